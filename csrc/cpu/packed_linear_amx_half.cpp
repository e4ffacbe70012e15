// packed_linear in bf16 on the AMX tiles, whose operands packed weights are as they lie; and the order of the work for
// both precisions.
#include "amx_panels.h"

#include <algorithm>

namespace lmvae {

#ifdef LMVAE_AMX
namespace {

constexpr int64_t kChunkBytes = 800 << 10;  // of the rows, in a second-level cache of 2 MB (as wherever there is AMX)
constexpr int64_t kLeastChunk = 8;          // steps
constexpr int64_t kSumBytes = 1 << 20;
constexpr int64_t kGroups = 8, kLeastGroup = 4;  // groups of a thread, panels of a group

struct HalfProduct {
  static constexpr int64_t kRows = kBlock;
  template <bool whole, int lines>
  TILES __attribute__((noinline)) static void run(const char* a, const char* b, int64_t steps, float* c, bool add,
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
};

}  // namespace

AmxPlan amx_plan(int64_t rows, int64_t steps, int64_t panels, int64_t threads, int64_t block_bytes, int64_t sums) {
  AmxPlan plan{};
  plan.rows = rows;
  plan.steps = steps;
  plan.sums = sums;
  const int64_t fit = kChunkBytes / (blocks_of(rows) * block_bytes);
  plan.chunk = rows <= kBlock ? plan.steps : even(plan.steps, std::max<int64_t>(fit, kLeastChunk));
  const int64_t each = (panels + threads - 1) / threads;
  if (plan.chunk == plan.steps) {
    plan.group = std::min(each, std::max(kLeastGroup, (each + kGroups - 1) / kGroups));
  } else {  // the sums of a group's panels wait for the last chunk
    const int64_t kept = kSumBytes / (blocks_of(rows) * kBlock * sums * 4);
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

TILES void half_linear_amx_panels(const HalfLinearArgs& a, const char* rows, const AmxPlan& plan, PanelQueue& queue,
                                  const PanelSums& done) {
  streamed_panels<HalfProduct>(reinterpret_cast<const char*>(a.weight), rows, plan, queue, done);
}
#else
AmxPlan amx_plan(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t) { return {}; }
void half_linear_amx_rows(const c10::BFloat16*, int64_t, int64_t, int64_t, char*, int64_t, int64_t) {}
void half_linear_amx_panels(const HalfLinearArgs&, const char*, const AmxPlan&, PanelQueue&, const PanelSums&) {}
#endif

}  // namespace lmvae
