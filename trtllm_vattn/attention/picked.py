"""Decode attention by the kernel that is fastest for a batch's lengths.

On a GPU the kernels are cuDNN's and the shares kernel (shares.py), for many lanes by two choices of settings. cuDNN's
is a little faster for equal lengths, the shares kernel up to several times faster for unequal ones. Before a launch,
the caller gives `pick` the lengths, which the host knows, and passes the result to `use`; a step is captured once for
each kernel. So the other sequences' lengths choose the kernel, and with it the last bits of a sequence's logits. With
`deterministic` one kernel is always used, on a GPU that of fixed shares, whose bits depend on no other sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import ClassVar

import numpy as np
import torch

from trtllm_vattn.attention import trust
from trtllm_vattn.attention.base import Attention, PackedPrefill, PrefillChunk, Span
from trtllm_vattn.attention.cost import Cost, CostFile, Load, calibration_lengths, cheapest
from trtllm_vattn.attention.cudnn import CudnnAttention
from trtllm_vattn.attention.options import PREFIXES, Feature, LayerOptions, PrefixTables
from trtllm_vattn.attention.prompts import FlatPromptsAttention, PromptKernel
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.attention.shares import FixedSharesAttention, SharesAttention
from trtllm_vattn.attention.shares_launch import MANY_LANES
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, VattnError
from trtllm_vattn.graphs.capture import captured, replays_ms

logger = logging.getLogger(__name__)

PROMPT_SIZES = ((256, 256), (2048, 2048), (2048, 8192))
"""Rows and length of the chunks by which the kernel for prompts is chosen."""
SCRATCH_LAYERS = 4
SCRATCH_TOKENS = (8192, 2048)
"""Tokens of each of the first `LONG_ONES` slots, and of the others, over which kernels are measured."""
LONG_ONES = 16
SCRATCH_SHARE = 8
"""Measuring takes at most one part in so many of the GPU's free memory."""

Timed = Callable[[Callable[[], object]], float]
"""Calls a function of all layers (captured if possible) and returns how many microseconds it took."""


class PickedAttention(FlatPromptsAttention):
    """Several backends over one cache, of which one is used at a time; initially the first of `kernels`.

    Parameters
    ----------
    deterministic : bool
        Always use the first kernel, which is that of `FixedSharesAttention` on a GPU.
    kernels : mapping or None
        Backends by name; None: cudnn and shares on a GPU, and for many lanes ``shares-plain``; torch and shares on the
        host.

    Raises
    ------
    ConfigError
        A backend does not work over this cache or on this machine.
    """

    name: ClassVar[str] = "picked"
    features: ClassVar[frozenset[Feature]] = SharesAttention.features

    def __init__(
        self,
        cache: KVCache,
        num_heads: int,
        scale: float | None = None,
        *,
        deterministic: bool = False,
        kernels: Mapping[str, Attention] | None = None,
    ) -> None:
        super().__init__(cache, num_heads, scale, fixed=deterministic)
        self._deterministic = deterministic
        self.kernels: dict[str, Attention] = dict(kernels or self._usual(deterministic))
        if deterministic:
            self.kernels = dict(list(self.kernels.items())[:1])
        self._first = self._current = next(iter(self.kernels))
        self._verifying = next((kernel for kernel in self.kernels.values() if kernel.most_queries > 1), None)
        self.most_queries = 1 if self._verifying is None else self._verifying.most_queries
        self._costs: dict[tuple[int, bool], dict[str, Cost]] = {}
        self._see_invariance()

    def _see_invariance(self) -> None:
        self.batch_invariant = len(self.kernels) == 1 and self.kernels[self._first].batch_invariant

    def _usual(self, deterministic: bool) -> dict[str, Attention]:
        cache, heads, scale = self.cache, self.num_heads, self.scale
        if cache.device.type == "cuda" and self._needed_by_cache() - CudnnAttention.features:
            return {"shares": SharesAttention(cache, heads, scale, self.prompts)}
        if deterministic and cache.device.type == "cuda":
            return {FixedSharesAttention.name: FixedSharesAttention(cache, heads, scale, self.prompts)}
        backend = CudnnAttention if cache.device.type == "cuda" else TorchAttention
        first: Attention = backend(cache, heads, scale)
        if deterministic:
            return {first.name: first}
        kernels: dict[str, Attention] = {first.name: first}
        kernels["shares"] = SharesAttention(cache, heads, scale, self.prompts)
        if cache.device.type == "cuda" and cache.shape.num_slots > MANY_LANES:
            kernels["shares-plain"] = SharesAttention(cache, heads, scale, self.prompts, plain=True)
        return kernels

    # -- choosing --------------------------------------------------------------------------------------------------

    def pick(self, lengths: np.ndarray, anywhere: bool = False, prefixes: bool = False) -> str:
        """The fastest kernel for lengths int ``[lanes]``, 0 for idle lanes; it takes a few microseconds.

        `anywhere` says that lane i need not be slot i. For a number of lanes without costs (`learn`, `measure`), the
        first kernel. With `prefixes` it is the kernel that honours `PrefixTables`.
        """
        if prefixes:
            return super().pick(lengths, anywhere, prefixes)
        costs = self._costs.get((measured_lanes(len(lengths), self.cache.shape.num_slots), anywhere))
        return self._first if costs is None else cheapest(costs, lengths)

    def token_us(self, lanes: int, anywhere: bool = False) -> float | None:
        costs = self._costs.get((measured_lanes(lanes, self.cache.shape.num_slots), anywhere), {})
        cost = costs.get(self.variants[-1].removesuffix(PREFIXES))
        return None if cost is None or cost.per_token <= 0 else cost.per_token

    def use(self, variant: str) -> None:
        super().use(variant)
        self._current = variant.removesuffix(PREFIXES)
        kernel = self.kernels[self._current]
        kernel.use(kernel.name + (PREFIXES if self._with_prefixes else ""))

    @property
    def variants(self) -> tuple[str, ...]:
        if self.prefixes is None:
            return tuple(self.kernels)
        able = [name for name, kernel in self.kernels.items() if kernel.prefixes is not None]
        best = SharesAttention.name if SharesAttention.name in able else able[0]
        return (*self.kernels, best + PREFIXES)

    def set_options(self, options: Sequence[LayerOptions]) -> None:
        """As the base class; kernels that cannot serve the options are not used any more."""
        super().set_options(options)
        needed = {feature for each in options for feature in each.features()}
        self._keep({name: kernel for name, kernel in self.kernels.items() if needed <= kernel.features})
        for kernel in self.kernels.values():
            kernel.set_options(options)

    def set_prefixes(self, tables: PrefixTables) -> None:
        """As the base class. Raises ConfigError if `deterministic`: what lanes share would change the order in which a
        sequence's numbers are added up."""
        if self._deterministic:
            raise ConfigError("deterministic attention takes no prefixes from other slots; leave one of them")
        super().set_prefixes(tables)
        for kernel in self.kernels.values():
            if Feature.PREFIXES in kernel.features:
                kernel.set_prefixes(tables)

    def _keep(self, kernels: dict[str, Attention]) -> None:
        """Use only these kernels, or if there is none, the shares kernel."""
        if not kernels:
            kernels["shares"] = SharesAttention(self.cache, self.num_heads, self.scale, self.prompts)
            if self.prefixes is not None:
                kernels["shares"].set_prefixes(self.prefixes)
        if kernels.keys() != self.kernels.keys():
            self._costs.clear()
        self.kernels = kernels
        self._first = self._current = next(iter(kernels))
        self._see_invariance()

    def describe(self) -> str:
        decode = " or ".join(self.kernels) + (" by lengths" if len(self.kernels) > 1 else "")
        prompts = self.prompts.name if self.prompts is not None else TorchAttention.name
        if self.host_planned is not None:
            prompts = f"{self.host_planned.name}, {prompts} where captured"
        return f"decode: {decode}; prompts: {prompts}"

    def measure(self, lanes: Sequence[int], anywhere: bool = False) -> None:
        if len(self.kernels) == 1 or self.cache.device.type != "cuda":
            return
        try:
            self._measure_here(lanes, anywhere, CostFile())
        except (RuntimeError, VattnError) as error:
            logger.warning("%s decodes all batches, and %s", self._first, f"measuring kernels failed: {error}")

    def _measure_here(self, lanes: Sequence[int], anywhere: bool, file: CostFile) -> None:
        """Costs for each number of lanes, rounded up as `pick` does, and the fastest kernel for prompts: from the file,
        or measured over a cache made for it."""
        wanted = sorted({measured_lanes(each, self.cache.shape.num_slots) for each in lanes})
        card = card_and_versions()
        keys = {each: self._key(each, anywhere, f"apart {card}") for each in wanted}
        known = {
            each: costs for each, key in keys.items() if (costs := file.get(key)) and set(costs) == set(self.kernels)
        }
        self._costs.update({(each, anywhere): costs for each, costs in known.items()})
        prompts_key = f"prompts {self._key(0, False, card)}"
        provider = file.read(prompts_key)
        if len(known) < len(keys) or not self._may_serve(provider):
            usable = [name for name in trust.PROVIDERS if self._may_serve(name)]
            with scratch_cache(self.cache, wanted[-1]) as cache:
                apart = PickedAttention(cache, self.num_heads, self.scale)
                for each in wanted:
                    if each not in known:
                        backed = cache.lengths[:each].copy()
                        costs = apart.learn(backed, replayed_us, anywhere)
                        file.put(keys[each], costs)
                        self._costs[each, anywhere] = costs
                times = apart.prompt_us(usable)
            provider = min(times, key=lambda name: sum(times[name]))
            logger.info("us a layer of prompts: %s", times)
            file.write(prompts_key, provider)
        if provider != PromptKernel.name:
            self.host_planned = trust.PROVIDERS[provider][0](self.cache, self.num_heads, self.scale)

    def _may_serve(self, provider: object) -> bool:
        """Whether prompts may go by a kernel. Of other libraries' only the one asked for is looked at: to import one
        takes seconds."""
        if provider == PromptKernel.name:
            return True
        known = isinstance(provider, str) and provider in trust.PROVIDERS
        return known and trust.why_not(str(provider), self.cache.shape, self.num_heads) == "yes"

    def prompt_us(self, providers: Sequence[str]) -> dict[str, list[float]]:
        """Microseconds a layer of a few chunks of the first slot, by the kernel of prompts.py and by `providers`."""
        shape, most = self.cache.shape, int(self.cache.lengths[0])
        times: dict[str, list[float]] = {}
        for name in (PromptKernel.name, *providers):
            made = (
                None if name == PromptKernel.name else trust.PROVIDERS[name][0](self.cache, self.num_heads, self.scale)
            )
            self.host_planned = made
            for rows, length in PROMPT_SIZES:
                length = min(length, most)
                rows = min(rows, length)
                q = torch.zeros(rows, self.num_heads, shape.head_dim, dtype=shape.dtype, device=self.cache.device)
                count, end = (torch.full((1,), n, dtype=torch.int32, device=q.device) for n in (rows, length))
                slot = torch.zeros(1, dtype=torch.int64, device=q.device)
                packed = PackedPrefill([PrefillChunk(rows, slot, count, end, length)], [Span(0, length - rows, length)])
                # A new step would plan again, which may not be captured.
                self.begin_step()

                def layers(q: torch.Tensor = q, packed: PackedPrefill = packed) -> None:
                    for layer in range(shape.num_layers):
                        self.prefill_packed(layer, q, packed)

                times.setdefault(name, []).append(replayed_us(layers) / shape.num_layers)
        self.host_planned = None
        return times

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

    def decode_queries(
        self,
        layer: int,
        q: torch.Tensor,
        query_lens: torch.Tensor | None,
        lengths: torch.Tensor,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self._verifying is None:
            return super().decode_queries(layer, q, query_lens, lengths, slots, out)
        return self._verifying.decode_queries(layer, q, query_lens, lengths, slots, out)

    def decode_mixed(
        self, layer: int, q: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor, out: torch.Tensor
    ) -> None:
        # It reads nothing of rows of length 0, wherever they are, and lanes need not be slots.
        kernel = self.kernels.get(SharesAttention.name, self.kernels[self._current])
        kernel.decode_mixed(layer, q, lengths, slots, out)


def measured_lanes(lanes: int, most: int) -> int:
    """The number of lanes whose costs are taken for `lanes`: a power of two, or `most`."""
    return min(most, 1 << max(0, lanes - 1).bit_length())


def card_and_versions() -> str:
    """What costs depend on besides shapes."""
    cudnn: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return f"{torch.cuda.get_device_name()} torch {torch.__version__} cudnn {cudnn}"


def replayed_us(work: Callable[[], object], replays: int = 5) -> float:
    """Microseconds of a captured call: the median of some replays."""
    return 1e3 * median(replays_ms(captured(work), replays))


@contextmanager
def scratch_cache(like: KVCache, slots: int) -> Iterator[KVCache]:
    """A flat cache of random tokens beside another one, as that one's shape is, for as long as kernels are measured."""
    shape = like.shape
    longest = min(SCRATCH_TOKENS[0], shape.max_seq_len)
    lengths = np.where(np.arange(slots) < LONG_ONES, longest, min(SCRATCH_TOKENS[1], longest))
    small = replace(shape, num_layers=min(SCRATCH_LAYERS, shape.num_layers), num_slots=slots, max_seq_len=longest)
    free, _ = torch.cuda.mem_get_info(like.device)
    share = free / SCRATCH_SHARE / (int(lengths.sum()) * small.token_bytes)
    lengths = np.maximum(1, (lengths * min(1.0, share)).astype(np.int64))
    with make_cache("vattn", small, like.device, lookahead=0) as cache:
        for slot, length in enumerate(lengths.tolist()):
            cache.admit(slot, length)
            for layer in range(small.num_layers):
                kv = cache.layer(layer)
                kv.k[slot, :length].normal_()
                kv.v[slot, :length].normal_()
        yield cache
