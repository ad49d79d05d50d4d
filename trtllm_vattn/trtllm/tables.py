"""Block tables that are never rewritten: a constant on the device, of which a batch's rows are gathered.

TensorRT-LLM's kernels take a table with K and V apart, as offsets that count one layer's K or V of one block
(``block × layers × kv_factor``, and one more for V); others take one table of block numbers. All pools have the same
layout, so one constant serves them all. Rows follow the batch's order and are copied on the device, and only when the
batch is made of other sequences than before.

A row goes on past its sequence, to blocks that may have no memory. Decode kernels do not look there. Context attention
loads whole tiles of keys, past a prompt's end too: so the rows of prompts name the tail behind their last block. They
do not grow while they are prompts, and when one begins to decode the batch is another.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.blocks import BlockLayout
from trtllm_vattn.vmm.tensors import upload


class AffineTables:
    """The constants.

    Parameters
    ----------
    width : int
        Entries of a row; those beyond a slot's blocks name the tail.
    tail : int
        A block that is always mapped. There is one row more than the layout's slots, and all of it is the tail: the
        row of dummy requests, whatever their length.
    """

    def __init__(self, layout: BlockLayout, width: int, tail: int, device: torch.device) -> None:
        self.ordinals = ordinals = torch.arange(width, dtype=torch.int32)
        firsts = torch.arange(layout.num_slots + 1, dtype=torch.int32)[:, None] * layout.blocks_per_slot
        blocks = torch.where(ordinals < layout.blocks_per_slot, firsts + ordinals, tail)
        blocks[layout.num_slots] = tail
        self.dummy_row = layout.num_slots
        self.one = blocks.to(device)
        """int32 ``[slots + 1, width]``: block numbers, for kernels that take one table."""
        k = blocks * (layout.layers_per_range * layout.kv_factor)
        self.host = torch.stack([k, k + (layout.kv_factor - 1)], dim=1)
        """int32 ``[slots + 1, 2, width]`` on the host: offsets of K and of V."""
        self.apart = self.host.to(device)
        """The same on the device, for kernels that take K and V apart."""

    def rows(self, slots: Sequence[int], apart: bool = True) -> torch.Tensor:
        """The rows of some slots, in their order, ``[len(slots), 2, width]`` or, not apart, ``[len(slots), width]``."""
        index = torch.tensor(slots, dtype=torch.int64, device=self.one.device)
        return (self.apart if apart else self.one)[index]


@dataclass
class _Gathered:
    """What a destination holds: rows of these requests, as of `epoch`; `version` counts torch's writes to it."""

    ids: list[int]
    prompts: int
    epoch: int
    version: int | None


class RowGatherer:
    """Fills destinations ``[pools, sequences, 2, width]`` with the rows of a batch's requests.

    Parameters
    ----------
    slots_of, blocks_of : callable
        The rows of request ids, in order; how many blocks each has.
    host : Tensor
        int32 ``[pools, sequences, 2, width]`` on the host, which kernels are given beside the one on the device; kept
        the same.

    Attributes
    ----------
    epoch : int
        To be raised by whoever takes a request's slot, so that its id may come to name another.
    copies : int
        How often rows were copied.
    """

    def __init__(
        self,
        tables: AffineTables,
        slots_of: Callable[[Sequence[int]], list[int]],
        blocks_of: Callable[[Sequence[int]], list[int]],
        host: torch.Tensor,
    ) -> None:
        self.tables, self.host = tables, host
        self._slots_of, self._blocks_of = slots_of, blocks_of
        self.epoch = self.copies = 0
        self._held: dict[int, tuple[weakref.ref[torch.Tensor], _Gathered]] = {}
        self._host_holds: tuple[list[int], int, int] = ([], 0, -1)

    def fill(self, destination: torch.Tensor, request_ids: Sequence[int], prompts: int = 0) -> bool:
        """Have the first rows of every pool of `destination` be those of `request_ids`, the first `prompts` of them of
        prompts; returns whether any was copied.

        Raises ConfigError where they are more than its rows.
        """
        held = self._known(destination)
        if held and held.epoch == self.epoch and held.prompts == prompts and held.ids == request_ids:
            return False
        ids, count = list(request_ids), len(request_ids)
        room = min(destination.shape[1], self.host.shape[1])
        if count > room:
            raise ConfigError(f"{count} requests for a table of {room} rows; raise max_batch_size")
        slots = self._slots_of(ids)
        index = upload(torch.tensor(slots, dtype=torch.int64).numpy(), destination.device)
        ends = torch.tensor(self._blocks_of(ids[:prompts]), dtype=torch.int64)[:, None, None]
        past = self.tables.ordinals >= ends
        first = destination[0, :count]
        torch.index_select(self.tables.apart, 0, index, out=first)
        if prompts:
            tail = self.tables.apart[self.tables.dummy_row]
            first[:prompts] = torch.where(upload(past.numpy(), destination.device), tail, first[:prompts])
        if len(destination) > 1:
            destination[1:, :count] = first
        if self._host_holds != (ids, prompts, self.epoch):
            rows = self.tables.host[slots]
            rows[:prompts] = torch.where(past, self.tables.host[self.tables.dummy_row], rows[:prompts])
            self.host[:, :count] = rows
            self._host_holds = (ids, prompts, self.epoch)
        self._held = {key: pair for key, pair in self._held.items() if pair[0]() is not None}
        gathered = _Gathered(ids, prompts, self.epoch, _version(destination))
        self._held[id(destination)] = weakref.ref(destination), gathered
        self.copies += 1
        return True

    def _known(self, destination: torch.Tensor) -> _Gathered | None:
        """What we left in a destination, where nobody has written to it since."""
        found = self._held.get(id(destination))
        if found is None or found[0]() is not destination or found[1].version != _version(destination):
            return None
        return found[1]


def _version(tensor: torch.Tensor) -> int | None:
    """How often torch has written to a tensor; None where it does not count."""
    return None if tensor.is_inference() else tensor._version
