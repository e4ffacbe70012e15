// The products of latent_kv over one chunk: on vectors, as they are compiled for each instruction set, or handed to the
// AMX tiles where operands fit them.
#pragma once

#include <algorithm>

#include "latent_kv.h"
#include "simd_math.h"

namespace lmvae::LMVAE_ISA {
namespace {

constexpr int kRowBlock = by_registers(8, 4);  // rows x 2 vectors of accumulators stay in registers

// Cache lines asked for ahead of their use, one for every second step of a product, into the first or the second level.
template <int level>
struct PrefetchTo {
  const char *next = nullptr, *end = nullptr;
  __attribute__((always_inline)) void one() {
    __builtin_prefetch(next, 0, level == 1 ? 3 : 2);
    next = next + 64 < end ? next + 64 : end;
  }
};

// C[i][j] (+)= sum_k A[i * ai + k * ak] * B[k * ldb + j] for I rows and J vectors.
template <typename T, int I, int J, bool add, typename Ahead>
LMVAE_INLINE void product_block(const T* a, int64_t ai, int64_t ak, const T* b, int64_t ldb, T* c, int64_t ldc,
                                int64_t depth, Ahead& ahead) {
  constexpr int64_t V = Lanes<T>::count;
  Register<T> sum[I][J];
#pragma GCC unroll 8
  for (int i = 0; i < I; i++)
#pragma GCC unroll 2
    for (int j = 0; j < J; j++) sum[i][j] = Register<T>{};
  auto step = [&](int64_t k) __attribute__((always_inline)) {
    Register<T> row[J];
#pragma GCC unroll 2
    for (int j = 0; j < J; j++) row[j] = load(b + k * ldb + j * V);
#pragma GCC unroll 8
    for (int i = 0; i < I; i++) {
      const T x = a[i * ai + k * ak];
#pragma GCC unroll 2
      for (int j = 0; j < J; j++) sum[i][j] += x * row[j];
    }
  };
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2) {
    ahead.one();
    step(k);
    step(k + 1);
  }
  if (k < depth) step(k);
#pragma GCC unroll 8
  for (int i = 0; i < I; i++)
#pragma GCC unroll 2
    for (int j = 0; j < J; j++) {
      T* p = c + i * ldc + j * V;
      store(p, add ? load(p) + sum[i][j] : sum[i][j]);
    }
}

// A sum over nz is made of sums of this many terms: its rounding error then grows as that of a blocked BLAS.
constexpr int64_t kDepth = 64;

template <typename T, int I, int J, bool add, typename Ahead>
LMVAE_INLINE void product_deep(const T* a, int64_t ai, int64_t ak, const T* b, int64_t ldb, T* c, int64_t ldc,
                               int64_t depth, Ahead& ahead) {
  product_block<T, I, J, add>(a, ai, ak, b, ldb, c, ldc, std::min(depth, kDepth), ahead);
  for (int64_t k = kDepth; k < depth; k += kDepth)
    product_block<T, I, J, true>(a + k * ak, ai, ak, b + k * ldb, ldb, c, ldc, std::min(depth - k, kDepth), ahead);
}

// The same for m rows and n columns, n a multiple of the vector.
template <typename T, bool add, typename Ahead>
void product(const T* a, int64_t ai, int64_t ak, int64_t m, const T* b, int64_t ldb, int64_t n, T* c, int64_t ldc,
             int64_t depth, Ahead& ahead) {
  constexpr int64_t V = Lanes<T>::count;
  int64_t j = 0;
  for (; j + 2 * V <= n; j += 2 * V) {
    int64_t i = 0;
    for (; i + kRowBlock <= m; i += kRowBlock)
      product_deep<T, kRowBlock, 2, add>(a + i * ai, ai, ak, b + j, ldb, c + i * ldc + j, ldc, depth, ahead);
    for (; i < m; i++) product_deep<T, 1, 2, add>(a + i * ai, ai, ak, b + j, ldb, c + i * ldc + j, ldc, depth, ahead);
  }
  if (j < n) {
    int64_t i = 0;
    for (; i + kRowBlock <= m; i += kRowBlock)
      product_deep<T, kRowBlock, 1, add>(a + i * ai, ai, ak, b + j, ldb, c + i * ldc + j, ldc, depth, ahead);
    for (; i < m; i++) product_deep<T, 1, 1, add>(a + i * ai, ai, ak, b + j, ldb, c + i * ldc + j, ldc, depth, ahead);
  }
}

// dst[j][i] = src[i][j]; m and n are multiples of the vector.
template <typename T>
void transpose(const T* src, int64_t ld_src, T* dst, int64_t ld_dst, int64_t m, int64_t n) {
  constexpr int V = Lanes<T>::count;
  for (int64_t i = 0; i < m; i += V)
    for (int64_t j = 0; j < n; j += V) {
      Register<T> r[V];
#pragma GCC unroll 16
      for (int l = 0; l < V; l++) r[l] = load(src + (i + l) * ld_src + j);
      transpose_block<T>(r);
#pragma GCC unroll 16
      for (int l = 0; l < V; l++) store(dst + (j + l) * ld_dst + i, r[l]);
    }
}

struct Chunk {
  int64_t layer, side, head, slot, row;  // row: within the run
  int64_t n;                             // rows
  int64_t flat;                          // first row within its (layer, side)
  Chunk(const KvRows& r, int64_t index) {
    const int64_t part = index % r.chunks_per_run;
    const int64_t run = index / r.chunks_per_run, runs = r.rows() / r.run;
    layer = run / runs / 2;
    side = run / runs % 2;
    row = part * r.chunk;
    n = std::min(r.chunk, r.run - row);
    flat = run % runs * r.run + row;
    const int64_t first = run % runs * r.run / r.dim;  // (head, slot) of the run's first row
    head = first / r.slots;
    slot = first % r.slots;
  }
  int64_t at(const KvTensor& t, int64_t batch) const {
    const int64_t* s = t.stride;
    return layer * s[0] + side * s[1] + batch * s[2] + head * s[3] + slot * s[4] + row * s[5];
  }
  int64_t group() const { return layer * 2 + side; }
};

// What a call on the tiles may use: operands behind `turned`, which has kKvChunk rows of the batch.
template <typename T>
char* operands(const KvBackward& a, T* turned) {
  return reinterpret_cast<char*>(turned + kKvChunk * a.batch_padded);
}

// tile [n][panel] = w z for n rows of weights of bf16 from element `where` on, on the AMX tiles.
template <typename T>
void tile_of_memory(const KvForward& a, int64_t where, int64_t n, int64_t panel, T* tile) {
  if constexpr (std::is_same_v<T, float>)
    kv_tile_forward(static_cast<const uint16_t*>(a.weight.data) + where, a.weight.stride[5], n, a.rows.nz,
                    a.tiles + panel * (a.rows.nz / kKvTile) * kKvTileBlock, tile);
}

// gram (+)= g g^T, of gradients [batch_padded][kKvChunk].
template <typename T>
void add_gram(const KvBackward& a, const Chunk& c, const T* g, T* turned) {
  transpose(g, kKvChunk, turned, a.gram_padded, a.gram_padded, kKvChunk);
  if constexpr (std::is_same_v<T, float>)
    if (a.on_tiles) return kv_tile_gram(g, turned, a.batch_padded, static_cast<float*>(a.gram), operands(a, turned));
  PrefetchTo<2> none;
  product<T, true>(g, kKvChunk, 1, a.rows.batch, turned, a.gram_padded, a.gram_padded, static_cast<T*>(a.gram),
                   a.gram_padded, c.n, none);
}

// A tile of the weight's gradient, [kKvChunk][nz_padded], of the chunk's gradients [batch_padded][kKvChunk].
template <typename T, typename Ahead>
void weight_tile(const KvBackward& a, const Chunk& c, const T* g, T* tile, T* turned, Ahead& ahead) {
  if constexpr (std::is_same_v<T, float>)
    if (a.tiles != nullptr) {
      transpose(g, kKvChunk, turned, a.batch_padded, a.batch_padded, kKvChunk);
      if (kv_tile_product(turned, a.tiles, a.batch_padded, a.nz_padded, tile, operands(a, turned))) return;
    }
  product<T, false>(g, 1, kKvChunk, c.n, static_cast<const T*>(a.z), a.nz_padded, a.nz_padded, tile, a.nz_padded,
                    a.rows.batch, ahead);
}

}  // namespace
}  // namespace lmvae::LMVAE_ISA
