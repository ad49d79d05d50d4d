"""Prefill and decode on 64 nodes, on paper: what moving keys and values costs, by extents and by blocks of a table.

An experiment: ``python scripts/experiments/transfer_at_64_nodes.py --help``. Nothing of it ran on 64 nodes: a queueing
model over measured costs. Each input is written down with its unit and where it is from (`INPUTS`).

A request is prefilled by the node that is free first, one prompt after another. Its keys and values leave by that
node's network card, one transfer at a time; one takes as long as its bytes, or as its descriptors take the one thread
that posts them, whichever is slower. They arrive by the decode node's card, which they share. Of two decode nodes
chosen at random the one with fewer sequences gets a request; it waits there until a place of the batch is free.
Decoding steps take what they take on one GPU by the number of sequences and their tokens.

For each division of the nodes the highest rate of arrivals is looked for at which 90 of 100 requests have their first
token within ``--ttft-s`` and their later ones within ``--tpot-ms`` each.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from trtllm_vattn.arguments import amount, numbers, output, positive, seed
from trtllm_vattn.bench.harness.flags import add_trace, plot
from trtllm_vattn.bench.harness.report import result_of, write
from trtllm_vattn.bench.harness.traces import Request, fit, load_trace
from trtllm_vattn.memory.pool import CLASSES
from trtllm_vattn.transfer.ucx import nixl_installed

MIB = 1 << 20
NODES = 64
LAYERS, RANGES = 32, 2
BLOCK = 16
LAYOUTS = ("extents", "blocks")
INPUTS: dict[str, tuple[float, str, str]] = {
    "kv_bytes": (131_072, "bytes a token", "Llama-3-8B in bfloat16: 32 layers × 8 heads × 128 × 2 × 2"),
    "prefill_tokens_s": (
        35_211,
        "tokens/s of a node",
        "measured: one H200, Azure code trace, scripts/results/h200/serve_vllm.json (98.8 % of its tokens are prompts)",
    ),
    "kv_read_gb_s": (4_100, "GB/s", "measured: one H200, decode attention over flat KV at large batches"),
    "kv_capacity_tokens": (819_200, "tokens of a decode node", "100 GiB of KV on one H200"),
    "network_gb_s": (50, "GB/s of a node", "data sheet: one 400 Gb/s card (ConnectX-7); not measured"),
    "latency_us": (10, "us of a transfer", "assumed"),
    "descriptor_us": (
        6.3,
        "us of a descriptor",
        "measured: processor time of NIXL 1.5.1 over UCX 1.23.0 between two agents of one host, 16,384 descriptors of "
        "256 bytes",
    ),
}
"""By name: value, unit, source."""
STEP_MS = {1: 4.874, 8: 5.326, 32: 6.570, 64: 8.588, 128: 13.140}
"""Decode steps by sequences of 2,048 tokens; measured: one H200, scripts/results/h200/graph_vllm.json."""
STEP_CONTEXT = 2_048
STEP_S = [1e-3 * float(np.interp(sequences, list(STEP_MS), list(STEP_MS.values()))) for sequences in range(129)]
COLORS = ("#1f77b4", "#d62728", "#2ca02c")


def descriptors_of(tokens: int, layout: str) -> int:
    """How many descriptors a sequence is: one for each extent of each range, or for K and V of each layer's blocks."""
    if layout == "blocks":
        return -(-tokens // BLOCK) * LAYERS * 2
    pages = -(-tokens * int(INPUTS["kv_bytes"][0]) // RANGES // (2 * MIB))
    largest = 1 << (CLASSES - 1)
    # The fewest extents of power-of-two sizes.
    return RANGES * (pages // largest + (pages % largest).bit_count())


def measured_descriptor_us(count: int = 16_384, size: int = 256) -> float:
    """Processor time of a descriptor: listing, posting and completing it over UCX between two agents here."""
    from nixl_cu13._api import nixl_agent, nixl_agent_config

    sender, receiver = (nixl_agent(name, nixl_agent_config()) for name in ("sender", "receiver"))
    source, target = np.ones(2 * count * size, np.uint8), np.zeros(2 * count * size, np.uint8)
    for agent, array in ((sender, source), (receiver, target)):
        agent.register_memory([(array.ctypes.data, array.nbytes, 0, "")], "DRAM")
    sender.add_remote_agent(receiver.get_agent_metadata())
    best = float("inf")
    for _ in range(5):
        started = process_time()
        # With gaps, so that none are merged.
        lists = [
            sender.get_xfer_descs([(array.ctypes.data + 2 * i * size, size, 0) for i in range(count)], "DRAM")
            for array in (source, target)
        ]
        handle = sender.initialize_xfer("WRITE", *lists, "receiver")
        state = sender.transfer(handle)
        while state == "PROC":
            state = sender.check_xfer_state(handle)
        best = min(best, process_time() - started)
        sender.release_xfer_handle(handle)
    return 1e6 * best / count


def transfer_s(tokens: int, layout: str, costs: dict[str, float]) -> tuple[float, float]:
    """Seconds of one transfer, alone: on the wire, and at the sender."""
    wire = tokens * costs["kv_bytes"] / (costs["network_gb_s"] * 1e9)
    return wire, max(wire, descriptors_of(tokens, layout) * costs["descriptor_us"] * 1e-6)


def step_s(sequences: int, tokens: int, costs: dict[str, float]) -> float:
    """Seconds of a decode step of so many sequences with so many tokens together."""
    more = (tokens - sequences * STEP_CONTEXT) * costs["kv_bytes"] / (costs["kv_read_gb_s"] * 1e9)
    return max(STEP_S[sequences] + more, STEP_S[1])


@dataclass
class Decode:
    """A decode node: a batch, and who waits for a place in it."""

    costs: dict[str, float]
    now: float = 0.0
    steps: int = 0
    tokens: int = 0
    """Of the sequences in the batch."""
    ends: list[tuple[int, int, Request, float]] = field(default_factory=list)
    """By the step at which they end: number, request, and when it joined."""
    waiting: list[tuple[float, int, Request]] = field(default_factory=list)
    done: list[tuple[int, float, float]] = field(default_factory=list)
    """Requests that ended: number, when they joined, and seconds of each token."""

    @property
    def load(self) -> int:
        return len(self.ends) + len(self.waiting)

    def arrive(self, at: float, number: int, request: Request) -> None:
        """A sequence is here from a time on."""
        heapq.heappush(self.waiting, (at, number, request))

    def advance(self, until: float) -> None:
        """Decode until a time. Between two that join or end, steps are counted together."""
        while self.now < until:
            self._admit()
            if not self.ends:
                if not self.waiting or self.waiting[0][0] >= until:
                    self.now = until
                    return
                self.now = self.waiting[0][0]
                continue
            each = step_s(len(self.ends), self.tokens, self.costs)
            left = self.ends[0][0] - self.steps
            stop = min(until, self.waiting[0][0]) if self.waiting and self.waiting[0][0] > self.now else until
            count = max(1, min(left, int((stop - self.now) / each)))
            self.now += count * each
            self.steps += count
            self.tokens += count * len(self.ends)
            while self.ends and self.ends[0][0] <= self.steps:
                _, number, request, joined = heapq.heappop(self.ends)
                self.tokens -= request.prompt_tokens + request.output_tokens
                self.done.append((number, joined, (self.now - joined) / max(1, request.output_tokens - 1)))

    def _admit(self) -> None:
        while self.waiting and self.waiting[0][0] <= self.now and len(self.ends) < len(STEP_S) - 1:
            _, number, request = self.waiting[0]
            if self.tokens + request.prompt_tokens + request.output_tokens > self.costs["kv_capacity_tokens"]:
                return
            heapq.heappop(self.waiting)
            # The first token is the prefill's.
            heapq.heappush(self.ends, (self.steps + max(1, request.output_tokens - 1), number, request, self.now))
            self.tokens += request.prompt_tokens + 1


def simulate(
    trace: Sequence[Request],
    prefills: int,
    rate: float,
    layout: str,
    costs: dict[str, float],
    seconds: float = 120.0,
    random_seed: int = 0,
) -> dict[str, float]:
    """Latencies of a trace's requests, drawn at random, that arrive at a rate (a Poisson process) for so many seconds,
    with so many nodes prefilling."""
    random = np.random.default_rng(random_seed)
    requests = [trace[i] for i in random.integers(0, len(trace), max(200, int(rate * seconds)))]
    arrivals = np.cumsum(random.exponential(1 / rate, len(requests)))
    free = [(0.0, node) for node in range(prefills)]
    sends = [0.0] * prefills
    nodes = [Decode(costs) for _ in range(NODES - prefills)]
    receives = [0.0] * len(nodes)
    waits, busy = [], 0.0
    finished: list[tuple[float, int, int]] = []
    for number, (at, request) in enumerate(zip(arrivals, requests, strict=True)):
        start, node = heapq.heappop(free)
        end = max(start, float(at)) + request.prompt_tokens / costs["prefill_tokens_s"]
        heapq.heappush(free, (end, node))
        finished.append((end, number, node))
    pairs = random.integers(0, len(nodes), (len(requests), 2)).tolist()
    for (end, number, node), two in zip(sorted(finished), pairs, strict=True):
        for index in two:
            nodes[index].advance(end)
        to = min(two, key=lambda index: nodes[index].load)
        wire, sending = transfer_s(requests[number].prompt_tokens, layout, costs)
        begins = max(end, sends[node])
        sends[node] = begins + sending
        receives[to] = max(begins, receives[to]) + wire
        there = max(sends[node], receives[to]) + costs["latency_us"] * 1e-6
        busy += sending
        waits.append(there - end)
        nodes[to].arrive(there, number, requests[number])
    for each in nodes:
        while each.load:
            each.advance(each.now + 60)
    joined = {number: (when, tpot) for each in nodes for number, when, tpot in each.done}
    ttft = np.array([joined[number][0] - arrivals[number] for number in range(len(requests))])
    tpot = np.array([joined[number][1] for number in range(len(requests))])
    return {
        "ttft_p90_s": float(np.quantile(ttft, 0.9)),
        "tpot_p90_ms": 1e3 * float(np.quantile(tpot, 0.9)),
        "transfer_p50_s": float(np.median(waits)),
        "transfer_p99_s": float(np.quantile(waits, 0.99)),
        "senders_busy": busy / (float(arrivals[-1]) * prefills),
    }


def best_rate(meets: Callable[[float], bool], most: float) -> float:
    """The highest rate that meets the objectives, to 5 %; 0 where none does."""
    low, high = 0.0, most
    while high - low > 0.05 * high and high > 0.1:
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each trace, division and layout."""
    costs = {name: value for name, (value, _, _) in INPUTS.items()}
    rows = []
    for path in args.trace:
        requests = fit(load_trace(path, args.requests), args.max_seq_len, args.max_output)
        for layout in LAYOUTS:
            for prefills in args.prefills:
                row = {"trace": path.stem, "layout": layout, "prefill": prefills, "decode": NODES - prefills}
                rows.append({**row, **_best(args, requests, prefills, layout, costs)})
                print(f"{path.stem} {layout} {prefills}: {rows[-1]['rate']:.1f} requests/s", file=sys.stderr)
    return rows


def _best(
    args: argparse.Namespace, requests: list[Request], prefills: int, layout: str, costs: dict[str, float]
) -> dict[str, float]:
    def at(rate: float) -> dict[str, float]:
        return simulate(requests, prefills, rate, layout, costs, args.seconds, args.seed)

    def meets(rate: float) -> bool:
        told = at(rate)
        return told["ttft_p90_s"] <= args.ttft_s and told["tpot_p90_ms"] <= args.tpot_ms

    prompt = float(np.mean([request.prompt_tokens for request in requests]))
    rate = best_rate(meets, prefills * costs["prefill_tokens_s"] / prompt)
    return {"rate": rate, "prompt_mean": prompt, **(at(rate) if rate else {})}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Requests a second that meet the objectives, and what a request waits for its transfer then, by division."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for color, trace in zip(COLORS, dict.fromkeys(row["trace"] for row in rows), strict=False):
        for layout, style in zip(LAYOUTS, ("-o", "--x"), strict=True):
            mine = [row for row in rows if (row["trace"], row["layout"]) == (trace, layout)]
            label = f"{trace[:24]}, {layout}"
            axes[0].plot(
                [row["prefill"] for row in mine], [row["rate"] for row in mine], style, color=color, label=label
            )
            served = [row for row in mine if row["rate"]]
            p99 = [row["transfer_p99_s"] for row in served]
            axes[1].plot([row["prefill"] for row in served], p99, style, color=color, label=label)
    axes[0].set_ylabel("requests/s within the objectives")
    axes[1].set(ylabel="p99 from prefill's end to arrival, s", yscale="log")
    for axis in axes:
        axis.set_xlabel(f"nodes that prefill, of {NODES}")
    axes[0].legend(fontsize=7)
    figure.suptitle("64 nodes on paper: KV sent by extents or by blocks of a table (a model, not a run)")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best division of each trace and layout."""
    out: dict[str, Any] = {}
    for trace in dict.fromkeys(row["trace"] for row in rows):
        best = {
            layout: max((r for r in rows if (r["trace"], r["layout"]) == (trace, layout)), key=lambda row: row["rate"])
            for layout in LAYOUTS
        }
        name = trace.split("_")[0].lower()
        for layout, row in best.items():
            out[f"{name}_{layout}_requests_s"] = row["rate"]
            out[f"{name}_{layout}_prefill_nodes"] = row["prefill"]
            out[f"{name}_{layout}_transfer_p99_s"] = row.get("transfer_p99_s")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add_trace(parser, action="append", required=True)
    add("--requests", type=positive, default=2000, metavar="REQUESTS", help="of each trace")
    add("--prefills", type=numbers, default=[8, 16, 32, 48, 56], metavar="NODES,...", help="that prefill")
    add("--max-seq-len", type=positive, default=131_072, metavar="TOKENS", help="longest sequence")
    add("--max-output", type=positive, default=4_096, metavar="TOKENS", help="longest output")
    add("--seconds", type=amount, default=120.0, metavar="SECONDS", help="that requests arrive")
    add("--ttft-s", type=amount, default=5.0, metavar="SECONDS", help="objective for the first token")
    add("--tpot-ms", type=amount, default=25.0, metavar="MILLISECONDS", help="objective for each later token")
    add("--measure-descriptors", action="store_true", help="measure what a descriptor costs here (needs NIXL)")
    add("--seed", type=seed, default=0, metavar="N", help="of arrivals")
    add("--output-json", type=output, metavar="FILE")
    add("--plot", type=plot, metavar="FILE")
    args = parser.parse_args(arguments)
    if args.measure_descriptors:
        if not nixl_installed():
            parser.error("--measure-descriptors needs NIXL: pip install 'trtllm-vattn[transfer]'")
        INPUTS["descriptor_us"] = (measured_descriptor_us(), *INPUTS["descriptor_us"][1:])
    rows = run(args)
    told = summary_of(rows)
    for name, value in told.items():
        print(f"{name}: {value}")
    inputs = {name: {"value": value, "unit": unit, "source": source} for name, (value, unit, source) in INPUTS.items()}
    inputs["step_ms"] = {"value": STEP_MS, "unit": "ms by sequences", "source": "scripts/results/h200/graph_vllm.json"}
    if args.output_json:
        results = {"inputs": inputs, "runs": rows, "executed": False}
        program = "python scripts/experiments/transfer_at_64_nodes.py"
        write(result_of("transfer_at_64_nodes", args, results, told, program), args.output_json)
    if args.plot:
        draw(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
