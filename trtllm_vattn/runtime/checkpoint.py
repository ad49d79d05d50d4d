"""Checkpoints as transformers resolves them, loaded whole or refused: nothing is served with weights that are random.

transformers fills tensors that a checkpoint lacks with random numbers, and says so in a warning. Here they are named in
an error, as are tensors that the model has no place for, tensors of another shape, and files that cannot be read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import positions_of, refuse_family
from trtllm_vattn.runtime.hub import advice, check_repo_id, hub_error, is_local_only

logger = logging.getLogger(__name__)

DRAWN = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""What transformers' `generate` heeds of a ``generation_config`` where ``do_sample`` is true."""
CHOICES = (
    *DRAWN,
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_length",
    "min_new_tokens",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
"""All that it heeds when it chooses tokens."""
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0}
"""What changes nothing, where that is neither None, 0 nor an empty list."""

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
"""Files, of which whoever has a tokenizer has one."""

SHOWN = 4
"""Names in a message; the others are counted."""


def load_checkpoint(
    name: str, device: torch.device | str, dtype: torch.dtype, shapes: Iterable[str] = ()
) -> PreTrainedModel:
    """The causal language model of a checkpoint on a device.

    Parameters
    ----------
    name : str
        A directory, or a name on the Hugging Face Hub, which transformers looks up in its cache and, unless
        ``HF_HUB_OFFLINE`` is set, downloads. Code that comes with a checkpoint is not run.
    shapes : iterable of str
        What else could have been named, for the message where there is no such checkpoint.

    Raises
    ------
    ConfigError
        There is no such checkpoint; its files cannot be read; or its tensors are not those of the model that its
        ``config.json`` describes. The message names them.
    """
    where = Path(name)
    local = where.is_dir()
    config = read_config(name, shapes)
    try:
        with torch.device(device):
            model, found = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                local_files_only=is_local_only(name),
                trust_remote_code=False,
                # They are refused below, all at once and by name.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        damaged = _damaged(where if local else _snapshot(name))
        what = _listed(damaged) + "; get its files again" if damaged else _said(error)
        raise ConfigError(f"{name} cannot be loaded: {what}") from error
    _refuse_other_tensors(name, model, found)
    loaded: PreTrainedModel = model
    return loaded


def positions_in(name: str, shapes: Iterable[str]) -> int | None:
    """Positions that the model of a checkpoint has, by its configuration; None where that says none, or cannot be
    read."""
    try:
        config = read_config(name, shapes)
    except ConfigError:
        return None
    return positions_of(config.get_text_config())


def read_config(name: str, shapes: Iterable[str] = ()) -> PreTrainedConfig:
    """A checkpoint's configuration, of a family that can be served at all: known before its weights are read. Raises
    ConfigError where there is none."""
    where = Path(name)
    local = where.is_dir()
    if not local:
        check_repo_id(name, tuple(shapes))
    elif not (where / "config.json").is_file():
        raise ConfigError(f"{name} is a directory without a config.json; give a Hugging Face checkpoint")
    elif damaged := _damaged_json(where):
        raise ConfigError(f"{name} cannot be read: {_listed(damaged)}; get its files again")
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=is_local_only(name), trust_remote_code=False)
    except Exception as error:
        if local:
            raise ConfigError(f"{Path(name) / 'config.json'} cannot be read: {_said(error)}") from error
        raise _not_found(name, shapes, error) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        refuse_family(config, name)
        raise ConfigError(
            f"{name} is not served: transformers has no causal language model for checkpoints of type "
            f"{config.model_type!r}"
        )
    refuse_family(config.get_text_config(), name)
    return config


def _not_found(name: str, shapes: Iterable[str], error: Exception) -> ConfigError:
    from huggingface_hub import constants

    how = f"its cache and on the Hub ({constants.HF_HUB_CACHE}): {_said(error)}"
    if constants.HF_HUB_OFFLINE:
        how = f"its cache alone, as HF_HUB_OFFLINE is set ({constants.HF_HUB_CACHE})"
    elif unanswered := hub_error():
        how = f"its cache ({constants.HF_HUB_CACHE}), and {unanswered}"
    return ConfigError(
        f"no model {name!r}: it is no directory here, none of the shapes {', '.join(shapes)}, and transformers did not "
        f"find it as a checkpoint in {how}; {advice(name, tuple(shapes))}"
    )


def _snapshot(name: str, file: str = "config.json") -> Path | None:
    """Where a file of a name on the Hub lies in transformers' cache; None where it does not."""
    try:
        found = cached_file(name, file, local_files_only=True)
    except OSError:
        return None
    return None if found is None else Path(found).parent


def _is_on_hub(name: str, file: str) -> bool:
    """Whether a name on the Hub has a file: there, or in transformers' cache where the Hub does not answer."""
    try:
        return cached_file(name, file, local_files_only=is_local_only(name)) is not None
    except OSError:
        return False


def _refuse_other_tensors(name: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raise ConfigError where a checkpoint's tensors are not the model's, by transformers' account of loading them.

    What is tied, renamed, or ignored by the model's class is accounted for there.
    """
    wrong = []
    if missing := sorted(found["missing_keys"]):
        wrong.append(f"{_counted(missing)} missing ({_listed(missing)})")
    if unexpected := sorted(found["unexpected_keys"]):
        wrong.append(f"{_counted(unexpected)} unknown to the model ({_listed(unexpected)})")
    if misshapen := sorted(found["mismatched_keys"]):
        shapes = [f"{key}: {list(there)}, the model's {list(own)}" for key, there, own in misshapen]
        wrong.append(f"{_counted(misshapen)} of another shape ({_listed(shapes, '; ')})")
    wrong += found.get("error_msgs") or []
    if wrong:
        raise ConfigError(
            f"{name} does not hold the {type(model).__name__} that its config.json describes: {', '.join(wrong)}; get "
            "its files again, or correct config.json"
        )


def _counted(tensors: Sequence[Any]) -> str:
    return f"{len(tensors)} tensor{' is' if len(tensors) == 1 else 's are'}"


def _listed(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return between.join(names[:SHOWN]) + more


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _damaged_json(folder: Path) -> list[str]:
    """JSON files of a checkpoint that are none, with why."""
    wrong = []
    for path in sorted([*folder.glob("*config.json"), *folder.glob("*.index.json")]):
        try:
            if not isinstance(json.loads(path.read_text()), dict):
                wrong.append(f"{path.name} (not an object of JSON)")
        except (OSError, ValueError) as error:
            wrong.append(f"{path.name} ({error})")
    return wrong


def _damaged(folder: Path | None) -> list[str]:
    """Files of a checkpoint that are absent, truncated or corrupt, with why; looked for after loading has failed."""
    if folder is None:
        return []
    wrong = _damaged_json(folder)
    for index in sorted(folder.glob("*.index.json")):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            wrong += [] if wrong else [f"{index.name} (no weight_map from tensors to files)"]
            continue
        wrong += [f"{name} (absent, {index.name} names it)" for name in sorted(shards) if not (folder / name).is_file()]
    for path in _existing(folder, ("*.safetensors", "*.bin")):
        if why := _why_unreadable(path):
            wrong.append(f"{path.name} ({path.stat().st_size:,} bytes: {why})")
    return wrong


def _existing(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def _why_unreadable(path: Path) -> str:
    """Why a file of tensors cannot be read; empty where it can."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return ""
        torch.load(path, map_location="meta", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        return f"truncated or corrupt, {' '.join(str(error).split())[:120]}"
    except Exception as error:  # pickle raises whatever the bytes make it do
        return f"corrupt, {_said(error)[:120]}"
    return ""


def end_of_text(model: Any) -> tuple[int, ...]:
    """The token ids that end a text, by a model's ``generation_config``, or where that names none its configuration.

    One or several, of this vocabulary; empty where nobody names any. Raises ConfigError for what is no token id.
    """
    config = model.config.get_text_config()
    named: Any = None
    for source in (getattr(model, "generation_config", None), model.config, config):
        named = getattr(source, "eos_token_id", None) if named is None else named
    if named is None:
        return ()
    listed = list(named) if isinstance(named, list | tuple) else [named]
    if wrong := [token for token in listed if not isinstance(token, int) or isinstance(token, bool)]:
        raise ConfigError(
            f"eos_token_id of generation_config.json or config.json holds {wrong[0]!r}; it is a token id, or a list of "
            "them"
        )
    return tuple(dict.fromkeys(token for token in listed if 0 <= token < config.vocab_size))


def say_what_is_not_heeded(model: Any) -> None:
    """Log a warning that names what a model's ``generation_config`` says of how tokens are chosen: a request's
    `SamplingParams` alone say that here. Nothing where it says nothing, or what changes nothing."""
    config = getattr(model, "generation_config", None)
    names = CHOICES if getattr(config, "do_sample", None) else [name for name in CHOICES if name not in DRAWN]
    said = {name: getattr(config, name, None) for name in names}
    left = {name: value for name, value in said.items() if value not in (None, 0, [], NEUTRAL.get(name))}
    if left:
        shown = ", ".join(f"{name}={value}" for name, value in left.items())
        logger.warning("generation_config.json says %s; requests choose by SamplingParams alone: give it there", shown)


def require_tokenizer(name: str, shapes: Iterable[str] = ()) -> Any:
    """`load_tokenizer`'s, before anything of the model is loaded. Raises ConfigError where there is no such model, or
    it has none."""
    shapes = tuple(shapes)
    if Path(name).is_dir() or name not in shapes:
        read_config(name, shapes)
    tokenizer = load_tokenizer(name, shapes)
    if tokenizer is None:
        raise ConfigError(f"{name} has no tokenizer, which texts need; give a checkpoint with one")
    return tokenizer


def load_tokenizer(name: str, shapes: Iterable[str] = ()) -> Any:
    """The fast tokenizer of a checkpoint, a directory or a name on the Hub; None where it has none, or `name` is one of
    the `shapes`. Raises ConfigError where it has one that cannot be loaded."""
    where = Path(name)
    local = where.is_dir()
    if local:
        there = any((where / file).is_file() for file in TOKENIZERS)
    else:
        there = name not in shapes and any(map(partial(_is_on_hub, name), TOKENIZERS))
    if not there:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=is_local_only(name), trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"the tokenizer of {name} cannot be loaded: {_said(error)}") from error
