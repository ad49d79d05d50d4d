"""Another serving engine in a process of its own on the same device, with which a case takes turns."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from trtllm_vattn.arguments import output
from trtllm_vattn.bench.harness.serving import Load, Served
from trtllm_vattn.errors import ConfigError, VattnError

if TYPE_CHECKING:
    from typing_extensions import Self

PEERS = {"vllm": Path(__file__).resolve().parents[1] / "peer" / "vllm_worker.py"}
"""The script that runs beside each engine that there is a peer of."""
CLOSING_S = 60.0
"""How long a peer may take to end by itself."""
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
"""A peer's environment, where it has nothing else: it asks the network for nothing and tells it nothing."""
_TOLD = 2000
"""Characters of a peer's log in an error."""


def add_peer(parser: argparse.ArgumentParser, text: str) -> None:
    """Add ``--peer`` and what says where it is."""
    add = parser.add_argument
    add("--peer", choices=tuple(PEERS), help=f"{text} (default: none)")
    text = "interpreter that has the peer (default: this one)"
    add("--peer-python", type=Path, metavar="FILE", help=text)
    text = (
        "PYTHONPATH of the peer alone, so that what lies there does not shadow what runs here (default: as it is here)"
    )
    add("--peer-path", metavar="FOLDER", help=text)
    add("--peer-log", type=output, metavar="FILE", help="what the peer prints (default: shown where it fails)")


class Peer:
    """A peer's process. It is started with its interpreter, asked at the door whether the engine is there; `start`
    makes one.

    Raises ConfigError where the interpreter or the engine is not there, and VattnError with the end of its log where it
    fails or ends.
    """

    def __init__(
        self,
        name: str,
        python: Path | None = None,
        path: str | None = None,
        log: Path | None = None,
        device: str = "cpu",
    ) -> None:
        self.name, python = name, Path(sys.executable) if python is None else python
        environment = {**QUIET, **os.environ, **visible(device)} | ({} if path is None else {"PYTHONPATH": path})
        self._undo = ExitStack()
        self._closed = False
        self._log = self._undo.enter_context(log.open("a+b") if log else tempfile.TemporaryFile())  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [python, PEERS[name]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                # With all that it starts it is ended together, and not by an interrupt of ours.
                start_new_session=True,
            )
        except OSError as error:
            self._undo.close()
            raise ConfigError(f"the peer's interpreter {python} does not run: {error.strerror}") from error
        try:
            versions: dict[str, str] | None = self.ask("hello")
            if versions is None:
                raise ConfigError(
                    f"{name} is not installed for {python}; install it, or say where by --peer-python or --peer-path"
                )
        except BaseException:
            self.close()
            raise
        self.versions = versions

    def ask(self, do: str, **command: Any) -> Any:
        """The answer to a command. Raises VattnError where there is none, or an error."""
        assert self._process.stdin is not None
        line = json.dumps({"do": do, **command}).encode() + b"\n"
        with suppress(BrokenPipeError):
            self._process.stdin.write(line)
            self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise VattnError(f"{self.name}, asked to {do}: {answer['error']}{self._told()}")
        return answer["ok"]

    def _answer(self) -> dict[str, Any]:
        """The next line of its answers; an error where it has ended, whoever else holds the pipe open."""
        assert self._process.stdout is not None
        line = b""
        while not (ready := select.select([self._process.stdout], [], [], 1.0)[0]) and self._process.poll() is None:
            pass
        if ready:
            line = self._process.stdout.readline()
        if not line:
            return {"error": "it ended without an answer"}
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not found.keys() & {"ok", "error"}:
            return {"error": f"it answered {line!r:.60}"}
        return found

    def _told(self) -> str:
        """The end of what it printed."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _TOLD))
        last = self._log.read().decode(errors="replace").strip()
        return f"; it printed: {last}" if last else ""

    def serve(self, load: Load) -> Served:
        """Requests through its engine; a request of which it said why it has none of its tokens has failed."""
        found = self.ask("serve", prompts=load.prompts, outputs=load.outputs, arrivals=load.arrivals)
        if errors := [error for error in found["errors"] if error is not None]:
            raise VattnError(
                f"{self.name} failed {len(errors)} of {len(load.prompts)} requests; the first: {errors[0]}"
            )
        return Served(found["times"], [False] * len(load.prompts), found["seconds"])

    def close(self) -> None:
        """End it, and all that it started. Idempotent."""
        if self._closed:
            return
        self._closed = True
        # Leaving the process closes its pipes and waits for it.
        with suppress(BrokenPipeError), self._undo, self._process:
            assert self._process.stdin is not None
            with suppress(subprocess.TimeoutExpired, BrokenPipeError):
                self._process.stdin.write(b'{"do": "stop"}\n')
                self._process.stdin.close()
                self._process.wait(CLOSING_S)
            # Its own processes outlive it by a moment, or for ever.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """The model's config.json, from which a peer makes the same shape with weights of its own."""
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config["torch_dtype"] = config["dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n")


def opener(args: argparse.Namespace) -> Callable[[], Peer]:
    """What makes the peer that the flags name."""
    return lambda: Peer(args.peer, args.peer_python, args.peer_path, args.peer_log, args.device)


def versions_of(args: argparse.Namespace) -> dict[str, str]:
    """What the peer is and runs on, asked before anything takes long."""
    with opener(args)() as peer:
        return peer.versions


def visible(device: str) -> dict[str, str]:
    """The environment in which a process sees one device alone, by the numbers that this process has for them."""
    if device == "cpu":
        return {}
    index, shown = int(device.partition(":")[2] or 0), os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": shown.split(",")[index] if shown else str(index)}


def fit_together(total: int, weights: int, kv: int, beside: int) -> bool:
    """Whether two engines of `weights`, `kv` and `beside` bytes each lie on a device of `total` bytes at once."""
    return 2 * (weights + kv + beside) <= total


def check_tokens(name: str, load: Load, times: Sequence[Sequence[float]]) -> None:
    """Every request has as many tokens as it asked for. Raises VattnError otherwise: nothing could be compared."""
    wrong = [i for i, (seen, wanted) in enumerate(zip(times, load.outputs, strict=True)) if len(seen) != wanted]
    if wrong:
        i = wrong[0]
        raise VattnError(
            f"{name} gave {len(wrong)} of {len(times)} requests another number of tokens than they asked for; request "
            f"{i} has {len(times[i])} of {load.outputs[i]}"
        )
