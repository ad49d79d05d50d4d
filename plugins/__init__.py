"""TensorRT: an attention plugin over this package's caches, networks with it, and a session that runs their engines.

Installs as `trtllm_vattn.plugins`. May import `runtime` and below. Needs `tensorrt` (10 or newer) or
`tensorrt_rtx` only where a plan is built or run.
"""
