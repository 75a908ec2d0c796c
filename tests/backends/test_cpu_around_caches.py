"""Results that the native kernels write around the caches: large ones, whose planes or rows may begin within a line."""

import pytest
import torch
from test_cpu import assert_agrees

from cases import Case
from leannorm.activation import as_activation
from leannorm.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.available, reason="the extension was not built")

LARGE = [
    Case("short planes", (32, 750, 7, 9)),
    Case("planes of whole vectors", (16, 700, 14, 14)),
    Case("planes of whole lines", (8, 300, 32, 32)),
    Case("pieces of planes", (2, 18, 261, 257)),
    Case("pieces of few planes", (1, 3, 1001, 857)),
    Case("rows", (16, 192, 28, 28), "channels_last"),
    Case("rows of no whole lines", (16, 200, 28, 28), "channels_last"),
]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large_results(instruction_set, two_threads, case, dtype):
    if dtype == torch.bfloat16:  # as many bytes
        case = Case(case.name, (2 * case.shape[0], *case.shape[1:]), case.layout)
    for seed, source in enumerate(("full", "grid:1/8")):  # other values than those that are left in kept memory
        assert_agrees(case, dtype, source, as_activation("relu"), residual=True, seed=seed)
