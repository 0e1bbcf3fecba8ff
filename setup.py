"""Builds the C++ and CUDA extensions through ninja, without any PyTorch header: one wheel serves every PyTorch.

Without a compiler, or without nvcc, the package still installs with what can be built; `dadpo doctor` says what is
missing. Switches:
    DADPO_CPU=0, DADPO_CUDA=0     leave that module out
    DADPO_REQUIRE=1               fail instead of leaving a module out
    DADPO_MAX_JOBS=N              compile jobs (default: ninja's)
    CUDA_HOME                     where bin/nvcc is (default: the one on the PATH)
    TORCH_CUDA_ARCH_LIST          as PyTorch's; by default "8.0;9.0a;10.0+PTX" (before CUDA 12.8: "8.0;9.0a;9.0+PTX")
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
COMMON = "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra"
X86 = {  # best first: the module takes the first that the processor has
    "v4_amx": ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DDADPO_TILES"],
    "v4_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    "v4": ["-march=x86-64-v4"],
    "v3": ["-march=x86-64-v3"],
    "v2": ["-march=x86-64-v2"],
}
ISAS = X86 if platform.machine().lower() in ("x86_64", "amd64") else {"generic": []}


class Missing(Exception):
    """What a module cannot be built without."""


def compiler() -> str:
    command = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    if command is None or not shutil.which(shlex.split(command)[0]):
        raise Missing("no C++ compiler found: install g++ or clang++, or set CXX")
    return command


def cuda_compiler() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if nvcc is None:
        raise Missing(
            f"no nvcc found {'in ' + home if home else 'on the PATH'}: install the CUDA toolkit, set CUDA_HOME"
        )
    return nvcc


def architectures(nvcc: str) -> list[tuple[str, bool]]:
    """`(version, whether PTX too)`, such as `("9.0a", False)`; bfloat16 and warp reductions need 8.0."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        wanted = re.split(r"[;,\s]+", listed.strip("; "))
    else:
        known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
        wanted = ["8.0", "9.0a", "10.0+PTX" if "compute_100" in known else "9.0+PTX"]
    found = []
    for item in wanted:
        match = re.fullmatch(r"(\d+\.\d[af]?)(\+PTX)?", item)
        if not match or float(match[1].rstrip("af")) < 8:
            raise Missing(
                f"TORCH_CUDA_ARCH_LIST has {item!r}: expected versions from 8.0 on, as 8.0, 9.0a or 10.0+PTX"
            )
        found.append((match[1], bool(match[2])))
    return found


def cpu_module(n, target: str) -> None:
    cxx = compiler()
    shared = "-shared -pthread" + (" -undefined dynamic_lookup" if sys.platform == "darwin" else "")
    libraries = "-ldl" if sys.platform == "linux" else ""
    rules(n, f"{cxx} {COMMON} -fno-math-errno -ffp-contract=fast", f"{cxx} {shared}", libraries)
    source = ROOT / "csrc" / "cpu"
    listed = " ".join(f"F({isa})" for isa in ISAS)
    objects = [
        compiled(n, f"{isa}.o", source / "passes.cpp", *flags, f"-DDADPO_ISA={isa}") for isa, flags in ISAS.items()
    ]
    objects.append(compiled(n, "module.o", source / "module.cpp", *headers(), f"-DDADPO_FOR_EACH_ISA(F)={listed}"))
    n.build(target, "link", objects)


def cuda_module(n, target: str) -> None:
    cxx, nvcc = compiler(), cuda_compiler()
    archs = architectures(nvcc)
    codes = []
    for version, ptx in archs:
        number = version.replace(".", "")
        codes.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            codes.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    listed = " ".join(version + "+PTX" * ptx for version, ptx in archs)
    host = f"-ccbin {shlex.quote(shlex.split(cxx)[0])}" if "CXX" in os.environ else ""
    rules(n, f"{cxx} {COMMON}", f"{nvcc} {host} -shared -cudart static -nodlink")
    flags = "-O3 -std=c++17 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall"
    n.rule(
        "nvcc", f"{nvcc} {host} {flags} {' '.join(codes)} -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc"
    )
    source = ROOT / "csrc" / "cuda"
    objects = []
    for kernels in sorted(source.glob("*.cu")):
        objects.extend(n.build(f"{kernels.stem}.o", "nvcc", str(kernels)))
    name = f'-DDADPO_CUDA_ARCHITECTURES="{listed}"'
    objects.append(compiled(n, "module.o", source / "module.cpp", *headers(), name))
    n.build(target, "link", objects)


def rules(n, cxx: str, link: str, libraries: str = "") -> None:
    n.rule("cxx", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
    n.rule("link", f"{link} $in -o $out {libraries}")


def compiled(n, name: str, source: Path, *flags: str) -> str:
    n.build(name, "cxx", str(source), variables={"flags": shlex.join(flags)})
    return name


def headers() -> list[str]:
    import pybind11

    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]


MODULES = {"_cpu": ("DADPO_CPU", cpu_module), "_cuda": ("DADPO_CUDA", cuda_module)}


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            self.ninja(ext)
        except (OSError, Missing, subprocess.CalledProcessError) as error:
            if os.environ.get("DADPO_REQUIRE") == "1":
                raise
            print(
                f"dadpo-kernels: {ext.name} is left out ({error}); `dadpo doctor` tells what is missing",
                file=sys.stderr,
            )

    def ninja(self, ext: Extension) -> None:
        import ninja
        from ninja.ninja_syntax import Writer

        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with (build / "build.ninja").open("w") as file:
            _, module = MODULES[ext.name.split(".")[-1]]
            module(Writer(file), str(target))
        jobs = os.environ.get("DADPO_MAX_JOBS")
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), *(["-j", jobs] if jobs else [])], cwd=build, check=True)


enabled = [
    Extension(f"dadpo_kernels.{name}", sources=[], optional=True)
    for name, (switch, _) in MODULES.items()
    if os.environ.get(switch) != "0"
]
setup(ext_modules=enabled, cmdclass={"build_ext": NinjaBuild})
