"""Part of `bench compression`: attention over latents at the sizes of DeepSeek-V2-Lite and V3."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.bench.harness.recording import Recording
from trtllm_vattn.bench.harness.timing import timed_ms
from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.select import make_cache

ROW, LAYERS = 576, 4


def latents(recording: Recording) -> Iterator[dict[str, Any]]:
    """Microseconds a layer of decoding `--batch` sequences of `--context` tokens, of 16 and of 128 query heads, and the
    bytes of latents that were read in that time; on the host by torch, of small rows."""
    args = recording.args
    gpu, device = args.device != "cpu", torch.device(args.device)
    dtype = torch.bfloat16 if gpu else torch.float32
    shape = CacheShape(LAYERS, 1, ROW if gpu else 24, dtype, args.batch, args.context, kv_factor=1)
    generator = torch.Generator(device).manual_seed(args.seed)
    with make_cache("vattn", shape, args.device, lookahead=0) as cache, torch.inference_mode():
        for slot in range(args.batch):
            cache.admit(slot, args.context)
        for layer in range(LAYERS):
            kv = cache.layer(layer)
            assert isinstance(kv, FlatKV)
            for slot in range(args.batch):
                kv.k[slot, : args.context].normal_(generator=generator)
        lengths = torch.full((args.batch,), args.context, dtype=torch.int32, device=device)
        for heads in (16, 128) if gpu else (4,):
            attention = make_attention("auto", cache, heads)
            q = torch.randn(args.batch, heads, shape.head_dim, generator=generator, device=device).to(dtype)

            def all_layers(attention: Any = attention, q: torch.Tensor = q) -> None:
                attention.begin_step()
                for layer in range(LAYERS):
                    attention.decode(layer, q, lengths)

            took = median(timed_ms(all_layers, 10, device)) / LAYERS
            read = args.batch * args.context * shape.layer_token_bytes
            yield {
                "latents_backend": attention.name,
                f"latents_us_a_layer_{heads}_heads": 1e3 * took,
                f"latents_gb_per_s_{heads}_heads": read / took / 1e6,
            }
