"""The shape that cache tests use: 384 bytes a token and layer, so that rows straddle pages of 4 KiB."""

from __future__ import annotations

import torch

from trtllm_vattn.cache.base import CacheShape

SHAPE = CacheShape(num_layers=4, num_kv_heads=2, head_dim=24, dtype=torch.float32, num_slots=4, max_seq_len=50)
