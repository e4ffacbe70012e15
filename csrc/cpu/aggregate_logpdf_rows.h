// aggregate_logpdf: rows of z and prepared posteriors where they lie, and sums that are cut into chains.
#pragma once

#include "aggregate_logpdf.h"
#include "aggregate_logpdf_math.h"
#include "simd_math.h"

namespace lmvae::LMVAE_ISA {

template <typename A> constexpr int64_t kLine = kAggLine / static_cast<int64_t>(sizeof(A));  // elements of a line

template <typename A>
LMVAE_INLINE A* at(void* base, int64_t row, int64_t pitch) {
  return static_cast<A*>(base) + row * pitch;
}

// Row `r` of a group, counted through its samples: its sample and its row of z.
struct Place {
  int64_t sample, row;
};
LMVAE_INLINE Place place_of(const AggGroup& g, int64_t r) { return {r / g.z_count, g.z_begin + r % g.z_count}; }

template <typename T>
LMVAE_INLINE void load_z(const AggArgs& a, Place p, int64_t col, int64_t cols, acc_t<T>* out) {
  load_row(static_cast<const T*>(a.z) + p.sample * a.z_sample + p.row * a.z_row + col * a.z_col, a.z_col, out, cols);
}

// to += from, from = 0
template <typename A>
LMVAE_INLINE void add_and_clear(A* from, A* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) to[i] += from[i], from[i] = 0;
}

// Adds a chain's sums [count, 2, cols] to its place in the partial ones and clears them.
template <typename A>
LMVAE_INLINE void flush(const AggArgs& a, const AggTask& task, int64_t count, int64_t col, int64_t cols, A* chain) {
  for (int64_t n = 0; n < 2 * count; n++)
    add_and_clear(chain + n * cols, at<A>(a.partial, 2 * task.slot + n, a.padded) + col, cols);
}

}  // namespace lmvae::LMVAE_ISA
