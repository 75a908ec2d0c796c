// The concatenation along channels of tensors in channels-last memory, which is never written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "layout.hpp"

namespace leannorm {

struct Part {
  const char* x;
  char* dx;  // null where no gradient is wanted
  int64_t channels;
};
using Parts = std::vector<Part>;

// Some rows of the concatenation: in the caches next to each other, put together in a block; in the parts at row(i).
template <class Row>
class PartRows {
 public:
  PartRows(const Parts& parts, int64_t element, int64_t count, Row row)
      : parts_(parts), element_(element), count_(count), row_(row) {
    for (const Part& part : parts) width_ += part.channels * element;
  }

  void read(char* block) const {
    each([&](const Part& part, int64_t row, int64_t at, int64_t bytes) {
      copy(block + at, part.x + row * bytes, bytes);
    });
  }
  void write(const char* block) const {
    each([&](const Part& part, int64_t row, int64_t at, int64_t bytes) {
      if (part.dx) copy(part.dx + row * bytes, block + at, bytes);
    });
  }
  // Adds to gradients that have been written, of float32.
  void add(const char* block) const {
    each([&](const Part& part, int64_t row, int64_t at, int64_t bytes) {
      if (!part.dx) return;
      auto* const to = reinterpret_cast<float*>(part.dx + row * bytes);
      const auto* const from = reinterpret_cast<const float*>(block + at);
      for (int64_t c = 0; c < part.channels; ++c) to[c] += from[c];
    });
  }

 private:
  static void copy(char* to, const char* from, int64_t bytes) {
    // by a size that the compiler knows, since rows of a part are short
    for (; bytes >= kLine; bytes -= kLine, to += kLine, from += kLine) std::memcpy(to, from, kLine);
    std::memcpy(to, from, bytes);
  }

  // Part by part, as they lie in memory.
  template <class Body>
  void each(Body body) const {
    int64_t begin = 0;
    for (const Part& part : parts_) {
      const int64_t bytes = part.channels * element_;
      for (int64_t i = 0; i < count_; ++i) body(part, row_(i), i * width_ + begin, bytes);
      begin += bytes;
    }
  }

  const Parts& parts_;
  int64_t element_, count_;
  Row row_;
  int64_t width_ = 0;  // bytes
};

// Calls body(first, count) for some rows, at most so many at a time.
template <class Body>
void each_block(Range rows, int64_t most, Body body) {
  for (int64_t first = rows.begin; first < rows.end; first += most) body(first, std::min(most, rows.end - first));
}

// Moments of the sampled rows.
Partials moments_of_parts(const Kernels&, const Tensors&, const Parts&, const Layout&, const Places&);

}  // namespace leannorm
