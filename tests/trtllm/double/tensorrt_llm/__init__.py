"""A stand-in for TensorRT-LLM 1.2.x, built from its recorded interface: what its names do, not how.

tests/trtllm/test_interface.py holds it to tests/data/trtllm_interface.json. README.md lists what it assumes.
"""
