"""`serve`: OpenAI's completions and chat-completions endpoints over a checkpoint, until SIGTERM or an interrupt.

At SIGTERM no connection is taken any more; requests that run are finished within ``--drain-s``.
"""

from __future__ import annotations

import argparse
import os
import sys

from trtllm_vattn.arguments import amount, positive, size
from trtllm_vattn.cli.engine_flags import add_engine, engine_options, show_start
from trtllm_vattn.values import unicode_text

KEY_VARIABLE = "TRTLLM_VATTN_API_KEY"


def port(text: str) -> int:
    """A TCP port; 0 is a free one."""
    if not (text.isascii() and text.isdecimal() and len(text) < 6) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}; give a port from 0 to 65535, 0 for a free one")
    return int(text)


def key(text: str) -> str:
    """A key that fits a header."""
    if not text.isascii() or not text.isprintable() or not text or " " in text:
        raise argparse.ArgumentTypeError("it is empty, or has characters that no header has; give letters and digits")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `serve`."""
    add_engine(parser, max_seqs=64)
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="HOST", help="address to listen at; 0.0.0.0 is every one")
    add("--port", type=port, default=8000, metavar="PORT", help="0 is a free one")
    add("--name", metavar="NAME", help="what clients call the model (default: what --model says)")
    text = f"clients have to send it; several times for several (default: what {KEY_VARIABLE} holds, or no check)"
    add("--api-key", type=key, action="append", metavar="KEY", help=text)
    add("--max-body", type=size, default="4MiB", metavar="BYTES", help="of a request's body")
    text = "for a request's head to come, and for its body; what comes slower is answered with 408"
    add("--read-timeout-s", type=amount, default=60.0, metavar="SECONDS", help=text)
    text = "unfinished requests at once; more are answered with 429"
    add("--max-requests", type=positive, default=4096, metavar="REQUESTS", help=text)
    parser.epilog = (
        "It says where it listens when it serves. Then: curl ADDRESS/chat/completions -d "
        """'{"messages": [{"role": "user", "content": "Hi"}]}', or OpenAI's client with base_url=ADDRESS; """
        "GET /health, /metrics and /v1/models. Clients need no key unless one is given here. SIGTERM ends it with code "
        "0 when requests that run are finished; where the device is lost it ends with code 2, to be started anew."
    )
    add("--drain-s", type=amount, default=30.0, metavar="SECONDS", help="for requests that run at SIGTERM")


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; 0."""
    # With starlette and uvicorn, which are an extra.
    from trtllm_vattn.serve.app import Settings
    from trtllm_vattn.serve.server import serve

    keys = args.api_key or [key for key in (os.environ.get(KEY_VARIABLE),) if key]
    if not keys and args.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"trtllm-vattn: {args.host} may be reached by others, and no --api-key is asked for", file=sys.stderr)
    name = unicode_text("the model's name", args.name or args.model)
    show_start()
    settings = Settings(name, tuple(keys), args.max_body, read_s=args.read_timeout_s)
    serve(args.model, settings, args.host, args.port, args.drain_s, args.max_requests, engine_options(args))
    return 0
