from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from graph_doubles import CUmemorytype, FakeCuda, Kernel, Other

from trtllm_vattn.errors import CaptureError, DriverError
from trtllm_vattn.graphs.audit import (
    AuditReport,
    audit,
    audit_host,
    cuda_probe,
    pool_regions,
    torch_blocks,
)
from trtllm_vattn.graphs.host_graph import HostGraph
from trtllm_vattn.graphs.nodes import GraphReader
from trtllm_vattn.vmm.regions import POOL, RESERVATION, STATIC, Region, tensor_regions

DEVICE, HOST = CUmemorytype.CU_MEMORYTYPE_DEVICE, CUmemorytype.CU_MEMORYTYPE_HOST
KV, MINE, STRANGE = 0x7F00_0000_0000, 0x7F10_0000_0000, 0x7F20_0000_0000
REGIONS = [Region(KV, 1 << 20, RESERVATION), Region(MINE, 4096, STATIC), Region(MINE + 4096, 4096, POOL)]


def word(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)


def cuda() -> FakeCuda:
    return FakeCuda({STRANGE: (8192, DEVICE), STRANGE + (1 << 20): (64, HOST)})


def report(*nodes: object, driver: FakeCuda | None = None):  # type: ignore[no-untyped-def]
    driver = driver or cuda()
    return audit(GraphReader(driver).read(list(nodes)), REGIONS, cuda_probe(driver))


def test_addresses_are_told_by_where_they_lie() -> None:
    kernel = Kernel(
        "attend", [word(KV + 8), word(MINE), word(MINE + 4096), (7).to_bytes(4, "little"), word(12345), word(0)]
    )
    found = report(kernel, Kernel("library", [word(KV)], by_library=True))
    assert found.nodes == {"kernel": 2}
    assert found.addresses == {RESERVATION: 2, STATIC: 1, POOL: 1}
    assert found.numbers == 1
    assert found.findings == ()
    found.raise_if_foreign()


def test_parameters_packed_into_one_buffer_are_read_too() -> None:
    found = report(Kernel("packed", [(7).to_bytes(4, "little"), word(KV), word(1, STRANGE)], packed=True))
    assert found.addresses == {RESERVATION: 1}
    assert [(f.parameter, f.offset) for f in found.findings] == [(2, 8)]
    assert found.opaque == ()


def test_a_region_ends_before_its_end() -> None:
    driver = FakeCuda({KV + (1 << 20): (4096, DEVICE)})
    found = report(Kernel("k", [word(KV + (1 << 20) - 1), word(KV + (1 << 20))]), driver=driver)
    assert found.addresses == {RESERVATION: 1}
    assert [finding.address for finding in found.findings] == [KV + (1 << 20)]


def test_a_foreign_address_is_named() -> None:
    found = report(Kernel("first", [word(KV)]), Kernel("second", [word(KV), word(STRANGE + 16)]))
    message = (
        rf"holds {STRANGE + 16:#x}, 0 bytes into parameter 1 of kernel 'second' \(node 1\): device memory of 8,192 "
        rf"bytes at {STRANGE:#x} that is neither.*\(1 such in all\); pass the tensor as static"
    )
    with pytest.raises(CaptureError, match=message):
        found.raise_if_foreign()
    assert found.as_dict()["findings"][0]["allocation"] == {"base": STRANGE, "size": 8192, "where": "device"}


def test_two_numbers_that_look_like_an_address_are_told_apart() -> None:
    low = 0x4_0000_0000
    driver = FakeCuda({low: (1 << 31, DEVICE), STRANGE: (8192, DEVICE)})
    nodes = GraphReader(driver).read([Kernel("functor", [word(3, low + 4, KV, 99), word(low), word(low + 512)])])
    found = audit(nodes, REGIONS, cuda_probe(driver))
    assert [(f.parameter, f.address) for f in found.findings] == [(1, low)], "the start of an allocation"
    assert [f.address for f in found.lookalikes] == [low + 4, low + 512]
    assert found.as_dict()["lookalike_values"] == [low + 4, low + 512]
    # Where torch has handed out a tensor from the middle of what it has of the driver.
    found = audit(nodes, REGIONS, cuda_probe(driver), blocks={low + 512})
    assert [f.address for f in found.findings] == [low, low + 512]
    inside = report(Kernel("functor", [word(3, STRANGE + 8, KV, 99)]), driver=driver)
    with pytest.raises(CaptureError, match="8 bytes into parameter 0 of kernel 'functor'"):
        inside.raise_if_foreign()


def test_what_lay_on_the_stack_is_no_finding() -> None:
    name = "_ZN2at6native24index_elementwise_kernelILi128ELi4E"
    found = report(Kernel(name, [word(KV), word(1, 2, STRANGE, KV)]))
    assert found.findings == ()
    assert [(f.name, f.parameter, f.offset, f.certain) for f in found.lookalikes] == [(name, 1, 16, False)]
    assert any("unused parts" in sentence for sentence in found.unseen)


def test_where_tensors_are_joined_the_output_and_two_inputs_are_looked_at() -> None:
    name = "_ZN2at6native40_GLOBAL__N__0f1a8107_8_Shape_cu_49f7391c19CatArrayBatchedCopyINS1_10OpaqueTypeILj2EEEjLi4E"
    kernels = [Kernel(name, [word(KV), word(KV, KV, 0, STRANGE), word(STRANGE)])]
    kernels += [Kernel(name, parameters) for parameters in ([word(STRANGE)], [word(KV), word(KV, STRANGE)])]
    found = report(*kernels)
    assert [(f.node, f.parameter, f.offset) for f in found.findings] == [(1, 0, 0), (2, 1, 8)]
    assert [(f.node, f.parameter, f.offset) for f in found.lookalikes] == [(0, 1, 24), (0, 2, 0)]


def test_copies_and_fills_are_looked_at_too() -> None:
    copy = SimpleNamespace(
        srcMemoryType=HOST, srcHost=STRANGE + (1 << 20), srcDevice=0, dstMemoryType=DEVICE, dstDevice=KV, dstHost=0
    )
    found = report(Other("MEMCPY", copy), Other("MEMSET", SimpleNamespace(dst=STRANGE)))
    assert found.addresses == {RESERVATION: 1}
    assert [(f.kind, f.parameter, f.allocation.where, f.certain) for f in found.findings] == [
        ("memcpy", 0, "host", True),
        ("memset", 0, "device", True),
    ]


def test_a_copy_from_an_array_is_listed_and_one_of_unified_memory_read() -> None:
    array, unified = CUmemorytype.CU_MEMORYTYPE_ARRAY, CUmemorytype.CU_MEMORYTYPE_UNIFIED
    copy = SimpleNamespace(
        srcMemoryType=array, srcHost=0, srcDevice=0, dstMemoryType=unified, dstDevice=STRANGE, dstHost=0
    )
    found = report(Other("MEMCPY", copy))
    assert [(f.kind, f.parameter) for f in found.findings] == [("memcpy", 1)]
    assert [(index, part.parameter) for index, _, part in found.opaque] == [(0, 0)]
    assert found.unseen == ("1 times: it copies from or to a CUDA array, whose memory the driver hides",)


def test_the_body_of_a_loop_is_walked_where_it_is_known() -> None:
    loop, other = Other("CONDITIONAL"), Other("CONDITIONAL")
    step = [Kernel("inner", [word(STRANGE)])]
    body = [Other("GRAPH", step), Kernel("decide", [word(5), word(MINE)])]
    driver = cuda()
    nodes = GraphReader(driver).read([loop, other], {int(loop): [body]})
    assert [(node.kind, node.name) for node in nodes] == [
        ("conditional", ""),
        ("graph", ""),
        ("kernel", "inner"),
        ("kernel", "decide"),
        ("conditional", ""),
    ]
    found = audit(nodes, REGIONS, cuda_probe(driver))
    assert [finding.name for finding in found.findings] == ["inner"]
    assert found.addresses == {STATIC: 1}
    assert [(index, part.why) for index, _, part in found.opaque] == [(4, "a node of kind conditional")]


def test_reports_of_several_graphs_are_one() -> None:
    driver = cuda()
    graphs = {
        "step of 4": [Kernel("mine", [bytes(128), word(KV)])],
        "step of 4, in a loop": [Kernel("clean", [word(KV), word(12345)]), Kernel("theirs", [word(MINE, STRANGE)])],
    }
    reports = [
        audit(GraphReader(driver).read(nodes), REGIONS, cuda_probe(driver), name=name) for name, nodes in graphs.items()
    ]
    whole = AuditReport.joined(reports)
    assert whole.graphs == tuple(graphs)
    assert (whole.nodes, whole.addresses, whole.numbers) == ({"kernel": 3}, {RESERVATION: 2, STATIC: 1}, 1)
    assert len(whole.opaque) == 1
    assert len(whole.unseen) == 5
    assert whole.as_dict()["graphs"] == list(graphs)
    with pytest.raises(CaptureError, match=r"the step of 4, in a loop holds .* of kernel 'theirs' \(node 1\)"):
        whole.raise_if_foreign()
    assert AuditReport.joined([]).graphs == ()


def test_graphs_inside_graphs_are_walked() -> None:
    inner = [Kernel("inner", [word(STRANGE)])]
    found = report(Other("GRAPH", [Other("GRAPH", inner), Other("EMPTY")]))
    assert found.nodes == {"graph": 2, "kernel": 1, "empty": 1}
    assert [finding.name for finding in found.findings] == ["inner"]


def test_what_cannot_be_seen_is_listed() -> None:
    found = report(
        Kernel("tma", [bytes(128), word(KV)]),
        Kernel("hidden", [word(KV)], hidden=True),
        Kernel("unkept", [None]),
        Other("HOST"),
        Other("CONDITIONAL"),
    )
    assert [(index, name, part.parameter) for index, name, part in found.opaque] == [
        (0, "tma", 0),
        (1, "hidden", -1),
        (2, "unkept", 0),
        (3, "", -1),
        (4, "", -1),
    ]
    text = "\n".join(found.unseen)
    for part in ("1 times: it may hold TMA", "keeps no parameters of it", "node of kind host", "arrays of pointers"):
        assert part in text
    assert report().unseen == ()


@pytest.mark.parametrize("refusal", ["nodes", "places"])
def test_a_driver_that_refuses_is_an_error(refusal: str) -> None:
    driver = cuda()
    driver.refuse = refusal
    with pytest.raises(DriverError, match="CUDA_ERROR_NOT_SUPPORTED"):
        report(Kernel("k", [word(1)]), driver=driver)


def test_a_host_graph_is_audited_by_its_storages() -> None:
    mine, foreign = torch.ones(4), torch.ones(4)
    graph = HostGraph.capture(lambda: mine.add_(foreign * 2), [mine, foreign])
    clean = audit_host(graph, tensor_regions(STATIC, [mine, foreign]))
    assert clean.findings == ()
    assert set(clean.addresses) == {STATIC, POOL}
    dirty = audit_host(graph, tensor_regions(STATIC, [mine]))
    with pytest.raises(
        CaptureError, match=rf"holds {foreign.data_ptr():#x}, 0 bytes into parameter 0 of operation 'aten.mul"
    ):
        dirty.raise_if_foreign()


@pytest.mark.gpu
def test_a_captured_graph_is_audited_on_the_card() -> None:
    from trtllm_vattn.graphs.replay import GraphRunner
    from trtllm_vattn.vmm.cuda import CudaDriver
    from trtllm_vattn.vmm.owners import Extent, Reservation
    from trtllm_vattn.vmm.tensors import tensor_at

    driver = CudaDriver()
    granularity = driver.granularity()
    reservation, extent = Reservation(driver, granularity), Extent(driver, granularity)
    (mapping,) = reservation.map(0, [extent])
    window = tensor_at(reservation.base, granularity, driver.device).view(torch.float32)
    static, foreign = torch.ones(1024, device="cuda:0"), torch.ones(1024, device="cuda:0")
    window.zero_()

    def step(bucket: int) -> tuple[torch.Tensor]:
        static.copy_(window[:1024])
        torch.add(static, foreign, out=static)
        return (static * 2,)

    runner = GraphRunner(step, [1], [static, window], static.device)
    runner.capture()
    graph = driver.cuda.CUgraph(runner.graph(1).raw_cuda_graph())
    nodes = GraphReader(driver.cuda).read(graph)
    mine = [Region(reservation.base, granularity, RESERVATION), *tensor_regions(STATIC, [static])]
    known = [*mine, *pool_regions(runner.pool)]
    found = audit(nodes, known, cuda_probe(driver.cuda))
    assert {RESERVATION, STATIC, POOL} <= set(found.addresses)
    region = tensor_regions(STATIC, [foreign])[0]
    assert {finding.address for finding in (*found.findings, *found.lookalikes)} == {region.base}
    assert audit(nodes, known, cuda_probe(driver.cuda), torch_blocks()).findings
    assert audit(nodes, [*known, region], cuda_probe(driver.cuda)).findings == ()
    assert runner.audit(mine).findings
    assert runner.audit(mine).addresses == found.addresses, "its static tensors do not hide the reservation"
    assert runner.audit([*mine, region]).findings == ()
    runner.close()
    for owner in (mapping, extent, reservation):
        owner.close()


@pytest.mark.gpu
def test_graphs_composed_of_a_step_are_audited_on_the_card() -> None:
    from trtllm_vattn.graphs.replay import GraphRunner

    count, go, foreign = (torch.zeros(1, dtype=torch.int32, device="cuda:0") for _ in range(3))

    def step(bucket: int) -> tuple[torch.Tensor]:
        count.add_(1)
        go.copy_(count < 5 + foreign)
        return (count + bucket,)

    runner = GraphRunner(step, [2, 1], [count, go], count.device, go)
    runner.capture()
    once = runner.audit([], "step", 2)
    runner.replay(2, 3)
    runner.replay_while(2)
    runner.replay(1, 2)
    whole = runner.audit([], "step", 2)
    assert whole.graphs == ("step of 2", "step of 2, 3 times over", "step of 2, in a loop")
    assert whole.nodes["graph"] == 3 + 1
    assert whole.nodes["conditional"] == 1
    # The captured one, thrice in the second, once in the loop's body beside the kernel that decides.
    assert whole.nodes["kernel"] == 5 * once.nodes["kernel"] + 1
    assert not [part for _, _, part in whole.opaque if "conditional" in part.why]
    strangers = tensor_regions(STATIC, [foreign])
    assert {finding.graph for finding in (*whole.findings, *whole.lookalikes)} == set(whole.graphs)
    assert runner.audit(strangers).findings == ()
    assert len(runner.audit(strangers).graphs) == 5
    runner.close()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_nothing_captured_is_nothing_to_look_at(device: str) -> None:
    from trtllm_vattn.graphs.replay import GraphRunner

    x = torch.zeros(4, device=device)
    runner = GraphRunner(lambda bucket: (x[:bucket] + 1,), [4, 2], [x], x.device)
    with pytest.raises(CaptureError, match="no prompt is captured"):
        runner.audit([], "prompt")
    runner.capture([2])
    assert runner.audit([], "prompt").graphs == ("prompt of 2",)
    assert runner.audit().findings == (), "a runner knows its static tensors"
    with pytest.raises(CaptureError, match=r"no graph for 4 lanes: the runner is captured for \[2\]"):
        runner.audit([], "prompt", 4)
    runner.close()
