"""TensorRT-LLM's PyTorch backend on fixed addresses: a manager adapter, its installation, and a launcher's hook.

May import everything below `plugins`; imports TensorRT-LLM only where it is installed and asked for. What is imported
by the hook in every process (`installation`, `config`) is light.
"""

from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.installation import install, uninstall

__all__ = ["TrtllmConfig", "install", "uninstall"]
