"""A model's layers compiled: one function for all of them, dynamic in the number of tokens.

Compiling layer by layer (PyTorch's regional compilation) keeps start-up short: a layer is compiled once for one token
and once for any other number, whatever the model's depth and the batch sizes captured. Projections of the same input
are merged into one matrix product, as serving engines do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.graphs.capture import collector_off
from trtllm_vattn.runtime.rewrites import (
    add_onto_products,
    keep_rows,
    rotate_with_attention,
    share_products,
    split_even_products,
)
from trtllm_vattn.runtime.step_model import StepModel
from trtllm_vattn.runtime.tuned import install

MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear modules of one parent that are given the same input, by the names that transformers gives them."""


MOST_VARIANTS = 64
"""Compiled variants of one layer class in a process: two a model."""


class LinearSlice(nn.Module):
    """Some outputs of a merged linear module, in place of the module that computed them.

    `weight` and `bias` are parameters under the names they had, views of the merged ones, so that whoever writes to
    them by name (`load_state_dict`, an optimizer, `Engine.update_weights`) writes to what is computed with. The merged
    module `whole` is no submodule: it has no names and no copy in a checkpoint. In a compiled layer every part asks for
    the whole product and `rewrites.share_products` leaves one of them.
    """

    def __init__(self, whole: nn.Linear, start: int, stop: int) -> None:
        super().__init__()
        self.__dict__["whole"] = whole
        self.start, self.stop = start, stop
        self.weight = _rows(whole.weight, start, stop)
        self.bias = None if whole.bias is None else _rows(whole.bias, start, stop)

    whole: nn.Linear

    @property
    def intact(self) -> bool:
        """Whether the parameters are still views of the merged ones: copying a model, or moving it to another device or
        dtype, separates them."""
        own, merged = (self.weight, self.bias), (self.whole.weight, self.whole.bias)
        return all(
            mine is None or (mine.dtype == all_.dtype and mine.data_ptr() == all_[self.start :].data_ptr())
            for mine, all_ in zip(own, merged, strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return self.whole(x)[..., self.start : self.stop]  # type: ignore[no-any-return]
        return nn.functional.linear(x, self.weight, self.bias)


def _rows(merged: torch.Tensor, start: int, stop: int) -> nn.Parameter:
    return nn.Parameter(merged.detach()[start:stop], merged.requires_grad)


def merge_projections(model: PreTrainedModel) -> int:
    """Merge the weights of `MERGED` in place; returns how many products a pass over the model has less.

    Memory for one merged weight is taken at a time. Modules that are not plain linear ones stay as they are, merged
    ones too, unless their parameters were separated from what was merged (`LinearSlice.intact`).
    """
    fewer = 0
    # A parameter made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        for parent in list(model.modules()):
            for names in MERGED:
                parts: list[Any] = [getattr(parent, name, None) for name in names]
                plain = all(type(part) is nn.Linear for part in parts)
                slices = all(isinstance(part, LinearSlice) for part in parts)
                separated = slices and not all(part.intact for part in parts)
                if plain or separated:
                    fewer += _merge(parent, names, parts)
    return fewer


def _merge(parent: nn.Module, names: Sequence[str], parts: Sequence[Any]) -> int:
    """Merge plain linear modules, or parts; returns how many products fewer there are."""
    biased = [part.bias is not None for part in parts]
    if any(biased) != all(biased):
        return 0
    weight = parts[0].weight
    rows = [len(part.weight) for part in parts]
    whole = nn.Linear(weight.shape[1], sum(rows), bias=biased[0], device="meta")
    whole.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]), weight.requires_grad)
    if biased[0]:
        whole.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]), weight.requires_grad)
    start = 0
    for name, count in zip(names, rows, strict=True):
        setattr(parent, name, LinearSlice(whole, start, start + count))
        start += count
    return len(names) - 1


Backend = Callable[[torch.fx.GraphModule, Sequence[torch.Tensor]], Callable[..., Any]]


def rewriting(traced: torch.fx.GraphModule, examples: Sequence[torch.Tensor], inner: Backend) -> Callable[..., Any]:
    """A backend that rewrites a layer's graph (rewrites.py) before it hands it over to another one."""
    graph = traced.graph
    share_products(graph)
    keep_rows(graph)
    rotate_with_attention(graph)
    if _of_one_token(examples):
        split_even_products(graph)
    else:
        add_onto_products(graph)
    traced.recompile()
    return inner(traced, examples)


def _of_one_token(examples: Sequence[Any]) -> bool:
    """Whether a layer is traced for a single token: what is neither a size nor a weight is ``[1, tokens, ...]``."""
    return any(isinstance(x, torch.Tensor) and x.dim() == 3 and bool(x.shape[1] == 1) for x in examples)


def _inductor(traced: torch.fx.GraphModule, examples: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """One function for all models: torch keeps what it compiled by the backend's identity.

    A product with a single token's row is a sum over weights, which Inductor writes itself once it is asked to tune;
    that also takes in what comes after it. (gpt-fast found this.)
    """
    return rewriting(traced, examples, partial(_unadvised, config_patches=_settings(examples)))


def _unadvised(traced: torch.fx.GraphModule, examples: Sequence[torch.Tensor], **options: Any) -> Callable[..., Any]:
    """Inductor, without its advice that float32 products would be faster if they were less exact (TF32): whoever asks
    for float32 has chosen. torch gives it when it first compiles such a product, at any step, and where warnings are
    errors it would be taken for a model that cannot be compiled."""
    from torch._inductor.compile_fx import compile_fx

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TensorFloat32", UserWarning)
        return cast(Callable[..., Any], compile_fx(traced, list(examples), **options))


SINGLE_TOKEN = {
    "coordinate_descent_tuning": True,
    "use_static_cuda_launcher": False,
    "compile_threads": 1,
    "dynamic_scale_rblock": False,
}
"""Inductor's settings for a layer of a single token.

Before torch 2.13, a kernel forgets that it was tuned, and starts tune again: where Inductor launches it without Triton;
where another process compiles it (triton.Config leaves the mark behind when it is pickled); and where Inductor tries a
smaller block beside the tuned one.
"""


def _settings(examples: Sequence[Any]) -> dict[str, Any]:
    """Inductor's settings for a layer; of those that this torch has."""
    from torch._inductor import config

    wanted = SINGLE_TOKEN if _of_one_token(examples) else {}
    return {name: value for name, value in wanted.items() if hasattr(config, name)}


def compile_layers(model: PreTrainedModel, backend: Backend | None = None) -> int:
    """Compile every decoder layer of a bound model in place; returns how many there are.

    `backend` takes a traced graph and example inputs, as torch.compile's does; None is Inductor. A layer that cannot be
    traced whole, or that would have to be compiled too often, is an error at its first pass and never a silent fall
    back. A model whose layers are compiled already stays as it is.

    Raises
    ------
    ConfigError
        The model does not name its layers' class.
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ConfigError(f"{type(model).__name__} does not say which of its modules are layers; use compile=False")
    if any(layer._compiled_call_impl is not None for layer in layers):
        merge_projections(model)
        return len(layers)
    # Per layer class and process, not per model: a process may hold many.
    torch._dynamo.config.recompile_limit = max(MOST_VARIANTS, torch._dynamo.config.recompile_limit)
    # Which rows the last layer keeps (binding.py) is a tensor that its module names; their number differs.
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    merge_projections(model)
    chosen = _inductor if backend is None else partial(rewriting, inner=backend)
    for layer in layers:
        layer.compile(backend=chosen, dynamic=True, fullgraph=True)
    return len(layers)


def compile_around_layers(model: PreTrainedModel, backend: Backend = _unadvised) -> int:
    """Compile what a pass computes before and after the layers, angles and the last norm; returns how many modules
    there are.

    An embedding is one kernel as it is. What is compiled already stays as it is.
    """
    around = [each for each in model.base_model.children() if not isinstance(each, nn.ModuleList | nn.Embedding)]
    for module in around:
        if module._compiled_call_impl is None:
            module.compile(backend=backend, dynamic=True, fullgraph=True)
    return len(around)


@contextmanager
def tracing() -> Iterator[None]:
    """For a first pass: no garbage is collected, since tracing makes many objects."""
    with collector_off():
        yield


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What to apply to a function of tensors that is run in every step."""


def compile_model(model: PreTrainedModel) -> Wrap:
    """Compile a bound model's layers and what is around them; returns what compiles functions beside the model."""
    install(model.device)
    compile_layers(model)
    compile_around_layers(model)
    return partial(torch.compile, dynamic=True)


def compiled_modules(model: StepModel) -> list[nn.Module]:
    """What of a model is compiled."""
    return [module for module in model.modules() if module._compiled_call_impl is not None]


def uncompile(model: StepModel, besides: Sequence[nn.Module] = ()) -> None:
    """Have a model run as it is written again, but for some of its modules. Merged projections stay."""
    kept = {*map(id, besides)}
    for module in compiled_modules(model):
        if id(module) not in kept:
            module._compiled_call_impl = None


def as_it_is(function: Callable[..., None]) -> Callable[..., None]:
    """For where nothing is compiled."""
    return function
