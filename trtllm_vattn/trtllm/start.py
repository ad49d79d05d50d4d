"""The check of an executor's KV cache managers when it starts; only then is a KV cache announced."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm import elastic
from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.features import UnsupportedFeature

logger = logging.getLogger(__name__)

KINDS = ("KV_CACHE_MANAGER", "DRAFT_KV_CACHE_MANAGER", "CROSS_KV_CACHE_MANAGER")
"""Names of the resource managers that keep K and V."""


def check_executor(executor: Any, config: TrtllmConfig) -> None:
    """Check the managers that a `PyExecutor` uses, put budgets in force, and log what is served.

    Raises
    ------
    UnsupportedFeature
        A manager is a stock one (unless ``allow_stock``): the executor's maker chose it by another way than the one
        that is patched.
    ConfigError
        The executor lacks a recorded attribute, or a budget is too small.
    """
    found = managers_of(executor)
    if not found:
        logger.warning("this model has no KV cache, so trtllm-vattn has nothing to do")
        return
    stock = [manager for manager in found if not elastic.is_ours(manager)]
    if stock:
        names = ", ".join(type(manager).__name__ for manager in stock)
        what = f"the executor runs on TensorRT-LLM's own {names}, not on a KV cache at fixed addresses"
        if not config.allow_stock:
            raise UnsupportedFeature(
                f"{what}: AutoDeploy makes one of its own, other backends may; use the PyTorch backend, run without "
                "trtllm-vattn, or carry on with the stock KV cache by allow_stock=True (trtllm-vattn run --allow-stock)"
            )
        logger.warning("%s; carrying on with it, as allow_stock says", what)
    for manager in found:
        if elastic.is_ours(manager):
            manager.vattn.set_initial_budget()
            elastic.let_ranks_agree(manager, executor)
            # A warm-up executor is followed by the one that serves.
            if not getattr(executor, "is_warmup", False):
                logger.warning("%s", manager.vattn.describe())


def note_failed(executor: Any, requests: Iterable[Any]) -> None:
    """Requests of an executor end in an error: nothing of them is reused."""
    numbers = [request.py_request_id for request in requests]
    for manager in managers_of(executor):
        if elastic.is_ours(manager):
            manager.vattn.fail(numbers)


def managers_of(executor: Any) -> list[Any]:
    """The managers of K and V that an executor uses, each once. Raises ConfigError where it has no such attributes."""
    try:
        every = {
            getattr(kind, "name", str(kind)): each for kind, each in executor.resource_manager.resource_managers.items()
        }
        found = [executor.kv_cache_manager, *(every.get(kind) for kind in KINDS)]
    except AttributeError as error:
        raise ConfigError(
            f"the installed TensorRT-LLM's PyExecutor is another than the adapter knows ({error}); run without "
            "trtllm-vattn"
        ) from error
    return list({id(manager): manager for manager in found if manager is not None}.values())
