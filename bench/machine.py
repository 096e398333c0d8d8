"""The machine as far as it explains a figure: processor, memory, device, versions. No host name, no path."""

import importlib.metadata
import os
import platform
import resource
from pathlib import Path
from typing import Any

import torch

from speeder_engine.encoders.sources import has_native_bf16

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
PACKAGES = ("torch", "numpy", "transformers", "triton", "onnxruntime", "openvino", "faiss-cpu")
PROC = Path("/proc")


def describe(device: torch.device) -> dict[str, Any]:
    """Flat: strings and numbers."""
    found: dict[str, Any] = {
        "cpu": cpu_field("model name") or platform.processor() or platform.machine(),
        "cpu_flags": " ".join(flag for flag in FLAGS if flag in (cpu_field("flags") or "").split()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package.replace("-", "_"): version for package in PACKAGES if (version := version_of(package))},
    }
    if device.type == "cuda":
        held = torch.cuda.get_device_properties(device)
        found |= {"gpu": held.name, "gpu_memory_gib": round(held.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return found


def served_dtype(device: torch.device) -> str:
    """bfloat16 where the device multiplies it. Elsewhere torch emulates it, a hundred times slower: nobody would run
    that."""
    return "bfloat16" if has_native_bf16(device) else "float32"


def cpu_field(name: str) -> str | None:
    """The first processor's, where the system says it."""
    try:
        lines = (PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        return None
    values = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name)
    return next(values, None)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def reset_peak(device: torch.device) -> None:
    """From now on `peak_mib` counts anew, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        (PROC / "self" / "clear_refs").write_text("5")
    except OSError:
        return


def peak_mib(device: torch.device) -> float:
    """Most memory held at a time since `reset_peak`: on a GPU what torch allocated, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = (PROC / "self" / "status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
