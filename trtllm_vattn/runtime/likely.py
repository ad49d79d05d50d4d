"""Graphs of steps that nobody has asked for yet but somebody is likely to: those that read first tokens in other slots,
and those that sample, also behind a pass with prompts.

A capture holds all requests up for 0.1 to 0.2 s. So at the start, on a GPU, likely kinds are captured for few batch
sizes, of which each serves all down to a quarter of it, until `MOST_SECONDS` or `MOST_BYTES` are spent. A step of a
kind that has no graph of its size runs in a larger one of that kind, and its own is captured when nobody runs
(`DecodeBatch.capture_wanted`). Only where there is none at all it is captured at once, and counted
(`DecodeBatch.captures_while_running`); where it cannot be, for lack of memory, such steps run without a graph until it
can, when nobody runs; where there is no memory for a step of the kind at all, who asks for it ends with an error. Ranks
that compute together capture in the launch that needs it, all of them (`DecodeBatch.captures_alone`): how far each got
by the bounds of time would differ.

Of steps that sample, those that sort all logits (`StepKind.truncated`) are captured at the start. They give every lane
the tokens that a step without a sort gives, so they serve such steps too, which are then wanted as others are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from trtllm_vattn.errors import VattnError
from trtllm_vattn.graphs.replay import CaptureReport, GraphRunner

logger = logging.getLogger(__name__)

MOST_SECONDS = 1.5
MOST_BYTES = 512 << 20
"""Of all likely graphs, in the graphs' pool; no capture begins beyond."""
SPARE = 4
"""A graph serves batches of down to one part in so many of its size."""
SAMPLING_BYTES = 60
"""Of a row and token of the vocabulary, while a step that samples sorts them: numbers of 4 and 8 bytes."""


def few_buckets(buckets: Sequence[int], most: int | None = None) -> list[int]:
    """The fewest of some batch sizes, in falling order, of which one serves each that is no larger than `most`: the
    largest of these, and below each one the smallest that it does not leave to another."""
    left = sorted(each for each in buckets if most is None or each <= most)
    found: list[int] = []
    while left:
        found.append(left[-1])
        below = [each for each in left if each * SPARE < found[-1]]
        # The largest that this one does not serve.
        left = [each for each in left if each <= below[-1]] if below else []
    return found


def sampled_rows(vocab_size: int) -> int:
    """Rows of the largest step that samples and is captured before anybody asks for it."""
    return MOST_BYTES // (SAMPLING_BYTES * vocab_size)


def serving(runner: GraphRunner, bucket: int) -> int | None:
    """The captured batch size by which a runner does what it would do for `bucket`; None where there is none."""
    return min((each for each in runner.captured if bucket <= each <= SPARE * bucket), default=None)


def capture_within(wanted: Iterable[tuple[GraphRunner, int]]) -> CaptureReport:
    """Capture graphs in order until the bounds are reached, or one cannot be: whoever asks for it is told then. The
    report's `seconds` are by size, of all together."""
    seconds: dict[int, float] = {}
    nbytes = 0
    for runner, bucket in wanted:
        if sum(seconds.values()) >= MOST_SECONDS or nbytes >= MOST_BYTES:
            break
        try:
            report = runner.capture([bucket], timed=())
        except (RuntimeError, VattnError) as error:
            logger.warning("steps that may be wanted are not captured before they are: %s", error)
            break
        seconds[bucket] = seconds.get(bucket, 0.0) + report.seconds[bucket]
        nbytes += report.pool_bytes
    return CaptureReport(seconds, {}, nbytes)
