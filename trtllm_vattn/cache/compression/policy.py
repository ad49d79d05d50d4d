"""What a policy sees of a sequence, and what it says is kept: the seam of cache compression."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from typing import Any, ClassVar

import torch

from trtllm_vattn.cache.compression.mass import attended, maps
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.values import described, finite, whole

MOST_ID = 2**31 - 1
"""The largest token id that any vocabulary has."""
Amount = int | float
"""Tokens; a float is a share of the sequence's tokens at the end of its prompt."""


@dataclass(frozen=True, eq=False)
class HeadsView:
    """What a policy sees: KV heads of one layer that lie in one range, `held` tokens of one sequence each. A token is
    known by its place; places are in the order of positions, which differ from them once tokens were evicted.

    Attributes
    ----------
    layer, first_head : int
        Which heads: the layer, and the first of its KV heads.
    length, prompt_length : int
        The sequence's tokens so far, evicted ones too, and those at the end of its prompt.
    keys, values : Tensor
        ``[held, heads, head_dim]``, as they are stored, for reading alone: keys turned to their positions. Those of
        eight bits are given as float32, scales applied.
    positions, tokens : Tensor
        int64 ``[heads, held]``: each place's position, and the id of its token.
    queries : Tensor
        ``[queries, heads, group, head_dim]``: the last queries since tokens were evicted last, as many as the policy
        asks for (`CompressionPolicy.queries`); `group` query heads share a KV head. The last one is at position
        ``length - 1``.
    scale : float
        Of scores, in the softmax.
    carried : Tensor
        float32 ``[heads, held]``: the attention that each token had from queries before these.
    notes : dict
        Of the policy, for these heads of this sequence: what it writes there it sees the next time.
    """

    layer: int
    first_head: int
    length: int
    prompt_length: int
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor
    queries: torch.Tensor
    scale: float
    carried: torch.Tensor
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Tokens of each head."""
        return len(self.keys)

    def maps(self, first: int = 0, stop: int | None = None) -> torch.Tensor:
        """Attention of queries `first` to `stop` to all places, float32 ``[heads, group, queries, held]``: each row
        adds up to 1, and is 0 where the query does not see the place."""
        return maps(self.queries, self.keys, self.scale, first, stop)

    def attended(self, local: int | None = None) -> torch.Tensor:
        """float32 ``[heads, held]``: the attention that each token had from the queries seen, added up over these and
        the query heads that share the KV head. With `local`, that of queries less than so many positions behind it."""
        first = self.length - len(self.queries)
        return attended(
            self.queries, self.keys, self.scale, positions=self.positions, first_position=first, local=local
        )

    @cached_property
    def seen_mass(self) -> torch.Tensor:
        """`attended` of all positions."""
        return self.attended()

    @property
    def mass(self) -> torch.Tensor:
        """float32 ``[heads, held]``: the attention that each token has had, from queries before these, too."""
        return self.carried + self.seen_mass


class CompressionPolicy(ABC):
    """Says which tokens a head keeps.

    Parameters
    ----------
    every : int or None
        It runs at the end of a sequence's prompt, and then whenever so many tokens were added; None is never again.
    queries : int or None
        How many of the last queries it wants the attention of, at most; None is all. They are kept for every slot, so
        that all take more memory than keys and values do.

    Raises
    ------
    ConfigError
        A number is out of its range.
    """

    by_head: ClassVar[bool] = False
    """Whether it keeps different numbers of tokens in heads of one layer, so that heads need ranges of their own to
    give memory back (`CacheConfig.heads_per_range`)."""

    def __init__(self, every: int | None = None, queries: int | None = 64) -> None:
        self.every = None if every is None else whole("every", every, 1)
        self.queries = None if queries is None else whole("queries", queries, 1)

    @property
    def by_layer(self) -> bool:
        """Whether it keeps different numbers of tokens in layers, so that they need ranges of their own."""
        return self.by_head

    def check(self, num_layers: int) -> None:  # noqa: B027
        """Raise ConfigError where it does not suit a model of so many layers."""

    @abstractmethod
    def keep(self, view: HeadsView) -> Sequence[torch.Tensor]:
        """The places that each head keeps, int64 ``[kept]`` on the device of the view, ascending; the last place, the
        newest token's, is among them."""


def checked_amount(name: str, given: Any) -> Amount:
    """A number of tokens, or a share. Raises ConfigError."""
    if isinstance(given, float):
        if not 0 <= finite(name, given) <= 1:
            raise ConfigError(f"{name} is {given}; a share is between 0.0 and 1.0, a number of tokens a whole number")
        return given
    return whole(name, given, 0)


def tokens_of(amount: Amount, length: int) -> int:
    """Tokens that an amount is of a sequence of `length` tokens; shares are rounded up."""
    return ceil(amount * length) if isinstance(amount, float) else amount


def checked_ids(name: str, given: Any) -> tuple[int, ...]:
    """Token ids, each once, in order. Raises ConfigError."""
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ConfigError(f"{name} is {described(given)}; give the token ids, a list of whole numbers")
    return tuple(sorted({whole(f"an id of {name}", each, 0, MOST_ID) for each in given}))
