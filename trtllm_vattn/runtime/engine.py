"""`Engine`: continuous batching over a Hugging Face model and one of our caches, decode captured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, OutOfPages, SequenceTooLong
from trtllm_vattn.graphs.audit import AuditReport
from trtllm_vattn.graphs.policy import MappingPolicy, start_choosing
from trtllm_vattn.graphs.runner import default_buckets
from trtllm_vattn.runtime.beside import MappingBeside
from trtllm_vattn.runtime.binding import bind, check_fit, scale_of, shape_of
from trtllm_vattn.runtime.compaction import Compaction
from trtllm_vattn.runtime.compiled import as_it_is, compile_model, tracing
from trtllm_vattn.runtime.decode import DecodeBatch
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.pipeline import Pipeline
from trtllm_vattn.runtime.prefill import Prefill
from trtllm_vattn.runtime.request import Completion, Running, StepRecord, TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams, choose, margins
from trtllm_vattn.runtime.scheduler import Scheduler
from trtllm_vattn.runtime.startup import StartupReport, memory_left
from trtllm_vattn.runtime.weights import Manifest, NamedTensors, Weights
from trtllm_vattn.vmm.open import open_driver

if TYPE_CHECKING:
    from typing_extensions import Self

UNUSUAL = 509
"""Tokens of the first compiled pass. No dimension of a model has this size, so torch takes none for their number; and
kernels are tuned by it, which with few tokens would all seem alike."""


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
        ``auto``, ``torch``, ``cudnn``, ``xqa`` or ``xqa-fmha``.
    capture : bool
        Whether decode steps are captured once a bucket and replayed, or run eagerly.
    buckets : sequence of int or None
        Batch sizes to capture; None for the usual ones up to the cache's slots.
    steps : int
        Most decode steps of one launch. With more than one, tokens are chosen on the device and come in groups; what a
        sequence has beyond its end is discarded.
    loop : bool
        Whether the device ends a launch earlier: when a sequence ends, or its next token has no memory yet.
    packed : bool
        Whether sequences take the first lanes, whatever their slots, instead of lane i being slot i.
    compile : bool or None
        Whether the model's layers are compiled by torch.compile; None is yes on a GPU. Compiling changes the model in
        place.
    mapping : str
        When memory is mapped ahead: ``concurrent`` is while the device computes, ``between-steps`` and ``quiesce``
        before a launch (graphs/policy.py).
    chunk : int
        Prompt tokens that go in at once; longer prompts go in by chunks, between decode steps.
    record_margins : bool
        Whether token events carry the distance of the two largest logits.
    observer : callable or None
        Called with a `StepRecord` after each decode step.
    """

    together: ClassVar[bool] = True
    """Whether the model takes chunks of several prompts in one pass."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        *,
        attention: str = "auto",
        capture: bool = True,
        buckets: Sequence[int] | None = None,
        steps: int = 1,
        loop: bool = False,
        packed: bool = False,
        compile: bool | None = None,
        mapping: str = "concurrent",
        chunk: int = 2048,
        record_margins: bool = False,
        observer: Callable[[StepRecord], None] | None = None,
    ) -> None:
        if chunk < 1:
            raise ConfigError(f"chunk is {chunk}; it must be a positive number of tokens")
        if steps < 1:
            raise ConfigError(f"steps is {steps}; a launch has at least 1")
        if record_margins and steps > 1:
            raise ConfigError(f"margins are recorded of single steps; steps is {steps}, make it 1")
        if model.device != cache.device:
            raise ConfigError(f"the model is on {model.device}, the cache on {cache.device}; put them on one device")
        check_fit(model, cache.shape)
        bind(model)
        self.model, self.cache = model, cache
        self.steps, self.loop, self.record_margins, self.observer = steps, loop, record_margins, observer
        config = model.config.get_text_config()
        self._vocab_size: int = config.vocab_size
        self.attention = make_attention(attention, cache, config.num_attention_heads, scale_of(model))
        self._prefilled = 0
        self._read_at = 0.0
        self._events: list[TokenEvent] = []  # not returned yet
        self._ids = itertools.count()
        self.startup = StartupReport()
        buckets = default_buckets(cache.shape.num_slots) if buckets is None else buckets
        compiling = cache.device.type == "cuda" if compile is None else compile
        with torch.inference_mode():
            started = perf_counter()
            wrap = compile_model(model) if compiling else as_it_is
            self.decode = DecodeBatch(model, self.attention, buckets, steps=steps, loop=loop, packed=packed, wrap=wrap)
            self.prefill = Prefill(model, self.attention, chunk, self.decode.runner.pool, self.together)
            if compiling:
                with tracing():
                    self.prefill.warm_up(UNUSUAL)
            self.startup.compile_s = perf_counter() - started
            if capture:
                self.startup.decode = self.decode.capture()
                self.startup.prefill = self.prefill.capture()
        self.weights = Weights(model, capture)
        self._mapping = MappingBeside(
            cache, MappingPolicy.named(mapping), self.decode.publish_frontiers if loop else None
        )
        movable = isinstance(cache, KVCacheManager) and capture and not packed
        compaction = Compaction(cast(KVCacheManager, cache), self.startup.decode.replay_s) if movable else None
        self.scheduler = Scheduler(cache, self.decode, compaction, chunk)
        self.pipeline = Pipeline(self.scheduler, steps, one_by_one=loop or record_margins)

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
        idle_after_s: float | None = None,
        idle_floor: int = 0,
        mapping: str = "auto",
        **options: Any,
    ) -> Self:
        """An engine over a checkpoint directory or a named shape (`runtime.models.SHAPES`), on the GPU if there is one.

        With the ``vattn`` cache graphs are captured over one mapped dummy slot, and the budget is set from what is left
        then; `set_budget` changes it at any time. `startup` says what all of it cost.

        Parameters
        ----------
        max_seqs : int
            Sequences that run at once.
        budget : int or None
            Bytes of KV memory; None is what is left of 90 % of the GPU's memory after capturing, or on the host, and
            for the other caches, enough for all sequences at `max_seq_len` tokens.
        idle_after_s, idle_floor
            When memory that no sequence uses goes back to the driver, but for so many bytes (`KVCacheManager`).
        mapping : str
            ``auto`` asks a short soak on this machine's driver, made once and remembered (graphs/policy.py).
        options
            Further parameters of `Engine`.
        """
        device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
        with ExitStack() as undo:
            choosing = undo.enter_context(start_choosing(device, mapping))
            started = perf_counter()
            loaded = load_model(model, device, dtype)
            load_s = perf_counter() - started
            shape = shape_of(loaded, max_seqs, max_seq_len)
            policy = choosing.result().policy
            later = cache in ("vattn", "blocks") and device != "cpu"
            idle: dict[str, Any] = {"idle_after_s": idle_after_s, "idle_floor": idle_floor, "sized_later": later}
            driver = policy.wrap(open_driver(device)) if later else None
            made = make_cache(cache, shape, device, None if later else budget, driver=driver, **idle)
            undo.callback(made.close)
            engine = cls(loaded, made, mapping=policy, **options)
            undo.callback(engine.close)
            if later:
                engine.set_budget(memory_left(made.device) if budget is None else budget)
            undo.pop_all()
        engine.startup.load_s = load_s
        return engine

    def set_budget(self, budget: int) -> None:
        """Raise or lower the bytes that a fixed-address cache may hold, at any time; no graph is captured again.

        Where running sequences hold more, the youngest go back to the queue and are prefilled again when there is room.
        Raises ConfigError for another cache, or less than the dummy slot needs.
        """
        if not isinstance(self.cache, KVCacheManager):
            raise ConfigError(f"a {type(self.cache).__name__} has its memory for life; use the vattn cache")
        while True:
            try:
                self.cache.set_budget(budget)
                break
            except OutOfPages:
                if not self.scheduler.holders:
                    raise
                self.scheduler.preempt_youngest()
        self.startup.budget_bytes = budget

    # -- requests --------------------------------------------------------------------------------------------------

    def submit(
        self, prompt: Sequence[int], params: SamplingParams | None = None, forced: Sequence[int] | None = None
    ) -> int:
        """Queue a prompt of token ids; returns the request's number.

        With `forced`, those tokens are fed in place of the chosen ones, which events and completions still report
        (teacher forcing); there must be `max_tokens` of them.
        Raises ConfigError or SequenceTooLong; nothing is queued then.
        """
        if not self.busy:  # it costs as much as there are weights
            self.weights.require_in_place()
        request = self._request(prompt, params, forced)
        self.scheduler.waiting.append(request)
        return request.id

    def _request(self, prompt: Sequence[int], params: SamplingParams | None, forced: Sequence[int] | None) -> Running:
        params = params or SamplingParams()
        prompt = [int(token) for token in prompt]
        if not prompt:
            raise ConfigError("the prompt is empty; at least one token is needed")
        for name, tokens in (("prompt has", prompt), ("forced tokens have", forced or [0])):
            if min(tokens) < 0 or max(tokens) >= self._vocab_size:
                raise ConfigError(f"the {name} token ids outside 0 to {self._vocab_size - 1}")
        longest = self.cache.shape.max_seq_len
        if len(prompt) + params.max_tokens > longest:
            raise SequenceTooLong(
                f"a prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} exceed max_seq_len {longest}; "
                "lower max_tokens, or build the cache with a larger max_seq_len"
            )
        if forced is not None and self.steps > 1:
            raise ConfigError(f"tokens are forced in single steps; this engine takes {self.steps} a launch, make it 1")
        if forced is not None and len(forced) < params.max_tokens:
            raise ConfigError(f"{len(forced)} tokens to force, {params.max_tokens} needed; give as many as max_tokens")
        return Running(next(self._ids), prompt, params, forced)

    def abort(self, request: int) -> None:
        """Drop a request wherever it is; its memory is free for others. Raises ConfigError for an unknown one, and
        DriverError where releasing failed, which the next step tries again."""
        self.scheduler.abort(request)

    @property
    def busy(self) -> bool:
        """Whether any request is not finished, or an event not delivered."""
        return bool(self.scheduler.waiting or self.scheduler.holders or self.scheduler.ended or self._events)

    @property
    def prefilling(self) -> bool:
        """Whether any request still waits or has prompt tokens to put in."""
        return bool(self.scheduler.waiting or self.scheduler.prefilling)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Run prompts of token ids to their end; completions in the order of the prompts.

        Raises ConfigError or SequenceTooLong with none of them queued, ConfigError where others are running: take their
        tokens by `run`. What a step raises ends them all.
        """
        if self.scheduler.waiting or self.scheduler.holders:
            raise ConfigError("requests are running, whose tokens nobody would get; use run(), or abort them")
        each = params if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts and {len(each)} sampling parameters; give one for each, or one")
        self.weights.require_in_place()
        requests = [self._request(prompt, one, None) for prompt, one in zip(prompts, each, strict=True)]
        self.scheduler.waiting += requests
        done: dict[int, str] = {}
        try:
            with tqdm(total=len(prompts), unit="request", disable=None if progress else True) as bar:
                for event in self.run():
                    if event.finish_reason:
                        done[event.request] = event.finish_reason
                        bar.update()
        except BaseException:
            self._events.clear()
            self.scheduler.drop_all()
            raise
        return [
            Completion(each.id, len(each.prompt), each.chosen, done[each.id], each.weights_versions)
            for each in requests
        ]

    def run(self) -> Iterator[TokenEvent]:
        """Step until no request is left, streaming tokens as they come; more may be submitted meanwhile."""
        while self.busy:
            yield from self.step()

    # -- stepping --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Admit what fits, put up to `chunk` prompt tokens in, decode `steps` tokens of every running sequence.

        Raises DriverError where mapping ahead failed beside the last step. Whatever it raises, the next call goes on,
        and returns the tokens that this one had. Raises WeightsMixed after an update of the weights broke.
        """
        self.weights.require_current()
        self._mapping.before_step()
        self.scheduler.release_ended()
        self.scheduler.admit()
        if not self.pipeline.running:
            self.scheduler.compact()
        self._prefilled = 0
        for half in (self._prefill, self._decode):
            half()
            self.scheduler.release_ended()
        events, self._events = self._events, []
        return events

    def _prefill(self) -> None:
        chunks = self.scheduler.next_chunks()
        if not chunks:
            return
        logits = self.prefill.run([chunk for _, chunk in chunks])
        # The device is busy: the sequences' first steps, and the next prompts, find their memory there.
        self._mapping.beside_step()
        self.scheduler.admit_beside()
        whole = [request for request, chunk in chunks if chunk.end == request.length]
        first = choose(logits[: len(whole)], [(each.params, len(each.fed)) for each in whole]) if whole else []
        for request, chunk in chunks:
            request.prefilled = chunk.end
            self._prefilled += len(chunk.tokens)
        for request in whole:
            self.scheduler.prefilling.remove(request)
        self._settle(whole, first, margins(logits[: len(whole)]) if self.record_margins else None)

    def _decode(self, drain: bool = False) -> None:
        """A launch's tokens, of the next one or of one that is under way (`drain`)."""
        running = self.scheduler.decoding
        if not running:
            self.pipeline.forget()
            return
        started = self._read_at if self.pipeline.running else perf_counter()
        launch = self.pipeline.drain() if drain else self.pipeline.start()
        if launch is None:
            return
        ahead = self._mapping.beside_step()
        waited = perf_counter()
        rows = launch.read()
        waited = perf_counter() - waited
        if self.loop:
            # The device went no further than memory reached.
            self.cache.prepare_step(self.decode.lengths_after(len(rows)))
        self._read_at = perf_counter()
        lanes, wall_s = len(launch.lane_of), self._read_at - started
        for row in rows:
            # Who has ended with an earlier row, or joined since the launch, has no part in it.
            requests = [request for request in running.values() if request.slot in launch.lane_of]
            theirs = [launch.lane_of[request.slot] for request in requests]
            apart = margins(launch.logits[theirs]) if self.record_margins else None
            self._settle(requests, [row[lane] for lane in theirs], apart)
        self.decode.took(launch, rows)
        self.pipeline.settled()
        for request in running.values():
            if request.forced is not None:
                self.scheduler.decode_next(request)
        if self.observer is not None:
            self.observer(StepRecord(lanes, len(rows), self._prefilled, wall_s, self.pipeline.kv_s, ahead, waited))

    def _settle(self, requests: list[Running], chosen: list[int], apart: list[float] | None) -> None:
        """Append each request's token; those that end with it leave, who is new takes part in the next launch."""
        for i, (request, token) in enumerate(zip(requests, chosen, strict=True)):
            reason = request.accept(token)
            request.weights_versions.append(self.weights.version)
            self._events.append(
                TokenEvent(request.id, token, reason, apart[i] if apart else None, self.weights.version)
            )
            if reason:
                self.scheduler.leave(request)
            elif request.slot not in self.scheduler.decoding:
                self.scheduler.decode_next(request)

    def audit(self) -> AuditReport:
        """Whose the addresses are that all captured graphs hold. Raises CaptureError where nothing is captured."""
        return AuditReport.joined([self.decode.audit(), self.prefill.audit()])

    # -- weights ---------------------------------------------------------------------------------------------------

    @property
    def weights_version(self) -> int:
        """How many updates of the weights succeeded; 0 are those that the engine started with."""
        return self.weights.version

    def update_weights(
        self,
        named_tensors: NamedTensors,
        *,
        manifest: Manifest | None = None,
        partial: bool = False,
        running: Literal["continue", "restart", "abort"] = "continue",
    ) -> int:
        """Write new weights over the model's, in place, under captured graphs; returns the new `weights_version`.

        Not thread-safe, as all of the engine: call it between steps. Launches under way are waited for first; their
        tokens, of the old version, come with the next `step`.

        Parameters
        ----------
        named_tensors : mapping, or iterable of (str, Tensor)
            By transformers' names, whatever is merged or compiled: those of `state_dict` and `named_parameters`, or
            those that `save_pretrained` writes (which differ for mixtures of experts). Of tied weights, either name, or
            both with equal values. On the host, or on the engine's GPU with their values ready on the current stream.
            float16, bfloat16, float32 and float64 are converted to the model's dtype; others must be equal.
        manifest : mapping of str to (shape, dtype), or None
            What a generator will give. Tensors are then copied as they come, one at a time, and may be reused as soon
            as the generator is asked for the next one (on the current stream, where they are on the GPU). Without it, a
            generator's tensors are all collected first.
        partial : bool
            Whether weights that are not named keep their values. Else every parameter and persistent buffer must be.
        running : str
            What becomes of requests that are not finished: ``continue`` goes on over keys and values that the old
            weights computed; ``restart`` prefills prompts and the tokens so far again; ``abort`` ends them all, queued
            ones too, by an event with `finish_reason` ``abort`` and no token.

        Raises
        ------
        ConfigError
            Names, shapes, dtypes or devices are wrong, by the dict or the manifest: nothing is changed, and what runs
            goes on. Or a stream gives other than its manifest.

        Where a stream breaks after its first tensor was written, whatever it raised is raised, and the weights are
        mixed: `step` raises WeightsMixed until a full update succeeds; events wait for that.
        """
        if running not in ("continue", "restart", "abort"):
            raise ConfigError(f"running is {running!r}; choose continue, restart or abort")
        update = self.weights.check(named_tensors, manifest, partial)
        self._drain()
        if running == "restart":
            self.scheduler.preempt_all()
        elif running == "abort":
            unfinished = sorted([*self.scheduler.holders, *self.scheduler.waiting], key=lambda request: request.id)
            self._events += [
                TokenEvent(request.id, None, "abort", weights_version=self.weights.version) for request in unfinished
            ]
            self.scheduler.drop_all()
        return self.weights.write(update)

    @torch.inference_mode()
    def _drain(self) -> None:
        """Take the tokens of all launches under way."""
        self._prefilled = 0
        while self.pipeline.running:
            self._decode(drain=True)
        self.scheduler.release_ended()

    # -- ending ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Drop all requests, the graphs, and the cache. Idempotent. Raises what failed beside the last step, closed."""
        self.scheduler.clear()
        self.decode.close()
        self.prefill.close()
        self._mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
