// Contiguous memory: the planes of a channel, one in each sample.
//
// A thread takes whole channels, and does with a few of them all that there is to do while the caches hold them. Where
// there are too few channels for that, all threads share each step.
#include <optional>
#include <vector>

#include "layout.hpp"
#include "orders.hpp"

namespace leannorm {
namespace {

constexpr int64_t kPiece = 1 << 16;        // elements of a plane that are one unit of work
constexpr int64_t kBlock = 1 << 18;        // elements of the channels that a thread takes together
constexpr int64_t kLanes = 32;             // of the kernels' scratch
constexpr int64_t kCacheBytes = 16 << 20;  // larger calls write around the caches

struct Planes : Layout {
  explicit Planes(const Plan& plan) : Layout(plan) { pieces = divide_up(spatial, kPiece); }

  int64_t units() const { return samples * pieces; }  // of a channel
  int64_t stretch() const { return spatial % pieces ? 1 : spatial / pieces; }
  bool channels_fill_threads() const { return 8 * divide_up(channels, threads) * threads <= 9 * channels; }
  int64_t parts() const { return channels_fill_threads() ? 1 : units(); }
};

// One thread with a few channels, or all threads with all channels.
struct Team {
  const Planes& layout;
  std::optional<Range> block;

  // Calls body(pieces, part) until all units of the channels are done.
  template <class Body>
  void each_part(Body body) const {
    const int64_t units = layout.units();
    if (block) return body({block->begin, block->end, 0, units}, 0);
    over_shares(units * layout.channels, layout.threads, [&](Range range) {
      for (int64_t i = range.begin; i < range.end; ++i) {
        const int64_t channel = i / units, unit = i % units;
        body({channel, channel + 1, unit, unit + 1}, unit);
      }
    });
  }

  // Calls body(range) for all of the channels.
  template <class Body>
  void each_range(int threads, Body body) const {
    block ? body(*block) : over_shares(layout.channels, threads, body);
  }
};

// Calls body(team) until all channels are done.
template <class Body>
void over_teams(const Planes& layout, Body body) {
  if (!layout.channels_fill_threads()) return body(Team{layout, std::nullopt});
  const int64_t size = std::max(kBlock / layout.count(), int64_t{1});
  over_shares(layout.channels, layout.threads, [&](Range range) {
    for (int64_t begin = range.begin; begin < range.end; begin += size)
      body(Team{layout, Range{begin, std::min(begin + size, range.end)}});
  });
}

// Moments to be, and how many elements of a channel each part has.
Partials moments(const Planes& layout, const Sample& places) {
  Partials found(places ? 1 : layout.parts(), layout.channels);
  for (int64_t part = 0; part < found.parts; ++part) {
    const Range piece = share_of(layout.spatial, part % layout.pieces, layout.pieces);
    found.counts[part] = static_cast<double>(layout.channels_fill_threads() ? layout.count() : piece.size());
  }
  if (places) found.counts[0] = places->count;
  return found;
}

void add_moments(const Kernels& kernels, const Tensors& t, const Team& team, const Sample& places, Partials& parts) {
  if (!places) {
    team.each_part(
        [&](Pieces pieces, int64_t part) { kernels.moments_planes(t, team.layout, pieces, parts.at(part)); });
    return;
  }
  team.each_range(threads_for(team.layout, *places), [&](Range range) {
    const int64_t spatial = team.layout.spatial;
    if (!places->runs.empty())
      return kernels.moments_of_runs(t, spatial, range.begin, range.end, places->all_runs(), parts.at(0));
    std::vector<float> scratch(scratch_size(kLanes));
    kernels.moments_sampled_planes(t, spatial, range.begin, range.end, places->all(), parts.at(0), scratch.data());
  });
}

void correct(const Kernels& kernels, const Correction& correction, const Team& team, const Places& places) {
  const Tensors& t = correction.tensors;
  const Channels& channels = correction.channels;
  team.each_range(threads_for(team.layout, places), [&](Range range) {
    const int64_t spatial = team.layout.spatial;
    if (places.runs.empty()) kernels.correct_planes(t, channels, spatial, range.begin, range.end, places.all());
    else kernels.correct_runs(t, channels, spatial, range.begin, range.end, places.all_runs());
  });
}

// One pass that reads x and dy.
void backward_pass(const Kernels& kernels, const Tensors& t, const Team& team, const Channels& channels, Backward mode,
                   Partials& parts) {
  team.each_part([&](Pieces pieces, int64_t part) {
    kernels.backward_planes(t, channels, mode, team.layout, pieces, parts.at(part));
  });
}

}  // namespace

bool planes::begin_at_whole_bytes(const Plan& plan) { return Planes(plan).stretch() % 8 == 0; }

void planes::batch_norm(const Kernels& kernels, const Plan& plan, const Call& call, float* mean, float* var) {
  const Planes layout(plan);
  const Sample places(plan, call.draw);
  const Tensors t = with_streaming(call.tensors, layout, kCacheBytes);
  Partials parts = moments(layout, places);
  ChannelBuffers buffers(layout);
  const Channels channels = buffers.view();
  over_teams(layout, [&](Team team) {
    add_moments(kernels, t, team, places, parts);
    team.each_range(1, [&](Range range) { finish_moments(call, parts, range, mean, var, buffers); });
    team.each_part([&](Pieces pieces, int64_t) { kernels.forward_planes(t, channels, layout, pieces); });
  });
}

void planes::batch_norm_backward(const Kernels& kernels, const Plan& plan, const Call& call, const float* mean,
                                 const float* var, float* sum_g_xhat, float* sum_g) {
  const Planes layout(plan);
  const Sample places(plan, call.draw);
  const Tensors t = with_streaming(call.tensors, layout, kCacheBytes);
  const double count = places ? places->count : static_cast<double>(layout.count());
  Partials parts(layout.parts(), layout.channels);
  ChannelBuffers buffers(layout);
  set_point(call, {0, layout.channels}, mean, var, buffers);
  const Channels channels = buffers.view();
  const Correction correction(without_streaming(t), buffers);
  over_teams(layout, [&](Team team) {
    backward_pass(kernels, t, team, channels, places ? Backward::fused : Backward::reduce, parts);
    team.each_range(1, [&](Range range) {
      finish_sums(call, parts, range, count, var, sum_g_xhat, sum_g, buffers);
    });
    if (places) correct(kernels, correction, team, *places);
    else backward_pass(kernels, t, team, channels, Backward::exact, parts);
  });
}

void planes::normalize(const Kernels& kernels, const Plan& plan, const Call& call, const float* mean,
                       const float* var) {
  const Planes layout(plan);
  const Tensors t = with_streaming(call.tensors, layout, kCacheBytes);
  ChannelBuffers buffers(layout);
  set_point(call, {0, layout.channels}, mean, var, buffers);
  const Channels channels = buffers.view();
  over_shares(layout.units() * layout.channels, layout.threads, [&](Range range) {  // in memory's order
    for (int64_t i = range.begin, end; i < range.end; i = end) {
      const int64_t unit = i / layout.channels, first = unit * layout.channels;
      end = std::min(first + layout.channels, range.end);
      kernels.forward_planes(t, channels, layout, {i - first, end - first, unit, unit + 1});
    }
  });
}

void planes::backward_fused(const Kernels& kernels, const Plan& plan, const Call& call, const float* mean,
                            const float* var, float* sum_g_xhat, float* sum_g) {
  const Planes layout(plan);
  const Tensors t = with_streaming(call.tensors, layout, kCacheBytes);
  const double count = static_cast<double>(layout.count());
  Partials parts(layout.parts(), layout.channels);
  ChannelBuffers buffers(layout);
  set_point(call, {0, layout.channels}, mean, var, buffers);
  const Channels channels = buffers.view();
  over_teams(layout, [&](Team team) {
    backward_pass(kernels, t, team, channels, Backward::fused, parts);
    team.each_range(1, [&](Range range) {
      finish_sums(call, parts, range, count, var, sum_g_xhat, sum_g, buffers);
    });
  });
}

}  // namespace leannorm
