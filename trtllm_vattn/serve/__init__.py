"""`trtllm-vattn serve`: OpenAI's completions and chat-completions endpoints over an `AsyncEngine`.

Thin: requests are parsed (`protocol`), given to the engine, and its events written as they come (`answers`, `app`); all
scheduling is the engine's. Needs the extra ``serve``.
"""
