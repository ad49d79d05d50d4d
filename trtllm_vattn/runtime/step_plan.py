"""`StepPlan`: what the next launch does, decided before anything is launched."""

from __future__ import annotations

from dataclasses import dataclass

from trtllm_vattn.runtime.prefill import PromptChunk
from trtllm_vattn.runtime.request import RequestState


@dataclass(frozen=True)
class StepPlan:
    """One launch: decode steps, or a pass over the model with chunks of prompts.

    Attributes
    ----------
    steps : int
        Decode steps of every running sequence, in a loop at most; 1 where prompts go in.
    chunks : tuple of (RequestState, PromptChunk)
        Prompt tokens that go in, in the order in which requests were admitted. Whose prompt is complete then gets a
        lane, and its first token with this launch.
    decodes : bool
        Whether running sequences take part. They always do, but for models that take prompts in passes of their own.
    drafts : int
        Draft tokens of each running sequence that its one step has room for.
    """

    steps: int
    chunks: tuple[tuple[RequestState, PromptChunk], ...] = ()
    decodes: bool = True
    drafts: int = 0

    @property
    def joins(self) -> tuple[RequestState, ...]:
        """Requests whose prompt is complete after this launch."""
        return tuple(request for request, chunk in self.chunks if chunk.end == request.length)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(chunk.tokens) for _, chunk in self.chunks)
