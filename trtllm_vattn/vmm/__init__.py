"""The driver seam: CUDA and host drivers, wrappers around them, owners, and tensors over addresses.

May import `trtllm_vattn.errors` and nothing else of ours.
"""
