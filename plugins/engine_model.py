"""`EngineModel`: a TensorRT engine as the model (`StepModel`) of `runtime.Engine`.

Inputs and outputs lie at fixed addresses and each batch size has its own execution context, so a captured step stays
valid. The contexts run one after another and share their device memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins.build import CONTEXT, DECODE
from trtllm_vattn.plugins.callback_errors import clear_errors, error_of
from trtllm_vattn.plugins.networks.decoder import inputs_of
from trtllm_vattn.plugins.networks.spec import PlanLimits
from trtllm_vattn.plugins.registry import AttachedCache
from trtllm_vattn.runtime.binding import DecodeStep, PrefillStep, current_step
from trtllm_vattn.vmm.tensors import current_stream


class EngineModel(nn.Module):
    """Runs a TensorRT engine as a `runtime.step_model.StepModel`.

    Parameters
    ----------
    engine : ICudaEngine or EmulatedEngine
    config : PretrainedConfig
        Of the model that the engine was built from.
    scaling : float
        Factor of the attention scores in the engine.
    attached : AttachedCache
        The cache, under the name that the engine asks for.
    allocation : object
        ExecutionContextAllocationStrategy.USER_MANAGED of the TensorRT module, or None.
    """

    def __init__(
        self,
        engine: Any,
        config: Any,
        scaling: float,
        limits: PlanLimits,
        attached: AttachedCache,
        allocation: object = None,
    ) -> None:
        super().__init__()
        self.engine, self.config, self.scaling, self.limits = engine, config, scaling, limits
        self.attached, self._allocation = attached, allocation
        self.device, self.dtype = attached.cache.device, attached.cache.shape.dtype
        attached.attention(config.num_attention_heads, scaling)
        size = max(1, int(engine.device_memory_size_v2))
        self._memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._static: dict[int, dict[str, torch.Tensor]] = {
            DECODE: self._allocate(limits.max_lanes, limits.max_lanes, 1),
            CONTEXT: self._allocate(max(1, limits.max_chunk), 1, limits.max_seq_len),
        }
        self._static[DECODE]["last"].copy_(torch.arange(limits.max_lanes))
        self._contexts: dict[tuple[int, int], Any] = {}
        self._bound: dict[tuple[int, int], tuple[int, int, int]] = {}

    def _allocate(self, tokens: int, lanes: int, most: int) -> dict[str, torch.Tensor]:
        """A profile's inputs and output at their largest sizes."""
        sizes = {"tokens": tokens, "lanes": lanes, "most": most}
        made = {
            name: torch.zeros(sizes[dimension], dtype=torch.int32, device=self.device)
            for name, dimension in inputs_of(self.limits).items()
        }
        made["logits"] = torch.zeros(lanes, self.config.vocab_size, dtype=torch.float32, device=self.device)
        return made

    def buffers(self, recurse: bool = True) -> Iterator[torch.Tensor]:
        """Every tensor that a captured step touches, except the cache's."""
        yield self._memory
        for static in self._static.values():
            yield from static.values()
        yield from self.attached.storages()
        yield from getattr(self.engine, "storages", [])

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, logits_to_keep: Any = None, **kwargs: Any
    ) -> SimpleNamespace:
        """Logits ``[1, rows, vocab]`` of tokens and positions int64 ``[1, tokens]``, for the current step.

        Raises ConfigError where the plan does not take the shapes, or TensorRT fails.
        """
        step = current_step()
        tokens = input_ids.shape[1]
        if isinstance(step, DecodeStep):
            return self._decode(step, tokens, input_ids[0], position_ids[0])
        assert isinstance(step, PrefillStep)
        if tokens > self.limits.max_chunk:
            raise ConfigError(
                f"a chunk of {tokens} prompt tokens, the plan takes {self.limits.max_chunk}; lower the session's "
                "chunk, or build with a larger max_chunk"
            )
        static = self._static[CONTEXT]
        (chunk,) = step.packed.chunks
        for name, value in (("lengths", chunk.length), ("query_lengths", chunk.query_len), ("slots", chunk.slot)):
            static[name].copy_(value)
        static["last"].copy_(logits_to_keep)
        return self._run(CONTEXT, tokens, 1, chunk.max_length, input_ids[0], position_ids[0])

    def _decode(self, step: DecodeStep, lanes: int, ids: torch.Tensor, positions: torch.Tensor) -> SimpleNamespace:
        if lanes > self.limits.max_lanes:
            raise ConfigError(
                f"a step of {lanes} lanes, the plan takes {self.limits.max_lanes}; build with a larger max_lanes"
            )
        static = self._static[DECODE]
        static["lengths"][:lanes].copy_(step.lengths)
        if step.anywhere:
            static["slots"][:lanes].copy_(step.slots)
        return self._run(DECODE, lanes, lanes, 1, ids, positions)

    def _run(
        self, profile: int, tokens: int, lanes: int, most: int, ids: torch.Tensor, positions: torch.Tensor
    ) -> SimpleNamespace:
        static = self._static[profile]
        static["input_ids"][:tokens].copy_(ids)
        static["positions"][:tokens].copy_(positions)
        # A whole short prompt may be captured, so it keeps a context; chunks of long prompts share one.
        key = (profile, tokens if most <= tokens else -1) if profile == CONTEXT else (profile, tokens)
        stream = current_stream(self.device)
        context = self._context(key, stream)
        self._bind(key, context, tokens, lanes, most)
        clear_errors()
        try:
            done = context.execute_async_v3(stream)
        except RuntimeError as error:
            raise error_of("TensorRT did not run the engine", str(error)) from error
        if not done:
            raise error_of("TensorRT did not run the engine")
        return SimpleNamespace(logits=static["logits"][None, :lanes])

    def _context(self, key: tuple[int, int], stream: int) -> Any:
        context = self._contexts.get(key)
        if context is None:
            options = () if self._allocation is None else (self._allocation,)
            context = self.engine.create_execution_context(*options)
            if context is None:
                raise error_of("TensorRT made no execution context")
            if self._allocation is not None:
                context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
            context.set_optimization_profile_async(key[0], stream)
            for name, tensor in self._static[key[0]].items():
                context.set_tensor_address(name, tensor.data_ptr())
            self._contexts[key] = context
        return context

    def _bind(self, key: tuple[int, int], context: Any, tokens: int, lanes: int, most: int) -> None:
        """Set input shapes where they changed; a captured context's shapes never do."""
        if self._bound.get(key) == (tokens, lanes, most):
            return
        sizes = {"tokens": tokens, "lanes": lanes, "most": most}
        for name, dimension in inputs_of(self.limits).items():
            if not context.set_input_shape(name, (sizes[dimension],)):
                raise error_of(f"the plan does not take {name} of size {sizes[dimension]}")
        self._bound[key] = (tokens, lanes, most)

    def close(self) -> None:
        """Drop contexts and engine. Idempotent."""
        self._contexts.clear()
        self._bound.clear()
        self.engine = None
