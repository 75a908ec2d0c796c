// How a call's work is cut over threads, and the per-channel values that its parts meet in.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "driver.hpp"

namespace leannorm {

constexpr int64_t kSerial = 1 << 14;  // elements below which a second thread costs more than it saves

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
  int64_t size() const { return end - begin; }
};

inline Range share_of(int64_t n, int thread, int threads) { return {n * thread / threads, n * (thread + 1) / threads}; }

// Calls body(range) for the shares of [0, n).
template <class Body>
void over_shares(int64_t n, int threads, Body body) {
  parallel(threads, [&](int thread) {
    const Range range = share_of(n, thread, threads);
    if (range.begin < range.end) body(range);
  });
}

// The sizes of a call, and over how many threads it is worth spreading.
struct Layout : Geometry {
  int threads;
  explicit Layout(const Plan& plan);
  int64_t elements() const { return samples * channels * spatial; }
  int64_t count() const { return samples * spatial; }  // elements of a channel
};

// Two sums for each part and channel, and each part's weight.
struct Partials {
  int64_t parts, channels;
  std::vector<double> first, second, counts;
  Partials(int64_t parts, int64_t channels)
      : parts(parts), channels(channels), first(parts * channels), second(parts * channels), counts(parts) {}
  Sums at(int64_t part) { return {&first[part * channels], &second[part * channels]}; }
};

// Per-channel values, to be repeated for wide rows and padded.
struct ChannelBuffers {
  int64_t channels, width, padded;
  std::vector<float> values;
  float *mean, *scale, *bias, *centre, *slope;

  explicit ChannelBuffers(const Geometry& g);
  Channels view() const { return {mean, scale, bias, centre, slope}; }
  Channels repeated();
};

// What the correction of sampled elements reads and writes. In float32 it begins with dx as it lies there, scale g, since
// dx may have taken the place of dy; what has fewer bits is made anew from x and dy, so that it is rounded once.
struct Correction {
  Tensors tensors;
  Channels channels;
  Correction(const Tensors&, const ChannelBuffers&);
  Correction(const Correction&) = delete;

 private:
  std::vector<float> one_;  // what is left of the scale
};

// Fixed places, or those that a draw gives.
class Sample {
 public:
  Sample(const Plan& plan, const int64_t* draw);
  Sample(const Sample&) = delete;
  explicit operator bool() const { return places_; }
  const Places& operator*() const { return *places_; }
  const Places* operator->() const { return places_; }

 private:
  std::optional<Places> drawn_;
  const Places* places_ = nullptr;
};

// The threads for sampled elements alone.
int threads_for(const Layout&, const Places&);

int threads_for(int64_t elements);

int64_t size_of(Dtype);  // in bytes

constexpr int64_t kLine = 64;  // bytes of a cache line

inline bool starts_a_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % kLine == 0; }

// Whether rows of `width` elements of the results are whole cache lines.
bool has_whole_lines(const Tensors&, int64_t width);

constexpr int64_t kRowsCacheBytes = 8 << 20;  // larger calls on rows write around the caches

// Writes around the caches if the tensors have more bytes than `limit`. Rows of `width` elements are to be whole cache
// lines for that; planes need not be.
Tensors with_streaming(Tensors, const Layout&, int64_t limit, int64_t width = 0);
Tensors without_streaming(Tensors);

void set_point(const Call&, Range, const float* mean, const float* var, ChannelBuffers&);

// Merges the parts of some channels into mean and var, and takes these for the channels' values.
void finish_moments(const Call&, const Partials&, Range, float* mean, float* var, ChannelBuffers&);

// Merges the parts of some channels into the sums of g and g xhat, and these into the channels' centre and slope.
void finish_sums(const Call&, const Partials&, Range, double count, const float* var, float* sum_g_xhat, float* sum_g,
                 ChannelBuffers&);

}  // namespace leannorm
