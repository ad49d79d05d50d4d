"""Dry passes of several threads: torch's stance towards compiled code is one for the whole process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trtllm_vattn.runtime import dry_pass


def is_compiled() -> bool:
    """Whether what is compiled now is traced."""
    traced: list[int] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        traced.append(1)
        forward: Callable[..., Any] = graph.forward
        return forward

    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    return bool(traced)


def test_dry_passes_of_two_threads_leave_compiling_on() -> None:
    """The first one's end would come between the second one's begin and end."""
    inside, may_end, second = threading.Event(), threading.Event(), threading.Event()

    def first_pass() -> None:
        with dry_pass._uncompiled():
            inside.set()
            assert may_end.wait(10)

    def second_pass() -> None:
        with dry_pass._uncompiled():
            second.set()

    threads = [threading.Thread(target=each) for each in (first_pass, second_pass)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    assert not second.wait(0.05)
    may_end.set()
    for thread in threads:
        thread.join()
    assert second.is_set()
    assert is_compiled()


def test_a_dry_pass_that_fails_leaves_compiling_on() -> None:
    with pytest.raises(KeyboardInterrupt), dry_pass._uncompiled():
        raise KeyboardInterrupt
    assert is_compiled()
