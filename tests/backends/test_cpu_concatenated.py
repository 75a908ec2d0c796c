"""Batch norm of a concatenation that is not written: against float64, and against PyTorch's concatenation with ours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_count import threads
from torch.utils.checkpoint import checkpoint

import leannorm
from cases import ACTIVATIONS
from leannorm import backends
from leannorm.backends import cpu
from leannorm.functional import batch_norm, concatenated_batch_norm, takes_concatenation

pytestmark = pytest.mark.skipif(not cpu.available, reason="the extension was not built")
SOURCES = ("ns:1/4", "bs:1/4", "fs:1/8", "fs:1/8@step", "grid:1/8", "grid:1/8@step", "0.75*grid:1/4+0.25*bs:1/2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {
    "dense layer": ((4, 14, 14), (64, 32, 32)),
    "odd": ((3, 9, 7), (3, 17, 24, 2)),
    "one part": ((4, 8, 8), (48,)),
    "wide": ((4, 9, 8), (700, 900, 33)),
    "many blocks": ((5, 40, 33), (96, 32)),
    "around the caches": ((4, 76, 76), (64, 32)),
    "large, parts of no whole cache lines": ((4, 76, 76), (40, 56)),
    "3d": ((2, 4, 5, 6), (8, 24)),
}


def tensors(shape, channels, dtype=torch.float32, offset=0.0, seed=0):
    """Make the parts, gamma, beta and the gradient that comes in."""
    generator = torch.Generator().manual_seed(seed)
    samples, *sizes = shape
    order = torch.channels_last if len(sizes) == 2 else torch.channels_last_3d

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    parts = [(draw(samples, count, *sizes) + offset).to(dtype, memory_format=order) for count in channels]
    total = sum(channels)
    constants = draw(total).float(), draw(total).float(), draw(samples, total, *sizes)
    return [part.requires_grad_() for part in parts], *constants


def results(parts, gamma, beta, dy, source, activation, function=concatenated_batch_norm):
    torch.manual_seed(5)  # of places that are drawn
    gamma, beta = gamma.clone().requires_grad_(), beta.clone().requires_grad_()
    given = parts if function is concatenated_batch_norm else torch.cat(parts, 1)
    y, mean, var = function(
        given, gamma, beta, statistics=leannorm.parse_statistics(source), activation=activation, eps=1e-3
    )
    return [y.detach(), mean, var, *torch.autograd.grad(y, [*parts, gamma, beta], dy.to(y.dtype))]


def exact(parts):
    return [part.detach().double().requires_grad_() for part in parts]


def away_from_edges(parts, gamma, beta, dy, source, activation):
    """Take away the gradient where rounding may decide on which side of an edge of the activation z lies."""
    z, *_ = results(exact(parts), gamma, beta, dy, source, None, batch_norm)
    edges = torch.tensor([0, *(activation.parameters if activation else ())])
    near = 64 * torch.finfo(parts[0].dtype).eps * z.abs().max()
    return dy.masked_fill((z[..., None] - edges).abs().amin(-1) <= near, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS[1:2], *ACTIVATIONS[4:5]], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_error_is_at_most_twice_that_of_the_concatenation(instruction_set, name, activation, dtype):
    parts, *others = tensors(*SHAPES[name], dtype)
    others[-1] = away_from_edges(parts, *others, "grid:1/4", activation)
    assert takes_concatenation(parts)
    ours = results(parts, *others, "grid:1/4", activation)
    theirs = results(parts, *others, "grid:1/4", activation, batch_norm)
    wanted = results(exact(parts), *others, "grid:1/4", activation, batch_norm)
    for found, other, right in zip(ours, theirs, wanted, strict=True):
        assert (found.dtype, found.shape) == (other.dtype, other.shape)
        assert found.is_contiguous(memory_format=torch.channels_last) or found.ndim != 4
        unit = 4 * torch.finfo(dtype).eps * right.norm()
        assert (found.double() - right).norm() <= 2 * (other.double() - right).norm() + unit


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("offset", [0, 100])
def test_sources_and_activations(instruction_set, source, activation, offset):
    parts, *others = tensors(*SHAPES["odd"], offset=offset)
    others[-1] = away_from_edges(parts, *others, source, activation)
    tolerance = 1e-4 if offset == 0 else 5e-3
    ours = results(parts, *others, source, activation)
    wanted = results(exact(parts), *others, source, activation, batch_norm)
    for found, right in zip(ours, wanted, strict=True):
        torch.testing.assert_close(found.double(), right.double(), rtol=tolerance, atol=tolerance)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_shape(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    shape = (draw(1, 4), draw(2, 12), draw(1, 12))
    channels = data.draw(st.lists(st.integers(2, 70), min_size=1, max_size=6))
    dtype = data.draw(st.sampled_from(DTYPES))
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    source = data.draw(st.sampled_from(SOURCES))
    parts, *others = tensors(shape, channels, dtype, offset=draw(0, 3), seed=draw(0, 1000))
    others[-1] = away_from_edges(parts, *others, source, activation)
    with threads(draw(1, 3)):
        ours = results(parts, *others, source, activation)
    _, _, var, *_ = expected = results(exact(parts), *others, source, activation, batch_norm)
    # a division by next to nothing enlarges every rounding
    enlarged = 1 / min(1.0, var.min().item() + 1e-3)
    for found, wanted in zip(ours, expected, strict=True):
        bound = 64 * torch.finfo(dtype).eps * enlarged * (1 + wanted.norm())
        assert (found.double() - wanted).norm() <= bound


def test_threads_change_rounding_alone_and_nothing_changes_without_them():
    parts, *others = tensors(*SHAPES["many blocks"])  # 6,600 elements a channel are added up
    found = []
    for count in (1, 2, 4, 4):
        with threads(count):
            found.append(results(parts, *others, "grid:1/8", "relu"))
    for one, two, four, again in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1.3e-6, atol=1e-4)
        torch.testing.assert_close(one, four, rtol=1.3e-6, atol=1e-4)
        assert torch.equal(four, again)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads(value):
    parts, *others = tensors(*SHAPES["dense layer"])
    with torch.no_grad():
        parts[1][-1, 3, 5, 5] = value
        parts[2][0, 7] = value
    ours = results(parts, *others, "grid:1/4", "relu")
    for found, wanted in zip(ours, results(exact(parts), *others, "grid:1/4", "relu", batch_norm), strict=True):
        assert torch.equal(found.isfinite(), wanted.isfinite())


def changed(parts, change):
    return [change(part.detach()) if i == 1 else part for i, part in enumerate(parts)]


class Other(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part.contiguous(),
        lambda part: part.bfloat16(),
        lambda part: part.repeat(1, 2, 1, 1)[:, ::2],
        lambda part: part[:, :1],
        lambda part: part.as_subclass(Other),
        lambda part: part.double(),
    ],
    ids=["contiguous", "another dtype", "strided", "one channel", "subclass", "float64"],
)
def test_other_concatenations_are_written(change):
    parts, gamma, beta, _ = tensors(*SHAPES["dense layer"])
    others = changed(parts, change)
    assert takes_concatenation(parts)
    assert not takes_concatenation(others)
    source = leannorm.parse_statistics("grid:1/4")
    total = sum(part.shape[1] for part in others)
    found, *_ = concatenated_batch_norm(others, gamma[:total], beta[:total], statistics=source)
    wanted, *_ = batch_norm(torch.cat(others, 1), gamma[:total], beta[:total], statistics=source)
    assert torch.equal(found, wanted)
    assert found.stride() == wanted.stride()


def test_exact_statistics_and_residuals_are_computed_of_the_written_one():
    parts, gamma, beta, dy = tensors(*SHAPES["dense layer"])
    sampled = {"statistics": leannorm.parse_statistics("grid:1/4"), "residual": dy.float()}
    for options in ({"statistics": leannorm.FullBatch()}, sampled):
        found = concatenated_batch_norm(parts, gamma, beta, **options)
        wanted = batch_norm(torch.cat(parts, 1), gamma, beta, **options)
        assert all(map(torch.equal, found, wanted))


def test_only_the_gradients_that_are_wanted_are_computed():
    parts, gamma, _, dy = tensors(*SHAPES["dense layer"])
    source = leannorm.parse_statistics("grid:1/4")
    y, *_ = concatenated_batch_norm(parts, gamma, None, statistics=source, activation="relu")
    wanted = torch.autograd.grad(y, parts, dy.float())
    some = [parts[0].detach(), *parts[1:]]
    y, *_ = concatenated_batch_norm(some, gamma, None, statistics=source, activation="relu")
    y.backward(dy.float())
    assert some[0].grad is None
    for part, gradient in zip(some[1:], wanted[1:], strict=True):
        assert torch.equal(part.grad, gradient)
    with torch.no_grad():
        without, *_ = concatenated_batch_norm(parts, gamma, None, statistics=source, activation="relu")
    assert torch.equal(without, y)
    assert not without.requires_grad


def test_second_derivatives():
    parts, gamma, beta, dy = tensors((2, 3, 4), (2, 3))

    def gradients(parts, function):
        leaves = [*parts, gamma.to(parts[0].dtype).requires_grad_(), beta.to(parts[0].dtype).requires_grad_()]
        given = leaves[:-2] if function is concatenated_batch_norm else torch.cat(leaves[:-2], 1)
        y, *_ = function(given, *leaves[-2:], statistics=leannorm.GridSampling(1 / 2, minimum=4), activation="silu")
        first = torch.autograd.grad((y * dy.to(y.dtype)).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves)

    found = gradients(parts, concatenated_batch_norm)
    wanted = gradients(exact(parts), batch_norm)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3)


def test_gradients_come_in_any_memory_order_and_in_batches():
    parts, gamma, beta, dy = tensors(*SHAPES["dense layer"])
    source = leannorm.parse_statistics("grid:1/4")
    dy = dy.float()
    y, *_ = concatenated_batch_norm(parts, gamma, beta, statistics=source, activation="relu")
    found = [
        torch.autograd.grad(y, parts, given, retain_graph=True)
        for given in (dy, dy.contiguous(memory_format=torch.channels_last))
    ]
    assert all(map(torch.equal, *found))
    batch = torch.autograd.grad(y, parts, torch.stack([dy, 2 * dy]), is_grads_batched=True, retain_graph=True)
    for one, many in zip(found[0], batch, strict=True):
        torch.testing.assert_close(many[0], one)
        torch.testing.assert_close(many[1], 2 * one)
    y.sum().backward()  # a gradient of one element, expanded
    assert all(part.grad.isfinite().all() for part in parts)


def test_hooks_on_saved_tensors_may_change_their_form():
    parts, gamma, beta, dy = tensors(*SHAPES["dense layer"])
    source = leannorm.parse_statistics("grid:1/4")

    def gradients(unpack):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y, *_ = concatenated_batch_norm(parts, gamma, beta, statistics=source, activation="relu")
        return torch.autograd.grad(y, parts, dy.float())

    for one, other in zip(gradients(lambda t: t), gradients(lambda t: t.contiguous()), strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_of_the_concatenation_s_size_is_kept_but_the_output():
    parts, gamma, beta, _ = tensors(*SHAPES["dense layer"])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        concatenated_batch_norm(parts, gamma, beta, statistics=leannorm.parse_statistics("grid:1/4"), activation="relu")
    addresses = {part.data_ptr() for part in parts}
    assert {t.data_ptr() for t in kept if t.ndim == 4} == addresses


def test_a_part_that_is_changed_in_place_is_noticed():
    parts, gamma, beta, _ = tensors(*SHAPES["dense layer"])
    y, *_ = concatenated_batch_norm(parts, gamma, beta, statistics=leannorm.parse_statistics("grid:1/4"))
    with torch.no_grad():
        parts[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpoints_draw_the_same_places():
    parts, gamma, beta, dy = tensors(*SHAPES["dense layer"])
    source = leannorm.parse_statistics("grid:1/8@step")

    def call(*parts):
        return concatenated_batch_norm(parts, gamma, beta, statistics=source, activation="relu")[0]

    torch.manual_seed(0)
    wanted = torch.autograd.grad(call(*parts), parts, dy.float())
    torch.manual_seed(0)
    found = torch.autograd.grad(checkpoint(call, *parts, use_reentrant=False), parts, dy.float())
    assert all(map(torch.equal, found, wanted))


def test_bad_parts_get_pytorchs_error_or_ours():
    parts, gamma, beta, _ = tensors(*SHAPES["dense layer"])
    source = leannorm.parse_statistics("grid:1/4")
    with pytest.raises(ValueError, match=r"weight must have the shape \(128,\)"):
        concatenated_batch_norm(parts, gamma[1:], beta, statistics=source)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        concatenated_batch_norm(changed(parts, lambda part: part[:, :, 1:]), gamma, beta, statistics=source)
    with pytest.raises((RuntimeError, ValueError), match="non-empty list"):
        concatenated_batch_norm([], gamma, beta, statistics=source)
    assert not takes_concatenation([])


def test_without_the_extension_the_concatenation_is_written(monkeypatch):
    parts, *_ = tensors(*SHAPES["dense layer"])
    monkeypatch.setattr(backends.cpu.extension, "kernels", None)
    assert not takes_concatenation(parts)
