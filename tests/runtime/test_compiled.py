"""Compiled layers: one function for all of them, nothing left out, the same tokens. Traced on the host, compiled on
the card."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from interrupting import THOROUGH
from sweep_families import tiny_config, tiny_model
from ties import agree, by_request
from torch import nn

from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import CaptureError, ConfigError, ManagerClosed
from trtllm_vattn.runtime.binding import PrefillStep, bind, forward, shape_of
from trtllm_vattn.runtime.compiled import (
    LinearSlice,
    as_it_is,
    compile_around_layers,
    compile_layers,
    merge_projections,
    rewriting,
)
from trtllm_vattn.runtime.decode import DecodeBatch
from trtllm_vattn.runtime.engine import UNUSUAL, Engine
from trtllm_vattn.runtime.families import FAMILIES as FAMILIES_SERVED
from trtllm_vattn.runtime.lane_processors import StepKind
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.prefill import Prefill, packed_prefill
from trtllm_vattn.runtime.sampling import SamplingParams

FAMILIES = ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral"] if THOROUGH else ["tiny-qwen2", "tiny-qwen3"]
PROMPTS = [[1, 2, 3], list(range(20)), [7]]

# How often a layer is traced hangs on how often it is called, and with which sizes.
pytestmark = pytest.mark.usefixtures("whole_models")


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Nothing traced by another test counts."""
    torch._dynamo.reset()


class Tracing:
    """A backend that runs what was traced as it is, and keeps it."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, traced: torch.fx.GraphModule, examples: Sequence[torch.Tensor]) -> Callable[..., Any]:
        self.graphs.append(traced)
        return traced.forward

    def products(self) -> list[int]:
        return [sum(node.target is nn.functional.linear for node in graph.graph.nodes) for graph in self.graphs]

    def attentions(self) -> list[set[str]]:
        """Operations of ours."""
        return [
            {str(node.target) for node in graph.graph.nodes if "trtllm_vattn" in str(node.target)}
            for graph in self.graphs
        ]

    def methods_of_the_unknown(self) -> list[str]:
        """Methods of what is not known to be a tensor: torch compiles graphs that have any anew at each start."""
        calls = [node for graph in self.graphs for node in graph.graph.nodes if node.op == "call_method"]
        return [str(node.target) for node in calls if "example_value" not in node.args[0].meta]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_layers_are_one_function_in_few_variants_and_the_tokens_are_the_same(name: str) -> None:
    tokens = []
    backend = Tracing()
    for compiled in (False, True):
        model = load_model(name, "cpu", torch.float32)
        if compiled:
            bind(model)
            assert compile_layers(model, backend) == model.config.num_hidden_layers == 4
        with Engine(model, make_cache("vattn", shape_of(model, 3, 128), "cpu"), capture=False) as engine:
            done = [*engine.generate(PROMPTS, SamplingParams(12)), *engine.generate([[5]], SamplingParams(12))]
            tokens.append([each.tokens for each in done])
    assert tokens[0] == tokens[1]
    # For any other number of tokens, the last layer of prompts too, and for one token; q, k, v are one product, and
    # gate, up where there are more tokens; turning queries and keys, storing and attending are one operation. Qwen3
    # normalises in between.
    # Both products that a layer adds to the residual do so themselves.
    assert backend.products() == [2, 3, 5]
    onto = "trtllm_vattn.linear_onto.default"
    fused = "trtllm_vattn.rotate_and_attend" + ("" if name == "tiny-qwen3" else "_product")
    assert backend.attentions() == [{fused, onto}, {fused, onto}, {fused}]
    assert backend.methods_of_the_unknown() == []


def in_turn(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    x = x + nn.functional.linear(x * 2, first)
    return nn.functional.linear(x * 3, second) + x


def in_parallel(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    normed = x * 2
    return x + nn.functional.linear(normed, first) + nn.functional.linear(normed * 3, second)


def looked_at_behind(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    total = x + nn.functional.linear(x * 2, first)
    return nn.functional.linear(total * 3, second) + x


def viewed_behind(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    view = x.transpose(1, 2)
    total = x + nn.functional.linear(x * 2, first)
    return nn.functional.linear(total * 3, second) + view.transpose(1, 2)


def added_twice(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    product = nn.functional.linear(x * 2, first)
    return nn.functional.linear(x + product, second) * product


def of_itself(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return x + nn.functional.linear(x.float(), first)


def multiplied_before(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    product = nn.functional.linear(x, first)
    return x + nn.functional.linear(x * 2, second) + product


def written_between(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    twice = x * 2
    product = nn.functional.linear(twice, first)
    twice.add_(1)
    return (x * 3 + twice) + product


def written_by_an_activation(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    total = x + x
    same = nn.functional.relu(total, inplace=True)
    return (total + nn.functional.linear(same * 2, first)) * same


@pytest.mark.parametrize(
    ("function", "onto"),
    [
        *((in_turn, 2), (in_parallel, 2), (looked_at_behind, 1), (viewed_behind, 0), (added_twice, 0), (of_itself, 0)),
        *((multiplied_before, 1), (written_between, 0), (written_by_an_activation, 0)),
    ],
)
@torch.inference_mode()
def test_products_add_to_the_residual_where_nobody_looks_at_it_behind(
    function: Callable[..., torch.Tensor], onto: int
) -> None:
    backend = Tracing()
    compiled = torch.compile(function, backend=partial(rewriting, inner=backend), dynamic=True, fullgraph=True)
    x, first, second = torch.randn(1, 5, 8), torch.randn(8, 8), torch.randn(8, 8)
    want = function(x.clone(), first, second)
    mine = x.clone()
    torch.testing.assert_close(compiled(mine, first, second), want)
    (graph,) = backend.graphs
    assert sum("linear_onto" in str(node.target) for node in graph.graph.nodes) == onto
    # A sum that is no product's is memory of its own.
    assert torch.equal(mine, want) == (onto > 0 and function is not multiplied_before)
    assert torch.equal(mine, x) == (onto == 0)


@pytest.mark.parametrize("kind", list(FAMILIES_SERVED) if THOROUGH else ["deepseek_v3", "smollm3"])
def test_families_compute_compiled_what_they_do_uncompiled(kind: str) -> None:
    done = []
    for compiled in (False, True):
        model = tiny_model(tiny_config(kind))
        if compiled:
            bind(model)
            compile_layers(model, Tracing())
        with Engine(model, make_cache("vattn", shape_of(model, 3, 128), "cpu"), capture=False) as engine:
            done += [engine.generate(PROMPTS, SamplingParams(12, logprobs=1, prompt_logprobs=1))]
    for one, other in zip(*done, strict=True):
        assert one.tokens == other.tokens
        for mine, its in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert mine.logprob == pytest.approx(its.logprob, abs=1e-4)


@torch.inference_mode()
def test_methods_that_write_in_place_are_left_where_nobody_looks_at_their_result() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        made = torch.zeros_like(x)
        made.view(-1).add_(x.view(-1))
        made[..., :1] = 5.0
        return made

    x = torch.randn(1, 5, 8)
    compiled = torch.compile(step, backend=partial(rewriting, inner=Tracing()), dynamic=True, fullgraph=True)
    assert torch.equal(compiled(x), step(x))


@torch.inference_mode()
def test_no_size_of_a_step_or_a_prompt_needs_another_variant() -> None:
    backend = Tracing()
    model = load_model("tiny-llama", "cpu", torch.float32)
    bind(model)
    compile_layers(model, backend)
    assert compile_around_layers(model, backend) == 2
    attention = make_attention("torch", make_cache("contiguous", shape_of(model, 9, 600), "cpu"), 4)
    prefill = Prefill(model, attention, 2048)
    # As an engine starts, then in another order.
    for rows in (UNUSUAL, 512, 256, 100, 17, 16):
        prefill.warm_up(rows)
    batch = DecodeBatch(model, attention, [1, 2, 4, 8, 9])
    for bucket in (9, 8, 4, 2, 1, 9):
        batch._forward(bucket)
    # Layers, angles and the last norm, each for one token and for any other number.
    assert len(backend.graphs) == 6


def test_every_layer_runs_what_was_compiled() -> None:
    ran = []

    def backend(traced: torch.fx.GraphModule, examples: Sequence[torch.Tensor]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            ran.append(1)
            return traced.forward(*arguments)

        return run

    model = load_model("tiny-llama", "cpu", torch.float32)
    bind(model)
    compile_layers(model, backend)
    cache = make_cache("contiguous", shape_of(model, 2, 64), "cpu")
    with Engine(model, cache, capture=False) as engine:
        engine.generate([[1, 2, 3]], SamplingParams(6))
    passes = 6
    assert len(ran) == passes * model.config.num_hidden_layers


@torch.inference_mode()
def test_what_ends_a_step_is_one_function_for_all_batch_sizes() -> None:
    backend = Tracing()
    model = load_model("tiny-llama", "cpu", torch.float32)
    bind(model)
    attention = make_attention("torch", make_cache("contiguous", shape_of(model, 4, 64), "cpu"), 4)
    wrap = partial(torch.compile, backend=backend, dynamic=True)
    batch = DecodeBatch(model, attention, [1, 2, 4], wrap=wrap)
    batch.set_lane(0, token=3, length=1, limit=9)
    for step, bucket in enumerate((4, 2, 1)):
        (logits,) = batch._step(attention.variants[0], StepKind(), bucket)
        assert len(logits) == bucket
        assert batch._out[step % 2, 0] == logits[0].argmax()
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_layer_computes_the_rows_that_are_looked_at_alone(name: str) -> None:
    backend = Tracing()
    logits: list[list[torch.Tensor]] = []
    kept = ([19, 3], [0, 0, 7, 19], [5])
    for compiled in (False, True):
        model = load_model(name, "cpu", torch.float32)
        bind(model)
        if compiled:
            compile_layers(model, backend)
        attention = make_attention("torch", make_cache("contiguous", shape_of(model, 4, 64), "cpu"), 4)
        ids = torch.arange(20)
        numbers = torch.tensor([[20], [20], [19], [0], [0]])
        step = PrefillStep(attention, torch.zeros_like(ids), ids, packed_prefill(numbers, [(20, 20)]))
        with torch.inference_mode():
            logits.append([forward(model, ids, ids, step, torch.tensor(rows)) for rows in kept])
    for want, got, rows in zip(*logits, kept, strict=True):
        assert len(got) == len(rows)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    # A variant for the last layer and any number of kept rows. A single one is not worth another.
    assert len(backend.graphs) == 2
    assert [sum(node.target is torch.index_select for node in graph.graph.nodes) for graph in backend.graphs] == [0, 1]
    (selected,) = (node for node in backend.graphs[1].graph.nodes if node.target is torch.index_select)
    order = list(backend.graphs[1].graph.nodes)
    behind = [node for node in order[order.index(selected) :] if node.target is nn.functional.linear]
    assert len(behind) == 2  # gate and up as one product, down; attention's own output is before


def test_compiling_again_changes_nothing() -> None:
    backend = Tracing()
    model = load_model("tiny-llama", "cpu", torch.float32)
    bind(model)
    for _ in range(3):
        compile_layers(model, backend)
        with Engine(model, make_cache("contiguous", shape_of(model, 2, 64), "cpu"), capture=False) as engine:
            engine.generate([[1, 2, 3]], SamplingParams(4))
    assert len(backend.graphs) == 2


def test_a_layer_that_cannot_be_traced_whole_is_an_error() -> None:
    model = load_model("tiny-llama", "cpu", torch.float32)
    bind(model)
    layer = model.model.layers[1]
    own = layer.mlp.forward
    layer.mlp.forward = lambda x: (torch._dynamo.graph_break(), own(x))[1]
    compile_layers(model, Tracing())
    cache = make_cache("contiguous", shape_of(model, 2, 64), "cpu")
    with Engine(model, cache, capture=False) as engine, pytest.raises(torch._dynamo.exc.Unsupported):
        engine.generate([[1, 2, 3]], SamplingParams(4))


def failing(traced: torch.fx.GraphModule, examples: Sequence[torch.Tensor]) -> Callable[..., Any]:
    raise RuntimeError("no compiler here")


def test_an_engine_that_cannot_compile_leaves_nothing_open_and_the_model_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compiling(model: Any) -> Any:
        compile_layers(model, failing)
        return as_it_is

    monkeypatch.setattr("trtllm_vattn.runtime.engine.compile_model", compiling)
    model = load_model("tiny-llama", "cpu", torch.float32)
    cache = make_cache("vattn", shape_of(model, 2, 64), "cpu")
    with pytest.raises(ConfigError, match=r"cannot be compiled \(use compile=False\): .*no compiler here"):
        Engine(model, cache, compile=True)
    with pytest.raises(ManagerClosed):
        cache.stats()
    # What the error says to do helps.
    with Engine(model, make_cache("vattn", shape_of(model, 2, 64), "cpu"), compile=False, capture=False) as engine:
        assert len(engine.generate([[1, 2, 3]], SamplingParams(4))[0].tokens) == 4


def test_an_engine_that_cannot_capture_closes_its_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(self: Any, step: Any, lanes: int) -> Any:
        raise CaptureError(f"no graphs of {lanes} lanes")

    monkeypatch.setattr("trtllm_vattn.graphs.capture.GraphCapture.capture", refusing)
    model = load_model("tiny-llama", "cpu", torch.float32)
    cache = make_cache("vattn", shape_of(model, 2, 64), "cpu")
    with pytest.raises(ConfigError, match="cannot be captured"):
        Engine(model, cache, compile=False)
    with pytest.raises(ManagerClosed):
        cache.stats()


def test_advice_to_be_less_exact_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def advising(traced: torch.fx.GraphModule, examples: Sequence[torch.Tensor], **_: Any) -> Callable[..., Any]:
        advice = "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. Consider ..."
        warnings.warn(advice, stacklevel=1)
        return traced.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", advising)
    model = load_model("tiny-llama", "cpu", torch.float32)
    bind(model)
    compile_layers(model)
    compile_around_layers(model)
    # Both at a first pass, and at a later one of another kind: of one token.
    with Engine(model, make_cache("vattn", shape_of(model, 2, 64), "cpu"), compile=False, capture=False) as engine:
        engine.generate([[1, 2, 3]], SamplingParams(4))


def test_a_model_without_layers_to_name_is_refused() -> None:
    model = load_model("tiny-llama", "cpu", torch.float32)
    model._no_split_modules = []
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not say which of its modules are layers"):
        compile_layers(model, Tracing())


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2"])
def test_merged_projections_compute_what_they_did(name: str) -> None:
    model = load_model(name, "cpu", torch.float32)
    attention = model.model.layers[2].self_attn
    x = torch.randn(1, 5, 64)
    names = ("q_proj", "k_proj", "v_proj")
    before = [getattr(attention, name)(x) for name in names]
    weights = sum(parameter.numel() for parameter in model.parameters())
    # Two products less for q, k, v and one for gate, up, in each layer.
    assert merge_projections(model) == 3 * 4
    for projection, want in zip(names, before, strict=True):
        part = getattr(attention, projection)
        assert isinstance(part, LinearSlice)
        assert torch.allclose(part(x), want, atol=1e-6)
    assert (attention.q_proj.whole.bias is not None) == (name == "tiny-qwen2")
    assert sum(parameter.numel() for parameter in model.parameters()) == weights
    assert merge_projections(model) == 0


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_compiled_steps_agree_with_plain_ones_on_the_card() -> None:
    from trtllm_vattn.attention.select import available

    if available()["cudnn"] != "yes":
        pytest.skip(available()["cudnn"])
    from torch._dynamo.utils import counters

    prompts = [list(range(1, n)) for n in (4, 40, 2, 17)]
    events = []
    for compiled in (False, True):
        model = load_model("llama-3.2-1b", "cuda:0", torch.bfloat16)
        counters.clear()
        with Engine(
            model,
            make_cache("vattn", shape_of(model, 4, 128), "cuda:0"),
            compile=compiled,
            record_margins=True,
        ) as engine:
            numbers = [engine.submit(prompt, SamplingParams(8)) for prompt in prompts]
            seen = list(engine.run())
            assert (engine.startup.compile_s > 0.5) == compiled
        events.append(by_request(seen, numbers))
    assert counters["stats"]["unique_graphs"] >= 2
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]
    agree(*events)
