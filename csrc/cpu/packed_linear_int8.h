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

template <typename T>
struct ByteLinearArgs : LinearEnd<T> {
  int64_t steps;          // of kByteStep depths
  const int8_t* weight;   // [panels][steps][kByteStepNumbers], zeros beyond out and in
  const float* scales;    // [panels][kLinearPanel]: what a column's whole numbers count
  const int32_t* totals;  // [panels][kLinearPanel]: their sum
  // Rows in pieces of kByteDepth: fp32 [pieces][rows][kByteDepth], or whole numbers of 16 bits, shifted by 2^15 to be
  // positive, as high and low bytes [pieces][rows][2][kByteDepth].
  const void* x;
  const float* row_scales;  // [rows]: what a row's whole numbers count
};

// By the dot products of AVX512-VNNI, over rows of whole numbers.
void byte_linear_dot_panels(const ByteLinearArgs<c10::BFloat16>& a, int64_t begin, int64_t end, const PanelSums& done);

}  // namespace lmvae

// One row as whole numbers of 16 bits in `to` (pieces `apart` bytes from each other) and what they count; false where
// a number is not finite.
LMVAE_DECLARE(bool byte_linear_round(const c10::BFloat16* x, int64_t n, int64_t apart, uint8_t* to, float* scale))
// n numbers in fp32, in pieces `apart` numbers from each other, zeros to the end of a step.
LMVAE_DECLARE(template <typename T> void byte_linear_widen(const T* x, int64_t n, int64_t apart, float* to))
// Panels [begin, end), over rows in fp32.
LMVAE_DECLARE(template <typename T>
              void byte_linear_panels(const ::lmvae::ByteLinearArgs<T>& a, int64_t begin, int64_t end))
