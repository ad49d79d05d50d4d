"""Attention over pages mapped exactly to each length, everything past it unmapped: a load too far ends the process.

Run as ``python overread_probe.py BACKEND LAYERS_PER_RANGE CACHE``, the cache ``vattn`` or ``blocks``; prints a line
before and after each case. With ``beyond`` behind, a lane claims more tokens than are mapped, which has to be noticed.
"""

from __future__ import annotations

import sys

import torch

from trtllm_vattn.attention.base import Attention, PackedPrefill, PrefillChunk, Span
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.select import make_cache

HEADS, LAYERS = 32, 32
LENGTHS = [1, 15, 16, 17, 33, 160, 1000, 1023, 1024, 1025, 4097, 0, 0, 2048]
"""Of slots 0 to 13; slots 11 and 12 hold no sequence and have nothing mapped at all."""


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q ``[rows, heads, dim]`` sees the last rows of k, v ``[tokens, kv_heads, dim]`` causally; float32."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("rhd,thd->hrt", q.float(), keys) * q.shape[2] ** -0.5
    ahead = torch.ones(len(q), len(k), device=q.device, dtype=torch.bool).triu(len(k) - len(q) + 1)
    return torch.einsum("hrt,thd->rhd", scores.masked_fill(ahead, -torch.inf).softmax(-1), values)


def kept(attention: Attention, layer: int, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V ``[length, kv_heads, dim]`` of a slot."""
    kv = attention.cache.layer(layer)
    if isinstance(kv, FlatKV):
        return kv.k[slot, :length], kv.v[slot, :length]
    positions, size = torch.arange(length, device="cuda"), kv.k.shape[1]
    where = kv.table[slot, positions // size].long(), positions % size
    return kv.k[where], kv.v[where]


def check(case: str, got: torch.Tensor, want: torch.Tensor) -> None:
    torch.cuda.synchronize()
    error = float((got.float() - want).norm() / want.norm())
    print(f"done {case}: error {error:.1e}", flush=True)
    if not (error < 1e-2 and bool(torch.isfinite(got).all())):
        raise SystemExit(f"{case}: wrong, error {error}")


def decode_cases(attention: Attention, slots: list[int] | None, layer: int) -> None:
    order = list(range(len(LENGTHS))) if slots is None else slots
    lengths = [LENGTHS[slot] for slot in order]
    case = f"decode of {'lanes' if slots is None else 'other slots'}, layer {layer}"
    print(f"start {case}", flush=True)
    q = torch.randn(len(order), HEADS, 128, device="cuda", dtype=torch.bfloat16)
    on_device = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    out = attention.decode(layer, q, on_device, None if slots is None else torch.tensor(slots, device="cuda"))
    want = torch.zeros_like(out, dtype=torch.float32)
    for lane, (slot, length) in enumerate(zip(order, lengths, strict=True)):
        if length:
            want[lane] = reference(q[lane][None], *kept(attention, layer, slot, length))[0]
        elif bool(out[lane].any()):
            raise SystemExit(f"{case}: a lane of length 0 gave something else than zeros")
    check(case, out, want)


def prefill_case(attention: Attention, slot: int, count: int, padded: int, layer: int) -> None:
    length = LENGTHS[slot]
    case = f"prefill of {count} tokens padded to {padded}, up to {length}, layer {layer}"
    print(f"start {case}", flush=True)
    q = torch.randn(padded, HEADS, 128, device="cuda", dtype=torch.bfloat16)
    sizes = (torch.tensor([n], dtype=torch.int32, device="cuda") for n in (count, length))
    out = attention.prefill(layer, q, PrefillChunk(padded, torch.tensor([slot], device="cuda"), *sizes, length))
    if not bool(torch.isfinite(out).all()):
        raise SystemExit(f"{case}: padding rows are not finite")
    check(case, out[:count], reference(q[:count], *kept(attention, layer, slot, length)))


def packed_case(attention: Attention, layer: int) -> None:
    """Chunks of several prompts, the last keys of each being the last that are mapped."""
    spans = [Span(slot, start, LENGTHS[slot]) for slot, start in ((5, 0), (8, 1000), (0, 0), (13, 512), (4, 1))]
    case = f"prefill of {len(spans)} chunks packed, layer {layer}"
    print(f"start {case}", flush=True)
    counts = [span.end - span.start for span in spans]
    q = torch.randn(sum(counts) + 9, HEADS, 128, device="cuda", dtype=torch.bfloat16)
    chunks = [
        PrefillChunk(
            count,
            torch.tensor([span.slot], device="cuda"),
            *(torch.tensor([n], dtype=torch.int32, device="cuda") for n in (count, span.end)),
            span.end,
        )
        for span, count in zip(spans, counts, strict=True)
    ]
    out = attention.prefill_packed(layer, q, PackedPrefill(chunks, spans))
    if not bool(torch.isfinite(out).all()):
        raise SystemExit(f"{case}: padding rows are not finite")
    rows = zip(spans, q[: sum(counts)].split(counts), strict=True)
    want = [reference(mine, *kept(attention, layer, span.slot, span.end)) for span, mine in rows]
    check(case, out[: sum(counts)], torch.cat(want))


def claim_too_much(attention: Attention) -> None:
    lengths = [0] * len(LENGTHS)
    lengths[4] = 4096
    print(f"start decode of {lengths[4]} tokens where {LENGTHS[4]} are", flush=True)
    q = torch.randn(len(lengths), HEADS, 128, device="cuda", dtype=torch.bfloat16)
    attention.decode(0, q, torch.tensor(lengths, dtype=torch.int32, device="cuda"))
    torch.cuda.synchronize()
    print("nobody noticed", flush=True)


def main(backend: str, layers_per_range: int, kind: str, beyond: bool) -> None:
    shape = CacheShape(LAYERS, 8, 128, torch.bfloat16, len(LENGTHS), 8192)
    with make_cache(kind, shape, "cuda:0", 8 << 30, layers_per_range=layers_per_range, lookahead=0) as cache:
        attention = make_attention(backend, cache, HEADS)
        for slot, length in enumerate(LENGTHS):
            # Slots are taken in order, so empty ones are taken for a moment and given up with nothing parked in them.
            cache.admit(slot, max(1, length))
        for slot, length in enumerate(LENGTHS):
            for layer in (0, LAYERS - 1):
                if length:
                    kv = torch.randn(2, length, 8, 128, device="cuda", dtype=torch.bfloat16)
                    where = (torch.full((length,), slot, device="cuda"), torch.arange(length, device="cuda"))
                    attention.write(layer, *kv, *where)
        for slot in (11, 12):
            cache.release(slot)
        cache.arena.reclaim(cache.arena.parked_bytes)  # type: ignore[attr-defined]
        if any(cache.arena.slots[slot].mapped for slot in (11, 12)):  # type: ignore[attr-defined]
            raise SystemExit("slots 11 and 12 are still mapped")
        if beyond:
            return claim_too_much(attention)
        for layer in (0, LAYERS - 1):
            decode_cases(attention, None, layer)
            decode_cases(attention, [11, 10, 3, 13, 12, 8, 2, 0], layer)
            for slot, count, padded in ((2, 16, 16), (2, 1, 16), (8, 1024, 1024), (8, 24, 32), (8, 1000, 1024)):
                prefill_case(attention, slot, count, padded, layer)
            for slot, count, padded in ((10, 97, 128), (6, 1000, 1024), (13, 512, 512), (13, 2048, 2048)):
                prefill_case(attention, slot, count, padded, layer)
            packed_case(attention, layer)
    print("all cases passed", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:] == ["beyond"])
