// Latent attention of one (sentence, kv head): forward and backward. Its keys and values (slots, then tokens) are copied
// once into a dense block of the accumulation type, which for sentences of tens of tokens stays in the first- or second-level
// cache; queries go through in tiles of one or two vectors of lanes, keys in passes of at most kPass with an online softmax.
// What a token sees is two runs of columns (visibility.py: visible_slots, visible_tokens), and what no row of a block
// sees is not computed.
#include "latent_attention.h"
#include "latent_attention_tiles.h"

#include <limits>

namespace lmvae::LMVAE_ISA {
namespace {

constexpr int64_t kPass = 128;     // keys whose scores are held at once: with a tile of 32 queries, 16 KB
constexpr int64_t kChain = 48;     // products added one after the other before they join the rest, for accuracy
constexpr int kMaxLanes = 2 * 16;  // a tile's queries: at most two vectors of floats

LMVAE_INLINE float tanh_(float x) {  // Cephes' tanhf: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel
  const float a = std::fabs(x), z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near = p * z * x + x;
  const float far = std::copysign(1.0f - 2.0f / (exp_(a + a) + 1.0f), x);
  return a < 0.625f ? near : far;  // NaN: far, which is NaN
}
LMVAE_INLINE double tanh_(double x) { return std::tanh(x); }

struct Range {
  int64_t lo, hi;
};

// Rows of the next pair, fetched a few lines at a time between register tiles. A pair's rows are short runs far apart, which
// the hardware does not foresee. What this gains has not been measured by itself.
class Ahead {
 public:
  void add(const void* first, int64_t step, int64_t rows, int64_t bytes) {
    if (parts_ == kParts || rows <= 0) return;
    part_[parts_++] = {static_cast<const char*>(first), step, rows, (bytes + 63) / 64};
    left_ += rows * part_[parts_ - 1].lines;
  }
  void plan(int64_t calls) { pace_ = left_ > kMost ? 0 : left_ / calls + 1; }  // too much to keep: leave it to the hardware
  void step() {
    for (int64_t n = pace_; n > 0 && at_ < parts_; n--) {
      const Rows& r = part_[at_];
      __builtin_prefetch(r.first + row_ * r.step + line_ * 64, 0, 2);
      if (++line_ < r.lines) continue;
      line_ = 0;
      if (++row_ < r.rows) continue;
      row_ = 0, at_++;
    }
  }

 private:
  static constexpr int kParts = 48;
  static constexpr int64_t kMost = 8192;  // lines: 512 KB, a part of the second-level cache
  struct Rows {
    const char* first;
    int64_t step, rows, lines;
  };
  Rows part_[kParts];
  int parts_ = 0, at_ = 0;
  int64_t row_ = 0, line_ = 0, left_ = 0, pace_ = 0;
};

// One (sentence, kv head). Columns are the slots that any token sees (0 .. used - 1), then the tokens.
template <typename T>
struct Unit {
  using A = acc_t<T>;
  const LatentAttentionArgs& args;
  int64_t b, kv_head, first, tokens, group, used, rows, columns, pitch;
  mutable Ahead ahead;

  Unit(const LatentAttentionArgs& args_, int64_t pair) : args(args_), b(pair / args_.kv_heads), kv_head(pair % args_.kv_heads) {
    first = args.cu_seqlens[b];
    tokens = args.cu_seqlens[b + 1] - first;
    group = args.heads / args.kv_heads;
    used = args.visibility == Visibility::Prefix ? args.slots : std::min(args.slots, tokens);
    rows = tokens * group;  // row i * group + g: neighbours see nearly the same
    columns = used + tokens;
    pitch = round_up(args.head_dim, Lanes<A>::count);
  }
  static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

  Range slots(int64_t row) const {
    const int64_t i = row / group;
    Range r{0, used};
    if (args.visibility == Visibility::Prefix) {
      r.lo = used + i - args.window + 1;
    } else if (args.visibility == Visibility::Rolling) {
      r = {std::max<int64_t>(i > 0, i + 2 - args.window + (i > 0)), std::min(used, i + 1)};
    } else {
      const int64_t from = 2 * i + 2 - args.window;  // the window's first cache position
      r = {from > 0 ? (from + 1) / 2 : 0, std::min(used, i + 1)};
    }
    r.lo = std::min(std::max<int64_t>(r.lo, 0), r.hi);
    return r;
  }
  Range seen_tokens(int64_t row) const {  // in columns
    const int64_t i = row / group;
    const int64_t reach = args.visibility == Visibility::Interleaved ? (args.window - 1) / 2 : args.window - 1;
    int64_t lo = std::max<int64_t>(0, i - reach);
    if (args.visibility == Visibility::Rolling) lo = std::max(lo, i - 1);
    return {used + lo, used + i + 1};
  }

  // Plans to fetch what pair `next` will read and write.
  void look_ahead(int64_t next, bool backward) const {
    if (next < 0) return;
    const Unit n(args, next);
    const int64_t size = sizeof(T), bytes = args.head_dim * size, D = args.head_dim;
    for (const Strided* x : {&args.memory_k, &args.memory_v})
      if (n.used > 0)
        ahead.add(static_cast<const T*>(x->data) + n.b * x->batch + n.kv_head * x->head, x->row * size, n.used, bytes);
    for (const Strided* x : {&args.k, &args.v})
      ahead.add(static_cast<const T*>(x->data) + n.first * x->row + n.kv_head * x->head, x->row * size, n.tokens, bytes);
    for (int64_t g = 0; g < group; g++) {
      const int64_t head = n.kv_head * group + g;
      for (const Strided* x : {&args.q, &args.grad_out})
        if (x->data != nullptr)
          ahead.add(static_cast<const T*>(x->data) + n.first * x->row + head * x->head, x->row * size, n.tokens, bytes);
      const void* out = backward ? args.grad_q : args.out;
      ahead.add(static_cast<const T*>(out) + (n.first * args.heads + head) * D, args.heads * bytes, n.tokens, bytes);
    }
    if (backward) {
      for (const void* x : {args.grad_memory_k, args.grad_memory_v})
        if (x != nullptr) ahead.add(static_cast<const T*>(x) + next * args.slots * D, bytes, args.slots, bytes);
      for (const void* x : {args.grad_k, args.grad_v})
        ahead.add(static_cast<const T*>(x) + (n.first * args.kv_heads + n.kv_head) * D, args.kv_heads * bytes, n.tokens, bytes);
    }
    ahead.plan(backward ? 24 : 8);  // about as many register tiles as a short sentence has
  }

  int64_t token_of(int64_t row) const { return first + row / group; }
  int64_t head_of(int64_t row) const { return kv_head * group + row % group; }
  const T* row_of(const Strided& x, int64_t row) const {
    return static_cast<const T*>(x.data) + token_of(row) * x.row + head_of(row) * x.head;
  }
  void load_padded(const T* x, int64_t stride, A* y) const {
    load_row(x, stride, y, args.head_dim);
    for (int64_t d = args.head_dim; d < pitch; d++) y[d] = 0;
  }
  // Keys or values of every column, dense.
  void load_columns(const Strided& memory, const Strided& x, A* y) const {
    const T* m = static_cast<const T*>(memory.data) + b * memory.batch + kv_head * memory.head;
    for (int64_t j = 0; j < used; j++) load_padded(m + j * memory.row, memory.dim, y + j * pitch);
    const T* t = static_cast<const T*>(x.data) + first * x.row + kv_head * x.head;
    for (int64_t i = 0; i < tokens; i++) load_padded(t + i * x.row, x.dim, y + (used + i) * pitch);
  }
  void store_columns(A* grad, void* memory, void* x) const {
    const int64_t D = args.head_dim;
    if (memory != nullptr) {
      T* m = static_cast<T*>(memory) + (b * args.kv_heads + kv_head) * args.slots * D;
      for (int64_t j = 0; j < used; j++) store_row(grad + j * pitch, m + j * D, D);
      std::fill_n(m + used * D, (args.slots - used) * D, T(0));
    }
    T* t = static_cast<T*>(x) + (first * args.kv_heads + kv_head) * D;
    for (int64_t i = 0; i < tokens; i++) store_row(grad + (used + i) * pitch, t + i * args.kv_heads * D, D);
  }
};

// A run of columns from `column` on, whose scores start at row `at` of the score block.
struct Piece {
  int64_t column, count, at;
};

template <typename T, int QV>
struct Tile {
  using A = acc_t<T>;
  static constexpr int L = Lanes<A>::count, W = QV * L;
  const Unit<T>& u;
  const int64_t first_row, count, vecs;
  alignas(64) A lo[2][W], hi[2][W];  // per lane: the slots and the tokens it sees, as columns
  Range all[2], common[2];           // seen by any lane; seen by every lane

  Tile(const Unit<T>& unit, int64_t row0, int64_t rows) : u(unit), first_row(row0), count(rows), vecs(unit.pitch / L) {
    for (int kind = 0; kind < 2; kind++) {
      const Range from = range(kind, 0), to = range(kind, count - 1);
      all[kind] = {from.lo, to.hi};
      common[kind] = {to.lo, from.hi};
      for (int64_t r = 0; r < W; r++) {  // idle lanes see everything: nothing that is used depends on them
        const Range seen = r < count ? range(kind, r) : Range{0, u.columns};
        lo[kind][r] = static_cast<A>(seen.lo), hi[kind][r] = static_cast<A>(seen.hi);
      }
    }
  }
  Range range(int kind, int64_t r) const { return kind == 0 ? u.slots(first_row + r) : u.seen_tokens(first_row + r); }

  // Calls body(pieces of slots and tokens, scores held, first pass?) for every pass over the columns that the tile sees.
  template <typename F>
  void passes(F&& body) const {
    const int64_t slots = std::max<int64_t>(0, all[0].hi - all[0].lo), total = slots + all[1].hi - all[1].lo;
    for (int64_t p = 0; p < total; p += kPass) {
      const int64_t end = std::min(total, p + kPass);
      const int64_t from_slots = std::max<int64_t>(0, std::min(end, slots) - p);
      const Piece pieces[2] = {{all[0].lo + p, from_slots, 0},
                               {all[1].lo + p + from_slots - slots, end - p - from_slots, from_slots}};
      body(pieces, end - p, p == 0);
    }
  }

  void load_rows(const Strided& x, A* y) const {
    for (int64_t r = 0; r < count; r++) u.load_padded(u.row_of(x, first_row + r), x.dim, y + r * u.pitch);
    std::fill_n(y + count * u.pitch, (W - count) * u.pitch, A(0));
  }

  // s = masked (and capped) scores of the pass; slope, where given, is d(capped score) / d(score).
  void scores(const Piece* pieces, int64_t held, const A* keys, const A* qt, A* s, A* slope) const {
    for (int kind = 0; kind < 2; kind++) {
      const Piece& piece = pieces[kind];
      u.ahead.step();
      dots<A, QV>(keys + piece.column * u.pitch, u.pitch, piece.count, qt, u.args.head_dim, s + piece.at * W);
    }
    if (u.args.softcap > 0) {
      const A cap = static_cast<A>(u.args.softcap), inverse = static_cast<A>(1 / u.args.softcap);
#pragma omp simd
      for (int64_t x = 0; x < held * W; x++) s[x] = tanh_(s[x] * inverse);
      if (slope != nullptr) {
#pragma omp simd
        for (int64_t x = 0; x < held * W; x++) slope[x] = A(1) - s[x] * s[x];
      }
#pragma omp simd
      for (int64_t x = 0; x < held * W; x++) s[x] *= cap;
    }
    const Vec<A> hidden = splat(-std::numeric_limits<A>::infinity());
    for (int kind = 0; kind < 2; kind++) {
      const Piece& piece = pieces[kind];
      for (int64_t n = 0; n < piece.count; n++) {
        const int64_t column = piece.column + n;
        if (column >= common[kind].lo && column < common[kind].hi) continue;
        const Vec<A> c = splat(static_cast<A>(column));
#pragma GCC unroll 2
        for (int v = 0; v < QV; v++) {
          A* at = s + (piece.at + n) * W + v * L;
          const auto seen = (c >= load(lo[kind] + v * L)) & (c < load(hi[kind] + v * L));
          store(at, seen ? load(at) : hidden);
        }
      }
    }
  }

  // target[r] += sum over the columns that r sees of s[column][r] * x[column]: O += P V, dQ += dS K.
  void by_row(const Piece* pieces, const A* s, const A* x, A* target) const {
    const int64_t step = outer_step(count);
    for (int64_t r = 0; r < count; r += step) {
      const int64_t n = std::min(step, count - r);
      u.ahead.step();
      for (int kind = 0; kind < 2; kind++) {
        const Piece& piece = pieces[kind];
        const int64_t from = std::max(piece.column, range(kind, r).lo);
        const int64_t to = std::min(piece.column + piece.count, range(kind, r + n - 1).hi);
        for (int64_t at = from; at < to; at += kChain)
          outer<A>(n, s + (piece.at + at - piece.column) * W + r, 1, W, x + at * u.pitch, u.pitch,
                   std::min(kChain, to - at), target + r * u.pitch, u.pitch, vecs);
      }
    }
  }

  // target[column] += sum over the rows that see it of s[column][r] * x[r]: dV += P^T dO, dK += dS^T Q.
  void by_column(const Piece* pieces, const A* s, const A* x, A* target) const {
    for (int kind = 0; kind < 2; kind++) {
      const Piece& piece = pieces[kind];
      const int64_t step = outer_step(piece.count);
      int64_t from = 0, to = 0;
      for (int64_t n = 0; n < piece.count; n += step) {
        const int64_t columns = std::min(step, piece.count - n), column = piece.column + n;
        u.ahead.step();
        while (from < count && hi[kind][from] <= static_cast<A>(column)) from++;
        to = std::max(to, from);
        while (to < count && lo[kind][to] < static_cast<A>(column + columns)) to++;
        if (from < to)
          outer<A>(columns, s + (piece.at + n) * W + from, W, 1, x + from * u.pitch, u.pitch, to - from,
                   target + column * u.pitch, u.pitch, vecs);
      }
    }
  }
};

// ---- workspace -------------------------------------------------------------------------------------------------------

template <typename A>
struct Workspace {  // laid out once for the longest sentence
  A *keys, *values, *qt, *q, *out, *s;
  A *grad_keys, *grad_values, *grad_out, *grad_out_t, *grad_s, *slope;

  // Returns the number of elements; with base null only counts.
  int64_t lay_out(A* base, int64_t columns, int64_t pitch, bool backward) {
    int64_t at = 0;
    auto take = [&](int64_t n) {
      A* p = base + at;
      at += Unit<A>::round_up(n, 16);
      return p;
    };
    const int64_t tile = kMaxLanes * pitch, block = kMaxLanes * kPass;
    keys = take(columns * pitch), values = take(columns * pitch);
    qt = take(tile), q = take(tile), out = take(tile), s = take(block);
    if (backward) {
      grad_keys = take(columns * pitch), grad_values = take(columns * pitch);
      grad_out = take(tile), grad_out_t = take(tile), grad_s = take(block), slope = take(block);
    }
    return at;
  }
};

// ---- forward ---------------------------------------------------------------------------------------------------------

template <typename T, int QV>
void forward_tile(const Unit<T>& u, int64_t row0, int64_t rows, const Workspace<acc_t<T>>& w) {
  using A = acc_t<T>;
  constexpr int L = Lanes<A>::count, W = QV * L;
  const Tile<T, QV> tile(u, row0, rows);
  tile.load_rows(u.args.q, w.q);
  transpose(w.q, u.pitch, W, u.args.head_dim, static_cast<A>(u.args.scale), w.qt);
  std::fill_n(w.out, rows * u.pitch, A(0));
  const A none = -std::numeric_limits<A>::infinity();
  alignas(64) A largest[W], sum[W] = {}, base[W];
  std::fill_n(largest, W, none);
  tile.passes([&](const Piece* pieces, int64_t held, bool first) {
    tile.scores(pieces, held, w.keys, w.qt, w.s, nullptr);
    alignas(64) A rescale[W];
#pragma GCC unroll 2
    for (int v = 0; v < QV; v++) {
      Vec<A> m = load(largest + v * L);
      for (int64_t n = 0; n < held; n++) {
        const Vec<A> x = load(w.s + n * W + v * L);
        m = x > m ? x : m;
      }
      store(rescale + v * L, load(largest + v * L));
      store(largest + v * L, m);
    }
    for (int r = 0; r < W; r++) base[r] = largest[r] == none ? A(0) : largest[r];  // nothing seen yet: no Inf - Inf
    if (!first) {
      for (int r = 0; r < W; r++) rescale[r] = exp_(rescale[r] - base[r]), sum[r] *= rescale[r];
      for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < u.pitch; d++) w.out[r * u.pitch + d] *= rescale[r];
    }
    for (int64_t block = 0; block < held; block += 16) {  // sums of sixteen, for accuracy
      alignas(64) A part[W] = {};
      for (int64_t n = block; n < std::min(held, block + 16); n++) {
        A* s = w.s + n * W;
#pragma omp simd
        for (int r = 0; r < W; r++) {
          s[r] = exp_(s[r] - base[r]);
          part[r] += s[r];
        }
      }
      for (int r = 0; r < W; r++) sum[r] += part[r];
    }
    tile.by_row(pieces, w.s, w.values, w.out);
  });
  const int64_t D = u.args.head_dim;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t place = u.token_of(row0 + r) * u.args.heads + u.head_of(row0 + r);
    const A factor = A(1) / sum[r];
    A* out = w.out + r * u.pitch;
    for (int64_t d = 0; d < u.pitch; d++) out[d] *= factor;
    store_row(out, static_cast<T*>(u.args.out) + place * D, D);
    A* stats = static_cast<A*>(u.args.stats) + place * 2;
    stats[0] = base[r], stats[1] = factor;
  }
}

// ---- backward --------------------------------------------------------------------------------------------------------

template <typename T, int QV>
void backward_tile(const Unit<T>& u, int64_t row0, int64_t rows, const Workspace<acc_t<T>>& w) {
  using A = acc_t<T>;
  constexpr int L = Lanes<A>::count, W = QV * L;
  const Tile<T, QV> tile(u, row0, rows);
  const LatentAttentionArgs& args = u.args;
  const int64_t D = args.head_dim;
  tile.load_rows(args.q, w.q);
  tile.load_rows(args.grad_out, w.grad_out);
  transpose(w.q, u.pitch, W, D, static_cast<A>(args.scale), w.qt);
  transpose(w.grad_out, u.pitch, W, D, A(1), w.grad_out_t);

  alignas(64) A largest[W] = {}, factor[W] = {}, delta[W] = {};  // delta = sum over keys of P dP = dO . O
  bool one_pass = false;
  tile.passes([&](const Piece*, int64_t held, bool first) { one_pass = first && held <= kPass; });
  for (int64_t r = 0; r < rows; r++) {
    const int64_t place = u.token_of(row0 + r) * args.heads + u.head_of(row0 + r);
    const A* stats = static_cast<const A*>(args.stats) + place * 2;
    largest[r] = stats[0], factor[r] = stats[1];
    if (!one_pass) {
      A* out = w.out;
      load_row(static_cast<const T*>(args.out) + place * D, 1, out, D);
      const A* grad = w.grad_out + r * u.pitch;
      A dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < D; d++) dot += grad[d] * out[d];
      delta[r] = dot;
    }
  }
  A* grad_q = w.out;
  tile.passes([&](const Piece* pieces, int64_t held, bool first) {
    A* slope = args.softcap > 0 ? w.slope : nullptr;
    tile.scores(pieces, held, w.keys, w.qt, w.s, slope);
    for (int kind = 0; kind < 2; kind++)
      dots<A, QV>(w.values + pieces[kind].column * u.pitch, u.pitch, pieces[kind].count, w.grad_out_t, D,
                  w.grad_s + pieces[kind].at * W);
    for (int64_t n = 0; n < held; n++) {
      A *s = w.s + n * W, *g = w.grad_s + n * W;
#pragma omp simd
      for (int r = 0; r < W; r++) {
        s[r] = exp_(s[r] - largest[r]) * factor[r];
        g[r] = s[r] == A(0) ? A(0) : g[r];  // what is hidden has no part in it, be its value Inf or NaN
        if (one_pass) delta[r] += s[r] * g[r];
      }
    }
    tile.by_column(pieces, w.s, w.grad_out, w.grad_values);
    const A scale = static_cast<A>(args.scale);
    for (int64_t n = 0; n < held; n++) {
      A *s = w.s + n * W, *g = w.grad_s + n * W;
#pragma omp simd
      for (int r = 0; r < W; r++) g[r] = s[r] * (g[r] - delta[r]) * scale;
    }
    if (slope != nullptr) {
#pragma omp simd
      for (int64_t x = 0; x < held * W; x++) w.grad_s[x] *= slope[x];
    }
    tile.by_column(pieces, w.grad_s, w.q, w.grad_keys);
    if (first) std::fill_n(grad_q, rows * u.pitch, A(0));
    tile.by_row(pieces, w.grad_s, w.keys, grad_q);
  });
  for (int64_t r = 0; r < rows; r++) {
    const int64_t place = u.token_of(row0 + r) * args.heads + u.head_of(row0 + r);
    store_row(grad_q + r * u.pitch, static_cast<T*>(args.grad_q) + place * D, D);
  }
}

// Queries in tiles of two vectors of lanes, the rest in one vector where that is enough.
template <typename T, typename One, typename Two>
void for_tiles(const Unit<T>& u, One&& one, Two&& two) {
  constexpr int64_t L = Lanes<acc_t<T>>::count;
  for (int64_t row = 0; row < u.rows; row += 2 * L) {
    const int64_t rows = std::min(2 * L, u.rows - row);
    if (rows <= L) one(row, rows);
    else two(row, rows);
  }
}

}  // namespace

template <typename T>
int64_t latent_attention_workspace(const LatentAttentionArgs& args, int64_t max_seqlen, bool backward) {
  using A = acc_t<T>;
  Workspace<A> w;
  const int64_t pitch = Unit<T>::round_up(args.head_dim, Lanes<A>::count);
  return w.lay_out(nullptr, args.slots + max_seqlen, pitch, backward) * static_cast<int64_t>(sizeof(A));
}

template <typename T>
void latent_attention_fwd(const LatentAttentionArgs& args, int64_t pair, int64_t next, void* workspace) {
  const Unit<T> u(args, pair);
  if (u.tokens == 0) return;
  u.look_ahead(next, false);
  Workspace<acc_t<T>> w;
  w.lay_out(static_cast<acc_t<T>*>(workspace), u.columns, u.pitch, false);
  u.load_columns(args.memory_k, args.k, w.keys);
  u.load_columns(args.memory_v, args.v, w.values);
  for_tiles(
      u, [&](int64_t row, int64_t rows) { forward_tile<T, 1>(u, row, rows, w); },
      [&](int64_t row, int64_t rows) { forward_tile<T, 2>(u, row, rows, w); });
}

template <typename T>
void latent_attention_bwd(const LatentAttentionArgs& args, int64_t pair, int64_t next, void* workspace) {
  using A = acc_t<T>;
  const Unit<T> u(args, pair);
  u.look_ahead(next, true);
  Workspace<A> w;
  w.lay_out(static_cast<A*>(workspace), u.columns, u.pitch, true);
  std::fill_n(w.grad_keys, u.columns * u.pitch, A(0));
  std::fill_n(w.grad_values, u.columns * u.pitch, A(0));
  if (u.tokens > 0) {
    u.load_columns(args.memory_k, args.k, w.keys);
    u.load_columns(args.memory_v, args.v, w.values);
  }
  for_tiles(
      u, [&](int64_t row, int64_t rows) { backward_tile<T, 1>(u, row, rows, w); },
      [&](int64_t row, int64_t rows) { backward_tile<T, 2>(u, row, rows, w); });
  u.store_columns(w.grad_keys, args.grad_memory_k, args.grad_k);
  u.store_columns(w.grad_values, args.grad_memory_v, args.grad_v);
}

#define LMVAE_INSTANTIATE(T)                                                                                   \
  template int64_t latent_attention_workspace<T>(const LatentAttentionArgs&, int64_t, bool);                   \
  template void latent_attention_fwd<T>(const LatentAttentionArgs&, int64_t, int64_t, void*);                  \
  template void latent_attention_bwd<T>(const LatentAttentionArgs&, int64_t, int64_t, void*);
LMVAE_INSTANTIATE(float)
LMVAE_INSTANTIATE(double)
LMVAE_INSTANTIATE(c10::BFloat16)
LMVAE_INSTANTIATE(c10::Half)

}  // namespace lmvae::LMVAE_ISA
