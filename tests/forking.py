"""Python processes that begin with torch, transformers and the package imported.

To import them takes a process several seconds. One server for a whole run of tests does it once, when it is first
asked, and forks: each child is a process of its own, with the arguments, environment, folder and streams of who asked,
which ends by its own exit code or signal. The command that asks stands in for Python (`-c`, `-m` or a script): signals
sent to it go on to the child, the child is killed where it is killed, and it ends as the child ends.

What is asked of an import, of an interpreter's start, or of variables that are read in an import, needs Python itself.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

VARIABLE = "VATTN_TESTS_FORKED_PYTHON"
"""The environment variable that names the command, for the tests' workers."""
HANDED_ON = (signal.SIGINT, signal.SIGTERM)


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start the server, which ends when its input does, and set `VARIABLE` to a command in `folder` that asks it."""
    command, address = folder / "python", folder / "socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)
    here = str(Path(__file__).parent)
    asking = f"import sys; sys.path.append({here!r}); import forking; forking.ask({str(address)!r})"
    command.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", "-c", asking])} "$@"\n')
    command.chmod(0o700)
    os.environ[VARIABLE] = str(command)
    with listener:
        serving = [sys.executable, __file__, str(listener.fileno())]
        return subprocess.Popen(serving, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[listener.fileno()])


def python() -> str:
    """The command."""
    return os.environ[VARIABLE]


def ask(address: str) -> None:
    """Have the server run this process's arguments, and end as they end."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b"."], [0, 1, 2])
        server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode() + b"\n")
        for number in HANDED_ON:
            signal.signal(number, lambda number, frame: server.send(bytes([number])))
        code = int(server.makefile().readline())
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _serve(listener: socket.socket) -> list[str]:
    """Fork for whoever asks, until the input ends; in a child, the arguments that it was asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        if 0 in select.select([0, listener], [], [])[0]:
            os._exit(0)
        asking = listener.accept()[0]
        _import()
        if not os.fork():
            listener.close()
            return _attended(asking)
        asking.close()
        while _is_reaped():
            pass


def _import() -> None:
    import torch

    torch.set_num_threads(1)
    for name in ("transformers.models.llama.modeling_llama", "trtllm_vattn.cli.main", "trtllm_vattn.runtime.engine"):
        importlib.import_module(name)


def _is_reaped() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False


def _attended(asking: socket.socket) -> list[str]:
    """Fork the child, in which the arguments are returned, and stay beside it until it ends."""
    streams = socket.recv_fds(asking, 1, 3)[1]
    arguments, folder, environment = json.loads(asking.makefile().readline())
    child = os.fork()
    if not child:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        asking.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        return list(arguments)
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    ended = os.pidfd_open(child)
    while ended not in (ready := select.select([ended, asking], [], [])[0]):
        assert asking in ready
        for number in asking.recv(64) or bytes([signal.SIGKILL]):
            os.kill(child, number)
    asking.send(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def _run(arguments: list[str]) -> None:
    """What Python does with these arguments."""
    import runpy

    how, *rest = arguments
    if how == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec", dont_inherit=True), sys.modules["__main__"].__dict__)
    elif how == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        sys.modules.pop(rest[0], None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(how).parent)
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
