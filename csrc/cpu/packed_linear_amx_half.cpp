// packed_linear in bf16 on the AMX tiles, whose operands packed weights are as they lie; and the order of the work for
// both precisions.
#include "amx_panels.h"

#include <algorithm>

namespace lmvae {

#ifdef LMVAE_AMX
namespace {

constexpr int64_t kPieceSteps = 16;
constexpr int64_t kChunkBytes = 800 << 10;  // of the rows, in a second-level cache of 2 MB (as wherever there is AMX)
constexpr int64_t kLeastChunk = 8;          // steps
constexpr int64_t kSumBytes = 1 << 20;
constexpr int64_t kGroups = 8, kLeastGroup = 4;  // groups of a thread, panels of a group

// c (+)= rows x weights over `steps` steps, with `lines` lines fetched in each.
template <bool whole, int lines>
TILES __attribute__((noinline)) void half_product(const char* a, const char* b, int64_t steps, float* c, bool add,
                                                  const char* ahead) {
  LMVAE_BEGIN(add);
  for (int64_t k = 0; k < steps; k++, a += kPair, b += kPair, ahead += lines * 64) {
    LMVAE_LEFT_OF(_tile_stream_loadd, 0);
    LMVAE_RIGHT(0);
#pragma GCC unroll 32
    for (int line = 0; line < lines; line++) __builtin_prefetch(ahead + line * 64, 0, 2);
    LMVAE_PRODUCT_OF();
  }
  LMVAE_END();
}

template <int lines>
TILES void half_block(bool whole, const char* a, const char* b, int64_t steps, float* c, bool add, const char* ahead) {
  if (whole)
    half_product<true, lines>(a, b, steps, c, add, ahead);
  else
    half_product<false, lines>(a, b, steps, c, add, ahead);
}

}  // namespace

AmxPlan amx_plan(int64_t rows, int64_t in, int64_t panels, int64_t threads, int64_t parts) {
  AmxPlan plan{};
  plan.rows = rows;
  plan.steps = (in + kDepth - 1) / kDepth;
  const int64_t fit = kChunkBytes / (blocks_of(rows) * parts * kPair);
  plan.chunk = rows <= kBlock ? plan.steps : even(plan.steps, std::max<int64_t>(fit, kLeastChunk));
  const int64_t each = (panels + threads - 1) / threads;
  if (plan.chunk == plan.steps) {
    plan.group = std::min(each, std::max(kLeastGroup, (each + kGroups - 1) / kGroups));
  } else {  // the sums of a group's panels wait for the last chunk
    const int64_t kept = kSumBytes / (blocks_of(rows) * kBlock * kLinearPanel * 4);
    plan.group = std::min(each, std::max(kLeastGroup, kept));
  }
  return plan;
}

// Rows [begin, end) as tiles, zeros beyond rows and inputs: [block of 32 rows][step][32 rows][32 depths].
TILES void half_linear_amx_rows(const c10::BFloat16* x, int64_t stride, int64_t rows, int64_t in, char* tiles,
                                int64_t begin, int64_t end) {
  const int64_t steps = (in + kDepth - 1) / kDepth;
  const __mmask32 last = 0xffffffffu >> (steps * kDepth - in);
  for (int64_t r = begin; r < end; r++) {
    char* to = tiles + (r / kBlock * steps * kBlock + r % kBlock) * 64;
    for (int64_t s = 0; s < steps; s++, to += kPair) {
      const __mmask32 mask = r >= rows ? 0 : s + 1 < steps ? 0xffffffffu : last;
      _mm512_store_si512(to, _mm512_maskz_loadu_epi16(mask, x + r * stride + s * kDepth));
    }
  }
}

// bf16 weights are tiles as they lie.
TILES void half_linear_amx_panels(const HalfLinearArgs& a, const char* rows, const AmxPlan& plan, PanelQueue& queue,
                                  const PanelSums& done) {
  configure_tiles();
  const Sums sums(plan);
  const int64_t blocks = blocks_of(plan.rows);
  const auto weight = [&](const Piece& piece) {
    return reinterpret_cast<const char*>(a.weight) + (piece.panel * plan.steps + piece.step) * kPair;
  };
  for (auto group = queue.take(); group.begin < group.end; group = queue.take()) {
    Walk walk(group, plan, kPieceSteps);
    for (Piece piece = walk.next(); piece.steps > 0;) {
      const Piece next = walk.next();
      const char *b = weight(piece), *ahead = weight(next.steps > 0 ? next : Piece{queue.following()});
      float* c = sums.of(piece.panel);
      // As many lines a step that the first blocks fetch all 32 of every step.
      const int64_t lines = blocks == 1 ? 32 : blocks == 2 ? 16 : blocks <= 4 ? 8 : blocks <= 8 ? 4 : 2;
      for (int64_t block = 0; block < blocks; block++) {
        const char *left = rows + (block * plan.steps + piece.step) * kPair,
                   *at = ahead + block * piece.steps * lines * 64;
        float* to = c + block * kBlock * kLinearPanel;
        const bool whole = plan.rows - block * kBlock > 16, add = piece.step > 0;
        if (block * lines >= 32)
          half_block<0>(whole, left, b, piece.steps, to, add, ahead);
        else if (lines == 32)
          half_block<32>(whole, left, b, piece.steps, to, add, at);
        else if (lines == 16)
          half_block<16>(whole, left, b, piece.steps, to, add, at);
        else if (lines == 8)
          half_block<8>(whole, left, b, piece.steps, to, add, at);
        else if (lines == 4)
          half_block<4>(whole, left, b, piece.steps, to, add, at);
        else
          half_block<2>(whole, left, b, piece.steps, to, add, at);
      }
      if (piece.last) done(piece.panel, c);
      piece = next;
    }
  }
  release_tiles();
}
#else
AmxPlan amx_plan(int64_t, int64_t, int64_t, int64_t, int64_t) { return {}; }
void half_linear_amx_rows(const c10::BFloat16*, int64_t, int64_t, int64_t, char*, int64_t, int64_t) {}
void half_linear_amx_panels(const HalfLinearArgs&, const char*, const AmxPlan&, PanelQueue&, const PanelSums&) {}
#endif

}  // namespace lmvae
