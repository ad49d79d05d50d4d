"""What is exported, shown and drawn of an engine is what it holds."""

from __future__ import annotations

import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

prometheus_client = pytest.importorskip("prometheus_client")
pytest.importorskip("rich")

from trtllm_vattn import ConfigError, Engine, EngineClosed, SamplingParams  # noqa: E402
from trtllm_vattn.cache.base import SlotStats  # noqa: E402
from trtllm_vattn.cli.main import main  # noqa: E402
from trtllm_vattn.memory.pool import ExtentPool  # noqa: E402
from trtllm_vattn.observe import metrics  # noqa: E402
from trtllm_vattn.observe.address_map import DUMMY, IDLE, RUNNING, SHARED, Space  # noqa: E402
from trtllm_vattn.observe.metrics import (  # noqa: E402
    COUNTER,
    FAMILIES,
    STEP,
    EngineCollector,
    start_metrics_server,
    tenant_metrics_of,
)
from trtllm_vattn.observe.top import first_reached, read  # noqa: E402
from trtllm_vattn.runtime.engine_stats import StepTotals  # noqa: E402
from trtllm_vattn.tenancy.borrowing import Lease  # noqa: E402
from trtllm_vattn.tenancy.config import TenantConfig  # noqa: E402
from trtllm_vattn.tenancy.tenant import Tenant  # noqa: E402
from trtllm_vattn.trace import read_trace  # noqa: E402
from trtllm_vattn.verify.tenants import lending  # noqa: E402
from trtllm_vattn.vmm.host import HostDriver  # noqa: E402
from trtllm_vattn.vmm.wrappers import FaultyDriver  # noqa: E402

DOCUMENT = Path(__file__).resolve().parents[2] / "trtllm_vattn" / "observe" / "README.md"
OTHERS = re.compile("draft|lease|broker")
PROMPT = [1 + token % 200 for token in range(70)]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Path]]:
    """An engine with a trace: two requests have ended, one of two samples that share a prompt runs."""
    path = tmp_path_factory.mktemp("observe") / "trace.json"
    options: dict[str, Any] = {"dtype": torch.float32, "max_seqs": 3, "max_seq_len": 128, "capture": False}
    with Engine.from_pretrained("tiny-llama", device="cpu", trace=str(path), **options) as engine:
        engine.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=3, ignore_eos=True))
        engine.submit(PROMPT, SamplingParams(max_tokens=40, ignore_eos=True, n=2, temperature=1.0, seed=1))
        while len(engine.scheduler.decoding) < 2:
            engine.step()
        for _ in range(3):
            engine.step()
        yield engine, path


def exported(engine: Engine, slots: bool = False) -> dict[str, float]:
    registry = prometheus_client.CollectorRegistry()
    registry.register(EngineCollector(engine, slots))
    return {
        f"{sample.name}{'|'.join(sample.labels.values())}": sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def test_metrics_are_the_engines_numbers(watched: tuple[Engine, Path]) -> None:
    engine, _ = watched
    found, stats = exported(engine), engine.stats()
    assert (found["vattn_running"], found["vattn_waiting"], found["vattn_asleep"]) == (2, 0, 0)
    assert found["vattn_ended_totallength"] == 2
    running = [request for request in engine.scheduler.decoding.values()]
    assert found["vattn_chosen_tokens_total"] == 6 + sum(len(request.chosen) for request in running)
    assert found["vattn_computed_prompt_tokens_total"] >= 5 + len(PROMPT)
    assert found["vattn_prefix_tokens_totalfound"] > 0
    assert found["vattn_step_seconds_count"] == stats.totals.launches == sum(stats.totals.within)
    assert found["vattn_step_seconds_bucket+Inf"] == stats.totals.launches
    cache = engine.cache
    assert found["vattn_kv_held_bytes"] == cache.held_bytes
    assert found["vattn_kv_budget_bytes"] == cache.budget_bytes
    dummy = cache.driver.granularity()  # type: ignore[attr-defined]
    parts = ("mapped", "parked", "retained", "free")
    assert sum(found[f"vattn_kv_{part}_bytes"] for part in parts) + dummy == cache.held_bytes
    assert found["vattn_mappings"] == cache.stats().live_mappings > 0
    assert found["vattn_mappings_made_totaladmission"] > 0
    assert found["vattn_captures_while_running_total"] == 0
    engine.decode.captures_while_running = 3
    assert exported(engine)["vattn_captures_while_running_total"] == engine.captures_while_running == 3
    engine.decode.captures_while_running = 0


def test_slots_are_shown_as_they_are(watched: tuple[Engine, Path]) -> None:
    engine, _ = watched
    rows = engine.slot_stats()
    assert sorted(row.state for row in rows if row.state == "running") == ["running"] * 2
    for row in rows:
        if row.state == "running":
            assert row.length == engine.cache.lengths[row.slot]
            assert row.length <= row.frontier == engine.cache.frontiers[row.slot]
        assert row.mapped_bytes > 0
    found = exported(engine, slots=True)
    assert found[f"vattn_slot_tokens{rows[0].slot}|{rows[0].state}"] == rows[0].length
    assert len(found) == 3 * len(rows)


def test_the_document_has_the_names_that_are_exported(watched: tuple[Engine, Path]) -> None:
    table = DOCUMENT.read_text().split("<!-- metrics -->")[1].split("<!-- /metrics -->")[0]
    rows = {
        name: (label, text) for name, label, text in re.findall(r"^\| `(\w+)` \| `?(\w*)`? \| (.+) \|$", table, re.M)
    }
    wanted = {f.name + ("_total" if f.kind is COUNTER else ""): (f.label, f.help) for f in FAMILIES}
    assert rows == {**wanted, STEP[0]: ("le", f"{STEP[1]}: a histogram")}
    # Of this engine everything but drafts and a broker, which it has not.
    exporting = {name.partition("{")[0] for name in exported(watched[0])}
    assert all(any(each.startswith(name) for each in exporting) for name in rows if not OTHERS.search(name))


def test_numbers_are_read_from_any_thread_while_steps_run(watched: tuple[Engine, Path]) -> None:
    engine, _ = watched
    failed: list[BaseException] = []
    done = threading.Event()

    def look() -> None:
        try:
            while not done.is_set():
                stats, rows = engine.stats(), engine.slot_stats()
                assert stats.cache.held_bytes <= stats.cache.budget_bytes
                assert all(isinstance(row, SlotStats) for row in rows)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(8):
        engine.step()
    number = engine.submit([5, 6, 7], SamplingParams(max_tokens=30))
    engine.step()
    engine.abort(number)
    engine.set_budget(engine.cache.budget_bytes)
    done.set()
    thread.join()
    assert failed == []
    engine.cache.check_integrity()


def test_a_frame_is_drawn_by_the_metrics_address(
    watched: tuple[Engine, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with start_metrics_server(watched[0]) as server:
        url = f"http://127.0.0.1:{server.port}"
        assert main(["top", url, "--once", "--slots", "1"]) == 0
        shown = capsys.readouterr().out
        assert main(["top", f"{url}/metrics", "--once"]) == 0
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/other")
    for text in ("running 2", "waiting 0", "steps waited for", "free extents", "frontier", "p99 ≤", "more"):
        assert text in shown, text
    rows = watched[0].slot_stats()
    assert f"{rows[0].frontier:,}" in shown
    for address in (url, "ftp://x", "nonsense"):
        assert main(["top", address, "--once"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "does not answer" in said[0]
    assert "is no address" in said[1]


def test_a_tenant_of_a_broker_is_shown_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "broker"
    config = TenantConfig(str(path), "chat", floor="128KiB", ceiling="512KiB")
    options: dict[str, Any] = {"max_seqs": 2, "max_seq_len": 64, "capture": False, "compile": False}
    with ExitStack() as stack:
        with lending(HostDriver(), 1 << 20, path) as broker, Tenant(TenantConfig(str(path), "idle", floor="64KiB")):
            engine = stack.enter_context(Engine.from_pretrained("tiny-llama", device="cpu", broker=config, **options))
            url = f"http://127.0.0.1:{stack.enter_context(start_metrics_server(engine)).port}"
            engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3, ignore_eos=True))
            # Behind this answer the broker has heard all that the engine said.
            engine.cache._borrowing.tenant.standing()  # type: ignore[attr-defined]
            found, account = exported(engine), broker.books.accounts["chat"]
            assert found["vattn_lease_bytes"] == account.held == engine.cache.held_bytes > 0
            assert found["vattn_lease_budget_bytes"] == account.budget
            lease = engine.stats().cache.lease
            assert lease is not None
            assert found["vattn_lease_wanted_bytes"] == lease.wanted > 0
            assert found["vattn_broker_ended"] == 0
            of_all = exported(engine, slots=True)
            assert of_all["vattn_tenant_lent_byteschat|serving"] == account.held
            assert of_all["vattn_tenant_ceiling_byteschat|serving"] == 512 << 10
            assert of_all["vattn_tenant_wanted_byteschat|serving"] == account.wants
            assert of_all["vattn_tenant_floor_bytesidle|serving"] == 64 << 10
            # Its own connection has no part in it: a late one is shown as the broker tells it.
            account.debts.append((broker.clock() - 7.0, 0))
            assert exported(engine, slots=True)["vattn_tenant_overdue_secondschat|overdue"] >= 7.0
            assert main(["top", url, "--once"]) == 0
            shown = capsys.readouterr().out
            for text in ("tenants", "chat", "overdue", "idle", "asked for", "0.5"):
                assert text in shown, text
        assert exported(engine)["vattn_broker_ended"] == 1
        assert not [name for name in exported(engine, slots=True) if "tenant" in name]
        assert main(["top", url, "--once"]) == 0
        assert "the broker has ended" in capsys.readouterr().out


def test_a_broker_that_hangs_holds_up_nobody_who_watches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BROKER_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as hanging:
        hanging.bind(str(tmp_path / "broker"))
        hanging.listen()
        assert list(tenant_metrics_of(Lease(str(tmp_path / "broker"), "one", 1, 1, 1, False))) == []
    assert list(tenant_metrics_of(Lease(str(tmp_path / "none"), "one", 1, 1, 1, False))) == []


def test_another_programs_metrics_are_refused() -> None:
    registry = prometheus_client.CollectorRegistry()
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
    try:
        with pytest.raises(ConfigError, match="no numbers of an engine"):
            read(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_quantiles_are_bounds_of_buckets() -> None:
    assert first_reached([1.0, 2.0, 5.0], [1, 5, 10], 5) == 2.0
    assert first_reached([1.0], [1], 5) == float("inf")
    assert list(StepTotals.BOUNDS) == sorted(StepTotals.BOUNDS)


def test_a_trace_lines_up_steps_requests_and_driver_calls(watched: tuple[Engine, Path]) -> None:
    engine, path = watched
    for _ in range(3):
        engine.step()
    trace = engine._trace
    assert trace is not None
    trace._flush()
    events = [event for event in read_trace(path) if event["ph"] != "M"]
    names = {event["name"] for event in events}
    assert {
        "reserve",
        "create",
        "map",
        "set_access",
        "step",
        "launch prompts",
        "launch decode",
        "wait for tokens",
    } <= names
    assert {"admit", "sequence placed", "sequence left", "requests", "KV bytes held"} <= names
    spans = [event for event in events if event["ph"] == "X"]
    admits = [span for span in spans if span["name"] in ("admit", "begin_with")]
    maps = [span for span in spans if span["name"] == "map"]
    inside = [m for m in maps for a in admits if a["ts"] <= m["ts"] and m["ts"] + m["dur"] <= a["ts"] + a["dur"]]
    assert inside, "no mapping lies within an admission"
    of_first = [event for event in events if event.get("cat") == "request" and event["id"] == 0]
    assert [event["ph"] for event in of_first] == ["b", "n", "e"]
    assert of_first[-1]["args"] == {"tokens": 3, "finish_reason": "length"}
    steps = [span for span in spans if span["name"] == "step"]
    assert len(steps) == engine.stats().totals.launches
    ends = [step["ts"] + step["dur"] for step in steps]
    assert ends == sorted(ends)


def test_a_map_is_what_the_cache_has(watched: tuple[Engine, Path], tmp_path: Path, capsys: Any) -> None:
    engine, path = watched
    trace, cache = engine._trace, engine.cache
    assert trace is not None
    assert cache._memory.thread.wait_idle(10)  # type: ignore[attr-defined]
    trace._flush()
    space = Space(read_trace(path))
    now = space.at(1e6)
    running = {slot: str(cache.sequence_at(slot)) for slot in range(cache.shape.num_slots)}
    assert now.owners == {slot: name for slot, name in running.items() if name != "None"}
    drawn = {slot: sum(size for _, size, _ in places) for (slot, _), places in now.mapped.items()}
    wanted = {row.slot: row.mapped_bytes for row in engine.slot_stats()}
    wanted[cache.dummy_slot] = cache.driver.granularity()  # type: ignore[attr-defined]
    assert drawn == wanted
    kinds = {now.kind(slot, handle) for (slot, _), places in now.mapped.items() for _, _, handle in places}
    assert {RUNNING, IDLE, DUMMY} <= kinds
    assert (SHARED in kinds) == bool(cache.arena.extent_refs)  # type: ignore[attr-defined]
    before, after = (space.at(seconds) for seconds in space.burst(0.5))
    assert sum(map(len, after.mapped.values())) > sum(map(len, before.mapped.values()))
    picture = tmp_path / "map.png"
    assert main(["map", str(path), "--plot", str(picture), "--burst-s", "0.5"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "sequences" in capsys.readouterr().out
    assert main(["map", str(path), "--plot", str(tmp_path / "new" / "map.png"), "--at-s", "0"]) == 0
    assert f"drawn in {tmp_path}/new/map.png" in capsys.readouterr().out
    assert main(["map", str(path), "--plot", str(picture), "--at-s", "0,1e6"]) == 2
    assert re.search(r"--at-s is 1e\+06, and .*trace.json ends at \d+\.\d+ s; give less", capsys.readouterr().err)


def test_a_trace_without_a_cache_or_driver_is_no_map(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="address spaces of 0 caches"):
        Space([])
    layout = {"name": "address space", "ph": "i", "ts": 1.0, "cat": "cache", "args": {"ranges": [1], "slots": 1}}
    with pytest.raises(ConfigError, match="no driver call"):
        Space([layout])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"ph":"i","ts":1.0}', "is no event"),
        ("3", "is no event"),
        ("[" * 5000 + ",", "line 2: maximum recursion"),
        ('{"name":"address space","ph":"i","ts":1.0}', "not as an engine writes them"),
    ],
)
def test_a_damaged_trace_is_refused(tmp_path: Path, capsys: Any, line: str, said: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(f"[\n{line}\n{line}\n]\n")
    assert main(["map", str(path), "--plot", str(tmp_path / "map.svg")]) == 2
    assert said in capsys.readouterr().err


def test_a_closed_engine_exports_nothing() -> None:
    engine = Engine.from_pretrained("tiny-llama", device="cpu", max_seqs=1, max_seq_len=32, capture=False)
    engine.sleep(kv="drop")
    assert (exported(engine)["vattn_asleep"], exported(engine)["vattn_kv_held_bytes"]) == (1, 0)
    engine.close()
    with pytest.raises(EngineClosed):
        engine.stats()
    assert exported(engine) == {}
    with pytest.raises(ConfigError, match="one rank"):
        Engine.from_pretrained("tiny-llama", device="cpu", tensor_parallel=2, trace="x.json")


def test_log_records_have_fields(
    watched: tuple[Engine, Path], host_driver: HostDriver, caplog: pytest.LogCaptureFixture
) -> None:
    engine, _ = watched
    number = engine.submit([1, 2, 3], SamplingParams(max_tokens=2))
    engine._fail(engine.scheduler.requests[number], "a reason")
    driver = FaultyDriver(host_driver)
    pool = ExtentPool(driver, 1 << 20)
    pool.release(pool.acquire(4096))
    driver.fail("release")
    pool.drop_free()
    pool.close()
    of_request, of_extent = (record for record in caplog.records if record.name.startswith("trtllm_vattn"))
    assert (of_request.name, vars(of_request)["request"]) == ("trtllm_vattn.runtime.engine", number)
    fields = {name: vars(of_extent)[name] for name in ("bytes", "code")}
    assert (of_extent.name, fields) == ("trtllm_vattn.memory.pool", {"bytes": 4096, "code": "CUDA_ERROR_UNKNOWN"})
