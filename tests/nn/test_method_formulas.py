"""Each method against its published formula, in float64, written here in its own way."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import leannorm
from leannorm import nn


def layer_of(cls, method, channels=3, **options):
    layer = cls(channels, method, dtype=torch.float64, **options)
    torch.manual_seed(3)
    if layer.weight is not None:
        layer.weight.data.uniform_(0.5, 1.5)
    layer.bias.data.uniform_(-1, 1)
    return layer


def batch(seed, shape=(6, 3, 4, 5), scale=1.7, shift=0.4):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * x + shift + torch.arange(float(shape[1]))[:, None, None]


def column(v):
    return v.reshape(-1, 1, 1)


def affine(layer, normalized):
    return normalized * column(layer.weight) + column(layer.bias)


def channels(x):
    """(C, M) array."""
    return x.detach().numpy().swapaxes(0, 1).reshape(x.shape[1], -1)


def test_group_instance_and_layer_normalization():
    x = batch(0, (2, 6, 3, 3))
    for method, groups in (
        (leannorm.GroupNormalization(4), 2),  # gcd(4, 6)
        (leannorm.InstanceNormalization(), 6),
        (leannorm.LayerNormalization(), 1),
    ):
        model, _ = leannorm.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(6, dtype=torch.float64)), method)
        model[0].weight.data.uniform_(0.5, 1.5)
        grouped = x.reshape(2, groups, -1)
        mean, var = grouped.mean(-1, keepdim=True), grouped.var(-1, correction=0, keepdim=True)
        expected = ((grouped - mean) / (var + 1e-5).sqrt()).reshape_as(x) * column(model[0].weight)
        torch.testing.assert_close(model(x), expected)
        assert type(model[0]).__module__.startswith("torch.nn.modules")


def test_batch_renormalization_and_its_schedule():
    method = leannorm.BatchRenormalization(1.5, d_max=0.3, start=2, r_end=6, d_end=4)
    layer = layer_of(nn.BatchRenorm, method, momentum=0.5)
    running_mean, running_var = np.zeros(3), np.ones(3)
    r_limits, d_limits, bound = [1, 1, 1, 1.125, 1.25, 1.375, 1.5, 1.5], [0, 0, 0, 0.15, 0.3, 0.3, 0.3, 0.3], set()
    for step in range(8):
        x = batch(step)
        values = channels(x)
        mean, deviation = values.mean(1), np.sqrt(values.var(1) + 1e-5)
        sigma = np.sqrt(running_var + 1e-5)
        r = np.clip(deviation / sigma, 1 / r_limits[step], r_limits[step])
        d = np.clip((mean - running_mean) / sigma, -d_limits[step], d_limits[step])
        bound |= {bool(np.allclose(r, deviation / sigma)), bool(np.allclose(d, (mean - running_mean) / sigma))}
        normalized = (x - column(torch.tensor(mean))) / column(torch.tensor(deviation))
        expected = affine(layer, normalized * column(torch.tensor(r)) + column(torch.tensor(d)))
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(x)
        y.backward(dy)
        g = dy * column(layer.weight.detach()) * column(torch.tensor(r))
        sums = g.mean([0, 2, 3]), (g * normalized).mean([0, 2, 3])
        dx = (g - column(sums[0]) - normalized * column(sums[1])) / column(torch.tensor(deviation))
        torch.testing.assert_close(leaf.grad, dx)
        running_mean = (running_mean + mean) / 2
        running_var = (running_var + values.var(1, ddof=1)) / 2
        torch.testing.assert_close(layer.running_mean, torch.tensor(running_mean))
        torch.testing.assert_close(layer.running_var, torch.tensor(running_var))
    assert bound == {True, False}, "the limits bind in some steps and not in others"


def test_batch_renormalization_without_limits_computes_what_eval_mode_does():
    layer = layer_of(nn.BatchRenorm, leannorm.BatchRenormalization(1e9, d_max=1e9, start=0, r_end=0, d_end=0))
    layer.running_mean.uniform_(-1, 1)
    layer.running_var.uniform_(0.5, 2)
    x = batch(0)
    expected = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), expected)


def test_moving_average_normalization_forward_and_backward():
    method = leannorm.MovingAverageNormalization(3, warmup=0, r_max=1.05, r_start=5)
    layer = layer_of(nn.MovingAverageBatchNorm, method, momentum=0.3)
    squares, products, average, clipped = [], [], None, set()
    for step in range(1, 10):
        x = batch(step, scale=1 + 0.3 * (step % 4)).requires_grad_()
        values = x.detach()
        squares.append(values.square().mean([0, 2, 3]))
        warm = step <= 3
        chi = squares[-1] if warm else torch.stack(squares[-3:]).mean(0)
        old = chi if average is None else average
        wanted = ((chi + 1e-5) / (old + 1e-5)).sqrt()
        r = torch.ones(3, dtype=torch.float64) if step <= 5 else wanted.clamp(1 / 1.05, 1.05)
        clipped |= {bool((r != wanted).any())} if step > 5 else set()
        z = values / column((chi + 1e-5).sqrt())
        y = layer(x)
        torch.testing.assert_close(y.detach(), affine(layer, column(r) * z).detach())
        dy = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(50 + step))
        layer.zero_grad()
        y.backward(dy)
        g = dy * column(layer.weight.detach()) * column(r)
        products.append((g * z).mean([0, 2, 3]))
        psi = products[-1] if warm else torch.stack(products[-3:]).mean(0)
        torch.testing.assert_close(x.grad, (g - z * column(psi)) / column((chi + 1e-5).sqrt()))
        torch.testing.assert_close(layer.weight.grad, (dy * column(r) * z).sum([0, 2, 3]))
        torch.testing.assert_close(layer.bias.grad, dy.sum([0, 2, 3]))
        average = chi if average is None else 0.7 * average + 0.3 * chi
        torch.testing.assert_close(layer.running_var, average)
    assert clipped == {True, False}
    assert not layer.running_mean.any()


def test_moving_average_normalization_centers_convolutions():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.BatchNorm2d(3)).double()
    weight = model[0].weight.detach().clone()
    names = list(model.state_dict())
    _, report = leannorm.convert(model, leannorm.MovingAverageNormalization(2))
    assert [change.module for change in report.changes] == ["1", "0"]
    assert [name for name in model.state_dict() if name in names] == names
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    expected = F.conv2d(x, weight - weight.mean([1, 2, 3], keepdim=True), model[0].bias, padding=1)
    torch.testing.assert_close(model[0](x), expected)
    leannorm.convert(model, leannorm.FullBatch())
    assert type(model[0]) is torch.nn.Conv2d
    torch.testing.assert_close(model[0](x), expected)


@pytest.mark.parametrize(
    ("samples", "sizes"), [(4, (4, 3, 3)), (3, (3, 3, 2, 2)), (5, (5, 5)), (10, (10,)), (99, (10,))]
)
def test_ghost_batches(samples, sizes):
    x = batch(0, (10, 3, 2, 2))
    layer = layer_of(nn.GhostBatchNorm, leannorm.GhostBatch(samples), momentum=1.0)
    normalized = []
    for part in x.split(sizes):
        values = channels(part)
        mean, var = torch.tensor(values.mean(1)), torch.tensor(values.var(1))
        normalized.append((part - column(mean)) / column((var + 1e-5).sqrt()))
    torch.testing.assert_close(layer(x), affine(layer, torch.cat(normalized)))
    torch.testing.assert_close(layer.running_mean, torch.tensor(channels(x).mean(1)))
    torch.testing.assert_close(layer.running_var, torch.tensor(channels(x).var(1, ddof=1)))


def test_accumulated_moments_are_those_of_the_whole_batch():
    layer = layer_of(nn.AccumulatedBatchNorm, leannorm.AccumulatedBatch(3))
    plain = torch.nn.BatchNorm2d(3, dtype=torch.float64)
    for step in range(3):
        parts = [batch(10 * step + i, (size, 3, 4, 5)) for i, size in enumerate((2, 5, 1))]
        for i, part in enumerate(parts):
            seen = torch.cat(parts[: i + 1])
            values = channels(seen)
            expected = (part - column(torch.tensor(values.mean(1)))) / column(torch.tensor(values.var(1) + 1e-5).sqrt())
            before = layer.running_mean.clone()
            torch.testing.assert_close(layer(part), affine(layer, expected))
            assert torch.equal(before, layer.running_mean) == (i < 2), "the running statistics move once a step"
        plain(torch.cat(parts))
        torch.testing.assert_close(layer.running_mean, plain.running_mean)
        torch.testing.assert_close(layer.running_var, plain.running_var)
        assert layer.num_batches_tracked == step + 1


def test_a_nan_is_gone_with_the_step_that_met_it():
    layer = nn.AccumulatedBatchNorm(1, leannorm.AccumulatedBatch(2), guard_nonfinite=True)
    assert layer(torch.full((4, 1), float("nan"))).isnan().all()
    assert layer(torch.randn(4, 1)).isnan().all(), "pooled with the micro-batch before"
    assert layer(torch.randn(4, 1)).isfinite().all()


def test_adaptive_momentum_formula_and_training():
    layer = layer_of(nn.AdaptiveBatchNorm, leannorm.AdaptiveMomentum(learning_rate=0.5))
    plain = torch.nn.BatchNorm2d(3, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict(), strict=False)
    w, b = torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    history = []
    for step in range(6):
        x = batch(step, shift=step)
        mean, var = torch.tensor(channels(x).mean(1)), torch.tensor(channels(x).var(1, ddof=1))
        if history:
            w_, b_ = w.clone().requires_grad_(), b.clone().requires_grad_()
            last_mean, before = history[-1]
            moved = before + (0.1 + 0.9 * torch.sigmoid(w_ @ last_mean + b_)) * (last_mean - before)
            distance = ((mean - moved) ** 2 / (layer.running_var + 1e-5)).mean()
            dw, db = torch.autograd.grad(distance, [w_, b_])
            w, b = w - 0.5 * dw, b - 0.5 * db
        momentum = 0.1 + 0.9 * torch.sigmoid(w @ mean + b)
        history.append((mean, layer.running_mean.clone()))
        expected = (
            layer.running_mean + momentum * (mean - layer.running_mean),
            layer.running_var + momentum * (var - layer.running_var),
        )
        torch.testing.assert_close(layer(x), plain(x))
        torch.testing.assert_close((layer.running_mean, layer.running_var), expected)
        torch.testing.assert_close((layer.estimator_weight, layer.estimator_bias), (w, b))
    assert w.abs().min() > 0


def test_adaptive_momentum_learns_to_follow_a_drift():
    moving, still = (
        leannorm.nn.AdaptiveBatchNorm(1, leannorm.AdaptiveMomentum(learning_rate=rate)) for rate in (0.1, 0)
    )
    torch.manual_seed(0)
    for step in range(200):
        x = torch.randn(64, 1) + 0.5 * step
        moving(x)
        still(x)
    assert (moving.running_mean - x.mean()).abs() < (still.running_mean - x.mean()).abs() / 2
    assert not still.estimator_bias


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_diminishing_average(exponent):
    layer = layer_of(nn.DiminishingBatchNorm, leannorm.DiminishingAverage(exponent))
    mean, var = np.zeros(3), np.ones(3)
    for t in range(1, 6):
        x = batch(t)
        share = 1 / t**exponent
        mean = share * channels(x).mean(1) + (1 - share) * mean
        var = share * channels(x).var(1) + (1 - share) * var
        expected = (x - column(torch.tensor(mean))) / column(torch.tensor(var + 1e-5).sqrt())
        torch.testing.assert_close(layer(x), affine(layer, expected))
        torch.testing.assert_close(layer.running_var, torch.tensor(var))


def test_l1_deviation():
    x, layer = batch(0), layer_of(nn.L1BatchNorm, leannorm.L1Deviation(), momentum=1.0)
    values = channels(x)
    sigma = math.sqrt(math.pi / 2) * np.abs(values - values.mean(1, keepdims=True)).mean(1)
    expected = (x - column(torch.tensor(values.mean(1)))) / column(torch.tensor(np.sqrt(sigma**2 + 1e-5)))
    torch.testing.assert_close(layer(x), affine(layer, expected))
    torch.testing.assert_close(layer.running_var, torch.tensor(sigma**2 * 120 / 119))


@pytest.mark.parametrize(("chunks", "taken"), [(16, 8), (1, 1), (7, 1), (120, 1), (60, 60)])
def test_range_deviation(chunks, taken):
    x, layer = batch(0), layer_of(nn.RangeBatchNorm, leannorm.RangeDeviation(chunks))
    values = channels(x)
    ranges = [part.max(1) - part.min(1) for part in np.split(values, taken, axis=1)]
    sigma = np.mean(ranges, axis=0) / math.sqrt(2 * math.log(120 // taken))
    expected = (x - column(torch.tensor(values.mean(1)))) / column(torch.tensor(np.sqrt(sigma**2 + 1e-5)))
    torch.testing.assert_close(layer(x), affine(layer, expected))


def test_range_of_normal_values_is_twice_their_deviation():
    layer = nn.RangeBatchNorm(1, leannorm.RangeDeviation(16), momentum=1.0)
    torch.manual_seed(0)
    layer(5 * torch.randn(100_000, 1))
    assert layer.running_var.sqrt().item() == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("training", [True, False])
def test_enhanced_transform(kernel, training):
    x = batch(0)
    layer = layer_of(nn.EnhancedBatchNorm, leannorm.EnhancedTransform(kernel)).train(training)
    layer.running_var.uniform_(0.5, 2)
    plain = torch.nn.BatchNorm2d(3, dtype=torch.float64, affine=False).train(training)
    plain.load_state_dict(dict(layer.named_buffers()))
    same = plain(x) * column(layer.kernel[:, 0, kernel // 2, kernel // 2]) + column(layer.bias)
    torch.testing.assert_close(layer(x), same)
    torch.nn.init.normal_(layer.kernel)
    padded = F.pad(plain(x), (kernel // 2,) * 4)
    expected = torch.zeros_like(x)
    for i in range(kernel):
        for j in range(kernel):
            expected += column(layer.kernel[:, 0, i, j]) * padded[:, :, i : i + 4, j : j + 5]
    torch.testing.assert_close(layer(x), (expected + column(layer.bias)).detach(), check_stride=False)


def test_mixture_of_one_component_is_batch_normalization():
    layer = layer_of(nn.MixtureBatchNorm, leannorm.MixtureNormalization(1))
    plain = torch.nn.BatchNorm2d(3, dtype=torch.float64, momentum=0.1)
    plain.load_state_dict(layer.state_dict(), strict=False)
    for step in range(3):
        torch.testing.assert_close(layer(batch(step)), plain(batch(step)))


def test_mixture_formula():
    layer = layer_of(nn.MixtureBatchNorm, leannorm.MixtureNormalization(2))
    two_modes = torch.cat([batch(0, (4, 3, 2, 2)), batch(1, (4, 3, 2, 2)) + 8])
    layer(two_modes)
    mu, var, share = (t.clone() for t in (layer.component_mean, layer.component_var, layer.component_share))
    x = torch.cat([batch(2, (4, 3, 2, 2)), batch(3, (4, 3, 2, 2)) + 8])
    y = layer(x)
    positions = x.permute(0, 2, 3, 1).reshape(-1, 3)
    density = [
        share[k] * torch.distributions.Normal(mu[k], (var[k] + 1e-5).sqrt()).log_prob(positions).sum(1).exp()
        for k in (0, 1)
    ]
    p = torch.stack(density) / sum(density)
    expected = torch.zeros_like(positions)
    for k in (0, 1):
        weight = (p[k] / p[k].sum())[:, None]
        mean = (weight * positions).sum(0)
        variance = (weight * (positions - mean) ** 2).sum(0)
        expected += (p[k] / p[k].mean().sqrt())[:, None] * (positions - mean) / (variance + 1e-5).sqrt()
    expected = expected.reshape(8, 2, 2, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(y, affine(layer, expected), check_stride=False)
    assert 0.3 < p[0].mean() < 0.7, "both modes are found"


@pytest.mark.parametrize("training", [True, False])
def test_eight_bit_values_and_straight_through_gradients(training):
    def q(x, bits):
        return np.round(x * 2 ** (bits - 1)) / 2 ** (bits - 1)

    layer = layer_of(nn.EightBitBatchNorm, leannorm.EightBitNormalization()).train(training)
    layer.running_var.uniform_(0.5, 2)
    x = batch(0).requires_grad_()
    values = channels(x)
    mean, var = values.mean(1), values.var(1)
    if not training:
        mean, var = layer.running_mean.numpy(), layer.running_var.numpy()
    scale = q(np.sqrt(var), 16) + 2.0**-15
    normalized = q((x.detach().numpy() - q(mean, 16).reshape(3, 1, 1)) / scale.reshape(3, 1, 1), 8)
    weight, bias = q(layer.weight.detach().numpy(), 8), q(layer.bias.detach().numpy(), 8)
    y = layer(x)
    torch.testing.assert_close(y.detach(), torch.tensor(normalized * weight.reshape(3, 1, 1) + bias.reshape(3, 1, 1)))
    dy = torch.randn_like(x)
    y.backward(dy)
    torch.testing.assert_close(layer.weight.grad, torch.tensor(q((dy.numpy() * normalized).sum((0, 2, 3)), 15)))
    torch.testing.assert_close(layer.bias.grad, torch.tensor(q(dy.numpy().sum((0, 2, 3)), 15)))
    if not training:
        torch.testing.assert_close(x.grad, dy * column(torch.tensor(weight / scale)))


def test_masked_statistics_are_those_of_the_valid_positions():
    layer = nn.MaskedBatchNorm(3, leannorm.MaskedSequences(), dtype=torch.float64, momentum=1.0)
    x = torch.randn(4, 3, 7, dtype=torch.float64)
    lengths = torch.tensor([7, 1, 0, 4])
    valid = torch.cat([x[n, :, :length] for n, length in enumerate(lengths)], 1)
    mean, var = valid.mean(1), valid.var(1, correction=0)
    expected = (x - mean[:, None]) / (var[:, None] + 1e-5).sqrt()
    torch.testing.assert_close(layer(x, lengths=lengths), expected)
    torch.testing.assert_close(layer.running_var, valid.var(1))
    poisoned = x.clone()
    poisoned[1, :, 1:] = float("nan")
    torch.testing.assert_close(layer(poisoned, lengths=lengths)[0], expected[0])
