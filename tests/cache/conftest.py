from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from shapes import SHAPE

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.select import CACHES, make_cache
from trtllm_vattn.vmm.host import HostDriver


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest, host_driver: HostDriver) -> Iterator[KVCache]:
    """Each kind of cache, with room for every slot at its maximum."""
    with make_cache(request.param, SHAPE, "cpu", driver=host_driver) as made:
        yield made


DUMMY_PAGES = {"vattn": 1, "blocks": 12, "published": 8}
"""What the dummy slot takes of a budget: a page, a block of 32 tokens, a page a tensor. Others hold it apart."""


@pytest.fixture(params=[kind for kind in CACHES if kind != "contiguous"])
def small(request: pytest.FixtureRequest, host_driver: HostDriver) -> Iterator[Callable[[int], KVCache]]:
    """The kinds that can have less memory than their slots (all but maximum reservation), made for a number of tokens
    in all."""
    made: list[KVCache] = []

    def make(tokens: int) -> KVCache:
        budget = tokens * SHAPE.token_bytes + 4096 * DUMMY_PAGES.get(request.param, 0)
        longer = replace(SHAPE, max_seq_len=400)
        made.append(make_cache(request.param, longer, "cpu", budget, lookahead=0, driver=host_driver))
        return made[-1]

    yield make
    for each in made:
        each.close()
