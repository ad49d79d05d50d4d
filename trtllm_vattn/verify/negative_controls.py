"""Negative controls of the soak: what must be caught if something goes wrong beneath a captured graph.

Each does one thing that the library never does, and reports how it was detected. A kernel that reads unmapped memory
ends its process, so that control runs in a process of its own, ``python -m trtllm_vattn.verify.negative_controls
DEVICE MODEL unfenced``; with ``fenced`` the same program waits before it unmaps, and has to survive.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from time import sleep
from typing import Any

import torch
from transformers import PreTrainedModel

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import CaptureError, UnmappedAccess
from trtllm_vattn.graphs.replay import GraphRunner
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.verify.differential import LANES, Differential, Replica
from trtllm_vattn.vmm.base import Driver, Fence
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.tensors import current_stream
from trtllm_vattn.vmm.wrappers import WrappedDriver

MakeDifferential = Callable[[], Differential]


class MappingTable(WrappedDriver):
    """Knows every mapping that is alive, so that a control can change it by the driver's calls alone, and the cache
    above does not notice."""

    def __init__(self, inner: Driver) -> None:
        super().__init__(inner)
        self._alive: dict[int, tuple[int, int]] = {}

    def _call(self, name: str, *arguments: int) -> Any:
        answer = super()._call(name, *arguments)
        if name == "map":
            address, size, handle = arguments
            self._alive[address] = (size, handle)
        elif name == "unmap":
            address, size = arguments
            for each in [each for each in self._alive if address <= each < address + size]:
                del self._alive[each]
        return answer

    def beneath(self, cache: KVCache, slot: int, tokens: int) -> list[tuple[int, int, int]]:
        """Address, size and handle of each mapping that holds one of a slot's first tokens, in order of addresses."""
        addresses = {
            cache.layer(layer).k[slot, token].data_ptr()
            for layer in range(cache.shape.num_layers)
            for token in range(tokens)
        }
        return sorted(
            (start, size, handle)
            for start, (size, handle) in self._alive.items()
            if any(start <= address < start + size for address in addresses)
        )


def run_controls(make: MakeDifferential, table: MappingTable, device: str, model: str) -> dict[str, str]:
    """All controls; what caught each, or ``missed``. `make` builds replicas over the driver `table`."""
    return {
        "unfenced unmap": unfenced_unmap(device, model),
        "page swapped for another's": _with_replicas(make, partial(swapped_page, table)),
        "stale table": _with_replicas(make, stale_table),
        "length past the frontier": _with_replicas(make, length_past_frontier),
        "foreign address in the graph": foreign_address(torch.device(device)),
    }


def _with_replicas(make: MakeDifferential, control: Callable[[Differential], str]) -> str:
    differential = make()
    try:
        for _ in range(30):
            differential.step(check_eager=False)
        differential.count_mismatches()
        if differential.tally.mismatches:
            return "missed: the replicas differed before anything was done"
        return control(differential)
    finally:
        differential.close()


def swapped_page(table: MappingTable, differential: Differential) -> str:
    """Two sequences' first pages change places, and their bytes do not."""
    cache = differential.subject.cache
    if cache.device.type == "cuda":
        torch.cuda.synchronize(cache.device)
    while len(differential.limits) > 0:
        differential.release()
    # So that both slots are mapped anew, alike.
    cache.release_free_memory()
    for _ in range(2):
        differential.admit(prompt_len=64)
    first, second = (table.beneath(cache, cache.slot_of(sequence), 1) for sequence in differential.limits)
    for address, size, _ in (*first, *second):
        table.unmap(address, size)
    for (one, size, handle), (other, _, another) in zip(first, second, strict=True):
        for address, mapped in ((one, another), (other, handle)):
            table.map(address, size, mapped)
            table.set_access(address, size)
    for _ in range(3):
        differential.step(check_eager=False)
        differential.count_mismatches()
    return f"{differential.tally.mismatches} rows differed" if differential.tally.mismatches else "missed"


def stale_table(differential: Differential) -> str:
    """A sequence has moved, and the table of the lanes still says where it was."""
    decode = differential.subject.decode
    before = decode.slots.copy()
    for _ in range(20):
        differential.move()
        if (decode.slots != before).any():
            break
    decode.slots[:] = before
    decode.resend()
    return _guarded(lambda: differential.subject.launch(1))


def length_past_frontier(differential: Differential) -> str:
    """A lane claims a token more than is mapped for its sequence."""
    decode, cache = differential.subject.decode, differential.subject.cache
    cache.prepare_step(decode.lengths_after(1))
    slot, lane = next(iter(decode.lane_of.items()))
    decode.lengths[lane] = decode.limits[lane] = cache.frontiers[slot] + 1
    decode.positions[lane] = decode.lengths[lane] - 1
    decode.resend()
    return _guarded(lambda: decode.launch(1))


def _guarded(launch: Callable[[], object]) -> str:
    try:
        launch()
    except UnmappedAccess as error:
        return f"refused: {error}"
    return "missed"


def foreign_address(device: torch.device) -> str:
    """A step uses a tensor that was not declared static."""
    mine, foreign = torch.ones(64, device=device), torch.ones(64, device=device)
    runner = GraphRunner(lambda bucket: (mine[:bucket] + foreign[:bucket],), [8], [mine], device)
    try:
        runner.capture()
        runner.audit().raise_if_foreign()
    except CaptureError as error:
        return f"refused: {error}"
    finally:
        runner.close()
    return "missed"


def unfenced_unmap(device: str, model: str) -> str:
    """Memory is unmapped beneath replays that were submitted before, in a process of its own."""
    code, said, errors = _unmap_apart(device, model, "unfenced")
    if "unmapping beside" not in said or "survived" in said or code == 0:
        return f"missed: {said[-200:]} {errors[-200:]}"
    lines = [line for line in errors.splitlines() if "illegal" in line.lower() or "Segmentation" in line]
    return f"the process ended with code {code}" + (f": {lines[-1].strip()}" if lines else "")


def fenced_unmap(device: str, model: str) -> str:
    """The same, but for the unmapping waiting for the fence of those replays; ``survived``, as it has to."""
    code, said, errors = _unmap_apart(device, model, "fenced")
    if "unmapping after" in said and "survived" in said and code == 0:
        return "survived"
    return f"the process ended with code {code}: {said[-200:]} {errors[-200:]}"


def _unmap_apart(device: str, model: str, how: str) -> tuple[int | None, str, str]:
    """Exit code (None where it did not end), output and errors of the process."""
    command = [sys.executable, "-m", "trtllm_vattn.verify.negative_controls", device, model, how]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return None, "it did not end in 300 s", ""
    return done.returncode, done.stdout.strip(), done.stderr.strip()


@torch.inference_mode()
def _unmap_beside_replays(model: PreTrainedModel, device: str, fenced: bool) -> None:
    driver = open_driver(device)
    table = MappingTable(driver)
    cache = KVCacheManager(shape_of(model, LANES, 256), table, 1 << 30)
    replica = Replica(model, cache)
    replica.admit(0, list(range(60)), 250)
    # Mapped as far as the replays go; truncating keeps the memory.
    cache.extend(0, 190)
    cache.truncate(0, 60)
    replica.launch(1).read()
    fence = _submit_replays(replica, driver, 50)
    if fenced:
        _wait(fence)
    print(f"unmapping {'after' if fence.done() else 'beside'} replays", flush=True)
    unmapped = table.beneath(cache, cache.slot_of(0), 250)
    for address, size, _ in unmapped:
        table.unmap(address, size)
    _wait(fence)
    print("survived", flush=True)
    for address, size, handle in unmapped:
        table.map(address, size, handle)
    replica.close()


def _submit_replays(replica: Replica, driver: Driver, times: int) -> Fence:
    """Hand replays to the device, behind work that keeps it from them for a while; on the host, to a thread."""
    runner = replica.decode.runner
    if isinstance(driver, HostDriver):
        driver.hold()
        fence: Fence = driver.record(0)

        def replay() -> None:
            for _ in range(times):
                runner.replay(LANES)
            driver.complete()

        threading.Thread(target=replay).start()
        return fence
    work = torch.ones(8192, 8192, device=driver.device)
    for _ in range(10):
        torch.mm(work, work)
    for _ in range(times):
        runner.replay(LANES)
    return driver.record(current_stream(driver.device))


def _wait(fence: Fence) -> None:
    while not fence.done():
        sleep(0.001)


if __name__ == "__main__":
    where, name, how = sys.argv[1:]
    _unmap_beside_replays(load_model(name, where, torch.float32), where, how == "fenced")
