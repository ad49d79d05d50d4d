"""`map`: the address space at moments of a trace, as a picture; before and after the largest burst, unless told."""

from __future__ import annotations

import argparse
from pathlib import Path

from trtllm_vattn.arguments import amount, listed, tolerance
from trtllm_vattn.bench.harness.flags import PLOTS, plot
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trace import read_trace
from trtllm_vattn.values import counted


def moments(text: str) -> list[float]:
    """Seconds, separated by commas."""
    return listed(text, tolerance)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `map`."""
    add = parser.add_argument
    add("trace", type=Path, metavar="FILE", help="of Engine(trace=...), serve --event-trace or generate --event-trace")
    add("--plot", type=plot, default="map.png", metavar="FILE", help=f"that is drawn, and ends in {', '.join(PLOTS)}")
    text = "since the trace began, each a map (default: before and after the burst)"
    add("--at-s", type=moments, metavar="SECONDS,...", help=text)
    add("--burst-s", type=amount, default=1.0, metavar="SECONDS", help="of the burst, in which most was mapped")


def run(args: argparse.Namespace) -> int:
    """Draw, and say what was drawn; 0."""
    from trtllm_vattn.observe.address_map import Space, draw

    events = read_trace(args.trace)
    try:
        space = Space(events)
        if args.at_s and max(args.at_s) > space.lasts_s:
            raise ConfigError(
                f"--at-s is {max(args.at_s):g}, and {args.trace} ends at {space.lasts_s:.3f} s; give less"
            )
        maps = [space.at(seconds) for seconds in args.at_s or space.burst(args.burst_s)]
    except ConfigError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the events of {args.trace} are not as an engine writes them ({type(error).__name__}: {error}); the file "
            "was changed, or is of another version"
        ) from error
    draw(space, maps, args.plot)
    for each in maps:
        count = sum(map(len, each.mapped.values()))
        held = f"{counted(len(each.owners), 'sequence')}, {counted(count, 'mapping')}"
        print(f"{each.at_s:.3f} s: {held}, {counted(len(each.shared), 'extent')} shared")
    print(f"drawn in {args.plot}")
    return 0
