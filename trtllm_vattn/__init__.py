"""A KV cache for TensorRT-LLM whose addresses never change.

The public API. A name is imported from its module when it is first used, so that `import trtllm_vattn` loads neither
torch nor transformers nor TensorRT-LLM. `Engine` needs the extra ``runtime``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm_vattn.cache.base import CacheShape, KVCache
    from trtllm_vattn.cache.manager import KVCacheManager
    from trtllm_vattn.cache.select import make_cache
    from trtllm_vattn.errors import (
        AddressSpaceExhausted,
        BrokerLost,
        CacheAsleep,
        CacheInterrupted,
        CaptureError,
        ConfigError,
        DriverError,
        DuplicateSequence,
        EngineAsleep,
        EngineClosed,
        EngineOverloaded,
        HostMemoryFull,
        InvariantViolation,
        KVCacheOutOfMemory,
        ManagerClosed,
        MemoryQuarantined,
        NoFreeSlot,
        NoTokenAllowed,
        OutOfPages,
        PrefixEvicted,
        RankLost,
        RequestFailed,
        SequenceSuspended,
        SequenceTooLong,
        TransferFailed,
        UnknownSequence,
        UnmappedAccess,
        VattnError,
        WeightsMixed,
        WrongProcess,
    )
    from trtllm_vattn.plugins.session import EngineSession
    from trtllm_vattn.runtime.async_engine import AsyncEngine
    from trtllm_vattn.runtime.engine import Engine
    from trtllm_vattn.runtime.request import Completion, TokenEvent
    from trtllm_vattn.runtime.sampling import SamplingParams
    from trtllm_vattn.runtime.speculation import Speculation
    from trtllm_vattn.tenancy.config import TenantConfig
    from trtllm_vattn.trtllm.config import TrtllmConfig
    from trtllm_vattn.trtllm.installation import install, uninstall
    from trtllm_vattn.vmm.open import open_driver

__all__ = [
    "AddressSpaceExhausted",
    "AsyncEngine",
    "BrokerLost",
    "CacheAsleep",
    "CacheInterrupted",
    "CacheShape",
    "CaptureError",
    "Completion",
    "ConfigError",
    "DriverError",
    "DuplicateSequence",
    "Engine",
    "EngineAsleep",
    "EngineClosed",
    "EngineOverloaded",
    "EngineSession",
    "HostMemoryFull",
    "InvariantViolation",
    "KVCache",
    "KVCacheManager",
    "KVCacheOutOfMemory",
    "ManagerClosed",
    "MemoryQuarantined",
    "NoFreeSlot",
    "NoTokenAllowed",
    "OutOfPages",
    "PrefixEvicted",
    "RankLost",
    "RequestFailed",
    "SamplingParams",
    "SequenceSuspended",
    "SequenceTooLong",
    "Speculation",
    "TenantConfig",
    "TokenEvent",
    "TransferFailed",
    "TrtllmConfig",
    "UnknownSequence",
    "UnmappedAccess",
    "VattnError",
    "WeightsMixed",
    "WrongProcess",
    "install",
    "make_cache",
    "open_driver",
    "uninstall",
]

_MODULES = {
    "AsyncEngine": "runtime.async_engine",
    "CacheShape": "cache.base",
    "Completion": "runtime.request",
    "Engine": "runtime.engine",
    "EngineSession": "plugins.session",
    "KVCache": "cache.base",
    "KVCacheManager": "cache.manager",
    "SamplingParams": "runtime.sampling",
    "Speculation": "runtime.speculation",
    "TenantConfig": "tenancy.config",
    "TokenEvent": "runtime.request",
    "TrtllmConfig": "trtllm.config",
    "install": "trtllm.installation",
    "make_cache": "cache.select",
    "open_driver": "vmm.open",
    "uninstall": "trtllm.installation",
}
"""Where the names are that are no errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
