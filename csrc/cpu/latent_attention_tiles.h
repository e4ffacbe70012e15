// The two matrix products that latent attention is made of, as register tiles over explicit vectors, and a
// transposition.
//
// Scores are kept transposed: row n is a key, lane r a query. A softmax over keys is then vertical (no horizontal
// reduction, no masking of vector tails), and each product needs one operand broadcast from memory and one as vectors:
//   dots:   S[n][r]  = sum_d K[n][d] * Qt[d][r]           reduction over head_dim
//   outer:  C[a][d] (+)= sum_i P[a, i] * B[i][d]            O, dQ (a = query, i = key) and dK, dV (a = key, i = query)
#pragma once

#include "simd_math.h"

namespace lmvae::LMVAE_ISA {

// Sums of a register tile.
constexpr int kOuterRows = by_registers(6, 4), kOuterVecs = by_registers(4, 2), kDotTile = by_registers(16, 8);

// ---- fetching ahead -------------------------------------------------------------------------------------------------

// Blocks of memory that will be needed soon. A register tile asks for as many lines as it has steps and touches one in
// each, so that what comes from far away is on its way while there is work; the hardware does not foresee where the
// next pair lies.
class Ahead {
 public:
  struct Lines {
    const char* at;
    int64_t count;
    bool write;
    void fetch(int64_t n) const {
      if (n >= count) return;
      prefetch_line(at + n * kLine, write);
    }
  };
  void add(const void* first, int64_t bytes, bool write) {
    if (count_ < kBlocks && bytes > 0)
      block_[count_++] = {static_cast<const char*>(first), (bytes + kLine - 1) / kLine, write};
  }
  Lines take(int64_t lines) {
    if (next_ == count_) return {nullptr, 0, false};
    Lines& block = block_[next_];
    const Lines out = {block.at, std::min(lines, block.count), block.write};
    block.at += out.count * kLine;
    block.count -= out.count;
    if (block.count == 0) next_++;
    return out;
  }

 private:
  static constexpr int kBlocks = 4;
  static constexpr int64_t kLine = 64;
  Lines block_[kBlocks] = {};
  int count_ = 0, next_ = 0;
};

// ---- dots -----------------------------------------------------------------------------------------------------------

// s[n][r] = sum_d k[n][d] qt[d][r] for n < KN. Where a tile has too few sums to hide the latency of an addition, each
// is split in two.
template <typename A, int QV, int KN>
static void dots_tile(const A* k, int64_t ldk, const A* qt, int64_t d_count, A* s, Ahead& ahead) {
  constexpr int L = Lanes<A>::count, W = QV * L, C = KN * QV <= 4 ? 2 : 1;
  Vec<A> acc[C][KN][QV] = {};
  const Ahead::Lines lines = ahead.take(d_count / C);
  int64_t d = 0;
  for (; d + C <= d_count; d += C) {
    lines.fetch(d / C);
#pragma GCC unroll 2
    for (int c = 0; c < C; c++) {
      Vec<A> q[QV];
#pragma GCC unroll 2
      for (int v = 0; v < QV; v++) q[v] = load(qt + (d + c) * W + v * L);
#pragma GCC unroll 16
      for (int n = 0; n < KN; n++) {
        const Vec<A> x = splat(k[n * ldk + d + c]);
#pragma GCC unroll 2
        for (int v = 0; v < QV; v++) acc[c][n][v] += x * q[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < KN; n++) {
#pragma GCC unroll 2
    for (int v = 0; v < QV; v++) {
      Vec<A> sum = acc[0][n][v];
      if constexpr (C == 2) {
        sum += acc[1][n][v];
        if (d < d_count) sum += splat(k[n * ldk + d]) * load(qt + d * W + v * L);
      }
      store(s + n * W + v * L, sum);
    }
  }
}

template <typename A, int QV, int KN = kDotTile / QV>
static void dots_rows(int64_t rows, const A* k, int64_t ldk, const A* qt, int64_t d_count, A* s, Ahead& ahead) {
  if (rows == KN) return dots_tile<A, QV, KN>(k, ldk, qt, d_count, s, ahead);
  if constexpr (KN > 1) dots_rows<A, QV, KN - 1>(rows, k, ldk, qt, d_count, s, ahead);
}

// How many rows each of the fewest tiles of at most `most` rows takes that cover `rows`: 13 by 6 -> 5 (5 + 5 + 3).
LMVAE_INLINE int64_t even_step(int64_t rows, int64_t most) {
  const int64_t calls = (rows + most - 1) / most;
  return calls > 1 ? (rows + calls - 1) / calls : rows;
}

// s[n][r] = sum_d k[n][d] qt[d][r] for n < count; rows of qt and s are QV vectors wide.
template <typename A, int QV>
static void dots(const A* k, int64_t ldk, int64_t count, const A* qt, int64_t d_count, A* s, Ahead& ahead) {
  const int64_t step = even_step(count, kDotTile / QV);
  for (int64_t n = 0; n < count; n += step)
    dots_rows<A, QV>(std::min(step, count - n), k + n * ldk, ldk, qt, d_count, s + n * QV * Lanes<A>::count, ahead);
}

// ---- outer ----------------------------------------------------------------------------------------------------------

template <typename A, int RN, int DV>
static void outer_tile(const A* p, int64_t pa, int64_t pi, const A* b, int64_t ldb, int64_t count, bool add, A* c,
                       int64_t ldc) {
  constexpr int L = Lanes<A>::count;
  Vec<A> acc[RN][DV] = {};  // from zero, then added to c: sums of blocks round less than one long chain
  for (int64_t i = 0; i < count; i++) {
    Vec<A> x[DV];
#pragma GCC unroll 4
    for (int v = 0; v < DV; v++) x[v] = load(b + i * ldb + v * L);
#pragma GCC unroll 8
    for (int a = 0; a < RN; a++) {
      const Vec<A> w = splat(p[a * pa + i * pi]);
#pragma GCC unroll 4
      for (int v = 0; v < DV; v++) acc[a][v] += w * x[v];
    }
  }
#pragma GCC unroll 8
  for (int a = 0; a < RN; a++)
#pragma GCC unroll 4
    for (int v = 0; v < DV; v++) {
      A* at = c + a * ldc + v * L;
      store(at, add ? load(at) + acc[a][v] : acc[a][v]);
    }
}

template <typename A, int RN, int DV>
static void outer_columns(const A* p, int64_t pa, int64_t pi, const A* b, int64_t ldb, int64_t count, bool add, A* c,
                          int64_t ldc, int64_t vecs) {
  constexpr int L = Lanes<A>::count;
  int64_t v = 0;
  for (; v + DV <= vecs; v += DV) outer_tile<A, RN, DV>(p, pa, pi, b + v * L, ldb, count, add, c + v * L, ldc);
  if constexpr (DV > 1) {
    if (v < vecs) outer_columns<A, RN, DV / 2>(p, pa, pi, b + v * L, ldb, count, add, c + v * L, ldc, vecs - v);
  }
}

// c[a][d] (+)= sum_i p[a * pa + i * pi] b[i][d] for a < rows <= kOuterRows, i < count, d < vecs vectors.
template <typename A, int RN = kOuterRows>
static void outer(int64_t rows, const A* p, int64_t pa, int64_t pi, const A* b, int64_t ldb, int64_t count, bool add,
                  A* c, int64_t ldc, int64_t vecs) {
  if (rows == RN) return outer_columns<A, RN, kOuterVecs>(p, pa, pi, b, ldb, count, add, c, ldc, vecs);
  if constexpr (RN > 1) outer<A, RN - 1>(rows, p, pa, pi, b, ldb, count, add, c, ldc, vecs);
}

// ---- transposition --------------------------------------------------------------------------------------------------

// xt[d][r] = factor * x[r][d] for r < rows and 0 for rows <= r < width (a multiple of the lanes), d < d_count; a row of
// x has d_count rounded up to whole vectors.
template <typename A>
static void transpose(const A* x, int64_t ldx, int64_t rows, int64_t width, int64_t d_count, A factor, A* xt) {
  constexpr int L = Lanes<A>::count;
  for (int64_t d = 0; d < d_count; d += L)
    for (int64_t r = 0; r < width; r += L) {
      Vec<A> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) block[i] = r + i < rows ? load(x + (r + i) * ldx + d) * factor : Vec<A>{};
      transpose_block<A>(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) store(xt + (d + i) * width + r, block[i]);
    }
}

}  // namespace lmvae::LMVAE_ISA
