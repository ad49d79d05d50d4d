"""A process of `Ranks.start`: ``rank size device store-port port all-reduce`` as arguments, its key on stdin."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from trtllm_vattn.runtime.parallel.ranks import connect, device_of, serve


def main(arguments: list[str]) -> None:
    """Serve until rank 0 ends."""
    rank, size, device, store_port, port, all_reduce = arguments
    key = sys.stdin.buffer.read()
    torch.set_num_threads(max(1, torch.get_num_threads() // int(size)))
    connection = connect("127.0.0.1", int(port), key, int(rank))
    store = dist.TCPStore("127.0.0.1", int(store_port), int(size), False)  # type: ignore[attr-defined]
    serve(int(rank), int(size), device_of(int(rank), int(size), device), store, connection, all_reduce)


if __name__ == "__main__":
    main(sys.argv[1:])
