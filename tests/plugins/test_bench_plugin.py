"""The harness: a whole decoder's attention layers called as TensorRT calls them, remapped, checked, counted."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from trtllm_vattn.bench.cases.plugin import PluginWorkload
from trtllm_vattn.cli.main import main
from trtllm_vattn.plugins.plugin import AttentionLayer

SMALL = ["bench", "plugin", "--module", "plain", "--model", "tiny-llama", "--rounds", "2"]


def test_layers_stay_right_while_memory_moves(tmp_path: Path) -> None:
    report = tmp_path / "plugin.json"
    assert main([*SMALL, "--replays", "60", "--device", "cpu", "--output-json", str(report)]) == 0
    found = json.loads(report.read_text())
    summary = found["summary"]
    assert (summary["replays"], summary["graphs"], summary["layers"]) == (60, 2, 2)
    assert summary["python_calls_during_replay"] == summary["enqueues_during_replay"] == 0
    assert summary["remaps"] > 60
    assert summary["checks"] >= 6
    assert max(summary["worst_error"], summary["eager_error"]) < 1e-5
    assert found["results"]["replays"]["sequences"] > 20
    assert "step_ratio" not in summary, "a ratio of Python's own time is no step ratio"
    assert summary["eager_step_ratio"] > 0


def test_a_wrong_output_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    churn = PluginWorkload.churn

    def forgetting(self: PluginWorkload) -> None:
        """Other bytes under a sequence."""
        churn(self)
        for layer in range(self.cache.shape.num_layers):
            slot = int(self.cache.lengths.argmax())
            self.cache.layer(layer).v[slot, :1] += 1

    monkeypatch.setattr(PluginWorkload, "churn", forgetting)
    assert main([*SMALL, "--device", "cpu", "--replays", "12"]) == 1
    assert "from the reference, more than" in capsys.readouterr().err


def test_python_in_a_replay_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A layer that was not captured would be called again in each replay."""
    from trtllm_vattn.graphs.replay import GraphRunner

    def calling(self: GraphRunner, bucket: int, steps: int = 1) -> object:
        return self._step(bucket)

    monkeypatch.setattr(GraphRunner, "replay", calling)
    assert main([*SMALL, "--device", "cpu", "--replays", "4"]) == 1
    output = capsys.readouterr()
    assert "Python ran in a replay" in output.err
    calls = next(line for line in output.out.splitlines() if line.startswith("python_calls_during_replay"))
    assert int(calls.split()[1]) >= 4 * 4


def test_only_shapes_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "plugin", "--model", "/some/checkpoint"]) == 2
    assert "no weights are needed here, give one of tiny-llama" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_on_a_gpu_no_python_runs_and_nothing_is_wrong(tmp_path: Path) -> None:
    report = tmp_path / "plugin.json"
    sizes = ["--model", "small-llama", "--lanes", "8", "--max-seq-len", "512", "--context", "256"]
    assert main([*SMALL, *sizes, "--device", "cuda:0", "--replays", "500", "--output-json", str(report)]) == 0
    summary = json.loads(report.read_text())["summary"]
    assert summary["python_calls_during_replay"] == 0
    assert summary["remaps"] > 200
    assert summary["step_ratio"] > 0


@pytest.mark.gpu
def test_an_eager_layer_allocates_nothing_and_waits_for_nothing() -> None:
    """Two calls of one shape: the second takes no memory and no synchronisation, and may run on any stream."""
    from layers import Layer, fields_of

    from trtllm_vattn.cache.base import CacheShape
    from trtllm_vattn.cache.manager import KVCacheManager
    from trtllm_vattn.plugins import plain, registry
    from trtllm_vattn.plugins.emulated import describe
    from trtllm_vattn.vmm.cuda import CudaDriver

    fields = fields_of(num_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16")
    shape = CacheShape(2, 2, 128, torch.bfloat16, 4, 256)
    with KVCacheManager(shape, CudaDriver(), budget=1 << 28) as cache:
        registry.attach("kv", cache)
        for sequence in range(4):
            cache.admit(sequence, 9)
        layer: AttentionLayer = Layer(fields, "cuda:0").plugin
        own = {name: torch.randn(4, fields.width_of(name), device="cuda").bfloat16() for name in ("q", "k", "v")}
        integers = {name: torch.full((4,), 9, dtype=torch.int32, device="cuda") for name in fields.inputs[3:6]}
        given = {**own, **integers, "extent": torch.zeros(1, dtype=torch.int32, device="cuda")}
        out = torch.zeros_like(own["q"])
        inputs, outputs = describe(plain, fields, 4, 4, 1)
        addresses = [given[name].data_ptr() for name in fields.inputs]
        layer.on_shape_change(inputs, outputs)
        layer.enqueue(inputs, outputs, addresses, [out.data_ptr()], 0, torch.cuda.current_stream().cuda_stream)
        want, side = out.clone(), torch.cuda.Stream()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        with warnings.catch_warnings():
            # torch says that it does not detect everything.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        try:
            layer.enqueue(inputs, outputs, addresses, [out.data_ptr()], 0, side.cuda_stream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if registry.attached("kv").attentions[0].name == "cudnn":
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        torch.cuda.synchronize()
        torch.testing.assert_close(out, want)
        registry.detach("kv")
