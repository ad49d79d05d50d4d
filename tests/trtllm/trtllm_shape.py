"""Where the fake TensorRT-LLM is, and the shape of the managers that tests make over it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

FAKE = Path(__file__).with_name("fake")
SHAPE = dict(num_layers=3, num_kv_heads=2, head_dim=8, tokens_per_block=16, max_seq_len=128, max_batch_size=4)
"""A block of 16 tokens takes 6 KiB: pages of 4 KiB hold two thirds of one."""
VERSIONS = {"1.2": "1.2.1", "1.3.0rc": "1.3.0rc20", "1.4.0rc": "1.4.0rc1"}
"""Of the fake, by recorded series."""


def drafts(most: int, extra: int = 0) -> SimpleNamespace:
    """A `speculative_config` of so many draft tokens a step, named as each version names them."""
    return SimpleNamespace(max_total_draft_tokens=most, tokens_per_gen_step=most + 1, extra_kv_tokens=extra)
