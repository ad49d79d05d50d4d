"""Decode attention by the kernel that is fastest for a batch's lengths.

On a GPU the kernels are cuDNN's and the shares kernel (shares.py): cuDNN's is a little faster for equal lengths, the
shares kernel up to several times faster for unequal ones. Before a launch, the caller gives `pick` the lengths, which
the host knows, and passes the result to `use`; a step is captured once for each kernel. So the other sequences' lengths
choose the kernel, and with it the last bits of a sequence's logits. With `deterministic` one kernel is always used,
whose result for a sequence depends on that sequence alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import torch

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.cost import Cost, CostFile, Load, calibration_lengths, cheapest
from trtllm_vattn.attention.cudnn import CudnnAttention
from trtllm_vattn.attention.prompts import FlatPromptsAttention
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.attention.shares import SharesAttention
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import ConfigError

Timed = Callable[[Callable[[], object]], float]
"""Calls a function of all layers (captured if possible) and returns how many microseconds it took."""


class PickedAttention(FlatPromptsAttention):
    """Several backends over one cache, of which one is used at a time; initially the first of `kernels`.

    Parameters
    ----------
    deterministic : bool
        Always use the first kernel, which is cuDNN's on a GPU.
    kernels : mapping or None
        Backends by name; None: cudnn and shares on a GPU, torch and shares on the host.

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
        backend = CudnnAttention if cache.device.type == "cuda" else TorchAttention
        first: Attention = backend(cache, heads, scale)
        if deterministic:
            return {first.name: first}
        return {first.name: first, "shares": SharesAttention(cache, heads, scale, self.prompts)}

    # -- choosing --------------------------------------------------------------------------------------------------

    def pick(self, lengths: np.ndarray, anywhere: bool = False) -> str:
        """The fastest kernel for lengths int ``[lanes]``, 0 for idle lanes; it takes a few microseconds.

        `anywhere` says that lane i need not be slot i. For a number of lanes without costs (`learn`), the first kernel.
        """
        costs = self._costs.get((len(lengths), anywhere))
        return self._first if costs is None else cheapest(costs, lengths)

    def use(self, kernel: str) -> None:
        """Decode by this kernel from now on. Raises ConfigError if it is not among `kernels`."""
        if kernel not in self.kernels:
            raise ConfigError(f"no kernel {kernel!r} to pick from; there are {', '.join(self.kernels)}")
        self._current = kernel

    def learn(
        self, backed: np.ndarray, timed: Timed, anywhere: bool = False, file: CostFile | None = None, card: str = ""
    ) -> dict[str, Cost]:
        """Find each kernel's cost for ``len(backed)`` lanes: read it from `file`, or measure it and store it there.

        A measurement reads up to ``backed[i]`` tokens of slot i, which must be mapped and finite. `card` names the GPU
        and the versions of the software.
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
                    kernel.begin_step()
                    for layer in range(shape.num_layers):
                        kernel.decode(layer, q, lengths, slots)

                took[name].append(timed(layers) / shape.num_layers)
        loads = [Load.of(batch) for batch in batches]
        return {name: Cost.fitted(loads, times, lanes) for name, times in took.items()}

    # -- the backend in use ------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        super().begin_step()
        for kernel in self.kernels.values():
            kernel.begin_step()

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

    def _decode_mixed(
        self, layer: int, q: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor, out: torch.Tensor
    ) -> None:
        # It reads nothing of rows of length 0, wherever they are, and lanes need not be slots.
        kernel = self.kernels.get(SharesAttention.name, self.kernels[self._current])
        if len(q):
            kernel.decode(layer, q, lengths, slots, out)
