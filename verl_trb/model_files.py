"""What a Hugging Face model folder says about its model, without loading it and without the network."""

import json
import math
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from verl_trb.errors import UserError

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Model:
    """A model folder on this machine; `config` is its config.json (of the language model, where it has
    several).
    """

    folder: Path
    config: dict[str, Any]

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the output layer, padding included."""
        return int(self.config["vocab_size"])

    @property
    def max_positions(self) -> int | None:
        """Tokens a sequence may have, None if the model does not say."""
        return self.config.get("max_position_embeddings")

    @property
    def heads(self) -> str:
        """Attention heads / key-value heads."""
        return f"{self.config['num_attention_heads']}/{self._key_value_heads}"

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token occupies in a cache, in all layers."""
        head_dim = self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]
        return 2 * self.layers * self._key_value_heads * head_dim * element_bytes

    @cached_property
    def parameters(self) -> int | None:
        """Number of weights, from the headers of the safetensors files; None without such files."""
        headers = [safetensors_header(file) for file in self.folder.glob("*.safetensors")]
        sizes = [math.prod(entry["shape"]) for header in headers for name, entry in header.items() if name[0] != "_"]
        return sum(sizes) or None

    @property
    def _key_value_heads(self) -> int:
        return int(self.config.get("num_key_value_heads") or self.config["num_attention_heads"])


def is_hub_name(path: str) -> bool:
    """Whether `path` can only be a name on the Hugging Face hub: owner/name, and no folder here."""
    return _HUB_NAME.fullmatch(path) is not None and not Path(path).exists()


def find_model(key: str, path: str | None) -> Model | None:
    """The model that config key `key` names; None if it is a hub name that this machine's cache does not
    have.

    Raises UserError for no path, a missing or unreadable folder, a config.json that is missing, broken or
    not a language model's, and weights that are missing or cut short.
    """
    if not path:
        raise UserError(f"{key} is not set; give a Hugging Face model folder or hub name.")
    if is_hub_name(path):
        folder = _cached(path)
        return None if folder is None else Model(folder, _config(f"{key}={path}", folder))
    folder = Path(path).expanduser()
    what = f"{key}={path}"
    if not folder.is_dir():
        raise UserError(f"{what}: {'not a folder' if folder.exists() else 'no such folder'}; give a model folder.")
    model = Model(folder, _config(what, folder))
    _check_weights(what, folder)
    return model


def safetensors_header(file: Path) -> dict[str, Any]:
    """Name -> {dtype, shape, data_offsets} of a safetensors file.

    Raises ValueError if it is broken or cut short.
    """
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise ValueError("no header")
        (length,) = struct.unpack("<Q", start)
        text = stream.read(min(length, 100_000_000))
    header = json.loads(text)
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if file.stat().st_size < 8 + length + end:
        raise ValueError("cut short")
    return header


def _config(what: str, folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{what} has no config.json; give a folder in Hugging Face format.") from None
    except OSError as error:
        raise UserError(f"{what}: config.json cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"{what}: config.json is not JSON ({error}); copy the model again.") from None
    content = content.get("text_config", content) if isinstance(content, dict) else {}
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        if not isinstance(content.get(name), int):
            raise UserError(f"{what}: config.json has no {name}; this is not a language model's folder.")
    return content


def _check_weights(what: str, folder: Path) -> None:
    files = [file for pattern in WEIGHTS for file in folder.glob(pattern)]
    if not files:
        raise UserError(f"{what} has no weights ({', '.join(WEIGHTS)}); copy the model again.")
    for file in files:
        try:
            if file.suffix == ".safetensors":
                safetensors_header(file)
            else:
                file.open("rb").close()
        except OSError as error:
            raise UserError(f"{what}: {file.name} cannot be read ({error.strerror}).") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{what}: {file.name} is damaged ({error}); copy the model again.") from None


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json")
    return Path(file).parent if isinstance(file, str) else None
