// Moments: a block that stays in the cache is read twice, the second time centred, then merged (Chan et al.). The centre
// is the block's mean but for rounding, which the sum of the centred values corrects.
#pragma once

#include "blocks.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace leannorm::LEANNORM_ISA {
namespace {

class Merge {
 public:
  Merge(double count, double block)
      : inverse_count_(count > 0 ? 1 / count : 0),
        inverse_block_(1 / block),
        block_(block),
        between_(count * block / (count + block)) {}

  void operator()(double& sum, double& square, double centre, double centred, double centred_square) const {
    const double block_sum = centre * block_ + centred;
    const double distance = block_sum * inverse_block_ - sum * inverse_count_;
    square += centred_square - centred * centred * inverse_block_ + distance * distance * between_;
    sum += block_sum;
  }

 private:
  double inverse_count_, inverse_block_, block_, between_;
};

// Rows at row(r), with weight(r).
template <class T, class Row, class Weight>
void moments_of_rows(int64_t rows, int64_t width, Row row, Weight weight, Sums totals, float* scratch) {
  const int64_t part = scratch_size(width) / 3;
  float *centre = scratch, *sum = scratch + part, *square = scratch + 2 * part;
  const int64_t block = width > 1024 ? kBlockRows / 4 : kBlockRows;
  const auto lane = [](const float* p, int64_t i) { return load<Float32>(p + i, All{}); };
  double count = 0;
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t last = rows < first + block ? rows : first + block;
    float block_count = 0;
    for (int64_t r = first; r < last; ++r) block_count += weight(r);
    const float share = 1.0f / block_count;
    clear(scratch, 3 * part);
    int64_t r = first;
    for (; r + 2 <= last; r += 2) {
      const auto *a = row(r), *b = row(r + 1);
      const float weight_a = weight(r) * share, weight_b = weight(r + 1) * share;
      each_vector(width, [&](int64_t i, auto lanes) {
        const Vec added = weight_a * load<T>(a + i, lanes) + weight_b * load<T>(b + i, lanes);
        store<Float32>(centre + i, lane(centre, i) + added, All{});
      });
    }
    for (; r < last; ++r) {
      const auto* a = row(r);
      const float weight_a = weight(r) * share;
      each_vector(width, [&](int64_t i, auto lanes) {
        store<Float32>(centre + i, lane(centre, i) + weight_a * load<T>(a + i, lanes), All{});
      });
    }
    for (r = first; r < last; ++r) {
      const auto* a = row(r);
      const float weight_a = weight(r);
      each_vector(width, [&](int64_t i, auto lanes) {
        const Vec centred = load<T>(a + i, lanes) - lane(centre, i), weighted = weight_a * centred;
        store<Float32>(sum + i, lane(sum, i) + weighted, All{});
        store<Float32>(square + i, lane(square, i) + weighted * centred, All{});
      });
    }
    const Merge merge(count, block_count);
    for (int64_t i = 0; i < width; ++i) merge(totals.first[i], totals.second[i], centre[i], sum[i], square[i]);
    count += block_count;
  }
}

void moments_rows(const Tensors& t, int64_t offset, int64_t rows, int64_t width, Sums totals, float* scratch) {
  with_dtype(t.dtype, [&]<class T>(T) {
    const auto row = [&](int64_t r) { return at<T>(t.x, offset + r * width); };
    moments_of_rows<T>(rows, width, row, [](int64_t) { return 1.0f; }, totals, scratch);
  });
}

void moments_sampled_rows(const Tensors& t, int64_t width, Sampled sampled, Sums totals, float* scratch) {
  with_dtype(t.dtype, [&]<class T>(T) {
    const auto row = [&](int64_t r) { return at<T>(t.x, sampled.positions[r] * width); };
    const auto weight = [&](int64_t r) { return sampled.weights[r]; };
    moments_of_rows<T>(sampled.count, width, row, weight, totals, scratch);
  });
}

// Elements value(i, lanes), with weight(i, lanes), which is 0 in lanes that are not there.
template <class Value, class Weight>
void moments_of_elements(int64_t length, Value value, Weight weight, double& sum, double& square) {
  double count = 0;
  for (int64_t first = 0; first < length; first += kBlock) {
    const int64_t n = length - first < kBlock ? length - first : kBlock;
    Vec counts{}, sums{}, centred_sums{}, squares{};
    each_vector(n, [&](int64_t i, auto lanes) {
      const Vec w = weight(first + i, lanes);
      counts += w;
      sums += w * value(first + i, lanes);
    });
    const double block_count = sum_of(counts);
    const float centre = static_cast<float>(sum_of(sums) / block_count);
    each_vector(n, [&](int64_t i, auto lanes) {
      const Vec centred = value(first + i, lanes) - centre, weighted = weight(first + i, lanes) * centred;
      centred_sums += weighted;
      squares += weighted * centred;
    });
    Merge(count, block_count)(sum, square, centre, sum_of(centred_sums), sum_of(squares));
    count += block_count;
  }
}

void moments_planes(const Tensors& t, const Geometry& geometry, int64_t begin, int64_t end, Sums totals) {
  with_dtype(t.dtype, [&]<class T>(T) {
    each_piece(geometry, begin, end, [&](Piece piece) {
      const auto* x = at<T>(t.x, piece.offset);
      const auto value = [&](int64_t i, auto lanes) { return load<T>(x + i, lanes); };
      const auto weight = [&](int64_t, auto lanes) { return keep_first(broadcast(1.0f), lanes); };
      moments_of_elements(piece.length, value, weight, totals.first[piece.sums], totals.second[piece.sums]);
    });
  });
}

void moments_sampled_planes(const Tensors& t, int64_t spatial, int64_t plane, int64_t begin, int64_t end,
                            Sampled sampled, Sums totals) {
  with_dtype(t.dtype, [&]<class T>(T) {
    for (int64_t channel = begin; channel < end; ++channel, plane += spatial) {
      const auto* x = at<T>(t.x, plane);
      const auto value = [&](int64_t i, auto lanes) { return gather<T>(x, sampled.positions + i, lanes); };
      const auto weight = [&](int64_t i, auto lanes) { return load<Float32>(sampled.weights + i, lanes); };
      moments_of_elements(sampled.count, value, weight, totals.first[channel], totals.second[channel]);
    }
  });
}

}  // namespace
}  // namespace leannorm::LEANNORM_ISA
