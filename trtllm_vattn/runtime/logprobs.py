"""Log-probabilities of tokens: of those chosen, beside the likeliest, and of a prompt's.

They are the model's own, by its logits before any sampling parameter changes them, as vLLM's ``raw_logprobs``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trtllm_vattn.runtime.sampling_fields import MOST_LOGPROBS


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability, and the likeliest tokens at its place with theirs, likeliest first: as many as
    were asked for."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def of_logits(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of tokens int64 ``[rows]``, by logits ``[rows, vocab]``: their log-probabilities float32 ``[rows]``, the
    likeliest tokens int64 ``[rows, most]`` and theirs; `most` is `MOST_LOGPROBS`, or the vocabulary."""
    logits = logits.float()
    total = logits.logsumexp(dim=-1, keepdim=True)
    values, ids = logits.topk(min(MOST_LOGPROBS, logits.shape[1]), dim=-1)
    own = logits.gather(1, tokens.clamp(min=0)[:, None])
    return (own - total)[:, 0], ids, values - total


class Fetched:
    """Log-probabilities on their way to the host; `read` waits for them.

    Parameters
    ----------
    tensors
        As `of_logits` gives them, with any dimensions before.
    stream : torch.cuda.Stream or None
        Copies them; None on the host, where they are cloned.
    """

    def __init__(self, tensors: tuple[torch.Tensor, ...], stream: torch.cuda.Stream | None) -> None:
        self._arrived: torch.cuda.Event | None = None
        if stream is None:
            self._tensors = tuple(tensor.clone() for tensor in tensors)
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            copies = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors]
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        self._tensors = tuple(copies)

    def read(self, *place: int) -> tuple[torch.Tensor, ...]:
        """The three tensors, or what they hold at a place of their first dimensions."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return tuple(tensor[place] for tensor in self._tensors)

    def token(self, token: int, most: int, *place: int) -> TokenLogprob:
        """One token's, with `most` of the likeliest."""
        own, ids, values = self.read(*place)
        return TokenLogprob(token, float(own), tuple(zip(ids[:most].tolist(), values[:most].tolist(), strict=True)))
