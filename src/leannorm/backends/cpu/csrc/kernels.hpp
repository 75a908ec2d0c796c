// What one thread does to one stretch of memory: the interface between the driver and the kernels of an instruction set.
//
// Legend
//   row         all channels of one position, in channels-last memory; a wide row is `fold` of them
//   plane       the elements of one channel of one sample, in contiguous memory; cut into pieces
//   unit        a wide row, counted in memory's order; or a piece of a channel's planes, counted within the channel
//   position    of a sampled element: a sample and a place in its map, which all channels share
//   z           (x - mean) scale + bias + residual;  y = act(z);  g = dy act'(z)
//   dx          scale g - weight (centre + slope (x - mean)), weight 1 except in `correct`
//   signs       one bit an element, at its offset: whether act' is 1 there; else it is another constant
#pragma once

#include <cstdint>

namespace leannorm {

enum class Dtype : int { float32, bfloat16, float16 };
enum class Kind : int { identity, relu, clamp, leaky_relu, silu, hardswish, gelu, gelu_tanh };

struct Activation {
  Kind kind;
  float first, second;  // clamp: the bounds; leaky_relu: the slope
};

struct Geometry {
  int64_t samples, channels, spatial;
  int64_t fold;    // rows in a wide row
  int64_t pieces;  // of a plane
  int64_t width() const { return channels * fold; }
};

// Per channel; repeated for wide rows and padded to whole vectors.
struct Channels {
  const float *mean, *scale, *bias, *centre, *slope;
};

struct Tensors {
  Dtype dtype;
  Activation activation;
  const void *x = nullptr, *dy = nullptr;
  const void* residual = nullptr;  // may be null
  // Backward's alternative to the residual, for activations that take their output; may be null.
  const void* y = nullptr;
  void* out = nullptr;        // y in forward, dx in backward, which may lie where dy does
  void* dresidual = nullptr;  // may be null
  uint8_t* signs = nullptr;   // forward writes them, backward takes them in place of y; may be null
  bool stream = false;        // the outputs exceed the caches: write around them, but for dx in the place of dy

  bool in_place() const { return out == dy; }
};

enum class Backward : int { reduce, fused, exact };  // sums alone; dx = scale g and the sums; dx alone

// Two sums a channel: of x and of its squared distance from its mean; or of g and of g (x - mean).
// They lie at the channel, for wide rows at the lane.
struct Sums {
  double *first, *second;
};

// Where the first channel of each position lies, in ascending order, and the position's weight.
struct Sampled {
  const int64_t* offsets;
  const float* weights;
  int64_t count;
};

// The same, as numbers of rows.
struct Positions {
  const int64_t* rows;
  const float* weights;
  int64_t count;
};

// Channels [first, first + size) of rows that are `width` wide in y and dy; in x and dx they are rows of their own.
struct Columns {
  int64_t first, size, width;
};

// Positions of weight 1 that lie side by side.
struct Run {
  int64_t offset, length;
};
struct Runs {
  const Run* runs;
  int64_t count;
};

// Floats of scratch for rows of a width.
constexpr int64_t scratch_size(int64_t width) { return 3 * (width + 64); }

// Pieces of planes: some units of some channels.
struct Pieces {
  int64_t first_channel, end_channel, first_unit, end_unit;
};

// A depthwise convolution over channels-last memory.

struct Link {
  int64_t at, tap;
};
struct LinkRange {
  const Link* links;
  int64_t count;
};

// Elements of one dimension, `step` apart, that are linked through the same taps: the first one to these links, each
// further one to what lies `stride` behind. What they are linked to can lie before the beginning or behind the end.
struct LinkRun {
  int64_t first, step, count, stride;
  LinkRange links;
};

// Columns: outputs see inputs, inputs are seen by outputs. Buffers of a row have so many zeros before and behind.
struct ColumnLinks {
  int64_t size, outputs;
  LinkRun seen;
  const LinkRun* seeing;
  int64_t seeing_runs;
  int64_t inputs_before, inputs_behind, outputs_before, outputs_behind;
};

// Rows: the same, without what there is not.
struct RowLinks {
  int64_t size, outputs;
  const LinkRange *seen, *seeing;  // of each output, of each input
  int64_t stride, padding;
  int64_t span_of_seen, span_of_seeing;  // from the first to the last of them, at most
  // The number of first inputs that no output behind this one sees.
  int64_t complete(int64_t output) const {
    const int64_t end = (output + 1) * stride - padding;
    return output + 1 == outputs || end > size ? size : end < 0 ? 0 : end;
  }
};

constexpr int64_t kMostTaps = 128;

// Tables of a number a tap and channel have `padded` channels, whole vectors of any instruction set.
struct Depthwise {
  RowLinks rows;
  ColumnLinks columns;
  int64_t channels, padded, taps, kernel_columns;
  // Floats of rows of all channels in buffers.
  int64_t input_row() const { return (columns.inputs_before + columns.size + columns.inputs_behind) * padded; }
  int64_t output_row() const { return (columns.outputs_before + columns.outputs + columns.outputs_behind) * padded; }
};

// Sampled outputs: their positions, ascending, their rows in the sample, their weights.
struct SampledRows {
  const int64_t *positions, *rows;
  const float* weights;
  int64_t count;
  const void* sample;  // the convolution there
};

// A convolution with kernels of one element, of float32 in channels-last memory, as a product of matrices: each row of
// `inputs` numbers gives one of `outputs`.
struct Pointwise {
  int64_t inputs, outputs;
  const int64_t* places;  // the row of the input for each row of the output; null where it is the same
};

// Which row of the input gives which row of the output; null where they are counted alike.
struct RowPairs {
  const int64_t *inputs, *outputs;
  bool dense;  // next to each other in both tensors, but for a few
  int64_t input(int64_t i) const { return inputs ? inputs[i] : i; }
  int64_t output(int64_t i) const { return outputs ? outputs[i] : i; }
};

// Rows lie in buffers by blocks, which stay in the caches, and apart by whole vectors and one line more: rows that are
// a page apart would be in each other's way there. The filters' gradient lies in panels, filter after filter.
constexpr int64_t kForwardBlock = 1 << 14, kBackwardBlock = 1 << 17;  // floats

inline int64_t pointwise_rows(int64_t width, int64_t block) {
  const int64_t rows = block / width & ~int64_t{7};
  return rows < 8 ? 8 : rows > 128 ? 128 : rows;
}
inline int64_t pointwise_vectors(int64_t width) { return (width + 15) & ~int64_t{15}; }
inline int64_t pointwise_step(int64_t width) { return pointwise_vectors(width) + 16; }
inline int64_t pointwise_padded(int64_t outputs) { return (outputs + 7) & ~int64_t{7}; }
inline int64_t pointwise_part(const Pointwise& p) { return pointwise_vectors(p.inputs) * pointwise_padded(p.outputs); }
inline int64_t pointwise_packed(const Pointwise& p) {
  const int64_t forward = pointwise_vectors(p.outputs) * p.inputs, backward = pointwise_vectors(p.inputs) * p.outputs;
  return forward > backward ? forward : backward;
}
inline int64_t pointwise_scratch(const Pointwise& p) {
  const int64_t forward = pointwise_rows(p.inputs, kForwardBlock) * pointwise_step(p.inputs);
  const int64_t rows = pointwise_rows(p.inputs + p.outputs, kBackwardBlock), step = pointwise_step(p.outputs);
  const int64_t backward = rows * (step + pointwise_vectors(p.inputs)) + step;
  return forward > backward ? forward : backward;
}

// begin and end are channels. Moments are zero before, sums of backward are added to.
struct Kernels {
  void (*moments_rows)(const Tensors&, int64_t offset, int64_t rows, int64_t width, Sums, float* scratch);
  void (*moments_sampled_rows)(const Tensors&, int64_t width, Sampled, Sums, float* scratch);
  void (*moments_planes)(const Tensors&, const Geometry&, Pieces, Sums);
  void (*moments_sampled_planes)(const Tensors&, int64_t spatial, int64_t begin, int64_t end, Sampled, Sums,
                                 float* scratch);
  void (*moments_of_runs)(const Tensors&, int64_t spatial, int64_t begin, int64_t end, Runs, Sums);
  void (*forward_rows)(const Tensors&, const Channels&, int64_t offset, int64_t rows, int64_t width);
  void (*forward_planes)(const Tensors&, const Channels&, const Geometry&, Pieces);
  void (*backward_rows)(const Tensors&, const Channels&, Backward, int64_t offset, int64_t rows, int64_t width, Sums,
                        float* scratch);
  void (*backward_planes)(const Tensors&, const Channels&, Backward, const Geometry&, Pieces, Sums);
  void (*correct_rows)(const Tensors&, const Channels&, int64_t width, Sampled);
  void (*correct_planes)(const Tensors&, const Channels&, int64_t spatial, int64_t begin, int64_t end, Sampled);
  void (*correct_runs)(const Tensors&, const Channels&, int64_t spatial, int64_t begin, int64_t end, Runs);
  // Of a part of a concatenation, for some rows, at most 128 of them; the channels and sums are those of all parts. Without
  // an output backward gives the sums alone. Where dx takes the place of dy, which is then of the part, correct
  // reads that.
  void (*forward_columns)(const Tensors&, const Channels&, const Columns&, int64_t first, int64_t rows);
  void (*backward_columns)(const Tensors&, const Channels&, const Columns&, int64_t first, int64_t rows, Sums,
                           float* scratch);
  void (*correct_columns)(const Tensors&, const Channels&, const Columns&, Positions);
  // Of depthwise convolutions. first and last are rows of outputs, counted over all samples; scratch holds the rows
  // that they are linked to, a row of results and tables, as depthwise.cpp counts them.
  void (*depthwise_at)(const Tensors&, const Depthwise&, const float* filters, const int64_t* positions, int64_t count,
                       int64_t begin, int64_t end);
  void (*depthwise_forward)(const Tensors&, const Depthwise&, const float* filters, const float* shift, int64_t first,
                            int64_t last, float* scratch);
  void (*depthwise_sums)(const Tensors&, const Depthwise&, const SampledRows&, const Channels&, int64_t first,
                         int64_t last, double* totals, float* scratch);
  void (*depthwise_backward)(const Tensors&, const Depthwise&, const float* filters, const SampledRows&,
                             const Channels&, int64_t first, int64_t last, float* scratch);
  // Of pointwise convolutions. first and last are rows, or sampled ones, or outputs; centre is taken off
  // the inputs; scratch is of pointwise_scratch.
  void (*pointwise_pack)(const Pointwise&, const float* weight, const float* factors, bool forward, int thread,
                         int threads, float* packed);
  void (*pointwise_forward)(const Tensors&, const Pointwise&, const float* filters, const Channels&, const RowPairs&,
                            int64_t first, int64_t last, float* scratch);
  void (*pointwise_sampled)(const Tensors&, const Pointwise&, const Channels&, const SampledRows&, int64_t first,
                            int64_t last);
  void (*pointwise_backward)(const Tensors&, const Pointwise&, const float* filters, const float* centre,
                             int64_t first, int64_t last, double* sum_g, float* dweight, float* scratch);
  void (*pointwise_correct)(const Tensors&, const Pointwise&, const float* filters, const float* centre,
                            const Channels&, const SampledRows&, int64_t first, int64_t last, float* dweight,
                            float* scratch);
  void (*pointwise_products)(const Pointwise&, const float* weight, const float* parts, int64_t count, int64_t first,
                             int64_t last, double* products);
  void (*pointwise_filters)(const Pointwise&, const float* parts, int64_t count, const float* factors, int64_t first,
                            int64_t last, float* dweight);
};

namespace avx512_bf16 {
extern const Kernels kernels;
}
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
