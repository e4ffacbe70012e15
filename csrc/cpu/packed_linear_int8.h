// What packed_linear_int8.cpp (checks, memory, threads) hands to the arithmetic of each instruction set.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "packed_linear.h"

namespace lmvae {

// Steps of 64 depths, as bytes' dot products and AMX tiles read them: [2 halves][16 quads][16 columns][4 of a quad].
constexpr int64_t kByteStep = 64;    // depths
constexpr int64_t kByteDepth = 512;  // depths of a piece, which has as many bytes as one in fp32
constexpr int64_t kByteBlock = 16 * kByteStep, kByteStepNumbers = kLinearPanel * kByteStep;
constexpr int64_t kByteSums = 2 * kLinearPanel;  // of a row in a panel: of high and of low bytes
constexpr int64_t kByteBlockRows = 16;           // of one product on the AMX tiles

template <typename T>
struct ByteLinearArgs : LinearEnd<T> {
  int64_t steps;          // of kByteStep depths
  const int8_t* weight;   // [panels][steps][kByteStepNumbers], zeros beyond out and in
  const float* scales;    // [panels][kLinearPanel]: what a column's whole numbers count
  const int32_t* totals;  // [panels][kLinearPanel]: their sum
  // Rows in pieces of kByteDepth: fp32 [pieces][rows][kByteDepth], or whole numbers of 16 bits, shifted by 2^15 to be
  // positive, as high and low bytes: [pieces][rows][2][kByteDepth] for the dot products, for the AMX tiles
  // [ceil(rows / 16)][steps][2][16 rows][kByteStep].
  const void* x;
  const float* row_scales;  // [rows]: what a row's whole numbers count
};

// Over rows of whole numbers; each panel's sums, int32 [rows][kByteSums], are given to `done`. By the dot products of
// AVX512-VNNI panels [begin, end), by the AMX tiles those of the queue.
using WholeSums = std::function<void(int64_t panel, const int32_t* sums)>;
void byte_linear_dot_panels(const ByteLinearArgs<c10::BFloat16>& a, int64_t begin, int64_t end, int64_t following,
                            const WholeSums& done);
void byte_linear_amx_panels(const ByteLinearArgs<c10::BFloat16>& a, const AmxPlan& plan, PanelQueue& queue,
                            const WholeSums& done);

// Where the whole numbers of a row go: pieces of `depth` inputs `apart` bytes from each other, low bytes `low` behind
// the high ones.
struct BytePlaces {
  uint8_t* to;
  int64_t depth, apart, low;
};

}  // namespace lmvae

// One row as whole numbers of 16 bits and what they count; false where a number is not finite.
LMVAE_DECLARE(bool byte_linear_round(const c10::BFloat16* x, int64_t n, ::lmvae::BytePlaces places, float* scale))
// The whole numbers' sums of a panel on their way to y.
LMVAE_DECLARE(void byte_linear_finish(const ::lmvae::ByteLinearArgs<c10::BFloat16>& a, const int32_t* sums,
                                      int64_t panel))
// n numbers in fp32, in pieces `apart` numbers from each other, zeros to the end of a step.
LMVAE_DECLARE(template <typename T> void byte_linear_widen(const T* x, int64_t n, int64_t apart, float* to))
// Panels [begin, end), over rows in fp32.
LMVAE_DECLARE(template <typename T> void byte_linear_panels(const ::lmvae::ByteLinearArgs<T>& a, int64_t begin,
                                                            int64_t end, int64_t following))
