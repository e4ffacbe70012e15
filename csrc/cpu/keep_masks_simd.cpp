#include "keep_masks.h"
#include "simd_math.h"

namespace lmvae::LMVAE_ISA {

void keep_mask_rows(const KeepMaskKey& key, int64_t begin, int64_t end, uint64_t* bits) {
  alignas(64) float kept[64 + 2 * 4 * kLanes];
  const int64_t words = key.words(), blocks = (key.cols + 3) / 4;
  for (int64_t r = begin; r < end; r++) {
    const int64_t row = r / key.batch * key.total + key.first + r % key.batch * key.step;
    uint64_t* to = bits + r * words;
    for (int64_t word = 0; word < words - 1; word++) {
      const int64_t block = word * 16, left = key.cols - word * 64;
      keep_fill(kept, key.threshold, 1.0f, key.seed, key.offset, static_cast<uint64_t>(row * blocks + block),
                std::min<int64_t>(16, blocks - block));
      uint64_t found = 0;
#pragma omp simd reduction(| : found)
      for (int64_t i = 0; i < 64; i++) found |= static_cast<uint64_t>(kept[i] != 0.0f) << i;
      to[word] = left < 64 ? found & ((uint64_t{1} << left) - 1) : found;
    }
    to[words - 1] = 0;
  }
}

}  // namespace lmvae::LMVAE_ISA
