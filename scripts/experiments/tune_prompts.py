"""How fast is attention for prompts under which settings, beside other libraries' kernels? For one GPU.

An experiment: ``python scripts/experiments/tune_prompts.py --help``. It prints microseconds a layer: a row a set of
chunks, a column a choice of settings (rows of a tile x keys at a time, warps, stages, programs a multiprocessor), then
 cuDNN over a gathered copy, and FlashAttention-3 of FlashInfer and vLLM where they may be
used. The best settings belong into the tables of trtllm_vattn/attention/prompt_launch.py. Each result is compared with
that of the first settings. Settings that do not fit, and whoever is not there, are said.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from trtllm_vattn.arguments import HEADS, heads
from trtllm_vattn.attention import trust
from trtllm_vattn.attention.base import PackedPrefill, PrefillChunk, Span
from trtllm_vattn.attention.cudnn import CudnnAttention
from trtllm_vattn.attention.prompt_launch import PromptPlan, PromptSettings, PromptWorkspace, attend, plan
from trtllm_vattn.attention.shares_launch import Features, programs_at_once, tensor_maps
from trtllm_vattn.cache.base import CacheShape, FlatKV, KVCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import VattnError
from trtllm_vattn.graphs.capture import captured, replays_ms
from trtllm_vattn.table import table

LAYERS = 4
MIXED = [64 * (i + 1) if i % 3 else 16 * (i + 1) for i in range(16)]
CASES: dict[str, list[tuple[int, int]]] = {
    "2048 at 2048": [(2048, 2048)],
    "512 at 512": [(512, 512)],
    "2048 at 8192": [(2048, 8192)],
    "2048 at 32768": [(2048, 32768)],
    "256 at 100000": [(256, 100_000)],
    "8 x 256 at 256..2048": [(256, 256 * (i + 1)) for i in range(8)],
    "16 mixed": [(rows, rows * (i % 4 + 1)) for i, rows in enumerate(MIXED)],
    "480 at 480": [(480, 480)],
    "64 at 4096": [(64, 4096)],
}
"""Rows and the sequence's length after them, of each chunk."""
SETTINGS = [
    *((128, 128, 8, stages, 1) for stages in (2, 3)),
    *((128, 64, 8, stages, 1) for stages in (2, 3, 4)),
    *((64, 128, 4, stages, 1) for stages in (2, 3)),
    *((64, 64, 4, stages, resident) for stages in (2, 3) for resident in (2, 3)),
    (128, 32, 8, 4, 1),
]
REPEATS = 15


def us_of(work: Callable[[], object]) -> float:
    """Microseconds a layer of work over all layers, captured."""
    return 1e3 * median(replays_ms(captured(work), REPEATS)) / LAYERS


def filled(chunks: list[tuple[int, int]], shape: list[int]) -> KVCache:
    """A cache whose slots hold the chunks' sequences."""
    _, kv_heads, dim = shape
    longest = max(length for _, length in chunks)
    cache = make_cache(
        "vattn", CacheShape(LAYERS, kv_heads, dim, torch.bfloat16, len(chunks), longest), "cuda:0", lookahead=0
    )
    for slot, (_, length) in enumerate(chunks):
        cache.admit(slot, length)
        for layer in range(LAYERS):
            kv = cache.layer(layer)
            assert isinstance(kv, FlatKV)
            kv.k[slot, :length].normal_()
            kv.v[slot, :length].normal_()
    return cache


def ours(
    cache: KVCache, chunks: list[tuple[int, int]], q: torch.Tensor, settings: PromptSettings
) -> tuple[float, torch.Tensor, str]:
    """Microseconds a layer, the result, and what the plan and the compiled kernel are like."""
    card = torch.cuda.get_device_properties(0)
    workspace = PromptWorkspace(q.device, card.multi_processor_count, q.shape[2])
    numbers, row = [], 0
    for slot, (rows, length) in enumerate(chunks):
        numbers.append([row, rows, length, slot])
        row += rows
    descriptors = torch.tensor(numbers, dtype=torch.int32, device="cuda")
    out = torch.empty_like(q)
    flat = [kv for kv in map(cache.layer, range(LAYERS)) if isinstance(kv, FlatKV)]
    tma = Features.of(q.device, flat[0]).tma
    maps = [tensor_maps(kv, settings.block_n) if tma else None for kv in flat]
    programs = card.multi_processor_count * settings.resident
    kernels: list[Any] = []

    def planned_now() -> PromptPlan:
        most = workspace.most_parts
        return plan(descriptors, len(q), 0, q.shape[1], cache.shape.num_kv_heads, settings, programs, most)

    planned = planned_now()

    def work() -> None:
        for kv, tiles in zip(flat, maps, strict=True):
            kernels.append(attend(q, kv, out, planned, workspace, q.shape[2] ** -0.5, tiles))

    work()
    fitting = programs_at_once(kernels[0], card.shared_memory_per_multiprocessor)
    if fitting < settings.resident:
        raise VattnError(f"{fitting} programs fit on a multiprocessor")
    us, plan_us = us_of(work), us_of(planned_now) * LAYERS
    pieces, kernel = int(planned.header[0]), kernels[0]
    how = f"{pieces} pieces a head, planned in {plan_us:.1f} us; {kernel.n_regs} registers, {kernel.n_spills} spilled"
    return us, out.clone(), how


def peers(cache: KVCache, chunks: list[tuple[int, int]], q: torch.Tensor) -> dict[str, float | str]:
    """Microseconds a layer of other libraries' kernels, or why there are none."""
    scale, spans = q.shape[2] ** -0.5, [Span(slot, end - rows, end) for slot, (rows, end) in enumerate(chunks)]
    made = []
    for slot, (rows, end) in enumerate(chunks):
        count, length = (torch.tensor([n], dtype=torch.int32, device="cuda") for n in (rows, end))
        made.append(PrefillChunk(rows, torch.tensor([slot], device="cuda"), count, length, end))
    result: dict[str, float | str] = {}
    packed = PackedPrefill(made, spans)
    try:
        cudnn = CudnnAttention(cache, q.shape[1], scale)

        def gathered() -> None:
            # What is planned for the first layer is kept: no step begins here.
            for layer in range(LAYERS):
                cudnn.prefill_packed(layer, q, packed) if len(chunks) > 1 else cudnn.prefill(layer, q, made[0])

        result["cuDNN gathered"] = us_of(gathered)
    except (RuntimeError, VattnError) as error:
        result["cuDNN gathered"] = str(error).splitlines()[0][:80]
    for name, (provider, _, _) in trust.PROVIDERS.items():
        why = trust.why_not(name, cache.shape, q.shape[1])
        if why != "yes":
            result[name] = why
            continue
        kernel = provider(cache, q.shape[1], scale)
        planned, out = kernel.plan(spans), torch.empty_like(q)

        def theirs(kernel: Any = kernel, planned: Any = planned, out: torch.Tensor = out) -> None:
            for layer in range(LAYERS):
                kernel.attend(layer, q, out, planned)

        result[name] = us_of(theirs)
    return result


@torch.inference_mode()
def main() -> int:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=heads, default=[32, 8, 128], metavar="Q,KV,SIZE", help=HEADS)
    parser.add_argument("--quick", action="store_true", help="few settings")
    parser.add_argument("--json", help="a file for all results")
    args = parser.parse_args()
    torch.manual_seed(0)
    every = [PromptSettings(*numbers) for numbers in (SETTINGS[:2] if args.quick else SETTINGS)]
    names = ["x".join(map(str, (s.block_m, s.block_n))) + f" {s.warps}w {s.stages}s {s.resident}r" for s in every]
    rows, results, told = [], {}, {}
    for case, chunks in CASES.items():
        with filled(chunks, args.heads) as cache:
            q = torch.randn(
                sum(r for r, _ in chunks), args.heads[0], args.heads[2], dtype=torch.bfloat16, device="cuda"
            )
            took: dict[str, float | str] = {}
            first = None
            for name, settings in zip(names, every, strict=True):
                try:
                    took[name], out, told[case, name] = ours(cache, chunks, q, settings)
                except Exception as error:
                    took[name] = str(error).strip().splitlines()[0][:80]
                    told[case, name] = str(took[name])
                    continue
                first = out if first is None else first
                error_of = float((out.float() - first.float()).norm() / first.float().norm())
                if not error_of < 1e-2:
                    took[name] = f"WRONG by {error_of:.0e}"
            took |= peers(cache, chunks, q)
            results[case] = took
            best = min((us for name in names if isinstance(us := took[name], float)), default=0.0)
            shown = [f"{us:.1f}{'*' if us == best else ''}" if isinstance(us, float) else "-" for us in took.values()]
            rows.append([case, *shown])
            print(case, {name: us if isinstance(us, str) else round(us, 1) for name, us in took.items()}, flush=True)
    for (case, name), text in told.items():
        print(f"  {case}: {name}: {text}")
    print(table(["us a layer", *results[case]], rows))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"results": results, "told": [[*key, text] for key, text in told.items()]}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
