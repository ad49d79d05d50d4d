"""Capture and replay of a step, the guard before a replay, the audit of captured graphs, and a CUDA graph for the host.

Installs as `trtllm_vattn.graphs`. May import `cache` and below.
"""
