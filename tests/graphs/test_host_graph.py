from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from trtllm_vattn.errors import CaptureError
from trtllm_vattn.graphs.host_graph import HostGraph
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.owners import Extent, Reservation
from trtllm_vattn.vmm.tensors import strided, tensor_at


def test_a_replay_computes_anew_into_the_same_storages() -> None:
    x, w = torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    outputs = []
    graph = HostGraph.capture(lambda: outputs.append((x @ w).relu() + 1), [x, w])
    (out,) = outputs
    address = out.data_ptr()
    for values in ([1.0, 0.0], [-1.0, -1.0], [0.5, 2.0]):
        x.copy_(torch.tensor(values))
        graph.replay()
        assert torch.equal(out, (torch.tensor(values) @ w).relu() + 1)
        assert out.data_ptr() == address


def test_views_writes_in_place_and_indexed_writes_are_replayed() -> None:
    table, index, value = torch.zeros(6, 4), torch.tensor([1, 3]), torch.ones(2, 4)

    def step() -> None:
        table.index_put_((index,), value * 2)
        table.view(24)[::4].add_(10)
        table[5].copy_(table[1].reshape(2, 2).t().reshape(4))

    graph = HostGraph.capture(step, [table, index, value])
    want = torch.zeros(6, 4)
    for indices, number in (([1, 3], 1.0), ([0, 2], 5.0)):
        index.copy_(torch.tensor(indices))
        value.fill_(number)
        table.zero_()
        want.zero_()
        want[indices] = number * 2
        want.view(24)[::4] += 10
        want[5] = want[1].reshape(2, 2).t().reshape(4)
        graph.replay()
        assert torch.equal(table, want)


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which operations run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ran: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.append(str(operation))
        return operation(*args, **(kwargs or {}))


def test_a_replay_runs_what_computes_and_no_mere_view() -> None:
    x, outputs = torch.arange(6.0), []
    graph = HostGraph.capture(lambda: outputs.append(x.view(2, 3).t()[1].mul_(2) + 1), [x])
    assert {"aten.view.default", "aten.t.default", "aten.select.int"} < set(graph.operations())
    x.fill_(3.0)
    with Watching() as watching:
        graph.replay()
    assert watching.ran == ["aten.mul_.Tensor", "aten.add.Tensor", "aten.copy_.default"]
    assert x.tolist() == [3.0, 6.0, 3.0, 3.0, 6.0, 3.0]
    assert outputs[0].tolist() == [7.0, 7.0]


def test_what_a_step_writes_is_what_the_addresses_back_now(host_driver: HostDriver) -> None:
    """A page remapped beneath a captured step: it reads and writes the new page, and the first one again."""
    reservation = Reservation(host_driver, 4096)
    pages = [Extent(host_driver, 4096) for _ in range(2)]
    window = strided(tensor_at(reservation.base, 4096, "cpu"), torch.float32, (1024,), (1,))
    (mapping,) = reservation.map(0, [pages[0]])
    window.fill_(1.0)
    outputs = []
    graph = HostGraph.capture(lambda: outputs.append(window.sum() / 512), [window])
    seen = [float(outputs[0])]
    mapping.close()
    (mapping,) = reservation.map(0, [pages[1]])
    window.fill_(3.0)
    for _ in range(2):
        graph.replay()
        seen.append(float(outputs[0]))
        mapping.close()
        (mapping,) = reservation.map(0, [pages[0]])
    mapping.close()
    assert seen == [2.0, 6.0, 2.0]
    for owner in (*pages, reservation):
        owner.close()


X, MASK = torch.arange(4.0), torch.tensor([True, False, True, False])
OUTSIDE = torch.ones(4)


MODES = [contextlib.nullcontext, torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda: X + 1 if X.sum() > 3 else X, "_local_scalar_dense.* reads a value back to the host"),
        (lambda: X * X[0].item(), "_local_scalar_dense.* reads a value back"),
        (lambda: X[: int(X[1])], "_local_scalar_dense.* reads a value back"),
        (lambda: torch.allclose(X, X), "allclose.* reads a value back"),
        (lambda: X.nonzero(), "nonzero.* shape depends on data"),
        (lambda: torch.nonzero(X, out=torch.empty(0, dtype=torch.int64)), "nonzero.out has .* shape depends on data"),
        (lambda: torch.where(MASK), "nonzero.* shape depends on data"),
        (lambda: X[MASK], "index.* shape depends on data"),
        (lambda: X.index_put_((MASK,), X[0]), "index_put_.* shape depends on data"),
        (lambda: torch.masked_select(X, MASK), "masked_select.* shape depends on data"),
        (lambda: torch.unique(X), "_unique2.* shape depends on data"),
        (lambda: torch.repeat_interleave(X, X.long()), "repeat_interleave.* shape depends on data"),
        (lambda: X + OUTSIDE, r"add.* given a tensor of shape \(4,\) that is neither static nor made in the step"),
        (lambda: X + torch.tensor([1.0, 2.0, 3.0, 4.0]), "neither static nor made"),
        (lambda: HostGraph.capture(lambda: X + 1, [X]), "captures do not nest"),
    ],
)
def test_what_a_cuda_graph_could_not_hold_is_refused(
    mode: Callable[[], AbstractContextManager[object]], step: Callable[[], object], message: str
) -> None:
    with mode(), pytest.raises(CaptureError, match=message):
        HostGraph.capture(step, [X, MASK])
    graph = HostGraph.capture(lambda: X + 1, [X])
    graph.replay()


def test_numbers_and_known_sizes_are_held() -> None:
    x, repeats = torch.zeros(3), torch.tensor([2, 0, 1])
    outputs = []

    def step() -> None:
        x[0] = 5.0
        outputs.append(torch.repeat_interleave(x, repeats, output_size=3))
        outputs.append(torch.where(x > 0, x, -1.0))

    graph = HostGraph.capture(step, [x, repeats])
    x.copy_(torch.tensor([0.0, 7.0, 9.0]))
    graph.replay()
    assert outputs[0].tolist() == [5.0, 5.0, 9.0]
    assert outputs[1].tolist() == [5.0, 7.0, 9.0]


@pytest.mark.parametrize("replay_mode", MODES)
@pytest.mark.parametrize("capture_mode", MODES)
def test_an_unmodified_llama_replays_to_the_bit(
    capture_mode: Callable[[], AbstractContextManager[object]],
    replay_mode: Callable[[], AbstractContextManager[object]],
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    # Without a mask transformers reads the positions back to see whether sequences are packed.
    mask = torch.full((5, 5), float("-inf")).triu(1).expand(2, 1, 5, 5).contiguous()

    def step() -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        return logits

    outputs = []
    with capture_mode():
        graph = HostGraph.capture(lambda: outputs.append(step()), [*model.parameters(), *model.buffers(), tokens, mask])
    for seed in range(3):
        tokens.copy_(torch.randint(64, (2, 5), generator=torch.Generator().manual_seed(seed)))
        with replay_mode():
            graph.replay()
        with torch.no_grad():
            assert torch.equal(outputs[0], step())


def test_a_result_that_an_operation_sizes_itself_is_replayed() -> None:
    out = torch.empty(0)
    x = torch.arange(4.0)
    graph = HostGraph.capture(lambda: torch.add(x, 1, out=out), [x, out])
    for value in (3.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert out.tolist() == [value + 1] * 4


def test_a_tensor_of_the_capture_that_was_resized_is_noticed() -> None:
    outputs = []
    graph = HostGraph.capture(lambda: outputs.append(X + 1), [X])
    outputs[0].resize_(1 << 16)
    with pytest.raises(CaptureError, match=r"add.Tensor was captured with a storage at 0x.* which has moved"):
        graph.replay()


def test_a_static_tensor_that_moved_is_noticed() -> None:
    x = torch.ones(3)
    graph = HostGraph.capture(lambda: x * 2, [x])
    x.set_(torch.zeros(5))
    with pytest.raises(CaptureError, match="has moved since the capture"):
        graph.replay()


def test_a_closed_graph_does_not_replay() -> None:
    graph = HostGraph.capture(lambda: X + 1, [X])
    assert len(graph) == 1
    assert graph.operations() == ["aten.add.Tensor"]
    graph.close()
    graph.close()
    with pytest.raises(CaptureError, match="this graph is closed"):
        graph.replay()
