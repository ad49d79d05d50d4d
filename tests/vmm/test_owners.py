from __future__ import annotations

import gc

import pytest
import torch

from trtllm_vattn.errors import DriverError, InvariantViolation
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.owners import Extent, Reservation, RollbackFailed
from trtllm_vattn.vmm.tensors import tensor_at
from trtllm_vattn.vmm.wrappers import CountingDriver, FaultyDriver


def test_extents_map_in_a_row_with_one_set_access(driver: CountingDriver) -> None:
    granularity = driver.granularity()
    reservation = Reservation(driver, 8 * granularity)
    extents = [Extent(driver, size * granularity) for size in (1, 2, 1)]
    mappings = reservation.map(2 * granularity, extents)
    assert [mapping.offset // granularity for mapping in mappings] == [2, 3, 5]
    assert [mapping.address - reservation.base for mapping in mappings] == [m.offset for m in mappings]
    assert driver.calls["set_access"] == 1
    window = tensor_at(reservation.base + 2 * granularity, 4 * granularity, driver.device)
    window.fill_(3)
    assert int(window.sum(dtype=torch.int64)) == 12 * granularity
    assert (reservation.mappings, [extent.mappings for extent in extents]) == (3, [1, 1, 1])
    for owner in (*mappings, *extents, reservation):
        owner.close()
        owner.close()
    assert reservation.mappings == 0


def test_serials_grow_with_creation(host_driver: HostDriver) -> None:
    extents = [Extent(host_driver, 4096) for _ in range(3)]
    serials = [extent.serial for extent in extents]
    assert serials == sorted(set(serials))
    for extent in extents:
        extent.close()


def test_what_a_mapping_holds_is_not_closed(host_driver: HostDriver) -> None:
    reservation, extent = Reservation(host_driver, 4096), Extent(host_driver, 4096)
    (mapping,) = reservation.map(0, [extent])
    with pytest.raises(InvariantViolation, match="has 1 mappings"):
        extent.close()
    with pytest.raises(InvariantViolation, match="has 1 mappings"):
        reservation.close()
    mapping.close()
    extent.close()
    reservation.close()


@pytest.mark.parametrize("failing", range(6))
def test_every_failure_while_mapping_leaves_nothing_mapped(host_driver: HostDriver, failing: int) -> None:
    """Calls 0 to 2 map, 3 sets access; later ones do not happen."""
    faulty = FaultyDriver(host_driver)
    reservation = Reservation(faulty, 4 * 4096)
    extents = [Extent(faulty, 4096) for _ in range(3)]
    faulty.fail("*", skip=failing)
    if failing < 4:
        with pytest.raises(DriverError, match="injected"):
            reservation.map(0, extents)
        assert host_driver.live_mappings == reservation.mappings == sum(e.mappings for e in extents) == 0
    faulty.disarm()
    for mapping in reservation.map(0, extents):
        mapping.close()
    for extent in extents:
        extent.close()
    reservation.close()


def test_a_failed_rollback_names_what_is_left(host_driver: HostDriver) -> None:
    faulty = FaultyDriver(host_driver)
    reservation = Reservation(faulty, 4 * 4096)
    extents = [Extent(faulty, 4096) for _ in range(3)]
    faulty.fail("set_access")
    faulty.fail("unmap", skip=1)
    with pytest.raises(RollbackFailed, match="1 mappings could not be taken back") as caught:
        reservation.map(0, extents)
    assert [mapping.extent for mapping in caught.value.left] == [extents[1]]
    assert host_driver.live_mappings == 1
    caught.value.left[0].close()
    for owner in (*extents, reservation):
        owner.close()


@pytest.mark.parametrize("call", ["unmap", "release", "free"])
def test_a_failed_close_may_be_tried_again(host_driver: HostDriver, call: str) -> None:
    faulty = FaultyDriver(host_driver)
    reservation, extent = Reservation(faulty, 4096), Extent(faulty, 4096)
    (mapping,) = reservation.map(0, [extent])
    faulty.fail(call)
    for owner, closes in ((mapping, "unmap"), (extent, "release"), (reservation, "free")):
        if closes == call:
            with pytest.raises(DriverError, match=call):
                owner.close()
        owner.close()
    assert host_driver.live_handles == host_driver.live_reservations == host_driver.live_mappings == 0


def test_an_owner_that_is_dropped_open_warns(host_driver: HostDriver) -> None:
    extent = Extent(host_driver, 4096)
    handle = extent.handle
    with pytest.warns(ResourceWarning, match="was not closed"):
        extent.__del__()
    extent._open = False
    del extent
    gc.collect()
    host_driver.release(handle)


def test_a_failed_create_leaves_no_half_made_owner(host_driver: Driver) -> None:
    faulty = FaultyDriver(host_driver)
    faulty.fail("create")
    with pytest.raises(DriverError):
        Extent(faulty, 4096)
    gc.collect()
