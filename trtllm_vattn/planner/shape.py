"""`ModelShape`: what of a model the formulas need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.values import shown, whole


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder with grouped-query attention.

    Parameters
    ----------
    name : str
    num_layers, num_heads, num_kv_heads, head_dim : int
    weight_bytes : int
        That a decode step reads: all but the table of token embeddings, which is read where it is the output too.
    kv_itemsize, itemsize : int
        Bytes of an element of K and V, and of a weight.
    kv_factor : int
        2 for K and V, 1 for one latent.
    """

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    weight_bytes: int
    kv_itemsize: int = 2
    itemsize: int = 2
    kv_factor: int = 2

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "kv_itemsize", "itemsize"):
            whole(name, getattr(self, name), 1)
        whole("weight_bytes", self.weight_bytes, 0)
        if self.kv_factor not in (1, 2):
            raise ConfigError(f"kv_factor is {shown(self.kv_factor)}; it is 2 for K and V, 1 for a shared latent")

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return self.kv_factor * self.num_kv_heads * self.head_dim * self.kv_itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self.num_layers * self.layer_token_bytes

    @property
    def pair_flops(self) -> int:
        """Operations of attention a layer for each pair of a query and a key."""
        return 4 * self.num_heads * self.head_dim

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any], itemsize: int = 2) -> ModelShape:
        """Out of a Hugging Face configuration of a dense decoder with gated feed-forward layers (Llama, Qwen, Mistral).

        Raises ConfigError for a mixture of experts, for latent attention, for layers with sliding windows, and where a
        number is missing.
        """
        for key, what in (
            ("num_local_experts", "a mixture of experts"),
            ("num_experts", "a mixture of experts"),
            ("n_routed_experts", "a mixture of experts"),
            ("kv_lora_rank", "latent attention"),
        ):
            if config.get(key):
                raise ConfigError(f"{name} has {what} ({key} {shown(config[key])}), which no plan is made for yet")
        if config.get("sliding_window") and config.get("use_sliding_window", True):
            raise ConfigError(
                f"{name} has layers with a window of {shown(config['sliding_window'])} tokens, which no plan is made "
                "for yet"
            )

        def number(key: str, default: Any = None) -> int:
            given = config.get(key)
            return whole(f"{key} of {name}", default if given is None else given, 1)

        layers, hidden, heads = (number(key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
        kv_heads = number("num_key_value_heads", heads)
        head_dim = number("head_dim", hidden // heads)
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        weights = layers * (attention + 3 * hidden * number("intermediate_size")) + hidden * number("vocab_size")
        return cls(name, layers, heads, kv_heads, head_dim, itemsize * weights, itemsize, itemsize)
