"""Building the same engine on every rank: the model's part, the cache of its heads, the graphs."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.ranked import FollowingCache, LeadingCache
from trtllm_vattn.memory.mapping_policy import MappingPolicy
from trtllm_vattn.runtime.before_loading import refuse_windows
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import SHAPES, load_model
from trtllm_vattn.runtime.parallel import group
from trtllm_vattn.runtime.parallel.engine import FollowingEngine, LeadingEngine
from trtllm_vattn.runtime.parallel.shard import shard_model
from trtllm_vattn.runtime.startup import memory_left
from trtllm_vattn.vmm.open import open_driver


@dataclass(frozen=True)
class Recipe:
    """What all ranks build alike.

    Parameters
    ----------
    model : str
        As `load_model` takes it.
    dtype : torch.dtype
    max_seqs, max_seq_len : int
    budget : int or None
        Bytes of KV on each rank; None is what the rank with the least memory has left, or on the host enough for all.
    idle_after_s, idle_floor
        As `KVCacheManager` has them.
    policy : MappingPolicy
    options : dict
        Parameters of `Engine` that are plain values.
    """

    model: str
    dtype: torch.dtype
    max_seqs: int
    max_seq_len: int
    budget: int | None
    idle_after_s: float | None
    idle_floor: int
    policy: MappingPolicy
    options: dict[str, Any] = field(default_factory=dict)


class Parts:
    """A rank's model and cache, before the ranks meet in a collective."""

    def __init__(self, recipe: Recipe, leads: bool) -> None:
        here = group.current_group()
        self.recipe, self.device = recipe, str(here.device)
        started = perf_counter()
        self.model = load_part(recipe.model, here, recipe.dtype)
        self.load_s = perf_counter() - started
        shape = shape_of(self.model, recipe.max_seqs, recipe.max_seq_len)
        if shape.windows:
            refuse_windows(type(self.model).__name__)
        config = CacheConfig(idle_after_s=recipe.idle_after_s, idle_floor=recipe.idle_floor)
        # On a GPU sized once everything else has its memory.
        self.sized_later = self.device != "cpu"
        driver = recipe.policy.wrap(open_driver(self.device))
        kind: type[LeadingCache | FollowingCache] = LeadingCache if leads else FollowingCache
        self.cache = kind(shape, driver, None if self.sized_later else recipe.budget, config=config)
        if not self.sized_later and recipe.budget is None:
            layout = self.cache.layout
            self.cache.set_budget(layout.num_ranges * layout.range_bytes)

    @property
    def likeness(self) -> dict[str, Any]:
        """What has to be equal on all ranks."""
        shapes = [tuple(parameter.shape) for parameter in self.model.parameters()]
        return {**self.cache.byte_order, "parameters": len(shapes), "numbers": sum(math.prod(each) for each in shapes)}

    def engine(self, **own: Any) -> Any:
        """Build the engine, in step with all other ranks. What was made is given back where it fails."""
        options = {**self.recipe.options, "prefix_cache": False, "packed": True, "mapping": self.recipe.policy.value}
        options.update(own)
        with ExitStack() as undo:
            undo.callback(self.cache.close)
            engine: Engine
            if isinstance(self.cache, FollowingCache):
                engine = FollowingEngine(self.model, self.cache, **options)
            else:
                engine = LeadingEngine(self.model, self.cache, **options)
            undo.pop_all()
        return engine

    def memory_left(self) -> int:
        """Bytes that KV may take on this rank, once everything else has its memory."""
        return memory_left(torch.device(self.device))


def load_part(name: str, here: group.Group, dtype: torch.dtype) -> PreTrainedModel:
    """This rank's part of a model, on its device.

    A checkpoint is loaded to the host and divided there, so that a GPU has to hold no more than its part; a named shape
    is made on the device, for its random weights are to be those of a single rank, and divided weight by weight.
    """
    if name in SHAPES:
        model = load_model(name, here.device, dtype)
        shard_model(model, here.rank, here.size)
    else:
        model = load_model(name, "cpu", dtype)
        shard_model(model, here.rank, here.size)
        model.to(here.device)
    if here.device.type == "cuda":
        torch.cuda.empty_cache()
    return model
