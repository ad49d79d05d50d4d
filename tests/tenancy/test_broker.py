"""A broker and its tenants over a Unix socket: isolation, ceilings, who may say what, and tenants that end, hang or
lie."""

from __future__ import annotations

import errno
import os
import random
import resource
import socket
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest
from tenancy.lending import lending, until

from trtllm_vattn.cli.broker import EXPLAINED
from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import BrokerLost, ConfigError, DriverError, WrongProcess
from trtllm_vattn.machine import processes
from trtllm_vattn.tenancy import broker as of_broker
from trtllm_vattn.tenancy import protocol as say
from trtllm_vattn.tenancy.beside import DeviceProcesses
from trtllm_vattn.tenancy.books import Limits
from trtllm_vattn.tenancy.broker import Broker, Connection
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.tenancy.tenant import BrokerDriver, Client, Tenant, open_tenant
from trtllm_vattn.verify.tenants import PatternedTenant, Strangers, TenantProcess
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

PAGE = 4096


def standing(broker: Broker) -> dict[str, say.TenantStatus]:
    with Client(broker.path) as client:
        return {tenant.name: tenant for tenant in client.standing().tenants}


def config(broker: Broker, name: str, **options: object) -> TenantConfig:
    return TenantConfig(str(broker.path), name, **options)  # type: ignore[arg-type]


def test_a_tenant_never_reads_anothers_bytes_and_never_passes_its_ceiling(broker: Broker) -> None:
    tenants = [PatternedTenant(config(broker, f"t{seed}", ceiling="600KiB"), seed) for seed in range(3)]
    for _ in range(120):
        for tenant in tenants:
            tenant.turn()
    assert broker.books.lent <= 1 << 20
    for tenant in tenants:
        tenant.look()
        tenant.close()
        counts = tenant.counts
        assert counts["handovers"] > 30
        assert counts["foreign_bytes"] == counts["lost_bytes"] == counts["passed"] == 0
    until(lambda: not broker.tenants)
    assert broker.books.lent == 0


def test_extents_are_created_anew_and_lent_once(broker: Broker) -> None:
    with Tenant(config(broker, "one")) as tenant:
        numbers, inodes = set(), set()
        for _ in range(50):
            lease, descriptor = tenant.create(PAGE)
            numbers.add(lease)
            inodes.add(os.fstat(descriptor).st_ino)
            os.close(descriptor)
            tenant.release(lease, PAGE)
        assert len(numbers) == len(inodes) == 50


def test_a_ceiling_holds_and_can_be_changed_while_the_tenant_serves(broker: Broker) -> None:
    driver = open_tenant(config(broker, "one", ceiling=4 * PAGE), "cpu")
    handles = [driver.create(PAGE) for _ in range(4)]
    with pytest.raises(DriverError, match=r"CUDA_ERROR_OUT_OF_MEMORY \(4,096 bytes asked for; tenant 'one' has 16,384"):
        driver.create(PAGE)
    with Client(broker.path) as client:
        client.do(say.SetLimits("one", ceiling=5 * PAGE))
        assert driver.tenant.ceiling == 5 * PAGE
        handles.append(driver.create(PAGE))
        client.do(say.SetLimits("one", ceiling=2 * PAGE))
        assert driver.tenant.budget == 2 * PAGE
        with pytest.raises(ConfigError, match="asks for a floor of 12,288 bytes"):
            client.do(say.SetLimits("one", floor=3 * PAGE))
    for handle in handles:
        driver.release(handle)
    driver.tenant.close()


def test_memory_comes_back_within_the_deadline_from_who_holds_it_idle(broker: Broker) -> None:
    rich = PatternedTenant(config(broker, "rich"), 0, extents=300)
    while rich.borrow():
        pass
    assert standing(broker)["rich"].lent > 1 << 19

    class Giver:
        def give(self) -> None:
            while rich.held_bytes > rich.tenant.budget:
                rich.give_back(0)

    giver = Giver()
    rich.tenant.on_change(giver.give)
    poor = open_tenant(config(broker, "poor", floor="512KiB"), "cpu")
    with pytest.raises(DriverError, match="once others have given back what they owe"):
        poor.create(1 << 19)
    with poor.tenant.waiting(20.0):
        handle = poor.create(1 << 19)
    assert standing(broker)["rich"].state in ("serving", "owing")
    poor.release(handle)
    poor.tenant.close()
    rich.close()


# -- who may say what --------------------------------------------------------------------------------------------------


def test_a_tenant_speaks_for_itself_alone(broker: Broker) -> None:
    with Tenant(config(broker, "one")) as one, Tenant(config(broker, "two")) as two:
        lease, descriptor = one.create(PAGE)
        os.close(descriptor)
        with pytest.raises(ConfigError, match="tenant 'two' has no lease"):
            two.do(say.Release(lease))
        for message in (say.SetLimits("one", ceiling=0), say.SetAsleep("one", True)):
            with pytest.raises(ConfigError, match="by no tenant"):
                two.do(message)
        with pytest.raises(ConfigError, match="tenant 'two' already"):
            two.do(say.Hello(say.VERSION, "three", device="cpu"))
        with pytest.raises(ConfigError, match="there is a tenant 'one' already"):
            Tenant(config(broker, "one"))
        assert {name: each.lent for name, each in standing(broker).items()} == {"one": PAGE, "two": 0}
        assert standing(broker)["one"].pid == os.getpid()
        one.release(lease, PAGE)
    with Client(broker.path) as client, pytest.raises(ConfigError, match="say Hello first"):
        client.do(say.Create(PAGE))


def test_another_user_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    with lending(tmp_path / "broker", PAGE, allow=[12345]) as broker:
        assert broker.path.stat().st_mode & 0o777 == 0o666
        answers = []
        for user in (12344, 12345):
            # A tenant that is allowed sets no limits all the same: its user does not operate the broker.
            connection = Connection(socket.socket(socket.AF_UNIX), os.getpid(), user)
            answers += [broker.handle(connection, say.encode(each))[0] for each in (say.Status(), say.SetLimits("one"))]
            connection.socket.close()
        assert [getattr(each, "code", "said") for each in answers] == ["denied", "denied", "said", "denied"]
        assert "user 12344 may not speak to this broker" in getattr(answers[0], "message", "")
        # Who may not speak is hung up on at once, and takes nobody's place.
        broker._allowed.clear()
        with Client(broker.path) as client, pytest.raises(ConfigError, match=r"user \d+ may not speak to this broker"):
            client.standing()
        until(lambda: not broker._connections)


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        (say.Hello(1, "one", device="cpu"), "version 1 asked for; this broker speaks 2"),
        (say.Hello(2, "one", device="abc"), "lends memory of device cpu, not of abc"),
        (say.Hello(2, "one", floor=1 << 40, device="cpu"), "asks for a floor of 1,099,511,627,776 bytes"),
        (say.Hello(2, "one", floor=2, ceiling=1, device="cpu"), "its ceiling is 1"),
    ],
)
def test_a_hello_that_cannot_be_leaves_nothing(broker: Broker, hello: say.Hello, message: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Client(broker.path) as client, pytest.raises(ConfigError, match=message):
        client.do(hello)
    until(lambda: len(os.listdir("/proc/self/fd")) == before)
    assert not broker.tenants


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": 3}, "a broker's path is an int"),
        ({"name": "a b"}, "give letters, digits"),
        ({"name": ""}, "give letters, digits"),
        ({"floor": "much"}, "floor is 'much'"),
        ({"ceiling": -1}, "ceiling is -1"),
        ({"priority": 1.5}, "priority is 1.5"),
    ],
)
def test_a_wrong_setting_is_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TenantConfig(**{"path": "x", **given})  # type: ignore[arg-type]


def test_a_socket_is_taken_over_from_a_broker_that_ended_and_no_other(broker: Broker, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a broker listens at"):
        Broker(broker.driver, PAGE, broker.path)
    with pytest.raises(ConfigError, match="no broker answers at"):
        Client(tmp_path / "none")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="is no socket"):
        Broker(broker.driver, PAGE, file)
    with pytest.raises(ConfigError, match="no broker can listen at"):
        Broker(broker.driver, PAGE, tmp_path / "no" / "folder")
    left = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    left.bind(str(tmp_path / "left"))
    left.close()
    with lending(tmp_path / "left", PAGE) as other, Client(other.path) as client:
        assert client.standing().memory == PAGE


# -- messages ----------------------------------------------------------------------------------------------------------


def test_no_message_ends_the_broker_or_moves_anything(tmp_path: Path) -> None:
    # Its loop does not run: messages are handed to it.
    driver = HostDriver()
    broker = Broker(driver, 1 << 20, tmp_path / "broker")
    account = broker.books.join("honest", Limits(), 0.0)
    lease = broker.books.lend("honest", PAGE, 0.0)
    strangers = Strangers(broker, 31)
    strangers.send(4000)
    assert strangers.refused > 2000
    assert (broker.tenants, broker.books.accounts) == ({}, {"honest": account})
    assert account.leases == {lease: PAGE}
    broker.close()
    assert driver.live_handles == 0


def test_noise_on_the_socket_is_answered_and_hung_up_on(broker: Broker) -> None:
    rng = random.Random(7)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(60):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
            raw.connect(str(broker.path))
            raw.settimeout(5.0)
            if number % 3:
                raw.send(rng.randbytes(rng.randint(1, 60_000)))
            else:
                # Descriptors are nothing that a tenant sends.
                socket.send_fds(raw, [say.encode(say.Status())], [raw.fileno()] * (number % 7 + 1))
            answer = say.decode_answer(raw.recv(say.LONGEST))
            assert isinstance(answer, say.Refused)
            assert answer.code == "malformed"
            assert raw.recv(say.LONGEST) == b""
    until(lambda: len(os.listdir("/proc/self/fd")) == before)


def test_who_says_noise_and_is_gone_ends_nobody_else(broker: Broker) -> None:
    rng = random.Random(8)
    with Tenant(config(broker, "one")) as tenant:
        for _ in range(40):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
                raw.connect(str(broker.path))
                raw.send(rng.randbytes(30))
        assert tenant.standing().tenants[0].name == "one"


def test_who_does_not_read_its_answers_is_hung_up_on(broker: Broker) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.connect(str(broker.path))
        raw.setblocking(False)
        packet = say.encode(say.Status())
        deadline = time.monotonic() + 20.0
        while time.monotonic() < deadline:
            try:
                raw.send(packet, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                time.sleep(0.001)
            except OSError:
                break
        else:
            pytest.fail("it was never hung up on")
    assert standing(broker) == {}


def test_status_names_all_tenants_however_many_there_are(tmp_path: Path) -> None:
    driver = HostDriver()
    broker = Broker(driver, 1 << 20, tmp_path / "broker")
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mine, theirs:
        names = [f"{number:0200}" for number in range(say.MOST_TENANTS + 5)]
        for name in names:
            connection = Connection(theirs, os.getpid(), os.getuid())
            hello = say.Hello(say.VERSION, name, 1, (1 << 62) - 1, -1000, "cpu")
            assert isinstance(broker.handle(connection, say.encode(hello))[0], say.Welcome)
        stop = os.eventfd(0, os.EFD_CLOEXEC)
        thread = threading.Thread(target=broker.serve, args=(stop,))
        thread.start()
        page = broker.handle(Connection(theirs, os.getpid(), os.getuid()), say.encode(say.Status()))[0]
        assert page is not None
        assert say.LONGEST / 2 < len(say.encode(page)) < say.LONGEST
        assert [each.name for each in standing(broker).values()] == names
        os.eventfd_write(stop, 1)
        thread.join()
        os.close(stop)
    broker.close()
    driver.close()


def test_what_processes_have_on_a_card_is_asked_of_nvml_which_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    found = [SimpleNamespace(pid=7, usedGpuMemory=5000), SimpleNamespace(pid=8, usedGpuMemory=None)]
    nvml = SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: calls.append("init"),
        nvmlShutdown=lambda: calls.append("shutdown"),
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid.decode(),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: found if handle == f"GPU-{UUID(int=3)}" else [],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    driver = SimpleNamespace(device="cuda:0", identity=lambda: UUID(int=3).hex)
    asked = DeviceProcesses(cast(Driver, driver))
    looks = [asked.look() for _ in range(2)]
    assert [looks[1].bytes_beside(pid, 1000, ()) for pid in (7, 8, 9)] == [4000, None, 0]
    assert calls == ["init"]
    asked.close()
    asked.close()
    assert calls == ["init", "shutdown"]
    assert processes(str(UUID(int=3))) == 2


def test_what_an_operator_did_is_said(broker: Broker, capsys: pytest.CaptureFixture[str]) -> None:
    def said(action: str, *flags: str) -> str:
        assert main(["broker", action, "--socket", str(broker.path), *flags]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "bytes lent to 0 tenants" in said("status")
    early = said("limits", "--tenant", "one", "--ceiling", "512KiB", "--priority", "-2")
    assert early == "one is no tenant now; kept for when it comes: ceiling 524,288 bytes, priority -2"
    with Tenant(config(broker, "one")) as tenant:
        os.close(tenant.create(PAGE)[1])
        changed = said("limits", "--tenant", "one", "--floor", "64KiB")
        assert changed.startswith("one now has floor 65,536 bytes, ceiling 524,288 bytes, priority -2; ")
        assert changed.endswith("; 4,096 bytes are lent to it")
        assert said("sleep", "--tenant", "one").startswith(
            "one is told to sleep: 4,096 bytes are lent to it now, and it "
        )
        assert said("wake", "--tenant", "one").startswith("one is told to wake: ")
        status = said("status")
        assert "bytes lent to 1 tenant |" in status
        assert status.endswith(EXPLAINED)


def test_connections_that_say_nothing_keep_no_tenant_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_broker, "MOST_CONNECTIONS", 4)
    monkeypatch.setattr(of_broker, "MOST_TENANTS", 3)
    with lending(tmp_path / "broker", 1 << 20) as broker, ExitStack() as stack:
        idle = [stack.enter_context(Client(broker.path)) for _ in range(4)]
        tenants = [stack.enter_context(Tenant(config(broker, f"t{number}"))) for number in range(3)]
        # The oldest go first.
        assert [each.standing().memory for each in idle[3:]] == [1 << 20]
        with pytest.raises(BrokerLost):
            idle[0].standing()
        with pytest.raises(ConfigError, match="there are 3 tenants already"):
            Tenant(config(broker, "more"))
        monkeypatch.setattr(of_broker, "MOST_CONNECTIONS", 3)
        idle[3].close()
        until(lambda: len(broker._connections) == 3)
        with Client(broker.path) as client, pytest.raises(ConfigError, match="3 processes are connected already"):
            client.standing()
        assert all(not tenant.is_lost for tenant in tenants)


def test_a_broker_has_more_descriptors_than_select_takes(broker: Broker) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        for _ in range(1100):
            stack.callback(os.close, os.dup(0))
        with Tenant(config(broker, "one")), pytest.raises(ConfigError, match="there is a tenant 'one' already"):
            Tenant(config(broker, "one"))
        assert set(standing(broker)) <= {"one"}


def test_a_broker_without_descriptors_waits_and_does_not_spin(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0
    accept = socket.socket.accept

    def refused(listener: socket.socket) -> Any:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", refused)
    started = time.monotonic()
    with Client(broker.path) as client:
        assert client.standing().memory == 1 << 20
    assert tries == 4
    assert time.monotonic() - started > 2 * of_broker.LOOK_AGAIN_S
    # It is said once, however long it lasts.
    assert caplog.text.count("connections wait: Too many open files") == 1


def test_handles_that_are_not_released_are_tried_again_a_few_at_a_time(tmp_path: Path) -> None:
    host = HostDriver()
    calls: list[int] = []

    class Stuck(FaultyDriver):
        def release(self, handle: int) -> None:
            calls.append(handle)
            if len(calls) < 400:
                raise DriverError("CUDA_ERROR_UNKNOWN", "release", (handle,))
            super().release(handle)

    driver = Stuck(host)
    with lending(tmp_path / "broker", 1 << 20, driver) as broker, Tenant(config(broker, "one")) as tenant:
        for _ in range(60):
            lease, descriptor = tenant.create(PAGE)
            os.close(descriptor)
            tenant.release(lease, PAGE)
        assert len(calls) < 60 * (of_broker.MOST_RETRIES + 1)
        calls += [0] * 400
        for _ in range(20):
            lease, descriptor = tenant.create(PAGE)
            os.close(descriptor)
            tenant.release(lease, PAGE)
        assert len(broker._stuck) == 0
    assert host.live_handles == 0
    host.close()


# -- tenants that end, hang or lie -------------------------------------------------------------------------------------


def test_tenants_that_end_hang_or_lie_lose_their_lease_and_nobody_else_notices(broker: Broker) -> None:
    with PatternedTenantOf(broker, "survivor") as survivor:
        kinds = {"killed": "honest", "hung": "hung", "lying": "lying", "beside": "beside"}
        others = {name: TenantProcess(config(broker, name, floor="64KiB"), 1, manner) for name, manner in kinds.items()}
        for each in others.values():
            each.wait_ready()
        for _ in range(30):
            survivor.turn()
        seen = standing(broker)
        # What it says it gave back, and did not, and what it has beside the broker, is seen.
        assert (seen["lying"].lent, seen["lying"].leases) == (0, 0)
        assert (seen["lying"].beside_bytes or 0) > 0
        assert seen["beside"].beside_bytes == 16 * PAGE
        assert seen["survivor"].beside_bytes is not None
        others["killed"].kill()
        until(lambda: "killed" not in standing(broker))
        # One that hangs owes what the survivor is promised, and is overdue then; what it holds counts as lent.
        held = seen["hung"].lent
        assert held > 0
        with Client(broker.path) as client:
            client.do(say.SetLimits("hung", floor=0, ceiling=0))
            until(lambda: standing(broker)["hung"].state == "overdue")
        assert standing(broker)["hung"].lent == held
        assert broker.books.lent == held + standing(broker)["survivor"].lent + standing(broker)["beside"].lent
        for name in ("hung", "lying", "beside"):
            others[name].kill()
        until(lambda: set(broker.tenants) == {"survivor"})
        for _ in range(30):
            survivor.turn()
        assert survivor.counts["handovers"] > 0
    assert survivor.counts["foreign_bytes"] == survivor.counts["lost_bytes"] == survivor.counts["passed"] == 0


class PatternedTenantOf(PatternedTenant):
    def __init__(self, broker: Broker, name: str) -> None:
        super().__init__(config(broker, name, floor="256KiB"), 5)

    def __enter__(self) -> PatternedTenantOf:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def test_a_broker_that_is_told_to_ends_who_does_not_pay(tmp_path: Path) -> None:
    with lending(tmp_path / "broker", 1 << 20, deadline_s=0.05, kill=True) as broker:
        hung = TenantProcess(config(broker, "hung"), 1, "hung")
        hung.wait_ready()
        poor = open_tenant(config(broker, "poor", floor="1MiB"), "cpu")
        with poor.tenant.waiting(20.0):
            handle = poor.create(1 << 20)
        hung.process.join(10)
        assert hung.process.exitcode == -9
        hung.pipe.close()
        poor.release(handle)
        poor.tenant.close()


def test_tenants_of_a_broker_that_ended_keep_what_they_hold(tmp_path: Path) -> None:
    with lending(tmp_path / "broker", 1 << 20) as broker:
        tenant = PatternedTenant(config(broker, "one"), 0)
        for _ in range(4):
            assert tenant.borrow()
    assert tenant.tenant.broker_has_ended
    tenant.look()
    assert tenant.counts["lost_bytes"] == 0
    with pytest.raises(DriverError, match=r"it hung up|has ended"):
        tenant.driver.create(PAGE)
    with pytest.raises(BrokerLost, match="has ended"):
        tenant.tenant.standing()
    tenant.close()


def test_a_tenant_hears_that_its_broker_was_killed(broker: Broker) -> None:
    # Who is killed writes to no page: its end of the connection is gone. Who waits for others' memory waits no more.
    with Tenant(config(broker, "one")) as tenant:
        for connection in list(broker._connections):
            connection.socket.shutdown(socket.SHUT_RDWR)
        assert tenant.wait_for(1 << 30, 20.0)
        assert tenant.broker_has_ended
        with pytest.raises(DriverError, match="has ended; what it lent stays"):
            tenant.create(PAGE)


def test_a_tenant_is_of_one_process(broker: Broker) -> None:
    with Tenant(config(broker, "one")) as tenant:
        pid = os.fork()
        if not pid:
            try:
                tenant.create(PAGE)
            except WrongProcess:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert standing(broker)["one"].lent == 0


# -- failing calls -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_imported_goes_back(broker: Broker) -> None:
    with Tenant(config(broker, "one")) as tenant:
        faulty = FaultyDriver(HostDriver())
        driver = BrokerDriver(tenant, faulty)
        faulty.fail("import_fd")
        with pytest.raises(DriverError, match="injected"):
            driver.create(PAGE)
        assert (tenant.held, standing(broker)["one"].lent, driver.leases) == (0, 0, {})
        handle = driver.create(PAGE)
        faulty.fail("release")
        with pytest.raises(DriverError, match="injected"):
            driver.release(handle)
        assert standing(broker)["one"].lent == PAGE
        driver.release(handle)
        assert standing(broker)["one"].lent == 0


@pytest.mark.parametrize("call", ["create", "export_handle"])
def test_a_driver_call_that_fails_in_the_broker_lends_nothing(tmp_path: Path, call: str) -> None:
    inner = HostDriver()
    faulty = FaultyDriver(inner)
    with lending(tmp_path / "broker", 1 << 20, faulty) as broker, Tenant(config(broker, "one")) as tenant:
        faulty.fail(call)
        with pytest.raises(DriverError, match="injected"):
            tenant.create(PAGE)
        assert (broker.books.lent, inner.live_handles) == (0, 0)
        lease, descriptor = tenant.create(PAGE)
        os.close(descriptor)
        # What is not released is tried again with the next one.
        faulty.fail("release")
        tenant.release(lease, PAGE)
        assert (broker.books.lent, inner.live_handles) == (0, 1)
        lease, descriptor = tenant.create(PAGE)
        os.close(descriptor)
        tenant.release(lease, PAGE)
        assert inner.live_handles == 0


def test_a_driver_of_another_granularity_is_refused(broker: Broker) -> None:
    with Tenant(config(broker, "one")) as tenant, pytest.raises(ConfigError, match="extents are multiples of 4,096"):
        BrokerDriver(tenant, HostDriver(2 << 20))
