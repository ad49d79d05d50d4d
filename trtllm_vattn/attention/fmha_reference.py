"""A reference of `flashinfer.prefill.trtllm_fmha_v2_prefill` for one sequence, in plain torch for any device."""

from __future__ import annotations

import torch


def fmha_reference(
    qkv: tuple[torch.Tensor, torch.Tensor],
    input_layout: str,
    workspace_buffer: torch.Tensor,
    seq_lens: torch.Tensor,
    max_q_len: int,
    max_kv_len: int,
    bmm1_scale: float,
    bmm2_scale: float,
    batch_size: int,
    cum_seq_lens_q: torch.Tensor,
    cum_seq_lens_kv: torch.Tensor,
    *,
    block_tables: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Causal attention of a chunk's queries, the last of `seq_lens` tokens, over pages behind a table.

    It gathers rows with indices clamped to length - 1, so it reads no row past a length, and computes in float32.

    Parameters
    ----------
    qkv : tuple of Tensor
        Queries ``[rows, num_heads, head_dim]``, and contiguous pages ``[pages, 2, num_kv_heads, page_size,
        head_dim]``.
    seq_lens : Tensor
        int32 ``[1]``: tokens of K and V.
    max_kv_len : int
        An upper bound of `seq_lens`.
    bmm1_scale, bmm2_scale : float
        Factors of the scores and of the result.
    cum_seq_lens_q : Tensor
        int32 ``[2]``: 0, and the number of queries; further rows of `out` are not written.
    block_tables : Tensor
        int32 ``[1, pages of the sequence]``.
    """
    q, pages = qkv
    heads, size = pages.shape[2:4]
    tokens = torch.arange(max_kv_len, device=q.device).minimum(seq_lens - 1)
    where = block_tables[0].long()[tokens // size]
    k, v = (pages[where, part, :, tokens % size].float() for part in range(2))
    row = torch.arange(len(q), device=q.device)
    count = cum_seq_lens_q[1:]
    visible = torch.arange(max_kv_len, device=q.device) <= (seq_lens - count + row.minimum(count - 1))[:, None]
    grouped = q.float().view(len(q), heads, -1, q.shape[2])
    scores = torch.einsum("rhgd,thd->hgrt", grouped, k) * bmm1_scale
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(dim=-1)
    result = torch.einsum("hgrt,thd->rhgd", weights, v).flatten(1, 2) * bmm2_scale
    out.copy_(torch.where((row < count)[:, None, None], result.to(out.dtype), out))
