"""Where the stand-in lies, and the shape of the managers that tests make over it."""

from __future__ import annotations

from pathlib import Path

DOUBLE = Path(__file__).with_name("double")
SHAPE = dict(num_layers=3, num_kv_heads=2, head_dim=8, tokens_per_block=16, max_seq_len=128, max_batch_size=4)
"""A block of 16 tokens takes 6 KiB: pages of 4 KiB hold two thirds of one."""
