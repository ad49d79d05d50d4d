"""Who holds which tokens: a radix tree over blocks of token ids.

An *owner* is a slot that holds the KV of a sequence's first tokens, all of them in order; so one owner serves every
prefix of its own sequence, and the tree stores where each owner ends. A node is one block of `block_size` tokens behind
all blocks above it; children are looked up by the block's token ids themselves, so no collision of hashes can give a
sequence another one's KV. Matching goes to the token: what an owner holds beyond its last whole block is kept too, and
a match may end inside a block.

What is evicted is a *run*: the blocks at the end of one branch that were last used at the same time. Every use of a
block is a use of the blocks before it, so the least recently used block is always at an end (SGLang's RadixAttention,
arXiv 2312.07104; vLLM's prefix cache does the same by blocks).

Nothing here knows of memory. Not thread-safe.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trtllm_vattn.cache.prefix.events import AllBlocksCleared, BlockRemoved, BlockStored, KVCacheEvent
from trtllm_vattn.errors import ConfigError

TOKEN = np.dtype("<i8")
DEFAULT_PRIORITY = 35
"""Of a request that names none; priorities go from 0 to 100, and lower ones are evicted first (TensorRT-LLM's)."""


class Retention(NamedTuple):
    """What the tokens of a sequence from `start` on are worth: `priority` (0 to 100) for so many seconds, and
    `DEFAULT_PRIORITY` after that; None is for good."""

    start: int
    priority: int
    seconds: float | None = None


Priorities = int | Sequence[Retention]
"""One priority for all tokens, or one from each `Retention.start` on, in their order; the first starts at 0."""


class PrefixKey(NamedTuple):
    """What KV depends on beside the tokens before it; KV of one key never serves another.

    Attributes
    ----------
    salt : str
        A tenant's own word: sequences of different salts share nothing, so nobody can time another's prompts.
    weights_version : int
        Of the model's weights.
    adapter : Hashable
        LoRA adapter; an int is reported as ``lora_id``, a str as ``lora_name``.
    policy : Hashable
        What decides which KV is kept and how (windows, compression), where a policy is used.
    """

    salt: str = ""
    weights_version: int = 0
    adapter: Hashable = None
    policy: Hashable = None


class Match(NamedTuple):
    """The longest prefix that is held: `tokens` of them by `owner`, which holds `owner_tokens` in all."""

    owner: int
    tokens: int
    owner_tokens: int


class _Node:
    """One block, behind those of its parents. `ends` has the owners whose last whole block it is, with the token ids
    (as bytes) that they hold beyond it."""

    __slots__ = (
        "block",
        "children",
        "depth",
        "ends",
        "expires",
        "hash",
        "last_used",
        "parent",
        "pins",
        "priority",
        "stamp",
    )

    def __init__(self, parent: _Node | None, block: bytes, digest: int) -> None:
        self.parent, self.block, self.hash = parent, block, digest
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: dict[bytes, _Node] = {}
        self.ends: dict[int, bytes] = {}
        self.last_used = self.priority = self.pins = self.stamp = 0
        self.expires = math.inf

    def retain(self, priority: int, expires: float) -> bool:
        """It has at least this priority until that time; returns whether it has it, and for a limited time."""
        if priority > self.priority:
            self.priority, self.expires = priority, expires
        elif priority == self.priority:
            self.expires = max(self.expires, expires)
        else:
            return False
        return self.expires < math.inf


class _Entry:
    __slots__ = ("end", "evictable", "key", "priority", "tokens")

    def __init__(self, end: _Node, key: PrefixKey, tokens: int, evictable: bool, priority: Priorities) -> None:
        self.end, self.key, self.tokens, self.evictable, self.priority = end, key, tokens, evictable, priority


@dataclass(frozen=True)
class Run:
    """The end of one branch, which may be evicted: tokens `start` to `stop` of `owners`; `bounds` are the first tokens
    of this run and of those above it that nobody else needs, each with when it was last used: evicting further up takes
    what was used later."""

    owners: tuple[int, ...]
    start: int
    stop: int
    bounds: tuple[tuple[int, int, int], ...]
    """(first token, priority, last used), nearest to the end first."""
    node: _Node
    branches_off: bool
    """Others hold what lies above the last of `bounds`."""


class PrefixTree:
    """Owners of token prefixes, looked up by tokens and evicted by time of use.

    Parameters
    ----------
    block_size : int
        Tokens a block; it has nothing to do with pages of memory. Small blocks find branches sooner, large ones are
        fewer to look up.
    events : bool
        Keep events for `take_events`.
    clock : callable
        Seconds, for priorities that are for a limited time.

    Raises
    ------
    ConfigError
        `block_size` is not a positive whole number.
    """

    def __init__(self, block_size: int = 16, events: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
            raise ConfigError(f"block_size is {block_size!r}; it must be a positive whole number of tokens")
        self.block_size = block_size
        self.num_blocks = 0
        self._block_bytes = block_size * TOKEN.itemsize
        self._events: list[KVCacheEvent] | None = [] if events else None
        self._roots: dict[PrefixKey, _Node] = {}
        self._entries: dict[int, _Entry] = {}
        self._now = 0
        self._heap: list[tuple[int, int, int, int, _Node, int]] = []
        self._numbers = itertools.count()
        self._clock = clock
        self._expiring: list[tuple[float, int, _Node]] = []
        self._limited = False
        """Whether any block ever had a priority for a limited time."""

    # -- reading ------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, owner: int) -> bool:
        return owner in self._entries

    def owners(self) -> list[int]:
        """Everybody who holds anything."""
        return list(self._entries)

    def tokens_of(self, owner: int) -> int:
        """Tokens that an owner holds; 0 for one that is not in the tree."""
        entry = self._entries.get(owner)
        return 0 if entry is None else entry.tokens

    def match(self, tokens: Sequence[int] | np.ndarray, key: PrefixKey = PrefixKey()) -> Match | None:  # noqa: B008
        """The longest prefix of `tokens` that an owner holds, less than all of them: the last one is computed anew, so
        that there are logits. None where nobody holds the first token. Nothing changes; see `touch`."""
        root = self._roots.get(key)
        if root is None:
            return None
        data = as_bytes(tokens)[: -TOKEN.itemsize]
        node = self._walk(root, data)
        rest = data[node.depth * self._block_bytes :][: self._block_bytes]
        more, owner = self._inside(node, rest)
        matched = node.depth * self.block_size + more
        if not matched:
            return None
        return Match(owner, matched, self._entries[owner].tokens)

    def _walk(self, node: _Node, data: bytes) -> _Node:
        """The last node whose blocks `data` begins with."""
        size = self._block_bytes
        for at in range(0, len(data) - size + 1, size):
            below = node.children.get(data[at : at + size])
            if below is None:
                break
            node = below
        return node

    def _inside(self, node: _Node, rest: bytes) -> tuple[int, int]:
        """Tokens of `rest`, which is less than a block or in no child, that some owner holds behind a node, and who: an
        owner that ends there if one does."""
        best, owner, first = 0, -1, rest[: TOKEN.itemsize]
        for each, tail in node.ends.items():
            more = _common(tail, rest)
            if owner < 0 or more > best:
                best, owner = more, each
        if first:
            for block, child in node.children.items():
                if block.startswith(first) and (more := _common(block, rest)) > best:
                    best, owner = more, _some_end(child)
        return best, owner if owner >= 0 else _some_end(node) if node.children else -1

    def is_covered(self, owner: int) -> bool:
        """Whether others hold all whole blocks that an owner holds."""
        end = self._entries[owner].end
        return bool(end.children) or len(end.ends) > 1

    def priority_of(self, owner: int) -> int:
        """The highest priority of those who hold an owner's last block."""
        return self._entries[owner].end.priority

    def keeps_pinned(self, owner: int, tokens: int) -> bool:
        """Whether a block is pinned that nobody holds but this owner, behind its first `tokens` tokens."""
        node = self._entries[owner].end
        if self.is_covered(owner):
            return False
        while node.parent is not None and node.depth * self.block_size > tokens:
            if node.pins:
                return True
            node = node.parent
            if len(node.children) > 1 or node.ends:
                return False
        return False

    def ends_above(self, owner: int) -> list[int]:
        """Other owners whose whole blocks an owner holds too, from its end upwards."""
        node: _Node | None = self._entries[owner].end
        found = []
        while node is not None:
            found += [each for each in node.ends if each != owner]
            node = node.parent
        return found

    # -- writing ------------------------------------------------------------------------------------------------------

    def touch(self, match: Match) -> None:
        """A match was used: its blocks are the last to be evicted from now on."""
        self._now += 1
        self._use(self._last_node(match))

    def _last_node(self, match: Match) -> _Node:
        """The block that a match ends in."""
        node = self._entries[match.owner].end
        while node.depth > -(-match.tokens // self.block_size):
            node = node.parent  # type: ignore[assignment]
        return node

    @contextmanager
    def keeping(self, match: Match) -> Iterator[None]:
        """Nothing of a match is evicted meanwhile."""
        node = self._last_node(match)
        node.pins += 1
        try:
            yield
        finally:
            node.pins -= 1
            self._push(node)

    def _use(self, node: _Node) -> None:
        end: _Node | None = node
        while end is not None:
            end.last_used = self._now
            end.stamp += 1
            end = end.parent
        self._push(node)

    def insert(
        self,
        owner: int,
        tokens: Sequence[int] | np.ndarray,
        key: PrefixKey = PrefixKey(),  # noqa: B008
        priority: Priorities = DEFAULT_PRIORITY,
        evictable: bool = True,
        like: int | None = None,
    ) -> None:
        """An owner holds these tokens, which begin with those that it held before. `evictable` is False for one that
        runs. A block has the priority of its first token, or a higher one that somebody else gave it. `like` is an
        owner that holds all of these tokens, if one is known: they are not looked up then. Raises ConfigError for no
        tokens."""
        data = as_bytes(tokens)
        if not data:
            raise ConfigError(f"owner {owner} holds no tokens; insert it when it does")
        self._now += 1
        root = self._roots.get(key)
        if root is None:
            root = self._roots[key] = _Node(None, b"", 0)
        size = self._block_bytes
        whole = len(data) // size * size
        old = self._entries.get(owner)
        node = self._known(root, data, key, priority, owner if old is not None else like)
        new: list[_Node] = []
        steps = [Retention(0, priority)] if isinstance(priority, int) else list(priority)
        now = self._clock()
        for at in range(node.depth * size, whole, size):
            block = data[at : at + size]
            while len(steps) > 1 and steps[1].start * TOKEN.itemsize <= at:
                del steps[0]
            below = node.children.get(block)
            if below is None:
                below = node.children[block] = _Node(node, block, self._digest(node, block, key))
                new.append(below)
            for_s = steps[0].seconds
            if below.retain(steps[0].priority, math.inf if for_s is None else now + for_s):
                self._limited = True
                heapq.heappush(self._expiring, (below.expires, next(self._numbers), below))
            node = below
        self.num_blocks += len(new)
        self._stored(new, key)
        if old is not None:
            del old.end.ends[owner]
        node.ends[owner] = data[whole:]
        self._entries[owner] = _Entry(node, key, len(data) // TOKEN.itemsize, evictable, priority)
        if old is not None and old.end is not node:
            self._prune(old.end, old.key)
        self._use(node)

    def _known(self, root: _Node, data: bytes, key: PrefixKey, priority: Priorities, owner: int | None) -> _Node:
        """The last block of `data` that an owner, who holds the same first tokens, is known to hold, with all blocks
        down to it at this priority at least; the root where they have to be looked up one by one: without an owner, and
        where priorities are for a limited time or not the same for all tokens."""
        entry = None if owner is None else self._entries.get(owner)
        if entry is None or entry.key != key or self._limited or not isinstance(priority, int):
            return root
        node, blocks = entry.end, len(data) // self._block_bytes
        while node.depth > blocks:
            node = node.parent  # type: ignore[assignment]
        # It holds them, by its word; one that is wrong would give others' keys and values to who looks them up.
        if node.parent is None or not data.startswith(node.block, (node.depth - 1) * self._block_bytes):
            return root
        if not isinstance(entry.priority, int) or entry.priority < priority:
            above = node
            while above.parent is not None:
                above.retain(priority, math.inf)
                above = above.parent
        return node

    def truncate(self, owner: int, tokens: int) -> None:
        """An owner holds its first `tokens` tokens and no more; 0 removes it."""
        if tokens <= 0:
            self.remove(owner)
            return
        entry = self._entries[owner]
        if tokens >= entry.tokens:
            return
        old, tail = entry.end, entry.end.ends.pop(owner)
        node = old
        while node.depth > tokens // self.block_size:
            node, tail = node.parent, node.block  # type: ignore[assignment]
        entry.end, entry.tokens = node, tokens
        node.ends[owner] = tail[: tokens % self.block_size * TOKEN.itemsize]
        self._prune(old, entry.key)
        self._push(node)

    def remove(self, owner: int) -> None:
        """An owner holds nothing any more."""
        entry = self._entries.pop(owner)
        del entry.end.ends[owner]
        self._prune(entry.end, entry.key)

    def rename(self, owner: int, new: int) -> None:
        """An owner has another number from now on, which nobody has."""
        entry = self._entries.pop(owner)
        self._entries[new], entry.end.ends[new] = entry, entry.end.ends.pop(owner)

    def is_pinned(self, owner: int) -> bool:
        """Whether any block that an owner holds is pinned."""
        node: _Node | None = self._entries[owner].end
        while node is not None and not node.pins:
            node = node.parent
        return node is not None

    def set_evictable(self, owner: int, evictable: bool) -> None:
        """Whether an owner's end may be evicted; one that runs is not."""
        entry = self._entries[owner]
        entry.evictable = evictable
        self._push(entry.end)

    def pin(self, tokens: Sequence[int] | np.ndarray, key: PrefixKey = PrefixKey()) -> int:  # noqa: B008
        """Keep the whole blocks of these tokens that are held now; returns their tokens. Calls are counted."""
        node = self._node_of(tokens, key)
        if node is None or node.parent is None:
            return 0
        node.pins += 1
        return node.depth * self.block_size

    def unpin(self, tokens: Sequence[int] | np.ndarray, key: PrefixKey = PrefixKey()) -> int:  # noqa: B008
        """Undo one `pin` of the same tokens. Raises ConfigError where there is none."""
        node = self._node_of(tokens, key)
        while node is not None and not node.pins:
            node = node.parent
        if node is None:
            raise ConfigError("these tokens are not pinned; unpin what pin was called with, once for each call")
        node.pins -= 1
        self._push(node)
        return node.depth * self.block_size

    def _node_of(self, tokens: Sequence[int] | np.ndarray, key: PrefixKey) -> _Node | None:
        root = self._roots.get(key)
        return None if root is None else self._walk(root, as_bytes(tokens))

    def clear(self) -> None:
        """Nobody holds anything, nothing is pinned."""
        self._roots, self._entries, self._heap, self._expiring = {}, {}, [], []
        self.num_blocks = 0
        if self._events is not None:
            self._events.append(AllBlocksCleared())

    def _prune(self, node: _Node, key: PrefixKey) -> None:
        """Remove a node, and those above it, that no owner holds."""
        gone: list[int] = []
        while not node.children and not node.ends:
            parent = node.parent
            if parent is None:
                del self._roots[key]
                break
            del parent.children[node.block]
            node.stamp = -1
            gone.append(node.hash)
            node = parent
        else:
            self._push(node)
        self.num_blocks -= len(gone)
        if gone and self._events is not None:
            self._events.append(BlockRemoved(gone))

    # -- eviction -----------------------------------------------------------------------------------------------------

    def _push(self, node: _Node, at: tuple[int, int, int] | None = None) -> None:
        """Queue the end of a branch for eviction, at its own time or another."""
        if not node.children and node.ends and node.parent is not None:
            start, priority, last_used = at or (-1, node.priority, node.last_used)
            heapq.heappush(self._heap, (priority, last_used, next(self._numbers), node.stamp, node, start))
            if len(self._heap) > 64 + 4 * len(self._entries):
                self._heap = [item for item in self._heap if item[3] == item[4].stamp]
                heapq.heapify(self._heap)

    def expire(self) -> list[int]:
        """Give blocks whose time is over `DEFAULT_PRIORITY`; returns the owners that end with one."""
        found: list[int] = []
        now = self._clock()
        while self._expiring and self._expiring[0][0] <= now:
            _, _, node = heapq.heappop(self._expiring)
            if node.stamp >= 0 and node.expires <= now:
                node.priority, node.expires = DEFAULT_PRIORITY, math.inf
                node.stamp += 1
                self._push(node)
                found += node.ends
        return found

    def pop_oldest(self) -> Run | None:
        """Take the run to be evicted first out of the queue: of the lowest priority the least recently used. None where
        nothing may go. Evict it with `truncate` or `remove`, or `requeue` it."""
        while self._heap:
            _, _, _, stamp, node, start = heapq.heappop(self._heap)
            if node.children or not node.ends or node.stamp != stamp or node.pins:
                continue
            if all(self._entries[each].evictable for each in node.ends):
                return self._run(node, start)
        return None

    def _run(self, node: _Node, start: int) -> Run:
        owners = tuple(node.ends)
        stop = max(self._entries[each].tokens for each in owners)
        bounds: list[tuple[int, int, int]] = []
        above = node
        while above.parent is not None:
            used = above.priority, above.last_used
            first = (above.depth - 1) * self.block_size
            if bounds and bounds[-1][1:] == used:
                bounds[-1] = (first, *used)
            else:
                bounds.append((first, *used))
            above = above.parent
            if len(above.children) > 1 or above.ends or above.pins:
                break
        return Run(
            owners,
            bounds[0][0] if start < 0 else start,
            stop,
            tuple(bounds),
            node,
            bool(len(above.children) > 1 or above.ends),
        )

    def requeue(self, run: Run, at: tuple[int, int, int] | None = None) -> None:
        """Put a run back, at its own time or, of `bounds`, that of one further up."""
        self._push(run.node, at)

    # -- events -------------------------------------------------------------------------------------------------------

    @property
    def has_events(self) -> bool:
        """Whether events are kept."""
        return self._events is not None

    def take_events(self) -> list[KVCacheEvent]:
        """Events since the last call, in order; none are kept unless the tree was made with ``events=True``."""
        found, self._events = self._events or [], None if self._events is None else []
        return found

    def _digest(self, parent: _Node, block: bytes, key: PrefixKey) -> int:
        if self._events is None:
            return 0
        digest = hashlib.blake2b(block, digest_size=8)
        digest.update(parent.hash.to_bytes(8, "little") if parent.parent else repr(key).encode())
        return int.from_bytes(digest.digest(), "little")

    def _stored(self, new: list[_Node], key: PrefixKey) -> None:
        if not new or self._events is None:
            return
        parent = new[0].parent
        extra = tuple(part for part in key if part not in ("", 0, None))
        self._events.append(
            BlockStored(
                block_hashes=[node.hash for node in new],
                parent_block_hash=parent.hash if parent is not None and parent.parent is not None else None,
                token_ids=np.frombuffer(b"".join(node.block for node in new), TOKEN).tolist(),
                block_size=self.block_size,
                lora_id=key.adapter if isinstance(key.adapter, int) else None,
                lora_name=key.adapter if isinstance(key.adapter, str) else None,
                extra_keys=[extra] * len(new) if extra else None,
            )
        )


def as_bytes(tokens: Sequence[int] | np.ndarray) -> bytes:
    """Token ids as bytes, `TOKEN` each."""
    return np.ascontiguousarray(tokens, TOKEN).tobytes()


def _common(one: bytes, other: bytes) -> int:
    """Tokens that two runs of token ids begin with alike."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size // TOKEN.itemsize
    unlike = np.frombuffer(one[:size], TOKEN) != np.frombuffer(other[:size], TOKEN)
    return int(unlike.argmax())


def _some_end(node: _Node) -> int:
    """An owner that ends at a node or below it: the one that came last."""
    while not node.ends:
        node = next(reversed(node.children.values()))
    return next(reversed(node.ends))
