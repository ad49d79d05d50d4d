"""The engines of a model that several ranks compute: rank 0's, which decides, and the others', which launch what it
launches.

Rank 0 has the requests, the scheduler and the plans. What it does to its lanes is noted, and goes out with each launch
as one message (a step plan: the lanes that change, the kernel of attention, how many steps, or the chunks of prompts);
the other ranks do the same to lanes of their own and launch the same graph. No rank reads another's tokens: each
chooses by the same logits, and rank 0's choice is sent to all on the device, in the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

import torch

from trtllm_vattn.cache.ranked import FollowingCache, LeadingCache, Report
from trtllm_vattn.errors import ConfigError, VattnError
from trtllm_vattn.graphs.replay import CaptureReport
from trtllm_vattn.runtime.decode import DecodeBatch, Launch
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.lane_processors import LaneAsks
from trtllm_vattn.runtime.parallel.channel import Call, Follower, Leader
from trtllm_vattn.runtime.parallel.group import current_group, numbers_of_all
from trtllm_vattn.runtime.passes import Passes
from trtllm_vattn.runtime.prefill import PromptChunk
from trtllm_vattn.runtime.request import RequestState
from trtllm_vattn.runtime.sampling import SamplingParams, of_parts
from trtllm_vattn.runtime.sleeping import SleepingReport
from trtllm_vattn.runtime.step_model import StepModel
from trtllm_vattn.runtime.step_plan import StepPlan
from trtllm_vattn.runtime.weights import Manifest, NamedTensors
from trtllm_vattn.vmm.tensors import inference


class RankedDecode(DecodeBatch):
    """Lanes of which rank 0's tokens are everybody's."""

    captures_alone: ClassVar[bool] = False

    def capture(self) -> CaptureReport:
        here = current_group()
        # One after another, for the first one stores what it measured, by which the others then choose alike.
        for rank in range(here.size):
            if rank == here.rank:
                self.attention.measure(self.runner.buckets, self.packed)
            numbers_of_all(rank)
        if len(set(numbers_of_all(int(self.attention.captures_prompts)))) > 1:
            raise ConfigError(
                "ranks measured different kernels of attention as the fastest for prompts, and could not store what "
                "they measured (XDG_CACHE_HOME); use deterministic=True, by which nothing is measured"
            )
        return super().capture()

    def _take_largest(self, largest: torch.Tensor, place: torch.Tensor, width: int, inputs: torch.Tensor) -> None:
        self._take(of_parts(largest, place, width), inputs)

    def _take(self, chosen: torch.Tensor, inputs: torch.Tensor) -> None:
        torch.ops.trtllm_vattn.from_first_.default(chosen)
        super()._take(chosen, inputs)


class LeadingDecode(RankedDecode):
    """Rank 0's lanes. What is done to them is noted for the others, and a launch sends it."""

    leader: Leader | None = None
    _silent = False
    """Whether what is done to lanes is part of a launch that was noted as a whole."""

    def note(self, call: str, *arguments: Any) -> None:
        if self.leader is not None and not self._silent:
            self.leader.note(call, *arguments)

    def set_lane(
        self,
        slot: int,
        token: int,
        length: int,
        limit: int,
        params: SamplingParams | None = None,
        generated: int = 0,
        known: Sequence[int] = (),
        asks: LaneAsks | None = None,
    ) -> None:
        # `asks` is refused at the door.
        self.note("set_lane", slot, token, length, limit, params, generated)
        super().set_lane(slot, token, length, limit, params, generated, known, asks)

    def clear_lane(self, slot: int) -> None:
        self.note("clear_lane", slot)
        super().clear_lane(slot)

    def feed_token(self, slot: int, token: int) -> None:
        self.note("feed_token", slot, token)
        super().feed_token(slot, token)

    def resend(self) -> None:
        self.note("resend")
        super().resend()

    def clear(self) -> None:
        self.note("clear")
        super().clear()

    def _start(self, steps: int, bucket: int, variant: str, guarded: float) -> Launch:
        if self.leader is None:
            return super()._start(steps, bucket, variant, guarded)
        return self.together(("decode", (steps, variant)), super()._start, steps, bucket, variant, guarded)

    def together(self, launch: Call, start: Any, *arguments: Any) -> Launch:
        """Tell the others of a launch, and start it here: both, whatever interrupt comes."""
        return self.attention.cache.at_once(self._together, launch, start, *arguments)

    def _together(self, launch: Call, start: Any, *arguments: Any) -> Launch:
        assert self.leader is not None
        name, told = launch
        self.leader.note(name, *told)
        self.leader.send()
        self._silent = True
        try:
            # In a thread of its own, where nothing is set as it is for the caller.
            with inference():
                started: Launch = start(*arguments)
        finally:
            self._silent = False
        return started


class LeadingPasses(Passes):
    """Rank 0's passes."""

    decode: LeadingDecode

    def _start(self, plan: StepPlan, guard_s: float) -> Launch:
        if self.decode.leader is None:
            return super()._start(plan, guard_s)
        chunks = [(PromptRequest.of(request), chunk) for request, chunk in plan.chunks]
        return self.decode.together(("prompts", (chunks, plan.decodes)), super()._start, plan, guard_s)


class FollowingDecode(RankedDecode):
    """Another rank's lanes, whose tokens nobody reads here."""

    def follow(self, steps: int, variant: str) -> None:
        """Start what rank 0 starts."""
        self._start(steps, self.bucket, variant, self.check(steps))

    def _fetch(self, lanes: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        return self._out, None


@dataclass(frozen=True)
class PromptRequest:
    """What a pass asks of a request whose prompt goes in (`RequestState`), as it is sent."""

    slot: int
    last: int
    length: int
    limit: int
    params: SamplingParams
    chosen: range
    asks: None = None
    wants_prompt_logprobs: bool = False

    @classmethod
    def of(cls, request: Any) -> PromptRequest:
        chosen = range(len(request.chosen))
        return cls(request.slot, request.last, request.length, request.limit, request.params, chosen)


class LeadingEngine(Engine):
    """Rank 0's engine, made by ``Engine.from_pretrained(..., tensor_parallel=2)``.

    What it cannot do yet is refused by name: weights are not updated, nothing sleeps, no prefixes are kept, and no loop
    runs on the device.

    Raises
    ------
    RankLost
        From any call: another rank has ended.
    """

    decode_class: ClassVar[type[DecodeBatch]] = LeadingDecode
    passes_class: ClassVar[type[Passes]] = LeadingPasses
    cache: LeadingCache
    decode: LeadingDecode

    def lead(self, leader: Leader, on_close: Any) -> None:
        """Have the others follow from now on; all have built the same engine."""
        self.leader, self._on_close = leader, on_close
        leader.forget_reports(Report(self.cache.frontiers * 0, ()))
        self.cache.peers = self.decode.leader = leader
        # By what was measured here, all decide alike how prompts go in.
        leader.note("costs", self.prefill.replay_s, self.prefill.pass_s)

    leader: Leader | None = None

    def _step(self) -> None:
        assert self.leader is not None
        with self.leader.call():
            super()._step()

    def _read(self, launch: Launch) -> tuple[list[list[int]], float]:
        assert self.leader is not None
        read = super()._read(launch)
        if self.leader.watch.lost is not None:
            # Collectives that were given up left anything.
            raise self.leader.watch.lost
        return read

    def set_budget(self, budget: int | str) -> None:
        assert self.leader is not None
        with self.leader.call():
            super().set_budget(budget)

    def update_weights(
        self,
        named_tensors: NamedTensors,
        *,
        manifest: Manifest | None = None,
        partial: bool = False,
        running: Literal["continue", "restart", "abort"] = "continue",
        restore: bool = False,
    ) -> int:
        self._cannot("take new weights")

    def sleep(
        self, *, kv: Literal["keep", "drop"] = "keep", weights: Literal["keep", "host", "drop"] = "keep"
    ) -> SleepingReport:
        self._cannot("sleep")

    def _complete(self, request: RequestState, is_text: bool) -> None:
        if request.asks is not None or request.params.prompt_logprobs is not None:
            self._cannot("change logits or give log-probabilities (min_p, penalties, logit_bias, grammars, logprobs)")
        super()._complete(request, is_text)

    def _cannot(self, what: str) -> NoReturn:
        raise ConfigError(f"a tensor parallel engine cannot {what} yet; use one of one rank, or start another")

    def close(self) -> None:
        leader, self.leader = self.leader, None
        if leader is not None:
            # Nobody is told of the calls by which it is taken down here.
            self.cache.peers = self.decode.leader = None
            if leader.watch.lost is None:
                leader.note("close")
                leader.send()
        try:
            super().close()
        finally:
            if leader is not None:
                self._on_close()


def check_options(options: dict[str, Any]) -> None:
    """Raise ConfigError for parameters of `Engine` that several ranks cannot have."""
    refused = ("prefix_cache", "kv_events", "loop", "sleepable_weights", "speculation", "kv_scales")
    wrong = [name for name in refused if options.get(name)]
    if wrong:
        raise ConfigError(f"{wrong[0]} is not served with tensor_parallel yet; leave it out, or use one rank")
    if options.get("packed") is False:
        raise ConfigError("packed is False; with tensor_parallel sequences take the first lanes, whatever their slots")


class FollowingEngine(Engine):
    """Another rank's engine: it makes the calls that rank 0 tells of."""

    decode_class: ClassVar[type[DecodeBatch]] = FollowingDecode
    cache: FollowingCache
    decode: FollowingDecode

    def __init__(self, model: StepModel, cache: FollowingCache, **options: Any) -> None:
        super().__init__(model, cache, **options)
        self._reported = Report(cache.frontiers * 0, ())
        self._calls: dict[str, Callable[..., object]] = {
            "set_lane": self.decode.set_lane,
            "clear_lane": self.decode.clear_lane,
            "feed_token": self.decode.feed_token,
            "resend": self.decode.resend,
            "clear": self.decode.clear,
            "decode": self._decode,
            "prompts": self._prompts,
            "costs": self._costs,
            "admit_at": cache.admit_at,
            "release_soon": cache.release_soon,
            "prepare_step": cache.prepare_step,
            "restore_lengths": cache.restore_lengths,
            "set_budget": cache.set_budget,
            "reset": cache.reset,
            "preallocate_for": cache.preallocate_for,
            "release_free_memory": cache.release_free_memory,
        }

    def follow(self, follower: Follower, asks: bool, calls: list[Call]) -> None:
        """Make calls. An error of the last one is the answer where it asks for one, and raised else."""
        launched = False
        with inference():
            for i, (name, arguments) in enumerate(calls):
                answers = asks and i == len(calls) - 1
                try:
                    self._calls[name](*arguments)
                except VattnError as error:
                    if not answers:
                        raise
                    follower.answer(error, None, self._report())
                else:
                    if answers:
                        follower.answer(None, None, self._report())
                launched = launched or name in ("decode", "prompts")
        if launched:
            self._map_ahead.during_step()
            self.cache.release_left()
        report = self.cache.report()
        if (report.frontiers != self._reported.frontiers).any():
            follower.report(self._report())

    def _report(self) -> Report:
        self._reported = self.cache.report()
        return self._reported

    def _decode(self, steps: int, variant: str) -> None:
        self.decode.follow(steps, variant)

    def _prompts(self, chunks: list[tuple[Any, PromptChunk]], decodes: bool) -> None:
        self.passes.launch(StepPlan(1, tuple(chunks), decodes))

    def _costs(self, replay_s: dict[int, float], pass_s: float) -> None:
        self.prefill.replay_s, self.prefill.pass_s = replay_s, pass_s
