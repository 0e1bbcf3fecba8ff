"""`dadpo doctor` reports what is built, which backend is chosen, and why."""

from types import SimpleNamespace

import pytest

from dadpo_kernels.cli.doctor_report import report
from dadpo_kernels.cli.main import main
from dadpo_kernels.ops.backends import cpu, cuda


def test_report(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"_cpu: built; uses {cpu._cpu.active()}" in text
    assert "cpu bfloat16  cpu\n" in text
    assert "not cpu: it takes torch.float32 and torch.bfloat16, not torch.float64" in text


@pytest.mark.parametrize(("compiler", "remedy"), [("/usr/bin/g++", "g++ is installed now"), (None, "install g++")])
def test_without_the_extension(monkeypatch, compiler, remedy):
    monkeypatch.setattr(cpu, "_cpu", None)
    monkeypatch.setattr("shutil.which", lambda name: compiler if name == "g++" else None)
    text = report()
    assert f"_cpu: not built; {remedy}" in text
    assert "cpu float32   torch; not cpu: the extension dadpo_kernels._cpu is not built" in text


@pytest.mark.parametrize(
    ("nvcc", "remedy"), [("/usr/bin/nvcc", "nvcc is installed now"), (None, "CUDA toolkit's nvcc")]
)
def test_without_the_cuda_extension(monkeypatch, nvcc, remedy):
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr("shutil.which", lambda name: nvcc if name == "nvcc" else None)
    assert "_cuda: not built; " in report()
    assert remedy in report()


def test_architectures_of_the_cuda_extension(monkeypatch):
    monkeypatch.setattr(cuda, "_cuda", SimpleNamespace(ARCHITECTURES="8.0 9.0a"))
    assert "_cuda: built for compute capabilities 8.0 9.0a" in report()
