#include "keep_masks.h"
#include "simd_math.h"

namespace lmvae::LMVAE_ISA {

void keep_mask_rows(const KeepMaskKey& key, int64_t begin, int64_t end, uint64_t* bits) {
  const Stream stream(key.seed, key.offset);
  const int64_t words = key.words(), blocks = (key.cols + 3) / 4;
  for (int64_t r = begin; r < end; r++) {
    const int64_t row = r / key.batch * key.total + key.first + r % key.batch * key.step;
    uint64_t* to = bits + r * words;
    for (int64_t word = 0; word < words - 1; word++)
      to[word] = keep_bits(stream, key.threshold, static_cast<uint64_t>(row * blocks + word * 16));
    if (const int64_t last = key.cols % 64; last > 0) to[words - 2] &= (uint64_t{1} << last) - 1;
    to[words - 1] = 0;
  }
}

}  // namespace lmvae::LMVAE_ISA
