// One stage of the coupling flow: the elementwise functions, its subnets, the way from its x side to its y side and
// back, and how threads that share a flow divide it and meet. Compiled once per instruction set (csrc/dispatch.h).
//
// Notation, for a stage y = P(scale * couple(x) + offset): the x side and the y side, whichever way the flow runs.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstring>

#include "coupling_flow.h"
#include "coupling_flow_gemm.h"

static_assert(lmvae::flow::kTileRows % lmvae::LMVAE_ISA::kChain == 0);

namespace lmvae::LMVAE_ISA {
namespace {

using flow::Call;
using flow::Layer;
using flow::Net;
using flow::Plan;
using flow::Stage;
// A vector with torch's elementary functions.
template <typename T>
using MathVec = at::vec::Vectorized<T>;

template <typename T>
MathVec<T> load_part(const T* p, int64_t n) {
  return n >= MathVec<T>::size() ? MathVec<T>::loadu(p) : MathVec<T>::loadu(p, n);
}

template <typename T>
void store_part(T* p, const MathVec<T>& v, int64_t n) {
  if (n >= MathVec<T>::size()) {
    v.store(p);
  } else {
    v.store(p, n);
  }
}

template <typename T>
T lanes_sum(const MathVec<T>& v) {
  alignas(64) T lanes[MathVec<T>::size()];
  v.store(lanes);
  T sum = 0;
  for (T lane : lanes) sum += lane;
  return sum;
}

// Where the activations of a stage lie: column `c` of row r at base + rows * c (a matrix per array, see
// Stage::columns).
template <typename T>
struct Activations {
  T* base;
  int64_t rows, row;
  T* at(int64_t column, int64_t width) const { return base + column * rows + row * width; }
};

// --- the elementwise functions ---------------------------------------------------------------------------------------

template <typename T>
MathVec<T> squash(const Stage& s, const MathVec<T>& raw) {
  if (s.squash == flow::kNoSquash) return raw;
  if (s.squash == flow::kTanh) return raw.tanh();
  if (s.squash == flow::kAtan) return MathVec<T>(T(0.636)) * raw.atan();
  return (MathVec<T>(T(0.5)) * raw).tanh();  // 2 sigmoid(u) - 1
}

template <typename T>
MathVec<T> activate(int kind, const MathVec<T>& x) {
  const MathVec<T> one(T(1)), half(T(0.5));
  if (kind == flow::kGelu) return x * half * (one + (x * MathVec<T>(T(M_SQRT1_2))).erf());
  return x / (one + x.neg().exp());  // SiLU
}

template <typename T>
void activate_all(int kind, const T* from, T* to, int64_t n) {
  constexpr int64_t W = MathVec<T>::size();
  for (int64_t i = 0; i < n; i += W) store_part(to + i, activate(kind, load_part(from + i, n - i)), n - i);
}

// --- the subnets -----------------------------------------------------------------------------------------------------

template <typename T>
Product<T> rows_times(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                      int64_t ldc) {
  return {m, n, k, a, lda, 1, b, ldb, Layout::kRows, c, ldc, Start::kZero, nullptr, false};
}

// The input of a stage's subnets: the passive half, and the condition where there is one.
template <typename T>
struct Inputs {
  const T *passive, *cond;  // rows `dim` and `cond_dim` apart
};

// out = in @ weight + bias of a first layer, columns [c0, c1).
template <typename T>
void first_layer(const Call<T>& call, const Stage& s, const Layer& layer, const Inputs<T>& in, int64_t rows, int64_t c0,
                 int64_t c1, T* out, int64_t ldo, bool relu, T* scratch) {
  const Plan& plan = *call.plan;
  const T* weight = call.theta + layer.weight + c0;
  auto p = rows_times(rows, c1 - c0, s.passive_width, in.passive, plan.dim, weight, layer.out, out + c0, ldo);
  p.start = Start::kBias;
  p.bias = call.theta + layer.bias + c0;
  p.relu = relu && !s.conditional;
  gemm(p, scratch);
  if (s.conditional) {
    auto q = rows_times(rows, c1 - c0, plan.cond_dim, in.cond, plan.cond_dim, weight + s.passive_width * layer.out,
                        layer.out, out + c0, ldo);
    q.start = Start::kAccumulate;
    q.relu = relu;
    gemm(q, scratch);
  }
}

// raw [rows, 2 active_width] = the stage's nets on `in`. Hidden activations go to `hidden` (after a ReLU, before GELU
// and SiLU, which need their argument for the gradient); `post` holds one layer's activated values.
template <typename T>
void run_nets(const Call<T>& call, const Stage& s, const Inputs<T>& in, int64_t rows, T* raw,
              const Activations<T>& hidden, int64_t hidden_column, T* post, T* scratch) {
  const int64_t ldr = 2 * s.active_width;
  for (const Net& net : s.nets) {
    const int64_t depth = net.layers.size();
    const bool relu = net.activation == flow::kRelu;
    const T* input = nullptr;
    for (int64_t k = 0; k < depth; ++k) {
      const Layer& layer = net.layers[k];
      const bool last = k + 1 == depth;
      T* out = last ? raw + net.column : hidden.at(hidden_column + layer.hidden, layer.out);
      const int64_t ldo = last ? ldr : layer.out;
      if (k == 0) {
        first_layer(call, s, layer, in, rows, 0, layer.out, out, ldo, relu && !last, scratch);
      } else {
        auto p = rows_times(rows, layer.out, layer.in, input, layer.in, call.theta + layer.weight, layer.out, out, ldo);
        p.start = Start::kBias;
        p.bias = call.theta + layer.bias;
        p.relu = relu && !last;
        gemm(p, scratch);
      }
      input = out;
      if (!last && !relu) {
        activate_all(net.activation, out, post, rows * layer.out);
        input = post;
      }
    }
  }
}

// --- the rest of a stage, row by row ---------------------------------------------------------------------------------

// Compiled once: which of its multiplications and additions the compiler fuses must not differ between callers, whose
// results are to have the same bits.
#if defined(__clang__)
#define LMVAE_ONE_COPY __attribute__((noinline))
#else
#define LMVAE_ONE_COPY __attribute__((noipa))
#endif

// A squash whose slope follows from its value: backward wants the value and not what it was computed from.
LMVAE_INLINE bool keeps_squashed(const Stage& s) { return s.squash == flow::kTanh || s.squash == flow::kSigmoid; }

// Whether a coupling leaves exp(log_scale) for backward in place of t, which then nobody asks for.
LMVAE_INLINE bool keeps_factor(const Stage& s, bool coupled) { return coupled && !s.affine; }

// x side -> u = scale * couple(x) + offset (before the permutation). `u` may be x. Returns the row's sum of log-scales.
// keep: leave in `raw` what backward wants (coupling_factors).
template <typename T>
LMVAE_ONE_COPY T couple_row(const Call<T>& call, const Stage& s, const T* x, T* raw, T* u, bool keep) {
  constexpr int64_t W = MathVec<T>::size();
  T logdet = 0;
  if (s.coupling) {
    const MathVec<T> clamp(static_cast<T>(s.clamp)), gain(static_cast<T>(s.gain));
    const T* xa = x + s.active;
    T *ua = u + s.active, *raw_s = raw, *raw_t = raw + s.active_width;
    const bool keep_squashed = keep && keeps_squashed(s), keep_factor = keep && keeps_factor(s, true);
    MathVec<T> sum(T(0));
    for (int64_t i = 0; i < s.active_width; i += W) {
      const int64_t n = s.active_width - i;
      const MathVec<T> squashed = squash(s, gain * load_part(raw_s + i, n)), log_scale = clamp * squashed;
      const MathVec<T> factor = log_scale.exp();
      store_part(ua + i, load_part(xa + i, n) * factor + gain * load_part(raw_t + i, n), n);
      if (keep_squashed) store_part(raw_s + i, squashed, n);
      if (keep_factor) store_part(raw_t + i, factor, n);
      sum = sum + (n >= W ? log_scale : MathVec<T>::set(MathVec<T>(T(0)), log_scale, n));
    }
    logdet = lanes_sum(sum);
    if (u != x) std::memcpy(u + s.passive, x + s.passive, s.passive_width * sizeof(T));
  } else if (u != x) {
    std::memcpy(u, x, call.plan->dim * sizeof(T));
  }
  if (s.affine) {
    const T *scale = call.scales + s.prepared, *offset = call.theta + s.offset;
    for (int64_t i = 0; i < call.plan->dim; i += W) {
      const int64_t n = call.plan->dim - i;
      store_part(u + i, load_part(u + i, n) * load_part(scale + i, n) + load_part(offset + i, n), n);
    }
  }
  return logdet;
}

// v on the coupling's y side -> x, in place. Returns the row's sum of log-scales. keep: as couple_row.
template <typename T>
LMVAE_ONE_COPY T uncouple_row(const Stage& s, T* raw, T* x, bool keep) {
  constexpr int64_t W = MathVec<T>::size();
  const MathVec<T> clamp(static_cast<T>(s.clamp)), gain(static_cast<T>(s.gain));
  T* xa = x + s.active;
  MathVec<T> sum(T(0));
  for (int64_t i = 0; i < s.active_width; i += W) {
    const int64_t n = s.active_width - i;
    const MathVec<T> squashed = squash(s, gain * load_part(raw + i, n)), log_scale = clamp * squashed;
    if (keep && keeps_squashed(s)) store_part(raw + i, squashed, n);
    store_part(xa + i, (load_part(xa + i, n) - gain * load_part(raw + s.active_width + i, n)) * log_scale.neg().exp(),
               n);
    sum = sum + (n >= W ? log_scale : MathVec<T>::set(MathVec<T>(T(0)), log_scale, n));
  }
  return lanes_sum(sum);
}

template <typename T>
void gather_row(const T* from, const int32_t* index, T* to, int64_t dim) {
  for (int64_t j = 0; j < dim; ++j) to[j] = from[index[j]];
}

template <typename T>
void unscale_row(const Call<T>& call, const Stage& s, T* v) {
  constexpr int64_t W = MathVec<T>::size();
  const T *scale = call.scales + s.prepared, *offset = call.theta + s.offset;
  for (int64_t i = 0; i < call.plan->dim; i += W) {
    const int64_t n = call.plan->dim - i;
    store_part(v + i, (load_part(v + i, n) - load_part(offset + i, n)) / load_part(scale + i, n), n);
  }
}

// u [rows, dim] @ the stage's soft permutation (`which` 0: matrix, 1: its inverse), or by its transpose.
template <typename T>
void soft_permute(const Call<T>& call, const Stage& s, int which, Layout layout, const T* u, T* y, int64_t rows,
                  int64_t c0, int64_t c1, T* scratch) {
  const int64_t dim = call.plan->dim;
  const T* matrix = call.constants + s.matrix + which * dim * dim;
  auto p = rows_times(rows, c1 - c0, dim, u, dim, matrix + (layout == Layout::kRows ? c0 : c0 * dim), dim, y + c0, dim);
  p.layout = layout;
  gemm(p, scratch);
}

// The elementwise part of a stage from the x side to the y side. u: [rows, dim] of scratch. logdet may be nullptr.
template <typename T>
void stage_out(const Call<T>& call, const Stage& s, const T* x, T* raw, T* y, T* u, T* logdet, int64_t rows, bool keep,
               T* scratch) {
  const int64_t dim = call.plan->dim;
  for (int64_t r = 0; r < rows; ++r) {
    T* row = s.permutation == flow::kNoPermutation ? y + r * dim : u + r * dim;
    const T sum = couple_row(call, s, x + r * dim, raw + r * 2 * s.active_width, row, keep);
    if (logdet) logdet[r] += sum;
    if (s.permutation == flow::kHard) gather_row(row, call.indices + s.index, y + r * dim, dim);
  }
  if (s.permutation == flow::kSoft) soft_permute(call, s, 0, Layout::kRows, u, y, rows, 0, dim, scratch);
}

// y side -> the coupling's y side (its passive half is the x side's already).
template <typename T>
void stage_in(const Call<T>& call, const Stage& s, const T* y, T* v, int64_t rows, T* scratch) {
  const int64_t dim = call.plan->dim;
  if (s.permutation == flow::kSoft) soft_permute(call, s, 1, Layout::kRows, y, v, rows, 0, dim, scratch);
  for (int64_t r = 0; r < rows; ++r) {
    T* row = v + r * dim;
    if (s.permutation == flow::kHard) gather_row(y + r * dim, call.indices + s.index + dim, row, dim);
    if (s.permutation == flow::kNoPermutation) std::memcpy(row, y + r * dim, dim * sizeof(T));
    if (s.affine) unscale_row(call, s, row);
  }
}

template <typename T>
void stage_forward(const Call<T>& call, const Stage& s, const T* x, const T* cond, T* y, const Activations<T>& kept,
                   T* u, T* post, T* logdet, int64_t rows, bool keep, T* scratch) {
  T* raw = kept.at(call.plan->dim, 2 * s.active_width);
  if (s.coupling) {
    run_nets(call, s, Inputs<T>{x + s.passive, cond}, rows, raw, kept, call.plan->dim + 2 * s.active_width, post,
             scratch);
  }
  stage_out(call, s, x, raw, y, u, logdet, rows, keep, scratch);
}

template <typename T>
void stage_inverse(const Call<T>& call, const Stage& s, const T* y, const T* cond, T* x, const Activations<T>& kept,
                   T* post, T* logdet, int64_t rows, bool keep, T* scratch) {
  const int64_t dim = call.plan->dim;
  stage_in(call, s, y, x, rows, scratch);
  if (!s.coupling) return;
  T* raw = kept.at(dim, 2 * s.active_width);
  run_nets(call, s, Inputs<T>{x + s.passive, cond}, rows, raw, kept, dim + 2 * s.active_width, post, scratch);
  for (int64_t r = 0; r < rows; ++r) {
    const T sum = uncouple_row(s, raw + r * 2 * s.active_width, x + r * dim, keep);
    if (logdet) logdet[r] -= sum;
  }
}

// A thread's share of n rows or columns, in multiples of `grain`.
struct Share {
  int64_t begin, end;
  Share(int64_t n, int64_t grain, int rank, int threads) {
    const int64_t chunk = ((n + grain - 1) / grain + threads - 1) / threads * grain;
    begin = std::min(n, rank * chunk);
    end = std::min(n, begin + chunk);
  }
};

// --- teams -----------------------------------------------------------------------------------------------------------

void pause_cpu() {
#ifdef __x86_64__
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void meet(flow::Barrier& b, int threads) {
  if (threads == 1) return;
  const int phase = b.phase.load(std::memory_order_acquire);
  if (b.waiting.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
    b.waiting.store(0, std::memory_order_relaxed);
    b.phase.store(phase + 1, std::memory_order_release);
    b.phase.notify_all();
    return;
  }
  constexpr int kSpins = 2000;  // some 30 us; then the core is better used by whoever holds the others up
  for (int spin = 0; spin < kSpins; ++spin) {
    if (b.phase.load(std::memory_order_acquire) != phase) return;
    pause_cpu();
  }
  b.phase.wait(phase, std::memory_order_acquire);
}

}  // namespace
}  // namespace lmvae::LMVAE_ISA
