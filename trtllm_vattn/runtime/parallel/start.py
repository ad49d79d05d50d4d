"""`Engine.from_pretrained` with several ranks."""

from __future__ import annotations

from typing import Any

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.mapping_policy import start_policy_probe
from trtllm_vattn.runtime.before_loading import check_ranks_before_loading
from trtllm_vattn.runtime.deterministic import check_ranks
from trtllm_vattn.runtime.parallel.build import Recipe
from trtllm_vattn.runtime.parallel.engine import LeadingEngine, check_options
from trtllm_vattn.runtime.parallel.ranks import Ranks, size_of_torchrun
from trtllm_vattn.values import whole

MOST_RANKS = 64
OWN = ("clock", "observer", "swap_cost", "tokenizer")
"""Parameters of `Engine` that rank 0 alone has."""


def start_engine(
    ranks: int | Ranks, model: str, device: str, dtype: torch.dtype, given: dict[str, Any]
) -> LeadingEngine:
    """An engine over several ranks; `given` are the parameters of `Engine.from_pretrained`, checked.

    Raises
    ------
    ConfigError
        A setting cannot work with several ranks, or there are too few GPUs.
    RankLost
        A rank did not start, or ended meanwhile.
    """
    options = dict(given)
    sizes = {name: options.pop(name) for name in ("max_seqs", "max_seq_len", "budget", "idle_after_s", "idle_floor")}
    if (cache := options.pop("cache")) != "vattn":
        raise ConfigError(f"cache is {cache!r}; with tensor_parallel it is vattn")
    if options.pop("host_memory"):
        raise ConfigError("host_memory is not served with tensor_parallel yet; leave it out, or use one rank")
    if (kv_dtype := options.pop("kv_cache_dtype")) != "auto":
        raise ConfigError(f"kv_cache_dtype is {kv_dtype!r}; with tensor_parallel it is auto, the model's own")
    if options.pop("kept_seqs") not in (None, 0):
        raise ConfigError("kept_seqs is for a prefix cache, which tensor_parallel does not serve yet; leave it out")
    check_options(options)
    size = ranks.size if isinstance(ranks, Ranks) else whole("tensor_parallel", ranks, 1, MOST_RANKS)
    if options.get("deterministic"):
        check_ranks(size)
    if size > 1:
        check_ranks_before_loading(model, sizes["max_seq_len"], size)
    with start_policy_probe(device, options.pop("mapping")) as probe:
        policy = probe.result().policy
    own = {name: options.pop(name) for name in OWN if name in options}
    recipe = Recipe(model=model, dtype=dtype, policy=policy, options=options, **sizes)
    if isinstance(ranks, Ranks):
        if ranks.device != device.partition(":")[0]:
            raise ConfigError(f"device is {device!r}, and the ranks are on {ranks.device!r}; make them alike")
        return ranks.build(recipe, closing=False, **own)
    kind = device.partition(":")[0]
    started = Ranks.of_torchrun(size, kind) if size_of_torchrun() > 1 else Ranks.start(size, kind)
    try:
        return started.build(recipe, closing=True, **own)
    except BaseException:
        started.close()
        raise
