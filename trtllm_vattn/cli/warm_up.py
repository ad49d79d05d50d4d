"""`trtllm-vattn warm-up`: compile once what would take minutes at a first request, and check what is to be trusted."""

from __future__ import annotations

import argparse
from time import perf_counter

import torch

from trtllm_vattn.arguments import HEADS, heads
from trtllm_vattn.attention import flashinfer_prompts, trust
from trtllm_vattn.cache.base import CacheShape

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add = parser.add_argument
    add("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of keys and values")
    add("--heads", type=heads, default="32,8,128", metavar="Q,KV,SIZE", help=HEADS)


def run(args: argparse.Namespace) -> int:
    """Compile and check the kernels for prompts of other libraries; 0 if one may be used now."""
    num_heads, num_kv_heads, head_dim = args.heads
    shape = CacheShape(1, num_kv_heads, head_dim, DTYPES[args.dtype], 1, 64)
    why = flashinfer_prompts.availability(shape)
    if flashinfer_prompts.COMMAND in why:
        print(f"compiling FlashInfer's FlashAttention-3 for heads of {head_dim} of {args.dtype}; this takes about")
        print("two minutes, once on this machine", flush=True)
        started = perf_counter()
        flashinfer_prompts.compile_kernel(head_dim, shape.dtype)
        print(f"compiled in {perf_counter() - started:.0f} s")
    usable = 0
    for name in trust.PROVIDERS:
        why = trust.why_not(name, shape, num_heads)
        usable += why == "yes"
        print(f"{name}: {'checked over unmapped memory, may be used' if why == 'yes' else why}")
    return 0 if usable else 1
