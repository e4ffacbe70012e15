// packed_linear with int8 weights widened on the way, in fp32 arithmetic: for fp32 rows, and where the CPU has no dot
// products of bytes. Rows of bf16 as whole numbers, for those that have.
#include "packed_linear_int8.h"

#include <algorithm>

#include "packed_linear_fetch.h"
#include "simd_math.h"

namespace lmvae::LMVAE_ISA {
namespace {

constexpr int kTileRows = by_registers(10, 4);  // times two vectors of sums
constexpr int kLanesF = Lanes<float>::count, kTileColumns = 2 * kLanesF;
using V = Vec<float>;
using I = Vec<int32_t>;

// Where the vector of columns v begins within a step.
constexpr int64_t place(int64_t v) { return v * kLanesF / 16 * kByteBlock + v * kLanesF % 16 * 4; }

// The quad's number of depth j in every column.
LMVAE_INLINE V number(I quad, int j) { return __builtin_convertvector((quad << (24 - 8 * j)) >> 24, V); }

// sums[r][0 .. kTileColumns) (+)= sum_k x[r][k] w[k][...] for r < R, while the next piece is fetched. The second vector
// of columns lies `second` behind the first.
template <int R>
void tile(const float* x, const int8_t* w, int64_t second, int64_t steps, bool add, float* sums, Fetch& next) {
  constexpr int C = R <= 2 ? 4 : R <= by_registers(7, 4) ? 2 : 1;
  V acc[C][R][2] = {};
  Fetch fetch = next;
  for (int64_t s = 0; s < steps; s++, w += kByteStepNumbers, x += kByteStep) {
#pragma GCC unroll 1
    for (int k = 0; k < 16; k++) {
      if (k % 4 == 0) fetch();
      const I left = *reinterpret_cast<const I*>(w + 64 * k), right = *reinterpret_cast<const I*>(w + 64 * k + second);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const V l = number(left, j), m = number(right, j);
#pragma GCC unroll 10
        for (int r = 0; r < R; r++) {
          const V value = splat(x[r * kByteDepth + 4 * k + j]);
          acc[j % C][r][0] += value * l;
          acc[j % C][r][1] += value * m;
        }
      }
    }
  }
  next = fetch;
#pragma GCC unroll 10
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      V sum = acc[0][r][v];
      if constexpr (C == 2) sum += acc[1][r][v];
      if constexpr (C == 4) sum = (sum + acc[1][r][v]) + (acc[2][r][v] + acc[3][r][v]);
      float* at = sums + r * kLinearPanel + v * kLanesF;
      store(at, add ? load(at) + sum : sum);
    }
}

template <int R = kTileRows>
void tile_of(int64_t rows, const float* x, const int8_t* w, int64_t second, int64_t steps, bool add, float* sums,
             Fetch& next) {
  if (rows == R) return tile<R>(x, w, second, steps, add, sums, next);
  if constexpr (R > 1) tile_of<R - 1>(rows, x, w, second, steps, add, sums, next);
}

}  // namespace

bool byte_linear_round(const c10::BFloat16* x, int64_t n, BytePlaces places, float* scale) {
  const auto* bits = reinterpret_cast<const uint16_t*>(x);
  int32_t largest = 0;  // numbers without a sign are ordered as their bits are
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; i++) largest = std::max<int32_t>(largest, bits[i] & 0x7fff);
  if (largest >= 0x7f80) return false;
  const float most = bits_to_float(static_cast<uint32_t>(largest) << 16);
  *scale = most / 32767.0f;
  const float inverse = most > 1e-30f ? 32767.0f / most : 0.0f;  // smaller ones would not have a finite inverse
  for (int64_t k = 0; k < n; k += places.depth, places.to += places.apart) {
    const int64_t depth = std::min(places.depth, n - k), end = (depth + kByteStep - 1) / kByteStep * kByteStep;
    uint8_t *high = places.to, *low = high + places.low;
#pragma omp simd
    for (int64_t i = 0; i < depth; i++) {
      const float value = bits_to_float(static_cast<uint32_t>(bits[k + i]) << 16) * inverse;
      const int32_t whole = static_cast<int32_t>(value + 12582912.0f - 12582912.0f) + 32768;  // to the nearest
      high[i] = static_cast<uint8_t>(whole >> 8);
      low[i] = static_cast<uint8_t>(whole);
    }
    for (int64_t i = depth; i < end; i++) high[i] = low[i] = 0;
  }
  return most > 1e-30f || most == 0.0f;
}

void byte_linear_finish(const ByteLinearArgs<c10::BFloat16>& a, const int32_t* whole, int64_t panel) {
  constexpr int64_t kSome = 16;  // rows at a time, whose sums stay in the first-level cache
  alignas(64) float sums[kSome * kLinearPanel];
  const float* scales = a.scales + panel * kLinearPanel;
  int32_t shift[kLinearPanel];  // a row's numbers are 2^15 too large, its high bytes 2^7
  for (int64_t c = 0; c < kLinearPanel; c++) shift[c] = a.totals[panel * kLinearPanel + c] * 128;
  LinearEnd<c10::BFloat16> end = a;
  for (int64_t from = 0; from < a.rows; from += kSome) {
    end.rows = std::min(kSome, a.rows - from);
    for (int64_t r = 0; r < end.rows; r++, whole += kByteSums) {
      const float row = a.row_scales[from + r];
#pragma omp simd
      for (int64_t c = 0; c < kLinearPanel; c++) {
        const float high = static_cast<float>(whole[c] - shift[c]), low = static_cast<float>(whole[kLinearPanel + c]);
        sums[r * kLinearPanel + c] = (high * 256.0f + low) * row * scales[c];
      }
    }
    packed_linear_finish<c10::BFloat16>(end, sums, panel);
    end.y += kSome * a.out;
    if (end.residual != nullptr) end.residual += kSome * a.out;
  }
}

template <typename T>
void byte_linear_widen(const T* x, int64_t n, int64_t apart, float* to) {
  for (int64_t k = 0; k < n; k += kByteDepth, to += apart) {
    const int64_t depth = std::min(kByteDepth, n - k);
    load_unit(x + k, to, depth);
    std::fill(to + depth, to + (depth + kByteStep - 1) / kByteStep * kByteStep, 0.0f);
  }
}
template void byte_linear_widen(const float*, int64_t, int64_t, float*);
template void byte_linear_widen(const c10::BFloat16*, int64_t, int64_t, float*);

template <typename T>
void byte_linear_panels(const ByteLinearArgs<T>& a, int64_t begin, int64_t end, int64_t following) {
  alignas(64) float sums[kLinearRows * kLinearPanel];
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows, height = (a.rows + tiles - 1) / tiles;
  const int passes = static_cast<int>(tiles * (kLinearPanel / kTileColumns));
  constexpr int64_t kSteps = kByteDepth / kByteStep, kRun = 1;
  for (int64_t p = begin; p < end; p++) {
    const int8_t* panel = a.weight + p * a.steps * kByteStepNumbers;
    for (int64_t s = 0; s < a.steps; s += kSteps) {
      const int64_t steps = std::min(kSteps, a.steps - s);
      const int8_t* w = panel + s * kByteStepNumbers;
      const float* x = static_cast<const float*>(a.x) + s / kSteps * a.rows * kByteDepth;
      const bool last = s + steps == a.steps && p + 1 == end;
      Fetch next{reinterpret_cast<const char*>(last ? a.weight + following * a.steps * kByteStepNumbers
                                                    : w + steps * kByteStepNumbers),
                 passes};
      // Sums of 64 terms in a register, which round less than longer ones.
      for (int64_t t = 0; t < steps; t += kRun)
        for (int64_t v = 0; v < kLinearPanel / kLanesF; v += 2)
          for (int64_t r = 0; r < a.rows; r += height)
            tile_of(std::min(height, a.rows - r), x + r * kByteDepth + t * kByteStep,
                    w + t * kByteStepNumbers + place(v), place(v + 1) - place(v), std::min(kRun, steps - t), s + t > 0,
                    sums + r * kLinearPanel + v * kLanesF, next);
    }
    const float* scales = a.scales + p * kLinearPanel;
    for (int64_t r = 0; r < a.rows; r++)
#pragma omp simd
      for (int64_t c = 0; c < kLinearPanel; c++) sums[r * kLinearPanel + c] *= scales[c];
    packed_linear_finish<T>(a, sums, p);
  }
}
template void byte_linear_panels(const ByteLinearArgs<float>&, int64_t, int64_t, int64_t);
template void byte_linear_panels(const ByteLinearArgs<c10::BFloat16>&, int64_t, int64_t, int64_t);

}  // namespace lmvae::LMVAE_ISA
