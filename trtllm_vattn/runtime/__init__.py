"""Python runtime API: Engine, sampling, and the binding to Hugging Face models.

May import `graphs`, `attention`, `cache` and below. Needs transformers (extra ``runtime``).
"""

from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams

__all__ = ["Engine", "SamplingParams"]
