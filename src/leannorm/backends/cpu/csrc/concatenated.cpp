#include "concatenated.hpp"

#include <algorithm>

#include "layout.hpp"
#include "scratch.hpp"

namespace leannorm {
namespace {

constexpr int64_t kBlockBytes = 1 << 17;

// The bytes of an element and of a row, how many rows a block has, and its bytes.
struct Blocks {
  int64_t element, width, rows, bytes;
  explicit Blocks(const Call& call, const Layout& layout)
      : element(size_of(call.tensors.dtype)),
        width(layout.channels * element),
        rows(std::max<int64_t>(1, kBlockBytes / width)),
        bytes(rows * width) {}
};

}  // namespace

void concatenated_batch_norm(const Kernels& kernels, const Plan& plan, const Call& call, const Parts& parts,
                             float* mean, float* var) {
  const Layout layout(plan);
  const Sample places(plan, call.draw);
  const Blocks blocks(call, layout);
  ChannelBuffers buffers(layout);
  finish_moments(call, moments_of_parts(kernels, call.tensors, parts, layout, *places), {0, layout.channels}, mean,
                 var, buffers);
  const Tensors all = with_streaming(call.tensors, layout, kRowsCacheBytes, layout.channels);
  over_shares(layout.count(), layout.threads, [&](Range share) {
    char* const block = scratch_of<char, Of::thread>(blocks.bytes);
    Tensors t = all;
    t.x = block;
    each_block(share, blocks.rows, [&](int64_t first, int64_t count) {
      PartRows(parts, blocks.element, count, [&](int64_t i) { return first + i; }).read_and_ask(block);
      t.out = static_cast<char*>(all.out) + first * blocks.width;
      kernels.forward_rows(t, buffers.view(), 0, count, layout.channels);
    });
  });
}

void concatenated_batch_norm_backward(const Kernels& kernels, const Plan& plan, const Call& call, const Parts& parts,
                                      const float* mean, const float* var, float* sum_g_xhat, float* sum_g) {
  const Layout layout(plan);
  const Sample places(plan, call.draw);
  const Blocks blocks(call, layout);
  const auto* const dy = static_cast<const char*>(call.tensors.dy);
  ChannelBuffers buffers(layout);
  set_point(call, {0, layout.channels}, mean, var, buffers);
  const bool around_caches = goes_around_caches(parts, blocks.element, layout.count());
  Partials sums(layout.threads, layout.channels);
  parallel(layout.threads, [&](int thread) {
    std::vector<float> scratch(scratch_size(layout.channels));
    char *const x = scratch_of<char, Of::thread>(2 * blocks.bytes), *const dx = x + blocks.bytes;
    Tensors t = call.tensors;
    t.x = x, t.out = dx;
    each_block(share_of(layout.count(), thread, layout.threads), blocks.rows, [&](int64_t first, int64_t count) {
      const PartRows rows(parts, blocks.element, count, [&](int64_t i) { return first + i; });
      rows.read_and_ask(x);
      t.dy = dy + first * blocks.width;
      kernels.backward_rows(t, buffers.view(), Backward::fused, 0, count, layout.channels, sums.at(thread),
                            scratch.data());
      rows.write(dx, around_caches);
    });
  });
  finish_sums(call, sums, {0, layout.channels}, places->count, var, sum_g_xhat, sum_g, buffers);

  const Parts gradient{{dy, nullptr, layout.channels}};
  std::vector<int64_t> offsets(blocks.rows);
  for (int64_t i = 0; i < blocks.rows; ++i) offsets[i] = i * layout.channels;
  over_shares(places->size(), threads_for(layout, *places), [&](Range share) {
    char *const x = scratch_of<char, Of::thread>(3 * blocks.bytes), *const dx = x + blocks.bytes,
                *const g = dx + blocks.bytes;
    Tensors t = call.tensors;
    t.x = x, t.out = dx, t.dy = g;
    each_block(share, blocks.rows, [&](int64_t first, int64_t count) {
      const auto row = [&](int64_t i) { return places->offsets[first + i] / layout.channels; };
      const PartRows rows(parts, blocks.element, count, row);
      rows.read(x);
      PartRows(gradient, blocks.element, count, row).read(g);
      kernels.correct_rows(t, buffers.view(), layout.channels, {offsets.data(), &places->weights[first], count});
      rows.write(dx);
    });
  });
}

}  // namespace leannorm
