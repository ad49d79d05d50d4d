"""Every Triton kernel of the project compiled for a card that is not there, in the configurations that run on it.

Run as ``python compile_probe.py CAPABILITY [CASES]``, the capability ``8.0``, ``8.6``, ``8.9``, ``9.0``, ``10.0`` or
``12.0``, the cases ``some`` (what is shipped for heads of 128; the default) or ``all``. The launching functions are
called as ever, over a cache of the host's addresses, with a driver beneath Triton that compiles and launches nothing.
Prints a line a kernel: what it is, a hash of its PTX without line numbers, registers, bytes of registers that are
spilled, bytes of shared memory. The lines of two commits, compared, say what a change did to the compiled code.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.update(TRITON_INTERPRET="0", TRITON_DISABLE_LINE_INFO="1", TRITON_CACHE_DIR=tempfile.mkdtemp())

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from trtllm_vattn.attention import latents
from trtllm_vattn.attention.kv_write import rotate_and_write_kv, write_kv
from trtllm_vattn.attention.options import FP8, PLAIN, LayerOptions, PrefixTables
from trtllm_vattn.attention.prompt_launch import MOST_BLOCK_M, PromptWorkspace, attend, plan, prompt_settings
from trtllm_vattn.attention.prompts import head_tables
from trtllm_vattn.attention.shares import HEAD_SIZES, LEAST_CAPABILITY_FP8
from trtllm_vattn.attention.shares_launch import (
    HOPPER,
    Extras,
    Features,
    Pieces,
    Rows,
    SharedReads,
    Workspace,
    launch,
    launch_prefixes,
    most_programs,
    programs_at_once,
    settings_for,
    tensor_maps,
)
from trtllm_vattn.cache.base import CacheShape, FlatKV, KVCache, PagedKV
from trtllm_vattn.cache.compression import mass
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.plugins.step_write import write_step

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP8: "fp8"}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Card:
    """Its multiprocessors, and shared memory of one of them and of a program, in bytes (CUDA C++ Programming Guide,
    table of compute capabilities)."""

    multiprocessors: int
    shared: int
    most_shared: int


CARDS = {
    "8.0": Card(108, 164 << 10, 163 << 10),
    "8.6": Card(84, 100 << 10, 99 << 10),
    "8.9": Card(142, 100 << 10, 99 << 10),
    "9.0": Card(132, 228 << 10, 227 << 10),
    "10.0": Card(148, 228 << 10, 227 << 10),
    "12.0": Card(170, 100 << 10, 99 << 10),
}
MOST_SPILLED = 128
"""Bytes of registers that a kernel of `some` may spill: some numbers that it needs before its loops and behind them."""


class CannotCompile(Exception):
    """A kernel that Triton or ptxas refuses."""


class NoDevice:
    """A driver that says what to compile for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Compiled:
    """What is compiled while it is entered: the kernels of launches, by what the launch was named."""

    card: Card
    most_spilled: int = MOST_SPILLED
    label: str = ""
    seen: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def run(self, function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        try:
            kernel = RUN(function, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            # Whatever Triton raises: errors of its compiler have no common class.
            raise CannotCompile(f"{function.__name__} does not compile: {type(error).__name__}: {error}") from error
        if kernel.hash not in self.seen:
            usage = _usage(kernel.asm["cubin"])
            self.seen[kernel.hash] = usage
            kernel.n_regs = usage["REG"]
            self.note(function.__name__, kernel, usage)
        return kernel

    def note(self, name: str, kernel: Any, usage: dict[str, int]) -> None:
        shared, spilled = kernel.metadata.shared, usage["STACK"] + usage["LOCAL"]
        digest = hashlib.sha256(re.sub(r"(?m)^\s*//.*$", "", kernel.asm["ptx"]).encode()).hexdigest()[:12]
        fitting = programs_at_once(kernel, self.card.shared)
        print(
            f"{self.label:52} {name:16} {digest} {usage['REG']:4} registers {spilled:5} spilled {shared:7} shared "
            f"{fitting:2} a multiprocessor",
            flush=True,
        )
        if shared > self.card.most_shared:
            self.fault(f"{name} takes {shared} bytes of shared memory of {self.card.most_shared}")
        if spilled > self.most_spilled:
            self.fault(f"{name} spills {spilled} bytes of registers, of {self.most_spilled} that it may")

    def fault(self, what: str) -> None:
        self.faults.append(f"{self.label}: {what[:1500]}")
        print(self.faults[-1], flush=True)


RUN = JITFunction.run


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes on the stack, of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}


class Kernels:
    """The launching functions over caches for a card."""

    def __init__(self, capability: str) -> None:
        self.card = CARDS[capability]
        major, minor = map(int, capability.split("."))
        self.major = major
        self.hopper, self.eight_bits = major == HOPPER, (major, minor) >= LEAST_CAPABILITY_FP8
        self.compiled = Compiled(self.card)
        self.caches: dict[tuple[object, ...], KVCache] = {}
        self.paths = [(True, True), (True, False), (False, False)] if self.hopper else [(False, False)]
        """Whether loads are by TMA, and whether launches are dependent."""

    def cache(self, kind: str, shape: CacheShape, **config: Any) -> KVCache:
        key = (kind, shape, *sorted(config.items()))
        if key not in self.caches:
            self.caches[key] = make_cache(kind, shape, "cpu", "64MiB", lookahead=0, **config)
        return self.caches[key]

    def flat(self, dim: int, dtype: torch.dtype, **config: Any) -> tuple[KVCache, FlatKV]:
        """Of 8 KV heads, 4 layers, 64 slots of 131,072 tokens, more than 2**31 elements from the first to the last."""
        cache = self.cache("vattn", CacheShape(4, 8, dim, dtype, 64, 1 << 17), **config)
        kv = cache.head_groups(1)[0]
        assert isinstance(kv, FlatKV)
        return cache, kv

    def decode(
        self,
        dim: int,
        dtype: torch.dtype,
        what: str = "plain",
        *,
        group: int = 4,
        queries: int = 1,
        lanes: int = 8,
        tma: bool = False,
        pdl: bool = False,
    ) -> None:
        heads = what == "heads"
        cache, kv = self.flat(dim, dtype, own_lengths=True, heads_per_range=1) if heads else self.flat(dim, dtype)
        rows = Rows.of(group, queries, dim)
        few = lanes * 8 <= self.card.multiprocessors
        settings = settings_for(self.card.shared, dim, dtype.itemsize, rows.rows, lanes, few)
        q = torch.empty(lanes, queries, 8 * group, dim, dtype=BF16 if dtype == FP8 else dtype)
        programs = self.card.multiprocessors * most_programs(dim)
        pieces = Pieces.of(1 << 17, lanes, 8, rows, dim) if what == "fixed" else None
        features = Features(tma, pdl)
        options, tables, reads = self.options(what, 8 * group), None, None
        if what in ("prefixes", "shared"):
            tables = PrefixTables.empty(64, lanes, CPU)
        path = f"{'tma' if tma else ''} {'pdl' if pdl else ''}"
        self.compiled.label = f"{SHORT[dtype]} {dim} x {group * queries}, {lanes} lanes, {what} {path}"
        if what == "shared":
            assert tables is not None
            reads = SharedReads(CPU, programs, lanes, queries, 8 * group, 8, dim)
            read_by = settings_for(self.card.shared, dim, dtype.itemsize, reads.rows, 1, False)
            maps = tensor_maps(kv, read_by.tile) if tma else None
            launch_prefixes(
                q, kv, tables, reads, scale=0.1, options=options, programs=programs, settings=read_by,
                features=features, tiles=maps,
            )  # fmt: skip
        launch(
            q,
            kv,
            torch.empty_like(q),
            torch.empty(lanes, dtype=torch.int32),
            None if queries == 1 else torch.empty(lanes, dtype=torch.int32),
            torch.empty(lanes, dtype=torch.int64),
            scale=0.1,
            workspace=Workspace(CPU, programs, lanes, 8, rows, dim, pieces),
            programs=programs,
            settings=settings,
            features=features,
            tiles=tensor_maps(kv, settings.tile) if tma else None,
            extras=Extras(options, tables, reads, head_tables(cache)[1] if heads else None),
            pieces=pieces,
        )

    def options(self, what: str, heads: int) -> LayerOptions:
        return {
            "window": LayerOptions(4096, 4, torch.empty(heads)),
            "softcap": LayerOptions(softcap=50.0),
            "scales": LayerOptions(k_scale=torch.empty(1), v_scale=torch.empty(8)),
        }.get(what, PLAIN)

    def prompts(
        self, dim: int, dtype: torch.dtype, what: str = "plain", *, group: int = 4, rows: int = 2048, tma: bool = False
    ) -> None:
        heads = what == "heads"
        cache, kv = self.flat(dim, dtype, own_lengths=True, heads_per_range=1) if heads else self.flat(dim, dtype)
        tiles = -(-rows * 8 * group // MOST_BLOCK_M)
        card = self.card
        settings = prompt_settings(dim, dtype.itemsize, card.shared, tiles, card.multiprocessors, self.hopper)
        workspace = PromptWorkspace(CPU, card.multiprocessors, dim)
        options = self.options(what, 8 * group)
        q = torch.empty(rows, 8 * group, dim, dtype=BF16 if dtype == FP8 else dtype)
        self.compiled.label = f"{SHORT[dtype]} {dim} x {group}, {rows} rows, {what} {'tma' if tma else ''}"
        planned = plan(
            torch.empty(4, 4, dtype=torch.int32), rows, 0, 8 * group, 8, settings, card.multiprocessors,
            workspace.most_parts, options,
        )  # fmt: skip
        tables = PrefixTables.empty(64, 4, CPU) if what == "prefixes" else None
        extras = Extras(options, tables, heads=head_tables(cache)[1] if heads else None)
        maps = tensor_maps(kv, settings.block_n) if tma else None
        attend(q, kv, torch.empty_like(q), planned, workspace, 0.1, maps, extras)

    def latents(self, row: int, dtype: torch.dtype, heads: int, queries: int, pieces: int) -> None:
        if not latents.fits(row, self.card.shared, self.major):
            return
        cache = self.cache("vattn", CacheShape(4, 1, row, dtype, 64, 1 << 17, kv_factor=1))
        rows, most = cache.layer(1).k, latents.most_rows(self.major)
        counts = None if queries == 1 else torch.empty(4, dtype=torch.int32)
        lengths, slots = torch.empty(4, dtype=torch.int32), torch.empty(4, dtype=torch.int64)
        workspace = latents.LatentWorkspace(CPU, self.card.multiprocessors, row)
        q = torch.empty(4, queries, heads, row, dtype=dtype)
        self.compiled.label = f"{SHORT[dtype]} latents of {row} x {heads * queries}, {pieces} pieces"
        latents.launch_lanes(
            q, rows, torch.empty_like(q), lengths, counts, slots, scale=0.1, pieces=pieces, workspace=workspace,
            most=most,
        )  # fmt: skip
        q = torch.empty(512, heads, row, dtype=dtype)
        self.compiled.label = f"{SHORT[dtype]} latents of {row} x {heads}, chunks"
        latents.launch_chunks(q, rows, torch.empty_like(q), torch.empty(4, 4, dtype=torch.int32), scale=0.1, most=most)

    def writes(self, dim: int, dtype: torch.dtype) -> None:
        flat = self.flat(dim, dtype)[1]
        paged = self.cache("blocks", CacheShape(4, 8, dim, dtype, 64, 1 << 17)).layer(1)
        assert isinstance(paged, PagedKV)
        new = BF16 if dtype == FP8 else dtype
        q, k, v = (torch.empty(64, heads, dim, dtype=new) for heads in (32, 8, 8))
        cos, slots = torch.empty(64, dim, dtype=new), torch.empty(64, dtype=torch.int64)
        scales = (torch.empty(1), torch.empty(8)) if dtype == FP8 else (None, None)
        deficits = torch.empty(65, dtype=torch.int32)
        for kv, name in ((flat, "flat"), (paged, "blocks")):
            self.compiled.label = f"{SHORT[dtype]} {dim}, writes of {name}"
            write_kv(kv, k, v, slots, slots, True, None, *scales)
            rotate_and_write_kv(kv, q, k, v, cos, cos, slots, slots, True, None, *scales)
        self.compiled.label = f"{SHORT[dtype]} {dim}, writes of flat with deficits"
        write_kv(flat, k, v, slots, slots, True, deficits, *scales)
        if dtype != FP8:
            lengths = torch.empty(8, dtype=torch.int32)
            self.compiled.label = f"{SHORT[dtype]} {dim}, writes of a plan's layer"
            write_step(flat, k, v, lengths, lengths, lengths)

    def mass(self, dim: int, dtype: torch.dtype) -> None:
        queries, keys = torch.empty(64, 8, 4, dim, dtype=BF16), torch.empty(300, 8, dim, dtype=dtype)
        positions = torch.empty(8, 300, dtype=torch.int64)
        self.compiled.label = f"{SHORT[dtype]} {dim}, attention that tokens have"
        for local in (None, 16):
            mass.by_kernel(queries, keys, 0.1, positions, 0, local)

    def case(self, call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Compile what a call launches; what does not compile is noted, and the next case goes on."""
        try:
            call(*args, **kwargs)
        except CannotCompile as error:
            self.compiled.fault(str(error))

    def some(self) -> None:
        """Of heads of 128: what runs for a model of Llama's shape, and each feature."""
        for tma, pdl in self.paths:
            self.case(self.decode, 128, BF16, tma=tma, pdl=pdl)
            self.case(self.decode, 128, BF16, lanes=128, queries=5, tma=tma, pdl=pdl)
            self.case(self.decode, 128, BF16, "fixed", tma=tma, pdl=pdl)
            self.case(self.decode, 128, BF16, "fixed", lanes=128, tma=tma, pdl=pdl)
        tma, pdl = self.paths[0]
        for what in ("window", "softcap", "prefixes", "shared"):
            self.case(self.decode, 128, BF16, what, tma=tma, pdl=pdl)
        self.case(self.decode, 128, BF16, "heads", pdl=pdl)
        for what in ("plain", "window", "softcap", "prefixes"):
            self.case(self.prompts, 128, BF16, what, tma=tma)
        self.case(self.prompts, 128, BF16, "heads")
        if self.eight_bits:
            self.case(self.decode, 128, FP8, "scales", tma=tma, pdl=pdl)
            self.case(self.prompts, 128, FP8, "scales", tma=tma)
            self.case(self.writes, 128, FP8)
        self.case(self.writes, 128, BF16)
        self.case(self.mass, 128, BF16)
        self.case(self.latents, 576, BF16, 16, 1, 4)

    def all(self) -> None:
        """Every head size and dtype, with few and many rows of queries, and lanes; whatever they spill."""
        self.some()
        self.compiled.most_spilled = 1 << 20
        for dim, dtype in itertools.product(HEAD_SIZES, (BF16, FP16, FP32, FP8)):
            if dtype != FP8 or self.eight_bits:
                self.of(dim, dtype)
        for dim, dtype in itertools.product(HEAD_SIZES, (BF16, FP32)):
            self.case(self.mass, dim, dtype)
        for dtype, row in itertools.product((BF16, FP16), (576, 320, 24)):
            for heads, queries, pieces in ((16, 1, 1), (16, 8, 4), (128, 1, 4), (4, 1, 16)):
                self.case(self.latents, row, dtype, heads, queries, pieces)

    def of(self, dim: int, dtype: torch.dtype) -> None:
        """All kernels for rows of keys and values of a head size and dtype."""
        paths = {(tma and dtype != FP32, pdl) for tma, pdl in self.paths}
        for tma, pdl in sorted(paths):
            for queries, lanes in ((1, 8), (1, 128), (5, 8), (8, 128)):
                self.case(self.decode, dim, dtype, queries=queries, lanes=lanes, tma=tma, pdl=pdl)
        tma, pdl = max(paths)
        if dtype != FP8:
            self.case(self.decode, dim, dtype, "fixed", tma=tma, pdl=pdl)
        whats = ["window", "softcap", "prefixes"] + ["scales"] * (dtype == FP8)
        for what in whats:
            for queries in (1, 8):
                self.case(self.decode, dim, dtype, what, queries=queries, tma=tma, pdl=pdl)
            self.case(self.prompts, dim, dtype, what, tma=tma)
        self.case(self.decode, dim, dtype, "shared", queries=5, tma=tma, pdl=pdl)
        for queries in (1, 8):
            self.case(self.decode, dim, dtype, "heads", queries=queries, pdl=pdl)
        self.case(self.prompts, dim, dtype, "heads")
        for rows in (256, 2048):
            for by_tma in {tma, False}:
                self.case(self.prompts, dim, dtype, rows=rows, tma=by_tma)
        self.case(self.writes, dim, dtype)


def main(capability: str, cases: str = "some") -> None:
    kernels = Kernels(capability)
    driver.set_active(NoDevice(int(capability.replace(".", ""))))
    JITFunction.run = lambda function, *args, **kwargs: kernels.compiled.run(function, *args, **kwargs)
    with torch.inference_mode():
        {"some": kernels.some, "all": kernels.all}[cases]()
    for cache in kernels.caches.values():
        cache.close()
    faults = kernels.compiled.faults
    print(f"{len(kernels.compiled.seen)} kernels for compute capability {capability}, {len(faults)} faults")
    if faults:
        raise SystemExit("\n".join(faults))
    print("all cases passed", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
