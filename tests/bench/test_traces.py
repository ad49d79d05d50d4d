from __future__ import annotations

import logging
from pathlib import Path

import pytest

from trtllm_vattn.bench.traces import Request, fit, generate_trace, load_trace
from trtllm_vattn.bench.workload import prompt_ids
from trtllm_vattn.errors import ConfigError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2030-01-02 03:04:05.5000000,100,7
2030-01-02 03:04:06.7500001,30,2
"""
MOONCAKE = """{"timestamp": 3000, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]}
{"timestamp": 4500, "input_length": 600, "output_length": 9, "hash_ids": [1, 7]}
"""
SHAREGPT = """num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio
12,34,46,0.35
56,0,56,0
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "whatever.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "requests"),
    [
        (AZURE, [Request(0.0, 100, 7), Request(1.25, 30, 2)]),
        (MOONCAKE, [Request(0.0, 1100, 5, (1, 2, 3)), Request(1.5, 600, 9, (1, 7))]),
        (SHAREGPT, [Request(0.0, 12, 34), Request(0.0, 56, 0)]),
    ],
    ids=["azure", "mooncake", "sharegpt"],
)
def test_each_format_is_told_by_its_content(tmp_path: Path, text: str, requests: list[Request]) -> None:
    loaded = load_trace(written(tmp_path, text))
    assert [request.arrival_s for request in loaded] == pytest.approx(
        [request.arrival_s for request in requests], abs=1e-5
    )
    assert [(r.prompt_tokens, r.output_tokens, r.prefix_blocks) for r in loaded] == [
        (r.prompt_tokens, r.output_tokens, r.prefix_blocks) for r in requests
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "columns"),
        ("a,b\n1,2\n", r"has columns \['a', 'b'\]; known are Azure code .*, ShareGPT lengths .* and Mooncake"),
        (AZURE.splitlines()[0] + "\n", "has no requests"),
        (AZURE + "2030-01-02 03:04:07.000000,many,2\n", "line 4: ValueError"),
        (AZURE + "2030-01-02 03:04:07.000000,0,2\n", "line 4: 0 prompt and 2 output tokens"),
        (MOONCAKE + '{"timestamp": 1}\n', "line 3: KeyError"),
        (MOONCAKE + "{broken\n", "line 3: JSONDecodeError"),
        (SHAREGPT + "x,1,1,1\n", "line 4: ValueError"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_trace(written(tmp_path, text))


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the trace .*nowhere.csv: No such file"):
        load_trace(tmp_path / "nowhere.csv")


def test_the_generator_repeats_itself_and_has_the_shape_it_says() -> None:
    trace = generate_trace(4000, seed=3, median_prompt=1469, median_output=20)
    assert trace == generate_trace(4000, seed=3, median_prompt=1469, median_output=20)
    assert trace != generate_trace(4000, seed=4, median_prompt=1469, median_output=20)
    prompts = sorted(request.prompt_tokens for request in trace)
    assert 1350 < prompts[2000] < 1600
    assert 1850 < sum(prompts) / 4000 < 2250
    arrivals = [request.arrival_s for request in trace]
    assert arrivals == sorted(arrivals)
    assert 70 < arrivals[-1] < 90


def test_fitting_cuts_what_is_too_long_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    requests = [Request(0, 100, 10), Request(0, 5, 50), Request(0, 5, 0), Request(0, 5, 5)]
    with caplog.at_level(logging.WARNING):
        fitted = fit(requests, max_seq_len=64, max_output=20)
    assert [(r.prompt_tokens, r.output_tokens) for r in fitted] == [(54, 10), (5, 20), (5, 1), (5, 5)]
    assert "of 4 requests, 1 prompts and 1 outputs were cut" in caplog.text
    caplog.clear()
    fit(requests[2:], 64, 20)
    assert not caplog.text
    with pytest.raises(ConfigError, match="outputs of 64 tokens leave no room for a prompt in 64; lower max_output"):
        fit(requests, 64, 64)


def test_equal_prefix_blocks_give_equal_tokens() -> None:
    one = prompt_ids(Request(0, 1100, 1, (5, 6, 7)), 0, 1000, seed=1)
    two = prompt_ids(Request(0, 1300, 1, (5, 9, 7)), 1, 1000, seed=1)
    assert (one[:512] == two[:512]).all()
    assert (one[512:1024] != two[512:1024]).any()
    assert (one[1024:1100] == two[1024:1100]).all()
    assert 0 <= one.min() <= one.max() < 1000
    assert (one == prompt_ids(Request(0, 1100, 1, (5, 6, 7)), 0, 1000, seed=1)).all()
    assert (one[:512] != prompt_ids(Request(0, 1100, 1, (5, 6, 7)), 0, 1000, seed=2)[:512]).any()
