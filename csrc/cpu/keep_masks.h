// Dropout masks of latent_kv as bits: one pass over the random stream, whose mask every product of a step then reads.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

#include "dispatch.h"

namespace lmvae {

// A mask of `groups` x `batch` rows of `cols` elements: sentence b of a group is number first + b * step of a batch of
// `total`, and row (group * total + that number) of the stream. A word keeps its element when word >> 8 >= threshold.
struct KeepMaskKey {
  uint64_t seed, offset;
  int64_t first, step, total, groups, batch, cols;
  uint32_t threshold;
  bool operator==(const KeepMaskKey& o) const {
    return seed == o.seed && offset == o.offset && first == o.first && step == o.step && total == o.total &&
           groups == o.groups && batch == o.batch && cols == o.cols && threshold == o.threshold;
  }
  // Words of 64 bits of a row; one more than it fills, so that 64 bits can be read from wherever they begin.
  int64_t words() const { return (cols + 63) / 64 + 1; }
};

// int64 [groups * batch * words]: bit i of a row is set where its element i is kept. The last few masks are kept (32 MB
// of them at most), since the products of a training step ask for the same one in turn.
at::Tensor keep_mask(const KeepMaskKey& key);

}  // namespace lmvae

// Rows [begin, end) of the mask.
LMVAE_DECLARE(void keep_mask_rows(const ::lmvae::KeepMaskKey& key, int64_t begin, int64_t end, uint64_t* bits))
