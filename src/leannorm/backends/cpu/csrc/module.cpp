// The extension module: tensors come as addresses, with all that their owner has checked (see the package's __init__.py).
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "concatenated.hpp"
#include "depthwise.hpp"
#include "driver.hpp"
#include "kept_tensor.hpp"
#include "kernels.hpp"
#include "pointwise.hpp"
#include "pool.hpp"
#include "preactivated.hpp"
#include "running.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace leannorm {
namespace {

struct InstructionSet {
  std::string name;
  const Kernels *kernels, *bfloat16;

  const Kernels& of(int dtype) const { return static_cast<Dtype>(dtype) == Dtype::bfloat16 ? *bfloat16 : *kernels; }
};

// Those of this machine, best first.
std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512bf16"))
      found.push_back({"avx512_bf16", &avx512::kernels, &avx512_bf16::kernels});
    found.push_back({"avx512", &avx512::kernels, &avx512::kernels});
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    found.push_back({"avx2", &avx2::kernels, &avx2::kernels});
#endif
  found.push_back({"portable", &portable::kernels, &portable::kernels});
  return found;
}

InstructionSet chosen = instruction_sets().front();

void choose(const std::string& name) {
  for (const auto& set : instruction_sets())
    if (set.name == name) {
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

Tensors of_kind(int dtype, int kind, float first, float second) {
  return {.dtype = static_cast<Dtype>(dtype), .activation = {static_cast<Kind>(kind), first, second}};
}

template <auto kOperator>
void forward(const Plan& plan, int dtype, Address x, Address residual, Address y, Address signs, Address weight,
             Address bias, Address mean, Address var, Address draw, double eps, int kind, float first, float second) {
  Tensors tensors = of_kind(dtype, kind, first, second);
  tensors.x = pointer<void>(x);
  tensors.residual = pointer<void>(residual);
  tensors.out = pointer<void>(y);
  tensors.signs = pointer<uint8_t>(signs);
  const Call call{tensors, pointer<int64_t>(draw), pointer<float>(weight), pointer<float>(bias), eps};
  kOperator(chosen.of(dtype), plan, call, pointer<float>(mean), pointer<float>(var));
}

template <auto kOperator>
void backward(const Plan& plan, int dtype, Address dy, Address x, Address residual, Address y, Address signs,
              Address dx, Address dresidual, Address weight, Address bias, Address mean, Address var, Address sum_g_xhat,
              Address sum_g, Address draw, double eps, int kind, float first, float second) {
  Tensors tensors = of_kind(dtype, kind, first, second);
  tensors.x = pointer<void>(x);
  tensors.dy = pointer<void>(dy);
  tensors.residual = pointer<void>(residual);
  tensors.y = pointer<void>(y);
  tensors.out = pointer<void>(dx);
  tensors.dresidual = pointer<void>(dresidual);
  tensors.signs = pointer<uint8_t>(signs);
  const Call call{tensors, pointer<int64_t>(draw), pointer<float>(weight), pointer<float>(bias), eps};
  kOperator(chosen.of(dtype), plan, call, pointer<float>(mean), pointer<float>(var), pointer<float>(sum_g_xhat),
            pointer<float>(sum_g));
}

Parts parts_of(const std::vector<Address>& xs, const std::vector<Address>& dxs, const std::vector<int64_t>& channels) {
  Parts parts;
  for (size_t i = 0; i < channels.size(); ++i)
    parts.push_back({pointer<char>(xs[i]), dxs.empty() ? nullptr : pointer<char>(dxs[i]), channels[i]});
  return parts;
}

void concatenated_forward(const Plan& plan, int dtype, const std::vector<Address>& xs,
                          const std::vector<int64_t>& channels, Address y, Address weight, Address bias, Address mean,
                          Address var, Address draw, double eps, int kind, float first, float second) {
  Tensors tensors = of_kind(dtype, kind, first, second);
  tensors.out = pointer<void>(y);
  const Call call{tensors, pointer<int64_t>(draw), pointer<float>(weight), pointer<float>(bias), eps};
  concatenated_batch_norm(chosen.of(dtype), plan, call, parts_of(xs, {}, channels), pointer<float>(mean),
                          pointer<float>(var));
}

void concatenated_backward(const Plan& plan, int dtype, Address dy, const std::vector<Address>& xs,
                           const std::vector<Address>& dxs, const std::vector<int64_t>& channels, Address weight,
                           Address bias, Address mean, Address var, Address sum_g_xhat, Address sum_g, Address draw,
                           double eps, int kind, float first, float second) {
  Tensors tensors = of_kind(dtype, kind, first, second);
  tensors.dy = pointer<void>(dy);
  const Call call{tensors, pointer<int64_t>(draw), pointer<float>(weight), pointer<float>(bias), eps};
  concatenated_batch_norm_backward(chosen.of(dtype), plan, call, parts_of(xs, dxs, channels), pointer<float>(mean),
                                   pointer<float>(var), pointer<float>(sum_g_xhat), pointer<float>(sum_g));
}

template <class Plan, auto kOperator>
void convolution_forward(const Plan& plan, int dtype, Address x, Address residual, Address y, Address z,
                         Address sample, Address weight, Address gamma, Address beta, Address mean, Address var,
                         Address draw, double eps, int kind, float first, float second) {
  Tensors tensors = of_kind(dtype, kind, first, second);
  tensors.x = pointer<void>(x);
  tensors.residual = pointer<void>(residual);
  tensors.out = pointer<void>(y);
  tensors.dresidual = pointer<void>(z);
  const ConvolutionCall call{tensors,
                             pointer<int64_t>(draw),
                             pointer<float>(weight),
                             pointer<float>(gamma),
                             pointer<float>(beta),
                             eps};
  kOperator(chosen.of(dtype), plan, call, pointer<void>(sample), pointer<float>(mean), pointer<float>(var));
}

template <class Plan, auto kOperator>
void convolution_backward(const Plan& plan, int dtype, Address dy, Address x, Address at, Address dx,
                          Address dresidual, Address sample, Address weight, Address gamma, Address mean, Address var,
                          Address dweight, Address sum_g_xhat, Address sum_g, Address draw, double eps, int kind,
                          float first, float second) {
  Tensors tensors = of_kind(dtype, kind, first, second);
  tensors.x = pointer<void>(x);
  tensors.dy = pointer<void>(dy);
  tensors.y = pointer<void>(at);
  tensors.out = pointer<void>(dx);
  tensors.dresidual = pointer<void>(dresidual);
  const ConvolutionCall call{
      tensors, pointer<int64_t>(draw), pointer<float>(weight), pointer<float>(gamma), nullptr, eps};
  kOperator(chosen.of(dtype), plan, call, pointer<void>(sample), pointer<float>(mean), pointer<float>(var),
            pointer<float>(dweight), pointer<float>(sum_g_xhat), pointer<float>(sum_g));
}

// Of a batch norm: weight, bias, mean, variance, draw, eps, and the activation's kind and numbers.
using Point = std::tuple<Address, Address, Address, Address, Address, double, int, float, float>;

Tensors of_point(const Point& point) {
  return of_kind(static_cast<int>(Dtype::float32), std::get<6>(point), std::get<7>(point), std::get<8>(point));
}

Call call_of(const Point& point) {
  const auto& [weight, bias, mean, var, draw, eps, kind, first, second] = point;
  return {of_point(point), pointer<int64_t>(draw), pointer<float>(weight), pointer<float>(bias), eps};
}

ConvolutionCall convolution_call(const Tensors& tensors, Address weight, const Point& point) {
  const auto& [gamma, beta, mean, var, draw, eps, kind, first, second] = point;
  return {tensors, pointer<int64_t>(draw), pointer<float>(weight), pointer<float>(gamma), pointer<float>(beta), eps};
}

Moments moments_of(const Point& point) { return {pointer<float>(std::get<2>(point)), pointer<float>(std::get<3>(point))}; }

void preactivated(const PointwisePlan& plan, const Plan& first_plan, const std::vector<Address>& xs,
                  const std::vector<int64_t>& channels, const Point& first, Address y, Address z, Address sample,
                  Address weight, const Point& second) {
  Tensors tensors = of_point(second);
  tensors.out = pointer<void>(y);
  tensors.dresidual = pointer<void>(z);
  preactivated_forward(*chosen.kernels, first_plan, plan, call_of(first), convolution_call(tensors, weight, second),
                       parts_of(xs, {}, channels), moments_of(first), moments_of(second), pointer<void>(sample));
}

void preactivated_back(const PointwisePlan& plan, const Plan& first_plan, Address dy, const std::vector<Address>& xs,
                       const std::vector<Address>& dxs, const std::vector<int64_t>& channels, const Point& first,
                       Address at, Address sample, Address weight, const Point& second, Address first_sum_g_xhat,
                       Address first_sum_g, Address dweight, Address sum_g_xhat, Address sum_g) {
  Tensors tensors = of_point(second);
  tensors.dy = pointer<void>(dy);
  tensors.y = pointer<void>(at);
  preactivated_backward(*chosen.kernels, first_plan, plan, call_of(first), convolution_call(tensors, weight, second),
                        parts_of(xs, dxs, channels), moments_of(first), moments_of(second), pointer<void>(sample),
                        {pointer<float>(first_sum_g_xhat), pointer<float>(first_sum_g), pointer<float>(dweight),
                         pointer<float>(sum_g_xhat), pointer<float>(sum_g)});
}

}  // namespace
}  // namespace leannorm

NB_MODULE(_kernels, m) {
  nb::set_leak_warnings(false);  // plans live in a cache until the process ends
  using leannorm::Plan;
  const nb::call_guard<nb::gil_scoped_release> unlocked;
  nb::class_<Plan>(m, "Plan")
      .def(nb::init<bool, int64_t, std::vector<int64_t>, std::vector<int64_t>, std::vector<double>, bool>(),
           "channels_last"_a, "channels"_a, "sizes"_a, "boxes"_a, "shares"_a, "drawn"_a)
      .def("sign_bytes", &Plan::sign_bytes)
      .def("batch_norm", &leannorm::forward<leannorm::batch_norm>, unlocked)
      .def("batch_norm_backward", &leannorm::backward<leannorm::batch_norm_backward>, unlocked)
      .def("normalize", &leannorm::forward<leannorm::normalize>, unlocked)
      .def("backward_fused", &leannorm::backward<leannorm::backward_fused>, unlocked)
      .def("concatenated", &leannorm::concatenated_forward, unlocked)
      .def("concatenated_backward", &leannorm::concatenated_backward, unlocked);
  using leannorm::DepthwisePlan;
  using Pair = std::array<int64_t, 2>;
  nb::class_<DepthwisePlan>(m, "DepthwisePlan")
      .def(nb::init<int64_t, int64_t, Pair, Pair, Pair, Pair, Pair, std::vector<int64_t>, std::vector<double>, bool>(),
           "samples"_a, "channels"_a, "sizes"_a, "kernel"_a, "stride"_a, "padding"_a, "dilation"_a, "boxes"_a,
           "shares"_a, "drawn"_a)
      .def("forward", &leannorm::convolution_forward<DepthwisePlan, leannorm::depthwise_forward>, unlocked)
      .def("backward", &leannorm::convolution_backward<DepthwisePlan, leannorm::depthwise_backward>, unlocked);
  using leannorm::PointwisePlan;
  nb::class_<PointwisePlan>(m, "PointwisePlan")
      .def(nb::init<int64_t, int64_t, int64_t, Pair, Pair, std::vector<int64_t>, std::vector<double>, bool>(),
           "samples"_a, "inputs"_a, "outputs"_a, "sizes"_a, "stride"_a, "boxes"_a, "shares"_a, "drawn"_a)
      .def("forward", &leannorm::convolution_forward<PointwisePlan, leannorm::pointwise_forward>, unlocked)
      .def("backward", &leannorm::convolution_backward<PointwisePlan, leannorm::pointwise_backward>, unlocked)
      .def("preactivated", &leannorm::preactivated, unlocked)
      .def("preactivated_backward", &leannorm::preactivated_back, unlocked);
  m.def(
      "kept_tensor",
      [](int dtype, std::vector<int64_t> shape, std::vector<int64_t> strides) {
        return leannorm::kept_tensor(static_cast<leannorm::Dtype>(dtype), std::move(shape), std::move(strides));
      },
      "dtype"_a, "shape"_a, "strides"_a);
  m.def("track", [](uintptr_t running_mean, uintptr_t running_var, uintptr_t batches, uintptr_t mean, uintptr_t var,
                    int64_t channels, float unbiased, float factor, bool between_steps, bool guarded) {
    using leannorm::pointer;
    leannorm::track({pointer<float>(running_mean), pointer<float>(running_var), pointer<int64_t>(batches)},
                    pointer<float>(mean), pointer<float>(var), channels, unbiased, factor, between_steps, guarded);
  });
  m.def("idle_bytes", [] { return leannorm::pool().idle_bytes(); });
  m.def("release", [] { leannorm::pool().release(); });
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto& set : leannorm::instruction_sets()) names.push_back(set.name);
    return names;
  });
  m.def("instruction_set", [] { return leannorm::chosen.name; });
  m.def("use_instruction_set", &leannorm::choose, "name"_a);
}
