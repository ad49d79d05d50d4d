"""An engine's arguments."""

from dataclasses import dataclass


@dataclass
class AsyncEngineArgs:
    model: str
    load_format: str = "auto"
    skip_tokenizer_init: bool = False
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.92
    max_model_len: int | None = None
    seed: int = 0
