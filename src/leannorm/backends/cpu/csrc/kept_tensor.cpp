#include "kept_tensor.hpp"

#include <nanobind/ndarray.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "pool.hpp"

namespace nb = nanobind;

namespace leannorm {
namespace {

constexpr char kName[] = "dltensor";  // until somebody takes the tensor

// DLManagedTensor of DLPack's C interface.
struct Managed {
  nb::dlpack::dltensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

struct Kept {
  std::vector<int64_t> shape, strides;
  Block block;
  Managed managed;
};

nb::dlpack::dtype type_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 32, 1};
    case Dtype::bfloat16: return {static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
    default: return {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
  }
}

}  // namespace

nb::object kept_tensor(Dtype dtype, std::vector<int64_t> shape, std::vector<int64_t> strides) {
  std::size_t bytes = type_of(dtype).bits / 8;
  for (const int64_t size : shape) bytes *= static_cast<std::size_t>(size);
  auto kept = std::make_unique<Kept>(Kept{std::move(shape), std::move(strides), pool().take(bytes), {}});
  kept->managed.tensor = {kept->block.start,
                          {nb::device::cpu::value, 0},
                          static_cast<int32_t>(kept->shape.size()),
                          type_of(dtype),
                          kept->shape.data(),
                          kept->strides.data(),
                          0};
  kept->managed.context = kept.get();
  kept->managed.deleter = [](Managed* managed) {
    const std::unique_ptr<Kept> owned(static_cast<Kept*>(managed->context));
    pool().give_back(owned->block);
  };
  PyObject* const capsule = PyCapsule_New(&kept.get()->managed, kName, [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, kName)) return;
    auto* const managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, kName));
    managed->deleter(managed);
  });
  if (!capsule) {
    pool().give_back(kept->block);
    throw nb::python_error();
  }
  kept.release();
  return nb::steal(capsule);
}

}  // namespace leannorm
