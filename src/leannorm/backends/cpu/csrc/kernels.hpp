// What one thread does to one stretch of memory: the interface between the driver and the kernels of an instruction set.
//
// Legend
//   width       lanes of a row in channels-last memory: the channels, several rows of them when they are few
//   plane       the elements of one channel of one sample in contiguous memory
//   offset      of the first element, in elements
//   position    of a sampled element: its row in channels-last memory, its index in a plane in contiguous memory
//   z           (x - mean) scale + bias + residual;  y = act(z);  g = dy act'(z)
//   dx          scale g - weight (centre + slope (x - mean)), weight 1 except in `correct`
//   sums        of g and of g (x - mean)
#pragma once

#include <cstdint>

namespace leannorm {

enum class Dtype : int { float32, bfloat16, float16 };
enum class Kind : int { clamp, leaky_relu, silu, hardswish, gelu, gelu_tanh };

struct Activation {
  Kind kind;
  float first, second;  // clamp: the bounds, NaN for none; leaky_relu: the slope
};

// Per channel, for lanes padded to whole vectors.
struct Channels {
  const float *mean, *scale, *bias, *centre, *slope;
};

struct Tensors {
  Dtype dtype;
  Activation activation;
  const void *x, *residual, *y;  // residual and y may be null
  const void* dy;
  void* out;        // y in forward, dx in backward
  void* dresidual;  // may be null
  bool stream;      // out lies past the caches: write around them
};

enum class Backward : int { reduce, fused, exact };  // sums alone; dx = scale g and the sums; dx alone

// Sums of the elements and of their squared distances from their own mean, for each lane of a row or for a plane.
struct Moments {
  double *sum, *square;
};

struct Sums {
  double *g, *g_centred;
};

// Scratch that a call needs for a width, in floats.
constexpr int64_t scratch_size(int64_t width) { return 3 * (width + 64); }

struct Kernels {
  // The moments are zero before. Positions and weights may be null: adjacent elements, weight 1.
  void (*moments_rows)(Dtype, const void* x, int64_t offset, int64_t rows, int64_t width, const int64_t* positions,
                       const float* weights, Moments, float* scratch);
  void (*moments_plane)(Dtype, const void* x, int64_t offset, int64_t length, const int64_t* positions,
                        const float* weights, Moments);
  // Sums are added to.
  void (*forward_rows)(const Tensors&, const Channels&, int64_t offset, int64_t rows, int64_t width);
  void (*forward_plane)(const Tensors&, const Channels&, int64_t offset, int64_t length, int64_t channel);
  void (*backward_rows)(const Tensors&, const Channels&, Backward, int64_t offset, int64_t rows, int64_t width, Sums,
                        float* scratch);
  void (*backward_plane)(const Tensors&, const Channels&, Backward, int64_t offset, int64_t length, int64_t channel,
                         Sums);
  void (*correct_rows)(const Tensors&, const Channels&, int64_t width, const int64_t* positions, const float* weights,
                       int64_t count);
  void (*correct_plane)(const Tensors&, const Channels&, int64_t offset, int64_t channel, const int64_t* positions,
                        const float* weights, int64_t count);
};

namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace portable {
extern const Kernels kernels;
}

}  // namespace leannorm
