// lm_head_loss: one thread's matrix products through the BLAS that torch carries, for every type. fp32 and fp64 weights
// are read where they lie; half types are widened block by block, so products are exact and sums are fp32.
#include "lm_head_loss.h"

#include <algorithm>

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

namespace lmvae {
namespace {

template <typename T, typename C>
class GemmEngine final : public HeadEngine<C> {
 public:
  GemmEngine(const HeadProblem& problem, int64_t tokens, Product next) : p_(problem), next_(next) {
    hidden_ = Room<C>(tokens * p_.width);
    if (!std::is_same_v<T, C>) weight_ = Room<C>(block_columns() * p_.width);
    if (next == Product::Hidden) acc_ = Room<C>(tokens * p_.width);
    if (next == Product::Weight) gradient_ = Room<C>(tokens * block_columns());
  }
  int64_t tile_tokens() const override { return 256; }
  int64_t phase_tokens() const override { return 256; }
  // A block's weights take about half of a 1-2 MB second-level cache.
  int64_t block_columns() const override {
    const int64_t fit = (int64_t{768} << 10) / static_cast<int64_t>(sizeof(C) * std::max<int64_t>(1, p_.width));
    return std::clamp<int64_t>(fit / 32 * 32, 64, 512);
  }

  bool set_tokens(const int64_t* rows, int64_t count) override {
    count_ = count;
    for (int64_t i = 0; i < count; i++)
      widen(static_cast<const T*>(p_.hidden) + rows[i] * p_.hidden_row, hidden_.data() + i * p_.width);
    if (next_ == Product::Hidden) std::fill_n(acc_.data(), count * p_.width, C(0));
    return true;
  }

  bool set_block(int64_t first, int64_t count) override {
    const T* w = static_cast<const T*>(p_.weight) + first * p_.weight_row;
    if constexpr (std::is_same_v<T, C>) {
      block_ = view(const_cast<C*>(w), count, p_.width, p_.weight_row);
    } else {
      for (int64_t j = 0; j < count; j++) widen(w + j * p_.weight_row, weight_.data() + j * p_.width);
      block_ = view(weight_.data(), count, p_.width, p_.width);
    }
    block_t_ = block_.t();
    columns_ = count;
    return true;
  }

  void scores(int64_t t0, int64_t count, C* s, int64_t ld) override {
    at::Tensor out = view(s, count, columns_, ld);
    at::mm_out(out, view(hidden_.data() + t0 * p_.width, count, p_.width, p_.width), block_t_);
  }

  void accumulate(int64_t t0, int64_t count, const C* alpha, const C* p, int64_t ld) override {
    C* acc = acc_.data() + t0 * p_.width;
    for (int64_t i = 0; i < count; i++) {
      if (alpha[i] == C(1)) continue;
      for (int64_t k = 0; k < p_.width; k++) acc[i * p_.width + k] *= alpha[i];
    }
    at::Tensor out = view(acc, count, p_.width, p_.width);
    at::addmm_out(out, out, view(const_cast<C*>(p), count, columns_, ld), block_);
  }

  const C* acc_row(int64_t t) const override { return acc_.data() + t * p_.width; }

  void take_gradient(int64_t t0, int64_t count, const C* g, int64_t ld) override {
    for (int64_t i = 0; i < count; i++) std::copy_n(g + i * ld, columns_, gradient_.data() + (t0 + i) * columns_);
  }

  void weight_gradient(C* dw, bool add) override {
    at::Tensor out = view(dw, columns_, p_.width, p_.width);
    const at::Tensor g = view(gradient_.data(), count_, columns_, columns_).t();
    const at::Tensor h = view(hidden_.data(), count_, p_.width, p_.width);
    if (add)
      at::addmm_out(out, out, g, h);
    else
      at::mm_out(out, g, h);
  }

 private:
  static at::Tensor view(C* data, int64_t rows, int64_t columns, int64_t ld) {
    return at::from_blob(data, {rows, columns}, {ld, 1}, at::TensorOptions().dtype(c10::CppTypeToScalarType<C>::value));
  }
  void widen(const T* x, C* y) const { LMVAE_PICK(head_widen<T, C>)(x, y, p_.width); }

  HeadProblem p_;
  Product next_;
  Room<C> hidden_, weight_, acc_, gradient_;
  at::Tensor block_, block_t_;
  int64_t count_ = 0, columns_ = 0;
};

}  // namespace

template <>
std::unique_ptr<HeadEngine<double>> make_gemm_engine<double>(const HeadProblem& p, int64_t tokens, Product next) {
  return std::make_unique<GemmEngine<double, double>>(p, tokens, next);
}

template <>
std::unique_ptr<HeadEngine<float>> make_gemm_engine<float>(const HeadProblem& p, int64_t tokens, Product next) {
  switch (p.dtype) {
    case c10::ScalarType::BFloat16: return std::make_unique<GemmEngine<c10::BFloat16, float>>(p, tokens, next);
    case c10::ScalarType::Half: return std::make_unique<GemmEngine<c10::Half, float>>(p, tokens, next);
    default: return std::make_unique<GemmEngine<float, float>>(p, tokens, next);
  }
}

}  // namespace lmvae
