// Elementwise work of lm_head_loss, compiled once per instruction set.
#include "lm_head_loss.h"

#include <limits>

#include "simd_math.h"

namespace lmvae::LMVAE_ISA {
namespace {

template <typename C>
LMVAE_INLINE void logits_of(C* s, int64_t columns, const LogitForm<C>& form, int64_t first) {
  if (form.bias != nullptr) {
    const C* bias = form.bias + first;
#pragma omp simd
    for (int64_t j = 0; j < columns; j++) s[j] += bias[j];
  }
  if (form.scale != C(1)) {
#pragma omp simd
    for (int64_t j = 0; j < columns; j++) s[j] *= form.scale;
  }
  if (form.softcap > 0) {
    const C cap = form.softcap;
#pragma omp simd
    for (int64_t j = 0; j < columns; j++) s[j] = cap * tanh_(s[j] / cap);
  }
}

// d (cap tanh(x / cap)) / dx, from the capped value
template <typename C>
LMVAE_INLINE C slope_of(C capped, C cap) {
  const C t = capped / cap;
  return (C(1) - t) * (C(1) + t);
}

}  // namespace

template <typename C>
void head_online(C* s, int64_t ld, int64_t rows, int64_t columns, const LogitForm<C>& form, const int64_t* labels,
                 int64_t first, TokenState<C>* states, C* alpha, bool want_gradient) {
  constexpr C inf = std::numeric_limits<C>::infinity();
  for (int64_t i = 0; i < rows; i++, s += ld) {
    TokenState<C>& state = states[i];
    logits_of(s, columns, form, first);
    const int64_t at = labels[i] - first;
    const bool here = at >= 0 && at < columns;
    if (here) {
      state.label = s[at];
      state.label_slope = form.softcap > 0 ? slope_of(s[at], form.softcap) : C(1);
      s[at] = -inf;
    }
    C top = state.max;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < columns; j++) top = s[j] > top ? s[j] : top;  // NaN is left out here and shows in the sum
    const C shift = top == -inf ? C(0) : top;
    C sum = 0;
    if (!want_gradient) {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < columns; j++) sum += exp_(s[j] - shift);
    } else if (form.softcap > 0) {
      const C cap = form.softcap;
      if (here) s[at] = -inf;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < columns; j++) {
        const C e = exp_(s[j] - shift);
        sum += e;
        s[j] = e * slope_of(s[j], cap);
      }
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < columns; j++) {
        const C e = exp_(s[j] - shift);
        sum += e;
        s[j] = e;
      }
    }
    if (here && want_gradient) s[at] = 0;  // with a softcap 0 * slope(-inf) is NaN
    alpha[i] = top == state.max ? C(1) : (state.max == -inf ? C(0) : C(exp_(state.max - top)));
    state.sum = state.sum * alpha[i] + sum;
    state.max = top;
  }
}

template <typename C>
void head_gradient(C* s, int64_t ld, int64_t rows, int64_t columns, const LogitForm<C>& form, const int64_t* labels,
                   int64_t first, const TokenDone<C>* done) {
  for (int64_t i = 0; i < rows; i++, s += ld) {
    const TokenDone<C> d = done[i];
    logits_of(s, columns, form, first);
    const int64_t at = labels[i] - first;
    const bool here = at >= 0 && at < columns;
    const C label = here ? s[at] : C(0), factor = d.factor * d.inv_sum;
    if (form.softcap > 0) {
      const C cap = form.softcap;
#pragma omp simd
      for (int64_t j = 0; j < columns; j++) s[j] = factor * exp_(s[j] - d.max) * slope_of(s[j], cap);
      if (here) s[at] = d.factor * d.label_gradient * slope_of(label, cap);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < columns; j++) s[j] = factor * exp_(s[j] - d.max);
      if (here) s[at] = d.factor * d.label_gradient;
    }
  }
}

template <typename T, typename C>
void head_jacobian(const C* const* parts, const C* factors, int64_t count, const T* label_row, C label_factor,
                   HeadRow<T>* out, int64_t n) {
  constexpr int64_t kStep = 256;
  C sum[kStep], row[kStep];
  for (int64_t base = 0; base < n; base += kStep) {
    const int64_t step = std::min(kStep, n - base);
    load_unit(label_row + base, row, step);
#pragma omp simd
    for (int64_t j = 0; j < step; j++) sum[j] = label_factor * row[j];
    for (int64_t r = 0; r < count; r++) {
      const C* part = parts[r] + base;
      const C factor = factors[r];
#pragma omp simd
      for (int64_t j = 0; j < step; j++) sum[j] += factor * part[j];
    }
    store_row(sum, out + base, step);
  }
}

template <typename C>
void head_column_sums(const C* s, int64_t ld, int64_t rows, int64_t columns, double* out) {
  for (int64_t i = 0; i < rows; i++, s += ld) {
#pragma omp simd
    for (int64_t j = 0; j < columns; j++) out[j] += static_cast<double>(s[j]);
  }
}

template <typename T, typename C>
void head_widen(const T* x, C* y, int64_t n) {
  load_unit(x, y, n);
}

template <typename T, typename C>
void head_narrow(const C* x, C factor, T* y, int64_t n) {
  constexpr int64_t kStep = 256;
  C buffer[kStep];
  for (int64_t base = 0; base < n; base += kStep) {
    const int64_t step = std::min(kStep, n - base);
#pragma omp simd
    for (int64_t j = 0; j < step; j++) buffer[j] = factor * x[base + j];
    store_row(buffer, y + base, step);
  }
}

#define LMVAE_HEAD_C(C)                                                                                       \
  template void head_online<C>(C*, int64_t, int64_t, int64_t, const LogitForm<C>&, const int64_t*, int64_t,   \
                               TokenState<C>*, C*, bool);                                                     \
  template void head_gradient<C>(C*, int64_t, int64_t, int64_t, const LogitForm<C>&, const int64_t*, int64_t, \
                                 const TokenDone<C>*);                                                        \
  template void head_column_sums<C>(const C*, int64_t, int64_t, int64_t, double*);
#define LMVAE_HEAD_T(T, C)                                                                                  \
  template void head_jacobian<T, C>(const C* const*, const C*, int64_t, const T*, C, HeadRow<T>*, int64_t); \
  template void head_widen<T, C>(const T*, C*, int64_t);                                                    \
  template void head_narrow<T, C>(const C*, C, T*, int64_t);
LMVAE_HEAD_C(float)
LMVAE_HEAD_C(double)
LMVAE_HEAD_T(float, float)
LMVAE_HEAD_T(double, double)
LMVAE_HEAD_T(c10::BFloat16, float)
LMVAE_HEAD_T(c10::Half, float)

}  // namespace lmvae::LMVAE_ISA
