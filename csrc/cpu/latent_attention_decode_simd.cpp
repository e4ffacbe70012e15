// One decoding step of one (row, kv head): each key and value is read once, for all query heads that share it. Keys
// come in blocks; a block of the accumulation type with dense rows is used where it lies, any other is converted first.
#include "latent_attention.h"
#include "latent_attention_tiles.h"

#include <limits>
#include <type_traits>

namespace lmvae::LMVAE_ISA {
namespace {

constexpr int64_t kBlock = 64;  // keys at a time: 16 KB of float rows of 64

template <typename A>
LMVAE_INLINE A lane_sum(Vec<A> x) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int l = 0; l < Lanes<A>::count; l++) sum += x[l];
  return sum;
}

template <typename T>
struct Block {
  using A = acc_t<T>;
  const A* rows;
  int64_t pitch;

  // Keys or values [from, from + count) of one (row, kv head), each readable up to `padded` elements when converted.
  Block(const T* x, const Strided& s, int64_t from, int64_t count, int64_t head_dim, int64_t padded, A* room) {
    if constexpr (std::is_same_v<T, A>) {
      if (s.dim == 1 && head_dim == padded) {
        rows = x + from * s.row;
        pitch = s.row;
        return;
      }
    }
    for (int64_t n = 0; n < count; n++) {
      load_row(x + (from + n) * s.row, s.dim, room + n * padded, head_dim);
      for (int64_t d = head_dim; d < padded; d++) room[n * padded + d] = 0;
    }
    rows = room;
    pitch = padded;
  }
};

int64_t padded_dim(int64_t head_dim, int64_t lanes) { return (head_dim + lanes - 1) / lanes * lanes; }

}  // namespace

template <typename T>
int64_t latent_attention_decode_workspace(const LatentAttentionDecodeArgs& a) {
  using A = acc_t<T>;
  const int64_t group = a.heads / a.kv_heads, pitch = padded_dim(a.head_dim, Lanes<A>::count);
  return (2 * group * pitch + kBlock * pitch + padded_dim(group * kBlock, 16) + 2 * padded_dim(group, 16)) * sizeof(A);
}

template <typename T>
void latent_attention_decode(const LatentAttentionDecodeArgs& a, int64_t b, int64_t kv_head, int64_t length,
                             void* workspace) {
  using A = acc_t<T>;
  constexpr int L = Lanes<A>::count;
  const int64_t D = a.head_dim, group = a.heads / a.kv_heads, pitch = padded_dim(D, L), vecs = pitch / L;
  A* q = static_cast<A*>(workspace);
  A* out = q + group * pitch;
  A* room = out + group * pitch;
  A* p = room + kBlock * pitch;  // [group][kBlock]
  A* largest = p + padded_dim(group * kBlock, 16);
  A* sum = largest + padded_dim(group, 16);

  const A scale = static_cast<A>(a.scale), none = -std::numeric_limits<A>::infinity();
  for (int64_t g = 0; g < group; g++) {
    load_row(static_cast<const T*>(a.q.data) + b * a.q.batch + (kv_head * group + g) * a.q.head, a.q.dim, q + g * pitch,
             D);
    for (int64_t d = 0; d < pitch; d++) q[g * pitch + d] = d < D ? q[g * pitch + d] * scale : A(0);
    largest[g] = none;
    sum[g] = 0;
  }
  std::fill_n(out, group * pitch, A(0));

  const T* keys = static_cast<const T*>(a.k.data) + b * a.k.batch + kv_head * a.k.head;
  const T* values = static_cast<const T*>(a.v.data) + b * a.v.batch + kv_head * a.v.head;
  for (int64_t from = std::max<int64_t>(0, length - a.window); from < length; from += kBlock) {
    const int64_t count = std::min(kBlock, length - from);
    const Block<T> k(keys, a.k, from, count, D, pitch, room);
    for (int64_t n = 0; n < count; n++) {
      const A* key = k.rows + n * k.pitch;
      for (int64_t g = 0; g < group; g++) {
        Vec<A> even = {}, odd = {};
        int64_t v = 0;
        for (; v + 2 <= vecs; v += 2) {
          even += load(q + g * pitch + v * L) * load(key + v * L);
          odd += load(q + g * pitch + (v + 1) * L) * load(key + (v + 1) * L);
        }
        if (v < vecs) even += load(q + g * pitch + v * L) * load(key + v * L);
        p[g * kBlock + n] = lane_sum<A>(even + odd);
      }
    }
    for (int64_t g = 0; g < group; g++) {
      A* s = p + g * kBlock;
      if (a.softcap > 0)
        for (int64_t n = 0; n < count; n++)
          s[n] = static_cast<A>(a.softcap) * std::tanh(s[n] / static_cast<A>(a.softcap));
      A m = largest[g];
      for (int64_t n = 0; n < count; n++) m = s[n] > m ? s[n] : m;
      const A base = m == none ? A(0) : m, rescale = exp_(largest[g] - base);
      largest[g] = m;
      A total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t n = 0; n < count; n++) {
        s[n] = exp_(s[n] - base);
        total += s[n];
      }
      sum[g] = sum[g] * rescale + total;
      for (int64_t d = 0; d < pitch; d++) out[g * pitch + d] *= rescale;
    }
    const Block<T> v(values, a.v, from, count, D, pitch, room);
    for (int64_t g = 0; g < group; g += kOuterRows)
      outer<A>(std::min<int64_t>(kOuterRows, group - g), p + g * kBlock, kBlock, 1, v.rows, v.pitch, count, true,
               out + g * pitch, pitch, vecs);
  }
  for (int64_t g = 0; g < group; g++) {
    const A factor = sum[g] == A(0) ? A(0) : A(1) / sum[g];  // a row that holds nothing: zeros
    for (int64_t d = 0; d < pitch; d++) out[g * pitch + d] *= factor;
    store_row(out + g * pitch, static_cast<T*>(a.out) + (b * a.heads + kv_head * group + g) * D, D);
  }
}

#define LMVAE_INSTANTIATE(T)                                                               \
  template int64_t latent_attention_decode_workspace<T>(const LatentAttentionDecodeArgs&); \
  template void latent_attention_decode<T>(const LatentAttentionDecodeArgs&, int64_t, int64_t, int64_t, void*);
LMVAE_INSTANTIATE(float)
LMVAE_INSTANTIATE(double)
LMVAE_INSTANTIATE(c10::BFloat16)
LMVAE_INSTANTIATE(c10::Half)

}  // namespace lmvae::LMVAE_ISA
