from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

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


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda: X + 1 if X.sum() > 3 else X, "_local_scalar_dense.* reads a value back to the host"),
        (lambda: X * X[0].item(), "reads a value back"),
        (lambda: X.nonzero(), "nonzero.* shape depends on data"),
        (lambda: X[MASK], "index.* shape depends on data"),
        (lambda: torch.masked_select(X, MASK), "masked_select.* shape depends on data"),
        (lambda: X + OUTSIDE, r"add.* given a tensor of shape \(4,\) that is neither static nor made in the step"),
        (lambda: X + torch.tensor([1.0, 2.0, 3.0, 4.0]), "neither static nor made"),
        (lambda: HostGraph.capture(lambda: X + 1, [X]), "captures do not nest"),
    ],
)
def test_what_a_cuda_graph_could_not_hold_is_refused(step: Callable[[], object], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        HostGraph.capture(step, [X, MASK])
    graph = HostGraph.capture(lambda: X + 1, [X])
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
