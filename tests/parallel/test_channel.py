"""What ranks say to one another: errors keep their type, and whoever ends is named."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np
import pytest

from trtllm_vattn.cache.ranked import Report
from trtllm_vattn.errors import DriverError, KVCacheOutOfMemory, RankLost
from trtllm_vattn.runtime.parallel.channel import Follower, Leader, retold, told


@pytest.fixture
def pair() -> Iterator[tuple[Leader, Connection]]:
    """A leader of one rank, and that rank's end."""
    here, there = Pipe()
    leader = Leader([here], ["rank 1 (process 7)"])
    yield leader, there
    leader.close()
    there.close()


def test_errors_keep_their_type() -> None:
    error = retold(1, told(DriverError("CUDA_ERROR_UNKNOWN", "map", (4096, 2))))
    assert isinstance(error, DriverError)
    assert (error.code, error.call, error.arguments) == ("CUDA_ERROR_UNKNOWN", "map", (4096, 2))
    assert "on rank 1" in str(error)
    assert str(retold(2, told(KVCacheOutOfMemory("no room")))) == "no room (on rank 2)"
    assert isinstance(retold(2, told(KVCacheOutOfMemory("no room"))), KVCacheOutOfMemory)
    assert isinstance(retold(3, told(ValueError("odd"))), RankLost)


def test_calls_are_collected_and_sent_in_order(pair: tuple[Leader, Connection]) -> None:
    leader, there = pair
    leader.note("first", 1)
    leader.note("second")
    assert not there.poll(0)
    leader.ask("third", 3)
    assert pickle.loads(there.recv_bytes()) == (True, [("first", (1,)), ("second", ()), ("third", (3,))])
    there.send_bytes(pickle.dumps((Report(np.array([5]), (2,)), (None, None))))
    assert leader.answers() == {1: None}
    (report,) = leader.reports
    assert report.frontiers.tolist() == [5]
    assert report.broken == (2,)


def test_a_rank_that_ends_is_named_whatever_is_under_way(pair: tuple[Leader, Connection]) -> None:
    leader, there = pair
    there.close()
    with pytest.raises(RankLost, match=r"rank 1 \(process 7\) has ended"), leader.call():
        # As a collective does.
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(RankLost, match="rank 1"), leader.call():
        pass


def test_an_own_error_is_raised_as_it_is(pair: tuple[Leader, Connection], monkeypatch: pytest.MonkeyPatch) -> None:
    leader, _ = pair
    monkeypatch.setattr("trtllm_vattn.runtime.parallel.channel.LOOK_S", 0.01)
    with pytest.raises(RuntimeError, match="my own"), leader.call():
        raise RuntimeError("my own")


def test_a_follower_hears_why_all_of_it_ends() -> None:
    here, there = Pipe()
    leader, follower = Leader([here], ["rank 1"]), Follower(there)
    leader.watch.note(RankLost(2, "rank 2 has ended"))
    leader.close()
    assert follower.parting(5.0) == "rank 2 has ended"
    with pytest.raises(EOFError):
        follower.receive()
    follower.close()
