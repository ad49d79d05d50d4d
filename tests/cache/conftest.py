from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from shapes import SHAPE

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.paged import PagedCache
from trtllm_vattn.cache.select import CACHES, make_cache
from trtllm_vattn.vmm.host import HostDriver


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest, host_driver: HostDriver) -> Iterator[KVCache]:
    """Each kind of cache, with room for every slot at its maximum."""
    with make_cache(request.param, SHAPE, "cpu", driver=host_driver) as made:
        yield made


@pytest.fixture(params=("paged", "vattn"))
def small(request: pytest.FixtureRequest, host_driver: HostDriver) -> Iterator[Callable[[int], KVCache]]:
    """The kinds that can have less memory than their slots, made for a number of tokens in all."""
    made: list[KVCache] = []

    def make(tokens: int) -> KVCache:
        # A page in hand for the dummy slot, which the paged cache holds apart.
        spare = 4096 if request.param == "vattn" else 0
        budget = tokens * SHAPE.token_bytes + spare
        if request.param == "vattn":
            made.append(make_cache("vattn", SHAPE, "cpu", budget, lookahead=0, driver=host_driver))
        else:
            made.append(PagedCache(SHAPE, "cpu", 8, budget // (8 * SHAPE.token_bytes)))
        return made[-1]

    yield make
    for each in made:
        each.close()
