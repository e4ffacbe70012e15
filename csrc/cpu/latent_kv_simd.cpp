// latent_kv, chunks [begin, end) of at most 64 rows of the projection. A chunk's weights (64 x nz) pass through the
// first two cache levels once; everything that needs them, or the matching piece of the memory's gradient, happens
// there.
#include "latent_kv.h"
#include "latent_kv_products.h"
#include "simd_math.h"

namespace lmvae::LMVAE_ISA {

// ---- rows of any type -----------------------------------------------------------------------------------------------

template <typename T, typename S>
LMVAE_INLINE void widen(const S* x, T* y, int64_t n) {
  if constexpr (std::is_same_v<acc_t<S>, T>)
    load_unit(x, y, n);
  else
    for (int64_t i = 0; i < n; i++) y[i] = static_cast<T>(x[i]);
}
template <typename T, typename S>
LMVAE_INLINE void narrow(const T* x, S* y, int64_t n) {
  if constexpr (std::is_same_v<acc_t<S>, T>)
    store_row(x, y, n);
  else
    for (int64_t i = 0; i < n; i++) y[i] = static_cast<S>(x[i]);
}

template <typename F>
LMVAE_INLINE void with_type(KvType type, F f) {
  switch (type) {
    case KvType::F64: return f(double{});
    case KvType::F32: return f(float{});
    case KvType::F16: return f(c10::Half{});
    default: return f(c10::BFloat16{});
  }
}

template <typename T>
LMVAE_INLINE void load(const KvTensor& t, int64_t at, T* y, int64_t n) {
  with_type(t.type, [&](auto s) { widen(static_cast<const decltype(s)*>(t.data) + at, y, n); });
}
template <typename T>
LMVAE_INLINE void save(const KvTensor& t, int64_t at, const T* x, int64_t n) {
  with_type(t.type, [&](auto s) { narrow(x, static_cast<decltype(s)*>(t.data) + at, n); });
}

LMVAE_INLINE int64_t size_of(KvType type) { return type == KvType::F64 ? 8 : type == KvType::F32 ? 4 : 2; }
template <typename T> LMVAE_INLINE bool is_type(KvType type) {
  return type == (sizeof(T) == 8 ? KvType::F64 : KvType::F32);
}
// Asks for n numbers of a sentence further on: each sentence's lie far from the next one's, and are too few at a time
// for the processor to see so many streams.
LMVAE_INLINE void next_lines(const KvTensor& t, int64_t at, int64_t n, bool write) {
  const int64_t size = size_of(t.type);
  const char* first = static_cast<const char*>(t.data) + at * size;
  for (int64_t line = 0; line < n * size; line += 64) prefetch_line(first + line, write);
}

LMVAE_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What one row block of a forward product reads (4 KB at nz = 128) is asked for two blocks earlier: far enough for
// memory, near enough for the first level. dz walks its whole chunk again and again, so it asks for the next one, in
// the second level.
constexpr int64_t kAhead = 8192;

// The lines of a chunk, moved on by `ahead` bytes, if its rows lie one behind the other.
template <int level>
LMVAE_INLINE PrefetchTo<level> lines_of(const KvRows& r, const KvTensor& t, const Chunk& c, int64_t ahead) {
  if (t.stride[5] != r.nz) return {};
  const char* p = static_cast<const char*>(t.data) + c.at(t, 0) * size_of(t.type) + ahead;
  return {p, p + c.n * r.nz * size_of(t.type)};
}

// A row of a chunk, kKvChunk numbers, times the dropout factors of elements [first, first + kKvChunk) of sentence b.
template <typename T>
LMVAE_INLINE void drop(const KvDropout& d, int64_t group, int64_t b, int64_t first, T* x) {
  const uint64_t* words = d.bits + (group * d.batch + b) * d.words + first / 64;
  const int64_t shift = first % 64;
  const uint64_t kept = shift == 0 ? words[0] : words[0] >> shift | words[1] << (64 - shift);
  const T scale = static_cast<T>(static_cast<float>(d.scale));
  for (int64_t half = 0; half < 2; half++) {
    const auto bits = static_cast<uint32_t>(kept >> (32 * half));
#pragma omp simd
    for (int32_t i = 0; i < 32; i++) x[32 * half + i] *= (bits >> i & 1) != 0 ? scale : T(0);
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <typename T> int64_t kv_vector() { return Lanes<T>::count; }

template <typename T> int64_t kv_forward_scratch(const KvForward& a) { return kKvChunk * a.rows.nz; }

template <typename T>
void kv_forward_chunks(const KvForward& a, void* scratch, int64_t begin, int64_t end) {
  constexpr int64_t V = Lanes<T>::count;
  const KvRows& r = a.rows;
  T* const copy = static_cast<T*>(scratch);
  alignas(64) T tile[kKvChunk * 2 * V] = {}, turned[2 * V * kKvChunk] = {}, bias[kKvChunk] = {};
  const bool direct = is_type<T>(a.weight.type);
  for (int64_t index = begin; index < end; index++) {
    const Chunk c(r, index);
    const int64_t where = c.at(a.weight, 0);
    auto ahead = lines_of<1>(r, a.weight, c, kAhead);
    const T* w = static_cast<const T*>(a.weight.data) + where;
    int64_t ldw = a.weight.stride[5];
    const bool tiles = a.tiles != nullptr && c.n % 16 == 0;
    if (!direct && !tiles) {
      for (int64_t i = 0; i < c.n; i++) load(a.weight, where + i * ldw, copy + i * r.nz, r.nz);
      w = copy;
      ldw = r.nz;
    }
    if (a.bias != nullptr)
      load(KvTensor{const_cast<void*>(a.bias), a.weight.type, {}}, c.group() * r.rows() + c.flat, bias, c.n);
    const T* z = static_cast<const T*>(a.panels);
    for (int64_t b0 = 0; b0 < r.batch; b0 += a.panel, z += r.nz * a.panel) {
      if (tiles)
        tile_of_memory(a, where, c.n, b0 / a.panel, tile);
      else
        product<T, false>(w, ldw, 1, c.n, z, a.panel, a.panel, tile, a.panel, r.nz, ahead);
      transpose(tile, a.panel, turned, kKvChunk, round_up(c.n, V), a.panel);
      for (int64_t b = b0; b < std::min(b0 + a.panel, r.batch); b++) {
        T* x = turned + (b - b0) * kKvChunk;
        for (int64_t i = 0; i < c.n; i++) x[i] += bias[i];
        if (a.dropout.bits != nullptr) drop(a.dropout, c.group(), b, c.flat, x);
        const int64_t at = c.at(a.memory, b);
        save(a.memory, at, x, c.n);
        next_lines(a.memory, at + c.n, c.n, true);
      }
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <typename T> int64_t kv_backward_scratch(const KvBackward& a) {
  const int64_t operands = a.on_tiles ? 2 * a.batch_padded : 0;
  return kKvChunk * (a.batch_padded + 2 * a.nz_padded + std::max(operands, a.gram_padded));
}

// The chunk's piece of every gradient, dropout applied, as rows of kKvChunk; zero beyond the chunk and the batch.
template <typename T>
void load_gradients(const KvBackward& a, const Chunk& c, T* g) {
  int64_t row = 0;
  for (const KvGrad* grad = a.grads; grad < a.grads + a.num_grads; grad++)
    for (int64_t b = 0; b < grad->batch; b++, row++) {
      T* x = g + row * kKvChunk;
      const int64_t at = c.at(grad->tensor, b);
      load(grad->tensor, at, x, c.n);
      next_lines(grad->tensor, at + c.n * grad->tensor.stride[5], c.n, false);
      if (grad->dropout.bits != nullptr) drop(grad->dropout, c.group(), b, c.flat, x);
      std::fill(x + c.n, x + kKvChunk, T(0));
    }
}

// One row of AdamW with decoupled weight decay (Loshchilov & Hutter, ICLR 2019), in torch's order of operations.
template <typename T>
LMVAE_INLINE void adamw_row(const KvAdamW& h, const T* g, T* w, T* m, T* v, int64_t n) {
  const T clip = static_cast<T>(h.clip), decay = static_cast<T>(h.decay), eps = static_cast<T>(h.eps);
  const T rest1 = static_cast<T>(1.0 - h.beta1), beta2 = static_cast<T>(h.beta2), rest2 = static_cast<T>(1.0 - h.beta2);
  const T step = static_cast<T>(h.step_size), root = static_cast<T>(h.sqrt_bias2);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const T x = g[i] * clip;
    const T mean = m[i] + rest1 * (x - m[i]);
    const T square = beta2 * v[i] + rest2 * x * x;
    m[i] = mean;
    v[i] = square;
    w[i] = w[i] * decay - step * mean / (std::sqrt(square) / root + eps);
  }
}

template <typename T>
void adamw_tile(const KvBackward& a, const Chunk& c, const T* tile, T* row) {
  const int64_t nz = a.rows.nz, at_w = c.at(a.weight, 0), at_m = c.at(a.exp_avg, 0), at_v = c.at(a.exp_avg_sq, 0);
  for (int64_t i = 0; i < c.n; i++) {
    const int64_t w = at_w + i * a.weight.stride[5];
    const int64_t m = at_m + i * a.exp_avg.stride[5];
    const int64_t v = at_v + i * a.exp_avg_sq.stride[5];
    const T* g = tile + i * a.nz_padded;
    if (is_type<T>(a.weight.type) && is_type<T>(a.exp_avg.type)) {
      adamw_row(a.adamw, g, static_cast<T*>(a.weight.data) + w, static_cast<T*>(a.exp_avg.data) + m,
                static_cast<T*>(a.exp_avg_sq.data) + v, nz);
      continue;
    }
    T *pw = row, *pm = row + a.nz_padded, *pv = row + 2 * a.nz_padded;
    load(a.weight, w, pw, nz);
    load(a.exp_avg, m, pm, nz);
    load(a.exp_avg_sq, v, pv, nz);
    adamw_row(a.adamw, g, pw, pm, pv, nz);
    save(a.weight, w, pw, nz);
    save(a.exp_avg, m, pm, nz);
    save(a.exp_avg_sq, v, pv, nz);
  }
}

template <typename T>
void kv_backward_chunks(const KvBackward& a, void* scratch, int64_t begin, int64_t end) {
  constexpr int64_t V = Lanes<T>::count;
  const KvRows& r = a.rows;
  T* const g = static_cast<T*>(scratch);            // [batch_padded][kKvChunk]
  T* const tile = g + kKvChunk * a.batch_padded;    // [kKvChunk][nz_padded]: a tile of the weight's gradient
  T* const copy = tile + kKvChunk * a.nz_padded;    // [kKvChunk][nz_padded]: weights in the accumulation type
  T* const turned = copy + kKvChunk * a.nz_padded;  // [kKvChunk][gram_padded or batch_padded]
  std::fill(g, g + kv_backward_scratch<T>(a), T(0));
  const bool direct = is_type<T>(a.weight.type) && a.nz_padded == r.nz;  // else rows would be read past their ends
  for (int64_t index = begin; index < end; index++) {
    const Chunk c(r, index);
    load_gradients(a, c, g);
    if (a.dbias != nullptr) {
      alignas(64) T sum[kKvChunk] = {};
      for (int64_t b = 0; b < r.batch; b++)
        for (int64_t i = 0; i < kKvChunk; i++) sum[i] += g[b * kKvChunk + i];
      for (T& x : sum) x *= static_cast<T>(a.unscaled);
      save(KvTensor{a.dbias, a.weight.type, {}}, c.group() * r.rows() + c.flat, sum, c.n);
    }
    if (a.gram != nullptr) add_gram(a, c, g, turned);
    if (a.dz != nullptr) {
      auto ahead = lines_of<2>(r, a.weight, c, c.n * r.nz * size_of(a.weight.type));
      const int64_t where = c.at(a.weight, 0);
      const T* w = static_cast<const T*>(a.weight.data) + where;
      int64_t ldw = a.weight.stride[5];
      if (!direct) {
        for (int64_t i = 0; i < c.n; i++) load(a.weight, where + i * ldw, copy + i * a.nz_padded, r.nz);
        w = copy;
        ldw = a.nz_padded;
      }
      product<T, true>(g, kKvChunk, 1, r.batch, w, ldw, a.nz_padded, static_cast<T*>(a.dz), a.nz_padded, c.n, ahead);
    }
    if (a.sink == KvSink::None) continue;
    auto ahead = a.sink == KvSink::AdamW ? lines_of<2>(r, a.weight, c, 0) : PrefetchTo<2>{};
    weight_tile(a, c, g, tile, turned, ahead);
    if (a.sink == KvSink::AdamW) {
      adamw_tile(a, c, tile, copy);
    } else if (a.sink == KvSink::Store) {
      const int64_t where = c.at(a.dweight, 0);
      for (int64_t i = 0; i < c.n; i++) save(a.dweight, where + i * r.nz, tile + i * a.nz_padded, r.nz);
    } else {
      for (int64_t i = 0; i < c.n; i++) {  // beyond nz an infinite gradient times nothing is NaN
        const T* x = tile + i * a.nz_padded;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < r.nz; k++) sum += x[k] * x[k];
        *a.norm += static_cast<double>(sum);
      }
    }
  }
}

#define LMVAE_INSTANTIATE(T)                                                     \
  template int64_t kv_vector<T>();                                               \
  template int64_t kv_forward_scratch<T>(const KvForward&);                      \
  template int64_t kv_backward_scratch<T>(const KvBackward&);                    \
  template void kv_forward_chunks<T>(const KvForward&, void*, int64_t, int64_t); \
  template void kv_backward_chunks<T>(const KvBackward&, void*, int64_t, int64_t);
LMVAE_INSTANTIATE(float)
LMVAE_INSTANTIATE(double)

}  // namespace lmvae::LMVAE_ISA
