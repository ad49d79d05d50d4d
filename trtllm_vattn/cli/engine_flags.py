"""Flags of commands that serve a checkpoint by an engine: `serve` and `generate`."""

from __future__ import annotations

import argparse
import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from trtllm_vattn.arguments import amount, json_object, output, positive, size
from trtllm_vattn.attention.options import KV_CACHE_DTYPES
from trtllm_vattn.bench.harness.flags import MAX_SEQS, add_device
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.sizes import USUAL_MAX_SEQ_LEN
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.values import shown

if TYPE_CHECKING:
    from trtllm_vattn.cache.compression import CompressionPolicy
    from trtllm_vattn.runtime.speculation import Speculation

T = TypeVar("T")


def speculative_config(text: str) -> Speculation:
    """How tokens are drafted, by vLLM's names: ``{"method": "ngram"}``, or ``{"model": "NAME"}`` for a draft model."""
    # With transformers, which takes seconds.
    from trtllm_vattn.runtime.speculation import Speculation

    given = json_object(text)
    return _made(Speculation, {"method": "draft_model" if "model" in given else "ngram", **given})


def compression_config(text: str) -> CompressionPolicy:
    """Which tokens are evicted: ``{"policy": "h2o"}`` or ``{"policy": "fastgen"}``, and parameters of its class."""
    from trtllm_vattn.cache.compression import H2O, FastGen

    policies: dict[str, Callable[..., CompressionPolicy]] = {"h2o": H2O, "fastgen": FastGen}
    given = json_object(text)
    name = given.pop("policy", None)
    if not isinstance(name, str) or name not in policies:
        raise argparse.ArgumentTypeError(f"policy is {shown(name)}; there are {', '.join(policies)}")
    return _made(policies[name], given)


def _made(kind: Callable[..., T], given: dict[str, Any]) -> T:
    known = inspect.signature(kind).parameters
    if unknown := [name for name in given if name not in known]:
        raise argparse.ArgumentTypeError(f"no {shown(unknown[0])} is known; there are {', '.join(known)}")
    try:
        return kind(**given)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


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
    text = "what keys and values are stored as: the model's own dtype, or eight bits (e4m3), in half the bytes or less"
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default=KV_CACHE_DTYPES[0], help=text)
    text = """how tokens are drafted that one step verifies: {"method": "ngram"}, or {"model": "NAME"} for a smaller
        model that drafts; with num_speculative_tokens and other fields (default: none are drafted)"""
    add("--speculative-config", type=speculative_config, metavar="JSON", help=text)
    text = """by which policy tokens are evicted, so that outputs are approximate: {"policy": "h2o", "heavy": 0.1,
        "recent": 0.1}, or "fastgen" and its fields (default: all are kept)"""
    add("--compression-config", type=compression_config, metavar="JSON", help=text)
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
        "kv_cache_dtype": args.kv_cache_dtype,
        "speculation": args.speculative_config,
        "compression": args.compression_config,
        "prefix_cache": False if args.no_prefix_cache else None,
        "deterministic": args.deterministic,
        "tensor_parallel": args.tensor_parallel or 1,
        "broker": TenantConfig(args.broker, args.tenant) if args.broker else None,
        "trace": args.event_trace,
    }


def show_start() -> None:
    """Have an engine's start say on stderr what it is at."""
    # With torch, which a parser does without.
    from trtllm_vattn.runtime.startup import progress

    progress.setLevel(logging.INFO)
