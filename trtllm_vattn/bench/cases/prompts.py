"""Short prompts: is one replay of a captured graph faster than an eager pass?"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.prefill import PromptChunk


@torch.inference_mode()
def time_prompts(engine: Engine, repeats: int, seed: int) -> list[dict[str, Any]]:
    """Milliseconds until a prompt's logits are there, by replay and by pass, of each size that was captured; in turns.

    The engine has nothing else to do, and a free slot.
    """
    cache, prefill = engine.cache, engine.prefill
    sizes = prefill.runner.buckets
    slot = cache.admit("prompt", min(sizes[-1], cache.shape.max_seq_len))
    random = np.random.default_rng(seed)

    def once(chunk: PromptChunk, captured: bool) -> float:
        prefill.captured = captured
        started = perf_counter()
        prefill.run([chunk])
        if cache.device.type == "cuda":
            torch.cuda.synchronize(cache.device)
        return 1e3 * (perf_counter() - started)

    rows = []
    try:
        for size in tqdm(sizes, desc="prompts", unit="size", disable=None):
            length = min(size, cache.shape.max_seq_len)
            ids = random.integers(0, engine.model.config.get_text_config().vocab_size, length).tolist()
            chunk = PromptChunk(slot, ids, 0)
            took: dict[bool, list[float]] = {True: [], False: []}
            for captured in took:
                once(chunk, captured)  # The first of each may have to plan and allocate.
            for _ in range(repeats):
                for captured, milliseconds in took.items():
                    milliseconds.append(once(chunk, captured))
            rows.append({"tokens": length, "replay_ms": summarise(took[True]), "pass_ms": summarise(took[False])})
    finally:
        prefill.captured = True
        cache.release("prompt")
    return rows
