"""The model families that are tested to give transformers' own tokens; documents and tests read this list.

Others that transformers registers may work too: a dry pass (dry_pass.py) refuses what a cache does not serve.
"""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """A family by name, a checkpoint of it, and where it is served only in part, how far."""

    name: str
    checkpoint: str
    limit: str = ""


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", "meta-llama/Llama-3.1-8B-Instruct"),
    "qwen2": Family("Qwen2", "Qwen/Qwen2.5-7B-Instruct"),
    "qwen3": Family("Qwen3", "Qwen/Qwen3-8B"),
    "mistral": Family("Mistral", "mistralai/Mistral-7B-Instruct-v0.3"),
    "mixtral": Family("Mixtral", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    "qwen3_moe": Family("Qwen3-MoE", "Qwen/Qwen3-30B-A3B"),
    "gemma": Family("Gemma", "google/gemma-7b"),
    "gemma3_text": Family("Gemma 3", "google/gemma-3-1b-it"),
    "phi": Family("Phi", "microsoft/phi-2"),
    "phi3": Family("Phi-3", "microsoft/Phi-3-mini-4k-instruct"),
    "olmo2": Family("OLMo 2", "allenai/OLMo-2-1124-7B-Instruct"),
    "granite": Family("Granite", "ibm-granite/granite-3.3-8b-instruct"),
    "gemma2": Family("Gemma 2", "google/gemma-2-9b-it"),
    "deepseek_v2": Family("DeepSeek-V2", "deepseek-ai/DeepSeek-V2-Lite"),
    "deepseek_v3": Family("DeepSeek-V3", "deepseek-ai/DeepSeek-V3"),
    "gpt_oss": Family("gpt-oss", "openai/gpt-oss-20b"),
    "smollm3": Family("SmolLM3", "HuggingFaceTB/SmolLM3-3B"),
}
"""By transformers' model type."""
