"""Exceptions, named after who has to act. A message says what was asked, what there is, and what to do."""

from __future__ import annotations


class VattnError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(VattnError, ValueError):
    """A setting or an argument cannot work; change it."""


class KVCacheOutOfMemory(VattnError):
    """No physical memory left under the budget; nothing changed. Release or preempt a sequence, or raise the budget."""


class HostMemoryFull(VattnError):
    """The host tier has no room left under its bound; nothing changed. Raise `host_memory`, end a suspended sequence,
    or compute the tokens again instead of keeping them."""


class AddressSpaceExhausted(VattnError):
    """The driver gave no virtual addresses; lower the number of slots or `max_seq_len`."""


class DriverError(VattnError):
    """A driver call failed.

    Attributes
    ----------
    code : str
        The CUresult's name (``CUDA_ERROR_OUT_OF_MEMORY``).
    call : str
        Driver-seam call that failed (``map``).
    arguments : tuple of int
        What it was called with.
    """

    def __init__(self, code: str, call: str, arguments: tuple[int, ...], detail: str = "") -> None:
        self.code, self.call, self.arguments = code, call, arguments
        shown = ", ".join(f"{argument:#x}" for argument in arguments)
        super().__init__(f"{call}({shown}) failed: {code}" + (f" ({detail})" if detail else ""))


STICKY = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        *("ILLEGAL_ADDRESS", "MISALIGNED_ADDRESS", "INVALID_ADDRESS_SPACE", "INVALID_PC", "ILLEGAL_INSTRUCTION"),
        *("LAUNCH_FAILED", "LAUNCH_TIMEOUT", "ASSERT", "HARDWARE_STACK_ERROR", "ECC_UNCORRECTABLE", "CONTAINED"),
        *("CONTEXT_IS_DESTROYED", "DEVICE_UNAVAILABLE", "EXTERNAL_DEVICE", "MPS_CLIENT_TERMINATED"),
    )
)
"""CUresults after which every call of the process on the device fails the same way (CUDA driver API, error codes: "the
process must be terminated and relaunched"), and those of a device that is gone."""
STICKY_TEXTS = (
    *("illegal memory access", "misaligned address", "global/shared address space", "invalid program counter"),
    *("illegal instruction", "unspecified launch failure", "launch timed out", "device-side assert"),
    *("hardware stack error", "uncorrectable ECC"),
)
"""The same, as torch words them behind "CUDA error:"."""


def is_device_lost(error: BaseException | None) -> bool:
    """Whether no call of this process on the device succeeds any more: by a driver call's code, or by what torch raises
    for work that failed; also as the cause of another error."""
    while error is not None:
        if isinstance(error, DriverError):
            if error.code in STICKY:
                return True
        elif isinstance(error, RuntimeError) and "CUDA error" in (text := str(error)) and _is_sticky(text):
            return True
        error = error.__cause__
    return False


def _is_sticky(text: str) -> bool:
    return any(each in text for each in STICKY_TEXTS)


class MemoryQuarantined(VattnError):
    """Memory that the driver would not unmap or release is in the way; the warning logged then has the driver's words.

    A slot in which an unmap failed is not used again: release its sequence, or `reset()` the cache. Where `close()`
    raises it, call `close()` again.
    """


class UnknownSequence(VattnError, KeyError):
    """No sequence of that id is in the cache."""

    __str__ = Exception.__str__


class SequenceSuspended(UnknownSequence):
    """A sequence's tokens are in host memory; `resume` it first."""


class DuplicateSequence(VattnError):
    """A sequence of that id is in the cache already."""


class SequenceTooLong(VattnError):
    """A sequence would outgrow `max_seq_len`, or all the memory there is for sequences; nothing changed."""


class PrefixEvicted(VattnError):
    """The tokens that a call names are not kept any more; nothing changed. Begin the sequence without them."""


class NoFreeSlot(VattnError):
    """Every slot holds a sequence; nothing changed. Release one, or build the cache with more slots."""


class ManagerClosed(VattnError):
    """The cache was used after `close()`."""


class CacheAsleep(VattnError):
    """The cache gave all its memory back to the driver by `sleep`; call `wake` first."""


class EngineClosed(ManagerClosed):
    """The engine was used after `close()`."""


class EngineAsleep(CacheAsleep):
    """The engine gave memory back by `sleep` that a call needs; call `wake` first. An engine's calls raise this one,
    whether it is the weights' memory or the cache's."""


class EngineOverloaded(VattnError):
    """As many requests are unfinished as an engine takes; nothing was queued. Try again later."""


class RequestFailed(VattnError):
    """A request ended with an error of its own; the message says which. Others go on."""


class NoTokenAllowed(RequestFailed):
    """A request ended because its own parameters (a grammar, bad words, `min_tokens`) forbid every token that could
    come next; change them. It would end so again."""


class UnmappedAccess(VattnError):
    """A replay would touch addresses with no memory behind them; it was not launched."""


class WeightsMixed(VattnError):
    """A step would compute with weights of two versions, since an update broke in the middle; it was not taken. Repeat
    the update in full, or close the engine."""


class CaptureError(VattnError):
    """A step did something that a captured graph cannot hold."""


class CacheInterrupted(VattnError):
    """A call was cut short (KeyboardInterrupt) while it changed the cache; call `reset()` or `close()`."""


class WrongProcess(VattnError):
    """A cache or driver was used in a process that was forked after it was made; nothing was touched."""


class RankLost(VattnError):
    """Another process of a tensor parallel engine ended, failed or did not answer: nothing of the engine works any more
    but `close()`. Requests that had not ended are submitted again to another engine.

    Attributes
    ----------
    rank : int
        Of the process that was lost.
    """

    def __init__(self, rank: int, message: str) -> None:
        self.rank = rank
        super().__init__(message)


class BrokerLost(VattnError):
    """The broker that lends a process its memory has ended, or does not answer. What was lent stays as it is; nothing
    more is lent until the process has another broker."""


class TransferFailed(VattnError):
    """A sequence did not get to another cache: the peer refused it, ended, or did not answer. The sender still has it,
    and the receiver holds nothing of it."""


class InvariantViolation(VattnError):
    """Our own bug: the books do not agree with one another. The message carries the numbers."""


OutOfPages = KVCacheOutOfMemory  # alias for 0.1
