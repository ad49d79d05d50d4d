"""New weights for a serving engine, by transformers' names, written in place beneath captured graphs.

Reinforcement learning gives an engine new weights every few minutes. The addresses of a model's weights are in its
captured graphs, so new ones are written over the old ones, and nothing is captured or compiled again. What is written
where follows from one table (`destinations`): a view of the model's memory for each name. All checks that a list of
names, shapes and dtypes allows are made before the first byte is written (`Weights.check`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import cast

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from trtllm_vattn.errors import ConfigError, WeightsMixed
from trtllm_vattn.runtime.compiled import LinearSlice
from trtllm_vattn.runtime.step_model import StepModel
from trtllm_vattn.values import shown, typed

Manifest = Mapping[str, tuple[Sequence[int], torch.dtype]]
"""Shape and dtype of each tensor, by its name."""

NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]

BUCKET_BYTES = 64 << 20
"""Of one staging buffer; there are two, in pinned host memory, where tensors come from the host to a GPU."""

CASTABLE = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Dtypes that are converted to one another. Others (8-bit floats, integers) would need scales."""

SHOWN = 5
"""Most names that a message lists."""


class WeightsState(Enum):
    """Which weights the model has."""

    CURRENT = "current"
    """All of one version."""
    UPDATING = "updating"
    """An update has begun, and has not returned."""
    DROPPED = "dropped"
    """Their memory was given back with what was in it (`Engine.sleep`)."""
    MIXED = "mixed"
    """An update broke after it had begun to write: some are new, some old."""


@dataclass(frozen=True)
class Destination:
    """Where the tensor of a name goes: `view` is all of the model's own tensor `owner`, or a part of it (an expert's
    gate projection in transformers' fused experts)."""

    view: torch.Tensor
    owner: str

    @property
    def place(self) -> tuple[int, ...]:
        """The same for two names of one tensor (tied weights), and for no others."""
        return self.view.data_ptr(), *self.view.shape, *self.view.stride()


def destinations(model: PreTrainedModel) -> dict[str, Destination]:
    """Views of the model's memory by every name that a tensor of it has: those of its `state_dict` (parameters and
    persistent buffers, tied ones by each name), and those that `save_pretrained` writes where they differ.

    The latter are found by having transformers' own conversion take stand-ins without memory apart, so whatever it
    renames or splits is known here too. A name whose tensor is no view of the model's, since its values would have to
    be rearranged, is not among them.
    """
    own = {name: t.detach() for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    owners: dict[int, str] = {}
    found = {name: Destination(t, owners.setdefault(t.data_ptr(), name)) for name, t in own.items()}
    stand_ins = {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for name, t in own.items()
    }
    names = {stand_in.untyped_storage()._cdata: name for name, stand_in in stand_ins.items()}
    with _AsViews():
        saved = revert_weight_conversion(model, stand_ins)
    for name, part in saved.items():
        whole = names.get(part.untyped_storage()._cdata)
        if whole is not None and name not in found:
            start = own[whole].storage_offset() + part.storage_offset()
            view = own[whole].as_strided(part.shape, part.stride(), start)
            found[name] = Destination(view, found[whole].owner)
    return found


class _AsViews(TorchFunctionMode):
    """Parts of tensors stay views where transformers would copy them to make them contiguous."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class WeightUpdate:
    """A checked update: what is to come, in which form, and where it goes."""

    tensors: Iterable[tuple[str, torch.Tensor]]
    manifest: dict[str, tuple[torch.Size, torch.dtype]]
    destinations: dict[str, Destination]


class Weights:
    """A model's weights while an engine serves them. Not thread-safe, as the engine.

    Parameters
    ----------
    model : StepModel
        As it is run: bound, and compiled if it will be.
    captured : bool
        Whether graphs hold the addresses of its parameters.

    Attributes
    ----------
    version : int
        How many updates succeeded.
    state : WeightsState
        Steps are taken in ``CURRENT`` alone. Only a full update that succeeds leads back to it, so that no interrupt,
        wherever it falls, makes an engine serve weights of two versions.
    """

    def __init__(self, model: StepModel, captured: bool) -> None:
        self.model = model
        self.device = model.device
        self.version = 0
        self.state = WeightsState.CURRENT
        self._broken_by = ""
        self._writes = 0
        merged = any(isinstance(module, LinearSlice) for module in model.modules())
        self._fixed = [
            (f"{prefix}.{name}".lstrip("."), module._parameters, name, parameter.data_ptr())
            for prefix, module in (model.named_modules() if captured or merged else ())
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        """Parameters whose addresses something holds: the name, where the module keeps it, and the address."""
        self.were_written()

    def require_current(self) -> None:
        """Raise WeightsMixed where a step would compute with weights of two versions."""
        if self.state is WeightsState.CURRENT:
            return
        if self.state is WeightsState.DROPPED:
            raise WeightsMixed("sleep dropped the weights; give all of them by update_weights (partial=False)")
        what = (
            "weights are being updated, or an update was interrupted"
            if self.state is WeightsState.UPDATING
            else f"an update of the weights broke after it had begun to write ({self._broken_by}); versions are mixed"
        )
        raise WeightsMixed(f"{what}; repeat the update in full (partial=False), or close the engine")

    def dropped(self) -> None:
        """Nothing of the weights is left; only a full update leads back."""
        self.state = WeightsState.DROPPED

    def require_in_place(self) -> None:
        """Raise ConfigError where a parameter was replaced instead of written to, so that graphs would go on reading
        the old one."""
        for name, parameters, key, address in self._fixed:
            parameter = parameters.get(key)
            if parameter is None or parameter.data_ptr() != address:
                raise ConfigError(
                    f"{name} was replaced by another tensor, but captured graphs and merged projections hold the "
                    "address of the first; write in place (update_weights, copy_, load_state_dict without assign=True)"
                )

    def were_written(self) -> bool:
        """Whether anything was written to parameters since the last call, by whomever: by torch's counter of each."""
        before = self._writes
        # To ask the model for them walks over all of its modules, which takes a millisecond before a first token.
        parameters = [kept[name] for _, kept, name, _ in self._fixed] or self.model.parameters()
        self._writes = sum(0 if each is None or each.is_inference() else each._version for each in parameters)
        return self._writes != before

    # -- before the first byte -------------------------------------------------------------------------------------

    def check(self, tensors: NamedTensors, manifest: Manifest | None, partial: bool) -> WeightUpdate:
        """Check what is to be written, by names, shapes and dtypes; nothing is changed.

        Raises ConfigError, which names what is unknown, missing, given twice, misshapen, or of a dtype or on a device
        that is not taken.
        """
        if self.state is not WeightsState.CURRENT and partial:
            dropped = self.state is WeightsState.DROPPED
            what = "sleep dropped the weights" if dropped else "an update of the weights broke"
            raise ConfigError(f"{what}; only a full one (partial=False) mends that")
        if next(self.model.parameters(), None) is None:
            raise ConfigError(f"{type(self.model).__name__} has no weights to write, as a plan's; build the plan again")
        self.require_in_place()
        known = destinations(cast(PreTrainedModel, self.model))
        streamed = manifest is not None and not isinstance(tensors, Mapping | list | tuple)
        pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
        if not isinstance(pairs, Iterable) or isinstance(pairs, torch.Tensor | np.ndarray | str):
            raise ConfigError(f"named tensors are {typed(tensors)}; give a dict, or pairs of name and tensor")
        if streamed:
            wanted = _manifest({} if manifest is None else manifest)
        else:
            given = self._gathered(pairs)
            wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in given.items()}
            if manifest is not None:
                _same_manifest(wanted, _manifest(manifest))
            pairs = given.items()
        where = self._matched(known, wanted, partial)
        if not streamed:
            _tied_agree(given, where)
        return WeightUpdate(pairs, wanted, where)

    def _gathered(self, pairs: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        given: dict[str, torch.Tensor] = {}
        writes: dict[str, int] = {}
        for name, tensor in _pairs(pairs):
            if name in given:
                raise ConfigError(f"{name} is given twice")
            self._take(name, tensor)
            given[name] = tensor
            writes[name] = 0 if tensor.is_inference() else tensor._version
        written = [
            name for name, tensor in given.items() if not tensor.is_inference() and tensor._version != writes[name]
        ]
        if written:
            raise ConfigError(
                f"{_some(written)}: written to after they were given, as by a generator that gives one buffer again "
                "and again; give a manifest, so that each tensor is copied as it comes"
            )
        return given

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        """Raise ConfigError where a tensor is of a kind or on a device that cannot be copied from."""
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"{name} is {typed(tensor)}; give a tensor")
        if hasattr(tensor, "full_tensor"):
            raise ConfigError(f"{name} is distributed over several devices; give its full_tensor()")
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ConfigError(f"{name} is sparse or quantized; give a dense tensor")
        if tensor.device.type != "cpu" and tensor.device != self.device:
            raise ConfigError(f"{name} is on {tensor.device}; give it on the host or on {self.device}")

    def _matched(
        self, known: dict[str, Destination], wanted: dict[str, tuple[torch.Size, torch.dtype]], partial: bool
    ) -> dict[str, Destination]:
        if unknown := sorted(wanted.keys() - known.keys()):
            raise ConfigError(
                f"{type(self.model).__name__} has no weights named {_some(unknown)}; it has names like {_some(known)}"
            )
        if not wanted:
            raise ConfigError("no weights are given; an update has at least one")
        where = {name: known[name] for name in wanted}
        wrong = [
            f"{name} is {tuple(wanted[name][0])}, the model's {tuple(each.view.shape)}"
            for name, each in where.items()
            if wanted[name][0] != each.view.shape
        ]
        if wrong:
            raise ConfigError(f"shapes differ: {_some(wrong, '; ')}")
        wrong = [
            f"{name} is {wanted[name][1]}, the model's {each.view.dtype}"
            for name, each in where.items()
            if wanted[name][1] != each.view.dtype and not {wanted[name][1], each.view.dtype} <= CASTABLE
        ]
        if wrong:
            raise ConfigError(
                f"dtypes differ: {_some(wrong, '; ')}; only float16, bfloat16, float32 and float64 are converted"
            )
        _covered(known, where, partial)
        return where

    # -- writing ---------------------------------------------------------------------------------------------------

    def write(self, update: WeightUpdate, restore: bool = False) -> int:
        """Write a checked update over the model's weights, on the current stream, and wait for it; returns the new
        version.

        Raises ConfigError where a stream gives other than its manifest says, or whatever the stream raises: before the
        first tensor is written nothing is changed, and after it the weights are mixed. With `restore` what is
        overwritten is kept on the host meanwhile, and written back then.
        """
        left = dict(update.manifest)
        places: set[tuple[int, ...]] = set()
        copier = _Copier(self.device)
        version, before, written = self.version, self.state, False
        replaced: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.state = WeightsState.UPDATING
        try:
            for name, tensor in _pairs(update.tensors):
                self._expect(name, tensor, left, update.manifest)
                if self.version != version:
                    raise ConfigError("another update was made while a stream was asked for its next tensor")
                where = update.destinations[name]
                if where.place not in places:
                    if restore:
                        replaced.append((where.view, _on_host(where.view)))
                    written = True
                    copier.copy(where.view, tensor)
                    places.add(where.place)
                elif not _equal(where.view, tensor, where.view.dtype):
                    raise ConfigError(f"{name} is tied to {where.owner} and differs from it; give one of them")
            if left:
                raise ConfigError(f"the stream ended without {_some(left)}, which its manifest names")
            copier.finish()
            self.version += 1
            self.state = WeightsState.CURRENT
        except BaseException as error:
            self._broken_by = f"{type(error).__name__}: {error}"
            if restore:
                for view, old in replaced:
                    copier.copy(view, old)
                copier.finish()
            self.state = WeightsState.MIXED if written and not restore else before
            raise
        return self.version

    def _expect(
        self,
        name: str,
        tensor: torch.Tensor,
        left: dict[str, tuple[torch.Size, torch.dtype]],
        manifest: dict[str, tuple[torch.Size, torch.dtype]],
    ) -> None:
        if name not in left:
            again = "is given twice" if name in manifest else "is not in the manifest"
            raise ConfigError(f"{name} {again}")
        self._take(name, tensor)
        shape, dtype = left.pop(name)
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise ConfigError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}; its manifest says {tuple(shape)} {dtype}"
            )


class _Copier:
    """Copies into weights: from the host to a GPU through two pinned buffers, one filled while the other is read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self._read: list[torch.cuda.Event] = []
        self._used = 0

    @torch.inference_mode()
    def copy(self, view: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write a tensor of the same shape, converted to the view's dtype."""
        if tensor.device == view.device:
            view.copy_(tensor)
            return
        for target, source in _in_rows(view, tensor.detach(), BUCKET_BYTES):
            nbytes = target.numel() * target.itemsize
            staged = self._room(nbytes)[:nbytes].view(target.dtype).view(target.shape)
            staged.copy_(source)
            target.copy_(staged, non_blocking=True)

    def _room(self, nbytes: int) -> torch.Tensor:
        """Pinned memory that nothing reads, from an address that suits every dtype."""
        if not self._buffers:
            self._buffers = [torch.empty(BUCKET_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._read = [torch.cuda.Event() for _ in self._buffers]  # type: ignore[no-untyped-call]
        if self._used + nbytes > BUCKET_BYTES:
            self._read[0].record(torch.cuda.current_stream(self._device))
            for both in (self._buffers, self._read):
                both.reverse()
            self._read[0].synchronize()
            self._used = 0
        start = self._used
        self._used += -(-nbytes // 256) * 256
        return self._buffers[0][start:]

    def finish(self) -> None:
        """Wait until everything is written, so that what it came from may be reused on any stream."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


@torch.inference_mode()
def _on_host(view: torch.Tensor) -> torch.Tensor:
    """A copy of a weight's values, in pinned memory where they are on a GPU."""
    kept = torch.empty(view.shape, dtype=view.dtype, pin_memory=view.device.type == "cuda")
    return kept.copy_(view)


def _in_rows(target: torch.Tensor, source: torch.Tensor, most: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both in parts of at most `most` bytes of the target, along whichever dimensions that takes."""
    nbytes = target.numel() * target.itemsize
    if nbytes <= most:
        if nbytes:
            yield target, source
        return
    rows = max(1, most * len(target) // nbytes)
    if rows == 1 and nbytes // len(target) > most:
        for one, other in zip(target, source, strict=True):
            yield from _in_rows(one, other, most)
        return
    for start in range(0, len(target), rows):
        yield target[start : start + rows], source[start : start + rows]


@torch.inference_mode()
def _equal(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors hold the same values in a dtype; on any devices, with little memory besides."""
    parts = _in_rows(one.detach(), other.detach(), BUCKET_BYTES)
    return all(torch.equal(a.to(dtype), b.to(a.device).to(dtype)) for a, b in parts)


def _pairs(pairs: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ConfigError(f"a stream of weights gave {typed(pair)}; give pairs of name and tensor")
        yield pair[0], pair[1]


def _manifest(manifest: Manifest) -> dict[str, tuple[torch.Size, torch.dtype]]:
    if not isinstance(manifest, Mapping):
        raise ConfigError(f"the manifest is {typed(manifest)}; give a dict of names to shape and dtype")
    checked = {}
    for name, entry in manifest.items():
        try:
            shape, dtype = entry
            shape = torch.Size(shape)
        except (TypeError, ValueError):
            raise ConfigError(f"the manifest's {name} is {shown(entry)}; give its shape and its torch.dtype") from None
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"the manifest's {name} has dtype {shown(dtype)}; give a torch.dtype")
        checked[name] = (shape, dtype)
    return checked


def _same_manifest(
    given: dict[str, tuple[torch.Size, torch.dtype]], manifest: dict[str, tuple[torch.Size, torch.dtype]]
) -> None:
    wrong = sorted(name for name in given.keys() | manifest.keys() if given.get(name) != manifest.get(name))
    if wrong:
        name = wrong[0]
        raise ConfigError(
            f"tensors are not those of the manifest: {_some(wrong)}; {name} is {given.get(name, 'not given')}, in the "
            f"manifest {manifest.get(name, 'not named')}"
        )


def _covered(known: dict[str, Destination], where: dict[str, Destination], partial: bool) -> None:
    """Raise ConfigError where something is given by two names that are not tied, or, unless `partial`, is not given."""
    places: dict[str, dict[tuple[int, ...], Destination]] = {}
    for each in where.values():
        places.setdefault(each.owner, {})[each.place] = each
    missing = []
    for owner in dict.fromkeys(each.owner for each in known.values()):
        there = places.get(owner, {})
        size, whole = sum(each.view.numel() for each in there.values()), known[owner].view.numel()
        if size > whole:
            names = [name for name, each in where.items() if each.owner == owner]
            raise ConfigError(f"{owner} is given as a whole and in parts: {_some(names)}; give one or the other")
        if not there and whole:
            missing.append(owner)
        elif size < whole:
            parts = {
                each.place: name for name, each in known.items() if each.owner == owner and each.view.numel() < whole
            }
            missing += [name for place, name in parts.items() if place not in there]
    if missing and not partial:
        raise ConfigError(
            f"{len(missing)} weights are missing: {_some(missing)}; give them, or say partial=True to keep the old ones"
        )


def _tied_agree(given: dict[str, torch.Tensor], where: dict[str, Destination]) -> None:
    """Raise ConfigError where one tensor is given by two names, with different values."""
    first: dict[tuple[int, ...], str] = {}
    for name, each in where.items():
        other = first.setdefault(each.place, name)
        one, two = given[other], given[name]
        if other != name and one.data_ptr() != two.data_ptr() and not _equal(one, two, each.view.dtype):
            raise ConfigError(f"{name} and {other} are one tensor in this model (tied), and differ; give one of them")


def _some(names: Iterable[str], between: str = ", ") -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return between.join(names[:SHOWN]) + more
