"""Draw the README's picture from a recorded run: pages that move beneath fixed addresses while a graph is replayed.

``python scripts/experiments/draw_idea.py RUN.json FOLDER`` writes ``idea-light.svg`` and ``idea-dark.svg``: drawings
with CSS animations, which browsers play in an image; where animations are off they show one moment of the run. What
moves is what the run recorded: every rectangle is an extent, its number is the driver's handle.
"""

from __future__ import annotations

import argparse
import json
import sys
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 880, 502
LEFT, TOP, CELL, ROW, TALL = 306, 96, 56, 46, 30
"""Where the slots' cells begin, how wide a page is, from one slot to the next, and how high a page is."""
SHELF_LEFT, SHELF_TOP, SHELF_WIDTH = 36, 406, 14
"""Where memory that is mapped nowhere lies: a row of so many pages."""
MOVE, AHEAD, PAUSE, HOLD = 0.9, 0.34, 0.34, 0.5
"""Seconds of an operation's moves, of a mapping made ahead, from one replay to the next, and of rest before replays."""
FADE = 0.25
LETTERS = "ABCDEF"
COLOURS = {
    "light": {
        **dict(zip(LETTERS, ("#3b7dd8", "#2f9e63", "#d9782b", "#8a5cd1", "#cf4660", "#17919b"), strict=True)),
        "parked": "#c3cad3",
        "free": "#e8ebf0",
        "card": "#ffffff",
        "edge": "#d0d7de",
        "empty": "#f3f5f8",
        "ink": "#1f2328",
        "quiet": "#59636e",
        "number": "#ffffff",
        "number-still": "#4a5460",
        "graph": "#eef4ff",
        "line": "#3b7dd8",
    },
    "dark": {
        **dict(zip(LETTERS, ("#5b9bf0", "#4cc38a", "#f0a04b", "#ae92f5", "#f27d90", "#3cc3cf"), strict=True)),
        "parked": "#4b535f",
        "free": "#2a303a",
        "card": "#0d1117",
        "edge": "#30363d",
        "empty": "#161b22",
        "ink": "#e6edf3",
        "quiet": "#9198a1",
        "number": "#0d1117",
        "number-still": "#c3cad3",
        "graph": "#111d33",
        "line": "#5b9bf0",
    },
}
Moment = tuple[float, float, float, float]
"""Seconds, x, y, opacity."""


@dataclass
class Piece:
    """One place of an extent: where it is seen when, and whose it is when."""

    handle: int
    pages: int
    moments: list[Moment] = field(default_factory=list)
    roles: list[tuple[float, str]] = field(default_factory=list)

    def go(self, start: float, end: float, x: float, y: float, opacity: float = 1) -> None:
        """Rest until `start`, then move; a piece that is new appears there."""
        if self.moments:
            last = self.moments[-1]
            self.moments.append((max(start, last[0]), *last[1:]))
        self.moments.append((end, x, y, opacity))

    def at(self, time: float) -> Moment:
        """Where it is at a moment."""
        index = bisect_right([moment[0] for moment in self.moments], time)
        if index == 0:
            return (time, *self.moments[0][1:3], 0)
        before = self.moments[index - 1]
        if index == len(self.moments):
            return (time, *before[1:])
        after = self.moments[index]
        part = (time - before[0]) / (after[0] - before[0])
        x, y, opacity = (a + part * (b - a) for a, b in zip(before[1:], after[1:], strict=True))
        return (time, x, y, opacity)

    def role_at(self, time: float) -> str:
        """Whose it is at a moment."""
        return [role for since, role in self.roles if since <= time or since == self.roles[0][0]][-1]


class Film:
    """The recorded run, laid out in time.

    Attributes
    ----------
    pieces : list of Piece
    captions : list of (seconds, text)
    replays : list of seconds
    owners, lengths : per slot, lists of (seconds, value)
    """

    def __init__(self, run: dict[str, Any]) -> None:
        self.config = run["config"]
        slots = self.config["slots"]
        self.pieces: list[Piece] = []
        self.captions: list[tuple[float, str]] = []
        self.replays: list[float] = []
        self.owners: list[list[tuple[float, str | None]]] = [[(0.0, None)] for _ in range(slots)]
        self.lengths: list[list[tuple[float, int]]] = [[(0.0, 0)] for _ in range(slots)]
        self._sizes: dict[int, int] = {}
        self._shelf: dict[int, Piece] = {}
        self._mapped: dict[int, Piece] = {}
        self._stored: dict[int, list[int]] = {}
        self._film(run["results"]["events"])

    def _film(self, events: list[dict[str, Any]]) -> None:
        now = 0.4
        scene: list[dict[str, Any]] = []
        captured = False
        operating = False
        for event in events:
            kind = event["event"]
            if kind == "captured":
                captured = True
                self._play(scene, -1.0, 0.5)  # the dummy slot's page is there before the film begins
                scene = []
            elif not captured:
                scene.append(event)
            elif kind == "operation":
                if scene:
                    self._play(scene, now, AHEAD)
                now += PAUSE
                self.captions.append((now, event["text"]))
                scene, operating = [], True
            elif kind == "replay":
                if scene:
                    self._play(scene, now, MOVE if operating else AHEAD)
                now += (MOVE + HOLD) if operating else PAUSE
                scene, operating = [], False
                self.replays.append(now)
                for lengths, length in zip(self.lengths, event["lengths"], strict=True):
                    lengths.append((now, length))
            else:
                scene.append(event)
        self._play(scene, now, MOVE)
        self.end = now + MOVE + 3 * HOLD

    # -- one scene -------------------------------------------------------------------------------------------------

    def _play(self, scene: list[dict[str, Any]], start: float, seconds: float) -> None:
        """Move what a scene's calls moved, all at once."""
        changes = next((event for event in scene if event["event"] == "owners"), None)
        if changes is not None:
            for slot, owner in enumerate(changes["owners"]):
                self.owners[slot].append((start + seconds / 2, owner))
                self.lengths[slot].append((start + seconds, changes["lengths"][slot]))
        back: list[Piece] = []
        for event in scene:
            getattr(self, f"_{event['event']}", self._ignore)(event, start, seconds, back)
        for piece in back:
            self._shelf[piece.handle] = piece
        self._pack(start, start + seconds)
        for address, piece in self._mapped.items():
            slot = self._place(address)[0]
            self._tell(piece, start, (slot < len(self.owners) and self.owners[slot][-1][1]) or "parked")
        for piece in self._shelf.values():
            self._tell(piece, start, "free")

    def _ignore(self, event: dict[str, Any], start: float, seconds: float, back: list[Piece]) -> None:
        """What changes nothing that is drawn."""

    def _create(self, event: dict[str, Any], start: float, seconds: float, back: list[Piece]) -> None:
        handle = event["result"]
        self._sizes[handle] = event["arguments"][0] // self.config["page_bytes"]
        piece = Piece(handle, self._sizes[handle])
        self.pieces.append(piece)
        self._shelf[handle] = piece
        x, y = self._spots()[handle]
        piece.go(start, start, x, y, 0)
        piece.go(start, start + seconds / 3, x, y)

    def _release(self, event: dict[str, Any], start: float, seconds: float, back: list[Piece]) -> None:
        handle = event["arguments"][0]
        piece = next((piece for piece in back if piece.handle == handle), None) or self._shelf[handle]
        if piece in back:
            back.remove(piece)
        self._shelf.pop(handle, None)
        x, y = piece.moments[-1][1:3]
        piece.go(start + seconds / 2, start + seconds + FADE, x, y + 14, 0)

    def _map(self, event: dict[str, Any], start: float, seconds: float, back: list[Piece]) -> None:
        address, _, handle = event["arguments"]
        place = self._place(address)
        if place is None:  # addresses that are used while bytes are copied
            return
        piece = self._shelf.pop(handle, None) or next((piece for piece in back if piece.handle == handle), None)
        if piece in back:
            back.remove(piece)
        if piece is None:
            other = next(other for other in self._mapped.values() if other.handle == handle)
            piece = Piece(handle, other.pages)
            self.pieces.append(piece)
            x, y = other.moments[-1][1:3]
            piece.go(start, start, x, y, 0)
            piece.go(start, start + 0.01, x, y)
        slot, page = place
        self._mapped[address] = piece
        piece.go(start + seconds / 3, start + seconds, LEFT + page * CELL, TOP + slot * ROW)

    def _unmap(self, event: dict[str, Any], start: float, seconds: float, back: list[Piece]) -> None:
        piece = self._mapped.pop(event["arguments"][0], None)
        if piece is None:
            return
        if any(other.handle == piece.handle for other in self._mapped.values()):
            x, y = piece.moments[-1][1:3]
            piece.go(start + seconds / 2, start + seconds, x, y, 0)
        else:
            back.append(piece)
            x, y = piece.moments[-1][1:3]
            piece.go(start, start + seconds / 4, x, y)

    def _pack(self, start: float, end: float) -> None:
        for handle, (x, y) in self._spots().items():
            piece = self._shelf[handle]
            if piece.moments[-1][1:3] != (x, y):
                piece.go(max(start, piece.moments[-1][0]), max(end, piece.moments[-1][0] + 0.01), x, y)

    def _spots(self) -> dict[int, tuple[float, float]]:
        """Where extents lie that are mapped nowhere: in a row, in the order of their creation."""
        spots, column = {}, 0
        for handle in sorted(self._shelf):
            spots[handle] = (float(SHELF_LEFT + column * CELL), float(SHELF_TOP))
            column += self._sizes[handle]
        return spots

    def _place(self, address: int) -> Any:
        """Slot and page of an address; None where it lies in no slot."""
        slot, offset = divmod(address - self.config["base"], self.config["slot_bytes"])
        page = offset // self.config["page_bytes"]
        if 0 <= slot <= self.config["slots"] and page < self.config["pages_a_slot"]:
            return slot, page
        return None

    @staticmethod
    def _tell(piece: Piece, time: float, role: str) -> None:
        if not piece.roles or piece.roles[-1][1] != role:
            piece.roles.append((time, role))


# -- drawing -----------------------------------------------------------------------------------------------------


class Drawing:
    """An SVG of a film, moving or at one moment."""

    def __init__(self, film: Film, run: dict[str, Any], theme: str, still: float, moving: bool) -> None:
        self.film, self.run, self.colours, self.still, self.moving = film, run, COLOURS[theme], still, moving
        self._rules: list[str] = []
        self._body: list[str] = []

    def _percent(self, time: float) -> str:
        return f"{100 * min(max(time, 0.0), self.film.end) / self.film.end:.3f}".rstrip("0").rstrip(".") + "%"

    def _animate(self, frames: list[tuple[float, str]], steps: bool) -> str:
        """A rule of these frames; returns its class."""
        if not self.moving:
            return ""
        name = f"k{len(self._rules)}"
        shown: dict[str, str] = {"0%": frames[0][1]}
        for time, style in frames:
            shown[self._percent(time)] = style
        shown["100%"] = frames[-1][1]
        body = "".join(f"{at}{{{style}}}" for at, style in shown.items())
        pace = "step-end" if steps else "ease-in-out"
        self._rules.append(
            f"@keyframes {name}{{{body}}}.{name}{{animation:{name} {self.film.end:.2f}s {pace} infinite}}"
        )
        return f' class="{name}"'

    def _shown(self, since: float, until: float) -> str:
        """Attributes of what is there for some time."""
        frames = [(0.0, "opacity:0"), (since, "opacity:1"), (until, "opacity:0")]
        if since <= 0:
            frames = [(0.0, "opacity:1"), (until, "opacity:0")]
        here = since <= self.still < until
        return f'{self._animate(frames, steps=True)} opacity="{int(here)}"'

    def _text(self, x: float, y: float, text: str, kind: str, more: str = "") -> None:
        self._body.append(f'<text x="{x:g}" y="{y:g}" data-kind="{kind}"{more}>{text}</text>')

    def svg(self) -> str:
        """The whole drawing."""
        self._frame()
        self._graph()
        self._slots()
        for piece in self.film.pieces:
            self._piece(piece)
        self._captions()
        summary = self.run["summary"]
        title = (
            f"Recorded on the host driver: {summary['replays']} replays of one captured graph, while "
            f"{summary['mappings_made']} mappings were made and {summary['mappings_taken_away']} taken away; "
            f"{summary['wrong_replays']} wrong sums"
        )
        c = self.colours
        sans = "-apple-system,BlinkMacSystemFont,'Segoe UI',Helvetica,Arial,'DejaVu Sans',sans-serif"
        mono = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
        fixed = (
            f"text{{font-family:{sans};font-size:13px}}"
            f"[data-kind=address]{{font-family:{mono};font-size:11.5px;fill:{c['quiet']}}}"
            f"[data-kind=quiet]{{fill:{c['quiet']};font-size:12px}}"
            f"[data-kind=caption]{{font-size:19px;font-weight:600}}"
            f"[data-kind=count]{{font-size:26px;font-weight:700;text-anchor:middle}}"
            f"[data-kind=middle]{{text-anchor:middle}}"
            f"[data-kind=number]{{font-family:{mono};font-size:11px;text-anchor:middle}}"
            "@media (prefers-reduced-motion:reduce){*{animation:none!important}}"
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            f'fill="{c["ink"]}" role="img"><title>{title}</title><style>{fixed}{"".join(self._rules)}</style>'
            + "\n".join(self._body)
            + "</svg>\n"
        )

    def _frame(self) -> None:
        c = self.colours
        self._body.append(
            f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="10" fill="{c["card"]}" '
            f'stroke="{c["edge"]}"/>'
        )
        self._text(LEFT, TOP - 14, "virtual addresses: reserved once, the same for ever", "quiet")
        self._text(30, SHELF_TOP - 16, "free extents: physical memory that is mapped nowhere", "quiet")
        self._body.append(
            f'<rect x="30" y="{SHELF_TOP - 6}" width="{SHELF_WIDTH * CELL + 12}" height="{TALL + 12}" '
            f'rx="8" fill="none" stroke="{c["edge"]}"/>'
        )
        summary = self.run["summary"]
        foot = (
            f"Recorded on the host driver, {self.run['started'][:10]}: {summary['replays']} replays of one captured "
            f"graph, {summary['mappings_made']} mappings made, {summary['mappings_taken_away']} taken away, "
            f"{summary['wrong_replays']} wrong sums."
        )
        self._text(30, HEIGHT - 34, foot, "quiet")
        more = "Each rectangle is one physical allocation, #n its handle; the bar below shows how long the sequence is."
        self._text(30, HEIGHT - 16, more, "quiet")

    def _graph(self) -> None:
        """The captured graph, its count of replays, and the addresses that it holds."""
        c, film = self.colours, self.film
        slots = film.config["slots"] + 1
        top, bottom = TOP - 2, TOP + (slots - 1) * ROW + TALL + 2
        middle = 100
        self._body.append(
            f'<rect x="30" y="{top}" width="140" height="{bottom - top}" rx="10" fill="{c["graph"]}" '
            f'stroke="{c["line"]}" stroke-width="1.5"/>'
        )
        self._text(middle, top + 40, "one graph,", "middle")
        self._text(middle, top + 58, "captured once", "middle")
        self._text(middle, bottom - 74, "replays", "middle")
        pulses: list[tuple[float, str]] = [(0.0, "opacity:.25")]
        for time in film.replays:
            pulses += [(time - 0.02, "opacity:.25"), (time, "opacity:1"), (time + 0.22, "opacity:.25")]
        shown = self._animate(pulses, steps=False)
        lines = "".join(f'<path d="M170 {TOP + slot * ROW + TALL / 2:g} H190"/>' for slot in range(slots))
        self._body.append(f'<g{shown} opacity=".7" fill="none" stroke="{c["line"]}" stroke-width="1.6">{lines}</g>')
        height = 40
        counts = [(0.0, 0), *((time, number + 1) for number, time in enumerate(film.replays))]
        frames = [(time, f"transform:translateY({-height * count}px)") for time, count in counts]
        now = [count for time, count in counts if time <= self.still][-1]
        numbers = "".join(
            f'<text x="{middle}" y="{height * count + 30}" data-kind="count">{count}</text>' for _, count in counts
        )
        inner = self._animate(frames, steps=True)
        self._body.append(
            f'<svg x="30" y="{(top + bottom) / 2 - 8:g}" width="140" height="{height}" viewBox="30 0 140 {height}">'
            f'<g{inner} transform="translate(0 {-height * now})">{numbers}</g></svg>'
        )

    def _slots(self) -> None:
        c, film = self.colours, self.film
        pages = film.config["pages_a_slot"]
        wide = pages * CELL
        most = pages * film.config["tokens_a_page"]
        dummy = film.config["base"] + film.config["slots"] * film.config["slot_bytes"]
        y = TOP + film.config["slots"] * ROW
        self._text(196, y + 19, f"{dummy:#x}", "address")
        self._text(LEFT + CELL + 10, y + 19, "dummy slot: always mapped, idle lanes write here", "quiet")
        for slot in range(film.config["slots"]):
            y = TOP + slot * ROW
            address = film.config["base"] + slot * film.config["slot_bytes"]
            self._text(196, y + 19, f"{address:#x}", "address")
            for page in range(pages):
                self._body.append(
                    f'<rect x="{LEFT + page * CELL + 1}" y="{y + 0.5:g}" width="{CELL - 2}" height="{TALL - 1}" rx="4" '
                    f'fill="{c["empty"]}" stroke="{c["edge"]}" stroke-dasharray="2 3"/>'
                )
            lengths = film.lengths[slot]
            frames = [(time, f"transform:scaleX({length / most:.4g})") for time, length in lengths]
            now = [length for time, length in lengths if time <= self.still][-1]
            self._body.append(
                f'<g transform="translate({LEFT} {y + TALL + 3})"><rect{self._animate(frames, steps=False)} '
                f'width="{wide}" height="4" rx="1" fill="{c["quiet"]}" transform="scale({now / most:.4g} 1)"/></g>'
            )
            owners = [*film.owners[slot], (film.end, None)]
            for (since, owner), (until, _) in pairwise(owners):
                if owner:
                    label = f"request {owner}"
                    self._text(LEFT + wide + 12, y + 20, label, "owner", self._shown(since, until))

    def _piece(self, piece: Piece) -> None:
        c = self.colours
        frames = [
            (time, f"transform:translate({x:g}px,{y:g}px);opacity:{opacity:g}") for time, x, y, opacity in piece.moments
        ]
        if frames[0][0] > 0:
            frames.insert(0, (0.0, frames[0][1]))
        tail = piece.moments[-1]
        frames += [(self.film.end - 0.6, frames[-1][1])]
        frames += [(self.film.end, f"transform:translate({tail[1]:g}px,{tail[2]:g}px);opacity:0")]
        _, x, y, opacity = piece.at(self.still)

        def ink(role: str) -> str:
            return c["number" if role in LETTERS else "number-still"]

        fills = [(time, f"fill:{c[role]}") for time, role in piece.roles]
        inks = [(time, f"fill:{ink(role)}") for time, role in piece.roles]
        role = piece.role_at(self.still)
        wide = piece.pages * CELL
        self._body.append(
            f'<g{self._animate(frames, steps=False)} transform="translate({x:g} {y:g})" opacity="{opacity:g}">'
            f'<rect{self._animate(fills, steps=True)} x="1" width="{wide - 2}" height="{TALL}" rx="5" '
            f'fill="{c[role]}"/>'
            f'<g{self._animate(inks, steps=True)} fill="{ink(role)}"><text x="{wide / 2:g}" y="19" data-kind="number">'
            f"#{piece.handle}</text></g></g>"
        )

    def _captions(self) -> None:
        captions = [*self.film.captions, (self.film.end, "")]
        for (since, text), (until, _) in pairwise(captions):
            self._text(30, 46, text, "caption", self._shown(since, until))
        first = "The graph is captured before any request exists"
        self._text(30, 46, first, "caption", self._shown(0, captions[0][0]))


def draw(run: dict[str, Any], theme: str, moving: bool = True, still: float | None = None) -> str:
    """The SVG of a run; still ones show the moment `still`, in seconds, and moving ones where animations are off."""
    film = Film(run)
    return Drawing(film, run, theme, film.captions[5][0] + MOVE if still is None else still, moving).svg()


def main() -> int:
    """Draw a recorded run for light and dark pages."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    run = json.loads(args.run.read_text())
    for theme in COLOURS:
        (args.folder / f"idea-{theme}.svg").write_text(draw(run, theme))
    return 0


if __name__ == "__main__":
    sys.exit(main())
