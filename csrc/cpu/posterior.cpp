// posterior_sample on CPU: allocation, threads, and autograd. Arithmetic is in posterior_simd.cpp, the contract and its
// checks in kernels/posterior/op.py.
#include "posterior.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace lmvae {
namespace {

// Rows a thread must have before a second one pays: about 4k elements, some 4 us of arithmetic.
int64_t grain(const PosteriorArgs& a) {
  const int64_t per_row = a.dim * a.samples;
  return std::max<int64_t>(1, 4096 / std::max<int64_t>(1, per_row));
}

at::ScalarType kl_type(const at::Tensor& mu) { return mu.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

PosteriorArgs common_args(const at::Tensor& mu, const at::Tensor& logvar, const at::Tensor& seed, int64_t samples,
                          int64_t mode, double target) {
  TORCH_CHECK(mu.dim() == 2 && logvar.sizes() == mu.sizes(), "posterior: mu and logvar must both be [B, D], got ",
              mu.sizes(), " and ", logvar.sizes());
  TORCH_CHECK(seed.numel() == 2 && seed.scalar_type() == at::kLong && seed.is_contiguous(),
              "posterior: seed must be int64 [2]");
  const int64_t* s = seed.const_data_ptr<int64_t>();
  PosteriorArgs a{};
  a.mu = mu.const_data_ptr();
  a.logvar = logvar.const_data_ptr();
  a.mu_row = mu.stride(0);
  a.mu_col = mu.stride(1);
  a.logvar_row = logvar.stride(0);
  a.logvar_col = logvar.stride(1);
  a.batch = mu.size(0);
  a.dim = mu.size(1);
  a.samples = samples;
  a.seed = static_cast<uint64_t>(s[0]);
  a.offset = static_cast<uint64_t>(s[1]);
  a.mode = static_cast<KlMode>(mode);
  a.target = target;
  return a;
}

std::tuple<at::Tensor, at::Tensor> posterior_fwd(const at::Tensor& mu, const at::Tensor& logvar, const at::Tensor& seed,
                                                 int64_t samples, int64_t mode, double target) {
  PosteriorArgs a = common_args(mu, logvar, seed, samples, mode, target);
  at::Tensor z =
      samples == 1 ? at::empty({a.batch, a.dim}, mu.options()) : at::empty({samples, a.batch, a.dim}, mu.options());
  at::Tensor kl = at::empty({a.batch}, mu.options().dtype(kl_type(mu)));
  a.z = z.mutable_data_ptr();
  a.kl = kl.mutable_data_ptr();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, mu.scalar_type(), "posterior_fwd", [&] {
    const auto rows = LMVAE_PICK(posterior_fwd_rows<scalar_t>);
    at::parallel_for(0, a.batch, grain(a), [&](int64_t begin, int64_t end) { rows(a, begin, end); });
  });
  return {z, kl};
}

std::tuple<at::Tensor, at::Tensor> posterior_bwd(const std::optional<at::Tensor>& dz,
                                                 const std::optional<at::Tensor>& dkl, const at::Tensor& mu,
                                                 const at::Tensor& logvar, const at::Tensor& kl, const at::Tensor& seed,
                                                 int64_t samples, int64_t mode, double target) {
  PosteriorArgs a = common_args(mu, logvar, seed, samples, mode, target);
  at::Tensor dmu = at::empty({a.batch, a.dim}, mu.options()), dlogvar = at::empty({a.batch, a.dim}, mu.options());
  a.dmu = dmu.mutable_data_ptr();
  a.dlogvar = dlogvar.mutable_data_ptr();
  if (dz.has_value() && dz->defined()) {
    TORCH_CHECK(dz->scalar_type() == mu.scalar_type(), "posterior: dz is ", dz->scalar_type(), ", mu is ",
                mu.scalar_type());
    a.dz = dz->const_data_ptr();
    a.dz_sample = samples == 1 ? 0 : dz->stride(0);
    a.dz_row = dz->stride(-2);
    a.dz_col = dz->stride(-1);
  }
  if (dkl.has_value() && dkl->defined()) {
    TORCH_CHECK(dkl->scalar_type() == kl_type(mu), "posterior: dkl is ", dkl->scalar_type(), " instead of ",
                kl_type(mu));
    a.dkl = dkl->const_data_ptr();
    a.dkl_row = dkl->stride(0);
    a.kl_saved = kl.const_data_ptr();
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, mu.scalar_type(), "posterior_bwd", [&] {
    const auto rows = LMVAE_PICK(posterior_bwd_rows<scalar_t>);
    at::parallel_for(0, a.batch, grain(a), [&](int64_t begin, int64_t end) { rows(a, begin, end); });
  });
  return {dmu, dlogvar};
}

// What backward gives under create_graph: op.py writes it in plain torch, so that it has derivatives itself.
std::tuple<at::Tensor, at::Tensor> posterior_bwd_again(const std::optional<at::Tensor>& dz,
                                                       const std::optional<at::Tensor>& dkl, const at::Tensor& mu,
                                                       const at::Tensor& logvar, const at::Tensor& seed,
                                                       int64_t samples, int64_t mode, double target) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lmvae_fast::posterior_bwd_again", "")
                             .typed<decltype(posterior_bwd_again)>();
  return op.call(dz, dkl, mu, logvar, seed, samples, mode, target);
}

// The same formula as op.py registers for every device, in C++ for CPU tensors: at [512, 128] the call would otherwise
// spend a third of its time in Python. Both primitives are called through the dispatcher, so that tracing sees them.
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct Posterior : torch::autograd::Function<Posterior> {
  static variable_list forward(AutogradContext* ctx, const Variable& mu, const Variable& logvar, const Variable& seed,
                               int64_t samples, int64_t mode, double target) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("lmvae_fast::posterior_fwd", "")
                               .typed<decltype(posterior_fwd)>();
    auto [z, kl] = op.call(mu, logvar, seed, samples, mode, target);
    ctx->save_for_backward({mu, logvar, kl, seed});
    ctx->saved_data["samples"] = samples;
    ctx->saved_data["mode"] = mode;
    ctx->saved_data["target"] = target;
    ctx->set_materialize_grads(false);
    return {z, kl};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("lmvae_fast::posterior_bwd", "")
                               .typed<decltype(posterior_bwd)>();
    const auto saved = ctx->get_saved_variables();
    const auto optional = [](const Variable& g) { return g.defined() ? std::optional<at::Tensor>(g) : std::nullopt; };
    const int64_t samples = ctx->saved_data["samples"].toInt(), mode = ctx->saved_data["mode"].toInt();
    const double target = ctx->saved_data["target"].toDouble();
    const auto dz = optional(grads[0]), dkl = optional(grads[1]);
    auto [dmu, dlogvar] = at::GradMode::is_enabled()
                              ? posterior_bwd_again(dz, dkl, saved[0], saved[1], saved[3], samples, mode, target)
                              : op.call(dz, dkl, saved[0], saved[1], saved[2], saved[3], samples, mode, target);
    return {dmu, dlogvar, Variable(), Variable(), Variable(), Variable()};
  }
};

std::tuple<at::Tensor, at::Tensor> posterior_autograd(const at::Tensor& mu, const at::Tensor& logvar,
                                                      const at::Tensor& seed, int64_t samples, int64_t mode,
                                                      double target) {
  const auto out = Posterior::apply(mu, logvar, seed, samples, mode, target);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m) {
  m.impl("posterior_fwd", &posterior_fwd);
  m.impl("posterior_bwd", &posterior_bwd);
}

TORCH_LIBRARY_IMPL(lmvae_fast, AutogradCPU, m) { m.impl("posterior_fwd", &posterior_autograd); }

}  // namespace lmvae
