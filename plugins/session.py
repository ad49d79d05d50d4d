"""`EngineSession`: `runtime.Engine` over a TensorRT engine.

Steps are captured once for each batch size, because lengths, slots and tokens are on the device and the cache's
addresses fixed. TensorRT-LLM's `GenerationSession` captures in every step, because its plugin takes host tensors.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from transformers import AutoConfig, PreTrainedModel

from trtllm_vattn.cache.base import CacheShape, KVCache
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.mapping_policy import start_policy_probe
from trtllm_vattn.plugins import plain, registry
from trtllm_vattn.plugins.build import EMULATED, config_of, make_logger, read_folder
from trtllm_vattn.plugins.callback_errors import clear_errors, error_of
from trtllm_vattn.plugins.emulated import EmulatedEngine
from trtllm_vattn.plugins.engine_model import EngineModel
from trtllm_vattn.plugins.fields import DTYPES
from trtllm_vattn.plugins.networks.spec import DecoderSpec, PlanLimits
from trtllm_vattn.plugins.plugin import register
from trtllm_vattn.plugins.tensorrt import load_tensorrt
from trtllm_vattn.plugins.trtllm_folder import PLAN, is_trtllm_folder, read_trtllm_folder
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.startup import memory_left
from trtllm_vattn.values import shown, whole
from trtllm_vattn.vmm.open import open_driver

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(eq=False)
class LoadedEngine:
    """An engine in memory, with the description in its folder.

    Parameters
    ----------
    engine : ICudaEngine or EmulatedEngine
    decoder : dict
        `DecoderSpec.sizes`.
    allocation : object
        See `EngineModel`.
    keep : object
        An object that must live as long as the engine (TensorRT's runtime).
    """

    engine: Any
    config: Any
    decoder: dict[str, Any]
    limits: PlanLimits
    allocation: object = None
    keep: object = None

    @classmethod
    def load(cls, folder: Path, device: str) -> LoadedEngine:
        """Load an engine from its folder, or from one of `trtllm-build`; a folder without a plan is emulated by torch.

        Raises ConfigError where the folder holds no engine, or TensorRT does not take the plan here.
        """
        if is_trtllm_folder(folder):
            config, decoder, limits = read_trtllm_folder(folder)
            return cls._from_plan("tensorrt", folder / PLAN, config, decoder, limits)
        found = read_folder(folder)
        limits = PlanLimits(**found["limits"])
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises whatever the file makes it do
            raise ConfigError(
                f"{folder / 'config.json'} cannot be read: {error}; make it anew with `trtllm-vattn plugin build`"
            ) from error
        if found["module"] == EMULATED:
            model = load_model(found["source"], device, DTYPES[found["decoder"]["dtype"]])
            return cls.emulated(model, limits)
        return cls._from_plan(found["module"], folder / "engine.plan", config, found["decoder"], limits)

    @classmethod
    def _from_plan(
        cls, module: str, path: Path, config: Any, decoder: dict[str, Any], limits: PlanLimits
    ) -> LoadedEngine:
        trt = load_tensorrt(module)
        register(trt)
        clear_errors()
        runtime = trt.Runtime(make_logger(trt))
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            where = "on this machine" if torch.cuda.is_available() else "here, where torch sees no GPU"
            raise error_of(f"{trt.__name__} {trt.__version__} does not take {path} {where}")
        allocation = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return cls(engine, config, decoder, limits, allocation, keep=runtime)

    @classmethod
    def emulated(cls, model: PreTrainedModel, limits: PlanLimits, trt: Any = plain) -> LoadedEngine:
        """An emulated engine of a model, whose plugin classes are those of module `trt`."""
        spec = DecoderSpec.of(model, limits.max_seq_len)
        return cls(EmulatedEngine(spec, limits, trt), config_of(model), spec.sizes(), limits)

    def cache_shape(self, num_slots: int, max_seq_len: int | None = None) -> CacheShape:
        """The shape of a cache for this engine."""
        sizes = self.decoder
        return CacheShape(
            sizes["num_layers"],
            sizes["num_kv_heads"],
            sizes["head_dim"],
            DTYPES[sizes["dtype"]],
            num_slots,
            max_seq_len or self.limits.max_seq_len,
        )


class EngineSession(Engine):
    """Runs requests over a TensorRT engine and a cache, which it attaches under the plan's cache name and closes.

    Parameters
    ----------
    loaded : LoadedEngine
    cache : KVCache
        Of `loaded.cache_shape`, with no more slots than the plan has lanes, and sequences no longer than the plan's.
    attention : str
        The backend that the plan's layers run on: ``auto``, ``torch`` or ``cudnn``.
    options
        Further parameters of `Engine`; `compile` is off and `packed` the plan's, and others are refused. A pass takes
        `max_chunk` tokens of the plan at most.

    Raises
    ------
    ConfigError
        The cache does not fit the plan, or another one is attached under its name.
    """

    supports_packed_prefill: ClassVar[bool] = False

    def __init__(self, loaded: LoadedEngine, cache: KVCache, *, attention: str = "auto", **options: Any) -> None:
        limits = loaded.limits
        if not limits.max_chunk:
            raise ConfigError(
                "this plan has no context phase, so prompts cannot go in; build it with max_chunk above 0"
            )
        if cache.shape.num_slots > limits.max_lanes or cache.shape.max_seq_len > limits.max_seq_len:
            raise ConfigError(
                f"the cache has {cache.shape.num_slots} slots of {cache.shape.max_seq_len} tokens, the plan takes "
                f"{limits.max_lanes} lanes and {limits.max_seq_len} tokens; make the cache smaller, or build anew"
            )
        self.name = limits.cache
        with ExitStack() as undo:
            attached = registry.attach(self.name, cache, attention)
            undo.callback(registry.detach, self.name)
            model = EngineModel(
                loaded.engine, loaded.config, loaded.decoder["scale"], limits, attached, loaded.allocation
            )
            most = options.pop("max_step_tokens", None)
            most = options.get("chunk", limits.max_chunk) if most is None else most
            options["chunk"] = min(whole("max_step_tokens", most, 1), limits.max_chunk)
            if options["chunk"] == 1 and not limits.any_slot:
                raise ConfigError(
                    "a chunk of 1 token would be taken for a decode step of lane 0; chunk and the plan's max_chunk "
                    "have to be at least 2"
                )
            for name, own in (("compile", False), ("packed", limits.any_slot)):
                if options.get(name) not in (None, own):
                    raise ConfigError(
                        f"{name} is {shown(options[name])}, and this plan's is {own}, as it was built; leave it out"
                    )
            options["compile"], options["packed"] = False, limits.any_slot
            super().__init__(model, cache, attention=attention, **options)
            undo.pop_all()
        self.loaded = loaded

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        *,
        device: str | None = None,
        max_seqs: int | None = None,
        max_seq_len: int | None = None,
        budget: int | None = None,
        mapping: str = "auto",
        **options: Any,
    ) -> Self:
        """A session over an engine's folder (`trtllm-vattn plugin build`) and a new cache.

        Parameters
        ----------
        max_seqs, max_seq_len : int or None
            None is what the plan takes.
        budget : int or None
            Bytes of KV memory; None is what is left of 90 % of the GPU's memory after capturing, or on the host enough
            for all sequences.
        mapping : str
            ``auto`` runs a short probe of this driver, once, and stores its report (memory/mapping_policy.py).
        """
        device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        with ExitStack() as undo:
            probe = undo.enter_context(start_policy_probe(device, mapping))
            loaded = LoadedEngine.load(Path(folder), device)
            shape = loaded.cache_shape(max_seqs or loaded.limits.max_lanes, max_seq_len)
            policy = probe.result().policy
            if device == "cpu":
                cache = make_cache("vattn", shape, device, budget)
            else:
                cache = KVCacheManager(shape, policy.wrap(open_driver(device)))
            undo.callback(cache.close)
            session = cls(loaded, cache, mapping=policy, **options)
            undo.callback(session.close)
            if device != "cpu":
                session.set_budget(memory_left(cache.device) if budget is None else budget)
            undo.pop_all()
        return session

    def close(self) -> None:
        """Drop all requests, the graphs, the contexts and the cache; the name is free. Idempotent."""
        try:
            super().close()
        finally:
            if registry.is_attached(self.name) and registry.attached(self.name).cache is self.cache:
                registry.detach(self.name)
            cast(EngineModel, self.model).close()
