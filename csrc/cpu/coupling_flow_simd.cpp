// The arithmetic of the coupling flow on the CPU, once per instruction set (csrc/dispatch.h).
//
// Three ways through the stages:
//   flow_forward   a thread takes its rows through the whole flow, a tile of rows at a time: no meetings, activations in cache;
//   flow_team      few rows: the threads split the columns of every product, so that the machine reads the weights once;
//   flow_backward  rows are split for what belongs to a row, columns for what sums over rows (weight gradients).
// Every sum runs in the same order in all of them: results do not depend on the batch, the tiles or the number of threads.
// Notation, for a stage y = P(scale * couple(x) + offset): the x side and the y side, whichever way the flow runs.
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstring>

#include "coupling_flow.h"
#include "coupling_flow_gemm.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

static_assert(lmvae::flow::kTileRows % lmvae::LMVAE_ISA::kChain == 0);

namespace lmvae::LMVAE_ISA {
namespace {

using flow::Call;
using flow::Layer;
using flow::Net;
using flow::Plan;
using flow::Stage;
template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
Vec<T> load(const T* p, int64_t n) {
  return n >= Vec<T>::size() ? Vec<T>::loadu(p) : Vec<T>::loadu(p, n);
}

template <typename T>
void store(T* p, const Vec<T>& v, int64_t n) {
  if (n >= Vec<T>::size()) {
    v.store(p);
  } else {
    v.store(p, n);
  }
}

template <typename T>
T lanes_sum(const Vec<T>& v) {
  alignas(64) T lanes[Vec<T>::size()];
  v.store(lanes);
  T sum = 0;
  for (T lane : lanes) sum += lane;
  return sum;
}

// Where the activations of a stage lie: column `c` of row r at base + rows * c (a matrix per array, see Stage::columns).
template <typename T>
struct Activations {
  T* base;
  int64_t rows, row;
  T* at(int64_t column, int64_t width) const { return base + column * rows + row * width; }
};

// --- the elementwise functions -----------------------------------------------------------------------------------------

template <typename T>
Vec<T> squash(const Stage& s, const Vec<T>& raw) {
  if (s.squash == flow::kNoSquash) return raw;
  if (s.squash == flow::kTanh) return raw.tanh();
  if (s.squash == flow::kAtan) return Vec<T>(T(0.636)) * raw.atan();
  return (Vec<T>(T(0.5)) * raw).tanh();  // 2 sigmoid(u) - 1
}

// d squash / d raw, given squash(raw).
template <typename T>
Vec<T> squash_slope(const Stage& s, const Vec<T>& raw, const Vec<T>& squashed) {
  const Vec<T> one(T(1));
  if (s.squash == flow::kNoSquash) return one;
  if (s.squash == flow::kAtan) return Vec<T>(T(0.636)) / (one + raw * raw);
  const Vec<T> slope = one - squashed * squashed;
  return s.squash == flow::kTanh ? slope : Vec<T>(T(0.5)) * slope;
}

template <typename T>
Vec<T> activate(int kind, const Vec<T>& x) {
  const Vec<T> one(T(1)), half(T(0.5));
  if (kind == flow::kGelu) return x * half * (one + (x * Vec<T>(T(M_SQRT1_2))).erf());
  return x / (one + x.neg().exp());  // SiLU
}

template <typename T>
Vec<T> activation_slope(int kind, const Vec<T>& x) {
  const Vec<T> one(T(1)), half(T(0.5));
  if (kind == flow::kGelu) {
    const Vec<T> cdf = half * (one + (x * Vec<T>(T(M_SQRT1_2))).erf());
    const Vec<T> pdf = (x * x * Vec<T>(T(-0.5))).exp() * Vec<T>(T(M_2_SQRTPI * M_SQRT1_2 * 0.5));
    return cdf + x * pdf;
  }
  const Vec<T> sigmoid = one / (one + x.neg().exp());
  return sigmoid * (one + x * (one - sigmoid));
}

template <typename T>
void activate_all(int kind, const T* from, T* to, int64_t n) {
  constexpr int64_t W = Vec<T>::size();
  for (int64_t i = 0; i < n; i += W) store(to + i, activate(kind, load(from + i, n - i)), n - i);
}

// --- the subnets -------------------------------------------------------------------------------------------------------

template <typename T>
Product<T> rows_times(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
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

// raw [rows, 2 active_width] = the stage's nets on `in`. Hidden activations go to `hidden` (after a ReLU, before GELU and
// SiLU, which need their argument for the gradient); `post` holds one layer's activated values.
template <typename T>
void run_nets(const Call<T>& call, const Stage& s, const Inputs<T>& in, int64_t rows, T* raw, const Activations<T>& hidden,
              int64_t hidden_column, T* post, T* scratch) {
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

// --- the rest of a stage, row by row -----------------------------------------------------------------------------------

// x side -> u = scale * couple(x) + offset (before the permutation). `u` may be x. Returns the row's sum of log-scales.
template <typename T>
T couple_row(const Call<T>& call, const Stage& s, const T* x, const T* raw, T* u) {
  constexpr int64_t W = Vec<T>::size();
  T logdet = 0;
  if (s.coupling) {
    const Vec<T> clamp(static_cast<T>(s.clamp)), gain(static_cast<T>(s.gain));
    const T *xa = x + s.active, *raw_s = raw, *raw_t = raw + s.active_width;
    T* ua = u + s.active;
    Vec<T> sum(T(0));
    for (int64_t i = 0; i < s.active_width; i += W) {
      const int64_t n = s.active_width - i;
      const Vec<T> log_scale = clamp * squash(s, gain * load(raw_s + i, n));
      store(ua + i, load(xa + i, n) * log_scale.exp() + gain * load(raw_t + i, n), n);
      sum = sum + (n >= W ? log_scale : Vec<T>::set(Vec<T>(T(0)), log_scale, n));
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
      store(u + i, load(u + i, n) * load(scale + i, n) + load(offset + i, n), n);
    }
  }
  return logdet;
}

// v on the coupling's y side -> x, in place. Returns the row's sum of log-scales.
template <typename T>
T uncouple_row(const Stage& s, const T* raw, T* x) {
  constexpr int64_t W = Vec<T>::size();
  const Vec<T> clamp(static_cast<T>(s.clamp)), gain(static_cast<T>(s.gain));
  T* xa = x + s.active;
  Vec<T> sum(T(0));
  for (int64_t i = 0; i < s.active_width; i += W) {
    const int64_t n = s.active_width - i;
    const Vec<T> log_scale = clamp * squash(s, gain * load(raw + i, n));
    store(xa + i, (load(xa + i, n) - gain * load(raw + s.active_width + i, n)) * log_scale.neg().exp(), n);
    sum = sum + (n >= W ? log_scale : Vec<T>::set(Vec<T>(T(0)), log_scale, n));
  }
  return lanes_sum(sum);
}

template <typename T>
void gather_row(const T* from, const int32_t* index, T* to, int64_t dim) {
  for (int64_t j = 0; j < dim; ++j) to[j] = from[index[j]];
}

template <typename T>
void unscale_row(const Call<T>& call, const Stage& s, T* v) {
  constexpr int64_t W = Vec<T>::size();
  const T *scale = call.scales + s.prepared, *offset = call.theta + s.offset;
  for (int64_t i = 0; i < call.plan->dim; i += W) {
    const int64_t n = call.plan->dim - i;
    store(v + i, (load(v + i, n) - load(offset + i, n)) / load(scale + i, n), n);
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
void stage_out(const Call<T>& call, const Stage& s, const T* x, const T* raw, T* y, T* u, T* logdet, int64_t rows,
               T* scratch) {
  const int64_t dim = call.plan->dim;
  for (int64_t r = 0; r < rows; ++r) {
    T* row = s.permutation == flow::kNoPermutation ? y + r * dim : u + r * dim;
    const T sum = couple_row(call, s, x + r * dim, raw + r * 2 * s.active_width, row);
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
                   T* u, T* post, T* logdet, int64_t rows, T* scratch) {
  T* raw = kept.at(call.plan->dim, 2 * s.active_width);
  if (s.coupling) {
    run_nets(call, s, Inputs<T>{x + s.passive, cond}, rows, raw, kept, call.plan->dim + 2 * s.active_width, post, scratch);
  }
  stage_out(call, s, x, raw, y, u, logdet, rows, scratch);
}

template <typename T>
void stage_inverse(const Call<T>& call, const Stage& s, const T* y, const T* cond, T* x, const Activations<T>& kept,
                   T* post, T* logdet, int64_t rows, T* scratch) {
  const int64_t dim = call.plan->dim;
  stage_in(call, s, y, x, rows, scratch);
  if (!s.coupling) return;
  T* raw = kept.at(dim, 2 * s.active_width);
  run_nets(call, s, Inputs<T>{x + s.passive, cond}, rows, raw, kept, dim + 2 * s.active_width, post, scratch);
  for (int64_t r = 0; r < rows; ++r) {
    const T sum = uncouple_row(s, raw + r * 2 * s.active_width, x + r * dim);
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

// --- backward of a stage -----------------------------------------------------------------------------------------------

// sums[c] (+)= sum over rows of the matrix's column c.
template <typename T>
void column_sums(const T* matrix, int64_t ld, int64_t rows, int64_t width, T* sums, bool first) {
  constexpr int64_t W = Vec<T>::size();
  for (int64_t i = 0; i < width; i += W) {
    const int64_t n = width - i;
    Vec<T> sum = first ? Vec<T>(T(0)) : load(sums + i, n);
    for (int64_t r0 = 0; r0 < rows; r0 += kChain) {
      Vec<T> part(T(0));
      for (int64_t r = r0; r < std::min(rows, r0 + kChain); ++r) part = part + load(matrix + r * ld + i, n);
      sum = sum + part;
    }
    store(sums + i, sum, n);
  }
}

// The gradient of a hidden layer's argument from that of its value, in place.
template <typename T>
void hidden_gradient(int activation, const T* kept, T* grad, int64_t count) {
  constexpr int64_t W = Vec<T>::size();
  const Vec<T> zero(T(0));
  for (int64_t i = 0; i < count; i += W) {
    const int64_t n = count - i;
    const Vec<T> value = load(kept + i, n), g = load(grad + i, n);
    store(grad + i, activation == flow::kRelu ? Vec<T>::blendv(g, zero, value <= zero) : g * activation_slope(activation, value),
          n);
  }
}

// dA (+)= G W^T.
template <typename T>
void input_gradient(int64_t rows, int64_t k, int64_t n, const T* g, int64_t ldg, const T* w, T* da, int64_t lda,
                    bool accumulate, T* panel) {
  gemm<T>({rows, k, n, g, ldg, 1, w, n, Layout::kTransposed, da, lda, accumulate ? Start::kAccumulate : Start::kZero,
           nullptr, false},
          panel);
}

// d_raw [rows, 2 active_width] is given; hidden gradients out; adds to the gradient of the passive half (columns of `grad`)
// and of cond.
template <typename T>
void nets_input_gradient(const Call<T>& call, const Stage& s, const Activations<T>& kept, const T* d_raw,
                         const Activations<T>& d_hidden, T* grad, T* grad_cond, int64_t rows, T* panel) {
  const Plan& plan = *call.plan;
  for (const Net& net : s.nets) {
    const T* g = d_raw + net.column;
    int64_t ldg = 2 * s.active_width;
    for (int64_t k = int64_t(net.layers.size()) - 1; k > 0; --k) {
      const Layer &layer = net.layers[k], &before = net.layers[k - 1];
      T* down = d_hidden.at(before.hidden, before.out);
      input_gradient(rows, layer.in, layer.out, g, ldg, call.theta + layer.weight, down, layer.in, false, panel);
      hidden_gradient(net.activation, kept.at(plan.dim + 2 * s.active_width + before.hidden, before.out), down,
                      rows * before.out);
      g = down;
      ldg = before.out;
    }
    const Layer& layer = net.layers[0];
    const T* weight = call.theta + layer.weight;
    input_gradient(rows, s.passive_width, layer.out, g, ldg, weight, grad + s.passive, plan.dim, true, panel);
    if (s.conditional && grad_cond) {
      input_gradient(rows, plan.cond_dim, layer.out, g, ldg, weight + s.passive_width * layer.out, grad_cond, plan.cond_dim,
                     true, panel);
    }
  }
}

// Through scale and offset for one row. Forward, y = u scale + offset: `through` = g, g *= scale. Inverse,
// u = (y - offset) / scale: g /= scale, `through` = -g. Then d_offset sums `through` and d_scale sums through * u.
template <typename T>
void affine_gradient(const Call<T>& call, const Stage& s, T* u, T* g, T* through) {
  constexpr int64_t W = Vec<T>::size();
  const T* scale = call.scales + s.prepared;
  for (int64_t i = 0; i < call.plan->dim; i += W) {
    const int64_t n = call.plan->dim - i;
    const Vec<T> gi = load(g + i, n), scale_i = load(scale + i, n);
    const Vec<T> out = call.inverse ? gi / scale_i : gi * scale_i;
    const Vec<T> t = call.inverse ? out.neg() : gi;
    store(through + i, t, n);
    store(u + i, t * load(u + i, n), n);
    store(g + i, out, n);
  }
}

// What the gradient of one row wants of its coupling, each function computed once: e = exp(log_scale), `slope`
// = d log_scale / d raw, and, when v is not nullptr, the coupling's y side v = [x_passive, x_active e + t].
template <typename T>
void coupling_factors(const Call<T>& call, const Stage& s, const T* x, const T* raw, T* e, T* slope, T* v) {
  constexpr int64_t W = Vec<T>::size();
  if (v != nullptr) std::memcpy(v, x, call.plan->dim * sizeof(T));
  const Vec<T> clamp(static_cast<T>(s.clamp)), gain(static_cast<T>(s.gain));
  for (int64_t i = 0; i < s.active_width; i += W) {
    const int64_t n = s.active_width - i;
    const Vec<T> r = gain * load(raw + i, n), squashed = squash(s, r), factor = (clamp * squashed).exp();
    store(e + i, factor, n);
    store(slope + i, clamp * gain * squash_slope(s, r, squashed), n);
    if (v != nullptr) {
      store(v + s.active + i, load(x + s.active + i, n) * factor + gain * load(raw + s.active_width + i, n), n);
    }
  }
}

// The coupling's gradient for one row, active half: g in place, d_raw out.
// Forward:  v = x e + t:          dx = g e,  dt = g,     ds = g x e + d_logdet.
// Inverse:  x = (v - t) / e:      dv = g/e,  dt = -g/e,  ds = -g x - d_logdet.
template <typename T>
void coupling_gradient(const Call<T>& call, const Stage& s, const T* x, const T* e, const T* slope, T d_logdet, T* g,
                       T* d_raw) {
  constexpr int64_t W = Vec<T>::size();
  const Vec<T> gain(static_cast<T>(s.gain)), dl(d_logdet);
  for (int64_t i = 0; i < s.active_width; i += W) {
    const int64_t n = s.active_width - i;
    const Vec<T> gi = load(g + s.active + i, n), xi = load(x + s.active + i, n), ei = load(e + i, n);
    const Vec<T> dx = call.inverse ? gi / ei : gi * ei;
    const Vec<T> dt = call.inverse ? dx.neg() : gi;
    const Vec<T> ds = call.inverse ? (gi * xi + dl).neg() : dx * xi + dl;
    store(g + s.active + i, dx, n);
    store(d_raw + i, ds * load(slope + i, n), n);
    store(d_raw + s.active_width + i, dt * gain, n);
  }
}

// What a stage's backward leaves for the sums over rows.
template <typename T>
struct Sums {
  T *d_raw, *d_hidden;       // [rows, 2 active_width]; [rows, width] per hidden layer
  T *through, *through_u;    // [rows, dim]: see affine_gradient
};

// The part of a stage's backward that belongs to single rows. g [rows, dim]: the gradient of the stage's output on entry, of
// its input on return (in the way the flow ran); it may come back in `spare`, with the two pointers swapped.
template <typename T>
void stage_rows_gradient(const Call<T>& call, const Stage& s, const T* x, const Activations<T>& kept, const T* d_logdet,
                         T*& g, T*& spare, T* grad_cond, const Sums<T>& out, const Activations<T>& d_hidden, int64_t rows,
                         T* panel) {
  const int64_t dim = call.plan->dim;
  const T* raw = kept.at(dim, 2 * s.active_width);
  const int32_t* index = call.indices + s.index;
  auto permute = [&] {
    if (s.permutation == flow::kNoPermutation) return;
    if (s.permutation == flow::kSoft) {
      soft_permute(call, s, call.inverse ? 1 : 0, Layout::kTransposed, g, spare, rows, 0, dim, panel);
    } else {
      for (int64_t r = 0; r < rows; ++r) gather_row(g + r * dim, call.inverse ? index : index + dim, spare + r * dim, dim);
    }
    std::swap(g, spare);
  };
  auto affine_row = [&](int64_t r) { affine_gradient(call, s, out.through_u + r * dim, g + r * dim, out.through + r * dim); };
  if (!call.inverse) permute();
  if (s.coupling) {
    alignas(64) T e[flow::kMaxDim], slope[flow::kMaxDim];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * 2 * s.active_width;
      coupling_factors(call, s, x + r * dim, raw + at, e, slope, s.affine ? out.through_u + r * dim : nullptr);
      if (s.affine && !call.inverse) affine_row(r);
      coupling_gradient(call, s, x + r * dim, e, slope, d_logdet[r], g + r * dim, out.d_raw + at);
    }
    nets_input_gradient(call, s, kept, out.d_raw, d_hidden, g, grad_cond, rows, panel);
  } else if (s.affine) {
    std::memcpy(out.through_u, x, rows * dim * sizeof(T));
  }
  if (s.affine && (call.inverse || !s.coupling)) {
    for (int64_t r = 0; r < rows; ++r) affine_row(r);
  }
  if (call.inverse) permute();
}

// dW (+)= A^T G, this thread's share of it: of the rows of dW or of its columns, whichever there are more of.
template <typename T>
void weight_gradient(int64_t rows, int64_t k, int64_t n, const T* a, int64_t lda, const T* g, int64_t ldg, T* dw,
                     bool first, int rank, int threads, T* panel) {
  const bool by_row = k > n;
  const Share share = by_row ? Share(k, kTileM, rank, threads) : Share(n, 2 * Simd<T>::W, rank, threads);
  const int64_t count = share.end - share.begin;
  if (by_row) {
    a += share.begin;
    dw += share.begin * n;
  } else {
    g += share.begin;
    dw += share.begin;
  }
  gemm<T>({by_row ? count : k, by_row ? n : count, rows, a, 1, lda, g, ldg, Layout::kRows, dw, n,
           first ? Start::kZero : Start::kAccumulate, nullptr, false},
          panel);
}

// The part of a stage's backward that sums over rows: this thread's share of the gradients of theta. x, kept, sums: of all
// rows. `post` is shared: one hidden layer's activated values, made here for GELU and SiLU by whoever needs them.
template <typename T>
void stage_sums(const Call<T>& call, const Stage& s, const T* x, const T* cond, const Activations<T>& kept,
                const Sums<T>& sums, const Activations<T>& d_hidden, T* grad_theta, bool first, int64_t rows, int rank,
                int threads, T* post, T* panel) {
  const Plan& plan = *call.plan;
  auto columns = [&](const T* matrix, int64_t ld, int64_t width, T* out) {
    const Share share(width, Simd<T>::W, rank, threads);
    column_sums(matrix + share.begin, ld, rows, share.end - share.begin, out + share.begin, first);
  };
  if (s.affine) {
    columns(sums.through_u, plan.dim, plan.dim, grad_theta + s.scale);
    columns(sums.through, plan.dim, plan.dim, grad_theta + s.offset);
  }
  for (const Net& net : s.nets) {
    for (size_t k = 0; k < net.layers.size(); ++k) {
      const Layer& layer = net.layers[k];
      const bool last = k + 1 == net.layers.size();
      const T* g = last ? sums.d_raw + net.column : d_hidden.at(layer.hidden, layer.out);
      const int64_t ldg = last ? 2 * s.active_width : layer.out;
      T* dw = grad_theta + layer.weight;
      columns(g, ldg, layer.out, grad_theta + layer.bias);
      if (k == 0) {
        weight_gradient(rows, s.passive_width, layer.out, x + s.passive, plan.dim, g, ldg, dw, first, rank, threads, panel);
        if (s.conditional) {
          weight_gradient(rows, plan.cond_dim, layer.out, cond, plan.cond_dim, g, ldg, dw + s.passive_width * layer.out,
                          first, rank, threads, panel);
        }
        continue;
      }
      const Layer& before = net.layers[k - 1];
      const T* value = kept.at(plan.dim + 2 * s.active_width + before.hidden, before.out);
      if (net.activation != flow::kRelu) {
        activate_all(net.activation, value, post, rows * before.out);
        value = post;
      }
      weight_gradient(rows, layer.in, layer.out, value, layer.in, g, ldg, dw, first, rank, threads, panel);
    }
  }
}

// --- teams -------------------------------------------------------------------------------------------------------------

void pause_cpu() {
#ifdef __x86_64__
  _mm_pause();
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

template <typename T>
void flow_forward(const Call<T>& call, const flow::ForwardRows<T>& io, int64_t begin, int64_t end) {
  const Plan& plan = *call.plan;
  const int64_t dim = plan.dim, stages = plan.stages.size(), tile = flow::even_tile(end - begin, flow::kTileRows);
  const flow::ForwardMemory<T> memory(plan, tile, io.saved != nullptr, io.workspace);
  for (int64_t row = begin; row < end; row += tile) {
    const int64_t rows = std::min(tile, end - row);
    const T* cond = call.cond ? call.cond + row * plan.cond_dim : nullptr;
    T* logdet = io.logdet + row;
    for (int64_t r = 0; r < rows; ++r) logdet[r] = call.inverse ? -call.logdet_offset : call.logdet_offset;
    const T* from = io.x + row * dim;
    for (int64_t i = 0; i < stages; ++i) {
      const Stage& s = plan.stages[call.inverse ? stages - 1 - i : i];
      Activations<T> kept{memory.kept, tile, 0};
      if (io.saved) kept = {io.saved + s.first_column * call.batch, call.batch, row};
      T* to = i + 1 == stages ? io.y + row * dim : memory.state[i % 2];
      if (call.inverse) {
        // The x side is what backward wants; it is made in place of the saved state.
        T* x = io.saved ? kept.at(0, dim) : to;
        stage_inverse(call, s, from, cond, x, kept, memory.post, logdet, rows, memory.panel);
        if (x != to && i + 1 == stages) std::memcpy(to, x, rows * dim * sizeof(T));
        from = x;
      } else {
        if (io.saved) {
          if (i + 1 < stages) {
            const Stage& next = plan.stages[i + 1];
            to = Activations<T>{io.saved + next.first_column * call.batch, call.batch, row}.at(0, dim);
          }
          if (i == 0) {
            T* x = kept.at(0, dim);
            std::memcpy(x, from, rows * dim * sizeof(T));
            from = x;
          }
        }
        stage_forward(call, s, from, cond, to, kept, memory.u, memory.post, logdet, rows, memory.panel);
        from = to;
      }
    }
    if (stages == 0) std::memcpy(io.y + row * dim, from, rows * dim * sizeof(T));
  }
}

template <typename T>
void flow_team(const Call<T>& call, const flow::Team<T>& io, int rank, int threads) {
  const Plan& plan = *call.plan;
  const int64_t dim = plan.dim, stages = plan.stages.size(), rows = call.batch;
  // With very few rows every thread does the elementwise part of all of them, and one meeting per stage is saved.
  const bool alone = rows < flow::kPrivateRows;
  const Share mine = alone ? Share(rows, 1, 0, 1) : Share(rows, 1, rank, threads);
  const flow::TeamMemory<T> memory(plan, rows, io.shared, rank, alone);
  const int64_t r0 = mine.begin, count = mine.end - mine.begin;
  T* logdet = memory.logdet;
  for (int64_t r = 0; r < rows; ++r) logdet[r] = call.inverse ? -call.logdet_offset : call.logdet_offset;
  const T* from = io.x;
  int turn = 0;  // layers write to two buffers in turn: one meeting between a write and the next write to it is enough
  for (int64_t i = 0; i < stages; ++i) {
    const Stage& s = plan.stages[call.inverse ? stages - 1 - i : i];
    T *to = memory.state[i % 2], *raw = memory.raw[i % 2];
    if (call.inverse) {
      stage_in(call, s, from + r0 * dim, to + r0 * dim, count, memory.panel);
      if (!alone && s.coupling) meet(*io.barrier, threads);
    }
    const T* x = call.inverse ? to : from;
    for (const Net& net : s.nets) {
      const T* input = nullptr;
      for (size_t k = 0; k < net.layers.size(); ++k) {
        const Layer& layer = net.layers[k];
        const bool last = k + 1 == net.layers.size(), relu = net.activation == flow::kRelu;
        const Share share(layer.out, 2 * Simd<T>::W, rank, threads);
        const int64_t n = share.end - share.begin, ld = last ? 2 * s.active_width : layer.out;
        T* out = last ? raw + net.column : memory.hidden[turn ^= 1];
        if (k == 0) {
          first_layer(call, s, layer, Inputs<T>{x + s.passive, call.cond}, rows, share.begin, share.end, out, ld,
                      relu && !last, memory.panel);
        } else {
          auto p = rows_times(rows, n, layer.in, input, layer.in, call.theta + layer.weight + share.begin, layer.out,
                              out + share.begin, ld);
          p.start = Start::kBias;
          p.bias = call.theta + layer.bias + share.begin;
          p.relu = relu && !last;
          gemm(p, memory.panel);
        }
        if (!last && !relu && n > 0) {
          for (int64_t r = 0; r < rows; ++r) {
            T* row = out + r * ld + share.begin;
            activate_all(net.activation, row, row, n);
          }
        }
        meet(*io.barrier, threads);
        input = out;
      }
    }
    const int64_t at = r0 * dim;
    if (!call.inverse) {
      stage_out(call, s, from + at, raw + r0 * 2 * s.active_width, to + at, memory.u + at, logdet + r0, count, memory.panel);
      if (!alone) meet(*io.barrier, threads);
    } else if (s.coupling) {
      for (int64_t r = r0; r < r0 + count; ++r) logdet[r] -= uncouple_row(s, raw + r * 2 * s.active_width, to + r * dim);
    }
    from = to;
  }
  if (alone && rank != 0) return;
  std::memcpy(io.y + r0 * dim, from + r0 * dim, count * dim * sizeof(T));
  std::memcpy(io.logdet + r0, logdet + r0, count * sizeof(T));
}

template <typename T>
void flow_backward(const Call<T>& call, const flow::Backward<T>& io, int rank, int threads) {
  const Plan& plan = *call.plan;
  const int64_t dim = plan.dim, stages = plan.stages.size();
  const flow::BackwardMemory<T> memory(plan, io.tile, io.saved != nullptr, io.shared, rank);
  for (int64_t row = 0; row < call.batch; row += io.tile) {
    const int64_t rows = std::min(io.tile, call.batch - row);
    const Share mine(rows, 1, rank, threads);
    const int64_t r0 = mine.begin, count = mine.end - mine.begin, at = r0 * dim;
    const T* cond = call.cond ? call.cond + row * plan.cond_dim : nullptr;
    T* grad_cond = io.grad_cond ? io.grad_cond + (row + r0) * plan.cond_dim : nullptr;
    if (grad_cond) std::memset(grad_cond, 0, count * plan.cond_dim * sizeof(T));
    T *g = memory.grad[0] + at, *spare = memory.grad[1] + at;
    std::memcpy(g, io.grad_y + row * dim + at, count * dim * sizeof(T));
    int turn = 0;  // of three state buffers
    if (!io.saved) std::memcpy(memory.state[0] + at, io.y + row * dim + at, count * dim * sizeof(T));
    for (int64_t i = 0; i < stages; ++i) {
      const Stage& s = plan.stages[call.inverse ? i : stages - 1 - i];
      // What other threads read in the sums alternates between two sets, so that one meeting per stage is enough.
      const Sums<T> sums{memory.d_raw[i % 2], memory.d_hidden[i % 2], memory.through[i % 2], memory.through_u[i % 2]};
      Activations<T> all{memory.kept[i % 2], io.tile, 0};
      const T* x;
      if (io.saved) {
        all = {const_cast<T*>(io.saved) + s.first_column * call.batch, call.batch, row};
        x = all.at(0, dim);
      } else {
        const Activations<T> kept{memory.kept[i % 2], io.tile, r0};
        T *here = memory.state[turn], *there = memory.state[(turn + 1) % 3];
        const T* my_cond = cond ? cond + r0 * plan.cond_dim : nullptr;
        if (call.inverse) {  // at the x side: run forward to find the next
          stage_forward<T>(call, s, here + at, my_cond, there + at, kept, memory.u, memory.my_post, nullptr, count,
                           memory.panel);
          x = here;
        } else {
          stage_inverse<T>(call, s, here + at, my_cond, there + at, kept, memory.my_post, nullptr, count, memory.panel);
          x = there;
        }
        turn = (turn + 1) % 3;
      }
      const Sums<T> my_sums{sums.d_raw + r0 * 2 * s.active_width, sums.d_hidden, sums.through + at, sums.through_u + at};
      const Activations<T> my_kept{all.base, all.rows, all.row + r0};
      stage_rows_gradient(call, s, x + at, my_kept, io.grad_logdet + row + r0, g, spare, grad_cond, my_sums,
                          Activations<T>{sums.d_hidden, io.tile, r0}, count, memory.panel);
      meet(*io.barrier, threads);
      stage_sums(call, s, x, cond, all, sums, Activations<T>{sums.d_hidden, io.tile, 0}, io.grad_theta, row == 0, rows, rank,
                 threads, memory.post, memory.panel);
    }
    std::memcpy(io.grad_x + row * dim + at, g, count * dim * sizeof(T));
    meet(*io.barrier, threads);  // the next tile starts over with the first of the two sets
  }
}

// scale, log(scale) and d scale / d raw of an affine's raw parameter (spec.py, Stage).
template <typename T>
void flow_prepare(int kind, const T* raw, T* scale, T* log_scale, T* slope, int64_t n) {
  constexpr int64_t W = Vec<T>::size();
  const Vec<T> one(T(1)), half(T(0.5)), tenth(T(0.1)), ten(T(10)), two(T(2));
  for (int64_t i = 0; i < n; i += W) {
    const int64_t left = n - i;
    const Vec<T> r = load(raw + i, left);
    Vec<T> value, log_value, derivative;
    if (kind == flow::kExp) {
      value = derivative = r.exp();
      log_value = r;
    } else if (kind == flow::kSoftplus) {
      const Vec<T> u = half * r;
      value = tenth * Vec<T>::blendv(two * u.exp().log1p(), r, u > Vec<T>(T(20)));  // torch's threshold
      derivative = tenth / (one + u.neg().exp());
      log_value = value.log();
    } else {
      const Vec<T> sigmoid = one / (one + (two - r).exp());
      value = ten * sigmoid;
      derivative = value * (one - sigmoid);
      log_value = value.log();
    }
    store(scale + i, value, left);
    store(log_scale + i, log_value, left);
    store(slope + i, derivative, left);
  }
}

#define LMVAE_INSTANTIATE(T)                                                                  \
  template void flow_prepare<T>(int, const T*, T*, T*, T*, int64_t);                           \
  template void flow_forward<T>(const Call<T>&, const flow::ForwardRows<T>&, int64_t, int64_t); \
  template void flow_team<T>(const Call<T>&, const flow::Team<T>&, int, int);                  \
  template void flow_backward<T>(const Call<T>&, const flow::Backward<T>&, int, int);
LMVAE_INSTANTIATE(float)
LMVAE_INSTANTIATE(double)

}  // namespace lmvae::LMVAE_ISA
