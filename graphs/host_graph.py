"""`HostGraph` is a CUDA graph for the CPU: it captures a step once and replays it at fixed addresses.

A capture runs the step under a dispatch mode that records every aten operation with its tensors. A replay runs the
recorded operations again on the same storages. So tests without a GPU show whether a step's addresses stay valid, and a
capture refuses what a CUDA graph could not hold.

Limit: reads by the host that call no aten operation are not noticed; on the CPU these are `tolist()` and `numpy()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode

from trtllm_vattn.errors import CaptureError
from trtllm_vattn.vmm.tensors import inference

_aten = torch.ops.aten
_INDEXED = {
    _aten.index.Tensor,
    _aten.index.Tensor_out,
    _aten._unsafe_index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index_put.default,
}
"""Operations whose result shape, or work on the host, depends on data if an index is a mask."""


_PLAIN = {int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}


def _tensors(tree: Any) -> list[torch.Tensor]:
    """All in an operation's arguments or results, which are nested in lists, tuples and dicts alone."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    found: list[torch.Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[torch.Tensor]) -> None:
    # Not torch's own for any tree, and plain values told by their type alone: this is most of a capture's time.
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return
    for each in tree:
        if type(each) in _PLAIN:
            continue
        if isinstance(each, torch.Tensor):
            found.append(each)
        else:
            _collect(each, found)


def _aliases(tree: Any) -> Any:
    """The same, with other tensors over the same memory."""
    if type(tree) in _PLAIN:
        return tree
    if isinstance(tree, torch.Tensor):
        return tree.detach()
    if isinstance(tree, (list, tuple)):
        return type(tree)([_aliases(each) for each in tree])
    if isinstance(tree, dict):
        return {key: _aliases(each) for key, each in tree.items()}
    return tree


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class Record:
    """One recorded operation with its arguments, and the results that a replay copies to their captured addresses."""

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[tuple[int, torch.Tensor]]
    """Results that are no views of an argument, with their index among the operation's results."""

    def storages(self) -> list[torch.UntypedStorage]:
        """The storages that the operation reads and writes."""
        made = [tensor for _, tensor in self.results]
        return [tensor.untyped_storage() for tensor in (*_tensors((self.args, self.kwargs)), *made)]

    @property
    def computes(self) -> bool:
        """Whether the operation writes anything: one that only makes views of its arguments need not run again."""
        return bool(self.results) or self.operation._schema.is_mutable or not self.operation._schema.returns

    def run(self) -> None:
        answer = self.operation(*self.args, **self.kwargs)
        if self.results:
            results = _tensors(answer)
            for place, recorded in self.results:
                recorded.copy_(results[place])


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, static: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.records: list[Record] = []
        self._whole: set[Any] = set()
        """Operations that are not made of others."""
        self._known = {_storage(tensor) for tensor in static}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        inputs = {_storage(tensor) for tensor in given}
        if not inputs <= self._known:
            self._refuse_outside(operation, given)
        # In inference mode operations arrive whole; what they are made of tells what a graph could not hold.
        if operation not in self._whole:
            with self:
                decomposed = operation.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
            self._whole.add(operation)
        _refuse_data_dependent(operation, args, kwargs)
        # Aliases, because operations like squeeze_ change the shape of the very tensor they are given. A record keeps
        # its results alive, so that no later one is given a storage that a replay still needs.
        recorded_args, recorded_kwargs = _aliases(args), _aliases(kwargs)
        answer = operation(*args, **kwargs)
        made = [(i, tensor.detach()) for i, tensor in enumerate(_tensors(answer)) if _storage(tensor) not in inputs]
        self._known.update(_storage(tensor) for _, tensor in made)
        self.records.append(Record(operation, recorded_args, recorded_kwargs, made))
        return answer

    def _refuse_outside(self, operation: Any, given: list[torch.Tensor]) -> None:
        if operation is _aten.lift_fresh.default and given[0].dim() == 0:
            # A Python number that became a tensor, as in x[0] = 5.0; on CUDA it is an argument of the kernel.
            self._known.add(_storage(given[0]))
        for tensor in given:
            if _storage(tensor) not in self._known and tensor.numel():
                raise CaptureError(
                    f"{operation} was given a tensor of shape {tuple(tensor.shape)} that is neither static nor made in "
                    "the step: a replay would read it where it was; make it once, outside, and pass it as static"
                )


@cache
def _depends_on_data(operation: Any) -> tuple[bool, bool]:
    """Whether an operation reads a value back to the host, and whether a result's shape depends on data."""
    tags = operation.tags
    return torch.Tag.data_dependent_output in tags, torch.Tag.dynamic_output_shape in tags


def _refuse_data_dependent(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    reads_back, dynamic = _depends_on_data(operation)
    if reads_back:
        raise CaptureError(
            f"{operation} reads a value back to the host, on which the step may branch; a graph cannot: keep the "
            "value on the device (torch.where instead of if, tensors instead of .item())"
        )
    if operation in _INDEXED:
        shaped = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    else:
        shaped = dynamic and kwargs.get("output_size") is None
    if shaped:
        raise CaptureError(
            f"{operation} has a result whose shape depends on data; a graph's shapes are fixed: use torch.where or "
            "a padded index"
        )


class HostGraph:
    """A recorded step; `replay()` runs it again at the same addresses."""

    def __init__(self, records: list[Record], static: list[torch.Tensor]) -> None:
        self._records: list[Record] | None = records
        self._computing = [record for record in records if record.computes]
        self._static = [(tensor, tensor.data_ptr()) for tensor in static]
        self._storages = {
            storage.data_ptr(): (storage, record.operation)
            for record in self._computing
            for storage in record.storages()
        }

    @classmethod
    def capture(cls, step: Callable[[], object], static: Iterable[torch.Tensor]) -> HostGraph:
        """Run `step` once and record it.

        Parameters
        ----------
        static : iterable of Tensor
            Every tensor that the step may touch and does not make itself. A tensor's views need not be listed.

        Raises
        ------
        CaptureError
            The step does what a CUDA graph cannot hold; the message names the operation.
        """
        static = list(static)
        around = _get_current_dispatch_mode_stack()
        if any(isinstance(mode, _Recorder) for mode in around):
            raise CaptureError("a capture is under way; captures do not nest")
        try:
            with _Recorder(static) as recorder:
                step()
        finally:
            # An interrupt may come between a mode's beginning and torch's noting it: nothing is recorded for ever.
            while len(_get_current_dispatch_mode_stack()) > len(around):
                _pop_mode()
        return cls(recorder.records, static)

    def __len__(self) -> int:
        """The number of recorded operations."""
        return len(self._records or ())

    @property
    def records(self) -> list[Record]:
        """The recorded operations in order; none after `close()`."""
        return list(self._records or ())

    def operations(self) -> list[str]:
        """The names of the recorded operations in order."""
        return [str(record.operation) for record in self._records or ()]

    def replay(self) -> None:
        """Run the operations again. Raises CaptureError after `close()`, or if a captured tensor's memory has moved."""
        if self._records is None:
            raise CaptureError("this graph is closed; capture the step again")
        for tensor, address in self._static:
            if tensor.data_ptr() != address:
                raise CaptureError(
                    f"a static tensor of shape {tuple(tensor.shape)} has moved since the capture, which has its old "
                    "address; write into it in place"
                )
        for address, (storage, operation) in self._storages.items():
            if storage.data_ptr() != address:
                raise CaptureError(
                    f"{operation} was captured with a storage at {address:#x}, which has moved to "
                    f"{storage.data_ptr():#x}; do not resize what a captured step uses, or capture it again"
                )
        # Inference tensors, which a capture in inference mode makes, may be written in inference mode only.
        with inference():
            for record in self._computing:
                record.run()

    def close(self) -> None:
        """Drop the records. Idempotent."""
        self._records = None
        self._computing = []
        self._static = []
        self._storages = {}
