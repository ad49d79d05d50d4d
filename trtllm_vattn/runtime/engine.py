"""`Engine`: continuous batching over a Hugging Face model and one of our caches, decode captured."""

from __future__ import annotations

import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.cache.base import CacheShape, KVCache, SlotStats
from trtllm_vattn.cache.compression import CompressionPolicy
from trtllm_vattn.cache.prefix import PrefixCache
from trtllm_vattn.cache.prefix.events import KVCacheEvent
from trtllm_vattn.cache.select import CACHES, make_cache
from trtllm_vattn.errors import (
    CacheInterrupted,
    ConfigError,
    EngineClosed,
    HostMemoryFull,
    KVCacheOutOfMemory,
    VattnError,
    WrongProcess,
)
from trtllm_vattn.graphs.audit import AuditReport
from trtllm_vattn.graphs.capture import collector_off
from trtllm_vattn.lost import is_lost_behind, never_free
from trtllm_vattn.memory.mapping_policy import start_policy_probe
from trtllm_vattn.runtime.before_loading import check_before_loading
from trtllm_vattn.runtime.binding import bind, check_fit, end_pass, options_for, shape_of
from trtllm_vattn.runtime.borrowing import check_broker, make_borrowing_cache
from trtllm_vattn.runtime.checkpoint import end_of_text, load_tokenizer, say_what_is_not_heeded
from trtllm_vattn.runtime.compaction import Compaction
from trtllm_vattn.runtime.compiled import as_it_is, compile_model, compiled_modules, uncompile
from trtllm_vattn.runtime.compression import Compression, check_compression, check_policy
from trtllm_vattn.runtime.decode import ABSENT, DecodeBatch, Launch
from trtllm_vattn.runtime.deterministic import check_deterministic
from trtllm_vattn.runtime.dry_pass import AttentionNeeds, naming
from trtllm_vattn.runtime.engine_stats import EngineStats, StepTotals
from trtllm_vattn.runtime.grammar import Grammar, GrammarCompiler
from trtllm_vattn.runtime.kv_dtype import KVScales, check_kv_cache_dtype, check_kv_scales
from trtllm_vattn.runtime.lane_processors import check_sizes
from trtllm_vattn.runtime.likely import capture_within
from trtllm_vattn.runtime.map_ahead_hook import MapAheadHook
from trtllm_vattn.runtime.models import SHAPES, load_model, longest_of
from trtllm_vattn.runtime.passes import Passes, most_rows
from trtllm_vattn.runtime.pipeline import Pipeline
from trtllm_vattn.runtime.prefill import Prefill
from trtllm_vattn.runtime.prefix_reading import PrefixReading
from trtllm_vattn.runtime.request import (
    Completion,
    RequestState,
    StepRecord,
    TokenEvent,
    as_params,
    as_prompts,
    make_request,
)
from trtllm_vattn.runtime.reuse import RequestSlots
from trtllm_vattn.runtime.sampling import NO_TOKEN, SamplingParams, margins
from trtllm_vattn.runtime.sampling_fields import LARGEST_COUNT, check_salt
from trtllm_vattn.runtime.scheduler import Scheduler
from trtllm_vattn.runtime.settings import (
    MOST_SEQUENCES,
    check_device,
    check_dtype,
    check_model_name,
    check_settings,
    usual_step_tokens,
)
from trtllm_vattn.runtime.sleeping import Sleeping, SleepingReport
from trtllm_vattn.runtime.speculation import Speculation
from trtllm_vattn.runtime.speculation_draft import DraftModel, check_draft_model
from trtllm_vattn.runtime.startup import LOAD, StartupReport, memory_left, progress
from trtllm_vattn.runtime.step_model import StepModel
from trtllm_vattn.runtime.survival import Survival
from trtllm_vattn.runtime.swap_cost import SwapCost
from trtllm_vattn.runtime.text import bad_word_ids, check_tokenizer, text_for
from trtllm_vattn.runtime.tokens import TokenIds, token_ids
from trtllm_vattn.runtime.weights import Manifest, NamedTensors, Weights
from trtllm_vattn.runtime.weights_ipc import IpcWeights, ReceivedWeights, named_tensors
from trtllm_vattn.sizes import parse_bytes
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.trace import Trace
from trtllm_vattn.values import choice, counted, described, finite, shown, truth, typed, unicode_text, whole
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.tensors import finish, inference
from trtllm_vattn.vmm.uninterrupted import drain
from trtllm_vattn.vmm.wrappers import TracingDriver

if TYPE_CHECKING:
    from typing_extensions import Self

    from trtllm_vattn.runtime.borrowing import Left
    from trtllm_vattn.runtime.parallel.ranks import Ranks

logger = logging.getLogger(__name__)

CHANGED = (
    "computed anew, it chose another token than before, which deterministic engines do not; the machine or an "
    "operation of its own is at fault"
)
NOT_FINITE = "its logits are NaN or infinite, so that there is no token to choose"
MEMORY_WAIT_S = 0.01
"""Seconds that a step waits for other tenants' memory where it has nothing else to do."""
UNUSUAL = 509
"""Tokens of the first compiled pass. No dimension of a model has this size, so torch takes none for their number; and
kernels are tuned by it, which with few tokens would all seem alike."""


OBJECTS = ("kv_scales", "compression")
"""Parameters that are checked once there is a model."""
REMAPPING = ("vattn", "blocks")
"""Caches, by name, that keep prefixes."""
FEWEST_KEPT, MOST_KEPT_BYTES = 64, 1 << 44
"""Slots of ended sequences unless told otherwise, and the addresses that they may take: a process has 2**47."""


def _kept(shape: CacheShape, wanted: int | None) -> int:
    """Slots for what ended sequences leave."""
    if wanted is not None:
        return wanted
    return min(max(FEWEST_KEPT, 4 * shape.num_slots), MOST_KEPT_BYTES // (shape.max_seq_len * shape.token_bytes))


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class _Changing:
    """Context of what changes an engine's books: where it is left half done, the next call recovers before it begins.

    An error of this library is raised before or after a change, never in the middle of one, but for `CacheInterrupted`.
    Anything else may come from anywhere: an interrupt, or torch in the middle of a launch.
    """

    __slots__ = ("_engine",)

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)

    def __enter__(self) -> None:
        engine = self._engine()
        assert engine is not None
        engine._interrupted = engine._attention = True
        engine.cache.mark_changing(True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        engine = self._engine()
        assert engine is not None
        engine.cache.mark_changing(False)
        if kind is None or (issubclass(kind, VattnError) and kind is not CacheInterrupted):
            engine._interrupted = engine._attention = False
        if engine.cache.device.type == "cuda" and is_lost_behind(error):
            # Also the error: tensors stand in the frames that it holds.
            never_free(engine, error)


class Engine:
    """Runs requests over a model and a cache. Not thread-safe; used from one stream.

    Whatever interrupts a call (KeyboardInterrupt, at any instruction), the next one goes on: requests keep the tokens
    they have, are prefilled again where their memory's state is not known, and each token comes once. An interrupted
    `submit` queued nothing, an interrupted `close` is called again. An engine that is dropped without `close()` gives
    everything back, with a ResourceWarning of its cache. A forked child's calls raise WrongProcess.

    Parameters
    ----------
    model : StepModel
        A Hugging Face causal language model (of `runtime.families.FAMILIES`, or another that a dry pass finds
        servable), on the cache's device; its code is not changed, its attention is pointed at ours.
    cache : KVCache
        The engine closes it; also where the engine cannot start (compile, capture). Where a setting is refused before
        anything runs on the device, or a start is interrupted, it stays open.
    attention : str
        ``auto``, ``torch``, ``cudnn``, ``shares``, ``latents``, ``xqa`` or ``xqa-fmha``
        (`attention.select.make_attention`).
    capture : bool
        Whether decode steps are captured once a bucket and replayed, or run eagerly.
    buckets : sequence of int or None
        Batch sizes to capture, of at most the cache's slots; all slots, which may run at once, are added. None for the
        usual ones.
    steps : int
        Most decode steps of one launch, no more than `max_seq_len`. With more than one, tokens are chosen on the device
        and come in groups; what a sequence has beyond its end is discarded.
    loop : bool
        Whether the device ends a launch earlier: when a sequence ends, or its next token has no memory yet.
    packed : bool or None
        Whether sequences take the first lanes, whatever their slots, instead of lane i being slot i. None is where
        there are more slots than `max_running`.
    max_running : int or None
        Sequences that run at once, at most; None is as many as the cache has slots. Further slots are for what ended
        sequences leave (`prefix_cache`).
    prefix_cache : bool or None
        Whether what ended requests leave in their slots is kept, as far as memory and slots allow, for prompts that
        begin with the same tokens (cache/prefix/README.md). None is where the cache can (`KVCache.remaps`).
    kv_events : bool
        Whether `kv_events` gives events of stored and removed blocks.
    compile : bool or None
        Whether the model's layers are compiled by torch.compile; None is yes on a GPU. Compiling changes the model in
        place.
    mapping : str
        When memory is mapped ahead: ``concurrent`` is while the device computes, ``between-steps`` and ``quiesce``
        before a launch (memory/mapping_policy.py).
    max_step_tokens : int or None
        Most tokens of a pass: of prompts, which go in by chunks, and one of every running sequence. None is 4096 on a
        GPU of 70 GiB or more that no broker shares out, else 2048.
    chunk : int or None
        The former name of `max_step_tokens`.
    target_itl_ms : float or None
        Milliseconds that a pass may take, and so the longest time between two tokens of a running sequence: chunks are
        made as short as the cost of passes, which is measured all along, asks for.
    max_wait_s : float
        Seconds after which a request goes before all others, whatever their priorities.
    clock : callable
        Seconds, by which deadlines and waiting are counted; another one for virtual time.
    deterministic : bool
        Whether the bits of a request's logits, and so its tokens and log-probabilities, depend on nothing but its own
        tokens and parameters: not on who runs beside it, in which lane, or whether it was preempted
        (runtime/deterministic.py says by what means, and what they cost). Prefixes, speculation, compression and mixed
        passes are left out, and refused where they are asked for; so is what cannot hold it.
    record_margins : bool
        Whether token events carry the distance of the two largest logits.
    observer : callable or None
        Called with a `StepRecord` after each launch's tokens.
    swap_cost : SwapCost or None
        Says whether the tokens of who is preempted go to host memory, of which the cache may have some
        (`CacheConfig.host_memory`), or are computed anew; None measures both.
    sleepable_weights : bool
        Whether the model's parameters are moved to memory that `sleep` can give back (runtime/sleeping.py). They are
        gone when the engine is closed.
    kv_scales : KVScales or None
        For a cache of eight-bit keys and values: what they are divided by (runtime.kv_scales.calibrated_scales). None
        is 1.
    speculation : Speculation or None
        Has several tokens of a sequence drafted and verified in one step (runtime/speculation.py); the tokens of every
        request are the same as without, up to rounding. Of a pass with prompts in it every sequence gets one token, and
        what sequences share is read by each of them (trtllm_vattn/README.md). None drafts none.
    tokenizer : transformers' fast tokenizer, or None
        Prompts may be texts then, and text, stop texts and grammars be asked for (`SamplingParams`).
    trace : Trace, str, Path or None
        Has events noted for Perfetto (trace.py): steps, launches, requests, what changes the cache, and background
        work; of an engine by `from_pretrained` driver calls, too. A file of this name is written, and closed with the
        engine. None notes nothing.
    compression : CompressionPolicy or None
        Evicts tokens of each sequence, so that it takes less memory and its tokens are approximate
        (cache/compression/README.md). None keeps all.

    Raises
    ------
    ConfigError
        A setting cannot work, or the model and the cache do not fit one another.
    """

    supports_packed_prefill: ClassVar[bool] = True
    """Whether the model takes chunks of several prompts in one pass."""
    _survival: Survival | None = None
    _sleeps_for_broker = False
    decode_class: ClassVar[type[DecodeBatch]] = DecodeBatch
    passes_class: ClassVar[type[Passes]] = Passes

    def __init__(
        self,
        model: StepModel,
        cache: KVCache,
        *,
        attention: str = "auto",
        capture: bool = True,
        buckets: Sequence[int] | None = None,
        steps: int = 1,
        loop: bool = False,
        packed: bool | None = None,
        max_running: int | None = None,
        prefix_cache: bool | None = None,
        kv_events: bool = False,
        compile: bool | None = None,
        mapping: str = "concurrent",
        chunk: int | None = None,
        max_step_tokens: int | None = None,
        target_itl_ms: float | None = None,
        max_wait_s: float = 30.0,
        clock: Callable[[], float] = perf_counter,
        deterministic: bool = False,
        record_margins: bool = False,
        observer: Callable[[StepRecord], None] | None = None,
        swap_cost: SwapCost | None = None,
        sleepable_weights: bool = False,
        kv_scales: KVScales | None = None,
        speculation: Speculation | None = None,
        tokenizer: Any = None,
        compression: CompressionPolicy | None = None,
        trace: Trace | str | os.PathLike[str] | None = None,
    ) -> None:
        _check_parts(model, cache)
        settings = check_settings(
            cache.shape.num_slots,
            cache.shape.max_seq_len,
            attention=attention,
            capture=capture,
            buckets=buckets,
            steps=steps,
            loop=loop,
            packed=packed,
            max_running=max_running,
            prefix_cache=prefix_cache,
            kv_events=kv_events,
            compile=compile,
            mapping=mapping,
            chunk=usual_step_tokens(cache.device, cache.waits_for_memory) if chunk is None else chunk,
            max_step_tokens=max_step_tokens,
            target_itl_ms=target_itl_ms,
            max_wait_s=max_wait_s,
            clock=clock,
            deterministic=deterministic,
            record_margins=record_margins,
            observer=observer,
            swap_cost=swap_cost,
            sleepable_weights=sleepable_weights,
            speculation=speculation,
        )
        self.swap_cost: SwapCost = settings["swap_cost"]
        steps, policy = settings["steps"], settings["mapping"]
        self.tokenizer = check_tokenizer(tokenizer)
        check_fit(model, cache.shape)
        reusing = _check_reuse(settings, cache) and compression is None
        scales = check_kv_scales(kv_scales, cache.shape)
        self.startup = StartupReport()
        needs = bind(model, cache.shape)
        check_compression(compression, settings, cache, needs, model)
        self.model, self.cache = model, cache
        self.steps, self.loop, self.record_margins, self.observer = steps, loop, record_margins, observer
        self.clock = clock
        config = model.config.get_text_config()
        self._vocab_size: int = config.vocab_size
        self._end_of_text = end_of_text(model)
        say_what_is_not_heeded(model)
        self.attention = self._make_attention(attention, needs, scales, settings)
        self._check_drafts(settings["speculation"])
        # Before anything is captured: its memory is a captured step's.
        self.compression = None if compression is None else Compression(compression, self.attention, model.dtype)
        self._reading = self._make_reading(settings) if reusing else None
        self._process = os.getpid()
        self._attention = self._interrupted = False
        self._changing = _Changing(self)
        self._read_at = 0.0
        self._events: list[TokenEvent] = []
        """Not delivered yet. An event is put here before its token is in the request's output."""
        self._ids: Iterator[int] = itertools.count()
        self._grammars = GrammarCompiler(tokenizer, self._vocab_size, self._end_of_text) if tokenizer else None
        self._closed = False
        with ExitStack() as undo:
            undo.callback(uncompile, model, compiled_modules(model))
            undo.push(self._abandon)
            draft_model = self._make_draft_model(settings)
            if draft_model is not None:
                undo.callback(draft_model.close)
            mixed = self._start_device(settings, draft_model)
            self.weights = Weights(model, capture)
            self._map_ahead = MapAheadHook(cache, policy, self.decode.publish_frontiers if loop else None)
            self.slots = RequestSlots.over(cache, reusing, settings["kv_events"], self._reading)
            self.scheduler = self._make_scheduler(settings, mixed)
            self._watch(trace)
            one_by_one = loop or record_margins or (self.compression is not None and self.compression.one_by_one)
            self.pipeline = Pipeline(self.scheduler, self.passes, one_by_one, self.compression)
            undo.pop_all()
        _engines.add(self)
        # Nothing at the end of the interpreter, when graphs may still run.
        weakref.finalize(self, _drop, self._process, self.passes, self.prefill, self.decode).atexit = False

    def _watch(self, given: Trace | str | os.PathLike[str] | None) -> None:
        """Count steps, and note events where there is a trace."""
        self.totals = StepTotals()
        self._trace = self.scheduler.trace = Trace.of(given)
        if self._trace is not None:
            self.cache.trace_to(self._trace)

    def _make_attention(
        self, name: str, needs: AttentionNeeds, scales: KVScales | None, settings: dict[str, Any]
    ) -> Attention:
        shape = self.cache.shape
        made = make_attention(
            name,
            self.cache,
            self.model.config.get_text_config().num_attention_heads,
            needs.scale,
            deterministic=settings["deterministic"],
            options=options_for(needs, shape, self.cache.device, scales),
            most_rows=most_rows(settings["chunk"], settings["lanes"], shape.max_seq_len),
        )
        if settings["deterministic"]:
            check_deterministic(self.model, made)
        return made

    def _make_reading(self, settings: dict[str, Any]) -> PrefixReading | None:
        """What has lanes read first tokens in another's slot; None where drafts are verified, by steps in which every
        lane reads its own slot, and where attention is a plan's own layers', which know of no other slot."""
        if settings["speculation"] is not None or not isinstance(self.model, PreTrainedModel):
            return None
        lanes = settings["lanes"] or self.cache.shape.num_slots
        return PrefixReading.over(self.attention, lanes)

    def _make_scheduler(self, settings: dict[str, Any], mixed: bool) -> Scheduler:
        # Queries are noted by slot, so nobody moves who may be asked for them.
        movable = self.cache.remaps and settings["capture"] and not settings["packed"] and self.compression is None
        alone: bool = settings["deterministic"]
        return Scheduler(
            self.slots,
            self.decode,
            Compaction(self.cache, self.startup.decode.replay_s) if movable and not alone else None,
            settings["chunk"],
            _failing(weakref.ref(self)),
            steps=settings["steps"],
            mixed=mixed,
            alone=alone,
            clock=self.clock,
            max_wait_s=settings["max_wait_s"],
            swap_cost=self.swap_cost,
            cost=self.passes.cost,
            target_ms=settings["target_itl_ms"],
            pass_sizes=() if self.passes.graphs is None else self.passes.graphs.runner.buckets,
            padded_sizes=self.passes.padded_sizes,
        )

    def _check_drafts(self, speculation: Speculation | None) -> None:
        """Raise ConfigError where this engine cannot verify drafts."""
        if speculation is None:
            return
        if not self.supports_packed_prefill:
            raise ConfigError(
                f"{typed(self)}'s model takes one token of each sequence in a step, and speculation verifies "
                "several; leave speculation out"
            )
        if self.cache.shape.windows:
            raise ConfigError(
                "drafts that are rejected are taken back, and a cache that keeps windows has no tokens that left one; "
                "leave speculation out, or make the cache of dataclasses.replace(shape, windows=())"
            )
        queries = 1 + speculation.num_speculative_tokens
        if queries > self.cache.shape.max_seq_len:
            raise ConfigError(
                f"num_speculative_tokens is {speculation.num_speculative_tokens}, which takes {queries} tokens in a "
                f"step, and a sequence has {self.cache.shape.max_seq_len} at most; make it fewer, or max_seq_len larger"
            )
        if self.attention.most_queries < queries:
            raise ConfigError(
                f"num_speculative_tokens is {speculation.num_speculative_tokens}, which takes {queries} queries of a "
                f"lane in a step; the {self.attention.name} backend takes {self.attention.most_queries} here: use "
                "attention='shares' over flat KV, or attention='torch'"
            )
        if speculation.model is not None:
            lanes = self.cache.shape.num_slots
            check_draft_model(self.model, speculation.model, lanes, self.cache.shape.max_seq_len)
        self.cache.expect_growth(queries)

    def _make_draft_model(self, settings: dict[str, Any]) -> DraftModel | None:
        speculation: Speculation | None = settings["speculation"]
        if speculation is None or speculation.model is None:
            return None
        shape = check_draft_model(self.model, speculation.model, settings["lanes"], self.cache.shape.max_seq_len)
        drafts = cast(PreTrainedModel, speculation.model)
        with inference(), naming(drafts):
            return DraftModel(
                drafts,
                shape,
                settings["attention"],
                cast("int | None", speculation.draft_budget),
                settings["chunk"],
                self.cache.device.type == "cuda" if settings["compile"] is None else settings["compile"],
            )

    def _budget_left(self) -> int:
        """Bytes that are left for the cache, without those for a draft model's."""
        left = memory_left(self.cache.device)
        speculator = self.decode.speculator
        if speculator is None or speculator.draft_model is None:
            return left
        return left - speculator.draft_model.take_part_of(left, self.cache.shape.token_bytes)

    def _start_device(self, settings: dict[str, Any], draft_model: DraftModel | None) -> bool:
        """Compile, plan and capture what runs on the device; returns whether prompts and decoding sequences share
        passes."""
        names = ("buckets", "steps", "loop", "packed", "chunk", "compile", "lanes")
        buckets, steps, loop, packed, chunk, compiling, lanes = (settings[name] for name in names)
        model, on_gpu = self.model, self.cache.device.type == "cuda"
        mixed = self.supports_packed_prefill and not settings["deterministic"]
        if compiling is None:
            compiling = on_gpu
        self.startup.mark("look into the model, attention backend")
        # Tracing makes many objects, in the first steps before a capture too: a collection looks at all of them.
        with inference(), naming(model), collector_off():
            started = perf_counter()
            wrap = compile_model(cast(PreTrainedModel, model)) if compiling else as_it_is
            # Behind the merging of projections, and before anything holds an address.
            self.sleeping = Sleeping(self.cache, cast(PreTrainedModel, model), settings["sleepable_weights"])
            self.decode = self.decode_class(
                model,
                self.attention,
                buckets,
                steps=steps,
                loop=loop,
                packed=packed,
                wrap=wrap,
                lanes=lanes,
                speculation=settings["speculation"],
                draft_model=draft_model,
                reading=self._reading,
            )
            self.prefill = Prefill(model, self.attention, chunk, self.decode.runner.pool, mixed)
            self.passes = self.passes_class(self.decode, self.prefill, wrap)
            self.startup.mark("buffers")
            if compiling:
                progress.info("compiling the model's layers")
                self.prefill.warm_up(UNUSUAL)
                if mixed:
                    self.prefill.warm_up(UNUSUAL, prompts=2)
                if draft_model is not None:
                    draft_model.prefill.warm_up(UNUSUAL)
                    draft_model.prefill.warm_up(UNUSUAL, prompts=2)
            self.startup.mark("compile layers")
            if on_gpu and mixed:
                mixed = self._warm_up_passes()
            self.startup.mark("kernels of passes")
            if compiling:
                self.startup.compile_s = perf_counter() - started
            if settings["capture"]:
                progress.info("capturing decode steps of %s", counted(len(self.decode.runner.buckets), "size"))
                self.startup.decode = self.decode.capture()
                self.startup.mark("measure attention, capture decode steps")
                if settings["speculation"] is not None:
                    self.startup.drafts = self.decode.capture_drafts(self.startup.decode.replay_s)
                if draft_model is not None:
                    draft_model.prefill.capture()
                progress.info("capturing passes of prompts")
                self.startup.mark("capture drafts")
                if self.attention.captures_prompts and mixed:
                    self.startup.passes = self.passes.capture()
                else:
                    self.startup.prefill = self.prefill.capture()
                self.startup.mark("capture passes of prompts")
                if on_gpu and self.decode.captures_alone:
                    likely = itertools.chain(self.decode.likely(), self.passes.likely())
                    self.startup.likely = capture_within(likely)
                    self.decode.measure_prefixes()
                self.startup.mark("capture likely steps")
            # Nothing else is decided by what passes cost.
            if settings["target_itl_ms"] is not None:
                self.passes.learn()
        self.startup.attention = self.attention.describe()
        return mixed

    def _warm_up_passes(self) -> bool:
        try:
            self.passes.warm_up()
        except ConfigError as error:
            logger.warning("prompts go in by passes of their own, between decode steps: %s", error)
            return False
        return True

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_seqs: int = 8,
        max_seq_len: int | None = None,
        kept_seqs: int | None = None,
        budget: int | str | None = None,
        cache: str = "vattn",
        idle_after_s: float | None = None,
        idle_floor: int | str = 0,
        host_memory: int | str = 0,
        mapping: str = "auto",
        tensor_parallel: int | Ranks = 1,
        kv_cache_dtype: str = "auto",
        tokenizer: Any = "auto",
        trace: Trace | str | os.PathLike[str] | None = None,
        broker: str | TenantConfig | None = None,
        **options: Any,
    ) -> Self:
        """An engine over a checkpoint (a directory, or a name on the Hugging Face Hub) or a named shape
        (`runtime.models.SHAPES`), on the GPU if there is one.
        Settings are checked before anything is loaded.

        With the ``vattn`` cache graphs are captured over one mapped dummy slot, and the budget is set from what is left
        then; `set_budget` changes it at any time. `startup` says what all of it cost.

        Parameters
        ----------
        max_seqs : int
            Sequences that run at once.
        max_seq_len : int or None
            Tokens of the longest sequence, prompt and output together; refused where the model has fewer positions.
            None is 4096, or the model's positions where they are fewer (`runtime.models.longest_of`).
        kept_seqs : int or None
            Ended ones that may be kept beside them for prompts that begin alike, as far as the budget goes: each takes
            a slot, which is addresses. None is four times `max_seqs`, at least 64; 0 without a prefix cache.
        budget : int, str or None
            Bytes of KV memory, ``"40GiB"`` too; None is what is left of 90 % of the GPU's memory after capturing, or on
            the host, and for the other caches, enough for all sequences at `max_seq_len` tokens.
        idle_after_s, idle_floor
            When memory that no sequence uses goes back to the driver, but for so many bytes (`KVCacheManager`).
        host_memory : int or str
            Bytes (``"32GiB"`` too) of host memory that may be pinned for keys and values of requests that are
            preempted or suspended, and that sleep; 0 is none.
        mapping : str
            ``auto`` runs a short probe of this driver, once, and stores its report (memory/mapping_policy.py).
        tensor_parallel : int or Ranks
            Ranks that compute the model together, each on a GPU of its own, or on the host
            (runtime/parallel/README.md). Under torchrun they are its processes: rank 0 gets the engine, the others
            serve within this call and leave by SystemExit. Else they are started here, and end with the engine; those
            of a `Ranks` stay.
        kv_cache_dtype : str
            ``auto`` stores keys and values as the model has them; ``fp8`` (or ``fp8_e4m3``) in eight bits, half the
            bytes, by backends that can (torch, shares).
        tokenizer : transformers' fast tokenizer, str or None
            ``auto`` is the checkpoint's, where it has one.
        broker : str, TenantConfig or None
            Keys and values lie in memory that a broker lends to several processes (tenancy/README.md): the path of its
            socket, or with a name, limits and a priority. The budget follows what it lends, up to `budget`.
        options
            Further parameters of `Engine`.

        Raises
        ------
        ConfigError
            A setting cannot work; the message names it.
        """
        model, device = check_model_name(model), check_device(device)
        dtype = check_dtype(dtype, device)
        max_seqs = whole("max_seqs", max_seqs, 1, MOST_SEQUENCES)
        asked = None if max_seq_len is None else whole("max_seq_len", max_seq_len, 1, LARGEST_COUNT)
        max_seq_len = longest_of(model, asked)
        _check_named(mapping, cache, kv_cache_dtype, tokenizer)
        budget = None if budget is None else parse_bytes(budget, "the budget")
        idle_floor = parse_bytes(idle_floor, "idle_floor")
        host_memory = parse_bytes(host_memory, "host_memory")
        if idle_after_s is not None and finite("idle_after_s", idle_after_s) <= 0:
            raise ConfigError(f"idle_after_s is {idle_after_s}; it is a positive number of seconds, or None")
        known = {key: value for key, value in options.items() if key not in OBJECTS}
        settings, policy_of_tokens = check_settings(max_seqs, max_seq_len, **known), options.get("compression")
        check_policy(policy_of_tokens)
        tenancy = check_broker(broker, cache, tensor_parallel, options)
        if policy_of_tokens is not None and cache != "vattn":
            raise ConfigError(f"compression is for the vattn cache; the cache asked for is {cache!r}")
        if type(tensor_parallel) is not int or tensor_parallel != 1:
            if policy_of_tokens is not None:
                raise ConfigError("compression is served on one rank; leave it out, or make tensor_parallel 1")
            if trace is not None:
                raise ConfigError("a trace is written on one rank; leave trace out, or make tensor_parallel 1")
            sizes = {"max_seqs": max_seqs, "max_seq_len": max_seq_len, "budget": budget, "kept_seqs": kept_seqs}
            kept_back = {"idle_after_s": idle_after_s, "idle_floor": idle_floor, "host_memory": host_memory}
            kinds = {"cache": cache, "mapping": mapping, "kv_cache_dtype": kv_cache_dtype}
            tokenizer = load_tokenizer(model, SHAPES) if isinstance(tokenizer, str) else tokenizer
            given = {**sizes, **kept_back, **kinds, **options, "tokenizer": tokenizer}
            return cast("Self", _on_ranks(tensor_parallel, model, device, dtype, given))
        check_before_loading(model, max_seq_len, settings, policy_of_tokens)
        reusing = options.get("prefix_cache") is not False and cache in REMAPPING and policy_of_tokens is None
        reusing = reusing and options.get("deterministic") is not True
        kept = None if kept_seqs is None else whole("kept_seqs", kept_seqs, 0, MOST_SEQUENCES)
        with ExitStack() as undo:
            tracing_to = Trace.of(trace)
            if tracing_to is not None and tracing_to.is_owned:
                undo.callback(tracing_to.close)
            before = StartupReport()
            probe = undo.enter_context(start_policy_probe(device, mapping))
            loaded, options["speculation"] = _load(model, device, dtype, before, settings["speculation"])
            shape = shape_of(loaded, max_seqs, max_seq_len, kv_cache_dtype)
            if reusing and options.get("packed") is not False:
                shape = replace(shape, num_slots=max_seqs + _kept(shape, kept))
            policy = probe.result().policy
            later = cache in ("vattn", "blocks") and device != "cpu"
            idle: dict[str, Any] = {"idle_after_s": idle_after_s, "idle_floor": idle_floor, "sized_later": later}
            idle["host_memory"] = host_memory
            if policy_of_tokens is not None and not shape.windows:  # which is refused by name
                idle |= _compressing(policy_of_tokens)

            def traced(driver: Driver) -> Driver:
                return driver if tracing_to is None else TracingDriver(driver, tracing_to)

            if tenancy is not None:
                made, left = make_borrowing_cache(tenancy, cache, shape, device, policy, idle, traced)
            else:
                driver = policy.wrap(traced(open_driver(device))) if later or tracing_to is not None else None
                made, left = make_cache(cache, shape, device, None if later else budget, driver=driver, **idle), None
            undo.callback(made.close)
            if tenancy is not None and budget is not None:
                made.set_budget(budget)
            elif tenancy is None and not later and budget is None and shape.num_slots > max_seqs:
                made.set_budget(made.budget_bytes // (shape.num_slots + 1) * (max_seqs + 1))
            options = {"max_running": max_seqs, **options}
            options["tokenizer"] = load_tokenizer(model, SHAPES) if isinstance(tokenizer, str) else tokenizer
            before.mark("mapping probe, cache, tokenizer")
            engine = cls(loaded, made, mapping=policy, trace=tracing_to, **options)
            undo.callback(engine.close)
            engine._go_on_with(left)
            if later and tenancy is None:
                engine.set_budget(engine._budget_left() if budget is None else budget)
            undo.pop_all()
        engine.startup.join(before, made.stats().budget_bytes)
        return engine

    def set_budget(self, budget: int | str) -> None:
        """Raise or lower the bytes (``"40GiB"`` too) that a fixed-address cache may hold, at any time; no graph is
        captured again.

        Where running sequences hold more, the youngest go back to the queue and are prefilled again when there is room.
        Whoever does not fit any more even alone ends with an error in a later step. Raises ConfigError for another
        cache, or less than the dummy slot needs, and EngineAsleep while keys and values sleep.
        """
        self._check_open()
        budget = parse_bytes(budget, "the budget")
        self.sleeping.require_cache()
        while True:
            try:
                self.cache.set_budget(budget)
                break
            except KVCacheOutOfMemory:
                if not self.scheduler.holders:
                    raise
                with self._changing:
                    self.scheduler.preempt_youngest()

    def stats(self) -> EngineStats:
        """What it holds now, and has counted since it was built. From any thread, beside running steps, which do not
        wait for it. Raises EngineClosed, WrongProcess."""
        self._check_process()
        if self._closed:
            raise EngineClosed("this engine is closed; build another")
        scheduler, prefixes, speculator = self.scheduler, self.slots.prefixes, self.decode.speculator
        return EngineStats(
            running=len(scheduler.decoding) + len(scheduler.prefilling),
            waiting=len(scheduler.waiting),
            suspended=len(scheduler.parked),
            is_asleep=self.sleeping.is_asleep,
            weights_version=self.weights.version,
            swaps=scheduler.swaps,
            num_slots=self.cache.shape.num_slots,
            totals=self.totals.copy(scheduler.preempted),
            cache=self.cache.stats(),
            transfers=self.cache.transfers,
            prefix=None if prefixes is None else (prefixes.stats.prompt_tokens, prefixes.stats.cached_tokens),
            drafts=None if speculator is None else (speculator.stats.drafted, speculator.stats.accepted),
            captures_while_running=self.captures_while_running,
        )

    @property
    def trace_error(self) -> str | None:
        """Why the trace ended before the engine; None where it goes on, and without one."""
        return None if self._trace is None else self._trace.error

    def slot_stats(self) -> list[SlotStats]:
        """The cache's slots that hold anything (`KVCache.slot_stats`). From any thread. Raises ManagerClosed."""
        return self.cache.slot_stats()

    # -- requests --------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: TokenIds | str,
        params: SamplingParams | None = None,
        forced: TokenIds | None = None,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> int:
        """Queue a prompt, token ids or a text; returns the request's number. Of `SamplingParams.n` samples it is the
        first one's; the others have the numbers that follow, in order.

        The prompt's tokens and all of the output but its last token, which is not stored, have to fit a slot, and the
        budget alone; without `max_tokens` the output may be as long as that allows. With `forced`, those tokens are fed
        in place of the chosen ones, which events and completions still report (teacher forcing); there must be
        `max_tokens` of them.

        Parameters
        ----------
        prompt, forced : sequence, numpy array or torch tensor
            Integers of one dimension. The prompt may be a text where the engine has a tokenizer, which adds the special
            tokens that it adds to texts.
        priority : int
            Requests of higher priority are given slots first, and are preempted last.
        deadline_s : float or None
            Seconds from now. Of one priority, those whose deadline comes first go first. A request that has not ended
            by then, waiting, running or suspended, ends with `finish_reason` ``deadline``, and keeps the tokens that it
            has: by the next step, or `end_overdue`.

        Raises
        ------
        ConfigError
            Something is of the wrong type or out of its range; nothing is queued.
        SequenceTooLong
            It can never fit the slot or the budget; nothing is queued.
        EngineOverloaded
            Requests outlive the process (`TenantConfig.keep_s`), and the journal has no room for one more now; nothing
            is queued.
        """
        self._check_open()
        if not self.busy:  # it costs as much as there are weights
            self._check_weights()
        request = self._request(prompt, params, forced)
        if self._survival is not None:
            self._survival.check(request)
        request.priority = whole("priority", priority, -LARGEST_COUNT, LARGEST_COUNT)
        if deadline_s is not None:
            if finite("deadline_s", deadline_s) <= 0:
                raise ConfigError(f"deadline_s is {deadline_s}; it is a positive number of seconds from now, or None")
            request.deadline = request.arrived + float(deadline_s)
        samples = [request, *request.branches(self._ids)]
        try:
            for each in samples:
                self.scheduler.add(each)
            if self._survival is not None:
                self._survival.added(request)
            return request.id
        except BaseException:
            for each in samples:
                self.scheduler.drop(each)
            if self._survival is not None:
                self._survival.dropped([request.id])
            raise

    def fork(self, request: int, params: SamplingParams | None = None) -> int:
        """Queue another request that goes on from the tokens that one has so far; returns its number.

        The two share the memory of these tokens where there is a prefix cache: whole extents are mapped in both slots,
        the page that the new one writes is copied. The new one's output begins with what the other one has generated;
        its events begin behind that.

        Parameters
        ----------
        params : SamplingParams or None
            None is those of the request, with a seed that is greater by 1 for each fork of it. `max_tokens` counts all
            of the output; None, in those given, is the request's.

        Raises
        ------
        ConfigError
            An unknown request, one that has ended, tokens that are forced, parameters that cannot be, or `max_tokens`
            that it has already.
        SequenceTooLong
            It can never fit.
        """
        self._check_open()
        if self._survival is not None:
            raise ConfigError("a request that outlives its process cannot be forked; submit another")
        if self.compression is not None:
            raise ConfigError("a request whose tokens are evicted cannot be forked; leave compression out, or submit")
        number = whole("request", request, 0, LARGEST_COUNT)
        known = self.scheduler.requests.get(number)
        if known is None:
            raise ConfigError(f"no request {number} is waiting or running; fork one before its last token")
        made = self._fork_of(known, params)
        with self._changing:
            # While keys and values sleep nobody begins with them.
            if known.is_verified and not self.cache.is_asleep:
                self.slots.computed(known)
            known.forks += 1
        try:
            self.scheduler.add(made)
            return made.id
        except BaseException:
            self.scheduler.drop(made)
            raise

    def _fork_of(self, known: RequestState, params: SamplingParams | None) -> RequestState:
        if known.forced is not None:
            raise ConfigError(f"request {known.id} has forced tokens, which a fork would only repeat; submit another")
        if params is None:
            made = known.fork(known.anew(next(self._ids), known.params.of_branch(known.forks + 1)))
        else:
            if isinstance(params, SamplingParams) and params.n > 1:
                raise ConfigError(f"n is {params.n}; fork once for each")
            asked = self._request(known.prompt, params)
            made = known.fork(asked)
            if params.max_tokens is None:
                made.max_tokens = known.max_tokens
            _check_fork(known, made)
        made.arrived = self.clock()
        return made

    def _check_weights(self) -> None:
        """Before requests come to an idle engine: others than `update_weights` may have written weights in place,
        and what is kept was computed with the old ones. Raises ConfigError where they were replaced."""
        self.weights.require_in_place()
        if self.slots.prefixes is not None and self.weights.were_written():
            with self._changing:
                self.slots.flush()

    def _request(self, prompt: object, params: object, forced: object = None, silent: bool = False) -> RequestState:
        if forced is not None and self.decode.speculator is not None:
            raise ConfigError(
                "tokens are forced one at a time, and speculation takes those that it accepts; leave one of them out"
            )
        if forced is not None and self.steps > 1:
            raise ConfigError(f"tokens are forced in single steps; this engine takes {self.steps} a launch, make it 1")
        is_text = isinstance(prompt, str)
        if isinstance(prompt, str):
            prompt = self.tokenize(prompt)
        made = make_request(
            next(self._ids), prompt, params, forced, self.cache, self._vocab_size, self._end_of_text, silent
        )
        self._complete(made, is_text)
        made.arrived = self.clock()
        return made

    def tokenize(self, text: str) -> list[int]:
        """The token ids that `submit` makes of a text. From any thread. Raises ConfigError without a tokenizer, and for
        what is no Unicode."""
        if self.tokenizer is None:
            raise ConfigError("the prompt is text, and this engine has no tokenizer; give token ids, or tokenizer=")
        unicode_text("the prompt", text)
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def _complete(self, request: RequestState, is_text: bool) -> None:
        """Give a new request what its parameters ask for beside tokens. Raises ConfigError where that cannot be."""
        params, tokenizer = request.params, self.tokenizer
        if request.forced is not None and (params.uses_history or params.stop):
            raise ConfigError(
                "forced tokens are fed in place of chosen ones: penalties, bad_words, stop and grammars, which go by "
                "what was chosen, are not possible with them"
            )
        if params.prompt_logprobs is not None and self.scheduler.alone:
            raise ConfigError(
                "this engine is deterministic, and prompt_logprobs are computed by passes that others share; leave "
                "them out, or build another without deterministic"
            )
        if params.prompt_logprobs is not None and not self.scheduler.mixed:
            raise ConfigError(
                "prompt_logprobs are not possible: this model takes prompts by passes of their own; leave them out"
            )
        if self.decode.speculator is not None and request.asks is not None:
            raise ConfigError(
                "this engine speculates, and drafts are verified by the model's own logits: min_p, penalties, "
                "logit_bias, bad_words, min_tokens, grammars and logprobs are not possible with them; leave them out, "
                "or build the engine without speculation"
            )
        request.text = text_for(tokenizer, params, is_text)
        request.bad_words = bad_word_ids(tokenizer, params)
        token_ids("bad_words", [token for word in request.bad_words for token in word], self._vocab_size)
        check_sizes(params, request.bad_words)
        if params.has_grammar:
            request.grammar = self.compile_grammar(params)
        # Behind later tokens it is found when there is none to choose.
        if params.has_grammar and (why := self._forbidden(request)) is not None:
            raise ConfigError(f"{why}; change what it asks for")
        if request.asks is not None:
            self.decode.processors.require(self._vocab_size, grammar=params.has_grammar)

    def compile_grammar(self, params: SamplingParams) -> Grammar:
        """The grammar that parameters ask for, compiled unless it was lately; any thread may call this before it
        submits, so that no step waits. Raises ConfigError where there is no tokenizer, or it cannot be."""
        if self._grammars is None:
            raise ConfigError("a grammar needs a tokenizer, which this engine has not; build it with tokenizer=")
        return self._grammars.grammar(params)

    def abort(self, request: int) -> None:
        """Drop a request wherever it is, and its tokens that nobody took yet; its memory is free for others. The number
        that `submit` gave drops all its samples, a later sample's number that one alone.

        Raises ConfigError for an unknown one, and DriverError where releasing failed, which the next step tries again.
        """
        self._check_open()
        number = whole("request", request, 0, LARGEST_COUNT)
        known = self.scheduler.requests.get(number)
        if known is not None and known.group is None:
            samples = [known]
        else:
            samples = [each for each in self.scheduler.requests.values() if number in (each.id, each.first)]
        if not samples and all(event.request != number for event in self._events):
            raise ConfigError(f"no request {number} is waiting or running")
        with self._changing:
            for each in samples:
                self.scheduler.end(each)
            # Behind the end: no token of a request that goes on is lost.
            self._events = [
                event for event in self._events if number not in (event.request, event.request - event.branch)
            ]
            if self._survival is not None:
                self._survival.dropped({number, *(each.id for each in samples)})
            self.scheduler.release_ended()

    def _check_open(self) -> None:
        if self._attention:
            self._attend()

    def _attend(self) -> None:
        """Look closer, before a call begins: at whose engine it is, whether it is closed, what became of the last."""
        self._check_process()
        if self._closed:
            raise EngineClosed("this engine is closed; build another")
        if self._interrupted:
            self._recover()
        self._attention = False

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise WrongProcess(f"this engine was made in process {self._process}; make one in this process")

    def _recover(self) -> None:
        """Begin anew with what requests' records say, after a call that was interrupted. May be interrupted itself.

        An event that was put to the others has its token put to the output; what else was half done is forgotten, and
        who has not ended waits to be prefilled with the tokens it has.
        """
        drain()
        self.decode.return_to_stream()
        finish(str(self.cache.device))
        end_pass()
        self.pipeline.forget()
        self.decode.clear()
        self.cache.reset()
        self.slots.begin_anew()
        self.scheduler.begin_anew()
        for event in self._events:
            request = self.scheduler.requests.get(event.request)
            if request is not None and (event.index == len(request.chosen) or event.finish_reason):
                self._note(request, event)
        # What `generate` was called for is nobody's any more.
        for request in [request for request in self.scheduler.requests.values() if request.silent]:
            self.scheduler.drop(request)
        self._interrupted = False

    @property
    def busy(self) -> bool:
        """Whether any request is not finished, or has events that nobody took yet."""
        return bool(self.scheduler.has_active or self.scheduler.ended or self._events or self._interrupted)

    @property
    def prefilling(self) -> bool:
        """Whether any request still waits or has prompt tokens to put in."""
        return bool(self.scheduler.waiting or self.scheduler.prefilling)

    def generate(
        self,
        prompts: Sequence[TokenIds | str],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Run prompts, token ids or texts, to their end; completions in the order of the prompts, of each as many as
        `SamplingParams.n` says, by `index`.

        A request that fails has a completion with `finish_reason` ``error``. Raises ConfigError or SequenceTooLong with
        none of them queued, ConfigError where others are running: take their tokens by `run`. What a step raises, and
        an interrupt, drops these requests and no others; events of others are kept for `run` and `step`.
        """
        self._check_open()
        given = as_prompts(prompts)
        each = as_params(params, len(given))
        truth("progress", progress)
        if self.scheduler.has_active:
            raise ConfigError("requests are running, whose tokens nobody would get; use run(), or abort them")
        self._check_weights()
        requests: list[RequestState] = []
        for prompt, one in zip(given, each, strict=True):
            first = self._request(prompt, one, silent=True)
            requests += [first, *first.branches(self._ids)]
        try:
            for request in requests:
                self.scheduler.add(request)
            with tqdm(total=len(requests), unit="request", disable=None if progress else True) as bar:
                while any(request.finish_reason is None for request in requests):
                    self._step()
                    bar.update(sum(request.finish_reason is not None for request in requests) - bar.n)
            with self._changing:
                self.scheduler.release_ended()
        except BaseException:
            self._drop_silent()
            raise
        return [request.completion() for request in requests]

    def _drop_silent(self) -> None:
        """Forget what `generate` was called for. What fails in that is tried again by the next call, so that the error
        or interrupt that led here is the one raised."""
        self._interrupted = self._attention = True
        try:
            self._attend()
        except Exception as error:
            logger.warning("taking the memory of requests that failed is tried again by the next call: %s", error)

    def run(self) -> Iterator[TokenEvent]:
        """Step until no request is left, streaming tokens as they come; more may be submitted meanwhile.

        Whoever leaves early, by a break or an exception, loses nothing: what is not taken is what the next `run` or
        `step` begins with.
        """
        self._check_open()
        return self._stream()

    def _stream(self) -> Iterator[TokenEvent]:
        while self.busy or self._closed:
            if not self._events or self._attention:
                self._step()
                continue
            # Between these two there is no call, so that no interrupt comes between them.
            event = self._events[0]
            del self._events[0]
            yield event

    # -- stepping --------------------------------------------------------------------------------------------------

    def step(self) -> list[TokenEvent]:
        """Start the next launches and take the tokens of one: a pass of `chunk` tokens at most, of prompts that go in
        and one of every running sequence; or, where no prompt does, `steps` decode steps of them.

        Raises DriverError where mapping ahead failed beside the last step. Whatever it raises, an interrupt among it,
        the next call goes on, and returns the tokens that this one had. Raises WeightsMixed after an update of the
        weights broke.
        """
        self._step()
        # As above: an interrupt comes after a call or at a jump back, and there is none before the caller has these.
        events, self._events = self._events, []
        return events

    def _step(self) -> None:
        """One step, whose events are put to the others: plan and launch (`Pipeline`), and commit."""
        self._check_open()
        if (self._sleeps_for_broker or self.is_told_otherwise) and self._obey():
            self.cache.wait_for_memory(MEMORY_WAIT_S)
            return
        if self.sleeping.is_asleep:
            self.sleeping.require_awake()
        self.weights.require_current()
        if self._survival is not None:
            self._survival.begin_step(delivered=not self._events)
        while self.cache.follow_budget() and self.scheduler.holders:
            with self._changing:
                self.scheduler.preempt_youngest()
        with inference(), self._changing:
            self._map_ahead.before_step()
            started = self._read_at if self.pipeline.running else perf_counter()
            self._end_overdue()
            launch = self.pipeline.start()
            record = None if launch is None else self._commit(launch, started)
            if self._survival is not None:
                self._survival.write()
            self.scheduler.release_ended()
        self._report_demand(waits=launch is None)
        if record is not None and self.observer is not None:
            self.observer(record)

    @property
    def deadline_in_s(self) -> float:
        """Seconds until a request's deadline passes, 0 where one has; infinite where none has a deadline."""
        return max(0.0, self.scheduler.next_deadline - self.clock())

    def end_overdue(self) -> list[TokenEvent]:
        """End requests whose deadline has passed, as a step does, where none is taken: the engine sleeps, or all its
        requests are suspended. Returns events as `step` does."""
        self._check_open()
        if self._survival is not None:
            self._survival.begin_step(delivered=not self._events)
        with self._changing:
            self._end_overdue()
            if self._survival is not None:
                self._survival.write()
            self.scheduler.release_ended()
        events, self._events = self._events, []
        return events

    def _end_overdue(self) -> None:
        for request in self.scheduler.overdue():
            self._end_without_token(request, "deadline", None)

    @property
    def is_told_otherwise(self) -> bool:
        """Whether it is awake and a broker's operator wants it to sleep, or sleeps by the operator's word, which holds
        no more: the next step does so, whether anything runs or not."""
        return not self.sleeping.is_asleep if self.cache.asked_to_sleep else self._sleeps_for_broker

    def _obey(self) -> bool:
        """Sleep or wake by the word of a broker's operator; returns whether the engine sleeps by it. Keys and values go
        to host memory, or are computed anew where that has no room; weights go there where they can."""
        if not self.cache.asked_to_sleep:
            self.wake()
            self._sleeps_for_broker = False
        elif not self.sleeping.is_asleep:
            weights: Literal["keep", "host"] = "keep" if self.sleeping.weights is None else "host"
            try:
                self.sleep(kv="keep", weights=weights)
            except HostMemoryFull:
                self.sleep(kv="drop", weights=weights)
            self._sleeps_for_broker = True
        return self._sleeps_for_broker

    def _trace_step(self, record: StepRecord) -> None:
        """Note a launch whose tokens were just read."""
        if self._trace is None:
            return
        read, scheduler = self._read_at, self.scheduler
        steps = {"lanes": record.lanes, "steps": record.steps, "prompt_tokens": record.prefilled}
        self._trace.span("wait for tokens", read - record.wait_s, read, category="step")
        self._trace.span("step", read - record.wall_s, read, steps, "step", track="steps")
        running = len(scheduler.decoding) + len(scheduler.prefilling)
        self._trace.counter("requests", {"running": running, "waiting": len(scheduler.waiting)})
        self._trace.counter("KV bytes held", {"bytes": self.cache.held_bytes})

    def _report_demand(self, waits: bool) -> None:
        """Where the memory is a broker's, tell it what is needed, and leave it a moment where nothing can run."""
        if not self.cache.waits_for_memory:
            return
        scheduler = self.scheduler
        lanes = len(self.decode.lengths) - len(scheduler.holders)
        waiting = [request.length for request in islice(scheduler.waiting, lanes)]
        self.cache.report_demand(waiting, at_once=waits or not scheduler.has_active)
        if waits and waiting:
            self.cache.wait_for_memory(MEMORY_WAIT_S)
        elif not scheduler.has_active:
            self.cache.follow_budget()

    def _commit(self, launch: Launch, started: float) -> StepRecord:
        """Append a launch's tokens to their requests; while the device computes them, memory is mapped and requests are
        admitted."""
        # Next decode steps, and the next prompts, find their memory mapped.
        ahead_s = self._map_ahead.during_step()
        self.scheduler.admit_during_step()
        rows, wait_s = self._read(launch)
        self.pipeline.was_read(launch, rows)
        lanes, wall_s = len(launch.lane_of), self._read_at - started
        for of_prompt in launch.of_prompts:
            of_prompt.read()
        tokens = 0
        for step, row in enumerate(rows):
            # Who has ended with an earlier row, or joined since the launch, has no part in it.
            requests = [
                request
                for request in self.scheduler.decoding.values()
                if (lane := launch.lane_of.get(request.slot)) is not None and row[lane] != ABSENT
            ]
            tokens += len(requests)
            where = [launch.lane_of[request.slot] for request in requests]
            apart = margins(launch.logits[where]) if self.record_margins else None
            self._commit_tokens(requests, [row[lane] for lane in where], apart, launch, step)
            if self._survival is not None:
                # While they are in the processor's caches: a launch replaces what is there.
                self._survival.write()
        self.pipeline.commit(launch, rows)
        self.swap_cost.observe_prompt(launch.prompt_tokens, wall_s)
        drafted = self._roll_back(launch)
        steps = min(len(rows), launch.steps)
        record = StepRecord(lanes, steps, launch.prompt_tokens, wall_s, self.pipeline.kv_s, ahead_s, wait_s, *drafted)
        self.totals.add(record, tokens)
        self._trace_step(record)
        return record

    def _roll_back(self, launch: Launch) -> tuple[int, int]:
        """What was backed for rejected drafts is not the sequences' any more. Returns how many tokens were drafted in
        the launch, and accepted."""
        speculator = self.decode.speculator
        if speculator is None:
            return 0, 0
        if launch.drafts:
            self.cache.roll_back(self.decode.lengths_after(0))
        return speculator.last if launch.drafts else (0, 0)

    def _read(self, launch: Launch) -> tuple[list[list[int]], float]:
        """A launch's tokens, by step and lane, and the seconds that they were waited for."""
        started = perf_counter()
        # Nothing is half done while the device is waited for, which is where an interrupt mostly comes.
        self._interrupted = False
        rows = launch.read()
        self._interrupted = True
        waited = perf_counter() - started
        if self.loop and not launch.prompt_tokens:
            # The device went no further than memory reached.
            self.cache.prepare_step(self.decode.lengths_taken(launch, len(rows)))
        self._read_at = perf_counter()
        return rows, waited

    def _commit_tokens(
        self,
        requests: list[RequestState],
        chosen: Sequence[int],
        apart: list[float] | None,
        launch: Launch,
        step: int,
    ) -> None:
        """Append each request's token; those that end with it leave. Who has none (`NO_TOKEN`) ends with an error."""
        for i, (request, token) in enumerate(zip(requests, chosen, strict=True)):
            grammar, most = request.grammar, request.params.logprobs
            if token == NO_TOKEN or (grammar is not None and grammar.error):
                self._fail_without_token(request)
                continue
            if request.is_chosen_again and token != request.expected:
                self._fail(request, CHANGED)
                continue
            logprob = None if most is None else launch.logprob(step, launch.lane_of[request.slot], token, most)
            event = request.event(token, apart[i] if apart else None, self.weights.version, logprob)
            if not (request.silent or request.is_chosen_again):
                self._events += [event]
            self._note(request, event)
            if request.is_verified and len(request.chosen) == request.known + 1:
                self.slots.computed(request)

    def _fail_without_token(self, request: RequestState) -> None:
        """End a request that has no next token; by its own parameters, or by the model's logits."""
        if request.grammar is not None and request.grammar.error:
            self._fail(request, f"its grammar: {request.grammar.error}", is_forbidden=True)
        elif (why := self._forbidden(request)) is not None:
            self._fail(request, f"{why}; change what it asks for", is_forbidden=True)
        else:
            self._fail(request, NOT_FINITE)

    def _forbidden(self, request: RequestState) -> str | None:
        """Which of its parameters leave no token that could come next, in words; None where there is one."""
        asks = request.asks
        what = [] if asks is None else asks.forbid
        # A grammar alone has a token, or has ended.
        if asks is None or (len(what) < 2 and not request.bad_words) or not asks.leaves_nothing(self._vocab_size):
            return None
        together = "together " if len(what) > 1 else ""
        return f"its {' and '.join(what)} {together}forbid every token that could come next"

    def _note(self, request: RequestState, event: TokenEvent) -> None:
        """What an event says becomes part of the request's record; it ends, where the event is its last. Of its newest
        event it may be done again, where it was interrupted."""
        request.note(event)
        if self._survival is not None and not request.is_chosen_again:
            # What is chosen again is noted already, with what came behind it.
            if event.finish_reason is None:
                self._survival.noted(event)
            else:
                self._survival.ended(event, event.finish_reason)
        if event.finish_reason:
            request.error, request.finish_reason = event.error, event.finish_reason
            self.totals.ended[event.finish_reason] += request.id in self.scheduler.requests
            self.scheduler.end(request)

    def _fail(self, request: RequestState, message: str, is_forbidden: bool = False) -> None:
        """End a request with an error; its slot is taken by `Scheduler.release_ended`."""
        logger.warning("request %d: %s", request.id, message, extra={"request": request.id})
        self._end_without_token(request, "error", message, is_forbidden)

    def _end_without_token(
        self, request: RequestState, reason: str, message: str | None, is_forbidden: bool = False
    ) -> None:
        request.restore()
        event = request.end_event(reason, message, self.weights.version, is_forbidden)
        if not request.silent:
            self._events += [event]
        self._note(request, event)

    def audit(self) -> AuditReport:
        """Whose the addresses are that all captured graphs hold. Raises CaptureError where nothing is captured."""
        self._check_open()
        return AuditReport.joined([self.decode.audit(), *(self.passes.audit() or [self.prefill.audit()])])

    def speculation_stats(self) -> dict[str, Any]:
        """Counts of drafts since the start, by name: ``drafted``, ``accepted``, ``acceptance_rate``,
        ``accepted_per_step``, ``steps`` by their number of drafts, ``overshoot`` (`SpeculationStats`). Raises
        ConfigError without speculation."""
        self._check_open()
        if self.decode.speculator is None:
            raise ConfigError("this engine drafts nothing; build it with speculation=Speculation()")
        return self.decode.speculator.stats.as_dict()

    @property
    def captures_while_running(self) -> int:
        """Graphs that were captured while requests waited for them, 0.1 to 0.2 s each on a GPU: of the first step of a
        kind (sampling, log-probabilities, prefixes in other slots) that was not captured at the start."""
        return self.decode.captures_while_running

    def capture_wanted(self, most: int = 1) -> int:
        """Capture up to so many graphs that steps went without, in larger ones; returns how many are left. Where
        requests run nothing is captured; one that cannot be is logged, and wanted again when a step goes without it.
        `AsyncEngine` calls it while it has nothing to do."""
        self._check_open()
        if self.busy or self.sleeping.is_asleep:
            return len(self.decode.wanted)
        with inference(), naming(self.model), self._changing:
            return self.decode.capture_wanted(most)

    # -- prefix cache ----------------------------------------------------------------------------------------------

    def _prefixes(self) -> PrefixCache:
        self._check_open()
        if self.slots.prefixes is None:
            raise ConfigError("this engine keeps no prefixes; build it with prefix_cache=True over the vattn cache")
        return self.slots.prefixes

    def prefix_stats(self) -> dict[str, Any]:
        """Counts of the prefix cache since the start, by name: ``cached_tokens`` of ``prompt_tokens``, ``hit_rate``,
        how often each of the ``ways`` was taken and why, what is kept now, and what decode read once for several
        sequences. Raises ConfigError without one."""
        reading = {} if self._reading is None else self._reading.as_dict()
        return {**self._prefixes().as_dict(), **reading}

    def flush_prefix_cache(self) -> int:
        """Forget what is kept, pinned or not; returns the tokens forgotten. What runs goes on, and is not kept when it
        ends. 0 without a prefix cache."""
        self._check_open()
        with self._changing:
            return self.slots.flush()

    def pin(self, tokens: TokenIds, cache_salt: str | None = None) -> int:
        """Keep what there is of these tokens, whole blocks of it, until `unpin` or a flush; returns how many tokens
        that is. Calls are counted. Only the growth of running sequences takes them, where nothing else is left to take.
        Raises ConfigError without a prefix cache, or for what are no tokens, and EngineAsleep while keys and values
        sleep."""
        prefixes, ids = self._prefixes(), token_ids("the tokens", tokens, self._vocab_size)
        check_salt(cache_salt)
        self.sleeping.require_cache()
        with self._changing:
            return prefixes.pin(ids, self.slots.key(cache_salt))

    def unpin(self, tokens: TokenIds, cache_salt: str | None = None) -> int:
        """Undo one `pin` of the same tokens. Raises ConfigError where there is none, EngineAsleep as `pin`."""
        prefixes, ids = self._prefixes(), token_ids("the tokens", tokens, self._vocab_size)
        check_salt(cache_salt)
        self.sleeping.require_cache()
        with self._changing:
            return prefixes.unpin(ids, self.slots.key(cache_salt))

    def kv_events(self) -> list[KVCacheEvent]:
        """Events of stored and removed blocks since the last call, in order, in the words of vLLM's KV events
        (cache/prefix/events.py). Raises ConfigError unless the engine was built with ``kv_events=True``."""
        prefixes = self._prefixes()
        if not prefixes.tree.has_events:
            raise ConfigError("this engine keeps no KV events; build it with kv_events=True")
        return prefixes.take_events()

    # -- host memory and sleep ---------------------------------------------------------------------------------------

    def suspend(self, request: int) -> int:
        """Take a request out until `resume`: its keys and values go to host memory, and its memory is for others. It
        keeps its slot, so that they come back at the same addresses. Returns the bytes copied: 0 of one that has none
        yet, and where host memory is full or the cache has none (`CacheConfig.host_memory`); its tokens are computed
        anew then. Tokens of launches that nobody has read yet are chosen again. Its deadline goes on.

        Raises ConfigError for a request that is not running or waiting, or suspended already.
        """
        self._check_open()
        self.sleeping.require_awake()
        known = self._unfinished(request)
        if known.id in self.scheduler.parked:
            raise ConfigError(f"request {known.id} is suspended already")
        with inference(), self._changing:
            return self.scheduler.park(known)

    def resume(self, request: int) -> None:
        """Have a suspended request go on, when it has its turn. Raises ConfigError for one that is not suspended."""
        self._check_open()
        known = self._unfinished(request)
        if known.id not in self.scheduler.parked:
            raise ConfigError(f"request {known.id} is not suspended")
        with self._changing:
            self.scheduler.unpark(known)

    def _unfinished(self, request: int) -> RequestState:
        number = whole("request", request, 0, LARGEST_COUNT)
        known = self.scheduler.requests.get(number)
        if known is None:
            raise ConfigError(f"no request {number} is waiting, running or suspended")
        return known

    def sleep(
        self, *, kv: Literal["keep", "drop"] = "keep", weights: Literal["keep", "host", "drop"] = "keep"
    ) -> SleepingReport:
        """Give memory back to the driver until `wake`; graphs, and all addresses in them, stay. Returns what stays.

        Launches under way are waited for; their tokens come with the first `step` after waking.

        Parameters
        ----------
        kv : str
            ``keep`` copies keys and values of running requests, and of the prefix cache, to host memory; ``drop``
            forgets them, and running requests are computed anew. Those of suspended requests stay in host memory.
        weights : str
            ``keep`` leaves them on the device; ``host`` copies them to host memory; ``drop`` forgets them, and steps
            wait for a full `update_weights` after waking. Both need ``sleepable_weights=True``.

        Raises
        ------
        ConfigError
            Another word, weights that cannot sleep, or a cache that has its memory for life.
        EngineAsleep
            It sleeps already.
        HostMemoryFull
            `host_memory` is too small for what is to be kept; use ``kv="drop"``.
        DriverError
            Nothing was given back. Where the driver refuses even what undoes a failed sleep, requests that lost memory
            are computed anew, and weights that are not mapped again are so by `wake`.
        """
        self.sleeping.check(kv, weights)
        self._check_open()
        if self.decode.speculator is not None and self.decode.speculator.draft_model is not None:
            raise ConfigError("an engine with a draft model cannot sleep: its weights and cache would stay; use ngram")
        self.sleeping.require_awake()
        self._drain()
        with inference(), self._changing:
            self.scheduler.release_ended()
            if kv == "drop":
                self.slots.flush()
                self.scheduler.preempt_all()
            self.sleeping.sleep(kv, weights)
            if weights == "drop":
                self.weights.dropped()
        return self.sleeping.report()

    def wake(self, tags: Sequence[str] | None = None) -> float:
        """Have the memory again that `sleep` gave back, at the same addresses, with what was kept; returns the seconds
        it took. Nothing is captured again.

        Parameters
        ----------
        tags : sequence of str or None
            ``weights`` or ``kv_cache`` alone, as vLLM has them: new weights can be written before there is memory for
            keys and values. None is both.

        Raises ConfigError for another tag, KVCacheOutOfMemory or DriverError where others have the memory, and
        MemoryQuarantined where an earlier call left some in the way that the driver still does not take back; what is
        awake then stays so, and `wake` may be called again.
        """
        wanted = self.sleeping.check_tags(tags)
        self._check_open()
        started = perf_counter()
        with inference(), self._changing:
            self.sleeping.wake(wanted)
        return perf_counter() - started

    def sleeping_report(self) -> SleepingReport:
        """Bytes: what is on the device now, by whose they are, and in host memory."""
        self._check_process()
        return self.sleeping.report()

    def _go_on_with(self, left: Left | None) -> None:
        """Note requests in a broker's journal, and go on with those that another process left; nothing without one."""

        def complete(request: RequestState) -> None:
            name = f"request {request.id} of the process before this one, whose model was another,"
            token_ids(name, [*request.prompt, *request.chosen], self._vocab_size)
            self._complete(request, is_text=False)

        if left is not None:
            self._survival = Survival(self.scheduler, self.cache, *left, complete)
            self._ids = self._survival.numbers()

    def survivors(self, received: Mapping[int, int] | None = None) -> dict[int, list[int]]:
        """The tokens so far of each request that the process before this one left (`TenantConfig.keep_s`), by its
        number, which it keeps; before the first step. They go on from there.

        Parameters
        ----------
        received : mapping of int to int, or None
            How many tokens of each the consumer has; what is behind them comes again by events, before others, and
            nothing that it has comes twice. None: it has all.

        Raises ConfigError where nothing outlives a process, where steps were taken, or for more tokens than there are.
        """
        self._check_open()
        if self._survival is None:
            raise ConfigError("nothing outlives this engine's process; build it with broker=TenantConfig(keep_s=...)")
        with self._changing:
            self._events = [*self._survival.events(received), *self._events]
        return self._survival.tokens()

    @property
    def prefilled_again(self) -> int:
        """Requests that had tokens when they were taken over from another process, and whose keys and values had to be
        computed again."""
        return 0 if self._survival is None else self._survival.prefilled_again

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
        restore: bool = False,
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
        restore : bool
            Whether a stream that breaks leaves the old weights. As many bytes of host memory as are written keep what
            was there meanwhile.

        Raises
        ------
        ConfigError
            Names, shapes, dtypes or devices are wrong, by the dict or the manifest: nothing is changed, and what runs
            goes on. Or a stream gives other than its manifest.

        Where a stream breaks after its first tensor was written, whatever it raised is raised, and without `restore`
        the weights are mixed: `step` raises WeightsMixed until a full update succeeds; events wait for that.
        """
        choice("running", running, "continue", "restart", "abort")
        truth("partial", partial)
        truth("restore", restore)
        self._check_open()
        self.sleeping.require_weights()
        update = self.weights.check(named_tensors, manifest, partial)
        self._drain()
        with self._changing:
            if running == "restart":
                self.scheduler.preempt_all()
                self.scheduler.forget_suspended()
            elif running == "abort":
                for request in list(self.scheduler.requests.values()):
                    self._end_without_token(request, "abort", None)
                self.scheduler.release_ended()
            # What runs goes on, and is not kept.
            self.slots.flush()
            for request in list(self.scheduler.requests.values()):
                if request.is_chosen_again and request.slot >= 0:
                    # The new weights would choose other tokens.
                    self.scheduler.recompute(request)
                request.restore()
                request.given, request.of_older_weights = len(request.chosen), self.scheduler.is_kept(request)
        self.slots.weights_version = self.weights.write(update, restore)
        return self.weights.version

    def update_weights_from_ipc(
        self,
        weights: IpcWeights,
        *,
        manifest: Manifest | None = None,
        partial: bool = False,
        running: Literal["continue", "restart", "abort"] = "continue",
        restore: bool = True,
    ) -> int:
        """`update_weights` from memory of another process that this one maps: by CUDA IPC of the same GPU, or, on the
        host, shared memory (runtime/weights_ipc.py). Returns the new `weights_version`.

        Parameters
        ----------
        weights
            A mapping of names to what `torch.multiprocessing.reductions.reduce_tensor` gave for each tensor, all of
            which stay as they are until this returns; `WeightBucket` objects, of which each may be written again when
            the next is asked for; or what `receive_weights` gives, whose other end is told how it went.
        manifest, partial, running, restore
            As `update_weights` takes them. A manifest is needed for buckets that are not all there; a channel begins
            with its own.

        Raises ConfigError as `update_weights`, and where memory cannot be mapped: it is on another GPU, or whose it is
        has gone. Unless `restore` is False, the weights are the old ones whenever this raises.
        """
        try:
            pairs, manifest = named_tensors(weights, manifest, self.cache.device)
            version = self.update_weights(pairs, manifest=manifest, partial=partial, running=running, restore=restore)
        except BaseException as error:
            if isinstance(weights, ReceivedWeights):
                weights.tell("failed", str(error))
            raise
        if isinstance(weights, ReceivedWeights):
            weights.tell("done", version)
        return version

    def _drain(self) -> None:
        """Take the tokens of all launches under way."""
        while self.pipeline.running:
            with inference(), self._changing:
                launch = self.pipeline.drain()
                assert launch is not None
                record = self._commit(launch, self._read_at)
                self.scheduler.release_ended()
            if self.observer is not None:
                self.observer(record)

    # -- ending ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Drop all requests, the graphs, and the cache. Idempotent, and where it raised or was interrupted, calling it
        again goes on; every other call raises EngineClosed then. Raises what failed during the last step, after all
        is closed."""
        if self._attention:
            self._check_process()
            drain()
            if self._interrupted:
                self.decode.return_to_stream()
                end_pass()
        self._attention = self._closed = True
        self._interrupted = False
        self._events = []
        if self._survival is not None:
            self._survival.end()
        self.scheduler.clear()
        with ExitStack() as all_of_it:
            if self._trace is not None and self._trace.is_owned:
                all_of_it.callback(self._trace.close)
            all_of_it.callback(self._close_parts)
        self._map_ahead.raise_failed()

    def _abandon(self, kind: type[BaseException] | None, *_: object) -> None:
        """A start failed: close what it had made. Behind an interrupt, the caller may try again with the same cache."""
        if kind is not None and issubclass(kind, Exception):
            self._close_parts()

    def _close_parts(self) -> None:
        """Close the graphs, the cache and what sleeps: all that a start had made, if it failed."""
        made = vars(self)
        with ExitStack() as all_of_it:
            # In this order backwards, each whatever the others raise.
            for name in ("sleeping", "cache", "prefill", "passes", "decode"):
                if name in made:
                    all_of_it.callback(made[name].close)

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _check_named(mapping: Any, cache: Any, kv_cache_dtype: Any, tokenizer: Any) -> None:
    """Raise ConfigError for what `from_pretrained` has no such mapping policy, cache, dtype or tokenizer for."""
    if not isinstance(mapping, str):
        raise ConfigError(f"mapping is {described(mapping)}; give a policy's name, or auto")
    if not isinstance(cache, str) or cache not in CACHES:
        raise ConfigError(f"no cache {shown(cache)}; there are {', '.join(CACHES)}")
    check_kv_cache_dtype(kv_cache_dtype)
    if not (isinstance(tokenizer, str) and tokenizer == "auto"):
        check_tokenizer(tokenizer)


def _check_parts(model: Any, cache: Any) -> None:
    """Raise ConfigError for what are no model and cache, or are not on one device."""
    if not isinstance(cache, KVCache):
        raise ConfigError(f"cache is {described(cache)}; give a KVCache (cache.select.make_cache)")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model is {described(model)}; give a causal language model of transformers")
    if model.device != cache.device:
        raise ConfigError(f"the model is on {model.device}, the cache on {cache.device}; put them on one device")


def _check_fork(known: RequestState, made: RequestState) -> None:
    """Raise ConfigError where a fork with parameters of its own cannot go on from the output that it begins with."""
    before = len(made.chosen)
    if made.max_tokens <= before:
        raise ConfigError(
            f"max_tokens is {made.max_tokens}, and request {known.id} has {before} tokens of output already, which "
            "count; give more"
        )
    if made.params.prompt_logprobs is not None and before:
        raise ConfigError(
            f"prompt_logprobs come with the first token of an output, and request {known.id} has {before}; leave them "
            "out, or submit another"
        )
    if made.grammar is not None:
        matcher = made.grammar.follow(made.chosen)
        if made.grammar.error or (before and matcher.is_stopped()):
            raise ConfigError(
                f"the {before} tokens of request {known.id}, with which its fork begins, are not how the grammar "
                "begins; leave it out, or submit another"
            )


def _check_reuse(settings: dict[str, Any], cache: KVCache) -> bool:
    """Whether prefixes are kept. Raises ConfigError where they shall be and the cache cannot."""
    wanted: bool | None = settings["prefix_cache"]
    if wanted and not cache.remaps:
        raise ConfigError(f"{typed(cache)} cannot keep prefixes; use the vattn cache, or prefix_cache=False")
    reusing = cache.remaps if wanted is None else wanted
    if settings["kv_events"] and not reusing:
        raise ConfigError("kv_events are those of the prefix cache, which this engine has not")
    return reusing


def _compressing(policy: CompressionPolicy) -> dict[str, Any]:
    """Settings of a cache whose tokens a policy evicts: what is mapped at once goes back at once, so single pages."""
    return {
        "own_lengths": True,
        "extent_classes": 1,
        "heads_per_range": 1 if policy.by_head else None,
        "layers_per_range": 1 if policy.by_layer else None,
    }


def _load(
    model: str, device: str, dtype: torch.dtype, report: StartupReport, speculation: Speculation | None
) -> tuple[PreTrainedModel, Speculation | None]:
    """`load_model`'s, also of the model that drafts where it is named, marked in a report."""
    progress.info("loading %s on %s", model, device)
    loaded = load_model(model, device, dtype)
    if speculation is not None and isinstance(speculation.model, str):
        progress.info("loading %s, which drafts, on %s", speculation.model, device)
        speculation = replace(speculation, model=load_model(speculation.model, device, dtype))
    report.mark(LOAD)
    return loaded, speculation


def _on_ranks(ranks: int | Ranks, model: str, device: str, dtype: torch.dtype, given: dict[str, Any]) -> Engine:
    # It builds upon this module.
    from trtllm_vattn.runtime.parallel.start import start_engine

    progress.info("loading %s on several ranks of %s", model, device)
    engine = start_engine(ranks, model, device, dtype, given)
    progress.info("%s", engine.startup.summary())
    return engine


def _failing(engine: weakref.ref[Engine]) -> Callable[[RequestState, str], None]:
    """`Engine._fail` for what the engine itself holds: no cycle keeps a dropped engine's memory until garbage is
    collected."""

    def fail(request: RequestState, message: str) -> None:
        there = engine()
        assert there is not None
        there._fail(request, message)

    return fail


def _drop(process: int, *graphs: DecodeBatch | Prefill | Passes) -> None:
    """Nobody holds an engine any more. Without graphs nothing holds its cache either, which gives its memory back."""
    if process == os.getpid():
        for each in graphs:
            each.close()


def _refuse_in_child() -> None:
    """What a forked child inherits is its parent's: the next call of it finds out."""
    for engine in _engines:
        engine._attention = True


os.register_at_fork(after_in_child=_refuse_in_child)
