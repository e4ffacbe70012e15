// aggregate_logpdf on CPU: groups, allocation and threads. Arithmetic is in aggregate_logpdf_simd.cpp, the contract in
// kernels/aggregate_logpdf/op.py. Rows of z are independent forward; backward, fixed chunks of a group's rows sum their
// part of its posteriors' gradients, and the parts are added in order: results do not depend on the number of threads.
#include "aggregate_logpdf.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace lmvae {
namespace {

constexpr double kLog2Pi = 1.8378770664093454836;
constexpr int64_t kWorthAThread = 16384;  // densities of one dimension: some 10 us
constexpr int64_t kChunk = 128;  // rows of a backward task, unless there would be more than kMostChunks of a group
constexpr int64_t kMostChunks = 16;

using Groups = std::vector<AggGroup>;
using Optional = std::optional<at::Tensor>;

at::ScalarType arithmetic(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

const int32_t* offsets(const char* name, const at::Tensor& cu, int64_t end, const char* what) {
  TORCH_CHECK(cu.scalar_type() == at::kInt && cu.dim() == 1 && cu.is_contiguous() && cu.numel() > 0,
              "aggregate_logpdf: ", name, " must be int32 [groups + 1]");
  const int32_t* v = cu.const_data_ptr<int32_t>();
  const int64_t last = cu.numel() - 1;
  TORCH_CHECK_VALUE(v[0] == 0 && v[last] == end, name, " must run from 0 to the ", end, " ", what, ", got ", v[0],
                    " to ", v[last]);
  for (int64_t g = 0; g < last; g++)
    TORCH_CHECK_VALUE(v[g + 1] >= v[g], name, " must not decrease, but group ", g, " has ", v[g + 1] - v[g], " ", what);
  return v;
}

struct Problem {
  AggArgs a{};
  Groups groups;
  int64_t samples, longest = 0, lines = 0;
  std::vector<at::Tensor> kept;  // what the pointers in `a` point into
};

Problem problem_of(const at::Tensor& z, const at::Tensor& mu, const at::Tensor& logvar, const Optional& cu_z,
                   const Optional& cu_posteriors, bool per_dim, double min_var) {
  TORCH_CHECK(z.dim() == 3 && mu.dim() == 2 && logvar.sizes() == mu.sizes() && z.size(2) == mu.size(1) &&
                  z.scalar_type() == mu.scalar_type() && logvar.scalar_type() == mu.scalar_type(),
              "aggregate_logpdf: z must be [S, K, D], mu and logvar [N, D], of one dtype, got ", z.sizes(), ", ",
              mu.sizes(), ", ", logvar.sizes());
  TORCH_CHECK(cu_z.has_value() == cu_posteriors.has_value(), "aggregate_logpdf: offsets come in pairs");
  Problem p;
  AggArgs& a = p.a;
  a.z = z.const_data_ptr(), a.mu = mu.const_data_ptr(), a.logvar = logvar.const_data_ptr();
  a.z_sample = z.stride(0), a.z_row = z.stride(1), a.z_col = z.stride(2);
  a.mu_row = mu.stride(0), a.mu_col = mu.stride(1), a.logvar_row = logvar.stride(0), a.logvar_col = logvar.stride(1);
  p.samples = z.size(0), a.rows = z.size(1), a.dim = z.size(2), a.per_dim = per_dim, a.min_var = min_var;
  const int64_t line = kAggLine / (arithmetic(mu) == at::kDouble ? 8 : 4);
  a.padded = (a.dim + line - 1) / line * line;

  const int64_t posteriors = mu.size(0), count = cu_z.has_value() ? cu_z->numel() - 1 : 1;
  const int32_t *rows_of = nullptr, *members_of = nullptr;
  if (cu_z.has_value()) {
    TORCH_CHECK_VALUE(cu_posteriors->numel() == cu_z->numel(), "cu_z is [", cu_z->numel(), "] and cu_posteriors [",
                      cu_posteriors->numel(), "]: they must be one size");
    rows_of = offsets("cu_z", *cu_z, a.rows, "rows of z");
    members_of = offsets("cu_posteriors", *cu_posteriors, posteriors, "posteriors");
  }
  for (int64_t i = 0; i < count; i++) {
    AggGroup g{0, a.rows, 0, posteriors, p.lines, 0.0};
    if (rows_of)
      g = {rows_of[i], rows_of[i + 1] - rows_of[i], members_of[i], members_of[i + 1] - members_of[i], p.lines, 0.0};
    TORCH_CHECK_VALUE(g.count > 0 || g.z_count * p.samples == 0, "group ", i, " has ", g.z_count,
                      " rows of z and no posterior: their mean is not defined");
    g.log_norm = std::log(static_cast<double>(g.count)) + 0.5 * kLog2Pi * static_cast<double>(per_dim ? 1 : a.dim);
    p.longest = std::max(p.longest, g.count), p.lines += (g.count + line - 1) / line;
    p.groups.push_back(g);
  }
  a.groups = p.groups.data();
  a.lanes = (p.longest + line - 1) / line * line;
  return p;
}

// Shares `units` among threads in contiguous pieces: work(begin, end, scratch), `elements` of scratch for each.
template <typename F>
void share(int64_t units, int64_t densities, int64_t elements, at::ScalarType type, const F& work) {
  if (units == 0) return;
  const int64_t threads =
      std::max<int64_t>(1, std::min({static_cast<int64_t>(at::get_num_threads()), units, densities / kWorthAThread}));
  const int64_t room = (elements + 15) / 16 * 16;
  const at::Tensor scratch = at::empty({threads * room}, type);
  char* base = static_cast<char*>(scratch.mutable_data_ptr());
  const int64_t bytes = room * static_cast<int64_t>(scratch.element_size());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) work(units * t / threads, units * (t + 1) / threads, base + t * bytes);
  });
}

void* keep(Problem& p, at::IntArrayRef shape, at::ScalarType type) {
  p.kept.push_back(at::empty(shape, type));
  return p.kept.back().mutable_data_ptr();
}

template <typename scalar_t>
void prepare(Problem& p, at::ScalarType type, bool backward) {
  AggArgs& a = p.a;
  const int64_t posteriors = p.groups.empty() ? 0 : p.groups.back().begin + p.groups.back().count;
  const int64_t line = kAggLine / (type == at::kDouble ? 8 : 4);
  if (a.per_dim || backward) {
    a.mean = keep(p, {posteriors, a.padded}, type), a.scale = keep(p, {posteriors, a.padded}, type);
    if (a.per_dim) a.constant = keep(p, {posteriors, a.padded}, type);
    if (backward) a.ratio = keep(p, {posteriors, a.padded}, type);
  }
  if (!a.per_dim) {
    a.lane_mean = keep(p, {p.lines, a.dim, line}, type), a.lane_scale = keep(p, {p.lines, a.dim, line}, type);
    a.lane_constant = keep(p, {p.lines, line}, type);
  }
  const auto run = LMVAE_PICK(aggregate_prepare<scalar_t>);
  // an exponential, a root and a quotient in double each: about four densities
  share(posteriors, 4 * posteriors * a.dim, 0, type, [&](int64_t begin, int64_t end, void*) {
    for (size_t i = 0; i < p.groups.size(); i++) {
      const AggGroup& g = p.groups[i];
      const int64_t from = std::max(begin, g.begin), to = std::min(end, g.begin + g.count);
      if (from < to) run(a, static_cast<int64_t>(i), from - g.begin, to - g.begin);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> aggregate_logpdf_fwd(const at::Tensor& z, const at::Tensor& mu,
                                                        const at::Tensor& logvar, const Optional& cu_z,
                                                        const Optional& cu_posteriors, bool per_dim, double min_var) {
  Problem p = problem_of(z, mu, logvar, cu_z, cu_posteriors, per_dim, min_var);
  AggArgs& a = p.a;
  const at::ScalarType type = arithmetic(mu);
  std::vector<int64_t> shape{p.samples, a.rows};
  if (per_dim) shape.push_back(a.dim);
  at::Tensor logq = at::empty(shape, mu.options().dtype(type)), lse = at::empty(shape, mu.options().dtype(type));
  if (logq.numel() == 0) return {logq, lse};
  a.logq = logq.mutable_data_ptr(), a.lse = lse.mutable_data_ptr();
  int64_t pairs = 0;  // (row, posterior): the unit of work, so that unequal groups are shared evenly
  for (const AggGroup& g : p.groups) pairs += p.samples * g.z_count * g.count;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, mu.scalar_type(), "aggregate_logpdf_fwd", [&] {
    prepare<scalar_t>(p, type, false);
    const auto rows = LMVAE_PICK(aggregate_fwd_rows<scalar_t>);
    const int64_t elements = LMVAE_PICK(aggregate_scratch<scalar_t>)(a, p.longest, false);
    share(pairs, pairs * a.dim, elements, type, [&](int64_t begin, int64_t end, void* scratch) {
      int64_t first = 0;
      for (size_t i = 0; i < p.groups.size(); i++) {
        const AggGroup& g = p.groups[i];
        const int64_t count = p.samples * g.z_count;
        if (count == 0) continue;
        const auto row = [&](int64_t pair) {
          return std::clamp<int64_t>((pair - first + g.count - 1) / g.count, 0, count);
        };
        if (begin < first + count * g.count && end > first)
          rows(a, static_cast<int64_t>(i), row(begin), row(end), scratch);
        first += count * g.count;
      }
    });
  });
  return {logq, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> aggregate_logpdf_bwd(const at::Tensor& grad, const at::Tensor& lse,
                                                                    const at::Tensor& z, const at::Tensor& mu,
                                                                    const at::Tensor& logvar, const Optional& cu_z,
                                                                    const Optional& cu_posteriors, bool per_dim,
                                                                    double min_var, bool need_z, bool need_posteriors) {
  Problem p = problem_of(z, mu, logvar, cu_z, cu_posteriors, per_dim, min_var);
  AggArgs& a = p.a;
  const at::ScalarType type = arithmetic(mu);
  TORCH_CHECK(grad.sizes() == lse.sizes() && grad.scalar_type() == type && lse.scalar_type() == type &&
                  lse.is_contiguous() && lse.dim() == (per_dim ? 3 : 2) && lse.size(0) == p.samples &&
                  lse.size(1) == a.rows,
              "aggregate_logpdf: grad is ", grad.sizes(), " and lse ", lse.sizes(), " for z ", z.sizes());
  const auto shape = [&](const at::Tensor& x, bool needed) {
    return needed ? x.sizes().vec() : std::vector<int64_t>{0};
  };
  at::Tensor dz = at::empty(shape(z, need_z), z.options());
  at::Tensor dmu = at::empty(shape(mu, need_posteriors), mu.options()),
             dlogvar = at::empty(shape(mu, need_posteriors), mu.options());
  if (dz.numel() == 0 && dmu.numel() == 0) return {dz, dmu, dlogvar};
  a.lse = const_cast<void*>(lse.const_data_ptr()), a.grad = grad.const_data_ptr();
  a.grad_sample = grad.stride(0), a.grad_row = grad.stride(1), a.grad_col = per_dim ? grad.stride(2) : 0;
  if (need_z) a.dz = dz.mutable_data_ptr();
  a.dmu = dmu.mutable_data_ptr(), a.dlogvar = dlogvar.mutable_data_ptr();

  std::vector<AggTask> tasks;
  std::vector<int64_t> slot_of, chunks_of;
  int64_t slots = 0, densities = 0;
  for (size_t i = 0; i < p.groups.size(); i++) {
    const AggGroup& g = p.groups[i];
    const int64_t count = p.samples * g.z_count;
    const int64_t chunks = count == 0 ? 0 : std::clamp<int64_t>(count / kChunk, 1, kMostChunks);
    slot_of.push_back(slots), chunks_of.push_back(chunks);
    for (int64_t c = 0; c < chunks; c++, slots += g.count)
      tasks.push_back({static_cast<int64_t>(i), count * c / chunks, count * (c + 1) / chunks, slots});
    densities += count * g.count * a.dim;
  }
  if (need_posteriors) a.partial = keep(p, {slots, 2, a.padded}, type);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, mu.scalar_type(), "aggregate_logpdf_bwd", [&] {
    prepare<scalar_t>(p, type, true);
    const auto rows = LMVAE_PICK(aggregate_bwd_rows<scalar_t>);
    const int64_t elements = LMVAE_PICK(aggregate_scratch<scalar_t>)(a, p.longest, true);
    share(static_cast<int64_t>(tasks.size()), densities, elements, type,
          [&](int64_t begin, int64_t end, void* scratch) {
            for (int64_t t = begin; t < end; t++) rows(a, tasks[static_cast<size_t>(t)], scratch);
          });
    if (!need_posteriors) return;
    const auto posterior = LMVAE_PICK(aggregate_bwd_posterior<scalar_t>);
    share(mu.size(0), mu.numel() * kMostChunks / 8, 0, type, [&](int64_t begin, int64_t end, void*) {
      for (size_t i = 0; i < p.groups.size(); i++) {
        const AggGroup& g = p.groups[i];
        for (int64_t n = std::max(begin, g.begin); n < std::min(end, g.begin + g.count); n++)
          posterior(a, n, slot_of[i] + n - g.begin, g.count, chunks_of[i]);
      }
    });
  });
  return {dz, dmu, dlogvar};
}

}  // namespace

TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m) {
  m.impl("aggregate_logpdf_fwd", &aggregate_logpdf_fwd);
  m.impl("aggregate_logpdf_bwd", &aggregate_logpdf_bwd);
}

}  // namespace lmvae
