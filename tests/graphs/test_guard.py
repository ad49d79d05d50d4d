from __future__ import annotations

from time import perf_counter

import numpy as np
import pytest
import torch

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError, UnmappedAccess
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.vmm.host import HostDriver

SHAPE = CacheShape(num_layers=4, num_kv_heads=2, head_dim=24, dtype=torch.float32, num_slots=4, max_seq_len=50)


def test_it_passes_up_to_the_frontier_and_names_what_is_beyond(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 1 << 20, lookahead=0) as cache:
        cache.admit("first", 4)
        cache.admit("second", 10)
        guard = Guard(cache)
        frontier = int(cache.frontiers[1])
        guard.check(np.array([5, frontier, 0, 0]))
        guard.check(np.zeros(4, np.int64))
        message = (
            rf"sequence 'second' in slot 1 would be {frontier + 1} tokens long and touch {frontier + 1}, "
            rf"but {frontier} are mapped, in all 4 layers; call prepare_step"
        )
        with pytest.raises(UnmappedAccess, match=message):
            guard.check(np.array([5, frontier + 1, 0, 0]))
        with pytest.raises(UnmappedAccess, match="2 slots in all"):
            guard.check(np.array([50, 50, 0, 0]))
        with pytest.raises(UnmappedAccess, match="sequence None in slot 3"):
            guard.check(np.array([0, 0, 0, 1]))


def test_over_read_counts_and_ends_with_the_slot(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 1 << 20, lookahead=0) as cache:
        cache.admit("a", 10)
        cache.admit("whole", 50)
        guard = Guard(cache, over_read=3)
        frontier = int(cache.frontiers[0])
        guard.check(np.array([frontier - 3, 50, 0, 0]))
        with pytest.raises(UnmappedAccess, match=rf"would be {frontier - 2} tokens long and touch {frontier + 1},"):
            guard.check(np.array([frontier - 2, 50, 0, 0]))
        with pytest.raises(UnmappedAccess, match="sequence 'whole' in slot 1 would be 51 tokens long and touch 51,"):
            guard.check(np.array([0, 51, 0, 0]))


def test_it_wants_one_length_a_slot(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 1 << 20, lookahead=0) as cache:
        for lengths in (np.zeros(1, np.int64), np.zeros(3, np.int64)):
            with pytest.raises(ConfigError, match=r"shape \(.,\), but there are 4 slots; give one length a slot"):
                Guard(cache).check(lengths)


def test_it_costs_microseconds(host_driver: HostDriver) -> None:
    from dataclasses import replace

    with KVCacheManager(replace(SHAPE, num_slots=256), host_driver, 64 << 20) as cache:
        for sequence in range(256):
            cache.admit(sequence, 10)
        guard = Guard(cache)
        lengths = cache.lengths.copy()
        took = []
        for _ in range(200):
            started = perf_counter()
            guard.check(lengths)
            took.append(perf_counter() - started)
        assert sorted(took)[100] < 100e-6


READ_PAST_FRONTIER = """
import sys
import torch
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams

# On the card a page holds thousands of tokens of this model.
longest = 512 if sys.argv[1] == "cpu" else 8192
engine = Engine.from_pretrained("tiny-llama", device=sys.argv[1], max_seqs=1, max_seq_len=longest, cache="vattn")
engine.submit([1, 2, 3], SamplingParams(max_tokens=longest - 3))
engine.step()
decode = engine.decode
decode.lengths[0] = int(engine.cache.frontiers[0]) + 1
decode.positions[0] = decode.lengths[0] - 1
if sys.argv[2] == "guarded":
    from trtllm_vattn.errors import ConfigError, UnmappedAccess
    try:
        with torch.inference_mode():
            decode.launch()
    except UnmappedAccess as error:
        print("refused:", error, flush=True)
    engine.close()
else:
    decode._guard.check = lambda lengths: None
    with torch.inference_mode():
        print(decode.launch()[1].tolist(), "survived", flush=True)
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_the_guard_names_the_sequence_before_the_process_dies(run_apart, device: str) -> None:  # type: ignore[no-untyped-def]
    guarded = run_apart(READ_PAST_FRONTIER, device, "guarded")
    assert guarded.returncode == 0, guarded.stderr
    assert "refused: sequence 0 in slot 0 would be" in guarded.stdout
    unguarded = run_apart(READ_PAST_FRONTIER, device, "unguarded")
    assert unguarded.returncode != 0
    assert "survived" not in unguarded.stdout
