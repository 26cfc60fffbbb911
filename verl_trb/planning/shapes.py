"""The shape of a transformer language model, and what follows from it: parameters, bytes, FLOPs a token."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verl_trb.errors import UserError
from verl_trb.model_files import find_model, is_hub_name


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped-query attention, gated MLPs and RMS norms (Qwen3, Llama and their like).

    tied: whether the output layer is the embedding. norms_on_heads: whether queries and keys are normalized (Qwen3).
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    head_dim: int = 128
    tied: bool = True
    norms_on_heads: bool = True

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        norms = 2 * self.hidden + (2 * self.head_dim if self.norms_on_heads else 0)
        return attention + 3 * self.hidden * self.intermediate + norms

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """A layer's linear modules by their names in transformers: numbers of inputs and outputs."""
        h, i, q, k = self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {"q_proj": (h, q), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (q, h)}
        mlp = {"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}
        return {f"self_attn.{name}": size for name, size in attention.items()} | {
            f"mlp.{name}": size for name, size in mlp.items()
        }

    def adapters(self, rank: int, targets: str | Sequence[str]) -> int:
        """Parameters of low-rank adapters on the modules that `targets` names as peft does: "all-linear", a regular
        expression, or ends of names.
        """

        def adapted(name: str) -> bool:
            if isinstance(targets, str):
                return targets == "all-linear" or re.fullmatch(targets, f"model.layers.0.{name}") is not None
            return any(f"model.layers.0.{name}".endswith(f".{target}") for target in targets)

        sizes = (inputs + outputs for name, (inputs, outputs) in self.linear.items() if adapted(name))
        return self.layers * rank * sum(sizes)

    @property
    def body(self) -> int:
        """Parameters of all layers."""
        return self.layers * self.layer

    @property
    def head(self) -> int:
        """Parameters of the output layer."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.body + self.hidden + self.head * (1 if self.tied else 2)

    @property
    def read(self) -> int:
        """Parameters that a decoding pass reads: the layers and the output layer."""
        return self.body + self.head

    @property
    def kv_elements(self) -> int:
        """Numbers in the KV cache of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def _qwen3(layers: int, hidden: int, heads: int, intermediate: int, tied: bool = True) -> Shape:
    return Shape(layers, hidden, heads, 8, intermediate, vocabulary=151_936, tied=tied)


# Published configurations; those of "-Base" are the same.
KNOWN = {
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 16, 3072),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 16, 6144),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 32, 9728),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 32, 12_288, tied=False),
    "Qwen/Qwen3-14B": _qwen3(40, 5120, 40, 17_408, tied=False),
    "Qwen/Qwen3-32B": _qwen3(64, 5120, 64, 25_600, tied=False),
}


def shape_of(key: str, path: str | None) -> Shape:
    """The shape of the model that config key `key` names: a known one, or by its config.json here.

    Raises UserError for a hub name that is neither, and as `find_model`.
    """
    name = (path or "").removesuffix("-Base")
    if name in KNOWN:
        return KNOWN[name]
    model = find_model(key, path)
    if model is None:
        near = difflib.get_close_matches(name, KNOWN, n=2, cutoff=0.5) if is_hub_name(name) else []
        hint = f"did you mean {' or '.join(near)}? Otherwise give" if near else "give"
        raise UserError(f"{key}={path} is neither known here nor in this machine's cache; {hint} a model folder.")
    return from_config(model.config)


def from_config(config: dict[str, Any]) -> Shape:
    """From the content of a config.json."""
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    return Shape(
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        intermediate=int(config.get("intermediate_size") or 4 * hidden),
        vocabulary=int(config["vocab_size"]),
        head_dim=int(config.get("head_dim") or hidden // heads),
        tied=bool(config.get("tie_word_embeddings", False)),
        norms_on_heads=str(config.get("model_type", "")).startswith("qwen3"),
    )
