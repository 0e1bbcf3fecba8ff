"""The report of `dadpo doctor`: what is installed and built, and which backend a call gets and why."""

import importlib.metadata
import platform
import shutil

import torch

from ..ops.backends import cpu, cuda
from ..ops.backends.registry import BACKENDS, resolve

EXTRAS = ("triton", "transformers", "accelerate", "pyarrow", "trl", "peft", "matplotlib")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def report() -> str:
    """The text that `dadpo doctor` prints."""
    sections = {"Versions": versions(), "Extensions": extensions(), "Backends": backends()}
    return "\n\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections.items())


def versions() -> list[str]:
    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    devices = ["cpu"] + [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        f"dadpo-kernels {version('dadpo-kernels')}, Python {platform.python_version()}, {platform.machine()}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, devices: {', '.join(devices)}",
        *(f"{name} {version(name)}" for name in EXTRAS),
    ]


def extensions() -> list[str]:
    if cpu._cpu:
        can = ", ".join(cpu._cpu.available())
        threads = "PyTorch's OpenMP threads" if cpu._cpu.shares_threads() else "separate threads"
        amx = cpu._cpu.amx_obstacle() or "usable"
        lines = [f"_cpu: built; uses {cpu._cpu.active()} (this processor supports: {can}) on {threads}; AMX: {amx}"]
    else:
        lines = [not_built("_cpu", ("g++", "clang++", "c++"), "install g++ or clang++, then reinstall this package")]
    if cuda._cuda:
        lines.append(f"_cuda: built for compute capabilities {cuda._cuda.ARCHITECTURES}")
    else:
        lines.append(
            not_built(
                "_cuda", ("nvcc",), "for NVIDIA GPUs, install the CUDA toolkit's nvcc, then reinstall this package"
            )
        )
    return lines


def not_built(module: str, compilers: tuple[str, ...], remedy: str) -> str:
    installed = [compiler for compiler in compilers if shutil.which(compiler)]
    remedy = f"{installed[0]} is installed now: reinstall this package" if installed else remedy
    return f"{module}: not built; {remedy} (with DADPO_REQUIRE=1 the installation fails and shows why)"


def backends() -> list[str]:
    lines = []
    for device in map(torch.device, ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]):
        for dtype in DTYPES:
            line = f"{device.type} {str(dtype).removeprefix('torch.'):<9} {resolve('auto', device, dtype)}"
            for name, backend in BACKENDS.items():
                if device.type in backend.devices and (reason := backend.obstacle(device, dtype)):
                    line += f"; not {name}: {reason}"
            lines.append(line)
    return lines
