"""Record the run that the README's picture is drawn from: a captured step is replayed while memory changes beneath it.

The run uses the real cache over the host driver, and is recorded by the trace that any engine can write
(trtllm_vattn/trace.py): driver calls, which sequence is in which slot, and what this script adds, operations and
replays. Each replay's sums are compared with a model that holds every token.

``python scripts/experiments/record_idea.py OUTPUT.json`` writes the run, ``draw_idea.py`` draws it; ``--trace FILE``
keeps the trace, for Perfetto.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.slotted import LEFT, PLACED
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.graphs.host_graph import HostGraph
from trtllm_vattn.machine import commit, machine, versions
from trtllm_vattn.trace import Trace, read_trace
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import TracingDriver

SLOTS, LONGEST, PAGES = 5, 64, 30
"""Slots, tokens a slot, and pages of the budget besides the dummy slot's."""
NOTED = ("reserve", "create", "release", "map", "unmap")


def events_of(trace: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is drawn, out of a trace: driver calls that succeeded, what this script noted, and behind each operation who
    has which slot."""
    owners: list[str | None] = [None] * SLOTS
    events: list[dict[str, Any]] = []
    for noted in trace:
        name, args, kind = noted["name"], noted.get("args", {}), noted.get("cat")
        if kind == "driver" and name in NOTED and "error" not in args:
            events.append({"event": name, **args})
        elif name == PLACED:
            owners[args["slot"]] = args["sequence"]
        elif name == LEFT:
            owners[args["slot"]] = None
        elif kind == "idea" and name == "owners":
            events.append({"event": name, "owners": list(owners), **args})
        elif kind == "idea":
            events.append({"event": name, **args})
    return events


class Recorder:
    """One captured step over one cache, and the requests that it decodes."""

    def __init__(self, trace: Path) -> None:
        self.trace = Trace(trace)
        self._host = HostDriver()
        driver = TracingDriver(self._host, self.trace)
        shape = CacheShape(1, 1, 64, torch.float32, SLOTS, LONGEST)
        page = driver.granularity()
        self.full = (PAGES + 1) * page
        self.cache = KVCacheManager(shape, driver, budget=self.full, lookahead=8)
        self.cache.trace_to(self.trace)
        self.page, self.tokens_a_page = page, page // shape.token_bytes
        self._guard = Guard(self.cache)
        layer = self.cache.layer(0)
        assert isinstance(layer, FlatKV)
        self._k, self._v = layer.k, layer.v
        self.tokens: dict[str, list[int]] = {}
        """Every request's tokens, by its letter: what the sums are compared with."""
        self._inputs = torch.zeros(4, SLOTS, dtype=torch.int64)
        self._inputs[0] = self.cache.dummy_slot
        self._every = torch.arange(LONGEST)
        self._sums = torch.zeros(SLOTS)
        static = [*self.cache.storages(), self._inputs, self._every, self._sums]
        self._graph = HostGraph.capture(self._step, static)
        self._note("captured", operations=len(self._graph))
        self.replays = self.wrong = 0

    def _step(self) -> None:
        """Store one token a lane, then sum the keys and values of each lane's sequence: all in the captured graph."""
        slots, positions, lengths, tokens = self._inputs
        row = tokens.to(torch.float32)[:, None, None].expand(SLOTS, 1, 64)
        self._k.index_put_((slots, positions), row)
        self._v.index_put_((slots, positions), -2 * row)
        places = torch.minimum(self._every[None], (lengths - 1).clamp(min=0)[:, None])
        there = self._every[None] < lengths[:, None]
        read = self._k[slots[:, None], places] - self._v[slots[:, None], places]
        self._sums.copy_(torch.where(there, read[..., 0, :].mean(-1), 0.0).sum(-1))

    def _note(self, event: str, **args: Any) -> None:
        self.trace.instant(event, args, "idea")

    def replay(self) -> None:
        """Decode one token of every request that is not at its slot's end, by a replay; then map ahead."""
        lengths = self.cache.lengths.copy()
        running = {name: self.cache.slot_of(name) for name in self.tokens}
        for name, slot in running.items():
            self.tokens[name].append(1 + (7 * len(self.tokens[name]) + ord(name)) % 31)
            lengths[slot] += 1
        self.cache.prepare_step(lengths)
        self._inputs.zero_()
        self._inputs[0] = self.cache.dummy_slot
        for name, slot in running.items():
            at = len(self.tokens[name])
            self._inputs[:, slot] = torch.tensor([slot, at - 1, at, self.tokens[name][-1]])
        slots, positions, after, _ = self._inputs.numpy()
        self._guard.check(after, slots, positions)
        self._graph.replay()
        self.replays += 1
        wrong = [name for name, slot in running.items() if self._sums[slot] != 3 * sum(self.tokens[name])]
        self.wrong += bool(wrong)
        self._note("replay", lengths=self.cache.lengths.tolist(), wrong=wrong)
        self.cache.map_ahead()

    def operate(self, text: str, change: Callable[[], object], replays: int) -> None:
        """One operation on the cache, noted with what it is called, and replays behind it."""
        self._note("operation", text=text)
        change()
        self._note("owners", lengths=self.cache.lengths.tolist())
        for _ in range(replays):
            self.replay()

    def admit(self, name: str, prompt: int) -> None:
        """A request with a prompt: its keys and values are stored outside the captured step, as a prefill does."""
        slot = self.cache.admit(name, prompt)
        self.tokens[name] = [1 + (5 * at + ord(name)) % 31 for at in range(prompt)]
        values = torch.tensor(self.tokens[name], dtype=torch.float32)[:, None, None]
        self._k[slot, :prompt], self._v[slot, :prompt] = values, -2 * values

    def release(self, name: str) -> None:
        self.cache.release(name)
        del self.tokens[name]

    def fork(self, name: str, new: str) -> None:
        length = len(self.tokens[name])
        self.cache.fork(name, new, length)
        self.tokens[new] = list(self.tokens[name])

    def close(self) -> None:
        self._k = self._v = torch.empty(0)
        self._graph.close()
        self.cache.close()
        self._host.close()
        self.trace.close()


def record(trace: Path) -> dict[str, Any]:
    """The whole run, recorded by a trace in this file: what the machine is, what was called, and what came of it."""
    run = Recorder(trace)
    cache = run.cache
    run.operate("Memory is created ahead, mapped nowhere yet", lambda: cache.preallocate(11, run.tokens_a_page), 2)
    run.operate("Request A arrives: its prompt is mapped", lambda: run.admit("A", 20), 3)
    run.operate("Request B arrives", lambda: run.admit("B", 19), 3)
    run.operate("Request C arrives; all grow, mapped ahead", lambda: run.admit("C", 9), 9)
    run.operate("D forks B: the same pages at two addresses", lambda: run.fork("B", "D"), 5)
    run.operate("A ends: its pages stay mapped, parked", lambda: run.release("A"), 3)
    run.operate("E adopts them: not one driver call", lambda: run.admit("E", 22), 4)
    run.operate("C moves to another slot: remapped, not copied", lambda: cache.move("C", 4), 4)
    run.operate("Other physical pages go beneath D", lambda: cache.replace("D"), 4)
    run.operate("B ends", lambda: run.release("B"), 2)
    run.operate("The budget shrinks: parked pages go back", lambda: cache.set_budget(21 * run.page), 3)
    run.operate("The budget grows again, and F arrives", lambda: (cache.set_budget(run.full), run.admit("F", 30)), 6)
    run.operate("All end", lambda: [run.release(name) for name in list(run.tokens)], 0)
    slot_bytes = cache.layout.slot_stride
    cache.check_integrity()
    run.close()
    events = events_of(read_trace(trace))
    # What closing the cache unmaps is not drawn.
    events = events[: max(place for place, each in enumerate(events) if each["event"] == "owners") + 1]
    reserved = next(event for event in events if event["event"] == "reserve")
    counts = {name: sum(event["event"] == name for event in events) for name in ("map", "unmap", "create")}
    return {
        "benchmark": "idea",
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": "python scripts/experiments/record_idea.py scripts/results/host/idea.json",
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": {
            "slots": SLOTS,
            "pages_a_slot": LONGEST // run.tokens_a_page,
            "tokens_a_page": run.tokens_a_page,
            "page_bytes": run.page,
            "slot_bytes": slot_bytes,
            "base": reserved["result"],
        },
        "results": {"events": events},
        "summary": {
            "graphs_captured": 1,
            "replays": run.replays,
            "wrong_replays": run.wrong,
            "mappings_made": counts["map"],
            "mappings_taken_away": counts["unmap"],
            "extents_created": counts["create"],
        },
    }


def main() -> int:
    """Record a run and write it; 1 where a replay's sums were wrong."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--trace", type=Path, help="keep the trace there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = record(args.trace or Path(folder, "trace.json"))
    args.output.write_text(json.dumps(found, separators=(",", ":")).replace('{"event"', '\n{"event"') + "\n")
    print(json.dumps(found["summary"], indent=1))
    return int(found["summary"]["wrong_replays"] > 0)


if __name__ == "__main__":
    sys.exit(main())
