"""Other libraries' kernels for prompts: what they are given, when they are there, and when they are trusted."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_vattn.attention import flashinfer_prompts, trust, vllm_prompts
from trtllm_vattn.attention.base import PackedPrefill, PrefillChunk, Span
from trtllm_vattn.attention.cost import JsonFile
from trtllm_vattn.attention.flashinfer_prompts import FlashInferPrompts
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.attention.shares import SharesAttention
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.cli.main import main

SHAPE = CacheShape(1, 8, 128, torch.bfloat16, 2, 64)


class Wrapper:
    """FlashInfer's, in plain torch."""

    def __init__(self, workspace: torch.Tensor, layout: str, backend: str) -> None:
        assert (layout, backend) == ("NHD", "fa3")

    def plan(
        self, *given: Any, causal: bool, sm_scale: float, q_data_type: torch.dtype, kv_data_type: torch.dtype
    ) -> None:
        assert causal
        assert q_data_type == kv_data_type == torch.float32
        self.given, self.scale = given, sm_scale

    def run(self, q: torch.Tensor, pools: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor) -> None:
        rows, blocks, indices, last, heads, kv_heads, dim, block = self.given
        assert (heads, kv_heads, dim) == (q.shape[1], pools[0].shape[2], q.shape[2])
        for chunk in range(len(rows) - 1):
            where = indices[blocks[chunk] : blocks[chunk + 1]].long()
            length = (len(where) - 1) * block + int(last[chunk])
            token = torch.arange(length)
            at = where[token // block], token % block
            k, v = (x[at].repeat_interleave(heads // kv_heads, dim=1) for x in pools)
            mine = q[rows[chunk] : rows[chunk + 1]]
            scores = torch.einsum("rhd,thd->hrt", mine, k) * self.scale
            ahead = torch.ones(len(mine), length, dtype=torch.bool).triu(length - len(mine) + 1)
            weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
            out[rows[chunk] : rows[chunk + 1]] = torch.einsum("hrt,thd->rhd", weights, v)


def chunk_of(span: Span) -> PrefillChunk:
    rows = span.end - span.start
    numbers = (torch.tensor([n], dtype=torch.int32) for n in (rows, span.end))
    return PrefillChunk(rows, torch.tensor([span.slot]), *numbers, span.end)


def test_flashinfer_is_given_blocks_of_the_fixed_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("flashinfer")
    fake.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    with make_cache("vattn", CacheShape(2, 2, 16, torch.float32, 3, 96), "cpu", layers_per_range=2) as cache:
        for slot, length in enumerate((40, 96, 7)):
            cache.admit(slot, length)
            for x in (cache.layer(1).k, cache.layer(1).v):
                x[slot, : int(cache.frontiers[slot])].normal_()
        attention = make_attention("shares", cache, 6)
        assert isinstance(attention, SharesAttention)
        spans = [Span(1, 30, 96), Span(0, 0, 33), Span(2, 6, 7)]
        packed, q = PackedPrefill([chunk_of(span) for span in spans], spans), torch.randn(104, 6, 16)
        lengths, slots = torch.tensor([5, 0], dtype=torch.int32), torch.tensor([2, 3])
        outputs = []
        for provider in (None, FlashInferPrompts(cache, 6, attention.scale)):
            attention.host_planned = provider
            attention.begin_step()
            outputs.append(attention.prefill_packed(1, q, packed))
            attention.begin_step()
            outputs.append(attention.attend_mixed(1, q, lengths, slots, packed))
        torch.testing.assert_close(outputs[0], outputs[2])
        torch.testing.assert_close(outputs[1], outputs[3])


def test_a_kernel_that_is_not_compiled_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(flashinfer_prompts, "is_compiled", lambda *_: False)
    assert "not compiled yet for heads of 128 of torch.bfloat16; run `trtllm-vattn warm-up`" in (
        flashinfer_prompts.availability(SHAPE)
    )
    monkeypatch.setattr(flashinfer_prompts, "is_compiled", lambda *_: True)
    assert flashinfer_prompts.availability(SHAPE) == "yes"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert "compute capability 9" in flashinfer_prompts.availability(SHAPE)


def test_the_extension_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vllm_prompts.extension() is None
    folder = tmp_path / "vllm" / "vllm_flash_attn"
    folder.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "_vllm_fa3_C.abi3.so").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert vllm_prompts.extension() == folder / "_vllm_fa3_C.abi3.so"


def test_the_extension_gets_its_arguments_by_name() -> None:
    def argument(name: str, kind: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, type=kind)

    names = [("q", "Tensor"), ("k_new", "Optional[Tensor]"), ("softcap", "float"), ("num_splits", "int")]
    op = SimpleNamespace(_schema=SimpleNamespace(arguments=[argument(*pair) for pair in names]))
    assert vllm_prompts.arguments_of(op, {"q": 3}) == [3, None, 0.0, 0]
    op._schema.arguments.append(argument("something new", "int"))
    with pytest.raises(KeyError, match="something new"):
        vllm_prompts.arguments_of(op, {"q": 3})


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were run; the next one ends as `outcome` says."""
    ran: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        ran.append(command)
        return OUTCOME[len(ran) - 1]

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setitem(trust.PROVIDERS, "flashinfer-fa3", (FlashInferPrompts, lambda shape: "yes", ("numpy",)))
    return ran


OUTCOME = (
    SimpleNamespace(returncode=0, stdout="trusted\n", stderr=""),
    SimpleNamespace(returncode=1, stdout="", stderr="CUDA error\nan illegal memory access was encountered"),
)


def test_a_check_is_run_once_and_its_answer_stored(checks: list[list[str]], tmp_path: Path) -> None:
    file = JsonFile(tmp_path / "checks.json")
    for _ in range(2):
        assert trust.why_not("flashinfer-fa3", SHAPE, 32, file) == "yes"
    assert [command[1:] for command in checks] == [
        ["-m", "trtllm_vattn.attention.trust", "flashinfer-fa3", "32", "8", "128", "bfloat16"]
    ]
    told = trust.why_not("flashinfer-fa3", SHAPE, 16, file)
    assert told == "its check over unmapped memory failed: an illegal memory access was encountered"
    assert trust.why_not("flashinfer-fa3", SHAPE, 16, JsonFile(file.path)) == told
    assert len(checks) == 2


def test_what_is_not_there_is_not_checked(checks: list[list[str]], tmp_path: Path) -> None:
    file = JsonFile(tmp_path / "checks.json")
    assert "compute capability 9" in trust.why_not("vllm-fa3", SHAPE, 32, file)
    assert not checks
    assert not file.path.exists()


def test_warm_up_says_what_cannot_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["warm-up"]) == 1
    told = capsys.readouterr().out
    assert "flashinfer-fa3: FlashAttention-3 needs a GPU of compute capability 9" in told
    assert "vllm-fa3: FlashAttention-3 needs a GPU" in told


def test_warm_up_compiles_once_and_says_so(
    checks: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled: list[tuple[int, torch.dtype]] = []
    monkeypatch.setattr(
        flashinfer_prompts, "availability", lambda shape: "yes" if compiled else "run `trtllm-vattn warm-up`, once"
    )
    monkeypatch.setattr(flashinfer_prompts, "compile_kernel", lambda *heads: compiled.append(heads))
    assert main(["warm-up"]) == 0
    assert compiled == [(128, torch.bfloat16)]
    told = capsys.readouterr().out
    assert "compiling FlashInfer's FlashAttention-3 for heads of 128 of bfloat16; this takes about" in told
    assert "flashinfer-fa3: checked over unmapped memory, may be used" in told
    assert main(["warm-up"]) == 0
    assert "compiling" not in capsys.readouterr().out
    assert len(compiled) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(trust.PROVIDERS))
def test_a_provider_that_is_there_loads_nothing_past_a_length(name: str, tmp_path: Path) -> None:
    why = trust.PROVIDERS[name][1](SHAPE)
    if why != "yes":
        pytest.skip(why)
    assert trust.why_not(name, SHAPE, 32, JsonFile(tmp_path / "checks.json")) == "yes"


def test_numbers_for_the_extension_are_those_of_the_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    with make_cache("vattn", CacheShape(1, 2, 16, torch.float32, 3, 96), "cpu") as cache:
        loaded: list[str] = []
        monkeypatch.setattr(torch.ops, "load_library", loaded.append)
        called: list[list[Any]] = []
        op = SimpleNamespace(_schema=SimpleNamespace(arguments=[]))
        names = ("q", "k", "cu_seqlens_q", "seqused_k", "page_table", "max_seqlen_q", "max_seqlen_k")
        op._schema.arguments = [SimpleNamespace(name=name, type="Tensor") for name in names]

        class Fwd:
            _schema = op._schema

            def __call__(self, *given: Any) -> None:
                called.append(list(given))

        monkeypatch.setattr(
            torch.ops, "_vllm_fa3_C", SimpleNamespace(fwd=SimpleNamespace(default=Fwd())), raising=False
        )
        made = vllm_prompts.VllmPrompts(cache, 4, 0.25)
        planned = made.plan([Span(2, 10, 33), Span(0, 0, 5)])
        q = torch.zeros(28, 4, 16)
        made.attend(0, q, torch.zeros_like(q), planned)
        _, k, ends, lengths, table, most_rows, most_keys = called[0]
        assert (ends.tolist(), lengths.tolist(), most_rows, most_keys) == ([0, 23, 28], [33, 5], 23, 33)
        block = k.shape[1]
        assert block in vllm_prompts.BLOCKS
        kv = cache.layer(0)
        for chunk, slot in enumerate((2, 0)):
            for token in (0, 31):
                found = k[int(table[chunk, token // block]), token % block]
                assert found.data_ptr() == kv.k[slot, token].data_ptr()
        assert ends.dtype == lengths.dtype == table.dtype == torch.int32
        assert np.all(table.numpy() >= 0)
