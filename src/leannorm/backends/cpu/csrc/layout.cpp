#include "layout.hpp"

#include <cmath>
#include <numeric>

namespace leannorm {
namespace {

float inverse_deviation(float var, double eps) { return static_cast<float>(1 / std::sqrt(var + eps)); }

}  // namespace

int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

int threads_for(int64_t elements) { return elements < kSerial || omp_in_parallel() ? 1 : omp_get_max_threads(); }

Layout::Layout(const Plan& plan)
    : Geometry{plan.sizes[0], plan.channels, plan.spatial(), 1, 1},
      threads(threads_for(elements())) {}

ChannelBuffers::ChannelBuffers(const Geometry& g)
    : channels(g.channels), width(g.width()), padded(width + 64), values(5 * padded) {
  float* p = values.data();
  for (float** buffer : {&mean, &scale, &bias, &centre, &slope}) *buffer = p, p += padded;
}

Channels ChannelBuffers::repeated() {
  for (float* v : {mean, scale, bias, centre, slope})
    for (int64_t i = channels; i < width; ++i) v[i] = v[i - channels];
  return view();
}

Correction::Correction(const Tensors& t, const ChannelBuffers& buffers) : tensors(t), channels(buffers.view()) {
  tensors.dresidual = nullptr;
  if (t.dtype != Dtype::float32) return;
  tensors.dy = t.out;
  tensors.activation.kind = Kind::identity;
  tensors.residual = tensors.y = tensors.signs = nullptr;
  one_.assign(buffers.padded, 1.0f);
  channels.scale = one_.data();
}

Sample::Sample(const Plan& plan, const int64_t* draw) {
  if (plan.boxes.empty()) return;
  if (!plan.fixed) drawn_.emplace(plan.places(draw));
  places_ = plan.fixed ? &*plan.fixed : &*drawn_;
}

int threads_for(const Layout& layout, const Places& places) {
  return places.size() * layout.channels < kSerial ? 1 : layout.threads;
}

bool has_whole_lines(const Tensors& t, int64_t width) {
  return width * size_of(t.dtype) % kLine == 0 && starts_a_line(t.out) && starts_a_line(t.dresidual);
}

Tensors with_streaming(Tensors t, const Layout& layout, int64_t limit, int64_t width) {
  const void* all[] = {t.x, t.dy, t.residual, t.y, t.out, t.dresidual};
  const int64_t streams = std::count_if(std::begin(all), std::end(all), [](const void* p) { return p != nullptr; });
  t.stream = streams * layout.elements() * size_of(t.dtype) > limit && has_whole_lines(t, width);
  return t;
}

Tensors without_streaming(Tensors t) {
  t.stream = false;
  return t;
}

void set_point(const Call& call, Range range, const float* mean, const float* var, ChannelBuffers& buffers) {
  for (int64_t c = range.begin; c < range.end; ++c) {
    buffers.mean[c] = mean[c];
    buffers.scale[c] = inverse_deviation(var[c], call.eps) * (call.weight ? call.weight[c] : 1.0f);
    buffers.bias[c] = call.bias ? call.bias[c] : 0.0f;
  }
}

void finish_moments(const Call& call, const Partials& parts, Range range, float* mean, float* var,
                    ChannelBuffers& buffers) {
  const double count = std::accumulate(parts.counts.begin(), parts.counts.end(), 0.0);
  const auto sum_of = [&](int64_t part, int64_t c) { return parts.first[part * parts.channels + c]; };
  const auto square_of = [&](int64_t part, int64_t c) { return parts.second[part * parts.channels + c]; };
  std::vector<double> means(range.size()), squares(range.size());
  for (int64_t part = 0; part < parts.parts; ++part)
    for (int64_t i = 0; i < range.size(); ++i) means[i] += sum_of(part, range.begin + i);
  for (double& mean : means) mean /= count;
  for (int64_t part = 0; part < parts.parts; ++part) {
    const double weight = parts.counts[part];
    if (weight == 0) continue;
    for (int64_t i = 0; i < range.size(); ++i) {
      const double distance = sum_of(part, range.begin + i) / weight - means[i];
      squares[i] += square_of(part, range.begin + i) + weight * distance * distance;
    }
  }
  for (int64_t i = 0; i < range.size(); ++i) {
    mean[range.begin + i] = static_cast<float>(means[i]);
    var[range.begin + i] = static_cast<float>(squares[i] / count);
  }
  set_point(call, range, mean, var, buffers);
}

void finish_sums(const Call& call, const Partials& parts, Range range, double count, const float* var,
                 float* sum_g_xhat, float* sum_g, ChannelBuffers& buffers) {
  std::vector<double> g(range.size()), g_centred(range.size());
  for (int64_t part = 0; part < parts.parts; ++part) {
    const int64_t first = part * parts.channels + range.begin;
    for (int64_t i = 0; i < range.size(); ++i) g[i] += parts.first[first + i];
    for (int64_t i = 0; i < range.size(); ++i) g_centred[i] += parts.second[first + i];
  }
  for (int64_t i = 0; i < range.size(); ++i) {
    const int64_t c = range.begin + i;
    const float rstd = inverse_deviation(var[c], call.eps);
    const double scale = buffers.scale[c] / count;
    sum_g[c] = static_cast<float>(g[i]);
    sum_g_xhat[c] = static_cast<float>(g_centred[i] * rstd);
    buffers.centre[c] = static_cast<float>(scale * g[i]);
    buffers.slope[c] = static_cast<float>(scale * rstd * rstd * g_centred[i]);
  }
}

}  // namespace leannorm
