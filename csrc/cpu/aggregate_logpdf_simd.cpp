// aggregate_logpdf: log-densities of rows of z under every posterior of their group, reduced while they are made.
//
// A posterior is prepared once (mu, 1 / sqrt(2 e^logvar + min_var), -logvar / 2), so that a density costs one
// subtraction, two products and a sum; exponentials are e^x of x <= 0. Per dimension, registers hold dimensions. A
// joint density sums over them, so there a loop runs along lanes of posteriors, and no sum ever crosses a register.
#include "aggregate_logpdf_per_dim.h"

namespace lmvae::LMVAE_ISA {

template <typename T>
void aggregate_prepare(const AggArgs& a, int64_t group, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const AggGroup& g = a.groups[group];
  constexpr int64_t line = kLine<A>;
  const auto *mu = static_cast<const T*>(a.mu), *logvar = static_cast<const T*>(a.logvar);
  for (int64_t j = begin; j < end; j++) {
    const int64_t n = g.begin + j;
    double sum = 0;
    for (int64_t d = 0; d < a.padded; d++) {
      A m = 0, lv = 0, scale = 0, ratio = 0;
      if (d < a.dim) {
        m = static_cast<A>(mu[n * a.mu_row + d * a.mu_col]),
        lv = static_cast<A>(logvar[n * a.logvar_row + d * a.logvar_col]);
        // In double, so that no rounding but the last is added to the density; e^logvar over- and underflows as in A.
        const double twice = 2.0 * static_cast<double>(static_cast<A>(std::exp(static_cast<double>(lv))));
        const double root = 1.0 / std::sqrt(twice + a.min_var);
        scale = static_cast<A>(root), ratio = static_cast<A>(twice * root * root);
        sum -= 0.5 * static_cast<double>(lv);
      }
      if (a.mean) at<A>(a.mean, n, a.padded)[d] = m;
      if (a.scale) at<A>(a.scale, n, a.padded)[d] = scale;
      if (a.ratio) at<A>(a.ratio, n, a.padded)[d] = ratio;
      if (a.constant) at<A>(a.constant, n, a.padded)[d] = A(-0.5) * lv;
      if (a.lane_mean && d < a.dim) {
        const int64_t place = ((g.first_line + j / line) * a.dim + d) * line + j % line;
        static_cast<A*>(a.lane_mean)[place] = m, static_cast<A*>(a.lane_scale)[place] = scale;
      }
    }
    if (a.lane_constant) static_cast<A*>(a.lane_constant)[g.first_line * line + j] = static_cast<A>(sum);
  }
  if (end < g.count || !a.lane_constant) return;
  for (int64_t j = g.count; j % line != 0; j++) {  // lanes without a posterior have density 0
    static_cast<A*>(a.lane_constant)[g.first_line * line + j] = -kInf<A>;
    for (int64_t d = 0; d < a.dim; d++) {
      const int64_t place = ((g.first_line + j / line) * a.dim + d) * line + j % line;
      static_cast<A*>(a.lane_mean)[place] = 0, static_cast<A*>(a.lane_scale)[place] = 0;
    }
  }
}

// ---- joint

// Log-densities, without their constant, of kAggRows rows z [kAggRows, padded] under every posterior: out [kAggRows,
// lanes]. Not inlined: forward and backward must get the same bits (see density_of).
template <typename A>
static __attribute__((noinline)) void joint_densities(const AggArgs& a, const AggGroup& g, const A* z, A* out) {
  constexpr int64_t line = kLine<A>;
  for (int64_t block = 0; block * line < g.count; block++) {
    const int64_t at_line = g.first_line + block;
    const A *mean = at<A>(a.lane_mean, at_line, a.dim * line), *scale = at<A>(a.lane_scale, at_line, a.dim * line);
    const A* constant = at<A>(a.lane_constant, at_line, line);
    alignas(64) A total[kAggRows * line] = {};
    for (int64_t d0 = 0; d0 < a.dim; d0 += kAggChain) {
      alignas(64) A sum[kAggRows * line] = {};
      for (int64_t d = d0; d < std::min(d0 + kAggChain, a.dim); d++) {
        const A z0 = z[d], z1 = z[a.padded + d], z2 = z[2 * a.padded + d], z3 = z[3 * a.padded + d];
        const A *m = mean + d * line, *s = scale + d * line;
#pragma omp simd
        for (int64_t l = 0; l < line; l++) {
          const A u0 = (z0 - m[l]) * s[l], u1 = (z1 - m[l]) * s[l], u2 = (z2 - m[l]) * s[l], u3 = (z3 - m[l]) * s[l];
          sum[l] += u0 * u0;
          sum[line + l] += u1 * u1;
          sum[2 * line + l] += u2 * u2;
          sum[3 * line + l] += u3 * u3;
        }
      }
#pragma omp simd
      for (int64_t i = 0; i < kAggRows * line; i++) total[i] += sum[i];
    }
    for (int64_t r = 0; r < kAggRows; r++) {
#pragma omp simd
      for (int64_t l = 0; l < line; l++) out[r * a.lanes + block * line + l] = constant[l] - total[r * line + l];
    }
  }
}

// Up to kAggRows rows of a group into z [kAggRows, padded]; the rest, and the padding, stays what it is (0 at first).
template <typename T>
LMVAE_INLINE void load_rows(const AggArgs& a, const AggGroup& g, int64_t begin, int64_t end, acc_t<T>* z) {
  for (int64_t r = begin; r < end; r++) load_z<T>(a, place_of(g, r), 0, a.dim, z + (r - begin) * a.padded);
}

template <typename T>
void joint_fwd(const AggArgs& a, int64_t group, int64_t begin, int64_t end, acc_t<T>* z) {
  using A = acc_t<T>;
  const AggGroup& g = a.groups[group];
  const int64_t count = (g.count + kLine<A> - 1) / kLine<A> * kLine<A>;
  A* densities = z + kAggRows * a.padded;
  std::fill_n(z, kAggRows * a.padded, A(0));
  for (int64_t r0 = begin; r0 < end; r0 += kAggRows) {
    const int64_t r1 = std::min(r0 + kAggRows, end);
    load_rows<T>(a, g, r0, r1, z);
    joint_densities(a, g, z, densities);
    for (int64_t r = r0; r < r1; r++) {
      const A* x = densities + (r - r0) * a.lanes;
      A largest = -kInf<A>, total = 0;
#pragma omp simd reduction(max : largest)
      for (int64_t n = 0; n < count; n++) largest = x[n] > largest ? x[n] : largest;
      largest = std::abs(largest) < kInf<A> ? largest : A(0);
      for (int64_t n0 = 0; n0 < count; n0 += kAggTile) {
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t n = n0; n < std::min(n0 + kAggTile, count); n++) sum += exp_lane(x[n] - largest);
        total += sum;
      }
      const Place p = place_of(g, r);
      const int64_t out = p.sample * a.rows + p.row;
      const A lse = largest + std::log(total);
      static_cast<A*>(a.lse)[out] = lse;
      static_cast<A*>(a.logq)[out] = static_cast<A>(static_cast<double>(lse) - g.log_norm);
    }
  }
}

template <typename T, bool kPosteriors>
void joint_bwd(const AggArgs& a, const AggTask& task, acc_t<T>* z) {
  using A = acc_t<T>;
  const AggGroup& g = a.groups[task.group];
  const int64_t padded = a.padded, count = (g.count + kLine<A> - 1) / kLine<A> * kLine<A>;
  A *dz = z + kAggRows * padded, *part = dz + kAggRows * padded, *weights = part + kAggRows * padded;
  A* chain = weights + kAggRows * a.lanes;
  std::fill_n(z, kAggRows * padded, A(0));
  if constexpr (kPosteriors) {
    std::fill_n(chain, 2 * g.count * padded, A(0));
    std::fill_n(at<A>(a.partial, 2 * task.slot, padded), 2 * g.count * padded, A(0));
  }
  for (int64_t r0 = task.begin; r0 < task.end; r0 += kAggRows) {
    const int64_t r1 = std::min(r0 + kAggRows, task.end);
    load_rows<T>(a, g, r0, r1, z);
    joint_densities(a, g, z, weights);
    for (int64_t r = r0; r < r1; r++) {
      const Place p = place_of(g, r);
      const A lse = static_cast<const A*>(a.lse)[p.sample * a.rows + p.row];
      const A grad = static_cast<const A*>(a.grad)[p.sample * a.grad_sample + p.row * a.grad_row];
      A* w = weights + (r - r0) * a.lanes;
#pragma omp simd
      for (int64_t n = 0; n < count; n++) w[n] = grad * exp_lane(w[n] - lse);
    }
    for (int64_t r = r1; r < r0 + kAggRows; r++) std::fill_n(weights + (r - r0) * a.lanes, count, A(0));
    std::fill_n(dz, 2 * kAggRows * padded, A(0));  // part too
    for (int64_t n = 0; n < g.count; n++) {
      const A *m = at<A>(a.mean, g.begin + n, padded), *s = at<A>(a.scale, g.begin + n, padded),
              *q = at<A>(a.ratio, g.begin + n, padded);
      const A w0 = weights[n], w1 = weights[a.lanes + n], w2 = weights[2 * a.lanes + n], w3 = weights[3 * a.lanes + n];
      A *dm = chain + 2 * n * padded, *dv = dm + padded;
#pragma omp simd
      for (int64_t d = 0; d < padded; d++) {
        const A u0 = (z[d] - m[d]) * s[d], u1 = (z[padded + d] - m[d]) * s[d];
        const A u2 = (z[2 * padded + d] - m[d]) * s[d], u3 = (z[3 * padded + d] - m[d]) * s[d];
        const A p0 = w0 * u0, p1 = w1 * u1, p2 = w2 * u2, p3 = w3 * u3;
        part[d] += p0 * s[d];
        part[padded + d] += p1 * s[d];
        part[2 * padded + d] += p2 * s[d];
        part[3 * padded + d] += p3 * s[d];
        if constexpr (kPosteriors) {
          dm[d] += (p0 + p1) + (p2 + p3);
          dv[d] += q[d] * ((p0 * u0 + p1 * u1) + (p2 * u2 + p3 * u3)) - A(0.5) * ((w0 + w1) + (w2 + w3));
        }
      }
      if (n % kAggChain == kAggChain - 1 || n + 1 == g.count) add_and_clear(part, dz, kAggRows * padded);
    }
    if (a.dz) {
      for (int64_t r = r0; r < r1; r++) {
        const Place p = place_of(g, r);
        A* row = dz + (r - r0) * padded;
#pragma omp simd
        for (int64_t d = 0; d < padded; d++) row[d] *= A(-2);
        store_row(row, static_cast<T*>(a.dz) + (p.sample * a.rows + p.row) * a.dim, a.dim);
      }
    }
    if constexpr (kPosteriors) {
      if ((r1 - task.begin) % kAggChain == 0 || r1 == task.end) flush(a, task, g.count, 0, padded, chain);
    }
  }
}

// ---- what aggregate_logpdf.cpp calls

template <typename T>
int64_t aggregate_scratch(const AggArgs& a, int64_t longest, bool backward) {
  if (a.per_dim) return backward ? 2 * longest * std::min(a.padded, kAggTile) : 0;
  return kAggRows * (a.padded + a.lanes) + (backward ? 2 * kAggRows * a.padded + 2 * longest * a.padded : 0);
}

template <typename T>
void aggregate_fwd_rows(const AggArgs& a, int64_t group, int64_t begin, int64_t end, void* scratch) {
  if (a.per_dim) return marginal_fwd<T>(a, group, begin, end);
  joint_fwd<T>(a, group, begin, end, static_cast<acc_t<T>*>(scratch));
}

template <typename T>
void aggregate_bwd_rows(const AggArgs& a, const AggTask& task, void* scratch) {
  auto* room = static_cast<acc_t<T>*>(scratch);
  if (a.per_dim) return a.partial ? marginal_bwd<T, true>(a, task, room) : marginal_bwd<T, false>(a, task, room);
  return a.partial ? joint_bwd<T, true>(a, task, room) : joint_bwd<T, false>(a, task, room);
}

template <typename T>
void aggregate_bwd_posterior(const AggArgs& a, int64_t posterior, int64_t slot, int64_t step, int64_t count) {
  using A = acc_t<T>;
  const A* scale = at<A>(a.scale, posterior, a.padded);
  for (int64_t c0 = 0; c0 < a.dim; c0 += kAggTile) {
    const int64_t cols = std::min(kAggTile, a.dim - c0);
    alignas(64) A dmu[kAggTile] = {}, dlogvar[kAggTile] = {};
    for (int64_t i = 0; i < count; i++) {
      const A *dm = at<A>(a.partial, 2 * (slot + i * step), a.padded) + c0, *dv = dm + a.padded;
#pragma omp simd
      for (int64_t c = 0; c < cols; c++) dmu[c] += dm[c], dlogvar[c] += dv[c];
    }
#pragma omp simd
    for (int64_t c = 0; c < cols; c++) dmu[c] *= A(2) * scale[c0 + c];
    store_row(dmu, static_cast<T*>(a.dmu) + posterior * a.dim + c0, cols);
    store_row(dlogvar, static_cast<T*>(a.dlogvar) + posterior * a.dim + c0, cols);
  }
}

#define LMVAE_INSTANTIATE(T)                                                             \
  template void aggregate_prepare<T>(const AggArgs&, int64_t, int64_t, int64_t);         \
  template int64_t aggregate_scratch<T>(const AggArgs&, int64_t, bool);                  \
  template void aggregate_fwd_rows<T>(const AggArgs&, int64_t, int64_t, int64_t, void*); \
  template void aggregate_bwd_rows<T>(const AggArgs&, const AggTask&, void*);            \
  template void aggregate_bwd_posterior<T>(const AggArgs&, int64_t, int64_t, int64_t, int64_t);
LMVAE_INSTANTIATE(float)
LMVAE_INSTANTIATE(double)
LMVAE_INSTANTIATE(c10::Half)
LMVAE_INSTANTIATE(c10::BFloat16)

}  // namespace lmvae::LMVAE_ISA
