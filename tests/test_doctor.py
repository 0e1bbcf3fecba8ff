"""`dadpo doctor` tells what is built, what is picked, and why."""

import pytest

from dadpo_kernels.backends import cpu
from dadpo_kernels.cli import main
from dadpo_kernels.doctor import report


def test_report(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"_cpu: built; runs {cpu._cpu.active()}" in text
    assert "cpu bfloat16  cpu\n" in text
    assert "not cpu: it takes torch.float32 and torch.bfloat16, not torch.float64" in text


@pytest.mark.parametrize(("compiler", "remedy"), [("/usr/bin/g++", "g++ is here now"), (None, "install g++")])
def test_without_the_extension(monkeypatch, compiler, remedy):
    monkeypatch.setattr(cpu, "_cpu", None)
    monkeypatch.setattr("shutil.which", lambda name: compiler if name == "g++" else None)
    text = report()
    assert f"_cpu: not built; {remedy}" in text
    assert "cpu float32   torch; not cpu: the extension dadpo_kernels._cpu is not built" in text
