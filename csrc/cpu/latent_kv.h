// What latent_kv.cpp (checks, allocation, threads) hands to latent_kv_simd.cpp (arithmetic).
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace lmvae {

enum class KvType : int { F64, F32, F16, BF16 };

// A tensor over (layer, side, batch, head, slot, row of the head): element strides in that order. Side 0 is K, 1 is V.
// The weight and the optimizer's moments have batch stride 0, and nz contiguous elements at each index.
struct KvTensor {
  void* data = nullptr;
  KvType type = KvType::F32;
  int64_t stride[6] = {};
};

// The rows (head, slot, dim) of one (layer, side), cut into chunks along which every tensor has one stride.
struct KvRows {
  int64_t layers, heads, slots, dim, nz, batch;
  int64_t run;    // rows after which a tensor's stride may change: dim, slots * dim or heads * slots * dim
  int64_t chunk;  // rows of a chunk, at most kKvChunk; the last one of a run may be shorter
  int64_t chunks_per_run;
  int64_t rows() const { return heads * slots * dim; }
  int64_t chunks() const { return run == 0 ? 0 : layers * 2 * (rows() / run) * chunks_per_run; }
};

constexpr int64_t kKvChunk = 64;

struct KvDropout {
  const uint64_t* bits = nullptr;  // [layers * 2 * batch][words], one for each element that is kept; null: no dropout
  int64_t words = 0, batch = 0;
  double scale = 1.0;
};

struct KvForward {
  KvRows rows;
  KvTensor weight, memory;
  const void* bias;    // dense [layers, 2, rows], of the weight's type; may be null
  const void* panels;  // z transposed and cut into panels of `panel` columns: [panels][nz][panel]; accumulation type
  int64_t panel;
  KvDropout dropout;
  const char* tiles = nullptr;  // a panel after another for kv_tile_forward, if the product goes by it
};

struct KvGrad {  // gradient of one forward's memory
  KvTensor tensor;
  int64_t batch;
  KvDropout dropout;
};

struct KvAdamW {
  double clip, lr, beta1, beta2, eps, decay;  // decay = 1 - lr * weight_decay
  double step_size, sqrt_bias2;               // lr / (1 - beta1^step), sqrt(1 - beta2^step)
};

enum class KvSink : int { None, Store, AdamW, Norm };  // what becomes of a tile of the weight's gradient

struct KvBackward {
  KvRows rows;  // batch: the sum over all gradients
  const KvGrad* grads;
  int64_t num_grads;
  int64_t batch_padded;  // up to a multiple of kv_rows_block
  int64_t nz_padded;     // up to a multiple of the vector
  const void* z;         // [batch, nz_padded], accumulation type, zero in the padding
  KvTensor weight;       // read for dz, written by AdamW
  void* dz;              // this task's partial sums [batch_padded, nz_padded], accumulation type; null: not wanted
  void* gram;            // this task's partial sums [batch_padded, gram_padded] of G G^T; null: not wanted
  int64_t gram_padded;
  void* dbias;  // dense [layers, 2, rows] of the weight's type; null: not wanted
  KvSink sink;
  KvTensor dweight, exp_avg, exp_avg_sq;
  KvAdamW adamw;
  double* norm;                 // this task's partial sum of squares
  bool on_tiles = false;        // gradients are multiplied there, and lack the dropout's scale, which z has
  double unscaled = 1.0;        // that scale, for what z is no factor of
  const char* tiles = nullptr;  // z for kv_tile_product
};

// Products on the AMX tiles, for weights and for memory's gradients of bf16: 32 is the side of one. What returns false
// has met an infinite number or NaN, which have no parts, and its product has to be made otherwise. Latents are
// operands of three parts, [columns / 32][rows / 32] blocks of kKvTileBlock bytes, from [rows, columns] fp32:
// kv_tile_latents.
constexpr int64_t kKvTile = 32, kKvTileBlock = 3 * 2 * kKvTile * kKvTile;
bool kv_have_tiles();
void kv_tile_latents(const float* z, int64_t rows, int64_t columns, char* parts);
// tile [rows, 32] = w [rows, nz] z for weights of bf16 and z [nz, 32] that bf16 has; rows a multiple of 16, nz of 32.
void kv_tile_forward(const uint16_t* w, int64_t ldw, int64_t rows, int64_t nz, const char* latents, float* tile);
// tile [kKvChunk, columns] = g [kKvChunk, batch] z, as exact as fp32; room: 2 * kKvChunk * batch bytes.
bool kv_tile_product(const float* g, const char* latents, int64_t batch, int64_t columns, float* tile, char* room);
// gram [batch, batch] += g g^T, of g [batch, kKvChunk] and of g turned around; room: 4 * kKvChunk * batch bytes.
void kv_tile_gram(const float* g, const float* turned, int64_t batch, float* gram, char* room);

}  // namespace lmvae

// Elements of scratch (accumulation type, 64-byte aligned) that one task needs.
LMVAE_DECLARE(template <typename T> int64_t kv_forward_scratch(const ::lmvae::KvForward& a))
LMVAE_DECLARE(template <typename T> int64_t kv_backward_scratch(const ::lmvae::KvBackward& a))
LMVAE_DECLARE(template <typename T> int64_t kv_vector())  // lanes of a vector
LMVAE_DECLARE(template <typename T> void kv_forward_chunks(const ::lmvae::KvForward& a, void* scratch, int64_t begin,
                                                           int64_t end))
LMVAE_DECLARE(template <typename T> void kv_backward_chunks(const ::lmvae::KvBackward& a, void* scratch, int64_t begin,
                                                            int64_t end))
