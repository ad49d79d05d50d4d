"""A reference of `flashinfer.xqa.xqa` in plain torch: it takes the same arguments and runs on any device.

It gathers rows with indices clamped to length - 1, so it reads no row past a length, and computes in float32.
"""

from __future__ import annotations

import torch


def xqa_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    output: torch.Tensor,
    workspace_buffer: torch.Tensor,
    semaphores: torch.Tensor,
    num_kv_heads: int,
    page_size: int,
    *,
    q_scale: float = 1.0,
    kv_layout: str = "NHD",
) -> None:
    """Decode attention of one query token per lane over blocks behind a table; the result is written to `output`.

    Parameters
    ----------
    q, output : Tensor
        ``[lanes, 1, num_heads, head_dim]``.
    k_cache, v_cache : Tensor
        ``[blocks, num_kv_heads, page_size, head_dim]`` (HND) or ``[blocks, page_size, num_kv_heads, head_dim]`` (NHD),
        any strides.
    page_table : Tensor
        int32 ``[lanes, blocks of a lane]``.
    seq_lens : Tensor
        uint32 ``[lanes, 1]``, at least 1.
    workspace_buffer, semaphores : Tensor
        Memory that the kernel needs; not used here.
    q_scale : float
        Scores are scaled by ``q_scale * head_dim ** -0.5``.
    """
    if kv_layout == "HND":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    lengths = seq_lens.view(torch.int32).long()
    extent = page_table.shape[1] * page_size
    tokens = torch.arange(extent, device=q.device).minimum(lengths - 1)
    blocks = page_table.long().gather(1, tokens // page_size)
    k, v = (cache[blocks, tokens % page_size].float() for cache in (k_cache, v_cache))
    visible = torch.arange(extent, device=q.device) < lengths
    grouped = q[:, 0].float().view(len(q), num_kv_heads, -1, q.shape[3])
    scores = torch.einsum("nhgd,nthd->nhgt", grouped, k) * (q_scale * q.shape[3] ** -0.5)
    weights = scores.masked_fill(~visible[:, None, None], torch.finfo(scores.dtype).min).softmax(dim=-1)
    output.copy_(torch.einsum("nhgt,nthd->nhgd", weights, v).flatten(1, 2)[:, None].to(output.dtype))
