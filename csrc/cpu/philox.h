// The stream itself, for tests of bit identity (kernels/philox.py defines it, simd_math.h computes it).
#pragma once

#include <cstdint>

#include "dispatch.h"

LMVAE_DECLARE(void philox_rows_words(uint32_t* out, uint64_t seed, uint64_t offset, int64_t blocks))
LMVAE_DECLARE(void philox_rows_normal(float* out, uint64_t seed, uint64_t offset, int64_t blocks))
