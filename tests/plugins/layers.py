"""One layer of a plan over a cache, with K and V that are known, and what must come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trtllm_vattn.plugins import plain
from trtllm_vattn.plugins.emulated import built_layer, describe
from trtllm_vattn.plugins.fields import AttentionFields, Slots
from trtllm_vattn.vmm.tensors import current_stream

HEADS, KV_HEADS, DIM, LAYERS, TOKENS = 4, 2, 16, 2, 64


def fields_of(**changes: Any) -> AttentionFields:
    """Fields for a cache of `KV_HEADS` heads of `DIM` in float32."""
    values: dict[str, Any] = {
        "cache": "kv",
        "layer": 1,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": DIM,
        "scale": 0.3,
        "window": 0,
        "dtype": "float32",
        "packed_qkv": 0,
        "slots": int(Slots.CONTEXT),
        "context": 1,
    }
    return AttentionFields(**{**values, **changes})


class Layer:
    """A layer in an execution context; `call` is what TensorRT does for one enqueue."""

    def __init__(self, fields: AttentionFields, device: str = "cpu", trt: Any = plain) -> None:
        self.fields, self.device, self.trt = fields, device, trt
        self.plugin = built_layer(trt, fields).attach_to_context(None)

    def call(
        self,
        own: Mapping[str, torch.Tensor],
        lengths: Sequence[int],
        slots: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
        most: int = 1,
    ) -> torch.Tensor:
        """Shape change and enqueue, with raw addresses; the output ``[tokens, q_width]``."""
        given = dict(own)
        for name, values in (("lengths", lengths), ("slots", slots), ("query_lengths", counts)):
            wanted = values if values is not None else [0] * len(lengths)
            given[name] = torch.tensor(wanted, dtype=torch.int32, device=self.device)
        given["extent"] = torch.zeros(most, dtype=torch.int32, device=self.device)
        tensors = [given[name].contiguous() for name in self.fields.inputs]
        inputs, outputs = describe(self.trt, self.fields, len(tensors[0]), len(lengths), most)
        self.plugin.on_shape_change(inputs, outputs)
        out = torch.full(outputs[0].dims, torch.nan, dtype=self.fields.torch_dtype, device=self.device)
        addresses = [tensor.data_ptr() for tensor in tensors]
        self.plugin.enqueue(inputs, outputs, addresses, [out.data_ptr()], 0, current_stream(self.device))
        return out


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, visible: int | None = None
) -> torch.Tensor:
    """The last query's output over the first `visible` tokens: q ``[q_width]``, k and v ``[tokens, kv_width]``."""
    k, v = (x[:visible].view(-1, KV_HEADS, DIM).repeat_interleave(HEADS // KV_HEADS, 1).double() for x in (k, v))
    scores = torch.einsum("hd,thd->ht", q.view(HEADS, DIM).double(), k) * scale
    return torch.einsum("ht,thd->hd", scores.softmax(-1), v).flatten().to(q.dtype)
