"""`StepModel`: what the decode step and prefill need of a model, whatever computes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn


class StepModel(Protocol):
    """A module that maps tokens to logits and calls our attention once a layer, for the current step (`binding.Step`).

    A Hugging Face model is one once `binding.bind` has pointed its attention at ours; a TensorRT engine, real or
    emulated, is one by `plugins.engine_model.EngineModel`, whose attention layers are our plugin.
    """

    config: Any
    """Its configuration, as transformers has it: `get_text_config()` gives heads, layers and `vocab_size`."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`logits` ``[1, rows, vocab]`` of `input_ids` and `position_ids`, int64 ``[1, tokens]``: of the rows
        `logits_to_keep` (int64 on the device) where given, else of all."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """With `buffers`, every tensor that a captured step touches, except those of the cache and of the attention."""

    def buffers(self) -> Iterator[torch.Tensor]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
