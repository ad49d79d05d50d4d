"""Prefix reuse over a KV cache: which slot holds the tokens that a prompt begins with, and how to get at them.

`tree.py` knows who holds which tokens, `hybrid.py` chooses between the four ways to a hit, `events.py` tells routers;
`reuse.py` is the `PrefixCache` that uses all three over a cache, and `managed.py` a `KVCacheManager` as it wants one.
May import `cache`, `memory`, `vmm` and `errors`. README.md says how it works.
"""

from trtllm_vattn.cache.prefix.hybrid import Decision, Hit, ReuseCosts, Way, choose
from trtllm_vattn.cache.prefix.managed import ManagedReuse, prefix_cache_over
from trtllm_vattn.cache.prefix.reuse import Admission, PrefixCache, PrefixStats
from trtllm_vattn.cache.prefix.tree import DEFAULT_PRIORITY, Match, PrefixKey, PrefixTree, Priorities, Retention

__all__ = [
    "DEFAULT_PRIORITY",
    "Admission",
    "Decision",
    "Hit",
    "ManagedReuse",
    "Match",
    "PrefixCache",
    "PrefixKey",
    "PrefixStats",
    "PrefixTree",
    "Priorities",
    "Retention",
    "ReuseCosts",
    "Way",
    "choose",
    "prefix_cache_over",
]
