// Batch normalization in each of the two memory orders.
#pragma once

#include "driver.hpp"

namespace leannorm {

namespace rows {
bool begin_at_whole_bytes(const Plan&);
void batch_norm(const Kernels&, const Plan&, const Call&, float* mean, float* var);
void batch_norm_backward(const Kernels&, const Plan&, const Call&, const float* mean, const float* var,
                         float* sum_g_xhat, float* sum_g);
void normalize(const Kernels&, const Plan&, const Call&, const float* mean, const float* var);
void backward_fused(const Kernels&, const Plan&, const Call&, const float* mean, const float* var, float* sum_g_xhat,
                    float* sum_g);
}  // namespace rows

namespace planes {
bool begin_at_whole_bytes(const Plan&);
void batch_norm(const Kernels&, const Plan&, const Call&, float* mean, float* var);
void batch_norm_backward(const Kernels&, const Plan&, const Call&, const float* mean, const float* var,
                         float* sum_g_xhat, float* sum_g);
void normalize(const Kernels&, const Plan&, const Call&, const float* mean, const float* var);
void backward_fused(const Kernels&, const Plan&, const Call&, const float* mean, const float* var, float* sum_g_xhat,
                    float* sum_g);
}  // namespace planes

}  // namespace leannorm
