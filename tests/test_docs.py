"""Examples in docstrings run."""

import doctest
import importlib

import pytest
import torch

import leannorm

NAMES = ["activation", "functional", "spelling", "nn.batchnorm", "conversion.swap", "conversion.recalibration"]


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
