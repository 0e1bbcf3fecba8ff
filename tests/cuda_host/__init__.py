"""The CUDA kernels' own source, compiled by g++ and run on the host: `build` makes the module, `HostTiles` runs it."""

import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

from dadpo_kernels.backends.cuda import CudaTiles

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-pthread",
]
VARIANTS = {
    "plain": ["-O2"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-pthread", "-fsanitize=thread", "-DDADPO_HOST_THREADS"],
}


def build(directory: Path, variant: str = "plain", threads: int = 64, cuda: Path = CUDA) -> Path:
    """Compiles `cuda`, the sources, for blocks of this many threads; the module's path."""
    directory.mkdir(parents=True, exist_ok=True)
    include = [f"-I{HERE}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = [*FLAGS, *VARIANTS[variant], *include, f"-DDADPO_THREADS={threads}", '-DDADPO_CUDA_ARCHITECTURES="host"']
    sources = [*sorted(cuda.glob("*.cu")), cuda / "module.cpp"]
    objects = [directory / f"{source.stem}.o" for source in sources]
    jobs = [
        subprocess.Popen(["g++", "-x", "c++", *flags, "-c", source, "-o", target])
        for source, target in zip(sources, objects, strict=True)
    ]
    codes = [job.wait() for job in jobs]
    assert not any(codes)
    module = directory / "_cuda.so"
    subprocess.run(["g++", "-shared", *FLAGS, *VARIANTS[variant], *objects, "-o", module], check=True)
    return module


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_host._cuda", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class HostTiles(CudaTiles):
    """The backend itself, on CPU tensors."""

    blocks = 1

    def queue(self):
        return self.module.Queue(0, 0)

    def busy_blocks(self) -> int:
        return self.blocks
