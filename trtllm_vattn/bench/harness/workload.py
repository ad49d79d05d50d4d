"""A request trace through one engine: token ids for requests of which only lengths are known, and the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from trtllm_vattn.bench.harness.contenders import observed
from trtllm_vattn.bench.harness.identity import RequestTokens
from trtllm_vattn.bench.harness.traces import PREFIX_BLOCK, Request
from trtllm_vattn.progress import Progress
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.request import StepRecord
from trtllm_vattn.runtime.sampling import SamplingParams


def prompt_ids(request: Request, index: int, vocab_size: int, seed: int) -> np.ndarray:
    """int64 ``[prompt_tokens]``, the same for the same arguments; equal prefix blocks give equal tokens."""
    own = np.random.default_rng([seed, 1, index])
    tokens = own.integers(0, vocab_size, request.prompt_tokens)
    for position, block in enumerate(request.prefix_blocks):
        part = tokens[position * PREFIX_BLOCK : (position + 1) * PREFIX_BLOCK]
        part[:] = np.random.default_rng([seed, 2, block]).integers(0, vocab_size, PREFIX_BLOCK)[: len(part)]
    return tokens


def prompts_of(requests: Sequence[Request], vocab_size: int, seed: int) -> list[list[int]]:
    """`prompt_ids` of every request."""
    return [prompt_ids(request, index, vocab_size, seed).tolist() for index, request in enumerate(requests)]


@dataclass
class MemorySamples:
    """Bytes of KV over time; `time_s` from the start of the run."""

    time_s: list[float] = field(default_factory=list)
    live_bytes: list[int] = field(default_factory=list)
    mapped_bytes: list[int] = field(default_factory=list)
    parked_bytes: list[int] = field(default_factory=list)

    def thinned(self, most: int = 400) -> dict[str, list[float] | list[int]]:
        """At most so many samples, evenly spaced."""
        step = max(1, -(-len(self.time_s) // most))
        return {name: values[::step] for name, values in vars(self).items()}


@dataclass
class TracedRun:
    """What one engine did with a trace."""

    tokens: RequestTokens
    steps: list[StepRecord]
    memory: MemorySamples
    seconds: float
    critical_path_maps: int


def run_traced(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[int],
    forced: RequestTokens | None = None,
    label: str = "",
) -> TracedRun:
    """Submit everything at once and step to the end; prompt i asks for ``outputs[i]`` tokens.

    With `forced`, the tokens of that run are fed, whatever this one chooses. Requests are numbered as the prompts are.
    """
    numbers = {}
    for index, (prompt, wanted) in enumerate(zip(prompts, outputs, strict=True)):
        fed = None if forced is None else [event.token for event in forced[index] if event.token is not None]
        numbers[engine.submit(prompt, SamplingParams(max_tokens=wanted, ignore_eos=True), fed)] = index
    run = TracedRun({index: [] for index in numbers.values()}, [], MemorySamples(), 0.0, 0)
    started = perf_counter()
    with Progress(label, sum(outputs), "token") as bar, observed(engine) as run.steps:
        while engine.busy:
            for event in engine.step():
                run.tokens[numbers[event.request]].append(event)
                bar.update()
            stats = engine.cache.stats()
            run.memory.time_s.append(perf_counter() - started)
            run.memory.live_bytes.append(stats.live_bytes)
            run.memory.mapped_bytes.append(stats.mapped_bytes)
            run.memory.parked_bytes.append(stats.parked_bytes)
    run.seconds = perf_counter() - started
    run.critical_path_maps = stats.critical_path_maps
    return run
