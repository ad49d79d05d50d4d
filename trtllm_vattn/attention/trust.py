"""Whether another library's kernel for prompts may be used over fixed addresses: a check of its own on each machine.

In a process of its own, which a load too far would end, the kernel attends to chunks of sequences behind whose last
token memory is NaN as far as it is mapped, and unmapped further on. It is trusted if the process survives and the
results are those of plain attention. The answer is stored by GPU, versions and shape (`cost.default_path`).
"""

from __future__ import annotations

import importlib.metadata
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from trtllm_vattn.attention import flashinfer_prompts, vllm_prompts
from trtllm_vattn.attention.base import Span
from trtllm_vattn.attention.cost import JsonFile, default_path
from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.select import make_cache

logger = logging.getLogger(__name__)

PROVIDERS: dict[str, tuple[type[Any], Callable[[CacheShape], str], tuple[str, ...]]] = {
    "vllm-fa3": (vllm_prompts.VllmPrompts, vllm_prompts.availability, ("vllm",)),
    "flashinfer-fa3": (flashinfer_prompts.FlashInferPrompts, flashinfer_prompts.availability, ("flashinfer-python",)),
}
"""Class, availability, and the packages whose versions matter, by name."""
LENGTHS = (1, 15, 16, 17, 33, 64, 65, 160, 1000, 1023, 1025, 2049)
MOST_ERROR = 1e-2
SECONDS = 180.0


def why_not(name: str, shape: CacheShape, num_heads: int, file: JsonFile | None = None) -> str:
    """``yes`` if the provider is there and passed its check on this machine, else the reason. May take some seconds
    the first time."""
    _, availability, packages = PROVIDERS[name]
    if (available := availability(shape)) != "yes":
        return available
    file = JsonFile(default_path("attention-checks.json")) if file is None else file
    parts = [name, *map(_version, packages), torch.__version__, torch.cuda.get_device_name()]
    key = " ".join(map(str, (*parts, num_heads, shape.num_kv_heads, shape.head_dim, shape.dtype)))
    found = file.read(key)
    if not isinstance(found, str):
        found = _checked(name, shape, num_heads)
        file.write(key, found)
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "?"


def _checked(name: str, shape: CacheShape, num_heads: int) -> str:
    """Run the check in a process of its own."""
    numbers = (num_heads, shape.num_kv_heads, shape.head_dim, str(shape.dtype).removeprefix("torch."))
    command = [sys.executable, "-m", __spec__.name, name, *map(str, numbers)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"its check over unmapped memory took more than {SECONDS:.0f} s"
    if done.returncode == 0 and done.stdout.endswith("trusted\n"):
        return "yes"
    told = (done.stderr.strip() or done.stdout.strip() or f"it ended with {done.returncode}").splitlines()[-1]
    logger.warning("%s is not used: its check over unmapped memory failed: %s", name, told)
    return f"its check over unmapped memory failed: {told[:200]}"


@torch.inference_mode()
def check(name: str, num_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Attend over unmapped tails on the current GPU. Raises RuntimeError where a result is wrong; a load too far ends
    the process."""
    shape = CacheShape(2, kv_heads, head_dim, dtype, len(LENGTHS), 4096)
    with make_cache("vattn", shape, "cuda:0", layers_per_range=1, lookahead=0) as cache:
        for slot, length in enumerate(LENGTHS):
            cache.admit(slot, length)
            for layer in range(shape.num_layers):
                kv = cache.layer(layer)
                for x in (kv.k, kv.v):
                    x[slot, : int(cache.frontiers[slot])] = torch.nan
                    x[slot, :length].normal_()
        made = PROVIDERS[name][0](cache, num_heads, head_dim**-0.5)
        every = [[Span(slot, 0, length)] for slot, length in enumerate(LENGTHS)]
        every += [[Span(slot, length // 2, length) for slot, length in enumerate(LENGTHS)]]
        every += [[Span(slot, length - 1, length) for slot, length in enumerate(LENGTHS)]]
        for spans in every:
            q = torch.randn(sum(s.end - s.start for s in spans), num_heads, head_dim, dtype=dtype, device="cuda:0")
            planned = made.plan(spans)
            for layer in range(shape.num_layers):
                out = torch.full_like(q, torch.nan)
                made.attend(layer, q, out, planned)
                kv = cache.layer(layer)
                assert isinstance(kv, FlatKV)
                _compare(q, out, kv, spans)


def _compare(q: torch.Tensor, out: torch.Tensor, kv: FlatKV, spans: list[Span]) -> None:
    row, group = 0, q.shape[1] // kv.k.shape[2]
    for span in spans:
        rows = span.end - span.start
        k, v = (x[span.slot, : span.end].float().repeat_interleave(group, dim=1) for x in (kv.k, kv.v))
        scores = torch.einsum("rhd,thd->hrt", q[row : row + rows].float(), k) * q.shape[2] ** -0.5
        ahead = torch.ones(rows, span.end, dtype=torch.bool, device=q.device).triu(span.start + 1)
        want = torch.einsum("hrt,thd->rhd", scores.masked_fill(ahead, -torch.inf).softmax(-1), v)
        error = float((out[row : row + rows].float() - want).norm() / want.norm())
        if not error < MOST_ERROR:
            raise RuntimeError(f"{rows} rows up to {span.end} tokens: error {error:.1e}")
        row += rows


if __name__ == "__main__":
    provider, heads, kv, size, kind = sys.argv[1:]
    check(provider, int(heads), int(kv), int(size), getattr(torch, kind))
    torch.cuda.synchronize()
    print("trusted")
