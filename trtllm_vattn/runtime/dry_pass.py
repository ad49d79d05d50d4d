"""A dry pass: what a model asks of attention, found out by a few tokens before a cache is touched.

A model is served by its own code with one function exchanged: attention. That is right only where each layer calls it
once, where all calls ask for the same causal attention over all that came before, and where tokens meet nowhere else.
Families that attend beside transformers' interface, mix tokens by convolutions or states, count positions themselves or
add a bias to the scores would give wrong tokens without an error; they are refused here, by what they did.

Two short passes run, the second with the tokens in reverse order. Attention is a stand-in that lets no token see
another, so each token's queries, keys, values and logits must be the same in both.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.errors import CaptureError, ConfigError
from trtllm_vattn.runtime import latents
from trtllm_vattn.runtime.step_model import StepModel
from trtllm_vattn.values import typed

DRY_NAME = "trtllm_vattn_dry_pass"
"""Under which the stand-in is registered with transformers."""

TOKENS = 8

NEUTRAL = (
    "cache_position",
    "deterministic",
    "layer_idx",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
)
"""What models hand on to attention that changes nothing of it."""

UNSET: dict[str, tuple[Any, ...]] = {"dropout": (0.0, None), "is_causal": (True, None)}
"""What changes attention, with the values by which it does not; of anything else that is None alone."""


@dataclass
class Call:
    """One call of the attention function: queries, keys and values ``[1, heads, tokens, dim]``, and what was asked."""

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: Any
    mask: Any
    options: dict[str, Any]

    @property
    def layer(self) -> int | None:
        """The layer's number; None where the module does not say."""
        number = getattr(self.module, "layer_idx", None)
        return number if isinstance(number, int) else None

    @property
    def scale(self) -> float:
        """By what scores are scaled; ``head_dim ** -0.5`` where the model does not say, as transformers has it."""
        return float(self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling)


@dataclass
class Recorder:
    """What one pass asked for.

    `masks` are transformers' mask functions of (batch, head, query, key), with what stood for each: None, as when the
    model is served, or with `marked` a tensor, by which the calls that are given it are known.
    """

    marked: bool = False
    calls: list[Call] = field(default_factory=list)
    masks: list[tuple[Any, torch.Tensor | None]] = field(default_factory=list)
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    wanted: int = 0
    """How many tokens' logits were asked for."""


class _Current(threading.local):
    recorder: Recorder | None = None


_current = _Current()


@contextmanager
def _recording(marked: bool) -> Iterator[Recorder]:
    try:
        _current.recorder = recorder = Recorder(marked)
        yield recorder
    finally:
        _current.recorder = None


def _recorder() -> Recorder:
    if _current.recorder is None:
        raise ConfigError("this model is in the middle of being bound to a cache; run it through its Engine")
    return _current.recorder


def _stand_in(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    scaling: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Each token's own value, by which no token sees another."""
    _recorder().calls.append(Call(module, query, key, value, scaling, attention_mask, options))
    if latents.keeps_latents(module):
        rows, _ = latents.rows_and_queries(module, query, key, value)
        return latents.values(module, rows.expand(-1, query.shape[1], -1))[None].contiguous(), None
    groups = max(1, query.shape[1] // value.shape[1])
    return value.repeat_interleave(groups, dim=1).transpose(1, 2).contiguous(), None


def _mask(q_length: int, kv_length: int, mask_function: Any, device: Any = None, **kwargs: Any) -> torch.Tensor | None:
    recorder = _recorder()
    mark = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device) if recorder.marked else None
    recorder.masks.append((mask_function, mark))
    return mark


AttentionInterface.register(DRY_NAME, _stand_in)
AttentionMaskInterface.register(DRY_NAME, _mask)


@dataclass(frozen=True, eq=False)
class AttentionNeeds:
    """What a model asks of attention.

    Attributes
    ----------
    scale : float or None
        By what scores are scaled; None is ``head_dim ** -0.5``.
    windows : tuple of int or None
        By layer, how many of the last tokens a query sees, itself included; None is all. Empty is all everywhere.
    sinks : tuple of Tensor or None
        By layer, the model's own parameter ``[num_heads]`` of a further logit of each head; empty without any.
    softcaps : tuple of float or None
        By layer, at what scores are capped softly; empty without any.
    """

    scale: float | None
    windows: tuple[int | None, ...] = ()
    sinks: tuple[torch.Tensor | None, ...] = ()
    softcaps: tuple[float | None, ...] = ()


_stance = threading.Lock()


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run compiled code as it is written. torch has one stance for the whole process, which two threads that each put
    back what they found could leave at the other's; and so could an interrupt."""
    with _stance:
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        except BaseException:
            torch.compiler.set_stance("default")
            raise


def attention_needs(model: PreTrainedModel, shape: CacheShape, cache: Cache) -> AttentionNeeds:
    """What the model asks of attention over up to `max_seq_len` tokens, once dry passes have shown that backends can
    compute it.

    Parameters
    ----------
    model : PreTrainedModel
        Its attention implementation is `DRY_NAME` afterwards.
    cache : Cache
        What the model is given for its cache; it keeps nothing.

    Raises
    ------
    ConfigError
        A layer does not call attention exactly once, or asks for what no backend computes, or for heads that are not
        the cache's; or tokens meet elsewhere. The message names the family and what it did.
    """
    with torch.inference_mode(), _uncompiled():
        model.set_attn_implementation(DRY_NAME)
        there = _pass(model, shape, cache)
        wrong = _wrong_calls(model, there, shape)
        windows: tuple[int | None, ...] = ()
        if not wrong:
            try:
                windows = _windows(model, shape, cache, there)
            except _WrongMask as error:
                wrong = [str(error)]
        if not wrong:
            wrong = _where_tokens_meet(there, _pass(model, shape, cache, back=True))
    if wrong:
        raise cannot_serve(model, "; ".join(wrong))
    calls = sorted(there.calls, key=lambda call: call.layer or 0)
    sinks = tuple(call.options.get("s_aux") for call in calls)
    softcaps = tuple(call.options.get("softcap") for call in calls)
    given = (sinks if any(each is not None for each in sinks) else (), softcaps if any(softcaps) else ())
    return AttentionNeeds(calls[0].scale, windows, *given)


@contextmanager
def naming(model: object) -> Iterator[None]:
    """Where a model's step cannot be captured or compiled, the error names the model and what serves it instead."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except CaptureError as error:
        raise ConfigError(
            f"a step of {type(model).__name__} cannot be captured (use capture=False): {error}"
        ) from error
    except TorchDynamoException as error:
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"{type(model).__name__} cannot be compiled (use compile=False): {text}") from error


def cannot_serve(model: StepModel, why: str) -> ConfigError:
    """The error for a model that this runtime does not serve."""
    kind = model.config.get_text_config().model_type
    return ConfigError(f"{type(model).__name__} ({kind}) is not served: {why}")


def _pass(
    model: PreTrainedModel, shape: CacheShape, cache: Cache, *, back: bool = False, marked: bool = False
) -> Recorder:
    """One pass over a few tokens; `back` with the tokens, and the positions they have, in reverse order."""
    vocab = model.config.get_text_config().vocab_size
    order = torch.arange(min(TOKENS, shape.max_seq_len), device=model.device)
    # Logits are asked for by the numbers of rows, of all but the first token.
    rows = order[1:] if len(order) > 1 else order
    if back:
        order, rows = order.flip(0), len(order) - 1 - rows
    with _recording(marked) as recorder:
        try:
            output = model(
                input_ids=((order * 7 + 3) % vocab)[None],
                position_ids=order[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=rows,
            )
            recorder.logits = output.logits[0]
            recorder.wanted = len(rows)
        except (ConfigError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            raise cannot_serve(
                model, f"a pass with its attention exchanged fails: {type(error).__name__}: {text}"
            ) from (error)
    return recorder


def _wrong_calls(model: PreTrainedModel, seen: Recorder, shape: CacheShape) -> list[str]:
    """What is wrong with the calls of a pass."""
    counts = Counter(call.layer for call in seen.calls)
    wrong = []
    none = [layer for layer in range(shape.num_layers) if not counts[layer]]
    if none:
        wrong.append(
            f"{_some(none)} of its {shape.num_layers} layers call no attention through transformers' interface: what "
            "they compute instead, with a state or a mask of their own, no cache here holds"
        )
    if several := [layer for layer, count in counts.items() if layer is not None and count > 1]:
        wrong.append(f"{_some(several)} of its layers call attention more than once a pass")
    if others := [layer for layer in counts if layer is None or layer >= shape.num_layers]:
        wrong.append(f"attention is called beside its {shape.num_layers} layers, by {_some(others)}")
    if wrong:
        return wrong
    heads = model.config.get_text_config().num_attention_heads
    for call in seen.calls:
        tokens = call.query.shape[2]
        asked = [tuple(x.shape) for x in (call.query, call.key, call.value)]
        served = [
            (1, count, min(TOKENS, shape.max_seq_len), shape.head_dim) for count in (heads, *[shape.num_kv_heads] * 2)
        ]
        if latents.keeps_latents(call.module):
            # A latent, and the part of the keys that holds positions; together a row.
            row = sum(size[3] for size in asked[1:])
            asked = [(*size[:3], row) for size in asked]
        if asked != served:
            wrong.append(
                f"layer {call.layer} has queries, keys and values of shapes {_shapes(asked)} for {tokens} tokens, a "
                f"cache of its configuration serves {_shapes(served)} (a head_dim for all and whole keys and values, "
                "no latents)"
            )
        wrong += [f"layer {call.layer} {what}" for what in _unserved(call)]
        if wrong:
            return wrong
    scales = {call.scale for call in seen.calls}
    if len(scales) > 1:
        wrong.append(f"its layers scale scores by different factors, {', '.join(f'{x:.6g}' for x in sorted(scales))}")
    return wrong


def _unserved(call: Call) -> list[str]:
    """What a call asks for that no backend computes."""
    wrong = []
    if call.mask is not None:
        wrong.append("gives attention a mask or a bias of its own")
    if getattr(call.module, "is_causal", True) is False:
        wrong.append("attends to what comes after, too (is_causal is False)")
    for name, value in call.options.items():
        if name in NEUTRAL or value in UNSET.get(name, (None,)):
            continue
        if name == "sliding_window" and isinstance(value, int):
            continue
        if name == "softcap" and isinstance(value, int | float):
            continue
        if name == "s_aux" and isinstance(value, torch.Tensor) and value.shape == call.query.shape[1:2]:
            continue
        if isinstance(value, torch.Tensor):
            value = f"a tensor of shape {tuple(value.shape)}"
        wrong.append(f"asks for attention with {name} = {value}, which no backend here computes")
    if call.scaling is not None and not isinstance(call.scaling, int | float):
        wrong.append(f"scales scores by {typed(call.scaling)}, not by a number")
    return wrong


class _WrongMask(Exception):
    """A mask shows what no backend computes."""


def _windows(model: PreTrainedModel, shape: CacheShape, cache: Cache, seen: Recorder) -> tuple[int | None, ...]:
    """Each layer's window, by its mask; empty without any. Raises _WrongMask where a mask hides anything else, or a
    layer's call names another window."""
    longest = shape.max_seq_len
    windows: tuple[int | None, ...] = (None,) * shape.num_layers
    try:
        shown = {id(mask): _window_of(mask, longest, model.device) for mask, _ in seen.masks}
    except _WrongMask:
        shown = {0: 0}
    if any(each is not None for each in shown.values()):
        # A model may make masks that no layer uses.
        used = _masks_used(_pass(model, shape, cache, marked=True))
        found = {layer: _window_of(mask, longest, model.device) for layer, mask in used.items()}
        windows = tuple(found.get(layer) for layer in range(shape.num_layers))
    for call in seen.calls:
        asked, found_by_mask = call.options.get("sliding_window"), windows[call.layer or 0]
        if isinstance(asked, int) and (asked if asked < longest else None) != found_by_mask:
            raise _WrongMask(
                f"layer {call.layer} asks for attention with sliding_window = {asked}, and its mask shows "
                f"{'all tokens' if found_by_mask is None else f'the last {found_by_mask}'}"
            )
    return windows if any(windows) else ()


def _masks_used(seen: Recorder) -> dict[int, Any]:
    """The mask function of each layer's call in a marked pass. Where a call's own is not known, there must be one."""
    known = {id(mark): mask for mask, mark in seen.masks}
    if any(id(call.mask) not in known for call in seen.calls) and len({id(mask) for mask in known.values()}) > 1:
        raise _WrongMask("it makes several masks, and which of them a layer is given is not to be seen")
    (some, *_) = known.values()
    return {call.layer or 0: known.get(id(call.mask), some) for call in seen.calls}


def _window_of(mask: Any, longest: int, device: torch.device) -> int | None:
    """How many tokens, up to itself, a mask lets a token of `longest` see; None is all of them. Raises _WrongMask where
    it lets it see others, or as many only in places."""
    keys = torch.arange(longest, device=device)
    first = torch.zeros((), dtype=torch.int64, device=device)

    def seen(query: int) -> torch.Tensor:
        try:
            return torch.as_tensor(mask(first, first, first + query, keys), device=device).expand(longest)
        except (IndexError, RuntimeError, TypeError) as error:
            raise _WrongMask(f"it masks attention in a way that cannot be looked into ({error})") from error

    window = int(seen(longest - 1).sum())
    for query in {longest - 1, max(0, longest - 2), min(window, longest - 1), window - 1, window // 2, 0}:
        visible = seen(query)
        if bool(visible[query + 1 :].any()):
            raise _WrongMask("its mask lets tokens attend to what comes after them")
        if not torch.equal(visible, (keys <= query) & (keys > query - window)):
            raise _WrongMask(
                f"its mask hides {query + 1 - int(visible.sum())} of {query + 1} tokens from the last, and not as a "
                "window does (chunks, say), which no backend here computes: lower max_seq_len until nothing is hidden"
            )
    return None if window == longest else window


def _where_tokens_meet(there: Recorder, back: Recorder) -> list[str]:
    """Where a token's numbers depend on the order of the tokens."""
    if len(there.logits) != there.wanted or len(back.logits) != back.wanted:
        return [f"it gives the logits of {len(there.logits)} tokens where those of {there.wanted} are asked for"]
    if len(back.calls) != len(there.calls):
        return ["its second pass calls attention another number of times than its first"]
    for call, other in zip(there.calls, back.calls, strict=True):
        for name in ("query", "key", "value"):
            if _differ(getattr(call, name), getattr(other, name).flip(2)):
                return [
                    f"the {name} of a token in layer {call.layer} depends on more than the token and its position_ids: "
                    "the model counts positions itself, or mixes tokens beside attention (a convolution, a state)"
                ]
    if _differ(there.logits, back.logits):
        return ["the logits of a token depend on other tokens beside attention, or are not those of the rows asked for"]
    return []


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether by more than rounding."""
    allowed = 0.05 if a.dtype.itemsize < 4 else 1e-3
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() > allowed * a.abs().max().clamp(min=1e-30))


def _some(names: Sequence[Any], most: int = 4) -> str:
    """A count, and a few of them."""
    shown = ", ".join("a module without a layer_idx" if name is None else str(name) for name in list(names)[:most])
    return f"{len(names)} ({shown}{', ...' if len(names) > most else ''})"


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return " ".join(str(list(shape)) for shape in shapes)
