"""One model on several ranks (tensor parallelism), over torch.distributed: NCCL between GPUs, gloo on the host."""

from trtllm_vattn.runtime.parallel.ranks import Ranks, size_of_torchrun

__all__ = ["Ranks", "size_of_torchrun"]
