"""`CacheConfig`: how a cache at fixed addresses lays out, maps and gives back its memory."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_vattn.cache.calibrated import calibration_of
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.lookahead import StepTimingModel
from trtllm_vattn.memory.pool import CLASSES
from trtllm_vattn.planner import Calibration, CostModel, Lengths, ModelShape, Objective, plan
from trtllm_vattn.sizes import parse_bytes
from trtllm_vattn.values import finite, whole

if TYPE_CHECKING:
    from typing_extensions import Self


class Layout(enum.Enum):
    """The order of bytes in a slot."""

    ROWS = "rows"
    """A token's row holds the K and V of several layers: ``[token][layer][K,V][head][dim]``."""
    BLOCKS = "blocks"
    """Blocks of tokens, as TensorRT-LLM's kernels read them: ``[block][layer][K,V][head][token][dim]``."""
    TENSORS = "tensors"
    """K and V of every layer are tensors of their own, in ranges of their own: ``[token][head][dim]`` (vAttention)."""


@dataclass(frozen=True)
class CacheConfig:
    """Settings of a `KVCacheManager`; each default is what it takes where nothing is said.

    Parameters
    ----------
    layout : Layout
    layers_per_range : int or None
        Layers that share a token's row, or a block; more of them make a page hold fewer tokens. None is as many as make
        a row of 64 KiB, 16 for Llama-3-8B. Not for tensors, which have ranges of their own.
    heads_per_range : int or None
        KV heads that share a token's row; `KVCache.head_groups` gives their tensors then. For rows; None is all.
    tokens_per_block : int
        16, 32, 64 or 128; for blocks. 32 is TensorRT-LLM's own default.
    extent_classes : int
        Number of extent sizes: the driver's granularity, and doublings of it.
    batch_access : bool
        Make all mappings of a growth accessible by one driver call; False is a call for each.
    exact_admission : bool
        A new sequence gets the memory of its own tokens and no more, and what others have beyond their lengths is taken
        for it: every sequence whose need is within the budget is admitted. For whoever promises memory to a scheduler.
    fence_streams : tuple of int
        CUDA streams that fences cover besides torch's current one.
    own_lengths : bool
        Each range has a length, a lower edge and a frontier of its own in each slot (`KVCache.set_length`), for
        policies that keep different tokens in different layers, or heads.
    lookahead : int or None
        Tokens that `map_ahead` keeps mapped past a sequence's length; 0 maps each token in its own step. None is as
        many as the measured times of steps and mappings ask for (memory/lookahead.py).
    step_timing : StepTimingModel or None
        What says how long steps and mappings take, where `lookahead` is None; None measures them.
    idle_after_s : float or None
        With a thread of its own (`start_thread`), the cache gives memory back to the driver that no sequence has used
        for so many seconds; None keeps it for the next sequence.
    idle_floor : int or str
        Bytes (``"1GiB"`` too) of idle memory that are kept all the same.
    host_memory : int or str
        Bytes (``"32GiB"`` too) of host memory that may be pinned for suspended sequences, and for what a cache that
        sleeps keeps; pinned in chunks when it is needed first, and kept until the cache is closed.

    Raises
    ------
    ConfigError
        A setting is out of its range.
    """

    layout: Layout = Layout.ROWS
    layers_per_range: int | None = None
    heads_per_range: int | None = None
    tokens_per_block: int = 32
    extent_classes: int = CLASSES
    batch_access: bool = True
    exact_admission: bool = False
    fence_streams: tuple[int, ...] = ()
    own_lengths: bool = False
    lookahead: int | None = None
    step_timing: StepTimingModel | None = None
    idle_after_s: float | None = None
    idle_floor: int | str = 0
    host_memory: int | str = 0

    @classmethod
    def auto(
        cls,
        shape: ModelShape,
        lengths: Lengths,
        budget: int | str,
        *,
        calibration: Calibration | str | None = None,
        itl_p99_ms: float | None = None,
        max_seqs: int = 256,
        **settings: Any,
    ) -> Self:
        """The configuration that the planner chooses (planner/README.md), for rows: layers that share one, lookahead,
        and extent sizes.

        Parameters
        ----------
        shape : ModelShape
            `planner.ModelShape.from_config`, of a model's configuration.
        lengths : Lengths
            `planner.Lengths.of`, tokens of prompts and outputs.
        budget : int or str
            Bytes of KV memory, ``"40GiB"`` too.
        calibration : Calibration, str or None
            Numbers of the machine, a file of `trtllm-vattn calibrate`, or a card's name. None is this machine's: as
            measured on it, else the package's of its card.
        itl_p99_ms : float or None
            Milliseconds between two tokens that 99 % are to stay within.
        max_seqs : int
            Sequences that run at once, at most.
        settings
            Other settings of `CacheConfig`; what is given here is not chosen.

        Raises
        ------
        ConfigError
            There is no calibration of this machine; the memory does not hold the longest request; nothing is within
            the latency; or another layout than rows is asked for.
        """
        if settings.get("layout", Layout.ROWS) is not Layout.ROWS:
            raise ConfigError(f"a plan is made for rows; the layout asked for is {settings['layout']}")
        numbers = calibration if isinstance(calibration, Calibration) else calibration_of(calibration)
        within = None if itl_p99_ms is None else 1e-3 * finite("itl_p99_ms", itl_p99_ms)
        objective = Objective(parse_bytes(budget, "the budget"), within, max_seqs)
        given = settings.get("layers_per_range")
        chosen = plan(CostModel(shape, numbers), lengths, objective, given and [given]).best.layout
        found = {
            "layers_per_range": chosen.layers_per_range,
            "lookahead": chosen.lookahead,
            "extent_classes": chosen.extent_classes,
        }
        return cls(**{**found, **settings})

    def __post_init__(self) -> None:
        if not isinstance(self.layout, Layout):
            raise ConfigError(f"layout is {self.layout!r}; it is one of {', '.join(map(str, Layout))}")
        if self.layers_per_range is not None and self.layout is Layout.TENSORS:
            raise ConfigError("layers_per_range is for rows and blocks; tensors have ranges of their own")
        if self.heads_per_range is not None:
            object.__setattr__(self, "heads_per_range", whole("heads_per_range", self.heads_per_range, 1))
            if self.layout is not Layout.ROWS:
                raise ConfigError(f"heads_per_range is for rows; the layout is {self.layout.value}")
        whole("extent_classes", self.extent_classes, 1)
        if self.lookahead is not None:
            object.__setattr__(self, "lookahead", whole("lookahead", self.lookahead, 0))
        if self.idle_after_s is not None and finite("idle_after_s", self.idle_after_s) <= 0:
            raise ConfigError(f"idle_after_s is {self.idle_after_s}; it is a positive number of seconds, or None")
        object.__setattr__(self, "idle_floor", parse_bytes(self.idle_floor, "idle_floor"))
        object.__setattr__(self, "host_memory", parse_bytes(self.host_memory, "host_memory"))
