// philox_words and philox_normal: the C++ form of kernels/philox.py's words and normal, fp32, one thread. Ops use the
// stream in place (simd_math.h); these exist so that tests can hold it against its definition.
#include "philox.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace lmvae {
namespace {

constexpr int64_t kRoom = 64;  // elements that a fill may write beyond its last block

at::Tensor fill(const at::Tensor& seed, int64_t rows, int64_t cols, bool normal) {
  TORCH_CHECK(seed.numel() == 2 && seed.scalar_type() == at::kLong && seed.is_contiguous(),
              "philox: seed must be int64 [2]");
  const int64_t blocks = (cols + 3) / 4 * rows;
  const at::Tensor out = at::empty({4 * blocks + kRoom}, at::TensorOptions().dtype(normal ? at::kFloat : at::kInt));
  const auto* s = seed.const_data_ptr<int64_t>();
  const auto key = static_cast<uint64_t>(s[0]), offset = static_cast<uint64_t>(s[1]);
  if (normal) {
    LMVAE_PICK(philox_rows_normal)(out.mutable_data_ptr<float>(), key, offset, blocks);
  } else {
    LMVAE_PICK(philox_rows_words)(reinterpret_cast<uint32_t*>(out.mutable_data_ptr<int32_t>()), key, offset, blocks);
  }
  return out.narrow(0, 0, 4 * blocks).view({rows, (cols + 3) / 4 * 4}).narrow(1, 0, cols);
}

at::Tensor words(const at::Tensor& seed, int64_t rows, int64_t cols) { return fill(seed, rows, cols, false); }
at::Tensor normal(const at::Tensor& seed, int64_t rows, int64_t cols) { return fill(seed, rows, cols, true); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(lmvae_fast, m) {
  m.def("philox_words(Tensor seed, int rows, int cols) -> Tensor");
  m.def("philox_normal(Tensor seed, int rows, int cols) -> Tensor");
}

TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m) {
  m.impl("philox_words", &words);
  m.impl("philox_normal", &normal);
}

}  // namespace lmvae
