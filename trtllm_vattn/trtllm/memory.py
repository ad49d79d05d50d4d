"""`ManagerMemory`: everything that one TensorRT-LLM `KVCacheManager` keeps at fixed addresses.

It owns the requests' slots, the block tables, the budget, and the blocks that are held back from the C++ scheduler. The
C++ manager goes on counting blocks for the scheduler. Slots grow from the same batches by the same rules, so the counts
agree; a version that grows its sequences by another rule would have kernels write where no memory is mapped, so whoever
hands block numbers to kernels calls `check_mapped` first.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.errors import (
    ConfigError,
    DriverError,
    KVCacheOutOfMemory,
    MemoryQuarantined,
    UnknownSequence,
    UnmappedAccess,
)
from trtllm_vattn.trtllm.agreement import BudgetAgreement
from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.events import EventBuffer
from trtllm_vattn.trtllm.features import UnsupportedFeature, enum_name
from trtllm_vattn.trtllm.holdback import BlockHoldback, StatsWithoutHoldback
from trtllm_vattn.trtllm.reuse import RequestReuse
from trtllm_vattn.trtllm.slots import NULL_BLOCK, RequestSlots
from trtllm_vattn.trtllm.tables import AffineTables, RowGatherer
from trtllm_vattn.vmm.base import Driver

logger = logging.getLogger(__name__)

DTYPES = {"HALF": torch.float16, "BF16": torch.bfloat16, "FLOAT": torch.float32, "FP8": torch.float8_e4m3fn}
"""Dtypes of K and V, by TensorRT-LLM's names."""


class ManagerMemory:
    """Memory of one manager; each method is what one overridden method of the manager does to it.

    Parameters
    ----------
    manager : KVCacheManager
        Whose memory it is; its attributes are read as they are filled in.
    stock : object
        The same manager seen as its stock class (``super()``): calls on it reach TensorRT-LLM's own methods.
    draft_length : callable
        Draft tokens of a request in the next step.
    asked : KvCacheConfig
        What the manager was asked for; ``max_gpu_total_bytes`` of it limits the budget, unless it is 0.
    reuses : bool
        Keep what requests leave for those that begin alike.

    Attributes
    ----------
    slots, cache, holdback, rows
        Made by `open`.
    reuse : RequestReuse or None
        What requests leave, where blocks are reused.
    events : EventBuffer or None
        What becomes of such blocks, where that was asked for.
    target : int or None
        The budget asked for, in bytes; None while TensorRT-LLM has not been asked.
    total_blocks : int
        Blocks that the C++ manager counts.
    running : dict
        Requests that have a slot, by id.
    dummies : dict
        Blocks that each dummy request took of the C++ manager when it was made, by id.
    agreement : BudgetAgreement or None
        By which the budget changes at run time, where there are several ranks.
    is_budget_set : bool
        Whether the budget is in force. Until graphs are captured there are only dummies, which take no memory.
    """

    slots: RequestSlots
    cache: BlockKVCache
    holdback: BlockHoldback
    rows: RowGatherer
    total_blocks: int

    def __init__(
        self,
        manager: Any,
        stock: Any,
        draft_length: Callable[[Any], int],
        config: TrtllmConfig,
        asked: Any,
        reuses: bool = False,
    ) -> None:
        self._manager, self._stock, self._draft_length, self._config = manager, stock, draft_length, config
        self._asked, self._reuses = asked, reuses
        self._byte_limit = byte_limit = int(getattr(asked, "max_gpu_total_bytes", None) or 0)
        self.reuse: RequestReuse | None = None
        self.events: EventBuffer | None = None
        self.agreement: BudgetAgreement | None = None
        self._lock = threading.RLock()  # budgets are set from other threads than the executor's
        self._sizing: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        budget = config.budget_bytes
        self.target = budget if budget is None else min(budget, byte_limit or budget)
        self.running: dict[int, Any] = {}
        self.dummies: dict[int, int] = {}
        self.is_budget_set = self.is_closed = False

    # -- opening and closing ---------------------------------------------------------------------------------------

    def count_blocks(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> int:
        """Blocks for the C++ manager to count: as many as requests can have or the GPU can hold, and warm-up's dummies.

        Keeps the arguments of `calculate_max_num_blocks`, with which the stock class is asked later.
        """
        self._sizing = (arguments, named)
        manager = self._manager
        tokens = manager.max_seq_len + manager.num_extra_kv_tokens + self._draft_tokens + 1
        longest = math.ceil(tokens / manager.tokens_per_block) + 1
        most = manager.max_batch_size * longest
        if torch.cuda.is_available():
            memory = torch.cuda.mem_get_info()[1]
            most = min(most, memory // (manager.get_cache_bytes_per_token() * manager.tokens_per_block) + 1)
        return int(most + manager.max_batch_size + 2 * longest)

    def open(self, driver: Driver, stream: Any) -> None:
        """Reserve the addresses, and publish pools and tables, once the stock constructor is through.

        Raises UnsupportedFeature, ConfigError, AddressSpaceExhausted, DriverError; nothing is left behind.
        """
        manager = self._manager
        heads = set(manager.num_kv_heads_per_layer)
        if len(heads) != 1:
            raise UnsupportedFeature(
                f"layers have {sorted(heads)} KV heads; the fixed-address KV cache needs the same number in each"
            )
        dtype = enum_name(manager.dtype)
        if dtype not in DTYPES:
            raise UnsupportedFeature(
                f"KV cache of dtype {dtype} is not supported at fixed addresses; there are {', '.join(DTYPES)}: set "
                "kv_cache_config.dtype"
            )
        shape = CacheShape(
            num_layers=manager.num_local_layers,
            num_kv_heads=heads.pop(),
            head_dim=manager.head_dim,
            dtype=DTYPES[dtype],
            num_slots=manager.max_batch_size,
            max_seq_len=manager.max_blocks_per_seq * manager.tokens_per_block,
            kv_factor=manager.kv_factor,
        )
        block = manager.tokens_per_block
        lookahead = block if self._config.lookahead is None else self._config.lookahead
        layers = self._config.layers_per_range or shape.num_layers
        self._token_count = getattr(manager.impl, "get_token_count", None)
        self.total_blocks = manager.impl.max_num_blocks
        self.holdback = BlockHoldback(
            self._take_blocks, self._stock.free_resources, manager.get_num_free_blocks, manager.max_blocks_per_seq
        )
        streams = () if stream is None else (stream.cuda_stream,)
        self.slots = RequestSlots(shape, driver, layers, lookahead, block, streams, self._reuses)
        self.cache = self.slots.cache
        if self._reuses:
            self._open_reuse(block, stream)
        with ExitStack() as undo:
            undo.callback(self.cache.close)
            self._publish()
            if self.target is not None:
                self.check_budget(self.target)
            undo.pop_all()

    def _open_reuse(self, block: int, stream: Any) -> None:
        on_stream: Callable[[], AbstractContextManager[Any]] = nullcontext
        if stream is not None:
            on_stream = lambda: torch.cuda.stream(stream)  # noqa: E731
        whole = not getattr(self._asked, "enable_partial_reuse", True)
        room = int(getattr(self._asked, "event_buffer_max_size", None) or 0)
        self.reuse = RequestReuse(self.cache, block, whole, bool(room), on_stream)
        if room:
            self.events = EventBuffer(room, self._manager.max_seq_len)

    def _publish(self) -> None:
        """Put pool addresses and tables where TensorRT-LLM's kernels and metadata look for them."""
        manager, cache, layout = self._manager, self.cache, self.cache.layout
        firsts = range(0, layout.num_layers, layout.layers_per_range)
        manager.num_pools = layout.num_ranges
        manager.kv_cache_pool_pointers = torch.tensor(
            [[cache.blocks(first).data_ptr(), 0] for first in firsts], dtype=torch.int64
        )
        layers = [divmod(layer, layout.layers_per_range) for layer in range(layout.num_layers)]
        manager.kv_cache_pool_mapping = torch.tensor(layers, dtype=torch.int32)
        manager.host_kv_cache_block_offsets = host = torch.zeros(
            (layout.num_ranges, manager.max_batch_size, 2, manager.max_blocks_per_seq),
            dtype=torch.int32,
            pin_memory=cache.device.type == "cuda",
        )
        tables = AffineTables(layout, manager.max_blocks_per_seq, NULL_BLOCK, cache.device)
        self.rows = RowGatherer(tables, self._table_rows, self._backed_blocks, host)

    def close(self) -> None:
        """Give all memory back, after the stock shutdown."""
        self.cache.close()

    def describe(self) -> str:
        """What is served, in one line."""
        shape = self.cache.shape
        return (
            f"KV cache at fixed addresses: {self._manager.num_pools} pools, the first at "
            f"{self.cache.blocks(0).data_ptr():#x}; {self.slots.max_requests} requests of {shape.max_seq_len} tokens "
            f"in blocks of {self._manager.tokens_per_block}, which are {'' if self.reuse else 'not '}reused; "
            f"a budget of {self.target:,} bytes"
        )

    # -- requests --------------------------------------------------------------------------------------------------

    def prepare(self, batch: Any) -> None:
        """Back a batch's new tokens, then have the C++ manager count them.

        Raises KVCacheOutOfMemory; nothing changed then. Where the stock class raises, each request keeps the memory
        that the C++ manager counts for it by then.
        """
        with self._lock:
            admitted, grown = self._new_tokens(batch)
            if admitted and not self.is_budget_set:
                self.set_initial_budget()
            new = {request.py_request_id: request for request in batch.context_requests if admitted}
            admit = release = None
            if (reuse := self.reuse) is not None:
                admit, release = lambda n, tokens: reuse.admit(new[n], tokens), lambda n: reuse.undo(new[n])
            try:
                self.slots.prepare_step(admitted, grown, admit, release)
            except KVCacheOutOfMemory:
                # The budget was lowered, or memory released, after the scheduler had asked how many blocks are free.
                promised = self.slots.budget_for(self.promised_blocks)
                if self.cache.budget_bytes >= promised:
                    raise
                self.cache.set_budget(promised)
                self.slots.prepare_step(admitted, grown, admit, release)
            # The stock class may rearrange the batch.
            prompts = list(batch.context_requests) if admitted else []
            try:
                self._stock.prepare_resources(batch)
            except BaseException:
                self._undo_step({number: new[number] for number in admitted}, grown)
                raise
            finally:
                for request in prompts:
                    number = request.py_request_id
                    if number in admitted and self.slots.holds(number):
                        self.running[number] = request
                        if self.reuse is not None:
                            self.reuse.begin(request)
            if self.reuse is not None and admitted and hasattr(batch, "reset_context_requests"):
                # A prompt that begins behind what is held may have become its last chunk.
                batch.reset_context_requests()

    def _new_tokens(self, batch: Any) -> tuple[dict[int, int], dict[int, int]]:
        """Tokens of requests that begin, and additional tokens of those that go on, by id; dummies left out."""
        extra, reserve = self._manager.num_extra_kv_tokens, self._reserved_draft_tokens
        admitted = {
            request.py_request_id: request.prompt_len + extra + self._draft_length(request)
            for request in batch.context_requests
            if request.is_first_context_chunk and request.py_request_id not in self.dummies
        }
        grown = {
            request.py_request_id: 1 + max(self._draft_length(request), reserve)
            for request in batch.generation_requests
            if request.py_request_id not in self.dummies
        }
        return admitted, grown

    def _undo_step(self, admitted: dict[int, Any], grown: dict[int, int]) -> None:
        """Shorten a failed step's requests to what the C++ manager counts by now, and release those it does not know.

        Where only blocks are counted, requests that grew stay as they are: memory may reach further than the count.
        """
        for number, request in admitted.items():
            if self._counted_tokens_or_none(number) is None:
                if self.reuse is not None:
                    self.reuse.undo(request)
                else:
                    self.cache.release(number)
        for number, tokens in grown.items() if self._token_count is not None else ():
            ahead = self.slots.length_of(number) - (self._counted_tokens_or_none(number) or 0)
            if ahead > 0:
                self.slots.rewind(number, min(tokens, ahead))

    def update(self, batch: Any, *arguments: Any, **named: Any) -> None:
        """The stock update; then memory is mapped ahead while the step runs. What fails is mapped when it is needed."""
        with self._lock:
            self._stock.update_resources(batch, *arguments, **named)
            if self.reuse is not None:
                self.reuse.updated(batch.context_requests)
            try:
                self.cache.map_ahead()
            except (DriverError, MemoryQuarantined) as error:
                logger.warning("mapping ahead failed and is left to the next step: %s", error)
            if self.agreement is not None:
                self.agreement.step()

    def rewind(self, request: Any, tokens: int) -> None:
        """Take rejected draft tokens back; their memory stays mapped."""
        with self._lock:
            self._stock.rewind_kv_cache(request, tokens)
            if self.slots.holds(request.py_request_id):
                self.slots.rewind(request.py_request_id, tokens)

    def free(self, request: Any) -> Any:
        """End a request that finished, was cancelled or is paused; its memory is parked for the next one."""
        with self._lock:
            number = request.py_request_id
            done = self._stock.free_resources(request)
            if self.dummies.pop(number, None) is None and self.slots.holds(number):
                if self.reuse is not None:
                    self.reuse.end(request)
                else:
                    self.cache.release(number)
                self.running.pop(number, None)
            self.rows.epoch += 1
            self._update_holdback()
            return done

    def fail(self, numbers: Iterable[int]) -> None:
        """Requests end in an error: nothing of them is reused."""
        with self._lock:
            if self.reuse is not None:
                for number in numbers:
                    self.reuse.fail(number)

    # -- reuse -----------------------------------------------------------------------------------------------------

    def forget_reusable(self) -> None:
        """Reuse nothing of what was computed so far."""
        with self._lock:
            if self.reuse is not None:
                self.reuse.flush()

    def reusable_tokens(self, tokens: Iterable[int], adapter: int | None, salt: int | str | None) -> int:
        """Tokens of a prompt that are held, in whole blocks; 0 where blocks are not reused."""
        with self._lock:
            return 0 if self.reuse is None else self.reuse.match(tokens, adapter, salt)

    def flush_events(self) -> None:
        """Have `latest_events` give what happened so far."""
        with self._lock:
            if self.reuse is not None and self.events is not None:
                self.events.add(self.reuse.take_events())

    def latest_events(self, timeout_ms: float | None) -> list[Any]:
        """As `EventBuffer.take`; nothing where events were not asked for."""
        return [] if self.events is None else self.events.take(timeout_ms)

    def add_dummies(self, request_ids: Sequence[int], *arguments: Any, **named: Any) -> Any:
        """Dummies of any length take no memory: all their blocks are the null block. Held-back blocks make room for
        them in the C++ manager's count. Raises ConfigError for ids of running requests."""
        with self._lock:
            taken = [number for number in request_ids if number in self.running]
            if taken:
                raise ConfigError(f"dummy requests cannot take the ids {taken}, which running requests have")
            room = len(request_ids) * (self._manager.max_blocks_per_seq + 1)
            self.holdback.hold(self.holdback.blocks - room)
            before = self._manager.get_num_free_blocks()
            try:
                made = self._stock.add_dummy_requests(request_ids, *arguments, **named)
                numbers = [request.py_request_id for request in made or []]
                are_counted = self._manager.get_num_free_blocks() < before
                counts = self._counted_blocks(numbers) if are_counted else [0] * len(numbers)
                self.dummies.update(zip(numbers, counts, strict=True))
            finally:
                self._update_holdback()
            return made

    # -- what kernels are given ------------------------------------------------------------------------------------

    def fill_table(self, table: torch.Tensor, request_ids: Sequence[int], num_context: int) -> None:
        """Gather the batch's rows of the constant block table into `table`, unless it holds them already.

        Raises as `check_mapped`, and UnknownSequence for a request that was never prepared.
        """
        self.check_mapped(request_ids)
        self.rows.fill(table, request_ids, num_context)

    def block_ids(self, request_ids: Sequence[int]) -> list[list[int]]:
        """Block numbers of each request; of a dummy, null blocks. Raises as `check_mapped`."""
        self.check_mapped(request_ids)
        dummies = [number for number in request_ids if number in self.dummies]
        counts = dict(zip(dummies, self._counted_blocks(dummies), strict=True))
        return [
            [NULL_BLOCK] * counts[number] if number in counts else self.slots.block_ids(number)
            for number in request_ids
        ]

    def has_invalid(self, fill_with_zero: bool) -> bool:
        """As `RequestSlots.has_invalid`. Nothing that was filled with zeros is reused."""
        with self._lock:
            found = self.slots.has_invalid(fill_with_zero)
            if fill_with_zero and self.reuse is not None:
                self.reuse.flush()
            return found

    def _table_rows(self, numbers: Iterable[int]) -> list[int]:
        """Rows of the constant table; of a dummy, the row of null blocks."""
        slots, row = self.cache.sequences, self.rows.tables.dummy_row
        try:
            return [row if number in self.dummies else slots[number] for number in numbers]
        except KeyError as error:
            raise UnknownSequence(f"request {error} is in a batch, but was never prepared") from error

    def _backed_blocks(self, numbers: Iterable[int]) -> list[int]:
        return [0 if number in self.dummies else len(self.slots.block_ids(number)) for number in numbers]

    def check_mapped(self, numbers: Iterable[int]) -> None:
        """Raise UnmappedAccess, naming each request of a batch for which the C++ manager counts more tokens than its
        slot has.

        Calls the C++ manager once a request. Where it counts only blocks, one call is enough as long as the blocks in
        use are as many as requests, dummies and holdback account for.
        """
        if self._token_count is None and self._do_blocks_add_up():
            return
        behind = []
        for number in numbers:
            if number not in self.dummies and self.slots.holds(number):
                counted, mapped = self._counted_tokens(number), self.slots.length_of(number)
                if counted > mapped:
                    behind.append((number, counted, mapped))
        if behind:
            which = "; ".join(f"request {n}: {counted} tokens, memory for {own}" for n, counted, own in behind)
            raise UnmappedAccess(
                f"TensorRT-LLM counts more tokens than there is memory for at fixed addresses ({which}), so nothing "
                "was launched: this version grows its requests by a rule that the adapter does not know; report it, "
                "and run without trtllm-vattn"
            )

    # -- what the C++ manager counts -------------------------------------------------------------------------------

    def _counted_blocks(self, numbers: Sequence[int]) -> list[int]:
        return [len(ids) for ids in self._stock.get_batch_cache_indices(list(numbers))] if numbers else []

    def _counted_tokens(self, number: int) -> int:
        """Tokens that the C++ manager counts for a request; the fewest that its blocks stand for, where this version
        says only those. Raises what the C++ manager raises for a request that it does not know."""
        if self._token_count is not None:
            return int(self._token_count(number))
        (blocks,) = self._counted_blocks([number])
        return (blocks - 1) * int(self._manager.tokens_per_block) + 1 if blocks else 0

    def _counted_tokens_or_none(self, number: int) -> int | None:
        try:
            return self._counted_tokens(number)
        except (LookupError, RuntimeError):
            return None

    def _do_blocks_add_up(self) -> bool:
        lengths = self.cache.lengths[[self.cache.sequences[number] for number in self.running]]
        running = int((-(-lengths // self._manager.tokens_per_block)).sum())
        used = self.total_blocks - self._manager.get_num_free_blocks()
        return bool(used == running + sum(self.dummies.values()) + self.holdback.blocks)

    def _take_blocks(self, number: int, blocks: int) -> Any:
        manager = self._manager
        tokens = min(blocks * manager.tokens_per_block, manager.max_seq_len) - manager.num_extra_kv_tokens
        made = self._stock.add_dummy_requests([number], [max(1, tokens)])
        return made[0] if made else None

    @property
    def _reserved_draft_tokens(self) -> int:
        """Draft tokens that the C++ manager adds at every step, however few are drafted (since 1.3, which rewinds the
        rest in `update_resources`); 0 where it adds only those drafted."""
        return int(getattr(self._manager, "_kv_reserve_draft_tokens", 0))

    @property
    def _draft_tokens(self) -> int:
        """Draft tokens that a generation step may need room for."""
        return max(int(self._manager.max_total_draft_tokens), self._reserved_draft_tokens)

    # -- capacity and budget ---------------------------------------------------------------------------------------

    @property
    def promised_blocks(self) -> int:
        """Blocks, free and in use, that the scheduler counts on."""
        return int(self.total_blocks - self.holdback.blocks - sum(self.dummies.values()))

    def stats(self) -> StatsWithoutHoldback:
        """The stock statistics without the blocks held back, and with our reuse."""
        found = StatsWithoutHoldback(self._stock.get_kv_cache_stats(), self.holdback.blocks)
        if self.reuse is not None:
            counts, block = self.reuse.prefixes.stats, self._manager.tokens_per_block
            found.reused_blocks = counts.cached_tokens // block
            found.missed_blocks = (counts.prompt_tokens - counts.cached_tokens) // block
        return found

    def capacity_blocks(self) -> int | None:
        """Blocks that the budget backs; None while it is not known."""
        return None if self.target is None else min(self.total_blocks, self.slots.blocks_backed_by(self.target))

    def _blocks_for_running(self) -> int:
        """Promised blocks that running requests may need to their end, those that they have included."""
        manager = self._manager
        more = math.ceil((manager.num_extra_kv_tokens + self._draft_tokens) / manager.tokens_per_block) + 1
        needed = sum(manager.get_needed_resource_to_completion(each) + more for each in self.running.values())
        return int(min(needed, self.promised_blocks))

    def _with_running(self, budget: int) -> int:
        """`budget`, or the bytes that running requests may need where that is more."""
        return max(budget, self.slots.budget_for(self._blocks_for_running()) if self.running else 0)

    def _update_holdback(self) -> None:
        """Have the C++ manager show as free what the budget backs. On the executor's thread, between its steps."""
        if not self.is_budget_set or self.target is None:
            return
        backed = max(self.slots.blocks_backed_by(self.target), self._blocks_for_running())
        wanted = self._with_running(self.target)
        self.holdback.hold(self.total_blocks - backed - sum(self.dummies.values()))
        if self.cache.budget_bytes > wanted:
            self.cache.shrink_towards(wanted)

    def set_initial_budget(self) -> None:
        """Put the budget in force once graphs are captured; without one, take what TensorRT-LLM itself would take now.

        Raises ConfigError for a budget that is too small.
        """
        if self.target is None:
            most = min(self._stock_blocks(None), self.total_blocks) * self.slots.block_bytes
            self.target = min(most, self._byte_limit or most)
        if getattr(self._manager.mapping, "world_size", 1) > 1:
            # As many blocks on every rank, whatever a block takes there.
            self.target = self.slots.budget_for(self._stock_blocks(self.slots.blocks_backed_by(self.target)))
        self.check_budget(self.target)
        with self._lock:
            if self.events is not None and not self.is_budget_set:
                self.events.create(self.slots.blocks_backed_by(self.target))
            self.is_budget_set = True
            self.cache.shrink_towards(self.target)
            self._update_holdback()

    def _stock_blocks(self, at_most: int | None) -> int:
        """Blocks that the stock class would take now, on the rank that has the fewest."""
        arguments, named = self._sizing
        if "synchronize_across_ranks" in named:
            # 1.4's constructor has the ranks agree after this call; here the call itself must.
            named = {**named, "synchronize_across_ranks": True}
        config = copy.copy(named["kv_cache_config"] if "kv_cache_config" in named else arguments[0])
        if at_most is not None:
            config.max_tokens, config.free_gpu_memory_fraction = at_most * self._manager.tokens_per_block, None
        if "kv_cache_config" in named:
            named = {**named, "kv_cache_config": config}
        else:
            arguments = (config, *arguments[1:])
        return int(self._stock.calculate_max_num_blocks(*arguments, **named)[0])

    def check_budget(self, budget: int) -> None:
        """Raise ConfigError for fewer bytes than one request of the longest kind needs."""
        slots, longest = self.slots, self._manager.max_blocks_per_seq
        if slots.blocks_backed_by(budget) < longest:
            raise ConfigError(
                f"a budget of {budget:,} bytes backs {slots.blocks_backed_by(budget):,} blocks of "
                f"{slots.block_bytes:,} bytes, but one request of {self._manager.max_seq_len:,} tokens needs "
                f"{longest:,}: raise it to {slots.budget_for(longest):,}, or lower max_seq_len"
            )

    def set_budget(self, budget: int) -> int:
        """Raise or lower the bytes of physical memory, from any thread; returns the budget then in force.

        Memory that no request needs goes back at once. The scheduler learns of a change when the next request ends.
        Running requests keep what they may need to their end, so a lowered budget is reached as they end; under a
        scheduler that overcommits (MAX_UTILIZATION), when fewer run.
        On several ranks that is begun at the same step of all, a few steps later (`BudgetAgreement`), and what is
        returned is the budget until then.
        Raises ConfigError for fewer bytes than one request of the longest kind needs.
        """
        self.check_budget(budget)
        with self._lock:
            if self.agreement is not None:
                self.agreement.ask(budget)
                return self.cache.budget_bytes
            self.target = budget
            return self.cache.shrink_towards(self._with_running(budget))

    def put_in_force(self, budget: int) -> None:
        """Change the budget, and what the scheduler is told of it, now. On the executor's thread, between its steps.

        Raises ConfigError as `check_budget`; DriverError.
        """
        self.check_budget(budget)
        self.target = budget
        self.cache.shrink_towards(self._with_running(budget))
        self._update_holdback()

    def release(self) -> int:
        """Give back all memory that running requests will not need; returns the bytes kept. The budget stays: new
        requests take memory again, and `resume` allows all of it at once."""
        with self._lock:
            return self.cache.shrink_towards(self._with_running(self.slots.least_bytes))

    def resume(self) -> int:
        """Allow the whole budget again; returns it. Memory is taken as requests need it."""
        with self._lock:
            target = self.slots.least_bytes if self.target is None else self.target
            return self.cache.shrink_towards(self._with_running(target))
