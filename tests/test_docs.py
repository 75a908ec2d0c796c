"""The README's examples and those in docstrings run."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import leannorm

NAMES = [
    "activation",
    "functional.given",
    "functional.sampled",
    "methods",
    "spelling",
    "nn.batchnorm",
    "conversion.swap",
    "conversion.explanation",
    "conversion.fusion",
    "conversion.recalibration",
    "graph.pruning",
    "graph.zeros",
]


def test_the_readmes_examples_print_what_they_say(capsys):
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    exec(compile(code, "README.md", "exec"), {})
    promised = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert len(promised) == 6
    assert capsys.readouterr().out.splitlines() == promised


@pytest.mark.parametrize("name", [f"leannorm.{name}" for name in NAMES])
def test_examples(name):
    module = importlib.import_module(name)
    names = {**vars(module), "torch": torch, "nn": torch.nn, "parse_statistics": leannorm.parse_statistics}
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    tests = [test for test in doctest.DocTestFinder().find(module, name, globs=names) if test.examples]
    assert tests, "no example found"
    for test in tests:
        result = doctest.DocTestRunner(optionflags=flags).run(test)
        assert result.failed == 0, test.name
