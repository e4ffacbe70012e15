// posterior_sample, rows [begin, end): one pass over mu and logvar in tiles that stay in the first-level cache. A tile
// is either some whole rows or a piece of one row; its noise is one contiguous range of Philox blocks either way.
#include <type_traits>

#include "posterior.h"
#include "simd_math.h"

namespace lmvae::LMVAE_ISA {

constexpr int64_t kTile = 1024;         // elements of a tile: six float rows of it fit in 32 KB
constexpr int64_t kSlack = 4 * kLanes;  // what normal_fill may write beyond the tile

LMVAE_INLINE int64_t pad4(int64_t n) { return (n + 3) / 4 * 4; }

// What a mode makes of one dimension's divergence k from N(0, 1). Masks multiply instead of select: an Inf or NaN then
// shows in the result exactly where it does in torch.
template <typename A, KlMode mode>
LMVAE_INLINE A kl_term(A k, A target) {
  if constexpr (mode == KlMode::DimThreshold) return k * (k > target ? A(1) : A(0));
  if constexpr (mode == KlMode::FreeBits) return k < target ? target : k;
  return k;
}
// d(kl_term)/d(k)
template <typename A, KlMode mode>
LMVAE_INLINE A kl_mask(A k, A target) {
  if constexpr (mode == KlMode::DimThreshold) return k > target ? A(1) : A(0);
  if constexpr (mode == KlMode::FreeBits) return k >= target ? A(1) : A(0);
  return A(1);
}

template <typename A>
struct Tile {
  alignas(64) A mu[kTile], lv[kTile], std[kTile], em1[kTile], excess[kTile];
  alignas(64) A eps[kTile + kSlack], dz[kTile], dmu[kTile], dlv[kTile];
};

// A dense block of rows x pitch in the arithmetic type: the tensor's own memory where it is already that, else a copy.
template <typename T>
LMVAE_INLINE const acc_t<T>* read_tile(const void* base, int64_t offset, int64_t row_stride, int64_t col_stride,
                                       acc_t<T>* copy, int64_t rows, int64_t cols, int64_t pitch) {
  const T* x = static_cast<const T*>(base) + offset;
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    if (col_stride == 1 && pitch == cols && (rows == 1 || row_stride == pitch)) return x;
  }
  for (int64_t r = 0; r < rows; r++) {
    load_row(x + r * row_stride, col_stride, copy + r * pitch, cols);
    for (int64_t c = cols; c < pitch; c++) copy[r * pitch + c] = 0;  // padding is computed on, and never stored
  }
  return copy;
}

// Where to compute an output block: its place in the (dense) output, else a buffer for write_tile to store from.
template <typename T>
LMVAE_INLINE acc_t<T>* output_tile(void* base, int64_t offset, int64_t row_stride, acc_t<T>* buffer, int64_t rows,
                                   int64_t cols, int64_t pitch) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    if (pitch == cols && (rows == 1 || row_stride == pitch)) return static_cast<T*>(base) + offset;
  }
  return buffer;
}
template <typename T>
LMVAE_INLINE void write_tile(const acc_t<T>* x, void* base, int64_t offset, int64_t row_stride, int64_t rows,
                             int64_t cols, int64_t pitch) {
  T* y = static_cast<T*>(base) + offset;
  if (static_cast<const void*>(x) == static_cast<const void*>(y)) return;
  for (int64_t r = 0; r < rows; r++) store_row(x + r * pitch, y + r * row_stride, cols);
}

template <typename T, KlMode mode>
void forward(const PosteriorArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t dim = a.dim, row_blocks = pad4(dim) / 4;
  const int64_t rows_per_tile = std::max<int64_t>(1, kTile / pad4(dim));
  const A target = static_cast<A>(a.target);
  Tile<A> t;
  double total[kTile];  // long rows of like terms would drift in fp32 where torch's pairwise sum does not
  for (int64_t r0 = begin; r0 < end; r0 += rows_per_tile) {
    const int64_t rows = std::min(rows_per_tile, end - r0);
    std::fill_n(total, rows, 0.0);
    for (int64_t c0 = 0; c0 < dim; c0 += kTile) {
      const int64_t cols = std::min(kTile, dim - c0), pitch = pad4(cols), n = rows * pitch;
      const A* mu = read_tile<T>(a.mu, r0 * a.mu_row + c0 * a.mu_col, a.mu_row, a.mu_col, t.mu, rows, cols, pitch);
      const A* lv = read_tile<T>(a.logvar, r0 * a.logvar_row + c0 * a.logvar_col, a.logvar_row, a.logvar_col, t.lv,
                                 rows, cols, pitch);
      const uint64_t block = static_cast<uint64_t>(r0 * row_blocks + c0 / 4);
      if (a.samples == 1) {  // the usual case in one loop: nothing but the noise goes through memory
        normal_fill(t.eps, a.seed, a.offset, block, n / 4);
        A* z = output_tile<T>(a.z, r0 * dim + c0, dim, t.dmu, rows, cols, pitch);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
          A std, minus1, excess;
          exp_parts(lv[i], &std, &minus1, &excess);
          z[i] = mu[i] + std * t.eps[i];
          t.excess[i] = kl_term<A, mode>(A(0.5) * (mu[i] * mu[i] + excess), target);
        }
        write_tile<T>(z, a.z, r0 * dim + c0, dim, rows, cols, pitch);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
          A minus1, excess;
          exp_parts(lv[i], &t.std[i], &minus1, &excess);
          t.excess[i] = kl_term<A, mode>(A(0.5) * (mu[i] * mu[i] + excess), target);
        }
      }
      for (int64_t r = 0; r < rows; r++) {
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < cols; c++) sum += static_cast<double>(t.excess[r * pitch + c]);
        total[r] += sum;
      }
      for (int64_t s = 0; a.samples > 1 && s < a.samples; s++) {
        normal_fill(t.eps, a.seed, a.offset, static_cast<uint64_t>(s * a.batch * row_blocks) + block, n / 4);
        const int64_t at = (s * a.batch + r0) * dim + c0;
        A* z = output_tile<T>(a.z, at, dim, t.dmu, rows, cols, pitch);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) z[i] = mu[i] + t.std[i] * t.eps[i];
        write_tile<T>(z, a.z, at, dim, rows, cols, pitch);
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      const A k = static_cast<A>(total[r]);
      static_cast<A*>(a.kl)[r0 + r] = mode == KlMode::SampleThreshold ? k * (k > target ? A(1) : A(0)) : k;
    }
  }
}

template <typename T, KlMode mode>
void backward(const PosteriorArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t dim = a.dim, row_blocks = pad4(dim) / 4;
  const int64_t rows_per_tile = std::max<int64_t>(1, kTile / pad4(dim));
  const A target = static_cast<A>(a.target);
  Tile<A> t;
  for (int64_t r0 = begin; r0 < end; r0 += rows_per_tile) {
    const int64_t rows = std::min(rows_per_tile, end - r0);
    for (int64_t c0 = 0; c0 < dim; c0 += kTile) {
      const int64_t cols = std::min(kTile, dim - c0), pitch = pad4(cols), n = rows * pitch, at = r0 * dim + c0;
      const A* lv = read_tile<T>(a.logvar, r0 * a.logvar_row + c0 * a.logvar_col, a.logvar_row, a.logvar_col, t.lv,
                                 rows, cols, pitch);
      A* dmu = output_tile<T>(a.dmu, at, dim, t.dmu, rows, cols, pitch);
      A* dlv = output_tile<T>(a.dlogvar, at, dim, t.dlv, rows, cols, pitch);
      const auto kl_gradient = [&](int64_t r) {
        const A g = static_cast<const A*>(a.dkl)[(r0 + r) * a.dkl_row];
        if (mode != KlMode::SampleThreshold) return g;
        return g * (static_cast<const A*>(a.kl_saved)[r0 + r] > target ? A(1) : A(0));
      };
      if (a.samples == 1 && a.dz != nullptr && a.dkl != nullptr) {  // the usual case in one loop
        normal_fill(t.eps, a.seed, a.offset, static_cast<uint64_t>(r0 * row_blocks + c0 / 4), n / 4);
        const A* dz = read_tile<T>(a.dz, r0 * a.dz_row + c0 * a.dz_col, a.dz_row, a.dz_col, t.dz, rows, cols, pitch);
        const A* mu = read_tile<T>(a.mu, r0 * a.mu_row + c0 * a.mu_col, a.mu_row, a.mu_col, t.mu, rows, cols, pitch);
        for (int64_t r = 0; r < rows; r++) {
          const A g = kl_gradient(r);
#pragma omp simd
          for (int64_t i = r * pitch; i < (r + 1) * pitch; i++) {
            A std, minus1, excess;
            exp_parts(lv[i], &std, &minus1, &excess);
            const A gk = g * kl_mask<A, mode>(A(0.5) * (mu[i] * mu[i] + excess), target);
            dmu[i] = dz[i] + gk * mu[i];
            dlv[i] = A(0.5) * (dz[i] * t.eps[i] * std + gk * minus1);
          }
        }
        write_tile<T>(dmu, a.dmu, at, dim, rows, cols, pitch);
        write_tile<T>(dlv, a.dlogvar, at, dim, rows, cols, pitch);
        continue;
      }
#pragma omp simd
      for (int64_t i = 0; i < n; i++) exp_parts(lv[i], &t.std[i], &t.em1[i], &t.excess[i]);
      for (int64_t s = 0; a.dz != nullptr && s < a.samples; s++) {
        normal_fill(t.eps, a.seed, a.offset, static_cast<uint64_t>((s * a.batch + r0) * row_blocks + c0 / 4), n / 4);
        const A* dz = read_tile<T>(a.dz, s * a.dz_sample + r0 * a.dz_row + c0 * a.dz_col, a.dz_row, a.dz_col, t.dz,
                                   rows, cols, pitch);
        if (s == 0) {
#pragma omp simd
          for (int64_t i = 0; i < n; i++) {
            dmu[i] = dz[i];
            dlv[i] = dz[i] * t.eps[i];
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < n; i++) {
            dmu[i] += dz[i];
            dlv[i] += dz[i] * t.eps[i];
          }
        }
      }
      if (a.dz == nullptr) {
        std::fill_n(dmu, n, A(0));
        std::fill_n(dlv, n, A(0));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) dlv[i] *= A(0.5) * t.std[i];
      }
      if (a.dkl != nullptr) {
        const A* mu = read_tile<T>(a.mu, r0 * a.mu_row + c0 * a.mu_col, a.mu_row, a.mu_col, t.mu, rows, cols, pitch);
        for (int64_t r = 0; r < rows; r++) {
          const A g = kl_gradient(r);
          const int64_t row = r * pitch;
#pragma omp simd
          for (int64_t i = row; i < row + pitch; i++) {
            const A gk = g * kl_mask<A, mode>(A(0.5) * (mu[i] * mu[i] + t.excess[i]), target);
            dmu[i] += gk * mu[i];
            dlv[i] += A(0.5) * gk * t.em1[i];
          }
        }
      }
      write_tile<T>(dmu, a.dmu, at, dim, rows, cols, pitch);
      write_tile<T>(dlv, a.dlogvar, at, dim, rows, cols, pitch);
    }
  }
}

template <typename T>
void posterior_fwd_rows(const PosteriorArgs& a, int64_t begin, int64_t end) {
  switch (a.mode) {
    case KlMode::DimThreshold: return forward<T, KlMode::DimThreshold>(a, begin, end);
    case KlMode::FreeBits: return forward<T, KlMode::FreeBits>(a, begin, end);
    case KlMode::SampleThreshold: return forward<T, KlMode::SampleThreshold>(a, begin, end);
    default: return forward<T, KlMode::Sum>(a, begin, end);
  }
}

template <typename T>
void posterior_bwd_rows(const PosteriorArgs& a, int64_t begin, int64_t end) {
  switch (a.mode) {
    case KlMode::DimThreshold: return backward<T, KlMode::DimThreshold>(a, begin, end);
    case KlMode::FreeBits: return backward<T, KlMode::FreeBits>(a, begin, end);
    case KlMode::SampleThreshold: return backward<T, KlMode::SampleThreshold>(a, begin, end);
    default: return backward<T, KlMode::Sum>(a, begin, end);
  }
}

#define LMVAE_INSTANTIATE(T)                                                   \
  template void posterior_fwd_rows<T>(const PosteriorArgs&, int64_t, int64_t); \
  template void posterior_bwd_rows<T>(const PosteriorArgs&, int64_t, int64_t);
LMVAE_INSTANTIATE(float)
LMVAE_INSTANTIATE(double)
LMVAE_INSTANTIATE(c10::Half)
LMVAE_INSTANTIATE(c10::BFloat16)

}  // namespace lmvae::LMVAE_ISA
