#include "driver.hpp"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <optional>

#include "places.hpp"

namespace leannorm {
namespace {

constexpr int64_t kSerial = 1 << 14;       // elements below which a second thread costs more than it saves
constexpr int64_t kPiece = 1 << 16;        // elements of a plane that are one unit of work
constexpr int64_t kWidth = 256;            // lanes that a row should have at least
constexpr int64_t kRowChunk = 1 << 15;     // elements of rows that are one step
constexpr int64_t kCacheBytes = 24 << 20;  // outputs beyond this are written around the caches

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Body>
void parallel(int threads, Body body) {
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    body(t);
#if defined(__x86_64__)
    __builtin_ia32_sfence();  // stores around the caches become visible before another thread goes on
#endif
  }
}

struct Range {
  int64_t begin, end;
};

Range share_of(int64_t n, int thread, int threads) { return {n * thread / threads, n * (thread + 1) / threads}; }

// The geometry of a problem, and how it is cut.
struct Layout {
  bool rows;
  int64_t samples, channels, spatial;
  int64_t fold = 1;    // rows that are taken as one wide row
  int64_t pieces = 1;  // of a plane
  int threads;

  explicit Layout(const Problem& p)
      : rows(p.channels_last),
        samples(p.sizes[0]),
        channels(p.channels),
        spatial(std::accumulate(p.sizes.begin() + 1, p.sizes.end(), int64_t{1}, std::multiplies<>())) {
    threads = elements() < kSerial || omp_in_parallel() ? 1 : omp_get_max_threads();
    if (rows) {
      const int64_t whole = 32 / std::gcd(channels, int64_t{32});  // makes wide rows whole vectors and cache lines
      fold = whole * std::max<int64_t>(1, kWidth / (channels * whole));
      if (channels * fold > 16 * kWidth) fold = 1;
    } else {
      pieces = divide_up(spatial, kPiece);
    }
  }

  int64_t elements() const { return samples * channels * spatial; }
  int64_t count() const { return samples * spatial; }
  int64_t width() const { return channels * fold; }
  int64_t wide_rows() const { return count() / fold; }
  int64_t rest() const { return count() % fold; }
  int64_t planes() const { return samples * channels; }

  // Partial statistics: for each thread its wide rows, and the rows that are left; or for each piece of each sample.
  int64_t parts() const { return rows ? threads * fold + 1 : samples * pieces; }

  // Calls body(first row, rows, thread, backwards) for steps of wide rows, body's thread owning them.
  template <class Body>
  void each_rows(bool reverse, Body body) const {
    const int64_t step = std::max<int64_t>(1, kRowChunk / width());
    parallel(threads, [&](int t) {
      const auto [begin, end] = share_of(wide_rows(), t, threads);
      const int64_t steps = divide_up(end - begin, step);
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t first = begin + (reverse ? steps - 1 - s : s) * step;
        body(first, std::min(step, end - first), t);
      }
    });
  }

  // Calls body(offset, length, channel, part) for the pieces of planes in memory's order, or against it.
  template <class Body>
  void each_piece(bool reverse, Body body) const {
    parallel(threads, [&](int t) {
      const int64_t units = planes() * pieces;
      const auto [begin, end] = share_of(units, t, threads);
      for (int64_t k = begin; k < end; ++k) {
        const int64_t unit = reverse ? begin + end - 1 - k : k;
        const int64_t plane = unit / pieces, piece = unit % pieces;
        const Range range = share_of(spatial, piece, pieces);
        body(plane * spatial + range.begin, range.end - range.begin, plane % channels,
             (plane / channels) * pieces + piece);
      }
    });
  }
};

// Two sums for each part and channel, and each part's weight.
struct Partials {
  int64_t parts, channels;
  std::vector<double> first, second, counts;
  Partials(int64_t parts, int64_t channels)
      : parts(parts), channels(channels), first(parts * channels), second(parts * channels), counts(parts) {}
  int64_t at(int64_t part, int64_t channel = 0) const { return part * channels + channel; }
};

// Per-channel values, repeated for wide rows and padded.
struct ChannelBuffers {
  int64_t channels, padded;
  std::vector<float> values;
  ChannelBuffers(int64_t channels, int64_t width) : channels(channels), padded(width + 64), values(5 * padded) {}
  float* mean() { return &values[0]; }
  float* scale() { return &values[padded]; }
  float* bias() { return &values[2 * padded]; }
  float* centre() { return &values[3 * padded]; }
  float* slope() { return &values[4 * padded]; }
  void repeat(int64_t width) {
    for (int k = 0; k < 5; ++k) {
      float* v = &values[k * padded];
      for (int64_t i = channels; i < width; ++i) v[i] = v[i - channels];
    }
  }
  Channels view() { return {mean(), scale(), bias(), centre(), slope()}; }
};

float inverse_deviation(float var, double eps) { return static_cast<float>(1 / std::sqrt(var + eps)); }

std::optional<Places> places_of(const Problem& p, const Layout& layout) {
  if (p.boxes.empty()) return std::nullopt;
  Places places(p.sizes, p.draw, p.boxes, p.shares);
  if (!layout.rows) places.within_samples(layout.spatial);
  return places;
}

Partials moments_of_all(const Kernels& kernels, const Problem& p, const Layout& layout) {
  Partials parts(layout.parts(), layout.channels);
  const Tensors& t = p.tensors;
  if (layout.rows) {
    const int64_t width = layout.width(), fold = layout.fold;
    parallel(layout.threads, [&](int thread) {
      std::vector<float> scratch(scratch_size(width));
      const auto [begin, end] = share_of(layout.wide_rows(), thread, layout.threads);
      const int64_t at = parts.at(thread * fold);
      kernels.moments_rows(t.dtype, t.x, begin * width, end - begin, width, nullptr, nullptr,
                           {&parts.first[at], &parts.second[at]}, scratch.data());
      for (int64_t k = 0; k < fold; ++k) parts.counts[thread * fold + k] = static_cast<double>(end - begin);
    });
    std::vector<float> scratch(scratch_size(layout.channels));
    const int64_t last = parts.parts - 1, at = parts.at(last);
    kernels.moments_rows(t.dtype, t.x, layout.wide_rows() * width, layout.rest(), layout.channels, nullptr, nullptr,
                         {&parts.first[at], &parts.second[at]}, scratch.data());
    parts.counts[last] = static_cast<double>(layout.rest());
  } else {
    layout.each_piece(false, [&](int64_t offset, int64_t length, int64_t channel, int64_t part) {
      const int64_t at = parts.at(part, channel);
      kernels.moments_plane(t.dtype, t.x, offset, length, nullptr, nullptr, {&parts.first[at], &parts.second[at]});
    });
    for (int64_t part = 0; part < parts.parts; ++part) {
      const Range range = share_of(layout.spatial, part % layout.pieces, layout.pieces);
      parts.counts[part] = static_cast<double>(range.end - range.begin);
    }
  }
  return parts;
}

Partials moments_of_places(const Kernels& kernels, const Problem& p, const Layout& layout, const Places& places) {
  const Tensors& t = p.tensors;
  const int64_t channels = layout.channels, sampled = static_cast<int64_t>(places.positions.size());
  const int threads = sampled * channels < kSerial ? 1 : layout.threads;
  Partials parts(layout.rows ? threads : layout.samples, channels);
  if (layout.rows) {
    parallel(threads, [&](int thread) {
      std::vector<float> scratch(scratch_size(channels));
      const auto [begin, end] = share_of(sampled, thread, threads);
      const int64_t at = parts.at(thread);
      kernels.moments_rows(t.dtype, t.x, 0, end - begin, channels, &places.positions[begin], &places.weights[begin],
                           {&parts.first[at], &parts.second[at]}, scratch.data());
      parts.counts[thread] = std::accumulate(&places.weights[begin], &places.weights[end], 0.0);
    });
  } else {
    parallel(threads, [&](int thread) {
      const auto [begin, end] = share_of(layout.planes(), thread, threads);
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t sample = plane / channels, first = places.first[sample];
        kernels.moments_plane(t.dtype, t.x, plane * layout.spatial, places.first[sample + 1] - first,
                              places.positions.data() + first, places.weights.data() + first,
                              {&parts.first[plane], &parts.second[plane]});
      }
    });
    parts.counts = places.counts;
  }
  return parts;
}

// Runs body(range of channels) over the threads where there are many partial sums.
template <class Body>
void over_channels(const Partials& parts, int threads, Body body) {
  if (parts.parts * parts.channels < kSerial) threads = 1;
  parallel(threads, [&](int t) {
    const Range range = share_of(parts.channels, t, threads);
    if (range.begin < range.end) body(range);
  });
}

void finish_moments(const Partials& parts, Range range, float* mean, float* var) {
  const int64_t n = range.end - range.begin;
  const double count = std::accumulate(parts.counts.begin(), parts.counts.end(), 0.0);
  std::vector<double> means(n), squares(n);
  for (int64_t part = 0; part < parts.parts; ++part) {
    const double* sum = &parts.first[parts.at(part, range.begin)];
    for (int64_t c = 0; c < n; ++c) means[c] += sum[c];
  }
  for (int64_t c = 0; c < n; ++c) means[c] /= count;
  for (int64_t part = 0; part < parts.parts; ++part) {
    const double weight = parts.counts[part];
    if (weight == 0) continue;
    const double *sum = &parts.first[parts.at(part, range.begin)], *square = &parts.second[parts.at(part, range.begin)];
    for (int64_t c = 0; c < n; ++c) {
      const double distance = sum[c] / weight - means[c];
      squares[c] += square[c] + weight * distance * distance;
    }
  }
  for (int64_t c = 0; c < n; ++c) {
    mean[range.begin + c] = static_cast<float>(means[c]);
    var[range.begin + c] = static_cast<float>(squares[c] / count);
  }
}

bool lines_are_whole(const Layout& layout, const void* p, int64_t bytes) {
  const int64_t stretch = layout.rows ? layout.width() : layout.spatial / layout.pieces;
  return reinterpret_cast<uintptr_t>(p) % 64 == 0 && stretch * bytes % 64 == 0 &&
         (layout.rows || layout.spatial % layout.pieces == 0);
}

Tensors with_streaming(const Problem& p, const Layout& layout) {
  Tensors t = p.tensors;
  const int64_t bytes = t.dtype == Dtype::float32 ? 4 : 2;
  t.stream = layout.elements() * bytes > kCacheBytes && lines_are_whole(layout, t.out, bytes) &&
             lines_are_whole(layout, t.dresidual, bytes);
  return t;
}

Tensors without_streaming(Tensors t) {
  t.stream = false;
  return t;
}

void set_point(const Problem& p, Range range, const float* mean, const float* var, ChannelBuffers& buffers) {
  for (int64_t c = range.begin; c < range.end; ++c) {
    buffers.mean()[c] = mean[c];
    buffers.scale()[c] = inverse_deviation(var[c], p.eps) * (p.weight ? p.weight[c] : 1.0f);
    buffers.bias()[c] = p.bias ? p.bias[c] : 0.0f;
  }
}

// One pass that reads x and dy; its sums are added up per part.
void backward_pass(const Kernels& kernels, const Tensors& t, const Layout& layout, const Channels& channels,
                   Backward mode, Partials* parts) {
  const bool reverse = mode == Backward::exact;  // begins with what the pass before has left in the cache
  const auto sums = [&](int64_t at) { return parts ? Sums{&parts->first[at], &parts->second[at]} : Sums{}; };
  if (layout.rows) {
    const int64_t width = layout.width();
    std::vector<float> scratch(scratch_size(width) * layout.threads);
    layout.each_rows(reverse, [&](int64_t first, int64_t rows, int thread) {
      kernels.backward_rows(t, channels, mode, first * width, rows, width,
                            sums(thread * layout.fold * layout.channels), &scratch[thread * scratch_size(width)]);
    });
    kernels.backward_rows(without_streaming(t), channels, mode, layout.wide_rows() * width, layout.rest(),
                          layout.channels, sums((layout.parts() - 1) * layout.channels), scratch.data());
  } else {
    layout.each_piece(reverse, [&](int64_t offset, int64_t length, int64_t channel, int64_t part) {
      kernels.backward_plane(t, channels, mode, offset, length, channel, sums(part * layout.channels + channel));
    });
  }
}

void correct(const Kernels& kernels, const Tensors& t, const Layout& layout, const Channels& channels,
             const Places& places) {
  const int64_t sampled = static_cast<int64_t>(places.positions.size());
  const int threads = sampled * layout.channels < kSerial ? 1 : layout.threads;
  parallel(threads, [&](int thread) {
    if (layout.rows) {
      const auto [begin, end] = share_of(sampled, thread, threads);
      kernels.correct_rows(t, channels, layout.channels, &places.positions[begin], &places.weights[begin], end - begin);
      return;
    }
    const auto [begin, end] = share_of(layout.planes(), thread, threads);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t sample = plane / layout.channels, first = places.first[sample];
      kernels.correct_plane(t, channels, plane * layout.spatial, plane % layout.channels,
                            places.positions.data() + first, places.weights.data() + first,
                            places.first[sample + 1] - first);
    }
  });
}

}  // namespace

void batch_norm(const Kernels& kernels, const Problem& p, float* mean, float* var) {
  const Layout layout(p);
  const auto places = places_of(p, layout);
  const Partials parts =
      places ? moments_of_places(kernels, p, layout, *places) : moments_of_all(kernels, p, layout);
  ChannelBuffers buffers(layout.channels, layout.width());
  over_channels(parts, layout.threads, [&](Range range) {
    finish_moments(parts, range, mean, var);
    set_point(p, range, mean, var, buffers);
  });
  buffers.repeat(layout.width());
  const Tensors t = with_streaming(p, layout);
  const Channels channels = buffers.view();
  const bool reverse = !places;
  if (layout.rows) {
    const int64_t width = layout.width();
    layout.each_rows(reverse, [&](int64_t first, int64_t rows, int) {
      kernels.forward_rows(t, channels, first * width, rows, width);
    });
    kernels.forward_rows(without_streaming(t), channels, layout.wide_rows() * width, layout.rest(), layout.channels);
  } else {
    layout.each_piece(reverse, [&](int64_t offset, int64_t length, int64_t channel, int64_t) {
      kernels.forward_plane(t, channels, offset, length, channel);
    });
  }
}

void batch_norm_backward(const Kernels& kernels, const Problem& p, const float* mean, const float* var,
                         float* sum_g_xhat, float* sum_g) {
  const Layout layout(p);
  const auto places = places_of(p, layout);
  ChannelBuffers buffers(layout.channels, layout.width());
  set_point(p, {0, layout.channels}, mean, var, buffers);
  buffers.repeat(layout.width());
  Partials parts(layout.parts(), layout.channels);
  const Tensors t = with_streaming(p, layout);
  backward_pass(kernels, t, layout, buffers.view(), places ? Backward::fused : Backward::reduce, &parts);

  const double count = places ? places->count : static_cast<double>(layout.count());
  over_channels(parts, layout.threads, [&](Range range) {
    std::vector<double> g(range.end - range.begin), g_centred(range.end - range.begin);
    for (int64_t part = 0; part < parts.parts; ++part)
      for (int64_t c = range.begin; c < range.end; ++c) {
        g[c - range.begin] += parts.first[parts.at(part, c)];
        g_centred[c - range.begin] += parts.second[parts.at(part, c)];
      }
    for (int64_t c = range.begin; c < range.end; ++c) {
      const float rstd = inverse_deviation(var[c], p.eps);
      const double xhat_sum = g_centred[c - range.begin] * rstd;
      sum_g[c] = static_cast<float>(g[c - range.begin]);
      sum_g_xhat[c] = static_cast<float>(xhat_sum);
      buffers.centre()[c] = static_cast<float>(buffers.scale()[c] * g[c - range.begin] / count);
      buffers.slope()[c] = static_cast<float>(buffers.scale()[c] * rstd * xhat_sum / count);
    }
  });
  buffers.repeat(layout.width());
  if (places) {
    correct(kernels, without_streaming(t), layout, buffers.view(), *places);
  } else {
    backward_pass(kernels, t, layout, buffers.view(), Backward::exact, nullptr);
  }
}

}  // namespace leannorm
