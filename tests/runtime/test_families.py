"""Families give transformers' own tokens, or are refused by name before a token, and the model is then as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sweep_families import tiny_config, tiny_model, verdict
from torch import nn
from transformers import PreTrainedModel

from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import bind, shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.families import FAMILIES


# A capture runs the same code as an eager step, so that most families need no eager run of their own.
@pytest.mark.parametrize(
    ("kind", "capture"), [*((kind, True) for kind in FAMILIES), *((kind, False) for kind in list(FAMILIES)[::8])]
)
def test_families_give_the_tokens_of_transformers(kind: str, capture: bool) -> None:
    assert verdict(tiny_config(kind), capture) == ("right", "")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("bert", "attends to what comes after"),
        ("bloom", "computes attention by its own code; families that take ours are Llama, "),
        ("deepseek_v32", "layers of kinds deepseek_sparse_attention"),
        ("diffllama", r"4 \(0, 1, 2, 3\) of its layers call attention more than once"),
        ("doge", "gives attention a mask or a bias of its own"),
        ("gpt2", "a step of GPT2LMHeadModel cannot be captured .use capture=False"),
        ("gpt_bigcode", "a head_dim for all and whole keys and values"),
        ("mamba", "layers of kinds linear_attention"),
        ("mllama", r"1 \(3\) of its 4 layers call no attention"),
        ("mpt", "computes attention by its own code"),
        ("qwen3_next", "layers of kinds linear_attention"),
        ("rwkv", "num_attention_heads is None"),
    ],
)
def test_what_a_cache_does_not_serve_is_refused_by_name(kind: str, why: str) -> None:
    model = tiny_model(tiny_config(kind))
    with pytest.raises(ConfigError, match=why) as raised:
        engine_over(model)
    assert type(model).__name__ in str(raised.value)


def engine_over(model: PreTrainedModel, max_seq_len: int = 64) -> Engine:
    return Engine(model, make_cache("contiguous", shape_of(model, 2, max_seq_len), "cpu"), compile=False)


def mixing(module: nn.Module, given: Any, out: torch.Tensor) -> torch.Tensor:
    """As a causal convolution does."""
    return out + 0.5 * nn.functional.pad(out, (0, 0, 1, -1))


def counting(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Positions by the number of a row, whatever is asked."""
    named["position_ids"] = torch.arange(named["position_ids"].shape[1])[None]
    return given, named


def all_rows(model: PreTrainedModel) -> None:
    forward = model.forward
    model.forward = lambda logits_to_keep=0, **named: forward(**named)


def twice(model: PreTrainedModel) -> None:
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def both(*given: Any, **named: Any) -> Any:
        forward(*given, **named)
        return forward(*given, **named)

    attention.forward = both


def shared(model: PreTrainedModel) -> None:
    model.model.layers[3].self_attn.layer_idx = 1


def not_called(model: PreTrainedModel) -> None:
    model.model.layers[2].self_attn.forward = lambda hidden_states, **named: (hidden_states, None)


def dropping(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.is_causal = False


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.model.layers[1].mlp.register_forward_hook(mixing), "of a token in layer 2 depends on more than"),
        (lambda m: m.model.norm.register_forward_hook(mixing), "the logits of a token depend on other tokens"),
        (lambda m: m.model.rotary_emb.register_forward_pre_hook(counting, with_kwargs=True), "counts positions itself"),
        (lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.5), "by different factors, 0.25, 0.5"),
        (all_rows, "gives the logits of 8 tokens where those of 7 are asked for"),
        (twice, r"1 \(1\) of its layers call attention more than once"),
        (shared, r"1 \(3\) of its 4 layers call no attention .*1 \(1\) of its layers call attention more than once"),
        (not_called, r"1 \(2\) of its 4 layers call no attention"),
        (dropping, "layer 0 attends to what comes after"),
    ],
    ids=["convolution", "last-mixing", "positions", "scales", "logits", "twice", "shared", "not-called", "not-causal"],
)
def test_what_a_model_does_beside_attention_is_found_by_dry_passes(
    change: Callable[[PreTrainedModel], object], why: str
) -> None:
    model = tiny_model(tiny_config("llama"))
    change(model)
    with pytest.raises(ConfigError, match=rf"LlamaForCausalLM \(llama\) is not served: .*{why}"):
        engine_over(model)


@torch.inference_mode()
def test_a_refused_model_is_as_it_was() -> None:
    model, same = (tiny_model(tiny_config("deepseek_v3")) for _ in range(2))
    for each in (model, same):
        each.model.layers[1].mlp.register_forward_hook(mixing)
    with pytest.raises(ConfigError, match="of a token in layer 2 depends on more than"):
        engine_over(model)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(input_ids=ids).logits, same(input_ids=ids).logits)


class Narrower:
    """A configuration that names another window to one layer."""

    sliding_window = 20

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def test_a_window_that_the_model_asks_for_counts_whatever_its_configuration_says() -> None:
    model = tiny_model(tiny_config("mistral", sliding_window=32))
    fitting = shape_of(model, 1, 32)
    needs = bind(model, fitting)
    assert (needs.scale, needs.windows) == (0.25, ())
    assert bind(model, replace(fitting, max_seq_len=33)).windows == (32,) * 4
    model.model.layers[1].self_attn.config = Narrower(model.config)
    with pytest.raises(
        ConfigError, match="layer 1 asks for attention with sliding_window = 20, and its mask shows the"
    ):
        bind(model, replace(fitting, max_seq_len=33))
    chunked = tiny_model(tiny_config("llama4_text", attention_chunk_size=32, no_rope_layers=[1, 1, 1, 1]))
    with pytest.raises(ConfigError, match=r"its mask hides \d+ of \d+ tokens from the last, and not as a"):
        engine_over(chunked, 64)


def test_the_scale_is_what_calls_ask_for() -> None:
    for kind, scale in (("llama", 0.25), ("granite", 0.7), ("opt", 1.0)):
        fields = {"attention_multiplier": scale} if kind == "granite" else {}
        model = tiny_model(tiny_config(kind, **fields))
        assert bind(model, shape_of(model, 1, 32)).scale == pytest.approx(scale), kind
