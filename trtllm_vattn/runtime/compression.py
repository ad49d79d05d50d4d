"""Policies of cache compression at work: when they run, what they are shown, and what their choice costs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.gather import restored
from trtllm_vattn.attention.options import FP8
from trtllm_vattn.attention.query_log import QueryLog
from trtllm_vattn.cache.base import FlatKV, KVCache
from trtllm_vattn.cache.compression import CompressionPolicy, HeadsView, compact
from trtllm_vattn.errors import ConfigError, DriverError, KVCacheOutOfMemory, MemoryQuarantined
from trtllm_vattn.runtime.dry_pass import AttentionNeeds
from trtllm_vattn.runtime.request import RequestState
from trtllm_vattn.runtime.step_model import StepModel
from trtllm_vattn.values import described
from trtllm_vattn.vmm.tensors import upload

logger = logging.getLogger(__name__)

WINDOWS = "layers with windows, whose tokens are masked by their places"
SINKS, SOFTCAPS, LATENTS = "sink logits", "soft caps of scores", "latents in place of keys and values"


@dataclass
class _Heads:
    """Of heads in one range, in one layer, behind their last compaction: each place's position, and the attention that
    it had (``[heads, held]``), and the policy's notes."""

    positions: torch.Tensor
    carried: torch.Tensor
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Sequence:
    """Of a request: the slot that its queries are noted for, and from which position on; and how many tokens it had
    when some were evicted last."""

    slot: int
    prompt_length: int
    since: int = 0
    evicted_at: int = 0
    heads: dict[tuple[int, int], _Heads] = field(default_factory=dict)


class Compression:
    """Runs a policy over sequences of a cache, behind the launches that complete their prompts and, where it runs
    again, behind decode steps.

    The device is waited for where a policy's choice is. A compaction that fails leaves the sequence as it is: it goes
    on with all its tokens, until the policy runs again.

    Attributes
    ----------
    runs, failed : int
        How often sequences were compacted, and how often that failed.
    evicted_bytes, returned_bytes : int
        Of keys and values that were given up, and of memory that went back for it.
    seconds : float
        Spent so far.
    """

    def __init__(self, policy: CompressionPolicy, attention: Attention, dtype: torch.dtype) -> None:
        self.policy, self.attention = policy, attention
        cache = attention.cache
        self.cache: KVCache = cache
        size = min(policy.queries or cache.shape.max_seq_len, cache.shape.max_seq_len)
        self.log = QueryLog(cache.shape, attention.num_heads, size, dtype, cache.device)
        attention.query_log = self.log
        self.runs = self.failed = self.evicted_bytes = self.returned_bytes = 0
        self.seconds = 0.0
        self._sequences: dict[int, _Sequence] = {}

    @property
    def one_by_one(self) -> bool:
        """Whether no launch may begin before the last one's tokens are read: behind a compaction nobody goes back by
        more than one token."""
        return self.policy.every is not None

    def launched(
        self,
        joined: Sequence[RequestState],
        decoding: Mapping[int, RequestState],
        known: Mapping[int, RequestState],
        fail: Callable[[RequestState, str], None],
    ) -> None:
        """Behind a launch: compact those whose prompt is complete with it, and those `decoding` whose turn it is again.
        `known` are all requests, by number; `fail` ends one that the policy cannot serve."""
        for request in joined:
            self._sequences = {number: each for number, each in self._sequences.items() if number in known}
            length = int(self.cache.lengths[request.slot])
            self._sequences[request.id] = _Sequence(request.slot, length)
            self._try(request, fail)
        if self.policy.every is None:
            return
        for request in list(decoding.values()):
            made = self._sequences.get(request.id)
            if made is not None and self.cache.lengths[request.slot] - made.since >= self.policy.every:
                self._try(request, fail)

    def _try(self, request: RequestState, fail: Callable[[RequestState, str], None]) -> None:
        started = perf_counter()
        try:
            self._compact(request, self._sequences[request.id])
            self.runs += 1
        except (DriverError, KVCacheOutOfMemory, MemoryQuarantined) as error:
            self.failed += 1
            text = "request %d keeps all its tokens, for compacting them failed: %s"
            logger.warning(text, request.id, error, extra={"request": request.id})
        except ConfigError as error:
            self.failed += 1
            fail(request, f"the compression policy chose what cannot be: {error}")
        self.seconds += perf_counter() - started

    def _compact(self, request: RequestState, sequence: _Sequence) -> None:
        cache, length = self.cache, int(self.cache.lengths[request.slot])
        if sequence.slot != request.slot:
            # It came back in another slot, for which other queries were noted.
            sequence.slot, sequence.since = request.slot, length
        ids = np.full(length, -1, np.int64)
        known = request.tokens[:length]
        ids[: len(known)] = known
        tokens = upload(ids, cache.device)
        views: dict[tuple[int, int], HeadsView] = {}
        kept: list[list[torch.Tensor]] = []
        for layer in range(cache.shape.num_layers):
            kept.append([])
            for part in range(len(cache.head_groups(layer))):
                view = views[layer, part] = self._view(sequence, layer, part, length, tokens)
                kept[-1] += self.policy.keep(view)
        self._check_newest(views, kept)
        done = compact(cache, request.id, kept)
        sequence.since = sequence.evicted_at = length
        for (layer, part), view in views.items():
            places = done.places[layer][part]
            positions, carried = (each.gather(1, places) for each in (view.positions, view.mass))
            sequence.heads[layer, part] = _Heads(positions, carried, view.notes)
        self.evicted_bytes += done.evicted_bytes
        self.returned_bytes += done.returned_bytes

    def _check_newest(self, views: Mapping[tuple[int, int], HeadsView], kept: Sequence[Sequence[torch.Tensor]]) -> None:
        """Raise ConfigError where a head does not keep its newest token, which may be written once more."""
        held = [view.held - 1 for (layer, _), view in views.items() for _ in range(view.keys.shape[1])]
        ends = [each[-1] if len(each) else torch.tensor(-1, device=self.cache.device) for row in kept for each in row]
        if len(ends) != len(held) or torch.stack(ends).tolist() != held:
            raise ConfigError("a head does not keep its newest token; a policy keeps that in every head")

    def _view(self, sequence: _Sequence, layer: int, part: int, length: int, tokens: torch.Tensor) -> HeadsView:
        cache, slot, shape = self.cache, sequence.slot, self.cache.shape
        kv = cache.head_groups(layer)[part]
        assert isinstance(kv, FlatKV)
        held, heads = int(cache.lengths_of(cache.group_of(layer, part))[slot]), kv.k.shape[2]
        own = slice(part * heads, (part + 1) * heads)
        before = sequence.heads.get((layer, part))
        came = torch.arange(sequence.evicted_at, length, device=cache.device)
        positions, carried = came.expand(heads, -1), torch.zeros(heads, held, device=cache.device)
        if before is not None:
            positions = torch.cat((before.positions, positions), dim=1)
            carried = functional.pad(before.carried, (0, held - before.carried.shape[1]))
        start = max(sequence.since, length - self.log.size)
        queries = self.log.last(layer, slot, start, length)
        group = queries.shape[1] // shape.num_kv_heads
        queries = queries.view(length - start, shape.num_kv_heads, group, shape.head_dim)[:, own]
        options = self.attention.options[layer]
        keys, values = (
            rows[slot, :held]
            if rows.dtype != FP8
            else restored(rows[slot, :held], scale if scale is None or len(scale) == 1 else scale[own])
            for rows, scale in ((kv.k, options.k_scale), (kv.v, options.v_scale))
        )
        return HeadsView(
            layer,
            part * heads,
            length,
            sequence.prompt_length,
            keys,
            values,
            positions,
            tokens[positions],
            queries,
            self.attention.scale,
            carried,
            {} if before is None else before.notes,
        )


def check_policy(policy: Any) -> None:
    """Raise ConfigError for what is neither a policy nor None."""
    if policy is not None and not isinstance(policy, CompressionPolicy):
        raise ConfigError(
            f"compression is {described(policy)}; give a CompressionPolicy of cache.compression, H2O or FastGen say"
        )


def check_compression(
    policy: Any, settings: Mapping[str, Any], cache: KVCache, needs: AttentionNeeds, model: StepModel
) -> None:
    """Raise ConfigError, by its name, for what a policy is not served with; None is no policy."""
    check_policy(policy)
    if policy is None:
        return
    windows = bool(cache.shape.windows or any(needs.windows))
    if cache.length_deficits is None and not windows:
        raise ConfigError(
            f"compression needs ranges with lengths of their own, which this {type(cache).__name__} has not; build a "
            "KVCacheManager with CacheConfig(own_lengths=True), or let Engine.from_pretrained build it"
        )
    wrong = {
        "a TensorRT plan, whose own layers attend, so that nobody sees queries": not isinstance(model, PreTrainedModel),
        WINDOWS: windows,
        SINKS: any(each is not None for each in needs.sinks),
        SOFTCAPS: any(each is not None for each in needs.softcaps),
        LATENTS: cache.shape.kv_factor == 1,
    }
    refuse_together({**wrong_settings(policy, settings), **wrong})
    policy.check(cache.shape.num_layers)


def wrong_settings(policy: CompressionPolicy, settings: Mapping[str, Any]) -> dict[str, bool]:
    """What of an engine's settings a policy is not served with, by what is said of it, and whether it was asked for."""
    again = policy.every is not None
    return {
        "prefix_cache=True: what was evicted is no prefix of another prompt; leave it out": settings["prefix_cache"],
        "speculation: rejected drafts go back behind a compaction; leave it out": settings["speculation"] is not None,
        "deterministic=True: it runs behind others' launches; leave one of them out": settings["deterministic"],
        "every beside steps above 1: it runs between single steps; make it 1": again and settings["steps"] > 1,
        "every beside loop=True: it runs between single steps; leave loop out": again and settings["loop"],
    }


def refuse_together(wrong: Mapping[str, bool]) -> None:
    """Raise ConfigError that names all that is there of what compression is not served with."""
    if found := [what for what, there in wrong.items() if there]:
        raise ConfigError(f"compression is not served with {'; nor with '.join(found)}")
