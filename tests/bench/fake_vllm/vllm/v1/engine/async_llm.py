"""The engine that `vllm serve` runs: a stream a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from vllm import STEP_S, Running, vllm_config
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext


class AsyncLLM:
    @classmethod
    def from_engine_args(
        cls, engine_args: AsyncEngineArgs, *, usage_context: UsageContext = UsageContext.ENGINE_CONTEXT
    ) -> AsyncLLM:
        asyncio.get_running_loop()  # its output handler runs in the loop that it is made in
        made = cls()
        tokens = {UsageContext.OPENAI_API_SERVER: 8192}.get(usage_context, 2048)
        made.vllm_config = vllm_config(vars(engine_args), tokens)
        return made

    async def generate(
        self, prompt: dict[str, Any], sampling_params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        running = Running(request_id, prompt, sampling_params, self.vllm_config.vocab_size)
        while running.left:
            await asyncio.sleep(STEP_S)
            yield running.next()

    def shutdown(self, timeout: float | None = None) -> None:
        print("shut down")
