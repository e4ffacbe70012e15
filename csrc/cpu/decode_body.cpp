// A decoder's layers over packed weights for one token a row, in one call: what models/decoder/decode_body.py builds.
// Every part is the op of its name (row_ops.h); what is saved are the calls between them, which at a few rows take as
// long as a good part of the products.
#include <tuple>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <torch/custom_class.h>

#include "body_parts.h"

namespace lmvae {
namespace {

// packed weight, scales and totals of one in int8, bias, activation (packed_linear.h), outputs
using LinearParts = std::tuple<at::Tensor, OptionalTensor, OptionalTensor, OptionalTensor, int64_t, int64_t>;

struct Linear {
  explicit Linear(LinearParts parts)
      : weight(std::get<0>(parts)),
        scales(std::get<1>(parts)),
        totals(std::get<2>(parts)),
        bias(std::get<3>(parts)),
        activation(std::get<4>(parts)),
        outputs(std::get<5>(parts)) {}

  at::Tensor operator()(const at::Tensor& x, const OptionalTensor& added = std::nullopt) const {
    if (scales.has_value()) return packed_linear_int8(x, weight, *scales, *totals, bias, added, activation, outputs);
    return packed_linear(x, weight, bias, added, activation, outputs);
  }

 private:
  at::Tensor weight;
  OptionalTensor scales, totals, bias;
  int64_t activation, outputs;
};

struct Layer {
  RowNorm before_attention, before_mlp;
  std::optional<RowNorm> query_norm, key_norm, behind_attention, behind_mlp;
  Linear qkv, out, up, down;
  int64_t heads, kv_heads, head_dim;
  double scale;
  std::optional<int64_t> window, rotation, gate;  // gate: of rows [gate, up], where the product does not apply it
  std::optional<double> softcap;
};

// Normed heads [from, from + count) of every row in place.
void norm_heads(const RowNorm& norm, at::Tensor heads, int64_t from, int64_t count) {
  at::Tensor part = heads.narrow(1, from, count);
  part.copy_(norm(part.reshape({-1, part.size(2)})).view(part.sizes()));
}

struct DecodeBody : torch::CustomClassHolder {
  explicit DecodeBody(NormParts last) : last_(std::move(last)) {}

  void add_layer(std::vector<NormParts> norms, std::optional<NormParts> query_norm, std::optional<NormParts> key_norm,
                 std::optional<NormParts> behind_attention, std::optional<NormParts> behind_mlp,
                 std::vector<LinearParts> products, std::vector<int64_t> heads, double scale,
                 std::optional<int64_t> window, std::optional<double> softcap, std::optional<int64_t> rotation,
                 std::optional<int64_t> gate) {
    TORCH_CHECK(norms.size() == 2 && products.size() == 4 && heads.size() == 3,
                "DecodeBody: a layer has 2 norms, 4 products and 3 numbers of heads, got ", norms.size(), ", ",
                products.size(), " and ", heads.size());
    layers_.push_back({RowNorm(norms[0]), RowNorm(norms[1]), norm_of(std::move(query_norm)),
                       norm_of(std::move(key_norm)), norm_of(std::move(behind_attention)),
                       norm_of(std::move(behind_mlp)), Linear(products[0]), Linear(products[1]), Linear(products[2]),
                       Linear(products[3]), heads[0], heads[1], heads[2], scale, window, rotation, gate, softcap});
  }

  // x [rows, hidden]; kv [layers, 2, rows, kv_heads, positions, head_dim], written to; places and lengths int64 [rows];
  // turns: cosines and sines [rows, head_dim] of every rotation, side by side. Returns normed states [rows, hidden].
  at::Tensor step(at::Tensor x, const at::Tensor& kv, const at::Tensor& places, const at::Tensor& lengths,
                  const std::vector<at::Tensor>& turns) const {
    TORCH_CHECK(kv.dim() == 6 && kv.size(0) == static_cast<int64_t>(layers_.size()) && kv.size(2) == x.size(0) &&
                    kv.scalar_type() == x.scalar_type(),
                "DecodeBody: a cache of ", kv.sizes(), " for ", layers_.size(), " layers and ", x.size(0), " rows");
    TORCH_CHECK(places.dim() == 1 && lengths.dim() == 1 && places.size(0) == x.size(0) && lengths.size(0) == x.size(0),
                "DecodeBody: places ", places.sizes(), " and lengths ", lengths.sizes(), " for ", x.size(0), " rows");
    for (const Layer& layer : layers_)
      TORCH_CHECK(kv.size(3) == layer.kv_heads && kv.size(5) == layer.head_dim, "DecodeBody: a cache of ", kv.sizes(),
                  " for ", layer.kv_heads, " heads of ", layer.head_dim);
    const at::NoGradGuard no_grad;
    int64_t index = 0;
    for (const Layer& layer : layers_) {
      const at::Tensor cache = kv.select(0, index++);
      x = mlp(layer, attention(layer, x, cache.select(0, 0), cache.select(0, 1), places, lengths, turns));
    }
    return last_(x);
  }

 private:
  static at::Tensor attention(const Layer& layer, const at::Tensor& x, const at::Tensor& keys, const at::Tensor& values,
                              const at::Tensor& places, const at::Tensor& lengths,
                              const std::vector<at::Tensor>& turns) {
    const int64_t rows = x.size(0), turned = layer.heads + layer.kv_heads;
    at::Tensor qkv = layer.qkv(layer.before_attention(x));
    const at::Tensor heads = qkv.view({rows, turned + layer.kv_heads, layer.head_dim});
    if (layer.query_norm.has_value()) norm_heads(*layer.query_norm, heads, 0, layer.heads);
    if (layer.key_norm.has_value()) norm_heads(*layer.key_norm, heads, layer.heads, layer.kv_heads);
    if (layer.rotation.has_value())
      frozen_rotary(qkv, turns.at(2 * *layer.rotation), turns.at(2 * *layer.rotation + 1), turned, false);
    const at::Tensor seen =
        latent_attention_step(heads.narrow(1, 0, layer.heads), heads.narrow(1, layer.heads, layer.kv_heads),
                              heads.narrow(1, turned, layer.kv_heads), keys, values, places, lengths, layer.scale,
                              layer.window, layer.softcap);
    const at::Tensor flat = seen.view({rows, layer.heads * layer.head_dim});
    return layer.behind_attention.has_value() ? x + (*layer.behind_attention)(layer.out(flat)) : layer.out(flat, x);
  }

  static at::Tensor mlp(const Layer& layer, const at::Tensor& x) {
    at::Tensor inner = layer.up(layer.before_mlp(x));
    if (layer.gate.has_value()) inner = frozen_activation(inner, *layer.gate);
    return layer.behind_mlp.has_value() ? x + (*layer.behind_mlp)(layer.down(inner)) : layer.down(inner, x);
  }

  RowNorm last_;
  std::vector<Layer> layers_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(lmvae_fast, m) {
  m.class_<DecodeBody>("DecodeBody")
      .def(torch::init<NormParts>())
      .def("add_layer", &DecodeBody::add_layer)
      .def("step", &DecodeBody::step);
}

}  // namespace lmvae
