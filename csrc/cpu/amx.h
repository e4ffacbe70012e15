// The AMX tiles (x86 with amx_bf16 and amx_int8): whether they are there, their configuration, and a product of 32
// x 32. LMVAE_AMX is defined where this compiler can write code for them; have_amx() says whether this CPU runs it.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(LMVAE_NO_AMX)
#define LMVAE_AMX 1
#include <cstring>

#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12: _mm512_undefined in its own header
#include <immintrin.h>
#endif

namespace lmvae {

bool have_amx();  // of this CPU, and the system lets us use it

#ifdef LMVAE_AMX
namespace {

#define TILES __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define TILES_INLINE                                                                                 \
  __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"), \
                 always_inline)) inline

constexpr int64_t kTile = 1024;  // bytes: 16 rows x 64 bytes
constexpr int64_t kPair = 2 * kTile;

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// The assembly names all 64 bytes; the compiler's own intrinsic declares only the first 8 as read.
TILES void configure_tiles() {
  TileConfig config;
  std::memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; i++) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}
TILES void release_tiles() { _tile_release(); }

// Operands are strings of tiles [step over 32 of depth][part][2][16 x 64 bytes]; C is 32 x 32 fp32.
//   left:  tile h holds rows 16h .. of the left matrix, 32 consecutive bf16 of depth each
//   right: tile h holds columns 16h .., row r of it the pairs (depth 2r, 2r+1) of the 16 columns
// (The tile intrinsics are statements, not expressions.)
#define LMVAE_LEFT(part)                  \
  _tile_loadd(4, a + (part) * kPair, 64); \
  _tile_loadd(5, a + (part) * kPair + kTile, 64)
#define LMVAE_RIGHT(part)                 \
  _tile_loadd(6, b + (part) * kPair, 64); \
  _tile_loadd(7, b + (part) * kPair + kTile, 64)
#define LMVAE_PRODUCT()    \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)
template <int parts>
TILES __attribute__((noinline)) void product32(const char* a, const char* b, int64_t steps, float* c, int64_t ldc,
                                               bool add) {
  asm volatile("" ::: "memory");  // tile loads do not tell the compiler what they read
  const int64_t row = ldc * 4;
  float *c1 = c + 16, *c2 = c + 16 * ldc, *c3 = c2 + 16;
  if (add) {
    _tile_loadd(0, c, row);
    _tile_loadd(1, c1, row);
    _tile_loadd(2, c2, row);
    _tile_loadd(3, c3, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; k++, a += parts * kPair, b += parts * kPair) {
    if constexpr (parts == 1) {
      LMVAE_LEFT(0);
      LMVAE_RIGHT(0);
      LMVAE_PRODUCT();
    } else if constexpr (parts == 2) {
      LMVAE_LEFT(0);
      LMVAE_RIGHT(1);
      LMVAE_PRODUCT();
      LMVAE_RIGHT(0);
      LMVAE_PRODUCT();
      LMVAE_LEFT(1);
      LMVAE_PRODUCT();
    } else {
      // In an order that loads seven pairs of tiles for the six products.
      LMVAE_LEFT(0);
      LMVAE_RIGHT(2);
      LMVAE_PRODUCT();
      LMVAE_RIGHT(1);
      LMVAE_PRODUCT();
      LMVAE_RIGHT(0);
      LMVAE_PRODUCT();
      LMVAE_LEFT(2);
      LMVAE_PRODUCT();
      LMVAE_LEFT(1);
      LMVAE_PRODUCT();
      LMVAE_RIGHT(1);
      LMVAE_PRODUCT();
    }
  }
  _tile_stored(0, c, row);
  _tile_stored(1, c1, row);
  _tile_stored(2, c2, row);
  _tile_stored(3, c3, row);
}

}  // namespace
#endif

}  // namespace lmvae
