"""The tree of token prefixes: what it matches, what it evicts first, what it tells routers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_vattn.cache.prefix import DEFAULT_PRIORITY, PrefixKey, PrefixTree, Retention
from trtllm_vattn.cache.prefix.events import AllBlocksCleared, BlockRemoved, BlockStored
from trtllm_vattn.errors import ConfigError

A = list(range(100, 140))


def test_a_match_is_the_longest_prefix_and_leaves_one_token_to_compute() -> None:
    tree = PrefixTree(block_size=4)
    tree.insert(7, A)
    assert tree.match(A) == (7, 39, 40)
    assert tree.match([*A, 1]) == (7, 40, 40)
    assert tree.match(A[:1]) is None
    assert tree.match([5, *A]) is None


def test_a_match_ends_inside_a_block_and_inside_the_owners_last_one() -> None:
    tree = PrefixTree(block_size=8)
    tree.insert(7, A[:21])
    assert tree.match([*A[:11], 1, 2]) == (7, 11, 21)
    assert tree.match([*A[:20], 1, 2]) == (7, 20, 21)
    assert tree.match([*A[:3], 1, 2]) == (7, 3, 21)


def test_the_owner_that_shares_most_is_found_and_one_that_ends_there_is_preferred() -> None:
    tree = PrefixTree(block_size=4)
    tree.insert(1, [*A[:8], 1, 2, 3, 4])
    tree.insert(2, [*A[:8], 1, 2, 9, 9, 9])
    tree.insert(3, A[:8])
    assert tree.match([*A[:8], 1, 2, 9, 0]) == (2, 11, 13)
    assert tree.match([*A[:8], 7]) == (3, 8, 8)


def test_keys_do_not_meet() -> None:
    tree = PrefixTree(block_size=4)
    keys = [PrefixKey(), PrefixKey("salt"), PrefixKey("", 1), PrefixKey("", 0, "lora"), PrefixKey("", 0, None, "h2o")]
    for owner, key in enumerate(keys):
        assert tree.match(A, key) is None
        tree.insert(owner, A, key)
    found = [tree.match(A, key) for key in keys]
    assert [each.owner for each in found if each] == [0, 1, 2, 3, 4]


def test_blocks_that_hash_alike_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = PrefixTree(block_size=4, events=True)
    monkeypatch.setattr(tree, "_digest", lambda *_: 1)
    tree.insert(1, A[:8])
    tree.insert(2, A[8:16])
    assert tree.match([*A[8:16], 0]) == (2, 8, 8)
    assert tree.match([*A[:4], *A[8:12], 0]) == (1, 4, 8)


def oldest(tree: PrefixTree) -> tuple[tuple[int, ...], int, int]:
    run = tree.pop_oldest()
    assert run is not None
    tree.requeue(run)
    return run.owners, run.start, run.stop


def test_the_least_recently_used_end_of_a_branch_goes_first() -> None:
    tree = PrefixTree(block_size=4)
    tree.insert(1, A[:16])
    tree.insert(2, [*A[:8], *range(8)])
    assert oldest(tree) == ((1,), 8, 16)
    found = tree.match([*A[:12], 0])
    assert found is not None
    tree.touch(found)
    assert oldest(tree) == ((1,), 12, 16)
    tree.truncate(1, 12)
    assert oldest(tree) == ((2,), 8, 16)


def test_a_lower_priority_goes_before_an_older_time() -> None:
    tree = PrefixTree(block_size=4)
    tree.insert(1, A[:8], priority=50)
    tree.insert(2, A[8:16], priority=10)
    assert oldest(tree)[0] == (2,)


def test_what_runs_or_is_pinned_is_not_evicted() -> None:
    tree = PrefixTree(block_size=4)
    tree.insert(1, A[:16])
    tree.insert(2, A[20:28], evictable=False)
    assert tree.pin(A[:9]) == 8
    assert oldest(tree) == ((1,), 8, 16)
    tree.truncate(1, 8)
    assert tree.pop_oldest() is None
    assert tree.unpin(A[:9]) == 8
    assert oldest(tree) == ((1,), 0, 8)
    tree.remove(1)
    tree.set_evictable(2, True)
    assert oldest(tree) == ((2,), 0, 8)


def test_unpinning_what_is_not_pinned_is_refused() -> None:
    tree = PrefixTree(block_size=4)
    tree.insert(1, A[:16])
    with pytest.raises(ConfigError, match="not pinned"):
        tree.unpin(A[:16])
    assert tree.pin([1, 2, 3]) == 0


@pytest.mark.parametrize("block_size", [0, -1, 2.5, True, "16"])
def test_a_block_size_that_cannot_be_is_refused(block_size: object) -> None:
    with pytest.raises(ConfigError, match="block_size"):
        PrefixTree(block_size)  # type: ignore[arg-type]


def test_nothing_is_inserted_without_tokens() -> None:
    with pytest.raises(ConfigError, match="no tokens"):
        PrefixTree().insert(0, [])


def test_routers_are_told_of_each_block_once() -> None:
    tree = PrefixTree(block_size=4, events=True)
    tree.insert(1, A[:10], PrefixKey("tenant"))
    tree.insert(2, [*A[:4], *range(4)], PrefixKey("tenant"))
    stored = tree.take_events()
    first, second = stored
    assert isinstance(first, BlockStored)
    assert isinstance(second, BlockStored)
    assert (first.token_ids, first.block_size, first.parent_block_hash) == (A[:8], 4, None)
    assert (second.token_ids, second.parent_block_hash) == ([0, 1, 2, 3], first.block_hashes[0])
    assert first.extra_keys == [("tenant",)] * 2
    assert len({*first.block_hashes, *second.block_hashes}) == 3
    assert first.as_dict()["type"] == "BlockStored"
    assert {"block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"} <= set(
        first.as_dict()
    )
    tree.truncate(1, 6)
    assert tree.take_events() == [BlockRemoved([first.block_hashes[1]])]
    tree.remove(1)
    assert tree.take_events() == []
    tree.remove(2)
    (removed,) = tree.take_events()
    assert isinstance(removed, BlockRemoved)
    assert set(removed.block_hashes) == {first.block_hashes[0], second.block_hashes[0]}
    tree.clear()
    assert tree.take_events() == [AllBlocksCleared()]


def test_hashes_cover_what_comes_before_and_the_key() -> None:
    def hashes(tokens: list[int], key: PrefixKey) -> list[int]:
        tree = PrefixTree(block_size=4, events=True)
        tree.insert(1, tokens, key)
        (event,) = tree.take_events()
        assert isinstance(event, BlockStored)
        return event.block_hashes

    plain = hashes(A[:8], PrefixKey())
    assert hashes(A[:8], PrefixKey()) == plain
    assert hashes(A[:8], PrefixKey("salt"))[0] != plain[0]
    assert hashes([*A[1:5], *A[4:8]], PrefixKey())[1] != plain[1]


def test_adapters_are_named_as_routers_expect() -> None:
    tree = PrefixTree(block_size=4, events=True)
    tree.insert(1, A[:4], PrefixKey(adapter=3))
    tree.insert(2, A[:4], PrefixKey(adapter="sql"))
    events = tree.take_events()
    assert [(each.lora_id, each.lora_name) for each in events if isinstance(each, BlockStored)] == [
        (3, None),
        (None, "sql"),
    ]


# -- against a model: what each owner holds, as lists ----------------------------------------------------------------

sequences = st.lists(st.integers(0, 2), min_size=1, max_size=14)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), st.integers(0, 5), sequences),
        st.tuples(st.just("truncate"), st.integers(0, 5), st.integers(0, 14)),
        st.tuples(st.just("touch"), sequences),
        st.tuples(st.just("evict")),
    ),
    max_size=40,
)


def common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@settings(deadline=None, max_examples=150)
@given(steps, st.integers(1, 4))
def test_the_tree_holds_what_its_owners_hold(life: list[tuple], block_size: int) -> None:
    tree, held = PrefixTree(block_size, events=True), {}
    known: set[int] = set()
    for name, *arguments in life:
        if name == "insert":
            owner, tokens = arguments
            # Tokens of an owner begin with those that it held.
            tokens = held.get(owner, []) + tokens
            tree.insert(owner, np.array(tokens))
            held[owner] = tokens
        elif name == "truncate":
            owner, tokens = arguments
            if owner in held and tokens <= len(held[owner]):
                tree.truncate(owner, tokens)
                held[owner] = held[owner][:tokens]
        elif name == "touch":
            if (found := tree.match(arguments[0])) is not None:
                tree.touch(found)
        elif (run := tree.pop_oldest()) is not None:
            assert set(run.owners) == {each for each in run.owners if len(held[each]) > run.start}
            for owner in run.owners:
                tree.truncate(owner, run.start)
                held[owner] = held[owner][: run.start]
        held = {owner: tokens for owner, tokens in held.items() if tokens}
        assert {owner: tree.tokens_of(owner) for owner in tree.owners()} == {o: len(t) for o, t in held.items()}
        wanted = {
            tuple(t[: n + block_size]) for t in held.values() for n in range(0, len(t) - block_size + 1, block_size)
        }
        assert tree.num_blocks == len(wanted)
        for event in tree.take_events():
            if isinstance(event, BlockStored):
                assert not known & set(event.block_hashes)
                known |= set(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                assert set(event.block_hashes) <= known
                known -= set(event.block_hashes)
        assert len(known) == tree.num_blocks
        for tokens in [*held.values(), [0, 1, 2, 0, 1, 2, 0]]:
            best = max((common(tokens[:-1], each) for each in held.values()), default=0)
            match = tree.match(tokens)
            assert (match.tokens if match else 0) == best
            if match:
                assert held[match.owner][:best] == tokens[:best]
                assert match.owner_tokens == len(held[match.owner])


def test_priorities_by_token() -> None:
    tree = PrefixTree(block_size=4)
    tree.insert(1, A[:12], priority=[Retention(0, 90), Retention(5, 50), Retention(7, 10)])
    tree.insert(2, A[20:28], priority=60)
    # A block is worth what its first token is.
    first = tree.pop_oldest()
    assert first is not None
    assert (first.owners, first.start, [bound[1] for bound in first.bounds]) == ((1,), 8, [10, 90])
    tree.truncate(1, 8)
    assert [run.owners for run in iter(tree.pop_oldest, None)][:2] == [(2,), (1,)]


def test_a_priority_for_a_time_falls_to_the_default() -> None:
    now = [100.0]
    tree = PrefixTree(block_size=4, clock=lambda: now[0])
    tree.insert(1, A[:8], priority=[Retention(0, 90, 5.0)])
    tree.insert(2, A[20:28], priority=60)
    tree.insert(3, [*A[:4], 1, 2, 3, 4], priority=[Retention(0, 90, 9.0), Retention(4, 20, 1.0)])
    assert tree.expire() == []
    now[0] = 106.0
    assert sorted(tree.expire()) == [1, 3]
    assert [tree.priority_of(owner) for owner in (1, 2, 3)] == [DEFAULT_PRIORITY, 60, DEFAULT_PRIORITY]
    assert [run.owners for run in iter(tree.pop_oldest, None)] == [(1,), (3,), (2,)]
    # What both hold is kept for as long as either asked; what is gone is not asked again.
    assert tree.expire() == []
    tree.remove(1)
    tree.remove(3)
    now[0] = 110.0
    assert tree.expire() == []


def test_what_an_owner_is_known_to_hold_is_not_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, begun, known = PrefixTree(4), [], PrefixTree._known

    def noted(*given: Any) -> Any:
        node = known(*given)
        begun.append(node.depth)
        return node

    tree.insert(0, A[:18])
    monkeypatch.setattr(PrefixTree, "_known", noted)
    tree.insert(0, A)
    tree.insert(1, A[:22], like=0)
    tree.insert(2, A, priority=60, like=1)
    assert begun == [4, 5, 5]
    assert [tree.tokens_of(owner) for owner in range(3)] == [40, 22, 40]
    assert tree.num_blocks == 10
    # Of the blocks that were not looked up, too.
    assert [tree.priority_of(owner) for owner in range(3)] == [60] * 3
    # Whoever says what is not so is not believed.
    tree.insert(3, [*A[:4], *range(8)], like=2)
    assert begun.pop() == 0
    assert tree.match([*A[:4], *range(9)]) == (3, 12, 12)
    assert tree.match(A) == (2, 39, 40)
    for _ in range(2):
        tree.insert(4, A, priority=[Retention(0, 80, 5.0)], like=2)
    assert begun[-2:] == [0, 0], "priorities for a time are those of each block"
