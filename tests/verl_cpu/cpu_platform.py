"""verl on a CPU: the platform `cpu`, loaded through VERL_USE_EXTERNAL_MODULES and VERL_PLATFORM=cpu."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

init_process_group = torch.distributed.init_process_group


def init_each_backend_once(backend: str | None = None, **settings: Any) -> None:
    """verl requests `cpu:gloo,<device>:<its backend>`, and torch refuses a device that is listed twice."""
    init_process_group(backend and ",".join(dict.fromkeys(backend.split(","))), **settings)


torch.distributed.init_process_group = init_each_backend_once
# verl offloads the reference model of a KL term to pinned memory, which only an accelerator has.
torch.Tensor.pin_memory = lambda self, *_: self


class CpuModule(ModuleType):
    """`torch.cpu` with the functions of `torch.cuda` that verl also calls; memory counts as 0 bytes."""

    is_available = staticmethod(torch.cpu.is_available)
    set_device = staticmethod(torch.cpu.set_device)
    synchronize = staticmethod(torch.cpu.synchronize)
    empty_cache = staticmethod(lambda: None)
    memory_allocated = memory_reserved = staticmethod(lambda: 0)
    max_memory_allocated = max_memory_reserved = staticmethod(lambda: 0)
    mem_get_info = staticmethod(lambda: (0, 0))
    set_rng_state = staticmethod(torch.set_rng_state)
    get_device_name = staticmethod(lambda: "CPU")


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """One CPU, whose ranks Ray schedules like GPUs, the only resource that verl's pools support."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = CpuModule("cpu")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> nullcontext[None]:
        return nullcontext()

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None
