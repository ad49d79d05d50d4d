"""The planner's numbers of the machine at hand, for whoever decides by them."""

from __future__ import annotations

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.machine import card
from trtllm_vattn.planner.calibration import Calibration, find, named, packaged


def card_of(device: torch.device | str | None = None) -> str:
    """What a device's results are filed by; None is the first GPU, else the host."""
    found = torch.device(device if device is not None else "cuda:0" if torch.cuda.is_available() else "cpu")
    return card({"gpu": None if found.type == "cpu" else {"name": torch.cuda.get_device_name(found)}})


def calibration_of(given: str | None, device: torch.device | str | None = None) -> Calibration:
    """The calibration that is named (a file, or a card), or the device's: as measured on this machine, else the
    package's. Raises ConfigError where there is none."""
    if given is not None:
        return named(given)
    if (found := find(name := card_of(device))) is None:
        raise ConfigError(
            f"there is no calibration of this machine ({name}): run trtllm-vattn calibrate, or name a file or a card: "
            f"{', '.join(packaged())}"
        )
    return found
