// lm_head_loss on CPU: what its files share. lm_head_loss.cpp owns the algorithm (threads, merging, registration),
// lm_head_loss_simd.cpp the elementwise work, and a HeadEngine the matrix products of one thread:
// lm_head_loss_gemm.cpp through torch's BLAS (every type), lm_head_loss_amx.cpp on the AMX tiles (bf16, fp16 and fp32)
// or, without tiles, by dot products of bf16.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "dispatch.h"
#include "room.h"

namespace lmvae {

// hidden [tokens, width] and weight [vocab, width], rows dense, row strides in elements.
struct HeadProblem {
  const void *hidden, *weight;
  int64_t hidden_row, weight_row;
  int64_t tokens, width, vocab;
  c10::ScalarType dtype;
};

// logits = scale * (product + bias), then softcap * tanh(logits / softcap) where softcap > 0. bias is null or in C.
template <typename C>
struct LogitForm {
  const C* bias;
  C scale, softcap;
};

// Rows of d nll / d hidden as they wait for the gradient of the loss. A loss scale comes with that one only, and until
// then fp16 would lose what is small.
template <typename T>
using HeadRow = std::conditional_t<std::is_same_v<T, c10::Half>, float, T>;

// What a token has gathered over the vocabulary seen so far, its own label left out: the label's logit is kept apart,
// so that 1 - p(label) comes out as a sum of what is not the label and not as a difference of nearly equal numbers.
template <typename C>
struct TokenState {
  C max = -INFINITY, sum = 0;    // sum of exp(logit - max)
  C label = 0, label_slope = 0;  // the label's logit; d logit / d (scale * product): 1 without a softcap
};

// What the second pass (weight and bias gradients) needs of a finished token.
template <typename C>
struct TokenDone {
  C max, inv_sum;    // softmax = exp(logit - max) * inv_sum
  C label_gradient;  // softmax(label) - 1
  C factor;          // the weight this token's nll has in what is differentiated, times scale
};

// What follows scores(): nothing, accumulate() or weight_gradient().
enum class Product { None, Hidden, Weight };

// The matrix products of one thread, C = float or double. Tokens are numbered within the group last set.
template <typename C>
class HeadEngine {
 public:
  virtual ~HeadEngine() = default;
  virtual void enter() {}                     // called by the thread that is going to use it, and
  virtual void leave() {}                     // when it has
  virtual int64_t tile_tokens() const = 0;    // tokens to give to scores() at a time
  virtual int64_t phase_tokens() const = 0;   // tokens to be scored before they are accumulated: a multiple of the tile
  virtual int64_t block_columns() const = 0;  // vocabulary rows to give to set_block() at most
  // Both return false where the engine cannot keep Inf and NaN as torch does; the caller then takes another engine.
  virtual bool set_tokens(const int64_t* rows, int64_t count) = 0;
  virtual bool set_block(int64_t first, int64_t count) = 0;
  // s[i][j] = hidden_(t0+i) . weight_(first+j), i < count, j < block
  virtual void scores(int64_t t0, int64_t count, C* s, int64_t ld) = 0;
  // acc_(t0+i) = alpha_i acc_(t0+i) + sum_j p[i][j] weight_(first+j)
  virtual void accumulate(int64_t t0, int64_t count, const C* alpha, const C* p, int64_t ld) = 0;
  virtual const C* acc_row(int64_t t) const = 0;
  // Takes g [count][block] of some tokens; once all of the group's are there, dw[j][:] (+)= sum_t g[t][j] hidden_t.
  virtual void take_gradient(int64_t t0, int64_t count, const C* g, int64_t ld) = 0;
  virtual void weight_gradient(C* dw, bool add) = 0;
};

// Engines for groups of at most `tokens` tokens whose blocks go through `next`.
template <typename C>
std::unique_ptr<HeadEngine<C>> make_gemm_engine(const HeadProblem& problem, int64_t tokens, Product next);
// Null where this CPU has no unit for the type.
std::unique_ptr<HeadEngine<float>> make_packed_engine(const HeadProblem& problem, int64_t tokens, Product next);

}  // namespace lmvae

// s [rows][columns] products -> exp(logit - new max) * slope in place (the label's entry 0); updates states, and gives
// in alpha the factor by which what was accumulated against the old max must shrink. labels are relative to column 0.
LMVAE_DECLARE(template <typename C> void head_online(C* s, int64_t ld, int64_t rows, int64_t columns,
                                                     const ::lmvae::LogitForm<C>& form, const int64_t* labels,
                                                     int64_t first, ::lmvae::TokenState<C>* states, C* alpha,
                                                     bool want_gradient))
// s products -> the gradient of sum factor * nll by the product, in place.
LMVAE_DECLARE(template <typename C> void head_gradient(C* s, int64_t ld, int64_t rows, int64_t columns,
                                                       const ::lmvae::LogitForm<C>& form, const int64_t* labels,
                                                       int64_t first, const ::lmvae::TokenDone<C>* done))
// out = sum_r factors[r] * parts[r] + label_factor * label_row, rounded to HeadRow<T>
LMVAE_DECLARE(template <typename T, typename C> void head_jacobian(const C* const* parts, const C* factors,
                                                                   int64_t count, const T* label_row, C label_factor,
                                                                   ::lmvae::HeadRow<T>* out, int64_t n))
// out[j] += sum_i s[i][j]; in double, as thousands of tokens add up
LMVAE_DECLARE(template <typename C> void head_column_sums(const C* s, int64_t ld, int64_t rows, int64_t columns,
                                                          double* out))
// rows of T widened to C, and back
LMVAE_DECLARE(template <typename T, typename C> void head_widen(const T* x, C* y, int64_t n))
LMVAE_DECLARE(template <typename T, typename C> void head_narrow(const C* x, C factor, T* y, int64_t n))
