"""Low-rank adapters train beside a frozen decoder's prepared weights as they do beside its modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lmvae_fast.models.decoder.attention import PackedAttention
from lmvae_fast.models.decoder.low_rank import LowRank
from lmvae_fast.models.decoder.training_body import trained_through
from lmvae_fast.testing import make_model
from tests.kernels.common import GRAD_FACTOR, VALUE_FACTOR, assert_within_error_rule, require
from tests.models.decoder.test_training_body import NAMES, reason_of, relative


@pytest.fixture(autouse=True)
def _extension():
    require("frozen_layer", "cpp")


def _adapted(family, dtype=torch.float32, **options):
    """A decoder with adapters that do something; these stay in fp32, as training keeps them."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    decoder = make_model(family, train_decoder=True, decoder_part="lora", **options).decoder.eval()
    with torch.no_grad():
        for name, parameter in decoder.model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if ".lora_" not in name:
                parameter.data = parameter.data.to(dtype)
    return decoder


def _with_adapters(decoder, forward, dtype, seed=1):
    """As `_figures`, and the gradients by every adapter."""
    adapters = {name: p for name, p in decoder.body.named_parameters() if p.requires_grad}
    assert adapters and all(".lora_" in name for name in adapters)
    for parameter in adapters.values():
        parameter.grad = None
    draw = torch.Generator().manual_seed(seed)
    shape = (decoder.num_layers, 2, 2, decoder.kv_heads, 3, decoder.head_dim)
    sizes = ((1, 9, decoder.hidden_size), shape, (1, 9, decoder.hidden_size))
    embedded, memory, weights = (torch.randn(size, generator=draw).bfloat16().to(dtype) for size in sizes)
    leaves = embedded.requires_grad_(), memory.requires_grad_()
    attention = PackedAttention(memory, "prefix", torch.tensor([0, 4, 9], dtype=torch.int32), 5)
    positions = torch.tensor([[3, 4, 5, 6, 3, 4, 5, 6, 7]])
    given = {"position_ids": positions, "use_cache": False, "lmvae": attention}
    hidden = forward(inputs_embeds=embedded, **given).last_hidden_state
    grads = torch.autograd.grad(hidden, [*leaves, *adapters.values()], weights)
    return dict(zip((*NAMES, *adapters), (hidden.detach(), *grads), strict=True))


def _of_draws(decoder, forward, dtype):
    """The figures of several draws side by side: the largest error of one adapter's few numbers is a matter of luck, eager's
    as well (over draws ours is 1.1 times it, and 3.8 times at one)."""
    found = [_with_adapters(decoder, forward, dtype, seed) for seed in range(1, 9)]
    return {name: torch.stack([figures[name] for figures in found]) for name in found[0]}


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_adapters_train_beside_prepared_weights(family):
    decoder = _adapted(family)
    plain = decoder.body.forward
    with trained_through(decoder) as body:
        ours = _of_draws(decoder, decoder.body, torch.float32)
        assert body.runs == "prepared layers"
    theirs = _of_draws(decoder, plain, torch.float32)
    decoder.model.double()
    truth = _of_draws(decoder, plain, torch.float64)
    for name in ours:
        factor = VALUE_FACTOR if name == "values" else GRAD_FACTOR
        assert_within_error_rule(name, ours[name], theirs[name], truth[name], factor=factor)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_in_bf16(family):
    decoder = _adapted(family, torch.bfloat16)
    plain = decoder.body.forward
    with trained_through(decoder) as body, torch.autocast("cpu", torch.bfloat16):
        ours = _with_adapters(decoder, decoder.body, torch.bfloat16)
        assert body.runs == "prepared layers"
        theirs = _with_adapters(decoder, plain, torch.bfloat16)
    decoder.model.float()
    truth = _with_adapters(decoder, plain, torch.float32)
    assert all(ours[name].dtype == torch.float32 for name in ours if ".lora_" in name)
    for name in ours:
        assert relative(ours[name], truth[name]) <= 1.5 * relative(theirs[name], truth[name]) + 2**-9, name


def test_a_step_of_the_adapters_prepares_nothing_anew():
    decoder = _adapted("llama")
    with trained_through(decoder) as body:
        before, first = _with_adapters(decoder, decoder.body, torch.float32), body._forward
        with torch.no_grad():
            for name, parameter in decoder.body.named_parameters():
                if ".lora_" in name:
                    parameter.add_(0.1)
        after = _with_adapters(decoder, decoder.body, torch.float32)
        assert body._forward is first and first is not None
        theirs = _with_adapters(decoder, body._plain, torch.float32)
    assert relative(after["values"], before["values"]) > 1e-3
    assert all(relative(after[name], theirs[name]) < 1e-5 for name in NAMES)


def test_unusual_adapters_keep_the_modules():
    decoder = _adapted("llama")
    part = decoder.body.layers[0].mlp.up_proj
    part.lora_dropout["default"] = nn.Dropout(0.1)
    assert reason_of(decoder) == "an adapter that is not plainly added"
    part.lora_dropout["default"] = nn.Identity()
    assert reason_of(decoder) is None
    part.lora_A["default"].weight.requires_grad_(False)
    assert reason_of(decoder) == "an adapter that does not train"
    part.lora_A["default"].weight.requires_grad_(True)
    decoder.train()
    assert reason_of(decoder) is None
    decoder.body.layers[0].self_attn.dropout = nn.Dropout(0.1)
    assert reason_of(decoder) == "it drops values while it trains"
    decoder.eval()
    assert reason_of(decoder) is None
    decoder.body.layers[1].input_layernorm.weight.requires_grad_(True)
    assert "trains" in reason_of(decoder)


def test_what_peft_changes_later_is_noticed():
    """Values equal the modules' after every change that peft looks at in a pass."""
    decoder = _adapted("llama")
    parts = [module for module in decoder.body.modules() if hasattr(module, "lora_A")]

    def each(change):
        return lambda: [change(part) for part in parts]

    def another(part):
        part.lora_B["default"].weight = nn.Parameter(part.lora_B["default"].weight.detach() + 0.1)

    changes = {
        "off": each(lambda part: part.enable_adapters(False)), "on": each(lambda part: part.enable_adapters(True)),
        "scale": each(lambda part: part.scale_layer(0.5)), "another weight": each(another),
        "merged": each(lambda part: part.merge()), "apart": each(lambda part: part.unmerge()),
    }  # fmt: skip
    with trained_through(decoder) as body, torch.no_grad():
        before = _values(decoder, decoder.body)
        for name, change in changes.items():
            change()
            after = _values(decoder, decoder.body)
            assert relative(after, _values(decoder, body._plain)) < 1e-5, name
            assert (body.runs == "prepared layers") == (name not in ("off", "merged")), (name, body.runs)
        assert relative(after, before) > 1e-3


def _values(decoder, forward):
    attention = PackedAttention(None, "prefix", torch.tensor([0, 4, 9], dtype=torch.int32), 5)
    embedded = torch.randn(1, 9, decoder.hidden_size, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    given = {"position_ids": positions, "use_cache": False, "lmvae": attention}
    return forward(inputs_embeds=embedded, **given).last_hidden_state


def test_training_mode_after_evaluation_is_noticed():
    decoder = _adapted("gpt2")
    for block in decoder.body.h:
        block.mlp.dropout.p = 0.3
    with trained_through(decoder) as body:
        _values(decoder, decoder.body)
        assert body.runs == "prepared layers"
        decoder.train()
        assert not torch.equal(_values(decoder, decoder.body), _values(decoder, decoder.body))
        assert body.runs == "modules: it drops values while it trains"


@pytest.mark.parametrize(
    "fault", ["nothing added", "no gradient by lora_A", "no gradient by lora_B", "inputs forgotten"]
)
def test_the_examination_sees_adapters_that_begin_as_no_change(fault, monkeypatch):
    pytest.importorskip("peft")
    decoder = make_model("llama", train_decoder=True, decoder_part="lora").decoder.eval()
    assert not any(w.any() for name, w in decoder.body.named_parameters() if "lora_B" in name)
    gradients = LowRank.gradients

    def wrong(self, grad, x, by_x):
        down, up = gradients(self, grad, x, by_x if fault != "inputs forgotten" else torch.zeros_like(by_x))
        return [down * (fault != "no gradient by lora_A"), up * (fault != "no gradient by lora_B")]

    if fault == "nothing added":
        monkeypatch.setattr(LowRank, "add", lambda self, x, out: None)
    monkeypatch.setattr(LowRank, "gradients", wrong)
    assert "are off by" in reason_of(decoder)
    assert not any(w.any() for name, w in decoder.body.named_parameters() if "lora_B" in name)  # as they were


def test_a_gradient_after_a_step_of_the_adapters_is_refused():
    decoder = _adapted("llama")
    with trained_through(decoder):
        hidden = _values(decoder, decoder.body)
        with torch.no_grad():
            for name, parameter in decoder.body.named_parameters():
                if ".lora_" in name:
                    parameter.add_(0.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            hidden.sum().backward()


def test_layouts_of_adapters_that_are_not_written_out_keep_the_modules():
    peft = pytest.importorskip("peft")

    def with_another(targets, active):
        decoder = _adapted("llama")
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets), decoder.model, adapter_name="b")
        for module in decoder.body.modules():
            if hasattr(module, "lora_A"):
                module.set_adapter(active)
        return decoder

    assert reason_of(with_another(["q_proj"], "b")) == "an adapter that only some of its layers have"
    both = with_another(["q_proj"], "default")
    for name, parameter in both.body.named_parameters():
        if ".b." in name:
            parameter.requires_grad_(True)  # of an adapter that is not in use
    assert reason_of(both) == "a part of its weights trains"
    assert reason_of(with_another(["embed_tokens"], "default")) == "another kind of adapter, or several"
