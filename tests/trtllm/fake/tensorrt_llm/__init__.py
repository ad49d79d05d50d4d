"""A stand-in for TensorRT-LLM, built from its recorded interface: what its names do, not how.

It plays the version that TRTLLM_FAKE_VERSION names (1.2.1 by default): 1.3 and 1.4 reserve draft tokens at every
step, begin sequences in batches and have KVCacheManagerV2. tests/trtllm/test_interface.py holds it to
tests/data/trtllm_interface.json. README.md lists what it assumes.
"""

from tensorrt_llm.version import __version__

__all__ = ["__version__"]
