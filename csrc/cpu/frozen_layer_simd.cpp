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
constexpr int64_t kPiece = 1024;

LMVAE_INLINE float sum_of(const float* x, int64_t n) {
  float sum = 0;
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t end = std::min(n, start + kPiece);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = start; i < end; i++) part += x[i];
    sum += part;
  }
  return sum;
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
  float* x = room.data();
  const float *weight = a.weight, *bias = a.bias == nullptr ? x + n : a.bias;  // room is zeros at first
  for (int64_t r = begin; r < end; r++) {
    load_unit(a.x + r * a.x_row, x, n);
    const float mean = a.centred ? sum_of(x, n) / static_cast<float>(n) : 0.0f;
    float squares = 0;
    for (int64_t start = 0; start < n; start += kPiece) {
      const int64_t end = std::min(n, start + kPiece);
      float part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = start; i < end; i++) part += (x[i] - mean) * (x[i] - mean);
      squares += part;
    }
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(n) + static_cast<float>(a.eps));
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] = (x[i] - mean) * scale * weight[i] + bias[i];
    store_row(x, a.out + r * n, n);
    a.stats[2 * r] = mean;
    a.stats[2 * r + 1] = scale;
  }
}

template <typename T>
void norm_rows_bwd(const NormArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t n = a.width;
  std::vector<float> room(3 * n);
  float *x = room.data(), *g = x + n, *added = g + n;
  const float* weight = a.weight;
  for (int64_t r = begin; r < end; r++) {
    load_unit(a.x + r * a.x_row, x, n);
    load_unit(a.grad + r * a.grad_row, g, n);
    const float mean = a.stats[2 * r], scale = a.stats[2 * r + 1];
    float sum = 0, along = 0;
    for (int64_t start = 0; start < n; start += kPiece) {
      const int64_t end = std::min(n, start + kPiece);
      float part = 0, part_along = 0;
#pragma omp simd reduction(+ : part, part_along)
      for (int64_t i = start; i < end; i++) {
        x[i] = (x[i] - mean) * scale;
        g[i] *= weight[i];
        part += g[i];
        part_along += g[i] * x[i];
      }
      sum += part;
      along += part_along;
    }
    sum = a.centred ? sum / static_cast<float>(n) : 0.0f;
    along /= static_cast<float>(n);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) g[i] = scale * (g[i] - sum - along * x[i]);
    if (a.added != nullptr) {
      load_unit(a.added + r * a.added_row, added, n);
#pragma omp simd
      for (int64_t i = 0; i < n; i++) g[i] += added[i];
    }
    store_row(g, a.out + r * n, n);
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
