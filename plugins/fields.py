"""The fields of one attention layer in a plan: names and sizes, but no address."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.values import as_whole, finite, shown, whole

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


LARGEST_FIELD = (1 << 31) - 1
"""A plan's whole numbers are of 32 bits."""


def check_cache_name(name: Any) -> None:
    """Raise ConfigError where a plan cannot name its cache so."""
    if not isinstance(name, str) or not name or "\0" in name:
        what = "is empty" if name == "" else f"is {shown(name)}"
        raise ConfigError(
            f"the field cache {what}; name the cache that the plan's process will attach, in a text without NUL"
        )


class Slots(IntEnum):
    """Whether a layer has the input ``slots``, and when it reads it."""

    NONE = 0
    """No such input: lane i is slot i."""
    CONTEXT = 1
    """Read for chunks of prompts; in decode lane i is slot i, which kernels read fastest."""
    ALWAYS = 2
    """Read in decode, too."""


@dataclass(frozen=True)
class AttentionFields:
    """The serialised fields of one attention layer.

    Parameters
    ----------
    cache : str
        The name under which the process that runs the plan attaches its cache (`registry.attach`).
    layer : int
        The cache's layer.
    num_heads, num_kv_heads, head_dim : int
    scale : float
        Factor of the attention scores; rounded to float32, which is what a plan holds.
    window : int
        Tokens of a sliding window; 0 for full attention. A cache longer than the window is refused.
    dtype : str
        Of q, k, v, the output and the cache: one of `DTYPES`.
    packed_qkv : int
        1 where q, k and v arrive as one tensor ``[tokens, (num_heads + 2 num_kv_heads) head_dim]``.
    slots : int
        A value of `Slots`.
    context : int
        1 where the plan also has a context phase, with inputs ``query_lengths`` and ``extent``.

    Raises
    ------
    ConfigError
        A field is out of its range.
    """

    cache: str
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int
    dtype: str
    packed_qkv: int
    slots: int
    context: int

    def __post_init__(self) -> None:
        check_cache_name(self.cache)
        for name in ("num_heads", "num_kv_heads", "head_dim", "layer", "window"):
            least = 0 if name in ("layer", "window") else 1
            object.__setattr__(self, name, whole(f"the field {name}", getattr(self, name), least, LARGEST_FIELD))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads over {self.num_kv_heads} kv heads; give a multiple of the latter"
            )
        scale = finite("the field scale", self.scale)
        with np.errstate(over="ignore"):
            object.__setattr__(self, "scale", float(np.float32(scale)))
        if not 0 < self.scale < np.inf:
            raise ConfigError(
                f"the field scale is {scale}, as float32 {self.scale}; it must be above 0, head_dim ** -0.5 say"
            )
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise ConfigError(f"the field dtype is {shown(self.dtype)}; there are {', '.join(DTYPES)}")
        flags = {name: as_whole(getattr(self, name)) for name in ("packed_qkv", "context", "slots")}
        if flags["packed_qkv"] not in (0, 1) or flags["context"] not in (0, 1) or flags["slots"] not in tuple(Slots):
            raise ConfigError(
                f"packed_qkv is {shown(self.packed_qkv)}, context {shown(self.context)}, slots {shown(self.slots)}; "
                "the first two are 0 or 1, slots is 0 (none), 1 (context phase) or 2 (always)"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def q_width(self) -> int:
        """Elements of a token's queries, and of its output."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of a token's keys."""
        return self.num_kv_heads * self.head_dim

    @property
    def inputs(self) -> tuple[str, ...]:
        """The layer's inputs, in order.

        q, k, v ``[tokens, width]`` (or qkv) of `dtype`; the rest int32 on the device: lengths ``[lanes]``, tokens of a
        lane's sequence with this call's included, 0 for a padding lane; slots ``[lanes]``; query_lengths ``[lanes]``,
        how many of a lane's rows are tokens; extent ``[most]``, whose contents are not read: its size bounds lengths.
        """
        names = ["qkv"] if self.packed_qkv else ["q", "k", "v"]
        names.append("lengths")
        if self.slots != Slots.NONE:
            names.append("slots")
        if self.context:
            names += ["query_lengths", "extent"]
        return tuple(names)

    def width_of(self, name: str) -> int:
        """Elements of a token in an input of `dtype`."""
        return {"q": self.q_width, "qkv": self.q_width + 2 * self.kv_width}.get(name, self.kv_width)

    def check_input(self, name: str, dims: Iterable[int]) -> None:
        """Raise ConfigError where an input's dimensions, -1 for one not known yet, are not those of `inputs`."""
        got = tuple(dims)
        if name in ("q", "k", "v", "qkv"):
            wanted: tuple[int | str, ...] = ("tokens", self.width_of(name))
            wrong = len(got) != 2 or got[1] not in (-1, wanted[1])
        else:
            wanted = ("most",) if name == "extent" else ("lanes",)
            wrong = len(got) != 1
        if wrong:
            shape = ", ".join(str(part) for part in wanted)
            raise ConfigError(
                f"input {name} of attention layer {self.layer} has shape {list(got)}; it must be [{shape}] for "
                f"{self.num_heads} query heads and {self.num_kv_heads} kv heads of {self.head_dim}"
            )

    def check_inputs(self, given: Mapping[str, Sequence[int]]) -> None:
        """Raise ConfigError where a call's inputs, dimensions by name, are not those of `inputs`, or differ in tokens
        or lanes."""
        for name, dims in given.items():
            self.check_input(name, dims)
        for first, others, what in (("q", ("k", "v"), "tokens"), ("lengths", ("slots", "query_lengths"), "lanes")):
            for name in others:
                if first in given and name in given and given[name][0] != given[first][0]:
                    raise ConfigError(
                        f"input {name} of attention layer {self.layer} has {given[name][0]} {what}, and {first} has "
                        f"{given[first][0]}; give both the same"
                    )

    def check_cache(self, shape: CacheShape) -> None:
        """Raise ConfigError, naming what differs, where a cache is not one that the layer was built for."""
        differing = [
            f"{name} is {theirs}, the plan's {ours}"
            for name, theirs, ours in (
                ("num_kv_heads", shape.num_kv_heads, self.num_kv_heads),
                ("head_dim", shape.head_dim, self.head_dim),
                ("dtype", shape.dtype, self.torch_dtype),
                ("kv_factor", shape.kv_factor, 2),
            )
            if theirs != ours
        ]
        if self.layer >= shape.num_layers:
            differing.append(f"num_layers is {shape.num_layers}, the plan has a layer {self.layer}")
        if self.window and self.window < shape.max_seq_len:
            differing.append(f"max_seq_len is {shape.max_seq_len}, the plan's window {self.window} tokens")
        if differing:
            raise ConfigError(
                f"the cache attached as {self.cache!r} does not fit the plan: {'; '.join(differing)}; attach one built "
                "for this model, or build the plan anew"
            )


KINDS: Mapping[str, str] = {
    field.name: {"str": "CHAR", "int": "INT32", "float": "FLOAT32"}[str(field.type)]
    for field in fields(AttentionFields)
}
"""PluginFieldType of each field by name. ONNX integers arrive as INT32, too."""


def to_collection(trt: Any, values: AttentionFields) -> tuple[Any, list[Any]]:
    """A PluginFieldCollection of a layer's fields, and the buffers that must outlive it."""
    buffers: list[Any] = []
    out = []
    for name, value in asdict(values).items():
        kind = KINDS[name]
        if kind == "CHAR":
            data: Any = value.encode()
        else:
            data = np.array([value], np.int32 if kind == "INT32" else np.float32)
        buffers.append(data)
        out.append(trt.PluginField(name, data, getattr(trt.PluginFieldType, kind)))
    return trt.PluginFieldCollection(out), buffers


def from_collection(collection: Iterable[Any]) -> AttentionFields:
    """The fields in a collection made by `to_collection` or from an ONNX node's attributes.

    Raises ConfigError for a field that is missing, unknown, or cannot be read.
    """
    values: dict[str, Any] = {}
    for field in collection:
        kind = KINDS.get(field.name)
        if kind is None:
            raise ConfigError(f"VattnAttention has no field {field.name!r}; there are {', '.join(KINDS)}")
        values[field.name] = _value(field, kind)
    missing = [name for name in KINDS if name not in values]
    if missing:
        raise ConfigError(f"VattnAttention was given no {', '.join(missing)}; its fields are {', '.join(KINDS)}")
    return AttentionFields(**values)


def _value(field: Any, kind: str) -> Any:
    data = field.data
    if kind == "CHAR":
        raw = data if isinstance(data, bytes) else np.asarray(data).tobytes()
        try:
            return raw.rstrip(b"\0").decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"the field {field.name} is {shown(raw)}, which is no text: {error}") from error
    array = np.asarray(data)
    if array.size != 1 or array.dtype.kind not in ("iu" if kind == "INT32" else "iuf"):
        raise ConfigError(f"the field {field.name} is {array.tolist()!r} of {array.dtype}; give one number ({kind})")
    return int(array.item()) if kind == "INT32" else float(array.item())
