// The gradients of a coupling flow: rows are split among the threads for what belongs to a row, columns for what sums
// over rows (weight gradients). Every sum runs in the same order whatever the number of threads.
#include "coupling_flow_stages.h"

namespace lmvae::LMVAE_ISA {
namespace {

// d squash / d raw, given squash(raw).
template <typename T>
MathVec<T> squash_slope(const Stage& s, const MathVec<T>& raw, const MathVec<T>& squashed) {
  const MathVec<T> one(T(1));
  if (s.squash == flow::kNoSquash) return one;
  if (s.squash == flow::kAtan) return MathVec<T>(T(0.636)) / (one + raw * raw);
  const MathVec<T> slope = one - squashed * squashed;
  return s.squash == flow::kTanh ? slope : MathVec<T>(T(0.5)) * slope;
}

template <typename T>
MathVec<T> activation_slope(int kind, const MathVec<T>& x) {
  const MathVec<T> one(T(1)), half(T(0.5));
  if (kind == flow::kGelu) {
    const MathVec<T> cdf = half * (one + (x * MathVec<T>(T(M_SQRT1_2))).erf());
    const MathVec<T> pdf = (x * x * MathVec<T>(T(-0.5))).exp() * MathVec<T>(T(M_2_SQRTPI * M_SQRT1_2 * 0.5));
    return cdf + x * pdf;
  }
  const MathVec<T> sigmoid = one / (one + x.neg().exp());
  return sigmoid * (one + x * (one - sigmoid));
}

// sums[c] (+)= sum over rows of the matrix's column c.
template <typename T>
void column_sums(const T* matrix, int64_t ld, int64_t rows, int64_t width, T* sums, bool first) {
  constexpr int64_t W = MathVec<T>::size();
  for (int64_t i = 0; i < width; i += W) {
    const int64_t n = width - i;
    MathVec<T> sum = first ? MathVec<T>(T(0)) : load_part(sums + i, n);
    for (int64_t r0 = 0; r0 < rows; r0 += kChain) {
      MathVec<T> part(T(0));
      for (int64_t r = r0; r < std::min(rows, r0 + kChain); ++r) part = part + load_part(matrix + r * ld + i, n);
      sum = sum + part;
    }
    store_part(sums + i, sum, n);
  }
}

// The gradient of a hidden layer's argument from that of its value, in place (a ReLU's is part of the product).
template <typename T>
void hidden_gradient(int activation, const T* kept, T* grad, int64_t count) {
  constexpr int64_t W = MathVec<T>::size();
  for (int64_t i = 0; i < count; i += W) {
    const int64_t n = count - i;
    store_part(grad + i, load_part(grad + i, n) * activation_slope(activation, load_part(kept + i, n)), n);
  }
}

// dA (+)= G W^T, through the ReLU whose values are `gate` where there is one.
template <typename T>
void input_gradient(int64_t rows, int64_t k, int64_t n, const T* g, int64_t ldg, const T* w, T* da, int64_t lda,
                    bool accumulate, const T* gate, T* panel) {
  gemm<T>({rows, k, n, g, ldg, 1, w, n, Layout::kTransposed, da, lda, accumulate ? Start::kAccumulate : Start::kZero,
           nullptr, false, gate},
          panel);
}

// d_raw [rows, 2 active_width] is given; hidden gradients out; adds to the gradient of the passive half (columns of
// `grad`) and of cond.
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
      const T* value = kept.at(plan.dim + 2 * s.active_width + before.hidden, before.out);
      const bool relu = net.activation == flow::kRelu;
      input_gradient(rows, layer.in, layer.out, g, ldg, call.theta + layer.weight, down, layer.in, false,
                     relu ? value : nullptr, panel);
      if (!relu) hidden_gradient(net.activation, value, down, rows * before.out);
      g = down;
      ldg = before.out;
    }
    const Layer& layer = net.layers[0];
    const T* weight = call.theta + layer.weight;
    input_gradient(rows, s.passive_width, layer.out, g, ldg, weight, grad + s.passive, plan.dim, true,
                   static_cast<const T*>(nullptr), panel);
    if (s.conditional && grad_cond) {
      input_gradient(rows, plan.cond_dim, layer.out, g, ldg, weight + s.passive_width * layer.out, grad_cond,
                     plan.cond_dim, true, static_cast<const T*>(nullptr), panel);
    }
  }
}

// Through scale and offset for one row. Forward, y = u scale + offset: `through` = g, g *= scale. Inverse,
// u = (y - offset) / scale: g /= scale, `through` = -g. Then d_offset sums `through` and d_scale sums through * u.
template <typename T>
void affine_gradient(const Call<T>& call, const Stage& s, T* u, T* g, T* through) {
  constexpr int64_t W = MathVec<T>::size();
  const T* scale = call.scales + s.prepared;
  for (int64_t i = 0; i < call.plan->dim; i += W) {
    const int64_t n = call.plan->dim - i;
    const MathVec<T> gi = load_part(g + i, n), scale_i = load_part(scale + i, n);
    const MathVec<T> out = call.inverse ? gi / scale_i : gi * scale_i;
    const MathVec<T> t = call.inverse ? out.neg() : gi;
    store_part(through + i, t, n);
    store_part(u + i, t * load_part(u + i, n), n);
    store_part(g + i, out, n);
  }
}

// What the gradient of one row wants of its coupling, each function computed once: e = exp(log_scale), `slope`
// = d log_scale / d raw, and, when v is not nullptr, the coupling's y side v = [x_passive, x_active e + t]. raw: as
// couple_row (`coupled`) or uncouple_row left it.
template <typename T>
void coupling_factors(const Call<T>& call, const Stage& s, const T* x, const T* raw, bool coupled, T* e, T* slope,
                      T* v) {
  constexpr int64_t W = MathVec<T>::size();
  if (v != nullptr) std::memcpy(v, x, call.plan->dim * sizeof(T));
  const MathVec<T> clamp(static_cast<T>(s.clamp)), gain(static_cast<T>(s.gain));
  for (int64_t i = 0; i < s.active_width; i += W) {
    const int64_t n = s.active_width - i;
    const MathVec<T> kept = load_part(raw + i, n), r = gain * kept;
    MathVec<T> squashed = kept, factor;
    if (keeps_factor(s, coupled)) {
      factor = load_part(raw + s.active_width + i, n);
    } else {
      if (!keeps_squashed(s)) squashed = squash(s, r);
      factor = (clamp * squashed).exp();
    }
    store_part(e + i, factor, n);
    store_part(slope + i, clamp * gain * squash_slope(s, r, squashed), n);
    if (v != nullptr) {
      store_part(v + s.active + i,
                 load_part(x + s.active + i, n) * factor + gain * load_part(raw + s.active_width + i, n), n);
    }
  }
}

// The coupling's gradient for one row, active half: g in place, d_raw out.
// Forward:  v = x e + t:          dx = g e,  dt = g,     ds = g x e + d_logdet.
// Inverse:  x = (v - t) / e:      dv = g/e,  dt = -g/e,  ds = -g x - d_logdet.
template <typename T>
void coupling_gradient(const Call<T>& call, const Stage& s, const T* x, const T* e, const T* slope, T d_logdet, T* g,
                       T* d_raw) {
  constexpr int64_t W = MathVec<T>::size();
  const MathVec<T> gain(static_cast<T>(s.gain)), dl(d_logdet);
  for (int64_t i = 0; i < s.active_width; i += W) {
    const int64_t n = s.active_width - i;
    const MathVec<T> gi = load_part(g + s.active + i, n), xi = load_part(x + s.active + i, n), ei = load_part(e + i, n);
    const MathVec<T> dx = call.inverse ? gi / ei : gi * ei;
    const MathVec<T> dt = call.inverse ? dx.neg() : gi;
    const MathVec<T> ds = call.inverse ? (gi * xi + dl).neg() : dx * xi + dl;
    store_part(g + s.active + i, dx, n);
    store_part(d_raw + i, ds * load_part(slope + i, n), n);
    store_part(d_raw + s.active_width + i, dt * gain, n);
  }
}

// What a stage's backward leaves for the sums over rows.
template <typename T>
struct Sums {
  T *d_raw, *d_hidden;     // [rows, 2 active_width]; [rows, width] per hidden layer
  T *through, *through_u;  // [rows, dim]: see affine_gradient
};

// The part of a stage's backward that belongs to single rows. g [rows, dim]: the gradient of the stage's output on
// entry, of its input on return (in the way the flow ran); it may come back in `spare`, with the two pointers swapped.
template <typename T>
void stage_rows_gradient(const Call<T>& call, const Stage& s, const T* x, const Activations<T>& kept, const T* d_logdet,
                         bool coupled, T*& g, T*& spare, T* grad_cond, const Sums<T>& out,
                         const Activations<T>& d_hidden, int64_t rows, T* panel) {
  const int64_t dim = call.plan->dim;
  const T* raw = kept.at(dim, 2 * s.active_width);
  const int32_t* index = call.indices + s.index;
  auto permute = [&] {
    if (s.permutation == flow::kNoPermutation) return;
    if (s.permutation == flow::kSoft) {
      soft_permute(call, s, call.inverse ? 1 : 0, Layout::kTransposed, g, spare, rows, 0, dim, panel);
    } else {
      for (int64_t r = 0; r < rows; ++r)
        gather_row(g + r * dim, call.inverse ? index : index + dim, spare + r * dim, dim);
    }
    std::swap(g, spare);
  };
  auto affine_row = [&](int64_t r) {
    affine_gradient(call, s, out.through_u + r * dim, g + r * dim, out.through + r * dim);
  };
  if (!call.inverse) permute();
  if (s.coupling) {
    alignas(64) T e[flow::kMaxDim], slope[flow::kMaxDim];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * 2 * s.active_width;
      coupling_factors(call, s, x + r * dim, raw + at, coupled, e, slope, s.affine ? out.through_u + r * dim : nullptr);
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

// dW (+)= A^T G, this thread's share of it: of the rows of dW or of its columns, whichever there are more of. db, where
// it is given, (+)= the sums of G's columns.
template <typename T>
void weight_gradient(int64_t rows, int64_t k, int64_t n, const T* a, int64_t lda, const T* g, int64_t ldg, T* dw, T* db,
                     bool first, int rank, int threads, T* panel) {
  const bool by_row = k > n;
  if (db && (by_row || k == 0)) {
    const Share share(n, Lanes<T>::count, rank, threads);
    column_sums(g + share.begin, ldg, rows, share.end - share.begin, db + share.begin, first);
    db = nullptr;
  }
  const Share share = by_row ? Share(k, kTileM, rank, threads) : Share(n, 2 * Lanes<T>::count, rank, threads);
  const int64_t count = share.end - share.begin;
  if (by_row) {
    a += share.begin;
    dw += share.begin * n;
  } else {
    g += share.begin;
    dw += share.begin;
    if (db) db += share.begin;
  }
  gemm<T>({by_row ? count : k, by_row ? n : count, rows, a, 1, lda, g, ldg, Layout::kRows, dw, n,
           first ? Start::kZero : Start::kAccumulate, nullptr, false, nullptr, db},
          panel);
}

// The part of a stage's backward that sums over rows: this thread's share of the gradients of theta. x, kept, sums: of
// all rows. `post` is shared: one hidden layer's activated values, made here for GELU and SiLU by whoever needs them.
template <typename T>
void stage_sums(const Call<T>& call, const Stage& s, const T* x, const T* cond, const Activations<T>& kept,
                const Sums<T>& sums, const Activations<T>& d_hidden, T* grad_theta, bool first, int64_t rows, int rank,
                int threads, T* post, T* panel) {
  const Plan& plan = *call.plan;
  auto columns = [&](const T* matrix, int64_t ld, int64_t width, T* out) {
    const Share share(width, Lanes<T>::count, rank, threads);
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
      T* db = grad_theta + layer.bias;
      if (k == 0) {
        weight_gradient(rows, s.passive_width, layer.out, x + s.passive, plan.dim, g, ldg, dw, db, first, rank, threads,
                        panel);
        if (s.conditional) {
          weight_gradient(rows, plan.cond_dim, layer.out, cond, plan.cond_dim, g, ldg, dw + s.passive_width * layer.out,
                          static_cast<T*>(nullptr), first, rank, threads, panel);
        }
        continue;
      }
      const Layer& before = net.layers[k - 1];
      const T* value = kept.at(plan.dim + 2 * s.active_width + before.hidden, before.out);
      if (net.activation != flow::kRelu) {
        activate_all(net.activation, value, post, rows * before.out);
        value = post;
      }
      weight_gradient(rows, layer.in, layer.out, value, layer.in, g, ldg, dw, db, first, rank, threads, panel);
    }
  }
}

}  // namespace

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
    int turn = 0;                                                // of three state buffers
    const bool coupled = (io.saved != nullptr) != call.inverse;  // the activations are couple_row's
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
                           true, memory.panel);
          x = here;
        } else {
          stage_inverse<T>(call, s, here + at, my_cond, there + at, kept, memory.my_post, nullptr, count, true,
                           memory.panel);
          x = there;
        }
        turn = (turn + 1) % 3;
      }
      const Sums<T> my_sums{sums.d_raw + r0 * 2 * s.active_width, sums.d_hidden, sums.through + at,
                            sums.through_u + at};
      const Activations<T> my_kept{all.base, all.rows, all.row + r0};
      stage_rows_gradient(call, s, x + at, my_kept, io.grad_logdet + row + r0, coupled, g, spare, grad_cond, my_sums,
                          Activations<T>{sums.d_hidden, io.tile, r0}, count, memory.panel);
      meet(*io.barrier, threads);
      stage_sums(call, s, x, cond, all, sums, Activations<T>{sums.d_hidden, io.tile, 0}, io.grad_theta, row == 0, rows,
                 rank, threads, memory.post, memory.panel);
    }
    std::memcpy(io.grad_x + row * dim + at, g, count * dim * sizeof(T));
    meet(*io.barrier, threads);  // the next tile starts over with the first of the two sets
  }
}

template void flow_backward<float>(const Call<float>&, const flow::Backward<float>&, int, int);
template void flow_backward<double>(const Call<double>&, const flow::Backward<double>&, int, int);

}  // namespace lmvae::LMVAE_ISA
