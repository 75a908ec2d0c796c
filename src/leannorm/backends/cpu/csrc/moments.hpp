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

// Rows at row(r), with weight(r), in blocks [first, last) that prepare makes ready; later(r) will be wanted later.
template <class T, class Prepare, class Row, class Later, class Weight>
void moments_of_rows(int64_t rows, int64_t width, Prepare prepare, Row row, Later later, Weight weight, Sums totals,
                     float* scratch) {
  const int64_t part = scratch_size(width) / 3;
  float *centre = scratch, *sum = scratch + part, *square = scratch + 2 * part;
  const int64_t block = width > 1024 ? kBlockRows / 4 : kBlockRows;
  const auto lane = [](const float* p, int64_t i) { return load<Float32>(p + i, All{}); };
  double count = 0;
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t last = rows < first + block ? rows : first + block;
    prepare(first, last);
    double block_count = 0;  // rounded, it would be another share of all than its sums are
    for (int64_t r = first; r < last; ++r) block_count += weight(r);
    const auto share = static_cast<float>(1 / block_count);
    clear(scratch, 3 * part);
    each_rows(first, last, [&](int64_t r, auto rows) {
      each_vector(width, [&](int64_t i, auto lanes) {
        Vec added{};
#pragma GCC unroll kRows
        for (int k = 0; k < rows.value; ++k) {
          prefetch(later(r + k) + i);
          added = multiply_add(broadcast(weight(r + k) * share), load<T>(row(r + k) + i, lanes), added);
        }
        store<Float32>(centre + i, lane(centre, i) + added, All{});
      });
    });
    each_rows(first, last, [&](int64_t r, auto rows) {
      each_vector(width, [&](int64_t i, auto lanes) {
        const Vec middle = lane(centre, i);
        Vec added = lane(sum, i), squares = lane(square, i);
#pragma GCC unroll kRows
        for (int k = 0; k < rows.value; ++k) {
          const Vec centred = load<T>(row(r + k) + i, lanes) - middle, weighted = weight(r + k) * centred;
          added += weighted;
          squares = multiply_add(weighted, centred, squares);
        }
        store<Float32>(sum + i, added, All{});
        store<Float32>(square + i, squares, All{});
      });
    });
    const Merge merge(count, block_count);
    for (int64_t i = 0; i < width; ++i) merge(totals.first[i], totals.second[i], centre[i], sum[i], square[i]);
    count += block_count;
  }
}

void moments_rows(const Tensors& t, int64_t offset, int64_t rows, int64_t width, Sums totals, float* scratch) {
  with_dtype(t.dtype, [&]<class T>(T) {
    const auto row = [&](int64_t r) { return at<T>(t.x, offset + r * width); };
    const auto later = [&](int64_t r) { return row(r) + elements_ahead<T>(width, kRows); };
    moments_of_rows<T>(rows, width, [](int64_t, int64_t) {}, row, later, [](int64_t) { return 1.0f; }, totals, scratch);
  });
}

void moments_sampled_rows(const Tensors& t, int64_t width, Sampled sampled, Sums totals, float* scratch) {
  with_dtype(t.dtype, [&]<class T>(T) {
    const auto row = [&](int64_t r) { return at<T>(t.x, sampled.offsets[r]); };
    const int64_t ahead = elements_ahead<T>(width, kRows) / width;
    const auto later = [&](int64_t r) { return row(r + ahead < sampled.count ? r + ahead : sampled.count - 1); };
    const auto weight = [&](int64_t r) { return sampled.weights[r]; };
    moments_of_rows<T>(sampled.count, width, [](int64_t, int64_t) {}, row, later, weight, totals, scratch);
  });
}

void moments_sampled_planes(const Tensors& t, int64_t spatial, int64_t begin, int64_t end, Sampled sampled,
                            Sums totals, float* scratch) {
  with_dtype(t.dtype, [&]<class T>(T) {
    const auto weight = [&](int64_t r) { return sampled.weights[r]; };
    typename T::Scalar rows[kBlockRows * kColumns];
    each_columns(begin, end, [&](int64_t channel, int64_t width) {
      int64_t start = 0;
      const auto prepare = [&](int64_t first, int64_t last) {
        start = first;
        gather(at<T>(t.x, channel * spatial), sampled.offsets + first, last - first, spatial, width, rows);
      };
      const auto row = [&](int64_t r) { return rows + (r - start) * width; };
      const Sums sums{totals.first + channel, totals.second + channel};
      moments_of_rows<T>(sampled.count, width, prepare, row, row, weight, sums, scratch);
    });
  });
}

// Blocks of at most kBlock elements value(i, lanes), one after another.
class MomentsOfElements {
 public:
  MomentsOfElements(double& sum, double& square) : sum_(sum), square_(square) {}

  template <class Value>
  void add(int64_t n, Value value) {
    SlotSums sums, centred_sums, squares;
    each_vector_in_slots(n, [&](int64_t i, auto lanes, int slot) { sums.parts[slot] += value(i, lanes); });
    const float centre = sum_of(sums.total()) / static_cast<float>(n);
    each_vector_in_slots(n, [&](int64_t i, auto lanes, int slot) {
      const Vec centred = keep_first(value(i, lanes) - centre, lanes);
      centred_sums.parts[slot] += centred;
      squares.parts[slot] = multiply_add(centred, centred, squares.parts[slot]);
    });
    const Merge merge(count_, static_cast<double>(n));
    merge(sum_, square_, centre, sum_of(centred_sums.total()), sum_of(squares.total()));
    count_ += static_cast<double>(n);
  }

 private:
  double& sum_;
  double& square_;
  double count_ = 0;
};

// Stretches of a channel, stretch(i): short ones side by side, so that a block is full. The next channel's, `spatial`
// elements further, are asked for.
template <class T, class Stretch>
void moments_of_stretches(const typename T::Scalar* x, int64_t count, int64_t spatial, Stretch stretch, double& sum,
                          double& square) {
  constexpr int64_t kShort = kBlock / 4;
  MomentsOfElements moments(sum, square);
  typename T::Scalar block[kBlock];
  int64_t filled = 0;
  const auto add = [&](const typename T::Scalar* p, int64_t n) {
    moments.add(n, [p](int64_t i, auto lanes) { return load<T>(p + i, lanes); });
  };
  for (int64_t s = 0; s < count; ++s) {
    const auto [offset, length] = stretch(s);
    if (length > kShort) {
      for (int64_t first = 0; first < length; first += kBlock)
        add(x + offset + first, length - first < kBlock ? length - first : kBlock);
      continue;
    }
    if (filled + length > kBlock) add(block, filled), filled = 0;
    prefetch(x + offset + spatial);
    prefetch(x + offset + spatial + length - 1);
    std::memcpy(block + filled, x + offset, length * sizeof *block);
    filled += length;
  }
  if (filled) add(block, filled);
}

void moments_planes(const Tensors& t, const Geometry& geometry, Pieces pieces, Sums totals) {
  with_dtype(t.dtype, [&]<class T>(T) {
    const int64_t count = pieces.end_unit - pieces.first_unit;
    for (int64_t channel = pieces.first_channel; channel < pieces.end_channel; ++channel) {
      const auto piece = [&](int64_t i) { return piece_of(geometry, channel, pieces.first_unit + i); };
      moments_of_stretches<T>(at<T>(t.x), count, geometry.spatial, piece, totals.first[channel],
                              totals.second[channel]);
    }
  });
}

void moments_of_runs(const Tensors& t, int64_t spatial, int64_t begin, int64_t end, Runs sampled, Sums totals) {
  with_dtype(t.dtype, [&]<class T>(T) {
    const auto run = [&](int64_t i) { return sampled.runs[i]; };
    for (int64_t channel = begin; channel < end; ++channel)
      moments_of_stretches<T>(at<T>(t.x, channel * spatial), sampled.count, spatial, run, totals.first[channel],
                              totals.second[channel]);
  });
}

}  // namespace
}  // namespace leannorm::LEANNORM_ISA
