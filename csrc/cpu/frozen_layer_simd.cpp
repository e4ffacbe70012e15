// Elementwise work of a frozen decoder layer, compiled once per instruction set: norms, activations, rotary positions,
// and what their gradients by the inputs are.
#include "frozen_layer.h"

#include <algorithm>
#include <vector>

#include "simd_math.h"

namespace lmvae::LMVAE_ISA {
namespace {

constexpr int64_t kChunk = 256;  // numbers worked on at a time where rows need no sums

// Sums are made of fp32 vectors, in pieces of a row, so that neither wide rows nor few lanes add many terms one by one.
// A piece is summed as four quarters side by side: an addition then waits for the fourth one before it, not for the
// last.
constexpr int64_t kPiece = 1024;

template <typename Term>
LMVAE_INLINE float sum_of(int64_t n, const Term& term) {
  float sum = 0;
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t quarter = std::min(n - start, kPiece) / 4, rest = start + 4 * quarter;
    const int64_t a = start, b = a + quarter, c = b + quarter, d = c + quarter;
    float first = 0, second = 0, third = 0, fourth = 0;
#pragma omp simd reduction(+ : first, second, third, fourth)
    for (int64_t i = 0; i < quarter; i++) {
      first += term(a + i);
      second += term(b + i);
      third += term(c + i);
      fourth += term(d + i);
    }
    for (int64_t i = rest; i < std::min(n, start + kPiece); i++) first += term(i);
    sum += (first + second) + (third + fourth);
  }
  return sum;
}

// A row as fp32: itself, or widened into `room`; where one is to be made; and what is left to do with one that was.
LMVAE_INLINE const float* wide_row(const float* x, float*, int64_t) { return x; }
LMVAE_INLINE float* wide_place(float* out, float*) { return out; }
LMVAE_INLINE void narrow_row(const float*, const float*, int64_t) {}

template <typename T>
LMVAE_INLINE const float* wide_row(const T* x, float* room, int64_t n) {
  load_unit(x, room, n);
  return room;
}

template <typename T>
LMVAE_INLINE float* wide_place(T*, float* room) {
  return room;
}

template <typename T>
LMVAE_INLINE void narrow_row(const float* x, T* out, int64_t n) {
  store_row(x, out, n);
}

LMVAE_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }

// Its value and its slope, s (1 - s) without the difference, which large x multiply later on.
LMVAE_INLINE void sigmoid_of(float x, float* value, float* slope) {
  const float e = exp_(-std::fabs(x)), inverse = 1.0f / (1.0f + e);
  *value = x < 0 ? e * inverse : inverse;
  *slope = e * inverse * inverse;
}

constexpr float kGelu = 1.5957691216057308f, kCube = 0.044715f;  // 2 sqrt(2 / pi)

}  // namespace

template <typename T>
void norm_rows(const NormArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t n = a.width;
  std::vector<float> room(a.bias == nullptr ? 2 * n : n);
  const float *weight = a.weight, *bias = a.bias == nullptr ? room.data() + n : a.bias;  // room is zeros at first
  for (int64_t r = begin; r < end; r++) {
    const float* x = wide_row(a.x + r * a.x_row, room.data(), n);
    float* out = wide_place(a.out + r * n, room.data());
    const float mean = a.centred ? sum_of(n, [x](int64_t i) { return x[i]; }) / static_cast<float>(n) : 0.0f;
    const float squares = sum_of(n, [x, mean](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(n) + static_cast<float>(a.eps));
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
    narrow_row(out, a.out + r * n, n);
    a.stats[2 * r] = mean;
    a.stats[2 * r + 1] = scale;
  }
}

template <typename T>
void norm_rows_bwd(const NormArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t n = a.width;
  std::vector<float> room(3 * n);
  float *unit = room.data(), *by_unit = unit + n;
  const float* weight = a.weight;
  for (int64_t r = begin; r < end; r++) {
    const float mean = a.stats[2 * r], scale = a.stats[2 * r + 1];
    const float *x = wide_row(a.x + r * a.x_row, unit, n), *g = wide_row(a.grad + r * a.grad_row, by_unit, n);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      unit[i] = (x[i] - mean) * scale;
      by_unit[i] = g[i] * weight[i];
    }
    const float along = sum_of(n, [=](int64_t i) { return by_unit[i] * unit[i]; }) / static_cast<float>(n);
    const float sum = a.centred ? sum_of(n, [=](int64_t i) { return by_unit[i]; }) / static_cast<float>(n) : 0.0f;
    float* out = wide_place(a.out + r * n, by_unit);
    if (a.added == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) out[i] = scale * (by_unit[i] - sum - along * unit[i]);
    } else {
      const float* added = wide_row(a.added + r * a.added_row, by_unit + n, n);
#pragma omp simd
      for (int64_t i = 0; i < n; i++) out[i] = scale * (by_unit[i] - sum - along * unit[i]) + added[i];
    }
    narrow_row(out, a.out + r * n, n);
  }
}

template <typename T>
void activation_rows(const ActivationArgs<T>& a, int64_t begin, int64_t end) {
  float x[kChunk], up[kChunk];
  for (int64_t r = begin; r < end; r++)
    for (int64_t i = 0; i < a.width; i += kChunk) {
      const int64_t n = std::min(kChunk, a.width - i);
      load_unit(a.x + r * a.x_row + i, x, n);
      if (a.kind == RowActivation::SwiGlu) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) x[j] *= sigmoid(x[j]);
      } else {  // 0.5 x (1 + tanh(u)) is x sigmoid(2 u)
#pragma omp simd
        for (int64_t j = 0; j < n; j++) x[j] *= sigmoid(kGelu * (x[j] + kCube * x[j] * x[j] * x[j]));
      }
      if (a.kind != RowActivation::GeluTanh) {
        load_unit(a.x + r * a.x_row + a.width + i, up, n);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) x[j] *= up[j];
      }
      store_row(x, a.out + r * a.width + i, n);
    }
}

template <typename T>
void activation_rows_bwd(const ActivationArgs<T>& a, int64_t begin, int64_t end) {
  float x[kChunk], up[kChunk], g[kChunk], slopes[kChunk];
  const bool gated = a.kind != RowActivation::GeluTanh;
  for (int64_t r = begin; r < end; r++)
    for (int64_t i = 0; i < a.width; i += kChunk) {
      const int64_t n = std::min(kChunk, a.width - i);
      load_unit(a.x + r * a.x_row + i, x, n);
      load_unit(a.grad + r * a.grad_row + i, g, n);
      T* out = a.out + r * (gated ? 2 : 1) * a.width + i;
      // The value goes to x, its slope to `slopes`.
      if (a.kind == RowActivation::SwiGlu) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
          float s, slope;
          sigmoid_of(x[j], &s, &slope);
          slopes[j] = s + x[j] * slope;
          x[j] *= s;
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
          const float square = x[j] * x[j];
          float s, slope;
          sigmoid_of(kGelu * (x[j] + kCube * x[j] * square), &s, &slope);
          slopes[j] = s + x[j] * slope * kGelu * (1.0f + 3.0f * kCube * square);
          x[j] *= s;
        }
      }
      if (gated) {
        load_unit(a.x + r * a.x_row + a.width + i, up, n);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
          x[j] *= g[j];
          slopes[j] *= up[j];
        }
        store_row(x, out + a.width, n);
      }
#pragma omp simd
      for (int64_t j = 0; j < n; j++) g[j] *= slopes[j];
      store_row(g, out, n);
    }
}

template <typename T>
void rotary_rows(const RotaryArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t half = a.dim / 2;
  std::vector<float> room(3 * a.dim);
  float *cos = room.data(), *sin = cos + a.dim, *x = sin + a.dim;
  for (int64_t r = begin; r < end; r++) {
    load_unit(a.cos + r * a.cos_row, cos, a.dim);
    load_unit(a.sin + r * a.sin_row, sin, a.dim);
    for (int64_t h = 0; h < a.heads; h++) {
      T* at = a.x + r * a.x_row + h * a.dim;
      load_unit(at, x, a.dim);
      float* y = x + half;
      if (a.back) {
#pragma omp simd
        for (int64_t j = 0; j < half; j++) {
          const float left = x[j], right = y[j];
          x[j] = left * cos[j] + right * sin[half + j];
          y[j] = right * cos[half + j] - left * sin[j];
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < half; j++) {
          const float left = x[j], right = y[j];
          x[j] = left * cos[j] - right * sin[j];
          y[j] = right * cos[half + j] + left * sin[half + j];
        }
      }
      store_row(x, at, a.dim);
    }
  }
}

#define LMVAE_FROZEN(T)                                                             \
  template void norm_rows<T>(const NormArgs<T>&, int64_t, int64_t);                 \
  template void norm_rows_bwd<T>(const NormArgs<T>&, int64_t, int64_t);             \
  template void activation_rows<T>(const ActivationArgs<T>&, int64_t, int64_t);     \
  template void activation_rows_bwd<T>(const ActivationArgs<T>&, int64_t, int64_t); \
  template void rotary_rows<T>(const RotaryArgs<T>&, int64_t, int64_t);
LMVAE_FROZEN(float)
LMVAE_FROZEN(c10::BFloat16)

}  // namespace lmvae::LMVAE_ISA
