"""A tenant's side: the connection to a broker, and the driver whose memory is the broker's.

Everything above the driver seam is unchanged: `BrokerDriver.create` borrows an extent, `release` gives it back.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import select
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, TypeVar

import msgspec

from trtllm_vattn.errors import BrokerLost, ConfigError, DriverError, KVCacheOutOfMemory, WrongProcess
from trtllm_vattn.tenancy import protocol as say
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.tenancy.journal import Journal, Sizes
from trtllm_vattn.tenancy.page import (
    ASLEEP,
    BROKER_ENDED,
    BUDGET,
    CEILING,
    HEARD_NEEDS,
    IS_ASLEEP,
    NEEDS,
    SHARE,
    WANTS,
    Page,
)
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.wrappers import WrappedDriver

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

T = TypeVar("T")

ANSWER_S = 10.0
"""Seconds after which a broker that does not answer counts as lost: it answers in microseconds, or is stopped."""
RETRY_S = 0.02
STOP_S = 5.0
"""Seconds that the end of the interpreter waits for a thread that gives memory back."""
NUDGES = 1 << 16
"""Bytes that are read at once of those that a broker wakes a tenant by: all that there are."""


def require_broker(path: str | Path) -> None:
    """Raise ConfigError where no broker can be at a path, for there is no socket. Nobody is asked."""
    if not Path(path).is_socket():
        raise _no_broker(path, "it is no socket" if Path(path).exists() else os.strerror(errno.ENOENT))


def _no_broker(path: str | Path, why: str) -> ConfigError:
    return ConfigError(
        f"no broker answers at {path}: {why}; start one with trtllm-vattn broker --memory BYTES --socket {path}"
    )


class Client:
    """A connection to a broker, which answers within so many seconds or counts as lost. From any thread; one request at
    a time."""

    def __init__(self, path: str | Path, answer_s: float = ANSWER_S) -> None:
        self.path, self._process = str(path), os.getpid()
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(answer_s)
        self.is_lost = False
        try:
            self._connect(monotonic() + answer_s)
        except BaseException as error:
            self._socket.close()
            if isinstance(error, OSError):
                raise self._not_there(error.strerror or str(error)) from error
            raise

    def _connect(self, until: float) -> None:
        while True:
            try:
                self._socket.connect(self.path)
                return
            except BlockingIOError:
                # More processes come at once than it has accepted.
                if monotonic() >= until:
                    raise
            sleep(RETRY_S)

    def _not_there(self, why: str) -> ConfigError:
        return _no_broker(self.path, why)

    def ask(self, request: say.Message) -> tuple[say.Answer, list[int]]:
        """One request; its answer, and the descriptors beside it, which are the caller's. Raises BrokerLost. Whom an
        interrupt keeps from the answer has lost the broker, too."""
        self._check_process()
        with self._lock:
            if self.is_lost:
                raise BrokerLost(f"the broker at {self.path} has ended; what it lent stays, and it lends nothing more")
            is_answered = False
            try:
                answer = self._exchange(request)
                is_answered = True
                return answer
            except (OSError, say.Malformed) as error:
                raise BrokerLost(
                    f"the broker at {self.path} does not answer ({error}); what it lent stays, it lends no more"
                ) from error
            finally:
                if not is_answered:
                    # What it answers later would be taken for the answer to another request.
                    self.is_lost = True
                    # Whoever waits for it in another thread hears of it.
                    with suppress(OSError):
                        self._socket.shutdown(socket.SHUT_RDWR)
                    self._socket.close()

    def _exchange(self, request: say.Message) -> tuple[say.Answer, list[int]]:
        # Who was hung up on finds what the broker had to say all the same.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.send(say.encode(request), socket.MSG_NOSIGNAL)
        try:
            packet, descriptors = say.receive(self._socket)
        except ConnectionResetError:
            # Said once, where the broker did not read what was asked; its answer lies behind that.
            packet, descriptors = say.receive(self._socket)
        if not packet:
            raise ConnectionError("it hung up")
        try:
            return say.decode_answer(packet), descriptors
        except BaseException:
            say.close_all(descriptors)
            raise

    def tell(self, request: say.Report) -> None:
        """A request without an answer; nothing where the broker has ended. It never waits: a broker that has not read
        earlier ones looks at the page behind this one, too, when it does."""
        self._check_process()
        with self._lock, suppress(OSError):
            if not self.is_lost and self._has_room():
                self._socket.send(say.encode(request), socket.MSG_NOSIGNAL)

    def _has_room(self) -> bool:
        """Whether a packet can be sent at once."""
        room = select.poll()
        room.register(self._socket, select.POLLOUT)
        return bool(room.poll(0))

    def do(self, request: say.Message) -> None:
        """A request whose answer is `Done`. Raises ConfigError where it is refused, or BrokerLost."""
        answer, descriptors = self.ask(request)
        say.close_all(descriptors)
        _check(answer, say.Done)

    def standing(self) -> say.Standing:
        """What is lent to whom, of all tenants, in as many messages as that takes. Raises ConfigError where it is
        refused, or BrokerLost."""
        found = _check(self.ask(say.Status())[0], say.Standing)
        tenants = found.tenants
        while found.more:
            found = _check(self.ask(say.Status(tenants[-1].name))[0], say.Standing)
            tenants += found.tenants
        return msgspec.structs.replace(found, tenants=tenants)

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise WrongProcess(f"this connection to a broker was made in process {self._process}; make one here")

    def close(self) -> None:
        """Hang up; in a forked child, close its copy of the connection. Idempotent."""
        if self._process != os.getpid():
            # Whoever held it when the child was made is not in the child.
            self._lock = threading.Lock()
        with self._lock:
            self.is_lost = True
            self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _check(answer: say.Answer, kind: type[T]) -> T:
    """An answer of the kind that is waited for. Raises ConfigError for another one."""
    if isinstance(answer, kind):
        return answer
    said = answer.message if isinstance(answer, say.Refused) else f"it answered {type(answer).__name__}"
    raise ConfigError(f"the broker refuses: {said}")


class Tenant(Client):
    """A process that a broker lends memory to.

    Parameters
    ----------
    device : str
        `Driver.identity` of the device, which has to be the broker's.

    Attributes
    ----------
    budget : int
        Bytes that it may hold now; less than it holds where it owes the rest.

    Raises
    ------
    ConfigError
        There is no broker, or it refuses: the message says why.
    """

    def __init__(self, config: TenantConfig, device: str = "cpu") -> None:
        super().__init__(config.path)
        self.config = config
        self.name = config.name or f"pid-{os.getpid()}"
        self.patience_s = 0.0
        """How long `create` waits for memory that others have to give back first."""
        hello = say.Hello(
            say.VERSION,
            self.name,
            config.floor,  # type: ignore[arg-type]
            config.ceiling,  # type: ignore[arg-type]
            config.priority,
            device,
            float(config.keep_s),
        )
        descriptors: list[int] = []
        try:
            answer, descriptors = self.ask(hello)
            self.welcome = _check(answer, say.Welcome)
            self.leases = self.welcome.leases
            """Those of the process before this one, with their bytes."""
            while more := self._leases_after(self.leases):
                self.leases += more
            self.page = Page(descriptors[0])
            self.journal = Journal(descriptors[2]) if len(descriptors) > 2 else None
        except BaseException as error:
            self.close()
            say.close_all(descriptors)
            if isinstance(error, BrokerLost):
                raise self._not_there("it ended, or hung, while this process became its tenant") from error
            raise
        say.close_all([descriptors[0], *descriptors[2:]])
        self.held = sum(size for _, size in self.leases)
        self._watch = _Watch(descriptors[1], self.page, self._socket.fileno(), self._lose)

    def _lose(self) -> None:
        """The broker's process has ended, by whatever: nobody waits for it any more."""
        self.is_lost = True

    @property
    def deadline_s(self) -> float:
        """Seconds within which what is asked back has to be given back."""
        return self.welcome.deadline_s

    @property
    def budget(self) -> int:
        return self.page[BUDGET]

    @property
    def share(self) -> int:
        """Bytes that it may hold once others have given back what they owe."""
        return self.page[SHARE]

    @property
    def ceiling(self) -> int:
        """Bytes that it may ever hold."""
        return self.page[CEILING]

    @property
    def wanted(self) -> int:
        """Bytes that it said last it could use."""
        return self.page[WANTS]

    @property
    def heard_needs(self) -> int:
        """The needs that `budget` was worked out from."""
        return self.page[HEARD_NEEDS]

    @property
    def asked_to_sleep(self) -> bool:
        """Whether the broker's operator wants this tenant to sleep."""
        return bool(self.page[ASLEEP]) and not self.broker_has_ended

    @property
    def broker_has_ended(self) -> bool:
        """Whether nothing more is lent, or asked back."""
        return self.is_lost or bool(self.page[BROKER_ENDED])

    def report(self, needs: int, wants: int, is_asleep: bool = False) -> None:
        """Tell the broker what running sequences use of what is held, and what could be used now, in bytes; it is told
        when that has changed. No system call where it has not."""
        page = self.page
        if (needs, wants, is_asleep) != (page[NEEDS], page[WANTS], bool(page[IS_ASLEEP])):
            self._check_process()
            page[NEEDS], page[WANTS], page[IS_ASLEEP] = needs, wants, is_asleep
            self.tell(say.Report())

    def _leases_after(self, known: list[tuple[int, int]]) -> list[tuple[int, int]]:
        if len(known) < say.MOST_LEASES:
            return []
        return _check(self.ask(say.Leases(known[-1][0]))[0], say.Leased).leases

    def open_journal(self, sizes: Sizes) -> Journal:
        """The journal of what outlives this process: that of the process before it, or a new one. Raises ConfigError
        where the broker refuses, or it would be too large."""
        if self.journal is None:
            answer, descriptors = self.ask(say.MakeJournal(sizes.file_bytes))
            try:
                _check(answer, say.Done)
                self.journal = Journal(descriptors[0])
            finally:
                say.close_all(descriptors)
        self.journal.placements = sizes.placements
        return self.journal

    def leave(self) -> None:
        """Nothing outlives this process any more: what is lent to it ends with it."""
        with suppress(BrokerLost):
            self.do(say.Leave())

    def need(self, least: int) -> None:
        """It cannot do with less than so many bytes. Raises ConfigError where the broker cannot promise them."""
        self.do(say.Need(least))

    def create(self, size: int) -> tuple[int, int]:
        """Borrow an extent; its lease and its descriptor, which is the caller's. Raises DriverError."""
        until = monotonic() + self.patience_s
        while True:
            try:
                answer, descriptors = self.ask(say.Create(size))
            except BrokerLost as error:
                raise DriverError("CUDA_ERROR_OUT_OF_MEMORY", "create", (size,), str(error)) from error
            if isinstance(answer, say.Lent) and len(descriptors) == 1:
                self.held += size
                return answer.lease, descriptors[0]
            say.close_all(descriptors)
            is_short = isinstance(answer, say.Refused) and answer.code == "short"
            if not is_short or monotonic() >= until:
                code = "CUDA_ERROR_OUT_OF_MEMORY" if is_short else "CUDA_ERROR_UNKNOWN"
                said = getattr(answer, "message", "the broker sent no memory")
                raise DriverError(code, "create", (size,), said) from (KVCacheOutOfMemory(said) if is_short else None)
            self.report(self.page[NEEDS], max(self.page[WANTS], self.held + size))
            if self.budget >= self.held + size:
                # The device itself is short: others may have let go of handles whose memory is not back yet.
                self.wait_for_change(min(RETRY_S, until - monotonic()))
            else:
                self.wait_for(self.held + size, until - monotonic())

    def fetch(self, lease: int) -> int:
        """The descriptor of a lease that the process before this one had; the caller's. Raises DriverError."""
        try:
            answer, descriptors = self.ask(say.Fetch(lease))
        except BrokerLost as error:
            raise DriverError("CUDA_ERROR_OUT_OF_MEMORY", "fetch", (lease,), str(error)) from error
        if isinstance(answer, say.Lent) and len(descriptors) == 1:
            return descriptors[0]
        say.close_all(descriptors)
        raise DriverError("CUDA_ERROR_INVALID_HANDLE", "fetch", (lease,), getattr(answer, "message", "no memory came"))

    def release(self, lease: int, size: int) -> None:
        """Give a lease back, which is mapped nowhere here and whose handle is released."""
        self.held -= size
        # Where the broker has ended, its handle has, too: the memory is free.
        with suppress(BrokerLost):
            self.do(say.Release(lease))

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """Inside this context `create` waits for memory that others have to give back first."""
        before, self.patience_s = self.patience_s, seconds
        try:
            yield
        finally:
            self.patience_s = before

    def wait_for(self, budget: int, timeout_s: float) -> bool:
        """Whether the budget is so large within so many seconds."""
        return self._watch.wait(lambda: self.budget >= budget or self.broker_has_ended, timeout_s)

    def wait_for_change(self, timeout_s: float) -> None:
        """Return when the budget has changed, or after so many seconds."""
        before = self.budget
        self._watch.wait(lambda: self.budget != before or self.broker_has_ended, timeout_s)

    def on_change(self, call: Callable[[], None]) -> None:
        """Have a method called, in a thread of this tenant's, each time the broker changed the page. A method's object
        is not kept alive."""
        self._watch.call = weakref.WeakMethod(call)

    def close(self) -> None:
        """Hang up; the broker lends nothing more, and what was lent counts until the process ends. Idempotent."""
        super().close()
        if hasattr(self, "_watch"):
            self._watch.close()
            if self.journal is not None:
                self.journal.close()
                self.journal = None


class _Watch:
    """A thread that reads what the broker writes to wake a tenant, sees when the broker's end of the connection is
    gone, and tells those that wait."""

    def __init__(self, nudge: int, page: Page, connection: int, lose: Callable[[], None]) -> None:
        self._nudge, self._page, self._connection = nudge, page, connection
        self._lose = weakref.WeakMethod(lose)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._changed = threading.Condition()
        self.call: weakref.WeakMethod[Callable[[], None]] | None = None
        self._thread = threading.Thread(target=self._run, name="vattn-tenant", daemon=True)
        self._thread.start()
        _watches.add(self)

    def _run(self) -> None:
        waiting = select.poll()
        waiting.register(self._nudge, select.POLLIN)
        waiting.register(self._stop, select.POLLIN)
        # For its end alone, of which a broker that was killed wrote nothing.
        waiting.register(self._connection, 0)
        while True:
            ready = {descriptor for descriptor, _ in waiting.poll()}
            if self._stop in ready:
                return
            if self._connection in ready:
                waiting.unregister(self._connection)
                if (lose := self._lose()) is not None:
                    lose()
            if self._nudge in ready and not self._read():
                waiting.unregister(self._nudge)
            with self._changed:
                self._changed.notify_all()
            call = self.call() if self.call is not None else None
            if call is not None:
                try:
                    call()
                except Exception as error:
                    # The engine's next step does the same, and raises what it meets.
                    logger.warning("what the broker asked back was not given back beside the steps: %s", error)

    def _read(self) -> bool:
        """Whether the broker's end is there still, which is readable for ever once it is not."""
        try:
            return bool(os.read(self._nudge, NUDGES))
        except BlockingIOError:
            return True

    def wait(self, fits: Callable[[], bool], timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(fits, max(0.0, timeout_s))

    def close(self, timeout_s: float | None = None) -> None:
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            os.eventfd_write(self._stop, 1)
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return
            os.close(self._nudge)
            os.close(self._stop)
            self._page.close()


_watches: weakref.WeakSet[_Watch] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """A thread that comes back from a driver call to an interpreter that is gone would end the process."""
    for watch in list(_watches):
        watch.close(STOP_S)


# A forked child has none of its parent's threads.
os.register_at_fork(after_in_child=_watches.clear)


class BrokerDriver(WrappedDriver):
    """A driver whose memory is a broker's. Addresses, mappings and fences are its own process's.

    A handle is not released while it is mapped, which the owners above the seam see to: the broker takes a release for
    the end of a tenant's use.

    Parameters
    ----------
    tenant : Tenant
        The driver does not close it.
    inner : Driver
        Of the broker's device, and of its granularity; else ConfigError is raised.

    Attributes
    ----------
    leases : dict
        Lease and bytes, by handle.
    """

    def __init__(self, tenant: Tenant, inner: Driver) -> None:
        super().__init__(inner)
        if tenant.welcome.granularity != inner.granularity():
            raise ConfigError(
                f"the broker's extents are multiples of {tenant.welcome.granularity:,} bytes, this driver's of "
                f"{inner.granularity():,}; make the driver with the broker's granularity"
            )
        self.tenant = tenant
        self.leases: dict[int, tuple[int, int]] = {}
        self._left: set[int] = set()
        """Handles of leases that the process before this one had, until this one goes on with them."""

    def create(self, size: int) -> int:
        lease, descriptor = self.tenant.create(size)
        try:
            handle = self.inner.import_fd(descriptor, size)
        except BaseException:
            self.tenant.release(lease, size)
            raise
        finally:
            os.close(descriptor)
        self.leases[handle] = lease, size
        return handle

    def take_over(self, lease: int, size: int) -> int:
        """A handle of a lease that the process before this one had. Until `go_on` its release leaves the lease to the
        next process. Raises DriverError."""
        descriptor = self.tenant.fetch(lease)
        try:
            handle = self.inner.import_fd(descriptor, size)
        finally:
            os.close(descriptor)
        self.leases[handle] = lease, size
        self._left.add(handle)
        return handle

    def go_on(self) -> None:
        """What was taken over is this process's own from now on: its journal says so."""
        self._left.clear()

    @property
    def journal(self) -> Journal:
        """Of the tenant. Raises ConfigError where nothing outlives its process."""
        if self.tenant.journal is None:
            raise ConfigError("what this tenant is lent does not outlive its process; give TenantConfig(keep_s=...)")
        return self.tenant.journal

    def lease_of(self, handle: int) -> int:
        """The lease of a handle."""
        return self.leases[handle][0]

    def leave(self) -> None:
        """Have nothing outlive the tenant's process any more."""
        self.tenant.leave()

    def release(self, handle: int) -> None:
        self.inner.release(handle)
        lease = self.leases.pop(handle, None)
        if lease is not None and handle not in self._left:
            self.tenant.release(*lease)


def open_tenant(config: TenantConfig, device: str) -> BrokerDriver:
    """A driver of a device (``cpu``, ``cuda:N``) whose memory is a broker's; `BrokerDriver.tenant` is to be closed.
    Raises ConfigError: no such device, no broker, or it refuses."""
    if device == "cpu":
        tenant = Tenant(config)
        inner: Driver = HostDriver(tenant.welcome.granularity)
    else:
        inner = open_driver(device)
        tenant = Tenant(config, inner.identity())
    try:
        return BrokerDriver(tenant, inner)
    except BaseException:
        tenant.close()
        raise
