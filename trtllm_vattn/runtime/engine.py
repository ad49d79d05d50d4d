"""`Engine`: continuous batching over a Hugging Face model and one of our caches, decode captured."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, NoFreeSlot, OutOfPages, SequenceTooLong
from trtllm_vattn.graphs.runner import default_buckets
from trtllm_vattn.runtime.binding import bind, check_fit, scale_of, shape_of
from trtllm_vattn.runtime.decode import DecodeBatch
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.prefill import prefill_chunk
from trtllm_vattn.runtime.request import Completion, Running, TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams, sample

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class StepRecord:
    """What one decode step cost, in seconds of host time.

    `kv_s` went to the cache before the launch (`prepare_step`, guard); `ahead_s` to mapping ahead while the device was
    busy; `wall_s` from the start of bookkeeping to the tokens on the host. Where `prefilled` prompt tokens went in just
    before, `wall_s` includes waiting for them.
    """

    lanes: int
    prefilled: int
    wall_s: float
    kv_s: float
    ahead_s: float


class Engine:
    """Runs requests over a model and a cache. Not thread-safe; used from one stream.

    Parameters
    ----------
    model : PreTrainedModel
        A Hugging Face causal language model (Llama, Qwen2, Qwen3, Mistral families), on the cache's device; its code
        is not changed, its attention is pointed at ours.
    cache : KVCache
        The engine closes it.
    attention : str
        ``auto``, ``torch`` or ``cudnn``.
    capture : bool
        Whether decode steps are captured once a bucket and replayed, or run eagerly.
    buckets : sequence of int or None
        Batch sizes to capture; None for the usual ones up to the cache's slots.
    chunk : int
        Prompt tokens that go in at once; longer prompts go in by chunks, between decode steps.
    record_margins : bool
        Whether token events carry the distance of the two largest logits.
    observer : callable or None
        Called with a `StepRecord` after each decode step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        *,
        attention: str = "auto",
        capture: bool = True,
        buckets: Sequence[int] | None = None,
        chunk: int = 2048,
        record_margins: bool = False,
        observer: Callable[[StepRecord], None] | None = None,
    ) -> None:
        if chunk < 1:
            raise ConfigError(f"chunk is {chunk}; it must be a positive number of tokens")
        if model.device != cache.device:
            raise ConfigError(f"the model is on {model.device}, the cache on {cache.device}; put them on one device")
        check_fit(model, cache.shape)
        bind(model)
        self.model, self.cache = model, cache
        self.chunk, self.record_margins, self.observer = chunk, record_margins, observer
        config = model.config.get_text_config()
        self._vocab_size: int = config.vocab_size
        self.attention = make_attention(attention, cache, config.num_attention_heads, scale_of(model))
        self._prefilled = 0
        self._ids = itertools.count()
        self._waiting: deque[Running] = deque()
        self._prefilling: deque[Running] = deque()
        self._decoding: dict[int, Running] = {}
        """By slot, in the order of admission."""
        buckets = default_buckets(cache.shape.num_slots) if buckets is None else buckets
        with torch.inference_mode():
            self.decode = DecodeBatch(model, self.attention, buckets, capture)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        max_seqs: int = 8,
        max_seq_len: int = 2048,
        budget: int | None = None,
        cache: str = "vattn",
        attention: str = "auto",
        capture: bool = True,
    ) -> Self:
        """An engine over a checkpoint directory or a named shape (`runtime.models.SHAPES`), on the GPU if there is one.

        Parameters
        ----------
        max_seqs : int
            Sequences that run at once.
        budget : int or None
            Bytes of KV memory; None is enough for all of them at `max_seq_len` tokens.
        """
        device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
        loaded = load_model(model, device, dtype)
        made = make_cache(cache, shape_of(loaded, max_seqs, max_seq_len), device, budget)
        with ExitStack() as undo:
            undo.callback(made.close)
            engine = cls(loaded, made, attention=attention, capture=capture)
            undo.pop_all()
        return engine

    # -- requests --------------------------------------------------------------------------------------------------

    def submit(
        self, prompt: Sequence[int], params: SamplingParams | None = None, forced: Sequence[int] | None = None
    ) -> int:
        """Queue a prompt of token ids; returns the request's number.

        With `forced`, those tokens are fed in place of the chosen ones, which events and completions still report
        (teacher forcing); there must be `max_tokens` of them.
        Raises ConfigError or SequenceTooLong; nothing is queued then.
        """
        params = params or SamplingParams()
        prompt = [int(token) for token in prompt]
        if not prompt:
            raise ConfigError("the prompt is empty; at least one token is needed")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise ConfigError(f"the prompt has token ids outside 0 to {self._vocab_size - 1}")
        longest = self.cache.shape.max_seq_len
        if len(prompt) + params.max_tokens > longest:
            raise SequenceTooLong(
                f"a prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} exceed max_seq_len {longest}; "
                "lower max_tokens, or build the cache with a larger max_seq_len"
            )
        if forced is not None and len(forced) < params.max_tokens:
            raise ConfigError(f"{len(forced)} tokens to force, {params.max_tokens} needed; give as many as max_tokens")
        request = Running(next(self._ids), prompt, params, forced)
        self._waiting.append(request)
        return request.id

    def abort(self, request: int) -> None:
        """Drop a request wherever it is; its memory is free for others. Raises ConfigError for an unknown one."""
        for queue in (self._waiting, self._prefilling):
            for running in queue:
                if running.id == request:
                    queue.remove(running)
                    self._leave(running)
                    return
        for running in self._decoding.values():
            if running.id == request:
                self._leave(running)
                return
        raise ConfigError(f"no request {request} is waiting or running")

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._waiting or self._prefilling or self._decoding)

    @property
    def prefilling(self) -> bool:
        """Whether any request still waits or has prompt tokens to put in."""
        return bool(self._waiting or self._prefilling)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Run prompts of token ids to their end; completions in the order of the prompts."""
        each = params if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts and {len(each)} sampling parameters; give one for each, or one")
        lengths = {self.submit(prompt, one): len(prompt) for prompt, one in zip(prompts, each, strict=True)}
        tokens: dict[int, list[int]] = {request: [] for request in lengths}
        done: dict[int, Completion] = {}
        with tqdm(total=len(prompts), unit="request", disable=None if progress else True) as bar:
            for event in self.run():
                if event.request in tokens:
                    tokens[event.request].append(event.token)
                    if event.finish_reason:
                        number = event.request
                        done[number] = Completion(number, lengths[number], tokens[number], event.finish_reason)
                        bar.update()
        return [done[request] for request in lengths]

    def run(self) -> Iterator[TokenEvent]:
        """Step until no request is left, streaming tokens as they come; more may be submitted meanwhile."""
        while self.busy:
            yield from self.step()

    # -- stepping --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Admit what fits, put up to `chunk` prompt tokens in, decode one token of every running sequence."""
        self._admit()
        self._prefilled = 0
        return self._prefill() + self._decode()

    def _admit(self) -> None:
        while self._waiting:
            request = self._waiting[0]
            try:
                request.slot = self.cache.admit(request.id, request.length)
            except (NoFreeSlot, OutOfPages):
                if not self._prefilling and not self._decoding:
                    raise
                return
            self._prefilling.append(self._waiting.popleft())

    def _prefill(self) -> list[TokenEvent]:
        events = []
        room = self.chunk
        while self._prefilling and room > 0:
            request = self._prefilling[0]
            tokens = request.tokens[request.prefilled : request.prefilled + room]
            logits = prefill_chunk(self.model, self.attention, request.slot, tokens, request.prefilled, self.chunk)
            # The device is busy; the sequence's first steps find their memory there.
            self.cache.map_ahead()
            request.prefilled += len(tokens)
            room -= len(tokens)
            self._prefilled += len(tokens)
            if request.prefilled == request.length:
                self._prefilling.popleft()
                self._decoding[request.slot] = request
                events += self._accept([request], logits, [0], logits.argmax(dim=-1).tolist())
        return events

    def _decode(self) -> list[TokenEvent]:
        if not self._decoding:
            return []
        started = perf_counter()
        while True:
            try:
                self.cache.prepare_step(self.decode.lengths)
                break
            except OutOfPages:
                self._preempt()
        prepared = perf_counter() - started
        logits, chosen, guarded = self.decode.launch()
        ahead = perf_counter()
        self.cache.map_ahead()
        ahead = perf_counter() - ahead
        by_lane = chosen.tolist()
        if self.observer is not None:
            wall = perf_counter() - started
            self.observer(StepRecord(len(self._decoding), self._prefilled, wall, prepared + guarded, ahead))
        requests = list(self._decoding.values())
        return self._accept(requests, logits, [request.slot for request in requests], by_lane)

    def _accept(
        self, requests: list[Running], logits: torch.Tensor, rows: list[int], greedy: list[int]
    ) -> list[TokenEvent]:
        """Take one token a request: logits ``[any, vocab]``, of which request i has row ``rows[i]``; `greedy` is the
        argmax of every row."""
        chosen = {request.id: greedy[row] for request, row in zip(requests, rows, strict=True)}
        drawing = [(request, row) for request, row in zip(requests, rows, strict=True) if not request.params.greedy]
        if drawing:
            drawers, drawn_rows = map(list, zip(*drawing, strict=True))
            drawn = sample(logits[drawn_rows], [r.params for r in drawers], [len(r.fed) for r in drawers])
            chosen.update(zip((r.id for r in drawers), drawn.tolist(), strict=True))
        margins: list[float] | list[None] = [None] * len(requests)
        if self.record_margins:
            best = logits[rows].float().topk(2, dim=-1).values
            margins = (best[:, 0] - best[:, 1]).tolist()
        events = []
        for request, margin in zip(requests, margins, strict=True):
            reason = request.accept(chosen[request.id])
            events.append(TokenEvent(request.id, chosen[request.id], reason, margin))
            if reason:
                self._leave(request)
            else:
                self.decode.occupy(request.slot, request.fed[-1], request.length)
        return events

    def _preempt(self) -> None:
        """Send the youngest request back to the queue; its tokens are prefilled again when there is room.

        Raises OutOfPages where it is the only one: it can never be served.
        """
        holders = [*self._decoding.values(), *self._prefilling]
        if len(holders) == 1:
            raise OutOfPages(
                f"request {holders[0].id} alone outgrew the cache's memory at {holders[0].length} tokens; abort it, or "
                "raise the budget"
            )
        youngest = max(holders, key=lambda request: request.id)
        if youngest in self._prefilling:
            self._prefilling.remove(youngest)
        self._leave(youngest)
        youngest.slot, youngest.prefilled = -1, 0
        self._waiting.appendleft(youngest)

    def _leave(self, request: Running) -> None:
        """Take a request's slot and memory back."""
        if self._decoding.pop(request.slot, None) is not None:
            self.decode.vacate(request.slot)
        if request.slot >= 0:
            self.cache.release(request.id)

    # -- ending ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Drop all requests, the graphs, and the cache. Idempotent."""
        self._waiting.clear()
        self._prefilling.clear()
        self._decoding.clear()
        self.decode.close()
        self.cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
