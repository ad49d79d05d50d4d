"""Plots that can be read: logarithmic axes in plain numbers, and nothing of a device that was not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trtllm_vattn.bench.publish import plots as plot

HOST = {"gpu": None}
GPU = {"gpu": {"name": "NVIDIA H200"}}


def texts(
    monkeypatch: pytest.MonkeyPatch, draw: Any, result: dict[str, Any], path: Path
) -> tuple[list[str], list[Any]]:
    """Everything that is written in a plot, and its axes."""
    found: list[str] = []
    axes: list[Any] = []
    pyplot = plot.pyplot()
    close = pyplot.close

    def look(figure: Any) -> None:
        found.append(figure.get_suptitle())
        for axis in figure.axes:
            axes.append(axis)
            ticks = [label.get_text() for which in (axis.xaxis, axis.yaxis) for label in which.get_ticklabels()]
            found.extend([axis.get_title(), axis.get_xlabel(), axis.get_ylabel(), *ticks])
        close(figure)

    monkeypatch.setattr(pyplot, "close", look)
    draw(result, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    return [text for text in found if text], axes


def burst(machine: dict[str, Any], device: str) -> dict[str, Any]:
    steps = {phase: [1.0, 2.0] for phase in ("before", "during", "after")}
    spent = {"create": 0.3, "map": 40.0, "set_access": 2500.0}
    rows = [{"variant": "vattn, cold", "round": 0, "steps": steps, "mappings": 3, "driver_ms": spent}]
    config = {"device": device, "model": "tiny-llama"}
    return {"benchmark": "burst", "machine": machine, "config": config, "results": {"bursts": rows}}


def alloc(machine: dict[str, Any], device: str) -> dict[str, Any]:
    rows = [
        {"how": "one by one", "size": size, "busy": busy, "call": "map", "us": {"p50": 0.7 * size, "p99": 3.0 * size}}
        for size in (4096, 8192, 65536)
        for busy in (False, True)
    ]
    results = {"granule": 4096, "calls": rows}
    return {"benchmark": "alloc", "machine": machine, "config": {"device": device}, "results": results}


@pytest.mark.parametrize(("machine", "device"), [(HOST, "cpu"), (GPU, "cpu"), (GPU, "cuda:0")])
@pytest.mark.parametrize("what", ["burst", "alloc"])
def test_a_plot_names_the_machine_of_its_own_result(
    what: str, machine: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    draw, made = (plot.plot_burst, burst) if what == "burst" else (plot.plot_alloc, alloc)
    found, _ = texts(monkeypatch, draw, made(machine, device), tmp_path / "plot.png")
    whole = " | ".join(found)
    assert ("NVIDIA H200" in whole) is (device != "cpu")
    assert ("device" in whole) is (device != "cpu")
    assert ("the host" in whole) is (device == "cpu")


@pytest.mark.parametrize(("what", "unit"), [("burst", " ms"), ("alloc", " us")])
def test_logarithmic_axes_have_ticks_in_plain_numbers(
    what: str, unit: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    draw, made = (plot.plot_burst, burst) if what == "burst" else (plot.plot_alloc, alloc)
    found, axes = texts(monkeypatch, draw, made(HOST, "cpu"), tmp_path / "plot.png")
    logarithmic = [axis for axis in axes if axis.get_yscale() == "log" and axis.get_ylabel()]
    assert logarithmic
    for axis in logarithmic:
        low, high = axis.get_ylim()
        labels = [
            label.get_text()
            for label, at in zip(axis.yaxis.get_ticklabels(), axis.get_yticks(), strict=True)
            if low <= at <= high
        ]
        assert len([label for label in labels if label.endswith(unit)]) >= 3, labels
        assert len([at for at in axis.yaxis.get_minorticklocs() if low <= at <= high]) >= 5
    assert not [text for text in found if "$" in text or "^" in text or "e+" in text]


@pytest.mark.parametrize(
    ("value", "text"), [(0.001, "0.001"), (0.2, "0.2"), (5, "5"), (1.5, "1.5"), (1000, "1,000"), (2e6, "2,000,000")]
)
def test_a_number_has_no_exponent(value: float, text: str) -> None:
    assert plot._plain(value) == text


def test_times_of_a_hosts_replays_are_not_drawn_beside_eager_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory = {"time_s": [0.0, 1.0], "mapped_bytes": [1, 2], "live_bytes": [1, 1]}
    step = {"p50": 1.0, "p99": 2.0}
    runs = [{"cache": "vattn", "mode": mode, "step_ms": step, "memory": memory} for mode in ("eager", "captured")]
    for machine, device, drawn in ((HOST, "cpu", 1), (GPU, "cuda:0", 2)):
        config = {"device": device, "model": "tiny-llama"}
        results = {"trace": {"runs": runs}, "steady": None}
        result = {"benchmark": "graph", "machine": machine, "config": config, "results": results}
        found, axes = texts(monkeypatch, plot.plot_graph, result, tmp_path / "plot.png")
        assert len(axes) == drawn
        assert any("ms" in text for text in found) is (drawn == 2)
