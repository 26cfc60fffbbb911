"""New weights for a model that vLLM serves on a CPU, whose layers have packed their weights and freed the originals."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def _repack_tied_head(model: Any) -> None:
    """Pack a tied output layer again.

    vLLM's reload loads the embedding, whose weight the output layer shares; but on CPU the output layer computes
    with a packed copy of its own, which the reload does not know of (its documented limitation 2).
    """
    head = model.lm_head
    if getattr(head, "weight", None) is model.model.embed_tokens.weight:
        head.quant_method.process_weights_after_loading(head)
