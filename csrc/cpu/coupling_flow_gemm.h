// Matrix products of coupling_flow_simd.cpp, compiled once per instruction set.
//
// Why not the BLAS that torch carries: the products here are small and skinny ([rows, 64] x [64, 512]), 30 of them follow each
// other in one pass, and each wants its bias, its ReLU or its accumulation in the epilogue. A register-tiled kernel that
// reads B as it lies needs no call overhead, no packing at batch 1, and one thread team for the whole flow.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace lmvae::LMVAE_ISA {
namespace {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kVectorBytes = 64, kTileM = 12, kWideM = 3;  // 32 registers: 12 x 2 accumulators
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kVectorBytes = 32, kTileM = 6, kWideM = 1;  // 16 registers: 6 x 2
#else
constexpr int kVectorBytes = 16, kTileM = 6, kWideM = 1;
#endif

template <typename T>
struct Simd {
  typedef T V __attribute__((vector_size(kVectorBytes), may_alias, aligned(alignof(T))));
  typedef T R __attribute__((vector_size(kVectorBytes)));
  static constexpr int W = kVectorBytes / sizeof(T);
};

// B given as [N, K] (row n, column k at b[n * ld + k]) instead of [K, N].
enum class Layout { kRows, kTransposed };
enum class Start { kZero, kBias, kAccumulate };

template <typename T>
struct Product {
  int64_t m, n, k;
  const T* a;
  int64_t a_row, a_col;  // element (i, l) at a[i * a_row + l * a_col]; one of the two strides is 1
  const T* b;
  int64_t ldb;
  Layout layout;
  T* c;
  int64_t ldc;
  Start start;
  const T* bias;  // [n], with Start::kBias
  bool relu;
};

template <typename T, int MR, int NV, bool kUnitCol>
__attribute__((noinline)) void micro(
    int64_t k, const T* a, int64_t a_stride, const T* b, int64_t ldb, T* c, int64_t ldc, Start start, const T* bias,
    bool relu) {
  using V = typename Simd<T>::V;
  using R = typename Simd<T>::R;
  constexpr int W = Simd<T>::W;
  R acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) {
      acc[i][j] = start == Start::kZero   ? R{}
                  : start == Start::kBias ? R(*reinterpret_cast<const V*>(bias + j * W))
                                          : R(*reinterpret_cast<const V*>(c + i * ldc + j * W));
    }
  }
  for (int64_t l = 0; l < k; ++l) {
    R row[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) row[j] = *reinterpret_cast<const V*>(b + j * W);
    b += ldb;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const T value = kUnitCol ? a[i * a_stride] : a[i];
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) acc[i][j] += value * row[j];
    }
    a += kUnitCol ? 1 : a_stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) {
      R out = acc[i][j];
      if (relu) out = out < 0 ? R{} : out;  // NaN passes, as in torch
      *reinterpret_cast<V*>(c + i * ldc + j * W) = out;
    }
  }
}

template <typename T, int NV, bool kUnitCol, int MR>
void micro_rows(int64_t m, int64_t k, const T* a, int64_t a_stride, const T* b, int64_t ldb, T* c, int64_t ldc,
                Start start, const T* bias, bool relu) {
  if constexpr (MR == 0) {
    return;
  } else {
    if (m == MR) return micro<T, MR, NV, kUnitCol>(k, a, a_stride, b, ldb, c, ldc, start, bias, relu);
    micro_rows<T, NV, kUnitCol, MR - 1>(m, k, a, a_stride, b, ldb, c, ldc, start, bias, relu);
  }
}

// One panel of NV vectors of columns, all rows.
template <typename T, int NV, bool kUnitCol>
void panel(const Product<T>& p, const T* b, int64_t ldb, T* c, int64_t ldc, Start start, const T* bias) {
  constexpr int M = NV == 2 ? kTileM : kWideM;
  const int64_t a_row = p.a_row, stride = kUnitCol ? p.a_row : p.a_col;
  for (int64_t i = 0; i < p.m; i += M) {
    micro_rows<T, NV, kUnitCol, M>(std::min<int64_t>(M, p.m - i), p.k, p.a + i * a_row, stride, b, ldb, c + i * ldc, ldc,
                                   start, bias, p.relu);
  }
}

template <typename T>
void pack(const Product<T>& p, int64_t n0, int64_t width, T* out) {
  constexpr int64_t NR = 2 * Simd<T>::W;
  if (p.layout == Layout::kRows) {
    for (int64_t l = 0; l < p.k; ++l) {
      T* row = out + l * NR;
      std::memcpy(row, p.b + l * p.ldb + n0, width * sizeof(T));
      for (int64_t j = width; j < NR; ++j) row[j] = 0;
    }
    return;
  }
  constexpr int64_t kBlock = 16;
  for (int64_t l0 = 0; l0 < p.k; l0 += kBlock) {
    const int64_t l1 = std::min(p.k, l0 + kBlock);
    for (int64_t j = 0; j < width; ++j) {
      const T* source = p.b + (n0 + j) * p.ldb;
      for (int64_t l = l0; l < l1; ++l) out[l * NR + j] = source[l];
    }
    for (int64_t j = width; j < NR; ++j) {
      for (int64_t l = l0; l < l1; ++l) out[l * NR + j] = 0;
    }
  }
}

template <typename T, bool kUnitCol>
void product(const Product<T>& p, T* scratch) {
  constexpr int64_t W = Simd<T>::W, NR = 2 * W, kWide = 8 * W;
  int64_t n = 0;
  if (p.layout == Layout::kRows && p.m <= kWideM) {  // a few rows: read B once, long pieces at a time
    for (; n + kWide <= p.n; n += kWide) {
      panel<T, 8, kUnitCol>(p, p.b + n, p.ldb, p.c + n, p.ldc, p.start, p.bias ? p.bias + n : nullptr);
    }
  }
  for (; n + NR <= p.n; n += NR) {
    const T* bias = p.bias ? p.bias + n : nullptr;
    if (p.layout == Layout::kRows && p.m < 4 * kTileM) {
      panel<T, 2, kUnitCol>(p, p.b + n, p.ldb, p.c + n, p.ldc, p.start, bias);
    } else {
      pack(p, n, NR, scratch);
      panel<T, 2, kUnitCol>(p, scratch, NR, p.c + n, p.ldc, p.start, bias);
    }
  }
  if (n == p.n) return;
  // The last columns: B padded with zeros, C through a small tile.
  const int64_t width = p.n - n;
  pack(p, n, width, scratch);
  T bias[NR] = {}, tile[kTileM * NR];
  if (p.start == Start::kBias) std::memcpy(bias, p.bias + n, width * sizeof(T));
  Product<T> part = p;
  for (int64_t i = 0; i < p.m; i += kTileM) {
    part.m = std::min<int64_t>(kTileM, p.m - i);
    part.a = p.a + i * p.a_row;
    for (int64_t r = 0; r < part.m; ++r) {
      std::memset(tile + r * NR, 0, NR * sizeof(T));
      if (p.start == Start::kAccumulate) std::memcpy(tile + r * NR, p.c + (i + r) * p.ldc + n, width * sizeof(T));
    }
    panel<T, 2, kUnitCol>(part, scratch, NR, tile, NR, p.start, bias);
    for (int64_t r = 0; r < part.m; ++r) {
      std::memcpy(p.c + (i + r) * p.ldc + n, tile + r * NR, width * sizeof(T));
    }
  }
}

// scratch: k * 2 * W elements.
template <typename T>
void gemm(const Product<T>& p, T* scratch) {
  if (p.m == 0 || p.n == 0) return;
  if (p.a_col == 1) {
    product<T, true>(p, scratch);
  } else {
    product<T, false>(p, scratch);
  }
}

}  // namespace
}  // namespace lmvae::LMVAE_ISA
