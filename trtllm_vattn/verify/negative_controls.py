"""Negative controls of the soak: what must be caught if something goes wrong beneath a captured graph.

Each does one thing that the library never does, and reports how it came to light. A kernel that reads memory that is
gone ends its process, so that control runs in a process of its own, ``python -m trtllm_vattn.verify.negative_controls
DEVICE MODEL unfenced``; with ``fenced`` the same program waits before it unmaps, and has to survive.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from time import sleep
from typing import Any

import torch
from transformers import PreTrainedModel

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

MakeDifferential = Callable[[], Differential]


def run_controls(make: MakeDifferential, device: str, model: str) -> dict[str, str]:
    """All controls; what caught each, or ``missed``."""
    return {
        "unfenced unmap": unfenced_unmap(device, model),
        "page swapped for another's": _with_replicas(make, swapped_page),
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


def swapped_page(differential: Differential) -> str:
    """Two sequences' first pages change places, without their bytes: no public call does that, so the cache's insides
    are changed here on purpose."""
    cache: Any = differential.subject.cache
    if cache.device.type == "cuda":
        torch.cuda.synchronize(cache.device)
    while len(differential.limits) > 0:
        differential.release()
    for _ in range(2):
        differential.admit(prompt_len=64)
    first, second = (cache.arena.slots[cache.slot_of(sequence)].stripes[0] for sequence in differential.limits)
    for mapping in (*first, *second):
        mapping.close()
    for index, (one, other) in enumerate(zip(list(first), list(second), strict=True)):
        (first[index],) = one.reservation.map(one.offset, [other.extent])
        (second[index],) = other.reservation.map(other.offset, [one.extent])
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
    """A step uses a tensor that nobody said would stay."""
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
    cache = KVCacheManager(shape_of(model, LANES, 256), driver, 1 << 30)
    replica = Replica(model, cache)
    replica.admit(0, list(range(60)), 250)
    cache.arena.grow({cache.slot_of(0): 250})  # The cache's insides, on purpose: mapped whole, then unmapped below.
    replica.launch(1).read()
    fence = _submit_replays(replica, driver, 50)
    if fenced:
        _wait(fence)
    print(f"unmapping {'after' if fence.done() else 'beside'} replays", flush=True)
    for column in cache.arena.slots[cache.slot_of(0)].stripes:
        for mapping in column:
            mapping.close()
    _wait(fence)
    print("survived", flush=True)


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
