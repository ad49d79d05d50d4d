"""Latent attention (MLA of DeepSeek-V2, arXiv 2405.04434): a row of latents a token, not heads' keys and values.

transformers' modules expand the latents of all tokens to keys and values of every head before they attend. Here the
latents are what is stored, and the expansion is on the queries' side: a query times the keys' expansion is compared
with latents, and the weighted latents are expanded to values (the absorbed form of the paper). The model's code stays
as it is but for `expand_kv`, which hands the latents on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trtllm_vattn.errors import ConfigError

_PARTS = ("kv_b_proj", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def has_latents(module: Any) -> bool:
    """Whether a module of attention expands latents by `expand_kv`."""
    return callable(getattr(module, "expand_kv", None)) and all(hasattr(module, name) for name in _PARTS)


def latent_size(model: nn.Module) -> int | None:
    """Numbers of a token's row: its latent, and the part of the keys that holds positions; None without latents. Raises
    ConfigError where layers have different ones."""
    modules: list[Any] = [module for module in model.modules() if has_latents(module)]
    sizes: set[int] = {module.kv_lora_rank + module.qk_rope_head_dim for module in modules}
    if len(sizes) > 1:
        raise ConfigError(f"{type(model).__name__} has latents of different sizes by layer, {sorted(sizes)}")
    return sizes.pop() if sizes else None


def keep_latents(model: nn.Module) -> None:
    """Have modules hand latents to attention as they are."""
    for module in model.modules():
        if has_latents(module):
            vars(module)["expand_kv"] = _as_they_are


def expand_again(model: nn.Module) -> None:
    """Undo `keep_latents`."""
    for module in model.modules():
        if vars(module).get("expand_kv") is _as_they_are:
            del vars(module)["expand_kv"]


def _as_they_are(latent: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return latent, positions


def keeps_latents(module: nn.Module) -> bool:
    """Whether attention is called with latents by this module."""
    return vars(module).get("expand_kv") is _as_they_are


def rows_and_queries(
    module: Any, query: torch.Tensor, latent: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to store, ``[tokens, 1, row]``, and queries that are compared with them, ``[tokens, heads, row]``.

    query ``[1, heads, tokens, nope + rope]``; latent ``[1, 1, tokens, lora]``; positions ``[1, 1, tokens, rope]``.
    """
    nope, rope = torch.split(query, [module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
    keys, _ = _expansions(module)
    queries = torch.cat((torch.matmul(nope[0], keys), rope[0]), dim=-1).transpose(0, 1)
    return torch.cat((latent, positions), dim=-1)[0].transpose(0, 1), queries.contiguous()


def values(module: Any, out: torch.Tensor) -> torch.Tensor:
    """The heads' values of weighted rows: out ``[tokens, heads, row]`` to ``[tokens, heads, v_head_dim]``."""
    _, expansion = _expansions(module)
    return torch.matmul(out[..., : module.kv_lora_rank].transpose(0, 1), expansion.transpose(1, 2)).transpose(0, 1)


def _expansions(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """From latents to keys without positions ``[heads, nope, lora]``, and to values ``[heads, v_head_dim, lora]``."""
    sizes = [module.qk_nope_head_dim, module.v_head_dim]
    keys, to_values = module.kv_b_proj.weight.view(-1, sum(sizes), module.kv_lora_rank).split(sizes, dim=1)
    return keys, to_values
