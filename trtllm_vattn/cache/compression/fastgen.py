"""FastGen: a policy a head, found out at the end of the prompt (Ge et al. 2023, arXiv 2310.01801)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch

from trtllm_vattn.cache.compression.policy import (
    Amount,
    CompressionPolicy,
    HeadsView,
    checked_amount,
    checked_ids,
    tokens_of,
)
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.values import finite

KINDS = ("special", "punctuation", "frequency", "local", "full")
"""Policies of heads, each of which keeps what those before it keep, too; ``full`` keeps everything."""


class FastGen(CompressionPolicy):
    """Each head keeps special tokens; or these and punctuation; or these and those of most attention (frequency); or
    these and the last ones (local); or everything: the first of these, which take more and more memory, whose map of
    attention is near enough to the head's own.

    Near enough is the paper's ``|A - softmax(Q K_C)| <= 1 - threshold``, with half the sum of absolute differences
    (total variation) of each row, averaged over queries and over the query heads that share the KV head. Without the
    evicted keys a row is what is left of it, divided by its sum; so that distance is the attention to what is evicted,
    and the head recovers 1 minus it. Local tokens are those before each query.

    The order of policies, the shares of frequent and local tokens and the threshold are the paper's, and those of the
    reimplementation in AnswerDotAI/cold-compress (the authors published none), which counts as recovered the numbers of
    a map that differ by less than 1e-4; the paper does not say which norm it takes.

    What a head's policy is stays; with `every`, it is applied again to the tokens that came.

    Parameters
    ----------
    special, punctuation : iterable of int
        Token ids.
    threshold : float
        The attention that is to be recovered, up to 1.
    frequent, local : int or float
        Tokens of most attention, and last tokens; or shares of the sequence's tokens.
    every, queries
        As `CompressionPolicy` has them.

    Raises
    ------
    ConfigError
        A number is out of its range.
    """

    by_head: ClassVar[bool] = True

    def __init__(
        self,
        special: Iterable[int] = (),
        punctuation: Iterable[int] = (),
        *,
        threshold: float = 0.95,
        frequent: Amount = 0.3,
        local: Amount = 0.3,
        every: int | None = None,
        queries: int | None = 64,
    ) -> None:
        super().__init__(every, queries)
        self.special, self.punctuation = checked_ids("special", special), checked_ids("punctuation", punctuation)
        self.threshold = finite("threshold", threshold)
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold is {threshold}; it is the share of attention to recover, above 0 and up to 1")
        self.frequent, self.local = checked_amount("frequent", frequent), checked_amount("local", local)

    def keep(self, view: HeadsView) -> Sequence[torch.Tensor]:
        masks = self._masks(view)
        kinds: list[int] = view.notes.get("kinds") or self._kinds(view, masks)
        view.notes["kinds"] = kinds
        last = torch.arange(view.held, device=view.keys.device) == view.held - 1
        return [(masks[kind][head] | last).nonzero().flatten() for head, kind in enumerate(kinds)]

    def _masks(self, view: HeadsView) -> list[torch.Tensor]:
        """Of each kind, which places are kept, bool ``[heads, held]``."""
        special, punctuation = (
            torch.isin(view.tokens, torch.tensor(ids, dtype=torch.int64, device=view.tokens.device))
            for ids in (self.special, self.punctuation)
        )
        most = min(view.held, tokens_of(self.frequent, view.length))
        order = view.mass.sort(dim=1, descending=True, stable=True).indices[:, :most]
        frequent = torch.zeros_like(special).scatter_(1, order, True)
        local = view.positions >= view.length - self._local(view)
        parts = (special, punctuation, frequent, local, torch.ones_like(special))
        masks = [parts[0]]
        for part in parts[1:]:
            masks.append(masks[-1] | part)
        return masks

    def _local(self, view: HeadsView) -> int:
        return min(view.length, tokens_of(self.local, view.length))

    def _kinds(self, view: HeadsView, masks: Sequence[torch.Tensor]) -> list[int]:
        """Each head's policy, as a number in `KINDS`."""
        recovered = torch.stack([self.recovered(view, masks, kind) for kind in range(len(KINDS) - 1)])
        enough = torch.cat((recovered >= self.threshold, torch.ones_like(recovered[:1], dtype=torch.bool)))
        found: list[int] = enough.int().argmax(dim=0).tolist()
        return found

    def recovered(self, view: HeadsView, masks: Sequence[torch.Tensor], kind: int) -> torch.Tensor:
        """float32 ``[heads]``: the attention that goes to what a policy keeps, of all queries seen. `masks` has which
        places each policy keeps at the end, bool ``[heads, held]``."""
        asked, total = view.queries.shape[0] * view.queries.shape[2], view.seen_mass
        if KINDS[kind] != "local":
            return (total * masks[kind]).sum(-1) / asked
        # What is local to a query lies before it, not at the end.
        frequent = masks[KINDS.index("frequency")]
        return torch.where(frequent, total, view.attended(self._local(view))).sum(-1) / asked
