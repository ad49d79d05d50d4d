"""`Engine(deterministic=True)`: a request's bits depend on nothing of its batch.

Floating-point sums depend on their order, and kernels choose that by the shape of what they are given: a matrix
product of 8 rows adds up otherwise than one of 64, and attention that splits long sequences splits them by the batch
(He et al., Defeating Nondeterminism in LLM Inference, 2025). vLLM's batch-invariant mode has kernels that do not. Here
nothing is given another shape, and products stay by the fastest kernels:

* every decode step has as many rows as there are lanes, idle ones among them (one bucket);
* a prompt goes in by passes of its own, in chunks that its own length alone cuts (`padded_length`), its logits by a
  product of one row; no pass holds two prompts, or prompts and decoding sequences;
* one kernel of attention decodes all batches, one whose output of a lane depends on no other lane
  (`Attention.batch_invariant`): on a GPU the project's own with fixed shares (`FixedSharesAttention`), which cuts each
  sequence at the same numbers of tokens and combines the pieces in their order;
* prompts are attended to by the project's own kernel (prompt_kernel.py), which divides keys by the pass's rows and
  length, a count of programs that the settings fix (`PromptKernel.fixed`), and combines the pieces in their order. A
  pass has one prompt, so rows and length are its own. Others' kernels for prompts, which are picked by measuring, are
  not used;
* who was preempted and is computed anew takes the same steps again: its prompt goes in, and its tokens are chosen
  again, one by one (`RequestState.begin_again`). What is different then from what somebody has been told ends it with
  an error.

So no kernel sees a shape that depends on others. That a row's place among the rows of one shape changes nothing, and
that the same product gives the same bits again, is cuBLAS's own property, over the workspace that PyTorch gives it;
`bench doors --measure deterministic` looks at it on the machine at hand (`product_rows_different`), and at all of it
with requests in 100 random batches. It costs the rows that are padding, which is little where reading weights bounds a
step, and that prompts do not share passes.

On an H200 each of 1,073 requests in 100 random batches had the bits that it had alone (2026-11-30, commit a2fcc6b,
scripts/results/h200/doors.json, which says what it costs). With decode by cuDNN 1,048 of them had other ones: its
attention does not even repeat itself (scripts/results/h200/decode_repeats.txt).

Over two ranks (``tensor_parallel=2``) it holds where it does on one: each sum is of two numbers, and of two either
order gives the same bits. More ranks are refused: an all-reduce begins with another rank for each part of what it is
given (NCCL's rings and trees), so that a request's bits would depend on its lane.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.options import FP8
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.values import typed

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


MOST_RANKS = 2


def check_ranks(size: int) -> None:
    """Raise ConfigError where so many ranks add up in an order that depends on a request's lane."""
    if size > MOST_RANKS:
        raise ConfigError(
            f"deterministic is True, and tensor_parallel is {size}: in which order the numbers of more than "
            f"{MOST_RANKS} ranks are added depends on a request's place in the batch; use {MOST_RANKS}, or leave it out"
        )


def check_deterministic(model: Any, attention: Attention) -> None:
    """Raise ConfigError, by name, for what cannot hold it."""
    shape = attention.cache.shape
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"deterministic is True, and the model is {typed(model)}, whose kernels choose by shapes that "
            "are not known here; leave it out, or serve the Hugging Face model"
        )
    if shape.dtype == FP8:
        raise ConfigError(
            f"deterministic is True, and keys and values are {FP8}, which the kernel of fixed shares does not read; "
            "leave one of them out"
        )
    config = model.config.get_text_config()
    experts = next((name for name in EXPERTS if (getattr(config, name, None) or 0) > 1), None)
    if experts is not None:
        raise ConfigError(
            f"deterministic is True, and {type(model).__name__} has {getattr(config, experts)} experts, whose products "
            "have as many rows as a batch sends each; leave it out"
        )
    if not attention.batch_invariant:
        raise ConfigError(
            f"deterministic is True, and decode is by {attention.describe()}, which splits a sequence by the lengths "
            "of the others, does not repeat its own bits, or is not known to; use attention='auto', over a cache and a "
            "model that fixed shares serve on a GPU (no windows, sinks, soft caps or eight-bit keys), or 'torch'"
        )
