"""What pip makes of a clean checkout, with and without compilers.

The cheap half runs always. DADPO_PACKAGING=1 adds the other: builds and installs through build isolation, each in an
environment of its own, for minutes and from the package index. TORCH_PYTHON names further Pythons (as PATH does) that
have PyTorch, numpy, pytest and hypothesis: the wheel's CPU tests run on each.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = [p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/*/*")]
CUDA = ("nvcc", "ptxas", "cicc", "fatbinary", "nvlink")
HOST = ("g++", "gcc", "c++", "cc", "clang", "clang++", "x86_64-linux-gnu-", "aarch64-linux-gnu-")
thorough = pytest.mark.skipif(os.environ.get("DADPO_PACKAGING") != "1", reason="DADPO_PACKAGING=1 runs it: minutes")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The tree without anything built."""
    copy = tmp_path_factory.mktemp("checkout") / "dadpo-kernels"
    ignored = shutil.ignore_patterns(".git", ".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "runs")
    return shutil.copytree(ROOT, copy, ignore=ignored)


def without(names: tuple[str, ...], directory: Path) -> dict[str, str]:
    """The environment, its PATH less the programs whose names start so."""
    directory.mkdir(parents=True)
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).glob("*"):
            link = directory / program.name
            if not program.name.startswith(names) and not os.path.lexists(link):
                link.symlink_to(program)
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC", "CUDA_HOME", "CUDA_PATH")}
    return {**environment, "PATH": str(directory)}


def build(hook: str, source: Path, out: Path, env: dict[str, str] | None = None) -> Path:
    """Calls the build backend as pip and build do."""
    out.mkdir()
    code = f"from setuptools.build_meta import {hook}; {hook}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, env=env, check=True, capture_output=True)
    return next(out.iterdir())


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    """The unpacked source distribution."""
    out = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("build_sdist", checkout, out / "packed")) as archive:
        archive.extractall(out / "unpacked", filter="data")
    return next((out / "unpacked").iterdir())


def test_sdist_has_every_source(sdist):
    paths = {p.relative_to(sdist).as_posix() for p in sdist.rglob("*")}
    assert len(SOURCES) > 10
    for name in (*SOURCES, "setup.py", "pyproject.toml", "README.md", "LICENSE", "dadpo_kernels/py.typed"):
        assert name in paths, name


def check_contents(wheel: Path, modules: set[str]) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packages = {p.relative_to(ROOT).as_posix() for p in (ROOT / "dadpo_kernels").rglob("*.py")}
    assert packages <= set(names)
    assert {n.split("/")[1].split(".")[0] for n in names if n.endswith((".so", ".pyd"))} == modules
    strangers = [n for n in names if not n.startswith(("dadpo_kernels/", "dadpo_kernels-"))]
    assert not strangers
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_without_any_compiler(sdist, tmp_path):
    """Pure Python, and it works: the doctor tells what is missing."""
    environment = without((*CUDA, *HOST), tmp_path / "bin")
    wheel = build("build_wheel", sdist, tmp_path / "wheel", environment)
    check_contents(wheel, set())
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    # An editable install here may stand before PYTHONPATH.
    code = """
import sys
sys.path.insert(0, sys.argv[1])
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
import torch, dadpo_kernels as d
assert d.__file__.startswith(sys.argv[1]), d.__file__
from dadpo_kernels.cli.main import main
out = d.linear_selected_logps(torch.ones(2, 3), torch.randn(5, 3), torch.tensor([1, 4]))
assert out.label.isfinite().all()
main(["doctor"])
"""
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "installed")]
    text = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "_cpu: not built; install g++ or clang++" in text
    assert "_cuda: not built; for NVIDIA GPUs, install the CUDA toolkit's nvcc" in text
    assert "cpu float32   torch" in text


def test_required_modules_fail_the_build(sdist, tmp_path):
    environment = {**without((*CUDA, *HOST), tmp_path / "bin"), "DADPO_REQUIRE": "1", "DADPO_CUDA": "0"}
    with pytest.raises(subprocess.CalledProcessError) as error:
        build("build_wheel", sdist, tmp_path / "wheel", environment)
    assert b"no C++ compiler found: install g++ or clang++" in error.value.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
@pytest.mark.parametrize("listed", ["7.5", "Hopper", "8.0;nine"])
def test_unknown_architectures_are_named(sdist, tmp_path, listed):
    environment = {**os.environ, "DADPO_REQUIRE": "1", "DADPO_CPU": "0", "TORCH_CUDA_ARCH_LIST": listed}
    with pytest.raises(subprocess.CalledProcessError) as error:
        build("build_wheel", sdist, tmp_path / "wheel", environment)
    assert f"TORCH_CUDA_ARCH_LIST has {listed.split(';')[-1]!r}".encode() in error.value.stderr


COMPILER = """#!/bin/sh
echo "$0 $*" >> {log}
case "$1" in --list-gpu-arch) echo "{known}"; exit;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""


@pytest.mark.parametrize(
    ("listed", "known", "named", "codes"),
    [
        ("8.6;9.0a+PTX", "", "8.6 9.0a+PTX", "86,code=sm_86 90a,code=sm_90a 90a,code=compute_90a"),
        ("12.0", "", "12.0", "120,code=sm_120"),
        ("", "compute_100", "8.0 9.0a 10.0+PTX", "80,code=sm_80 90a,code=sm_90a 100,code=sm_100 100,code=compute_100"),
        ("", "compute_90", "8.0 9.0a 9.0+PTX", "80,code=sm_80 90a,code=sm_90a 90,code=sm_90 90,code=compute_90"),
    ],
)
def test_listed_architectures_are_compiled_and_no_others(sdist, tmp_path, listed, known, named, codes):
    """With programs in the place of the compilers, under CUDA_HOME and CXX: what they are told."""
    log = tmp_path / "log"
    (tmp_path / "bin").mkdir()
    for name in ("nvcc", "cxx"):
        (tmp_path / "bin" / name).write_text(COMPILER.format(log=log, known=known))
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        **os.environ, "DADPO_REQUIRE": "1", "DADPO_CPU": "0", "TORCH_CUDA_ARCH_LIST": listed,
        "CUDA_HOME": str(tmp_path), "CXX": str(tmp_path / "bin" / "cxx"),
    }  # fmt: skip
    source = shutil.copytree(sdist, tmp_path / "source")
    check_contents(build("build_wheel", source, tmp_path / "wheel", environment), {"_cuda"})
    calls = log.read_text().splitlines()
    kernels = [call for call in calls if ".cu " in call]
    assert len(kernels) == len([name for name in SOURCES if name.endswith(".cu")])
    for call in kernels:
        asked = [word for word in call.split() if "gencode" in word]
        assert asked == [f"-gencode=arch=compute_{code}" for code in codes.split()]
    (binding,) = (call for call in calls if "module.cpp" in call)
    assert f'-DDADPO_CUDA_ARCHITECTURES="{named}"' in binding
    (link,) = (call for call in calls if "-shared" in call)
    assert "-cudart static" in link


CASES = {
    "with nvcc": ((), {"_cpu", "_cuda"}),
    "without nvcc": (CUDA, {"_cpu"}),
    "no compiler": ((*CUDA, *HOST), set()),
}


@thorough
@pytest.mark.parametrize("case", CASES)
def test_install_into_a_clean_environment(checkout, tmp_path, case):
    """`pip install .`; PyTorch is lent from here, to save the download."""
    missing, modules = CASES[case]
    if "_cuda" in modules and not shutil.which("nvcc"):
        pytest.skip("no nvcc here")
    environment = without(missing, tmp_path / "bin")
    copy = shutil.copytree(checkout, tmp_path / "checkout")  # pip builds in place: nothing may be left of another case
    python = clean_python(tmp_path)
    start = time.time()
    command = [python, "-m", "pip", "install", "--no-deps", "--no-cache-dir", "."]
    subprocess.run(command, cwd=copy, env=environment, check=True)
    print(f"\n{case}: installed in {time.time() - start:.0f} s")
    lend_packages(python, Path(torch.__file__).parents[1])
    text = subprocess.run(
        [python, "-P", "-m", "dadpo_kernels.cli", "doctor"],
        env=environment, cwd=tmp_path, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in ("_cpu", "_cuda"):
        assert (f"{name}: not built" in text) == (name not in modules), text


@thorough
def test_build_makes_an_sdist_and_a_wheel_for_every_pytorch(checkout, tmp_path):
    """`python -m build`: the wheel is made from the sdist; then its tests, on this PyTorch and on those of others."""
    python = clean_python(tmp_path)
    subprocess.run([python, "-m", "pip", "install", "build"], check=True)
    start = time.time()
    subprocess.run([python, "-m", "build", "--outdir", tmp_path / "dist", checkout], check=True)
    print(f"\nbuilt in {time.time() - start:.0f} s")
    for made in sorted((tmp_path / "dist").iterdir()):
        print(f"{made.stat().st_size / 2**20:.2f} MiB {made.name}")
    (archive,), (wheel,) = ((tmp_path / "dist").glob(pattern) for pattern in ("*.tar.gz", "*.whl"))
    with tarfile.open(archive) as opened:
        assert {name.split("/", 1)[-1] for name in opened.getnames()}.issuperset(SOURCES)
    check_contents(wheel, {"_cpu", "_cuda"} if shutil.which("nvcc") else {"_cpu"})
    run_tests(Path(sys.executable), wheel, tmp_path / "here")
    for n, other in enumerate(filter(None, os.environ.get("TORCH_PYTHON", "").split(os.pathsep))):
        run_tests(Path(other), wheel_for(other, wheel, archive, tmp_path / f"wheel-{n}"), tmp_path / f"other-{n}")


def clean_python(directory: Path) -> Path:
    venv.create(directory / "venv", with_pip=True)
    return directory / "venv" / "bin" / "python"


def wheel_for(python: str, wheel: Path, archive: Path, directory: Path) -> Path:
    """The same wheel for the same version of Python, whatever its PyTorch; for another one its own, of the sdist."""
    code = "import sys; print('cp%d%d' % sys.version_info[:2])"
    tag = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    if tag in wheel.name:
        return wheel
    subprocess.run([python, "-m", "pip", "wheel", "--no-deps", "-w", directory, archive], check=True)
    return next(directory.iterdir())


def lend_packages(python: Path, packages: Path) -> None:
    code = "import site; print(site.getsitepackages()[0])"
    place = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    (Path(place) / "lent.pth").write_text(f"{packages}\n")


def run_tests(python: Path, wheel: Path, directory: Path) -> None:
    """The wheel's CPU tests, from a directory in which there is no source to import instead."""
    shutil.copytree(ROOT / "tests", directory / "tests")
    zipfile.ZipFile(wheel).extractall(directory / "installed")
    places = [directory / "installed", directory]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    code = "import sys, torch, dadpo_kernels as d; print(d.__file__, 'on', torch.__version__, sys.version)"
    subprocess.run([python, "-P", "-c", code], env=environment, cwd=directory, check=True)
    files = [
        *(f"tests/ops/test_{name}.py" for name in ("selected_logps", "topk_logps")),
        "tests/losses/test_divergence.py",
        "tests/cli/test_doctor.py",
    ]
    command = [python, "-P", "-m", "pytest", "-q", "-k", "not real and not agrees", "--rootdir", directory, *files]
    subprocess.run(command, env=environment, cwd=directory, check=True)
