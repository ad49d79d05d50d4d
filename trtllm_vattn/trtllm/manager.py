"""TensorRT-LLM's `KVCacheManager` with its memory at fixed addresses.

The class is made from whatever `KVCacheManager` is installed, as a subclass, because the C++ capacity scheduler is
handed its `impl`. The C++ manager goes on keeping the books, in blocks, over a pool of a few bytes a block; what
kernels touch is ours: the pools' base addresses, the tables, the buffers. Attributes and methods of ours begin with
``vattn`` or ``_vattn``; everything else that is overridden, called or read is in the recorded interface of the version
(tests/data/trtllm_interface.json), and what only some versions have is asked for before it is used.

Prior art: TensorRT-LLM PR #15931 put per-sequence arenas beneath KVCacheManagerV2.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm import elastic
from trtllm_vattn.trtllm.capacity import Capacity
from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.features import UnsupportedFeature, check_interface, dtype_of, refuse
from trtllm_vattn.trtllm.kernels import KernelViews
from trtllm_vattn.trtllm.later import LATER
from trtllm_vattn.trtllm.pages import Pages
from trtllm_vattn.trtllm.requests import Requests
from trtllm_vattn.trtllm.versions import RANGE
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.open import open_driver

logger = logging.getLogger(__name__)

BOOK_HEAD_DIM = 8
"""Elements a token that the C++ manager allocates, in one layer with one head: its pool is for the books alone."""


def current_driver() -> Driver:
    """The driver of the GPU that this process uses, or of the host where there is none."""
    return open_driver(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")


def name_of(value: Any) -> str:
    """The name of an enumerator of TensorRT-LLM's bindings."""
    return str(getattr(value, "name", value)).rpartition(".")[2]


@contextmanager
def books_alone(module: Any) -> Iterator[None]:
    """Have the C++ manager that is made meanwhile allocate next to nothing: one layer of one head of a few elements, in
    each pool. Raises ConfigError where it takes none of the arguments that say how much."""
    real = module.KVCacheManagerCpp

    def make(*arguments: Any, **named: Any) -> Any:
        small = {"size_per_head": BOOK_HEAD_DIM, "size_per_head_per_layer": [BOOK_HEAD_DIM]}
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
                module.PoolConfigurationCpp(window_size=pool.window_size, size_per_head=BOOK_HEAD_DIM, dtype=pool.dtype)
                for pool in named["pool_configurations"]
            ]
        if len(set(named.get("max_attention_window_vec") or ())) == 1:
            # One entry a layer in later versions; here there is one layer.
            named["max_attention_window_vec"] = named["max_attention_window_vec"][:1]
        return real(*arguments, **named)

    module.KVCacheManagerCpp = make
    try:
        yield
    finally:
        module.KVCacheManagerCpp = real


def without_reuse(config: Any) -> Any:
    """A copy of a `KvCacheConfig` with what only the C++ pool can do switched off."""
    plain = copy.copy(config)
    if getattr(plain, "enable_block_reuse", False):
        logger.warning("block reuse, on by default, is switched off: the fixed-address KV cache does not support it")
    plain.enable_block_reuse = plain.enable_partial_reuse = False
    return plain


def refuse_a_large_pool(manager: Any) -> None:
    """Raise ConfigError where the C++ manager allocated more than books need, whatever it was told: memory that nobody
    would use."""
    allocated = getattr(manager.impl.get_kv_cache_stats(), "allocated_bytes", 0)
    element = 4
    books = manager.impl.max_num_blocks * manager.tokens_per_block * manager.kv_factor * BOOK_HEAD_DIM * element
    if allocated > books:
        raise ConfigError(
            f"the C++ manager of the installed TensorRT-LLM allocated {allocated:,} bytes for its books, which need "
            f"{books:,} at most: its pools are sized by arguments that the adapter does not know; install one of "
            f"{RANGE}, or run without trtllm-vattn"
        )


class FixedAddress(Requests, KernelViews, Capacity):
    """How a manager is made and shut down."""

    def __init__(self, kv_cache_config: Any, kv_cache_type: Any, **arguments: Any) -> None:
        """As the stock class. Raises UnsupportedFeature by name, ConfigError, AddressSpaceExhausted, DriverError."""
        refuse(kv_cache_config, name_of(kv_cache_type), arguments)
        if "is_estimating_kv_cache" in arguments:
            arguments["is_estimating_kv_cache"] = False
        self._vattn_lock = threading.RLock()
        self._vattn_live, self._vattn_dummies = {}, {}
        self._vattn_sized = self._vattn_closed = False
        self._vattn_cap = int(getattr(kv_cache_config, "max_gpu_total_bytes", None) or 0)
        budget = self._vattn_settings.budget_bytes
        self._vattn_target = budget if budget is None else min(budget, self._vattn_cap or budget)
        with ExitStack() as undo:
            with books_alone(self._vattn_module):
                super().__init__(without_reuse(kv_cache_config), kv_cache_type, **arguments)
            undo.callback(super().shutdown)
            refuse_a_large_pool(self)
            self._vattn_token_count = getattr(self.impl, "get_token_count", None)
            self._vattn_total = self.impl.max_num_blocks
            self._vattn_ballast = self._vattn_make_ballast()
            self._vattn_pages = self._vattn_open(arguments.get("execution_stream"))
            undo.callback(self._vattn_pages.cache.close)
            self._vattn_publish()
            if self._vattn_target is not None:
                self.vattn_check_budget(self._vattn_target)
            undo.pop_all()
        elastic.register(self)

    def _vattn_open(self, stream: Any) -> Pages:
        heads = set(self.num_kv_heads_per_layer)
        if len(heads) != 1:
            raise UnsupportedFeature(
                f"layers have {sorted(heads)} KV heads; the fixed-address KV cache needs the same number in each"
            )
        shape = CacheShape(
            num_layers=self.num_local_layers,
            num_kv_heads=heads.pop(),
            head_dim=self.head_dim,
            dtype=dtype_of(name_of(self.dtype)),
            num_slots=self.max_batch_size,
            max_seq_len=self.max_blocks_per_seq * self.tokens_per_block,
            kv_factor=self.kv_factor,
        )
        settings = self._vattn_settings
        lookahead = self.tokens_per_block if settings.lookahead is None else settings.lookahead
        layers = settings.layers_per_range or self.num_local_layers
        pages = Pages(shape, type(self)._vattn_driver(), layers, lookahead, self.tokens_per_block)
        if stream is not None:
            pages.cache.streams.append(stream.cuda_stream)
        return pages

    def shutdown(self) -> None:
        """The stock shutdown; then all memory goes back. Idempotent."""
        if self._vattn_closed:
            return
        self._vattn_closed = True
        elastic.forget(self)
        super().shutdown()
        self._vattn_pages.cache.close()


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

        _vattn_settings = config or TrtllmConfig()
        _vattn_module = module
        _vattn_driver = staticmethod(driver)

    return FixedAddressKVCacheManager
