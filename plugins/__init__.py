"""TensorRT: an attention plugin over our caches, networks that hold it, and a session that runs them.

Installs as `trtllm_vattn.plugins`. May import `runtime` and below. Needs `tensorrt` (10 or newer) or
`tensorrt_rtx` only where a plan is built or run.
"""
