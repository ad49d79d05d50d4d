"""Attention over a cache that keeps only a window of some layers' tokens (`CacheShape.windows`).

Such a layer has as many rows a slot as its window is long, and the token at position p is in row ``p % window``. So
once the window is full it takes no further memory: no page is mapped or unmapped for it, whatever the sequence's
length, and addresses in captured graphs stay. Keys carry their positions since they were rotated, so the order of rows
does not matter to a query that sees all of them:

* **Decode.** Once a token is written, the rows hold exactly what it sees. Any backend is right that attends to
  ``min(length, window)`` rows; it needs no mask.
* **Prompts.** A chunk's tokens would take the places of tokens that the chunk's first queries see. So what the chunk
  needs of the rows is first copied, in the order of positions, to a scratch memory, with the chunk's own tokens behind
  it; a backend that computes windows attends over that, and the chunk's last tokens go to the rows.

Layers that keep all tokens are the inner backend's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch

from trtllm_vattn.attention.base import MIN_CHUNK_ROWS, Attention, PackedPrefill, PrefillChunk
from trtllm_vattn.attention.options import Feature, LayerOptions
from trtllm_vattn.attention.prompts import descriptors_of
from trtllm_vattn.cache.base import FlatKV, KVCache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.values import typed

COPIED_TOKENS = 8192
"""Tokens before their chunks that the chunks of one captured pass may need copied; a pass of more chunks than that
allows for runs eagerly."""

Make = Callable[[KVCache], Attention]


class _Over:
    """A cache as the inner backends see it: with other shapes or rows, and all else its own."""

    def __init__(self, cache: KVCache, **changes: Any) -> None:
        self._cache = cache
        self.shape = replace(cache.shape, windows=(), **changes)

    @property
    def dummy_slot(self) -> int:
        return self.shape.num_slots

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class _Scratch(_Over):
    """Packed tokens as a cache of which slot i begins at token i: the tokens of a chunk are those of one slot, wherever
    they begin. All layers share them.

    Behind `packed` tokens of chunks and of what precedes them, there are the tokens of a pass by their row.
    """

    def __init__(self, cache: KVCache, packed: int, rows: int, longest: int) -> None:
        super().__init__(cache, num_slots=packed + rows, max_seq_len=longest)
        shape = self.shape
        size = (shape.num_slots + 1 + longest, shape.kv_factor, shape.num_kv_heads, shape.head_dim)
        # Zeros: what a kernel loads beyond a chunk's tokens has to be finite.
        self.memory = torch.zeros(size, dtype=shape.dtype, device=cache.device)
        token = self.memory.stride(0)
        flat = (shape.num_slots + 1, longest, shape.num_kv_heads, shape.head_dim)
        self.parts = [self.memory[:, part] for part in range(shape.kv_factor)]
        k, v = (
            part.as_strided(flat, (token, token, shape.head_dim, 1), part.storage_offset())
            for part in (self.parts[0], self.parts[-1])
        )
        self.packed, self.kv = packed, FlatKV(k, v)

    def layer(self, layer: int) -> FlatKV:
        return self.kv

    def head_groups(self, layer: int) -> tuple[FlatKV, ...]:
        return (self.kv,)

    def storages(self) -> list[torch.Tensor]:
        return [self.memory]


@dataclass(frozen=True, eq=False)
class _Pass:
    """Where the tokens of one pass go, for layers of one window; int64 on the device.

    Attributes
    ----------
    slots, rows : Tensor
        ``[rows of the pass]``: where each token is kept. The dummy slot for one that its own chunk's later tokens
        displace.
    parts : sequence of _Part
        Chunks that are attended to in one call.
    """

    slots: torch.Tensor
    rows: torch.Tensor
    parts: Sequence[_Part]


@dataclass(frozen=True, eq=False)
class _Part:
    """Chunks, what is copied for them, and where to; int64 on the device.

    Attributes
    ----------
    old_slots, old_rows, old_to : Tensor
        Kept tokens, and their places in the scratch memory.
    new_to : Tensor
        ``[rows of the pass]``: where each row's token goes there; the last place for a row of no chunk of this part.
    inside : Tensor
        bool ``[rows of the pass]``: which rows belong to a chunk of this part.
    packed : PackedPrefill
        The chunks in the scratch memory.
    first, count : int
        The rows of a single chunk, where the inner backend takes one at a time; all rows else.
    """

    old_slots: torch.Tensor
    old_rows: torch.Tensor
    old_to: torch.Tensor
    new_to: torch.Tensor
    inside: torch.Tensor
    packed: PackedPrefill
    first: int
    count: int


class WindowedAttention(Attention):
    """Attention over a cache with windows, by two inner backends of one kind.

    Parameters
    ----------
    make : callable
        Makes the inner backends: one over the cache as one without windows, one over the scratch memory.
    most_rows : int
        Most rows of a pass.

    Raises
    ------
    ConfigError
        As `make` does, and where the cache keeps blocks.
    """

    name: ClassVar[str] = "windowed"
    keeps_windows: ClassVar[bool] = True
    features: ClassVar[frozenset[Feature]] = frozenset(
        {Feature.WINDOW, Feature.SINK_LOGITS, Feature.SOFTCAP, Feature.FP8}
    )

    def __init__(
        self, cache: KVCache, num_heads: int, scale: float | None = None, *, make: Make, most_rows: int = 2048
    ) -> None:
        super().__init__(cache, num_heads, scale)
        if not isinstance(cache.layer(0), FlatKV):
            raise ConfigError(f"{typed(cache)} has blocks, which keep no windows; use the vattn cache")
        longest = max(window for window in cache.shape.windows if window is not None) - 1
        self.most_chunks: int = max(1, COPIED_TOKENS // max(1, longest))
        packed = self.most_chunks * longest + most_rows
        self._scratch = _Scratch(cache, packed, most_rows, longest + most_rows)
        self.inner = make(cast(KVCache, _Over(cache)))
        self.over_scratch = make(cast(KVCache, self._scratch))
        self.over_read = self.inner.over_read  # type: ignore[misc]
        self.captures_prompts = self.over_scratch.captures_prompts  # type: ignore[misc]
        self._prompts: PackedPrefill | None = None
        self._last: tuple[torch.Tensor, ...] = ()
        self._set_inner_options(self.options)

    # -- what is the inner backend's ---------------------------------------------------------------------------------

    def set_options(self, options: Sequence[LayerOptions]) -> None:
        """As `Attention.set_options`; a layer's window is the one that the cache keeps of it."""
        if any(each.first_tokens for each in options):
            raise ConfigError("first tokens that stay visible are not kept in a window; make a cache without windows")
        if len(options) == self.cache.shape.num_layers:
            for layer, each in enumerate(options):
                if each.window not in (None, self.cache.shape.window_of(layer)):
                    raise ConfigError(
                        f"layer {layer} attends to a window of {each.window} tokens, the cache keeps "
                        f"{self.cache.shape.window_of(layer)}; make the cache with the model's windows"
                    )
        self._set_inner_options(options)
        self.options = tuple(options)

    def _set_inner_options(self, options: Sequence[LayerOptions]) -> None:
        shape = self.cache.shape
        self.inner.set_options([replace(each, window=None) for each in options])
        self.over_scratch.set_options(
            [replace(each, window=shape.window_of(layer)) for layer, each in enumerate(options)]
        )

    @property
    def variants(self) -> tuple[str, ...]:
        return self.inner.variants

    def measure(self, lanes: Sequence[int], anywhere: bool = False) -> None:
        self.inner.measure(lanes, anywhere)

    def pick(self, lengths: np.ndarray, anywhere: bool = False, prefixes: bool = False) -> str:
        return self.inner.pick(lengths, anywhere, prefixes)

    def use(self, variant: str) -> None:
        self.inner.use(variant)

    def describe(self) -> str:
        shape = self.cache.shape
        count = sum(window is not None for window in shape.windows)
        return f"{self.inner.describe()}; {count} of {shape.num_layers} layers keep a window"

    def storages(self) -> list[torch.Tensor]:
        return [*super().storages(), *self.inner.storages(), *self.over_scratch.storages(), self._scratch.memory]

    def begin_step(self) -> None:
        super().begin_step()
        self._prompts = None
        self.inner.begin_step()
        self.over_scratch.begin_step()

    def begin_prompts(self, packed: PackedPrefill) -> None:
        self._prompts = packed

    # -- storing -------------------------------------------------------------------------------------------------------

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        window = self.cache.shape.window_of(layer)
        if window is None:
            self.inner.write(layer, k, v, slots, positions)
        elif self._prompts is None:
            self.inner.write(layer, k, v, slots, self._rows_of(positions, window))
        else:
            self._check_rows(len(k))
            self.over_scratch.write(layer, k, v, self._places(len(k)), self._zeros(positions))
            self._last = (slots, positions)

    def rotate_and_write(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        window = self.cache.shape.window_of(layer)
        if window is None:
            return self.inner.rotate_and_write(layer, q, k, v, cos, sin, slots, positions)
        if self._prompts is None:
            return self.inner.rotate_and_write(layer, q, k, v, cos, sin, slots, self._rows_of(positions, window))
        self._check_rows(len(k))
        self._last = (slots, positions)
        places, zeros = self._places(len(k)), self._zeros(positions)
        return self.over_scratch.rotate_and_write(layer, q, k, v, cos, sin, places, zeros)

    def _check_rows(self, rows: int) -> None:
        most = self._scratch.shape.num_slots - self._scratch.packed
        if rows > most:
            raise ConfigError(f"a pass of {rows} rows over windows of a backend made for {most}; make it for more")

    def _rows_of(self, positions: torch.Tensor, window: int) -> torch.Tensor:
        rows: torch.Tensor = self._for(window, lambda: positions % window, positions)
        return rows

    def _for(self, window: int, make: Callable[[], Any], *inputs: object) -> Any:
        """What `make` makes, once a step for a window and the same inputs."""
        made = self._once_a_step(dict, *inputs)
        if window not in made:
            made[window] = make()
        return made[window]

    def _places(self, rows: int) -> torch.Tensor:
        first = self._scratch.packed
        make = partial(torch.arange, first, first + rows, device=self.cache.device)
        places: torch.Tensor = self._for(rows, make, self)
        return places

    def _zeros(self, positions: torch.Tensor) -> torch.Tensor:
        zeros: torch.Tensor = self._for(0, partial(torch.zeros_like, positions), positions)
        return zeros

    # -- attending -----------------------------------------------------------------------------------------------------

    def decode(
        self,
        layer: int,
        q: torch.Tensor,
        lengths: torch.Tensor,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        window = self.cache.shape.window_of(layer)
        if window is not None:
            lengths = self._for(window, lambda: lengths.clamp(max=window), lengths)
        return self.inner.decode(layer, q, lengths, slots, out)

    def prefill(self, layer: int, q: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        if self.cache.shape.window_of(layer) is None:
            return self.inner.prefill(layer, q, chunk)
        return self.prefill_packed(layer, q, self._prompts_of(chunk))

    def _prompts_of(self, chunk: PrefillChunk) -> PackedPrefill:
        if self._prompts is not None and list(self._prompts.chunks) == [chunk]:
            return self._prompts
        packed = self._once_a_step(partial(PackedPrefill, [chunk]), chunk)
        return packed

    def prefill_packed(self, layer: int, q: torch.Tensor, packed: PackedPrefill) -> torch.Tensor:
        window = self.cache.shape.window_of(layer)
        if window is None:
            return self.inner.prefill_packed(layer, q, packed)
        return self._attend_prompts(layer, window, q, packed, 0)

    def attend_mixed(
        self,
        layer: int,
        q: torch.Tensor,
        decode_lengths: torch.Tensor,
        decode_slots: torch.Tensor,
        packed: PackedPrefill,
    ) -> torch.Tensor:
        window, lanes = self.cache.shape.window_of(layer), len(decode_lengths)
        if window is None:
            return self.inner.attend_mixed(layer, q, decode_lengths, decode_slots, packed)
        out = self._attend_prompts(layer, window, q, packed, lanes)
        if lanes:
            decoded = self.decode(layer, q[:lanes], decode_lengths, decode_slots)
            out[:lanes] = torch.where((decode_lengths > 0)[:, None, None], decoded, out[:lanes])
        return out

    def _attend_prompts(
        self, layer: int, window: int, q: torch.Tensor, packed: PackedPrefill, first_row: int
    ) -> torch.Tensor:
        """Attention of the rows of chunks, zeros for others; then all rows' tokens are kept."""
        slots, positions = self._last
        make = partial(self._plan, window, slots, positions, packed, first_row)
        planned: _Pass = self._for(window, make, packed, slots, positions)
        out, fresh = torch.zeros_like(q, memory_format=torch.contiguous_format), self._scratch.packed
        kept = cast(FlatKV, self.cache.layer(layer))
        pairs = [(_bits(rows), _bits(part)) for rows, part in zip((kept.k, kept.v), self._scratch.parts, strict=False)]
        for part in planned.parts:
            for rows, scratch in pairs:
                scratch[part.old_to] = rows[part.old_slots, part.old_rows]
                scratch[part.new_to] = scratch[fresh : fresh + len(q)]
            self._attend_part(layer, q, out, part)
        for rows, scratch in pairs:
            rows[planned.slots, planned.rows] = scratch[fresh : fresh + len(q)]
        return out

    def _attend_part(self, layer: int, q: torch.Tensor, out: torch.Tensor, part: _Part) -> None:
        if self.over_scratch.captures_prompts:
            found = self.over_scratch.prefill_packed(layer, q, part.packed)
            out.copy_(torch.where(part.inside[:, None, None], found, out))
            return
        rows = slice(part.first, part.first + part.count)
        (chunk,) = part.packed.chunks
        padded = torch.nn.functional.pad(q[rows], (0, 0, 0, 0, 0, max(0, MIN_CHUNK_ROWS - part.count)))
        out[rows] = self.over_scratch.prefill(layer, padded, chunk)[: part.count]

    # -- planning a pass -----------------------------------------------------------------------------------------------

    def _plan(
        self, window: int, slots: torch.Tensor, positions: torch.Tensor, packed: PackedPrefill, first_row: int
    ) -> _Pass:
        descriptors = descriptors_of(packed, first_row, self.cache.device).long()
        chunks = len(packed.chunks) or len(descriptors)
        each = self.most_chunks if self.captures_prompts else 1
        if not packed.chunks and chunks > each:
            raise ConfigError(f"a captured pass of {chunks} chunks over windows; {each} at most are served")
        parts, at = [], first_row
        for first in range(0, chunks, each):
            some = packed.chunks[first : first + each]
            count = sum(chunk.rows for chunk in some)
            parts.append(self._part(window, descriptors[first : first + each], some, len(positions), at, count))
            at += count
        row = torch.arange(len(positions), device=positions.device)
        inside, chunk, (_, _, length, _) = _rows_of_chunks(row, descriptors)
        stays = ~inside | (positions >= length[chunk] - window)
        return _Pass(torch.where(stays, slots, self.cache.dummy_slot), torch.where(stays, positions % window, 0), parts)

    def _part(
        self,
        window: int,
        descriptors: torch.Tensor,
        chunks: Sequence[PrefillChunk],
        rows: int,
        first: int,
        count: int,
    ) -> _Part:
        row = torch.arange(rows, device=descriptors.device)
        inside, chunk, (starts, counts, lengths, slots) = _rows_of_chunks(row, descriptors)
        before = lengths - counts
        # What the first query sees, but itself.
        old = before.clamp(max=window - 1).where(counts > 0, 0)
        begins = (old + counts).cumsum(0) - old - counts
        last = self._scratch.dummy_slot
        new_to = torch.where(inside, begins[chunk] + old[chunk] + row - starts[chunk], last)
        most = max((min(window, each.max_length) for each in chunks), default=window) - 1
        number = torch.arange(len(descriptors) * most, device=row.device)
        of, token = number // max(1, most), number % max(1, most)
        there = token < old[of]
        position = before[of] - old[of] + token
        moved = torch.stack((starts, counts, old + counts, begins), dim=1).to(torch.int32)
        shifted = [
            PrefillChunk(
                each.rows,
                begins[i : i + 1],
                each.query_len,
                moved[i, 2:3],
                min(each.max_length, window - 1 + each.rows),
            )
            for i, each in enumerate(chunks)
        ]
        return _Part(
            torch.where(there, slots[of], self.cache.dummy_slot),
            torch.where(there, position % window, 0),
            torch.where(there, begins[of] + token, last),
            new_to,
            inside,
            PackedPrefill(shifted, (), moved),
            first,
            count,
        )


def _rows_of_chunks(
    row: torch.Tensor, descriptors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Whether each row is of a chunk, of which, and the descriptors' columns; a chunk that has no tokens has 0 rows."""
    first, count, length, slot = descriptors.unbind(1)
    count = torch.where(length >= count, count, 0)
    mine = (row[:, None] >= first) & (row[:, None] < first + count)
    return mine.any(dim=1), mine.int().argmax(dim=1), (first, count, length, slot)


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The same memory, of a type that can be copied by index whatever the numbers are."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
