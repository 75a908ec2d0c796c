"""The map of CONTRIBUTING.md, held by reading the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import leannorm

SOURCE = Path(leannorm.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

MAY_IMPORT = {
    "activation": set(),
    "records": set(),
    "methods": set(),
    "statistics": set(),
    "sampling": {"statistics"},
    "spelling": {"methods", "sampling", "statistics"},
    "ops": set(),
    "backends": {"ops"},
    "functional": {"activation", "backends", "ops", "statistics"},
    "nn": {"activation", "functional", "methods", "ops", "statistics"},
    "conversion": {"activation", "backends", "methods", "nn", "ops", "records", "sampling", "statistics"},
    "graph": {"functional", "nn", "records"},
    "quantize": {"nn", "records"},
    "report": {"records"},
    "train": {"conversion", "methods", "nn", "ops", "records", "spelling", "statistics"},
    "deploy": {"conversion", "graph", "quantize", "records", "report", "train"},
    "bench": {"activation", "conversion", "nn", "ops", "records", "spelling", "statistics", "train"},
    "__main__": {"cli"},
    "termination": set(),
    "cli": {"bench", "deploy", "records", "report", "termination", "train"},
}


def area(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_areas(path: Path) -> set[str]:
    """Give the areas of leannorm that a file imports, by name or as a public name of the package."""
    areas = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "leannorm":
            names = [
                leannorm._HOMES.get(alias.name, f"leannorm.{alias.name}")
                for alias in node.names
                if not alias.name.startswith("__")
            ]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        else:
            continue
        areas |= {name.split(".")[1] for name in names if name.startswith("leannorm.")}
    return areas


@pytest.mark.parametrize("path", [f for f in FILES if f.parent != SOURCE or f.name != "__init__.py"], ids=str)
def test_imports_follow_the_map(path):
    here = area(path)
    assert imported_areas(path) - {here} <= MAY_IMPORT[here]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_small_and_named(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 380
    assert path.stem not in ("utils", "helpers", "common", "misc")


def test_public_names_are_real_and_documented():
    assert sorted(leannorm._HOMES) == sorted(leannorm.__all__)
    for name in leannorm.__all__:
        assert getattr(leannorm, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = leannorm.nothing


def test_importing_leannorm_imports_nothing_heavy():
    code = "import leannorm, sys; assert not {'torch', 'numpy', 'lightning', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
