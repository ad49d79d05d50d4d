from __future__ import annotations

from pathlib import Path

import pytest

from trtllm_vattn.errors import DriverError
from trtllm_vattn.trace import Trace, read_trace
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.owners import Extent, Reservation
from trtllm_vattn.vmm.wrappers import CountingDriver, FaultyDriver, QuiescingDriver, TracingDriver, WrappedDriver


def use(driver: CountingDriver | TracingDriver | FaultyDriver) -> None:
    granularity = driver.granularity()
    address, handle = driver.reserve(granularity), driver.create(granularity)
    driver.map(address, granularity, handle)
    driver.set_access(address, granularity)
    assert driver.record(0).done()
    driver.unmap(address, granularity)
    driver.release(handle)
    driver.free(address, granularity)


CALLS = ["reserve", "create", "map", "set_access", "record", "unmap", "release", "free"]


def test_counting(host_driver: HostDriver) -> None:
    driver = CountingDriver(host_driver)
    use(driver)
    use(driver)
    assert driver.calls == dict.fromkeys(CALLS, 2)
    assert set(driver.seconds) == set(CALLS)
    assert all(seconds > 0 for seconds in driver.seconds.values())


def test_tracing_notes_a_span_a_call(host_driver: HostDriver, tmp_path: Path) -> None:
    with Trace(tmp_path / "trace.json") as trace:
        driver = TracingDriver(host_driver, trace)
        use(driver)
        with pytest.raises(DriverError):
            driver.create(5)
    spans = [event for event in read_trace(trace.path) if event.get("cat") == "driver"]
    assert [span["name"] for span in spans] == [*CALLS, "create"]
    assert spans[0]["args"]["arguments"] == [4096]
    assert spans[2]["args"]["arguments"][0] == spans[0]["args"]["result"]
    assert spans[-1]["args"]["error"] == "CUDA_ERROR_INVALID_VALUE"
    assert all(span["dur"] > 0 for span in spans)


def test_an_injected_failure_does_not_reach_the_driver(host_driver: HostDriver) -> None:
    driver = FaultyDriver(host_driver)
    driver.fail("create", skip=1)
    handle = driver.create(4096)
    with pytest.raises(DriverError, match=r"create.* CUDA_ERROR_UNKNOWN .injected"):
        driver.create(4096)
    assert host_driver.live_handles == 1
    assert driver.seen == 2
    driver.release(handle)
    use(driver)


def test_any_call_may_be_failed_by_its_number(host_driver: HostDriver) -> None:
    driver = FaultyDriver(host_driver)
    driver.fail("*", skip=2)
    address, handle = driver.reserve(4096), driver.create(4096)
    with pytest.raises(DriverError) as caught:
        driver.map(address, 4096, handle)
    assert caught.value.call == "map"
    assert caught.value.arguments == (address, 4096, handle)
    driver.release(handle)
    driver.free(address, 4096)


def test_random_failures_are_repeatable_and_can_be_ended(host_driver: HostDriver) -> None:
    def failures() -> list[int]:
        driver = FaultyDriver(host_driver)
        driver.fail_randomly(0.3, seed=5)
        failed = []
        for index in range(50):
            try:
                driver.record(0)
            except DriverError:
                failed.append(index)
        driver.disarm()
        for _ in range(50):
            driver.record(0)
        return failed

    assert failures() == failures()
    assert 5 < len(failures()) < 30


def test_mappings_change_only_after_quiescing(host_driver: HostDriver) -> None:
    order: list[str] = []

    class Noting(WrappedDriver):
        def _call(self, name: str, *arguments: int) -> object:
            order.append(name)
            return super()._call(name, *arguments)

    driver = QuiescingDriver(Noting(host_driver), lambda: order.append("quiesce"))
    granularity = driver.granularity()
    reservation, extent = Reservation(driver, granularity), Extent(driver, granularity)
    (mapping,) = reservation.map(0, [extent])
    for owner in (mapping, extent, reservation):
        owner.close()
    changes = ["quiesce", "map", "quiesce", "set_access", "quiesce", "unmap"]
    assert order == ["reserve", "create", *changes, "release", "free"]


def test_a_sticky_failure_stays(host_driver: HostDriver) -> None:
    driver = FaultyDriver(host_driver)
    driver.fail("create", code="CUDA_ERROR_ILLEGAL_ADDRESS", sticky=True)
    driver.record(0)
    for call in (lambda: driver.create(4096), lambda: driver.record(0)):
        with pytest.raises(DriverError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            call()
    driver.disarm()
    use(driver)
