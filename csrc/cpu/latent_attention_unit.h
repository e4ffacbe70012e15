// One (sentence, kv head) of latent attention: what its rows see, and where its rows lie. Rows that are dense in the
// accumulation type are used in place, others through a workspace.
#pragma once

#include <type_traits>

#include "latent_attention.h"
#include "latent_attention_tiles.h"

namespace lmvae::LMVAE_ISA {
namespace {

struct Range {
  int64_t lo, hi;
};

// Rows of A, dense, `pitch` elements apart.
template <typename A>
struct Rows {
  A* data;
  int64_t pitch;
  A* row(int64_t n) const { return data + n * pitch; }
};

// One row for each column: those of the slots, then those of the tokens.
template <typename A>
struct Columns {
  Rows<A> of[2];
  int64_t used;
  int64_t pitch(int kind) const { return of[kind].pitch; }
  A* at(int kind, int64_t column) const { return of[kind].row(kind == 0 ? column : column - used); }
};

// One (sentence, kv head). Columns are the slots that any token sees (0 .. used - 1), then the tokens.
template <typename T>
struct Unit {
  using A = acc_t<T>;
  const LatentAttentionArgs& args;
  int64_t b, kv_head, first, tokens, group, used, rows, columns, pitch;
  mutable Ahead ahead;
  bool whole;  // a row is whole vectors of the accumulation type: it can be read and written in place

  Unit(const LatentAttentionArgs& args_, int64_t pair)
      : args(args_), b(pair / args_.kv_heads), kv_head(pair % args_.kv_heads) {
    first = args.cu_seqlens[b];
    tokens = args.cu_seqlens[b + 1] - first;
    group = args.heads / args.kv_heads;
    used = args.visibility == Visibility::Prefix ? args.slots : std::min(args.slots, tokens);
    rows = tokens * group;  // row i * group + g: neighbours see nearly the same
    columns = used + tokens;
    pitch = round_up(args.head_dim, Lanes<A>::count);
    whole = std::is_same_v<T, A> && pitch == args.head_dim;
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

  // Plans to fetch what pair `next` (-1: none) will read and write of memory, where that is dense; the rest is little.
  void look_ahead(int64_t next, bool backward) const {
    if (next < 0) return;
    const Unit n(args, next);
    const int64_t bytes = n.used * args.head_dim * sizeof(T);
    for (const Strided* x : {&args.memory_k, &args.memory_v})
      if (x->row == args.head_dim && x->dim == 1)
        ahead.add(static_cast<const T*>(x->data) + n.b * x->batch + n.kv_head * x->head, bytes, false);
    if (backward && args.grad_memory_k != nullptr)
      for (void* x : {args.grad_memory_k, args.grad_memory_v}) ahead.add(n.memory_rows(x), bytes, true);
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
  Rows<const A> rows_of(const T* x, const Strided& layout, int64_t count, A* room) const {
    if constexpr (std::is_same_v<T, A>)
      if (whole && layout.dim == 1) return {x, layout.row};
    for (int64_t n = 0; n < count; n++) load_padded(x + n * layout.row, layout.dim, room + n * pitch);
    return {room, pitch};
  }
  // Keys or values of every column; room is for `columns` rows.
  Columns<const A> load_columns(const Strided& memory, const Strided& x, A* room) const {
    const T* m = static_cast<const T*>(memory.data) + b * memory.batch + kv_head * memory.head;
    const T* t = static_cast<const T*>(x.data) + first * x.row + kv_head * x.head;
    return {{rows_of(m, memory, used, room), rows_of(t, x, tokens, room + used * pitch)}, used};
  }
  // Queries or gradients of the output, rows [row, row + count).
  Rows<const A> load_rows(const Strided& x, int64_t row, int64_t count, A* room) const {
    if constexpr (std::is_same_v<T, A>)
      if (whole && x.dim == 1 && group == 1) return {row_of(x, row), x.row};
    for (int64_t r = 0; r < count; r++) load_padded(row_of(x, row + r), x.dim, room + r * pitch);
    return {room, pitch};
  }
  int64_t place_of(int64_t row) const { return token_of(row) * args.heads + head_of(row); }  // in [T, H]
  // A row of a [T, H, D] result whose tokens lie `token` numbers apart.
  T* result_row(void* x, int64_t token, int64_t row) const {
    return static_cast<T*>(x) + token_of(row) * token + head_of(row) * args.head_dim;
  }
  // Where rows [row, ...) of it are made: in place, or in `room`, from which store_rows takes them.
  Rows<A> target_rows(void* x, int64_t token, int64_t row, A* room) const {
    if constexpr (std::is_same_v<T, A>)
      if (whole && group == 1) return {result_row(x, token, row), token};
    return {room, pitch};
  }
  void store_rows(const Rows<A>& made, void* x, int64_t token, int64_t row, int64_t count, const A* room) const {
    if (made.data != room) return;
    for (int64_t r = 0; r < count; r++) store_row(made.row(r), result_row(x, token, row + r), args.head_dim);
  }
  // The same for the gradients of keys or values.
  T* memory_rows(void* memory) const {
    return memory == nullptr ? nullptr
                             : static_cast<T*>(memory) + (b * args.kv_heads + kv_head) * args.slots * args.head_dim;
  }
  T* token_rows(void* x) const { return static_cast<T*>(x) + first * args.grad_kv_token + kv_head * args.head_dim; }
  Columns<A> target_columns(void* memory, void* x, A* room) const {
    if constexpr (std::is_same_v<T, A>)
      if (whole) return {{{memory_rows(memory), pitch}, {token_rows(x), args.grad_kv_token}}, used};
    return {{{room, pitch}, {room + used * pitch, pitch}}, used};
  }
  void store_columns(const Columns<A>& made, void* memory, void* x, const A* room) const {
    const int64_t D = args.head_dim;
    T *m = memory_rows(memory), *t = token_rows(x);
    if (made.of[0].data == room) {
      for (int64_t j = 0; j < used; j++) store_row(made.at(0, j), m + j * D, D);
      for (int64_t i = 0; i < tokens; i++) store_row(made.at(1, used + i), t + i * args.grad_kv_token, D);
    }
    if (m != nullptr) std::fill_n(m + used * D, (args.slots - used) * D, T(0));
  }
};

}  // namespace
}  // namespace lmvae::LMVAE_ISA
