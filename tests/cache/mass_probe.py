"""The kernels that add up attention (mass_kernel.py) against torch. Run as ``python mass_probe.py DEVICE``, the device
``cpu`` (in Triton's interpreter: TRITON_INTERPRET=1) or a GPU."""

from __future__ import annotations

import sys

import torch

from trtllm_vattn.cache.compression import mass

CASES = [
    (40, 40, 2, 3, 16),
    (140, 9, 2, 1, 64),
    (130, 17, 1, 4, 96),
    (1, 1, 1, 2, 32),
    (70, 5, 1, 2, 256),
    (20, 3, 1, 2, 8),
]
"""Tokens held, queries, KV heads, query heads of each, head size."""


def main(device: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for held, count, heads, group, dim in CASES:
        queries = 3 * torch.randn(count, heads, group, dim, device=device).to(dtype)
        # Tokens of a slot, whose rows hold more than these keys; what lies behind them is NaN.
        rows = torch.full((held + 64, 2, heads, dim), torch.nan, device=device, dtype=dtype)
        rows[:held] = torch.randn(held, 2, heads, dim, device=device).to(dtype)
        keys = rows[:held, 0]
        evicted = torch.rand(heads, held, device=device).argsort(1)
        positions = (evicted.sort(1).values + 5).contiguous()
        first = int(positions[0, -1]) - count + 1
        for local in (None, 1, held // 3 + 1):
            some = mass.maps(queries.double(), keys.double(), dim**-0.5).double()
            at = first + torch.arange(count, device=device)
            near = torch.ones_like(positions[:, None] > at[:, None])
            if local is not None:
                near = positions[:, None] > at[:, None] - local
            want = (some * near[:, None]).sum(dim=(1, 2))
            got = mass.by_kernel(queries, keys, dim**-0.5, positions, first, local)
            error = float((got.double() - want).abs().max() / want.abs().max())
            assert got.shape == (heads, held)
            assert error < 1e-4, (held, count, local, error)
            if local is None:
                assert abs(float(got.sum()) / (heads * group * count) - 1) < 1e-4, "rows do not add up to 1"
    print("all cases passed", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1])
