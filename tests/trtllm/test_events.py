"""Events as TensorRT-LLM's serializer and routers read them."""

from __future__ import annotations

import threading

import pytest

from trtllm_vattn.cache.prefix.events import AllBlocksCleared, BlockRemoved, BlockStored
from trtllm_vattn.trtllm.events import EventBuffer, KVCacheRemovedData, KVCacheStoredData, block_key_hash


def stored(hashes: list[int], parent: int | None, tokens: list[int], key: tuple[object, ...] = ()) -> BlockStored:
    return BlockStored(hashes, parent, tokens, 4, extra_keys=[key] * len(hashes) if key else None)


def test_block_key_hashes_by_hand() -> None:
    """`hash_v1_block_key` (tensorrt_llm/runtime/kv_cache_hash.py), written out for one block of one token."""
    value = 7
    for _ in range(2):
        value = (value >> 16 ^ value) * 0x45D9F3B % 2**32
    value = (value >> 16 ^ value) + 0x9E3779B9
    seed = 1
    assert block_key_hash([7]) == seed ^ (value % 2**32 + (seed << 6) + (seed >> 2)) % 2**64
    assert block_key_hash([]) == 0
    assert len({block_key_hash([7, 8]), block_key_hash([8, 7]), block_key_hash([7, 8], 5), block_key_hash([7], 5)}) == 4
    salted = {block_key_hash([7], 0, lora, salt) for lora in (None, 0, 1) for salt in (None, 0, 1)}
    assert len(salted) == 9
    # A parent's hash has the salt in it already.
    assert block_key_hash([7], 5, None, 1) == block_key_hash([7], 5)


def test_blocks_chain_and_go_by_the_same_hashes() -> None:
    buffer = EventBuffer(10, 128)
    buffer.add([stored([101, 102], None, list(range(8)))])
    buffer.add([stored([103], 102, [8, 9, 10, 11]), BlockRemoved([103])])
    first, second, gone = buffer.take(0)
    assert [each.event_id for each in (first, second, gone)] == [0, 1, 2]
    assert isinstance(first.data, KVCacheStoredData)
    assert isinstance(second.data, KVCacheStoredData)
    hashes = [block.block_hash for block in first.data.blocks]
    assert hashes == [block_key_hash([0, 1, 2, 3]), block_key_hash([4, 5, 6, 7], hashes[0])]
    assert second.data.parent_hash == hashes[1]
    assert gone.data == KVCacheRemovedData([block_key_hash([8, 9, 10, 11], hashes[1])])
    buffer.add([AllBlocksCleared()])
    (cleared,) = buffer.take(0)
    assert cleared.data == KVCacheRemovedData(hashes)


@pytest.mark.parametrize(
    ("salt", "number", "text"), [("int:12", block_key_hash([1, 2, 3, 4], 0, None, 12), None), ("str:t", None, "t")]
)
def test_salts_are_in_the_hash(salt: str, number: int | None, text: str | None) -> None:
    buffer = EventBuffer(10, 128)
    buffer.add([stored([1], None, [1, 2, 3, 4], (salt,))])
    (event,) = buffer.take(0)
    assert isinstance(event.data, KVCacheStoredData)
    (block,) = event.data.blocks
    assert block.cache_salt == text
    assert block.block_hash != block_key_hash([1, 2, 3, 4])
    assert number in (None, block.block_hash)


def test_the_oldest_are_dropped_and_ids_count_on() -> None:
    buffer = EventBuffer(2, 128)
    buffer.add([stored([n], None, [n, 0, 0, 0]) for n in range(5)])
    assert [each.event_id for each in buffer.take(0)] == [3, 4]
    assert buffer.take(0) == []


def test_who_waits_is_woken() -> None:
    buffer = EventBuffer(2, 128)
    found: list[int] = []
    waiting = threading.Thread(target=lambda: found.extend(each.event_id for each in buffer.take(None)))
    waiting.start()
    buffer.add([stored([1], None, [1, 2, 3, 4])])
    waiting.join(10)
    assert found == [0]
    assert buffer.take(1) == []
