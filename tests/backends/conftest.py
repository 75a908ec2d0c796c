import pytest

from leannorm.backends import cpu


@pytest.fixture(params=cpu._kernels.instruction_sets() if cpu.available else [])
def instruction_set(request):
    """Compute with each instruction set that the machine has."""
    best = cpu._kernels.instruction_set()
    cpu._kernels.use_instruction_set(request.param)
    yield request.param
    cpu._kernels.use_instruction_set(best)
