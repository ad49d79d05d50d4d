"""Flags of commands that serve a checkpoint by an engine: `serve` and `generate`."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from trtllm_vattn.arguments import amount, output, positive, size
from trtllm_vattn.bench.harness.flags import MAX_SEQS, add_device
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.sizes import USUAL_MAX_SEQ_LEN
from trtllm_vattn.tenancy.config import TenantConfig


def add_engine(parser: argparse.ArgumentParser, max_seqs: int) -> None:
    """Add ``--model``, ``--device`` and what an engine is given."""
    add_device(parser)
    add = parser.add_argument
    text = "checkpoint with a tokenizer: a folder as save_pretrained writes it, or a name on the Hugging Face Hub"
    add("--model", metavar="MODEL", required=True, help=text)
    add("--max-seqs", type=positive, default=max_seqs, metavar="SEQUENCES", help=MAX_SEQS)
    text = "longest sequence, prompt and output together; longer ones are refused (default: "
    add("--max-seq-len", type=positive, metavar="TOKENS", help=f"{text}{USUAL_MAX_SEQ_LEN}, or the model's positions)")
    text = "KV memory, as 40GiB (default: what is left of the GPU's; on the host, all sequences at full length)"
    add("--budget", type=size, metavar="BYTES", help=text)
    add("--host-memory", type=size, metavar="BYTES", help="for KV of preempted requests, as 32GiB (default: none)")
    text = "most tokens of a pass (default: 4096 on a GPU of 70 GiB or more, else 2048)"
    add("--max-step-tokens", type=positive, metavar="TOKENS", help=text)
    text = "longest time between two tokens that prompts may cause (default: no limit)"
    add("--target-itl-ms", type=amount, metavar="MILLISECONDS", help=text)
    add("--no-prefix-cache", action="store_true", help="keep nothing of ended requests for prompts that begin alike")
    text = "the bits of a request depend on nothing of its batch; nothing is kept for prompts that begin alike then"
    add("--deterministic", action="store_true", help=text)
    text = "processes, each with a GPU, that the model is divided over (default: those of torchrun, or 1)"
    add("--tensor-parallel", type=positive, metavar="COUNT", help=text)
    text = "keys and values lie in memory that the broker at this socket lends (default: in the process's own)"
    add("--broker", metavar="FILE", help=text)
    text = "what the broker's operator calls this process, as in `broker limits` (default: pid- and its number)"
    add("--tenant", metavar="NAME", help=text)
    text = "note events for Perfetto there: driver calls, steps, requests, mappings (default: none)"
    add("--event-trace", type=output, metavar="FILE", help=text)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Parameters of `Engine.from_pretrained` out of the flags. Raises ConfigError for a tenant of no broker."""
    if args.tenant and not args.broker:
        raise ConfigError("--tenant names a process to a broker, and there is none; give --broker its socket")
    return {
        "device": args.device,
        "max_seqs": args.max_seqs,
        "max_seq_len": args.max_seq_len,
        "budget": args.budget,
        "host_memory": args.host_memory or 0,
        "max_step_tokens": args.max_step_tokens,
        "target_itl_ms": args.target_itl_ms,
        "prefix_cache": False if args.no_prefix_cache else None,
        "deterministic": args.deterministic,
        "tensor_parallel": args.tensor_parallel or 1,
        "broker": TenantConfig(args.broker, args.tenant) if args.broker else None,
        "trace": args.event_trace,
    }


def show_start() -> None:
    """Have an engine's start say on stderr what it is doing."""
    # With torch, which a parser does without.
    from trtllm_vattn.runtime.startup import progress

    progress.setLevel(logging.INFO)
