// What coupling_flow.cpp (plan, memory, threads) and the arithmetic (coupling_flow_stages.h,
// coupling_flow_forward_simd.cpp, coupling_flow_backward_simd.cpp) share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "dispatch.h"

namespace lmvae::flow {

enum Activation { kRelu = 1, kGelu = 2, kSilu = 3 };
enum Squash { kTanh = 1, kAtan = 2, kSigmoid = 3, kNoSquash = 4 };
enum Scale { kNoAffine = 0, kSoftplus = 1, kExp = 2, kSigmoidScale = 3 };
enum Permutation { kNoPermutation = 0, kHard = 1, kSoft = 2 };

struct Layer {
  int64_t in, out;
  int64_t weight, bias;  // offsets into theta; weight is [in, out]
  int64_t hidden;        // columns of hidden activations of this stage before this layer's (last layers have none)
};

struct Net {
  int activation;
  int64_t column;  // its first column in the stage's raw output [s | t]
  std::vector<Layer> layers;
};

// coupling -> affine -> permutation, each optional; kernels/coupling_flow/spec.py has the definitions.
struct Stage {
  bool coupling = false, conditional = false;
  int64_t active = 0, active_width = 0, passive = 0, passive_width = 0;
  int squash = 0;
  double clamp = 0, gain = 0;
  std::vector<Net> nets;
  int affine = kNoAffine;
  int64_t scale = 0, offset = 0;  // into theta; the prepared scale of this stage lies at `prepared`
  int64_t prepared = 0;
  int permutation = kNoPermutation;
  int64_t index = 0;         // into indices: index, then inverse
  int64_t matrix = 0;        // into constants: matrix, inverse, logdet
  int64_t hidden = 0;        // columns of hidden activations
  int64_t columns = 0;       // of saved activations: state | raw | hidden
  int64_t first_column = 0;  // columns of saved activations of the stages before
};

struct Plan {
  int64_t dim = 0, cond_dim = 0;
  std::vector<Stage> stages;
  int64_t theta = 0, constants = 0, indices = 0, prepared = 0;  // sizes
  int64_t columns = 0;                                          // of saved activations, all stages
  int64_t max_columns = 0, max_hidden = 0, max_raw = 0;         // per row, of the largest stage
  int64_t max_width = 0;                                        // of any product's inner dimension or result
  bool smooth = false;                                          // some activation is not a ReLU
};

// The numbers of a call. All matrices are contiguous; T is float or double.
template <typename T>
struct Call {
  const Plan* plan;
  const T *theta, *constants, *cond;
  const int32_t* indices;
  const T* scales;  // [prepared]: the scale of every channel of every stage that has one
  T logdet_offset;  // sum of log-scales and of log|det| of soft permutations: the same for every row
  int64_t batch;
  bool inverse;
};

template <typename T>
struct ForwardRows {
  const T* x;
  T *y, *logdet;
  T* saved;  // nullptr: activations are not kept
  T* workspace;
};

// A barrier for threads that meet every few microseconds: they spin, and sleep when somebody is late.
struct Barrier {
  alignas(64) std::atomic<int> waiting{0};
  alignas(64) std::atomic<int> phase{0};
};

template <typename T>
struct Team {
  const T* x;
  T *y, *logdet;
  T* shared;
  Barrier* barrier;
};

template <typename T>
struct Backward {
  const T *grad_y, *grad_logdet;
  const T* y;             // recompute: the flow's output
  const T* saved;         // or the activations; exactly one of the two is given
  T *grad_x, *grad_cond;  // grad_cond may be nullptr
  T* grad_theta;          // slots of affine scales get d/dscale
  T* shared;
  int64_t tile;  // rows in flight, of all threads together
  Barrier* barrier;
};

constexpr int64_t kMaxDim = 1024;  // spec.py refuses more
// A sum runs over at most kChain terms before it is added to the rest: long chains of fp32 additions lose digits. Tiles
// of rows are multiples of it, so that sums over the batch do not depend on the tiles.
constexpr int64_t kChain = 128;
// Rows of one thread in flight: their activations stay in the second-level cache.
constexpr int64_t kTileRows = 256;
// A team with fewer rows computes the elementwise part in every thread.
constexpr int64_t kPrivateRows = 4;
// Rows of a tile, when n rows go in as few equal tiles of at most `most` rows as possible (a short last tile is dear:
// weights and their gradients are read and written once per tile).
static inline int64_t even_tile(int64_t n, int64_t most) {
  const int64_t tiles = std::max<int64_t>(1, (n + most - 1) / most);
  return std::max<int64_t>(1, (n + tiles - 1) / tiles);
}
// Columns of a packed panel of B: two vectors, and the widest vector has 64 bytes.
template <typename T>
constexpr int64_t kPanel = 128 / int64_t(sizeof(T));
// Columns of a block of packed panels: with kChain rows it takes a quarter of a second-level cache of 1 MB.
template <typename T>
constexpr int64_t kBlock = 2048 / int64_t(sizeof(T));
// From so many rows on a product packs a whole block (coupling_flow_gemm.h).
constexpr int64_t kManyRows = 48;
// Elements that the products of `rows` rows, and those that sum over them, pack.
template <typename T>
int64_t product_scratch(int64_t max_width, int64_t rows) {
  const int64_t terms = rows < kManyRows ? rows : kChain;
  return std::max(kChain * kPanel<T>, terms * std::min(kBlock<T>, max_width + kPanel<T>));
}

// Cuts a buffer into pieces of whole cache lines; with a null base it only counts.
template <typename T>
struct Cutter {
  T* base;
  int64_t used = 0;
  T* take(int64_t n) {
    T* p = base == nullptr ? nullptr : base + used;
    used += (n + 15) / 16 * 16;
    return p;
  }
};

template <typename T>
struct ForwardMemory {
  T *state[2], *u, *post, *panel, *kept;
  int64_t size;
  ForwardMemory(const Plan& plan, int64_t tile, bool saved, T* base) {
    Cutter<T> c{base};
    for (T*& s : state) s = c.take(tile * plan.dim);
    u = c.take(tile * plan.dim);
    post = c.take(tile * plan.max_width);
    panel = c.take(product_scratch<T>(plan.max_width, tile));
    kept = c.take(saved ? 0 : tile * plan.max_columns);
    size = c.used;
  }
};

template <typename T>
struct TeamMemory {
  T *state[2], *raw[2], *hidden[2], *u, *logdet, *panel;
  int64_t shared, own;
  TeamMemory(const Plan& plan, int64_t rows, T* base, int rank, bool alone) {
    Cutter<T> c{base};
    for (T*& s : state) s = c.take(rows * plan.dim);
    for (T*& r : raw) r = c.take(rows * plan.max_raw);
    for (T*& h : hidden) h = c.take(rows * plan.max_width);
    u = c.take(rows * plan.dim);
    logdet = c.take(rows);
    shared = c.used;
    Cutter<T> mine{nullptr};
    for (int pass = 0; pass < 2; ++pass) {  // first the size of a member's own part, then the part
      if (pass == 1) {
        own = mine.used;
        mine = Cutter<T>{base == nullptr ? nullptr : base + shared + rank * own};
      }
      panel = mine.take(product_scratch<T>(plan.max_width, rows));
      if (alone) {
        for (T*& s : state) s = mine.take(rows * plan.dim);
        u = mine.take(rows * plan.dim);
        logdet = mine.take(rows);
      }
    }
  }
};

template <typename T>
struct BackwardMemory {
  T *grad[2], *state[3], *kept[2], *d_raw[2], *d_hidden[2], *through[2], *through_u[2];  // of all threads' rows
  T *u, *my_post, *post, *panel;                                                         // a thread's own
  int64_t shared, own;
  BackwardMemory(const Plan& plan, int64_t tile, bool saved, T* base, int rank) {
    Cutter<T> c{base};
    for (T*& p : grad) p = c.take(tile * plan.dim);
    for (T*& p : state) p = c.take(saved ? 0 : tile * plan.dim);
    for (T*& p : kept) p = c.take(saved ? 0 : tile * plan.max_columns);
    for (T*& p : d_raw) p = c.take(tile * plan.max_raw);
    for (T*& p : d_hidden) p = c.take(tile * plan.max_hidden);
    for (T*& p : through) p = c.take(tile * plan.dim);
    for (T*& p : through_u) p = c.take(tile * plan.dim);
    shared = c.used;
    Cutter<T> mine{nullptr};
    for (int pass = 0; pass < 2; ++pass) {
      if (pass == 1) {
        own = mine.used;
        mine = Cutter<T>{base == nullptr ? nullptr : base + shared + rank * own};
      }
      panel = mine.take(product_scratch<T>(plan.max_width, tile));
      u = mine.take(saved ? 0 : tile * plan.dim);
      my_post = mine.take(plan.smooth && !saved ? tile * plan.max_width : 0);
      post = mine.take(plan.smooth ? tile * plan.max_width : 0);
    }
  }
};

}  // namespace lmvae::flow

LMVAE_DECLARE(template <typename T> void flow_prepare(int kind, const T* raw, T* scale, T* log_scale, T* slope,
                                                      int64_t n);
              template <typename T> void flow_forward(const flow::Call<T>& call, const flow::ForwardRows<T>& io,
                                                      int64_t begin, int64_t end);
              template <typename T> void flow_team(const flow::Call<T>& call, const flow::Team<T>& io, int rank,
                                                   int threads);
              template <typename T> void flow_backward(const flow::Call<T>& call, const flow::Backward<T>& io, int rank,
                                                       int threads);)
