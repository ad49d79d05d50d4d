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
from trtllm_vattn.runtime.request import RequestState
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.step_plan import StepPlan


@torch.inference_mode()
def time_prompts(engine: Engine, repeats: int, seed: int) -> list[dict[str, Any]]:
    """Milliseconds until a prompt's logits are there, by replay and by pass, of each size that was captured; in turns.

    The engine has nothing else to do, and a free slot.
    """
    cache, prefill, passes = engine.cache, engine.prefill, engine.passes
    # Prompts alone are captured, or whole passes.
    graphs = passes.graphs
    sizes = (prefill if graphs is None else graphs).runner.buckets
    slot = cache.admit("prompt", min(sizes[-1], cache.shape.max_seq_len))
    random = np.random.default_rng(seed)

    def once(chunk: PromptChunk, captured: bool) -> float:
        prefill.captured, passes.graphs = captured and graphs is None, graphs if captured else None
        # Of a prompt that is longer, so that no sequence begins to decode.
        request = RequestState(0, [*chunk.tokens, 0], SamplingParams(1), 1, slot=slot)
        started = perf_counter()
        passes.launch(StepPlan(1, ((request, chunk),)))
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
        prefill.captured, passes.graphs = graphs is None, graphs
        cache.release("prompt")
    return rows
