"""Extension modules that tests compile."""

import importlib.util
from pathlib import Path
from types import ModuleType


def load(path: Path) -> ModuleType:
    """The module of a shared library whose file has its name, beside any other of that name."""
    spec = importlib.util.spec_from_file_location(f"tests.{path.parent.name}.{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
