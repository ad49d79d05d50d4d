"""Hugging Face models, their code unmodified, over one of our caches.

The model's own code calls an attention function found by name, which is ours: it stores K and V and attends. Which
tokens a call is about stands in a `Step` that is current while the model runs (the idea of vLLM's forward context): a
compiled layer sees one opaque operation and nothing of the step, so it is compiled once for all layers and steps.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, Cache, PreTrainedModel

from trtllm_vattn.attention.base import Attention, PackedPrefill
from trtllm_vattn.attention.options import FP8, LayerOptions
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime import latents
from trtllm_vattn.runtime.dry_pass import TOKENS, AttentionNeeds, attention_needs, cannot_serve
from trtllm_vattn.runtime.families import FAMILIES
from trtllm_vattn.runtime.kv_dtype import KVScales, check_kv_cache_dtype
from trtllm_vattn.runtime.step_model import StepModel

ATTENTION_NAME = "trtllm_vattn"


class Step(Protocol):
    """One forward pass: where its tokens' K and V go, and what its queries attend to."""

    @property
    def attention(self) -> Attention: ...

    @property
    def slots(self) -> torch.Tensor: ...

    @property
    def positions(self) -> torch.Tensor: ...

    @property
    def packed(self) -> PackedPrefill | None:
        """The chunks of prompts in it; None without any."""

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """q ``[tokens, num_heads, head_dim]`` to the same shape."""


@dataclass(frozen=True)
class DecodeStep:
    """One token a lane. slots, positions int64 ``[lanes]``; lengths int32 ``[lanes]``; all on the device.

    Lane i reads slot i, or with `anywhere` the slot that it writes to.
    """

    attention: Attention
    slots: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    anywhere: bool = False
    packed: None = None

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        return self.attention.decode(layer, q, self.lengths, self.slots if self.anywhere else None)


@dataclass(frozen=True)
class VerifyStep:
    """A token and drafts of each lane, one lane after another: as many rows each, of which the first count.

    slots, positions int64 ``[lanes * queries]``; lengths, query_lens int32 ``[lanes]``, as `Attention.decode_queries`
    takes them; all on the device. Lane i reads slot i, or ``lane_slots[i]``, int64 ``[lanes]``.
    """

    attention: Attention
    slots: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    query_lens: torch.Tensor
    lane_slots: torch.Tensor | None = None
    packed: None = None

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        by_lane = q.reshape(len(self.lengths), -1, *q.shape[1:])
        out = self.attention.decode_queries(layer, by_lane, self.query_lens, self.lengths, self.lane_slots)
        return out.reshape(q.shape)


@dataclass(frozen=True)
class PrefillStep:
    """Chunks of prompts packed one after another, padded at the end; a single chunk may contain the padding.

    slots, positions int64 ``[padded]``.
    """

    attention: Attention
    slots: torch.Tensor
    positions: torch.Tensor
    packed: PackedPrefill

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        if len(self.packed.chunks) > 1 or self.attention.captures_prompts:
            return self.attention.prefill_packed(layer, q, self.packed)
        return self.attention.prefill(layer, q, self.packed.chunks[0])


@dataclass(frozen=True)
class MixedStep:
    """One token each of decoding sequences in the first rows, chunks of prompts behind them, padding last.

    slots, positions int64 ``[rows]``; decode_lengths int32 ``[lanes]``, decode_slots int64 ``[lanes]``; all on the
    device (`Attention.attend_mixed`).
    """

    attention: Attention
    slots: torch.Tensor
    positions: torch.Tensor
    decode_lengths: torch.Tensor
    decode_slots: torch.Tensor
    packed: PackedPrefill

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        return self.attention.attend_mixed(layer, q, self.decode_lengths, self.decode_slots, self.packed)


class _Current(threading.local):
    """The step of the forward pass under way in a thread; None between passes."""

    step: Step | None = None


_current = _Current()


def end_pass() -> None:
    """No forward pass is under way in this thread, whatever one that was interrupted has left."""
    _current.step = None


def current_step() -> Step:
    """The step of the forward pass under way. Raises ConfigError outside of one."""
    if _current.step is None:
        raise ConfigError("this model is bound to a trtllm_vattn cache; run it through its Engine")
    return _current.step


class BoundCache(Cache):  # type: ignore[misc]
    """What the model takes for its cache; K and V are stored by the attention function."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both as they are."""
        return key_states, value_states


def _attend_noted(step: Step, layer: int, q: torch.Tensor) -> torch.Tensor:
    """`Step.attend` of queries as keys are stored, which are noted where a policy of eviction asks for them."""
    if step.attention.query_log is not None:
        step.attention.query_log.note(layer, q, step.slots, step.positions)
    return step.attend(layer, q)


def _store_and_attend(
    layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """q ``[tokens, num_heads, head_dim]`` to the same shape; k, v ``[tokens, num_kv_heads, head_dim]``; sinks
    ``[num_heads]``, a further logit of each head."""
    step = current_step()
    if sinks is not None:
        logits = step.attention.options[layer].sink_logits
        assert logits is not None
        logits.copy_(sinks)
    step.attention.write(layer, k, v, step.slots, step.positions)
    return _attend_noted(step, layer, q)


@torch.library.custom_op("trtllm_vattn::attend", mutates_args=())
def _opaque_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: torch.Tensor, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """`_store_and_attend` as one operation of a compiled layer; layer int64 ``[]`` on the host, so that all layers are
    one compiled function."""
    return _store_and_attend(int(layer), q, k, v, sinks).contiguous()


@_opaque_attend.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: torch.Tensor, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("trtllm_vattn::attend_keeping", mutates_args=())
def _opaque_attend_keeping(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """`attend`, in the last layer of a pass of which the rows `kept` alone, int64 ``[rows]``, are looked at after it
    (`rewrites.keep_rows`)."""
    return _store_and_attend(int(layer), q, k, v).contiguous()


@_opaque_attend_keeping.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("trtllm_vattn::rotate_and_attend", mutates_args=())
def _opaque_rotate_and_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer: torch.Tensor
) -> torch.Tensor:
    """`attend` of queries and keys that are turned first; cos, sin ``[1, tokens, head_dim]``."""
    return _rotate_and_attend(q, k, v, cos, sin, layer)


def _rotate_and_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer: torch.Tensor
) -> torch.Tensor:
    step, number = current_step(), int(layer)
    q = step.attention.rotate_and_write(number, q, k, v, cos[0], sin[0], step.slots, step.positions)
    return _attend_noted(step, number, q).contiguous()


@_opaque_rotate_and_attend.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer: torch.Tensor
) -> torch.Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("trtllm_vattn::rotate_and_attend_product", mutates_args=())
def _opaque_rotate_and_attend_product(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer: torch.Tensor, heads: int, kv_heads: int
) -> torch.Tensor:
    """`rotate_and_attend` of the parts of one product, ``[1, tokens, (heads + 2 * kv_heads) * head_dim]``."""
    q, k, v = torch.split(qkv.view(qkv.shape[1], -1, cos.shape[-1]), [heads, kv_heads, kv_heads], dim=1)
    return _rotate_and_attend(q, k, v, cos, sin, layer)


@_opaque_rotate_and_attend_product.register_fake
def _(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer: torch.Tensor, heads: int, kv_heads: int
) -> torch.Tensor:
    return qkv.new_empty(qkv.shape[1], heads, cos.shape[-1])


@torch.library.custom_op("trtllm_vattn::linear_onto", mutates_args=("residual",))
def _opaque_linear_onto(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """``residual += x @ weight.T`` in the product's kernel; residual ``[1, tokens, out]``, x ``[1, tokens, in]``."""
    residual[0].addmm_(x[0], weight.t())


@_opaque_linear_onto.register_fake
def _(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    return None


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function registered with transformers: query ``[1, num_heads, tokens, head_dim]``, key and value
    ``[1, num_kv_heads, tokens, head_dim]`` to ``[1, tokens, num_heads, head_dim]``, over the cache."""
    if latents.keeps_latents(module):
        return _attend_latents(module, query, key, value), None
    batch, heads, tokens, dim = query.shape
    q = query.transpose(1, 2).reshape(batch * tokens, heads, dim)
    k, v = (x.transpose(1, 2).reshape(batch * tokens, x.shape[1], dim) for x in (key, value))
    out = _attend(module, q, k, v, kwargs.get("s_aux"))
    return out.view(batch, tokens, heads, dim), None


def _attend(
    module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    if not torch.compiler.is_compiling():
        return _store_and_attend(module.layer_idx, q, k, v, sinks)  # type: ignore[arg-type]
    ops, layer = torch.ops.trtllm_vattn, module.vattn_layer
    kept: Any = module.vattn_kept
    out: torch.Tensor
    if sinks is not None:
        out = ops.attend(q, k, v, layer, sinks)
    elif kept is None:
        out = ops.attend(q, k, v, layer)
    else:
        out = ops.attend_keeping(q, k, v, layer, kept)
    return out


def _attend_latents(
    module: torch.nn.Module, query: torch.Tensor, latent: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """`attend` over rows of latents (latents.py), to ``[1, tokens, num_heads, v_head_dim]``."""
    rows, queries = latents.rows_and_queries(module, query, latent, positions)
    return latents.values(module, _attend(module, queries, rows, rows))[None]


def shape_of(model: StepModel, num_slots: int, max_seq_len: int, kv_cache_dtype: str = "auto") -> CacheShape:
    """The shape of a cache for this model, by its configuration; layers with sliding windows keep those alone
    (`CacheShape.windows`; replaced by none, a cache keeps all tokens for them too). `kv_cache_dtype` is ``auto``, for
    the model's own dtype, or ``fp8``.

    Raises
    ------
    ConfigError
        The configuration names no heads or layers, or other ones by layer; or the model has fewer positions than
        `max_seq_len`, or layers of a kind that no cache serves.
    """
    config = model.config.get_text_config()
    refuse_family(config, type(model).__name__)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other := sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"}):
        raise ConfigError(
            f"{type(model).__name__} ({config.model_type}) is not served: it has layers of kinds {', '.join(other)}, "
            "whose needs no cache here holds; a cache serves full attention only"
        )
    windows = windows_of(config)
    if not isinstance(model, PreTrainedModel) and has_windows(config, max_seq_len):
        raise ConfigError(
            f"{type(model).__name__} attends to windows of {sorted({each for each in windows if each})} tokens in some "
            f"layers, and serves full attention only; lower max_seq_len from {max_seq_len} to the window"
        )
    refuse_longer(max_seq_len, positions_of(config))
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    sizes = {name: _field(config, name) for name in names}
    sizes["num_key_value_heads"] = _field(config, "num_key_value_heads", sizes["num_attention_heads"])
    sizes["head_dim"] = _field(config, "head_dim", 1)
    unclear = [f"{name} is {value!r}" for name, value in sizes.items() if not isinstance(value, int) or value < 1]
    if unclear:
        raise ConfigError(
            f"{type(model).__name__} ({config.model_type}) is not served: in its configuration {', '.join(unclear)}; a "
            "cache has as many heads of keys and values, as large, in each layer"
        )
    head_dim = getattr(config, "head_dim", None) or sizes["hidden_size"] // sizes["num_attention_heads"]
    row = latents.latent_size(model) if isinstance(model, PreTrainedModel) else None
    return CacheShape(
        num_layers=sizes["num_hidden_layers"],
        num_kv_heads=1 if row else sizes["num_key_value_heads"],
        head_dim=row or head_dim,
        kv_factor=1 if row else 2,
        dtype=check_kv_cache_dtype(kv_cache_dtype) or model.dtype,
        num_slots=num_slots,
        max_seq_len=max_seq_len,
        windows=windows,
    )


def windows_of(config: Any) -> tuple[int | None, ...]:
    """Each layer's window, as a configuration names it; empty without any."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not window:
        return ()
    kinds = kinds or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _field(config: Any, name: str, otherwise: Any = None) -> Any:
    """A configuration's field, or where it has none, something else."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' for a field of heterogeneous layers
        return "another by layer"
    return otherwise if value is None else value


def refuse_family(config: Any, name: str) -> None:
    """Raise ConfigError for a configuration of what is no decoder over keys and values, or that turns positions by
    frequencies that depend on the longest sequence of a pass."""
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{name} ({config.model_type}) is not served: it has an encoder, whose states no cache holds")
    turning = {kind for each in _rope_of(config) if (kind := each.get("rope_type")) in ("dynamic", "longrope")}
    if turning:
        raise ConfigError(
            f"{name} has rope_type {turning.pop()}, by which the longest sequence of a batch changes the "
            "tokens of all; use a model with fixed frequencies (default, linear, llama3, yarn)"
        )


def _rope_of(config: Any) -> list[dict[str, Any]]:
    """A configuration's RoPE parameters; several where they differ by the kind of a layer."""
    whole = getattr(config, "rope_parameters", None) or {}
    by_kind = [each for each in whole.values() if isinstance(each, dict)]
    return by_kind or ([whole] if whole else [])


def has_windows(config: Any, max_seq_len: int) -> bool:
    """Whether a layer's window is shorter than the longest sequence; else it keeps all tokens."""
    return any(window and window < max_seq_len for window in windows_of(config))


def refuse_longer(max_seq_len: int, positions: int | None, model: str = "the model") -> None:
    """Raise ConfigError for longer sequences than a model has positions for; None is no bound."""
    if positions is not None and max_seq_len > positions:
        raise ConfigError(f"max_seq_len is {max_seq_len}, {model} has {positions} positions; give {positions} or fewer")


def positions_of(config: Any) -> int | None:
    """How many positions a model has; None where its configuration names no bound.

    ``linear`` stretches the positions a model was trained with by its factor, and ``yarn`` those that its parameters
    call original (transformers takes max_position_embeddings where they do not). A configuration may name the longer
    context itself, as those of ``llama3`` always do; the larger one holds. Where layers of different kinds turn
    differently, the least stretched bounds. (vLLM derives max_model_len the same way.)
    """
    named = _field(config, "max_position_embeddings")
    if not isinstance(named, int):
        return None
    return max(named, min((_stretched(each, named) for each in _rope_of(config)), default=named))


def _stretched(rope: dict[str, Any], named: int) -> int:
    factor = rope.get("factor") or 1.0
    if rope.get("rope_type") == "linear":
        return int(named * factor)
    if rope.get("rope_type") == "yarn":
        return int((rope.get("original_max_position_embeddings") or named) * factor)
    return named


def check_fit(model: StepModel, shape: CacheShape) -> None:
    """Raise ConfigError where a cache's shape is not the model's, naming what differs."""
    needed = shape_of(model, shape.num_slots, shape.max_seq_len)
    names = ["num_layers", "num_kv_heads", "head_dim", "kv_factor"]
    # Rows of eight bits are for any model, and so is a cache that keeps all tokens.
    names += ["dtype"] if shape.dtype != FP8 else []
    names += ["windows"] if shape.windows else []
    differing = [
        f"{name} is {getattr(shape, name)}, the model's {getattr(needed, name)}"
        for name in names
        if getattr(shape, name) != getattr(needed, name)
    ]
    if differing:
        raise ConfigError(
            f"the cache does not fit the model: {'; '.join(differing)}; build it with shape_of(model, ...)"
        )


def scale_of(model: StepModel) -> float | None:
    """The factor by which the model's attention scales scores, as its modules name it; None where they do not.

    Raises ConfigError where they name different ones.
    """
    values = (vars(module).get("scaling") for module in model.modules())
    named = {float(value) for value in values if isinstance(value, float | int)}
    if len(named) > 1:
        raise ConfigError(f"{type(model).__name__} scales scores by different factors, {sorted(named)}, by layer")
    return named.pop() if named else None


def bind(model: StepModel, shape: CacheShape | None = None) -> AttentionNeeds:
    """Point a Hugging Face model's attention at ours, after dry passes (dry_pass.py); its code stays as it is. Another
    model calls our attention by itself.

    Returns what its attention needs of a backend. Windows are looked for up to the `max_seq_len` of `shape`; without
    one, only what any cache asks of the model is.

    Raises
    ------
    ConfigError
        The model does not let its attention be chosen, or a cache of this shape does not serve it: the message says
        what it does. Its attention is what it was, then.
    """
    config = model.config.get_text_config()
    refuse_family(config, type(model).__name__)
    if not isinstance(model, PreTrainedModel):
        return AttentionNeeds(scale_of(model))
    if not model._supports_attention_backend:
        names = ", ".join(each.name for each in FAMILIES.values())
        raise cannot_serve(model, f"it computes attention by its own code; families that take ours are {names}")
    model.eval()
    before = config._attn_implementation
    latents.keep_latents(model)
    try:
        needs = attention_needs(model, shape or shape_of(model, 1, TOKENS), BoundCache())
        _point_at_ours(model)
    except BaseException:
        model.set_attn_implementation(before)
        latents.expand_again(model)
        raise
    return needs


def options_for(
    needs: AttentionNeeds, shape: CacheShape, device: torch.device, scales: KVScales | None = None
) -> list[LayerOptions]:
    """What a backend over a cache of this shape is told of each layer. Sinks are in float32; each step copies them from
    the model's parameters. Scales are copied to the model's device."""

    def of(layer: int, values: Sequence[Any] | torch.Tensor) -> Any:
        return values[layer] if len(values) else None

    def copied(values: Sequence[Any] | torch.Tensor, layer: int) -> torch.Tensor | None:
        value = of(layer, values)
        return None if value is None else value.detach().to(device, torch.float32, copy=True)

    return [
        LayerOptions(
            window=of(layer, needs.windows),
            sink_logits=copied(needs.sinks, layer),
            softcap=of(layer, needs.softcaps),
            k_scale=copied(scales.k if scales is not None else (), layer),
            v_scale=copied(scales.v if scales is not None else (), layer),
        )
        for layer in range(shape.num_layers)
    ]


def _point_at_ours(model: PreTrainedModel) -> None:
    AttentionInterface.register(ATTENTION_NAME, attend)
    model.set_attn_implementation(ATTENTION_NAME)
    layers = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    for module in layers:
        # A number would be compiled in, and every layer compiled again.
        module.vattn_layer = torch.tensor(module.layer_idx, device="cpu")
        module.vattn_kept = None
    # No submodules of the model: they have their names elsewhere.
    last = max((module.layer_idx for module in layers), default=0)
    model.__dict__["vattn_last_layer"] = [module for module in layers if module.layer_idx == last]
    model.eval()


def forward(
    model: StepModel,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    step: Step,
    last: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits ``[tokens, vocab]`` of tokens, positions int64 ``[tokens]``; of the rows `last` alone (int64 on the
    device) where given.

    Lanes of a decode step, too, go in as tokens of one sequence: which of them attend to what is the step's business,
    and the model is the same for both.
    """
    keep = {} if last is None else {"logits_to_keep": last}
    ends = getattr(model, "vattn_last_layer", ()) if last is not None and 1 < len(last) < len(tokens) else ()
    try:
        _current.step = step
        for module in ends:
            module.vattn_kept = last
        step.attention.begin_step()
        if step.packed is not None:
            step.attention.begin_prompts(step.packed)
        with _products_by_cublas_lt(tokens.device):
            output = model(
                input_ids=tokens[None],
                position_ids=positions[None],
                past_key_values=BoundCache(),
                use_cache=True,
                **keep,
            )
    finally:
        _current.step = None
        for module in ends:
            module.vattn_kept = None
    logits: torch.Tensor = output.logits[0]
    return logits


@contextmanager
def _products_by_cublas_lt(device: torch.device) -> Iterator[None]:
    """Matrix products are cuBLASLt's meanwhile; on the host nothing changes.

    It chooses better kernels than cuBLAS for the batches of decode, and as good ones for prompts.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.preferred_blas_library()
    try:
        torch.backends.cuda.preferred_blas_library("cublaslt")
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)
