"""Step time, passes with prompts, bursts and mapping: seconds in closed form (README.md derives the formulas)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trtllm_vattn.planner.calibration import Calibration
from trtllm_vattn.planner.memory import Layout
from trtllm_vattn.planner.shape import ModelShape


@dataclass(frozen=True)
class Load:
    """What a pass over the model does.

    Parameters
    ----------
    sequences : float
        That decode.
    kv_tokens : float
        Their tokens, all together.
    prompt_tokens : float
        That go in with them.
    prompt_pairs : float
        Of queries and keys of those tokens: rows times length, summed over chunks.
    """

    sequences: float
    kv_tokens: float
    prompt_tokens: float = 0.0
    prompt_pairs: float = 0.0


@dataclass(frozen=True)
class StepParts:
    """Seconds of a pass: what the device takes, by part, and the host, which works beside it.

    `tlb` is what of `attention` misses of the TLB add to reading. `mapping` are driver calls that the step itself has
    to make, `beside` those of the thread that maps ahead.
    """

    weights: float
    layers: float
    attention: float
    prompts: float
    tlb: float
    host: float
    mapping: float
    beside: float

    @property
    def device(self) -> float:
        return self.weights + self.layers + self.attention + self.prompts

    @property
    def total(self) -> float:
        return max(self.device, self.host, self.beside) + self.mapping

    @property
    def binds(self) -> str:
        """Which part bounds it: ``host``, ``driver calls``, ``TLB``, or ``bandwidth``."""
        if max(self.mapping, self.beside) > max(self.device, self.host):
            return "driver calls"
        if self.host > self.device:
            return "host"
        return "TLB" if self.tlb > self.attention / 2 > self.device / 4 else "bandwidth"


@dataclass(frozen=True)
class CostModel:
    """A model on a card."""

    shape: ModelShape
    card: Calibration

    # -- driver calls -------------------------------------------------------------------------------------------------

    def handle_us(self, nbytes: float, created: bool = True) -> float:
        """Microseconds of the driver to back addresses with one handle in a burst; `created` ones are made for it."""
        at = self.card.at
        return at("map_us", nbytes) + at("set_access_us", nbytes) + (at("create_us", nbytes) if created else 0.0)

    def window_s(self, layout: Layout, prompts: np.ndarray, created: bool = True) -> float:
        """Seconds to admit prompts of so many tokens one after another, driver calls and host."""
        handles = float(layout.handles(prompts).sum())
        each = self.handle_us(layout.handle_bytes(prompts), created) + self.card["mapping_us"]
        return 1e-6 * (len(prompts) * self.card["admit_us"] + handles * each)

    def page_s(self) -> float:
        """Seconds to map a page beside running kernels."""
        return 1e-6 * (self.card["page_beside_us"] + self.card["mapping_us"])

    def beside_s(self, layout: Layout, sequences: float) -> float:
        """Seconds that the thread that maps ahead takes for one step of so many sequences; shorter steps wait for
        it."""
        return sequences * layout.num_ranges / layout.page_tokens * self.page_s()

    # -- attention ----------------------------------------------------------------------------------------------------

    def row_factor(self, layout: Layout) -> float:
        return self.card.at("attention_row_factor", layout.row_bytes)

    def walks_s(self, visits: float, working_set: float, scattered: bool = True) -> float:
        """Seconds that misses of the TLB take of so many visits of pages that lie anywhere in a working set: those
        beyond the TLB's reach miss, so many of all."""
        if working_set <= self.card["tlb_reach_bytes"]:
            return 0.0
        walk_ns = self.card["tlb_walk_scattered_ns" if scattered else "tlb_walk_ns"]
        return 1e-9 * walk_ns * visits * (1 - self.card["tlb_reach_bytes"] / working_set)

    def random_read_s(self, nbytes: float, each: float, working_set: float, scattered: bool) -> float:
        """Seconds to read `nbytes` by pieces of `each` bytes at random places: misses are worked on beside transfers,
        so the slower of both."""
        return max(
            nbytes / self.card["read_bytes_per_s"], self.walks_s(nbytes / each, working_set, scattered=scattered)
        )

    def attention_s(self, layout: Layout, kv_tokens: float, sequences: float) -> tuple[float, float]:
        """Seconds of all layers' decode attention over so many tokens of so many sequences, and what of them TLB misses
        add to reading."""
        card, layers = self.card, self.shape.num_layers
        rate = card["attention_bytes_per_s"] * self.row_factor(layout)
        rate *= card.at("attention_batch_factor", max(1.0, sequences))
        read = kv_tokens * self.shape.layer_token_bytes / rate
        # A kernel's tile is K or V of one head; it visits each page that its rows lie in once.
        tiles = self.shape.kv_factor * self.shape.num_kv_heads / layout.head_groups
        visits = kv_tokens / max(1.0, layout.page_tokens) * tiles * layout.head_groups
        walks = self.walks_s(visits, kv_tokens * self.shape.token_bytes)
        return layers * (1e-6 * card["attention_us"] + max(read, walks)), layers * max(0.0, walks - read)

    # -- passes -------------------------------------------------------------------------------------------------------

    def parts(self, layout: Layout, load: Load) -> StepParts:
        """Seconds of a pass, by part."""
        card, layers = self.card, self.shape.num_layers
        rows = max(1.0, load.sequences + load.prompt_tokens)
        attention, walks = (0.0, 0.0)
        if load.sequences:
            attention, walks = self.attention_s(layout, load.kv_tokens, load.sequences)
        prompts = 0.0
        if load.prompt_tokens:
            flops = self.shape.pair_flops * load.prompt_pairs
            prompts = layers * (1e-6 * card["prompt_attention_us"] + flops / card["prompt_attention_flops_per_s"])
        mapping, beside = 0.0, self.beside_s(layout, load.sequences)
        if layout.lookahead == 0:
            each = self.handle_us(layout.granularity) + card["mapping_us"]
            mapping, beside = 1e-6 * each * load.sequences * layout.num_ranges / layout.page_tokens, 0.0
        return StepParts(
            weights=card.weights_s(self.shape.weight_bytes, rows),
            layers=layers * 1e-6 * card.layer_us(rows),
            attention=attention,
            prompts=prompts,
            tlb=walks,
            host=1e-6 * (card["host_us"] + card["host_lane_us"] * load.sequences),
            mapping=mapping,
            beside=beside,
        )

    def step_s(self, layout: Layout, sequences: float, kv_tokens: float) -> float:
        """Seconds of a decode step."""
        return self.parts(layout, Load(sequences, kv_tokens)).total

    def full_pass(self, sequences: float, kv_tokens: float, chunk: int, prompt: float) -> Load:
        """A pass of `chunk` rows, of which decoding sequences leave the rest to prompts of so many tokens."""
        rows = max(1.0, chunk - sequences)
        # Each row meets half of its own prompt on average.
        return Load(sequences, kv_tokens, rows, rows * prompt / 2)

    def burst_itl_s(
        self,
        layout: Layout,
        sequences: float,
        kv_tokens: float,
        chunk: int,
        prompts: np.ndarray,
        join: bool = False,
    ) -> float:
        """Seconds between two tokens, p99, of sequences that decode while these prompts arrive at once.

        Prompts go in one after another, by passes of `chunk` rows that decoding sequences have one each of. `kv_tokens`
        are all tokens of those at the beginning; with `join`, whose prompt is in decodes on with them.
        """
        rows = max(1.0, chunk - sequences)
        ends = np.concatenate(([0.0], np.cumsum(prompts, dtype=np.float64)))
        edges = np.append(np.arange(0.0, ends[-1], rows), ends[-1])
        # Pairs of queries and keys up to a token: those of whole prompts before, and half a square of its own.
        before = np.concatenate(([0.0], np.cumsum(np.square(prompts, dtype=np.float64) / 2)))
        prompt = np.minimum(np.searchsorted(ends, edges, side="right") - 1, len(prompts) - 1)
        pairs = np.diff(before[prompt] + (edges - ends[prompt]) ** 2 / 2)
        joined = prompt[:-1] if join else np.zeros(len(pairs), np.int64)
        # Few kinds: all but the last pass have as many rows.
        kinds, which = np.unique(np.stack((joined, np.diff(edges)), axis=1), axis=0, return_inverse=True)
        each = [
            self.parts(layout, Load(sequences + n, kv_tokens + ends[int(n)], tokens)) for n, tokens in kinds.tolist()
        ]
        of_kinds = np.array([(part.device, max(part.host, part.beside), part.mapping) for part in each])
        device, beside, mapping = of_kinds[which.reshape(-1)].T
        more = self.shape.num_layers * self.shape.pair_flops / self.card["prompt_attention_flops_per_s"]
        passes = np.maximum(device + more * pairs, beside) + mapping
        # The queue is filled up beside a pass, so that only the first one waits for its prompts' memory.
        first = prompts[: max(1, int(np.searchsorted(np.cumsum(prompts), 2 * chunk)) + 1)]
        passes[0] += self.window_s(layout, first, created=False)
        return float(np.percentile(passes, 99))
