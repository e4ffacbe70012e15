// The coupling flow run one way. Two ways through the stages:
//   flow_forward   a thread takes its rows through the whole flow, a tile of rows at a time: no meetings, activations
//   in
//                  cache;
//   flow_team      few rows: the threads split the columns of every product, so that the machine reads the weights
//   once.
// Every sum runs in the same order in both, and in flow_backward: results do not depend on the batch, the tiles or the
// number of threads.
#include "coupling_flow_stages.h"

namespace lmvae::LMVAE_ISA {

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
        stage_inverse(call, s, from, cond, x, kept, memory.post, logdet, rows, io.saved != nullptr, memory.panel);
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
        stage_forward(call, s, from, cond, to, kept, memory.u, memory.post, logdet, rows, io.saved != nullptr,
                      memory.panel);
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
        const Share share(layer.out, 2 * Lanes<T>::count, rank, threads);
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
      stage_out(call, s, from + at, raw + r0 * 2 * s.active_width, to + at, memory.u + at, logdet + r0, count, false,
                memory.panel);
      if (!alone) meet(*io.barrier, threads);
    } else if (s.coupling) {
      for (int64_t r = r0; r < r0 + count; ++r)
        logdet[r] -= uncouple_row(s, raw + r * 2 * s.active_width, to + r * dim, false);
    }
    from = to;
  }
  if (alone && rank != 0) return;
  std::memcpy(io.y + r0 * dim, from + r0 * dim, count * dim * sizeof(T));
  std::memcpy(io.logdet + r0, logdet + r0, count * sizeof(T));
}

// scale, log(scale) and d scale / d raw of an affine's raw parameter (spec.py, Stage).
template <typename T>
void flow_prepare(int kind, const T* raw, T* scale, T* log_scale, T* slope, int64_t n) {
  constexpr int64_t W = MathVec<T>::size();
  const MathVec<T> one(T(1)), half(T(0.5)), tenth(T(0.1)), ten(T(10)), two(T(2));
  for (int64_t i = 0; i < n; i += W) {
    const int64_t left = n - i;
    const MathVec<T> r = load_part(raw + i, left);
    MathVec<T> value, log_value, derivative;
    if (kind == flow::kExp) {
      value = derivative = r.exp();
      log_value = r;
    } else if (kind == flow::kSoftplus) {
      const MathVec<T> u = half * r;
      value = tenth * MathVec<T>::blendv(two * u.exp().log1p(), r, u > MathVec<T>(T(20)));  // torch's threshold
      derivative = tenth / (one + u.neg().exp());
      log_value = value.log();
    } else {
      const MathVec<T> sigmoid = one / (one + (two - r).exp());
      value = ten * sigmoid;
      derivative = value * (one - sigmoid);
      log_value = value.log();
    }
    store_part(scale + i, value, left);
    store_part(log_scale + i, log_value, left);
    store_part(slope + i, derivative, left);
  }
}

#define LMVAE_INSTANTIATE(T)                                                                    \
  template void flow_prepare<T>(int, const T*, T*, T*, T*, int64_t);                            \
  template void flow_forward<T>(const Call<T>&, const flow::ForwardRows<T>&, int64_t, int64_t); \
  template void flow_team<T>(const Call<T>&, const flow::Team<T>&, int, int);
LMVAE_INSTANTIATE(float)
LMVAE_INSTANTIATE(double)

}  // namespace lmvae::LMVAE_ISA
