// Tensors in the pool's memory, handed to Python by DLPack.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace leannorm {

// A DLPack capsule of a tensor that is not written yet; its memory goes back to the pool when the last view of it dies.
nanobind::object kept_tensor(Dtype, std::vector<int64_t> shape, std::vector<int64_t> strides);

}  // namespace leannorm
