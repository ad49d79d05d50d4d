"""New weights by their own names: the tokens of an engine built from them, all or nothing, each token's version."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, WeightsMixed
from trtllm_vattn.runtime import weights
from trtllm_vattn.runtime.binding import bind, shape_of
from trtllm_vattn.runtime.compiled import LinearSlice, compile_layers, merge_projections
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.request import TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.weights import Weights, WeightsState, destinations

MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "mixtral": MOE,
    "qwen3_moe": MOE,
}
PROMPTS = [[1, 2, 3], list(range(20))]
Manifest = dict[str, tuple[torch.Size, torch.dtype]]


def drawn(kind: str = "llama", seed: int = 0, **over: Any) -> PreTrainedModel:
    """A tiny model whose biases and norms are drawn too."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "initializer_range": 0.16,
            **FAMILIES[kind],
            **over,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def engine_of(model: PreTrainedModel, **options: Any) -> Engine:
    cache = make_cache("vattn", shape_of(model, 4, 128), "cpu")
    return Engine(model, cache, **{"compile": False, "capture": False, "buckets": [4], "chunk": 32, **options})


def tokens_of(engine: Engine, count: int = 6) -> list[list[int]]:
    return [each.tokens for each in engine.generate(PROMPTS, SamplingParams(count))]


def built_from(kind: str, seed: int) -> list[list[int]]:
    with engine_of(drawn(kind, seed)) as engine:
        return tokens_of(engine)


def copies(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def manifest_of(tensors: dict[str, torch.Tensor]) -> Manifest:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def as_traced(traced: torch.fx.GraphModule, examples: object) -> Callable[..., Any]:
    return traced.forward


def merged(model: PreTrainedModel) -> PreTrainedModel:
    assert merge_projections(model) > 0
    return model


def compiled(model: PreTrainedModel) -> PreTrainedModel:
    torch._dynamo.reset()
    bind(model)
    compile_layers(model, as_traced)
    return model


# -- the tokens of the new weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "capture"), [*((kind, True) for kind in FAMILIES), *((kind, False) for kind in list(FAMILIES)[:2])]
)
def test_tokens_are_those_of_an_engine_built_from_the_new_weights(kind: str, capture: bool, tmp_path: Path) -> None:
    new = drawn(kind, 9)
    new.save_pretrained(tmp_path)
    ways = [dict(new.named_parameters()), copies(new), load_file(tmp_path / "model.safetensors")]
    first, want = built_from(kind, 0), built_from(kind, 9)
    assert first != want
    model = merged(drawn(kind, 0))
    old = copies(model)
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with engine_of(model, capture=capture) as engine:
        graphs = dict(engine.decode.runner._graphs)
        assert tokens_of(engine) == first
        for way in ways:
            engine.update_weights(way)
            assert tokens_of(engine) == want
            engine.update_weights(old)
            assert tokens_of(engine) == first
        assert engine.weights_version == 6
        assert engine.decode.runner._graphs == graphs
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses


@pytest.mark.parametrize("prepared", [merged, compiled])
def test_merged_and_compiled_layers_compute_with_what_was_written_by_name(
    prepared: Callable[[PreTrainedModel], PreTrainedModel],
) -> None:
    new, model = drawn("qwen2", 9), prepared(drawn("qwen2", 0))
    want, old = built_from("qwen2", 9), copies(model)

    def copy() -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(new.get_parameter(name))

    with engine_of(model, capture=prepared is merged) as engine:
        first = tokens_of(engine)
        for write in (
            lambda: engine.update_weights(new.named_parameters()),
            lambda: model.load_state_dict(new.state_dict()),
            copy,
        ):
            write()
            assert tokens_of(engine) == want
            engine.update_weights(old)
            assert tokens_of(engine) == first != want


def test_a_merged_model_has_the_names_and_the_checkpoint_that_it_had(tmp_path: Path) -> None:
    model = drawn("qwen2")
    names = [[name for name, _ in model.named_parameters()], list(model.state_dict())]
    before = copies(model)
    merged(model)
    assert [[name for name, _ in model.named_parameters()], list(model.state_dict())] == names
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in before)


def test_parameters_separated_from_the_merged_ones_are_merged_again() -> None:
    model = merged(drawn())
    model.double().float()
    part = model.model.layers[0].self_attn.k_proj
    assert isinstance(part, LinearSlice)
    assert not part.intact
    assert merge_projections(model) == 0 + 3 * 2
    assert model.model.layers[0].self_attn.k_proj.intact
    assert merge_projections(model) == 0


def test_the_same_weights_again_change_no_token() -> None:
    model = merged(drawn())
    with engine_of(model, capture=True) as engine:
        before = tokens_of(engine)
        engine.update_weights(model.named_parameters())
        engine.update_weights(copies(model))
        assert tokens_of(engine) == before


def test_every_name_is_a_view_of_what_the_layers_read() -> None:
    model = merged(drawn("qwen3_moe"))
    found = destinations(model)
    assert {name for name, _ in model.named_parameters()} < found.keys()
    expert = found["model.layers.1.mlp.experts.2.up_proj.weight"]
    fused = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    assert expert.owner == "model.layers.1.mlp.experts.gate_up_proj"
    assert expert.view.data_ptr() == fused[2, 48:].data_ptr()
    assert expert.view.shape == (48, 64)
    whole = model.model.layers[0].self_attn.q_proj.whole
    assert found["model.layers.0.self_attn.k_proj.weight"].view.data_ptr() == whole.weight[64:].data_ptr()


def test_float_dtypes_are_converted_and_a_streams_tensors_copied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    new = {name: tensor.double() for name, tensor in copies(drawn(seed=9)).items()}
    pairs = [(a, b) for a, b in weights._in_rows(torch.zeros(5, 4, 8), torch.zeros(5, 4, 8), 100)]
    assert sum(a.numel() for a, _ in pairs) == 5 * 4 * 8
    assert max(a.numel() * 4 for a, _ in pairs) <= 100
    with engine_of(drawn()) as engine:
        engine.update_weights(new)
        assert tokens_of(engine) == built_from("llama", 9)


# -- all or nothing ----------------------------------------------------------------------------------------------------

Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"


def without(tensors: dict[str, torch.Tensor]) -> Any:
    del tensors[Q]
    return tensors


def unknown(tensors: dict[str, torch.Tensor]) -> Any:
    return tensors | {"model.layers.7.self_attn.q_proj.weight": torch.zeros(64, 64)}


def misshapen(tensors: dict[str, torch.Tensor]) -> Any:
    return tensors | {Q: torch.zeros(64, 63)}


def whole_numbers(tensors: dict[str, torch.Tensor]) -> Any:
    return tensors | {Q: torch.zeros(64, 64, dtype=torch.int64)}


def eight_bits(tensors: dict[str, torch.Tensor]) -> Any:
    return tensors | {Q: torch.zeros(64, 64, dtype=torch.float8_e4m3fn)}


def twice(tensors: dict[str, torch.Tensor]) -> Any:
    return [*tensors.items(), (Q, tensors[Q])]


def elsewhere(tensors: dict[str, torch.Tensor]) -> Any:
    return tensors | {Q: torch.zeros(64, 64, device="meta")}


def no_tensor(tensors: dict[str, torch.Tensor]) -> Any:
    return tensors | {Q: [[0.0]]}


def sparse(tensors: dict[str, torch.Tensor]) -> Any:
    return tensors | {Q: torch.zeros(64, 64).to_sparse()}


def names_alone(tensors: dict[str, torch.Tensor]) -> Any:
    return list(tensors)


def one_buffer(tensors: dict[str, torch.Tensor]) -> Any:
    def give() -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.empty(1 << 20)
        for name, tensor in tensors.items():
            yield name, buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)

    return give()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without, f"1 weights are missing: {Q}; give them, or say partial=True"),
        (unknown, "LlamaForCausalLM has no weights named model.layers.7.self_attn.q_proj.weight"),
        (misshapen, rf"{Q} is \(64, 63\), the model's \(64, 64\)"),
        (whole_numbers, f"{Q} is torch.int64, the model's torch.float32"),
        (eight_bits, f"{Q} is torch.float8_e4m3fn, the model's torch.float32"),
        (twice, f"{Q} is given twice"),
        (elsewhere, f"{Q} is on meta; give it on the host or on cpu"),
        (no_tensor, f"{Q} is a list; give a tensor"),
        (sparse, f"{Q} is sparse or quantized"),
        (names_alone, "gave a str; give pairs of name and tensor"),
        (one_buffer, "written to after they were given, as by a generator that gives one buffer again"),
        (lambda tensors: {}, "no weights are given"),
        (lambda tensors: None, "named tensors are a NoneType"),
        (lambda tensors: torch.zeros(2, 2), "named tensors are a Tensor"),
    ],
)
def test_a_wrong_list_changes_nothing(spoil: Callable[[dict[str, torch.Tensor]], Any], message: str) -> None:
    model = drawn()
    before = copies(model)
    with engine_of(model) as engine:
        request = engine.submit([1, 2, 3], SamplingParams(3))
        with pytest.raises(ConfigError, match=message):
            engine.update_weights(spoil(copies(drawn(seed=9))), running="abort")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert (engine.weights_version, engine.weights.state) == (0, WeightsState.CURRENT)
        assert [event.request for event in engine.run()] == [request] * 3


def test_a_manifest_that_is_wrong_is_refused_before_anything_is_asked_of_the_stream() -> None:
    new = copies(drawn(seed=9))
    entries: list[tuple[Any, str]] = [
        ({}, "no weights are given"),
        ({Q: (torch.Size([64, 64]), torch.float32)}, "weights are missing"),
        (manifest_of(new) | {Q: (torch.Size([64]), torch.float32)}, r"is \(64,\), the model's \(64, 64\)"),
        (manifest_of(new) | {Q: torch.float32}, "is torch.float32; give its shape and its torch.dtype"),
        (manifest_of(new) | {Q: ((64, 64), "float32")}, "has dtype 'float32'; give a torch.dtype"),
    ]
    with engine_of(drawn()) as engine:
        for manifest, message in entries:
            stream = iter(new.items())
            with pytest.raises(ConfigError, match=message):
                engine.update_weights(stream, manifest=manifest)
            assert next(stream)[0] == next(iter(new))
        with pytest.raises(ConfigError, match=f"tensors are not those of the manifest: {Q}"):
            engine.update_weights(new, manifest=manifest_of(new) | {Q: ((64, 64), torch.float16)})
        with pytest.raises(ConfigError, match="running is 'stop'; choose continue, restart or abort"):
            engine.update_weights(new, running="stop")  # type: ignore[arg-type]
        assert engine.weights_version == 0


def test_some_weights_alone_are_taken_when_it_is_said() -> None:
    new, model = drawn(seed=9), merged(drawn())
    mixed = drawn()
    with torch.no_grad():
        mixed.get_parameter(K).copy_(new.get_parameter(K))
    with engine_of(mixed) as engine:
        want = tokens_of(engine)
    with engine_of(model, capture=True) as engine:
        before = tokens_of(engine)
        assert engine.update_weights({K: new.get_parameter(K)}, partial=True) == 1
        assert tokens_of(engine) == want != before


def test_tied_weights_are_taken_by_either_name_or_by_both_if_they_agree() -> None:
    new = copies(drawn("gemma", 9))
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    assert {embed, head} < new.keys()
    want = built_from("gemma", 9)
    model = drawn("gemma")
    before = copies(model)
    with engine_of(model, capture=True) as engine:
        for left_out in ([], [embed], [head]):
            engine.update_weights({name: tensor for name, tensor in new.items() if name not in left_out})
            assert tokens_of(engine) == want
            engine.update_weights(before)
    wrong = new | {head: new[head] + 1}
    with engine_of(model) as engine:
        with pytest.raises(ConfigError, match=f"{head} and {embed} are one tensor|{embed} and {head} are one tensor"):
            engine.update_weights(wrong)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        with pytest.raises(ConfigError, match=f"{head} is tied to {embed} and differs"):
            engine.update_weights(iter(wrong.items()), manifest=manifest_of(wrong))
        assert engine.weights.state is WeightsState.MIXED


def test_experts_are_taken_fused_or_one_by_one_and_not_both(tmp_path: Path) -> None:
    new, model = drawn("qwen3_moe", 9), drawn("qwen3_moe")
    new.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    one = "model.layers.0.mlp.experts.3.gate_proj.weight"
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    with engine_of(model) as engine:
        with pytest.raises(ConfigError, match=f"{fused} is given as a whole and in parts"):
            engine.update_weights(saved | {fused: new.get_parameter(fused)})
        with pytest.raises(ConfigError, match=f"1 weights are missing: {one};"):
            engine.update_weights({name: tensor for name, tensor in saved.items() if name != one})
        engine.update_weights({one: saved[one]}, partial=True)
    got = model.get_parameter(fused)
    assert torch.equal(got[3, :48], new.get_parameter(fused)[3, :48])
    assert not torch.equal(got[3, 48:], new.get_parameter(fused)[3, 48:])


def test_parameters_replaced_beneath_graphs_are_refused_by_name() -> None:
    model, new = drawn(), drawn(seed=9)
    with engine_of(model, capture=True) as engine:
        engine.generate(PROMPTS, SamplingParams(2))
        model.load_state_dict(new.state_dict(), assign=True)
        for call in (
            lambda: engine.generate(PROMPTS, SamplingParams(2)),
            lambda: engine.submit([1]),
            lambda: engine.update_weights(new.state_dict()),
        ):
            with pytest.raises(ConfigError, match=r"model.embed_tokens.weight was replaced .* write in place"):
                call()


def test_a_model_without_parameters_is_refused() -> None:
    class Plan(torch.nn.Module):
        device = torch.device("cpu")

    with pytest.raises(ConfigError, match="Plan has no weights to write, as a plan's; build the plan again"):
        Weights(Plan(), True).check({Q: torch.zeros(1)}, None, False)  # type: ignore[arg-type]


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_may_give_one_buffer_again_and_again() -> None:
    new = copies(drawn(seed=9))
    with engine_of(merged(drawn()), capture=True) as engine:
        assert engine.update_weights(one_buffer(new), manifest=manifest_of(new)) == 1
        assert tokens_of(engine) == built_from("llama", 9)


class Broken(RuntimeError):
    pass


def broken(tensors: dict[str, torch.Tensor], after: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield from list(tensors.items())[:after]
    raise Broken("the sender died")


def changed(tensors: dict[str, torch.Tensor], **others: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from list(tensors.items())[:3]
    yield others["name"], others["tensor"]


@pytest.mark.parametrize(
    ("stream", "error", "message"),
    [
        (lambda new: broken(new, 5), Broken, "the sender died"),
        (lambda new: iter(list(new.items())[:5]), ConfigError, "the stream ended without"),
        (lambda new: changed(new, name=next(iter(new)), tensor=new[Q]), ConfigError, "is given twice"),
        (lambda new: changed(new, name="x", tensor=new[Q]), ConfigError, "x is not in the manifest"),
        (lambda new: changed(new, name=K, tensor=new[K].half()), ConfigError, "torch.float16; its manifest says"),
        (lambda new: changed(new, name=K, tensor=new[K][:1]), ConfigError, r"is \(1, 64\) torch.float32; its manif"),
        (lambda new: changed(new, name=K, tensor=new[K].to("meta")), ConfigError, "is on meta"),
    ],
)
def test_a_stream_that_breaks_leaves_an_engine_that_says_so_until_a_full_update(
    stream: Callable[[dict[str, torch.Tensor]], Any], error: type[Exception], message: str
) -> None:
    new = copies(drawn(seed=9))
    with engine_of(drawn(), capture=True) as engine:
        request = engine.submit([1, 2, 3], SamplingParams(8))
        early = engine.step()
        with pytest.raises(error, match=message):
            engine.update_weights(stream(new), manifest=manifest_of(new), running="restart")
        assert (engine.weights_version, engine.weights.state) == (0, WeightsState.MIXED)
        for _ in range(2):
            with pytest.raises(WeightsMixed, match=r"broke after it had begun to write \((Broken|ConfigError): "):
                engine.step()
        with pytest.raises(ConfigError, match=r"only a full one \(partial=False\) mends that"):
            engine.update_weights({Q: new[Q]}, partial=True)
        assert engine.update_weights(new) == 1
        events = [*early, *engine.run()]
        assert [event.request for event in events] == [request] * 8
        assert tokens_of(engine) == built_from("llama", 9)


def test_a_stream_that_breaks_before_its_first_tensor_changes_nothing() -> None:
    new = copies(drawn(seed=9))
    with engine_of(drawn()) as engine:
        before = tokens_of(engine)
        with pytest.raises(Broken):
            engine.update_weights(broken(new, 0), manifest=manifest_of(new))
        assert engine.weights.state is WeightsState.CURRENT
        assert tokens_of(engine) == before


def test_a_broken_engine_can_be_closed() -> None:
    new = copies(drawn(seed=9))
    with engine_of(drawn()) as engine:
        engine.submit([1, 2, 3], SamplingParams(8))
        engine.step()
        with pytest.raises(Broken):
            engine.update_weights(broken(new, 2), manifest=manifest_of(new))


def test_a_stream_that_uses_the_engine_gets_no_token() -> None:
    new = copies(drawn(seed=9))

    def meddling(call: Callable[[Engine], Any]) -> Iterator[tuple[str, torch.Tensor]]:
        first, *rest = new.items()
        yield first
        call(engine)
        yield from rest

    calls: list[tuple[Callable[[Engine], Any], type[Exception], str]] = [
        (lambda engine: engine.generate([[1]], SamplingParams(2)), WeightsMixed, "weights are being updated"),
        (lambda engine: engine.update_weights(new), ConfigError, "another update was made while a stream was asked"),
    ]
    with engine_of(drawn()) as engine:
        for call, error, message in calls:
            with pytest.raises(error, match=message):
                engine.update_weights(meddling(call), manifest=manifest_of(new))
        engine.update_weights(new)


def test_an_interrupt_at_any_instruction_leaves_a_state_that_says_what_the_weights_are() -> None:
    model = drawn(num_hidden_layers=1)
    old, new = copies(model), copies(drawn(seed=9, num_hidden_layers=1))
    serving = Weights(model, captured=True)
    two = {name: new[name] for name in list(new)[:2]}
    left = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != weights.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    seen, at = [], 0
    while True:
        at += 1
        update, left = serving.check(two, None, True), at
        sys.settrace(trace)
        try:
            serving.write(update)
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            sys.settrace(None)
        is_new = [torch.equal(tensor, new[name]) for name, tensor in model.state_dict().items() if name in two]
        seen.append((serving.state, tuple(is_new)))
        serving.write(serving.check(old, None, False))
        assert serving.state is WeightsState.CURRENT
    assert at > 100
    assert {(WeightsState.CURRENT, (False, False)), (WeightsState.MIXED, (True, False))} <= set(seen)
    assert not {(WeightsState.CURRENT, (True, False))} & set(seen)


# -- what runs meanwhile -----------------------------------------------------------------------------------------------


def versions(events: list[TokenEvent], request: int) -> list[int]:
    return [event.weights_version for event in events if event.request == request and event.token is not None]


MOST = 24


def running_engine(**options: Any) -> tuple[Engine, list[int], list[TokenEvent]]:
    """An engine with two sequences decoding, a launch of theirs under way where launches go ahead, and one queued."""
    model = drawn()
    cache = make_cache("vattn", shape_of(model, 2, 128), "cpu")
    engine = Engine(model, cache, compile=False, buckets=[2], chunk=32, **options)
    requests = [engine.submit(prompt, SamplingParams(MOST, ignore_eos=True)) for prompt in (*PROMPTS, [5])]
    events = [event for _ in range(3) for event in engine.step()]
    return engine, requests, events


OPTIONS: list[dict[str, Any]] = [{"capture": False}, {"capture": True}, {"steps": 3}, {"steps": 3, "loop": True}]


@pytest.mark.parametrize("options", OPTIONS)
def test_what_runs_goes_on_and_each_token_has_its_version(options: dict[str, Any]) -> None:
    engine, requests, events = running_engine(**options)
    with engine:
        before = {request: len(versions(events, request)) for request in requests}
        under_way = engine.pipeline.unread.steps if engine.pipeline.unread is not None else 0
        assert under_way == (0 if options.get("loop") else options.get("steps", 1))
        engine.update_weights(copies(drawn(seed=9)))
        assert engine.pipeline.unread is None
        events += engine.run()
        for request in requests[:2]:
            old = before[request] + under_way
            assert versions(events, request) == [0] * old + [1] * (MOST - old)
        assert versions(events, requests[2]) == [1] * MOST
        assert [event.finish_reason for event in events].count("length") == 3


def test_tokens_before_an_update_are_the_old_models_and_after_a_restart_the_new_ones() -> None:
    old, new = drawn(), drawn(seed=9)
    engine, requests, events = running_engine()
    with engine:
        engine.update_weights(copies(new), running="restart")
        assert not engine.scheduler.holders
        events += engine.run()
    for request, prompt in zip(requests, (*PROMPTS, [5]), strict=True):
        tokens = [event.token for event in events if event.request == request]
        known = list(prompt)
        with torch.inference_mode():
            for token, version in zip(tokens, versions(events, request), strict=True):
                logits = (old, new)[version](input_ids=torch.tensor([known]), use_cache=False).logits
                assert token == int(logits[0, -1].argmax())
                known.append(token)
        assert len(tokens) == MOST


def test_what_runs_ends_when_it_is_aborted() -> None:
    engine, requests, events = running_engine()
    with engine:
        assert engine.scheduler.holders
        engine.update_weights(copies(drawn(seed=9)), running="abort")
        assert engine.busy
        events += engine.run()
        assert [engine.cache.sequence_at(slot) for slot in range(2)] == [None, None]
        assert [(event.request, event.finish_reason) for event in events if event.finish_reason] == [
            (request, "abort") for request in requests
        ]
        assert all(event.token is None for event in events if event.finish_reason)
        assert {event.weights_version for event in events} == {0}
        assert tokens_of(engine) == built_from("llama", 9)


def test_drained_tokens_of_sequences_that_end_with_them_are_delivered() -> None:
    model = drawn()
    with engine_of(model) as engine:
        # The prompt's pass gives the first token; a launch of the second, and the last, is under way by then.
        request = engine.submit([1, 2, 3], SamplingParams(2))
        events = engine.step()
        assert engine.scheduler.holders
        engine.update_weights(copies(model))
        assert not engine.scheduler.holders
        events += engine.run()
        assert [(event.request, event.finish_reason) for event in events] == [(request, None), (request, "length")]
        assert not engine.busy


def test_completions_carry_the_version_of_each_token() -> None:
    model = drawn()
    with engine_of(model) as engine:
        assert engine.weights_version == 0
        assert [each.weights_versions for each in engine.generate(PROMPTS, SamplingParams(4))] == [[0] * 4] * 2
        engine.update_weights(copies(model))
        engine.update_weights(copies(model))
        assert [each.weights_versions for each in engine.generate(PROMPTS, SamplingParams(4))] == [[2] * 4] * 2


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("compile", [False, True])
def test_on_the_card_graphs_replay_with_weights_from_the_host_and_from_the_card(
    compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "BUCKET_BYTES", 6000)  # several buffers full for every weight
    old, new = drawn("qwen2"), drawn("qwen2", 9)

    def engine_on_card(model: PreTrainedModel) -> Engine:
        model = model.to("cuda:0", torch.bfloat16)
        return Engine(model, make_cache("vattn", shape_of(model, 4, 128), "cuda:0"), compile=compile, buckets=[4])

    with engine_on_card(drawn("qwen2", 9)) as engine:
        want = tokens_of(engine)
    with engine_on_card(drawn("qwen2")) as engine:
        first = tokens_of(engine)
        graphs = dict(engine.decode.runner._graphs)
        there = {name: tensor.to("cuda:0") for name, tensor in copies(new).items()}
        for way in (copies(new), there, {name: tensor.bfloat16() for name, tensor in there.items()}):
            engine.update_weights(way)
            assert tokens_of(engine) == want
            pinned = {name: tensor.pin_memory() for name, tensor in copies(old).items()}
            engine.update_weights(iter(pinned.items()), manifest=manifest_of(pinned))
            assert tokens_of(engine) == first != want
        assert engine.decode.runner._graphs == graphs
        engine.audit()
        request = engine.submit([1, 2, 3], SamplingParams(24))
        events = [event for _ in range(4) for event in engine.step()]
        engine.update_weights(there)
        events += engine.run()
        assert {event.weights_version for event in events if event.request == request} == {6, 7}
