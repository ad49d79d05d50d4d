"""`bench survival`: an engine's process is ended by SIGKILL wherever it is, again and again, and the next one goes on
with its sequences (tenancy/README.md).

A broker has a process of its own. Engines are children of one process that has imported everything, and hand each token
to it by a pipe, as a consumer that outlives them. An engine is ended some tokens after it began, at a random moment, or
it ends itself (by the same signal) at one of `PLACES` that a random moment would seldom meet: in the middle of a store
of the journal, at its switch from one half to the other (which comes often here), in a driver call while memory is
mapped ahead, or replaced under a sequence (which happens all the time). What the consumer has got, the next engine is
told. At the end the tokens are compared with those of an engine that nobody disturbed: on the host with what it
generates, token by token; on a GPU, where the same sums may have other last bits, it is fed prompts and tokens
(teacher-forced), and each token has to be the one that it chooses there, or a tie (``--tie-tolerance``). Ties are
counted apart (`tokens_tied`, `widest_tie`).

Then what the journal costs, of engines of 1, 32 and 128 sequences that nobody ends: microseconds of a step in which it
is waited for, in the middle, and of all threads' processor time a step. `journal_over_card_step` is that over a decode
step of an 8B model on an H200 with as many sequences (`CARD_STEP_MS`), as if nothing of it ran beside the GPU's work,
which it mostly does: a step's tokens are noted while the next one computes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import mmap
import os
import random
import select
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtllm_vattn.arguments import adder, non_negative
from trtllm_vattn.bench.harness.case import conclude
from trtllm_vattn.bench.harness.flags import TIE_TOLERANCE, add_common, dtype_of
from trtllm_vattn.bench.harness.identity import Identity, compare_forced
from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.errors import VattnError
from trtllm_vattn.progress import Progress
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.logprobs import TokenLogprob
from trtllm_vattn.runtime.request import TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.survival import Survival
from trtllm_vattn.tenancy import journal
from trtllm_vattn.tenancy.broker import Broker, open_exportable
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.tenancy.placements import Placements
from trtllm_vattn.tenancy.tenant import Client
from trtllm_vattn.vmm.cuda import CudaDriver
from trtllm_vattn.vmm.host import HostDriver

EVENT = struct.Struct("<iii")
BEGAN, ENDED, HERE, REPLACED = -1, -2, -3, -4
"""In place of a request's number: an engine has begun (its requests, and how many are prefilled again); all requests
have ended; the engine ends itself here; so many mappings were replaced under a sequence."""
COST = struct.Struct("5d")
"""Seconds of a step, of its journal's, of all threads' processor time for that; of the journal's, tokens and
places."""
NOTED = 2000
PLACES = ("anywhere", "a store", "a switch", "a replacement", "map-ahead")
"""Where an engine is ended, in turn; `anywhere` is by its parent."""
MOST_TIMES = {"a store": 40, "a switch": 9, "a replacement": 30, "map-ahead": 5}
"""How often it comes to a place at most, before it ends there. A switch is three stores, and every engine's first
record is one."""
SMALL_TAIL = 1 << 10
"""Bytes behind a snapshot of a journal that is to write the next one soon."""
SEQUENCES = (1, 32, 128)
CARD_STEP_MS = {1: 4.6, 32: 6.6, 128: 12.9}
"""A decode step of Llama-3-8B, by its sequences, on an H200 (scripts/results/README.md)."""
COST_PROMPT = 256
"""Tokens of a prompt, at most, where the journal's cost is measured."""
LIKELIEST = 20
"""Tokens at each place, of which those that an engine gave are looked for."""
WARM = ("transformers.models.llama.modeling_llama", "triton")
"""What every engine imports, of those that are installed: done once, before any child. None of it opens a GPU."""
KEEP_S = 600.0
LIFE_S = 300.0
"""After which an engine's life counts as hanging."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench survival`."""
    add = adder(parser, add_common(parser, on_gpu="llama-3.2-1b"))
    add("--kills", "COUNT", "engines that are ended by SIGKILL", 30, 20)
    add("--prompts", "PROMPTS", "sequences that run at once, and go on from engine to engine", 32, 4)
    add("--prompt-tokens", "TOKENS", "of each prompt", 2048, 60)
    add("--output-tokens", "TOKENS", "of each sequence", 512, 120)
    add("--life-tokens", "TOKENS", "tokens of all sequences that an engine gives at most before it is ended", 400, 60)
    add("--memory", "BYTES", "of the broker", "8GiB", "2MiB")
    text = "steps of engines that nobody ends, of which the journal's part is told; 0 leaves it out"
    add("--journal-steps", "STEPS", text, 100, type=non_negative)
    text = f"{TIE_TOLERANCE}, and tokens are compared teacher-forced; 0 asks for the same tokens"
    add("--tie-tolerance", "LOGITS", text, 0.25, 0.0)
    text = "kill no more once so many have passed, and say how many were killed (default: no limit)"
    add("--most-seconds", "SECONDS", text)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where a sequence was lost, a token was another, or came twice, or memory was left lent."""
    started = time.perf_counter()
    for name in WARM:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder, broker_process(args, Path(folder) / "broker") as path:
        counts, lives, compared = survive(args, path)
        with Client(path) as client:
            left = client.standing().lent
    costs = journal_costs(args) if args.journal_steps else {}
    places = Counter(each["place"] for each in lives if each["killed"])
    summary = {
        "kills": counts["kills"],
        "kills_at": {place: places[place] for place in PLACES},
        "kills_at_start": sum(each["killed"] and "there" not in each for each in lives),
        "sequences_lost": counts["lost"],
        "tokens_differing": counts["differing"],
        "tokens_tied": sum(each.ties for each in compared),
        "widest_tie": max(each.widest_tie for each in compared),
        "widest_mismatch": max(each.widest_mismatch for each in compared),
        "tokens_twice": counts["twice"],
        "prefilled_again": counts["again"],
        "bytes_left": left,
        "mappings_replaced": sum(each["replaced"] for each in lives),
        "sequences": counts["sequences"],
        "tokens": counts["tokens"],
        **started_again(lives),
        **costs,
        "seconds": time.perf_counter() - started,
    }
    names = ("sequences_lost", "tokens_differing", "tokens_twice", "prefilled_again", "bytes_left")
    wrong = [f"{name}: {summary[name]}" for name in names if summary[name]]
    return conclude("survival", args, {"lives": lives}, summary, wrong=wrong)


def started_again(lives: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds from an engine's process to the first token that it gave, of those that went on with sequences; and how
    many more that is than until an engine was ready that found none, both in the middle."""
    after = [each["next_token_s"] for each in lives if each.get("there") and "next_token_s" in each]
    anew = [each["ready_s"] for each in lives if each.get("there") == 0]
    found: dict[str, Any] = {"next_token_s": summarise(after)} if after else {}
    if after and anew:
        found["next_token_over_start_s"] = float(np.median(after) - np.median(anew))
    return found


# -- processes ---------------------------------------------------------------------------------------------------------


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """Have a child process do something with a pipe to this one; its number, and the pipe's end."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        # A child has none of this process's threads, and uses nothing that they hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    code = 1
    try:
        os.close(read)
        work(write)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def broker_process(args: argparse.Namespace, path: Path) -> Iterator[Path]:
    """A broker in a process of its own."""

    def serve(pipe: int) -> None:
        driver = HostDriver() if args.device == "cpu" else open_exportable(args.device)
        broker = Broker(driver, args.memory, path)
        os.write(pipe, b"x")
        never, _ = os.pipe()
        broker.serve(never)

    pid, pipe = forked(serve)
    try:
        if not os.read(pipe, 1):
            raise VattnError("the broker did not begin")
        yield path
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(pipe)


def make_engine(args: argparse.Namespace, path: Path | None) -> Engine:
    """An engine of the benchmark's sizes; as the tenant that outlives it, or without a broker."""
    broker = None if path is None else TenantConfig(str(path), "survivor", keep_s=KEEP_S)
    on_host = args.device == "cpu"
    if on_host:
        # Of a tiny model: more threads only wait for one another.
        torch.set_num_threads(1)
    # Not compiled, which would take most of an engine's start.
    options: dict[str, Any] = {"compile": False, **({"capture": False} if on_host else {"deterministic": True})}
    return Engine.from_pretrained(
        args.model,
        device=args.device,
        dtype=dtype_of(args.device),
        max_seqs=args.prompts,
        max_seq_len=args.prompt_tokens + args.output_tokens,
        prefix_cache=False,
        tokenizer=None,
        broker=broker,
        **options,
    )


def live(
    args: argparse.Namespace,
    path: Path,
    prompts: Sequence[Sequence[int]],
    received: dict[int, int],
    place: str,
    seed: int,
    pipe: int,
) -> None:
    """One engine's life: go on with what there is, or begin with these prompts, and replace memory all the time."""
    journal.TAIL, rng = SMALL_TAIL, random.Random(seed)
    if place == "a switch":
        # Soon, however long the snapshot is.
        journal.tail_of = lambda snapshot: SMALL_TAIL
    fate = Fate(place, rng, pipe)
    fate.watch(args.device)
    engine = make_engine(args, path)
    there = engine.survivors(received)
    os.write(pipe, EVENT.pack(BEGAN, len(there), engine.prefilled_again))
    params = SamplingParams(max_tokens=args.output_tokens, ignore_eos=True)
    for prompt in prompts[len(there) :] if not received else ():
        engine.submit(list(prompt), params)
    while engine.busy:
        events = engine.step()
        for event in events:
            if event.error:
                raise VattnError(event.error)
        os.write(pipe, b"".join(EVENT.pack(event.request, event.index, event.token or 0) for event in events))
        running = [slot for slot in range(engine.cache.shape.num_slots) if engine.cache.sequence_at(slot) is not None]
        if running and rng.random() < 0.5:
            # It waits for what is under way, which is nearly always something.
            with fate.replacing():
                replaced = engine.cache.replace(engine.cache.sequence_at(rng.choice(running)))
            os.write(pipe, EVENT.pack(REPLACED, replaced, 0))
    # What was handed over is forgotten.
    engine.step()
    os.write(pipe, EVENT.pack(ENDED, 0, 0))
    engine.close()


class Fate:
    """Ends this process by SIGKILL when it has come to one of `PLACES` some times."""

    def __init__(self, place: str, rng: random.Random, pipe: int) -> None:
        self._place, self._random, self._pipe = place, rng, pipe
        self._left = rng.randint(1, MOST_TIMES.get(place, 1))
        self._replaces = False

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Inside this context memory is replaced under a sequence."""
        self._replaces = True
        try:
            yield
        finally:
            self._replaces = False

    def is_due(self, place: str) -> bool:
        """Whether it ends here."""
        if place != self._place:
            return False
        self._left -= 1
        return self._left == 0

    def end(self) -> None:
        """End here."""
        os.write(self._pipe, EVENT.pack(HERE, 0, 0))
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, device: str) -> None:
        """Have every store of a journal, and every driver call that maps or unmaps, come by here."""
        store, store_word = journal.store, journal.store_word

        def in_store(memory: mmap.mmap, at: int, data: bytes) -> None:
            half = (at - journal.HEAD) // ((len(memory) - journal.HEAD) // 2)
            # Of the half that does not hold it is a snapshot's.
            if self.is_due("a switch" if memory[8 * journal.LIVE] != half + 1 else "a store"):
                store(memory, at, data[: self._random.randrange(len(data) + 1)])
                self.end()
            store(memory, at, data)

        def in_store_word(words: memoryview[int], word: int, value: int) -> None:
            if word == journal.LIVE and self.is_due("a switch"):
                self.end()
            store_word(words, word, value)

        journal.store, journal.store_word = in_store, in_store_word
        driver: Any = HostDriver if device == "cpu" else CudaDriver
        for name in ("map", "unmap"):
            setattr(driver, name, self._watched(getattr(driver, name)))

    def _watched(self, call: Callable[..., None]) -> Callable[..., None]:
        def called(*arguments: Any) -> None:
            is_ahead = threading.current_thread().name == "vattn-map-ahead"
            due = self.is_due("map-ahead" if is_ahead else "a replacement" if self._replaces else "")
            if due and self._random.random() < 0.5:
                self.end()
            call(*arguments)
            if due:
                self.end()

        return called


class Consumer:
    """What outlives the engines: the tokens of each sequence, and what was wrong with them."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.counts: Counter[str] = Counter()

    def received(self) -> dict[int, int]:
        """How many tokens of each it has."""
        return {number: len(tokens) for number, tokens in self.tokens.items()}

    def take(self, number: int, index: int, token: int) -> None:
        """A token comes."""
        tokens = self.tokens.setdefault(number, [])
        if index < len(tokens):
            self.counts["twice"] += 1
        elif index > len(tokens):
            self.counts["lost"] += 1
        tokens[index:] = [token]


def watch(
    pid: int, pipe: int, consumer: Consumer, after: int | None, delay_s: float, place: str = PLACES[0]
) -> dict[str, Any]:
    """Take an engine's tokens until it has ended, by itself or at a `place`; end it so long after it gave so many. What
    became of it."""
    found: dict[str, Any] = {
        "tokens": 0,
        "killed": False,
        "ended": False,
        "again": 0,
        "place": PLACES[0],
        "replaced": 0,
    }
    left, began = b"", time.monotonic()
    due = None
    while True:
        now = time.monotonic()
        if due is None and after is not None and "there" in found and found["tokens"] >= after:
            due = now + delay_s
        if not found["killed"] and ((due is not None and now >= due) or now > began + LIFE_S):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            found["killed"] = due is not None
            if due is None:
                raise VattnError(f"an engine did not end within {LIFE_S:g} s")
        wait = None if found["killed"] else 0.5 if due is None else max(0.0, due - now)
        if not select.select([pipe], [], [], wait)[0]:
            continue
        packet = os.read(pipe, 1 << 16)
        if not packet:
            break
        left += packet
        whole = len(left) - len(left) % EVENT.size
        for number, index, token in EVENT.iter_unpack(left[:whole]):
            if number == BEGAN:
                found.update(there=index, again=token, ready_s=time.monotonic() - began)
            elif number == ENDED:
                found["ended"] = True
            elif number == HERE:
                found["here"] = True
            elif number == REPLACED:
                found["replaced"] += index
            elif number >= 0:
                found.setdefault("next_token_s", time.monotonic() - began)
                found["tokens"] += 1
                consumer.take(number, index, token)
        left = left[whole:]
    status = os.waitpid(pid, 0)[1]
    os.close(pipe)
    if found.pop("here", False) and os.WIFSIGNALED(status):
        found.update(killed=True, place=place)
    if not found["killed"] and not found["ended"]:
        raise VattnError("an engine ended by itself before its sequences had; its error is above")
    return found


def survive(args: argparse.Namespace, path: Path) -> tuple[Counter[str], list[dict[str, Any]], list[Identity]]:
    """End engines until there were as many as asked for; sequences that end are followed by new ones. Counts, what
    became of each engine, and how each round's tokens compare."""
    rng, counts, began = random.Random(args.seed), Counter[str](), time.monotonic()
    most_s = math.inf if args.most_seconds is None else args.most_seconds
    lives: list[dict[str, Any]] = []
    compared: list[Identity] = []
    vocab = np.random.default_rng(args.seed)
    with Progress("kills", args.kills, "kill") as bar:
        while counts["kills"] < args.kills and time.monotonic() - began < most_s:
            prompts = vocab.integers(1, 500, (args.prompts, args.prompt_tokens)).tolist()
            consumer, ended = Consumer(), False
            while not ended:
                kills = counts["kills"] < args.kills and time.monotonic() - began < most_s
                place = PLACES[len(lives) % len(PLACES)] if kills else PLACES[0]
                after = None
                if kills:
                    # Who ends itself comes there first, mostly.
                    after = rng.randint(0, args.life_tokens) if place == PLACES[0] else 2 * args.life_tokens
                received = consumer.received()
                seed = args.seed + len(lives)
                pid, pipe = forked(lambda pipe: live(args, path, prompts, received, place, seed, pipe))  # noqa: B023
                found = watch(pid, pipe, consumer, after, rng.random() * 0.02, place)
                lives.append(found)
                counts["kills"] += found["killed"]
                counts["again"] += found["again"]
                bar.update(found["killed"])
                ended = found["ended"]
            counts["sequences"] += len(prompts)
            counts.update(consumer.counts)
            # No number comes again, also of another round's requests.
            first = min(consumer.tokens, default=0)
            delivered = {place: consumer.tokens.get(first + place, []) for place in range(len(prompts))}
            counts["tokens"] += sum(map(len, delivered.values()))
            short = [place for place, tokens in delivered.items() if len(tokens) < args.output_tokens]
            counts["lost"] += len(short)
            whole = {place: tokens for place, tokens in delivered.items() if place not in short}
            compared.append(compare_forced(undisturbed(args, prompts, whole), whole, args.tie_tolerance))
            counts["differing"] += compared[-1].mismatches
    return counts, lives, compared


def undisturbed(
    args: argparse.Namespace, prompts: Sequence[Sequence[int]], delivered: Mapping[int, Sequence[int]]
) -> dict[int, list[TokenEvent]]:
    """What an engine without a broker, in a process of its own, chooses for the prompts of these places: fed the tokens
    that were delivered where ties are told, else its own."""

    def generate(pipe: int) -> None:
        params = SamplingParams(max_tokens=args.output_tokens, ignore_eos=True, logprobs=LIKELIEST)
        found: dict[int, list[Any]] = {place: [] for place in delivered}
        with make_engine(args, None) as engine, os.fdopen(pipe, "w") as file:
            place_of = {
                engine.submit(list(prompts[place]), params, tokens if args.tie_tolerance else None): place
                for place, tokens in delivered.items()
            }
            for event in engine.run():
                if event.logprob is None:
                    raise VattnError(event.error or "an engine gave no log-probabilities")
                found[place_of[event.request]].append((event.token, event.logprob.top))
            json.dump(found, file)

    pid, pipe = forked(generate)
    with os.fdopen(pipe) as file:
        text = file.read()
    os.waitpid(pid, 0)
    if not text:
        raise VattnError("the engine without a broker did not generate; its error is above")
    return {
        int(place): [
            TokenEvent(int(place), token, logprob=TokenLogprob(token, top[0][1], tuple((id_, at) for id_, at in top)))
            for token, top in events
        ]
        for place, events in json.loads(text).items()
    }


def journal_costs(args: argparse.Namespace) -> dict[str, Any]:
    """What the journal takes of a step, by how many sequences decode."""
    found: dict[str, Any] = {}
    on_card = list[float]()
    for sequences in SEQUENCES:
        prompt = min(args.prompt_tokens, COST_PROMPT)
        # All of them decode in all steps, though their prompts may go in one by one.
        outputs = args.journal_steps + 2 * sequences + 8
        sizes = {"prompts": sequences, "prompt_tokens": prompt, "output_tokens": outputs}
        sized = argparse.Namespace(**{**vars(args), **sizes, "memory": max(args.memory, 64 << 20)})
        with tempfile.TemporaryDirectory() as folder, broker_process(sized, Path(folder) / "broker") as path:
            cost = journal_cost(sized, path)
        found.update({f"{name}_{sequences}": value for name, value in cost.items()})
        if sequences in CARD_STEP_MS:
            on_card.append(cost["journal_us_per_step"] / (1e3 * CARD_STEP_MS[sequences]))
    return {**found, "journal_over_card_step": max(on_card)}


class Stopwatch:
    """Sums up the wall time and the processor time of calls."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0

    def timed(self, call: Callable[..., None], *, wall: bool) -> Callable[..., None]:
        """The call, timed; without `wall` its processor time alone."""

        def called(*arguments: Any) -> None:
            cpu, started = time.thread_time(), time.perf_counter()
            call(*arguments)
            # The processor's clock takes longer than what is measured, at times.
            ended = time.perf_counter()
            self.cpu_s += time.thread_time() - cpu
            if wall:
                self.wall_s += ended - started

        return called


def journal_cost(args: argparse.Namespace, path: Path) -> dict[str, float]:
    """Microseconds of a decode step and of its notes in the journal: those that it waits for, in the middle and of the
    quickest tenth, as on a machine that does nothing else; the mean of all threads' processor time; and of what it
    waits for in the middle, that for tokens and that for what lies where."""

    def measure(pipe: int) -> None:
        with make_engine(args, path) as engine:
            params = SamplingParams(max_tokens=args.output_tokens, ignore_eos=True)
            for number in range(args.prompts):
                engine.submit([1 + number] * args.prompt_tokens, params)
            first: set[int] = set()
            while len(first) < args.prompts:
                first.update(event.request for event in engine.step())
            watch, cache, notes = Stopwatch(), engine.cache, list[Survival]()
            placements = Stopwatch()
            # Who notes what lies where is mostly another thread than the one that steps.
            Placements.note = watch.timed(Placements.note, wall=False)  # type: ignore[method-assign]
            cache.note_placements = placements.timed(cache.note_placements, wall=True)  # type: ignore[method-assign]
            begin_step = watch.timed(Survival.begin_step, wall=True)
            Survival.write = watch.timed(Survival.write, wall=True)  # type: ignore[method-assign]
            Survival.begin_step = lambda self, delivered: (notes.append(self), begin_step(self, delivered))[1]  # type: ignore
            found: list[tuple[float, float, float, float, int]] = []
            while engine.busy and len(found) < args.journal_steps:
                watch.wall_s = watch.cpu_s = placements.wall_s = placements.cpu_s = 0.0
                started = time.perf_counter()
                tokens = len(engine.step())
                whole, cpu = time.perf_counter() - started, watch.cpu_s + placements.cpu_s
                found.append((whole, watch.wall_s, placements.wall_s, cpu, tokens))
            # An event's part is less than a clock's: of many, and of one that nobody will read.
            event, started = TokenEvent(0, 1), time.perf_counter()
            for _ in range(NOTED):
                notes[-1].noted(event)
            each_s = (time.perf_counter() - started) / NOTED
            for whole, written, placed, cpu, tokens in found:
                noted = tokens * each_s
                os.write(pipe, COST.pack(whole, written + placed + noted, cpu + noted, written + noted, placed))

    pid, pipe = forked(measure)
    found = b""
    while packet := os.read(pipe, 1 << 16):
        found += packet
    os.waitpid(pid, 0)
    os.close(pipe)
    steps = np.array([*COST.iter_unpack(found)])
    if not len(steps):
        raise VattnError("the engine whose journal is measured took no step; its error is above")
    whole, waited, _, written, placed = (1e6 * float(each) for each in np.median(steps, axis=0))
    return {
        "step_us": whole,
        "journal_us_per_step": waited,
        "journal_p10_us_per_step": 1e6 * float(np.percentile(steps[:, 1], 10)),
        "journal_cpu_us_per_step": 1e6 * float(steps[:, 2].mean()),
        "journal_tokens_us_per_step": written,
        "journal_places_us_per_step": placed,
    }
