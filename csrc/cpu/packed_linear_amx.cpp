// packed_linear on the AMX tiles: fp32 products as exact sums of bf16 parts (as in lm_head_loss_amx.cpp), for rows
// enough that the vector units would take longer than the memory.
//
// A number is high + middle + low, 8 bits each. Six products of parts are taken, smallest first; what is left out is
// below 2^-22 of a product, and 2^-25 of it on average. Inf less Inf is NaN: the caller does sums with a NaN over
// again. A step is 32 depths of a panel, which is a page of weights: while the tiles multiply one, the vector units
// take the next apart, and the lines of pages further on are fetched, one of every page in turn.
#include "amx.h"
#include "packed_linear.h"

#include <algorithm>
#include <functional>

namespace lmvae {

#ifdef LMVAE_AMX
namespace {

constexpr int64_t kDepth = 32, kBlock = 32;            // of one step, and rows of the accumulators
constexpr int64_t kParts = 3, kStep = kParts * kPair;  // bytes of a step's parts, of rows and of weights alike
constexpr int64_t kStreams = 8;                        // pages fetched in turn
constexpr int64_t kPage = kDepth * kLinearPanel * 4;

// Pairs (depth 2r, 2r + 1) of 16 columns in three vectors of bf16, by cutting bits off: exact, and never Inf.
TILES_INLINE void take_apart(__m512i even, __m512i odd, char* to) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t p = 0; p < kParts; p++, to += kPair) {
    const __m512i e = _mm512_and_si512(even, high), o = _mm512_and_si512(odd, high);
    _mm512_store_si512(to, _mm512_or_si512(_mm512_srli_epi32(e, 16), o));
    even = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(even), _mm512_castsi512_ps(e)));
    odd = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(odd), _mm512_castsi512_ps(o)));
  }
}

// Row pairs [from, from + count) of the 16 of a step's weights.
TILES_INLINE void take_apart_rows(const float* w, char* parts, int64_t from, int64_t count, const char* ahead) {
  for (int64_t r = from; r < from + count; r++) {
    for (int64_t l = 4 * r; l < 4 * r + 4; l++)
      __builtin_prefetch(ahead + l % kStreams * kPage + l / kStreams * 64, 0, 2);
    const float* pair = w + 2 * r * kLinearPanel;
    for (int64_t half = 0; half < 2; half++)
      take_apart(_mm512_loadu_si512(pair + 16 * half), _mm512_loadu_si512(pair + kLinearPanel + 16 * half),
                 parts + half * kTile + r * 64);
  }
}

// A block of at most 16 rows leaves the tiles of its second half alone.
#define LMVAE_LEFT_OF(part)               \
  _tile_loadd(4, a + (part) * kPair, 64); \
  if (whole) _tile_loadd(5, a + (part) * kPair + kTile, 64)
#define LMVAE_PRODUCT_OF()   \
  _tile_dpbf16ps(0, 4, 6);   \
  _tile_dpbf16ps(1, 4, 7);   \
  if (whole) {               \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7); \
  }

}  // namespace

int64_t packed_linear_amx_workspace(int64_t rows, int64_t in) {
  return (rows + kBlock - 1) / kBlock * (in / kDepth) * kStep;
}

// Steps [begin, end) of all rows, rows filled up with zeros: [block of 32 rows][step][part][half][16 rows x 32 bf16].
TILES void packed_linear_amx_rows(const float* x, int64_t stride, int64_t rows, int64_t in, char* parts, int64_t begin,
                                  int64_t end) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t r = 0; r < (rows + kBlock - 1) / kBlock * kBlock; r++) {
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

// Sums of panels [begin, end), each given to `done` as [rows][32] when it is complete.
TILES void packed_linear_amx_panels(const PackedLinearArgs& args, const char* parts, int64_t begin, int64_t end,
                                    const PanelSums& done) {
  alignas(64) char buffers[2][kStep];
  alignas(64) float sums[kLinearRows * kLinearPanel];
  configure_tiles();
  const int64_t rows = args.rows, steps = args.in / kDepth;
  const int64_t blocks = (rows + kBlock - 1) / kBlock, all = (end - begin) * steps;
  const float* weight = args.weight + begin * args.in * kLinearPanel;
  // Where the lines lie that step t fetches: its share of the group of pages after its own.
  const auto fetched = [&](int64_t t) {
    return reinterpret_cast<const char*>(weight) + (t / kStreams + 1) * kStreams * kPage +
           t % kStreams * (kPage / kStreams);
  };
  take_apart_rows(weight, buffers[0], 0, 16, fetched(0));
  for (int64_t t = 0; t < all; t++) {
    const int64_t step = t % steps, following = std::min(t + 1, all - 1);
    const float* next = weight + following * kDepth * kLinearPanel;
    const char *b = buffers[t % 2], *ahead = fetched(following);
    char* apart = buffers[(t + 1) % 2];
    for (int64_t block = 0; block < blocks; block++) {
      const char* a = parts + (block * steps + step) * kStep;  // a and b: what the tile macros load
      float* c = sums + block * kBlock * kLinearPanel;
      const bool whole = rows - block * kBlock > 16;
      asm volatile("" ::: "memory");  // tile loads do not tell the compiler what they read
      if (step == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      } else if (blocks > 1) {
        _tile_loadd(0, c, 128);
        _tile_loadd(1, c + 16, 128);
        _tile_loadd(2, c + 512, 128);
        _tile_loadd(3, c + 528, 128);
      }
      const bool side = block == 0;  // work of the vector units between the products
      LMVAE_LEFT_OF(0);
      LMVAE_RIGHT(2);
      LMVAE_PRODUCT_OF();
      if (side) take_apart_rows(next, apart, 0, 3, ahead);
      LMVAE_RIGHT(1);
      LMVAE_PRODUCT_OF();
      if (side) take_apart_rows(next, apart, 3, 3, ahead);
      LMVAE_RIGHT(0);
      LMVAE_PRODUCT_OF();
      if (side) take_apart_rows(next, apart, 6, 2, ahead);
      LMVAE_LEFT_OF(1);
      LMVAE_PRODUCT_OF();
      if (side) take_apart_rows(next, apart, 8, 3, ahead);
      LMVAE_RIGHT(1);
      LMVAE_PRODUCT_OF();
      if (side) take_apart_rows(next, apart, 11, 3, ahead);
      LMVAE_LEFT_OF(2);
      LMVAE_RIGHT(0);
      LMVAE_PRODUCT_OF();
      if (side) take_apart_rows(next, apart, 14, 2, ahead);
      if (step + 1 == steps || blocks > 1) {
        _tile_stored(0, c, 128);
        _tile_stored(1, c + 16, 128);
        _tile_stored(2, c + 512, 128);
        _tile_stored(3, c + 528, 128);
      }
      asm volatile("" ::: "memory");
    }
    if (step + 1 == steps) done(begin + t / steps, sums);
  }
  release_tiles();
}

// bf16 weights are tiles as they lie. A panel is multiplied piece by piece; with every block of rows its share of the
// lines of a piece further on is fetched.
TILES void half_linear_amx_panels(const HalfLinearArgs& a, const char* rows, int64_t begin, int64_t end,
                                  const PanelSums& done) {
  constexpr int64_t kSteps = 16;
  alignas(64) float sums[kLinearRows * kLinearPanel];
  configure_tiles();
  const int64_t blocks = (a.rows + kBlock - 1) / kBlock;
  for (int64_t p = begin; p < end; p++) {
    const char* panel = reinterpret_cast<const char*>(a.weight) + p * a.steps * kPair;
    for (int64_t s = 0; s < a.steps; s += kSteps) {
      const int64_t steps = std::min(kSteps, a.steps - s), share = kSteps * kPair / blocks;
      const char *w = panel + s * kPair, *ahead = w + steps * kPair;
      for (int64_t block = 0; block < blocks; block++) {
        for (int64_t line = block * share; line < (block + 1) * share; line += 64)
          __builtin_prefetch(ahead + line, 0, 2);
        product32<1>(rows + (block * a.steps + s) * kPair, w, steps, sums + block * kBlock * kLinearPanel, kLinearPanel,
                     s > 0);
      }
    }
    done(p, sums);
  }
  release_tiles();
}
#else
int64_t packed_linear_amx_workspace(int64_t, int64_t) { return 0; }
void packed_linear_amx_rows(const float*, int64_t, int64_t, int64_t, char*, int64_t, int64_t) {}
void packed_linear_amx_panels(const PackedLinearArgs&, const char*, int64_t, int64_t, const PanelSums&) {}
void half_linear_amx_panels(const HalfLinearArgs&, const char*, int64_t, int64_t, const PanelSums&) {}
#endif

}  // namespace lmvae
