"""The CPU kernels with AMX's registers in software: `load` compiles them, as the instruction set `generic`."""

import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11

from tests.support import extension

HERE = Path(__file__).parent
CPU = HERE.parents[2] / "csrc" / "cpu"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-pthread"]
DEFINED = ["-DDADPO_TILES", "-DDADPO_SOFT_TILES", "-DDADPO_ISA=generic", "-DDADPO_FOR_EACH_ISA(F)=F(generic)"]


@cache
def load() -> ModuleType:
    """`dadpo_kernels._cpu`, built anew in a folder of its own."""
    path = Path(tempfile.mkdtemp(prefix="cpu_tiles_")) / "_cpu.so"
    include = [f"-I{HERE}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    sources = [str(CPU / name) for name in ("passes.cpp", "module.cpp")]
    subprocess.run(["g++", "-shared", *FLAGS, *DEFINED, *include, *sources, "-o", str(path), "-ldl"], check=True)
    return extension.load(path)
