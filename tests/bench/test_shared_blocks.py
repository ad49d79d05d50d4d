"""Block tables that share blocks: what is shared, what is given back, and that an engine's tokens stay the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtllm_vattn.bench.harness.shared_blocks import BlockSlots, SharedBlocks
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.errors import KVCacheOutOfMemory
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.sampling import SamplingParams


def test_whole_blocks_are_shared_and_evicted_from_the_end() -> None:
    with SharedBlocks(CacheShape(1, 1, 4, torch.float32, 4, 64), "cpu", 4, 8) as cache:
        tokens = np.arange(14)
        assert cache.admit_with_prefix("a", tokens)[1] == 0
        cache.keep("a", tokens)
        # Two samples of one prompt: three whole blocks of it, and one of each its own.
        assert cache.admit_with_prefix("b", tokens)[1] == 12
        assert cache.stats().mapped_bytes == 8 * 4 * cache.shape.token_bytes
        cache.check_integrity()
        with pytest.raises(KVCacheOutOfMemory):
            cache.admit_with_prefix("c", np.append(tokens[:8], np.arange(90, 114)))
        cache.check_integrity()
        cache.release("a")
        cache.release("b")
        cache.check_integrity()
        # All blocks but one of the first block: what is evicted is the end.
        assert cache.admit_with_prefix("d", np.arange(100, 124))[1] == 0
        cache.release("d")
        assert cache.admit_with_prefix("e", tokens)[1] == 8
        cache.forget_kept()
        cache.check_integrity()
        cache.release("e")
        assert cache.admit_with_prefix("f", tokens)[1] == 8
        cache.release("f")
        cache.forget_kept()
        assert cache.admit_with_prefix("g", tokens)[1] == 0


def test_an_engine_over_them_gives_the_same_tokens() -> None:
    model = load_model("tiny-llama", "cpu", torch.float32)
    random = np.random.default_rng(0)
    shared = random.integers(0, 512, 40).tolist()
    prompts = [[*shared, *random.integers(0, 512, count).tolist()] for count in (3, 9, 0, 5)]
    found = []
    for sharing in (False, True):
        cache = SharedBlocks(shape_of(model, 2, 96), "cpu")
        with Engine(model, cache, attention="torch", compile=False, capture=False) as engine:
            if sharing:
                engine.slots = engine.scheduler.slots = BlockSlots(cache)
            done = engine.generate(prompts, SamplingParams(8, ignore_eos=True))
            found.append([each.tokens for each in done])
            cache.check_integrity()
            if sharing:
                assert engine.slots.cached_tokens >= 2 * 32
    assert found[0] == found[1]
