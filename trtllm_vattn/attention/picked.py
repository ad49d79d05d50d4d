"""Decode attention by whichever kernel is the fastest for the lengths at hand.

On a GPU that is cuDNN's or our own by equal shares (shares.py): cuDNN's is a little faster where sequences are equal,
ours by up to several times where they are not. Whoever steps asks `pick` with the lengths, which the host knows before
a launch, and says `use`; a captured step is captured once for each kernel that is picked. Neighbours' lengths then
decide on the kernel, and so on the last bits of a sequence's logits; `deterministic` keeps to one kernel whose result
for a sequence depends on that sequence alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import torch

from trtllm_vattn.attention.base import Attention, Chunks
from trtllm_vattn.attention.cost import Cost, CostFile, Load, calibration_lengths, cheapest
from trtllm_vattn.attention.gather import GatheringAttention
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.attention.shares import SharesAttention
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import ConfigError

Timed = Callable[[Callable[[], object]], float]
"""Calls a function of all layers, captured where that is possible, and says how many microseconds it took."""


class PickedAttention(GatheringAttention):
    """Several backends over one cache, one of which is in use at a time; at first that is the first of `kernels`.

    Parameters
    ----------
    deterministic : bool
        Keep to the first kernel, cuDNN's on a GPU.
    kernels : mapping or None
        Backends by name; None: cuDNN's and ours on a GPU, the reference and ours on the host.

    Raises
    ------
    ConfigError
        A backend does not work over this cache or on this machine.
    """

    name: ClassVar[str] = "picked"

    def __init__(
        self,
        cache: KVCache,
        num_heads: int,
        scale: float | None = None,
        *,
        deterministic: bool = False,
        kernels: Mapping[str, Attention] | None = None,
    ) -> None:
        super().__init__(cache, num_heads, scale)
        self.kernels: dict[str, Attention] = dict(kernels or self._usual(deterministic))
        if deterministic:
            self.kernels = dict(list(self.kernels.items())[:1])
        self._first = self._current = next(iter(self.kernels))
        self._costs: dict[tuple[int, bool], dict[str, Cost]] = {}

    def _usual(self, deterministic: bool) -> dict[str, Attention]:
        cache, heads, scale = self.cache, self.num_heads, self.scale
        first: Attention
        if cache.device.type == "cuda":
            from trtllm_vattn.attention.cudnn import CudnnAttention

            first = CudnnAttention(cache, heads, scale)
        else:
            first = TorchAttention(cache, heads, scale)
        return (
            {first.name: first}
            if deterministic
            else {first.name: first, "shares": SharesAttention(cache, heads, scale)}
        )

    # -- choosing --------------------------------------------------------------------------------------------------

    def pick(self, lengths: np.ndarray, anywhere: bool = False) -> str:
        """The kernel for a batch, int ``[lanes]``, 0 for idle lanes; a few microseconds of arithmetic.

        `anywhere` says that lane i need not be slot i. Of what was not measured (`learn`) the first kernel is picked.
        """
        costs = self._costs.get((len(lengths), anywhere))
        return self._first if costs is None else cheapest(costs, lengths)

    def use(self, kernel: str) -> None:
        """Decode by this kernel from now on. Raises ConfigError for one that is not among `kernels`."""
        if kernel not in self.kernels:
            raise ConfigError(f"no kernel {kernel!r} to pick from; there are {', '.join(self.kernels)}")
        self._current = kernel

    def learn(
        self, backed: np.ndarray, timed: Timed, anywhere: bool = False, file: CostFile | None = None, card: str = ""
    ) -> dict[str, Cost]:
        """Costs of each kernel for ``len(backed)`` lanes: from `file`, or measured and remembered there.

        Slots 0 to ``len(backed) - 1`` are read, of each so many tokens at most as `backed` says, which must be mapped
        and finite. `card` names the GPU and the versions of what runs on it.
        """
        lanes = len(backed)
        key = self._key(lanes, anywhere, card)
        costs = file.get(key) if file is not None else None
        if costs is None or set(costs) != set(self.kernels):
            costs = self._measure(backed, timed, anywhere)
            if file is not None:
                file.put(key, costs)
        self._costs[lanes, anywhere] = costs
        return costs

    def _key(self, lanes: int, anywhere: bool, card: str) -> str:
        shape, kv = self.cache.shape, self.cache.layer(0)
        parts = (card, self.num_heads, shape.num_kv_heads, shape.head_dim, shape.dtype, shape.max_seq_len)
        return " ".join(map(str, (*parts, tuple(kv.k.stride()), lanes, "anywhere" if anywhere else "in place")))

    def _measure(self, backed: np.ndarray, timed: Timed, anywhere: bool) -> dict[str, Cost]:
        lanes, shape, device = len(backed), self.cache.shape, self.cache.device
        q = torch.zeros(lanes, self.num_heads, shape.head_dim, dtype=shape.dtype, device=device)
        slots = self._lanes[:lanes] if anywhere else None
        batches = calibration_lengths(backed)
        took: dict[str, list[float]] = {name: [] for name in self.kernels}
        for batch in batches:
            lengths = torch.from_numpy(batch).to(device, torch.int32)
            for name, kernel in self.kernels.items():

                def layers(kernel: Attention = kernel, lengths: torch.Tensor = lengths) -> None:
                    for layer in range(shape.num_layers):
                        kernel.decode(layer, q, lengths, slots)

                took[name].append(timed(layers) / shape.num_layers)
        loads = [Load.of(batch) for batch in batches]
        return {name: Cost.fitted(loads, times, lanes) for name, times in took.items()}

    # -- the backend in use ------------------------------------------------------------------------------------------

    def storages(self) -> list[torch.Tensor]:
        return [*super().storages(), *(tensor for kernel in self.kernels.values() for tensor in kernel.storages())]

    def decode(
        self,
        layer: int,
        q: torch.Tensor,
        lengths: torch.Tensor,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.kernels[self._current].decode(layer, q, lengths, slots, out)

    def prefill(
        self,
        layer: int,
        q: torch.Tensor,
        slot: torch.Tensor,
        query_len: torch.Tensor,
        length: torch.Tensor,
        max_length: int,
    ) -> torch.Tensor:
        return self.kernels[self._first].prefill(layer, q, slot, query_len, length, max_length)

    def prefill_together(self, layer: int, q: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        return self.kernels[self._first].prefill_together(layer, q, chunks)
