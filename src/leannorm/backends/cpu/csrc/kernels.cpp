// Compiled once for each instruction set. Nothing of the C++ library that could be shared between them is used here.
#include "kernels.hpp"

#include "activations.hpp"
#include "simd.hpp"

namespace leannorm::LEANNORM_ISA {
namespace {

constexpr int64_t kBlock = 4096;     // elements a lane-wise float sum may hold before it goes to double
constexpr int64_t kBlockRows = 128;  // the same for rows

// A channel's value for each lane: read from memory in channels-last, the same one in a plane.

struct PerLane {
  const float* p;
  Vec operator()(int64_t i) const { return load<Float32>(p + i, All{}); }
};

struct Uniform {
  Vec v;
  Uniform(const float* p, int64_t channel) : v(broadcast(p ? p[channel] : 0.0f)) {}
  Vec operator()(int64_t) const { return v; }
};

template <class Value>
struct Point {
  Value mean, scale, bias, centre, slope;
};

Point<PerLane> point_of(const Channels& c) { return {{c.mean}, {c.scale}, {c.bias}, {c.centre}, {c.slope}}; }

Point<Uniform> point_of(const Channels& c, int64_t channel) {
  return {{c.mean, channel}, {c.scale, channel}, {c.bias, channel}, {c.centre, channel}, {c.slope, channel}};
}

struct LaneSums {
  float *g, *g_centred;
  void add(int64_t i, Vec a, Vec b) {
    store<Float32>(g + i, PerLane{g}(i) + a, All{});
    store<Float32>(g_centred + i, PerLane{g_centred}(i) + b, All{});
  }
};

struct PlaneSums {
  Vec g{}, g_centred{};
  void add(int64_t, Vec a, Vec b) {
    g += a;
    g_centred += b;
  }
};

template <class Body>
void with_dtype(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::float32: return body(Float32{});
    case Dtype::bfloat16: return body(BFloat16{});
    case Dtype::float16: return body(Float16{});
  }
}

template <class T>
const typename T::Scalar* at(const void* tensor, int64_t offset) {
  return tensor ? static_cast<const typename T::Scalar*>(tensor) + offset : nullptr;
}

template <class T>
typename T::Scalar* at(void* tensor, int64_t offset) {
  return tensor ? static_cast<typename T::Scalar*>(tensor) + offset : nullptr;
}

template <class T>
void put(typename T::Scalar* p, Vec v, bool around_caches, All all) {
  around_caches ? stream<T>(p, v) : store<T>(p, v, all);
}

template <class T>
void put(typename T::Scalar* p, Vec v, bool, Some some) {
  store<T>(p, v, some);
}

// Forward

template <class T, class Act, class Value>
void forward_span(const Tensors& t, const Act& act, const Point<Value>& point, int64_t offset, int64_t n) {
  const auto* x = at<T>(t.x, offset);
  const auto* residual = at<T>(t.residual, offset);
  auto* y = at<T>(t.out, offset);
  const bool around_caches = t.stream;
  each_vector(n, [&](int64_t i, auto lanes) {
    Vec z = (load<T>(x + i, lanes) - point.mean(i)) * point.scale(i) + point.bias(i);
    if (residual) z += load<T>(residual + i, lanes);
    put<T>(y + i, act(z), around_caches, lanes);
  });
}

void forward_rows(const Tensors& t, const Channels& channels, int64_t offset, int64_t rows, int64_t width) {
  with_dtype(t.dtype, [&]<class T>(T) {
    with_activation(t.activation, [&](auto act) {
      for (int64_t r = 0; r < rows; ++r) forward_span<T>(t, act, point_of(channels), offset + r * width, width);
    });
  });
}

void forward_plane(const Tensors& t, const Channels& channels, int64_t offset, int64_t length, int64_t channel) {
  with_dtype(t.dtype, [&]<class T>(T) {
    with_activation(t.activation,
                    [&](auto act) { forward_span<T>(t, act, point_of(channels, channel), offset, length); });
  });
}

// Backward

template <class T, Backward kMode, class Act, class Value, class Accumulator>
void backward_span(const Tensors& t, const Act& act, const Point<Value>& point, int64_t offset, int64_t n,
                   Accumulator& sums, float weight = 1.0f) {
  const auto *x = at<T>(t.x, offset), *dy = at<T>(t.dy, offset);
  const auto *residual = at<T>(t.residual, offset), *y = at<T>(t.y, offset);
  auto *dx = at<T>(t.out, offset), *dresidual = at<T>(t.dresidual, offset);
  const bool around_caches = t.stream;
  each_vector(n, [&](int64_t i, auto lanes) {
    const Vec centred = load<T>(x + i, lanes) - point.mean(i);
    Vec z;
    if (y) {
      z = load<T>(y + i, lanes);
    } else {
      z = centred * point.scale(i) + point.bias(i);
      if (residual) z += load<T>(residual + i, lanes);
    }
    const Vec g = act.backward(load<T>(dy + i, lanes), z);
    if constexpr (kMode != Backward::exact) sums.add(i, g, g * centred);
    if constexpr (kMode != Backward::reduce) {
      Vec d = point.scale(i) * g;
      if constexpr (kMode == Backward::exact) d -= weight * (point.centre(i) + point.slope(i) * centred);
      put<T>(dx + i, d, around_caches, lanes);
      if (dresidual) put<T>(dresidual + i, g, around_caches, lanes);
    }
  });
}

template <class Body>
void with_mode(Backward mode, Body body) {
  switch (mode) {
    case Backward::reduce: return body.template operator()<Backward::reduce>();
    case Backward::fused: return body.template operator()<Backward::fused>();
    case Backward::exact: return body.template operator()<Backward::exact>();
  }
}

void clear(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0;
}

void add_to(double* total, const float* part, int64_t n) {
  for (int64_t i = 0; i < n; ++i) total[i] += part[i];
}

void backward_rows(const Tensors& t, const Channels& channels, Backward mode, int64_t offset, int64_t rows,
                   int64_t width, Sums totals, float* scratch) {
  const int64_t part = scratch_size(width) / 3;
  with_dtype(t.dtype, [&]<class T>(T) {
    with_activation(t.activation, [&](auto act) {
      with_mode(mode, [&]<Backward kMode>() {
        LaneSums sums{scratch, scratch + part};
        for (int64_t first = 0; first < rows; first += kBlockRows) {
          if (kMode != Backward::exact) clear(scratch, 2 * part);
          const int64_t last = rows < first + kBlockRows ? rows : first + kBlockRows;
          for (int64_t r = first; r < last; ++r)
            backward_span<T, kMode>(t, act, point_of(channels), offset + r * width, width, sums);
          if (kMode != Backward::exact) {
            add_to(totals.g, sums.g, width);
            add_to(totals.g_centred, sums.g_centred, width);
          }
        }
      });
    });
  });
}

void backward_plane(const Tensors& t, const Channels& channels, Backward mode, int64_t offset, int64_t length,
                    int64_t channel, Sums totals) {
  with_dtype(t.dtype, [&]<class T>(T) {
    with_activation(t.activation, [&](auto act) {
      with_mode(mode, [&]<Backward kMode>() {
        const auto point = point_of(channels, channel);
        for (int64_t first = 0; first < length; first += kBlock) {
          const int64_t n = length - first < kBlock ? length - first : kBlock;
          PlaneSums sums;
          backward_span<T, kMode>(t, act, point, offset + first, n, sums);
          if (kMode != Backward::exact) {
            *totals.g += sum_of(sums.g);
            *totals.g_centred += sum_of(sums.g_centred);
          }
        }
      });
    });
  });
}

// Correction of sampled elements: computed anew from x and dy, so that dx is rounded once.

void correct_rows(const Tensors& t, const Channels& channels, int64_t width, const int64_t* positions,
                  const float* weights, int64_t count) {
  with_dtype(t.dtype, [&]<class T>(T) {
    with_activation(t.activation, [&](auto act) {
      PlaneSums unused;
      for (int64_t s = 0; s < count; ++s)
        backward_span<T, Backward::exact>(t, act, point_of(channels), positions[s] * width, width, unused, weights[s]);
    });
  });
}

template <class T>
Vec gather(const typename T::Scalar* p, const int64_t* positions, int count) {
  typename T::Packed packed{};
  for (int l = 0; l < count; ++l) {
    typename T::Scalar value = p[positions[l]];
    std::memcpy(reinterpret_cast<char*>(&packed) + l * sizeof value, &value, sizeof value);
  }
  return T::unpack(packed);
}

template <class T>
void scatter(typename T::Scalar* p, const int64_t* positions, Vec v, int count) {
  typename T::Scalar values[kLanes];
  store<T>(values, v, All{});
  for (int l = 0; l < count; ++l) p[positions[l]] = values[l];
}

void correct_plane(const Tensors& t, const Channels& channels, int64_t offset, int64_t channel,
                   const int64_t* positions, const float* weights, int64_t count) {
  with_dtype(t.dtype, [&]<class T>(T) {
    with_activation(t.activation, [&](auto act) {
      const auto point = point_of(channels, channel);
      const auto *x = at<T>(t.x, offset), *dy = at<T>(t.dy, offset);
      const auto *residual = at<T>(t.residual, offset), *y = at<T>(t.y, offset);
      auto* dx = at<T>(t.out, offset);
      each_vector(count, [&](int64_t s, auto lanes) {
        const int64_t* here = positions + s;
        const Vec centred = gather<T>(x, here, lanes.count) - point.mean(0);
        Vec z = centred * point.scale(0) + point.bias(0);
        if (residual) z += gather<T>(residual, here, lanes.count);
        if (y) z = gather<T>(y, here, lanes.count);
        const Vec g = act.backward(gather<T>(dy, here, lanes.count), z);
        const Vec share = load<Float32>(weights + s, lanes) * (point.centre(0) + point.slope(0) * centred);
        scatter<T>(dx, here, point.scale(0) * g - share, lanes.count);
      });
    });
  });
}

// Moments: a block that stays in the cache is read twice, the second time centred, then merged (Chan et al.). The centre
// is the block's mean but for rounding, which the sum of the centred values corrects.

struct Merging {
  double inverse_count, inverse_block, block_count, between;
  Merging(double count, double block)
      : inverse_count(count > 0 ? 1 / count : 0),
        inverse_block(1 / block),
        block_count(block),
        between(count * block / (count + block)) {}

  void operator()(double& sum, double& square, double centre, double centred, double centred_square) const {
    const double block_sum = centre * block_count + centred;
    const double distance = block_sum * inverse_block - sum * inverse_count;
    square += centred_square - centred * centred * inverse_block + distance * distance * between;
    sum += block_sum;
  }
};

void moments_rows(Dtype dtype, const void* tensor, int64_t offset, int64_t rows, int64_t width,
                  const int64_t* positions, const float* weights, Moments totals, float* scratch) {
  const int64_t part = scratch_size(width) / 3;
  float *centre = scratch, *sum = scratch + part, *square = scratch + 2 * part;
  const int64_t block = width > 1024 ? kBlockRows / 4 : kBlockRows;
  double count = 0;
  with_dtype(dtype, [&]<class T>(T) {
    for (int64_t first = 0; first < rows; first += block) {
      const int64_t last = rows < first + block ? rows : first + block;
      const auto each_row = [&](auto body) {
        for (int64_t r = first; r < last; ++r) {
          const auto* x = at<T>(tensor, offset + (positions ? positions[r] : r) * width);
          const float weight = weights ? weights[r] : 1.0f;
          each_vector(width, [&](int64_t i, auto lanes) { body(i, load<T>(x + i, lanes), weight); });
        }
      };
      float block_count = 0;
      for (int64_t r = first; r < last; ++r) block_count += weights ? weights[r] : 1.0f;
      clear(scratch, 3 * part);
      const float share = 1.0f / block_count;
      each_row([&](int64_t i, Vec x, float weight) {
        store<Float32>(centre + i, PerLane{centre}(i) + (weight * share) * x, All{});
      });
      each_row([&](int64_t i, Vec x, float weight) {
        const Vec centred = x - PerLane{centre}(i), weighted = weight * centred;
        store<Float32>(sum + i, PerLane{sum}(i) + weighted, All{});
        store<Float32>(square + i, PerLane{square}(i) + weighted * centred, All{});
      });
      const Merging merge(count, block_count);
      for (int64_t i = 0; i < width; ++i) merge(totals.sum[i], totals.square[i], centre[i], sum[i], square[i]);
      count += block_count;
    }
  });
}

void moments_plane(Dtype dtype, const void* tensor, int64_t offset, int64_t length, const int64_t* positions,
                   const float* weights, Moments totals) {
  double count = 0;
  with_dtype(dtype, [&]<class T>(T) {
    const auto* x = at<T>(tensor, offset);
    for (int64_t first = 0; first < length; first += kBlock) {
      const int64_t n = length - first < kBlock ? length - first : kBlock;
      const auto each_value = [&](auto body) {
        each_vector(n, [&](int64_t i, auto lanes) {
          const Vec value = positions ? gather<T>(x, positions + first + i, lanes.count) : load<T>(x + first + i, lanes);
          const Vec weight = weights ? load<Float32>(weights + first + i, lanes) : keep_first(broadcast(1.0f), lanes);
          body(value, weight);
        });
      };
      Vec weights_sum{}, first_sum{}, sum{}, square{};
      each_value([&](Vec x, Vec weight) {
        weights_sum += weight;
        first_sum += weight * x;
      });
      const double block_count = sum_of(weights_sum);
      const float centre = static_cast<float>(sum_of(first_sum) / block_count);
      each_value([&](Vec x, Vec weight) {
        const Vec centred = x - centre, weighted = weight * centred;
        sum += weighted;
        square += weighted * centred;
      });
      Merging(count, block_count)(*totals.sum, *totals.square, centre, sum_of(sum), sum_of(square));
      count += block_count;
    }
  });
}

}  // namespace

const Kernels kernels = {moments_rows,  moments_plane,  forward_rows, forward_plane,
                         backward_rows, backward_plane, correct_rows, correct_plane};

}  // namespace leannorm::LEANNORM_ISA
