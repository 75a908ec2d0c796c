"""Memory that the native CPU kernels keep for their next results."""

import os
import subprocess
import sys
import threading
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import leannorm
from leannorm.backends import cpu
from leannorm.backends.cpu import extension

pytestmark = pytest.mark.skipif(not cpu.available, reason="the extension was not built")

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_kept():
    leannorm.empty_cache()
    yield
    leannorm.empty_cache()


def empty_like(x: torch.Tensor) -> torch.Tensor:
    return extension.empty_like(x, torch.empty_like(x, device="meta").stride())


def kept(mib: float) -> torch.Tensor:
    return empty_like(torch.empty(int(mib * MIB / 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kept_tensors_are_those_of_torch(dtype, layout):
    like = torch.randn(4, 64, 64, 64).to(dtype).to(memory_format=layout)
    found, expected = empty_like(like), torch.empty_like(like)
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert found.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    assert found.data_ptr() % (2 * MIB) == 0
    found.copy_(like)
    assert torch.equal(found, like)


@pytest.mark.parametrize("like", [torch.empty(1000), torch.empty(MIB, dtype=torch.float64)], ids=["small", "float64"])
def test_other_tensors_are_left_to_torch(like):
    empty_like(like)
    assert cpu._kernels.idle_bytes() == 0


def test_memory_is_taken_again_the_last_one_first():
    first, second = kept(3), kept(3)
    addresses = first.data_ptr(), second.data_ptr()
    del first
    del second
    assert kept(3).data_ptr() == addresses[1]
    held = [kept(3), kept(3)]
    assert {tensor.data_ptr() for tensor in held} == set(addresses)


def test_a_view_keeps_its_memory():
    whole = kept(2)
    view = whole[:4].zero_()
    del whole
    other = kept(2).fill_(1)
    assert not view.any()
    assert other.all()


def test_a_block_serves_what_fills_most_of_it():
    big = kept(10)
    address = big.data_ptr()
    del big
    assert kept(7).data_ptr() != address
    leannorm.empty_cache()
    big = kept(10)
    address = big.data_ptr()
    del big
    assert kept(9).data_ptr() == address


def test_empty_cache_leaves_what_is_in_use():
    used = kept(2).fill_(3)
    unused = kept(2)
    del unused
    assert cpu._kernels.idle_bytes() == 2 * MIB
    leannorm.empty_cache()
    assert cpu._kernels.idle_bytes() == 0
    assert (used == 3).all()


def test_memory_that_is_not_to_be_had_is_torchs_error():
    with pytest.raises(RuntimeError, match="allocate memory"):
        empty_like(torch.empty(1).expand(1 << 23, 1 << 23))
    assert kept(2).fill_(1).all()


def test_a_capsule_that_nobody_takes_gives_its_memory_back():
    capsule = cpu._kernels.kept_tensor(0, [MIB], [1])
    del capsule
    assert cpu._kernels.idle_bytes() == 4 * MIB


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 5)), max_size=60))
@settings(deadline=None)
def test_what_is_kept_is_bounded(steps):
    leannorm.empty_cache()
    held: list[torch.Tensor] = []
    most = 0
    for size, given_back in steps:
        held.append(kept(size).fill_(len(held)))
        in_use = sum(tensor.nbytes for tensor in held)
        most = max(most, in_use)
        assert in_use + cpu._kernels.idle_bytes() <= 1.25 * 1.5 * most
        spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in held)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        if given_back < len(held):
            del held[given_back]


def test_threads_share_it():
    failures = []

    def work(value: int) -> None:
        for _ in range(200):
            tensor = kept(1).fill_(value)
            if not (tensor == value).all():
                failures.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_forked_process_has_its_own():
    values = kept(2).fill_(5)
    unused = kept(2)
    del unused
    child = os.fork()
    if child == 0:
        kept(2).fill_(7)
        values.fill_(8)
        os._exit(0 if cpu._kernels.idle_bytes() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (values == 5).all()


def test_a_training_step_takes_no_new_memory():
    layer = leannorm.BatchNorm2d(32, activation="relu")
    x = torch.randn(8, 32, 64, 64, requires_grad=True)
    addresses = []
    for _ in range(3):
        y = layer(x)
        addresses.append(y.data_ptr())
        torch.autograd.grad(y, x, torch.ones_like(y))
        del y
    assert addresses[1] == addresses[2]


def test_the_environment_leaves_memory_to_torch():
    code = (
        "import torch; from leannorm.backends import cpu; from leannorm.backends.cpu import extension\n"
        "extension.empty_like(torch.empty(1 << 20), (1,)); assert cpu._kernels.idle_bytes() == 0"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"LEANNORM_NO_CPU_MEMORY_CACHING": "1"}, check=True)
