"""`bench survival`: an engine's process is ended by SIGKILL wherever it is, again and again, and the next one goes on
with its sequences (tenancy/README.md).

A broker has a process of its own. Engines are children of one process that has imported everything, and hand each token
to it by a pipe, as a consumer that outlives them. An engine is ended some tokens after it began, at a random moment: in
a step, while memory is mapped ahead or replaced under a sequence (which it does all the time), in a write of the
journal (which is made small, so that checkpoints come often). What the consumer has got, the next engine is told. At
the end the tokens are compared with those of an engine that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from trtllm_vattn.arguments import non_negative, positive, size
from trtllm_vattn.bench.harness.case import conclude
from trtllm_vattn.bench.harness.flags import add_common, dtype_of
from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.errors import VattnError
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.tenancy import journal
from trtllm_vattn.tenancy.broker import Broker, open_exportable
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.vmm.host import HostDriver

EVENT = struct.Struct("<iii")
BEGAN, STEP, ENDED = -1, -2, -3
"""In place of a request's number: an engine has begun (its requests, and how many are prefilled again); a step's
microseconds, and those of its journal; all requests have ended."""
SMALL_HALF = 1 << 15
"""Bytes of half a journal that is to be full often."""
KEEP_S = 600.0
LIFE_S = 300.0
"""After which an engine's life counts as hanging."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench survival`."""
    gpu, add = add_common(parser, on_gpu="llama-3.2-1b"), parser.add_argument
    add("--kills", type=positive, default=30 if gpu else 20, metavar="COUNT", help="engines that are ended by SIGKILL")
    text = "sequences that run at once, and go on from engine to engine"
    add("--prompts", type=positive, default=32 if gpu else 4, metavar="PROMPTS", help=text)
    add("--prompt-tokens", type=positive, default=2048 if gpu else 60, metavar="TOKENS", help="of each prompt")
    add("--output-tokens", type=positive, default=512 if gpu else 120, metavar="TOKENS", help="of each sequence")
    text = "tokens of all sequences that an engine gives at most before it is ended"
    add("--life-tokens", type=positive, default=400 if gpu else 60, metavar="TOKENS", help=text)
    add("--memory", type=size, default="8GiB" if gpu else "2MiB", metavar="BYTES", help="of the broker")
    text = "steps of an engine that nobody ends, of which the journal's part is told; 0 leaves it out"
    add("--journal-steps", type=non_negative, default=100, metavar="STEPS", help=text)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where a sequence was lost, a token was another, or came twice."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, broker_process(args, Path(folder) / "broker") as path:
        counts, lives = survive(args, path)
        costs = journal_cost(args, path) if args.journal_steps else {}
    summary = {
        "kills": counts["kills"],
        "sequences_lost": counts["lost"],
        "tokens_differing": counts["differing"],
        "tokens_twice": counts["twice"],
        "prefilled_again": counts["again"],
        "sequences": counts["sequences"],
        "tokens": counts["tokens"],
        "next_token_s": summarise([each["next_token_s"] for each in lives if "next_token_s" in each]),
        **costs,
        "seconds": time.perf_counter() - started,
    }
    names = ("sequences_lost", "tokens_differing", "tokens_twice", "prefilled_again")
    wrong = [f"{name}: {summary[name]}" for name in names if summary[name]]
    return conclude("survival", args, {"lives": lives}, summary, wrong=wrong)


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
    options: dict[str, Any] = {"compile": False, "capture": False} if on_host else {"deterministic": True}
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
    args: argparse.Namespace, path: Path, prompts: Sequence[Sequence[int]], received: dict[int, int], pipe: int
) -> None:
    """One engine's life: go on with what there is, or begin with these prompts, and replace memory all the time."""
    journal.HALF, rng = SMALL_HALF, random.Random(os.getpid())
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
        if running and rng.random() < 0.5 and not engine.pipeline.running:
            engine.cache.replace(engine.cache.sequence_at(rng.choice(running)))
    # What was handed over is forgotten.
    engine.step()
    os.write(pipe, EVENT.pack(ENDED, 0, 0))
    engine.close()


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


def watch(pid: int, pipe: int, consumer: Consumer, after: int | None, delay_s: float) -> dict[str, Any]:
    """Take an engine's tokens until it has ended; end it so long after it gave so many. What became of it."""
    found: dict[str, Any] = {"tokens": 0, "killed": False, "ended": False, "again": 0}
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
            elif number >= 0:
                found.setdefault("next_token_s", time.monotonic() - began)
                found["tokens"] += 1
                consumer.take(number, index, token)
        left = left[whole:]
    os.waitpid(pid, 0)
    os.close(pipe)
    if not found["killed"] and not found["ended"]:
        raise VattnError("an engine ended by itself before its sequences had; its error is above")
    return found


def survive(args: argparse.Namespace, path: Path) -> tuple[Counter[str], list[dict[str, Any]]]:
    """End engines until there were as many as asked for; sequences that end are followed by new ones."""
    rng, counts = random.Random(args.seed), Counter[str]()
    lives: list[dict[str, Any]] = []
    vocab = np.random.default_rng(args.seed)
    with tqdm(total=args.kills, unit="kill", disable=None) as bar:
        while counts["kills"] < args.kills:
            prompts = vocab.integers(1, 500, (args.prompts, args.prompt_tokens)).tolist()
            expected = undisturbed(args, prompts)
            consumer, ended = Consumer(), False
            while not ended:
                after = rng.randint(0, args.life_tokens) if counts["kills"] < args.kills else None
                received = consumer.received()
                pid, pipe = forked(lambda pipe: live(args, path, prompts, received, pipe))  # noqa: B023
                found = watch(pid, pipe, consumer, after, rng.random() * 0.02)
                lives.append(found)
                counts["kills"] += found["killed"]
                counts["again"] += found["again"]
                bar.update(found["killed"])
                ended = found["ended"]
            counts["sequences"] += len(prompts)
            counts.update(consumer.counts)
            # No number comes again, also of another round's requests.
            first = min(consumer.tokens, default=0)
            for number, tokens in enumerate(expected, first):
                got = consumer.tokens.get(number, [])
                counts["tokens"] += len(got)
                counts["lost"] += len(got) < len(tokens)
                counts["differing"] += sum(one != other for one, other in zip(got, tokens, strict=False))
    return counts, lives


def undisturbed(args: argparse.Namespace, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens of an engine without a broker, in a process of its own."""

    def generate(pipe: int) -> None:
        params = SamplingParams(max_tokens=args.output_tokens, ignore_eos=True)
        with make_engine(args, None) as engine, os.fdopen(pipe, "w") as file:
            json.dump([completion.tokens for completion in engine.generate(prompts, params)], file)

    pid, pipe = forked(generate)
    with os.fdopen(pipe) as file:
        text = file.read()
    os.waitpid(pid, 0)
    if not text:
        raise VattnError("the engine without a broker did not generate; its error is above")
    tokens: list[list[int]] = json.loads(text)
    return tokens


def journal_cost(args: argparse.Namespace, path: Path) -> dict[str, float]:
    """Microseconds of a step, in the middle, and of its notes in the journal, of an engine that nobody ends."""

    def measure(pipe: int) -> None:
        with make_engine(args, path) as engine:
            cache, spent = engine.cache, [0.0]
            note, place = cache.note, cache.note_placements

            def timed(call: Callable[..., None]) -> Callable[..., None]:
                def called(*arguments: Any) -> None:
                    started = time.perf_counter()
                    call(*arguments)
                    spent[0] += time.perf_counter() - started

                return called

            cache.note, cache.note_placements = timed(note), timed(place)  # type: ignore[method-assign]
            params = SamplingParams(max_tokens=args.output_tokens, ignore_eos=True)
            for number in range(args.prompts):
                engine.submit([1 + number] * args.prompt_tokens, params)
            for _ in range(args.journal_steps):
                if not engine.busy:
                    break
                spent[0], started = 0.0, time.perf_counter()
                engine.step()
                whole = time.perf_counter() - started
                os.write(pipe, EVENT.pack(STEP, int(1e6 * whole), int(1e6 * spent[0])))

    pid, pipe = forked(measure)
    found = b""
    while packet := os.read(pipe, 1 << 16):
        found += packet
    os.waitpid(pid, 0)
    os.close(pipe)
    steps = [(whole, spent) for _, whole, spent in EVENT.iter_unpack(found)]
    if not steps:
        raise VattnError("the engine whose journal is measured took no step; its error is above")
    whole, spent = (float(np.median([step[place] for step in steps])) for place in (0, 1))
    return {"step_us": whole, "journal_us": spent, "journal_share": spent / whole}
