"""Builds the C++ extension through ninja: one object per instruction set, no PyTorch header.

Without a compiler the package still installs, in pure Python; `dadpo doctor` says what is missing. Switches:
    DADPO_CPU=0         leave the CPU module out
    DADPO_REQUIRE=1     fail instead of leaving a module out
    DADPO_MAX_JOBS=N    compile jobs (default: ninja's)
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = {  # best first: the module takes the first that the processor has
    "v4_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    "v4": ["-march=x86-64-v4"],
    "v3": ["-march=x86-64-v3"],
    "v2": ["-march=x86-64-v2"],
}
ISAS = X86 if platform.machine().lower() in ("x86_64", "amd64") else {"generic": []}


def compiler() -> str | None:
    command = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    return command if command and shutil.which(shlex.split(command)[0]) else None


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            self.ninja(ext, compiler())
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if os.environ.get("DADPO_REQUIRE") == "1":
                raise
            print(
                f"dadpo-kernels: {ext.name} is left out ({error}); `dadpo doctor` tells what is missing",
                file=sys.stderr,
            )

    def ninja(self, ext: Extension, cxx: str | None) -> None:
        if cxx is None:
            raise RuntimeError("no C++ compiler found: install g++ or clang++, or set CXX")
        import ninja
        import pybind11
        from ninja.ninja_syntax import Writer

        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        source = ROOT.resolve() / "csrc" / "cpu"
        common = shlex.split(
            "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=fast -Wall -Wextra"
        )
        include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        listed = " ".join(f"F({isa})" for isa in ISAS)
        shared = "-shared -pthread" + (" -undefined dynamic_lookup" if sys.platform == "darwin" else "")
        objects = []
        with (build / "build.ninja").open("w") as file:
            n = Writer(file)
            n.rule("cxx", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
            n.rule("link", f"{cxx} {shared} $in -o $out")

            def compile_to(name: str, source_name: str, *flags: str) -> None:
                variables = {"flags": shlex.join([*common, *flags])}
                objects.extend(n.build(name, "cxx", str(source / source_name), variables=variables))

            for isa, flags in ISAS.items():
                compile_to(f"{isa}.o", "passes.cpp", *flags, f"-DDADPO_ISA={isa}")
            compile_to("module.o", "module.cpp", *include, f"-DDADPO_FOR_EACH_ISA(F)={listed}")
            n.build(str(target), "link", objects)
        jobs = os.environ.get("DADPO_MAX_JOBS")
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), *(["-j", jobs] if jobs else [])], cwd=build, check=True)


enabled = [] if os.environ.get("DADPO_CPU") == "0" else [Extension("dadpo_kernels._cpu", sources=[], optional=True)]
setup(ext_modules=enabled, cmdclass={"build_ext": NinjaBuild})
