// What a decoder's body is made of, as Python hands it to decode_body.cpp and training_body.cpp.
#pragma once

#include <optional>
#include <tuple>
#include <utility>

#include <ATen/core/Tensor.h>

#include "row_ops.h"

namespace lmvae {

using OptionalTensor = std::optional<at::Tensor>;

// weight, bias, epsilon, whether the mean is taken off (LayerNorm; else RMSNorm)
using NormParts = std::tuple<at::Tensor, OptionalTensor, double, bool>;

struct RowNorm {
  explicit RowNorm(NormParts parts)
      : weight_(std::get<0>(parts)),
        bias_(std::get<1>(parts)),
        eps_(std::get<2>(parts)),
        centred_(std::get<3>(parts)) {}

  at::Tensor operator()(const at::Tensor& x) const { return std::get<0>(with_stats(x)); }
  // Rows, and what their gradient needs.
  std::tuple<at::Tensor, at::Tensor> with_stats(const at::Tensor& x) const {
    return frozen_norm(x, weight_, bias_, eps_, centred_);
  }
  // By x, plus `added`.
  at::Tensor gradient(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& stats,
                      const OptionalTensor& added = std::nullopt) const {
    return frozen_norm_bwd(grad, x, stats, weight_, added, centred_);
  }

  int64_t width() const { return weight_.numel(); }

 private:
  at::Tensor weight_;
  OptionalTensor bias_;
  double eps_;
  bool centred_;
};

inline std::optional<RowNorm> norm_of(std::optional<NormParts> parts) {
  return parts.has_value() ? std::optional<RowNorm>(RowNorm(*std::move(parts))) : std::nullopt;
}

}  // namespace lmvae
