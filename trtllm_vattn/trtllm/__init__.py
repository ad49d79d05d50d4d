"""The adapter for TensorRT-LLM's PyTorch backend: its KV cache at fixed addresses.

May import everything below `plugins`. The hook imports `installation` in every Python process, so that module and what
it imports load neither torch nor TensorRT-LLM.
"""

from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.installation import install, uninstall

__all__ = ["TrtllmConfig", "install", "uninstall"]
