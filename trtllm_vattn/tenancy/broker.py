"""The broker: one process that creates a device's physical memory and lends it to others by lease (README.md).

One thread and one selector. What a message asks for is done before the next one is read; nothing that a tenant sends,
or leaves unsent, makes the broker wait.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import selectors
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import monotonic

from trtllm_vattn.errors import ConfigError, DriverError, KVCacheOutOfMemory
from trtllm_vattn.tenancy import protocol as say
from trtllm_vattn.tenancy.beside import DeviceProcesses
from trtllm_vattn.tenancy.books import Account, Books, Limits
from trtllm_vattn.tenancy.journal import HEAD, MOST, is_begun
from trtllm_vattn.tenancy.page import (
    ASLEEP,
    BROKER_ENDED,
    BUDGET,
    CEILING,
    HEARD_NEEDS,
    IS_ASLEEP,
    NEEDS,
    SHARE,
    SIZE,
    WANTS,
    Page,
    sealed_memory,
)
from trtllm_vattn.values import shown
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.cuda import CudaDriver
from trtllm_vattn.vmm.host import HostDriver

logger = logging.getLogger(__name__)

SO_PEERPIDFD = 77
"""Linux', which `socket` has no name for."""
HOST_GRANULARITY = 2 << 20
"""Of the host's memory, as a card has it."""
MOST_CONNECTIONS = 1024
MOST_TENANTS = 1024
"""With those that hung up and whose processes have not ended, and those whose processes have and who are kept."""
MOST_KEPT = 128
"""Tenants whose processes have ended."""
MOST_RETRIES = 8
"""Handles that the driver would not release, and that are tried again with each release."""
NUDGE = bytes(7) + b"\1"
LOOK_AGAIN_S = 0.05
"""How often tenants that owe memory are looked at between their messages, and after which connections are accepted
again where there were too few descriptors for one."""


@dataclass(eq=False)
class Connection:
    """A process that speaks to the broker; a tenant once it has said Hello."""

    socket: socket.socket
    pid: int
    uid: int
    tenant: Tenancy | None = None


@dataclass(eq=False)
class Tenancy:
    """What the broker has of one tenant: its process, its page, and a handle of each of its leases."""

    name: str
    pid: int
    uid: int
    account: Account
    process: int
    """A pidfd: it says when the process has ended, and can be no other process's."""
    page_file: int
    page: Page
    nudge: int
    """A pipe's end: written where the tenant should look at its page. No eventfd, whose `O_NONBLOCK` the tenant could
    take away, and fill it."""
    nudged: int
    """The end that the tenant reads, kept so that writing never fails."""
    handles: dict[int, int] = field(default_factory=dict)
    """Driver handles by lease."""
    inodes: dict[int, int] = field(default_factory=dict)
    """On the host: the file of each lease."""
    published: tuple[int, ...] = ()
    is_asleep: bool = False
    is_told: bool = False
    """Whether it was logged that it is overdue."""
    keep_s: float = 0.0
    kept_until: float | None = None
    """Until when its leases outlive its process, which has ended."""
    journal: int | None = None

    @property
    def outlives(self) -> bool:
        """Whether there is something for the next process of its name: what its journal says. Without one, nobody knows
        what lies in its leases."""
        return bool(self.keep_s) and self.journal is not None and is_begun(self.journal)


class Broker:
    """Lends a device's memory to processes on this machine.

    Parameters
    ----------
    driver : Driver
        Creates the memory, which has to be exportable (`HostDriver`, or ``CudaDriver(exportable=True)``); the broker
        does not close it.
    memory : int
        Bytes that may be lent.
    path : Path
        Of the Unix socket, which nobody else may be listening at.
    deadline_s : float
        Seconds within which a tenant gives back what others are owed.
    allow : sequence of int
        Users, by number, that may be tenants beside the broker's own.
    kill : bool
        End a tenant's process (SIGKILL) that owes memory beyond its deadline. Else it is lent nothing more, and said
        to be overdue by `status` and in the log.

    Raises
    ------
    ConfigError
        Another broker listens there, or the path cannot be.
    """

    def __init__(
        self,
        driver: Driver,
        memory: int,
        path: Path,
        *,
        deadline_s: float = 1.0,
        allow: Sequence[int] = (),
        kill: bool = False,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.driver, self.path, self.kill, self.clock = driver, path, kill, clock
        self.books = Books(memory // driver.granularity() * driver.granularity(), deadline_s)
        self.tenants: dict[str, Tenancy] = {}
        self.refused = 0
        """Messages that were answered by `Refused`."""
        self._own, self._allowed = os.getuid(), {os.getuid(), *allow}
        self._stuck: deque[int] = deque()
        """Handles that the driver would not release."""
        self._processes = DeviceProcesses(driver)
        self._selector = selectors.DefaultSelector()
        self._connections: dict[Connection, None] = {}
        """The oldest first."""
        self._socket = _listen(path, bool(allow))
        self._file = _identity(path)
        self._selector.register(self._socket, selectors.EVENT_READ, self._accept)
        self._accepts_again: float | None = None
        self._is_short = False
        """Whether the last connection was not accepted for want of descriptors."""
        self._closed = False

    # -- the loop --------------------------------------------------------------------------------------------------

    def serve(self, stop: int) -> None:
        """Answer until the descriptor `stop` is readable."""
        self._selector.register(stop, selectors.EVENT_READ, None)
        try:
            while self.answer(None):
                pass
        finally:
            self._selector.unregister(stop)

    def answer(self, timeout_s: float | None) -> bool:
        """Wait for something to do, so many seconds at most, and do it; False where it was told to stop."""
        # What a lost tenant holds is owed by nobody who could pay.
        owed = any(each.account.debts and not each.account.is_lost for each in self.tenants.values())
        if owed and (timeout_s is None or timeout_s > LOOK_AGAIN_S):
            timeout_s = LOOK_AGAIN_S
        if kept := [each.kept_until for each in self.tenants.values() if each.kept_until is not None]:
            left = max(0.0, min(kept) - self.clock())
            timeout_s = left if timeout_s is None else min(timeout_s, left)
        if self._accepts_again is not None:
            timeout_s = LOOK_AGAIN_S if timeout_s is None else min(timeout_s, LOOK_AGAIN_S)
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                return False
            # What was ready may have been closed by what came before it.
            if self._selector.get_map().get(key.fd) is key:
                key.data()
        if owed:
            self._look_at_debtors()
        if self._accepts_again is not None and self._accepts_again <= self.clock():
            self._accepts_again = None
            self._selector.register(self._socket, selectors.EVENT_READ, self._accept)
        for tenant in list(self.tenants.values()):
            if tenant.kept_until is not None and tenant.kept_until <= self.clock():
                logger.info("tenant %s: nobody took over what it left", tenant.name)
                self.bury(tenant)
        return True

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            # The other side has gone already, or there are no descriptors: it waits, and the loop does not spin on it.
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                if not self._is_short:
                    logger.warning("connections wait: %s", error.strerror)
                self._is_short = True
                self._selector.unregister(self._socket)
                self._accepts_again = self.clock() + LOOK_AGAIN_S
            return
        self._is_short = False
        connection.setblocking(False)
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        made = Connection(connection, pid, uid)
        if uid not in self._allowed:
            self._send(made, self._refuse("denied", f"user {uid} may not speak to this broker; see --allow"))
            connection.close()
            return
        if len(self._connections) >= MOST_CONNECTIONS:
            # Who looks at the broker and does not hang up keeps no tenant out.
            idle = next((each for each in self._connections if each.tenant is None), None)
            if idle is None:
                self._send(made, self._refuse("denied", f"{MOST_CONNECTIONS} processes are connected already"))
                connection.close()
                return
            self._hang_up(idle)
        self._connections[made] = None
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(made))

    def _read(self, connection: Connection) -> None:
        try:
            packet, descriptors = say.receive(connection.socket)
        except BlockingIOError:
            return
        except say.Malformed as error:
            self._send(connection, self._refuse("malformed", str(error)))
            self._hang_up(connection)
            return
        except OSError:
            packet, descriptors = b"", []
        if descriptors:
            say.close_all(descriptors)
            self._send(connection, self._refuse("malformed", "a tenant sends no descriptors"))
            packet = b""
        if not packet:
            self._hang_up(connection)
            return
        answer, beside = self.handle(connection, packet)
        try:
            if answer is not None and not self._send(connection, answer, beside):
                self._hang_up(connection)
        finally:
            if isinstance(answer, say.Lent):
                say.close_all(beside)
        if isinstance(answer, say.Refused) and answer.code == "malformed":
            self._hang_up(connection)

    def _send(self, connection: Connection, answer: say.Message, beside: Sequence[int] = ()) -> bool:
        """Whether it was sent: who does not read its answers is hung up on, and not waited for."""
        try:
            socket.send_fds(connection.socket, [say.encode(answer)], list(beside), socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def _refuse(self, code: str, message: str) -> say.Refused:
        self.refused += 1
        return say.Refused(code, message)  # type: ignore[arg-type]

    # -- messages --------------------------------------------------------------------------------------------------

    def handle(self, connection: Connection, packet: bytes) -> tuple[say.Answer | None, list[int]]:
        """Do what a packet asks for; the answer, and the descriptors that go with it. Raises nothing for any packet."""
        try:
            request = say.decode_request(packet)
            answer, beside = self._do(connection, request)
        except say.Malformed as error:
            return self._refuse("malformed", str(error)), []
        except ConfigError as error:
            return self._refuse("config", str(error)), []
        except KVCacheOutOfMemory as error:
            return self._refuse("short", str(error)), []
        except DriverError as error:
            code = "short" if error.code == "CUDA_ERROR_OUT_OF_MEMORY" else "driver"
            return self._refuse(code, str(error)), []
        except OSError as error:
            return self._refuse("driver", f"the broker's machine refused: {error.strerror}"), []
        self._publish()
        return answer, beside

    def _do(self, connection: Connection, request: say.Request) -> tuple[say.Answer | None, list[int]]:
        tenant = connection.tenant
        if connection.uid not in self._allowed:
            return self._refuse("denied", f"user {connection.uid} may not speak to this broker; see --allow"), []
        if isinstance(request, say.Hello):
            return self._welcome(connection, request)
        if isinstance(request, say.Status):
            return self.standing(request.after), []
        if isinstance(request, say.SetLimits | say.SetAsleep):
            if tenant is not None or connection.uid not in (self._own, 0):
                return self._refuse("denied", "limits are set by the broker's own user, and by no tenant"), []
            self._operate(request)
            return say.Done(), []
        if tenant is None:
            return self._refuse("denied", "say Hello first"), []
        if isinstance(request, say.Create):
            return self._create(tenant, request.size)
        if isinstance(request, say.Release):
            self.books.take_back(tenant.name, request.lease, self.clock())
            self._drop(tenant, request.lease)
        elif isinstance(request, say.Fetch):
            if request.lease not in tenant.handles:
                raise ConfigError(f"tenant {shown(tenant.name)} has no lease {request.lease}")
            return say.Lent(request.lease), [self.driver.export_handle(tenant.handles[request.lease])]
        elif isinstance(request, say.Leases):
            return say.Leased(_leases_after(tenant, request.after)), []
        elif isinstance(request, say.MakeJournal):
            return say.Done(), [self._make_journal(tenant, request.size)]
        elif isinstance(request, say.Leave):
            tenant.keep_s = 0.0
            self._drop_journal(tenant)
        elif isinstance(request, say.Need):
            self.books.need(tenant.name, request.least, self.clock())
        else:
            self._hear(tenant)
            return None, []
        return say.Done(), []

    def _welcome(self, connection: Connection, hello: say.Hello) -> tuple[say.Answer, list[int]]:
        if hello.version != say.VERSION:
            return self._refuse("version", f"version {hello.version} asked for; this broker speaks {say.VERSION}"), []
        if connection.tenant is not None:
            return self._refuse("denied", f"this process is tenant {connection.tenant.name!r} already"), []
        if hello.device != (own := self.driver.identity()):
            return self._refuse("config", f"this broker lends memory of device {own}, not of {hello.device}"), []
        if connection.pid == 0:
            text = "the tenant's process is in a namespace of processes that the broker does not see; run both in one"
            return self._refuse("config", text), []
        before = self._predecessor(connection, hello)
        if before is None and len(self.tenants) >= MOST_TENANTS:
            return self._refuse("denied", f"there are {MOST_TENANTS} tenants already; end some of them"), []
        asked = Limits(hello.floor, hello.ceiling, hello.priority)
        with ExitStack() as undo:
            process = _process_of(connection)
            undo.callback(os.close, process)
            page_file = sealed_memory("vattn-page", SIZE)
            undo.callback(os.close, page_file)
            nudged, nudge = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            undo.callback(say.close_all, [nudged, nudge])
            page = Page(page_file)
            undo.callback(page.close)
            journal = None if before is None else before.journal
            if before is None:
                account = self.books.join(hello.name, asked, self.clock())
            else:
                account = before.account
                self.books.find(hello.name, asked, self.clock())
            undo.pop_all()
        tenant = Tenancy(hello.name, connection.pid, connection.uid, account, process, page_file, page, nudge, nudged)
        tenant.keep_s, tenant.journal = hello.keep_s, journal
        if before is not None:
            tenant.handles, tenant.inodes = before.handles, before.inodes
            if before.kept_until is None:
                self._selector.unregister(before.process)
            self._forget(before)
        self.tenants[hello.name] = connection.tenant = tenant
        self._selector.register(process, selectors.EVENT_READ, lambda: self._end_process(tenant))
        logger.info("tenant %s: process %d of user %d", tenant.name, tenant.pid, tenant.uid)
        sizes = self.driver.granularity(), self.books.memory
        return (
            say.Welcome(say.VERSION, *sizes, self.books.deadline_s, _leases_after(tenant, 0)),
            [page_file, nudged, *([] if journal is None else [journal])],
        )

    def _predecessor(self, connection: Connection, hello: say.Hello) -> Tenancy | None:
        """The tenant of this name whose process has ended, or is this one and hung up, and whose leases and journal are
        gone on with. Raises ConfigError where they are another user's."""
        tenant = self.tenants.get(hello.name)
        if tenant is None:
            return None
        is_same = tenant.kept_until is None and tenant.account.is_lost and tenant.pid == connection.pid
        if is_same and tenant.outlives and hello.keep_s and tenant.uid == connection.uid:
            return tenant
        if tenant.kept_until is None and _has_ended(tenant.process):
            # It has ended a moment ago, and its turn has not come.
            self._end_process(tenant)
            tenant = self.tenants.get(hello.name)
        if tenant is None or tenant.kept_until is None:
            return None
        if tenant.uid != connection.uid:
            raise ConfigError(f"what tenant {hello.name!r} left is kept for user {tenant.uid}")
        if not hello.keep_s:
            self.bury(tenant)
            return None
        return tenant

    def _create(self, tenant: Tenancy, size: int) -> tuple[say.Answer, list[int]]:
        granularity = self.driver.granularity()
        if not size or size % granularity:
            raise ConfigError(f"{size} bytes asked for; extents are multiples of {granularity:,} bytes")
        lease = self.books.lend(tenant.name, size, self.clock())
        handle = descriptor = None
        try:
            handle = self.driver.create(size)
            descriptor = self.driver.export_handle(handle)
            if self.driver.device == "cpu":
                tenant.inodes[lease] = os.fstat(descriptor).st_ino
        except BaseException:
            self.books.take_back(tenant.name, lease, self.clock())
            if handle is not None:
                self._release(handle)
            raise
        tenant.handles[lease] = handle
        return say.Lent(lease), [descriptor]

    def _drop(self, tenant: Tenancy, lease: int) -> None:
        """Nobody has a lease any more: its memory goes back to the driver, and is never lent again."""
        tenant.inodes.pop(lease, None)
        self._release(tenant.handles.pop(lease))

    def _make_journal(self, tenant: Tenancy, size: int) -> int:
        if not tenant.keep_s or tenant.journal is not None:
            raise ConfigError(
                f"tenant {shown(tenant.name)} has a journal already"
                if tenant.journal is not None
                else f"what tenant {shown(tenant.name)} is lent does not outlive its process; say Hello with keep_s"
            )
        if not HEAD <= size <= 5 * MOST:
            raise ConfigError(f"a journal of {size:,} bytes asked for; one has {HEAD:,} to {5 * MOST:,}")
        tenant.journal = sealed_memory("vattn-journal", size)
        return tenant.journal

    def _drop_journal(self, tenant: Tenancy) -> None:
        if tenant.journal is not None:
            os.close(tenant.journal)
            tenant.journal = None

    def _release(self, handle: int) -> None:
        again = [self._stuck.popleft() for _ in range(min(MOST_RETRIES, len(self._stuck)))]
        for each in (handle, *again):
            try:
                self.driver.release(each)
            except DriverError as error:
                if each == handle:
                    logger.warning("a handle is not released, and tried again: %s", error)
                self._stuck.append(each)

    def _hear(self, tenant: Tenancy) -> None:
        tenant.is_asleep = bool(tenant.page[IS_ASLEEP])
        self.books.report(tenant.name, tenant.page[NEEDS], tenant.page[WANTS], self.clock())

    def _operate(self, request: say.SetLimits | say.SetAsleep) -> None:
        if isinstance(request, say.SetAsleep):
            if request.name not in self.tenants:
                raise ConfigError(f"there is no tenant {shown(request.name)}; see `trtllm-vattn broker status`")
            tenant = self.tenants[request.name]
            tenant.page[ASLEEP] = request.asleep
            self._nudge(tenant)
            return
        old = self.books.limits_of(request.name)
        floor = old.floor if request.floor is None else request.floor
        ceiling = old.ceiling if request.ceiling is None else request.ceiling
        priority = old.priority if request.priority is None else request.priority
        self.books.set_limits(request.name, Limits(floor, ceiling, priority), self.clock())

    # -- tenants ---------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        """Write each tenant's page anew where its numbers changed, and wake who has to give back, or waited."""
        for tenant in self.tenants.values():
            if tenant.kept_until is not None:
                continue
            account = tenant.account
            now = (account.budget, account.share, account.needs, self.books.ceiling_of(account))
            if now != tenant.published:
                before = tenant.published[0] if tenant.published else 0
                tenant.published = now
                for field_, value in zip((BUDGET, SHARE, HEARD_NEEDS, CEILING), now, strict=True):
                    tenant.page[field_] = value
                if account.held > account.budget or account.budget > before:
                    self._nudge(tenant)

    def _nudge(self, tenant: Tenancy) -> None:
        # A pipe that is full wakes the tenant as well.
        with suppress(BlockingIOError):
            os.write(tenant.nudge, NUDGE)

    def _look_at_debtors(self) -> None:
        """Hear those that owe memory, and do what is to be done about those that owe it beyond their deadline."""
        now = self.clock()
        for tenant in list(self.tenants.values()):
            if tenant.account.debts and not tenant.account.is_lost:
                self._hear(tenant)
                # It may have looked in the middle of a step, and take no other.
                self._nudge(tenant)
        for tenant in list(self.tenants.values()):
            if tenant.kept_until is not None or not tenant.account.is_overdue(now):
                tenant.is_told = False
            elif not tenant.is_told:
                tenant.is_told = True
                owed = tenant.account.held - tenant.account.share
                logger.warning(
                    "tenant %s, process %d, owes %d bytes beyond its deadline of %g s; nothing more is lent to it%s",
                    tenant.name,
                    tenant.pid,
                    owed,
                    self.books.deadline_s,
                    ", and its process is ended" if self.kill else "",
                )
                if self.kill:
                    self._kill(tenant)
        self._publish()

    def _kill(self, tenant: Tenancy) -> None:
        try:
            signal.pidfd_send_signal(tenant.process, signal.SIGKILL)
        except ProcessLookupError:
            logger.info("tenant %s, process %d, has ended meanwhile", tenant.name, tenant.pid)
        except PermissionError as error:
            text = "tenant %s, process %d of user %d, cannot be ended: %s; have root run the broker, or end it"
            logger.warning(text, tenant.name, tenant.pid, tenant.uid, error.strerror)

    def _hang_up(self, connection: Connection) -> None:
        """A connection has ended. What a tenant holds counts as lent until its process has ended, too. Idempotent."""
        if connection not in self._connections:
            return
        del self._connections[connection]
        self._selector.unregister(connection.socket)
        connection.socket.close()
        tenant, connection.tenant = connection.tenant, None
        if tenant is None:
            return
        if tenant.handles or tenant.outlives:
            self.books.lose(tenant.name, self.clock())
            self._publish()
        else:
            self.bury(tenant)

    def _end_process(self, tenant: Tenancy) -> None:
        """A tenant's process has ended, and the system took what it had mapped. What its journal says is kept, whether
        it held memory or not: requests that waited, or slept, begin anew by it."""
        if not tenant.outlives:
            self.bury(tenant)
            return
        kept = [each for each in self.tenants.values() if each.kept_until is not None]
        if len(kept) >= MOST_KEPT:
            first = min(kept, key=lambda each: each.kept_until or 0.0)
            logger.warning("tenant %s is kept no longer: %d are", first.name, MOST_KEPT)
            self.bury(first)
        self._disconnect(tenant)
        self._selector.unregister(tenant.process)
        tenant.kept_until = self.clock() + tenant.keep_s
        self.books.lose(tenant.name, self.clock())
        logger.info("tenant %s ended; what it was lent is kept for %g s", tenant.name, tenant.keep_s)
        self._publish()

    def _disconnect(self, tenant: Tenancy) -> None:
        for connection in [each for each in self._connections if each.tenant is tenant]:
            connection.tenant = None
            self._hang_up(connection)

    def bury(self, tenant: Tenancy) -> None:
        """Nothing is lent to a tenant any more: its process has ended, or it left with nothing."""
        self._disconnect(tenant)
        if tenant.kept_until is None:
            self._selector.unregister(tenant.process)
        for lease in self.books.leave(tenant.name, self.clock()):
            self._drop(tenant, lease)
        self._drop_journal(tenant)
        self._forget(tenant)
        self._publish()

    def _forget(self, tenant: Tenancy) -> None:
        del self.tenants[tenant.name]
        tenant.page.close()
        say.close_all([tenant.process, tenant.page_file, tenant.nudge, tenant.nudged])

    def standing(self, after: str = "") -> say.Standing:
        """What is lent to whom: the first tenants of names behind `after`."""
        now, books, processes = self.clock(), self.books, self._processes.look()
        tenants = []
        names = sorted(name for name in self.tenants if name > after)
        for name in names[: say.MOST_TENANTS]:
            tenant = self.tenants[name]
            account = tenant.account
            limits, overdue = account.limits, account.is_overdue(now)
            late = max((now - due for due, most in account.debts if account.held > most), default=0.0)
            state = (
                "kept"
                if tenant.kept_until is not None
                else "lost"
                if account.is_lost
                else "overdue"
                if overdue
                else "owing"
                if account.debts
                else "serving"
            )
            if state == "serving" and tenant.is_asleep:
                state = "asleep"
            tenants.append(
                say.TenantStatus(
                    name=tenant.name,
                    pid=tenant.pid,
                    uid=tenant.uid,
                    floor=account.promised,
                    ceiling=books.ceiling_of(account),
                    priority=limits.priority,
                    lent=account.held,
                    leases=len(account.leases),
                    needs=account.needs,
                    wants=account.wants,
                    share=account.share,
                    budget=account.budget,
                    state=state,  # type: ignore[arg-type]
                    overdue_s=max(0.0, late),
                    beside_bytes=processes.bytes_beside(tenant.pid, account.held, set(tenant.inodes.values())),
                )
            )
        more = len(names) > len(tenants)
        return say.Standing(self.driver.device, books.memory, books.lent, books.deadline_s, self.refused, tenants, more)

    def close(self) -> None:
        """Stop listening, and release every handle: tenants keep what they have mapped, and get no more. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for tenant in self.tenants.values():
            tenant.page[BROKER_ENDED] = 1
            self._nudge(tenant)
        for tenant in list(self.tenants.values()):
            self.bury(tenant)
        for connection in list(self._connections):
            self._hang_up(connection)
        if self._accepts_again is None:
            self._selector.unregister(self._socket)
        self._socket.close()
        if _identity(self.path) == self._file:
            self.path.unlink(missing_ok=True)
        self._selector.close()
        self._processes.close()


def _process_of(connection: Connection) -> int:
    """A pidfd of the process that made a connection, were its number another's by now. Raises OSError."""
    try:
        return connection.socket.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
    # Before Linux 6.5.
    return os.pidfd_open(connection.pid)


def _has_ended(process: int) -> bool:
    """Whether the process of a pidfd has, whatever its number: `select.select` takes none beyond 1,023."""
    ended = select.poll()
    ended.register(process, select.POLLIN)
    return bool(ended.poll(0))


def _leases_after(tenant: Tenancy, number: int) -> list[tuple[int, int]]:
    """The next leases of a tenant behind a number, with their bytes, as many as go into a message."""
    # They are entered by rising numbers.
    found = ((lease, size) for lease, size in tenant.account.leases.items() if lease > number)
    return list(islice(found, say.MOST_LEASES))


def open_exportable(device: str) -> Driver:
    """A driver of ``cpu`` or ``cuda:N`` whose memory can be handed to other processes. Raises ConfigError."""
    if device == "cpu":
        return HostDriver(HOST_GRANULARITY)
    return CudaDriver(int(device.partition(":")[2] or 0), exportable=True)


def _identity(path: Path) -> tuple[int, int] | None:
    """Of the file at a path; None where there is none."""
    try:
        there = path.stat()
    except OSError:
        return None
    return there.st_dev, there.st_ino


def _is_listened_at(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        # One that has not accepted others yet would have this one wait.
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            return True
    return True


def _listen(path: Path, for_others: bool) -> socket.socket:
    """A socket that listens at a path, in the place of one whose broker has ended. Raises ConfigError."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _bind(made, path, for_others)
    except OSError as error:
        made.close()
        raise ConfigError(f"no broker can listen at {path}: {error.strerror or error}") from error
    except BaseException:
        made.close()
        raise
    return made


def _bind(made: socket.socket, path: Path, for_others: bool) -> None:
    if path.is_socket():
        if _is_listened_at(path):
            raise ConfigError(f"a broker listens at {path} already; give another path, or end that one")
        path.unlink()
    elif path.exists():
        raise ConfigError(f"{path} is there, and is no socket; give another path")
    before = os.umask(0o111 if for_others else 0o177)
    try:
        made.bind(str(path))
    finally:
        os.umask(before)
    made.listen(128)
