"""TensorRT-LLM's `KVCacheManager` with its memory at fixed addresses.

`make_manager` subclasses the `KVCacheManager` that is installed, because the C++ capacity scheduler is handed its
`impl`. The C++ manager goes on counting blocks, over a pool of a few bytes a block. What kernels touch lies at fixed
addresses and belongs to `ManagerMemory`, the attribute ``vattn``; the overridden methods only call it. Every other name
that is overridden, called or read is recorded for each version (tests/data/trtllm_interface.json); names that only some
versions have are asked for before they are used.

Prior art: TensorRT-LLM PR #15931 put per-sequence arenas beneath KVCacheManagerV2.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm import elastic
from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.features import cannot_reuse, check_interface, enum_name, refuse, unsupported
from trtllm_vattn.trtllm.holdback import StatsWithoutHoldback
from trtllm_vattn.trtllm.memory import ManagerMemory
from trtllm_vattn.trtllm.versions import RANGE
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.open import open_driver

logger = logging.getLogger(__name__)

CPP_HEAD_DIM = 8
"""Elements that the C++ manager allocates for a token, in one layer with one head."""

# The installed KVCacheManager stands behind the mixins in the final class; which one is not known before.
Stock: Any = object


def current_driver() -> Driver:
    """The driver of the GPU that this process uses, or of the host where there is none."""
    return open_driver(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")


@contextmanager
def shrunken_cpp_pool(module: Any) -> Iterator[None]:
    """Within the context, C++ managers allocate one layer of one head of a few elements in each pool.

    Raises ConfigError from the C++ manager's constructor where it takes none of the arguments that say how much.
    """
    real = module.KVCacheManagerCpp

    def make(*arguments: Any, **named: Any) -> Any:
        small = {"size_per_head": CPP_HEAD_DIM, "size_per_head_per_layer": [CPP_HEAD_DIM]}
        sizes = {name: value for name, value in small.items() if name in named}
        if not sizes or "num_kv_heads_per_layer" not in named:
            raise ConfigError(
                f"the C++ manager of the installed TensorRT-LLM is made of {', '.join(named)}, without "
                f"num_kv_heads_per_layer or size_per_head; the fixed-address cache fits {RANGE}: install one of these, "
                "or run without trtllm-vattn"
            )
        named.update(sizes, num_kv_heads_per_layer=[1])
        if named.get("pool_configurations"):
            named["pool_configurations"] = [
                module.PoolConfigurationCpp(window_size=pool.window_size, size_per_head=CPP_HEAD_DIM, dtype=pool.dtype)
                for pool in named["pool_configurations"]
            ]
        if len(set(named.get("max_attention_window_vec") or ())) == 1:
            # Later versions give one entry a layer; here there is one layer.
            named["max_attention_window_vec"] = named["max_attention_window_vec"][:1]
        return real(*arguments, **named)

    module.KVCacheManagerCpp = make
    try:
        yield
    finally:
        module.KVCacheManagerCpp = real


def check_cpp_pool_is_small(manager: Any) -> None:
    """Raise ConfigError where the C++ manager allocated more than `shrunken_cpp_pool` asks for; nobody would use it."""
    allocated = getattr(manager.impl.get_kv_cache_stats(), "allocated_bytes", 0)
    element = 4
    needed = manager.impl.max_num_blocks * manager.tokens_per_block * manager.kv_factor * CPP_HEAD_DIM * element
    if allocated > needed:
        raise ConfigError(
            f"the C++ manager of the installed TensorRT-LLM allocated {allocated:,} bytes to count blocks, which needs "
            f"{needed:,} at most: its pools are sized by arguments that the adapter does not know; install one of "
            f"{RANGE}, or run without trtllm-vattn"
        )


def without_block_reuse(config: Any) -> Any:
    """A copy of a `KvCacheConfig` for the C++ manager, which counts blocks and neither reuses them nor reports them."""
    plain = copy.copy(config)
    plain.enable_block_reuse = plain.enable_partial_reuse = False
    if getattr(plain, "event_buffer_max_size", 0):
        plain.event_buffer_max_size = 0
    return plain


def reuses_blocks(config: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether blocks are reused: as a `KvCacheConfig` says, where they can be. A warning says so where they cannot."""
    if not getattr(config, "enable_block_reuse", False):
        return False
    if (why := cannot_reuse(arguments)) is not None:
        logger.warning("block reuse, on by default, is switched off: the fixed-address KV cache cannot serve %s", why)
        return False
    return True


def refuse_beams(width: int) -> None:
    """Raise UnsupportedFeature for more than one beam."""
    if width > 1:
        raise unsupported("beam search", "use beam width 1")


class FixedAddress(Stock):  # type: ignore[misc]
    """Overrides of `KVCacheManager`, each a call of the same transition of `ManagerMemory`."""

    vattn: ManagerMemory
    _vattn_config: TrtllmConfig
    _vattn_module: Any
    """The module that the stock class is in."""
    _vattn_driver: Callable[[], Driver]

    def __init__(self, kv_cache_config: Any, kv_cache_type: Any, **arguments: Any) -> None:
        """As the stock class. Raises UnsupportedFeature by name, ConfigError, AddressSpaceExhausted, DriverError."""
        refuse(kv_cache_config, enum_name(kv_cache_type), arguments)
        if "is_estimating_kv_cache" in arguments:
            arguments["is_estimating_kv_cache"] = False
        module = self._vattn_module
        reuses = reuses_blocks(kv_cache_config, arguments)
        self.vattn = ManagerMemory(
            self,
            super(),
            lambda request: module.get_draft_token_length(request),
            self._vattn_config,
            kv_cache_config,
            reuses,
        )
        with ExitStack() as undo:
            with shrunken_cpp_pool(module):
                super().__init__(without_block_reuse(kv_cache_config), kv_cache_type, **arguments)
            undo.callback(super().shutdown)
            check_cpp_pool_is_small(self)
            self.vattn.open(type(self)._vattn_driver(), arguments.get("execution_stream"))
            if reuses:
                self.enable_block_reuse = True
                self.enable_partial_reuse = getattr(kv_cache_config, "enable_partial_reuse", True)
                self.event_buffer_max_size = getattr(kv_cache_config, "event_buffer_max_size", 0)
            undo.pop_all()
        elastic.register(self)

    def shutdown(self) -> None:
        """The stock shutdown; then all memory is given back. Idempotent."""
        if not self.vattn.is_closed:
            self.vattn.is_closed = True
            elastic.forget(self)
            super().shutdown()
            self.vattn.close()

    # -- requests --------------------------------------------------------------------------------------------------

    def prepare_resources(self, scheduled_batch: Any) -> None:
        """As `ManagerMemory.prepare`."""
        self.vattn.prepare(scheduled_batch)

    def update_resources(self, scheduled_batch: Any, *arguments: Any, **named: Any) -> None:
        """As `ManagerMemory.update`."""
        self.vattn.update(scheduled_batch, *arguments, **named)

    def rewind_kv_cache(self, request: Any, rewind_len: int) -> None:
        """As `ManagerMemory.rewind`."""
        self.vattn.rewind(request, rewind_len)

    def free_resources(self, request: Any, pin_on_release: bool = False) -> Any:
        """As `ManagerMemory.free`. Raises UnsupportedFeature for `pin_on_release`."""
        if pin_on_release:
            raise unsupported("pinning blocks on release")
        return self.vattn.free(request)

    def add_dummy_requests(self, request_ids: Sequence[int], *arguments: Any, **named: Any) -> Any:
        """As `ManagerMemory.add_dummies`."""
        return self.vattn.add_dummies(request_ids, *arguments, **named)

    # -- reuse -----------------------------------------------------------------------------------------------------

    def reset_reuse_state(self) -> None:
        """As `ManagerMemory.forget_reusable`."""
        self.vattn.forget_reusable()

    def flush_iteration_events(self) -> None:
        """As `ManagerMemory.flush_events`."""
        self.vattn.flush_events()

    def get_latest_events(self, timeout_ms: float | None = 0) -> list[Any]:
        """As `ManagerMemory.latest_events`."""
        return self.vattn.latest_events(timeout_ms)

    # -- capacity --------------------------------------------------------------------------------------------------

    def calculate_max_num_blocks(self, *arguments: Any, **named: Any) -> tuple[int, int]:
        """Blocks for the C++ manager to count, and none on the host."""
        return self.vattn.count_blocks(arguments, named), 0

    def get_max_resource_count(self) -> int:
        """Blocks that the budget backs."""
        return self.vattn.promised_blocks

    def get_kv_cache_stats(self) -> StatsWithoutHoldback:
        """The stock statistics without the blocks that the budget does not back."""
        return self.vattn.stats()

    # -- what kernels are given ------------------------------------------------------------------------------------

    def copy_batch_block_offsets(
        self, dst_tensor: torch.Tensor, request_ids: Sequence[int], beam_width: int, num_context: int, num_seqs: int
    ) -> None:
        """As `ManagerMemory.fill_table`. Raises UnsupportedFeature for several beams."""
        refuse_beams(beam_width)
        self.vattn.fill_table(dst_tensor, request_ids, num_context)

    def get_batch_cache_indices(
        self, request_ids: Sequence[int], layer_idx: int | None = None, **named: Any
    ) -> list[list[int]]:
        """As `ManagerMemory.block_ids`. Later versions ask for the first few blocks of each request
        (`num_blocks_per_seq`), and name a window and a beam width. Raises UnsupportedFeature for several beams."""
        refuse_beams(named.get("beam_width") or 1)
        found = self.vattn.block_ids(request_ids)
        counts = named.get("num_blocks_per_seq")
        return found if counts is None else [ids[:count] for ids, count in zip(found, counts, strict=True)]

    def get_cache_indices(self, request: Any, window_size: int | None = None) -> list[int]:
        """Block numbers of a request."""
        return self.vattn.block_ids([request.py_request_id])[0]

    def get_buffers(self, layer_idx: int, kv_layout: str = "NHD") -> torch.Tensor:
        """A layer's blocks, ``[blocks, kv_factor, heads, tokens, dim]`` (HND), or the same memory taken as
        ``[blocks, kv_factor, tokens, heads, dim]`` (NHD). Most blocks have no memory."""
        blocks = self.vattn.cache.blocks(self.layer_offsets[layer_idx])
        if kv_layout == "HND":
            return blocks
        if kv_layout != "NHD":
            raise ConfigError(f"kv_layout is {kv_layout!r}; there are NHD and HND")
        count, factor, heads, tokens, dim = blocks.shape
        return blocks.as_strided((count, factor, tokens, heads, dim), (*blocks.stride()[:2], heads * dim, dim, 1))

    def check_invalid_values_in_kv_cache(self, fill_with_zero: bool = False) -> bool:
        """Whether any mapped element is NaN or infinite; all is zeroed then, if `fill_with_zero`."""
        return self.vattn.has_invalid(fill_with_zero)

    # -- what only the C++ pool can do -----------------------------------------------------------------------------

    def pin_blocks(self, request_id: int) -> None:
        """Raises UnsupportedFeature."""
        raise unsupported("pinning blocks")

    def store_blocks_for_reuse(self, request: Any, pin_blocks: bool = False) -> None:
        """Raises UnsupportedFeature: a request's blocks are kept when it ends."""
        raise unsupported("storing the blocks of a request that runs")

    def get_unique_primary_pool(self) -> None:
        """Raises UnsupportedFeature: most of the pool has no memory, and a caller would read all of it."""
        raise unsupported("the whole pool as one tensor")

    def get_last_block_id(self, request_id: int) -> None:
        """Raises UnsupportedFeature."""
        raise unsupported("block ids for a KV connector")


class BlockBudget(Stock):  # type: ignore[misc]
    """Since 1.4 a request that can never fit is refused when it comes. The stock class answers for itself alone; its
    estimate of a request's blocks is right here too."""

    def kv_block_budget_applies(self) -> bool:
        """Whether the estimate is made: for the K and V of self-attention."""
        return enum_name(self.kv_cache_type) == "SELF"

    def get_request_kv_block_budget(self, request: Any) -> tuple[int, int] | None:
        """Blocks that a request needs to its end, and those that the budget backs."""
        found: tuple[int, int] | None = super().get_request_kv_block_budget(request)
        backed = self.vattn.capacity_blocks()
        return found if found is None or backed is None else (found[0], backed)


class PrefixProbe(Stock):  # type: ignore[misc]
    """Since 1.3 a router of attention-DP ranks asks how much of a prompt is held here."""

    def probe_prefix_match_length(
        self, input_tokens: Sequence[int], lora_task_id: int | None = None, cache_salt: str | None = None
    ) -> int:
        """As `ManagerMemory.reusable_tokens`."""
        memory: ManagerMemory = self.vattn
        return memory.reusable_tokens(input_tokens, lora_task_id, cache_salt)


class PoolIndices(Stock):  # type: ignore[misc]
    """Since 1.3 KV connectors and transfers ask where in the C++ pool a block is."""

    def get_memory_pool_block_indices(self, block_ids: list[int], *, window_size: int) -> None:
        """Raises UnsupportedFeature: the blocks are not in that pool."""
        raise unsupported("places in the C++ pool")


LATER: dict[type, str] = {
    BlockBudget: "get_request_kv_block_budget",
    PoolIndices: "get_memory_pool_block_indices",
    PrefixProbe: "probe_prefix_match_length",
}
"""Mixins for later versions, each with the stock method that asks for it."""


def make_manager(stock: Any, config: TrtllmConfig | None = None, driver: Callable[[], Driver] = current_driver) -> Any:
    """A subclass of the installed `KVCacheManager` over memory at fixed addresses.

    Parameters
    ----------
    stock : type
        The installed class.
    config : TrtllmConfig or None
        None is the defaults.
    driver : callable
        Opens the driver whose memory it is.

    Raises
    ------
    ConfigError
        The class lacks a name or a parameter that is needed.
    """
    module = sys.modules[stock.__module__]
    check_interface(stock, module)
    later = [mixin for mixin, name in LATER.items() if hasattr(stock, name)]

    class FixedAddressKVCacheManager(FixedAddress, *later, stock):  # type: ignore[misc]
        """`KVCacheManager` whose pools never move and are backed as far as requests need."""

        _vattn_config = config or TrtllmConfig()
        _vattn_module = module
        _vattn_driver = staticmethod(driver)

    return FixedAddressKVCacheManager
