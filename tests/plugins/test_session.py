"""Requests over an emulated engine, token for token those of the Engine over the model itself."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from trtllm_vattn.cache.compression import H2O
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins import registry
from trtllm_vattn.plugins.build import build_folder, read_folder
from trtllm_vattn.plugins.emulated import EmulatedContext
from trtllm_vattn.plugins.engine_model import EngineModel
from trtllm_vattn.plugins.networks.spec import PlanLimits
from trtllm_vattn.plugins.session import EngineSession, LoadedEngine
from trtllm_vattn.runtime import Engine, SamplingParams, prefix_reading
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.vmm.open import open_driver

ELSEWHERE = """
import json, sys
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins import registry
from trtllm_vattn.plugins.session import EngineSession, LoadedEngine
from trtllm_vattn.runtime import SamplingParams
from pathlib import Path
prompts = [[1, 2, 3], list(range(40)), list(range(5, 25)), [7] * 11]
with EngineSession.from_folder(sys.argv[1], device="cpu") as session:
    tokens = [done.tokens for done in session.generate(prompts, SamplingParams(max_tokens=24))]
loaded = LoadedEngine.load(Path(sys.argv[1]), "cpu")
with make_cache("vattn", loaded.cache_shape(2), "cpu") as cache:
    registry.attach("kv", cache)
    layer = loaded.engine.layers[0].attach_to_context(None)
    try:
        layer.enqueue([], [], [], [], 0, 0)
    except ConfigError as error:
        refused = str(error)
    registry.detach("kv")
print(json.dumps({"tokens": tokens, "refused": refused}))
"""
PROMPTS = [[1, 2, 3], list(range(40)), list(range(5, 25)), [7] * 11]
LIMITS = PlanLimits(max_lanes=4, max_chunk=32, max_seq_len=128)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return load_model("tiny-llama", "cpu", torch.float32)


@pytest.fixture(scope="module")
def described(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``engine.json`` says of an emulated engine."""
    return build_folder(llama, tmp_path_factory.mktemp("engine"), LIMITS, source="tiny-llama")


def session(model: PreTrainedModel, limits: PlanLimits = LIMITS, slots: int = 4, **options: Any) -> EngineSession:
    loaded = LoadedEngine.emulated(model, limits)
    device = str(model.device)
    return EngineSession(loaded, make_cache("vattn", loaded.cache_shape(slots), device), **options)


def tokens_of(engine: Engine, params: SamplingParams | None = None) -> list[list[int]]:
    params = params or SamplingParams(max_tokens=24)
    return [done.tokens for done in engine.generate(PROMPTS, params)]


def over_the_model(name: str, params: SamplingParams | None = None) -> list[list[int]]:
    model = load_model(name, "cpu", torch.float32)
    with Engine(model, make_cache("vattn", shape_of(model, 4, 128), "cpu")) as engine:
        return tokens_of(engine, params)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral"])
def test_an_engines_tokens_are_the_models(name: str) -> None:
    with session(load_model(name, "cpu", torch.float32)) as engine:
        assert tokens_of(engine) == over_the_model(name)


@pytest.mark.parametrize(
    "options",
    [{"capture": False}, {"steps": 4}, {"steps": 8, "loop": True}, {"buckets": [4]}, {"chunk": 8}],
    ids=str,
)
def test_every_way_of_stepping_gives_the_same(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    with session(llama, **options) as engine:
        assert tokens_of(engine) == over_the_model("tiny-llama")


def test_lanes_over_any_slot(llama: PreTrainedModel) -> None:
    with session(llama, PlanLimits(4, 32, 128, any_slot=True)) as engine:
        assert engine.decode.packed
        assert tokens_of(engine) == over_the_model("tiny-llama")


def test_sampling_is_the_engines(llama: PreTrainedModel) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=5)
    with session(llama) as engine:
        assert tokens_of(engine, params) == over_the_model("tiny-llama", params)


def test_a_step_is_captured_once_and_then_only_replayed(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = over_the_model("tiny-llama")
    executed = []
    execute = EmulatedContext.execute_async_v3

    def counted(self: EmulatedContext, stream: int) -> bool:
        executed.append(self)
        return execute(self, stream)

    monkeypatch.setattr(EmulatedContext, "execute_async_v3", counted)
    with session(llama, chunk=32) as engine:
        captured = len(executed)
        short = [PROMPTS[0], PROMPTS[2]]
        got = [done.tokens for done in engine.generate(short, SamplingParams(max_tokens=24))]
        assert len(executed) == captured, "a captured step ran the engine again"
        assert got == [want[0], want[2]]
        # Each batch size keeps a context of its own, so that none is bound again.
        model = engine.model
        assert isinstance(model, EngineModel)
        assert len({id(context) for context in executed}) == captured == len(model._contexts)


def test_budget_and_memory_change_beneath_the_captured_steps(llama: PreTrainedModel) -> None:
    want = over_the_model("tiny-llama")
    with session(llama) as engine:
        cache = engine.cache
        for round_number in range(3):
            engine.set_budget((4 << 20) + (round_number << 20))
            numbers = [engine.submit(prompt, SamplingParams(max_tokens=24)) for prompt in PROMPTS]
            got: dict[int, list[int]] = {number: [] for number in numbers}
            while engine.busy:
                for event in engine.step():
                    got[event.request].append(event.token)
                for number in numbers:
                    if number in cache._slot_of:  # type: ignore[attr-defined]
                        cache.replace(number)  # type: ignore[attr-defined]
                        break
            assert list(got.values()) == want
            cache.check_integrity()


def test_what_does_not_fit_is_refused(llama: PreTrainedModel) -> None:
    loaded = LoadedEngine.emulated(llama, LIMITS)
    with (
        make_cache("vattn", loaded.cache_shape(5), "cpu") as cache,
        pytest.raises(ConfigError, match=r"the cache has 5 slots of 128 tokens, the plan takes 4 lanes and 128"),
    ):
        EngineSession(loaded, cache)
    without = LoadedEngine.emulated(llama, PlanLimits(4, 0, 128))
    with (
        make_cache("vattn", loaded.cache_shape(4), "cpu") as cache,
        pytest.raises(ConfigError, match="this plan has no context phase"),
    ):
        EngineSession(without, cache)
    other = load_model("tiny-llama", "cpu", torch.bfloat16)
    with (
        make_cache("vattn", shape_of(other, 2, 64), "cpu") as cache,
        pytest.raises(ConfigError, match=r"dtype is torch\.bfloat16"),
    ):
        EngineSession(loaded, cache)


def test_the_name_is_free_again_when_a_session_ends(llama: PreTrainedModel) -> None:
    with session(llama) as engine:
        assert registry.attached("kv").cache is engine.cache
        loaded = engine.loaded
        with (
            make_cache("vattn", loaded.cache_shape(2), "cpu") as cache,
            pytest.raises(ConfigError, match="another cache is attached as 'kv'"),
        ):
            EngineSession(loaded, cache)
        assert registry.attached("kv").cache is engine.cache
    assert not registry.is_attached("kv")
    with make_cache("vattn", loaded.cache_shape(2), "cpu") as cache:
        registry.attach("kv", cache)
        engine.close()
        assert registry.attached("kv").cache is cache
        registry.detach("kv")


def test_a_chunk_of_one_token_is_refused(llama: PreTrainedModel) -> None:
    # A call of one row is a decode step, in which lane i is slot i.
    for limits, options in ((LIMITS, {"chunk": 1}), (PlanLimits(max_lanes=4, max_chunk=1, max_seq_len=128), {})):
        loaded = LoadedEngine.emulated(llama, limits)
        with (
            make_cache("vattn", loaded.cache_shape(4), "cpu") as cache,
            pytest.raises(ConfigError, match="chunk of 1 token would be taken for a decode step"),
        ):
            EngineSession(loaded, cache, **options)
        assert not registry.is_attached("kv")
    anywhere = PlanLimits(max_lanes=4, max_chunk=1, max_seq_len=128, any_slot=True)
    with session(llama, anywhere) as engine:
        assert tokens_of(engine) == over_the_model("tiny-llama")


def test_what_the_plan_decides_is_refused_and_its_chunk_is_a_bound(llama: PreTrainedModel) -> None:
    loaded = LoadedEngine.emulated(llama, LIMITS)
    for options, message in (
        ({"compile": True}, "compile is True, and this plan's is False"),
        ({"packed": True}, "packed is True, and this plan's is False"),
        ({"max_step_tokens": 0}, "max_step_tokens is 0"),
    ):
        with make_cache("vattn", loaded.cache_shape(4), "cpu") as cache, pytest.raises(ConfigError, match=message):
            EngineSession(loaded, cache, **options)
        assert not registry.is_attached("kv")
    with session(llama, max_step_tokens=4096) as engine:
        assert engine.scheduler.chunk == LIMITS.max_chunk
        assert tokens_of(engine) == over_the_model("tiny-llama")


def test_a_plans_layers_read_nothing_in_other_slots(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers attend by themselves: tables of the engine's attention are not theirs, however cheap they seem."""
    monkeypatch.setattr(prefix_reading, "LAYER_US_ON_HOST", 0.0)
    monkeypatch.setattr(prefix_reading, "LEAST_SAVED_ON_HOST", 1)
    with session(llama, attention="torch") as engine:
        first = tokens_of(engine)
        assert tokens_of(engine) == first
        stats = engine.prefix_stats()
        assert stats["cached_tokens"] > 0
        assert "table" not in stats["ways"]


def test_compression_over_a_plan_is_refused(llama: PreTrainedModel) -> None:
    loaded = LoadedEngine.emulated(llama, LIMITS)
    config = CacheConfig(own_lengths=True, extent_classes=1, layers_per_range=1)
    with KVCacheManager(loaded.cache_shape(4), open_driver("cpu"), config=config) as cache:
        with pytest.raises(ConfigError, match="a TensorRT plan, whose own layers attend"):
            EngineSession(loaded, cache, attention="torch", compression=H2O(0.3, 0.3))
        assert not registry.is_attached("kv")


def test_a_folder_without_a_plan_is_emulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "engine"
    # An alias of "emulated", for 0.1.
    arguments = ["plugin", "build", "tiny-llama", "--with", "played", "--dtype", "float32", "--output", str(folder)]
    assert main([*arguments, "--max-lanes", "4", "--max-chunk", "32", "--max-seq-len", "128"]) == 0
    assert "torch computes tiny-llama" in capsys.readouterr().out
    with EngineSession.from_folder(folder, device="cpu") as engine:
        assert tokens_of(engine) == over_the_model("tiny-llama")


@pytest.mark.gpu
def test_a_session_that_cannot_have_its_budget_leaves_nothing_attached(tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    arguments = ["plugin", "build", "tiny-llama", "--with", "emulated", "--dtype", "float32", "--output", str(folder)]
    assert main([*arguments, "--max-lanes", "4", "--max-chunk", "32", "--max-seq-len", "128"]) == 0
    with pytest.raises(ConfigError, match="budget"):
        EngineSession.from_folder(folder, device="cuda:0", attention="torch", budget=1)
    assert not registry.is_attached("kv")


@pytest.mark.usefixtures("whole_models")
def test_a_plan_in_another_process(tmp_path: Path, run_apart: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """What a folder holds is enough, and a layer there asks for its cache by name."""
    folder = tmp_path / "engine"
    arguments = ["plugin", "build", "tiny-llama", "--with", "emulated", "--dtype", "float32", "--output", str(folder)]
    sizes = ["--max-lanes", "4", "--max-chunk", "32", "--max-seq-len", "128", "--cache", "theirs"]
    assert main([*arguments, *sizes]) == 0
    done = run_apart(ELSEWHERE, str(folder))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == over_the_model("tiny-llama")
    assert "no cache is attached as 'theirs' in this process (attached: 'kv')" in found["refused"]


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("options", [{}, {"steps": 4}, {"steps": 8, "loop": True}], ids=str)
def test_on_a_gpu_captured_steps_are_the_eager_ones(options: dict[str, Any]) -> None:
    model = load_model("tiny-llama", "cuda:0", torch.float32)
    with session(model, capture=False, attention="torch") as engine:
        want = tokens_of(engine)
    with session(model, attention="torch", **options) as engine:
        assert tokens_of(engine) == want
        assert tokens_of(engine) == want


def test_the_benchmark_runs_over_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "engine", tmp_path / "graph.json"
    arguments = ["plugin", "build", "tiny-llama", "--with", "emulated", "--dtype", "float32", "--output", str(folder)]
    assert main([*arguments, "--max-lanes", "4", "--max-chunk", "64", "--max-seq-len", "128"]) == 0
    sizes = ["--requests", "4", "--max-output", "6", "--max-seqs", "4", "--max-seq-len", "128"]
    command = ["bench", "graph", "--engine", str(folder), "--device", "cpu", *sizes, "--audit"]
    assert main([*command, "--output-json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["summary"]["tokens_identical"] is True
    assert found["summary"]["audited_graphs"] > 10
    assert found["summary"]["audit_findings"] == 0
    assert [row["mode"] for row in found["results"]["trace"]["runs"]] == ["eager", "captured"]


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (None, {"module": None}, "module is None; it is a str"),
        (None, {"source": ...}, "it has no source; there are module, version"),
        (None, {"limits": []}, r"limits is a list \(\[\]\); it is a dict"),
        ("limits", {"max_lanes": "4"}, "max_lanes is '4'; it is a whole number"),
        ("limits", {"cache": "k\0v"}, "in a text without NUL"),
        ("limits", {"lanes": 4}, "unexpected keyword argument 'lanes'"),
        ("decoder", {"num_layers": ...}, "decoder has no num_layers"),
        ("decoder", {"num_kv_heads": 3}, "4 query heads over 3 kv heads"),
        ("decoder", {"scale": float("nan")}, "scale is nan"),
        ("decoder", {"dtype": "float99"}, "dtype is 'float99'; there are float32"),
        (None, {"module": "tensorrt_rtx"}, "it has no plan_sha256"),
    ],
)
def test_a_description_that_cannot_be_is_refused_with_its_field(
    described: dict[str, Any], tmp_path: Path, part: str | None, changes: dict[str, Any], message: str
) -> None:
    made = json.loads(json.dumps(described))
    into = made if part is None else made[part]
    into.update(changes)
    for name in [name for name, value in into.items() if value is ...]:
        del into[name]
    (tmp_path / "engine.json").write_text(json.dumps(made))
    with pytest.raises(ConfigError, match=f"engine.json describes no engine: .*{message}.* make it anew"):
        read_folder(tmp_path)


def test_a_folder_whose_files_are_no_mappings_is_refused(described: dict[str, Any], tmp_path: Path) -> None:
    for text, message in (("[]", r"it is a list \(\[\]\)"), ("null", "it is None"), ("[" * 100_000, "holds no engine")):
        (tmp_path / "engine.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_folder(tmp_path)
    older = {**described, "limits": {"max_lanes": 4}}
    (tmp_path / "engine.json").write_text(json.dumps(older))
    assert read_folder(tmp_path)["limits"] == asdict(PlanLimits(max_lanes=4))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: .*; make it anew"):
        LoadedEngine.load(tmp_path, "cpu")


def test_trtllm_builds_folders_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trtllm_vattn.plugins.trtllm_folder import is_trtllm_folder, read_trtllm_folder

    interface = json.loads((Path(__file__).parents[1] / "data" / "trtllm_engine_path.json").read_text())
    model = {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_size": 16,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "mapping": {"world_size": 1},
    }
    sizes = {"max_batch_size": 8, "max_input_len": 1024, "max_seq_len": 2048, "max_num_tokens": 512}
    recorded = interface["build"]["engine_config"]
    assert (sorted(model), sorted(sizes)) == (sorted(recorded["pretrained_config"]), sorted(recorded["build_config"]))
    assert not is_trtllm_folder(tmp_path)
    (tmp_path / "rank0.engine").write_bytes(b"")
    assert is_trtllm_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_config": model, "build_config": sizes}))
    monkeypatch.setenv("VATTN_CACHE", "mine")
    config, decoder, limits = read_trtllm_folder(tmp_path)
    assert limits == PlanLimits(8, 512, 2048, cache="mine")
    assert (decoder["scale"], decoder["num_layers"], config.vocab_size) == (0.25, 3, 512)
    model["mapping"] = {"world_size": 2}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_config": model, "build_config": sizes}))
    with pytest.raises(ConfigError, match="is an engine of 2 ranks"):
        read_trtllm_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is not one of trtllm-build's: KeyError"):
        read_trtllm_folder(tmp_path)
