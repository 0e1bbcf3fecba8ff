"""The CUDA kernels' own source, compiled by g++ and run on the host: `build` makes the module, `HostTiles` runs it."""

import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pybind11

from dadpo_kernels.ops.backends.cuda import CudaTiles

HERE = Path(__file__).parent
CUDA = HERE.parents[2] / "csrc" / "cuda"
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
THREADS = 64  # of a block: two warps
VARIANTS = {
    "plain": ["-O1"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-pthread", "-fsanitize=thread", "-DDADPO_HOST_THREADS"],
}


def build(directory: Path, variant: str = "plain", cuda: Path = CUDA, ready: Sequence[Path] = ()) -> Path:
    """Compiles `cuda`, the sources, but for those whose object is among `ready`; the module's path."""
    directory.mkdir(parents=True, exist_ok=True)
    include = [f"-I{HERE}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    define = [f"-DDADPO_THREADS={THREADS}", '-DDADPO_CUDA_ARCHITECTURES="host"']
    objects = {o.stem: o for o in ready}
    jobs = []
    for source in (*cuda.glob("*.cu"), cuda / "module.cpp"):
        if source.stem in objects:
            continue
        target = objects[source.stem] = directory / f"{source.stem}.o"
        flags = [*VARIANTS["plain" if source.suffix == ".cpp" else variant], *FLAGS, *include, *define]
        jobs.append(subprocess.Popen(["g++", "-x", "c++", *flags, "-c", source, "-o", target]))
    codes = [job.wait() for job in jobs]
    assert not any(codes)
    module = directory / "_cuda.so"
    subprocess.run(["g++", "-shared", *VARIANTS[variant], *objects.values(), "-o", module], check=True)
    return module


@cache
def plain() -> Path:
    """The module for ordinary tests, built once; the sanitized ones share its object of the binding."""
    return build(Path(tempfile.mkdtemp(prefix="cuda_host_")))


class HostTiles(CudaTiles):
    """The backend itself, on CPU tensors."""

    def queue(self):
        return self.module.Queue(0, 0)
