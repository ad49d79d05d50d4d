"""The model of 64 nodes: descriptors are what the cache has, nodes do no more than they can, objectives are met."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transfer_at_64_nodes as nodes

from trtllm_vattn.bench.harness.traces import Request
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.vmm.host import HostDriver

COSTS = {name: value for name, (value, _, _) in nodes.INPUTS.items()}
REQUESTS = [Request(0.0, 2000 * (1 + i % 4), 100 + i % 50) for i in range(60)]


@pytest.mark.parametrize("tokens", [1, 2048, 5000])
def test_descriptors_are_the_caches_extents(tokens: int) -> None:
    # A thousandth of the granularity, and of a token's row.
    driver = HostDriver(granularity=4096)
    shape = CacheShape(2, 1, 16, torch.float32, num_slots=1, max_seq_len=8192)
    assert shape.token_bytes * 512 == COSTS["kv_bytes"]
    with KVCacheManager(shape, driver, "64MiB") as cache:
        # As many extents as where a page holds 16 tokens of 64 KiB in each of two ranges.
        cache.admit("a", tokens)
        one_range = len(cache.extents("a")) / cache.layout.num_ranges
    scale = 4096 // (shape.token_bytes // cache.layout.num_ranges)
    assert nodes.descriptors_of(tokens * 32 // scale, "extents") / nodes.RANGES == pytest.approx(one_range, abs=1)
    assert nodes.descriptors_of(tokens, "blocks") == -(-tokens // 16) * 64
    driver.close()


def test_every_request_is_served_and_blocks_keep_senders_busy() -> None:
    told = {layout: nodes.simulate(REQUESTS, 32, 200.0, layout, COSTS, 5.0) for layout in nodes.LAYOUTS}
    assert told["extents"]["senders_busy"] < told["blocks"]["senders_busy"] < 1
    assert told["extents"]["transfer_p50_s"] < told["blocks"]["transfer_p50_s"]
    shortest = 2000 * COSTS["kv_bytes"] / 50e9
    assert told["extents"]["transfer_p50_s"] >= shortest
    assert told["extents"]["ttft_p90_s"] >= 2000 / COSTS["prefill_tokens_s"]
    # More than nodes can prefill piles up.
    assert nodes.simulate(REQUESTS, 4, 200.0, "extents", COSTS, 5.0)["ttft_p90_s"] > 5


def test_results_say_where_each_input_is_from(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:17:{i:02d}.0,{request.prompt_tokens},20" for i, request in enumerate(REQUESTS[:40])]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    report = tmp_path / "out.json"
    arguments = ["--trace", str(trace), "--seconds", "1", "--prefills", "32", "--output-json", str(report)]
    assert nodes.main([*arguments, "--plot", str(tmp_path / "out.png")]) == 0
    told = json.loads(report.read_text())
    assert not told["results"]["executed"]
    assert all(each["source"] and each["unit"] for each in told["results"]["inputs"].values())
    assert told["summary"]["trace_extents_requests_s"] > 0
    assert (tmp_path / "out.png").stat().st_size > 10_000
