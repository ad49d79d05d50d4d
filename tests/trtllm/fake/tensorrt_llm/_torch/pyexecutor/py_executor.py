"""A stand-in of the executor: its scheduler iteration, with kernels that read and write raw addresses."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tensorrt_llm._torch.pyexecutor.resource_manager import (
    LlmRequest,
    LlmRequestState,
    ResourceManagerType,
    ScheduledRequests,
)

CUDA_GRAPH_DUMMY_REQUEST_ID = (1 << 64) - 1


class Kernels:
    """What attention kernels do with a manager's pointers, mapping and table: float32 elements, on the host."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        # A captured graph bakes these in; they are read once.
        self.pointers = manager.kv_cache_pool_pointers[:, 0].tolist()
        self.mapping = manager.kv_cache_pool_mapping.tolist()
        self.heads = manager.num_kv_heads_per_layer[0]
        self.part = manager.tokens_per_block * self.heads * manager.head_dim * 4

    def _block(self, row: torch.Tensor, layer: int, field: int, ordinal: int) -> np.ndarray:
        """A block's elements ``[heads, tokens, dim]``: pool + offset × bytes in 64 bits, then the layer's place in the
        block. Nothing of it is touched before it is indexed."""
        pool, within = self.mapping[layer]
        address = self.pointers[pool] + (within * self.manager.kv_factor + int(row[pool, field, ordinal])) * self.part
        elements = (ctypes.c_float * (self.part // 4)).from_address(address)
        return np.ctypeslib.as_array(elements).reshape(self.heads, self.manager.tokens_per_block, -1)

    @staticmethod
    def value(number: int, layer: int, field: int, head: Any, token: Any) -> Any:
        return (number * 8191 + layer * 131 + field * 67 + head * 17 + token * 5) % 100003

    def _pieces(self, row: torch.Tensor, number: Any, tokens: range) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
        """For every layer, field and block: where it is, a view of the tokens in it, and what belongs there.

        `number` is a request's, or there is one for each of its tokens.
        """
        size, heads = self.manager.tokens_per_block, np.arange(self.heads)[:, None]
        for layer in range(len(self.mapping)):
            for field in range(self.manager.kv_factor):
                for first in range(tokens.start // size * size, tokens.stop, size):
                    these = np.arange(max(tokens.start, first), min(tokens.stop, first + size))
                    block = self._block(row, layer, field, first // size)
                    span = block[:, these[0] - first : these[-1] - first + 1]
                    who = number if isinstance(number, int) else number[these]
                    yield (layer, field, these), span, self.value(who, layer, field, heads, these)

    def write(self, row: torch.Tensor, number: Any, tokens: range) -> None:
        for _, span, values in self._pieces(row, number, tokens):
            span[:] = values[..., None]

    def load_tiles(self, row: torch.Tensor, end: int, tile: int = 128) -> None:
        """What context attention does: load up to a whole tile of keys, past the end too, wherever the table points."""
        size = self.manager.tokens_per_block
        most = self.manager.max_blocks_per_seq * size
        for layer in range(len(self.mapping)):
            for token in range(end, min(most, -(-end // tile) * tile), size // 2):
                self._block(row, layer, 0, token // size)[0, token % size].sum()
                self._block(row, layer, 1, token // size)[-1, token % size].sum()

    def wrong(self, row: torch.Tensor, number: Any, tokens: range) -> list[tuple[int, int, int, int]]:
        """Places of a request's history that hold something else than was written."""
        found = []
        for (layer, field, these), span, values in self._pieces(row, number, tokens):
            for head, index in zip(*np.nonzero((span != values[..., None]).any(-1)), strict=True):
                found.append((layer, field, int(head), int(these[index])))
        return found


def identities(request: LlmRequest) -> Any:
    """What a request's K and V are made from: its number, or for each token what comes before it. Its drafts are
    wrong."""
    if not request.has_content:
        return request.py_request_id
    seed = zlib.crc32(repr((request.lora_task_id, request.cache_salt_id)).encode())
    found = []
    for token in request.tokens + [0] * request.draft_tokens:
        seed = zlib.crc32(token.to_bytes(8, "little"), seed)
        found.append(seed % 10_000)
    return np.array(found)


class PyExecutor:
    """Schedules without eviction, prepares, runs the kernels, updates, frees; one iteration a call. Prompts are
    computed in chunks where `chunk` says of how many tokens."""

    chunk: int | None = None
    dist: Any = None
    """Has `allgather`, where there are several ranks."""

    def __init__(self, manager: Any, max_batch_size: int, warm_up_tokens: int = 1) -> None:
        self.manager, self.max_batch_size = manager, max_batch_size
        self.computed: dict[int, list[range]] = {}
        self.waiting: list[LlmRequest] = []
        self.running: list[LlmRequest] = []
        self.lengths: dict[int, int] = {}
        self.finished: list[int] = []
        self.wrong: list[Any] = []
        self.started = self.is_warmup = False
        self._own({ResourceManagerType.KV_CACHE_MANAGER: manager})
        shape = (manager.num_pools, max_batch_size, 2, manager.max_blocks_per_seq)
        self.table = torch.full(shape, -1, dtype=torch.int32)
        self.padding: list[LlmRequest] = []
        self.warm_up(warm_up_tokens)
        self.kernels = Kernels(manager)

    def _own(self, resources: dict[Any, Any]) -> None:
        self.resource_manager = SimpleNamespace(resource_managers=resources)
        self.kv_cache_manager = resources.get(ResourceManagerType.KV_CACHE_MANAGER)

    @classmethod
    def over(cls, resources: dict[Any, Any]) -> PyExecutor:
        """An executor that is started, and runs nothing."""
        made = cls.__new__(cls)
        made.started = made.is_warmup = False
        made._own(dict(resources))
        return made

    def warm_up(self, tokens: int) -> None:
        """A batch of dummies, the first of them as long as may be, through the same kernels."""
        numbers = list(range(self.max_batch_size))
        made = self.manager.add_dummy_requests(numbers, [tokens] + [1] * (len(numbers) - 1), is_gen=True)
        assert made is not None, "warm-up found no room"
        kernels = Kernels(self.manager)
        self.manager.copy_batch_block_offsets(self.table, numbers, 1, 0, len(numbers))
        for i, number in enumerate(numbers):
            kernels.write(self.table[:, i], number, range(tokens if i == 0 else 1))
        for request in made:
            self.manager.free_resources(request)

    def start_worker(self) -> None:
        self.started = True

    def submit(self, request: LlmRequest) -> None:
        self.waiting.append(request)

    def cancel(self, number: int) -> None:
        for queue in (self.waiting, self.running):
            for request in [each for each in queue if each.py_request_id == number]:
                queue.remove(request)
                if queue is self.running:
                    self._end(request)

    @property
    def active_requests(self) -> list[LlmRequest]:
        return self.waiting + self.running

    def _handle_errors(self, error_msg: str | None = None, *, requests: list[LlmRequest] | None = None) -> None:
        for request in list(self.active_requests if requests is None else requests):
            if request in self.waiting:
                self.waiting.remove(request)
            else:
                self.running.remove(request)
                self._end(request)

    def _end(self, request: LlmRequest) -> None:
        request.state = LlmRequestState.GENERATION_COMPLETE
        self.manager.free_resources(request)
        self.lengths.pop(request.py_request_id)
        self.finished.append(request.py_request_id)

    def _schedule(self) -> ScheduledRequests:
        """Every running request, and waiting ones whose need to their end is free beside the others'."""
        need = self.manager.get_needed_resource_to_completion
        free = self.manager.impl.get_kv_cache_stats().free_num_blocks
        for request in self.running:
            free -= need(request) - len(self.manager.impl.get_cache_block_ids(request.py_request_id, 0)[0])
        context = [each for each in self.running if each.state is LlmRequestState.CONTEXT_INIT]
        going = [each for each in self.running if each not in context]
        for request in context:
            request.context_chunk_size = min(self.chunk or request.prompt_len, request.context_remaining_length)
        while self.waiting and len(going) + len(context) < self.max_batch_size:
            if need(self.waiting[0]) > free:
                break
            free -= need(self.waiting[0])
            request = self.waiting.pop(0)
            request.context_chunk_size = min(self.chunk or request.prompt_len, request.prompt_len)
            context.append(request)
        return ScheduledRequests(context, going)

    def _pad(self, count: int) -> list[int]:
        if not self.padding:
            self.padding = self.manager.add_dummy_requests([CUDA_GRAPH_DUMMY_REQUEST_ID], is_gen=True) or []
            assert self.padding, "no padding dummy: batches would run eagerly for good"
        return [CUDA_GRAPH_DUMMY_REQUEST_ID] * count

    def step(self) -> int:
        """One iteration; returns how many requests took part."""
        batch = self._schedule()
        requests = batch.all_requests()
        if not requests:
            return 0
        self.manager.prepare_resources(batch)
        ids = [request.py_request_id for request in requests]
        ids += self._pad(self.max_batch_size - len(ids)) if len(ids) < self.max_batch_size else []
        self.manager.copy_batch_block_offsets(self.table, ids, 1, len(batch.context_requests), len(ids))
        for i, request in enumerate(requests):
            number, row, who = request.py_request_id, self.table[:, i], identities(request)
            is_prompt = request in batch.context_requests
            before = request.context_current_position if is_prompt else self.lengths[number]
            new = request.context_chunk_size if is_prompt else 1 + request.draft_tokens
            self.wrong += self.kernels.wrong(row, who, range(before))
            self.kernels.write(row, who, range(before, before + new))
            if is_prompt:
                self.kernels.load_tiles(row, before + new)
                self.computed.setdefault(number, []).append(range(before, before + new))
                request.move_to_next_context_chunk()
            self.lengths[number] = before + new
            request.py_rewind_len = 0 if is_prompt else request.draft_tokens
            if not is_prompt or not request.context_remaining_length:
                request.tokens.append(self.sample(request))
        for i in range(len(requests), len(ids)):
            self.kernels.write(self.table[:, i], 7, range(1))
        self.manager.update_resources(batch)
        for request in requests:
            number = request.py_request_id
            self.lengths[number] -= request.py_rewind_len
            if request not in self.running:
                self.running.append(request)
            if request.context_remaining_length:
                continue
            request.state = LlmRequestState.GENERATION_IN_PROGRESS
            request.generated += 1
            if request.generated >= request.max_new_tokens:
                self.running.remove(request)
                self._end(request)
        return len(requests)

    @staticmethod
    def sample(request: LlmRequest) -> int:
        """The next token, which follows from those before it."""
        return zlib.crc32(repr(request.tokens[-3:]).encode()) % 50_000

    def run(self) -> None:
        while self.waiting or self.running:
            assert self.step(), f"{len(self.waiting)} requests wait and nothing runs"
