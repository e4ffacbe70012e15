// latent_kv on the AMX tiles. Memory of bf16 weights: both operands are as they are. The gradient of a weight, and the
// products of gradients for its norm, where the memory's gradients are of bf16: they are operands as they are, and z is
// an exact sum of three parts, so that the sums are those of an fp32 product.
#include "amx.h"
#include "latent_kv.h"

#include <algorithm>

namespace lmvae {

#ifdef LMVAE_AMX
namespace {

constexpr int64_t kParts = 3, kSide = 32;  // rows, columns and depths of a product

// c = a x b: `a` of one part, `b` of three, the smallest first.
TILES __attribute__((noinline)) void product_by_parts(const char* a, const char* b, int64_t steps, float* c,
                                                      int64_t ldc) {
  asm volatile("" ::: "memory");  // tile loads do not tell the compiler what they read
  const int64_t row = ldc * 4;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < steps; k++, a += kPair, b += kParts * kPair) {
    LMVAE_LEFT(0);
    LMVAE_RIGHT(2);
    LMVAE_PRODUCT();
    LMVAE_RIGHT(1);
    LMVAE_PRODUCT();
    LMVAE_RIGHT(0);
    LMVAE_PRODUCT();
  }
  _tile_stored(0, c, row);
  _tile_stored(1, c + 16, row);
  _tile_stored(2, c + 16 * ldc, row);
  _tile_stored(3, c + 16 * ldc + 16, row);
  asm volatile("" ::: "memory");
}

// [rows / 32][columns / 32][32 rows][32 columns], of numbers that bf16 has.
TILES void left_operand(const float* x, int64_t rows, int64_t columns, char* to) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c += kSide) {
      const __m512 low = _mm512_loadu_ps(x + r * columns + c), high = _mm512_loadu_ps(x + r * columns + c + 16);
      _mm512_storeu_si512(to + (r / kSide * (columns / kSide) + c / kSide) * kPair + r % kSide * 64,
                          (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

}  // namespace

bool kv_have_tiles() { return have_amx(); }

// [columns / 32][batch / 32][part][half][16 pairs of sentences][16 columns][2]
TILES void kv_tile_latents(const float* z, int64_t batch, int64_t columns, char* parts) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t c = 0; c < columns; c += 16)
    for (int64_t b = 0; b < batch; b += 2) {
      const int64_t step = (c / kSide * (batch / kSide) + b / kSide) * kParts * kPair;
      char* to = parts + step + c % kSide / 16 * kTile + b % kSide / 2 * 64;
      __m512i even = _mm512_loadu_si512(z + b * columns + c), odd = _mm512_loadu_si512(z + (b + 1) * columns + c);
      for (int64_t p = 0; p < kParts; p++, to += kPair) {
        const __m512i e = _mm512_and_si512(even, high), o = _mm512_and_si512(odd, high);
        _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(e, 16), o));
        even = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(even), _mm512_castsi512_ps(e)));
        odd = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(odd), _mm512_castsi512_ps(o)));
      }
    }
}

TILES void kv_tile_forward(const uint16_t* w, int64_t ldw, int64_t rows, int64_t nz, const char* latents, float* tile) {
  const int64_t row = ldw * 2;
  configure_tiles();
  for (int64_t r = 0; r < rows; r += kSide, tile += kSide * kSide) {
    const char *a = reinterpret_cast<const char*>(w + r * ldw), *b = latents;
    const char* ahead = a + kKvChunk * row;
    const bool whole = rows - r > 16;
    asm volatile("" ::: "memory");  // tile loads do not tell the compiler what they read
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < nz; k += kSide, a += 64, ahead += 64, b += kParts * kPair) {
      LMVAE_RIGHT(0);
      _tile_stream_loadd(4, a, row);
      for (int64_t i = 0; i < 16; i++) __builtin_prefetch(ahead + i * row, 0, 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (!whole) continue;
      _tile_stream_loadd(5, a + 16 * row, row);
      for (int64_t i = 16; i < 32; i++) __builtin_prefetch(ahead + i * row, 0, 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, tile, kSide * 4);
    _tile_stored(1, tile + 16, kSide * 4);
    if (whole) {
      _tile_stored(2, tile + 16 * kSide, kSide * 4);
      _tile_stored(3, tile + 16 * kSide + 16, kSide * 4);
    }
    asm volatile("" ::: "memory");
  }
  release_tiles();
}

TILES bool kv_tile_product(const float* g, const char* parts, int64_t batch, int64_t columns, float* tile, char* room) {
  const int64_t steps = batch / kSide;
  left_operand(g, kKvChunk, batch, room);
  configure_tiles();
  for (int64_t c = 0; c < columns; c += kSide)
    for (int64_t r = 0; r < kKvChunk; r += kSide)
      product_by_parts(room + r / kSide * steps * kPair, parts + c / kSide * steps * kParts * kPair, steps,
                       tile + r * columns + c, columns);
  release_tiles();
  __mmask16 nan = 0;
  for (int64_t i = 0; i < kKvChunk * columns; i += 16) {
    const __m512 sums = _mm512_loadu_ps(tile + i);
    nan |= _mm512_cmp_ps_mask(sums, sums, _CMP_UNORD_Q);
  }
  return nan == 0;
}

TILES void kv_tile_gram(const float* g, const float* turned, int64_t batch, float* gram, char* room) {
  constexpr int64_t kSteps = kKvChunk / kSide;
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  char* const right = room + kKvChunk * batch * 2;
  left_operand(g, batch, kKvChunk, room);
  for (int64_t k = 0; k < kKvChunk; k += 2)
    for (int64_t c = 0; c < batch; c += 16) {
      const __m512i even = _mm512_loadu_si512(turned + k * batch + c),
                    odd = _mm512_loadu_si512(turned + k * batch + batch + c);
      char* to = right + (c / kSide * kSteps + k / kSide) * kPair + c % kSide / 16 * kTile + k % kSide / 2 * 64;
      _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(even, 16), _mm512_and_si512(odd, high)));
    }
  configure_tiles();
  for (int64_t r = 0; r < batch; r += kSide)
    for (int64_t c = 0; c < batch; c += kSide)
      product32<1>(room + r / kSide * kSteps * kPair, right + c / kSide * kSteps * kPair, kSteps, gram + r * batch + c,
                   batch, true);
  release_tiles();
}
#else
bool kv_have_tiles() { return false; }
void kv_tile_forward(const uint16_t*, int64_t, int64_t, int64_t, const char*, float*) {}
void kv_tile_gram(const float*, const float*, int64_t, float*, char*) {}
void kv_tile_latents(const float*, int64_t, int64_t, char*) {}
bool kv_tile_product(const float*, const char*, int64_t, int64_t, float*, char*) { return false; }
#endif

}  // namespace lmvae
