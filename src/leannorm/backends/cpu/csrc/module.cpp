// The extension module: tensors come as addresses, with all that their owner has checked (see the package's __init__.py).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "driver.hpp"
#include "kernels.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace leannorm {
namespace {

using InstructionSet = std::pair<std::string, const Kernels*>;

// Those of this machine, best first.
std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    found.emplace_back("avx512", &avx512::kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    found.emplace_back("avx2", &avx2::kernels);
#endif
  found.emplace_back("portable", &portable::kernels);
  return found;
}

InstructionSet chosen = instruction_sets().front();

void choose(const std::string& name) {
  for (const auto& set : instruction_sets())
    if (set.first == name) {
      chosen = set;
      return;
    }
  throw std::invalid_argument("this machine has no instruction set " + name);
}

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void forward(int dtype, bool channels_last, int64_t channels, std::vector<int64_t> sizes, Address x, Address residual,
             Address y, Address weight, Address bias, Address mean, Address var, Address draw,
             std::vector<int64_t> boxes, std::vector<double> shares, double eps, int kind, float first, float second) {
  const Tensors tensors{.dtype = static_cast<Dtype>(dtype),
                        .activation = {static_cast<Kind>(kind), first, second},
                        .x = pointer<void>(x),
                        .dy = nullptr,
                        .residual = pointer<void>(residual),
                        .y = nullptr,
                        .out = pointer<void>(y),
                        .dresidual = nullptr,
                        .stream = false};
  const Problem problem{tensors,          channels_last,     channels, std::move(sizes), pointer<int64_t>(draw),
                        std::move(boxes), std::move(shares), pointer<float>(weight),     pointer<float>(bias),
                        eps};
  batch_norm(*chosen.second, problem, pointer<float>(mean), pointer<float>(var));
}

void backward(int dtype, bool channels_last, int64_t channels, std::vector<int64_t> sizes, Address dy, Address x,
              Address residual, Address y, Address dx, Address dresidual, Address weight, Address bias, Address mean,
              Address var, Address sum_g_xhat, Address sum_g, Address draw, std::vector<int64_t> boxes,
              std::vector<double> shares, double eps, int kind, float first, float second) {
  const Tensors tensors{.dtype = static_cast<Dtype>(dtype),
                        .activation = {static_cast<Kind>(kind), first, second},
                        .x = pointer<void>(x),
                        .dy = pointer<void>(dy),
                        .residual = pointer<void>(residual),
                        .y = pointer<void>(y),
                        .out = pointer<void>(dx),
                        .dresidual = pointer<void>(dresidual),
                        .stream = false};
  const Problem problem{tensors,          channels_last,     channels, std::move(sizes), pointer<int64_t>(draw),
                        std::move(boxes), std::move(shares), pointer<float>(weight),     pointer<float>(bias),
                        eps};
  batch_norm_backward(*chosen.second, problem, pointer<float>(mean), pointer<float>(var), pointer<float>(sum_g_xhat),
                      pointer<float>(sum_g));
}

}  // namespace
}  // namespace leannorm

NB_MODULE(_kernels, m) {
  m.def("batch_norm", &leannorm::forward, nb::call_guard<nb::gil_scoped_release>());
  m.def("batch_norm_backward", &leannorm::backward, nb::call_guard<nb::gil_scoped_release>());
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto& set : leannorm::instruction_sets()) names.push_back(set.first);
    return names;
  });
  m.def("instruction_set", [] { return leannorm::chosen.first; });
  m.def("use_instruction_set", &leannorm::choose, "name"_a);
}
