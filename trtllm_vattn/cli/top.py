"""`top`: a live view of a running engine, by the address of its server or of `start_metrics_server`."""

from __future__ import annotations

import argparse
from time import sleep

from trtllm_vattn.arguments import amount, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `top`."""
    add = parser.add_argument
    add("url", nargs="?", default="http://127.0.0.1:8000", metavar="URL", help="of the server, or of its /metrics")
    add("--once", action="store_true", help="print one frame and end")
    add("--interval-s", type=amount, default=1.0, metavar="SECONDS", help="from one frame to the next")
    add("--slots", type=positive, default=20, metavar="COUNT", help="slots that are shown")


def run(args: argparse.Namespace) -> int:
    """Show frames until interrupted; 0."""
    from rich.console import Console
    from rich.live import Live

    from trtllm_vattn.observe.top import frame, read

    now = read(args.url)
    if args.once:
        Console().print(frame(now, most_slots=args.slots))
        return 0
    try:
        with Live(frame(now, most_slots=args.slots), auto_refresh=False, screen=True) as live:
            while True:
                sleep(args.interval_s)
                before, now = now, read(args.url)
                live.update(frame(now, before, args.slots), refresh=True)
    except KeyboardInterrupt:
        return 0
