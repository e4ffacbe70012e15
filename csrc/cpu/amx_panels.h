// What packed_linear's products on the AMX tiles share: the order in which a thread multiplies, and its tiles.
//
// A thread takes groups of panels and walks through each in pieces of some steps of 32 depths: every block of 32 rows
// is multiplied with a piece before the next. The rows lie in the second-level cache, the piece in the first. The lines
// of a piece further on are fetched evenly between the products: all at once they would take every place for a line on
// its way that a core has, and the products would wait behind them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "amx.h"
#include "packed_linear.h"
#include "room.h"

#ifdef LMVAE_AMX
namespace lmvae {
namespace {

constexpr int64_t kDepth = 32, kBlock = 32;  // numbers of 16 bits of one step, and rows of their accumulators

// Equal parts of `whole`, as few as are at most `most`: the size of one.
inline int64_t even(int64_t whole, int64_t most) {
  const int64_t parts = (whole + most - 1) / most;
  return (whole + parts - 1) / parts;
}

// Steps [step, step + steps) of a panel, the last of them or not. Without steps: nothing.
struct Piece {
  int64_t panel = 0, step = 0, steps = 0;
  bool last = false;
};

// The pieces of a group in their order: chunk by chunk of the depth, panel by panel.
class Walk {
 public:
  Walk(PanelQueue::Group group, const AmxPlan& plan, int64_t most)
      : group_(group), steps_(plan.steps), chunk_(plan.chunk), most_(most), panel_(group.begin) {}

  Piece next() {
    if (begin_ >= steps_ || panel_ >= group_.end) return {};
    const int64_t end = std::min(begin_ + chunk_, steps_), size = std::min(even(end - begin_, most_), end - step_);
    const Piece piece{panel_, step_, size, step_ + size == steps_};
    step_ += size;
    if (step_ < end) return piece;
    if (++panel_ == group_.end) {
      panel_ = group_.begin;
      begin_ = end;
    }
    step_ = begin_;
    return piece;
  }

 private:
  PanelQueue::Group group_;
  int64_t steps_, chunk_, most_, panel_, begin_ = 0, step_ = 0;
};

inline int64_t blocks_of(int64_t rows) { return (rows + kBlock - 1) / kBlock; }

// Room for a panel's sums; with several chunks of the depth, for those of every panel of a group.
class Sums {
 public:
  explicit Sums(const AmxPlan& plan)
      : numbers_(blocks_of(plan.rows) * kBlock * plan.sums),
        panels_(plan.chunk < plan.steps ? plan.group : 1),
        room_(panels_ * numbers_) {}
  float* of(int64_t panel) const { return room_.data() + panel % panels_ * numbers_; }

 private:
  int64_t numbers_, panels_;
  Room<float> room_;
};

// A block of at most 16 rows leaves the tiles of its second half alone.
#define LMVAE_SUMS(what)                                           \
  _tile_##what(0, c, kLinearPanel * 4);                            \
  _tile_##what(1, c + 16, kLinearPanel * 4);                       \
  if constexpr (whole) {                                           \
    _tile_##what(2, c + 16 * kLinearPanel, kLinearPanel * 4);      \
    _tile_##what(3, c + 16 * kLinearPanel + 16, kLinearPanel * 4); \
  }
#define LMVAE_LEFT_OF(load, part)  \
  load(4, a + (part) * kPair, 64); \
  if constexpr (whole) load(5, a + (part) * kPair + kTile, 64)
#define LMVAE_PRODUCT_OF()   \
  _tile_dpbf16ps(0, 4, 6);   \
  _tile_dpbf16ps(1, 4, 7);   \
  if constexpr (whole) {     \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7); \
  }
// Tile loads do not tell the compiler what they read.
#define LMVAE_BEGIN(add)         \
  asm volatile("" ::: "memory"); \
  if (add) {                     \
    LMVAE_SUMS(loadd)            \
  } else {                       \
    _tile_zero(0);               \
    _tile_zero(1);               \
    _tile_zero(2);               \
    _tile_zero(3);               \
  }
#define LMVAE_END()  \
  LMVAE_SUMS(stored) \
  asm volatile("" ::: "memory")

constexpr int64_t kStreamedSteps = 16;  // of a piece of weights that are tiles as they lie

// One product with weights that are tiles as they lie, 2 KB a step, as are a block of the rows: Product::run<whole,
// lines>(rows, weights, steps, c, add, ahead) adds to 4 KB of sums, while it fetches `lines` lines a step.
template <typename Product, int lines>
TILES void streamed_block(bool whole, const char* a, const char* b, int64_t steps, float* c, bool add,
                          const char* ahead) {
  if (whole)
    Product::template run<true, lines>(a, b, steps, c, add, ahead);
  else
    Product::template run<false, lines>(a, b, steps, c, add, ahead);
}

// The sums of the queue's panels, in blocks of Product::kRows rows.
template <typename Product>
TILES void streamed_panels(const char* weights, const char* rows, const AmxPlan& plan, PanelQueue& queue,
                           const PanelSums& done) {
  configure_tiles();
  const Sums sums(plan);
  const int64_t blocks = (plan.rows + Product::kRows - 1) / Product::kRows;
  const auto weight = [&](const Piece& piece) { return weights + (piece.panel * plan.steps + piece.step) * kPair; };
  for (auto group = queue.take(); group.begin < group.end; group = queue.take()) {
    Walk walk(group, plan, kStreamedSteps);
    for (Piece piece = walk.next(); piece.steps > 0;) {
      const Piece next = walk.next();
      const char *b = weight(piece), *ahead = weight(next.steps > 0 ? next : Piece{queue.following()});
      float* c = sums.of(piece.panel);
      // As many lines a step that the first blocks fetch all 32 of every step, or most of them.
      const int64_t lines = blocks == 1 ? 32 : blocks == 2 ? 16 : blocks <= 4 ? 8 : blocks <= 8 ? 4 : 2;
      for (int64_t block = 0; block < blocks; block++) {
        const char *left = rows + (block * plan.steps + piece.step) * kPair,
                   *at = ahead + block * piece.steps * lines * 64;
        float* to = c + block * Product::kRows * plan.sums;
        const bool whole = plan.rows - block * Product::kRows > 16, add = piece.step > 0;
        if (block * lines >= 32)
          streamed_block<Product, 0>(whole, left, b, piece.steps, to, add, ahead);
        else if (lines == 32)
          streamed_block<Product, 32>(whole, left, b, piece.steps, to, add, at);
        else if (lines == 16)
          streamed_block<Product, 16>(whole, left, b, piece.steps, to, add, at);
        else if (lines == 8)
          streamed_block<Product, 8>(whole, left, b, piece.steps, to, add, at);
        else if (lines == 4)
          streamed_block<Product, 4>(whole, left, b, piece.steps, to, add, at);
        else
          streamed_block<Product, 2>(whole, left, b, piece.steps, to, add, at);
      }
      if (piece.last) done(piece.panel, c);
      piece = next;
    }
  }
  release_tiles();
}

}  // namespace
}  // namespace lmvae
#endif
