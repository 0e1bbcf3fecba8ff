"""The CUDA kernels on the host under the sanitizers, and bugs planted in their source, which must be caught."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cuda_host

SANITIZERS = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are loaded as on Linux")


def run(module: Path, variant: str, script: str) -> subprocess.CompletedProcess:
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in SANITIZERS[variant]
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip(f"g++ has no {variant} sanitizer here")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "TSAN_OPTIONS": "halt_on_error=1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, ROOT / "tests" / "support" / "cuda_host" / script, module]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module", params=SANITIZERS)
def sanitized(request, tmp_path_factory):
    """`(variant, module)`"""
    binding = cuda_host.plain().with_name("module.o")
    module = cuda_host.build(tmp_path_factory.mktemp(request.param), request.param, ready=[binding])
    return request.param, module


def test_kernels_are_clean(sanitized):
    variant, module = sanitized
    done = run(module, variant, "check.py")
    assert (done.returncode, done.stdout) == (0, "checked\n"), done.stderr[-5000:]


BUGS = {
    "address": ("&& first + j < a.columns; j", "; j", "heap-buffer-overflow"),
    "thread": ("bank(i, lane)] = sums[i];\n    __syncthreads();", "bank(i, lane)] = sums[i];", "data race"),
}


def test_planted_bug_is_caught(sanitized, tmp_path):
    """A bound that is not checked, and a barrier that is missing."""
    variant, module = sanitized
    assert run(module, variant, "sums.py").returncode == 0  # as it is
    good, bad, message = BUGS[variant]
    copy = tmp_path / "csrc"
    shutil.copytree(cuda_host.CUDA.parent, copy)
    source = copy / "cuda" / "rows.cu"
    assert source.read_text().count(good) == 1
    source.write_text(source.read_text().replace(good, bad))
    ready = [*module.parent.glob("*.o"), cuda_host.plain().with_name("module.o")]
    ready = [o for o in ready if o.stem != "rows"]
    done = run(cuda_host.build(tmp_path / "planted", variant, copy / "cuda", ready), variant, "sums.py")
    assert done.returncode != 0
    assert message in done.stderr
    assert "column_sums_kernel" in done.stderr
