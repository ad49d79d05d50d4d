"""The choice between the ways to a hit: each wins where it costs least, and says why."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from trtllm_vattn.cache.prefix import Hit, ReuseCosts, Way, choose
from trtllm_vattn.cache.prefix.hybrid import costs_of, crossover
from trtllm_vattn.errors import ConfigError

COSTS = ReuseCosts()
TOKEN = 131072
HIT = Hit(4096, TOKEN, alias_tokens=4096, alias_handles=4, own_handles=4)


def test_nothing_is_lost_by_adopting_a_slot_that_ends_there() -> None:
    decision = choose(replace(HIT, lost_tokens=0, segments=2), COSTS)
    assert decision.way is Way.ADOPT
    assert decision.costs[Way.ADOPT] == 0


def test_a_slot_with_a_long_tail_is_not_adopted() -> None:
    decision = choose(replace(HIT, lost_tokens=8000), COSTS)
    assert decision.way is Way.ALIAS
    assert "4 whole extents hold 4096 of 4096 tokens" in decision.reason
    assert "adopt" in decision.reason


def test_small_extents_are_copied_and_large_ones_aliased() -> None:
    """At 2 GB a millisecond the crossover is near 50 MB a handle, less what backing the copy costs."""
    small = replace(HIT, tokens=64, alias_tokens=64, alias_handles=128, own_handles=2)
    assert choose(small, COSTS).way is Way.COPY
    assert choose(HIT, COSTS).way is Way.ALIAS


def test_a_copy_that_displaces_cached_tokens_costs_what_they_are_worth() -> None:
    hit = replace(HIT, tokens=512, alias_tokens=512, alias_handles=32, own_handles=1)
    assert choose(hit, COSTS).way is Way.COPY
    assert choose(replace(hit, displaces=True), COSTS).way is Way.ALIAS


def test_a_table_is_for_short_lives() -> None:
    hit = replace(HIT, tokens=512, alias_tokens=0, alias_handles=0, segments=2)
    assert choose(replace(hit, expected_tokens=100), COSTS).way is Way.TABLE
    assert choose(replace(hit, expected_tokens=100_000), COSTS).way is Way.COPY


def test_the_budget_of_mappings_rules_out_handles() -> None:
    found = costs_of(replace(HIT, mappings_left=3, segments=2), COSTS)
    assert set(found) == {Way.NONE, Way.TABLE}


def test_only_ways_that_may_be_chosen_are() -> None:
    hit = replace(HIT, lost_tokens=0, segments=2)
    assert choose(hit, COSTS, [Way.COPY]).way is Way.COPY
    assert choose(hit, COSTS, []).way is Way.NONE


def test_computing_wins_where_fetching_is_slow() -> None:
    slow = replace(COSTS, copy_launch_us=1e6)
    hit = Hit(16, TOKEN)
    assert choose(hit, slow).way is Way.NONE


@pytest.mark.parametrize("name", ["create_us", "copy_bytes_per_us", "table_step_us", "reuse_chance"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "2", True, None])
def test_costs_that_cannot_be_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        ReuseCosts(**{name: value})  # type: ignore[arg-type]


def test_rates_of_nothing_and_chances_above_one_are_refused() -> None:
    for name in ("copy_bytes_per_us", "prefill_tokens_per_s"):
        with pytest.raises(ConfigError, match=name):
            ReuseCosts(**{name: 0})
    with pytest.raises(ConfigError, match="reuse_chance"):
        ReuseCosts(reuse_chance=1.5)


def test_the_crossover_moves_with_the_size_of_extents() -> None:
    lengths = [32, 1024, 4096, 65536]
    small = crossover(lengths, TOKEN, 2 << 20, COSTS, num_ranges=2)
    large = crossover(lengths, TOKEN, 256 << 20, COSTS, num_ranges=2)
    assert {row["way"] for row in [*small, *large]} == {"table"}
    assert [row["mapped_way"] for row in small] == ["alias", "copy", "copy", "copy"]
    assert [row["mapped_way"] for row in large][-1] == "alias"
    assert small[-1]["handles"] == 65536 // 32 * 2
    assert large[-1]["alias_us"] < large[-1]["copy_us"] < large[-1]["compute_us"]
    assert large[0]["alias_us"] == large[0]["copy_us"]
