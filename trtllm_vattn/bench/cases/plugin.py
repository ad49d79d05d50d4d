"""`bench plugin`: the TensorRT plugin called as TensorRT calls it, captured once, replayed while memory moves.

No TensorRT runtime takes part: the calls are those of `plugins.emulated`. Sequences come and go, their pages are
replaced, parked memory is taken away and given back, and every output that is checked can be computed from the tokens
alone. Beside it the same layers are timed without the plugin.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median
from types import FrameType
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

import trtllm_vattn
from trtllm_vattn import plugins
from trtllm_vattn.arguments import adder
from trtllm_vattn.bench.cases.plugin_layers import EmulatedLayers
from trtllm_vattn.bench.harness.case import Recording
from trtllm_vattn.bench.harness.flags import MAX_SEQ_LEN, add_attention, add_common, dtype_of
from trtllm_vattn.bench.harness.timing import fill_flat, summarise, timed_ms
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.graphs.capture import captured, replays_ms
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.graphs.replay import GraphRunner
from trtllm_vattn.plugins import plain, registry
from trtllm_vattn.plugins.fields import AttentionFields, Slots
from trtllm_vattn.plugins.tensorrt import MODULES, load_tensorrt
from trtllm_vattn.progress import counting
from trtllm_vattn.runtime.models import SHAPES
from trtllm_vattn.verify.workload import CacheWorkload
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.wrappers import CountingDriver

NAME = "bench-plugin"
PROMPT = 64
"""Most tokens of a sequence's prompt."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench plugin`."""
    add = adder(parser, gpu := add_common(parser))
    text = "whose plugin classes; auto is TensorRT's where it is installed, plain needs none"
    parser.add_argument("--module", default="auto", choices=["auto", *MODULES, "plain"], help=text)
    add_attention(parser)
    add("--lanes", "SEQUENCES", "sequences of a decode step", 32, 4)
    add("--max-seq-len", "TOKENS", MAX_SEQ_LEN, 4096, 128)
    add("--context", "TOKENS", "tokens of each sequence where steps are timed", 2048, 64)
    add("--execution-contexts", "CONTEXTS", "TensorRT's execution contexts; each is captured once", 2, dest="contexts")
    add("--replays", "REPLAYS", "replays over remapped memory, in all", 10_000, 200)
    parser.set_defaults(check_every=50 if gpu else 10)
    add("--rounds", "TURNS", "turns that each kind of step, with the plugin and without, takes", 20, 3)


class PluginWorkload(CacheWorkload):
    """Sequences whose prompts the plugin's context phase puts in; token t of one has the row ``(t + offset) mod rows``
    of the layers' tables.

    Attributes
    ----------
    offsets : numpy.ndarray
        int64 ``[lanes]``, by slot.
    """

    def __init__(self, cache: KVCacheManager, layers: EmulatedLayers, seed: int) -> None:
        super().__init__(cache, seed)
        self.layers, self.budget = layers, cache.budget_bytes
        self.longest_prompt = min(PROMPT, cache.shape.max_seq_len // 2)
        self.offsets = np.zeros(cache.shape.num_slots, np.int64)

    def write(self, sequence: int, tokens: range) -> None:
        if tokens.start == 0:
            slot = self.cache.slot_of(sequence)
            self.offsets[slot] = self.random.randrange(1 << 20)
            self.layers.prefill(slot, int(self.offsets[slot]), len(tokens), PROMPT)

    def squeeze(self) -> None:
        """Lower the budget to what sequences use, which unmaps all parked memory; then restore it."""
        self.cache.set_budget(self.cache.stats().mapped_bytes + self.cache.bytes_of(1))
        self.cache.set_budget(self.budget)

    def churn(self) -> None:
        """Sequences end and begin, pages are replaced, parked memory is taken away."""
        for sequence in [
            each for each, tokens in self.authors.items() if len(tokens) + 2 >= self.cache.shape.max_seq_len
        ]:
            self.end(sequence)
        self.run_some({"release": 1 / 3, "squeeze": 1 / 20, "replace": 1 / 5})
        lanes = len(self.offsets) - self.random.randint(0, 1)
        while len(self.authors) < lanes:
            self.admit()


class PluginBenchmark:
    """A cache without a model, and the plugin's layers over it."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.model not in SHAPES:
            raise ConfigError(f"no shape {args.model!r}: no weights are needed here, give one of {', '.join(SHAPES)}")
        if args.max_seq_len < 4:
            raise ConfigError(
                f"--max-seq-len is {args.max_seq_len}: prompts are shorter than half of it; give 4 or more"
            )
        self.args = args
        config = AutoConfig.for_model(**SHAPES[args.model])
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dtype = dtype_of(args.device)
        shape = CacheShape(
            config.num_hidden_layers, config.num_key_value_heads, dim, dtype, args.lanes, args.max_seq_len
        )
        self.driver = CountingDriver(open_driver(args.device))
        self.cache = KVCacheManager(shape, self.driver)
        self.cache.set_budget(self.cache.layout.num_ranges * self.cache.layout.range_bytes)
        trt = self._module()
        fields = AttentionFields(
            NAME,
            0,
            config.num_attention_heads,
            shape.num_kv_heads,
            dim,
            dim**-0.5,
            0,
            str(dtype).removeprefix("torch."),
            0,
            int(Slots.CONTEXT),
            1,
        )
        self.trt = trt
        attached = registry.attach(NAME, self.cache, args.attention)
        attention = attached.attention(fields.num_heads, fields.scale)
        self.backend = attention.name
        self.guard = Guard(self.cache, attention.over_read)
        self.layers = EmulatedLayers(trt, fields, attached, args.lanes, args.contexts, args.seed)
        self.workload = PluginWorkload(self.cache, self.layers, args.seed)
        self.python_calls = 0
        self._ours = tuple(
            str(Path(path).resolve()) for path in (*plugins.__path__, f"{next(iter(trtllm_vattn.__path__))}/attention")
        )

    def _module(self) -> Any:
        if self.args.module == "plain":
            return plain
        try:
            return load_tensorrt(self.args.module)
        except ConfigError:
            if self.args.module != "auto":
                raise
            return plain

    # -- sequences -------------------------------------------------------------------------------------------------

    def _upload(self, lengths: dict[int, int]) -> None:
        lanes = np.zeros(self.args.lanes, np.int32)
        for slot, length in lengths.items():
            lanes[slot] = length
        self.layers.integers["lengths"].copy_(torch.from_numpy(lanes))
        self.layers.offsets.copy_(torch.from_numpy(self.workload.offsets))

    def prepare(self) -> np.ndarray:
        """Map the next step's tokens, run the guard, and copy the lengths to the device."""
        cache = self.cache
        self.workload.step()
        lengths: np.ndarray = cache.lengths.copy()
        slots = np.where(lengths > 0, np.arange(len(lengths)), cache.dummy_slot)
        self.guard.check(lengths, slots, np.maximum(lengths - 1, 0))
        self._upload({slot: int(lengths[slot]) for slot in np.flatnonzero(lengths).tolist()})
        return lengths

    # -- measuring -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def replays(self) -> dict[str, Any]:
        """Capture each execution context once; then replay, change sequences and memory, and check outputs."""
        args, layers = self.args, self.layers
        for _ in range(args.lanes):
            self.workload.admit()
        # Eager first: shapes are planned, and the reference must be met without a graph, too.
        self.prepare()
        layers.step(0, args.lanes)
        eager_error = self._check()
        runners = []
        for context in range(args.contexts):
            runner = GraphRunner(partial(layers.step, context), [args.lanes], layers.static, self.cache.device)
            self._upload({})
            runner.capture()
            runners.append(runner)
        enqueued, remapped = layers.enqueued, self._remaps()
        prompts = 0
        worst, checks = 0.0, 0
        for turn in counting(range(args.replays), "replays", "replay"):
            before = layers.enqueued
            self.workload.churn()
            prompts += layers.enqueued - before
            self.prepare()
            self._counted(partial(runners[turn % len(runners)].replay, args.lanes))
            if turn % args.check_every == 0 or turn == args.replays - 1:
                worst, checks = max(worst, self._check()), checks + 1
        self.cache.check_integrity()
        for runner in runners:
            runner.close()
        return {
            "replays": args.replays,
            "graphs": len(runners),
            "remaps": self._remaps() - remapped,
            "sequences": self.workload.new(),
            "checks": checks,
            "eager_error": eager_error,
            "worst_error": worst,
            "enqueues_during_replay": layers.enqueued - enqueued - prompts,
            "python_calls_during_replay": self.python_calls,
        }

    def _remaps(self) -> int:
        """Mappings made and taken away so far."""
        return self.driver.calls["map"] + self.driver.calls["unmap"]

    def _check(self) -> float:
        """The largest distance of any lane's output from the reference, over some layers."""
        count = len(self.layers.fields)
        some = {0, count - 1, self.workload.random.randrange(count)}
        errors = [
            self.layers.error(layer, slot, int(self.workload.offsets[slot]), int(self.cache.lengths[slot]))
            for layer in some
            for slot in np.flatnonzero(self.cache.lengths).tolist()
        ]
        return max(errors)

    def _counted(self, replay: Callable[[], object]) -> None:
        """Count the Python functions of the plugin and of attention that a replay calls."""

        def count(frame: FrameType, event: str, argument: object) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(self._ours):
                self.python_calls += 1

        sys.setprofile(count)
        try:
            replay()
        finally:
            sys.setprofile(None)

    @torch.inference_mode()
    def times(self) -> dict[str, Any]:
        """Captured steps of all layers, with the plugin and without, in turns."""
        args, cache, layers = self.args, self.cache, self.layers
        for slot in np.flatnonzero(cache.lengths).tolist():
            cache.release(cache.sequence_at(slot))
        fill_flat(cache, np.full(args.lanes, args.context))
        lengths = torch.full((args.lanes,), args.context, dtype=torch.int32)
        layers.integers["lengths"].copy_(lengths)
        slots = torch.arange(args.lanes, device=cache.device)
        positions = torch.full_like(slots, args.context - 1)
        steps: dict[str, Callable[[int], object]] = {
            "plugin": layers.plugin_alone,
            "without": lambda bucket: layers.without_plugin(bucket, slots, positions),
        }
        works = {name: partial(step, args.lanes) for name, step in steps.items()}
        on_gpu = cache.device.type == "cuda"
        graphs = {name: captured(work) for name, work in works.items()} if on_gpu else {}
        samples: dict[str, list[float]] = {name: [] for name in works}
        ratios = []
        for turn in range(args.rounds):
            for name in list(works) if turn % 2 else list(works)[::-1]:
                took = replays_ms(graphs[name], 5) if on_gpu else timed_ms(works[name], 5, cache.device)
                samples[name].append(mean(took))
            ratios.append(samples["plugin"][-1] / samples["without"][-1])
        return {
            **{f"{name}_ms": summarise(values) for name, values in samples.items()},
            "captured": on_gpu,
            "by_round": summarise(ratios),
            "step_ratio": median(samples["plugin"]) / median(samples["without"]),
        }

    def close(self) -> None:
        registry.detach(NAME)
        self.cache.close()


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where an output was wrong, or Python ran in a replay."""
    benchmark, recording = PluginBenchmark(args), Recording("plugin", args)
    tolerance = 1e-4 if dtype_of(args.device) == torch.float32 else 2e-2
    recording.sum_up(
        module=benchmark.trt.__name__.rpartition(".")[2],
        attention=benchmark.backend,
        layers=benchmark.cache.shape.num_layers,
    )

    def replays(recording: Recording) -> list[dict[str, Any]]:
        found = recording.results["replays"] = benchmark.replays()
        names = ("python_calls_during_replay", "replays", "remaps", "graphs", "checks")
        return [{name: found[name] for name in (*names, "worst_error", "eager_error", "enqueues_during_replay")}]

    def times(recording: Recording) -> list[dict[str, Any]]:
        found = recording.results["times"] = benchmark.times()
        # On the host every step runs in Python, plugin or not: another figure.
        return [{"step_ratio" if found["captured"] else "eager_step_ratio": found["step_ratio"]}]

    try:
        recording.measure({"replays": replays, "times": times})
    finally:
        benchmark.close()
    summary, wrong = recording.summary, []
    if (error := max(summary.get("worst_error", 0.0), summary.get("eager_error", 0.0))) > tolerance:
        wrong.append(f"an output is {error:.3g} from the reference, more than {tolerance}")
    if summary.get("python_calls_during_replay") or summary.get("enqueues_during_replay"):
        wrong.append("Python ran in a replay")
    return recording.conclude(wrong=wrong)
