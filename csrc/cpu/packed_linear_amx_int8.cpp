// packed_linear with int8 weights on the AMX tiles: rows of whole numbers of 16 bits, whose high and low bytes are
// multiplied beside each other, to the same sums as by AVX512-VNNI. Both operands are tiles as they lie.
#include "amx_panels.h"
#include "packed_linear_int8.h"

namespace lmvae {

#ifdef LMVAE_AMX
namespace {

// c[row][high, low][32 columns] (+)= rows x weights over `steps` steps of 64 depths, with `lines` lines fetched in
// each.
struct ByteProduct {
  static constexpr int64_t kRows = kByteBlockRows;
  template <bool, int lines>
  TILES __attribute__((noinline)) static void run(const char* a, const char* b, int64_t steps, float* c, bool add,
                                                  const char* ahead) {
    constexpr int64_t kRow = kByteSums * 4;
    asm volatile("" ::: "memory");  // tile loads do not tell the compiler what they read
    if (add) {
      _tile_loadd(0, c, kRow);
      _tile_loadd(1, c + 16, kRow);
      _tile_loadd(2, c + 32, kRow);
      _tile_loadd(3, c + 48, kRow);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; k++, a += kPair, b += kPair, ahead += lines * 64) {
      _tile_stream_loadd(4, a, 64);
      _tile_stream_loadd(5, a + kTile, 64);
      LMVAE_RIGHT(0);
#pragma GCC unroll 32
      for (int line = 0; line < lines; line++) __builtin_prefetch(ahead + line * 64, 0, 2);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, c, kRow);
    _tile_stored(1, c + 16, kRow);
    _tile_stored(2, c + 32, kRow);
    _tile_stored(3, c + 48, kRow);
    asm volatile("" ::: "memory");
  }
};
static_assert(kByteBlockRows * kByteSums == kBlock * kLinearPanel && kByteStepNumbers == kPair);

}  // namespace

TILES void byte_linear_amx_panels(const ByteLinearArgs<c10::BFloat16>& a, const AmxPlan& plan, PanelQueue& queue,
                                  const WholeSums& done) {
  streamed_panels<ByteProduct>(reinterpret_cast<const char*>(a.weight), static_cast<const char*>(a.x), plan, queue,
                               [&](int64_t panel, float* sums) { done(panel, reinterpret_cast<int32_t*>(sums)); });
}
#else
void byte_linear_amx_panels(const ByteLinearArgs<c10::BFloat16>&, const AmxPlan&, PanelQueue&, const WholeSums&) {}
#endif

}  // namespace lmvae
