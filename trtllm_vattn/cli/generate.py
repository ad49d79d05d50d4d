"""`generate`: text from prompts, through the checkpoint's own tokenizer and chat template, as it comes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TextIO

from trtllm_vattn.arguments import positive, probability, seed, tolerance
from trtllm_vattn.cli.engine_flags import add_engine, engine_options, show_start
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.values import counted, unicode_text

if TYPE_CHECKING:
    from trtllm_vattn.runtime.engine import Engine
    from trtllm_vattn.runtime.sampling import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `generate`."""
    add_engine(parser, max_seqs=8)
    add = parser.add_argument
    add("prompt", nargs="*", metavar="PROMPTS", help="texts; without any, and without --file, standard input is one")
    add("--file", type=Path, metavar="FILE", help="a prompt a line (default: the arguments, or standard input)")
    text = "give prompts to the model as they are (default: through the chat template, where there is one)"
    add("--raw", action="store_true", help=text)
    add("--max-tokens", type=positive, default=256, metavar="TOKENS", help="of each output")
    add("--temperature", type=tolerance, default=0.0, metavar="N", help="0 takes the likeliest token")
    add("--top-p", type=probability, default=1.0, metavar="SHARE", help="of probability that tokens are drawn from")
    add("--seed", type=seed, default=0, metavar="N", help="of what is drawn")
    add(
        "--stop",
        action="append",
        metavar="TEXT",
        help="a text that ends outputs, several times for several (default: none)",
    )


def prompts_of(args: argparse.Namespace, stdin: TextIO) -> list[str]:
    """Prompts out of arguments, a file or standard input. Raises ConfigError where there is none, or two are given."""
    if args.prompt and args.file:
        raise ConfigError("prompts are given as arguments and by --file; give one of them")
    try:
        if args.file:
            prompts = [line for line in args.file.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            if not args.prompt and stdin.isatty():
                print("the prompt is read from here; end it with Ctrl-D", file=sys.stderr)
            prompts = args.prompt or [stdin.read().removesuffix("\n")]
    except UnicodeDecodeError as error:
        where = args.file or "standard input"
        raise ConfigError(f"{where} is no text in UTF-8 ({error.reason} at byte {error.start})") from None
    # What is no UTF-8 in an argument comes as halves of surrogate pairs.
    prompts = [unicode_text("a prompt", prompt) for prompt in prompts]
    if not prompts or not all(prompts):
        raise ConfigError("there is no prompt, or an empty one; give some text")
    return prompts


def run(args: argparse.Namespace) -> int:
    """Print outputs: one as it comes, several each when it has ended; rate and memory on stderr. 1 where one failed."""
    from trtllm_vattn.runtime.checkpoint import require_tokenizer
    from trtllm_vattn.runtime.engine import Engine
    from trtllm_vattn.runtime.models import SHAPES, longest_of
    from trtllm_vattn.runtime.request import stored_tokens
    from trtllm_vattn.runtime.sampling import SamplingParams
    from trtllm_vattn.runtime.settings import check_model_name

    prompts = prompts_of(args, sys.stdin)
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop=args.stop or (),
        detokenize=True,
    )
    show_start()
    # Before the model is loaded: it may take minutes.
    tokenizer = require_tokenizer(check_model_name(args.model), SHAPES)
    if not args.raw and tokenizer.chat_template:
        tokens = [templated(tokenizer, prompt) for prompt in prompts]
    else:
        tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = longest_of(args.model, args.max_seq_len)
    for prompt in tokens:
        stored_tokens(len(prompt), args.max_tokens, longest)
    with Engine.from_pretrained(args.model, tokenizer=tokenizer, **engine_options(args)) as engine:
        return _generate(engine, tokens, params)


def templated(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of one user's message. Raises ConfigError where the chat template does not take it."""
    messages = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template raises whatever its author, or Jinja, has it raise
        raise ConfigError(f"the checkpoint's chat template does not take this: {error}; use --raw") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _generate(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> int:
    started, first_s, tokens, failed = perf_counter(), 0.0, 0, 0
    place = {engine.submit(prompt, params): number for number, prompt in enumerate(prompts)}
    texts = ["" for _ in prompts]
    for event in engine.run():
        first_s = first_s or perf_counter() - started
        number = place[event.request]
        tokens += event.token is not None
        if event.error is not None:
            failed += 1
            print(f"trtllm-vattn: {event.error}", file=sys.stderr)
        text = event.text or ""
        if len(prompts) == 1:
            print(text, end="" if event.finish_reason is None else "\n", flush=True)
            continue
        texts[number] += text
        if event.finish_reason is not None:
            print(f"[{number}] {texts[number]}", flush=True)
    seconds, stats = perf_counter() - started, engine.cache.stats()
    decoding = max(seconds - first_s, 1e-9)
    print(
        f"{counted(tokens, 'token')} in {seconds:.2f} s: the first after {first_s * 1e3:.0f} ms, then "
        f"{max(tokens - len(prompts), 0) / decoding:.1f} tokens/s; KV memory {stats.held_bytes / 2**20:,.1f} MiB "
        f"held of {stats.budget_bytes / 2**20:,.1f} MiB",
        file=sys.stderr,
    )
    return 1 if failed else 0
