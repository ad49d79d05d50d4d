"""The XQA backend by its reference on the host: the kernel's arguments, and the engine over the block layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trtllm_vattn.attention import fmha
from trtllm_vattn.attention.base import PrefillChunk
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.attention.select import available, make_attention
from trtllm_vattn.attention.xqa import XqaAttention
from trtllm_vattn.bench.cases.xqa_parts import replay_remapped
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.sampling import SamplingParams

CASES = [("blocks", "HND", 32), ("vattn", "NHD", 64), ("paged", "HND", 16)]
SHAPE = CacheShape(3, 2, 16, torch.float32, 3, 96)


class Calls:
    """Stands where the kernel does, and notes what it is given."""

    def __init__(self, attention: XqaAttention) -> None:
        self.seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.kernel, attention._kernel = attention._kernel, self

    def __call__(self, *arguments: Any, **named: Any) -> None:
        self.seen.append((arguments, named))
        self.kernel(*arguments, **named)


@pytest.mark.parametrize(("kind", "layout", "page"), CASES)
def test_the_kernel_gets_blocks_by_strides_and_rows_once_a_step(kind: str, layout: str, page: int) -> None:
    with make_cache(kind, SHAPE, "cpu") as cache:
        attention = make_attention("xqa", cache, 4)
        assert isinstance(attention, XqaAttention)
        calls = Calls(attention)
        cache.admit("a", 40)
        lengths = torch.tensor([40, 0, 0], dtype=torch.int32)
        for layers in ((0, 2, 1), (2,)):
            attention.begin_step()
            for layer in layers:
                attention.decode(layer, torch.randn(3, 4, 16), lengths)
        rows = [arguments[3] for arguments, _ in calls.seen]
        assert rows[0] is rows[1] is rows[2] is not rows[3]
        dummy = cache.dummy_slot if kind == "vattn" else None
        for arguments, named in calls.seen:
            q, k, v, table, counts, out, _, semaphores, heads, size = arguments
            assert (named["kv_layout"], size, heads) == (layout, page, 2)
            assert q.shape == out.shape == (3, 1, 4, 16)
            assert (table.dtype, counts.dtype, semaphores.dtype) == (torch.int32, torch.uint32, torch.uint32)
            assert counts.view(torch.int32).tolist() == [[40], [1], [1]]
            # Idle lanes read the dummy block, wherever their own slot is.
            assert table[1].tolist() == table[2].tolist() == [table[1, 0]] * table.shape[1]
            assert k.shape[-1] == v.shape[-1] == 16
            assert int(table.max()) < len(k)
            assert dummy is None or table[1, 0] == len(k) - 1


def test_a_step_reads_the_lengths_that_it_began_with() -> None:
    with make_cache("blocks", SHAPE, "cpu") as cache:
        mine, theirs = (make_attention(name, cache, 4) for name in ("xqa", "torch"))
        cache.admit("a", 40)
        mine.write(0, *torch.randn(2, 40, 2, 16), torch.zeros(40, dtype=torch.long), torch.arange(40))
        lengths, q = torch.zeros(1, dtype=torch.int32), torch.randn(1, 4, 16)
        for length in (7, 40, 33):
            lengths.fill_(length)  # in place, as a step's static buffers are written
            mine.begin_step()
            assert torch.allclose(mine.decode(0, q, lengths), theirs.decode(0, q, lengths), atol=1e-6)


@pytest.mark.parametrize("name", ["xqa", "shares"])
def test_the_backend_of_prompts_is_told_that_a_step_begins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(TorchAttention, "begin_step", lambda self: begun.append(self.name))
    with make_cache("vattn", SHAPE, "cpu") as cache:
        make_attention(name, cache, 4).begin_step()
    assert begun == ["torch"]


def test_a_forward_pass_begins_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(TorchAttention, "begin_step", lambda self: begun.append(self.name))
    with Engine.from_pretrained(
        "tiny-llama", device="cpu", attention="torch", max_seqs=2, max_seq_len=64, capture=False, compile=False
    ) as engine:
        begun.clear()
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=1))
        assert len(begun) == 1, "one chunk of a prompt"


@pytest.mark.parametrize(("kind", "slots"), [("blocks", None), ("vattn", [2, 0, 1])])
def test_other_backends_say_the_same(kind: str, slots: list[int] | None) -> None:
    with make_cache(kind, SHAPE, "cpu") as cache:
        mine, theirs = (make_attention(name, cache, 4) for name in ("xqa", "torch"))
        for slot, length in enumerate((96, 1, 33)):
            cache.admit(slot, length)
            where = torch.full((length,), slot), torch.arange(length)
            mine.write(1, *torch.randn(2, length, 2, 16), *where)
        order = slots or [0, 1, 2]
        lengths = torch.tensor([(96, 1, 33)[slot] for slot in order], dtype=torch.int32)
        q, lanes = torch.randn(3, 4, 16), None if slots is None else torch.tensor(slots)
        got = mine.decode(1, q, lengths, lanes)
        assert torch.allclose(got, theirs.decode(1, q, lengths, lanes), atol=1e-6)
        assert got.std() > 0.1


@pytest.mark.parametrize("length", [1, 33, 64])
def test_what_the_context_kernel_loads_past_a_length_is_finite(length: int) -> None:
    with make_cache("blocks", SHAPE, "cpu") as cache:
        attention = make_attention("xqa-fmha", cache, 4)
        cache.admit("before", 96)
        slot = cache.admit("a", 96)
        for kv in map(cache.layer, range(3)):
            mine = kv.table[: slot + 1].flatten().long()
            kv.k[mine], kv.v[mine] = torch.nan, torch.nan
        for start in (0, length - 1):
            count = length - start if start else max(1, length - 1)
            where = torch.full((count,), slot), torch.arange(start, start + count)
            query_len, end = (torch.tensor([n], dtype=torch.int32) for n in (count, start + count))
            chunk = PrefillChunk(count, torch.tensor([slot]), query_len, end, start + count)
            attention.begin_step()
            for layer in range(3):
                attention.write(layer, *torch.randn(2, count, 2, 16), *where)
                assert attention.prefill(layer, torch.randn(count, 4, 16), chunk).isfinite().all()
        whole = -(-length // 32) * 32
        for kv in map(cache.layer, range(3)):
            for part in (kv.k, kv.v):
                tokens = part[kv.table[slot].long()].flatten(0, 1)
                assert tokens[:length].isfinite().all()
                assert tokens[:length].any(dim=(1, 2)).all()
                assert not tokens[length:whole].any()
                assert tokens[whole:].isnan().all()
                assert part[kv.table[0].long()].isnan().all()


def test_blocks_of_other_sizes_are_refused() -> None:
    with make_cache("token", SHAPE, "cpu") as cache, pytest.raises(ConfigError, match=r"1 tokens.*\[16, 32, 64, 128\]"):
        make_attention("xqa", cache, 4)
    odd = CacheShape(1, 2, 16, torch.float32, 3, 90)
    with make_cache("contiguous", odd, "cpu") as cache, pytest.raises(ConfigError, match="make max_seq_len a multiple"):
        make_attention("xqa", cache, 4)


def test_the_engine_gives_the_same_tokens_over_blocks() -> None:
    model = load_model("tiny-llama", "cpu", torch.float32)
    prompts = [list(range(1, n)) for n in (4, 40, 21)]
    answers = []
    for kind, attention in (("vattn", "torch"), ("blocks", "xqa"), ("vattn", "xqa"), ("blocks", "xqa-fmha")):
        cache = make_cache(kind, shape_of(model, 2, 128), "cpu")
        with Engine(model, cache, attention=attention, compile=False) as engine:
            answers.append([done.tokens for done in engine.generate(prompts, SamplingParams(max_tokens=12))])
            assert not engine.decode.audit(2).findings
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert all(len(tokens) == 12 for tokens in answers[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_one_capture_outlives_the_memory_beneath_it(device: str) -> None:
    if device != "cpu" and available()["xqa"] != "yes":
        pytest.skip(available()["xqa"])
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = CacheShape(3, 2, 64, dtype, 4, 512)
    with make_cache("blocks", shape, device) as cache:
        assert isinstance(cache, BlockKVCache)
        before = cache.table.clone()
        found = replay_remapped(cache, num_heads=8, context=100, replays=60 if device == "cpu" else 400, seed=3)
        assert torch.equal(cache.table, before)
    assert (found["graphs_captured"], found["wrong"]) == (1, 0)
    assert found["remaps"] > 5


def test_an_engine_by_names() -> None:
    with Engine.from_pretrained(
        "tiny-llama", device="cpu", cache="blocks", attention="xqa", max_seqs=2, max_seq_len=64
    ) as engine:
        (done,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5))
        assert len(done.tokens) == 5
        engine.set_budget(64 << 20)


def test_what_all_layers_share_is_made_once_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    tables = fmha.ChunkTables

    def counted(*arguments: Any) -> fmha.ChunkTables:
        made.append(tables(*arguments))
        return made[-1]

    monkeypatch.setattr(fmha, "ChunkTables", counted)
    with Engine.from_pretrained(
        "tiny-llama", device="cpu", cache="blocks", attention="xqa-fmha", max_seqs=2, max_seq_len=64, capture=False
    ) as engine:
        engine.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=1))
    # Two prompts in one pass of four layers.
    assert len(made) == 2
