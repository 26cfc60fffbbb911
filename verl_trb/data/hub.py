"""A data set's rows from the Hugging Face hub, at one revision, read as they arrive."""

from collections.abc import Iterator
from typing import Any

from verl_trb.data.files import Row
from verl_trb.data.sources import Source
from verl_trb.errors import UserError


def hub_rows(source: Source, revision: str) -> tuple[Iterator[Row], str]:
    """Rows in the set's own order, and the commit they are of. Raises UserError if the hub does not give them.

    revision: a branch, tag or commit of the set's repository.
    """
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(source.hub, revision=revision, timeout=30).sha
    except Exception as error:  # of httpx and of huggingface_hub, many kinds
        raise _unreachable(source, revision, error) from None
    return _rows(source, commit or revision), commit or revision


def _rows(source: Source, commit: str) -> Iterator[Row]:
    from datasets import load_dataset

    number = -1
    try:
        dataset: Any = load_dataset(source.hub, source.config, split=source.split, revision=commit, streaming=True)
        for number, values in enumerate(dataset):
            yield Row(source.hub, number, values)
    except GeneratorExit:
        raise
    except Exception as error:
        raise _unreachable(source, commit, error) from None
    if number < 0:
        raise UserError(f"{source.hub} has no rows in its split {source.split!r}.")


def _unreachable(source: Source, revision: str, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return UserError(
        f"The data set {source.hub} at revision {revision} could not be read from the Hugging Face hub ({reason}); "
        f"check the connection, or give a downloaded copy: prepare_data {source.name} --from FILE_OR_FOLDER."
    )
