"""Log-probabilities of tokens: of those chosen, beside the likeliest, and of a prompt's.

They are the model's own, by its logits before any sampling parameter changes them, as vLLM's ``raw_logprobs``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trtllm_vattn.runtime.sampling_fields import MOST_LOGPROBS

ROWS_AT_ONCE = 128
"""Rows that are ordered at a time, which takes 16 bytes of each number."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability, and the likeliest tokens at its place with theirs, likeliest first: as many as
    were asked for."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def of_logits(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of tokens int64 ``[rows]``, by logits ``[rows, vocab]``: their log-probabilities float32 ``[rows]``, the
    likeliest tokens int64 ``[rows, most]`` and theirs; `most` is `MOST_LOGPROBS`, or the vocabulary. Of equally likely
    ones those with the smaller ids come first."""
    logits = logits.float()
    total = logits.logsumexp(dim=-1, keepdim=True)
    ids = likeliest_ids(logits, min(MOST_LOGPROBS, logits.shape[1]))
    own = logits.gather(1, tokens.clamp(min=0)[:, None])
    return (own - total)[:, 0], ids, logits.gather(1, ids) - total


def likeliest_ids(logits: torch.Tensor, most: int) -> torch.Tensor:
    """The places of the `most` largest of each row, in falling order, of equal ones the smaller places first: logits
    float32 ``[rows, vocab]`` to int64 ``[rows, most]``.

    topk promises no order of equal values, nor which of them it finds. So each number carries its place here: whole
    numbers of 64 bits, of which no two are equal.
    """
    vocab = logits.shape[1]
    behind = torch.arange(vocab - 1, -1, -1, device=logits.device)
    found = []
    for part in torch.split(logits, ROWS_AT_ONCE):
        # Bits of floats are in the order of the floats, those of negative ones the other way round; -0.0 becomes 0.0.
        bits = (part + 0.0).view(torch.int32)
        bits ^= (bits >> 31) & 0x7FFFFFFF
        keys = bits.long()
        keys <<= 32
        keys += behind
        found.append(vocab - 1 - keys.topk(most, dim=-1).values.remainder(1 << 32))
    return torch.cat(found)


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
