"""Backward that writes dx over dy, which it does where nobody but autograd holds that."""

import gc

import pytest
import torch
from torch import nn

import leannorm
from leannorm import parse_statistics
from leannorm.backends import cpu
from leannorm.ops import ownership

pytestmark = pytest.mark.skipif(not cpu.available, reason="the extension was not built")

SHAPE = 4, 16, 6, 6


def watch(y):
    """Give where the gradient of y lies and what it is, once that is known; a copy, so that nobody else holds it."""
    found = []
    y.register_hook(lambda dy: found.append((dy.data_ptr(), dy.clone())))
    return found


def layer_of(statistics="full", activation="relu"):
    return leannorm.BatchNorm2d(16, activation=activation, statistics=parse_statistics(statistics))


def step(hold=lambda y: None, *, layer=None, dtype=torch.float32, residual=False, factor=True):
    """Train a layer one step; give whether dx lay where dy did, dy, and all gradients."""
    torch.manual_seed(0)
    layer = layer or layer_of("grid:1/4")
    inputs = [torch.randn(SHAPE).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    leaves = [one.requires_grad_() for one in inputs[: 1 + residual]]
    x = leaves[0].clone()  # so that its gradient is seen before anybody adds it up
    seen_x = watch(x)
    y = layer(x, residual=leaves[1]) if residual else layer(x)
    seen_y = watch(y)
    held = hold(y)
    loss = (y * inputs[2]).sum() if factor else y.sum()
    loss.backward()
    [(dx_at, _)], [(dy_at, dy)] = seen_x, seen_y
    gradients = [one.grad for one in (*leaves, *layer.parameters())]
    return dx_at == dy_at, dy, gradients, held


def hold_by_hook(y):
    held = []
    y.register_hook(held.append)
    return lambda: held[0]


def hold_alias(y):
    held = []
    y.register_hook(lambda dy: held.append(dy.detach()))
    return lambda: held[0]


def hold_in_array(y):
    held = []
    y.register_hook(lambda dy: held.append(dy.numpy()))
    return lambda: torch.from_numpy(held[0])


def hold_by_hook_of_function(y):
    held = []
    y.grad_fn.register_hook(lambda _, outputs: held.append(outputs[0]))
    return lambda: held[0]


def hold_by_prehook_of_function(y):
    held = []
    y.grad_fn.register_prehook(lambda outputs: held.extend(outputs))
    return lambda: held[0]


def hold_by_hook_of_several(y):
    held = []
    torch.autograd.graph.register_multi_grad_hook([y], held.extend)
    return lambda: held[0]


def keep_as_grad(y):
    y.retain_grad()
    return lambda: y.grad


HOLDERS = [
    hold_by_hook,
    hold_alias,
    hold_in_array,
    hold_by_hook_of_function,
    hold_by_prehook_of_function,
    hold_by_hook_of_several,
]


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("statistics", ["full", "grid:1/4"])
def test_dx_takes_the_place_of_a_gradient_that_nobody_holds(statistics, residual):
    in_place, _, found, _ = step(layer=layer_of(statistics), residual=residual)
    assert in_place
    in_place, _, expected, _ = step(hold_by_hook, layer=layer_of(statistics), residual=residual)
    assert not in_place
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("hold", HOLDERS, ids=lambda hold: hold.__name__)
def test_a_gradient_that_somebody_holds_stays_as_it_is(hold):
    in_place, dy, gradients, held = step(hold)
    assert not in_place
    assert torch.equal(held(), dy)
    assert all(torch.equal(one, other) for one, other in zip(gradients, step()[2], strict=True))


def test_a_retained_gradient_is_a_copy():
    in_place, dy, _, held = step(keep_as_grad)
    assert in_place
    assert torch.equal(held(), dy)


def test_a_gradient_that_is_the_residuals_as_well_stays_as_it_is():
    in_place, dy, (_, dresidual, *_), _ = step(layer=layer_of("grid:1/4", activation=None), residual=True)
    assert not in_place
    assert torch.equal(dresidual, dy)


def test_a_gradient_spread_over_memory_of_one_number_stays_as_it_is():
    in_place, dy, _, _ = step(factor=False)
    assert not in_place
    assert torch.equal(dy, torch.ones(SHAPE))


@pytest.mark.parametrize(("statistics", "expected"), [("full", True), ("grid:1/4", False)])
def test_sampled_elements_of_16_bits_are_rounded_once(statistics, expected):
    assert step(layer=layer_of(statistics), dtype=torch.bfloat16)[0] is expected


def test_the_gradient_that_a_user_gives_stays_as_it_is():
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    before = dy.clone()
    layer_of()(x).backward(dy)
    assert torch.equal(dy, before)


def test_the_gradient_that_is_asked_for_is_not_written_over():
    layer = layer_of()
    y = layer(torch.randn(SHAPE, requires_grad=True))
    factor = torch.randn(SHAPE)
    dy, _ = torch.autograd.grad((y * factor).sum(), (y, layer.weight))
    assert torch.equal(dy, factor)


def test_hooks_of_a_module_see_its_gradients():
    layer, seen = nn.Sequential(layer_of()), []
    layer.register_full_backward_hook(lambda _, inputs, outputs: seen.append((inputs[0].clone(), outputs[0].clone())))
    x, factor = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    (layer(x) * factor).sum().backward()
    [(dx, dy)] = seen
    assert torch.equal(dx, x.grad)
    assert torch.equal(dy, factor)


def test_two_that_share_a_gradient():
    layers = [layer_of() for _ in range(2)]
    xs, factor = [torch.randn(SHAPE, requires_grad=True) for _ in layers], torch.randn(SHAPE)

    def gradients(add):
        y = add(*(layer(x) for layer, x in zip(layers, xs, strict=True)))
        return torch.autograd.grad((y * factor).sum(), xs)

    together = gradients(torch.add)
    apart = gradients(lambda a, b: a * torch.ones(SHAPE) + b * torch.ones(SHAPE))
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))


def test_frozen_layers():
    layer = layer_of().eval()
    in_place, _, found, _ = step(layer=layer)
    assert in_place
    layer.zero_grad()
    in_place, _, expected, _ = step(hold_by_hook, layer=layer)
    assert not in_place
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_folded_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), layer_of("grid:1/4", activation=None), nn.ReLU())
    folded, _ = leannorm.fuse(model, convolution=True)
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    factor = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    found = []
    for hold in (lambda _: None, hold_by_hook):
        y = folded(x)
        seen, held = watch(y), hold(y)
        found.append(torch.autograd.grad((y * factor).sum(), list(folded.parameters())))
        assert torch.equal(seen[0][1], factor)
    assert torch.equal(held(), factor)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("unknown", ["names", "counts"])
def test_nothing_is_written_over_where_torch_does_not_tell_who_holds_it(monkeypatch, unknown):
    if unknown == "names":
        monkeypatch.setattr(ownership, "_known", False)
    else:  # as if each holder counted the same
        monkeypatch.setattr(ownership, "_count", lambda _: (1, 1, 1))
    ownership._autograd_alone.cache_clear()
    try:
        assert not step()[0]
    finally:
        ownership._autograd_alone.cache_clear()


def test_counting_leaves_nothing_behind():
    def tensors():
        gc.collect()
        return sum(type(one) is torch.Tensor for one in gc.get_objects())

    ownership._autograd_alone.cache_clear()
    before = tensors()
    ownership._autograd_alone()
    assert tensors() == before
