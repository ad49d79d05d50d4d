"""The kernels over latents against plain float64 attention. Run as ``python latents_probe.py DEVICE``, the device
``cpu`` (in Triton's interpreter: TRITON_INTERPRET=1) or a GPU. Everything past each length is NaN, or not mapped: a
load too far is seen, or ends the process."""

from __future__ import annotations

import sys

import torch

from trtllm_vattn.attention import latents
from trtllm_vattn.attention.base import PackedPrefill
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.select import make_cache

LENGTHS = (70, 1, 0, 33, 100)


class Probe:
    """A cache of latents, random up to each length, NaN behind it."""

    def __init__(self, device: str, row: int, heads: int) -> None:
        self.device, self.heads, self.row, self.worst = device, heads, row, 0.0
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        shape = CacheShape(1, 1, row, self.dtype, len(LENGTHS), 128, kv_factor=1)
        self.cache = make_cache("vattn", shape, device, layers_per_range=1, lookahead=0)
        self.rows = self.cache.layer(0).k
        for slot, length in enumerate(LENGTHS):
            assert self.cache.admit(slot, max(1, length)) == slot
            self.rows[slot, : int(self.cache.frontiers[slot])] = torch.nan
            self.rows[slot, :length] = torch.randn(length, 1, row, device=device).to(self.dtype)
        self.scale = 0.7 * row**-0.5

    def check(self, what: str, got: torch.Tensor, q: torch.Tensor, slot: int, sees: int) -> None:
        """Raise where the output of a query, q ``[heads, row]``, that sees so many tokens is another."""
        rows = self.rows[slot, :sees, 0].double()
        want = (q.double() @ rows.T * self.scale).softmax(-1) @ rows
        error = float((got.double() - want).norm() / want.norm())
        self.worst = max(self.worst, error)
        if not error < (1e-5 if self.device == "cpu" else 1e-2):
            raise SystemExit(f"{what}: error {error}")

    def lanes(self, queries: int, counts: list[int] | None, pieces: int) -> None:
        slots = [4, 2, 0, 3, 1]
        lengths = [LENGTHS[slot] for slot in slots]
        q = torch.randn(len(slots), queries, self.heads, self.row, device=self.device).to(self.dtype)
        out = torch.full_like(q, torch.nan)
        on_device = [torch.tensor(x, dtype=torch.int32, device=self.device) for x in (lengths, slots, counts or [0])]

        workspace = latents.LatentWorkspace(torch.device(self.device), 32, self.row)
        for each in workspace.storages():
            each.fill_(torch.nan)
        latents.launch_lanes(
            q,
            self.rows,
            out,
            on_device[0],
            None if counts is None else on_device[2],
            on_device[1],
            scale=self.scale,
            pieces=pieces,
            workspace=workspace,
        )
        assert out.isfinite().all(), "an output is not finite"
        for lane, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            count = (counts or [queries] * len(slots))[lane] if length else 0
            assert not out[lane, count:].any(), f"lane {lane}: queries past {count} are no zeros"
            for query in range(count):
                sees = length - count + 1 + query
                self.check(f"lane {lane}, query {query}", out[lane, query], q[lane, query], slot, sees)

    def chunks(self) -> None:
        # Rows of each chunk, its length, its slot; rows 2, 3 and those behind are nobody's.
        descriptors = [[0, 2, 33, 3], [4, 20, 100, 4], [24, 1, 1, 1], [0, 0, 0, 0]]
        q = torch.randn(28, self.heads, self.row, device=self.device).to(self.dtype)
        out = torch.full_like(q, 7.0)
        on_device = torch.tensor(descriptors, dtype=torch.int32, device=self.device)
        latents.launch_chunks(q, self.rows, out, on_device, scale=self.scale)
        for first, count, length, slot in descriptors:
            for row in range(count):
                sees = length - count + 1 + row
                self.check(f"row {row} of {count}", out[first + row], q[first + row], slot, sees)
        assert bool((out[2:4] == 7).all()), "rows of no chunk changed"
        assert bool((out[25:] == 7).all()), "rows of no chunk changed"

    def passes(self) -> None:
        """The backend: a mixed pass whose chunks begin in the row of an idle lane, and decode of one query."""
        torch_backend = TorchAttention(self.cache, self.heads, self.scale)
        attention = latents.LatentAttention(self.cache, self.heads, self.scale)
        if self.device == "cpu":
            # As over a GPU, with the kernels in the interpreter.
            attention._on_gpu, attention._multiprocessors = True, 2
            attention._most_rows = latents.most_rows(8)
            attention.prompts = latents.LatentPrompts(self.cache, self.scale, latents.most_rows(8))
            attention._workspace = latents.LatentWorkspace(torch.device("cpu"), 2, self.row)
        q = torch.randn(12, self.heads, self.row, device=self.device).to(self.dtype)
        lengths = torch.tensor([100, 33, 0], dtype=torch.int32, device=self.device)
        slots = torch.tensor([4, 3, 2], device=self.device)
        descriptors = torch.tensor([[2, 5, 70, 0], [8, 1, 1, 1]], dtype=torch.int32, device=self.device)
        attention.begin_step()
        got = attention.attend_mixed(0, q, lengths, slots, PackedPrefill([], descriptors=descriptors))
        want = torch_backend.attend_chunks(0, q, torch.zeros_like(q), descriptors)
        want[:2] = torch_backend.decode(0, q[:2], lengths[:2], slots[:2])
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
        got = attention.decode(0, q[:3], lengths, slots)
        torch.testing.assert_close(got[:2], want[:2], rtol=2e-2, atol=2e-2)
        assert not got[2].any(), "a lane of no tokens is no zeros"


def main(device: str) -> None:
    torch.manual_seed(0)
    sizes = [(24, 4), (40, 20)] if device == "cpu" else [(576, 16), (576, 128), (40, 20)]
    for row, heads in sizes:
        probe = Probe(device, row, heads)
        probe.lanes(1, None, 1)
        probe.lanes(1, None, 4)
        probe.lanes(3, [1, 2, 0, 3, 1], 2)
        probe.chunks()
        probe.passes()
        print(f"done rows of {row}, {heads} heads: {probe.worst:.1e}", flush=True)
        probe.cache.close()
    print("all cases passed", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1])
