"""What a reader of GPU figures must know of the device: its name, its driver, the versions of what drives it."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from padst_kernels.gpu.timing import l2_bytes

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class DeviceFacts:
    """A GPU with its software; bytes of its memory and of its L2 cache."""

    name: str
    capability: str
    memory_bytes: int
    l2_bytes: int
    driver: str
    cuda: str
    torch: str
    triton: str
    transformers: str

    @property
    def sentence(self) -> str:
        """The same in one line."""
        memory, l2 = self.memory_bytes / 2**30, self.l2_bytes / 2**20
        return (
            f"{self.name} ({memory:.0f} GiB, L2 {l2:.0f} MiB, compute capability {self.capability}), "
            f"driver {self.driver}, CUDA {self.cuda}, torch {self.torch}, triton {self.triton}, "
            f"transformers {self.transformers}"
        )


def device_facts(device: torch.device) -> DeviceFacts | None:
    """The facts of a GPU, None for the CPU."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return DeviceFacts(
        name=found.name,
        capability=f"{found.major}.{found.minor}",
        memory_bytes=found.total_memory,
        l2_bytes=l2_bytes(device),
        driver=_driver(),
        cuda=str(torch.version.cuda or torch.version.hip),
        torch=torch.__version__,
        triton=_version("triton"),
        transformers=_version("transformers"),
    )


def _driver() -> str:
    """The version of NVIDIA's driver, from its own file or tool; `unknown` where neither says it."""
    try:
        found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        found = None
    if found:
        return found.group()
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.split()[0] if said.split() else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
