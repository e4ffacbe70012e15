// packed_linear in fp32 on the AMX tiles, as exact sums of bf16 parts (as in lm_head_loss_amx.cpp), for rows enough
// that the vector units would take longer than the memory.
//
// A number is high + middle + low, 8 bits each. Six products of parts are taken; what is left out is below 2^-22 of a
// product, and 2^-25 of it on average. Inf less Inf is NaN: the caller does sums with a NaN over again. While the tiles
// multiply, the vector units take the next weights apart.
#include "amx_panels.h"

#include <algorithm>

namespace lmvae {

#ifdef LMVAE_AMX
namespace {

constexpr int64_t kParts = 3, kStep = kParts * kPair;  // bytes of a step's parts, of rows and of weights alike
constexpr int64_t kPage = kDepth * kLinearPanel * 4;   // a step of fp32 weights
constexpr int64_t kStreams = 8;                        // pages fetched in turn
constexpr int64_t kPieceSteps = kStreams;

// Pairs (depth 2r, 2r + 1) of 16 columns in three vectors of bf16, by cutting bits off: exact, and never Inf.
TILES_INLINE void take_apart(__m512i even, __m512i odd, char* to) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
#pragma GCC unroll 3
  for (int64_t p = 0; p < kParts; p++, to += kPair) {
    const __m512i e = _mm512_and_si512(even, high), o = _mm512_and_si512(odd, high);
    _mm512_store_si512(to, _mm512_or_si512(_mm512_srli_epi32(e, 16), o));
    even = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(even), _mm512_castsi512_ps(e)));
    odd = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(odd), _mm512_castsi512_ps(o)));
  }
}

// What the vector units do between the products: steps of the weight taken apart, one pair of depths after another, and
// lines further on fetched, one of every page in turn.
class TakingApart {
 public:
  // steps [0, steps) at `weight`, into `parts`; of the kStreams pages at `ahead` the lines from `line` on.
  TILES_INLINE TakingApart(const float* weight, int64_t steps, char* parts, const char* ahead, int64_t line = 0)
      : pair_(weight), end_(weight + steps * kDepth * kLinearPanel), parts_(parts), ahead_(ahead + line * 64) {}

  template <int count>
  TILES_INLINE void some() {
#pragma GCC unroll 4
    for (int i = 0; i < count && pair_ < end_; i++) {
      const char* line = ahead_ + row_ % 2 * 4 * kPage + row_ / 2 * 64;
#pragma GCC unroll 4
      for (int page = 0; page < 4; page++) __builtin_prefetch(line + page * kPage, 0, 2);
      char* to = parts_ + row_ * 64;
      take_apart(_mm512_loadu_si512(pair_), _mm512_loadu_si512(pair_ + kLinearPanel), to);
      take_apart(_mm512_loadu_si512(pair_ + 16), _mm512_loadu_si512(pair_ + kLinearPanel + 16), to + kTile);
      pair_ += 2 * kLinearPanel;
      if (++row_ == 16) {
        row_ = 0;
        parts_ += kStep;
        ahead_ += kPage / kStreams;
      }
    }
  }
  TILES_INLINE void rest() {
    while (pair_ < end_) some<1>();
  }

 private:
  const float *pair_, *end_;
  char* parts_;
  const char* ahead_;
  int64_t row_ = 0;
};

// c (+)= rows x weights over `steps` steps of three parts, with `pairs` pairs of depths taken apart in each.
template <bool whole, int pairs>
TILES __attribute__((noinline)) void parts_product(const char* a, const char* b, int64_t steps, float* c, bool add,
                                                   TakingApart& apart) {
  LMVAE_BEGIN(add);
  TakingApart side = apart;
  for (int64_t k = 0; k < steps; k++, a += kStep, b += kStep) {
    LMVAE_LEFT_OF(_tile_loadd, 0);
    LMVAE_RIGHT(2);
    LMVAE_PRODUCT_OF();
    side.some<(pairs + 5) / 6>();
    LMVAE_RIGHT(1);
    LMVAE_PRODUCT_OF();
    side.some<(pairs + 4) / 6>();
    LMVAE_RIGHT(0);
    LMVAE_PRODUCT_OF();
    side.some<(pairs + 3) / 6>();
    LMVAE_LEFT_OF(_tile_loadd, 2);
    LMVAE_PRODUCT_OF();
    side.some<(pairs + 2) / 6>();
    LMVAE_LEFT_OF(_tile_loadd, 1);
    LMVAE_PRODUCT_OF();
    side.some<(pairs + 1) / 6>();
    LMVAE_RIGHT(1);
    LMVAE_PRODUCT_OF();
    side.some<pairs / 6>();
  }
  apart = side;
  LMVAE_END();
}

// One block of rows: there is so little to multiply that the parts of more than two steps would leave the first-level
// cache before they are used. Sums stay in the tiles for a whole panel.
template <bool whole>
TILES void one_block(const PackedLinearArgs& args, const char* parts, PanelQueue::Group group, float* c,
                     const PanelSums& done) {
  alignas(64) char buffers[2][kStep];
  const int64_t steps = args.in / kDepth, all = (group.end - group.begin) * steps;
  const float* weight = args.weight + group.begin * args.in * kLinearPanel;
  // Step t fetches its share of the pages after its own kStreams.
  const auto taking = [&](int64_t t, char* to) TILES {
    return TakingApart(weight + t * kDepth * kLinearPanel, 1, to,
                       reinterpret_cast<const char*>(weight) + (t / kStreams + 1) * kStreams * kPage,
                       t % kStreams * kStreams);
  };
  taking(0, buffers[0]).rest();
  for (int64_t t = 0; t < all; t++) {
    TakingApart next = taking(std::min(t + 1, all - 1), buffers[(t + 1) % 2]);
    const int64_t step = t % steps;
    const char *a = parts + step * kStep, *b = buffers[t % 2];
    asm volatile("" ::: "memory");
    if (step == 0) {
      LMVAE_BEGIN(false)
    }
    LMVAE_LEFT_OF(_tile_loadd, 0);
    LMVAE_RIGHT(2);
    LMVAE_PRODUCT_OF();
    next.some<3>();
    LMVAE_RIGHT(1);
    LMVAE_PRODUCT_OF();
    next.some<3>();
    LMVAE_RIGHT(0);
    LMVAE_PRODUCT_OF();
    next.some<3>();
    LMVAE_LEFT_OF(_tile_loadd, 2);
    LMVAE_PRODUCT_OF();
    next.some<3>();
    LMVAE_LEFT_OF(_tile_loadd, 1);
    LMVAE_PRODUCT_OF();
    next.some<2>();
    LMVAE_RIGHT(1);
    LMVAE_PRODUCT_OF();
    next.some<2>();
    if (step + 1 == steps) {
      LMVAE_END();
      done(group.begin + t / steps, c);
    }
  }
}

// Blocks of rows of a piece, while the next piece is taken apart: `pairs` pairs of depths a step of each block.
TILES void blocks_product(const AmxPlan& plan, const char* parts, Piece piece, const char* weight, float* sums,
                          TakingApart& next) {
  const int64_t blocks = blocks_of(plan.rows);
  for (int64_t block = 0; block < blocks; block++) {
    const char* a = parts + (block * plan.steps + piece.step) * kStep;
    float* c = sums + block * kBlock * kLinearPanel;
    const bool add = piece.step > 0;
    if (plan.rows - block * kBlock <= 16)
      parts_product<false, 8>(a, weight, piece.steps, c, add, next);
    else if (blocks <= 2)
      parts_product<true, 8>(a, weight, piece.steps, c, add, next);
    else if (blocks <= 4)
      parts_product<true, 4>(a, weight, piece.steps, c, add, next);
    else
      parts_product<true, 2>(a, weight, piece.steps, c, add, next);
  }
  next.rest();
}

}  // namespace

int64_t packed_linear_amx_workspace(int64_t rows, int64_t in) { return blocks_of(rows) * (in / kDepth) * kStep; }

// Steps [begin, end) of all rows, rows filled up with zeros: [block of 32 rows][step][part][half][16 rows x 32 bf16].
TILES void packed_linear_amx_rows(const float* x, int64_t stride, int64_t rows, int64_t in, char* parts, int64_t begin,
                                  int64_t end) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t r = 0; r < blocks_of(rows) * kBlock; r++) {
    for (int64_t k = begin; k < end; k++) {
      char* to = parts + (r / kBlock * (in / kDepth) + k) * kStep + r % kBlock / 16 * kTile + r % 16 * 64;
      __m512i left = _mm512_setzero_si512(), right = left;
      if (r < rows) {
        left = _mm512_loadu_si512(x + r * stride + k * kDepth);
        right = _mm512_loadu_si512(x + r * stride + k * kDepth + 16);
      }
      for (int64_t p = 0; p < kParts; p++, to += kPair) {
        const __m512i l = _mm512_and_si512(left, high), h = _mm512_and_si512(right, high);
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(l, 16)));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 32), _mm512_cvtepi32_epi16(_mm512_srli_epi32(h, 16)));
        left = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(l)));
        right = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(right), _mm512_castsi512_ps(h)));
      }
    }
  }
}

TILES void packed_linear_amx_panels(const PackedLinearArgs& args, const char* parts, const AmxPlan& plan,
                                    PanelQueue& queue, const PanelSums& done) {
  configure_tiles();
  const Sums sums(plan);
  const Room<char> room(plan.rows <= kBlock ? 0 : 2 * kPieceSteps * kStep);
  char* buffers[2] = {room.data(), room.data() + kPieceSteps * kStep};
  const auto weight = [&](const Piece& piece) {
    return args.weight + (piece.panel * args.in + piece.step * kDepth) * kLinearPanel;
  };
  for (auto group = queue.take(); group.begin < group.end; group = queue.take()) {
    if (plan.rows <= kBlock) {
      plan.rows <= 16 ? one_block<false>(args, parts, group, sums.of(0), done)
                      : one_block<true>(args, parts, group, sums.of(0), done);
      continue;
    }
    Walk walk(group, plan, kPieceSteps);
    Piece piece = walk.next(), next = walk.next();
    TakingApart(weight(piece), piece.steps, buffers[0], reinterpret_cast<const char*>(weight(next))).rest();
    for (int64_t t = 0; piece.steps > 0; t++) {
      const Piece after = walk.next();
      TakingApart apart(weight(next), next.steps, buffers[(t + 1) % 2], reinterpret_cast<const char*>(weight(after)));
      blocks_product(plan, parts, piece, buffers[t % 2], sums.of(piece.panel), apart);
      if (piece.last) done(piece.panel, sums.of(piece.panel));
      piece = next;
      next = after;
    }
  }
  release_tiles();
}

#else
int64_t packed_linear_amx_workspace(int64_t, int64_t) { return 0; }
void packed_linear_amx_rows(const float*, int64_t, int64_t, int64_t, char*, int64_t, int64_t) {}
void packed_linear_amx_panels(const PackedLinearArgs&, const char*, const AmxPlan&, PanelQueue&, const PanelSums&) {}
#endif

}  // namespace lmvae
