// coupling_flow on the CPU: the plan, memory and threads. Arithmetic is in coupling_flow_forward_simd.cpp and
// coupling_flow_backward_simd.cpp, the contract and its checks in kernels/coupling_flow.
#include "coupling_flow.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "amx.h"

namespace lmvae {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- the plan --------------------------------------------------------------------------------------------------------

// Reads the integers that FlowSpec.plan wrote (kernels/coupling_flow/spec.py) and lays out theta, constants and
// indices.
class PlanReader {
 public:
  PlanReader(at::IntArrayRef ints, at::ArrayRef<double> floats) : ints_(ints), floats_(floats) {}

  flow::Plan read() {
    plan_.dim = next();
    plan_.cond_dim = next();
    TORCH_CHECK(plan_.dim >= 2 && plan_.dim <= flow::kMaxDim, "coupling_flow: dim must be 2 to 1024, got ", plan_.dim);
    plan_.max_width = std::max(plan_.dim, plan_.cond_dim);
    while (at_ < ints_.size()) {
      const int64_t repeat = next(), period = next();
      const size_t ints_begin = at_, floats_begin = float_at_;
      for (int64_t r = 0; r < repeat; ++r) {
        at_ = ints_begin;
        float_at_ = floats_begin;
        for (int64_t i = 0; i < period; ++i) stage();
      }
    }
    return std::move(plan_);
  }

 private:
  int64_t next() {
    TORCH_CHECK(at_ < ints_.size(), "coupling_flow: the plan ends too early");
    return ints_[at_++];
  }

  void stage() {
    flow::Stage s;
    s.coupling = next() != 0;
    if (s.coupling) coupling(s);
    s.affine = static_cast<int>(next());
    s.permutation = static_cast<int>(next());
    const int64_t dim = plan_.dim;
    if (s.affine) {
      s.scale = plan_.theta;
      s.offset = plan_.theta + dim;
      plan_.theta += 2 * dim;
      s.prepared = plan_.prepared;
      plan_.prepared += dim;
    }
    if (s.permutation == flow::kHard) {
      s.index = plan_.indices;
      plan_.indices += 2 * dim;
    }
    if (s.permutation == flow::kSoft) {
      s.matrix = plan_.constants;
      plan_.constants += 2 * dim * dim + 1;
    }
    s.columns = dim + 2 * s.active_width + s.hidden;
    s.first_column = plan_.columns;
    plan_.columns += s.columns;
    plan_.max_columns = std::max(plan_.max_columns, s.columns);
    plan_.max_hidden = std::max(plan_.max_hidden, s.hidden);
    plan_.max_raw = std::max(plan_.max_raw, 2 * s.active_width);
    plan_.stages.push_back(std::move(s));
  }

  void coupling(flow::Stage& s) {
    const int64_t split = next(), active = next(), rest = plan_.dim - split;
    s.active = active == 0 ? 0 : split;
    s.active_width = active == 0 ? split : rest;
    s.passive = active == 0 ? split : 0;
    s.passive_width = active == 0 ? rest : split;
    s.squash = static_cast<int>(next());
    s.conditional = next() != 0;
    const int64_t nets = next();
    TORCH_CHECK(float_at_ + 2 <= floats_.size(), "coupling_flow: the plan has too few numbers");
    s.clamp = floats_[float_at_++];
    s.gain = floats_[float_at_++];
    for (int64_t n = 0; n < nets; ++n) {
      flow::Net net;
      net.activation = static_cast<int>(next());
      plan_.smooth = plan_.smooth || net.activation != flow::kRelu;
      net.column = n * s.active_width;
      const int64_t hidden_layers = next();
      int64_t in = s.passive_width + (s.conditional ? plan_.cond_dim : 0);
      for (int64_t k = 0; k <= hidden_layers; ++k) {
        const bool last = k == hidden_layers;
        const int64_t out = last ? s.active_width * (nets == 1 ? 2 : 1) : next();
        net.layers.push_back({in, out, plan_.theta, plan_.theta + in * out, s.hidden});
        plan_.theta += in * out + out;
        plan_.max_width = std::max({plan_.max_width, in, out});
        if (!last) s.hidden += out;
        in = out;
      }
      s.nets.push_back(std::move(net));
    }
  }

  at::IntArrayRef ints_;
  at::ArrayRef<double> floats_;
  size_t at_ = 0, float_at_ = 0;
  flow::Plan plan_;
};

void check_sizes(const flow::Plan& plan, const Tensor& x, const OptionalTensor& cond, const Tensor& theta,
                 const Tensor& constants, const Tensor& indices) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == plan.dim, "coupling_flow: x must be [batch, ", plan.dim, "], got ",
              x.sizes());
  TORCH_CHECK(theta.numel() == plan.theta && constants.numel() == plan.constants && indices.numel() == plan.indices,
              "coupling_flow: the plan wants theta, constants and indices of ", plan.theta, ", ", plan.constants,
              " and ", plan.indices, " elements, got ", theta.numel(), ", ", constants.numel(), " and ",
              indices.numel());
  TORCH_CHECK(indices.scalar_type() == at::kInt, "coupling_flow: indices must be int32");
  TORCH_CHECK(constants.scalar_type() == theta.scalar_type() && x.scalar_type() == theta.scalar_type(),
              "coupling_flow: x, theta and constants must have one dtype");
  if (plan.cond_dim > 0) {
    TORCH_CHECK(cond.has_value() && cond->dim() == 2 && cond->size(0) == x.size(0) && cond->size(1) == plan.cond_dim &&
                    cond->scalar_type() == x.scalar_type(),
                "coupling_flow: cond must be [", x.size(0), ", ", plan.cond_dim, "] in the dtype of x");
  }
  const int32_t* index = indices.const_data_ptr<int32_t>();
  uint32_t largest = 0;
  for (int64_t i = 0; i < plan.indices; ++i) largest = std::max(largest, static_cast<uint32_t>(index[i]));
  TORCH_CHECK(largest < plan.dim, "coupling_flow: a permutation holds an index outside [0, ", plan.dim, ")");
}

// --- numbers of a call -----------------------------------------------------------------------------------------------

// Half types are computed in fp32 throughout and rounded once at the end.
at::ScalarType compute_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor computed(const Tensor& x) { return x.to(compute_type(x)).contiguous(); }

template <typename T>
struct Numbers {
  Tensor theta, constants, indices, cond, prepared;
  flow::Call<T> call;
  const T* slopes;

  Numbers(const flow::Plan& plan, const OptionalTensor& c, const Tensor& theta_, const Tensor& constants_,
          const Tensor& indices_, int64_t batch, bool inverse)
      : theta(computed(theta_)), constants(computed(constants_)), indices(indices_.contiguous()) {
    if (plan.cond_dim > 0) cond = computed(*c);
    prepared = at::empty({3 * plan.prepared}, theta.options());
    T *scales = prepared.mutable_data_ptr<T>(), *logs = scales + plan.prepared, *s = logs + plan.prepared;
    slopes = s;
    const T* t = theta.const_data_ptr<T>();
    double offset = 0;
    const auto prepare = LMVAE_PICK(flow_prepare<T>);
    for (const flow::Stage& stage : plan.stages) {
      if (stage.affine)
        prepare(stage.affine, t + stage.scale, scales + stage.prepared, logs + stage.prepared, s + stage.prepared,
                plan.dim);
      if (stage.permutation == flow::kSoft)
        offset += constants.const_data_ptr<T>()[stage.matrix + 2 * plan.dim * plan.dim];
    }
    for (int64_t i = 0; i < plan.prepared; ++i) offset += logs[i];
    call = {&plan,
            t,
            constants.const_data_ptr<T>(),
            plan.cond_dim > 0 ? cond.const_data_ptr<T>() : nullptr,
            indices.const_data_ptr<int32_t>(),
            scales,
            static_cast<T>(offset),
            batch,
            inverse};
  }
};

// --- threads ---------------------------------------------------------------------------------------------------------

// How many threads a pass of `work` multiplications per stage is worth, and may have.
int team_size(double work) {
#if AT_PARALLEL_OPENMP
  if (at::in_parallel_region()) return 1;
  constexpr double kPerThread = 1 << 14;  // some 2 us of arithmetic between meetings
  return static_cast<int>(std::clamp(work / kPerThread, 1.0, static_cast<double>(at::get_num_threads())));
#else
  return 1;  // members wait for each other, which needs threads that run at the same time
#endif
}

// Runs member(rank, threads) on up to `wanted` threads at once. at::parallel_for may hand several shares to one thread
// (a smaller OpenMP team than asked for): the members count themselves before they start, so that nobody waits for a
// ghost.
template <typename F>
void run_team(int wanted, flow::Barrier& barrier, const F& member) {
  if (wanted == 1) return member(0, 1);
  std::atomic<int> shares{0}, members{0};
  at::parallel_for(0, wanted, 1, [&](int64_t begin, int64_t end) {
    const int rank = members.fetch_add(1);
    shares.fetch_add(static_cast<int>(end - begin));
    shares.notify_all();
    for (int seen = shares.load(), spin = 0; seen < wanted; seen = shares.load()) {
      if (++spin > 20000) shares.wait(seen);  // some 20 us; then the core is better used by whoever is late
    }
    const int threads = members.load();
    member(rank, threads);
  });
}

// --- forward ---------------------------------------------------------------------------------------------------------

enum Keep { kNothing = 0, kSave = 1, kRecompute = 2 };

// Below so many rows of a call threads share every product; from there on they share the rows, read all weights each,
// and need no meetings. Measured on two cores: 32 rows on Intel with AMX (2 MB of second-level cache a core), 96 on
// Zen 4.
int64_t team_rows(int threads) { return have_amx() ? 16 * threads : 96; }

template <typename T>
void forward(const flow::Plan& plan, Numbers<T>& numbers, const Tensor& x, Tensor& y, Tensor& logdet, Tensor& saved) {
  const int64_t batch = x.size(0);
  const T* in = x.const_data_ptr<T>();
  T *out = y.mutable_data_ptr<T>(), *ld = logdet.mutable_data_ptr<T>();
  T* keep = saved.numel() > 0 ? saved.mutable_data_ptr<T>() : nullptr;
  const double work = double(plan.theta) * batch / std::max<size_t>(1, plan.stages.size());
  const int threads = team_size(work);
  if (keep == nullptr && threads > 1 && batch < team_rows(threads)) {
    const bool alone = batch < flow::kPrivateRows;
    const flow::TeamMemory<T> size(plan, batch, nullptr, 0, alone);
    Tensor memory = at::empty({size.shared + threads * size.own}, x.options());
    flow::Barrier barrier;
    const flow::Team<T> io{in, out, ld, memory.mutable_data_ptr<T>(), &barrier};
    const auto run = LMVAE_PICK(flow_team<T>);
    return run_team(threads, barrier, [&](int rank, int members) { run(numbers.call, io, rank, members); });
  }
  const auto run = LMVAE_PICK(flow_forward<T>);
  const int64_t grain = std::max<int64_t>(1, (batch + threads - 1) / threads);
  at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    const int64_t tile = flow::even_tile(end - begin, flow::kTileRows);
    const flow::ForwardMemory<T> size(plan, tile, keep != nullptr, nullptr);
    Tensor memory = at::empty({size.size}, x.options());
    run(numbers.call, {in, out, ld, keep, memory.mutable_data_ptr<T>()}, begin, end);
  });
}

std::tuple<Tensor, Tensor, Tensor> coupling_flow_fwd(const Tensor& x, const OptionalTensor& cond, const Tensor& theta,
                                                     const Tensor& constants, const Tensor& indices,
                                                     at::IntArrayRef ints, at::ArrayRef<double> floats, bool inverse,
                                                     int64_t keep) {
  const flow::Plan plan = PlanReader(ints, floats).read();
  check_sizes(plan, x, cond, theta, constants, indices);
  const int64_t batch = x.size(0);
  const Tensor in = computed(x);
  Tensor y = at::empty({batch, plan.dim}, in.options()), logdet = at::empty({batch}, in.options());
  Tensor saved = at::empty({keep == kSave ? batch * plan.columns : 0}, in.options());
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "coupling_flow_fwd", [&] {
    Numbers<scalar_t> numbers(plan, cond, theta, constants, indices, batch, inverse);
    if (batch > 0) forward<scalar_t>(plan, numbers, in, y, logdet, saved);
  });
  if (x.scalar_type() == in.scalar_type()) return {y, logdet, saved};
  // Rebuilding from an output rounded to half precision would lose the states: keep the unrounded one.
  return {y.to(x.scalar_type()), logdet, keep == kRecompute ? y.view({-1}) : saved};
}

// --- backward --------------------------------------------------------------------------------------------------------

template <typename T>
void backward(const flow::Plan& plan, Numbers<T>& numbers, const Tensor& dy, const Tensor& dlogdet, const T* y,
              const T* saved, Tensor& dx, Tensor& dcond, Tensor& dtheta) {
  const int64_t batch = dy.size(0);
  const double work = 2.0 * plan.theta * batch / std::max<size_t>(1, plan.stages.size());
  const int threads = team_size(work);
  const int64_t tile = std::min(batch, flow::kTileRows * threads);
  const flow::BackwardMemory<T> size(plan, tile, saved != nullptr, nullptr, 0);
  Tensor memory = at::empty({size.shared + threads * size.own}, dy.options());
  flow::Barrier barrier;
  T* grad_theta = dtheta.mutable_data_ptr<T>();
  const T* gl = dlogdet.const_data_ptr<T>();
  const flow::Backward<T> io{dy.const_data_ptr<T>(),
                             gl,
                             y,
                             saved,
                             dx.mutable_data_ptr<T>(),
                             dcond.defined() ? dcond.mutable_data_ptr<T>() : nullptr,
                             grad_theta,
                             memory.mutable_data_ptr<T>(),
                             tile,
                             &barrier};
  const auto run = LMVAE_PICK(flow_backward<T>);
  run_team(threads, barrier, [&](int rank, int members) { run(numbers.call, io, rank, members); });
  // From d/dscale to d/draw, with the part of the log-determinant that is the same for every row.
  double sum = 0;
  for (int64_t r = 0; r < batch; ++r) sum += gl[r];
  const T total = static_cast<T>(numbers.call.inverse ? -sum : sum);
  for (const flow::Stage& s : plan.stages) {
    if (!s.affine) continue;
    T* g = grad_theta + s.scale;
    const T *scale = numbers.call.scales + s.prepared, *slope = numbers.slopes + s.prepared;
    for (int64_t c = 0; c < plan.dim; ++c) g[c] = (g[c] + total / scale[c]) * slope[c];
  }
}

std::tuple<Tensor, Tensor, Tensor> coupling_flow_bwd(const OptionalTensor& dy, const OptionalTensor& dlogdet,
                                                     const OptionalTensor& y, const Tensor& saved,
                                                     const OptionalTensor& cond, const Tensor& theta,
                                                     const Tensor& constants, const Tensor& indices,
                                                     at::IntArrayRef ints, at::ArrayRef<double> floats, bool inverse,
                                                     int64_t batch, bool want_cond) {
  const flow::Plan plan = PlanReader(ints, floats).read();
  const auto options = theta.options().dtype(compute_type(theta));
  const auto zeros_if_absent = [&](const OptionalTensor& t, at::IntArrayRef sizes) {
    return t.has_value() && t->defined() ? t->to(options.dtype()).contiguous() : at::zeros(sizes, options);
  };
  const Tensor grad_y = zeros_if_absent(dy, {batch, plan.dim}), grad_logdet = zeros_if_absent(dlogdet, {batch});
  check_sizes(plan, grad_y.to(theta.scalar_type()), cond, theta, constants, indices);
  TORCH_CHECK(grad_logdet.numel() == batch, "coupling_flow: dlogdet must be [", batch, "], got ", grad_logdet.sizes());
  const bool recompute = y.has_value();
  const Tensor start = recompute ? (saved.numel() > 0 ? saved : y->contiguous()) : saved;
  TORCH_CHECK(
      start.scalar_type() == grad_y.scalar_type() && start.numel() == batch * (recompute ? plan.dim : plan.columns),
      "coupling_flow: what forward kept has ", start.numel(), " elements of ", start.scalar_type());
  Tensor dx = at::empty({batch, plan.dim}, options), dtheta = at::empty({plan.theta}, options), dcond;
  if (want_cond) dcond = at::empty({batch, plan.cond_dim}, options);
  if (batch == 0) {
    dtheta.zero_();
  } else {
    AT_DISPATCH_FLOATING_TYPES(grad_y.scalar_type(), "coupling_flow_bwd", [&] {
      Numbers<scalar_t> numbers(plan, cond, theta, constants, indices, batch, inverse);
      // Without stages nothing was kept, and nothing will be read.
      const scalar_t* from = (plan.stages.empty() ? grad_y : start).const_data_ptr<scalar_t>();
      backward<scalar_t>(plan, numbers, grad_y, grad_logdet, recompute ? from : nullptr, recompute ? nullptr : from, dx,
                         dcond, dtheta);
    });
  }
  if (!want_cond) dcond = at::empty({0}, options);
  const auto type = theta.scalar_type();
  return {dx.to(type), dcond.to(type), dtheta.to(type)};
}

}  // namespace

TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m) {
  m.impl("coupling_flow_fwd", &coupling_flow_fwd);
  m.impl("coupling_flow_bwd", &coupling_flow_bwd);
}

}  // namespace lmvae
