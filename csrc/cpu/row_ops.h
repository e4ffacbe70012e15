// CPU implementations of torch ops that decode_body.cpp and training_body.cpp call without the dispatcher between.
// Shapes and dtypes of arguments are checked by the ops' public functions (kernels/*/op.py), and here by whoever calls.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace lmvae {

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& residual, int64_t activation, int64_t out_features);
at::Tensor packed_linear_int8(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales,
                              const at::Tensor& totals, const std::optional<at::Tensor>& bias,
                              const std::optional<at::Tensor>& residual, int64_t activation, int64_t out_features);
std::tuple<at::Tensor, at::Tensor> frozen_norm(const at::Tensor& x, const at::Tensor& weight,
                                               const std::optional<at::Tensor>& bias, double eps, bool centred);
at::Tensor frozen_norm_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& stats,
                           const at::Tensor& weight, const std::optional<at::Tensor>& added, bool centred);
at::Tensor frozen_activation(const at::Tensor& x, int64_t kind);
at::Tensor frozen_activation_bwd(const at::Tensor& grad, const at::Tensor& x, int64_t kind);
void frozen_rotary(at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t heads, bool back);
at::Tensor latent_attention_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& places,
                                 const at::Tensor& lengths, double scale, std::optional<int64_t> window,
                                 std::optional<double> softcap);

// Output [T, H, D], and [T, H, 2] numbers that the gradient needs.
std::tuple<at::Tensor, at::Tensor> latent_attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& memory_k,
    const std::optional<at::Tensor>& memory_v, const at::Tensor& cu_seqlens, int64_t visibility, double scale,
    std::optional<int64_t> max_seqlen, std::optional<int64_t> window, std::optional<double> softcap);
// What the gradients are written to: of tokens [T, heads, D], whose heads lie one behind the other, those of keys as
// far from token to token as those of values; of memory dense, and undefined without memory.
struct AttentionGradients {
  at::Tensor q, k, v, memory_k, memory_v;
};
void latent_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const std::optional<at::Tensor>& memory_k,
                               const std::optional<at::Tensor>& memory_v, const at::Tensor& out,
                               const at::Tensor& stats, const at::Tensor& cu_seqlens, int64_t visibility, double scale,
                               std::optional<int64_t> max_seqlen, std::optional<int64_t> window,
                               std::optional<double> softcap, const AttentionGradients& grads);

}  // namespace lmvae
