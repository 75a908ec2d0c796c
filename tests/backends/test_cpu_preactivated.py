"""A pointwise convolution between two batch norms as one operator: against float64, and against the operators."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from thread_count import threads
from torch.utils.checkpoint import checkpoint

import leannorm
from cases import ACTIVATIONS
from leannorm import backends
from leannorm.backends import cpu
from leannorm.functional import (
    BatchNorm,
    batch_norm,
    conv_batch_norm,
    preactivated_conv_batch_norm,
    takes_preactivated,
)
from leannorm.ops.concatenated import concatenated_shape

pytestmark = pytest.mark.skipif(not cpu.available, reason="the extension was not built")
SOURCES = ("ns:1/4", "bs:1/4", "fs:1/8", "fs:1/8@step", "grid:1/8", "grid:1/8@step", "0.75*grid:1/4+0.25*bs:1/2")
RELU, SILU = ACTIVATIONS[1], ACTIVATIONS[4]
SHAPES = {
    "dense layer": ((4, 14, 14), (64, 32, 32), 48),
    "odd": ((3, 9, 7), (3, 17, 24, 2), 13),
    "one part": ((4, 8, 8), (48,), 130),
    "wide": ((4, 9, 8), (500, 600, 33), 64),
    "many blocks": ((5, 40, 33), (96, 32), 40),
    "around the caches": ((4, 76, 76), (24, 8), 128),
}


class Call:
    """An operator's inputs, and its results by the one operator or by those that it stands for."""

    def __init__(self, shape, channels, outputs, source="grid:1/4", activations=(RELU, RELU), seed=0, offset=0.0):
        generator = torch.Generator().manual_seed(seed)
        samples, *sizes = shape

        def draw(*size):
            return torch.randn(size, generator=generator)

        total = sum(channels)
        parts = [draw(samples, count, *sizes) + offset for count in channels]
        self.parts = [part.contiguous(memory_format=torch.channels_last) for part in parts]
        self.parameters = [
            draw(total), draw(total), draw(outputs, total, 1, 1) / total**0.5, draw(outputs), draw(outputs)
        ]  # fmt: skip
        self.dy = draw(samples, outputs, *sizes)
        self.source, self.activations = leannorm.parse_statistics(source), activations
        self.tracked()

    def tracked(self):
        self.parts = [part.detach().requires_grad_() for part in self.parts]
        self.parameters = [p.detach().requires_grad_() for p in self.parameters]

    def double(self):
        twin = object.__new__(Call)
        twin.__dict__ |= vars(self)
        twin.parts, twin.parameters = [p.double() for p in self.parts], [p.double() for p in self.parameters]
        twin.dy = self.dy.double()
        twin.tracked()
        return twin

    @property
    def regions(self):
        shape = concatenated_shape(self.parts)
        shapes = shape, (shape[0], len(self.parameters[2]), *shape[2:])
        return [self.source.regions(shape, place, by_rows=False) for place, shape in enumerate(shapes)]

    def norms(self):
        weight, bias, _, gamma, beta = self.parameters
        (one, other), regions = self.activations, self.regions
        return BatchNorm(weight, bias, regions[0], 1e-3, one), BatchNorm(gamma, beta, regions[1], 1e-3, other)

    def forward(self):
        torch.manual_seed(7)  # of places that are drawn
        first, second = self.norms()
        return preactivated_conv_batch_norm(self.parts, first, self.parameters[2], second)

    def one_by_one(self):
        torch.manual_seed(7)
        first, second = self.norms()
        options = {"statistics": first.regions, "eps": 1e-3, "activation": first.activation}
        z, *one = batch_norm(torch.cat(self.parts, 1), first.weight, first.bias, **options)
        convolution = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
        options = {"statistics": second.regions, "eps": 1e-3, "activation": second.activation}
        y, *other = conv_batch_norm(z, self.parameters[2], None, second.weight, second.bias, **convolution, **options)
        return y, one, other

    def results(self, forward=None):
        y, one, other = (forward or self.forward)()
        gradients = torch.autograd.grad(y, [*self.parts, *self.parameters], self.dy)
        return [y.detach(), *one, *other, *gradients]


def assert_close(call, slack=4):
    """Compare with float64, by norms: where rounding decides on which side of an edge a value lies, few elements of a
    gradient differ much."""
    exact = call.double()
    theirs, wanted = call.results(call.one_by_one), exact.results(exact.one_by_one)
    for found, other, right in zip(call.results(), theirs, wanted, strict=True):
        assert (found.dtype, found.shape) == (other.dtype, other.shape)
        error, torchs = (found.double() - right).norm(), (other.double() - right).norm()
        unit = torch.finfo(torch.float32).eps * (right.norm() + call.dy.norm())  # some gradients are 0 but for rounding
        assert error <= 2 * torchs + slack * unit


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("activations", [(None, None), (RELU, RELU), (SILU, RELU), (RELU, SILU)], ids=str)
def test_error_is_at_most_twice_that_of_the_operators(instruction_set, name, activations):
    call = Call(*SHAPES[name], activations=activations)
    assert takes_preactivated(call.parts, call.parameters[2])
    assert_close(call)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_sources_and_activations(instruction_set, source, activation, offset):
    assert_close(Call(*SHAPES["odd"], source, (activation, RELU), offset=offset))
    assert_close(Call(*SHAPES["odd"], source, (RELU, activation), offset=offset))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_shape(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    channels = data.draw(st.lists(st.integers(2, 70), min_size=1, max_size=5))
    activations = data.draw(st.tuples(st.sampled_from(ACTIVATIONS), st.sampled_from(ACTIVATIONS)))
    source = data.draw(st.sampled_from(SOURCES))
    call = Call((draw(1, 4), draw(2, 12), draw(1, 12)), channels, draw(1, 70), source, activations, draw(0, 1000))
    assume(all(regions.boxes and regions.inverse_count < 1 for regions in call.regions))
    exact = call.double()
    _, _, first_var, _, var, *_ = wanted = exact.results(exact.one_by_one)
    assume(min(first_var.min(), var.min()) > 1e-2)  # else a division by next to nothing enlarges every rounding
    with threads(draw(1, 3)):
        ours = call.results()
    theirs = call.results(call.one_by_one)
    for found, other, right in zip(ours, theirs, wanted, strict=True):
        torchs = (other.double() - right).norm()
        assert (found.double() - right).norm() <= 4 * torchs + 2e-4 * (1 + right.norm())


def test_threads_change_rounding_alone_and_nothing_changes_without_them():
    call = Call(*SHAPES["many blocks"])
    found = []
    for count in (1, 2, 4, 4):
        with threads(count):
            found.append(call.results())
    for one, two, four, again in zip(*found, strict=True):
        for other in (two, four):
            assert (one - other).norm() <= 1e-4 * (1 + one.norm())
        assert torch.equal(four, again)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads(value):
    call = Call(*SHAPES["dense layer"], source="bs:1/2")
    with torch.no_grad():
        call.parts[1][-1, 3, 5, 5] = value
    exact = call.double()
    for found, wanted in zip(call.results(), exact.results(exact.one_by_one), strict=True):
        assert torch.equal(found.isfinite(), wanted.isfinite())


def test_what_is_not_taken_is_computed_one_by_one(monkeypatch):
    call = Call(*SHAPES["dense layer"])
    expected = call.results(call.one_by_one)
    weight = call.parameters[2]
    assert takes_preactivated(call.parts, weight)
    assert not takes_preactivated(call.parts, weight.double())
    assert not takes_preactivated(call.parts, weight.detach().expand(-1, -1, 2, 2))
    assert not takes_preactivated([part.bfloat16() for part in call.parts], weight)
    assert not takes_preactivated([part.contiguous() for part in call.parts], weight)
    assert not takes_preactivated([], weight)
    monkeypatch.setattr(backends.cpu.extension, "kernels", None)
    assert not takes_preactivated(call.parts, weight)
    monkeypatch.undo()
    monkeypatch.setattr(backends, "takes_preactivated", lambda *_: False)
    for found, wanted in zip(call.results(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_only_the_gradients_that_are_wanted_are_computed():
    call = Call(*SHAPES["dense layer"])
    all_of_them = call.results()[5:]
    call.parts[1].requires_grad_(False)
    call.parameters[0].requires_grad_(False)
    y, *_ = call.forward()
    y.backward(call.dy)
    for tensor, gradient in zip([*call.parts, *call.parameters], all_of_them, strict=True):
        assert tensor.grad is None if not tensor.requires_grad else torch.equal(tensor.grad, gradient)
    with torch.no_grad():
        without, *_ = call.forward()
    assert torch.equal(without, y)


def test_without_gamma_and_beta():
    call = Call(*SHAPES["dense layer"])

    def gradients(function):
        torch.manual_seed(0)
        y, *_ = function()
        return torch.autograd.grad(y, [*call.parts, call.parameters[2]], call.dy)

    norms = [norm._replace(weight=None, bias=None) for norm in call.norms()]
    call.norms = lambda: norms
    for one, other in zip(gradients(call.forward), gradients(call.one_by_one), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activations", [(SILU, SILU), (RELU, None)], ids=str)
def test_second_derivatives(activations):
    call = Call((2, 6, 7), (2, 3), 4, activations=activations)

    def second(call, forward):
        leaves = [*call.parts, *call.parameters]
        y, *_ = forward()
        first = torch.autograd.grad((y * call.dy).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves, allow_unused=True)

    exact = call.double()
    for one, other in zip(second(call, call.forward), second(exact, exact.one_by_one), strict=True):
        if other is None:
            assert one is None
            continue
        torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=1e-3)


def test_gradients_come_in_any_memory_order_and_in_batches():
    call = Call(*SHAPES["dense layer"])
    y, *_ = call.forward()

    def gradients(dy, **options):
        return torch.autograd.grad(y, call.parts, dy, retain_graph=True, **options)

    found = gradients(call.dy)
    assert all(map(torch.equal, found, gradients(call.dy.contiguous(memory_format=torch.channels_last))))
    batch = gradients(torch.stack([call.dy, 2 * call.dy]), is_grads_batched=True)
    for one, many in zip(found, batch, strict=True):
        torch.testing.assert_close(many[0], one, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(many[1], 2 * one, rtol=1e-3, atol=1e-4)
    y.sum().backward()  # a gradient of one element, expanded
    assert all(part.grad.isfinite().all() for part in call.parts)


def test_hooks_on_saved_tensors_may_change_their_form():
    call = Call(*SHAPES["dense layer"])

    def results(unpack):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y, *_ = call.forward()
        return torch.autograd.grad(y, [*call.parts, *call.parameters], call.dy)

    for one, other in zip(results(lambda t: t), results(lambda t: t.contiguous()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_nothing_is_kept_between_the_inputs_and_the_output():
    call = Call(*SHAPES["dense layer"])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, *_ = call.forward()
    known = {t.data_ptr() for t in (*call.parts, *call.parameters, y)}
    sampled = sum(t.numel() for t in kept if t.data_ptr() not in known)
    assert sampled <= y.numel() / 4 + 4 * 128  # the second batch norm's sample, and four vectors


def test_checkpoints_draw_the_same_places():
    call = Call(*SHAPES["dense layer"], source="grid:1/8@step")
    first, second = call.norms()

    def compute(*parts):
        return preactivated_conv_batch_norm(parts, first, call.parameters[2], second)[0]

    torch.manual_seed(0)
    wanted = torch.autograd.grad(compute(*call.parts), call.parts, call.dy)
    torch.manual_seed(0)
    found = torch.autograd.grad(checkpoint(compute, *call.parts, use_reentrant=False), call.parts, call.dy)
    assert all(map(torch.equal, found, wanted))


def test_bad_input_gets_a_clear_error():
    call = Call(*SHAPES["dense layer"])
    first, second = call.norms()
    weight = call.parameters[2]
    with pytest.raises(ValueError, match=r"weight must have the shape \(128,\)"):
        preactivated_conv_batch_norm(call.parts, second, weight, second)
    with pytest.raises(ValueError, match=r"weight must have the shape \(48,\)"):
        preactivated_conv_batch_norm(call.parts, first, weight, first)
    with pytest.raises(ValueError, match=r"conv_weight must be \(C, 128, 1, 1\)"):
        preactivated_conv_batch_norm(call.parts, first, weight[:, 1:], second)
