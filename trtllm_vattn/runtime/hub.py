"""Names on the Hugging Face Hub, which is asked for nothing where it does not answer: transformers would try for half a
minute, once for each file."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from pathlib import Path
from time import monotonic

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.values import shown

ANSWER_S = 5.0
"""Seconds that the Hub has to answer in."""
KEPT_S = 60.0
"""Seconds for which it is known whether it does."""


def check_repo_id(name: str, shapes: tuple[str, ...]) -> None:
    """Raise ConfigError, without asking anybody, for what names no directory here and can be no name on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    where = Path(name)
    if where.is_file():
        raise ConfigError(f"model is {shown(name)}, a file; give the checkpoint's directory, {where.parent} perhaps")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ConfigError(
            f"no model {shown(name)}: it is no directory here, and no name that the Hugging Face Hub could have "
            f"(OWNER/NAME); {advice(name, shapes)}"
        ) from None


def advice(name: str, shapes: tuple[str, ...]) -> str:
    """What to do about a name that nothing has."""
    close = get_close_matches(name, shapes, 1)
    return (f"do you mean {close[0]}? Else " if close else "") + (
        "give a checkpoint's directory" + (", or one of the shapes" if shapes else "")
    )


def hub_error() -> str:
    """Why the Hub does not answer, or is not to be asked (``HF_HUB_OFFLINE``); empty where it answers."""
    return _hub_error(int(monotonic() // KEPT_S))


@cache
def _hub_error(period: int) -> str:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_S)
    except Exception as error:
        return f"{constants.ENDPOINT} does not answer: {type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def is_local_only(name: str) -> bool:
    """Whether the files of a model of this name are looked for on this machine alone: in a directory, or, where the Hub
    does not answer, in transformers' cache."""
    return Path(name).is_dir() or bool(hub_error())
