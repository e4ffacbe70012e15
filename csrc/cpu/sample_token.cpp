// sample_token on CPU: allocation and threads. Arithmetic is in sample_token_simd.cpp, the contract and its checks in
// kernels/sample_token/op.py.
#include "sample_token.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace lmvae {
namespace {

std::tuple<at::Tensor, at::Tensor> sample_token(const at::Tensor& logits, const at::Tensor& seed,
                                                const at::Tensor& rows, const at::Tensor& steps,
                                                const std::optional<at::Tensor>& seen, bool greedy, double temperature,
                                                int64_t top_k, double top_p, double min_p, double penalty,
                                                bool logprob) {
  TORCH_CHECK(seed.numel() == 2 && seed.scalar_type() == at::kLong && seed.is_contiguous(),
              "sample_token: seed must be int64 [2]");
  const int64_t batch = logits.size(0), vocab = logits.size(1);
  const at::Tensor rows_dense = rows.contiguous(), steps_dense = steps.contiguous();
  at::Tensor ids = at::empty({batch}, logits.options().dtype(at::kLong));
  at::Tensor logprobs = at::empty({logprob ? batch : 0}, logits.options().dtype(at::kFloat));
  SampleTokenArgs a{};
  a.logits = logits.const_data_ptr();
  a.logits_row = logits.stride(0);
  a.logits_col = logits.stride(1);
  a.vocab = vocab;
  const int64_t* s = seed.const_data_ptr<int64_t>();
  a.seed = static_cast<uint64_t>(s[0]);
  a.offset = static_cast<uint64_t>(s[1]);
  a.rows = rows_dense.const_data_ptr<int64_t>();
  a.steps = steps_dense.const_data_ptr<int64_t>();
  if (seen.has_value() && seen->defined()) {
    a.seen = static_cast<const uint8_t*>(seen->const_data_ptr());
    a.seen_row = seen->stride(0);
    a.seen_col = seen->stride(1);
  }
  a.greedy = greedy;
  a.temperature = temperature;
  a.top_k = top_k;
  a.top_p = top_p;
  a.min_p = min_p;
  a.penalty = penalty;
  a.ids = ids.mutable_data_ptr<int64_t>();
  a.logprob = logprob ? logprobs.mutable_data_ptr<float>() : nullptr;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "sample_token", [&] {
    const int64_t bytes = LMVAE_PICK(sample_token_workspace<scalar_t>)(vocab);
    const auto run = LMVAE_PICK(sample_token_rows<scalar_t>);
    const int64_t grain = std::max<int64_t>(1, 16384 / vocab);  // a thread pays from some 10 us of work on
    at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      at::Tensor own = at::empty({bytes}, at::TensorOptions().dtype(at::kByte));
      run(a, begin, end, own.mutable_data_ptr());
    });
  });
  return {ids, logprobs};
}

}  // namespace

TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m) { m.impl("sample_token", &sample_token); }

}  // namespace lmvae
