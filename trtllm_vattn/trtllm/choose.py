"""Which class takes the place of the KV cache manager that TensorRT-LLM chose. Imports neither torch nor TensorRT-LLM
until a `Chooser` is made."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.features import UnsupportedFeature
from trtllm_vattn.trtllm.v2 import is_v2, make_manager_v2

logger = logging.getLogger(__name__)


class Chooser:
    """Called with the class that TensorRT-LLM chose, returns the class that is used.

    Raises
    ------
    ConfigError
        The installed `KVCacheManager` is not one that the adapter fits.
    """

    def __init__(self, stock: Any, config: TrtllmConfig) -> None:
        from trtllm_vattn.trtllm.manager import make_manager

        self._stock, self._config = stock, config
        self._fixed = make_manager(stock, config)
        self._v2: dict[Any, Any] = {}
        """Classes with a budget, by the V2 classes that they replace."""

    def is_fixed(self, chosen: Any) -> bool:
        """Whether a class is the one at fixed addresses."""
        return issubclass(chosen, self._fixed)

    def __call__(self, chosen: Any) -> Any:
        """The replacement of a class, always the same; a replacement is returned as it is.

        Raises UnsupportedFeature for a class that keeps more than attention's K and V, or keeps them otherwise;
        with `allow_stock` such a class is returned as it is.
        """
        if chosen is self._stock:
            return self._fixed
        if self.is_fixed(chosen) or chosen in self._v2.values():
            return chosen
        if is_v2(chosen):
            if chosen not in self._v2:
                self._v2[chosen] = make_manager_v2(chosen, self._config)
            return self._v2[chosen]
        what = f"this model's KV cache is a {chosen.__name__}, of which the fixed-address KV cache knows nothing"
        if self._config.allow_stock:
            logger.warning("%s; it is left as it is, as allow_stock says", what)
            return chosen
        raise UnsupportedFeature(
            f"{what} (hybrid and sparse models have such); run it without trtllm-vattn, or carry on with the stock KV "
            "cache by allow_stock=True (trtllm-vattn run --allow-stock)"
        )


def refuse_disaggregation(arguments: Mapping[str, Any]) -> None:
    """Raise UnsupportedFeature where `KvCacheCreator`'s arguments say that caches are sent to other processes."""
    given = arguments.get("llm_args")
    if arguments.get("is_disagg") or getattr(given, "cache_transceiver_config", None) is not None:
        raise UnsupportedFeature(
            "the fixed-address KV cache does not support disaggregated serving (cache_transceiver_config): it reads "
            "the C++ pool's own memory. Leave it out, or run without trtllm-vattn"
        )
