"""Where Hydra finds configurations: verl's own folder, and `recipe=NAME` in one or more folders of recipes.

Hydra looks for `recipe=NAME` in a folder named `recipe` on its search path; here the files NAME.yaml of this
project's recipes (top-level folder of the repository, package data when installed) and of the user's own
folders (environment variable VERL_TRB_RECIPES, separated by colons, searched first) serve as that folder.
Files whose name starts with an underscore are parts for recipes to include and are not listed.
"""

import importlib.util
import os
from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin

from verl_trb.errors import UserError

GROUP = "recipe"
ENVIRONMENT = "VERL_TRB_RECIPES"


class RecipeSource(FileConfigSource):
    """Serves the files of one folder as the config group `recipe`."""

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def load_config(self, config_path: str) -> ConfigResult:
        return super().load_config(_within_group(config_path))

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", GROUP) and super().is_group("")

    def is_config(self, config_path: str) -> bool:
        return config_path.startswith(f"{GROUP}/") and super().is_config(_within_group(config_path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path != GROUP:
            return [GROUP] if results_filter != ObjectType.CONFIG else []
        return [name for name in super().list("", results_filter) if not name.startswith("_")]


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


def recipe_names() -> list[str]:
    """Names that `recipe=` takes, sorted."""
    files = (file for folder in recipe_folders() for file in folder.glob("*.yaml"))
    return sorted({file.stem for file in files if not file.stem.startswith("_")})


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


def _within_group(config_path: str) -> str:
    return config_path.removeprefix(f"{GROUP}/")
