"""Weights from a process beside the engine's: its tokens are those of an engine built from them, or the old ones."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from tiny_text import tiny_model
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor
from trainer import drawn, train

from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, WeightsMixed
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.weights import WeightsState
from trtllm_vattn.runtime.weights_ipc import BucketEntry, IpcHandle, WeightBucket, manifest_of, receive_weights

PROMPTS = [[5, 6, 7], [300, 2, 9, 11]]


def engine_of(device: str = "cpu") -> Engine:
    model = copy.deepcopy(tiny_model()).to(device)
    cache = make_cache("vattn", shape_of(model, 4, 128), device)
    return Engine(model, cache, compile=False, buckets=[4], tokenizer=None)


def tokens_of(engine: Engine) -> list[list[int]]:
    return [each.tokens for each in engine.generate(PROMPTS, SamplingParams(6, ignore_eos=True))]


def built_from(version: int) -> list[list[int]]:
    with engine_of() as engine:
        engine.update_weights(drawn(version))
        return tokens_of(engine)


def trainer(device: str) -> tuple[Connection, multiprocessing.process.BaseProcess]:
    spawning: Any = multiprocessing.get_context("spawn" if device != "cpu" else "fork")
    here, there = spawning.Pipe()
    process = spawning.Process(target=train, args=(there, device), daemon=True)
    process.start()
    there.close()
    return here, process


@pytest.fixture(scope="module")
def beside() -> Iterator[Connection]:
    connection, process = trainer("cpu")
    yield connection
    connection.send(None)
    process.join(30)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with engine_of() as made:
        yield made


def test_buckets_of_another_process_are_served_under_the_same_graphs(engine: Engine, beside: Connection) -> None:
    graphs, first = dict(engine.decode.runner._graphs), tokens_of(engine)
    wanted = {version: built_from(version) for version in (1, 2)}
    assert wanted[1] != wanted[2] != first
    for version in (1, 2, 1, 0):
        before = engine.weights_version
        beside.send(version)
        assert engine.update_weights_from_ipc(receive_weights(beside)) == before + 1
        assert beside.recv() == before + 1
        assert tokens_of(engine) == wanted.get(version, first)
    assert engine.decode.runner._graphs == graphs


def test_a_trainer_that_dies_in_the_middle_leaves_the_old_weights(engine: Engine) -> None:
    first, version = tokens_of(engine), engine.weights_version
    connection, process = trainer("cpu")
    connection.send(-1)
    with pytest.raises(ConfigError, match="the process that sends weights has gone"):
        engine.update_weights_from_ipc(receive_weights(connection))
    process.join(30)
    assert process.exitcode == 9
    assert (engine.weights.state, engine.weights_version) == (WeightsState.CURRENT, version)
    assert tokens_of(engine) == first
    with pytest.raises(ConfigError, match="has gone"):
        receive_weights(connection)
    # Without a copy of the old ones the engine says that they are mixed.
    connection, process = trainer("cpu")
    connection.send(-1)
    with pytest.raises(ConfigError, match="has gone"):
        engine.update_weights_from_ipc(receive_weights(connection), restore=False)
    with pytest.raises(WeightsMixed):
        engine.step()
    engine.update_weights(drawn(0))
    assert tokens_of(engine) == first


def test_what_the_engine_refuses_the_trainer_is_told_and_may_try_again(engine: Engine, beside: Connection) -> None:
    first = tokens_of(engine)
    beside.send(1)
    with pytest.raises(ConfigError, match="a manifest is given, and the channel begins with its own"):
        engine.update_weights_from_ipc(receive_weights(beside), manifest={})
    assert "did not take the weights: a manifest is given" in beside.recv()
    beside.send(1)
    engine.update_weights_from_ipc(receive_weights(beside), running="restart")
    assert beside.recv() == engine.weights_version
    engine.update_weights(drawn(0))
    assert tokens_of(engine) == first


def handle_of(tensor: torch.Tensor) -> IpcHandle:
    """Of a tensor that is put to shared memory."""
    handle: IpcHandle = reduce_tensor(tensor.share_memory_())  # type: ignore[no-untyped-call]
    return handle


def buckets(version: int) -> list[WeightBucket]:
    """Each tensor in a bucket of its own."""
    made = []
    for name, each in drawn(version).items():
        flat = each.reshape(-1).view(torch.uint8).clone()
        made.append(WeightBucket(handle_of(flat), (BucketEntry(name, tuple(each.shape), each.dtype, 0),)))
    return made


def test_handles_of_each_tensor_and_buckets_without_a_channel(engine: Engine) -> None:
    first, wanted = tokens_of(engine), built_from(1)
    shared = drawn(1)
    engine.update_weights_from_ipc({name: handle_of(each) for name, each in shared.items()})
    assert tokens_of(engine) == wanted
    engine.update_weights_from_ipc(buckets(0))
    assert tokens_of(engine) == first
    engine.update_weights_from_ipc(iter(buckets(1)), manifest=manifest_of(buckets(1)))
    assert tokens_of(engine) == wanted
    engine.update_weights_from_ipc(buckets(0)[:1], partial=True)
    engine.update_weights(drawn(0))
    assert tokens_of(engine) == first


def moved(entry: BucketEntry) -> BucketEntry:
    return entry._replace(offset=4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: iter(buckets(1)), "give a manifest"),
        (lambda: buckets(1) * 2, "is given twice"),
        (lambda: buckets(1)[1:], "weights are missing"),
        (lambda: [3], "a bucket is int; give WeightBucket"),
        (lambda: {"lm_head.weight": torch.zeros(2)}, "lm_head.weight is Tensor; give what torch.multiprocessing"),
        (lambda: {"lm_head.weight": (print, ())}, "give what torch.multiprocessing.reductions.reduce_tensor returns"),
        (lambda: [replace(buckets(1)[0], entries=tuple(map(moved, buckets(1)[0].entries)))], "weights are missing"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(engine: Engine, given: Callable[[], Any], said: str) -> None:
    first, version = tokens_of(engine), engine.weights_version
    with pytest.raises(ConfigError, match=said):
        engine.update_weights_from_ipc(given())
    assert (tokens_of(engine), engine.weights_version) == (first, version)


def test_a_bucket_that_ends_early_and_one_of_a_gpu_are_refused() -> None:
    (first, *_) = buckets(1)
    with pytest.raises(ConfigError, match=r"is said to take .* bytes at 4 of a bucket"):
        replace(first, entries=tuple(map(moved, first.entries))).open(torch.device("cpu"))
    with pytest.raises(ConfigError, match="a bucket is on a GPU, and this engine on cpu"):
        replace(first, handle=(rebuild_cuda_tensor, ())).open(torch.device("cpu"))
    with pytest.raises(ConfigError, match="cannot be mapped here"):
        replace(first, handle=(first.handle[0], ())).open(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_on_the_card_buckets_come_by_cuda_ipc() -> None:
    connection, process = trainer("cuda:0")
    with engine_of("cuda:0") as engine:
        graphs, first = dict(engine.decode.runner._graphs), tokens_of(engine)
        got: dict[int, list[list[int]]] = {}
        for version in (1, 2, 1, 0):
            connection.send(version)
            engine.update_weights_from_ipc(receive_weights(connection))
            assert connection.recv() == engine.weights_version
            got.setdefault(version, tokens_of(engine))
            assert tokens_of(engine) == got[version]
        assert got[0] == first != got[1] != got[2]
        assert engine.decode.runner._graphs == graphs
        connection.send(-1)
        with pytest.raises(ConfigError, match="has gone"):
            engine.update_weights_from_ipc(receive_weights(connection))
        assert tokens_of(engine) == first
    process.join(30)
