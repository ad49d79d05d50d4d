"""`bench faults`: random operations on a cache while driver calls fail (verify/fault_injection.py)."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from time import perf_counter

from trtllm_vattn.arguments import adder
from trtllm_vattn.bench.harness.case import conclude
from trtllm_vattn.bench.harness.flags import add_results
from trtllm_vattn.errors import InvariantViolation
from trtllm_vattn.progress import counting
from trtllm_vattn.verify.fault_injection import FaultStress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench faults`."""
    add = adder(parser)
    add("--operations", "OPERATIONS", "operations in all", 20_000)
    add("--life", "OPERATIONS", "operations on one cache, from its construction to its close", 2_000)
    add("--life-seconds", "SECONDS", "after which the operations on one cache count as hanging", 300.0)
    add("--probability", "SHARE", "of a driver call to fail, from 0 to 1", 0.02)
    add_results(parser)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where a byte was wrong, anything was left in the driver, or a cache hung."""
    counts: Counter[str] = Counter()
    # What is set aside is warned of each time; here that is thousands of times.
    logger = logging.getLogger("trtllm_vattn")
    level = logger.level
    logger.setLevel(logging.ERROR)
    started = perf_counter()
    error = hang = None
    try:
        for number in counting(range(-(-args.operations // args.life)), "faults", "round"):
            stress = FaultStress(args.seed + number, args.probability, counts)
            stress.run_within(args.life_seconds, min(args.life, args.operations - number * args.life))
    except InvariantViolation as violation:
        error = f"life {number}: {violation}"
    except TimeoutError as late:
        hang = f"life {number}: {late}"
    finally:
        logger.setLevel(level)
    summary = {
        "operations": counts["operations"],
        "driver_calls": counts["driver calls"],
        "driver_calls_failed": counts["driver calls failed"],
        "operations_failed": counts["failed"],
        "sequences_lost": counts["lost"],
        "wrong_bytes_or_leaks": 0 if error is None else 1,
        "hangs": 0 if hang is None else 1,
        "lives": counts["lives"],
        "seconds": perf_counter() - started,
    }
    wrong = [found for found in (error, hang) if found is not None]
    conclude("faults", args, {"counts": dict(counts)}, summary, "\n".join(wrong))
    return int(bool(wrong))
