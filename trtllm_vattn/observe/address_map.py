"""The address space at a moment of a trace: which slot has which extents, and whose they are.

A trace (trace.py) holds every driver call with its addresses and handles, and every sequence that got or left a slot,
so that any moment of it can be drawn.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trtllm_vattn.cache.slotted import LEFT, PLACED
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.files import write_whole
from trtllm_vattn.values import counted

Event = dict[str, Any]
RUNNING, IDLE, SHARED = "backs a running sequence", "parked or retained", "in more than one slot"
DUMMY = "the dummy slot's"
COLOURS = {RUNNING: "#009E73", IDLE: "#56B4E9", SHARED: "#E69F00", DUMMY: "#999999"}
"""Of Okabe and Ito's palette, told apart by the colour-blind."""
MOST_SLOTS = 64
"""Rows that a picture has room for."""


@dataclass(frozen=True)
class AddressMap:
    """One moment.

    Attributes
    ----------
    at_s : float
        Seconds since the trace began.
    mapped : dict
        (slot, range) to (byte from the slot's start, bytes, handle) of each of its mappings, in order. The last slot is
        the dummy.
    owners : dict of int to str
        The sequence of each slot that has one.
    """

    at_s: float
    mapped: dict[tuple[int, int], list[tuple[int, int, int]]]
    owners: dict[int, str]
    dummy_slot: int

    @cached_property
    def shared(self) -> set[int]:
        """Handles that are mapped more than once."""
        counts = Counter(handle for places in self.mapped.values() for _, _, handle in places)
        return {handle for handle, count in counts.items() if count > 1}

    def kind(self, slot: int, handle: int) -> str:
        """Whose an extent in a slot is."""
        if slot == self.dummy_slot:
            return DUMMY
        if handle in self.shared:
            return SHARED
        return RUNNING if slot in self.owners else IDLE


class Space:
    """What a trace says of a cache's addresses.

    Parameters
    ----------
    events : list of dict
        `trace.read_trace`'s, of one cache built over a `TracingDriver`.

    Attributes
    ----------
    begins : float
        When the trace does, in microseconds of its clock.
    lasts_s : float
        Seconds from then to the end of its last event.

    Raises
    ------
    ConfigError
        No cache was traced, several were, or without its driver calls.
    """

    def __init__(self, events: list[Event]) -> None:
        noted = (event["args"] for event in events if event["name"] == "address space")
        layouts = list({tuple(layout["ranges"]): layout for layout in noted}.values())
        if len(layouts) != 1:
            raise ConfigError(f"the trace holds the address spaces of {len(layouts)} caches; one can be drawn")
        self.layout: dict[str, Any] = layouts[0]
        kept = (event for event in events if event.get("cat") in ("driver", "cache") and event["ph"] in "Xi")
        self._events = sorted(kept, key=_done_at)
        self._times = [_done_at(event) for event in self._events]
        if not any(event["name"] == "map" for event in self._events):
            raise ConfigError("the trace holds no driver call; trace an engine by Engine.from_pretrained(trace=...)")
        self.begins = next(event["ts"] for event in events if event["ph"] != "M")
        ends = max(event["ts"] + event.get("dur", 0.0) for event in events if event["ph"] != "M")
        self.lasts_s = (ends - self.begins) / 1e6

    def at(self, seconds: float) -> AddressMap:
        """The address space so many seconds after the trace began."""
        table: dict[int, tuple[int, int]] = {}
        owners: dict[int, str] = {}
        until = bisect_right(self._times, self.begins + 1e6 * seconds)
        for event in self._events[:until]:
            name, args = event["name"], event.get("args", {})
            if "error" in args:
                continue
            if name == "map":
                address, size, handle = args["arguments"]
                table[address] = size, handle
            elif name == "unmap":
                address, size = args["arguments"]
                whole = address in table and table[address][0] == size
                for each in [address] if whole else [each for each in table if address <= each < address + size]:
                    del table[each]
            elif name == PLACED:
                owners[args["slot"]] = str(args["sequence"])
            elif name == LEFT:
                owners.pop(args["slot"], None)
        return AddressMap(seconds, self._placed(table), owners, self.layout["slots"])

    def _placed(self, table: dict[int, tuple[int, int]]) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
        slot_bytes, slots = self.layout["slot_bytes"], self.layout["slots"]
        found: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for address, (size, handle) in sorted(table.items()):
            for number, base in enumerate(self.layout["ranges"]):
                slot, offset = divmod(address - base, slot_bytes)
                if 0 <= slot <= slots:
                    found.setdefault((slot, number), []).append((offset, size, handle))
        return found

    def burst(self, window_s: float) -> tuple[float, float]:
        """Seconds since the beginning before and after the `window_s` seconds in which most was mapped."""
        times = [
            time
            for event, time in zip(self._events, self._times, strict=True)
            if event["name"] == "map" and "error" not in event["args"]
        ]
        counts = [bisect_right(times, time + 1e6 * window_s) - place for place, time in enumerate(times)]
        first = times[counts.index(max(counts))] - self.begins
        return first / 1e6 - 1e-6, first / 1e6 + window_s


def _done_at(event: Event) -> float:
    at: float = event["ts"] + event.get("dur", 0.0)
    return at


def draw(space: Space, maps: list[AddressMap], path: Path) -> None:
    """Draw moments one above the other, slots as rows, addresses from left to right, ranges side by side. Raises
    ConfigError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ConfigError("maps need matplotlib: pip install 'trtllm-vattn[observe]'") from error
    slots = sorted({slot for each in maps for slot, _ in each.mapped})[:MOST_SLOTS]
    ends = [offset + size for each in maps for places in each.mapped.values() for offset, size, _ in places]
    wide, ranges = 1.02 * max(ends, default=1), len(space.layout["ranges"])
    unit, name = (2**20, "MiB") if wide * ranges >= 2**20 else (2**10, "KiB")
    tall = min(1.2 + 0.22 * len(slots), 9)
    figure, axes = pyplot.subplots(len(maps), 1, figsize=(11, tall * len(maps)), layout="constrained", squeeze=False)
    for axis, each in zip(axes[:, 0], maps, strict=True):
        for row, slot in enumerate(slots):
            for number in range(ranges):
                for offset, size, handle in each.mapped.get((slot, number), []):
                    left, colour = (number * wide + offset) / unit, COLOURS[each.kind(slot, handle)]
                    axis.broken_barh([(left, size / unit)], (row - 0.4, 0.8), color=colour, edgecolor="white", lw=0.4)
        labels = ["dummy" if slot == each.dummy_slot else str(slot) for slot in slots]
        axis.set_yticks(range(len(slots)), labels, fontsize=7)
        axis.set_ylim(max(len(slots), 1) - 0.5, -0.5)
        axis.set_xlim(0, ranges * wide / unit)
        axis.set_ylabel("slot")
        held = sum(size for _, size, _ in {p[2]: p for places in each.mapped.values() for p in places}.values())
        title = f"{each.at_s:.3f} s: {counted(len(each.owners), 'sequence')}, {held / 2**20:,.2f} MiB mapped"
        axis.set_title(title, fontsize=10, loc="left")
    axes[-1, 0].set_xlabel(
        f"{name} from the start of the slot" + (f", {ranges} ranges side by side" if ranges > 1 else "")
    )
    axes[0, 0].legend(handles=[Patch(color=colour, label=kind) for kind, colour in COLOURS.items()], fontsize=8)
    try:
        write_whole(path, "the map", lambda partial: figure.savefig(partial, dpi=130))
    finally:
        pyplot.close(figure)
