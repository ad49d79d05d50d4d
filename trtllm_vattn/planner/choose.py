"""`plan`: the layout, lookahead and limits that serve the most tokens within memory and latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.planner.lengths import Lengths
from trtllm_vattn.planner.memory import CLASSES, Layout
from trtllm_vattn.planner.time import CostModel, Load, StepParts
from trtllm_vattn.values import finite, whole

CHUNKS = (256, 512, 1024, 2048, 4096, 8192)
"""Tokens of a pass to choose from."""
USUAL_CHUNK = 2048
LOOKAHEADS = (None, 0, 16, 64, 256)
ALIKE = 5e-3
"""Part of the throughput within which two choices count as equal: the one with less to do for the driver goes first."""
RARE = 0.01
"""Part of the passes; what is rarer does not show in the 99th percentile."""
Z99 = 2.326
"""Standard deviations to the 99th percentile of a sum of many lengths."""


@dataclass(frozen=True)
class Objective:
    """What is asked of a plan.

    Parameters
    ----------
    budget : int
        Bytes of KV memory.
    itl_p99_s : float or None
        Seconds between two tokens that 99 % are to stay within.
    max_seqs : int
        Sequences that run at once, at most.
    chunks : sequence of int
        Tokens of a pass to choose from.
    """

    budget: int
    itl_p99_s: float | None = None
    max_seqs: int = 256
    chunks: Sequence[int] = CHUNKS

    def __post_init__(self) -> None:
        whole("the budget", self.budget, 1)
        whole("max_seqs", self.max_seqs, 1)
        if self.itl_p99_s is not None and finite("itl_p99", self.itl_p99_s) <= 0:
            raise ConfigError(f"itl_p99 is {self.itl_p99_s} s; it is above 0")
        if not self.chunks:
            raise ConfigError("chunks are empty; give one number of tokens at least")
        for chunk in self.chunks:
            whole("a chunk", chunk, 1)


@dataclass(frozen=True)
class Prediction:
    """What one choice gives.

    Attributes
    ----------
    layout : Layout
    chunk : int
        Tokens of a pass (`Engine`'s ``max_step_tokens``).
    max_seqs : int
        Sequences to let run at once: fewer than asked for where more would not be within the latency.
    sequences : float
        That run at once, on average.
    capacity : float
        That memory alone would let run at once, on average.
    waste : float
        Part of the mapped bytes that holds no token.
    step_s, itl_p99_s, window_s : float
        Seconds of a decode step (p50), between two tokens (p99), and to admit the prompts of all sequences at once.
    output_tokens_per_s : float
    parts : StepParts
        Of a decode step.
    binds : str
        What keeps it from more: ``memory``, ``bandwidth``, ``driver calls``, ``TLB``, ``host``, ``prompts`` (their
        computation), or ``max_seqs``.
    """

    layout: Layout
    chunk: int
    max_seqs: int
    sequences: float
    capacity: float
    waste: float
    step_s: float
    itl_p99_s: float
    window_s: float
    output_tokens_per_s: float
    parts: StepParts
    binds: str


@dataclass(frozen=True)
class Plan:
    """The choice, and all others in their order."""

    ranked: tuple[Prediction, ...]

    @property
    def best(self) -> Prediction:
        return self.ranked[0]

    def runners_up(self, count: int = 4) -> list[Prediction]:
        """The best of each other number of layers a range, in their order."""
        seen = {_kind(self.best)}
        found = []
        for each in self.ranked[1:]:
            if _kind(each) not in seen:
                seen.add(_kind(each))
                found.append(each)
        return found[:count]


def _kind(each: Prediction) -> int:
    return each.layout.layers_per_range


def memory_of(model: CostModel, layout: Layout, lengths: Lengths, objective: Objective) -> tuple[float, float]:
    """Sequences that memory alone lets run at once, and the part of it that is wasted."""
    step_s = model.step_s(layout, 1, lengths.mean_tokens)
    # The automatic lookahead depends on the step's time, and that on how many run.
    for _ in range(2):
        ahead = layout.ahead_tokens(step_s, model.page_s())
        capacity = layout.capacity(lengths, ahead, objective.budget)
        running = max(1.0, min(capacity, objective.max_seqs))
        step_s = model.step_s(layout, running, running * lengths.mean_tokens)
    return capacity, layout.waste(lengths, ahead)


def predict(
    model: CostModel,
    layout: Layout,
    lengths: Lengths,
    objective: Objective,
    chunk: int,
    memory: tuple[float, float] | None = None,
) -> Prediction | None:
    """What a layout and a chunk give; None where no sequence runs within the objective. `memory` is what `memory_of`
    returns, where it is known."""
    capacity, waste = memory or memory_of(model, layout, lengths, objective)
    if capacity < 1:
        return None
    of_memory = min(capacity, float(objective.max_seqs))
    # Every pass brings (chunk - n) / p new sequences, and each lives for so many passes as it has outputs.
    p, o = lengths.mean_prompt, lengths.mean_output
    of_prompts = max(1.0, o * chunk / (p + o))
    most = min(of_memory, of_prompts)
    sequences = _within(model, layout, lengths, objective, chunk, most)
    if sequences is None:
        return None
    load = Load(sequences, sequences * lengths.mean_tokens)
    parts = model.parts(layout, load)
    full = model.parts(layout, model.full_pass(load.sequences, load.kv_tokens, chunk, p)).total
    of_token = max(0.0, full - parts.total) / max(1.0, chunk - sequences)
    rate = o / (p * of_token + o * parts.total / sequences)
    by_latency = sequences < most
    if by_latency:
        binds = parts.binds
    elif most < of_memory:
        binds = "prompts"
    else:
        binds = "memory" if capacity <= objective.max_seqs else "max_seqs"
    if binds in ("memory", "max_seqs", "prompts") and parts.binds != "bandwidth":
        binds = parts.binds
    sample = lengths.sample
    window = model.window_s(layout, sample) * sequences / len(sample)
    itl = _itl_p99(model, layout, lengths, objective, chunk, sequences)
    limit = int(sequences) if by_latency else objective.max_seqs
    return Prediction(layout, chunk, limit, sequences, capacity, waste, parts.total, itl, window, rate, parts, binds)


def _within(
    model: CostModel, layout: Layout, lengths: Lengths, objective: Objective, chunk: int, most: float
) -> float | None:
    """How many sequences, up to `most`, stay within the objective's ITL: all of them, or the most by bisection."""
    if objective.itl_p99_s is None or _itl_p99(model, layout, lengths, objective, chunk, most) <= objective.itl_p99_s:
        return most
    low, high = 0, int(most)
    while low < high:
        middle = (low + high + 1) // 2
        if _itl_p99(model, layout, lengths, objective, chunk, middle) <= objective.itl_p99_s:
            low = middle
        else:
            high = middle - 1
    return float(low) if low else None


def _itl_p99(
    model: CostModel, layout: Layout, lengths: Lengths, objective: Objective, chunk: int, sequences: float
) -> float:
    """Seconds between two tokens, p99: a decode step over the longest contents, or a full pass where passes with
    prompts are more than one in a hundred."""
    most = objective.budget / model.shape.token_bytes
    kv = min(sequences * lengths.mean_tokens + Z99 * sequences**0.5 * lengths.spread, most)
    p, o = lengths.mean_prompt, lengths.mean_output
    if sequences * p / o / max(1.0, chunk - sequences) < RARE:
        return model.step_s(layout, sequences, kv)
    return model.burst_itl_s(layout, sequences, kv, chunk, lengths.sample)


def plan(
    model: CostModel,
    lengths: Lengths,
    objective: Objective,
    layers_per_range: Sequence[int] | None = None,
) -> Plan:
    """Predict all choices and rank them by output tokens a second.

    Parameters
    ----------
    layers_per_range : sequence of int or None
        To choose from; None is every divisor of the model's layers.

    Raises
    ------
    ConfigError
        The longest request does not fit the budget, or nothing is within the objective; it says what would be.
    """
    shape, granularity = model.shape, model.card.granularity
    layers = layers_per_range or [n for n in range(1, shape.num_layers + 1) if shape.num_layers % n == 0]
    least = min(
        int(layout.needed_bytes(lengths.longest)) + layout.dummy_bytes
        for layout in (Layout(shape, granularity, each) for each in layers)
    )
    if least > objective.budget:
        raise ConfigError(
            f"the longest request has {lengths.longest:,} tokens, which take {least:,} bytes; the memory is "
            f"{objective.budget:,}: give more, or cut requests"
        )
    layouts = [
        # More sizes of extents are fewer calls for the same bytes: there is nothing to choose.
        Layout(shape, granularity, each, None, CLASSES, lookahead)
        for each in layers
        for lookahead in LOOKAHEADS
    ]
    found = []
    for layout in layouts:
        memory = memory_of(model, layout, lengths, objective)
        each_chunk = (predict(model, layout, lengths, objective, chunk, memory) for chunk in objective.chunks)
        found += [each for each in each_chunk if each is not None]
    if not found:
        raise ConfigError(_nothing(model, lengths, objective, layouts[0]))
    best = max(each.output_tokens_per_s for each in found)

    def rank(each: Prediction) -> tuple[float, ...]:
        # Equal within `ALIKE`: less time of the driver, then what is usual.
        steps = int((best - each.output_tokens_per_s) / (ALIKE * best))
        return (steps, each.parts.mapping, each.layout.lookahead is not None, each.window_s, each.chunk != USUAL_CHUNK)

    return Plan(tuple(sorted(found, key=rank)))


def _nothing(model: CostModel, lengths: Lengths, objective: Objective, layout: Layout) -> str:
    alone = min(_itl_p99(model, layout, lengths, objective, chunk, 1.0) for chunk in objective.chunks)
    wanted = "" if objective.itl_p99_s is None else f" an ITL p99 of {1e3 * objective.itl_p99_s:g} ms"
    return (
        f"no choice is within{wanted or ' the memory'}: one sequence alone would have an ITL p99 of "
        f"{1e3 * alone:.3g} ms and needs {int(layout.needed_bytes(lengths.longest)):,} bytes; ask for more"
    )
