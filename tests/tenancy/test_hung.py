"""A broker and tenants that hang, lie or end in the middle of what they say: nobody waits for ever, or for the wrong
answer."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from tenancy.lending import lending

from trtllm_vattn.errors import BrokerLost, ConfigError, DriverError, WrongProcess
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.tenancy import protocol as say
from trtllm_vattn.tenancy import tenant as of_tenant
from trtllm_vattn.tenancy.broker import Broker, Connection
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.tenancy.tenant import Client, Tenant
from trtllm_vattn.vmm.host import HostDriver


@pytest.fixture
def deaf(tmp_path: Path) -> Iterator[socket.socket]:
    """What listens at a path, and reads nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as made:
        made.bind(str(tmp_path / "deaf"))
        made.listen(1)
        yield made


def test_a_tenant_that_fills_what_wakes_it_never_makes_the_broker_wait(broker: Broker) -> None:
    with Tenant(TenantConfig(str(broker.path), "liar")) as tenant, Client(broker.path, answer_s=3.0) as client:
        tenant._watch._thread.join(0)
        mine = tenant._watch._nudge
        os.eventfd_write(tenant._watch._stop, 1)
        tenant._watch._thread.join()
        # Whatever it is that wakes this tenant: filled, and such that writing to it waits.
        theirs = os.open(f"/proc/self/fd/{mine}", os.O_WRONLY | os.O_NONBLOCK)
        with suppress(BlockingIOError):
            while os.write(theirs, b"\xff" * 7 + b"\xfe"):
                pass
        os.set_blocking(mine, True)
        for ceiling in (1 << 19, 1 << 20) * 2:
            client.do(say.SetLimits("liar", 0, ceiling))
        os.close(theirs)
        os.close(mine)


def test_a_broker_that_may_not_end_a_process_says_so_and_lends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    with (
        lending(tmp_path / "broker", 1 << 20, kill=True, deadline_s=0.0) as broker,
        Tenant(TenantConfig(str(broker.path), "one")) as tenant,
        Client(broker.path) as client,
        caplog.at_level(logging.WARNING),
    ):
        lease, descriptor = tenant.create(8192)
        os.close(descriptor)
        client.do(say.SetLimits("one", 0, 4096))
        until = monotonic() + 10.0
        while "cannot be ended" not in caplog.text:
            assert monotonic() < until
            assert len(client.standing().tenants) == 1
        assert client.standing().tenants[0].state == "overdue"
        tenant.release(lease, 8192)


def test_a_tenants_process_is_the_one_that_connected_whosever_its_number_is_now(broker: Broker) -> None:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mine, theirs:
        connection = Connection(theirs, 1, os.getuid())
        answer, _ = broker.handle(connection, say.encode(say.Hello(say.VERSION, "one", device="cpu")))
        assert isinstance(answer, say.Welcome)
        assert connection.tenant is not None
        info = Path(f"/proc/self/fdinfo/{connection.tenant.process}").read_text()
        assert f"Pid:\t{os.getpid()}\n" in info
        broker.bury(connection.tenant)


def test_reports_never_wait_for_a_broker_that_hangs(deaf: socket.socket) -> None:
    with Client(deaf.getsockname(), answer_s=1.0) as client:
        for _ in range(500):
            started = monotonic()
            client.tell(say.Report())
            assert monotonic() - started < 0.9


def test_whom_an_interrupt_keeps_from_an_answer_takes_it_for_no_other(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = say.receive

    def interrupt(connection: socket.socket) -> tuple[bytes, list[int]]:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return receive(connection)

    with Tenant(TenantConfig(str(broker.path), "one")) as tenant:
        with monkeypatch.context() as once:
            once.setattr(say, "receive", interrupt)
            with pytest.raises(KeyboardInterrupt):
                tenant.ask(say.Status())
        # Whoever waits hears of it.
        assert tenant.wait_for(1 << 30, 5.0)
        with pytest.raises(BrokerLost):
            tenant.ask(say.Create(4096))


def test_an_answer_of_another_version_leaves_no_descriptor(deaf: socket.socket) -> None:
    with Client(deaf.getsockname()) as client:
        theirs, _ = deaf.accept()
        with theirs, open(os.devnull) as file:
            socket.send_fds(theirs, [b"\xc1"], [file.fileno()])
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(BrokerLost, match="speaks another version"):
                client.ask(say.Status())
            assert len(os.listdir("/proc/self/fd")) == before - 1


def test_a_tenant_of_a_broker_that_ended_does_not_spin(tmp_path: Path) -> None:
    class Woken:
        times = 0

        def count(self) -> None:
            self.times += 1

    woken = Woken()
    with lending(tmp_path / "broker", 1 << 20) as broker:
        tenant = Tenant(TenantConfig(str(broker.path), "one"))
        tenant.on_change(woken.count)
    assert tenant.wait_for(1 << 30, 5.0)
    tenant._watch.wait(lambda: woken.times > 20, 0.1)
    assert woken.times <= 20
    tenant.close()


def test_processes_that_come_together_wait_to_be_accepted(deaf: socket.socket) -> None:
    path, others = deaf.getsockname(), [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
    while others[-1].connect_ex(path) == 0:
        others.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        others[-1].setblocking(False)
    # One that begins there does not wait for it, either.
    with pytest.raises(ConfigError, match="a broker listens at"):
        Broker(HostDriver(), 1 << 20, Path(path))
    made: list[Client] = []
    thread = threading.Thread(target=lambda: made.append(Client(path)))
    thread.start()
    deaf.settimeout(20.0)
    # Those that came before it, of which the last one did not, and it.
    others += [deaf.accept()[0] for _ in others]
    thread.join()
    made[0].close()
    for each in others:
        each.close()


def test_a_path_that_is_too_long_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="AF_UNIX path too long"):
        Client(tmp_path / ("x" * 200))


def test_a_broker_that_ends_leaves_anothers_socket(tmp_path: Path) -> None:
    driver = HostDriver()
    first = Broker(driver, 1 << 20, tmp_path / "broker")
    first.path.unlink()
    second = Broker(driver, 1 << 20, first.path)
    first.close()
    assert second.path.exists()
    second.close()
    assert not second.path.exists()
    driver.close()


def test_who_reads_a_tenant_that_is_closed_finds_what_it_said_last(broker: Broker) -> None:
    tenant = Tenant(TenantConfig(str(broker.path), "one"))
    tenant.report(4096, 8192)
    tenant.close()
    # As a handler does at the end of the interpreter.
    assert (tenant.asked_to_sleep, tenant.broker_has_ended, tenant.wanted) == (False, True, 8192)
    tenant.report(0, 0)


def test_a_forked_child_says_nothing_for_its_parent(broker: Broker) -> None:
    with Tenant(TenantConfig(str(broker.path), "one")) as tenant:
        tenant.report(4096, 8192)
        pid = os.fork()
        if not pid:
            try:
                tenant.report(0, 0)
            except WrongProcess:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert tenant.wanted == 8192


def test_a_forked_child_closes_its_copy_whoever_was_asking(broker: Broker) -> None:
    with Tenant(TenantConfig(str(broker.path), "one")) as tenant:
        tenant._lock.acquire()
        pid = os.fork()
        if not pid:
            signal.alarm(5)
            tenant.close()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        tenant._lock.release()
        # It is the parent's still.
        assert isinstance(tenant.ask(say.Status())[0], say.Standing)


def test_the_end_of_the_interpreter_waits_a_while_for_who_gives_memory_back(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck:
        began, ends = threading.Event(), threading.Event()

        def wait(self) -> None:
            self.began.set()
            self.ends.wait(20.0)

    stuck = Stuck()
    monkeypatch.setattr(of_tenant, "STOP_S", 0.01)
    with Tenant(TenantConfig(str(broker.path), "one")) as tenant, Client(broker.path) as client:
        tenant.on_change(stuck.wait)
        client.do(say.SetLimits("one", 0, 8192))
        client.do(say.SetLimits("one", 0, 16384))
        assert stuck.began.wait(5.0)
        started = monotonic()
        of_tenant._stop_all()
        assert monotonic() - started < 10.0
        stuck.ends.set()


def test_why_a_broker_lends_no_more_is_said(broker: Broker) -> None:
    with Tenant(TenantConfig(str(broker.path), "one", ceiling=4096)) as tenant:
        with pytest.raises(DriverError, match="OUT_OF_MEMORY") as found:
            tenant.create(8192)
        assert "tenant 'one' has 0 of 4,096 bytes" in str(found.value.__cause__)


class _Ends(Exception):
    """The broker's process does."""


@pytest.mark.parametrize(("keep_s", "packets"), [(0.0, 0), (0.0, 1), (0.0, 2), (60.0, 0), (60.0, 1), (60.0, 3)])
def test_a_broker_that_ends_while_an_engine_starts_is_named(tmp_path: Path, keep_s: float, packets: int) -> None:
    message = "ended while this engine started" if packets else "no broker answers at .*: it ended, or hung, while"
    with lending(tmp_path / "broker", 1 << 20) as broker:
        left, read, handle = [packets], broker._read, broker.handle

        def ending(connection: Connection, packet: bytes) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise _Ends
            return handle(connection, packet)

        def reading(connection: Connection) -> None:
            try:
                read(connection)
            except _Ends:
                # As the kernel does with those of a process that is killed.
                for each in list(broker._connections):
                    each.socket.shutdown(socket.SHUT_RDWR)

        broker.handle, broker._read = ending, reading  # type: ignore[method-assign]
        config = TenantConfig(str(broker.path), "one", keep_s=keep_s)
        with pytest.raises(ConfigError, match=message):
            Engine.from_pretrained(
                "tiny-llama", broker=config, prefix_cache=False, device="cpu", max_seqs=2, max_seq_len=64
            )
