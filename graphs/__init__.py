"""Capture and replay of a step: runner, guard, and the host's stand-in for a CUDA graph.

Installs as `trtllm_vattn.graphs`. May import `attention`, `cache` and below.
"""
