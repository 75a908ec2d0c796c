"""Device code of the activations: their values and derivatives in float32, NaN passed on as PyTorch does."""

# Kinds and parameters are those of `leannorm.activation`; "" is the identity. No annotations are postponed here, since
# Triton reads `tl.constexpr` from them.

# A constexpr parameter takes a plain value.
# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _sigmoids(z):
    """Give sigmoid(z) and sigmoid(-z) = 1 - sigmoid(z), both without cancellation."""
    e = tl.exp(-tl.abs(z))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(z > 0.0, large, small), tl.where(z > 0.0, small, large)


@triton.jit
def _normal_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _twice_inner(z):
    return 1.5957691216057308 * (z + 0.044715 * z * z * z)  # 2 sqrt(2 / pi)


@triton.jit
def activate(z, first, second, ACTIVATION: tl.constexpr):
    """Give act(z)."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == "clamp":
        z = tl.where(z < first, first, tl.where(z > second, second, z))
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0.0, z, z * first)
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "hardswish":
        gate = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, 6.0, z + 3.0))
        z = z * gate / 6.0
    elif ACTIVATION == "gelu":
        z = z * _normal_cdf(z)
    elif ACTIVATION == "gelu_tanh":
        z = z * _sigmoid(_twice_inner(z))  # 1 + tanh(u) = 2 sigmoid(2 u)
    else:
        tl.static_assert(ACTIVATION == "", "unknown activation")
    return z


@triton.jit
def activate_backward(g, at, first, second, ACTIVATION: tl.constexpr):
    """Give g act'(z); ``at`` is z, or y = act(z) where `contract.takes_output` allows it."""
    if ACTIVATION == "relu":
        g = tl.where(at <= 0.0, 0.0, g)
    elif ACTIVATION == "clamp":
        g = tl.where((at <= first) | (at >= second), 0.0, g)
    elif ACTIVATION == "leaky_relu":
        g = tl.where(at > 0.0, g, g * first)
    elif ACTIVATION == "silu":
        s, rest = _sigmoids(at)
        g = g * s * (1.0 + at * rest)
    elif ACTIVATION == "hardswish":
        g = tl.where(at <= -3.0, 0.0, tl.where(at >= 3.0, g, g * (at / 3.0 + 0.5)))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * at * at)
        g = g * (_normal_cdf(at) + at * density)
    elif ACTIVATION == "gelu_tanh":
        s, rest = _sigmoids(_twice_inner(at))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * at * at)
        g = g * (s + at * s * rest * slope)
    else:
        tl.static_assert(ACTIVATION == "", "unknown activation")
    return g
