"""The driver seam: CUDA and host drivers, wrappers around them, owners, and tensors over addresses.

May import `trtllm_vattn.errors` and nothing else of ours.
"""

from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.open import open_driver

__all__ = ["HostDriver", "open_driver"]
