"""Steps in two graphs, while a request with a grammar runs: tokens as alone, and masks made beside the forward pass."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_passes import DescribedAttention
from tiny_text import VOCAB, tiny_model, tiny_tokenizer

from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, DriverError
from trtllm_vattn.graphs.replay import GraphRunner
from trtllm_vattn.runtime import engine as engine_module
from trtllm_vattn.runtime import grammar as grammar_module
from trtllm_vattn.runtime import lane_processors, pass_cost
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.decode import Choice, Launch
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.grammar import Grammar, GrammarCompiler, MaskJob, fill_masks
from trtllm_vattn.runtime.lane_processors import FORWARD, LaneAsks, LaneProcessors, StepKind
from trtllm_vattn.runtime.pass_cost import PassCost
from trtllm_vattn.runtime.pipeline import Pipeline
from trtllm_vattn.runtime.request import TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.step_plan import StepPlan

pytest.importorskip("llguidance")

LANES = 4
WAYS: dict[str, dict[str, Any]] = {
    "captured passes": {"buckets": [LANES]},
    "several steps": {"steps": 4, "buckets": [2, LANES], "packed": True},
    "eager": {"capture": False, "steps": 4},
    "loop": {"steps": 4, "loop": True, "buckets": [LANES]},
    "deterministic": {"deterministic": True},
}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def engine_of(pages: int | None = None, **options: Any) -> Engine:
    model = copy.deepcopy(tiny_model())
    memory: dict[str, Any] = (
        {"host_memory": 1 << 20} if pages is None else {"lookahead": 0, "budget": (pages + 1) * 4096}
    )
    cache = make_cache("vattn", shape_of(model, LANES, 96), "cpu", **memory)
    if not options.get("deterministic"):
        options["prefix_cache"] = False
    return Engine(model, cache, **{"compile": False, "tokenizer": tiny_tokenizer(), "chunk": 32, **options})


def asked(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 14, "ignore_eos": True, **options})


PROMPTS = [np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in (3, 28, 11, 1, 40, 17, 9, 22)]
PARAMS = [
    asked(regex="[a-c]{3,5}!", detokenize=True),
    asked(),
    asked(json_schema=SCHEMA, temperature=0.9, seed=2, max_tokens=18),
    asked(stop=["e", "th"], detokenize=True, temperature=0.8, seed=4),
    asked(regex="[a-z ]{40}", repetition_penalty=1.3, logprobs=2, max_tokens=20),
    asked(temperature=1.0, top_k=20, seed=9, max_tokens=20),
    asked(regex="(yes|no|perhaps)( (yes|no))*", stop=" no", detokenize=True, temperature=1.0, seed=7),
    asked(frequency_penalty=1.1, logprobs=1, max_tokens=16),
]


def outcome(events: list[TokenEvent]) -> tuple[list[int | None], str | None, str]:
    return [event.token for event in events], events[-1].finish_reason, "".join(event.text or "" for event in events)


@pytest.fixture(scope="module")
def alone() -> list[tuple[list[int | None], str | None, str]]:
    """Of each request, by an engine that runs nobody else, and no launch before the last one's tokens are read."""
    found = []
    with engine_of(capture=False) as engine:
        engine.pipeline.one_by_one = True
        for prompt, params in zip(PROMPTS, PARAMS, strict=True):
            engine.submit(prompt, params)
            found.append(outcome(list(engine.run())))
    return found


@pytest.mark.parametrize("way", WAYS)
def test_requests_that_come_go_and_are_preempted_have_the_tokens_that_they_have_alone(
    way: str, alone: list[tuple[list[int | None], str | None, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "captured passes":
        monkeypatch.setattr(engine_module, "make_attention", lambda _, *given, **__: DescribedAttention(*given))
    random = np.random.default_rng(5)
    with engine_of(pages=5, **WAYS[way]) as engine:
        which: dict[int, int] = {}
        got: dict[int, list[TokenEvent]] = {}
        left, aborted, steps = 8, 0, 0
        while left or engine.busy:
            if left and random.random() < 0.6:
                place = left % len(PROMPTS)
                number = engine.submit(PROMPTS[place], PARAMS[place])
                which[number], got[number] = place, []
                left -= 1
            steps += 1
            if steps in (8, 30) and (running := list(engine.scheduler.requests)):
                number = running[int(random.integers(len(running)))]
                engine.abort(number)
                del which[number]
                aborted += 1
            for event in engine.step():
                assert event.error is None
                got[event.request].append(event)
        for number, place in which.items():
            assert outcome(got[number]) == alone[place], place
        assert engine.scheduler.preempted
        assert aborted
        engine.cache.check_integrity()
        if way == "captured passes":
            graphs = engine.passes.graphs
            assert graphs is not None
            assert graphs.runner.captured
            assert "forward step" in names(engine)
            # Each that came behind the start was counted, for somebody waited.
            choosers = [each for kind, each in engine.decode._choosers.items() if kind != StepKind()]
            assert engine.captures_while_running >= sum(len(each.captured) for each in choosers) > 0


def names(engine: Engine) -> list[str]:
    """Of the graphs of steps that are looked at."""
    kinds = [kind.name + " step" for (_, kind), runner in engine.decode._runners.items() if runner.captured]
    kinds += [f"choice of a {kind.name} step" for kind, each in engine.decode._choosers.items() if each.captured]
    report = engine.audit()
    report.raise_if_foreign()
    assert all(any(graph.startswith(kind) for graph in report.graphs) for kind in kinds)
    return kinds


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a step does, in order: what it launches, reads and computes."""
    noted: list[str] = []

    def note(owner: Any, name: str, word: Callable[..., str | None]) -> None:
        inner = getattr(owner, name)

        def outer(*arguments: Any, **options: Any) -> Any:
            if (said := word(*arguments, **options)) is not None:
                noted.append(said)
            return inner(*arguments, **options)

        monkeypatch.setattr(owner, name, outer)

    def of_runner(runner: GraphRunner, *_: Any) -> str | None:
        step = runner._step
        kind = next((each for each in getattr(step, "args", ()) if isinstance(each, StepKind)), None)
        if getattr(getattr(step, "func", None), "__name__", "") == "_choose_tokens":
            return "choice"
        return None if kind is None else "forward" if kind == FORWARD else "step"

    note(GraphRunner, "replay", of_runner)
    note(Launch, "read", lambda launch: "read")
    note(lane_processors, "fill_masks", lambda *_: "masks")
    note(LaneProcessors, "put_masks", lambda *_: "copy")
    return noted


def test_masks_are_made_while_the_forward_pass_of_their_step_is_under_way(calls: list[str]) -> None:
    with engine_of(buckets=[LANES]) as engine:
        engine.submit(PROMPTS[0], asked(regex="[a-z ]{40}(!|?)".replace("?", "[?]"), max_tokens=30))
        engine.submit(PROMPTS[1], asked(max_tokens=30))
        for _ in range(6):
            engine.step()
        calls.clear()
        for _ in range(4):
            engine.step()
        # The forward pass of the next step goes out before anybody waits for the tokens that its masks are made of;
        # what is waited for is behind the choice before it.
        assert [call for call in calls if call != "copy"] == ["forward", "read", "masks", "choice"] * 4
        list(engine.run())
        calls.clear()
        # Nobody asks for a grammar any more: one graph a step, and nothing is computed.
        engine.generate([PROMPTS[0]], asked())
        assert set(calls) == {"step", "read"}


class Timeline:
    """A device and a host in virtual milliseconds, as a pipeline's `decode`: a forward pass takes 6, a choice 1, masks
    take the host 4; whatever is launched begins when the host has launched it and the device is done with the rest."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.launches = 0
        self.chosen_at: dict[int, float] = {}

    def run(self, takes: float) -> float:
        self.device = max(self.device, self.host) + takes
        return self.device

    def launch(self, steps: int, drafts: int) -> Launch:
        self.host += 0.5
        self.run(6)
        self.launches += 1
        nothing, choice = torch.empty(0), Choice(StepKind(processed=True), lambda: None)
        return Launch({0: 0}, self.launches, steps, nothing, 0.0, nothing, None, choice=choice)

    def choose(self, launch: Launch) -> Launch:
        self.host += 4
        self.chosen_at[launch.first] = self.run(1)
        return replace(launch, choice=None)

    def commit(self, launch: Launch, rows: object) -> None:
        self.host += 1


@pytest.mark.parametrize(("one_by_one", "takes"), [(False, 6 + 1), (True, 0.5 + 6 + 1 + 1)])
def test_a_step_takes_its_forward_pass_and_its_choice_where_masks_are_made_sooner(
    one_by_one: bool, takes: float
) -> None:
    timeline = Timeline()
    scheduler: Any = SimpleNamespace(
        decode=timeline,
        plan=lambda ahead: StepPlan(1),
        launched=lambda plan: None,
        cache=SimpleNamespace(note_placements=lambda: None),
        trace=None,
    )
    passes: Any = SimpleNamespace(measured=lambda launch: None)
    pipeline = Pipeline(scheduler, passes, one_by_one)
    begun = 0.0
    for step in range(30):
        launch = pipeline.start()
        assert launch is not None
        timeline.host = max(timeline.host, timeline.chosen_at[launch.first])
        pipeline.commit(launch, [[0]])
        if step == 9:
            begun = timeline.host
    # One by one a forward pass waits for what was chosen before it, and the masks are still made beside it.
    assert (timeline.host - begun) / 20 == pytest.approx(takes)


def test_masks_of_all_lanes_are_sent_by_one_copy_and_those_between_them_allow_all() -> None:
    compiler = GrammarCompiler(tiny_tokenizer(), VOCAB, [0])
    processors = LaneProcessors(4, 1, torch.device("cpu"))
    processors.require(VOCAB, grammar=True)
    regexes = {3: "a+", 1: "[b-d]", 0: "x?y"}
    for slot in (3, 2, 1, 0):
        params = asked(regex=regexes[slot]) if slot in regexes else asked(presence_penalty=1.0)
        grammar = compiler.grammar(params) if slot in regexes else None
        processors.set(slot, LaneAsks(params, [5], [], grammar=grammar))
    processors.send({slot: slot for slot in range(4)})
    # Masks of launches before were other ones.
    processors._staged.fill_(0)
    copies = []
    for slots in ({3, 2, 1}, {0, 1, 2, 3}, {0}, {2}):
        rows = processors.new_masks(slots)
        copies.append(rows)
        if rows is not None:
            processors.put_masks(rows)
    row = processors._row
    assert copies[-1] is None
    assert [len(rows) for rows in copies[:-1] if rows is not None] == [3, 4, 1]
    for slot in range(4):
        mask = processors._masks[row[slot]].numpy().tobytes()
        grammar = processors._asks[slot].grammar
        wanted = b"\xff" * len(mask) if grammar is None else grammar.follow([]).compute_bitmask()
        assert mask == wanted[: len(mask)], (slot, len(mask), len(wanted))
    # A grammar with an error allows all: its request ends with the next token.
    broken = processors._grammars[3][0]
    broken.follow([]).consume_token(VOCAB - 1)
    assert broken.error
    rows = processors.new_masks({3})
    assert rows is not None
    assert (processors._staged.numpy()[rows.start] == -1).all()


def test_masks_in_a_string_are_the_same_by_slices_of_all_lengths_and_by_none() -> None:
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer

    params = asked(json_schema={"type": "string", "maxLength": 12})
    sliced = GrammarCompiler(tiny_tokenizer(), VOCAB, [0]).grammar(params)
    whole = from_tokenizer(tiny_tokenizer(), n_vocab=VOCAB, eos_token=0, slices=[])
    other = LLMatcher(whole, LLMatcher.grammar_from_json_schema(params.json_schema), log_level=0)
    tokens = tiny_tokenizer()('"abcdefghijkl"', add_special_tokens=False)["input_ids"]
    assert len(tokens) > 4
    for place, token in enumerate(tokens):
        assert sliced.follow(tokens[:place]).compute_bitmask() == other.compute_bitmask()
        other.consume_token(token)


def test_masks_are_computed_by_another_thread_while_tokens_are_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []
    compute, commit = grammar_module._compute, Engine._commit_tokens
    begun, committing = threading.Event(), threading.Event()

    def computed(*given: Any) -> None:
        other = threading.current_thread() is not threading.main_thread()
        threads.append(other)
        begun.set()
        # Tokens are committed, whose requests look at their grammars, while the matchers are with this thread.
        assert not other or committing.wait(30)
        compute(*given)

    def committed(*given: Any) -> None:
        assert not threads or begun.wait(30)
        commit(*given)
        committing.set()

    with engine_of(buckets=[LANES]) as engine:
        for place in (0, 1):
            engine.submit(PROMPTS[place], asked(regex="[a-z ]{40}", max_tokens=20))
        for _ in range(5):
            engine.step()
        monkeypatch.setattr(grammar_module, "_compute", computed)
        monkeypatch.setattr(Engine, "_commit_tokens", committed)
        for _ in range(8):
            begun.clear()
            committing.clear()
            engine.step()
        assert threads == [True] * 8
        committing.set()
        engine.cache.check_integrity()


def test_masks_that_were_not_begun_when_they_are_settled_are_never_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(grammar_module, "_compute", lambda *given: calls.append(given))
    masks, job = np.zeros((1, 1), np.int32), MaskJob()
    assert not job.settle()
    job._run([], masks)
    assert not calls
    job = MaskJob()
    job.start([], masks)
    assert job.settle()
    assert job.over
    assert len(calls) == 1


def test_a_grammar_that_is_lent_is_left_alone_and_its_error_is_seen_afterwards() -> None:
    grammar = GrammarCompiler(tiny_tokenizer(), VOCAB, [0]).grammar(asked(regex="[ab]{1,3}"))
    a, b, other = (tiny_tokenizer()(text, add_special_tokens=False)["input_ids"][0] for text in "abz")
    job = MaskJob()
    matcher = grammar.lend([], a, job)
    assert matcher is not None
    assert grammar.is_lent(job, [a])
    assert not grammar.is_lent(job, [b])
    assert not grammar.ends_with([], a)
    # While it is lent only what was known before is said; following another output waits for it.
    matcher.consume_token(other)
    assert grammar.error is None
    assert job.settle() is False
    assert grammar.error
    assert grammar.lend([a], b, MaskJob()) is None
    # Nothing comes behind the third.
    grammar = grammar.anew()
    assert grammar.lend([b, b], b, MaskJob()) is None
    assert grammar.ends_with([b, b], b)


@pytest.mark.parametrize("where", ["new_masks", "put_masks", "begin_masks"])
def test_an_interrupt_between_a_forward_pass_and_its_choice_loses_no_token(
    where: str, monkeypatch: pytest.MonkeyPatch, alone: list[tuple[list[int | None], str | None, str]]
) -> None:
    interrupts = iter([False] * 5 + [True] + [False] * 3 + [True] + [False] * 999)
    inner = getattr(LaneProcessors, where)

    def interrupted(*arguments: Any) -> Any:
        if next(interrupts):
            raise KeyboardInterrupt
        return inner(*arguments)

    monkeypatch.setattr(LaneProcessors, where, interrupted)
    with engine_of(buckets=[LANES]) as engine:
        numbers = [engine.submit(*each) for each in zip(PROMPTS[:4], PARAMS[:4], strict=True)]
        events: list[TokenEvent] = []
        hits = 0
        while engine.busy:
            try:
                events += engine.step()
            except KeyboardInterrupt:
                hits += 1
        assert hits == 2
        for number, wanted in zip(numbers, alone, strict=False):
            assert outcome([event for event in events if event.request == number]) == wanted


def test_a_forward_pass_that_nobody_waits_for_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, alone: list[tuple[list[int | None], str | None, str]]
) -> None:
    with engine_of(buckets=[LANES]) as engine:
        number = engine.submit(PROMPTS[4], PARAMS[4])
        for _ in range(4):
            engine.step()

        def fail() -> float:
            raise DriverError("CUDA_ERROR_UNKNOWN", "map", (0,))

        with monkeypatch.context() as patch:
            patch.setattr(engine._map_ahead, "during_step", fail)
            with pytest.raises(DriverError):
                engine.step()
        assert engine.pipeline.unread is not None
        assert engine.pipeline.unread.choice is not None
        engine.abort(number)
        for place in (1, 4, 2):
            other = engine.submit(PROMPTS[place], PARAMS[place])
            assert outcome([each for each in engine.run() if each.request == other]) == alone[place]


def test_weights_sleep_and_suspension_find_no_half_of_a_launch(
    alone: list[tuple[list[int | None], str | None, str]],
) -> None:
    with engine_of(buckets=[LANES]) as engine:
        numbers = [engine.submit(PROMPTS[place], PARAMS[place]) for place in (4, 5)]
        events = [event for _ in range(5) for event in engine.step()]
        engine.sleep()
        engine.wake()
        events += [event for _ in range(3) for event in engine.step()]
        engine.suspend(numbers[0])
        events += [event for _ in range(3) for event in engine.step()]
        engine.update_weights(tiny_model().state_dict())
        engine.resume(numbers[0])
        events += engine.run()
        for number, place in zip(numbers, (4, 5), strict=True):
            assert outcome([event for event in events if event.request == number]) == alone[place]


def test_masks_that_were_begun_for_others_are_waited_for_behind_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, processors = GrammarCompiler(tiny_tokenizer(), VOCAB, [0]), LaneProcessors(1, 1, torch.device("cpu"))
    processors.require(VOCAB, grammar=True)
    asks = [LaneAsks(each, [5], [], grammar=compiler.grammar(each)) for each in (asked(regex="a+"), asked(regex="b+"))]
    thread, goes_on = grammar_module._masking_thread(os.getpid()), threading.Event()
    thread.submit(goes_on.wait, 30)
    monkeypatch.setattr(grammar_module, "START_S", 0.0)
    processors.set(0, asks[0])
    processors.begin_masks({0}, {0: tiny_tokenizer()("a")["input_ids"][0]})

    def interrupted(job: MaskJob) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MaskJob, "settle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            processors.new_masks({0})
    processors.clear_all()
    processors.set(0, asks[1])
    assert processors.new_masks({0}) is not None
    goes_on.set()
    thread.submit(int).result(30)
    grammar = asks[1].grammar
    assert grammar is not None
    mask = processors._staged[processors._row[0]].numpy().tobytes()
    assert mask == grammar.follow([]).compute_bitmask()[: len(mask)]


def test_a_forked_child_computes_masks_by_threads_of_its_own() -> None:
    words, params = VOCAB // 32, asked(regex="[a-z ]{40}")
    compiler = GrammarCompiler(tiny_tokenizer(), VOCAB, [0])

    def computed() -> bool:
        """Some at once, as for a batch, and some ahead."""
        masks = np.zeros((4, words), np.int32)
        fill_masks({row: (compiler.grammar(params), []) for row in range(4)}, masks)
        grammar, job = compiler.grammar(params), MaskJob()
        job.start([(grammar.follow([]), 3)], masks)
        return job.settle() and bool((masks == masks[0]).all() and masks.any())

    # Four, whatever this machine has.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
        grammar_module._executor.cache_clear()
        try:
            assert computed()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of forking with threads
                child = os.fork()
            if not child:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(10)
                os._exit(0 if computed() else 1)
            assert os.waitpid(child, 0)[1] == 0
        finally:
            grammar_module._executor.cache_clear()


def test_requests_with_grammars_go_on_where_the_main_thread_has_ended(
    monkeypatch: pytest.MonkeyPatch, alone: list[tuple[list[int | None], str | None, str]]
) -> None:
    # Which shuts down all executors, before it waits for other threads.
    ended = ThreadPoolExecutor(1)
    ended.shutdown()
    monkeypatch.setattr(grammar_module, "_masking_thread", lambda process: ended)
    with engine_of(buckets=[LANES]) as engine:
        engine.submit(PROMPTS[4], PARAMS[4])
        assert outcome(list(engine.run())) == alone[4]


class Noted:
    """A matcher that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def deep_copy(self) -> Noted:
        return self

    def reset(self) -> None:
        self.told.append("reset")

    def consume_token(self, token: int) -> bool:
        self.told.append(token)
        if token == 99:
            raise KeyboardInterrupt
        return True

    def is_stopped(self) -> bool:
        return self.told[-1] == 7


def test_a_grammar_follows_an_output_that_grows_and_shrinks_by_its_new_tokens_alone() -> None:
    matcher = Noted()
    grammar = Grammar(matcher)
    output = [1, 2]
    assert not grammar.ends_with(output, 3)
    output.append(3)
    grammar.follow(output)
    assert grammar.ends_with(output, 7)
    assert matcher.told == [1, 2, 3, 7]
    # Another token than the one that was asked about.
    grammar.follow([1, 2, 3, 8])
    assert matcher.told[4:] == ["reset", 1, 2, 3, 8]
    grammar.follow([1])
    assert matcher.told[9:] == ["reset", 1]
    with suppress(KeyboardInterrupt):
        grammar.follow([1, 99])
    grammar.follow([1, 5])
    assert matcher.told[11:] == [99, "reset", 1, 5]


def test_a_grammar_that_compiles_for_long_holds_up_nobody_whose_grammar_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler = GrammarCompiler(tiny_tokenizer(), VOCAB, [0])
    compiler.grammar(SamplingParams(regex="a"))
    begun, goes_on = threading.Event(), threading.Event()
    inner = compiler._compile

    def slow(schema: str | None, regex: str | None) -> Any:
        begun.set()
        assert goes_on.wait(30)
        return inner(schema, regex)

    monkeypatch.setattr(compiler, "_compile", slow)
    thread = threading.Thread(target=compiler.grammar, args=(SamplingParams(regex="b"),))
    thread.start()
    assert begun.wait(30)
    try:
        assert isinstance(compiler.grammar(SamplingParams(regex="a")), Grammar)
    finally:
        goes_on.set()
        thread.join()


def test_the_choice_of_tokens_is_part_of_what_a_pass_took(monkeypatch: pytest.MonkeyPatch) -> None:
    took: list[float] = []
    with engine_of(capture=False, target_itl_ms=50.0) as engine:
        monkeypatch.setattr(PassCost, "measure", lambda _, load, milliseconds: took.append(milliseconds))
        # By this clock each part of a pass takes a second, and what lies between two parts, too.
        monkeypatch.setattr(pass_cost, "perf_counter", partial(next, itertools.count(0.0)))
        for params in (PARAMS[1], PARAMS[0]):
            engine.submit(PROMPTS[0], params)
            assert list(engine.run())[-1].finish_reason
    assert took == [1000.0, 2000.0]


def test_who_forbids_what_its_grammar_wants_is_told_so() -> None:
    with engine_of() as engine:
        alone = engine.generate([[4, 5]], SamplingParams(3))[0].tokens
        with pytest.raises(ConfigError, match="its bad_words and regex together forbid every token that could come"):
            engine.submit([1, 2, 3], SamplingParams(9, regex="ab*", bad_words=["a"]))
        for more, said in (
            ({"bad_words": [[5, 6]]}, ("stop", None)),
            ({"min_tokens": 3, "bad_words": ["ab", "b"]}, ("error", "its bad_words and min_tokens and regex together")),
            ({"bad_words": [[n] for n in range(VOCAB)], "regex": None}, ("error", "its bad_words forbid every token")),
        ):
            params = SamplingParams(9, **{"regex": "ab*", **more})  # type: ignore[arg-type]
            wrong, other = engine.generate([[1, 2, 3], [4, 5]], [params, SamplingParams(3)])
            assert (other.finish_reason, other.tokens) == ("length", alone)
            assert wrong.finish_reason == said[0]
            assert (said[1] or "None") in str(wrong.error)


def test_a_tokenizer_with_more_tokens_than_logits_is_told() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens([f"added {number}" for number in range(VOCAB)])
    compiler = GrammarCompiler(tokenizer, VOCAB, [1])
    with pytest.raises(
        ConfigError, match=rf"it has {len(tokenizer):,} tokens, and the model logits for {VOCAB:,}; take"
    ):
        compiler.grammar(SamplingParams(regex="a"))
