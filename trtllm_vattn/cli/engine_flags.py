"""Flags of commands that serve a checkpoint by an engine: `serve` and `generate`."""

from __future__ import annotations

import argparse
from typing import Any

from trtllm_vattn.arguments import amount, output, positive, size
from trtllm_vattn.bench.harness.flags import MAX_SEQ_LEN, MAX_SEQS, add_device, add_model


def add_engine(parser: argparse.ArgumentParser, max_seqs: int) -> None:
    """Add ``--model``, ``--device`` and what an engine is given."""
    add_device(parser)
    add_model(parser, required=True)
    add = parser.add_argument
    add("--max-seqs", type=positive, default=max_seqs, metavar="SEQUENCES", help=MAX_SEQS)
    add("--max-seq-len", type=positive, default=4096, metavar="TOKENS", help=MAX_SEQ_LEN)
    text = "KV memory, as 40GiB (default: what is left of the GPU's; on the host, all sequences at full length)"
    add("--budget", type=size, metavar="BYTES", help=text)
    add("--host-memory", type=size, metavar="BYTES", help="for KV of preempted requests, as 32GiB (default: none)")
    add("--max-step-tokens", type=positive, default=2048, metavar="TOKENS", help="most tokens of a pass")
    text = "longest time between two tokens that prompts may cause (default: no limit)"
    add("--target-itl-ms", type=amount, metavar="MILLISECONDS", help=text)
    add("--no-prefix-cache", action="store_true", help="keep nothing of ended requests for prompts that begin alike")
    text = "note events for Perfetto there: driver calls, steps, requests, mappings (default: none)"
    add("--event-trace", type=output, metavar="FILE", help=text)
    add("--deterministic", action="store_true", help="one kernel of attention for all batches")


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Parameters of `Engine.from_pretrained` out of the flags."""
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
        "trace": args.event_trace,
    }
