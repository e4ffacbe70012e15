// What the packed_linear*.cpp files (checks, memory, threads) and the arithmetic of each instruction set share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

#include <c10/util/BFloat16.h>

#include "dispatch.h"

namespace lmvae {

constexpr int64_t kLinearPanel = 32;   // columns that lie together in the packed weight: two of the widest vectors
constexpr int64_t kLinearDepth = 128;  // terms of a sum held in registers; a panel's piece of this depth stays in L1
constexpr int64_t kLinearRows = 128;   // rows of one call

// Weights of 16 bits lie in steps of 32 depths, as AMX tiles read them: [2 halves][16 pairs][16 columns][2 of a pair].
constexpr int64_t kHalfStep = 32;               // depths
constexpr int64_t kHalfDepth = 256;             // depths of a piece, which has as many bytes as one in fp32
constexpr int64_t kHalfBlock = 16 * kHalfStep;  // numbers of 16 columns in a step
constexpr int64_t kStepNumbers = kLinearPanel * kHalfStep;

// What is done to a product before it is stored; numbers as in kernels/packed_linear/op.py.
enum class Activation : int64_t { None = 0, GeluTanh = 1, SwiGlu = 2 };

// Where products go, and what is done to them on the way. SwiGlu: a panel holds 16 gates and the 16 columns they are
// for, and gives 16 outputs.
template <typename T>
struct LinearEnd {
  int64_t rows, out;
  Activation activation;
  const T* bias;      // [out] or null; null with SwiGlu
  const T* residual;  // [rows, out] or null, added last
  T* y;               // [rows, out]
};

struct PackedLinearArgs : LinearEnd<float> {
  int64_t in;
  const float* x;       // [in / kLinearDepth][rows][kLinearDepth], the last piece filled in part
  const float* weight;  // [panels][in][kLinearPanel], zeros beyond out
};

// The same with weights of 16 bits. `x` is of bf16 for the dot products, of fp32 where weights are widened on the way.
struct HalfLinearArgs : LinearEnd<c10::BFloat16> {
  int64_t steps;           // of kHalfStep depths
  const void* x;           // [steps * kHalfStep / kHalfDepth][rows][kHalfDepth], zeros beyond the inputs
  const uint16_t* weight;  // [panels][steps][kStepNumbers], zeros beyond out and in
};

// Groups of panels that threads take in turn: cores are not equally fast where other programs run too, or where some
// are small, and nobody waits for half of the panels of the slowest.
class PanelQueue {
 public:
  struct Group {
    int64_t begin, end;
  };
  PanelQueue(int64_t panels, int64_t group) : panels_(panels), group_(group) {}
  // Panels [begin, end); empty when there are none left.
  Group take() {
    const int64_t begin = std::min(next_.fetch_add(group_, std::memory_order_relaxed), panels_);
    return {begin, std::min(begin + group_, panels_)};
  }
  // The panel that the next group begins with, if nobody else takes it before.
  int64_t following() const { return std::min(next_.load(std::memory_order_relaxed), panels_ - 1); }

 private:
  const int64_t panels_, group_;
  std::atomic<int64_t> next_{0};
};

// How rows are multiplied on the AMX tiles: in chunks of `chunk` of the `steps` steps of 64 bytes of depth that leave
// the rows in the second-level cache, by groups of `group` panels.
struct AmxPlan {
  int64_t rows, steps, chunk, group;
  int64_t sums;  // numbers of 32 bits that a row has in a panel
};
// block_bytes: of 32 rows in one step.
AmxPlan amx_plan(int64_t rows, int64_t steps, int64_t panels, int64_t threads, int64_t block_bytes,
                 int64_t sums = kLinearPanel);

// In fp32, where `in` is a multiple of 32: bytes of the rows' parts, the parts of steps [begin, end) of 32 depths, and
// the sums of the queue's panels, each given to `done` as [rows][kLinearPanel].
int64_t packed_linear_amx_workspace(int64_t rows, int64_t in);
void packed_linear_amx_rows(const float* x, int64_t stride, int64_t rows, int64_t in, char* parts, int64_t begin,
                            int64_t end);
using PanelSums = std::function<void(int64_t panel, float* sums)>;
void packed_linear_amx_panels(const PackedLinearArgs& a, const char* parts, const AmxPlan& plan, PanelQueue& queue,
                              const PanelSums& done);
// In bf16, of any number of inputs: rows [begin, end) of those filled up to a multiple of 32, as tiles, and the sums.
void half_linear_amx_rows(const c10::BFloat16* x, int64_t stride, int64_t rows, int64_t in, char* tiles, int64_t begin,
                          int64_t end);
void half_linear_amx_panels(const HalfLinearArgs& a, const char* rows, const AmxPlan& plan, PanelQueue& queue,
                            const PanelSums& done);
// By the dot products of AVX512-BF16; `a.x` is of bf16.
void half_linear_dot_panels(const HalfLinearArgs& a, int64_t begin, int64_t end, int64_t following,
                            const PanelSums& done);

}  // namespace lmvae

// The sums [rows][kLinearPanel] of a panel on their way to y; false if one of them is NaN.
LMVAE_DECLARE(template <typename T>
              bool packed_linear_finish(const ::lmvae::LinearEnd<T>& a, float* sums, int64_t panel))
// Panels [begin, end), whose last piece fetches the first of panel `following`.
LMVAE_DECLARE(void packed_linear_panels(const ::lmvae::PackedLinearArgs& a, int64_t begin, int64_t end,
                                        int64_t following))
LMVAE_DECLARE(void half_linear_widen(const c10::BFloat16* from, int64_t n, float* to))
LMVAE_DECLARE(void half_linear_panels(const ::lmvae::HalfLinearArgs& a, int64_t begin, int64_t end, int64_t following))
