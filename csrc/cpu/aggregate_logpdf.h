// What aggregate_logpdf.cpp (checks, allocation, threads) hands to aggregate_logpdf_simd.cpp (arithmetic).
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace lmvae {

constexpr int64_t kAggLine =
    64;                          // bytes: prepared posteriors are padded to whole lines of dimensions, or of posteriors
constexpr int64_t kAggRows = 4;  // rows of z that a joint density takes at a time
constexpr int64_t kAggChain =
    32;  // terms of a running sum before it is added to its total: long fp32 chains would drift
constexpr int64_t kAggTile = 256;  // columns that a per-dimension density takes at a time

// Rows of z [z_begin, z_begin + z_count) of every sample and posteriors [begin, begin + count). first_line: where the
// group's lines of lanes begin. log_norm: ln of what the sum of e^(log-density without its constant) is divided by.
struct AggGroup {
  int64_t z_begin, z_count, begin, count, first_line;
  double log_norm;
};

// Rows [begin, end) of a group, counted through its samples; its partial gradient sums begin at row `slot`.
struct AggTask {
  int64_t group, begin, end, slot;
};

// Strides are in elements, outputs are dense. A is the arithmetic type: float, or double for double.
struct AggArgs {
  const void *z, *mu, *logvar;
  int64_t z_sample, z_row, z_col, mu_row, mu_col, logvar_row, logvar_col;
  int64_t rows, dim, padded,
      lanes;  // z is [samples, rows, dim]; padded: dim in whole lines; lanes: of the longest group
  bool per_dim;
  double min_var;
  const AggGroup* groups;
  // Prepared posteriors, A; null where not needed. [posteriors, padded]: mu, 1 / sqrt(2 e^logvar + min_var),
  // 2 e^logvar / (2 e^logvar + min_var) and -logvar / 2. Joint densities read lanes of posteriors: mu and scale
  // [lines, dim, lanes of a line], sums of -logvar / 2 [lines, lanes of a line] (-Inf in lanes beyond a group's last).
  void *mean, *scale, *ratio, *constant, *lane_mean, *lane_scale, *lane_constant;
  void *logq, *lse;  // A: [samples, rows(, dim)]; in backward lse is read
  const void* grad;  // A
  int64_t grad_sample, grad_row, grad_col;
  void *dz, *dmu, *dlogvar;  // dz null: not wanted
  void* partial;             // A: [slots, 2, padded]; null: no gradient of the posteriors is wanted
};

}  // namespace lmvae

// Posteriors [begin, end) of a group, counted within it.
LMVAE_DECLARE(template <typename T> void aggregate_prepare(const ::lmvae::AggArgs& a, int64_t group, int64_t begin,
                                                           int64_t end))
// Elements of A that a thread needs for the two functions below: forward, backward.
LMVAE_DECLARE(template <typename T> int64_t aggregate_scratch(const ::lmvae::AggArgs& a, int64_t longest,
                                                              bool backward))
// Rows [begin, end) of a group, counted through its samples.
LMVAE_DECLARE(template <typename T> void aggregate_fwd_rows(const ::lmvae::AggArgs& a, int64_t group, int64_t begin,
                                                            int64_t end, void* scratch))
LMVAE_DECLARE(template <typename T> void aggregate_bwd_rows(const ::lmvae::AggArgs& a, const ::lmvae::AggTask& task,
                                                            void* scratch))
// dmu and dlogvar of one posterior from `count` partial sums, the first at `slot`, then `step` apart.
LMVAE_DECLARE(template <typename T> void aggregate_bwd_posterior(const ::lmvae::AggArgs& a, int64_t posterior,
                                                                 int64_t slot, int64_t step, int64_t count))
