// aggregate_logpdf per dimension: a few rows of z by a register of dimensions at a time, over all posteriors of the
// group, so that a posterior is read once for several rows and sums stay in registers.
#pragma once

#include "aggregate_logpdf_rows.h"

namespace lmvae::LMVAE_ISA {

constexpr int kMarginalRows = by_registers(4, 2);

// kRows rows of a group from r on.
template <typename T, int kRows>
void marginal_fwd_rows(const AggArgs& a, const AggGroup& g, int64_t r, int64_t c0) {
  using A = acc_t<T>;
  using V = Register<A>;
  constexpr int64_t lanes = Lanes<A>::count;
  const int64_t cols = std::min(kAggTile, a.dim - c0), n_cols = std::min(kAggTile, a.padded - c0);
  const A *mean = at<A>(a.mean, g.begin, a.padded) + c0, *scale = at<A>(a.scale, g.begin, a.padded) + c0;
  const A* constant = at<A>(a.constant, g.begin, a.padded) + c0;
  alignas(64) A z[kRows * kAggTile], most[kRows * kAggTile], sums[kRows * kAggTile];
  for (int i = 0; i < kRows; i++) {
    load_z<T>(a, place_of(g, r + i), c0, cols, z + i * kAggTile);
    std::fill_n(z + i * kAggTile + cols, n_cols - cols, A(0));
  }
  for (int64_t c = 0; c < n_cols; c += lanes) {
    V x[kRows], largest[kRows], total[kRows];
    for (int i = 0; i < kRows; i++) x[i] = load(z + i * kAggTile + c), largest[i] = splat(-kInf<A>), total[i] = V{};
    for (int64_t n = 0; n < g.count; n++) {
      const int64_t place = n * a.padded + c;
      const V m = load(mean + place), s = load(scale + place), k = load(constant + place);
      for (int i = 0; i < kRows; i++) largest[i] = larger(density_of(k, (x[i] - m) * s), largest[i]);
    }
    for (int i = 0; i < kRows; i++) {  // as in torch: all -Inf gives -Inf, not NaN
      const auto finite = (largest[i] < kInf<A>)&(largest[i] > -kInf<A>);
      largest[i] = finite ? largest[i] : V{};
    }
    for (int64_t n0 = 0; n0 < g.count; n0 += kAggChain) {
      V sum[kRows] = {};
      for (int64_t n = n0; n < std::min(n0 + kAggChain, g.count); n++) {
        const int64_t place = n * a.padded + c;
        const V m = load(mean + place), s = load(scale + place), k = load(constant + place);
        for (int i = 0; i < kRows; i++) sum[i] += exp_of(density_of(k, (x[i] - m) * s) - largest[i]);
      }
      for (int i = 0; i < kRows; i++) total[i] += sum[i];
    }
    for (int i = 0; i < kRows; i++) {
      store<A>(most + i * kAggTile + c, largest[i]);
      store<A>(sums + i * kAggTile + c, total[i]);
    }
  }
  const A log_norm = static_cast<A>(g.log_norm);
  for (int i = 0; i < kRows; i++) {
    A *lse = sums + i * kAggTile, *logq = most + i * kAggTile;
#pragma omp simd
    for (int64_t c = 0; c < n_cols; c++) {
      lse[c] = logq[c] + log_lane(lse[c]);
      logq[c] = lse[c] - log_norm;
    }
    const Place p = place_of(g, r + i);
    const int64_t out = (p.sample * a.rows + p.row) * a.dim + c0;
    store_row(lse, static_cast<A*>(a.lse) + out, cols);
    store_row(logq, static_cast<A*>(a.logq) + out, cols);
  }
}

template <typename T>
void marginal_fwd(const AggArgs& a, int64_t group, int64_t begin, int64_t end) {
  const AggGroup& g = a.groups[group];
  for (int64_t c0 = 0; c0 < a.dim; c0 += kAggTile) {
    int64_t r = begin;
    for (; r + kMarginalRows <= end; r += kMarginalRows) marginal_fwd_rows<T, kMarginalRows>(a, g, r, c0);
    for (; r < end; r++) marginal_fwd_rows<T, 1>(a, g, r, c0);
  }
}

// kRows rows from r on; what they give the posteriors is added to chain [count, 2, columns].
template <typename T, bool kPosteriors, int kRows>
void marginal_bwd_rows(const AggArgs& a, const AggGroup& g, int64_t r, int64_t c0, acc_t<T>* chain) {
  using A = acc_t<T>;
  using V = Register<A>;
  constexpr int64_t lanes = Lanes<A>::count;
  const int64_t cols = std::min(kAggTile, a.dim - c0), n_cols = std::min(kAggTile, a.padded - c0);
  const A *mean = at<A>(a.mean, g.begin, a.padded) + c0, *scale = at<A>(a.scale, g.begin, a.padded) + c0;
  const A *constant = at<A>(a.constant, g.begin, a.padded) + c0, *ratio = at<A>(a.ratio, g.begin, a.padded) + c0;
  alignas(64) A z[kRows * kAggTile], lse[kRows * kAggTile], grad[kRows * kAggTile];
  for (int i = 0; i < kRows; i++) {
    const Place p = place_of(g, r + i);
    A *zi = z + i * kAggTile, *li = lse + i * kAggTile, *gi = grad + i * kAggTile;
    load_z<T>(a, p, c0, cols, zi);
    load_row(static_cast<const A*>(a.lse) + (p.sample * a.rows + p.row) * a.dim + c0, 1, li, cols);
    load_row(static_cast<const A*>(a.grad) + p.sample * a.grad_sample + p.row * a.grad_row + c0 * a.grad_col,
             a.grad_col, gi, cols);
    for (A* row : {zi, li, gi}) std::fill_n(row + cols, n_cols - cols, A(0));
  }
  for (int64_t c = 0; c < n_cols; c += lanes) {
    V x[kRows], of[kRows], by[kRows], dz[kRows] = {};
    for (int i = 0; i < kRows; i++)
      x[i] = load(z + i * kAggTile + c), of[i] = load(lse + i * kAggTile + c), by[i] = load(grad + i * kAggTile + c);
    for (int64_t n0 = 0; n0 < g.count; n0 += kAggChain) {
      V part[kRows] = {};
      for (int64_t n = n0; n < std::min(n0 + kAggChain, g.count); n++) {
        const int64_t place = n * a.padded + c;
        const V m = load(mean + place), s = load(scale + place), k = load(constant + place);
        V dm{}, dv{};
        for (int i = 0; i < kRows; i++) {
          const V u = (x[i] - m) * s, weight = by[i] * exp_of(density_of(k, u) - of[i]), pull = weight * u;
          part[i] += pull * s;
          if constexpr (kPosteriors) dm += pull, dv += weight * (load(ratio + place) * (u * u) - A(0.5));
        }
        if constexpr (kPosteriors) {
          A *to_m = chain + 2 * n * n_cols + c, *to_v = to_m + n_cols;
          store<A>(to_m, load(to_m) + dm), store<A>(to_v, load(to_v) + dv);
        }
      }
      for (int i = 0; i < kRows; i++) dz[i] += part[i];
    }
    for (int i = 0; i < kRows; i++) store<A>(z + i * kAggTile + c, dz[i] * A(-2));
  }
  if (!a.dz) return;
  for (int i = 0; i < kRows; i++) {
    const Place p = place_of(g, r + i);
    store_row(z + i * kAggTile, static_cast<T*>(a.dz) + (p.sample * a.rows + p.row) * a.dim + c0, cols);
  }
}

template <typename T, bool kPosteriors>
void marginal_bwd(const AggArgs& a, const AggTask& task, acc_t<T>* chain) {
  using A = acc_t<T>;
  static_assert(kAggChain % kMarginalRows == 0);
  const AggGroup& g = a.groups[task.group];
  for (int64_t c0 = 0; c0 < a.dim; c0 += kAggTile) {
    const int64_t n_cols = std::min(kAggTile, a.padded - c0);
    if constexpr (kPosteriors) {
      std::fill_n(chain, 2 * g.count * n_cols, A(0));
      for (int64_t n = 0; n < 2 * g.count; n++)
        std::fill_n(at<A>(a.partial, 2 * task.slot + n, a.padded) + c0, n_cols, A(0));
    }
    for (int64_t r = task.begin; r < task.end;) {
      if (r + kMarginalRows <= task.end) {
        marginal_bwd_rows<T, kPosteriors, kMarginalRows>(a, g, r, c0, chain);
        r += kMarginalRows;
      } else {
        marginal_bwd_rows<T, kPosteriors, 1>(a, g, r, c0, chain);
        r++;
      }
      if constexpr (kPosteriors) {
        if ((r - task.begin) % kAggChain == 0 || r == task.end) flush(a, task, g.count, c0, n_cols, chain);
      }
    }
  }
}

}  // namespace lmvae::LMVAE_ISA
