"""Which class takes the place of the one that TensorRT-LLM chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.features import UnsupportedFeature
from trtllm_vattn.trtllm.manager import make_manager
from trtllm_vattn.trtllm.v2 import is_v2, make_manager_v2


class Chooser:
    """Called with the class chosen, gives ours.

    Raises
    ------
    ConfigError
        The installed `KVCacheManager` is none that the adapter fits.
    """

    def __init__(self, stock: Any, config: TrtllmConfig) -> None:
        self._stock, self._config = stock, config
        self._ours = make_manager(stock, config)

    def __call__(self, chosen: Any) -> Any:
        """Raises UnsupportedFeature for a class that keeps more than attention's K and V, or keeps them otherwise."""
        if chosen is self._stock:
            return self._ours
        if is_v2(chosen):
            return make_manager_v2(chosen, self._config)
        raise UnsupportedFeature(
            f"this model's KV cache is a {chosen.__name__}, of which the fixed-address KV cache knows nothing "
            "(hybrid and sparse models have such); run it without trtllm-vattn"
        )


def refuse_disaggregation(arguments: Mapping[str, Any]) -> None:
    """Raise UnsupportedFeature where `KvCacheCreator`'s arguments say that caches are sent to other processes."""
    given = arguments.get("llm_args")
    if arguments.get("is_disagg") or getattr(given, "cache_transceiver_config", None) is not None:
        raise UnsupportedFeature(
            "the fixed-address KV cache does not support disaggregated serving (cache_transceiver_config): it reads "
            "the C++ pool's own memory. Leave it out, or run without trtllm-vattn"
        )
