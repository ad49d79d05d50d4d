"""`Calibration`: the numbers of one machine that the formulas need, as a JSON file.

Each number is kept with its source; what was not measured is marked ``estimated``. `trtllm-vattn calibrate` writes one,
by default into the folder of this machine's probes, where `find` looks first; the package has one for each of some
cards (data/).
"""

from __future__ import annotations

import itertools
import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.files import reason, write_json
from trtllm_vattn.values import shown

FORMAT = 1
DATA = Path(__file__).parent / "calibration"
"""Defaults of some cards; the name of a file is the card's, as results are filed by. The folder has this module's name,
or mypy would take it for a package without a file."""


@dataclass(frozen=True)
class Curve:
    """A number that depends on another one: measured points, linear in the logarithm of `x` between them, and constant
    beyond the first and the last.

    Parameters
    ----------
    points : sequence of (float, float)
        (x, y) with x rising, all above 0.
    """

    points: tuple[tuple[float, float], ...]

    def __call__(self, x: float) -> float:
        (x0, y0), (x1, y1) = self._around(x)
        return y0 if x0 == x1 else y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)

    def in_proportion(self, x: float, inverse: bool = False) -> float:
        """Linear in `x` itself between points, and beyond the last one in proportion to it; with `inverse` this is so
        of 1 / y."""
        (x0, y0), (x1, y1) = self._around(x)
        if inverse:
            y0, y1 = 1 / y0, 1 / y1
        y = y0 if x0 == x1 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        y *= max(1.0, x / self.points[-1][0])
        return 1 / y if inverse else y

    def _around(self, x: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """The points on both sides, or twice the one at the end."""
        xs = [each[0] for each in self.points]
        at = bisect_right(xs, x)
        return self.points[max(0, at - 1)], self.points[min(at, len(xs) - 1)]


QUANTITIES: dict[str, tuple[bool, str]] = {
    "create_us": (True, "microseconds of cuMemCreate by bytes of the handle, in a burst of fresh handles"),
    "map_us": (True, "microseconds of cuMemMap by bytes of the handle, in a burst"),
    "set_access_us": (True, "microseconds of cuMemSetAccess a handle, by its bytes, in a burst"),
    "unmap_us": (True, "microseconds of cuMemUnmap a handle, by its bytes"),
    "release_us": (True, "microseconds of cuMemRelease by bytes of the handle"),
    "page_beside_us": (False, "microseconds to create, map and make accessible a page beside a busy device, p99"),
    "admit_us": (False, "microseconds of the host to admit a prompt, without driver calls"),
    "mapping_us": (False, "microseconds of the host for each mapping, without the driver call"),
    "host_us": (False, "microseconds of the host in a decode step, whatever the batch"),
    "host_lane_us": (False, "microseconds of the host in a decode step for each sequence"),
    "read_bytes_per_s": (False, "bytes a second of plain reads in order"),
    "copy_bytes_per_s": (False, "bytes a second copied on the device"),
    "tlb_reach_bytes": (False, "bytes whose addresses the TLB holds; random reads beyond miss"),
    "tlb_walk_ns": (False, "nanoseconds a miss, of all SMs together, pages mapped in order of creation"),
    "tlb_walk_scattered_ns": (False, "nanoseconds a miss, pages mapped in a random order"),
    "attention_us": (False, "microseconds a layer of decode attention, however little it reads"),
    "attention_bytes_per_s": (False, "bytes a second that decode attention reads beyond that"),
    "attention_row_factor": (True, "what attention's rate is multiplied by, by bytes of a token's row"),
    "attention_batch_factor": (True, "what attention's rate is multiplied by in an engine's steps, by sequences"),
    "prompt_attention_us": (False, "microseconds a layer of a prompt's attention, however short"),
    "prompt_attention_flops_per_s": (False, "operations a second of a prompt's attention beyond that"),
    "weights_bytes_per_s": (True, "bytes of weights a second in matrix products, by rows"),
    "layer_us": (True, "microseconds a layer beside products and attention, by rows: norms, gates, launches"),
}
"""Numbers of a calibration: whether each is a curve, and what it is."""


@dataclass(frozen=True)
class Calibration:
    """Numbers of a machine (`QUANTITIES` says what each is).

    Attributes
    ----------
    card : str
        As results are filed by: ``h200``, ``host``.
    granularity : int
        Bytes; of the driver.
    about : dict
        GPU, driver, versions, date, and whatever else says where the numbers are from.
    sources : dict of str to str
        Of each number, where it is from.
    estimated : frozenset of str
        Names of those that were not measured on such a card.
    """

    card: str
    granularity: int
    about: dict[str, Any]
    numbers: dict[str, float]
    curves: dict[str, Curve]
    sources: dict[str, str] = field(default_factory=dict)
    estimated: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> float:
        return self.numbers[name]

    def at(self, name: str, x: float) -> float:
        """A curve's value."""
        return self.curves[name](x)

    def weights_s(self, nbytes: float, rows: float) -> float:
        """Seconds of products of so many rows with weights of so many bytes. Beyond the last measured number of rows
        they are computing: in proportion to rows."""
        return nbytes / self.curves["weights_bytes_per_s"].in_proportion(rows, inverse=True)

    def layer_us(self, rows: float) -> float:
        """Microseconds of a layer's other kernels; in proportion to rows beyond the last measured number."""
        return self.curves["layer_us"].in_proportion(rows)

    @classmethod
    def from_dict(cls, given: Any, where: str) -> Calibration:
        """Out of a calibration's JSON. Raises ConfigError that names `where` and what is wrong there."""
        if not isinstance(given, Mapping) or given.get("format") != FORMAT:
            has = given.get("format") if isinstance(given, Mapping) else type(given).__name__
            raise ConfigError(
                f"{where} is no calibration of format {FORMAT} (it has {shown(has)}); run trtllm-vattn calibrate"
            )
        found = given.get("quantities")
        if not isinstance(found, Mapping):
            raise ConfigError(f"{where} has no quantities; make another by trtllm-vattn calibrate")
        if strange := sorted(set(found) ^ set(QUANTITIES)):
            raise ConfigError(
                f"{where} lacks, or has without need, {', '.join(map(str, strange[:5]))}; make another by trtllm-vattn "
                "calibrate"
            )
        numbers, curves = {}, {}
        for name, (is_curve, _) in QUANTITIES.items():
            each = found[name]
            value = each.get("value") if isinstance(each, Mapping) else None
            if is_curve:
                curves[name] = Curve(_points(value, f"{where}: {name}"))
            else:
                numbers[name] = _number(value, f"{where}: {name}")
        granularity = given.get("granularity")
        if not isinstance(granularity, int) or isinstance(granularity, bool) or granularity < 1:
            raise ConfigError(f"{where}: granularity is {shown(granularity)}; it is a positive number of bytes")
        return cls(
            str(given.get("card", "unknown")),
            granularity,
            {key: value for key, value in given.items() if key not in ("format", "card", "granularity", "quantities")},
            numbers,
            curves,
            {name: str(each.get("source", "")) for name, each in found.items()},
            frozenset(name for name, each in found.items() if each.get("estimated")),
        )

    def as_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        quantities: dict[str, Any] = {}
        for name, (is_curve, text) in QUANTITIES.items():
            value: Any = [list(point) for point in self.curves[name].points] if is_curve else self.numbers[name]
            quantities[name] = {"value": value, "what": text, "source": self.sources.get(name, "")}
            if name in self.estimated:
                quantities[name]["estimated"] = True
        head = {"format": FORMAT, "card": self.card, "granularity": self.granularity}
        return {**head, **self.about, "quantities": quantities}


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{what} is {shown(value)}; it is a number above 0")
    return float(value)


def _points(value: Any, what: str) -> tuple[tuple[float, float], ...]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not value or not all(isinstance(each, Sequence) and len(each) == 2 for each in value):
        raise ConfigError(f"{what} is {shown(value)}; it is a list of pairs of numbers")
    points = tuple((_number(x, what), _number(y, what)) for x, y in value)
    if any(one[0] >= other[0] for one, other in itertools.pairwise(points)):
        raise ConfigError(f"{what} is {shown(value)}; the first numbers of its pairs rise")
    return points


def load(path: Path) -> Calibration:
    """Read a calibration. Raises ConfigError where there is none."""
    try:
        given = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the calibration {path}: {reason(error)}") from error
    except ValueError as error:
        what = "give a file that trtllm-vattn calibrate wrote"
        raise ConfigError(f"cannot read the calibration {path}: it is no JSON ({error}); {what}") from error
    return Calibration.from_dict(given, str(path))


def save(calibration: Calibration, path: Path) -> None:
    """Write a calibration; the file is there whole or not at all. Raises ConfigError where it cannot be written."""
    write_json(path, "the calibration", calibration.as_dict())


def folder() -> Path:
    """Where `trtllm-vattn calibrate` keeps what it measured on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtllm-vattn" / "calibration"


def packaged() -> list[str]:
    """Cards with a default in the package."""
    return sorted(path.stem for path in DATA.glob("*.json"))


def find(card: str) -> Calibration | None:
    """The numbers of a card: as measured on this machine, else the package's; None without either. Raises ConfigError
    where a file cannot be read."""
    for path in (folder() / f"{card}.json", DATA / f"{card}.json"):
        if path.is_file():
            return load(path)
    return None


def named(name: str) -> Calibration:
    """What a file holds, or the numbers of a card. Raises ConfigError where there is neither."""
    if name.endswith(".json") or os.sep in name or Path(name).is_file():
        return load(Path(name))
    if (found := find(name)) is None:
        raise ConfigError(
            f"no calibration of {name!r}; the package has {', '.join(packaged())}: run trtllm-vattn calibrate on the "
            "machine, or name a file that it wrote"
        )
    return found
