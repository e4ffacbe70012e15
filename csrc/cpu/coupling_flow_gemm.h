// Matrix products of the coupling flow, compiled once per instruction set.
//
// Why not the BLAS that torch carries: the products here are small and skinny ([rows, 64] x [64, 512]), 30 of them
// follow each other in one pass, and each wants its bias, its ReLU or its accumulation in the epilogue. A
// register-tiled kernel that reads B as it lies needs no call overhead, no packing at batch 1, and one thread team for
// the whole flow.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vector.h"

namespace lmvae::LMVAE_ISA {
namespace {

constexpr int kTileM = by_registers(12, 6);  // rows of a register tile, times two vectors of columns
constexpr int kWideM = by_registers(3, 1);   // times eight

// A sum runs over at most kChain terms before it is added to the rest: long chains of fp32 additions lose digits. Tiles
// of rows are multiples of it, so that sums over the batch do not depend on the tiles.
constexpr int64_t kChain = 128;

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
__attribute__((noinline)) void micro(int64_t k, const T* a, int64_t a_stride, const T* b, int64_t ldb, T* c,
                                     int64_t ldc, Start start, const T* bias, bool relu) {
  constexpr int W = Lanes<T>::count;
  for (int64_t l0 = 0; l0 == 0 || l0 < k; l0 += kChain) {
    const int64_t l1 = std::min(k, l0 + kChain);
    Register<T> acc[MR][NV] = {};
    for (int64_t l = l0; l < l1; ++l) {
      if (!kUnitCol) {  // a new line of A per step, at a stride no hardware prefetcher follows
        __builtin_prefetch(a + 24 * a_stride);
        __builtin_prefetch(a + 24 * a_stride + MR - 1);
      }
      Register<T> row[NV];
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) row[j] = load(b + j * W);
      b += ldb;
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const T value = kUnitCol ? a[i * a_stride] : a[i];
#pragma GCC unroll 16
        for (int j = 0; j < NV; ++j) acc[i][j] += value * row[j];
      }
      a += kUnitCol ? 1 : a_stride;
    }
    const Start add = l0 > 0 ? Start::kAccumulate : start;
    const bool clip = relu && l1 == k;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) {
        Register<T> out = acc[i][j];
        if (add == Start::kBias) out += load(bias + j * W);
        if (add == Start::kAccumulate) out += load(c + i * ldc + j * W);
        if (clip) out = out < 0 ? Register<T>{} : out;  // NaN passes, as in torch
        store(c + i * ldc + j * W, out);
      }
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
    micro_rows<T, NV, kUnitCol, M>(std::min<int64_t>(M, p.m - i), p.k, p.a + i * a_row, stride, b, ldb, c + i * ldc,
                                   ldc, start, bias, p.relu);
  }
}

// Transposes as many rows as a vector has lanes, of that many elements.
template <typename T>
inline __attribute__((always_inline)) void transpose(const T* from, int64_t ld_from, T* to, int64_t ld_to) {
  constexpr int W = Lanes<T>::count;
  Register<T> rows[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) rows[i] = load(from + i * ld_from);
  transpose_block<T>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(to + i * ld_to, rows[i]);
}

// Columns [n0, n0 + width) of B as [k][NR], padded with zeros.
template <typename T>
void pack(const Product<T>& p, int64_t n0, int64_t width, T* out) {
  constexpr int64_t W = Lanes<T>::count, NR = 2 * W;
  if (p.layout == Layout::kRows) {
    const T* from = p.b + n0;
    if (width == NR) {
      for (int64_t l = 0; l < p.k; ++l, from += p.ldb, out += NR) {
        store(out, load(from));
        store(out + W, load(from + W));
      }
      return;
    }
    for (int64_t l = 0; l < p.k; ++l, from += p.ldb, out += NR) {
      for (int64_t j = 0; j < NR; ++j) out[j] = j < width ? from[j] : T(0);
    }
    return;
  }
  const T* from = p.b + n0 * p.ldb;
  int64_t l = 0;
  if (width == NR) {
    for (; l + W <= p.k; l += W) {
      transpose(from + l, p.ldb, out + l * NR, NR);
      transpose(from + W * p.ldb + l, p.ldb, out + l * NR + W, NR);
    }
  }
  for (; l < p.k; ++l) {
    for (int64_t j = 0; j < NR; ++j) out[l * NR + j] = j < width ? from[j * p.ldb + l] : T(0);
  }
}

template <typename T, bool kUnitCol>
void product(const Product<T>& p, T* scratch) {
  constexpr int64_t W = Lanes<T>::count, NR = 2 * W, kWide = 8 * W;
  int64_t n = 0;
  if (p.layout == Layout::kRows && p.m <= kWideM) {  // a few rows: read B once, long pieces at a time
    for (; n + kWide <= p.n; n += kWide) {
      panel<T, 8, kUnitCol>(p, p.b + n, p.ldb, p.c + n, p.ldc, p.start, p.bias ? p.bias + n : nullptr);
    }
  }
  if (!kUnitCol && p.m > p.n) {
    // A is the larger: all of B packed, and A read once, a strip of kTileM columns at a time.
    const int64_t panels = (p.n - n) / NR;
    for (int64_t j = 0; j < panels; ++j) pack(p, n + j * NR, NR, scratch + j * NR * p.k);
    Product<T> strip = p;
    for (int64_t i = 0; i < p.m; i += kTileM) {
      strip.m = std::min<int64_t>(kTileM, p.m - i);
      strip.a = p.a + i * p.a_row;
      for (int64_t j = 0; j < panels; ++j) {
        const int64_t c = n + j * NR;
        panel<T, 2, kUnitCol>(strip, scratch + j * NR * p.k, NR, p.c + i * p.ldc + c, p.ldc, p.start,
                              p.bias ? p.bias + c : nullptr);
      }
    }
    n += panels * NR;
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

// scratch: k * 2 * W elements; k * n when a_row is 1 and m > n.
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
