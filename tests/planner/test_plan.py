"""The choice: what binds, what is refused, and who takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm_vattn.cache.config import CacheConfig, Layout
from trtllm_vattn.cache.prefix.costs import reuse_costs
from trtllm_vattn.cache.prefix.hybrid import ReuseCosts
from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.planner import Calibration, CostModel, Lengths, ModelShape, Objective, plan
from trtllm_vattn.planner.calibration import DATA, find, folder, load, named, save
from trtllm_vattn.planner.choose import USUAL_CHUNK

# Four layers of Llama-3-8B's, so that there are few layouts.
SHAPE = ModelShape("four layers", 4, 32, 8, 128, 2 << 30)


@pytest.fixture(scope="module")
def model() -> CostModel:
    return CostModel(SHAPE, named("h200"))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lengths(prompt: int, output: int) -> Lengths:
    random = np.random.default_rng(0)
    return Lengths.of(random.integers(prompt // 2, prompt * 3 // 2, 200), random.integers(output // 2, output * 2, 200))


def test_memory_binds_where_it_is_little(model: CostModel) -> None:
    found = plan(model, lengths(2000, 1000), Objective(1 << 30))
    assert found.best.binds == "memory"
    assert found.best.sequences == found.best.capacity < 25
    more = plan(model, lengths(2000, 1000), Objective(64 << 30))
    assert more.best.output_tokens_per_s > found.best.output_tokens_per_s
    assert more.best.sequences > 5 * found.best.sequences


def test_prompts_bind_where_outputs_are_short(model: CostModel) -> None:
    found = plan(model, lengths(4000, 8), Objective(64 << 30))
    assert found.best.binds == "prompts"
    assert found.best.sequences < found.best.capacity / 4


def test_max_seqs_binds_where_memory_is_plenty(model: CostModel) -> None:
    found = plan(model, lengths(100, 2000), Objective(64 << 30, max_seqs=4))
    assert (found.best.binds, found.best.sequences) == ("max_seqs", 4.0)


def test_latency_limits_sequences_and_passes(model: CostModel) -> None:
    wanted = lengths(1000, 4000)
    free = plan(model, wanted, Objective(100 << 30, None, 256, (USUAL_CHUNK,))).best
    held = plan(model, wanted, Objective(100 << 30, free.itl_p99_s / 2, 256, (USUAL_CHUNK,)))
    assert all(each.itl_p99_s <= free.itl_p99_s / 2 for each in held.ranked)
    assert held.best.output_tokens_per_s < free.output_tokens_per_s
    assert held.best.sequences < free.sequences
    assert held.best.max_seqs < 256 == free.max_seqs
    assert held.best.binds == "bandwidth"


def test_of_equal_choices_that_with_less_for_the_driver_goes_first(model: CostModel) -> None:
    found = plan(model, lengths(2000, 200), Objective(64 << 30))
    best = found.best
    assert (best.layout.lookahead, best.layout.extent_classes) == (None, 8)
    alike = [each for each in found.ranked if each.output_tokens_per_s > 0.999 * best.output_tokens_per_s]
    assert best.window_s <= min(each.window_s for each in alike if each.parts.mapping == 0)
    assert len({each.layout.layers_per_range for each in (best, *found.runners_up())}) == 3


def test_given_layers_are_kept(model: CostModel) -> None:
    found = plan(model, lengths(2000, 200), Objective(64 << 30, chunks=(USUAL_CHUNK,)), [2])
    assert {(each.layout.layers_per_range, each.chunk) for each in found.ranked} == {(2, USUAL_CHUNK)}


def test_what_cannot_be_is_refused_with_what_would_be(model: CostModel) -> None:
    with pytest.raises(ConfigError, match=r"the longest request has .* tokens, which take .* give more"):
        plan(model, lengths(4000, 100), Objective(16 << 20))
    with pytest.raises(ConfigError, match=r"no choice is within an ITL p99 of 0.01 ms: one sequence alone would have"):
        plan(model, lengths(4000, 100), Objective(8 << 30, itl_p99_s=1e-5))
    for wrong in (
        {"budget": 0},
        {"budget": 1, "max_seqs": 0},
        {"budget": 1, "itl_p99_s": 0.0},
        {"budget": 1, "chunks": ()},
    ):
        with pytest.raises(ConfigError):
            Objective(**wrong)  # type: ignore[arg-type]


# -- who takes it ------------------------------------------------------------------------------------------------------


def test_a_cache_is_configured_by_it(model: CostModel) -> None:
    chosen = plan(model, lengths(2000, 200), Objective(8 << 30)).best.layout
    config = CacheConfig.auto(SHAPE, lengths(2000, 200), "8GiB", calibration="h200", idle_after_s=5.0)
    assert (config.layers_per_range, config.lookahead, config.extent_classes) == (
        chosen.layers_per_range,
        chosen.lookahead,
        chosen.extent_classes,
    )
    assert config.idle_after_s == 5.0
    # What is given is kept.
    kept = CacheConfig.auto(SHAPE, lengths(2000, 200), 8 << 30, calibration=model.card, layers_per_range=2, lookahead=7)
    assert (kept.layers_per_range, kept.lookahead) == (2, 7)


def test_no_cache_is_configured_without_numbers_or_for_another_layout() -> None:
    with pytest.raises(ConfigError, match=r"no calibration of this machine .*: run trtllm-vattn calibrate"):
        CacheConfig.auto(SHAPE, lengths(2000, 200), "8GiB")
    with pytest.raises(ConfigError, match="a plan is made for rows"):
        CacheConfig.auto(SHAPE, lengths(2000, 200), "8GiB", calibration="h200", layout=Layout.BLOCKS)
    with pytest.raises(ConfigError, match="itl_p99_ms"):
        CacheConfig.auto(SHAPE, lengths(2000, 200), "8GiB", calibration="h200", itl_p99_ms=float("nan"))


def as_host(calibration: Calibration) -> Calibration:
    return Calibration(
        "host", 4096, {}, calibration.numbers, calibration.curves, calibration.sources, calibration.estimated
    )


def test_the_ways_to_a_prefix_take_the_machine_s_numbers_where_there_are_some(model: CostModel) -> None:
    assert reuse_costs("cpu", table_step_us=0.5) == ReuseCosts(table_step_us=0.5)
    save(as_host(model.card), folder() / "host.json")
    found = reuse_costs("cpu", table_step_us=0.5)
    assert found.table_step_us == 0.5
    assert found.set_access_us == model.card.at("set_access_us", 8 * 4096) != ReuseCosts().set_access_us
    assert found.copy_bytes_per_us == pytest.approx(1e-6 * model.card["copy_bytes_per_s"])


def test_a_calibration_of_another_version_stops_no_engine(caplog: pytest.LogCaptureFixture) -> None:
    folder().mkdir(parents=True, exist_ok=True)
    (folder() / "host.json").write_text('{"format": 0}')
    assert reuse_costs("cpu") == ReuseCosts()
    assert "is no calibration of format" in caplog.text


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_measured_calibration_goes_before_the_package_s(model: CostModel) -> None:
    assert find("h200") == load(DATA / "h200.json")
    assert find("host") is None
    save(as_host(model.card), folder() / "h200.json")
    assert named("h200").card == "host"


def broken(change: Any) -> dict[str, Any]:
    given: dict[str, Any] = json.loads((DATA / "h200.json").read_text())
    change(given)
    return given


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(format=7), "no calibration of format 1"),
        (lambda d: d["quantities"].pop("map_us"), "lacks, or has without need, map_us"),
        (lambda d: d["quantities"].update(more={"value": 1}), "without need, more"),
        (lambda d: d["quantities"]["host_us"].update(value=-1), "host_us is -1; it is a number above 0"),
        (lambda d: d["quantities"]["host_us"].update(value=float("nan")), "host_us is nan"),
        (lambda d: d["quantities"]["map_us"].update(value=3), "map_us is 3; it is a list of pairs"),
        (lambda d: d["quantities"]["map_us"].update(value=[[2, 1], [2, 1]]), "the first numbers of its pairs rise"),
        (lambda d: d.update(granularity="2MiB"), "granularity is '2MiB'"),
        (lambda d: d.pop("quantities"), "has no quantities"),
    ],
)
def test_files_that_are_none_are_refused(change: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Calibration.from_dict(broken(change), "here")


def test_files_that_are_not_there_or_no_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    for name in ("x.json", "none.json"):
        with pytest.raises(ConfigError, match="cannot read the calibration"):
            named(str(tmp_path / name))
    with pytest.raises(ConfigError, match="no calibration of 'b300'; the package has h100, h200"):
        named("b300")
    with pytest.raises(ConfigError, match="cannot write the calibration"):
        save(load(DATA / "h200.json"), tmp_path / "x.json" / "below.json")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "lengths.csv"
    rows = [f"{p},{o}" for p, o in zip(range(100, 4000, 100), range(10, 400, 10), strict=True)]
    path.write_text("\n".join(["num_prefill_tokens,num_decode_tokens", *rows]))
    return path


def test_the_command_prints_the_choice_and_what_binds_and_draws(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = tmp_path / "plan.png"
    flags = ["--model", "tiny-llama", "--lengths", str(trace), "--memory", "4GiB", "--calibration", "h100"]
    assert main(["plan", *flags, "--slo", "itl_p99=40ms", "--plot", str(drawn)]) == 0
    said = capsys.readouterr().out
    assert "tiny-llama on h100" in said
    assert "of its numbers are estimated" in said
    assert "what binds: " in said
    assert "CacheConfig(layers_per_range=" in said
    assert said.count("\n|") >= 4
    assert drawn.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--slo", "itl_p99=fast"], "give itl_p99 and a time, as itl_p99=40ms"),
        (["--slo", "ttft=40ms"], "give itl_p99 and a time"),
        (["--slo", "itl_p99=1us"], "no choice is within an ITL p99"),
        (["--memory", "1MiB"], "the longest request has"),
        (["--calibration", "b300"], "no calibration of 'b300'"),
        (["--model", "tiny-gemma3"], "a window of 512 tokens"),
        (["--model", "no/such model"], "no model 'no/such model': it is no directory here"),
        (["--lengths", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_the_command_refuses_at_the_door(
    trace: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = {"--model": "tiny-llama", "--lengths": str(trace), "--memory": "4GiB", "--calibration": "h200"}
    given = {**usual, **dict(zip(flags[::2], flags[1::2], strict=True))}
    arguments = [part for pair in given.items() for part in pair]
    try:
        code = main(["plan", *arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    assert code == 2
    assert said in capsys.readouterr().err


def test_a_file_of_any_name_is_read_as_a_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text("a,b")
    with pytest.raises(ConfigError, match=r"cannot read the calibration mine: it is no JSON .*; give a file that"):
        named("mine")
    with pytest.raises(ConfigError, match=r"cannot read the calibration mine.json: No such file or directory$"):
        named("mine.json")
