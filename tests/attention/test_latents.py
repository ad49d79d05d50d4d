"""Attention over latents: the kernels in Triton's interpreter and on the card (latents_probe.py), the backend on the
host, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from probing import probe

from trtllm_vattn.attention import latents
from trtllm_vattn.attention.latents import MOST_PIECES, PROGRAMS_EACH, blocks_of, parts_of, pieces_for
from trtllm_vattn.attention.select import available, make_attention
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError

PROBE = Path(__file__).with_name("latents_probe.py")


def test_the_kernels_are_right_in_the_interpreter() -> None:
    probe(PROBE, "cpu", interpreted=True)


@pytest.mark.gpu
def test_the_kernels_are_right_on_the_card() -> None:
    if available()["latents"] != "yes":
        pytest.skip(available()["latents"])
    probe(PROBE, "cuda:0", interpreted=False)


def test_rows_are_read_in_two_parts() -> None:
    assert parts_of(576) == (512, 64)
    assert parts_of(24) == (16, 16)
    assert parts_of(16) == (16, 16)
    for row in range(16, 1024):
        first, rest = parts_of(row)
        assert first <= row <= first + rest <= 2 * max(first, 16)


def test_rows_that_a_card_cannot_hold_are_left_to_torch() -> None:
    a100, l40s, h200, b200 = (164 << 10, 8), (100 << 10, 8), (228 << 10, 9), (228 << 10, 10)
    assert all(latents.fits(576, *card) for card in (a100, h200, b200))
    assert not latents.fits(576, *l40s)
    assert latents.fits(320, *l40s)
    assert latents.fits(768, *h200)
    assert not latents.fits(768, *b200), "it compiles, and takes more than 227 KiB"
    assert not any(latents.fits(row, *h200) for row in (15, 1024))


def test_pieces_fit_the_memory_for_them() -> None:
    for lanes in (1, 3, 64, 500):
        for heads in (4, 16, 128):
            units = lanes * blocks_of(heads)[1]
            pieces = pieces_for(units, 132)
            assert 1 <= pieces <= MOST_PIECES
            assert pieces == 1 or units * pieces <= PROGRAMS_EACH * 132
            assert pieces == MOST_PIECES or units * pieces >= 2 * 132 or 2 * units * pieces >= PROGRAMS_EACH * 132


def test_deterministic_engines_have_the_torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "serves", lambda cache: True)
    shape = CacheShape(1, 1, 64, torch.bfloat16, 1, 32, kv_factor=1)
    with make_cache("vattn", shape, "cpu") as cache:
        assert make_attention("auto", cache, 4).name == "latents"
        chosen = make_attention("auto", cache, 4, deterministic=True)
        assert (chosen.name, chosen.batch_invariant) == ("torch", True)


def test_other_caches_are_refused() -> None:
    shape = CacheShape(1, 1, 64, torch.float32, 1, 32)
    with make_cache("vattn", shape, "cpu") as cache, pytest.raises(ConfigError, match="one latent a token"):
        make_attention("latents", cache, 4)
    eight_bits = CacheShape(1, 1, 64, torch.float8_e4m3fn, 1, 32, kv_factor=1)
    with make_cache("vattn", eight_bits, "cpu") as cache:
        with pytest.raises(ConfigError, match="latents backend cannot serve fp8 rows"):
            make_attention("latents", cache, 4)
        assert make_attention("auto", cache, 4).name == "torch"
