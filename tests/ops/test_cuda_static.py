"""What nvcc made of the CUDA kernels, read from the built module: needs nvcc at install time, and no GPU."""

import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dadpo_kernels.ops.backends import cuda
from dadpo_kernels.ops.backends.cuda import obstacle, runs_on
from dadpo_kernels.ops.backends.registry import resolve

KERNELS = {  # how many variants, and the least number of 128-bit loads and stores for each chunk of a row
    "forward_kernel": (18, 2, 1),
    "logit_gradient_kernel": (18, 2, 1),
    "column_sums_kernel": (3, 4, 0),
    "topk_kernel": (2, 2, 0),
    "exchange_kernel": (3, 0, 0),
}

built = pytest.mark.skipif(cuda._cuda is None, reason="dadpo_kernels._cuda is not built here (no nvcc)")


def cuobjdump() -> str:
    """CUDA's, or the one that comes with Triton."""
    triton = find_spec("triton")
    places = [Path(p) / "backends" / "nvidia" / "bin" for p in (triton.submodule_search_locations if triton else [])]
    program = shutil.which("cuobjdump") or next((p for d in places if (p := shutil.which("cuobjdump", path=d))), None)
    if not program:
        pytest.skip("no cuobjdump: it comes with CUDA's toolkit and with triton")
    return program


@cache
def dump(*options: str) -> str:
    command = [cuobjdump(), *options, cuda._cuda.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def chunks_of(name: str) -> int:
    """Of a row, in a kernel with this mangled name."""
    match = re.search(r"_kernelI\w*?Li(\d+)E", name)
    return int(match[1]) if match else 1


def architectures() -> list[str]:
    listed = cuda._cuda.ARCHITECTURES if cuda._cuda else ""
    return [f"sm_{v.removesuffix('+PTX').replace('.', '')}" for v in listed.split()]


@built
@pytest.mark.parametrize("arch", architectures())
def test_resources(arch):
    """No spills, no stack, no local memory; as many blocks fit as hide each other's waits."""
    text = dump("--dump-resource-usage")
    sections = [s for s in re.split(r"Fatbin (?=elf|ptx)", text) if re.search(rf"arch = {arch}\n", s)]
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", "".join(sections))
    for kernel, (variants, _, _) in KERNELS.items():
        instances = [u for u in usage if kernel in u[0]]
        assert len(instances) == variants, kernel
        for name, registers, stack, shared, local in instances:
            assert (stack, local) == ("0", "0"), name
            assert int(registers) <= 65_536 // (384 if chunks_of(name) > 3 else 1024), name
            assert int(shared) <= 17 * 1024, name  # of which the system may take 1 KiB


@built
@pytest.mark.parametrize("arch", architectures())
def test_instructions(arch):
    """128-bit accesses where there is a row to read or write; nothing atomic; nothing spilled."""
    functions = re.split(r"Function : ", dump("-sass", "-arch", arch))[1:]
    for kernel, (variants, loads, stores) in KERNELS.items():
        instances = [f for f in functions if kernel in f.splitlines()[0]]
        assert len(instances) == variants, kernel
        for code in instances:
            name = code.splitlines()[0]
            chunks = chunks_of(name)
            assert len(re.findall(r"\bLDG\.E\.128", code)) >= chunks * loads, name
            assert len(re.findall(r"\bSTG\.E\.128", code)) >= chunks * stores, name
            assert not re.search(r"\b(ATOM|ATOMG|ATOMS|RED|STL|LDL)\b", code), name


@built
@pytest.mark.parametrize("arch", architectures())
def test_loads_are_in_flight_together(arch):
    """The 128-bit loads of all of a thread's vectors are issued before the first exponential needs one."""
    for code in re.split(r"Function : ", dump("-sass", "-arch", arch))[1:]:
        name = code.splitlines()[0]
        if "forward_kernel" in name:
            before = code[: code.index("MUFU.EX2")]
            assert len(re.findall(r"\bLDG\.E\.128", before)) >= 2 * chunks_of(name)


@built
def test_without_a_gpu():
    """The module is imported without a driver; a launch says what is missing."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(RuntimeError, match=r"CUDA kernel exchange was not launched: .*(driver|device)"):
        cuda._cuda.exchange(cuda._cuda.Queue(0, 0), cuda._cuda.Matrix(0, 1, cuda._cuda.Type.f32), 1, 1, 0, 1, 0)


def test_reasons(monkeypatch):
    with pytest.raises(ValueError, match='backend="cuda" cannot run this call: the tensors are on cpu'):
        resolve("cuda", torch.device("cpu"), torch.float32)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "not torch.float64" in obstacle(gpu, torch.float64)
    monkeypatch.setattr(cuda, "_cuda", None)
    assert "not built (it needs nvcc" in obstacle(gpu, torch.float32)
    monkeypatch.setattr(cuda, "_cuda", type("Module", (), {"ARCHITECTURES": "8.0 9.0a"}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    assert (
        "built for 8.0 9.0a and this device has compute capability 12.0: reinstall with TORCH_CUDA_ARCH_LIST=12.0"
        in (obstacle(gpu, torch.float32))
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert obstacle(gpu, torch.float32) is None


@pytest.mark.parametrize(
    ("architectures", "runs", "fails"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0)]),
        ("9.0a", [(9, 0)], [(9, 1), (10, 0)]),
        ("8.0 9.0a 10.0+PTX", [(8, 0), (9, 0), (10, 0), (10, 3), (12, 0), (13, 1)], [(7, 5)]),
        ("12.0f", [(12, 0)], [(8, 0)]),
    ],
)
def test_which_devices_an_architecture_serves(architectures, runs, fails):
    assert all(runs_on(architectures, c) for c in runs)
    assert not any(runs_on(architectures, c) for c in fails)
