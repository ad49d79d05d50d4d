"""`bench start`: capture first, size later. How long does a start take, and does a change of budget ever need another
capture?

Fresh processes start the engine to its first token, with cold and with warm caches of torch and Python on disk; then
one engine is captured over its dummy slot, and its budget raised and lowered while the same prompts must give the same
tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, time
from typing import Any

from trtllm_vattn.arguments import adder
from trtllm_vattn.bench.harness.case import Part, Recording, captured_anew, captured_graphs, in_fresh_process
from trtllm_vattn.bench.harness.flags import MAX_SEQS, TIE_TOLERANCE, add_common, add_parts
from trtllm_vattn.bench.harness.identity import RequestTokens, compare
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import KVCacheOutOfMemory, NoFreeSlot
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate
from trtllm_vattn.vmm.open import open_driver

PARTS = ("cold", "warm", "budgets")
_START = """
import json, sys
from time import time
started = float(sys.argv[1])
from trtllm_vattn.runtime import Engine, SamplingParams
imported = time()
with Engine.from_pretrained(sys.argv[2], device=sys.argv[3], max_seqs=int(sys.argv[4]), max_seq_len=2048) as engine:
    built = time()
    engine.submit([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
    engine.step()
    first = time()
    report = engine.startup
    print(json.dumps({
        "first_token_s": first - started, "import_s": imported - started, "load_s": report.load_s,
        "compile_s": report.compile_s, "capture_s": report.capture_s, "capture_bytes": report.capture_bytes,
        "graphs": sum(len(each.seconds) for each in (report.decode, report.prefill, report.passes)),
        "budget_bytes": report.budget_bytes,
        "phases": {"import": imported - started, **report.phases, "first token": first - built},
        "captured": {
            name: {str(size): took for size, took in getattr(report, name).seconds.items()}
            for name in ("decode", "prefill", "passes", "likely")
        },
    }))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench start`."""
    add = adder(parser, gpu := add_common(parser))
    add_parts(parser, PARTS)
    text = "caches of torch, Triton and Python that a warm start finds (default: those that the cold one leaves)"
    add("--kept", "FOLDER", text, type=Path)
    add("--max-seqs", "SEQUENCES", MAX_SEQS, 32, 4)
    usual = "8GiB,60GiB,100GiB,60GiB,8GiB" if gpu else "4MiB,16MiB,4MiB"
    add("--budgets", "BYTES,...", "of KV, set one after the other", usual)
    text = f"{TIE_TOLERANCE}: cuDNN's decode of many lanes is not the same to the last bit from one call to the next"
    add("--tie-tolerance", "LOGITS", text, 0.25, 0.0)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where tokens changed."""
    recording = Recording("start", args)
    with tempfile.TemporaryDirectory() as made:

        def start(name: str, kept: str) -> dict[str, Any]:
            found = _started(args, kept)
            phases, captured = found.pop("phases"), found.pop("captured")
            recording.add("starts", {"start": name, **found})
            for phase, took in phases.items():
                recording.add("phases", {"start": name, "phase": phase, "seconds": took})
            for what, sizes_s in captured.items():
                for number, took in sizes_s.items():
                    recording.add("captures", {"start": name, "graph": what, "size": int(number), "seconds": took})
            figures = {f"{name}_first_token_s": found["first_token_s"]}
            return figures | {each: found[each] for each in ("capture_s", "capture_bytes")}

        def warm(recording: Recording) -> Iterator[dict[str, Any]]:
            if args.kept is not None:
                # What is kept may be of other shapes, or nothing yet.
                yield start("unquoted", str(args.kept))
            yield start("warm", made if args.kept is None else str(args.kept))

        parts: dict[str, Part] = {"cold": lambda recording: [start("cold", made)], "warm": warm, "budgets": _sized}
        recording.measure(parts, [name for name in PARTS if name in args.parts])
    shown = "\n".join(
        tabulate(rows, " ".join(rows[0]))
        for name in ("starts", "phases", "captures", "budgets")
        if (rows := recording.results.get(name))
    )
    wrong = [] if recording.summary.get("tokens_unchanged", True) else ["tokens changed with the budget"]
    return recording.conclude(shown, wrong=wrong)


def _started(args: argparse.Namespace, kept: str) -> dict[str, Any]:
    """One start in a fresh process; torch's compiled code, Python's and the mapping verdict are kept in `kept`, whose
    folders scripts/gpu names likewise."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{kept}/inductor", "TRITON_CACHE_DIR": f"{kept}/triton"}
    # Container images set the last one, and then every start compiles the source of all that it imports.
    caches |= {"XDG_CACHE_HOME": kept, "PYTHONPYCACHEPREFIX": f"{kept}/bytecode", "PYTHONDONTWRITEBYTECODE": ""}
    return in_fresh_process(_START, time(), args.model, args.device, args.max_seqs, **caches)


def _sized(recording: Recording) -> Iterator[dict[str, Any]]:
    """Budgets set one after the other under the same graphs, and filled."""
    args, model = recording.args, recording.model
    # Fillers take whole slots, so that nothing is mapped ahead for them.
    longest = 7900 if args.device != "cpu" else 500
    one = longest * shape_of(model, 1, longest).token_bytes
    slots = max(args.budgets) // one + 4
    cache = KVCacheManager(shape_of(model, slots, longest), open_driver(args.device))
    # One bucket, so that the same graph gives the tokens whichever slots are taken.
    with Engine(model, cache, prefix_cache=False, buckets=[slots], record_margins=True) as engine:
        captured = captured_graphs(engine)
        want = None
        for budget in args.budgets:
            started = perf_counter()
            engine.set_budget(budget)
            set_s = perf_counter() - started
            fillers, fill_s = _fill(cache, longest)
            held = cache.stats().held_bytes
            # Room for the prompts, in memory that was somebody's before.
            cache.release(fillers.pop())
            tokens = _generated(engine, [1, 2, 3], [5] * 60)
            want = want or tokens
            identity = compare(want, tokens, args.tie_tolerance, free=True)
            recording.add(
                "budgets",
                {
                    "budget_mib": budget / (1 << 20),
                    "set_s": set_s,
                    "fill_s": fill_s,
                    "sequences": len(fillers) + 1,
                    "held_bytes": held,
                    "tokens_unchanged": identity.identical,
                    "ties": identity.ties,
                    "captures": captured_anew(engine, captured),
                },
            )
            for filler in fillers:
                cache.release(filler)
            rows = recording.results["budgets"]
            yield {
                "budgets": len(rows),
                "largest_held_bytes": max(row["held_bytes"] for row in rows),
                "tokens_unchanged": all(row["tokens_unchanged"] for row in rows),
                "ties": sum(row["ties"] for row in rows),
                "recaptures": sum(row["captures"] for row in rows),
            }


def _generated(engine: Engine, *prompts: list[int]) -> RequestTokens:
    """Tokens of prompts run one by one, numbered in their order."""
    tokens: RequestTokens = {}
    for number, prompt in enumerate(prompts):
        engine.submit(prompt, SamplingParams(max_tokens=24, ignore_eos=True))
        tokens[number] = list(engine.run())
    return tokens


def _fill(cache: KVCacheManager, tokens: int) -> tuple[list[object], float]:
    """Admit sequences until nothing is left."""
    started = perf_counter()
    fillers: list[object] = []
    try:
        while True:
            filler = ("filler", len(fillers))
            cache.admit(filler, tokens)
            fillers.append(filler)
    except (KVCacheOutOfMemory, NoFreeSlot):
        return fillers, perf_counter() - started
