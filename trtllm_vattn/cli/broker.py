"""`broker`: lend one device's memory to several processes, and look at or change what each may have
(trtllm_vattn/tenancy/README.md)."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from trtllm_vattn.arguments import amount, device, listed, size
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.sizes import parse_bytes
from trtllm_vattn.table import tabulate
from trtllm_vattn.values import counted

COLUMNS = {
    "tenant": "name",
    "process": "pid",
    "state": "state",
    "lent MiB": "lent:,.1f",
    "budget": "budget:,.1f",
    "share": "share:,.1f",
    "needs": "needs:,.1f",
    "wants": "wants:,.1f",
    "floor": "floor:,.1f",
    "ceiling": "ceiling:,.1f",
    "priority": "priority",
    "beside": "beside_bytes:,.1f",
}
EXPLAINED = (
    "In MiB. lent: what it has now. budget: what it may have now, until others have given back what they owe; share: "
    "what it may have then, by floors, priorities, needs and wants. needs: what its running sequences use; wants: with "
    "those that wait. beside: what its process has on the device and was not lent."
)
"""Below the table of `status`, and in its help."""
BYTES = ("lent", "budget", "share", "needs", "wants", "floor", "ceiling", "beside_bytes")

if TYPE_CHECKING:
    from trtllm_vattn.tenancy.protocol import TenantStatus
    from trtllm_vattn.tenancy.tenant import Client


def bytes_or_none(text: str) -> int:
    """Bytes from 0 on: ``40GiB``."""
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def priority(text: str) -> int:
    """A whole number from -1000 to 1000."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 5) or not -1000 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}; give a whole number from -1000 to 1000")
    return int(text)


def users(text: str) -> list[int]:
    """Users by number: ``1000,1001``."""

    def user(part: str) -> int:
        if not (part.isascii() and part.isdecimal() and len(part) < 11):
            raise argparse.ArgumentTypeError(f"it holds {part!r:.60}; give users by number, as 1000,1001")
        return int(part)

    return listed(text, user)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `broker`, which lends without an action; and its actions."""
    add = parser.add_argument
    text = "how much may be lent, as 100GiB; needed to start a broker (default: none, for an ACTION)"
    add("--memory", type=size, metavar="BYTES", help=text)
    text = "path of its Unix socket; needed to start a broker (default: none, for an ACTION)"
    add("--socket", type=Path, metavar="FILE", help=text)
    add("--device", type=device, default="cpu", metavar="DEVICE", help="cpu or cuda:N")
    text = "within which a tenant gives back what others are owed"
    add("--deadline-s", type=amount, default=1.0, metavar="SECONDS", help=text)
    text = "that may be tenants, by number, beside the one that runs the broker (default: none)"
    add("--allow", type=users, metavar="USER,...", help=text)
    text = (
        "end (SIGKILL) a tenant's process that owes memory beyond its deadline; else it is reported, and lent no more"
    )
    add("--kill", action="store_true", help=text)
    parser.set_defaults(do=_serve)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")

    text = "what is lent to whom"
    status = actions.add_parser("status", help=text, description=text, epilog=EXPLAINED)
    _add_socket(status)
    status.set_defaults(do=_status)

    text = "change a tenant's limits, while it serves or before it is there"
    limits = actions.add_parser("limits", help=text, description=text)
    _add_socket(limits)
    _add_tenant(limits)
    add = limits.add_argument
    text = "what it gets whenever it wants it (default: as it is)"
    add("--floor", type=bytes_or_none, metavar="BYTES", help=text)
    add("--ceiling", type=bytes_or_none, metavar="BYTES", help="what it holds at most (default: as it is)")
    text = "tenants of higher priority get first what is beyond floors (default: as it is)"
    add("--priority", type=priority, metavar="N", help=text)
    limits.set_defaults(do=_limits)

    for name, text in (
        ("sleep", "have a tenant give all its memory back between two steps, until it is woken"),
        ("wake", "have a tenant that sleeps take its memory again, from others if need be"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        _add_socket(action)
        _add_tenant(action)
        action.set_defaults(do=_set_asleep, asleep=name == "sleep")


def _add_socket(parser: argparse.ArgumentParser) -> None:
    text = "the broker's Unix socket"
    parser.add_argument("--socket", type=Path, required=True, metavar="FILE", help=text)


def _add_tenant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tenant", required=True, metavar="NAME", help="the name that it gave, or will give")


def run(args: argparse.Namespace) -> int:
    """Do what was asked for; 0."""
    code: int = args.do(args)
    return code


@contextmanager
def told_to_stop() -> Iterator[int]:
    """A descriptor that is readable after SIGTERM or SIGINT."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGTERM, signal.SIGINT)}
    woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(woken)
        for each, handler in before.items():
            signal.signal(each, handler)
        os.close(read)
        os.close(write)


def _serve(args: argparse.Namespace) -> int:
    if args.memory is None or args.socket is None:
        raise ConfigError("a broker begins with --memory and --socket; or give an action, see broker --help")
    # With msgspec, which is an extra.
    from trtllm_vattn.tenancy.broker import Broker, open_exportable

    logging.getLogger("trtllm_vattn.tenancy").setLevel(logging.INFO)
    # Each tenant takes five descriptors, on the host each extent one.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    driver = open_exportable(args.device)
    with told_to_stop() as stop:
        broker = Broker(
            driver,
            args.memory,
            args.socket,
            deadline_s=args.deadline_s,
            allow=args.allow or (),
            kill=args.kill,
        )
        try:
            print(
                f"lending {broker.books.memory:,} bytes of {args.device} at {args.socket}", file=sys.stderr, flush=True
            )
            broker.serve(stop)
        finally:
            broker.close()
    return 0


def _status(args: argparse.Namespace) -> int:
    from trtllm_vattn.tenancy.tenant import Client

    with Client(args.socket) as client:
        standing = client.standing()
    rows = []
    for tenant in standing.tenants:
        row = {name: getattr(tenant, name) for name in ("name", "pid", "state", "priority", *BYTES)}
        mebibytes = {name: None if row[name] is None else row[name] / (1 << 20) for name in BYTES}
        rows.append({**row, **mebibytes})
    print(f"{standing.device}: {standing.lent:,} of {standing.memory:,} bytes lent to {counted(len(rows), 'tenant')}")
    if rows:
        print(tabulate(rows, COLUMNS))
        print(fill(EXPLAINED, 120))
    return 0


def _limits(args: argparse.Namespace) -> int:
    from trtllm_vattn.tenancy.protocol import SetLimits
    from trtllm_vattn.tenancy.tenant import Client

    if args.floor is None and args.ceiling is None and args.priority is None:
        raise ConfigError("no limit to change; give --floor, --ceiling or --priority")
    with Client(args.socket) as client:
        client.do(SetLimits(args.tenant, args.floor, args.ceiling, args.priority))
        tenant = _tenant(client, args.tenant)
    if tenant is None:
        given = {"floor": args.floor, "ceiling": args.ceiling, "priority": args.priority}
        limits = ", ".join(_limit(name, value) for name, value in given.items() if value is not None)
        print(f"{args.tenant} is no tenant now; kept for when it comes: {limits}")
    else:
        limits = ", ".join(_limit(name, getattr(tenant, name)) for name in ("floor", "ceiling", "priority"))
        print(f"{tenant.name} now has {limits}; {tenant.lent:,} bytes are lent to it")
    return 0


def _limit(name: str, value: int) -> str:
    return f"{name} {value}" if name == "priority" else f"{name} {value:,} bytes"


def _tenant(client: Client, name: str) -> TenantStatus | None:
    """How a tenant stands; None where it is not there."""
    return next((each for each in client.standing().tenants if each.name == name), None)


def _set_asleep(args: argparse.Namespace) -> int:
    from trtllm_vattn.tenancy.protocol import SetAsleep
    from trtllm_vattn.tenancy.tenant import Client

    with Client(args.socket) as client:
        client.do(SetAsleep(args.tenant, args.asleep))
        tenant = _tenant(client, args.tenant)
    if tenant is None:
        print(f"{args.tenant} was told to {args.action}, and is no tenant any more")
        return 0
    then = "gives them back between two steps" if args.asleep else "takes memory again, from others if need be"
    print(f"{tenant.name} is told to {args.action}: {tenant.lent:,} bytes are lent to it now, and it {then}")
    return 0
