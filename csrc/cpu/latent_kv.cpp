// latent_kv on CPU: allocation, geometry and threads. Arithmetic is in latent_kv_simd.cpp, the contract and its checks
// in kernels/latent_kv/op.py, bytes and FLOPs in docs/kernels/latent_kv.md.
#include "latent_kv.h"

#include "keep_masks.h"
#include "room.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

namespace lmvae {
namespace {

KvType type_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return KvType::F64;
    case at::kFloat: return KvType::F32;
    case at::kHalf: return KvType::F16;
    case at::kBFloat16: return KvType::BF16;
    default: TORCH_CHECK(false, "latent_kv: ", t.scalar_type(), " is not a floating dtype it knows");
  }
}

at::ScalarType accumulation_type(const at::Tensor& weight) {
  return weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Calls f with a value of the accumulation type.
template <typename F>
void with_accumulation(const at::Tensor& weight, F f) {
  if (weight.scalar_type() == at::kDouble)
    f(double{});
  else
    f(float{});
}

KvTensor weight_like(const at::Tensor& t) {  // [L, 2, Hkv, M, D, nz]
  KvTensor k{const_cast<void*>(t.const_data_ptr()), type_of(t), {}};
  const int64_t strides[6] = {t.stride(0), t.stride(1), 0, t.stride(2), t.stride(3), t.stride(4)};
  std::copy(strides, strides + 6, k.stride);
  return k;
}

KvTensor memory_like(const at::Tensor& t) {  // [L, 2, B, Hkv, M, D]
  KvTensor k{const_cast<void*>(t.const_data_ptr()), type_of(t), {}};
  std::copy(t.strides().begin(), t.strides().end(), k.stride);
  return k;
}

at::Tensor with_dense_rows(const at::Tensor& t) { return t.size(-1) > 1 && t.stride(-1) != 1 ? t.contiguous() : t; }

KvRows rows_of(const at::Tensor& weight, int64_t batch) {
  KvRows r{weight.size(0), weight.size(2), weight.size(3), weight.size(4), weight.size(5), batch, 0, 0, 0};
  r.run = r.rows();
  return r;
}

// Shortens the run to what this tensor's strides allow.
void limit_run(KvRows& r, const KvTensor& t) {
  if (r.slots > 1 && t.stride[4] != r.dim * t.stride[5]) r.run = std::min(r.run, r.dim);
  if (r.heads > 1 && t.stride[3] != r.slots * r.dim * t.stride[5]) r.run = std::min(r.run, r.slots * r.dim);
}

// Cuts runs into chunks of nearly equal size, in steps of 16 rows.
void cut(KvRows& r) {
  if (r.run == 0) return;
  const int64_t parts = (r.run + kKvChunk - 1) / kKvChunk;
  r.chunk = std::min(kKvChunk, ((r.run + parts - 1) / parts + 15) / 16 * 16);
  r.chunks_per_run = (r.run + r.chunk - 1) / r.chunk;
}

// `kept` holds the mask for as long as the dropout is used.
KvDropout dropout_of(double p, const std::optional<at::Tensor>& seed, const KvRows& rows, int64_t batch,
                     at::Tensor& kept) {
  if (p == 0.0) return {};
  TORCH_CHECK(seed.has_value() && (seed->numel() == 2 || seed->numel() == 5) && seed->scalar_type() == at::kLong &&
                  seed->is_contiguous(),
              "latent_kv: dropout needs a seed, int64 [2] or [5]");
  const int64_t* s = seed->const_data_ptr<int64_t>();
  const bool shared = seed->numel() == 5;
  KeepMaskKey key{static_cast<uint64_t>(s[0]), static_cast<uint64_t>(s[1]), 0, 1, batch, 2 * rows.layers, batch,
                  rows.rows(),
                  // nearbyint rounds halves to even, as Python's round in kernels/philox.py does
                  static_cast<uint32_t>(std::nearbyint(p * 16777216.0))};
  if (shared) {
    key.first = s[2];
    key.step = s[3];
    key.total = s[4];
  }
  if (key.threshold == 0) return {};
  kept = keep_mask(key);
  return {reinterpret_cast<const uint64_t*>(kept.const_data_ptr<int64_t>()), key.words(), batch, 1.0 / (1.0 - p)};
}

constexpr int64_t kLeastTileBatch = 12;  // sentences; fewer are multiplied as fast on the vector units

template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : raw_(new char[n * sizeof(T) + 64]) {}
  void* get() { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(raw_.get()) + 63) / 64 * 64); }

 private:
  std::unique_ptr<char[]> raw_;
};

// z [B, nz] -> [panels][nz][panel], zero beyond the batch. One vector per panel when the batch fits in it, else two.
at::Tensor pack_panels(const at::Tensor& z, at::ScalarType type, int64_t panel) {
  const int64_t batch = z.size(0), nz = z.size(1), panels = (batch + panel - 1) / panel;
  at::Tensor padded = at::zeros({panels * panel, nz}, z.options().dtype(type));
  padded.narrow(0, 0, batch).copy_(z);
  return padded.view({panels, panel, nz}).transpose(1, 2).contiguous();
}

at::Tensor pad_columns(const at::Tensor& z, at::ScalarType type, int64_t columns) {
  if (z.scalar_type() == type && z.size(1) == columns && z.is_contiguous()) return z;
  at::Tensor padded = at::zeros({z.size(0), columns}, z.options().dtype(type));
  padded.narrow(1, 0, z.size(1)).copy_(z);
  return padded;
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

void forward_into(const at::Tensor& z, const at::Tensor& weight_in, const std::optional<at::Tensor>& bias,
                  double dropout, const std::optional<at::Tensor>& seed, const at::Tensor& memory) {
  const at::Tensor weight = with_dense_rows(weight_in);
  TORCH_CHECK(memory.size(-1) <= 1 || memory.stride(-1) == 1, "latent_kv: out must have a contiguous last dim");
  KvForward a{};
  a.rows = rows_of(weight, z.size(0));
  a.weight = weight_like(weight);
  a.memory = memory_like(memory);
  a.memory.stride[5] = 1;
  limit_run(a.rows, a.weight);
  limit_run(a.rows, a.memory);
  cut(a.rows);
  const at::Tensor dense_bias = bias.has_value() ? bias->contiguous() : at::Tensor();
  a.bias = bias.has_value() ? dense_bias.const_data_ptr() : nullptr;
  if (memory.numel() == 0) return;
  at::Tensor mask;
  a.dropout = dropout_of(dropout, seed, a.rows, z.size(0), mask);
  with_accumulation(weight, [&](auto acc) {
    using T = decltype(acc);
    const int64_t lanes = LMVAE_PICK(kv_vector<T>)();
    const bool tiles = a.weight.type == KvType::BF16 && z.scalar_type() == at::kBFloat16 && a.rows.nz % kKvTile == 0 &&
                       a.rows.nz > 0 && kv_have_tiles();
    a.panel = tiles ? kKvTile : z.size(0) <= lanes ? lanes : 2 * lanes;
    const at::Tensor panels = pack_panels(z, accumulation_type(weight), a.panel);
    a.panels = panels.const_data_ptr();
    const int64_t operand = a.rows.nz / kKvTile * kKvTileBlock;
    const Room<char> operands(tiles ? panels.size(0) * operand : 0);
    if (tiles) {
      for (int64_t i = 0; i < panels.size(0); i++)
        kv_tile_latents(panels[i].const_data_ptr<float>(), a.rows.nz, kKvTile, operands.data() + i * operand);
      a.tiles = operands.data();
    }
    const auto run = LMVAE_PICK(kv_forward_chunks<T>);
    const int64_t scratch = LMVAE_PICK(kv_forward_scratch<T>)(a);
    // About 30 us of arithmetic before a second thread pays.
    const int64_t grain =
        std::max<int64_t>(1, (int64_t{1} << 21) / (a.rows.chunk * (a.rows.nz + 1) * round_up(z.size(0), lanes)));
    at::parallel_for(0, a.rows.chunks(), grain, [&](int64_t begin, int64_t end) {
      Scratch<T> buffer(scratch);
      run(a, buffer.get(), begin, end);
    });
  });
}

at::Tensor latent_kv_fwd(const at::Tensor& z, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         double dropout, const std::optional<at::Tensor>& seed, at::ScalarType dtype) {
  at::Tensor memory = at::empty({weight.size(0), 2, z.size(0), weight.size(2), weight.size(3), weight.size(4)},
                                weight.options().dtype(dtype));
  forward_into(z, weight, bias, dropout, seed, memory);
  return memory;
}

void latent_kv_out(const at::Tensor& z, const at::Tensor& weight, const std::optional<at::Tensor>& bias, double dropout,
                   const std::optional<at::Tensor>& seed, at::Tensor out) {
  forward_into(z, weight, bias, dropout, seed, out);
}

// ---- backward -------------------------------------------------------------------------------------------------------

// The gradients of one or several forwards as one batch, and everything the three backward products share.
struct Pass {
  KvBackward a{};
  std::vector<at::Tensor> kept;
  std::vector<KvGrad> grads;
  at::Tensor z, dz, gram, norm;
  at::Tensor scaled_z;  // with the dropout's scale, which gradients then lack

  Pass(const at::Tensor& weight, at::TensorList gradients, at::TensorList zs, double dropout, at::TensorList seeds) {
    TORCH_CHECK(gradients.size() == zs.size() && (dropout == 0.0 || seeds.size() == zs.size()),
                "latent_kv: as many gradients as latents (and seeds) are needed");
    a.rows = rows_of(weight, 0);
    for (size_t i = 0; i < gradients.size(); i++) {
      kept.push_back(with_dense_rows(gradients[i]));
      at::Tensor mask;
      const KvDropout drop =
          dropout_of(dropout, dropout == 0.0 ? std::optional<at::Tensor>() : seeds[i], a.rows, zs[i].size(0), mask);
      KvGrad grad{memory_like(kept.back()), zs[i].size(0), drop};
      if (mask.defined()) kept.push_back(mask);
      grad.tensor.stride[5] = 1;
      limit_run(a.rows, grad.tensor);
      grads.push_back(grad);
      a.rows.batch += grad.batch;
    }
    a.grads = grads.data();
    a.num_grads = static_cast<int64_t>(grads.size());
    z = zs.size() == 1 ? zs[0] : at::cat(zs);
    a.weight = weight_like(weight);
    limit_run(a.rows, a.weight);
  }

  // Whether all gradients are of numbers that bf16 has, for sentences enough.
  bool gradients_fit_tiles() const {
    if (a.weight.type != KvType::F32 || a.rows.batch < kLeastTileBatch || !kv_have_tiles()) return false;
    return std::all_of(grads.begin(), grads.end(), [&](const KvGrad& grad) {
      return grad.tensor.type == KvType::BF16 && grad.dropout.scale == grads[0].dropout.scale;
    });
  }

  // z with zeros to whole tiles, and with the dropout's scale, which is taken off the gradients.
  at::Tensor scaled_latents() {
    at::Tensor scaled = at::zeros({a.batch_padded, a.nz_padded}, z.options().dtype(at::kFloat));
    scaled.narrow(0, 0, a.rows.batch).narrow(1, 0, a.rows.nz).copy_(z).mul_(grads[0].dropout.scale);
    for (KvGrad& grad : grads) grad.dropout.scale = 1.0;
    return scaled;
  }

  // Runs the chunks in tasks whose number depends on the sizes only, so that sums do not depend on the thread count.
  void run(const at::Tensor& weight, bool want_dz, bool want_gram) {
    cut(a.rows);
    with_accumulation(weight, [&](auto acc) {
      using T = decltype(acc);
      const at::ScalarType type = accumulation_type(weight);
      const int64_t lanes = LMVAE_PICK(kv_vector<T>)();
      const bool tiles = (want_gram || a.sink != KvSink::None) && gradients_fit_tiles();
      a.on_tiles = tiles;
      if (tiles) a.unscaled = grads[0].dropout.scale;
      a.batch_padded = round_up(a.rows.batch, tiles ? kKvTile : lanes);
      a.nz_padded = round_up(a.rows.nz, tiles ? kKvTile : lanes);
      a.gram_padded = want_gram ? a.batch_padded : 0;
      const at::Tensor z_padded = tiles ? scaled_latents() : pad_columns(z, type, a.nz_padded);
      a.z = z_padded.const_data_ptr();
      const bool latents = tiles && a.sink != KvSink::None;
      const Room<char> operand(latents ? a.batch_padded / kKvTile * (a.nz_padded / kKvTile) * kKvTileBlock : 0);
      if (tiles) scaled_z = z_padded.narrow(0, 0, a.rows.batch).narrow(1, 0, a.rows.nz);
      if (latents) {
        kv_tile_latents(z_padded.const_data_ptr<float>(), a.batch_padded, a.nz_padded, operand.data());
        a.tiles = operand.data();
      }
      const int64_t sum_rows = tiles ? a.batch_padded : a.rows.batch;
      const int64_t partial = std::max<int64_t>(want_dz ? a.rows.batch * a.nz_padded : 1, a.rows.batch * a.gram_padded);
      const int64_t few_enough = std::clamp<int64_t>((int64_t{1} << 21) / std::max<int64_t>(1, partial), 8, 128);
      const int64_t tasks = std::clamp<int64_t>(a.rows.chunks() / 4, 1, few_enough);
      const auto options = z.options().dtype(type);
      if (want_dz) dz = at::zeros({tasks, sum_rows, a.nz_padded}, options);
      if (want_gram) gram = at::zeros({tasks, sum_rows, a.gram_padded}, options);
      if (a.sink == KvSink::Norm) norm = at::zeros({tasks}, options.dtype(at::kDouble));
      const auto chunks_of = LMVAE_PICK(kv_backward_chunks<T>);
      const int64_t scratch = LMVAE_PICK(kv_backward_scratch<T>)(a), chunks = a.rows.chunks();
      at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        Scratch<T> buffer(scratch);
        for (int64_t task = begin; task < end; task++) {
          KvBackward mine = a;
          if (want_dz) mine.dz = dz.mutable_data_ptr<T>() + task * dz.stride(0);
          if (want_gram) mine.gram = gram.mutable_data_ptr<T>() + task * gram.stride(0);
          if (a.sink == KvSink::Norm) mine.norm = norm.mutable_data_ptr<double>() + task;
          chunks_of(mine, buffer.get(), chunks * task / tasks, chunks * (task + 1) / tasks);
        }
      });
    });
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> latent_kv_bwd(const at::Tensor& grad, const at::Tensor& z,
                                                             const at::Tensor& weight_in, double dropout,
                                                             const std::optional<at::Tensor>& seed, bool need_z,
                                                             bool need_weight, bool need_bias) {
  const at::Tensor weight = with_dense_rows(weight_in);
  std::vector<at::Tensor> seeds;
  if (seed.has_value()) seeds.push_back(*seed);
  Pass pass(weight, grad, z, dropout, seeds);
  at::Tensor dz = at::empty({0}, z.options());
  at::Tensor dweight = at::empty({0}, z.options());
  at::Tensor dbias = at::empty({0}, z.options());
  if (need_weight) {
    dweight = at::empty(weight.sizes(), weight.options());
    pass.a.sink = KvSink::Store;
    pass.a.dweight = weight_like(dweight);
  }
  if (need_bias) {
    dbias = at::empty(weight.sizes().slice(0, 5), weight.options());
    pass.a.dbias = dbias.mutable_data_ptr();
  }
  pass.run(weight, need_z, false);
  if (need_z) {
    const at::Tensor sum = pass.dz.sum({0}, false, at::kDouble).narrow(0, 0, z.size(0)).narrow(1, 0, z.size(1));
    dz = at::mul(sum, pass.a.unscaled).to(z.scalar_type()).contiguous();
  }
  return {dz, dweight, dbias};
}

// ||dW||_F^2 as a scalar tensor. ||G^T Z||^2 = sum((G G^T) * (Z Z^T)) while the batch is smaller than nz; beyond that
// the tiles of dW themselves are cheaper.
at::Tensor latent_kv_norm(const at::Tensor& weight, at::TensorList grads, at::TensorList zs, at::TensorList seeds,
                          double dropout) {
  Pass pass(weight, grads, zs, dropout, seeds);
  const bool by_gram = pass.a.rows.batch <= weight.size(5);
  if (!by_gram) pass.a.sink = KvSink::Norm;
  pass.run(weight, false, by_gram);
  const auto type = accumulation_type(weight);
  if (!by_gram) return pass.norm.sum().to(type);
  const at::Tensor zd = (pass.scaled_z.defined() ? pass.scaled_z : pass.z).to(at::kDouble);
  const at::Tensor gram = pass.gram.sum({0}, false, at::kDouble).narrow(0, 0, zd.size(0)).narrow(1, 0, zd.size(0));
  return at::mul(gram, zd.matmul(zd.t())).sum().clamp_min(0.0).to(type);
}

void latent_kv_adamw(at::Tensor weight, at::Tensor exp_avg, at::Tensor exp_avg_sq, at::TensorList grads,
                     at::TensorList zs, at::TensorList seeds, double dropout, const at::Tensor& step,
                     const at::Tensor& lr, const at::Tensor& clip, double beta1, double beta2, double eps,
                     double weight_decay) {
  for (const at::Tensor& t : {weight, exp_avg, exp_avg_sq})
    TORCH_CHECK(t.size(-1) <= 1 || t.stride(-1) == 1,
                "latent_kv_adamw: weight and moments must have a contiguous last dim");
  Pass pass(weight, grads, zs, dropout, seeds);
  KvBackward& a = pass.a;
  a.exp_avg = weight_like(exp_avg);
  a.exp_avg_sq = weight_like(exp_avg_sq);
  limit_run(a.rows, a.exp_avg);
  limit_run(a.rows, a.exp_avg_sq);
  a.sink = KvSink::AdamW;
  const double t = step.item<double>(), rate = lr.item<double>();
  a.adamw = {clip.item<double>(),
             rate,
             beta1,
             beta2,
             eps,
             1.0 - rate * weight_decay,
             rate / (1.0 - std::pow(beta1, t)),
             std::sqrt(1.0 - std::pow(beta2, t))};
  pass.run(weight, false, false);
}

}  // namespace

TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m) {
  m.impl("latent_kv_fwd", &latent_kv_fwd);
  m.impl("latent_kv_out", &latent_kv_out);
  m.impl("latent_kv_bwd", &latent_kv_bwd);
  m.impl("latent_kv_norm", &latent_kv_norm);
  m.impl("latent_kv_adamw", &latent_kv_adamw);
}

}  // namespace lmvae
