"""Sampling parameters, and how a token is chosen from a row of logits.

A draw is the largest of the kept tokens' logits with Gumbel noise added (the Gumbel-max trick). The noise of a token
is a hash of the request's seed, the position in the output and the token's id (counter-based, after SplitMix64: Steele,
Lea and Flood, OOPSLA'14). So a draw depends on nothing else: not on who else is in the batch, on lanes, launches or the
order in which a device adds numbers up; and logits that differ by rounding give the same token, unless the two largest
with their noise are as near to one another.

Every choice is total: a row whose largest logit is no finite number gives `NO_TOKEN`, and no index ever leaves the
vocabulary, which on a GPU would end the process. Single logits of minus infinity are masked tokens.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.sampling_fields import LARGEST_COUNT, MOST_SAMPLES, check_fields, check_salt
from trtllm_vattn.runtime.tokens import token_ids
from trtllm_vattn.values import finite, truth, whole

COLDEST = 1e-5
"""Temperature below which the likeliest token is taken."""
HOTTEST = 1e30
"""Temperature above which nothing changes any more; it is a float32 on the device."""
NO_TOKEN = -1
"""Stands for a token where the logits give none."""
LARGEST_SEED = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen.

    Values are checked at construction; whole numbers and floats may be numpy's. Logits are changed by `logit_bias`,
    `repetition_penalty`, `frequency_penalty` and `presence_penalty`, `bad_words`, `min_tokens` and the grammar, in this
    order; then comes temperature, top-k, top-p over what is left, and `min_p`: transformers' order. vLLM has `min_p`
    before top-k.

    Parameters
    ----------
    max_tokens : int or None
        Tokens to generate at most; None is what fits the slot and the cache's budget when the request is submitted.
    temperature : float
        0 is greedy, and so is less than `COLDEST`, by which logits cannot be divided.
    top_p : float
        Smallest set of tokens whose probabilities add up to this; 1 is all.
    top_k : int
        Only so many of the likeliest, of equal ones those with the smaller ids; 0 is all.
    seed : int or None
        The same seed gives the same tokens for the same logits, whatever else is in the batch; None is a fresh one for
        each request.
    stop_token_ids : sequence of int
        Generation ends after one of these, which is part of the output.
    ignore_eos : bool
        Whether the end-of-text tokens that the checkpoint names do not end generation.
    n : int
        Samples of the same prompt, which share its memory, at most `sampling_fields.MOST_SAMPLES`. Sample i (its
        `branch`) is what a request with `seed` + i gives.
    cache_salt : str or None
        Keys and values of a prompt are reused for requests with the same salt alone.
    retention_priority : int
        0 to 100: what the request leaves is evicted before what those of a higher one left.
    min_p : float
        Only tokens at least so probable as this part of the likeliest one's probability; 0 is all.
    repetition_penalty : float
        Positive logits of tokens in the prompt or the output are divided by it, others multiplied (CTRL, 2019).
    presence_penalty, frequency_penalty : float
        -2 to 2. Subtracted from the logits of tokens in the output, once, and once for each time (OpenAI's).
    logit_bias : mapping of int to float, or None
        Added to the logits of these token ids, at most `sampling_fields.MOST_BIASED`. As penalties, of magnitudes that
        float32 has with room to spare (`sampling_fields.LARGEST_FACTOR`).
    bad_words : sequence of str, or of sequences of int
        Texts, with and without a space before them, or token ids that are never generated in this order, also where
        the prompt begins them. Texts need the engine's tokenizer. Where they, `min_tokens` and a grammar leave no token
        that could come next, the request is refused, or ends there with an error that says so.
    stop : str or sequence of str
        The output ends before the first of these texts, at most `sampling_fields.MOST_STOPS`; its tokens are among the
        output, it is not part of the text. Needs the engine's tokenizer. Text that may be the beginning of one is held
        back.
    min_tokens : int
        So many tokens are generated before a stop token or a stop text may end the output.
    logprobs, prompt_logprobs : int or None
        Log-probabilities of each token of the output, and of the prompt given the tokens before it, with so many of the
        likeliest; 0 is none beside it. They are the model's: of its logits, before anything above changes them. A
        prompt whose log-probabilities are asked for is computed whole, whatever is kept of it.
    json_schema : str, mapping or None
        The output is JSON of this schema. Needs the extra ``grammar`` and the engine's tokenizer. While a request with
        a grammar runs, launches are of one step, and tokens are chosen once those before them were read, behind a
        forward pass that does not wait (lane_processors.py).
    regex : str or None
        The output matches this regular expression; as `json_schema`.
    detokenize : bool or None
        Whether events and completions have text. None is where the prompt is text, or `stop` is given.

    Raises
    ------
    ConfigError
        A value is of the wrong type or out of its range; the message names it.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    cache_salt: str | None = None
    retention_priority: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = ()
    bad_words: Sequence[str | Sequence[int]] = ()
    stop: str | Sequence[str] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    detokenize: bool | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.max_tokens is not None:
            put("max_tokens", whole("max_tokens", self.max_tokens, 1, LARGEST_COUNT))
        put("temperature", finite("temperature", self.temperature))
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}; it is 0 for the likeliest token, or above")
        put("top_p", finite("top_p", self.top_p))
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it is above 0 and at most 1")
        put("top_k", whole("top_k", self.top_k, 0, LARGEST_COUNT))
        if self.seed is not None:
            put("seed", whole("seed", self.seed, 0, LARGEST_SEED))
        put("stop_token_ids", tuple(token_ids("stop_token_ids", self.stop_token_ids)))
        truth("ignore_eos", self.ignore_eos)
        put("n", whole("n", self.n, 1, MOST_SAMPLES))
        check_salt(self.cache_salt)
        put("retention_priority", whole("retention_priority", self.retention_priority, 0, 100))
        check_fields(self, put)
        if self.detokenize is not None:
            truth("detokenize", self.detokenize)

    def stopping_at(self, end_of_text: Sequence[int]) -> SamplingParams:
        """These, stopped by a checkpoint's end-of-text tokens, too, unless they are ignored."""
        more = () if self.ignore_eos else tuple(token for token in end_of_text if token not in self.stop_token_ids)
        return replace(self, stop_token_ids=(*self.stop_token_ids, *more)) if more else self

    @property
    def biases(self) -> dict[int, float]:
        """`logit_bias` by token id."""
        return dict(self.logit_bias or ())

    @property
    def has_grammar(self) -> bool:
        """Whether tokens are held to a JSON schema or a regular expression."""
        return self.json_schema is not None or self.regex is not None

    @property
    def uses_history(self) -> bool:
        """Whether the next token depends on which tokens came before it other than by the model."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.bad_words
            or self.has_grammar
        )

    @property
    def changes_logits(self) -> bool:
        """Whether tokens are chosen from other logits than the model's, or by `min_p`."""
        return bool(self.uses_history or self.logit_bias or self.min_p or self.min_tokens)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken: at temperature 0, or one too close to it to draw by."""
        return self.temperature < COLDEST

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from the likeliest ones alone, by their number or their probabilities' sum."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1)

    def seeded(self) -> SamplingParams:
        """These, with a fresh seed where they sample and have none."""
        return replace(self, seed=secrets.randbits(64)) if self.seed is None and not self.greedy else self

    def of_branch(self, branch: int) -> SamplingParams:
        """Those of one sample of several."""
        seed = None if self.seed is None else (self.seed + branch) & LARGEST_SEED
        return replace(self, n=1, seed=seed, prompt_logprobs=None if branch else self.prompt_logprobs)

    def key(self, index: int) -> int:
        """What the noise of the token at `index` of the output is made of, with the tokens' ids: an int64 number.

        Without a seed it is that of seed 0; the engine gives every request one (`seeded`)."""
        return _as_int64(_mixed(self.noise_base + index * _GOLDEN))

    @property
    def noise_base(self) -> int:
        """What `key` is made of, with the index (`keys_at`): an int64 number."""
        return _as_int64(_mixed((self.seed or 0) + _GOLDEN))


_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LOW = (1 << 64) - 1
_GOLDEN_INVERSE = pow(_GOLDEN, -1, 1 << 64)


def _mixed(x: int) -> int:
    """SplitMix64's finalizer of a 64-bit number."""
    x &= _LOW
    x = ((x ^ (x >> 30)) * _FIRST) & _LOW
    x = ((x ^ (x >> 27)) * _SECOND) & _LOW
    return x ^ (x >> 31)


def _as_int64(x: int) -> int:
    """The number with the same 64 bits."""
    return x - (1 << 64) if x >> 63 else x


def _signed(x: int) -> int:
    return x - (1 << 64)


def _mixed_on_device(x: torch.Tensor) -> torch.Tensor:
    """`_mixed` of int64 numbers, which wrap around. A shift to the right brings the sign in, which is masked away."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_FIRST)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_SECOND)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def keys_at(base: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`SamplingParams.key` on the device: int64 out of `noise_base` and index, int64, which broadcast."""
    return _mixed_on_device(base + index * _signed(_GOLDEN))


def add_noise(scores: torch.Tensor, keys: torch.Tensor, sampled: torch.Tensor) -> None:
    """Add each token's Gumbel noise, in place: scores ``[rows, vocab]``, keys int64 ``[rows]``; nothing to rows that
    are not `sampled`, bool ``[rows]``. The device's integers are 64-bit and wrap around, as the hash wants them."""
    ids = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    # The same as keys + ids * _GOLDEN. Inductor takes the product of an index and a number for an index of 32 bits too,
    # and triton refuses a longer factor of it; a sum with what was loaded is a number.
    x = _mixed_on_device((keys[:, None] * _as_int64(_GOLDEN_INVERSE) + ids) * _signed(_GOLDEN))
    uniform = (((x >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52
    noise = -(-uniform.log()).log()
    scores.add_(torch.where(sampled[:, None], noise, 0.0))


FIXED_POINT = 2.0**40
"""Probabilities are added up as whole numbers of this part of the likeliest token's: such sums are exact, in any order,
and 2**22 tokens fit into 63 bits."""


def sample_on_device(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    keys: torch.Tensor,
    noise: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] = add_noise,
    min_p: torch.Tensor | None = None,
    truncated: bool = True,
) -> torch.Tensor:
    """One token a row, or `NO_TOKEN`: logits ``[rows, vocab]`` to int64 ``[rows]``.

    The other tensors are ``[rows]`` on the device: float64 but for `keys`, int64 (`SamplingParams.key`). Temperature 0
    is greedy, top_k 0 is all, as are min_p None and 0. `noise` is `add_noise`, or the same compiled. Not `truncated`:
    top_k and top_p of all rows are 0 and 1, for which nothing is sorted; the tokens are the same.
    """
    logits = logits.float()
    best = logits.amax(dim=-1, keepdim=True)
    sampled = temperature > 0
    scaled = (logits - best) / torch.where(sampled, temperature, 1.0).float()[:, None]
    if truncated:
        cut = _cut(scaled, top_p, top_k, min_p)
    else:
        # The likeliest one's scaled logit is 0.
        cut = scaled < (-torch.inf if min_p is None else min_p.log()[:, None])
    noise(scaled, keys, sampled)
    chosen = scaled.masked_fill_(cut, -torch.inf).argmax(dim=-1)
    return torch.where(best.isfinite().squeeze(1), chosen, NO_TOKEN)


def _cut(scaled: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor, min_p: torch.Tensor | None) -> torch.Tensor:
    """Which tokens are left out, bool ``[rows, vocab]``."""
    column = (-1, 1)
    ordered, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    # Equal ones are in the order of their ids. Both kinds of truncation keep the first so many.
    vocab = scaled.shape[1]
    ids = torch.arange(vocab, device=scaled.device)
    within = ids < torch.where(top_k > 0, top_k, float(vocab)).view(column)
    weights = ((ordered.exp() * FIXED_POINT).nan_to_num(0.0, 0.0, 0.0).long()).masked_fill(~within, 0)
    summed = weights.cumsum(dim=-1)
    enough = top_p.view(column)
    within &= (summed - weights < enough * summed[:, -1:]) | (enough >= 1)
    if min_p is not None:
        # The likeliest one's scaled logit is 0.
        within &= ordered >= min_p.log().view(column)
    last = (within.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    edge, edge_id = ordered.gather(1, last), tokens.gather(1, last)
    return (scaled < edge) | ((scaled == edge) & (ids > edge_id))


def settings(params: SamplingParams) -> tuple[float, float, float]:
    """A row's temperature, top_p and top_k, as `sample_on_device` takes them."""
    return 0.0 if params.greedy else min(params.temperature, HOTTEST), params.top_p, float(params.top_k)


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], indices: Sequence[int]) -> torch.Tensor:
    """Sample one token a row, or `NO_TOKEN`: logits ``[rows, vocab]`` to int64 ``[rows]``.

    `indices` counts the tokens that each row's request has generated so far.
    """
    device = logits.device
    rows = torch.tensor([settings(each) for each in params], dtype=torch.float64, device=device).view(-1, 3)
    temperature, top_p, top_k = rows.unbind(1)
    keys = [0 if each.greedy else each.key(index) for each, index in zip(params, indices, strict=True)]
    return sample_on_device(logits, temperature, top_p, top_k, torch.tensor(keys, dtype=torch.int64, device=device))


def choose(logits: torch.Tensor, rows: Sequence[tuple[SamplingParams, int]]) -> list[int]:
    """One token a row, the likeliest one or as by `sample`: logits ``[rows, vocab]``, and for each row how many
    tokens its request has generated so far. Of a row that gives none (`have_token`), some token of the vocabulary."""
    chosen = logits.argmax(dim=-1)
    sampled = [row for row, (params, _) in enumerate(rows) if not params.greedy]
    if sampled:
        chosen[sampled] = sample(logits[sampled], *zip(*(rows[row] for row in sampled), strict=True)).clamp(min=0)
    tokens: list[int] = chosen.tolist()
    return tokens


def have_token(logits: torch.Tensor) -> list[bool]:
    """Whether each row gives a token: its largest logit is a finite number, and none is NaN."""
    there: list[bool] = logits.amax(dim=-1).isfinite().tolist()
    return there


def margins(logits: torch.Tensor) -> list[float]:
    """How far the two largest of each row are apart: logits ``[rows, vocab]``."""
    best = logits.float().topk(2, dim=-1).values
    apart: list[float] = (best[:, 0] - best[:, 1]).tolist()
    return apart


MOST_PARTS = 128


def in_parts(logits: torch.Tensor) -> torch.Tensor:
    """Rows by parts of equal width, no more than `MOST_PARTS`: logits ``[rows, vocab]`` to ``[rows, parts, width]``.

    The likeliest token is found in two stages: a GPU gives a row to one block of threads, and a vocabulary is long.
    """
    rows, vocab = logits.shape
    parts = max(n for n in range(1, MOST_PARTS + 1) if vocab % n == 0)
    return logits.view(rows, parts, vocab // parts)


def of_parts(largest: torch.Tensor, place: torch.Tensor, width: int) -> torch.Tensor:
    """The first largest of each row, int64 ``[rows]``, by that of each part and its place there, ``[rows, parts]``;
    `NO_TOKEN` where that is no finite number: maxima are NaN where anything is."""
    part = largest.argmax(dim=-1, keepdim=True)
    token = part * width + place.gather(1, part)
    return torch.where(largest.gather(1, part).isfinite(), token, NO_TOKEN).squeeze(1)
