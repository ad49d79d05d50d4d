"""Block tables that are made once; a batch's rows are gathered from them on the device.

TensorRT-LLM's kernels take a table ``[sequence][K, V][block]`` of offsets that count one layer's K or V of one block
(``block × layers × kv_factor``, plus one for V). A slot's blocks have consecutive numbers, so its row never changes,
and all pools have the same layout, so one table serves them all. Rows are copied only when the batch consists of other
sequences than before.

A row goes on past its sequence, to blocks that may have no memory. Decode kernels do not read there. Context attention
loads whole tiles of keys, past a prompt's end too, so a prompt's row names the null block behind its last block.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.layout import BlockLayout
from trtllm_vattn.vmm.tensors import upload


class AffineTables:
    """One row of offsets for each slot, and one row of null blocks (`dummy_row`), for dummy requests of any length.

    Parameters
    ----------
    width : int
        Entries of a row; those beyond a slot's blocks name the null block.
    null_block : int
        A block that is always mapped.

    Attributes
    ----------
    host, offsets : Tensor
        int32 ``[slots + 1, 2, width]`` on the host and on the device: offsets of K and of V.
    """

    def __init__(self, layout: BlockLayout, width: int, null_block: int, device: torch.device) -> None:
        self.ordinals = ordinals = torch.arange(width, dtype=torch.int32)
        firsts = torch.arange(layout.num_slots + 1, dtype=torch.int32)[:, None] * layout.blocks_per_slot
        blocks = torch.where(ordinals < layout.blocks_per_slot, firsts + ordinals, null_block)
        blocks[layout.num_slots] = null_block
        self.dummy_row = layout.num_slots
        k = blocks * (layout.layers_per_range * layout.kv_factor)
        self.host = torch.stack([k, k + (layout.kv_factor - 1)], dim=1)
        self.offsets = self.host.to(device)


@dataclass
class _Gathered:
    """Rows that a destination holds: of these requests, as of `epoch`. `version` is torch's count of writes to it."""

    ids: list[int]
    prompts: int
    epoch: int
    version: int | None


class RowGatherer:
    """Fills destinations ``[pools, sequences, 2, width]`` with the rows of a batch's requests.

    Parameters
    ----------
    slots_of, blocks_of : callable
        ``slots_of(ids)`` gives the table rows of requests, ``blocks_of(ids)`` how many blocks each has.
    host : Tensor
        int32 ``[pools, sequences, 2, width]`` on the host; always filled like the destination on the device.

    Attributes
    ----------
    epoch : int
        Callers raise it when a request loses its slot: its id may name another slot later.
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
        """Fill the first rows of every pool of `destination` with those of `request_ids`, of which the first `prompts`
        are prompts; returns whether rows were copied.

        Raises ConfigError where there are more requests than rows.
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
        torch.index_select(self.tables.offsets, 0, index, out=first)
        if prompts:
            null = self.tables.offsets[self.tables.dummy_row]
            first[:prompts] = torch.where(upload(past.numpy(), destination.device), null, first[:prompts])
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
        """Rows that `fill` left in a destination; None where somebody has written to it since."""
        found = self._held.get(id(destination))
        if found is None or found[0]() is not destination or found[1].version != _version(destination):
            return None
        return found[1]


def _version(tensor: torch.Tensor) -> int | None:
    """Torch's count of writes to a tensor; None where it does not count."""
    return None if tensor.is_inference() else tensor._version
