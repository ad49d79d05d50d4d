"""Running one attention layer of a plan: store this call's K and V in the cache, then attend."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trtllm_vattn.attention.base import Attention, PrefillChunk
from trtllm_vattn.cache.base import FlatKV
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins.fields import AttentionFields, Slots
from trtllm_vattn.plugins.registry import AttachedCache
from trtllm_vattn.vmm.tensors import tensor_at


def rows_per_lane(fields: AttentionFields, tokens: int, lanes: int) -> int:
    """Rows of each lane: 1 in decode, more where each lane is a chunk of a prompt.

    Raises ConfigError where tokens are no whole number of rows, or chunks come to a plan without a context phase.
    """
    rows, rest = divmod(tokens, max(1, lanes))
    if rest or not rows or (rows > 1 and not fields.context):
        phases = "each lane has one row, or as many as the others" if fields.context else "there is no context phase"
        raise ConfigError(
            f"{tokens} tokens in {lanes} lanes at attention layer {fields.layer}: {phases}; shape the inputs so, or "
            "build the plan with context=1"
        )
    return rows


def attend(
    fields: AttentionFields, attached: AttachedCache, given: Mapping[str, torch.Tensor], out: torch.Tensor
) -> None:
    """Store K and V and write the attention's result to `out`.

    Parameters
    ----------
    given : mapping of str to Tensor
        By the names of `AttentionFields.inputs`.
    out : Tensor
        ``[tokens, num_heads * head_dim]``; a padding lane's rows are finite and of no meaning.

    Nothing waits for the device. A decode call allocates nothing but what `attached.attention` does at a shape's first
    call; a chunk of a prompt takes a copy of its sequence's keys from torch's allocator.

    Raises
    ------
    ConfigError
        The shapes do not fit the layer, or the cache does not fit the plan.
    """
    fields.check_inputs({name: tensor.shape for name, tensor in given.items()})
    fields.check_cache(attached.cache.shape)
    q, k, v = _heads(fields, attached, given)
    lengths, slots = given["lengths"], given.get("slots")
    rows = rows_per_lane(fields, len(q), len(lengths))
    if rows == 1 and fields.slots != Slots.ALWAYS:
        slots = None
    if slots is None and len(lengths) > attached.cache.shape.num_slots:
        raise ConfigError(
            f"{len(lengths)} lanes, but the cache attached as {attached.name!r} has {attached.cache.shape.num_slots} "
            "slots; lane i is slot i: run fewer lanes, or attach a cache with more slots"
        )
    counts = given["query_lengths"] if rows > 1 else None
    attention = attached.attention(fields.num_heads, fields.scale)
    # TensorRT does not say where a step begins, so every layer's call is a step of its own.
    attention.begin_step()
    _store(attention, fields.layer, k, v, lengths, counts, slots, rows)
    result = out.view(len(q), fields.num_heads, fields.head_dim)
    if rows == 1:
        attention.decode(fields.layer, q, lengths, slots, out=result)
        return
    assert counts is not None
    most = min(given["extent"].shape[0], attached.cache.shape.max_seq_len)
    for lane in range(len(lengths)):
        at, own = slice(lane * rows, (lane + 1) * rows), slice(lane, lane + 1)
        slot = torch.full_like(lengths[own], lane) if slots is None else slots[own]
        chunk = PrefillChunk(rows, slot, counts[own], lengths[own], most)
        result[at] = attention.prefill(fields.layer, q[at], chunk)


def _heads(
    fields: AttentionFields, attached: AttachedCache, given: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q ``[tokens, num_heads, head_dim]``; k, v ``[tokens, num_kv_heads, head_dim]``."""
    if fields.packed_qkv:
        qkv = given["qkv"].view(len(given["qkv"]), -1, fields.head_dim)
        keys, values = fields.num_heads, fields.num_heads + fields.num_kv_heads
        q, k, v = qkv[:, :keys], qkv[:, keys:values], qkv[:, values:]
        # Kernels want contiguous queries; all layers share the buffer of the copy.
        return attached.buffer(q.shape, q.dtype).copy_(q), k, v
    q, k, v = (given[name].view(len(given["q"]), -1, fields.head_dim) for name in ("q", "k", "v"))
    return q, k, v


def _store(
    attention: Attention,
    layer: int,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor | None,
    slots: torch.Tensor | None,
    rows: int,
) -> None:
    kv = attention.cache.layer(layer)
    if k.device.type == "cuda" and isinstance(kv, FlatKV):
        from trtllm_vattn.plugins.step_write import write_step

        write_step(kv, k, v, lengths, counts, slots)
        return
    lane = torch.arange(len(lengths), device=lengths.device)
    row = torch.arange(rows, device=lengths.device)
    first = lengths - (1 if counts is None else counts)
    there = (lengths > 0)[:, None] & (row < (1 if counts is None else counts[:, None]))
    where = torch.where(there, (lane if slots is None else slots.long())[:, None], attention.cache.dummy_slot)
    positions = torch.where(there, first[:, None] + row, 0)
    attention.write(layer, k, v, where.flatten(), positions.flatten())


def tensor_over(address: int, dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor over memory of TensorRT's."""
    count = 1
    for size in dims:
        count *= size
    return tensor_at(address, count * dtype.itemsize, str(device)).view(dtype).view(dims)
