"""A model divided among ranks, in place: linear modules by transformers' own `tp_plan`, its code unmodified.

The plan's names say which modules are divided by their outputs (``colwise``: query, key and value heads, the first half
of an MLP) and which by their inputs (``rowwise``), whose results are summed over ranks. transformers' own application
of it makes every weight a DTensor; projections are then no plain linear modules any more, which `compiled` merges, and
KV heads cannot be fewer than ranks. So the plan is applied here: a weight is a plain tensor of this rank's rows or
columns. Of keys and values there may be fewer heads than ranks; several ranks have the same one then.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.before_loading import check_sizes
from trtllm_vattn.runtime.parallel import group  # noqa: F401  (its operations are called by name)
from trtllm_vattn.values import typed

KV = ("k_proj", "v_proj")
COLUMNS, ROWS, GATHERED, WHOLE = "colwise", "rowwise", "colwise_gather_output", "replicated_with_grad_allreduce"
SERVED = (COLUMNS, ROWS, GATHERED, WHOLE)
"""Styles of the plan that are applied. ``colwise_gather_output`` is for a model's head alone: where attention or an MLP
has it, the plan divides nothing that counts."""


class SummedLinear(nn.Linear):
    """A linear module of which each rank has some inputs; the ranks' results are summed, and the bias added once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight)
        # The overload by name: only of that does a traced graph know that it has an effect.
        torch.ops.trtllm_vattn.all_reduce_.default(y)
        return y if self.bias is None else y + self.bias


class GatheredLinear(nn.Linear):
    """A linear module of which each rank has some outputs; all ranks get all of them."""

    size: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        return torch.ops.trtllm_vattn.gather_last.default(y, self.size)  # type: ignore[no-any-return]


def check_divisible(model: PreTrainedModel, size: int) -> None:
    """Raise ConfigError where a model cannot be divided among so many ranks; the message says by what."""
    config = model.config.get_text_config()
    name = f"{type(model).__name__} ({config.model_type})"
    plan = getattr(model, "tp_plan", None) or {}
    if not plan:
        raise ConfigError(f"{name} has no tp_plan of transformers, by which it could be divided among {size} ranks")
    wrong = [
        f"{pattern} is {style!r}"
        for pattern, style in plan.items()
        if style not in SERVED or (style == GATHERED and ".layers." in pattern)
    ]
    if wrong:
        raise ConfigError(
            f"{name} is not divided among ranks: in its tp_plan {', '.join(wrong[:3])}; tensor parallelism here takes "
            f"plans whose layers are {COLUMNS} and {ROWS}"
        )
    check_sizes(config, name, size)


def shard_model(model: PreTrainedModel, rank: int, size: int) -> None:
    """Leave of a model what rank `rank` of `size` computes; its configuration names this rank's heads afterwards.

    Each weight is replaced by a copy of its part, one at a time. Raises ConfigError where the model cannot be divided;
    nothing is changed then.
    """
    check_divisible(model, size)
    config = model.config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    styles = [(_matching(pattern), style) for pattern, style in model.tp_plan.items()]
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            style = next((style for pattern, style in styles if pattern.fullmatch(name)), WHOLE)
            if style == WHOLE:
                continue
            if type(module) is not nn.Linear:
                raise ConfigError(f"{name} of {type(model).__name__} is {typed(module)}, not a linear module")
            if style == ROWS:
                _keep(module, _part(module.in_features, rank, size), dim=1)
                module.__class__ = SummedLinear
            elif style == COLUMNS and name.rpartition(".")[2] in KV:
                # Of fewer heads than ranks, neighbours have the same one.
                first = rank * kv_heads // size * head_dim
                _keep(module, slice(first, first + max(1, kv_heads // size) * head_dim), dim=0)
            elif style == COLUMNS or not module.out_features % size:
                _keep(module, _part(module.out_features, rank, size), dim=0)
                if style == GATHERED:
                    module.__class__, module.size = GatheredLinear, size  # type: ignore[assignment]
    _divide_heads(model, config, size, kv_heads, head_dim)


def _matching(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"\d+"))


def _part(whole: int, rank: int, size: int) -> slice:
    return slice(rank * whole // size, (rank + 1) * whole // size)


def _keep(module: nn.Linear, part: slice, dim: int) -> None:
    """Leave a part of a module's outputs (`dim` 0) or inputs (1). A bias goes with the outputs."""
    weight = module.weight
    kept = weight[part] if dim == 0 else weight[:, part]
    module.weight = nn.Parameter(kept.detach().clone(), weight.requires_grad)
    if dim == 0 and module.bias is not None:
        module.bias = nn.Parameter(module.bias[part].detach().clone(), module.bias.requires_grad)
    module.out_features, module.in_features = module.weight.shape


def _divide_heads(model: PreTrainedModel, config: Any, size: int, kv_heads: int, head_dim: int) -> None:
    config.head_dim = head_dim
    config.num_attention_heads //= size
    config.num_key_value_heads = max(1, kv_heads // size)
    for module in model.modules():
        if isinstance(getattr(module, "num_key_value_groups", None), int):
            module.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
