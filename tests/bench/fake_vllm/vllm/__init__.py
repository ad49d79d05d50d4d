"""As much of vLLM 0.26's surface as a peer uses (tests/data/vllm_interface.json), over a clock in place of a model.

FAKE_VLLM names what it does wrong: ``refuses`` to start, ``short`` outputs, ``dies`` in the middle of serving.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

__all__ = ["LLM", "SamplingParams"]

STEP_S = 0.001
print("what vLLM prints at import goes to stdout")


def vllm_config(arguments: dict[str, Any], max_num_batched_tokens: int) -> SimpleNamespace:
    """What it makes of its arguments. The model's config.json is read, and says how many bytes a token's KV takes."""
    if os.environ.get("FAKE_VLLM") == "refuses":
        raise ValueError("Free memory on device cuda:0 is less than desired")
    assert arguments["load_format"] == "dummy"
    assert arguments["skip_tokenizer_init"] is True
    config = json.loads((Path(arguments["model"]) / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert arguments["max_model_len"] <= config["max_position_embeddings"]
    token = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"] * 4
    return SimpleNamespace(
        cache_config=SimpleNamespace(
            num_gpu_blocks=arguments["kv_cache_memory_bytes"] // (16 * token), block_size=16, enable_prefix_caching=True
        ),
        scheduler_config=SimpleNamespace(
            max_num_seqs=1024, max_num_batched_tokens=max_num_batched_tokens, async_scheduling=True
        ),
        model_config=SimpleNamespace(max_model_len=arguments["max_model_len"]),
        compilation_config=SimpleNamespace(cudagraph_mode="FULL_AND_PIECEWISE"),
        vocab_size=config["vocab_size"],
    )


class Running:
    """A request, of which every step gives one token."""

    def __init__(self, request_id: str, prompt: dict[str, Any], params: SamplingParams, vocab_size: int) -> None:
        assert isinstance(request_id, str)
        assert all(0 <= token < vocab_size for token in prompt["prompt_token_ids"])
        assert (params.temperature, params.ignore_eos, params.detokenize) == (0.0, True, False)
        assert params.output_kind is RequestOutputKind.DELTA
        self.request_id, self.prompt = request_id, prompt
        self.left = max(1, params.max_tokens - (os.environ.get("FAKE_VLLM") == "short"))

    def next(self) -> RequestOutput:
        if os.environ.get("FAKE_VLLM") == "dies":
            print("RuntimeError: CUDA error: out of luck", file=sys.stderr, flush=True)
            os._exit(1)
        self.left -= 1
        outputs = [CompletionOutput(index=0, text="", token_ids=[7], cumulative_logprob=None, logprobs=None)]
        return RequestOutput(self.request_id, None, self.prompt["prompt_token_ids"], None, outputs, self.left == 0)


class LLMEngine:
    def __init__(self, config: SimpleNamespace) -> None:
        self.vllm_config = config
        self._running: dict[str, Running] = {}

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> str:
        assert request_id not in self._running
        self._running[request_id] = Running(request_id, prompt, params, self.vllm_config.vocab_size)
        return request_id

    def has_unfinished_requests(self) -> bool:
        return bool(self._running)

    def step(self) -> list[RequestOutput]:
        """A token of each of those whose prompts went in before; a pass takes `max_num_batched_tokens` of them."""
        time.sleep(STEP_S)
        room, outputs = self.vllm_config.scheduler_config.max_num_batched_tokens, []
        for request in itertools.islice(self._running.values(), 1024):
            room -= len(request.prompt["prompt_token_ids"])
            if outputs and room < 0:
                break
            outputs.append(request.next())
        self._running = {name: request for name, request in self._running.items() if request.left}
        return outputs


class LLM:
    def __init__(self, model: str, *, kv_cache_memory_bytes: int, gpu_memory_utilization: float, **kwargs: Any) -> None:
        assert 0 < gpu_memory_utilization <= 1
        arguments = {"model": model, "kv_cache_memory_bytes": kv_cache_memory_bytes, **kwargs}
        self.llm_engine = LLMEngine(vllm_config(arguments, 16384))
