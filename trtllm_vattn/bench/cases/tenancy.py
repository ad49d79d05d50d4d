"""`bench tenancy`: several processes under one broker (tenancy/README.md), in four parts.

*Isolation*: tenants' processes hand memory to one another and look at every word of it when it comes, and again before
it goes; meanwhile processes are ended by SIGKILL wherever they are, and new ones come. *Messages*: garbled ones, to a
broker that an honest tenant has leases of. *Visits*: tenants that come and go, of which nothing may be left in the
broker (visits.py). *Serving*: models with opposite bursts, each in a process of its own (on the
host in a thread): each alone with a static part of the memory, all together with static parts, and all together with
what the others leave idle. The parts are the broker's limits, changed while the engines serve. A burst takes
`burst_over_part` times a static part, tokens by bytes each, so that with static parts requests wait for memory while
the others' lies idle; where it is below 1 there is nothing to gain, and it says so.

Engines start once, and serve one burst each before anything is measured. Then come the run with static parts, the
shared one, and each model alone, for the two phases in which its first burst is; a run is said when it begins and ends,
with what the broker lends meanwhile, and its rows are kept at once. Runs alone that would begin later than
``--most-seconds`` after the engines' start began are left out, and figures over them with them; a run that does not end
in its time fails the part, and says what the broker has of each model.

Of the time between tokens, the 99th percentile of each model, of the model where it is worst: `p99_over_static` is
sharing over static parts, all of them serving in both; `p99_over_alone` is sharing over a static part with the GPU to
itself, in which the others' computing is, too (`p99_static_over_alone` is that without any sharing).
`ttft_static_over_ours` is the mean time to the first token with static parts over that with sharing. A row's `slowest`
says of its longest step how long it took, and how much of that went to the engine's launch (`StepRecord`): what is left
is what sharing memory took between launches.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_vattn.arguments import adder, non_negative
from trtllm_vattn.bench.cases.visits import MOST_RESIDENT, visits
from trtllm_vattn.bench.harness.case import Part, Recording, vocab_of
from trtllm_vattn.bench.harness.flags import add_common, dtype_of
from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.errors import VattnError
from trtllm_vattn.progress import Progress
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import planned_shape
from trtllm_vattn.runtime.request import StepRecord
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate
from trtllm_vattn.tenancy import protocol as say
from trtllm_vattn.tenancy.books import Limits
from trtllm_vattn.tenancy.broker import Broker
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.tenancy.tenant import Client
from trtllm_vattn.verify.tenants import Strangers, TenantProcess
from trtllm_vattn.verify.tenants import lending as lending_here
from trtllm_vattn.vmm.host import HostDriver

logger = logging.getLogger(__name__)

SURVIVORS, VICTIMS = 2, 3
EXTENT = 4
"""Granules of the largest extent that tenants of the isolation borrow."""
PHASES = 4
ALONE = 2
"""Phases of a run of one model alone: that of its burst, and one without."""
BUCKETS = (1, 2, 4, 8, 16, 32)
START_S = 0.2
SAID_S = 1.0
"""Seconds between two words about what is lent."""
COLUMNS = "run model requests itl_ms.p50 itl_ms.p99 ttft_ms.p50 ttft_ms.p99"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench tenancy`."""
    add = adder(parser, add_common(parser, on_gpu="llama-3.2-1b"))
    add("--handovers", "COUNT", "extents that go from one tenant to another", 400, 2000, type=non_negative)
    add("--kills", "COUNT", "tenants' processes that are ended by SIGKILL meanwhile", 4, 10, type=non_negative)
    add("--messages", "COUNT", "garbled messages to a broker", 10_000, type=non_negative)
    text = "tenants that come and go, of a broker on the host, which must not grow by them"
    add("--visits", "COUNT", text, 200, type=non_negative)
    add("--models", "COUNT", "models that serve under one broker; 0 leaves the serving out", 2, type=non_negative)
    add("--memory", "BYTES", "that the models share", "4GiB", "640KiB")
    add("--seconds", "SECONDS", "of each run, in which every model has two bursts", 8.0, 1.5)
    add("--prompts", "PROMPTS", "prompts of a burst", 48, 4)
    add("--prompt-tokens", "TOKENS", "of each prompt", 2048, 100)
    add("--output-tokens", "TOKENS", "of each request", 192, 8)
    add("--most-seconds", "SECONDS", "after the serving began, in which runs of one model alone may begin", 60.0)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where a byte was foreign or lost, a ceiling was passed, a message moved anything, or the
    broker grew by tenants that are gone."""
    started = time.perf_counter()
    recording = Recording("tenancy", args)

    def isolation(recording: Recording) -> list[dict[str, Any]]:
        counts = isolate(args)
        recording.results["isolation"] = dict(counts)
        lost = counts["lost_bytes"] + counts["lost_leases"]
        named = {"foreign_bytes_seen": "foreign_bytes", "ceilings_passed": "passed", "killed_tenants": "killed"}
        found = {name: counts[kind] for name, kind in {"handovers": "handovers", **named}.items()}
        return [{**found, "lost_by_others": lost}]

    def messages(recording: Recording) -> list[dict[str, Any]]:
        found = garble(args.messages, args.seed)
        names = {"messages": "messages", "messages_refused": "refused", "leases_moved_by_messages": "moved"}
        return [{name: found[kind] for name, kind in names.items()}]

    parts: dict[str, Part] = {
        "isolation": isolation,
        "messages": messages,
        "visits": lambda recording: [visits(args.visits)],
        "serving": serve_all,
    }
    left_out = {"visits": not args.visits, "serving": not args.models}
    recording.measure(parts, [name for name in parts if not left_out.get(name)])
    recording.sum_up(seconds=time.perf_counter() - started)
    wrong = [
        f"{name}: {recording.summary[name]}"
        for name in ("foreign_bytes_seen", "ceilings_passed", "lost_by_others", "leases_moved_by_messages")
        if recording.summary.get(name)
    ]
    grown = {name: recording.summary.get(name, 0) for name in ("visits_descriptors", "visits_resident_bytes")}
    if grown["visits_descriptors"] > 0 or grown["visits_resident_bytes"] > MOST_RESIDENT:
        wrong.append(f"the broker grew by tenants that are gone: {grown}")
    rows = recording.results.get("serving")
    return recording.conclude(tabulate(rows, COLUMNS) if rows else "", wrong=wrong)


# -- isolation ---------------------------------------------------------------------------------------------------------


@contextmanager
def lending(device: str, memory: int, deadline_s: float) -> Iterator[Path]:
    """A broker: on the host in a thread, with pages of 4 KiB; on a GPU in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "broker"
        if device == "cpu":
            with closing(HostDriver()) as driver, lending_here(driver, memory, path, deadline_s=deadline_s):
                yield path
            return
        command = [sys.executable, "-m", "trtllm_vattn", "broker", "--memory", str(memory), "--socket", str(path)]
        process = subprocess.Popen([*command, "--device", device, "--deadline-s", str(deadline_s)])
        try:
            _until(path.exists, 120.0)
            yield path
        finally:
            process.terminate()
            process.wait()


def _until(holds: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > end:
            raise VattnError(f"a broker or tenant did not do within {timeout_s:g} s what was waited for")
        time.sleep(0.002)


def isolate(args: argparse.Namespace) -> Counter[str]:
    """Hand memory over, and end processes, until there were as many of both as asked for."""
    counts: Counter[str] = Counter()
    if not args.handovers and not args.kills:
        return counts
    rng = random.Random(args.seed)
    # Scarce: the tenants' ceilings add up to twice of it, so that nearly all that is lent was another's before.
    granule = 4096 if args.device == "cpu" else 2 << 20
    tenants = SURVIVORS + VICTIMS
    memory, numbers = tenants * 8 * EXTENT * granule, iter(range(1 << 30))

    def begin(floor: int = 0) -> TenantProcess:
        number = next(numbers)
        config = TenantConfig(str(path), f"t{number}", floor, 2 * memory // tenants)
        return TenantProcess(config, args.seed + number, device=args.device)

    with lending(args.device, memory, 2.0) as path:
        promised = EXTENT * granule
        survivors = [begin(promised) for _ in range(SURVIVORS)]
        victims = [begin() for _ in range(VICTIMS if args.kills else 0)]
        for each in (*survivors, *victims):
            each.wait_ready(120.0)
        with Progress("kills", args.kills, "kill") as bar:
            while counts["killed"] < args.kills:
                time.sleep(rng.random() * 0.02)
                at = rng.randrange(len(victims))
                victims[at].kill()
                counts["killed"] += 1
                victims[at] = begin()
                victims[at].wait_ready(120.0)
                bar.update()
        for each in victims:
            counts.update(each.end(120.0))
        _until(lambda: sum(each.progress() for each in survivors) + counts["handovers"] >= args.handovers, 3600.0)
        for each in survivors:
            counts.update(each.end(120.0))
        with Client(path) as client:
            _until(lambda: not client.standing().tenants, 60.0)
            counts["lost_leases"] = client.standing().lent
    return counts


def garble(messages: int, seed: int) -> dict[str, int]:
    """Send garbled messages to a broker of which an honest tenant has leases; how many were refused, and how many of
    those leases are not as they were."""
    with tempfile.TemporaryDirectory() as folder:
        driver = HostDriver()
        broker = Broker(driver, 1 << 20, Path(folder) / "broker")
        broker.books.join("honest", Limits(floor=1 << 16), 0.0)
        leases = [broker.books.lend("honest", 4096, 0.0) for _ in range(8)]
        strangers = Strangers(broker, seed)
        strangers.send(messages)
        account = broker.books.accounts.get("honest")
        left = 0 if account is None else sum(account.leases.get(lease) == 4096 for lease in leases)
        broker.close()
        driver.close()
    return {"messages": strangers.messages, "refused": strangers.refused, "moved": len(leases) - left}


# -- serving -----------------------------------------------------------------------------------------------------------


def serve_model(options: dict[str, Any], pipe: Connection) -> None:
    """One model's process: builds an engine, then serves what it is sent, until it is sent None; sends what it met
    where it cannot."""
    try:
        tokens, device, output = options["prompt_tokens"], options["device"], options["output_tokens"]
        records: list[StepRecord] = []
        engine = Engine.from_pretrained(
            options["model"],
            device=device,
            dtype=dtype_of(device),
            max_seqs=options["max_seqs"],
            max_seq_len=tokens + output,
            broker=options["broker"],
            tokenizer=None,
            # Captured all the same, of fewer sizes: all runs alike, and ready sooner.
            compile=False,
            buckets=[size for size in BUCKETS if size < options["max_seqs"]],
            observer=records.append,
        )
        with engine:
            vocab = vocab_of(engine.model)
            pipe.send("ready")
            while (order := pipe.recv()) is not None:
                due, seed = order
                rng = np.random.default_rng(seed)
                prompts = [rng.integers(0, vocab, tokens).tolist() for _ in due]
                pipe.send(_serve(engine, records, due, prompts, output))
                engine.flush_prefix_cache()
    except Exception as error:
        pipe.send(error)


def _serve(
    engine: Engine, records: list[StepRecord], due: Sequence[float], prompts: Sequence[list[int]], output: int
) -> dict[str, Any]:
    """Submit each prompt when it is due (by the monotonic clock); milliseconds from then to its first token, and
    between its tokens, and the longest step's parts. `records` gets the engine's launches."""
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    last: dict[int, float] = {}
    ttft: list[float] = []
    itl: list[float] = []
    slowest: dict[str, float] = {"step_ms": 0.0}
    submitted, preempted = 0, engine.scheduler.preempted
    while submitted < len(due) or engine.busy:
        now = time.monotonic()
        while submitted < len(due) and due[submitted] <= now:
            last[engine.submit(prompts[submitted], params)] = -due[submitted]
            submitted += 1
        if not engine.busy:
            time.sleep(max(0.0, min(0.002, due[submitted] - now)))
            continue
        records.clear()
        began = time.monotonic()
        events = engine.step()
        now = time.monotonic()
        if 1e3 * (now - began) > slowest["step_ms"] and events:
            slowest = _parts(now - began, began - due[0], records)
        for event in events:
            if event.error:
                raise VattnError(event.error)
            before = last[event.request]
            (ttft if before < 0 else itl).append(1e3 * (now - abs(before)))
            last[event.request] = now
    return {"ttft_ms": ttft, "itl_ms": itl, "slowest": slowest, "preempted": engine.scheduler.preempted - preempted}


def _parts(step_s: float, at_s: float, records: Sequence[StepRecord]) -> dict[str, float]:
    """What a step's time went to, in ms; `at_s` is when it began, of the run."""
    parts = {"at_s": at_s, "step_ms": 1e3 * step_s}
    for record in records:
        parts |= {"launch_ms": 1e3 * record.wall_s, "prefilled": record.prefilled, "lanes": record.lanes}
        parts |= {"kv_ms": 1e3 * record.kv_s, "ahead_ms": 1e3 * record.ahead_s, "wait_ms": 1e3 * record.wait_s}
    return parts


def schedule(args: argparse.Namespace, model: int, phases: Sequence[int] = range(PHASES)) -> list[float]:
    """Seconds at which a model's requests come in these phases, the first of which begins at 0: a burst in each that is
    its turn, and now and then one in all of them."""
    phase = args.seconds / PHASES
    found = []
    for place, number in enumerate(phases):
        start = place * phase
        if number % args.models == model % args.models:
            found += [start] * args.prompts
        found += [start + phase * part / 4 for part in range(4)]
    return sorted(found)


class _Models:
    """The workers of all models, and the broker that they share."""

    def __init__(self, recording: Recording, path: Path, stack: ExitStack) -> None:
        self.recording, self.args, self.path = recording, recording.args, path
        args = self.args
        self.names = [f"model-{number}" for number in range(args.models)]
        self.pipes: list[Connection] = []
        for name in self.names:
            mine, theirs = multiprocessing.Pipe()
            options = {
                "broker": TenantConfig(str(path), name),
                "model": args.model,
                "device": args.device,
                "max_seqs": args.prompts + 8,
                "prompt_tokens": args.prompt_tokens,
                "output_tokens": args.output_tokens,
            }
            worker: Any
            if args.device == "cpu":
                worker = threading.Thread(target=serve_model, args=(options, theirs), daemon=True)
            else:
                worker = multiprocessing.get_context("spawn").Process(target=serve_model, args=(options, theirs))
            worker.start()
            self.pipes.append(mine)
            stack.callback(_end, worker)
            stack.callback(mine.send, None)
        for name, pipe in zip(self.names, self.pipes, strict=True):
            self._answer(pipe, 120.0)
            recording.say(f"serving: {name} is ready")

    def _answer(self, pipe: Connection, timeout_s: float) -> Any:
        if not pipe.poll(timeout_s):
            raise VattnError(f"a model did not answer within {timeout_s:g} s")
        answer = pipe.recv()
        if isinstance(answer, Exception):
            raise VattnError(f"a model ended: {answer}") from answer
        return answer

    def limit(self, floor: int, ceiling: int) -> None:
        """Give every model these limits."""
        with Client(self.path) as client:
            for name in self.names:
                client.do(say.SetLimits(name, 0, self.args.memory // 4096 * 4096))
            for name in self.names:
                client.do(say.SetLimits(name, floor, ceiling))

    def serve(self, run: str, models: Sequence[int], phases: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Have these models serve, all from one moment on; a row of each. Without `phases`, those of a model's first
        burst. Raises VattnError where they do not in twice the run's seconds and 20 s."""
        began, args = time.perf_counter(), self.args
        self.recording.say(f"serving: run {run} begins, {' and '.join(self.names[model] for model in models)}")
        begin = time.monotonic() + START_S
        for model in models:
            own = range(model, model + ALONE) if phases is None else phases
            due = [begin + each for each in schedule(args, model, own)]
            self.pipes[model].send((due, args.seed + model))
        watched = Watched(self.recording, run, begin, begin + 2 * args.seconds + 20)
        with Client(self.path) as client:
            while not all(self.pipes[model].poll() for model in models):
                watched.look(client.standing().tenants)
                time.sleep(0.02)
        rows = []
        for model in models:
            answer = self._answer(self.pipes[model], 1.0)
            rows.append(
                {
                    "run": run,
                    "model": self.names[model],
                    "requests": len(answer["ttft_ms"]),
                    "most_lent_bytes": watched.most[self.names[model]],
                    "times_overdue": watched.states["overdue"],
                    **{name: summarise(answer[name]) for name in ("ttft_ms", "itl_ms")},
                    **{name: answer[name] for name in ("slowest", "preempted")},
                }
            )
        self.recording.say(f"serving: run {run} ends, {time.perf_counter() - began:.1f} s")
        return rows


class Watched:
    """What a broker has of its tenants during a run, said now and then. `look` raises VattnError after `end`, by the
    monotonic clock."""

    def __init__(self, recording: Recording, run: str, begin: float, end: float) -> None:
        self._recording, self.run, self._begin, self.end = recording, run, begin, end
        self._said = begin
        self.most: Counter[str] = Counter()
        self.states: Counter[str] = Counter()

    def look(self, tenants: Sequence[say.TenantStatus]) -> None:
        now = time.monotonic()
        for tenant in tenants:
            self.most[tenant.name] = max(self.most[tenant.name], tenant.lent)
            self.states[tenant.state] += 1
        text = ", ".join(
            f"{each.name} {each.state} {each.lent:,} of {each.budget:,} bytes, needs {each.needs:,} "
            f"and wants {each.wants:,}"
            for each in tenants
        )
        if now > self.end:
            raise VattnError(f"the run {self.run} did not end in {now - self._begin:.0f} s: {text}")
        if now - self._said >= SAID_S:
            self._said = now
            self._recording.say(f"serving: {self.run} {now - self._begin:.1f} s: {text}")


def _end(worker: Any) -> None:
    """Wait for a worker to end; a process that does not is ended."""
    worker.join(20.0)
    if worker.is_alive() and hasattr(worker, "kill"):
        worker.kill()
        worker.join()


def serve_all(recording: Recording) -> Iterator[dict[str, Any]]:
    """All runs: the rows of each are kept at once, and the figures that are quoted come as they are known."""
    args, began = recording.args, time.perf_counter()
    part = args.memory // args.models
    burst = args.prompts * (args.prompt_tokens + args.output_tokens)
    over_part = burst * planned_shape(args.model, dtype_of(args.device)).token_bytes / part
    if over_part <= 1:
        logger.warning("a burst takes %.2f of a static part: nobody has to borrow; lower --memory", over_part)
    yield {"burst_over_part": over_part}
    everyone = range(args.models)
    rows: dict[str, list[dict[str, Any]]] = {}

    def measured(run: str, found: list[dict[str, Any]]) -> None:
        for row in found:
            recording.add("serving", row)
        rows.setdefault(run, []).extend(found)

    with ExitStack() as stack:
        models = _Models(recording, stack.enter_context(lending(args.device, args.memory, 1.0)), stack)
        yield {"start_s": time.perf_counter() - began}
        models.limit(part, part)
        # What is tuned or compiled at its first use is no run's.
        models.serve("warm-up", everyone)
        measured("static", models.serve("static", everyone, range(PHASES)))
        models.limit(part // 2, args.memory)
        measured("shared", models.serve("shared", everyone, range(PHASES)))
        shared = rows["shared"]
        yield {
            "p99_over_static": _worst(shared, rows["static"]),
            "ttft_static_over_ours": _ttft(rows["static"]) / _ttft(shared),
            "most_borrowed_bytes": max(row["most_lent_bytes"] for row in shared) - part // 2,
            "times_overdue": sum(row["times_overdue"] for row in shared),
            "slowest_shared_step_ms": max(row["slowest"]["step_ms"] for row in shared),
        }
        models.limit(part, part)
        for model in everyone:
            if time.perf_counter() - began > args.most_seconds:
                recording.say(f"serving: {args.most_seconds:g} s are over, {models.names[model]} is not served alone")
                break
            measured("alone", models.serve("alone", [model]))
    if alone := rows.get("alone", []):
        count = len(alone)
        yield {
            "models_alone": count,
            "p99_over_alone": _worst(shared[:count], alone),
            "p99_static_over_alone": _worst(rows["static"][:count], alone),
        }


def _worst(rows: Sequence[dict[str, Any]], to: Sequence[dict[str, Any]]) -> float:
    pairs = zip(rows, to, strict=True)
    return max(float(row["itl_ms"]["p99"]) / float(other["itl_ms"]["p99"]) for row, other in pairs)


def _ttft(rows: Sequence[dict[str, Any]]) -> float:
    return sum(float(row["ttft_ms"]["mean"]) for row in rows)
