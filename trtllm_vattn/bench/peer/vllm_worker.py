"""vLLM behind a pipe: commands come as lines of JSON on stdin, each is answered by one line on stdout.

Written against vLLM 0.26's public interface: `LLM` and its `llm_engine` where everything arrives at once and for steps,
which is how its offline benchmarks run it; `AsyncLLM`, as `vllm serve` makes it, for requests that arrive over time.
Its own defaults hold but for the bytes of KV, random weights of the shape that `folder`/config.json names, no
tokenizer, greedy sampling and outputs of exact lengths.

  {"do": "hello"}    versions, or null where vLLM is not installed
  {"do": "start", "kind": "offline" or "server", "folder": FOLDER, "kv_bytes": N, "max_model_len": N, "seed": N}
  {"do": "serve", "prompts": [[id, ...], ...], "outputs": [N, ...], "arrivals": [SECONDS, ...]}
  {"do": "decode", "batch": N, "context": N, "steps": N, "vocab": N}    offline alone
  {"do": "stop"}

An answer is {"ok": ...} or {"error": TEXT}. The end of stdin is "stop". This file is run by its path in the peer's
interpreter, and imports nothing of this package.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import random
import signal
import threading
import traceback
from time import perf_counter, sleep
from typing import Any

PACKAGES = ("vllm", "torch", "triton", "transformers", "flashinfer-python")
LITTLE = 0.05
"""Of the card's memory: vLLM refuses to start unless so much is free. How much it takes says `kv_bytes`."""


def versions() -> dict[str, str]:
    """Of what the peer runs on, by package; and Python's."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def engine_arguments(command: dict[str, Any]) -> dict[str, Any]:
    """What both kinds of engine are made with."""
    return {
        "model": command["folder"],
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": command["kv_bytes"],
        "gpu_memory_utilization": LITTLE,
        "max_model_len": command["max_model_len"],
        "seed": command["seed"],
    }


def settings(config: Any) -> dict[str, Any]:
    """What vLLM made of its defaults, for the report; what a version does not name is missing."""
    wanted = {
        "cache_config": ("num_gpu_blocks", "block_size", "enable_prefix_caching"),
        "scheduler_config": ("max_num_seqs", "max_num_batched_tokens", "async_scheduling", "enable_chunked_prefill"),
        "model_config": ("max_model_len",),
        "compilation_config": ("cudagraph_mode",),
    }
    found: dict[str, Any] = {}
    for part, names in wanted.items():
        for name in names:
            value = getattr(getattr(config, part, None), name, None)
            found[name] = value if isinstance(value, int | float | bool | None) else str(value)
    return found


def sampling(tokens: int) -> Any:
    """Greedy, and exactly so many tokens, each told as it comes."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0, ignore_eos=True, max_tokens=tokens, detokenize=False, output_kind=RequestOutputKind.DELTA
    )


def prompt(tokens: list[int]) -> dict[str, Any]:
    """A prompt of token ids, as vLLM takes it."""
    return {"prompt_token_ids": tokens}


class Offline:
    """`LLM`, stepped here."""

    def __init__(self, command: dict[str, Any]) -> None:
        from vllm import LLM

        self._engine = LLM(**engine_arguments(command)).llm_engine
        self.config = self._engine.vllm_config
        self._runs = 0

    def serve(self, command: dict[str, Any]) -> dict[str, Any]:
        prompts, outputs, arrivals = (command[name] for name in ("prompts", "outputs", "arrivals"))
        params = [sampling(tokens) for tokens in outputs]
        self._runs += 1
        index = {f"{self._runs}-{i}": i for i in range(len(prompts))}
        names = list(index)
        times: list[list[float]] = [[] for _ in prompts]
        submitted, started = 0, perf_counter()
        while submitted < len(prompts) or self._engine.has_unfinished_requests():
            now = perf_counter() - started
            while submitted < len(prompts) and arrivals[submitted] <= now:
                self._engine.add_request(names[submitted], prompt(prompts[submitted]), params[submitted])
                submitted += 1
            if not self._engine.has_unfinished_requests():
                sleep(max(0.0, arrivals[submitted] - now))
                continue
            for output in self._engine.step():
                now = perf_counter() - started
                times[index[output.request_id]] += [now] * len(output.outputs[0].token_ids)
        return {"times": times, "errors": [None] * len(prompts), "seconds": perf_counter() - started}

    def decode(self, command: dict[str, Any]) -> dict[str, Any]:
        """Milliseconds from one step's tokens to the next's, of steps in which all sequences decode; their mean length
        over the window is `context`."""
        batch, steps = command["batch"], command["steps"]
        length = max(1, command["context"] - steps // 2)
        # The first ones decode while the last still go in.
        most = self.config.scheduler_config.max_num_batched_tokens
        tokens = steps + -(-batch * length // most) + 5
        self._runs += 1
        own = random.Random(self._runs)
        for i in range(batch):
            ids = [own.randrange(command["vocab"]) for _ in range(length)]
            self._engine.add_request(f"{self._runs}-{i}", prompt(ids), sampling(tokens))
        stamps: list[tuple[float, int]] = []
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            if came := sum(len(output.outputs[0].token_ids) for output in outputs):
                stamps.append((perf_counter(), came))
        full = [
            1e3 * (now - before)
            for (before, came_before), (now, came) in itertools.pairwise(stamps)
            if came == came_before == batch
        ]
        # The last prompt's shadow.
        return {"step_ms": full[2:]}

    def close(self) -> None:
        pass


class Server:
    """`AsyncLLM`, as `vllm serve` makes it."""

    def __init__(self, command: dict[str, Any]) -> None:
        self._loop = asyncio.new_event_loop()
        self._engine = self._loop.run_until_complete(self._made(engine_arguments(command)))
        self.config = self._engine.vllm_config
        self._runs = 0

    async def _made(self, arguments: dict[str, Any]) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), usage_context=UsageContext.OPENAI_API_SERVER)

    def serve(self, command: dict[str, Any]) -> dict[str, Any]:
        return self._loop.run_until_complete(self._served(command))

    async def _served(self, command: dict[str, Any]) -> dict[str, Any]:
        prompts, outputs, arrivals = (command[name] for name in ("prompts", "outputs", "arrivals"))
        params = [sampling(tokens) for tokens in outputs]
        times: list[list[float]] = [[] for _ in prompts]
        self._runs += 1
        started = perf_counter()

        async def one(i: int) -> None:
            if (early := arrivals[i] - (perf_counter() - started)) > 0:
                await asyncio.sleep(early)
            async for output in self._engine.generate(prompt(prompts[i]), params[i], f"{self._runs}-{i}"):
                now = perf_counter() - started
                times[i] += [now] * len(output.outputs[0].token_ids)

        ended = await asyncio.gather(*(one(i) for i in range(len(prompts))), return_exceptions=True)
        seconds = perf_counter() - started
        errors = [None if error is None else f"{type(error).__name__}: {error}" for error in ended]
        return {"times": times, "errors": errors, "seconds": seconds}

    def close(self) -> None:
        self._engine.shutdown()


class Worker:
    """Answers commands."""

    def __init__(self) -> None:
        self._engine: Offline | Server | None = None

    def answer(self, command: dict[str, Any]) -> Any:
        do = command.get("do")
        if do == "hello":
            return versions() if importlib.util.find_spec("vllm") else None
        if do == "start":
            return self._start(command)
        if do not in ("serve", "decode") or not hasattr(self._engine, do):
            raise ValueError(f"{do!r} is nothing that {type(self._engine).__name__} does")
        # What was there before is not looked at for garbage while something is timed.
        gc.collect()
        gc.freeze()
        try:
            return getattr(self._engine, do)(command)
        finally:
            gc.unfreeze()

    def _start(self, command: dict[str, Any]) -> dict[str, Any]:
        started = perf_counter()
        engine: Offline | Server = (Server if command["kind"] == "server" else Offline)(command)
        self._engine = engine
        return {"seconds": perf_counter() - started, "settings": settings(engine.config)}

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def end_with(parent: int) -> None:
    """End this process, and all that it started, once the process that asked for it is gone, however it ended: nobody
    else would give the card's memory back."""
    while os.getppid() == parent:
        sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Until "stop" or the end of stdin."""
    if os.getpgrp() == os.getpid():
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    commands, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    # What vLLM and its processes print goes to stderr, and they read nothing.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    worker = Worker()
    for line in commands:
        command = json.loads(line)
        if command.get("do") == "stop":
            worker.close()
            print('{"ok": null}', file=answers, flush=True)
            return
        try:
            answer = {"ok": worker.answer(command)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    worker.close()


if __name__ == "__main__":
    main()
