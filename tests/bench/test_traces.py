from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trtllm_vattn.bench.harness.traces import Request, fit, generate_trace, load_trace
from trtllm_vattn.bench.harness.workload import prompt_ids
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
        ("", "has no requests"),
        ("a,b\n1,2\n", r"has columns \['a', 'b'\]; known are Azure .*, ShareGPT lengths .* and Mooncake"),
        (AZURE.splitlines()[0] + "\n", "has no requests"),
        (AZURE + "2030-01-02 03:04:07.000000,many,2\n", "line 4: ContextTokens is 'many'; it must be a whole number"),
        (AZURE + "2030-01-02 03:04:07.000000,0,2\n", "line 4: ContextTokens is 0; it must be at least 1"),
        (MOONCAKE + '{"timestamp": 1}\n', "line 3: input_length, output_length missing"),
        (MOONCAKE + "{broken\n", "line 3: Expecting property name"),
        (SHAREGPT + "x,1,1,1\n", "line 4: num_prefill_tokens is 'x'; it must be a whole number"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_trace(written(tmp_path, text))


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
LENGTHS = "num_prefill_tokens,num_decode_tokens\n"


@pytest.fixture(params=["UTC", "America/New_York", "Asia/Tokyo"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The host's time zone."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("stamps", "arrivals"),
    [
        (["2024-05-10 00:00:00.5+00:00", "2024-05-10 00:00:01+00:00", "2024-05-10 00:00:02.250+00:00"], [0, 0.5, 1.75]),
        (["2024-05-10T00:00:00Z", "2024-05-10T02:00:01+0200", "2024-05-10 00:00:02 UTC"], [0, 1, 2]),
        (["2024-05-09 17:30:00-05:30", "2024-05-10 00:00:00+01:00"], [0, 0]),
        (["2024-11-03 00:59:59", "2024-11-03 02:00:01", "2024-11-03 07:00:01"], [0, 3602, 21602]),
        (["2024-02-28 23:59:59.999999999", "2024-02-29 00:00:00.000000001"], [0, 2e-9]),
    ],
    ids=["pandas", "offsets", "negative offset", "summer time ends", "nanoseconds"],
)
def test_arrivals_are_those_of_the_file_in_any_time_zone(
    zone: str, tmp_path: Path, stamps: list[str], arrivals: list[float]
) -> None:
    loaded = load_trace(written(tmp_path, HEAD + "".join(f"{stamp},5,1\n" for stamp in stamps)))
    assert [request.arrival_s for request in loaded] == arrivals


@pytest.mark.parametrize(
    "text", [AZURE, MOONCAKE, SHAREGPT, json.dumps([json.loads(x) for x in MOONCAKE.split("\n")[:2]])]
)
@pytest.mark.parametrize("form", ["as it is", "BOM", "CRLF", "blank lines", "gz", "no end of line", "BOM and CRLF"])
def test_a_files_form_does_not_change_what_it_says(tmp_path: Path, text: str, form: str) -> None:
    expected = load_trace(written(tmp_path, text))
    raw = text.encode()
    if form == "blank lines":
        raw = b"\n  \n" + raw.replace(b"\n", b"\n\n")
    if "CRLF" in form:
        raw = raw.replace(b"\n", b"\r\n")
    if "BOM" in form:
        raw = b"\xef\xbb\xbf" + raw
    if form == "no end of line":
        raw = raw.rstrip(b"\n")
    path = tmp_path / ("träce 1.gz" if form == "gz" else "träce 1.csv")
    path.write_bytes(gzip.compress(raw) if form == "gz" else raw)
    assert load_trace(path) == expected
    assert load_trace(path, 1) == expected[:1]


def test_a_json_list_in_many_lines_is_read(tmp_path: Path) -> None:
    rows = [{"timestamp": 10.5 * n, "input_length": 1 + n, "output_length": n, "hash_ids": [n]} for n in range(3000)]
    expected = [Request(0.0105 * n, 1 + n, n, (n,)) for n in range(3000)]
    for indent in (None, 1):
        loaded = load_trace(written(tmp_path, json.dumps(rows, indent=indent)))
        assert [r.arrival_s for r in loaded] == pytest.approx([r.arrival_s for r in expected])
        assert [(r.prompt_tokens, r.prefix_blocks) for r in loaded] == [
            (r.prompt_tokens, r.prefix_blocks) for r in expected
        ]


GOOD = '{"timestamp": 1, "input_length": 3, "output_length": 2}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LENGTHS + "inf,3\n", "line 2: num_prefill_tokens is 'inf'"),
        (LENGTHS + "nan,3\n", "line 2: num_prefill_tokens is 'nan'"),
        (LENGTHS + "3,1e400\n", "line 2: num_decode_tokens is '1e400'"),
        (LENGTHS + "3,99999999999\n", "line 2: num_decode_tokens is '99999999999'; requests have fewer than"),
        (LENGTHS + "3.5,1\n", "line 2: num_prefill_tokens is '3.5'"),
        (LENGTHS + "1_0,1\n", "line 2: num_prefill_tokens is '1_0'"),
        (LENGTHS + "٣,1\n", "line 2: num_prefill_tokens is '٣'"),
        (LENGTHS + "3,-1\n", "line 2: num_decode_tokens is -1; it must be at least 0"),
        (LENGTHS + "\n\n3\n", "line 4: num_decode_tokens missing"),
        (LENGTHS + "3,1,9\n", "line 2: 3 cells under 2 columns"),
        (LENGTHS + ",\n3,x\n", "line 3: num_decode_tokens is 'x'"),
        ("num_prefill_tokens,num_prefill_tokens,num_decode_tokens\n3,4,5\n", "two columns num_prefill_tokens"),
        (HEAD + "2024-05-10 00:00:00.5,5\n", "line 2: GeneratedTokens missing"),
        (HEAD + "2024-13-10 00:00:00,5,1\n", "line 2: TIMESTAMP is '2024-13-10 00:00:00': month"),
        (HEAD + "yesterday,5,1\n", "line 2: TIMESTAMP is 'yesterday'; write"),
        (HEAD + ",5,1\n", "line 2: TIMESTAMP is ''; write"),
        (HEAD + "2024-05-10 00:00:00,5,1\n2024-05-10 00:00:00Z,5,1\n", "line 3: .* in every row, or in none"),
        (GOOD.replace("1,", "NaN,", 1), "line 1: timestamp is nan"),
        (GOOD.replace("1,", "1e300,", 1), "line 1: timestamp is 1e[+]300"),
        (GOOD.replace("1,", '"1",', 1), "line 1: timestamp is '1'; it must be a number of milliseconds"),
        (GOOD.replace("3", "Infinity"), "line 1: input_length is inf"),
        (GOOD.replace("3", "3.9"), "line 1: input_length is 3.9"),
        (GOOD.replace("3", "true"), "line 1: input_length is True"),
        (GOOD.replace("3", "null"), "line 1: input_length is None"),
        (GOOD.replace("3", "9" * 9000), "line 1: "),
        (GOOD[:-1] + ', "hash_ids": [1, -1]}', "line 1: hash_ids must be"),
        (GOOD[:-1] + ', "hash_ids": 7}', "line 1: hash_ids must be"),
        (GOOD + "\n[1, 2]\n", "line 2: it is list; a request is an object"),
        ("[1]", "line 1: it is int; a request is an object"),
        (f"[\n{GOOD},\n{GOOD}\n{GOOD}]", "line 4: '.*' where , or ] should be"),
        (f"[\n{GOOD},\n]", "line 3: Expecting value"),
        (f"[\n{GOOD},\n", "line 3: the file ends where a request should be"),
        (f"[\n{GOOD}\n", "line 3: the file ends where , or ] should be"),
        ("[]", "has no requests"),
        ("\n\n", "has no requests"),
        ("[" * 100_000, "line 1: "),
    ],
)
def test_a_row_that_is_wrong_is_named_by_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as raised:
        load_trace(path)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "raw", [b"\xff\xfeT\0", b"\x89PNG\r\n", HEAD.encode() + b"\xff,1,2\n", LENGTHS.encode() + b'"' * 9]
)
def test_what_is_no_text_is_named(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"trace\.csv"):
        load_trace(path)


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    for raw in (b"not one", gzip.compress(SHAREGPT.encode() * 99)[:-20], b""):
        path.write_bytes(raw)
        with pytest.raises(ConfigError, match=r"trace\.csv\.gz"):
            load_trace(path)


def test_requests_out_of_order_are_sorted_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [f"2024-05-10 00:00:0{second},{second},1\n" for second in (3, 1, 2)]
    loaded = load_trace(written(tmp_path, HEAD + "".join(rows)))
    assert [(r.arrival_s, r.prompt_tokens) for r in loaded] == [(0, 1), (1, 2), (2, 3)]
    assert "1 requests arrive before the one above them" in caplog.text


@pytest.mark.parametrize("kind", ["csv", "json lines", "json list"])
def test_a_trace_is_read_as_far_as_it_is_needed(tmp_path: Path, kind: str) -> None:
    """What stands behind the requests that were asked for is not looked at, however much it is."""
    head, row = {"csv": (LENGTHS, "3,2\n"), "json lines": ("", GOOD + "\n"), "json list": ("[", GOOD + ",")}[kind]
    path = written(tmp_path, head + 16 * row + 200_000 * "broken, " + "\n")
    with path.open("r+b") as file:
        file.truncate(4 << 30)  # A hole that takes no room on disk, and minutes to read.
    started = time.perf_counter()
    assert len(load_trace(path, 16)) == 16
    assert time.perf_counter() - started < 5
    with pytest.raises(ConfigError):
        load_trace(path, 17)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the trace .*nowhere.csv: No such file"):
        load_trace(tmp_path / "nowhere.csv")
    with pytest.raises(ConfigError, match=r"cannot read the trace .*: Is a directory"):
        load_trace(tmp_path)


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
    with pytest.raises(ConfigError, match="outputs of 64 tokens leave no room for a prompt in 64; lower --max-output"):
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
