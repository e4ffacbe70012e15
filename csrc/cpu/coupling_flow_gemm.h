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

#include "coupling_flow.h"
#include "vector.h"

namespace lmvae::LMVAE_ISA {
namespace {

constexpr int kTileM = by_registers(12, 6);  // rows of a register tile, times two vectors of columns
constexpr int kWideM = by_registers(3, 1);   // times eight

using flow::kChain;

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
  const T* bias = nullptr;  // [n], with Start::kBias
  bool relu = false;
  const T* gate = nullptr;  // laid out as c: where it is not above zero, the result is zero (the gradient of a ReLU)
  T* sums = nullptr;        // [n]: also the sums of B's columns, added to what is there unless start is kZero
};

// What becomes of a tile's sums over a chain of terms: c = gate(relu(sums + [c or bias])).
template <typename T>
struct Finish {
  T* c;
  int64_t ldc;
  Start start;
  const T *bias, *gate;
  bool relu;
  Finish at(int64_t row, int64_t column) const {
    const int64_t offset = row * ldc + column;
    return {c + offset, ldc, start, bias ? bias + column : nullptr, gate ? gate + offset : nullptr, relu};
  }
};

// One tile, over at most kChain terms.
template <typename T, int MR, int NV, bool kUnitCol>
__attribute__((noinline)) void micro(int64_t k, const T* a, int64_t a_stride, const T* b, int64_t ldb,
                                     const Finish<T>& to) {
  constexpr int W = Lanes<T>::count;
  T* const c = to.c;
  const T *const bias = to.bias, *const gate = to.gate;
  const int64_t ldc = to.ldc;
  const Start start = to.start;
  const bool relu = to.relu;
  Register<T> acc[MR][NV] = {};
  for (int64_t l = 0; l < k; ++l) {
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
  // One kind of work at a time on all sums, which stay in registers.
  auto each = [&](const auto& work) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) work(acc[i][j], i, j);
    }
  };
  if (start == Start::kBias) each([&](Register<T>& x, int, int j) { x += load(bias + j * W); });
  if (start == Start::kAccumulate) each([&](Register<T>& x, int i, int j) { x += load(c + i * ldc + j * W); });
  if (relu) each([&](Register<T>& x, int, int) { x = x < 0 ? Register<T>{} : x; });  // NaN passes, as in torch
  if (gate) {
    each([&](Register<T>& x, int i, int j) { x = load(gate + i * ldc + j * W) <= 0 ? Register<T>{} : x; });
  }
  each([&](Register<T>& x, int i, int j) { store(c + i * ldc + j * W, Vec<T>(x)); });
}

template <typename T, int NV, bool kUnitCol, int MR>
void micro_rows(int64_t m, int64_t k, const T* a, int64_t a_stride, const T* b, int64_t ldb, const Finish<T>& to) {
  if constexpr (MR == 0) {
    return;
  } else {
    if (m == MR) return micro<T, MR, NV, kUnitCol>(k, a, a_stride, b, ldb, to);
    micro_rows<T, NV, kUnitCol, MR - 1>(m, k, a, a_stride, b, ldb, to);
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

// Rows [l0, l0 + k) and columns [n0, n0 + width) of B as [k][NR], padded with zeros.
template <typename T>
void pack(const Product<T>& p, int64_t l0, int64_t k, int64_t n0, int64_t width, T* out) {
  constexpr int64_t W = Lanes<T>::count, NR = 2 * W;
  constexpr int64_t kAhead = 16;  // rows, at a stride no hardware prefetcher follows
  if (p.layout == Layout::kRows) {
    const T* from = p.b + l0 * p.ldb + n0;
    if (width == NR) {
      for (int64_t l = 0; l < k; ++l, from += p.ldb, out += NR) {
        __builtin_prefetch(from + kAhead * p.ldb);
        __builtin_prefetch(from + kAhead * p.ldb + NR - 1);
        store(out, load(from));
        store(out + W, load(from + W));
      }
      return;
    }
    for (int64_t l = 0; l < k; ++l, from += p.ldb, out += NR) {
      for (int64_t j = 0; j < NR; ++j) out[j] = j < width ? from[j] : T(0);
    }
    return;
  }
  const T* from = p.b + n0 * p.ldb + l0;
  int64_t l = 0;
  if (width == NR) {
    for (; l + W <= k; l += W) {
      const T* next = l + 2 * W <= k ? from + l + W : from + NR * p.ldb;
      for (int64_t j = 0; j < NR; ++j) __builtin_prefetch(next + j * p.ldb);
      transpose(from + l, p.ldb, out + l * NR, NR);
      transpose(from + W * p.ldb + l, p.ldb, out + l * NR + W, NR);
    }
  }
  for (; l < k; ++l) {
    for (int64_t j = 0; j < NR; ++j) out[l * NR + j] = j < width ? from[j * p.ldb + l] : T(0);
  }
}

// The sums of a packed panel's columns.
template <typename T>
void panel_sums(const T* packed, int64_t k, int64_t width, bool first, T* sums) {
  constexpr int64_t W = Lanes<T>::count, NR = 2 * W;
  Register<T> sum[2] = {};
  for (int64_t l = 0; l < k; ++l, packed += NR) {
    sum[0] += load(packed);
    sum[1] += load(packed + W);
  }
  T lanes[NR];
  store(lanes, sum[0]);
  store(lanes + W, sum[1]);
  for (int64_t j = 0; j < width; ++j) sums[j] = first ? lanes[j] : sums[j] + lanes[j];
}

// The last columns, fewer than a panel: B padded with zeros, C through a small tile.
template <typename T, bool kUnitCol>
void last_columns(int64_t m, int64_t k, int64_t width, const T* a, int64_t a_stride, const T* b, const Finish<T>& to) {
  constexpr int64_t NR = 2 * Lanes<T>::count;
  T bias[NR] = {}, tile[kTileM * NR], gate[kTileM * NR] = {};
  if (to.start == Start::kBias) std::memcpy(bias, to.bias, width * sizeof(T));
  for (int64_t r = 0; r < m; ++r) {
    std::memset(tile + r * NR, 0, NR * sizeof(T));
    if (to.start == Start::kAccumulate) std::memcpy(tile + r * NR, to.c + r * to.ldc, width * sizeof(T));
    if (to.gate) std::memcpy(gate + r * NR, to.gate + r * to.ldc, width * sizeof(T));
  }
  const Finish<T> small{tile, NR, to.start, bias, to.gate ? gate : nullptr, to.relu};
  micro_rows<T, 2, kUnitCol, kTileM>(m, k, a, a_stride, b, NR, small);
  for (int64_t r = 0; r < m; ++r) std::memcpy(to.c + r * to.ldc, tile + r * NR, width * sizeof(T));
}

// A chain of terms at a time: what is packed of B, and a strip of A, stay in the nearest cache.
template <typename T, bool kUnitCol>
void product(const Product<T>& p, T* scratch) {
  constexpr int64_t W = Lanes<T>::count, NR = 2 * W, kWide = 8 * W;
  const bool wide =
      p.layout == Layout::kRows && p.m <= kWideM && !p.sums;  // a few rows: read B once, long pieces at a time
  const bool in_place = p.layout == Layout::kRows && p.m < 4 * kTileM && !p.sums;
  const int64_t narrow = wide ? p.n / kWide * kWide : 0;  // where panels of two vectors begin
  const int64_t terms = std::max<int64_t>(1, p.k), stride = kUnitCol ? p.a_row : p.a_col;
  auto finish = [&](int64_t l0) {
    const bool last = l0 + kChain >= p.k;
    const Start start = l0 > 0 ? Start::kAccumulate : p.start;
    return Finish<T>{p.c, p.ldc, start, p.bias, last ? p.gate : nullptr, p.relu && last};
  };
  for (int64_t n = 0; n < narrow; n += kWide) {
    for (int64_t l0 = 0; l0 < terms; l0 += kChain) {
      micro_rows<T, 8, kUnitCol, kWideM>(p.m, std::min(kChain, p.k - l0), p.a + l0 * p.a_col, stride,
                                         p.b + l0 * p.ldb + n, p.ldb, finish(l0).at(0, n));
    }
  }
  for (int64_t l0 = 0; l0 < terms; l0 += kChain) {
    const int64_t k = std::min(kChain, p.k - l0);
    const Finish<T> to = finish(l0);
    // Columns [n, n + NR) of rows [i0, i1).
    auto tiles = [&](int64_t n, int64_t i0, int64_t i1, const T* b, int64_t ldb) {
      for (int64_t i = i0; i < i1; i += kTileM) {
        const int64_t rows = std::min<int64_t>(kTileM, p.m - i), width = p.n - n;
        const T* a = p.a + i * p.a_row + l0 * p.a_col;
        if (width >= NR) {
          micro_rows<T, 2, kUnitCol, kTileM>(rows, k, a, stride, b, ldb, to.at(i, n));
        } else {
          last_columns<T, kUnitCol>(rows, k, width, a, stride, b, to.at(i, n));
        }
      }
    };
    auto packed = [&](int64_t n, T* out) {
      const int64_t width = std::min(NR, p.n - n);
      pack(p, l0, k, n, width, out);
      if (p.sums) panel_sums(out, k, width, to.start != Start::kAccumulate, p.sums + n);
    };
    // A large A is read once and a large C written once, in the order of its rows: a strip at a time past a block of B.
    if ((!kUnitCol && p.m > p.n) || (p.m >= flow::kManyRows && p.k <= kChain)) {
      for (int64_t n0 = narrow; n0 < p.n; n0 += flow::kBlock<T>) {
        const int64_t n1 = std::min(p.n, n0 + flow::kBlock<T>);
        for (int64_t n = n0; n < n1; n += NR) packed(n, scratch + (n - n0) * k);
        for (int64_t i = 0; i < p.m; i += kTileM) {
          for (int64_t n = n0; n < n1; n += NR) tiles(n, i, i + 1, scratch + (n - n0) * k, NR);
        }
      }
      continue;
    }
    for (int64_t n = narrow; n < p.n; n += NR) {
      if (in_place && p.n - n >= NR) {
        tiles(n, 0, p.m, p.b + l0 * p.ldb + n, p.ldb);
      } else {
        packed(n, scratch);
        tiles(n, 0, p.m, scratch, NR);
      }
    }
  }
}

// scratch: flow::product_scratch.
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
