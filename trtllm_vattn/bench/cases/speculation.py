"""`bench speculation`: tokens a second with drafts beside none, on text that repeats itself and on text that does not.

Nobody can say what a model with random weights writes next, so the text is **scripted**: the model computes all that it
always computes, and then the next token of a generated text is made the likeliest. How many drafts are accepted is a
property of that text (`repeating_text`), not of a model; what a step costs is the model's.

That drafts change no token is shown apart, in float32 on the host, with nothing scripted, greedy and sampled.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from trtllm_vattn.arguments import adder
from trtllm_vattn.bench.cases.forks import rollback_us
from trtllm_vattn.bench.harness.case import Part, Recording, engine_for, vocab_of
from trtllm_vattn.bench.harness.flags import add_attention, add_common
from trtllm_vattn.bench.harness.serving import quiet_heap
from trtllm_vattn.errors import VattnError
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.speculation import Speculation
from trtllm_vattn.table import tabulate

DRAFTS = (0, 3, 7)
"""Most draft tokens of a step."""
WARM_UP = 32
"""Tokens of each sequence of a turn that is not measured."""
LARGE = 1e4
"""Logit of the scripted token."""
PHRASES, SHORTEST, LONGEST = 48, 6, 20
CHANGED = 0.04
"""Tokens of a repeated phrase that are another one than before."""
NOISE = 0.02
"""Of a draft model's weights, by their standard deviation."""
COLUMNS = "text lanes drafts round tokens_per_s step_ms longest_step_ms accepted_per_step steps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench speculation`."""
    add = adder(parser, add_common(parser))
    add_attention(parser)
    add("--lanes", "SEQUENCES,...", "sequences that decode at once", "1,32,128", "1,3")
    add("--context", "TOKENS", "tokens of each sequence before it decodes", 512, 256)
    add("--output-tokens", "TOKENS", "of each sequence", 192, 48)
    add("--rounds", "TURNS", "turns that each number of drafts takes", 1)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    recording = Recording("speculation", args)
    parts: dict[str, Part] = {
        "tokens": lambda recording: [{"tokens_identical_float32": tokens_identical(args.seed)}],
        "without": partial(measure_engine, drafts=0),
        "with": partial(measure_engine, drafts=DRAFTS[-1]),
    }
    recording.measure(parts)
    same = recording.summary.get("tokens_identical_float32", True)
    wrong = [] if same else ["tokens with drafts are others than without, in float32 on the host"]
    return recording.conclude(tabulate(recording.results.get("runs", []), COLUMNS), wrong=wrong)


def measure_engine(recording: Recording, drafts: int) -> None:
    """Rows of an engine that takes up to so many drafts a step, and so fewer, too."""
    args, model = recording.args, recording.model
    recording.sum_up(text="scripted")
    longest = args.context + args.output_tokens
    random, vocab = np.random.default_rng(args.seed), vocab_of(model)
    texts = {
        "repeating": repeating_text(longest + 1, vocab, random),
        "random": random.integers(0, vocab, longest + 1).tolist(),
    }
    script = Script(model, longest + max(DRAFTS) + 2)
    try:
        recording.say(f"start the engine with up to {drafts} drafts")
        with engine_of(model, args, drafts, longest) as engine, quiet_heap():
            measure_all(engine, script, texts, args, recording)
    finally:
        script.remove()


def repeating_text(tokens: int, vocab: int, random: np.random.Generator) -> list[int]:
    """A text that repeats itself as code and documents do: phrases, the first ones most often (Zipf), a few tokens of
    each repetition changed."""
    phrases = [random.integers(0, vocab, random.integers(SHORTEST, LONGEST + 1)) for _ in range(PHRASES)]
    weights = 1 / np.arange(1, PHRASES + 1)
    text: list[int] = []
    while len(text) < tokens:
        phrase = phrases[random.choice(PHRASES, p=weights / weights.sum())].copy()
        changed = random.random(len(phrase)) < CHANGED
        phrase[changed] = random.integers(0, vocab, int(changed.sum()))
        text += phrase.tolist()
    return text[:tokens]


class Script:
    """Has a model find a given text the likeliest, whatever it computes: behind position p comes token p + 1."""

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        self._model = model
        # Among its buffers, so that a captured step may read it.
        model.register_buffer("script", torch.zeros(tokens, dtype=torch.int64, device=model.device), persistent=False)
        self._hook = model.register_forward_hook(self._write, with_kwargs=True)

    def set(self, text: Sequence[int]) -> None:
        """Another text, for sequences that begin from now on."""
        self._model.script.zero_()
        self._model.script[: len(text)] = torch.tensor(text)

    def _write(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        positions, kept = kwargs["position_ids"][0], kwargs.get("logits_to_keep")
        if isinstance(kept, torch.Tensor):
            positions = positions.index_select(0, kept)
        following = model.script.index_select(0, (positions + 1).clamp(max=len(model.script) - 1))
        output.logits[0].scatter_(1, following[:, None], LARGE)

    def remove(self) -> None:
        """The model writes what it likes again."""
        self._hook.remove()
        del self._model.script


def engine_of(model: PreTrainedModel, args: argparse.Namespace, drafts: int, longest: int) -> Engine:
    """An engine over the fixed-address cache, with or without drafts."""
    speculation = Speculation(num_speculative_tokens=drafts) if drafts else None
    options: dict[str, Any] = {"attention": args.attention, "buckets": sorted(set(args.lanes))}
    return engine_for(model, args.device, max(args.lanes), longest, speculation=speculation, **options)


def measure_all(
    engine: Engine, script: Script, texts: dict[str, list[int]], args: argparse.Namespace, recording: Recording
) -> None:
    """Record rows of every text and number of lanes, by the drafts that this engine can take in a step."""
    ladders: dict[int, tuple[int, ...]] = {0: ()}
    if engine.decode.speculator is not None:
        whole = engine.decode.speculator.length.ladder
        ladders = {most: tuple(each for each in whole if each <= most) for most in DRAFTS if 0 < most <= whole[-1]}
    for turn in range(args.rounds + 1):
        for name, text in texts.items():
            script.set(text)
            for lanes, (drafts, ladder) in product(args.lanes, ladders.items()):
                # The first turn plans and captures what is left to be.
                if not turn and (name, drafts) != (next(iter(texts)), max(ladders)):
                    continue
                said = f"turn {turn} of {args.rounds}" if turn else "warm-up"
                recording.say(f"{said}: {name} text, {lanes} lanes, {drafts} drafts")
                if engine.decode.speculator is not None:
                    engine.decode.speculator.length.ladder = ladder
                # All decode at once only if the first one goes on until the last one's prompt is in.
                meanwhile = -(-lanes * args.context // engine.scheduler.chunk)
                output = args.output_tokens if turn else min(args.output_tokens, WARM_UP + meanwhile)
                row = measure(engine, text[: args.context], lanes, output)
                rollback = row.pop("rollback_us")
                if not turn:
                    continue
                recording.add("runs", {"drafts": drafts, "text": name, "lanes": lanes, "round": turn - 1, **row})
                rollback = max(rollback, recording.summary.get("rollback_us", 0.0))
                recording.sum_up(rollback_us=rollback, **summarised(recording.results["runs"]))


def measure(engine: Engine, prompt: list[int], lanes: int, output: int) -> dict[str, Any]:
    """Tokens a second while so many sequences decode, from when all do until the first one has ended."""
    before = engine.speculation_stats() if engine.decode.speculator is not None else {}
    for _ in range(lanes):
        engine.submit(prompt, SamplingParams(output, ignore_eos=True))
    while len(engine.scheduler.decoding) < lanes:
        if any(event.finish_reason for event in engine.step()):
            raise VattnError(f"a sequence ended before all {lanes} decoded; raise --output-tokens")
    engine.step()
    tokens, rollback = 0, 0.0
    took: list[float] = []
    started = last = perf_counter()
    while True:
        events = engine.step()
        if errors := [event.error for event in events if event.error]:
            raise VattnError(str(errors[0]))
        if any(event.finish_reason for event in events):
            break
        tokens, ended = tokens + len(events), perf_counter()
        took.append(ended - last)
        last = ended
        if len(took) == 1 and engine.decode.speculator is not None:
            rollback = rollback_us(engine)
            # Not counted: what was just measured.
            last = perf_counter()
            started += last - ended
    if len(took) < 2:
        raise VattnError(f"{len(took)} steps were too few to be timed; raise --output-tokens")
    for _ in engine.run():
        pass
    row = {"tokens_per_s": tokens / (ended - started), "step_ms": 1e3 * (ended - started) / len(took)}
    row["longest_step_ms"] = 1e3 * max(took)
    return {**row, "rollback_us": rollback, **_change(engine, before)}


def _change(engine: Engine, before: dict[str, Any]) -> dict[str, Any]:
    """What became of drafts since then."""
    if not before:
        return {"accepted_per_step": 0.0, "drafted": 0, "accepted": 0, "steps": ""}
    now = engine.speculation_stats()
    drafted, accepted, verified = (now[name] - before[name] for name in ("drafted", "accepted", "verified"))
    by_drafts = {drafts: count - before["steps"].get(drafts, 0) for drafts, count in now["steps"].items()}
    return {
        "accepted_per_step": accepted / max(1, verified),
        "drafted": drafted,
        "accepted": accepted,
        "steps": " ".join(f"{drafts}:{count}" for drafts, count in by_drafts.items() if count),
    }


def summarised(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures that are quoted, as far as rows are there: the mean of rounds; `worst_over_without` of all texts,
    lanes and drafts."""
    by: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        by.setdefault((row["text"], row["lanes"], row["drafts"]), []).append(row)

    def mean(what: str, rows: Sequence[dict[str, Any]]) -> float:
        return float(np.mean([row[what] for row in rows]))

    out: dict[str, Any] = {}
    worst: list[float] = []
    fewest = min(row["lanes"] for row in rows)
    for (text, lanes, drafts), some in by.items():
        without = by.get((text, lanes, 0))
        if not drafts or without is None:
            continue
        speedup = mean("tokens_per_s", some) / mean("tokens_per_s", without)
        worst.append(speedup)
        if text == "repeating":
            out[f"speedup_k{drafts}_{lanes}_lane{'s' if lanes > 1 else ''}"] = speedup
            if lanes == fewest:
                out[f"accepted_per_step_k{drafts}"] = mean("accepted_per_step", some)
    return {**out, "worst_over_without": min(worst)} if worst else out


def tokens_identical(seed: int) -> bool:
    """Whether requests get the same tokens with drafts as without in float32 on the host: greedy and sampled, looked up
    and by a draft model. Raises VattnError where no draft was accepted, which would show nothing."""
    model = load_model("tiny-llama", "cpu", torch.float32, seed)
    random = np.random.default_rng(seed)
    prompts = [(random.integers(0, 512, period).tolist() * 40)[:40] for period in (3, 5, 8, 13)]
    params = [
        SamplingParams(24),
        SamplingParams(24, temperature=0.3, seed=seed),
        SamplingParams(24, temperature=0.8, top_k=50, top_p=0.95, seed=seed + 1),
        SamplingParams(24),
    ]
    # Nearly the same model: most of its drafts are right, some are not.
    small = deepcopy(model)
    with torch.no_grad():
        for each in small.parameters():
            each += NOISE * each.std() * torch.randn_like(each)
    ways = [
        None,
        Speculation(num_speculative_tokens=7, prompt_lookup_min=1),
        Speculation("draft_model", 3, model=small),
    ]
    found, accepted = [], 0
    for speculation in ways:
        options: dict[str, Any] = {"attention": "torch", "compile": False, "capture": False, "prefix_cache": None}
        with engine_for(model, "cpu", len(prompts), 64, speculation=speculation, **options) as engine:
            found.append([done.tokens for done in engine.generate(prompts, params)])
            if speculation is not None:
                accepted += engine.speculation_stats()["accepted"]
    if not accepted:
        raise VattnError("no draft was accepted in float32 on the host; choose another --seed")
    return all(tokens == found[0] for tokens in found)
