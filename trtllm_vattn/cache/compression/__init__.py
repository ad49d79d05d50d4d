"""A cache that shrinks: policies say what each head keeps, compaction gives the rest back (README.md)."""

from trtllm_vattn.cache.compression.compaction import Compacted, compact
from trtllm_vattn.cache.compression.fastgen import FastGen
from trtllm_vattn.cache.compression.h2o import H2O
from trtllm_vattn.cache.compression.policy import CompressionPolicy, HeadsView

__all__ = ["H2O", "Compacted", "CompressionPolicy", "FastGen", "HeadsView", "compact"]
