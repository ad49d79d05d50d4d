"""The C++ books beside ours: what they say of a request, and that our memory reaches as far.

Ours are kept beside theirs and from the same batches, so they agree; a version that grows its sequences by another rule
would have kernels write where there is no memory. Whoever hands block numbers to kernels checks that first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from trtllm_vattn.errors import UnmappedAccess
from trtllm_vattn.trtllm.adapter import Adapter


class Books(Adapter):
    """Reads the C++ books."""

    def _vattn_booked(self, numbers: Sequence[int]) -> list[int]:
        """Blocks that requests have in the C++ books."""
        return [len(ids) for ids in super().get_batch_cache_indices(list(numbers))] if numbers else []

    def _vattn_least_tokens(self, number: int) -> int:
        """Tokens of a request in the C++ books; the fewest that its blocks stand for, where they are all that is said.

        Raises what the C++ manager raises for a request that it does not know.
        """
        if self._vattn_token_count is not None:
            return int(self._vattn_token_count(number))
        (blocks,) = self._vattn_booked([number])
        return (blocks - 1) * int(self.tokens_per_block) + 1 if blocks else 0

    def _vattn_check_frontiers(self, numbers: Iterable[int]) -> None:
        """Raise UnmappedAccess naming every request of a batch of which the C++ books have more tokens than there is
        memory for. One call of the C++ manager a request; where it counts blocks alone, one a batch as long as all of
        them add up."""
        cache, dummies = self._vattn_pages.cache, self._vattn_dummies
        if self._vattn_token_count is None and self._vattn_blocks_add_up():
            return
        behind = {}
        for number in numbers:
            slot = None if number in dummies else cache.sequences.get(number)
            if slot is not None:
                booked, ours = self._vattn_least_tokens(number), int(cache.lengths[slot])
                if booked > ours:
                    behind[number] = (booked, ours)
        if behind:
            told = "; ".join(
                f"request {number}: {booked} tokens, memory for {ours}" for number, (booked, ours) in behind.items()
            )
            raise UnmappedAccess(
                f"TensorRT-LLM's books are ahead of the memory at fixed addresses ({told}), so nothing was launched: "
                "this version grows its requests by a rule that the adapter does not know; report it, and run without "
                "trtllm-vattn"
            )

    def _vattn_blocks_add_up(self) -> bool:
        """Whether as many blocks are in use as our requests, dummies and ballast account for."""
        cache = self._vattn_pages.cache
        lengths = cache.lengths[[cache.sequences[number] for number in self._vattn_live]]
        ours = int((-(-lengths // self.tokens_per_block)).sum())
        used = self._vattn_total - self.get_num_free_blocks()
        return bool(used == ours + self._vattn_dummy_blocks + self._vattn_ballast.blocks)

    def _vattn_take_back(self, admitted: Mapping[int, int], grown: Mapping[int, int]) -> None:
        """The stock class failed amid keeping its books: keep of a step what they hold by now, and take back the rest.

        A request that the books hold and we do not would be written to without memory; one that we hold and the books
        do not would keep its slot for good. Where blocks alone are counted, what has grown stays grown: ahead is safe.
        """
        pages = self._vattn_pages
        for number in admitted:
            if self._vattn_tokens_or_none(number) is None:
                pages.cache.release(number)
        for number, tokens in grown.items() if self._vattn_token_count is not None else ():
            booked = self._vattn_tokens_or_none(number) or 0
            length = int(pages.cache.lengths[pages.cache.slot_of(number)])
            if booked < length:
                pages.rewind(number, min(tokens, length - booked))

    def _vattn_tokens_or_none(self, number: int) -> int | None:
        try:
            return self._vattn_least_tokens(number)
        except (LookupError, RuntimeError):
            return None
