#include "philox.h"
#include "simd_math.h"

namespace lmvae::LMVAE_ISA {

void philox_rows_words(uint32_t* out, uint64_t seed, uint64_t offset, int64_t blocks) {
  words_fill(out, seed, offset, 0, blocks);
}
void philox_rows_normal(float* out, uint64_t seed, uint64_t offset, int64_t blocks) {
  normal_fill(out, seed, offset, 0, blocks);
}

}  // namespace lmvae::LMVAE_ISA
