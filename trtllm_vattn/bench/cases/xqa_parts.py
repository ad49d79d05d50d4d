"""Parts of `bench xqa` below the model: attention replayed over memory that is replaced, the host's time for tables;
and what affine tables are compared with: TensorRT-LLM's own layout of a paged pool, with blocks in random order."""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch

from trtllm_vattn.attention.base import PrefillChunk
from trtllm_vattn.attention.select import available, make_attention
from trtllm_vattn.bench.harness.timing import fill_random, summarise, timed_ms
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.cache.paged import PagedCache
from trtllm_vattn.graphs.capture import Outputs
from trtllm_vattn.graphs.replay import GraphRunner
from trtllm_vattn.memory.layout import BlockLayout
from trtllm_vattn.progress import counting
from trtllm_vattn.trtllm.tables import AffineTables, RowGatherer
from trtllm_vattn.verify.workload import CacheWorkload


class RandomBlocks(PagedCache):
    """One allocation ``[block][layer][K,V][head][token][dim]``, as the block layout has it; tables are random.

    Parameters
    ----------
    seed : int
        Of the order in which blocks are handed out.
    """

    def __init__(self, shape: CacheShape, device: torch.device | str, block_size: int, seed: int = 0) -> None:
        super().__init__(shape, device, block_size)
        self.shuffle_free_memory(seed)

    def _make_pools(self, size: tuple[int, int, int, int]) -> list[list[torch.Tensor]]:
        layers, factor = self.shape.num_layers, self.shape.kv_factor
        whole = torch.zeros((size[0], layers, factor, *size[1:]), dtype=self.shape.dtype, device=self.device)
        return [[whole[:, layer, field] for field in range(factor)] for layer in range(layers)]


class Remapping(CacheWorkload):
    """Sequences that stay, whose memory is replaced, beside one that comes and goes."""

    def __init__(self, cache: BlockKVCache, seed: int, sequences: int, longest: int) -> None:
        super().__init__(cache, seed)
        self.authors = {self.new(): [] for _ in range(sequences)}
        self.longest_prompt = longest

    def passing(self) -> None:
        """A sequence begins and ends."""
        self.admit()
        self.end(max(self.authors))


TOLERANCE = 2e-2
"""By how much outputs of the same inputs may differ where a kernel adds up in no fixed order; values are about 1."""


@torch.inference_mode()
def replay_remapped(cache: BlockKVCache, num_heads: int, context: int, replays: int, seed: int) -> dict[str, Any]:
    """Capture decode attention of all layers once; replay it, while other memory with the same bytes is put beneath its
    sequences, and memory is taken and given all around.

    `cache` is empty, and has slots for more sequences than take part. Returns counts: ``replays``, ``remaps``,
    ``graphs_captured``, ``bits_differ`` (replays whose bits are others than the first's), ``wrong`` (those that differ
    by more than the tolerance), ``worst``.
    """
    shape = cache.shape
    attention = make_attention("xqa", cache, num_heads)
    lanes = shape.num_slots - 1
    fill_random(attention, np.full(lanes, context))
    # Off block and page edges.
    lengths = torch.tensor([max(1, context - 7 * i) for i in range(lanes)], dtype=torch.int32)
    lengths = lengths.to(cache.device)
    q = torch.randn(shape.num_layers, lanes, num_heads, shape.head_dim, dtype=shape.dtype, device=cache.device)

    def step(bucket: int) -> Outputs:
        attention.begin_step()
        return tuple(attention.decode(layer, q[layer, :bucket], lengths) for layer in range(shape.num_layers))

    static = [*cache.storages(), *attention.storages(), q, lengths]
    runner = GraphRunner(step, [lanes], static, cache.device)
    captured = len(runner.capture().seconds)
    first = [output.clone() for output in runner.replay(lanes)]
    differing = torch.zeros(2, dtype=torch.int64, device=cache.device)
    worst = torch.zeros((), device=cache.device)
    workload = Remapping(cache, seed, lanes, context)
    for number in counting(range(replays), "replays", "replay"):
        workload.run_some({"replace": 0.25, "passing": 0.1, "take_away": 0.1})
        apart = torch.stack(
            [(a - b).abs().max().float() for a, b in zip(runner.replay(lanes), first, strict=True)]
        ).max()
        worst = torch.maximum(worst, apart)
        differing += torch.stack([apart > 0, ~(apart <= TOLERANCE)])
        if number % 1000 == 0:
            cache.check_integrity()
    bits, wrong = differing.tolist()
    runner.close()
    return {
        "replays": replays,
        "remaps": workload.replaced,
        "graphs_captured": captured,
        "bits_differ": bits,
        "wrong": wrong,
        "worst": float(worst),
    }


@torch.inference_mode()
def prefill_us(cache: BlockKVCache, num_heads: int, tokens: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Microseconds a layer of attention for a prompt of `tokens` in one chunk, by backend: cuDNN's kernel over a
    gathered copy (``xqa``), TensorRT-LLM's over the blocks (``xqa-fmha``), in turns; only backends that work on this
    machine."""
    shape, on_gpu = cache.shape, cache.device.type == "cuda"
    usable = available()
    kinds = [name for name in ("xqa", "xqa-fmha") if not on_gpu or usable[name] == "yes"]
    backends = {name: make_attention(name, cache, num_heads) for name in kinds}
    fill_random(backends["xqa"], np.array([tokens]))
    q = torch.randn(tokens, num_heads, shape.head_dim, dtype=shape.dtype, device=cache.device)
    query_len, length = (torch.tensor([tokens], dtype=torch.int32, device=cache.device) for _ in range(2))
    slot = torch.tensor([cache.slot_of(0)], device=cache.device)
    prompt = PrefillChunk(tokens, slot, query_len, length, tokens)

    def work(name: str) -> None:
        backends[name].begin_step()
        for layer in range(shape.num_layers):
            backends[name].prefill(layer, q, prompt)

    took: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(3):
        for name in kinds:
            took[name] += timed_ms(partial(work, name), repeats, cache.device)
    return {name: summarise([1e3 * value / shape.num_layers for value in values]) for name, values in took.items()}


def table_host(
    shape: CacheShape, granularity: int, tokens_per_block: int, device: str, rounds: int = 500
) -> dict[str, Any]:
    """Microseconds of the host for a step's table, ``[1, lanes, 2, blocks]``, when the batch is the one before and when
    it is another."""
    layout = BlockLayout(
        num_layers=shape.num_layers,
        layers_per_range=shape.num_layers,
        layer_token_bytes=shape.layer_token_bytes,
        max_seq_len=shape.max_seq_len,
        num_slots=shape.num_slots,
        granularity=granularity,
        tokens_per_block=tokens_per_block,
        kv_factor=shape.kv_factor,
    )
    width = layout.blocks_of(shape.max_seq_len)
    tables = AffineTables(layout, width, 0, torch.device(device))
    host = torch.zeros((1, shape.num_slots, 2, width), dtype=torch.int32, pin_memory=device != "cpu")
    rows = RowGatherer(
        tables, lambda ids: [number % shape.num_slots for number in ids], lambda ids: [1] * len(ids), host
    )
    table = torch.zeros(host.shape, dtype=torch.int32, device=device)
    ids = list(range(shape.num_slots))
    samples: dict[str, list[float]] = {"unchanged_us": [], "changed_us": []}
    for number in range(rounds):
        for name, epoch in (("changed_us", number + 1), ("unchanged_us", number + 1)):
            rows.epoch = epoch
            started = perf_counter()
            rows.fill(table, list(ids))
            samples[name].append(1e6 * (perf_counter() - started))
    return {"lanes": shape.num_slots, "blocks": width, **{name: summarise(each) for name, each in samples.items()}}
