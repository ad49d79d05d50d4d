"""Decode steps for a batch: static input buffers, the step function, and its captured or eager execution.

One captured step is replayed alone, several times over in one launch, or in a loop that the device ends. Between the
steps of a launch the host touches nothing: tokens, positions and lengths are advanced on the device. So a launch may
also be started before the tokens of the one before it are read, as engines with asynchronous scheduling do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.graphs.audit import AuditReport
from trtllm_vattn.graphs.capture import Outputs
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.graphs.replay import CaptureReport, GraphRunner
from trtllm_vattn.runtime.binding import DecodeStep, forward
from trtllm_vattn.runtime.compiled import Wrap, as_it_is
from trtllm_vattn.runtime.sampling import SamplingParams, add_noise, in_parts, of_parts, sample_on_device, settings
from trtllm_vattn.runtime.step_model import StepModel
from trtllm_vattn.vmm.tensors import tensor_at, upload

STOPS = 4
"""Stop tokens of a lane that the device looks for in a loop; further ones are found after the launch."""


@dataclass(frozen=True)
class Launch:
    """What was started.

    `lane_of` are the lanes by slot then, without those whose sequence has left since; `logits` ``[bucket, vocab]`` are
    of its last step. `first` counts the steps before it since the inputs were uploaded.
    """

    lane_of: dict[int, int]
    first: int
    steps: int
    logits: torch.Tensor
    guard_s: float
    _out: torch.Tensor
    _arrived: torch.cuda.Event | None

    def read(self) -> list[list[int]]:
        """Wait, and give each step's tokens by lane; `sampling.NO_TOKEN` where its logits gave none."""
        if self._arrived is not None:
            self._arrived.synchronize()
        *rows, counts = self._out.tolist()
        taken = min(self.steps, counts[0] - self.first)
        return [rows[(self.first + step) % len(rows)] for step in range(taken)]


def advance(
    chosen: torch.Tensor,
    inputs: torch.Tensor,
    control: torch.Tensor,
    frontiers: torch.Tensor,
    out: torch.Tensor,
    go: torch.Tensor,
    dummy: int,
) -> None:
    """Note each lane's token, `chosen` int64 ``[lanes]``, and make the next step's inputs of this one's.

    All lanes, whatever the bucket, so that one compiled function serves all. A lane that has reached its limit, or
    whose logits gave no token (`NO_TOKEN`, which is noted and never fed), becomes idle. `go` is left other than 0 while
    fewer steps were taken than wanted, no lane has ended, and no lane's next length is beyond its slot's in
    `frontiers`.
    """
    positions, tokens, slots, lengths, limits = inputs[:5]
    row = control[:1].remainder(len(out) - 1)
    out.index_copy_(0, row, chosen[None])
    taken = control[:1] + 1
    out[-1, :1].copy_(taken)
    longer = lengths + 1
    running = lengths > 0
    goes_on = running & (longer <= limits) & (chosen >= 0)
    ended = running & ((inputs[5:] == chosen).any(dim=0) | ~goes_on)
    without_memory = goes_on & (longer > frontiers[slots])
    go.copy_((taken < control[1:]) & ~(ended | without_memory).any())
    control[:1].copy_(taken)
    slots.copy_(torch.where(goes_on, slots, dummy))
    tokens.copy_(torch.where(goes_on, chosen, 0))
    positions.copy_(torch.where(goes_on, lengths, 0))
    lengths.copy_(torch.where(goes_on, longer, 0))


def advance_greedily(largest: torch.Tensor, place: torch.Tensor, width: int, *others: Any) -> None:
    """`advance` with each lane's likeliest token, by the largest logit of each part of it (`of_parts`)."""
    advance(of_parts(largest, place, width), *others)


class DecodeBatch:
    """The lanes of the decode step; an idle lane has length 0 and writes to the dummy slot.

    Parameters
    ----------
    steps : int
        Most steps of one launch.
    loop : bool
        Whether the device decides how many of them are taken.
    packed : bool
        False: lane i is slot i. True: sequences take the first lanes, whatever their slots.
    wrap : callable
        Applied to functions of tensors that are run in every step; torch.compile, or nothing.

    Attributes
    ----------
    tokens, positions, slots, lengths, limits : numpy.ndarray
        int64 ``[lanes]``, the next launch's inputs on the host. `lengths` counts the first step's own token; `limits`
        is the length of a lane's last step.
    lane_of : dict
        Lanes by slot.
    """

    def __init__(
        self,
        model: StepModel,
        attention: Attention,
        buckets: Sequence[int],
        *,
        steps: int = 1,
        loop: bool = False,
        packed: bool = False,
        wrap: Wrap = as_it_is,
    ) -> None:
        self.model, self.attention = model, attention
        self.steps, self.loop, self.packed = steps, loop, packed
        cache = attention.cache
        lanes, device = cache.shape.num_slots, cache.device
        rows = 5 + STOPS
        self._host = _mirrored([rows * lanes + 2], torch.int64, device)
        self._device = torch.zeros_like(self._host, device=device)
        self._inputs = self._device[:-2].view(rows, lanes)
        staged = self._host.numpy()
        # Positions first: what is given to compiled code begins where its storage does, whatever the bucket.
        self.positions, self.tokens, self.slots, self.lengths, self.limits, *_ = staged[:-2].reshape(rows, lanes)
        self._stops = staged[:-2].reshape(rows, lanes)[5:]
        self._control = staged[-2:]
        self.slots[:] = cache.dummy_slot
        self._stops[:] = -1
        self._device.copy_(self._host)
        # Read by the device itself in the middle of a loop, so it stays on the host, where raising it is one store.
        frontiers = _mirrored([lanes + 1], torch.int64, device)
        self._frontiers = frontiers.numpy()
        nbytes = frontiers.numel() * frontiers.itemsize
        self._frontiers_seen = (
            tensor_at(frontiers.data_ptr(), nbytes, str(device), owner=frontiers).view(torch.int64)
            if device.type == "cuda"
            else frontiers
        )
        # Temperature, top_p and top_k, whose bits are float64, and a key for each step of two launches.
        self._sampling = torch.zeros(3 + 2 * steps, lanes, dtype=torch.int64, device=device)
        # Two launches' tokens, and a row with the count of steps.
        self._out = torch.zeros(2 * steps + 1, lanes, dtype=torch.int64, device=device)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._left: torch.cuda.Stream | None = None
        """The caller's stream, while another is the current one."""
        self._go = torch.zeros(1, dtype=torch.int32, device=device)
        self.lane_of: dict[int, int] = {}
        self._changed = True
        """Whether lanes are other than those on the device."""
        self._taken = 0
        """Steps started since the inputs were uploaded."""
        self._under_way: deque[Launch] = deque(maxlen=2)
        self._params: dict[int, tuple[SamplingParams, int]] = {}
        """By slot: how its lane's tokens are sampled, and how many it has so far; for lanes that are not greedy."""
        self.guard = Guard(cache, attention.over_read)
        self._advance, self._advance_greedily, self._add_noise = wrap(advance), wrap(advance_greedily), wrap(add_noise)
        static = [
            *model.parameters(),
            *model.buffers(),
            *cache.storages(),
            *attention.storages(),
            self._device,
            self._frontiers_seen,
            self._sampling,
            self._out,
            self._go,
        ]
        go = self._go if loop else None
        self.runner = GraphRunner(self._greedy_step, buckets, static, device, go)
        # Captured when the first sequence comes whose tokens are sampled: sorting a vocabulary takes a lot of the pool.
        self._sampler = GraphRunner(self._sampling_step, buckets, static, device, go, pool=self.runner.pool)
        self.captured = False

    def capture(self) -> CaptureReport:
        """Capture every bucket; launches are replays from then on."""
        report = self.runner.capture()
        self.captured = True
        return report

    # -- one step --------------------------------------------------------------------------------------------------

    def _forward(self, bucket: int) -> torch.Tensor:
        positions, tokens, slots, lengths = self._inputs[:4, :bucket]
        step = DecodeStep(self.attention, slots, positions, lengths.to(torch.int32), self.packed)
        return forward(self.model, tokens, positions, step)

    def _greedy_step(self, bucket: int) -> Outputs:
        logits = self._forward(bucket)
        parts = in_parts(logits)
        # Rows of idle lanes hold anything.
        largest = parts.new_empty(len(self.lengths), parts.shape[1])
        place = torch.empty_like(largest, dtype=torch.int64)
        torch.max(parts, dim=-1, out=(largest[:bucket], place[:bucket]))
        self._advance_greedily(largest, place, parts.shape[2], *self._lanes())
        return (logits,)

    def _sampling_step(self, bucket: int) -> Outputs:
        logits = self._forward(bucket)
        row = self._device[-2:-1].remainder(2 * self.steps)
        keys = self._sampling[3:, :bucket].index_select(0, row)[0]
        temperature, top_p, top_k = self._sampling[:3].view(torch.float64)[:, :bucket]
        chosen = self._inputs.new_empty(len(self.lengths))
        chosen[:bucket].copy_(sample_on_device(logits, temperature, top_p, top_k, keys, self._add_noise))
        self._advance(chosen, *self._lanes())
        return (logits,)

    def _lanes(self) -> tuple[Any, ...]:
        """What `advance` takes besides tokens."""
        dummy = self.attention.cache.dummy_slot
        return self._inputs, self._device[-2:], self._frontiers_seen, self._out, self._go, dummy

    # -- lanes -----------------------------------------------------------------------------------------------------

    def set_lane(
        self, slot: int, token: int, length: int, limit: int, params: SamplingParams | None = None, generated: int = 0
    ) -> None:
        """Give a slot's sequence a lane. Its next step writes `token` and makes it `length` tokens long; no step makes
        it longer than `limit`. `params` are those of the sequence, which has `generated` tokens of its own so far."""
        lane = self.lane_of.get(slot)
        if lane is None:
            lane = self.lane_of[slot] = len(self.lane_of) if self.packed else slot
        self.tokens[lane], self.positions[lane] = token, length - 1
        self.slots[lane], self.lengths[lane], self.limits[lane] = slot, length, limit
        if params is not None and params.stop_token_ids:
            some = params.stop_token_ids[:STOPS]
            self._stops[: len(some), lane] = some
        self._changed = True
        if params is not None and not params.greedy:
            self._params[slot] = (params, generated)

    def commit(self, launch: Launch, rows: Sequence[Sequence[int]]) -> None:
        """A launch gave these tokens, a row a step: its lanes that are left take part in the next one with the last."""
        there = [(lane, launch.lane_of[slot]) for slot, lane in self.lane_of.items() if slot in launch.lane_of]
        lanes, before = np.array(there, np.int64).reshape(-1, 2).T
        self.tokens[lanes] = np.array(rows[-1])[before]
        self.lengths[lanes] += len(rows)
        self.positions[lanes] += len(rows)
        for slot in self._params.keys() & launch.lane_of.keys():
            params, generated = self._params[slot]
            self._params[slot] = (params, generated + len(rows))

    def clear_lane(self, slot: int) -> None:
        """Take a slot's lane away."""
        self._changed = True
        for launch in self._under_way:
            launch.lane_of.pop(slot, None)
        lane = self.lane_of.pop(slot)
        self._params.pop(slot, None)
        columns = self._host[:-2].view(-1, len(self.lengths)).numpy()
        if self.packed and lane != (last := len(self.lane_of)):
            columns[:, lane] = columns[:, last]
            self.lane_of[int(self.slots[lane])] = lane
            lane = last
        columns[:5, lane] = 0
        self.slots[lane] = self.attention.cache.dummy_slot
        self._stops[:, lane] = -1

    def clear(self) -> None:
        """Take all lanes away, whatever became of a call that was interrupted, and forget what was launched. The device
        is done with it."""
        self._under_way.clear()
        self.lane_of.clear()
        self._params.clear()
        self._host.numpy()[:] = 0
        self.slots[:] = self.attention.cache.dummy_slot
        self._stops[:] = -1
        self._changed = True

    def lengths_after(self, steps: int) -> np.ndarray:
        """Lengths by slot, int64 ``[num_slots]``, once so many steps were taken; 0 where there is no lane."""
        ends: np.ndarray = np.minimum(self.lengths + (steps - 1), self.limits)
        if not self.packed:
            return ends
        by_slot = np.zeros_like(ends)
        for slot, lane in self.lane_of.items():
            by_slot[slot] = ends[lane]
        return by_slot

    # -- launching -------------------------------------------------------------------------------------------------

    def launch(self, steps: int = 1, unread: int = 0) -> Launch:
        """Guard and start what the host arrays describe: `steps` steps, or in a loop so many at most.

        With `unread` steps of an earlier launch, whose tokens have not been read, this one goes on from where the
        device is then; lanes must be the same (`unchanged`).
        Raises UnmappedAccess before anything is launched.
        """
        started = perf_counter()
        ahead = unread + (1 if self.loop else steps)
        self.guard.check(np.minimum(self.lengths + (ahead - 1), self.limits), self.slots, self.positions)
        guarded = perf_counter() - started
        bucket = self.bucket
        runner = self._sampler if self._params else self.runner
        if self.captured and bucket not in runner.captured:
            # What is captured is also run, over idle lanes.
            self._inputs[:5].zero_()
            self._inputs[2].fill_(self.attention.cache.dummy_slot)
            runner.capture([bucket])
        if not unread:
            self._taken, self._changed = 0, False
            self._control[:] = 0, steps
            self.publish_frontiers()
            self._device.copy_(self._host, non_blocking=True)
        if self._params:
            self._upload_sampling(steps, unread)
        if not self.captured:
            (logits,) = self._run_eagerly(runner, bucket, steps)
        elif self.loop:
            (logits,) = runner.replay_while(bucket)
        else:
            (logits,) = runner.replay(bucket, steps)
        launch = Launch(dict(self.lane_of), self._taken, steps, logits, guarded, *self._fetch(bucket))
        self._taken += steps
        self._under_way.append(launch)
        return launch

    @property
    def unchanged(self) -> bool:
        """Whether the lanes are those that the device has, so that a launch may go on before tokens are read."""
        return not self._changed

    def _fetch(self, bucket: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Start copying tokens to the host, beside whatever is launched next."""
        out = self._out[:, :bucket]
        if self._copies is None:
            return out, None
        stream = torch.cuda.current_stream(out.device)
        self._copies.wait_stream(stream)
        self._left = stream
        with torch.cuda.stream(self._copies):
            copy = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
            copy.copy_(out, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._left = None
        return copy, arrived

    def return_to_stream(self) -> None:
        """Make the stream the current one again that a launch was interrupted on."""
        if self._left is not None:
            torch.cuda.set_stream(self._left)
            self._left = None

    @property
    def bucket(self) -> int:
        """The bucket of the next launch."""
        return self.runner.bucket_for(max(self.lane_of.values()) + 1)

    def publish_frontiers(self) -> None:
        """Tell a running loop how long sequences may be now; to be called after memory was made accessible."""
        self._frontiers[:-1] = self.guard.longest()

    def _run_eagerly(self, runner: GraphRunner, bucket: int, steps: int) -> Outputs:
        step = self._sampling_step if runner is self._sampler else self._greedy_step
        for _ in range(steps):
            outputs = step(bucket)
            if self.loop and not self._go.item():
                break
        return outputs

    def _upload_sampling(self, steps: int, unread: int) -> None:
        rows = np.zeros(self._sampling.shape, np.int64)
        parameters, keys = rows[:3].view(np.float64), rows[3:]
        for slot, (params, generated) in self._params.items():
            lane = self.lane_of[slot]
            parameters[:, lane] = settings(params)
            for step in range(steps):
                keys[(self._taken + step) % (2 * self.steps), lane] = params.key(generated + unread + step)
        self._sampling.copy_(upload(rows, self._sampling.device))

    def audit(self, bucket: int | None = None) -> AuditReport:
        """Whose the addresses are that graphs hold, of a bucket or of all: greedy steps, those that sample,
        where any did, and launches of many steps. Raises CaptureError where there is no graph."""
        regions = self.attention.regions()
        reports = [self.runner.audit(regions, "decode step", bucket)]
        if bucket in self._sampler.captured or (bucket is None and self._sampler.captured):
            reports.append(self._sampler.audit(regions, "sampling step", bucket))
        return AuditReport.joined(reports)

    def close(self) -> None:
        """Drop all graphs. Idempotent."""
        self.runner.close()
        self._sampler.close()


def _mirrored(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros on the host, pinned where they are copied to a GPU."""
    tensor = torch.zeros(*shape, dtype=dtype)
    return tensor.pin_memory() if device.type == "cuda" else tensor
