#include "concatenated.hpp"

#include <algorithm>

#include "layout.hpp"

namespace leannorm {
namespace {

constexpr int64_t kBlockBytes = 1 << 17, kBlockRows = 128;
constexpr int64_t kBackwardCacheBytes = 16 << 20;  // less is found in the caches where gradients are added up

// Calls body(part, its columns).
template <class Body>
void each_part(const Parts& parts, int64_t width, Body body) {
  int64_t first = 0;
  for (const Part& part : parts) {
    body(part, Columns{first, part.channels, width});
    first += part.channels;
  }
}

// The same for blocks of some rows, as body(part, columns, first row, rows).
template <class Body>
void each_block_of_parts(const Parts& parts, int64_t width, int64_t element, Range rows, Body body) {
  const int64_t most = std::clamp<int64_t>(kBlockBytes / (width * element), 1, kBlockRows);
  each_block(rows, most, [&](int64_t first, int64_t count) {
    each_part(parts, width, [&](const Part& part, const Columns& columns) { body(part, columns, first, count); });
  });
}

// Whether each row of each part, and of its gradient, is whole cache lines.
bool have_whole_lines(const Parts& parts, int64_t element) {
  return std::all_of(parts.begin(), parts.end(), [&](const Part& part) {
    return part.channels * element % kLine == 0 && starts_a_line(part.dx);
  });
}

}  // namespace

void concatenated_batch_norm(const Kernels& kernels, const Plan& plan, const Call& call, const Parts& parts,
                             float* mean, float* var) {
  const Layout layout(plan);
  const Sample places(plan, call.draw);
  ChannelBuffers buffers(layout);
  finish_moments(call, moments_of_parts(kernels, call.tensors, parts, layout, *places), {0, layout.channels}, mean,
                 var, buffers);
  const int64_t element = size_of(call.tensors.dtype);
  Tensors all = with_streaming(call.tensors, layout, kRowsCacheBytes, layout.channels);
  all.stream &= have_whole_lines(parts, element);
  over_shares(layout.count(), layout.threads, [&](Range share) {
    Tensors t = all;
    each_block_of_parts(parts, layout.channels, element, share,
                        [&](const Part& part, const Columns& columns, int64_t first, int64_t count) {
                          t.x = part.x;
                          kernels.forward_columns(t, buffers.view(), columns, first, count);
                        });
  });
}

void concatenated_batch_norm_backward(const Kernels& kernels, const Plan& plan, const Call& call, const Parts& parts,
                                      const float* mean, const float* var, float* sum_g_xhat, float* sum_g) {
  const Layout layout(plan);
  const Sample places(plan, call.draw);
  const int64_t element = size_of(call.tensors.dtype);
  ChannelBuffers buffers(layout);
  set_point(call, {0, layout.channels}, mean, var, buffers);
  const int64_t bytes = 3 * layout.elements() * element;  // of x, dy and dx
  const bool around_caches = bytes > kBackwardCacheBytes && have_whole_lines(parts, element);
  Partials sums(layout.threads, layout.channels);
  parallel(layout.threads, [&](int thread) {
    std::vector<float> scratch(scratch_size(layout.channels));
    Tensors t = call.tensors;
    t.stream = around_caches;
    each_block_of_parts(parts, layout.channels, element, share_of(layout.count(), thread, layout.threads),
                        [&](const Part& part, const Columns& columns, int64_t first, int64_t count) {
                          t.x = part.x, t.out = part.dx;
                          kernels.backward_columns(t, buffers.view(), columns, first, count, sums.at(thread),
                                                   scratch.data());
                        });
  });
  finish_sums(call, sums, {0, layout.channels}, places->count, var, sum_g_xhat, sum_g, buffers);

  const Correction correction(call.tensors, buffers);
  over_shares(places->size(), threads_for(layout, *places), [&](Range share) {
    std::vector<int64_t> rows(share.size());
    for (int64_t i = 0; i < share.size(); ++i) rows[i] = places->offsets[share.begin + i] / layout.channels;
    const Positions sampled{rows.data(), &places->weights[share.begin], share.size()};
    each_part(parts, layout.channels, [&](const Part& part, const Columns& columns) {
      if (!part.dx) return;
      Tensors t = correction.tensors;
      t.x = part.x, t.out = part.dx;
      if (correction.tensors.in_place()) t.dy = part.dx;
      kernels.correct_columns(t, correction.channels, columns, sampled);
    });
  });
}

}  // namespace leannorm
