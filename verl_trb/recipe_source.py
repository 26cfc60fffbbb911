"""Where Hydra finds configurations: verl's own folder, and one or more folders with recipes and methods.

Hydra looks for `recipe=NAME` and `method=NAME` in folders of those names on its search path; here the files NAME.yaml
and methods/NAME.yaml of this project's recipes (top-level folder of the repository, package data when installed) and
of the user's own folders (environment variable VERL_TRB_RECIPES, separated by colons, searched first) serve as those.
Files whose name starts with an underscore are parts for others to include and are not listed.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin

from verl_trb.errors import UserError

GROUP, METHOD = "recipe", "method"
FOLDERS = {GROUP: "", METHOD: "methods"}  # of each config group, within a folder of recipes
ENVIRONMENT = "VERL_TRB_RECIPES"


class RecipeSource(FileConfigSource):
    """Serves the files of one folder as the config groups `recipe` and `method`."""

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def load_config(self, config_path: str) -> ConfigResult:
        return super().load_config(_within_folder(config_path))

    def is_group(self, config_path: str) -> bool:
        return config_path == "" or (config_path in FOLDERS and super().is_group(FOLDERS[config_path]))

    def is_config(self, config_path: str) -> bool:
        return config_path.startswith(tuple(f"{group}/" for group in FOLDERS)) and super().is_config(
            _within_folder(config_path)
        )

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path not in FOLDERS:
            return list(FOLDERS) if results_filter != ObjectType.CONFIG else []
        return sorted(_listed(Path(self.path) / FOLDERS[config_path]))


class SearchPath(SearchPathPlugin):
    """Adds the recipes and verl's configurations to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in recipe_folders():
            search_path.append("verl_trb", f"{RecipeSource.scheme()}://{folder}")
        search_path.append("verl", f"file://{verl_config_folder()}")


def register() -> None:
    """Makes Hydra know both; a second call changes nothing."""
    Plugins.instance().register(RecipeSource)
    Plugins.instance().register(SearchPath)


def recipe_folders() -> list[Path]:
    """The user's folders, then this project's. Raises UserError for one that does not exist."""
    folders = [Path(part).expanduser() for part in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if part]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{ENVIRONMENT} names {folder}, which is not a folder; correct or unset it.")
    return [*(folder.resolve() for folder in folders), _own_folder()]


def names(group: str) -> list[str]:
    """What `recipe=` or `method=` takes, sorted."""
    return sorted({name for folder in recipe_folders() for name in _listed(folder / FOLDERS[group])})


def recipe_names() -> list[str]:
    return names(GROUP)


def method_names() -> list[str]:
    return names(METHOD)


def recipe_file(name: str) -> Path | None:
    """The file of a recipe, None if no recipe folder has it."""
    return next((file for folder in recipe_folders() if (file := folder / f"{name}.yaml").is_file()), None)


def verl_config_folder() -> Path:
    """verl's configuration folder, found without importing verl, which takes seconds."""
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("verl is not installed; install verl==0.9.1 (`make` sets everything up).")
    return Path(next(iter(spec.submodule_search_locations))) / "trainer" / "config"


def _own_folder() -> Path:
    package = Path(__file__).resolve().parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def _listed(folder: Path) -> Iterator[str]:
    return (file.stem for file in folder.glob("*.yaml") if not file.stem.startswith("_"))


def _within_folder(config_path: str) -> str:
    group, _, name = config_path.partition("/")
    return f"{FOLDERS[group]}/{name}".lstrip("/")
