"""New weights for a model that vLLM serves on a CPU, whose layers have packed their weights and freed the originals."""

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any
from unittest import mock

import torch
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@contextmanager
def layerwise_reload(model: Any, model_config: Any) -> Iterator[None]:
    """Weights that are loaded into `model` within it go through vLLM's own layerwise reload, which packs them again.

    The reload keeps the tensors it is given until a layer is complete: they must not be views of a buffer that is
    reused before.
    """
    with torch.device("cpu"):
        initialize_layerwise_reload(model)
        yield
        finalize_layerwise_reload(model, model_config)
        _repack_tied_head(model)


@contextmanager
def untracked_segments() -> Iterator[None]:
    """Shared memory that is opened within it belongs to whoever made it: this process's resource tracker is not told.

    Python before 3.13 tells it of every segment, and takes back only what this process unlinks; each weight sync opens
    one that the trainer made and unlinks, so the tracker would grow. verl opens the segment, and `SharedMemory` has no
    argument for this before 3.13: nothing but a patch reaches it.
    """
    register = resource_tracker.register

    def but_segments(name: str, kind: str) -> None:
        if kind != "shared_memory":
            register(name, kind)

    with mock.patch.object(resource_tracker, "register", but_segments):
        yield


def _repack_tied_head(model: Any) -> None:
    """Pack a tied output layer again.

    vLLM's reload loads the embedding, whose weight the output layer shares; but on CPU the output layer computes
    with a packed copy of its own, which the reload does not know of (its documented limitation 2).
    """
    head = model.lm_head
    if getattr(head, "weight", None) is model.model.embed_tokens.weight:
        head.quant_method.process_weights_after_loading(head)
