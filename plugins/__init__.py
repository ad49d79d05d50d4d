"""TensorRT plugin, network builders and engine session: not written yet.

Installs as `trtllm_vattn.plugins`.
"""
