// What posterior.cpp (checks, allocation, threads) hands to posterior_simd.cpp (arithmetic).
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace lmvae {

enum class KlMode : int64_t {
  Sum = 0,
  DimThreshold = 1,
  FreeBits = 2,
  SampleThreshold = 3
};  // order of op.py's KL_MODES

// Strides are in elements. Outputs are dense. Pointers that do not apply are null (dz or dkl: that output was not
// used).
struct PosteriorArgs {
  const void *mu, *logvar;
  int64_t mu_row, mu_col, logvar_row, logvar_col;
  int64_t batch, dim, samples;
  uint64_t seed, offset;
  KlMode mode;
  double target;
  void *z, *kl;                     // forward: [samples, batch, dim], [batch]
  const void *dz, *dkl, *kl_saved;  // backward
  int64_t dz_sample, dz_row, dz_col, dkl_row;
  void *dmu, *dlogvar;
};

}  // namespace lmvae

LMVAE_DECLARE(template <typename T> void posterior_fwd_rows(const ::lmvae::PosteriorArgs& a, int64_t begin,
                                                            int64_t end))
LMVAE_DECLARE(template <typename T> void posterior_bwd_rows(const ::lmvae::PosteriorArgs& a, int64_t begin,
                                                            int64_t end))
