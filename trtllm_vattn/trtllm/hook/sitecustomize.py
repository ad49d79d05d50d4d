"""Python runs this at start where this folder is on PYTHONPATH. It runs the next `sitecustomize` on the path, if there
is one, and has the adapter installed when TensorRT-LLM is imported."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def _run_the_next() -> None:
    here = Path(__file__).resolve().parent
    others = [part for part in sys.path if part and Path(part).resolve() != here]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_run_the_next()

try:
    from trtllm_vattn.trtllm.installation import watch
except ImportError as error:
    print(f"trtllm-vattn: not installed in this Python, so the KV cache is the stock one: {error}", file=sys.stderr)
else:
    watch()
