"""Imports go one way, down the layers; every public name resolves."""

import ast
import importlib
from pathlib import Path

import pytest

import dadpo_kernels

PACKAGE = Path(dadpo_kernels.__file__).parent
LAYERS = ("ops", "losses", "models", "cache", "capture", "train", "cli")  # each may import those before it


def imported_layers(path: Path) -> set[str]:
    """Layers that a module of the package imports, wherever in its text."""
    package = path.relative_to(PACKAGE).parts[:-1]
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = [*package[: len(package) - node.level + 1], *(node.module or node.names[0].name).split(".")]
            imported.add(target[0])
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            imported |= {name.split(".")[1] for name in names if name.startswith("dadpo_kernels.")}
    return imported & set(LAYERS)


@pytest.mark.parametrize("number", range(len(LAYERS)), ids=LAYERS)
def test_no_import_goes_up(number):
    for path in (PACKAGE / LAYERS[number]).rglob("*.py"):
        assert imported_layers(path) <= set(LAYERS[: number + 1]), path


def test_layers_are_the_whole_package():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(LAYERS)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "integrations.py"}
    with pytest.raises(ImportError, match="From dadpo_kernels itself import patch, TRLDaDPOConfig"):
        importlib.import_module("dadpo_kernels.integrations.trl")


def test_public_names():
    for name in dadpo_kernels.__all__:
        assert getattr(dadpo_kernels, name) is not None
    for module, names in dadpo_kernels._MODULES.items():
        for name in names:
            assert getattr(importlib.import_module(f"dadpo_kernels.{module}"), name).__name__ == name
    typed = {
        (node.module, alias.asname)
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert typed == {(module, name) for module, names in dadpo_kernels._MODULES.items() for name in names}
    assert set(dadpo_kernels.__all__) <= set(dir(dadpo_kernels))
    with pytest.raises(AttributeError, match="'no_such_name'"):
        _ = dadpo_kernels.no_such_name
