"""Layers' graphs are rewritten where they have the form looked for, compute the same, and are left alone elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, rotate_half

from trtllm_vattn.attention.base import rotated
from trtllm_vattn.runtime.rewrites import rotate_with_attention, share_products, split_even_products

HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 16, 5


def test_rotated_is_what_transformers_computes() -> None:
    q, k = torch.randn(1, HEADS, TOKENS, DIM), torch.randn(1, KV_HEADS, TOKENS, DIM)
    cos, sin = torch.randn(2, 1, TOKENS, DIM)
    for x, want in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        got = rotated(x[0].transpose(0, 1), cos[0], sin[0])
        assert torch.equal(got, want[0].transpose(0, 1))


Turn = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def traced(turn: Turn) -> Graph:
    """A layer's attention: parts of a product, turned by `turn` and attended to."""

    def attention(
        x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer: torch.Tensor
    ) -> torch.Tensor:
        qkv = nn.functional.linear(x, weight)
        q, k, v = (
            qkv[..., start * DIM : stop * DIM].view(1, TOKENS, -1, DIM).transpose(1, 2)
            for start, stop in ((0, HEADS), (HEADS, HEADS + KV_HEADS), (HEADS + KV_HEADS, HEADS + 2 * KV_HEADS))
        )
        q, k = turn(q, k, cos, sin)
        rows = [x.transpose(1, 2).reshape(TOKENS, x.shape[1], DIM) for x in (q, k, v)]
        return torch.ops.trtllm_vattn.attend(*rows, layer)  # type: ignore[no-any-return]

    seen: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, examples: Sequence[torch.Tensor]) -> Callable[..., Any]:
        seen.append(graph)
        return lambda *arguments: (torch.zeros(TOKENS, HEADS, DIM),)

    torch._dynamo.reset()
    weight = torch.randn((HEADS + 2 * KV_HEADS) * DIM, 8)
    inputs = torch.randn(1, TOKENS, 8), weight, *torch.randn(2, 1, TOKENS, DIM), torch.tensor(0)
    torch.compile(attention, backend=keep, fullgraph=True)(*inputs)
    return seen[0].graph


def targets(graph: Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "trtllm_vattn" in str(node.target)]


def test_a_turn_before_attention_becomes_attentions() -> None:
    graph = traced(apply_rotary_pos_emb)
    assert rotate_with_attention(graph) == 1
    assert targets(graph) == ["trtllm_vattn.rotate_and_attend_product"]
    assert not any(node.target is torch.cat for node in graph.nodes)
    graph.lint()


def test_what_is_no_part_of_one_product_is_given_as_it_is() -> None:
    graph = traced(lambda q, k, cos, sin: apply_rotary_pos_emb(q * 2, k, cos, sin))
    assert rotate_with_attention(graph) == 1
    assert targets(graph) == ["trtllm_vattn.rotate_and_attend"]


def other_angles(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return apply_rotary_pos_emb(q, q, cos, sin)[0], apply_rotary_pos_emb(k, k, sin, cos)[0]


def half_of_it(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    half = DIM // 2
    angles = cos[..., :half], sin[..., :half]
    turned = apply_rotary_pos_emb(q[..., :half], k[..., :half], *angles)
    return tuple(torch.cat((x, whole[..., half:]), dim=-1) for x, whole in zip(turned, (q, k), strict=True))


def backwards(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return tuple((x * cos) - (rotate_half(x) * sin) for x in (q, k))


def interleaved(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    # Of the same shapes, and not the same.
    return tuple((x * cos) + torch.cat((-x[..., 1::2], x[..., ::2]), dim=-1) * sin for x in (q, k))


def a_quarter(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    cos, sin, at = cos.unsqueeze(1), sin.unsqueeze(1), DIM // 4
    return tuple((x * cos) + torch.cat((-x[..., at:], x[..., :at]), dim=-1) * sin for x in (q, k))


@pytest.mark.parametrize(
    "turn", [other_angles, a_quarter, half_of_it, backwards, interleaved, lambda q, k, cos, sin: (q, k)]
)
def test_other_turns_are_left_alone(turn: Turn) -> None:
    graph = traced(turn)
    assert rotate_with_attention(graph) == 0
    assert targets(graph) == ["trtllm_vattn.attend"]


class Halves(nn.Module):
    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first
        self.weight = nn.Parameter(torch.randn(24, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.linear(x, self.weight)[..., 0 : self.first]
        up = nn.functional.linear(x, self.weight)[..., self.first : 24]
        return nn.functional.silu(gate).sum() * up.sum()


@pytest.mark.parametrize(("first", "products"), [(12, 2), (8, 1)])
def test_products_are_shared_and_equal_parts_of_them_split(first: int, products: int) -> None:
    module, x = Halves(first), torch.randn(3, 8)
    traced = torch.fx.symbolic_trace(module)
    assert share_products(traced.graph) == 1
    assert split_even_products(traced.graph) == products - 1
    traced.recompile()
    assert sum(node.target is nn.functional.linear for node in traced.graph.nodes) == products
    assert torch.allclose(traced(x), module(x))
