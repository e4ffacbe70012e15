// What latent_attention.cpp (torch's side: checks, allocation, threads) hands to latent_attention_simd.cpp and
// latent_attention_decode_simd.cpp (arithmetic, one copy an instruction set).
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace lmvae {

enum class Visibility : int64_t { Prefix = 0, Rolling = 1, Interleaved = 2 };  // order of visibility.py's VISIBILITIES

// A tensor of rows of head_dim elements, addressed by (batch, head, row); strides in elements, any sign, 0 for
// expanded.
struct Strided {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, dim = 0;
};

struct LatentAttentionArgs {
  int64_t batch, heads, kv_heads, slots, head_dim;
  const int32_t* cu_seqlens;
  Visibility visibility;
  double scale;
  int64_t window;  // cache positions; more than any sentence has: none
  double softcap;  // 0: none
  Strided q, k, v, memory_k, memory_v;
  void* out;    // dense [T, H, D]
  void* stats;  // dense [T, H, 2], fp32 or fp64: the row's largest score m and 1 / sum of exp(score - m)
  // Backward only; heads of gradients are dense in their token, those of memory all dense, and null without memory.
  Strided grad_out;
  int64_t grad_q_token, grad_kv_token;  // numbers from one token's gradients to the next one's
  void *grad_q, *grad_k, *grad_v, *grad_memory_k, *grad_memory_v;
};

struct LatentAttentionDecodeArgs {
  int64_t heads, kv_heads, head_dim;
  double scale;
  int64_t window;
  double softcap;
  Strided q, k, v;  // q has one row a head
  void* out;        // dense [B, H, D]
};

}  // namespace lmvae

// Bytes of 64-byte-aligned workspace that a thread needs for sentences of up to max_seqlen tokens.
LMVAE_DECLARE(template <typename T> int64_t latent_attention_workspace(const ::lmvae::LatentAttentionArgs& args,
                                                                       int64_t max_seqlen, bool backward))
// One pair (sentence, kv head), numbered sentence * kv_heads + kv_head. Two of them share nothing that is written, so
// results do not depend on threads. next: the pair this thread does afterwards, or -1; what it needs is fetched
// meanwhile.
LMVAE_DECLARE(template <typename T> void latent_attention_fwd(const ::lmvae::LatentAttentionArgs& args, int64_t pair,
                                                              int64_t next, void* workspace))
LMVAE_DECLARE(template <typename T> void latent_attention_bwd(const ::lmvae::LatentAttentionArgs& args, int64_t pair,
                                                              int64_t next, void* workspace))
LMVAE_DECLARE(
    template <typename T> int64_t latent_attention_decode_workspace(const ::lmvae::LatentAttentionDecodeArgs& args))
LMVAE_DECLARE(template <typename T> void latent_attention_decode(const ::lmvae::LatentAttentionDecodeArgs& args,
                                                                 int64_t b, int64_t kv_head, int64_t length,
                                                                 void* workspace))
