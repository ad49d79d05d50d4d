"""Every pair of features is served, with the tokens that it has to have, or refused by what the matrix says."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache as remember
from pathlib import Path
from typing import Any

import pytest
from sweep_families import tiny_config
from sweep_families import tiny_model as model_of
from tiny_text import VOCAB, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from trtllm_vattn.cache.compression import H2O
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.mapping_policy import MappingPolicy
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.borrowing import make_borrowing_cache
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.features import FEATURES, REFUSED, refusal
from trtllm_vattn.runtime.features import OF_ENGINE as OF_ENGINE_OR_RANKS
from trtllm_vattn.runtime.request import TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.speculation import Speculation
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.verify.tenants import lending
from trtllm_vattn.vmm.host import HostDriver

pytest.importorskip("llguidance")

PROMPT, NEW = [126, 288] * 14, 7
OF_ENGINE = tuple(name for name in OF_ENGINE_OR_RANKS if name != "ranks")
"""Cells of several ranks are tried where there are any (tests/parallel/test_ranks.py)."""
OF_REQUEST = tuple(name for name in FEATURES if name not in OF_ENGINE_OR_RANKS)
CHANGING = {"fp8", "windows", "compression", "grammar"}
"""Those by which tokens are others."""
Features = frozenset[str]


@remember
def model_for(windows: bool) -> PreTrainedModel:
    if not windows:
        return tiny_model()
    fields = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
    return model_of(tiny_config("gemma3_text", vocab_size=VOCAB, **fields))


def engine_of(features: Features, broker: Path | None = None) -> Engine:
    model = copy.deepcopy(model_for("windows" in features))
    shape = shape_of(model, 4, 64, "fp8" if "fp8" in features else "auto")
    options: dict[str, Any] = {"lookahead": 0, "host_memory": 1 << 20}
    if features >= {"compression"} and "windows" not in features:
        options.update(own_lengths=True, extent_classes=1, layers_per_range=1)
    if "tenancy" in features:
        tenant = TenantConfig(str(broker), "-".join(sorted(features)))
        policy = MappingPolicy.CONCURRENT
        cache = make_borrowing_cache(tenant, "vattn", shape, "cpu", policy, options, lambda driver: driver).cache
    else:
        cache = make_cache("vattn", shape, "cpu", 1 << 20, **options)
    with ExitStack() as undo:
        undo.callback(cache.close)
        made = Engine(
            model,
            cache,
            compile=False,
            capture=False,
            tokenizer=tiny_tokenizer(),
            prefix_cache="prefix" in features,
            speculation=Speculation() if "drafts" in features else None,
            compression=H2O(0.3, 0.3) if "compression" in features else None,
            deterministic="deterministic" in features,
        )
        undo.pop_all()
    return made


def params_of(features: Features) -> SamplingParams:
    return SamplingParams(
        NEW,
        ignore_eos=True,
        logprobs=2 if "logprobs" in features else None,
        regex="[a-f]{30}" if "grammar" in features else None,
    )


def tokens_of(engine: Engine, features: Features) -> list[int]:
    """Of one request by these features, which each do what they are for."""
    params, events, forked = params_of(features), list[TokenEvent](), -1
    number = engine.submit(PROMPT, params)
    while len([event for event in events if event.request == number]) < 3:
        events += engine.step()
    if "fork" in features:
        forked = engine.fork(number)
    if "sleep" in features:
        engine.sleep()
        engine.wake()
    events += engine.run()
    assert all(event.error is None for event in events)
    tokens = [event.token for event in events if event.request == number]
    if "fork" in features:
        own = [(event.index, event.token) for event in events if event.request == forked]
        assert own == list(enumerate(tokens))[own[0][0] :]
    if "prefix" in features:
        (again,) = engine.generate([PROMPT], params)
        # Of a sequence that is longer than a window nothing is kept that others may begin with.
        assert (again.tokens, again.cached_tokens > 0) == (tokens, "windows" not in features)
    if "tenancy" in features:
        lease = engine.stats().cache.lease
        assert lease is not None
        assert lease.lent == engine.cache.held_bytes > 0
    if "drafts" in features:
        assert engine.speculation_stats()["drafted"] > 0
    if "logprobs" in features:
        assert all(event.logprob is not None and event.logprob.token == event.token for event in events)
    if "grammar" in features:
        assert set(tiny_tokenizer().decode(tokens)) <= set("abcdef")
    return tokens  # type: ignore[return-value]


@remember
def expected(features: Features) -> list[int]:
    """By an engine with those alone that change tokens."""
    with engine_of(features - set(OF_REQUEST)) as engine:
        return tokens_of(engine, features & set(OF_REQUEST))


def check(engine: Engine, one: str, other: str) -> None:
    """A cell, by an engine that has those of the two which are an engine's."""
    features = frozenset({one, other})
    said = refusal(one, other)
    if said is None:
        assert tokens_of(engine, features) == expected(features & CHANGING), (one, other)
        return
    with pytest.raises(ConfigError, match=said):
        tokens_of(engine, features)
    for number in list(engine.scheduler.requests):
        engine.abort(number)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("broker") / "socket"
    driver = HostDriver()
    with lending(driver, 16 << 20, path):
        yield path
    assert driver.live_handles == 0


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as closing:
        yield closing


@pytest.mark.parametrize("one", OF_ENGINE)
def test_a_feature_of_an_engine_with_every_other(one: str, undo: ExitStack, broker: Path) -> None:
    engine = undo.enter_context(engine_of(frozenset({one}), broker))
    for other in OF_REQUEST:
        check(engine, one, other)
    for other in OF_ENGINE[OF_ENGINE.index(one) + 1 :]:
        features = frozenset({one, other})
        if (said := refusal(one, other)) is not None:
            with pytest.raises(ConfigError, match=said):
                engine_of(features, broker)
            continue
        both = undo.enter_context(engine_of(features, broker))
        assert tokens_of(both, features) == expected(features & CHANGING), (one, other)


def test_features_of_a_request_with_each_other(undo: ExitStack) -> None:
    engine = undo.enter_context(engine_of(frozenset()))
    for one, other in itertools.combinations(OF_REQUEST, 2):
        check(engine, one, other)


def test_what_changes_tokens_does() -> None:
    """What the others compare with is not all the same."""
    each = [expected(frozenset({name})) for name in sorted(CHANGING)]
    assert len({str(tokens) for tokens in [*each, expected(frozenset())]}) == len(CHANGING) + 1
    assert {name for pair in REFUSED for name in pair} <= set(FEATURES)
