"""H2O: heavy hitters and recent tokens (Zhang et al. 2023, arXiv 2306.14048)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trtllm_vattn.cache.compression.policy import Amount, CompressionPolicy, HeadsView, checked_amount, tokens_of
from trtllm_vattn.errors import ConfigError


class H2O(CompressionPolicy):
    """Each head keeps the `recent` last tokens, and of those before the `heavy` ones of most attention, added
    up over queries; of equal ones the earlier. With ``every=1`` and ``queries=None`` that is the paper's greedy
    algorithm, which evicts one token a step once the budget is full, and what the authors' code keeps
    (FMInference/H2O, h2o_hf/utils_real_drop, `H2OKVCache_LayerWise`), where a KV head's own query heads are added up.
    The paper divides the budget evenly between the two, as the default does.

    Parameters
    ----------
    heavy, recent : int, float, or a sequence of them
        Tokens, or shares of the prompt; a sequence has one for each layer (a budget a layer). The newest token is
        kept in any case.
    every, queries
        As `CompressionPolicy` has them.

    Raises
    ------
    ConfigError
        A number is out of its range, or both are 0.
    """

    def __init__(
        self,
        heavy: Amount | Sequence[Amount] = 0.1,
        recent: Amount | Sequence[Amount] = 0.1,
        *,
        every: int | None = None,
        queries: int | None = 64,
    ) -> None:
        super().__init__(every, queries)
        self.heavy, self.recent = _by_layer("heavy", heavy), _by_layer("recent", recent)
        if not any(self.heavy) and not any(self.recent):
            raise ConfigError("heavy and recent are both 0, so that nothing is kept; give one of them")

    @property
    def by_layer(self) -> bool:
        return len(self.heavy) > 1 or len(self.recent) > 1

    def check(self, num_layers: int) -> None:
        for name, amounts in (("heavy", self.heavy), ("recent", self.recent)):
            if len(amounts) not in (1, num_layers):
                raise ConfigError(f"{name} has {len(amounts)} amounts for {num_layers} layers; give one, or one each")

    def keep(self, view: HeadsView) -> Sequence[torch.Tensor]:
        held = view.held
        recent = min(held, max(1, tokens_of(_of_layer(self.recent, view.layer), view.prompt_length)))
        heavy = min(held - recent, tokens_of(_of_layer(self.heavy, view.layer), view.prompt_length))
        order = view.mass[:, : held - recent].sort(dim=1, descending=True, stable=True).indices[:, :heavy]
        last = torch.arange(held - recent, held, device=order.device).expand(len(order), -1)
        return list(torch.cat((order, last), dim=1).sort(dim=1).values)


def _by_layer(name: str, given: Any) -> tuple[Amount, ...]:
    some = given if isinstance(given, list | tuple) else [given]
    if not some:
        raise ConfigError(f"{name} is empty; give one amount, or one for each layer")
    return tuple(checked_amount(name, each) for each in some)


def _of_layer(amounts: tuple[Amount, ...], layer: int) -> Amount:
    return amounts[layer if len(amounts) > 1 else 0]
