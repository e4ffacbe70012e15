// latent_attention on CPU: allocation, threads, and the checks that read values (kernels/latent_attention/checks.py has
// the others). Arithmetic is in latent_attention_simd.cpp and latent_attention_decode_simd.cpp.
#include "latent_attention.h"

#include <atomic>
#include <cstring>
#include <limits>
#include <tuple>

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "row_ops.h"

namespace lmvae {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kFetchedRows = 64;  // of keys, and of values, asked for ahead: 32 KB of float rows of 64

Strided packed(const at::Tensor& x) {  // [tokens, heads, head_dim]
  return {x.const_data_ptr(), 0, x.stride(1), x.stride(0), x.stride(2)};
}
Strided cached(const at::Tensor& x) {  // [batch, heads, rows, head_dim]
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}
at::ScalarType stats_type(const at::Tensor& q) { return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Runs body(pair, workspace) for every pair, each on one thread. Threads take runs of neighbours, which get shorter
// towards the end so that long sentences do not leave the others waiting: what lies side by side is then mostly written
// by one.
template <typename F>
void for_pairs(int64_t pairs, int64_t workspace_bytes, double flops, F&& body) {
  if (pairs == 0) return;
  constexpr double kWorthAThread = 2e5;  // some 5 us of arithmetic, what waking a thread costs
  const int64_t threads = std::max<int64_t>(
      1, std::min({static_cast<int64_t>(at::get_num_threads()), pairs, static_cast<int64_t>(flops / kWorthAThread)}));
  const int64_t bytes = (workspace_bytes + 127) / 128 * 128;
  const at::Tensor workspace = at::empty({threads * bytes}, at::kByte);
  char* base = static_cast<char*>(workspace.mutable_data_ptr());
  std::atomic<int64_t> next{0}, place{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) {
      char* own = base + place.fetch_add(1) * bytes;
      int64_t from = next.load(), to = 0;
      while (from < pairs) {
        to = from + std::max<int64_t>(1, (pairs - from) / (4 * threads));
        if (!next.compare_exchange_weak(from, to)) continue;
        for (int64_t pair = from; pair < to; pair++) body(pair, pair + 1 < to ? pair + 1 : -1, own);
        from = next.load();
      }
    }
  });
}

// Fills what forward and backward share, once the values of cu_seqlens are found to fit. Returns the longest sentence.
std::tuple<LatentAttentionArgs, int64_t, double> common_args(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& memory_k,
    const OptionalTensor& memory_v, const at::Tensor& cu_seqlens, int64_t visibility, double scale,
    std::optional<int64_t> max_seqlen, std::optional<int64_t> window, std::optional<double> softcap) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && memory_k.has_value() == memory_v.has_value(),
              "latent_attention: q, k and v must be [T, heads, D], memory_k and memory_v both given or both None");
  LatentAttentionArgs a{};
  a.batch = cu_seqlens.numel() - 1;
  a.heads = q.size(1);
  a.kv_heads = k.size(1);
  a.head_dim = q.size(2);
  a.q = packed(q);
  a.k = packed(k);
  a.v = packed(v);
  if (memory_k.has_value()) {
    a.memory_k = cached(*memory_k);
    a.memory_v = cached(*memory_v);
    a.slots = memory_k->size(2);
  }
  a.visibility = static_cast<Visibility>(visibility);
  a.scale = scale;
  a.softcap = softcap.value_or(0);
  a.window = window.value_or(std::numeric_limits<int32_t>::max());

  const int32_t* cu = cu_seqlens.const_data_ptr<int32_t>();
  a.cu_seqlens = cu;
  const int64_t tokens = q.size(0);
  TORCH_CHECK_VALUE(cu[0] == 0 && cu[a.batch] == tokens, "cu_seqlens must run from 0 to the ", tokens,
                    " tokens of q, got ", cu[0], " to ", cu[a.batch]);
  int64_t longest = 0;
  double flops = 0;  // of the two products of a forward pass, roughly
  for (int64_t b = 0; b < a.batch; b++) {
    const int64_t length = cu[b + 1] - cu[b];
    TORCH_CHECK_VALUE(length >= 0, "cu_seqlens must not decrease, but sentence ", b, " has ", length, " tokens");
    longest = std::max(longest, length);
    flops += 4.0 * a.heads * a.head_dim * length * (a.slots + length);
  }
  TORCH_CHECK_VALUE(!max_seqlen.has_value() || longest <= *max_seqlen, "max_seqlen is ", max_seqlen.value_or(0),
                    ", but cu_seqlens holds a sentence of ", longest, " tokens");
  TORCH_CHECK_VALUE(a.visibility == Visibility::Prefix || longest <= a.slots,
                    "visibility needs one memory slot per token: the longest sentence has ", longest,
                    " tokens, memory_k has ", a.slots, " slots");
  return {a, longest, flops};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> bwd(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                                   const at::Tensor& v, const OptionalTensor& memory_k,
                                                   const OptionalTensor& memory_v, const at::Tensor& out,
                                                   const at::Tensor& stats, const at::Tensor& cu_seqlens,
                                                   int64_t visibility, double scale, std::optional<int64_t> max_seqlen,
                                                   std::optional<int64_t> window, std::optional<double> softcap) {
  // Keys and values together: fewer, larger blocks, which the allocator keeps instead of asking the system every time.
  at::Tensor grad_q = at::empty(q.sizes(), q.options());
  at::Tensor grad_kv = at::empty({2, k.size(0), k.size(1), k.size(2)}, q.options());
  at::Tensor grad_memory = at::empty({2, 0}, q.options());  // without memory: nothing, but a tensor
  AttentionGradients grads{grad_q, grad_kv.select(0, 0), grad_kv.select(0, 1), {}, {}};
  if (memory_k.has_value()) {
    grad_memory =
        at::empty({2, memory_k->size(0), memory_k->size(1), memory_k->size(2), memory_k->size(3)}, q.options());
    grads.memory_k = grad_memory.select(0, 0);
    grads.memory_v = grad_memory.select(0, 1);
  }
  latent_attention_backward(grad_out, q, k, v, memory_k, memory_v, out, stats, cu_seqlens, visibility, scale,
                            max_seqlen, window, softcap, grads);
  return {grad_q, grad_kv, grad_memory};
}

// Keys and values that one (row, kv head) will read are asked for while another is computed: their rows are too short
// for the processor to see a stream in them. Both are asked for in turn, so that two pages are on their way at a time.
void fetch_visible(const LatentAttentionDecodeArgs& a, int64_t b, int64_t head, int64_t length, int64_t size) {
  if (a.k.dim != 1 || a.v.dim != 1) return;
  const int64_t from = std::max<int64_t>(0, length - a.window), row = a.head_dim * size;
  const char* k = static_cast<const char*>(a.k.data) + (b * a.k.batch + head * a.k.head + from * a.k.row) * size;
  const char* v = static_cast<const char*>(a.v.data) + (b * a.v.batch + head * a.v.head + from * a.v.row) * size;
  for (int64_t n = 0; n < std::min<int64_t>(length - from, kFetchedRows); n++)
    for (int64_t line = 0; line < row; line += 64) {
      __builtin_prefetch(k + n * a.k.row * size + line);
      __builtin_prefetch(v + n * a.v.row * size + line);
    }
}

// What a step adds to the cache: row b's key and value of every kv head, at position places[b].
struct NewToken {
  const at::Tensor &k, &v, &k_cache, &v_cache;
  const int64_t* places;

  void write(int64_t b, int64_t head) const {
    copy(k, k_cache, b, head);
    copy(v, v_cache, b, head);
  }

 private:
  void copy(const at::Tensor& from, const at::Tensor& to, int64_t b, int64_t head) const {
    const int64_t size = from.element_size(), dim = from.size(2);
    const int64_t step_in = from.stride(2) * size, step_out = to.stride(3) * size;
    const char* x =
        static_cast<const char*>(from.const_data_ptr()) + (b * from.stride(0) + head * from.stride(1)) * size;
    char* y = static_cast<char*>(to.mutable_data_ptr()) +
              (b * to.stride(0) + head * to.stride(1) + places[b] * to.stride(2)) * size;
    if (step_in == size && step_out == size) {
      std::memcpy(y, x, dim * size);
    } else {
      for (int64_t d = 0; d < dim; d++) std::memcpy(y + d * step_out, x + d * step_in, size);
    }
  }
};

at::Tensor decode_over(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                       const at::Tensor& lengths, double scale, std::optional<int64_t> window,
                       std::optional<double> softcap, const NewToken* added) {
  LatentAttentionDecodeArgs a{};
  const int64_t batch = q.size(0), positions = k_cache.size(2);
  a.heads = q.size(1);
  a.kv_heads = k_cache.size(1);
  a.head_dim = q.size(2);
  a.scale = scale;
  a.softcap = softcap.value_or(0);
  a.window = window.value_or(std::numeric_limits<int32_t>::max());
  a.q = {q.const_data_ptr(), q.stride(0), q.stride(1), 0, q.stride(2)};
  a.k = cached(k_cache);
  a.v = cached(v_cache);
  const at::Tensor counts = lengths.to(at::kLong).contiguous();
  const int64_t* count = counts.const_data_ptr<int64_t>();
  double flops = 0;
  for (int64_t b = 0; b < batch; b++) {
    TORCH_CHECK_VALUE(count[b] >= 0 && count[b] <= positions, "lengths must be 0 to the ", positions,
                      " positions of k_cache, got ", count[b], " in row ", b);
    flops += 4.0 * a.heads * a.head_dim * std::min(count[b], a.window);
  }
  at::Tensor out = at::empty({batch, a.heads, a.head_dim}, q.options());
  a.out = out.mutable_data_ptr();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "latent_attention_decode", [&] {
    const int64_t bytes = LMVAE_PICK(latent_attention_decode_workspace<scalar_t>(a));
    const auto pair = LMVAE_PICK(latent_attention_decode<scalar_t>);
    for_pairs(batch * a.kv_heads, bytes, 4 * flops, [&](int64_t p, int64_t next, void* own) {
      const int64_t b = p / a.kv_heads, head = p % a.kv_heads;
      if (added != nullptr) added->write(b, head);
      if (next >= 0) fetch_visible(a, next / a.kv_heads, next % a.kv_heads, count[next / a.kv_heads], sizeof(scalar_t));
      pair(a, b, head, count[b], own);
    });
  });
  return out;
}

at::Tensor decode(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& lengths,
                  double scale, std::optional<int64_t> window, std::optional<double> softcap) {
  return decode_over(q, k_cache, v_cache, lengths, scale, window, softcap, nullptr);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> latent_attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& memory_k,
    const OptionalTensor& memory_v, const at::Tensor& cu_seqlens, int64_t visibility, double scale,
    std::optional<int64_t> max_seqlen, std::optional<int64_t> window, std::optional<double> softcap) {
  const at::Tensor offsets = cu_seqlens.contiguous();
  auto [a, longest, flops] =
      common_args(q, k, v, memory_k, memory_v, offsets, visibility, scale, max_seqlen, window, softcap);
  at::Tensor out = at::empty({q.size(0), a.heads, a.head_dim}, q.options());
  at::Tensor stats = at::empty({q.size(0), a.heads, 2}, q.options().dtype(stats_type(q)));
  a.out = out.mutable_data_ptr();
  a.stats = stats.mutable_data_ptr();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "latent_attention_fwd", [&] {
    const int64_t bytes = LMVAE_PICK(latent_attention_workspace<scalar_t>(a, longest, false));
    const auto pair = LMVAE_PICK(latent_attention_fwd<scalar_t>);
    for_pairs(a.batch * a.kv_heads, bytes, flops,
              [&, &a = a](int64_t p, int64_t after, void* own) { pair(a, p, after, own); });
  });
  return {out, stats};
}

void latent_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const OptionalTensor& memory_k, const OptionalTensor& memory_v,
                               const at::Tensor& out, const at::Tensor& stats, const at::Tensor& cu_seqlens,
                               int64_t visibility, double scale, std::optional<int64_t> max_seqlen,
                               std::optional<int64_t> window, std::optional<double> softcap,
                               const AttentionGradients& grads) {
  const at::Tensor offsets = cu_seqlens.contiguous(), out_dense = out.contiguous(), stats_dense = stats.contiguous();
  auto [a, longest, flops] =
      common_args(q, k, v, memory_k, memory_v, offsets, visibility, scale, max_seqlen, window, softcap);
  TORCH_CHECK(grad_out.sizes() == q.sizes() && grad_out.scalar_type() == q.scalar_type(),
              "latent_attention: the gradient must be like q, got ", grad_out.sizes());
  const auto into = [](const at::Tensor& grad, const at::Tensor& of) {
    TORCH_CHECK(grad.sizes() == of.sizes() && grad.scalar_type() == of.scalar_type() && grad.stride(2) == 1 &&
                    (grad.size(1) == 1 || grad.stride(1) == grad.size(2)),
                "latent_attention: a gradient of ", grad.sizes(), " with strides ", grad.strides(), " for ",
                of.sizes());
    return grad.mutable_data_ptr();
  };
  a.grad_out = packed(grad_out);
  a.out = const_cast<void*>(out_dense.const_data_ptr());
  a.stats = const_cast<void*>(stats_dense.const_data_ptr());
  a.grad_q = into(grads.q, q);
  a.grad_k = into(grads.k, k);
  a.grad_v = into(grads.v, v);
  a.grad_q_token = grads.q.stride(0);
  a.grad_kv_token = grads.k.stride(0);
  TORCH_CHECK(grads.v.stride(0) == a.grad_kv_token, "latent_attention: gradients of keys and values lie alike");
  if (memory_k.has_value()) {
    TORCH_CHECK(grads.memory_k.is_contiguous() && grads.memory_v.is_contiguous() &&
                    grads.memory_k.sizes() == memory_k->sizes() && grads.memory_v.sizes() == memory_k->sizes() &&
                    grads.memory_k.scalar_type() == q.scalar_type() && grads.memory_v.scalar_type() == q.scalar_type(),
                "latent_attention: gradients of memory are dense, and as large as it");
    a.grad_memory_k = grads.memory_k.mutable_data_ptr();
    a.grad_memory_v = grads.memory_v.mutable_data_ptr();
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "latent_attention_bwd", [&] {
    const int64_t bytes = LMVAE_PICK(latent_attention_workspace<scalar_t>(a, longest, true));
    const auto pair = LMVAE_PICK(latent_attention_bwd<scalar_t>);
    for_pairs(a.batch * a.kv_heads, bytes, flops,
              [&, &a = a](int64_t p, int64_t after, void* own) { pair(a, p, after, own); });
  });
}

at::Tensor latent_attention_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& places,
                                 const at::Tensor& lengths, double scale, std::optional<int64_t> window,
                                 std::optional<double> softcap) {
  const at::Tensor at = places.to(at::kLong).contiguous();
  const NewToken added{k, v, k_cache, v_cache, at.const_data_ptr<int64_t>()};
  for (int64_t b = 0; b < q.size(0); b++)
    TORCH_CHECK_VALUE(added.places[b] >= 0 && added.places[b] < k_cache.size(2), "positions must be 0 to ",
                      k_cache.size(2) - 1, ", got ", added.places[b], " in row ", b);
  return decode_over(q, k_cache, v_cache, lengths, scale, window, softcap, &added);
}

TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m) {
  m.impl("latent_attention_fwd", &latent_attention_forward);
  m.impl("latent_attention_bwd", &bwd);
  m.impl("latent_attention_decode", &decode);
  m.impl("latent_attention_step", &latent_attention_step);
}

}  // namespace lmvae
