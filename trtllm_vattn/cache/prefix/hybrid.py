"""Four ways to a prefix that another slot holds, and the choice between them by what they cost.

* *adopt*: the new sequence goes on in the retained slot itself. No driver call for the prefix; what the slot held
  behind the prefix is lost for others.
* *alias*: the whole extents of the prefix are mapped in the new sequence's slot too, at one `set_access` a handle; what
  lies beyond the last whole extent is copied.
* *copy*: the prefix's bytes are copied into memory of the new slot's own, which others then cannot cache in.
* *table*: nothing is mapped or copied; the decode kernel reads the prefix in its owner's slot through a base address a
  segment, at a small price in each step.

All costs are microseconds, so that they can be added: driver calls, copying, reading through a table for as many steps
as the sequence is expected to live, and the loss of cached tokens, which is the time to compute them anew times the
chance that somebody asks. Arithmetic only: imports neither torch nor a driver.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

from trtllm_vattn.errors import ConfigError


class Way(enum.Enum):
    """How a sequence gets at the tokens it begins with; `NONE` is computing all of them."""

    NONE = "none"
    ADOPT = "adopt"
    ALIAS = "alias"
    COPY = "copy"
    TABLE = "table"


@dataclass(frozen=True)
class ReuseCosts:
    """What the parts of each way cost. The defaults were measured on one H200 (driver 580.159.04, idle; driver calls as
    `bench alloc` measures them); what was not measured yet says so.

    Attributes
    ----------
    create_us, map_us, set_access_us, unmap_us, release_us : float
        One driver call for one handle.
    copy_bytes_per_us : float
        Bytes copied on the device in a microsecond: 2 GB in a millisecond.
    copy_launch_us : float
        Of one copy, however short. Not measured.
    table_step_us : float
        What one more segment costs in one decode step, over all layers; an engine gives what it measured.
    table_is_measured : bool
        Whether that was measured on this device at the start.
    prefill_tokens_per_s : float
        Tokens computed anew in a second (Llama-3-8B).
    reuse_chance : float
        How likely a cached token is asked for before it would be evicted. `PrefixCache` puts its own count in place of
        it once it has seen enough.
    """

    create_us: float = 8.0
    map_us: float = 1.6
    set_access_us: float = 24.0
    unmap_us: float = 16.0
    release_us: float = 10.0
    copy_bytes_per_us: float = 2e6
    copy_launch_us: float = 5.0
    table_step_us: float = 0.05
    prefill_tokens_per_s: float = 42_000.0
    reuse_chance: float = 0.25
    table_is_measured: bool = False

    def __post_init__(self) -> None:
        for each in fields(self)[:-1]:
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"{each.name} is {value!r}; it must be a number from 0 on")
        for name in ("copy_bytes_per_us", "prefill_tokens_per_s"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is 0; it must be above 0")
        if self.reuse_chance > 1:
            raise ConfigError(f"reuse_chance is {self.reuse_chance!r}; it must be from 0 to 1")

    @property
    def alias_handle_us(self) -> float:
        """Mapping a handle once more, and taking that mapping away later."""
        return self.map_us + self.set_access_us + self.unmap_us

    @property
    def own_handle_us(self) -> float:
        """Backing addresses with a handle of one's own, and giving it back."""
        return self.create_us + self.map_us + self.set_access_us + self.unmap_us + self.release_us

    def compute_us(self, tokens: float) -> float:
        """Computing tokens anew."""
        return 1e6 * tokens / self.prefill_tokens_per_s

    def copy_us(self, size: int) -> float:
        """Copying bytes on the device."""
        return self.copy_launch_us + size / self.copy_bytes_per_us if size else 0.0


@dataclass(frozen=True)
class Hit:
    """A prefix that some slot holds, and what each way to it would take.

    Attributes
    ----------
    tokens : int
        Of the prefix.
    token_bytes : int
        Of one token in all layers.
    lost_tokens : int or None
        Tokens that only the owner holds behind the prefix, which adopting it loses; None where it cannot be adopted.
    alias_tokens, alias_handles : int
        The prefix's whole extents: the tokens in them, and the handles. 0 where none is whole.
    own_handles : int
        Handles that the prefix would take in memory of its own. Only in `copy` and, in part, `alias`.
    segments : int or None
        Slots that a table would read, the new one included; None where nothing can read through a table.
    expected_tokens : int
        That the new sequence is expected to generate: its steps, as far as is known.
    displaces : bool
        Memory is short: what is copied takes the place of cached tokens.
    mappings_left : int or None
        Mappings that the driver still bears; None is no limit.
    """

    tokens: int
    token_bytes: int
    lost_tokens: int | None = None
    alias_tokens: int = 0
    alias_handles: int = 0
    own_handles: int = 1
    segments: int | None = None
    expected_tokens: int = 256
    displaces: bool = False
    mappings_left: int | None = None


@dataclass(frozen=True)
class Decision:
    """The way chosen, why, and the costs of all ways that were possible, in microseconds."""

    way: Way
    reason: str
    costs: Mapping[Way, float]


def costs_of(hit: Hit, costs: ReuseCosts) -> dict[Way, float]:
    """Microseconds of each way that is possible, computing everything anew among them."""

    def displaced(tokens: int) -> float:
        return costs.reuse_chance * costs.compute_us(tokens) if hit.displaces else 0.0

    left = math.inf if hit.mappings_left is None else hit.mappings_left
    found = {Way.NONE: costs.compute_us(hit.tokens) + displaced(hit.tokens)}
    if hit.lost_tokens is not None:
        found[Way.ADOPT] = costs.reuse_chance * costs.compute_us(hit.lost_tokens)
    rest = hit.tokens - hit.alias_tokens
    if hit.alias_tokens and hit.alias_handles <= left:
        found[Way.ALIAS] = (
            hit.alias_handles * costs.alias_handle_us + costs.copy_us(rest * hit.token_bytes) + displaced(rest)
        )
    if hit.own_handles <= left:
        copied = costs.copy_us(hit.tokens * hit.token_bytes)
        found[Way.COPY] = hit.own_handles * costs.own_handle_us + copied + displaced(hit.tokens)
    if hit.segments is not None:
        found[Way.TABLE] = (hit.segments - 1) * costs.table_step_us * hit.expected_tokens
    return found


def choose(hit: Hit, costs: ReuseCosts, ways: Collection[Way] = frozenset(Way)) -> Decision:
    """The cheapest of some ways to a hit; `NONE` is always one. Of ways that cost the same, the one that needs no
    driver call."""
    found = {way: cost for way, cost in costs_of(hit, costs).items() if way in ways or way is Way.NONE}
    order = [Way.ADOPT, Way.TABLE, Way.ALIAS, Way.COPY, Way.NONE]
    ranked = sorted(found, key=lambda way: (found[way], order.index(way)))
    way = ranked[0]
    return Decision(way, _reason(hit, way, found, ranked, costs), found)


def _reason(hit: Hit, way: Way, found: Mapping[Way, float], ranked: Sequence[Way], costs: ReuseCosts) -> str:
    what = {
        Way.ADOPT: f"nobody else needs the slot, and {hit.lost_tokens} tokens behind the prefix are lost",
        Way.ALIAS: f"{hit.alias_handles} whole extents hold {hit.alias_tokens} of {hit.tokens} tokens, "
        f"{costs.alias_handle_us:.1f} us each",
        Way.COPY: f"{hit.tokens * hit.token_bytes:,} bytes are copied",
        Way.TABLE: f"{hit.segments} segments are read for {hit.expected_tokens} steps, {costs.table_step_us:.2f} us "
        f"each ({'measured at the start' if costs.table_is_measured else 'not measured'})",
        Way.NONE: f"{hit.tokens} tokens are computed sooner than they are fetched",
    }[way]
    others = ", ".join(f"{each.value} {found[each]:.0f}" for each in ranked[1:])
    return f"{what}: {found[way]:.0f} us" + (f" (others: {others})" if others else "")


def crossover(
    lengths: Sequence[int],
    token_bytes: int,
    extent_bytes: int,
    costs: ReuseCosts,
    expected_tokens: int = 256,
    num_ranges: int = 1,
    granularity: int = 2 << 20,
    largest_extent: int = 256 << 20,
) -> list[dict[str, float | str]]:
    """What aliasing, copying, reading through a table and computing anew cost by the length of the prefix.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of prefixes.
    token_bytes : int
        Of one token in all layers.
    extent_bytes : int
        Of the owner's extents; a prefix shares the whole ones and copies the rest.
    num_ranges : int
        Ranges of the layout: an extent lies in one of them.
    granularity, largest_extent : int
        Bytes. A copy takes the fewest extents of power-of-two classes between the two.

    Returns
    -------
    list of dict
        A row a length: ``tokens``, ``alias_us``, ``copy_us``, ``table_us``, ``compute_us``, ``handles``; ``way`` is the
        cheapest of all (nothing is adopted), ``mapped_way`` the cheapest without a table.
    """
    row_bytes = token_bytes // num_ranges
    rows: list[dict[str, float | str]] = []
    for tokens in lengths:
        whole = tokens * row_bytes // extent_bytes
        hit = Hit(
            tokens,
            token_bytes,
            alias_tokens=whole * extent_bytes // row_bytes,
            alias_handles=whole * num_ranges,
            own_handles=_fewest_extents(-(-tokens * row_bytes // granularity), largest_extent // granularity)
            * num_ranges,
            segments=2,
            expected_tokens=expected_tokens,
        )
        found = costs_of(hit, costs)
        rows.append(
            {
                "tokens": tokens,
                "handles": hit.alias_handles,
                # Where no extent is whole, aliasing is copying.
                "alias_us": found.get(Way.ALIAS, found[Way.COPY]),
                "copy_us": found[Way.COPY],
                "table_us": found[Way.TABLE],
                "compute_us": found[Way.NONE],
                "way": choose(hit, costs).way.value,
                "mapped_way": choose(hit, costs, (Way.ALIAS, Way.COPY)).way.value,
            }
        )
    return rows


def _fewest_extents(granules: int, largest: int) -> int:
    return granules // largest + (granules % largest).bit_count()
