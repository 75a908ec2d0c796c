// Results that are written around the caches although they do not begin at cache lines: they lie side by side in a
// buffer until it is full.
#pragma once

#include <cstring>

#include "blocks.hpp"
#include "simd.hpp"

namespace leannorm::LEANNORM_ISA {
namespace {

template <class T>
class Stage {
  using Scalar = typename T::Scalar;

 public:
  static constexpr int64_t kMost = 1024;                 // elements that can be taken at once
  static constexpr int64_t kLine = 64 / sizeof(Scalar);  // of the caches

  explicit Stage(void* tensor) : tensor_(at<T>(tensor)) {}
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

  ~Stage() { finish(); }

  // The tensor as those see it who write its elements [k, k + n) next.
  Scalar* take(int64_t k, int64_t n) {
    if (!tensor_) return nullptr;
    if (k != end_) {
      finish();
      begin_ = k;
      line_ = k / kLine * kLine;
    } else if (k + n - line_ > kSize) {
      write_lines();
      const int64_t whole = end_ / kLine * kLine;
      std::memcpy(buffer_, buffer_ + (whole - line_), (end_ - whole) * sizeof(Scalar));
      line_ = whole;
    }
    end_ = k + n;
    return buffer_ - line_;
  }

 private:
  static constexpr int64_t kSize = 2 * kMost + kLine;

  void finish() {
    write_lines();
    if (begin_ < end_) copy(begin_, end_);
  }

  // Writes [begin_, the last line's beginning).
  void write_lines() {
    const int64_t last = end_ / kLine * kLine;
    if (begin_ >= last) return;
    if (begin_ % kLine) copy(begin_, (begin_ / kLine + 1) * kLine);
    constexpr int64_t kStep = sizeof(Vec) / sizeof(Scalar);
    for (int64_t k = (begin_ + kLine - 1) / kLine * kLine; k < last; k += kStep)
      stream<Float32>(reinterpret_cast<float*>(tensor_ + k),
                      load<Float32>(reinterpret_cast<const float*>(buffer_ + (k - line_)), All{}));
    begin_ = last;
  }

  void copy(int64_t begin, int64_t end) {
    std::memcpy(tensor_ + begin, buffer_ + (begin - line_), (end - begin) * sizeof(Scalar));
  }

  Scalar* tensor_;
  int64_t begin_ = 0, end_ = 0;  // in the buffer and not yet in the tensor
  int64_t line_ = 0;             // where the buffer begins
  alignas(64) Scalar buffer_[kSize];
};

}  // namespace
}  // namespace leannorm::LEANNORM_ISA
