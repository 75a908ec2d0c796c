// Activations on vectors: y = act(z), and g = dy act'(z), where backward sees y in place of z if kTakesOutput. Then act'
// has two values: `is_one` says of y whether it is 1, and `backward_where` takes that.
//
// NaN passes through each as it does in torch: comparisons are written so that they fail on NaN.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace leannorm::LEANNORM_ISA {

// exp to about one unit in the last place; overflows to infinity and underflows to zero.
inline Vec exp(Vec x) {
  x = x < -104.0f ? broadcast(-104.0f) : x;
  x = x > 89.0f ? broadcast(89.0f) : x;
  const Vec magic = broadcast(0x1.8p23f);  // adding it rounds to an integer, which its last bits then hold
  const Vec shifted = multiply_add(x, broadcast(1.44269504f), magic);
  const Int n = (Int)(bits_of(shifted) - bits_of(magic));
  const Vec rounded = shifted - magic;
  Vec r = multiply_add(rounded, broadcast(-0.693359375f), x);
  r = multiply_add(rounded, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = multiply_add(p, r, 1.3981999507e-3f);
  p = multiply_add(p, r, 8.3334519073e-3f);
  p = multiply_add(p, r, 4.1665795894e-2f);
  p = multiply_add(p, r, 1.6666665459e-1f);
  p = multiply_add(p, r, 5.0000001201e-1f);
  p = multiply_add(p, r * r, r) + 1.0f;
  const Int half = n >> 1;  // 2^n in two factors: either alone stays within the exponent's range
  return p * float_of((Bits)((half + 127) << 23)) * float_of((Bits)((n - half + 127) << 23));
}

struct Identity {
  static constexpr bool kTakesOutput = true;
  explicit Identity(const Activation&) {}
  Vec operator()(Vec z) const { return z; }
  Where is_one(Vec) const { return everywhere(); }
  Vec backward_where(Vec dy, Where) const { return dy; }
  Vec backward(Vec dy, Vec) const { return dy; }
};

struct Relu {
  static constexpr bool kTakesOutput = true;
  explicit Relu(const Activation&) {}
  Vec operator()(Vec z) const { return at_least(0.0f, z); }
  Where is_one(Vec at) const { return except(where_at_most(at, Vec{})); }
  Vec backward_where(Vec dy, Where one) const { return choose(one, dy, Vec{}); }
  Vec backward(Vec dy, Vec at) const { return backward_where(dy, is_one(at)); }
};

struct Clamp {
  static constexpr bool kTakesOutput = true;
  Vec low, high;
  explicit Clamp(const Activation& a) : low(broadcast(a.first)), high(broadcast(a.second)) {}
  Vec operator()(Vec z) const {
    z = z < low ? low : z;
    return z > high ? high : z;
  }
  Where is_one(Vec at) const { return except(where_at_most(at, low) | where_at_least(at, high)); }
  Vec backward_where(Vec dy, Where one) const { return choose(one, dy, Vec{}); }
  Vec backward(Vec dy, Vec at) const { return backward_where(dy, is_one(at)); }
};

struct LeakyRelu {
  static constexpr bool kTakesOutput = true;
  Vec slope;
  explicit LeakyRelu(const Activation& a) : slope(broadcast(a.first)) {}
  Vec operator()(Vec z) const { return z > 0.0f ? z : z * slope; }
  Where is_one(Vec at) const { return where_above(at, Vec{}); }
  Vec backward_where(Vec dy, Where one) const { return choose(one, dy, dy * slope); }
  Vec backward(Vec dy, Vec at) const { return backward_where(dy, is_one(at)); }
};

struct Hardswish {
  static constexpr bool kTakesOutput = false;
  explicit Hardswish(const Activation&) {}
  Vec operator()(Vec z) const {
    Vec gate = z + 3.0f;
    gate = gate < 0.0f ? Vec{} : gate;
    gate = gate > 6.0f ? broadcast(6.0f) : gate;
    return z * gate * (1.0f / 6.0f);
  }
  Vec backward(Vec dy, Vec z) const {
    const Vec inside = dy * multiply_add(z, broadcast(1.0f / 3.0f), 0.5f);
    const Vec g = z >= 3.0f ? dy : inside;
    return z <= -3.0f ? Vec{} : g;
  }
};

// The smooth ones are z cdf(z) with the derivative cdf(z) + z pdf(z); a distribution gives both.
struct Density {
  Vec cdf, pdf;
};

struct Logistic {
  static Density at(Vec z) {
    const Vec cdf = 1.0f / (1.0f + exp(-z));
    return {cdf, cdf * (1.0f - cdf)};
  }
};

// The normal distribution by tanh: (1 + tanh(u)) / 2 = logistic(2 u), 2 u = sqrt(8 / pi) (z + 0.044715 z^3).
struct NormalByTanh {
  static Density at(Vec z) {
    constexpr float kScale = 1.5957691216057308f, kCubic = 0.044715f;
    const Vec square = z * z;
    const Density d = Logistic::at(kScale * multiply_add(kCubic * square, z, z));
    return {d.cdf, d.pdf * (kScale * multiply_add(square, broadcast(3.0f * kCubic), 1.0f))};
  }
};

// The normal distribution itself: Phi(-a) = exp(-a^2 / 2) P(t), t = 1 / (1 + 0.3 a), a >= 0. P is a fit of degree 10 to
// 1e-7 relative, so that both tails keep their digits.
struct Normal {
  static Density at(Vec z) {
    const Vec a = z < 0.0f ? -z : z;
    const Vec e = exp(-0.5f * z * z), t = 1.0f / multiply_add(a, broadcast(0.3f), 1.0f);
    Vec p = broadcast(-0.0124282017f);
    p = multiply_add(p, t, 0.0729415566f);
    p = multiply_add(p, t, -0.147245079f);
    p = multiply_add(p, t, 0.0995882303f);
    p = multiply_add(p, t, -0.0155382035f);
    p = multiply_add(p, t, 0.0683877319f);
    p = multiply_add(p, t, 0.0859196782f);
    p = multiply_add(p, t, 0.109011613f);
    p = multiply_add(p, t, 0.119680032f);
    p = multiply_add(p, t, 0.119682692f);
    const Vec tail = e * p * t;
    return {z < 0.0f ? tail : 1.0f - tail, e * 0.398942280f};
  }
};

template <class Distribution>
struct Gated {
  static constexpr bool kTakesOutput = false;
  explicit Gated(const Activation&) {}
  Vec operator()(Vec z) const { return z * Distribution::at(z).cdf; }
  Vec backward(Vec dy, Vec z) const {
    const Density d = Distribution::at(z);
    return dy * multiply_add(z, d.pdf, d.cdf);
  }
};

// Calls body with the activation.
template <class Body>
void with_activation(const Activation& a, Body body) {
  switch (a.kind) {
    case Kind::identity: return body(Identity(a));
    case Kind::relu: return body(Relu(a));
    case Kind::clamp: return body(Clamp(a));
    case Kind::leaky_relu: return body(LeakyRelu(a));
    case Kind::silu: return body(Gated<Logistic>(a));
    case Kind::hardswish: return body(Hardswish(a));
    case Kind::gelu: return body(Gated<Normal>(a));
    case Kind::gelu_tanh: return body(Gated<NormalByTanh>(a));
  }
}

}  // namespace leannorm::LEANNORM_ISA
