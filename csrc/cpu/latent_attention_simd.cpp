// Latent attention of one (sentence, kv head): forward and backward. Rows that are already dense in the accumulation
// type are read and written where they lie; others are converted into a workspace that for sentences of tens of tokens
// stays in the first- or second-level cache. Queries go through in tiles of one or two vectors of lanes, keys in passes
// of at most kPass with an online softmax. What a token sees is two runs of columns (visibility.py: visible_slots,
// visible_tokens), and what no row of a block sees is not computed.
#include "latent_attention.h"
#include "latent_attention_tiles.h"
#include "latent_attention_unit.h"

#include <limits>

namespace lmvae::LMVAE_ISA {
namespace {

constexpr int64_t kPass = 128;     // keys whose scores are held at once: with a tile of 32 queries, 16 KB
constexpr int64_t kChain = 48;     // products added one after the other before they join the rest, for accuracy
constexpr int kMaxLanes = 2 * 16;  // a tile's queries: at most two vectors of floats

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
        lo[kind][r] = static_cast<A>(seen.lo);
        hi[kind][r] = static_cast<A>(seen.hi);
      }
    }
  }
  Range range(int kind, int64_t r) const { return kind == 0 ? u.slots(first_row + r) : u.seen_tokens(first_row + r); }

  // Calls body(pieces of slots and tokens, scores held, first pass?) for every pass over the columns that the tile
  // sees.
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

  void dots_of(const Piece* pieces, const Columns<const A>& x, const A* rows_t, A* s) const {
    for (int kind = 0; kind < 2; kind++)
      dots<A, QV>(x.at(kind, pieces[kind].column), x.pitch(kind), pieces[kind].count, rows_t, u.args.head_dim,
                  s + pieces[kind].at * W, u.ahead);
  }

  // s = masked (and capped) scores of the pass; slope, where given, is d(capped score) / d(score).
  void scores(const Piece* pieces, int64_t held, const Columns<const A>& keys, const A* qt, A* s, A* slope) const {
    dots_of(pieces, keys, qt, s);
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

  // target[r] (+)= sum over the columns that r sees of s[column][r] * x[column]: O = P V, dQ = dS K.
  void by_row(const Piece* pieces, const A* s, const Columns<const A>& x, bool add, const Rows<A>& target) const {
    const int64_t step = even_step(count, kOuterRows);
    for (int64_t r = 0; r < count; r += step) {
      const int64_t n = std::min(step, count - r);
      bool more = add;
      for (int kind = 0; kind < 2; kind++) {
        const Piece& piece = pieces[kind];
        const int64_t from = std::max(piece.column, range(kind, r).lo);
        const int64_t to = std::min(piece.column + piece.count, range(kind, r + n - 1).hi);
        for (int64_t at = from; at < to; at += kChain, more = true)
          outer<A>(n, s + (piece.at + at - piece.column) * W + r, 1, W, x.at(kind, at), x.pitch(kind),
                   std::min(kChain, to - at), more, target.row(r), target.pitch, vecs);
      }
      if (!more)
        for (int64_t i = r; i < r + n; i++) std::fill_n(target.row(i), u.pitch, A(0));
    }
  }

  // target[column] (+)= sum over the rows that see it of s[column][r] * x[r]: dV = P^T dO, dK = dS^T Q.
  void by_column(const Piece* pieces, const A* s, const Rows<const A>& x, bool add, const Columns<A>& target) const {
    for (int kind = 0; kind < 2; kind++) {
      const Piece& piece = pieces[kind];
      const int64_t step = even_step(piece.count, kOuterRows);
      int64_t from = 0, to = 0;
      for (int64_t n = 0; n < piece.count; n += step) {
        const int64_t columns = std::min(step, piece.count - n), column = piece.column + n;
        while (from < count && hi[kind][from] <= static_cast<A>(column)) from++;
        to = std::max(to, from);
        while (to < count && lo[kind][to] < static_cast<A>(column + columns)) to++;
        if (from < to)
          outer<A>(columns, s + (piece.at + n) * W + from, W, 1, x.row(from), x.pitch, to - from, add,
                   target.at(kind, column), target.pitch(kind), vecs);
        else if (!add)
          clear(kind, column, column + columns, target);
      }
    }
  }

  // Zeros to the columns that this tile does not see.
  void clear_unseen(const Columns<A>& target) const {
    const Range every[2] = {{0, u.used}, {u.used, u.columns}};
    for (int kind = 0; kind < 2; kind++) {
      const bool any = all[kind].lo < all[kind].hi;
      clear(kind, every[kind].lo, any ? all[kind].lo : every[kind].hi, target);
      if (any) clear(kind, all[kind].hi, every[kind].hi, target);
    }
  }
  void clear(int kind, int64_t from, int64_t to, const Columns<A>& target) const {
    for (int64_t column = from; column < to; column++) std::fill_n(target.at(kind, column), u.pitch, A(0));
  }
};

// ---- workspace ------------------------------------------------------------------------------------------------------

template <typename A>
struct Workspace {  // laid out once for the longest sentence
  A *keys, *values, *qt, *q, *out, *s, *room;
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
    keys = take(columns * pitch);
    values = take(columns * pitch);
    qt = take(tile);
    q = take(tile);
    out = take(tile);
    s = take(block);
    room = take(pitch);
    if (backward) {
      grad_keys = take(columns * pitch);
      grad_values = take(columns * pitch);
      grad_out = take(tile);
      grad_out_t = take(tile);
      grad_s = take(block);
      slope = take(block);
    }
    return at;
  }
};

// ---- forward --------------------------------------------------------------------------------------------------------

template <typename T>
struct Sources {  // keys and values of every column
  Columns<const acc_t<T>> keys, values;
};

template <typename T, int QV>
void forward_tile(const Unit<T>& u, const Sources<T>& in, int64_t row0, int64_t rows, const Workspace<acc_t<T>>& w) {
  using A = acc_t<T>;
  constexpr int L = Lanes<A>::count, W = QV * L;
  const Tile<T, QV> tile(u, row0, rows);
  const Rows<const A> q = u.load_rows(u.args.q, row0, rows, w.q);
  transpose(q.data, q.pitch, rows, W, u.args.head_dim, static_cast<A>(u.args.scale), w.qt);
  const int64_t token = u.args.heads * u.args.head_dim;
  const Rows<A> out = u.target_rows(u.args.out, token, row0, w.out);
  const A none = -std::numeric_limits<A>::infinity();
  alignas(64) A largest[W], sum[W] = {}, base[W];
  std::fill_n(largest, W, none);
  tile.passes([&](const Piece* pieces, int64_t held, bool first) {
    tile.scores(pieces, held, in.keys, w.qt, w.s, nullptr);
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
      for (int r = 0; r < W; r++) {
        rescale[r] = exp_(rescale[r] - base[r]);
        sum[r] *= rescale[r];
      }
      for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < u.pitch; d++) out.row(r)[d] *= rescale[r];
    }
    for (int64_t n = 0; n < held; n++) {
      A* s = w.s + n * W;
#pragma omp simd
      for (int r = 0; r < W; r++) s[r] = exp_(s[r] - base[r]);
    }
#pragma GCC unroll 2
    for (int v = 0; v < QV; v++) {
      Vec<A> total = load(sum + v * L);
      for (int64_t block = 0; block < held; block += 16) {  // sums of sixteen, for accuracy
        Vec<A> part = {};
        for (int64_t n = block; n < std::min(held, block + 16); n++) part += load(w.s + n * W + v * L);
        total += part;
      }
      store(sum + v * L, total);
    }
    tile.by_row(pieces, w.s, in.values, !first, out);
  });
  for (int64_t r = 0; r < rows; r++) {
    const A factor = A(1) / sum[r];
    A* x = out.row(r);
    for (int64_t d = 0; d < u.pitch; d += L) store(x + d, load(x + d) * factor);
    A* stats = static_cast<A*>(u.args.stats) + u.place_of(row0 + r) * 2;
    stats[0] = base[r];
    stats[1] = factor;
  }
  u.store_rows(out, u.args.out, token, row0, rows, w.out);
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <typename T, int QV>
void backward_tile(const Unit<T>& u, const Sources<T>& in, const Columns<acc_t<T>>& grad_keys,
                   const Columns<acc_t<T>>& grad_values, int64_t row0, int64_t rows, const Workspace<acc_t<T>>& w) {
  using A = acc_t<T>;
  constexpr int L = Lanes<A>::count, W = QV * L;
  const Tile<T, QV> tile(u, row0, rows);
  const LatentAttentionArgs& args = u.args;
  const int64_t D = args.head_dim;
  const bool again = row0 > 0;  // the gradients of keys and values hold what earlier tiles gave
  if (!again) {
    tile.clear_unseen(grad_keys);
    tile.clear_unseen(grad_values);
  }
  const Rows<const A> q = u.load_rows(args.q, row0, rows, w.q);
  const Rows<const A> grad_out = u.load_rows(args.grad_out, row0, rows, w.grad_out);
  const Rows<A> grad_q = u.target_rows(args.grad_q, args.grad_q_token, row0, w.out);
  transpose(q.data, q.pitch, rows, W, D, static_cast<A>(args.scale), w.qt);
  transpose(grad_out.data, grad_out.pitch, rows, W, D, A(1), w.grad_out_t);

  alignas(64) A largest[W] = {}, factor[W] = {}, delta[W] = {};  // delta = sum over keys of P dP = dO . O
  bool one_pass = false;
  tile.passes([&](const Piece*, int64_t, bool first) { one_pass = first; });
  for (int64_t r = 0; r < rows; r++) {
    const A* stats = static_cast<const A*>(args.stats) + u.place_of(row0 + r) * 2;
    largest[r] = stats[0];
    factor[r] = stats[1];
    if (!one_pass) {
      A* out = w.room;
      load_row(static_cast<const T*>(args.out) + u.place_of(row0 + r) * D, 1, out, D);
      const A* grad = grad_out.row(r);
      A dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < D; d++) dot += grad[d] * out[d];
      delta[r] = dot;
    }
  }
  tile.passes([&](const Piece* pieces, int64_t held, bool first) {
    A* slope = args.softcap > 0 ? w.slope : nullptr;
    tile.scores(pieces, held, in.keys, w.qt, w.s, slope);
    tile.dots_of(pieces, in.values, w.grad_out_t, w.grad_s);
    for (int64_t n = 0; n < held; n++) {
      A *s = w.s + n * W, *g = w.grad_s + n * W;
#pragma omp simd
      for (int r = 0; r < W; r++) {
        s[r] = exp_(s[r] - largest[r]) * factor[r];
        g[r] = s[r] == A(0) ? A(0) : g[r];  // what is hidden has no part in it, be its value Inf or NaN
      }
    }
    tile.by_column(pieces, w.s, grad_out, again, grad_values);
    const Vec<A> scale = splat(static_cast<A>(args.scale));
#pragma GCC unroll 2
    for (int v = 0; v < QV; v++) {
      Vec<A> sum = load(delta + v * L);
      if (one_pass)
        for (int64_t x = v * L; x < held * W; x += W) sum += load(w.s + x) * load(w.grad_s + x);
      for (int64_t x = v * L; x < held * W; x += W)
        store(w.grad_s + x, load(w.s + x) * (load(w.grad_s + x) - sum) * scale);
    }
    if (slope != nullptr) {
#pragma omp simd
      for (int64_t x = 0; x < held * W; x++) w.grad_s[x] *= slope[x];
    }
    tile.by_column(pieces, w.grad_s, q, again, grad_keys);
    tile.by_row(pieces, w.grad_s, in.keys, !first, grad_q);
  });
  u.store_rows(grad_q, args.grad_q, args.grad_q_token, row0, rows, w.out);
}

// Queries in tiles of two vectors of lanes, the rest in one vector where that is enough.
template <typename T, typename One, typename Two>
void for_tiles(const Unit<T>& u, One&& one, Two&& two) {
  constexpr int64_t L = Lanes<acc_t<T>>::count;
  for (int64_t row = 0; row < u.rows; row += 2 * L) {
    const int64_t rows = std::min(2 * L, u.rows - row);
    if (rows <= L)
      one(row, rows);
    else
      two(row, rows);
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
  const Sources<T> in = {u.load_columns(args.memory_k, args.k, w.keys),
                         u.load_columns(args.memory_v, args.v, w.values)};
  for_tiles(
      u, [&](int64_t row, int64_t rows) { forward_tile<T, 1>(u, in, row, rows, w); },
      [&](int64_t row, int64_t rows) { forward_tile<T, 2>(u, in, row, rows, w); });
}

template <typename T>
void latent_attention_bwd(const LatentAttentionArgs& args, int64_t pair, int64_t next, void* workspace) {
  using A = acc_t<T>;
  const Unit<T> u(args, pair);
  u.look_ahead(next, true);
  Workspace<A> w;
  w.lay_out(static_cast<A*>(workspace), u.columns, u.pitch, true);
  const Columns<A> grad_keys = u.target_columns(args.grad_memory_k, args.grad_k, w.grad_keys);
  const Columns<A> grad_values = u.target_columns(args.grad_memory_v, args.grad_v, w.grad_values);
  if (u.tokens > 0) {
    const Sources<T> in = {u.load_columns(args.memory_k, args.k, w.keys),
                           u.load_columns(args.memory_v, args.v, w.values)};
    for_tiles(
        u, [&](int64_t row, int64_t rows) { backward_tile<T, 1>(u, in, grad_keys, grad_values, row, rows, w); },
        [&](int64_t row, int64_t rows) { backward_tile<T, 2>(u, in, grad_keys, grad_values, row, rows, w); });
  } else {
    for (const Columns<A>& grad : {grad_keys, grad_values})
      for (int64_t j = 0; j < u.used; j++) std::fill_n(grad.at(0, j), u.pitch, A(0));
  }
  u.store_columns(grad_keys, args.grad_memory_k, args.grad_k, w.grad_keys);
  u.store_columns(grad_values, args.grad_memory_v, args.grad_v, w.grad_values);
}

#define LMVAE_INSTANTIATE(T)                                                                  \
  template int64_t latent_attention_workspace<T>(const LatentAttentionArgs&, int64_t, bool);  \
  template void latent_attention_fwd<T>(const LatentAttentionArgs&, int64_t, int64_t, void*); \
  template void latent_attention_bwd<T>(const LatentAttentionArgs&, int64_t, int64_t, void*);
LMVAE_INSTANTIATE(float)
LMVAE_INSTANTIATE(double)
LMVAE_INSTANTIATE(c10::BFloat16)
LMVAE_INSTANTIATE(c10::Half)

}  // namespace lmvae::LMVAE_ISA
