// latent_kv, chunks [begin, end) of at most 64 rows of the projection. A chunk's weights (64 x nz) pass through the
// first two cache levels once; everything that needs them, or the matching piece of the memory's gradient, happens
// there.
#include "latent_kv.h"
#include "simd_math.h"

namespace lmvae::LMVAE_ISA {

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
LMVAE_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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
  alignas(64) T tile[kKvChunk * 2 * V] = {}, turned[2 * V * kKvChunk], bias[kKvChunk] = {};
  const bool direct = is_type<T>(a.weight.type);
  for (int64_t index = begin; index < end; index++) {
    const Chunk c(r, index);
    const int64_t where = c.at(a.weight, 0);
    auto ahead = lines_of<1>(r, a.weight, c, kAhead);
    const T* w = static_cast<const T*>(a.weight.data) + where;
    int64_t ldw = a.weight.stride[5];
    if (!direct) {
      for (int64_t i = 0; i < c.n; i++) load(a.weight, where + i * ldw, copy + i * r.nz, r.nz);
      w = copy;
      ldw = r.nz;
    }
    if (a.bias != nullptr)
      load(KvTensor{const_cast<void*>(a.bias), a.weight.type, {}}, c.group() * r.rows() + c.flat, bias, c.n);
    const T* z = static_cast<const T*>(a.panels);
    for (int64_t b0 = 0; b0 < r.batch; b0 += a.panel, z += r.nz * a.panel) {
      product<T, false>(w, ldw, 1, c.n, z, a.panel, a.panel, tile, a.panel, r.nz, ahead);
      transpose(tile, a.panel, turned, kKvChunk, round_up(c.n, V), a.panel);
      for (int64_t b = b0; b < std::min(b0 + a.panel, r.batch); b++) {
        T* x = turned + (b - b0) * kKvChunk;
        for (int64_t i = 0; i < c.n; i++) x[i] += bias[i];
        if (a.dropout.bits != nullptr) drop(a.dropout, c.group(), b, c.flat, x);
        save(a.memory, c.at(a.memory, b), x, c.n);
      }
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <typename T> int64_t kv_backward_scratch(const KvBackward& a) {
  const int64_t turned = a.on_tiles ? 2 * a.batch_padded : a.gram_padded;  // with room for operands
  return kKvChunk * (a.batch_padded + 2 * a.nz_padded + turned);
}

template <typename T>
void gram_on_tiles(const KvBackward& a, const T* g, T* turned) {
  if constexpr (std::is_same_v<T, float>)
    kv_tile_gram(g, turned, a.batch_padded, static_cast<float*>(a.gram),
                 reinterpret_cast<char*>(turned + kKvChunk * a.batch_padded));
}

// A tile of the weight's gradient, [kKvChunk][nz_padded], of the chunk's gradients [batch_padded][kKvChunk].
template <typename T, typename Ahead>
void weight_tile(const KvBackward& a, const Chunk& c, const T* g, T* tile, T* turned, Ahead& ahead) {
  if constexpr (std::is_same_v<T, float>)
    if (a.tiles != nullptr) {
      transpose(g, kKvChunk, turned, a.batch_padded, a.batch_padded, kKvChunk);
      auto* const room = reinterpret_cast<char*>(turned + kKvChunk * a.batch_padded);
      if (kv_tile_product(turned, a.tiles, a.batch_padded, a.nz_padded, tile, room)) return;
    }
  product<T, false>(g, 1, kKvChunk, c.n, static_cast<const T*>(a.z), a.nz_padded, a.nz_padded, tile, a.nz_padded,
                    a.rows.batch, ahead);
}

// The chunk's piece of every gradient, dropout applied, as rows of kKvChunk; zero beyond the chunk and the batch.
template <typename T>
void load_gradients(const KvBackward& a, const Chunk& c, T* g) {
  int64_t row = 0;
  for (const KvGrad* grad = a.grads; grad < a.grads + a.num_grads; grad++)
    for (int64_t b = 0; b < grad->batch; b++, row++) {
      T* x = g + row * kKvChunk;
      load(grad->tensor, c.at(grad->tensor, b), x, c.n);
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
  const bool direct = is_type<T>(a.weight.type) && r.nz % V == 0;
  for (int64_t index = begin; index < end; index++) {
    const Chunk c(r, index);
    load_gradients(a, c, g);
    if (a.dbias != nullptr) {
      alignas(64) T sum[kKvChunk] = {};
      for (int64_t b = 0; b < r.batch; b++)
        for (int64_t i = 0; i < kKvChunk; i++) sum[i] += g[b * kKvChunk + i];
      save(KvTensor{a.dbias, a.weight.type, {}}, c.group() * r.rows() + c.flat, sum, c.n);
    }
    if (a.gram != nullptr) {
      PrefetchTo<2> none;
      transpose(g, kKvChunk, turned, a.gram_padded, a.gram_padded, kKvChunk);
      if (a.on_tiles)
        gram_on_tiles(a, g, turned);
      else
        product<T, true>(g, kKvChunk, 1, r.batch, turned, a.gram_padded, a.gram_padded, static_cast<T*>(a.gram),
                         a.gram_padded, c.n, none);
    }
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
      T sum = 0;
      const T* x = tile;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < c.n * a.nz_padded; i++) sum += x[i] * x[i];
      *a.norm += static_cast<double>(sum);
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
