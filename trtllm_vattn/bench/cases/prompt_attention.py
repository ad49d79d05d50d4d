"""The part of `bench attention` that looks at prompts over flat KV: our kernel, cuDNN over a gathered copy, and other
libraries' FlashAttention-3 where it is installed and trusted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trtllm_vattn.attention import trust
from trtllm_vattn.attention.base import Attention, PackedPrefill, PrefillChunk, Span
from trtllm_vattn.attention.select import available, make_attention
from trtllm_vattn.attention.shares import SharesAttention
from trtllm_vattn.bench.harness.timing import Kernels, fill_flat, layers_us, refusal, summarise
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import VattnError

LAYERS = 4
POINTS = ((512, 512), (2048, 2048), (2048, 8192), (256, 100_000))
"""Rows of a chunk, and the sequence's length after it."""
ON_HOST = ((16, 16), (16, 40))
PROMPT = (2048, 2048)
COLUMNS = "rows length kernel layer_us.p50"


@torch.inference_mode()
def prompt_points(how: Kernels) -> dict[str, Any]:
    """Microseconds a layer of every point and kernel: ``points``; and ``missing``, who is not there and why."""
    gpu, device, num_heads = how.on_gpu, how.device, how.heads[0]
    points = POINTS if gpu else ON_HOST
    longest = max(length for _, length in points)
    shape = how.shape(LAYERS, 1, longest)
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    with make_cache("vattn", shape, device, lookahead=0) as cache:
        fill_flat(cache, np.array([longest]))
        slot = cache.slot_of(0)
        own = make_attention("shares", cache, num_heads)
        assert isinstance(own, SharesAttention)
        kernels: dict[str, tuple[Attention, Any]] = {"triton" if gpu else "torch": (own, None)}
        if gpu and available()["cudnn"] == "yes":
            kernels["gathered"] = (make_attention("cudnn", cache, num_heads), None)
        for name, (provider, _, _) in trust.PROVIDERS.items():
            why = trust.why_not(name, shape, num_heads)
            if why == "yes":
                kernels[name] = (own, provider(cache, num_heads, own.scale))
            else:
                missing[name] = why
        for count, length in points:
            packed, q = _chunk(count, length, slot, how)
            for name, (attention, planned_by_host) in kernels.items():
                own.host_planned = planned_by_host
                # What a kernel plans is kept for all layers, and for the capture: no step begins in between.
                attention.begin_step()

                def work(
                    layer: int, attention: Attention = attention, q: torch.Tensor = q, packed: PackedPrefill = packed
                ) -> None:
                    if attention.captures_prompts:
                        attention.prefill_packed(layer, q, packed)
                    else:
                        attention.prefill(layer, q, packed.chunks[0])

                try:
                    took = layers_us(work, LAYERS, how.repeats, cache.device)
                except (RuntimeError, VattnError) as error:
                    missing[f"{name}, {count} at {length}"] = refusal(error)
                    continue
                rows.append({"rows": count, "length": length, "kernel": name, "layer_us": summarise(took)})
    return {"points": rows, "missing": missing}


def _chunk(count: int, length: int, slot: int, how: Kernels) -> tuple[PackedPrefill, torch.Tensor]:
    """The last `count` tokens of a sequence of `length`, and their queries."""
    rows, end = (torch.tensor([n], dtype=torch.int32, device=how.device) for n in (count, length))
    chunk = PrefillChunk(count, torch.tensor([slot], device=how.device), rows, end, length)
    q = torch.randn(count, *how.heads[::2], dtype=how.dtype, device=how.device)
    return PackedPrefill([chunk], [Span(slot, length - count, length)]), q


def summary(result: dict[str, Any]) -> dict[str, float | str]:
    """Of `prompt_points`: a chunk of 2,048 tokens by the fastest kernel, its name, and the others."""
    of_prompt = [row for row in result["points"] if (row["rows"], row["length"]) == PROMPT]
    us = {row["kernel"]: row["layer_us"]["p50"] for row in of_prompt}
    if not us:
        return {}
    fastest = min((name for name in us if name != "gathered"), key=lambda name: us[name], default="gathered")
    named = {f"prompt_2048_{name.replace('-', '_')}_us": value for name, value in us.items()}
    return {"prompt_2048_us": us[fastest], "prompt_2048_provider": fastest, **named}
