"""latent_attention by flash attention: packing and choice, with a stand-in of flash-attn's signature and semantics."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from lmvae_fast.kernels import backend as registry
from lmvae_fast.kernels.latent_attention import flash, latent_attention

from .common import assert_op_within_error_rule, raises_naming
from .test_latent_attention import inputs, plain

HALVES = (torch.bfloat16, torch.float16)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """What flash-attn documents, in eager fp32: query i of S sees keys i + (N - S) - left to i + (N - S)."""
    assert deterministic
    assert causal
    assert dropout_p == 0.0
    outs, group = [], q.shape[1] // k.shape[1]
    for b in range(cu_seqlens_q.numel() - 1):
        mine = q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]].float()
        keys, values = (x[cu_seqlens_k[b] : cu_seqlens_k[b + 1]].float().repeat_interleave(group, 1) for x in (k, v))
        assert len(mine) <= max_seqlen_q
        assert len(keys) <= max_seqlen_k
        scores = torch.einsum("shd,nhd->hsn", mine, keys) * softmax_scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        ahead = torch.arange(len(keys)) - (torch.arange(len(mine)) + len(keys) - len(mine)).unsqueeze(1)
        seen = (ahead <= 0) if window_size[0] < 0 else (ahead <= 0) & (ahead >= -window_size[0])
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hsn,nhd->shd", weights, values).to(q.dtype))
    return torch.cat(outs)


@pytest.fixture
def installed(monkeypatch):
    """flash-attn, on the CPU."""
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "DEVICES", ("cpu",))
    monkeypatch.setitem(registry._DEVICES, "flash", ("cpu",))
    monkeypatch.setattr(registry._state, "chosen", {})
    flash.flash_attn_function.cache_clear()
    yield
    flash.flash_attn_function.cache_clear()


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 1}, {"softcap": 20.0}], ids=str)
@pytest.mark.parametrize("slots", [None, 1, 4], ids=["no memory", "1 slot", "4 slots"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("dtype", HALVES)
def test_values_and_gradients(dtype, kv_heads, slots, options, installed):
    lengths = [3, 7, 1, 12]
    tensors, cu_seqlens = inputs(lengths, kv_heads=kv_heads, slots=slots, dtype=dtype)
    options = {"cu_seqlens": cu_seqlens, "visibility": "prefix", "scale": 0.3, **options}
    memory = (None, None) if slots is None else ()

    def ours(*x):
        with registry.backend("flash"):
            return latent_attention(*x, *memory, max_seqlen=12, **options)

    names = ("q", "k", "v", "memory_k", "memory_v")[: len(tensors)]
    assert_op_within_error_rule(ours, lambda *x: plain(*x, **options), tensors, ("out",), names)


def test_empty_sentences_and_expanded_memory(installed):
    tensors, cu_seqlens = inputs([0, 4, 0, 2], dtype=torch.bfloat16, slots=3, layout="expanded")
    options = {"cu_seqlens": cu_seqlens, "visibility": "prefix", "scale": 0.25, "max_seqlen": 4}
    with registry.backend("flash"):
        mine = latent_attention(*tensors, **options)
    with registry.backend("reference"):
        torch.testing.assert_close(mine, latent_attention(*tensors, **options), rtol=2e-2, atol=2e-2)


def chosen(tensors, cu_seqlens, **options):
    facts = flash.facts(
        "auto", tensors[0], tensors[2].shape[-1],
        **{"visibility": "prefix", "max_seqlen": 600, "softcap": None, "sinks": False, "graded": False, **options},
    )  # fmt: skip
    return registry.why_not("latent_attention", "flash", "cpu", tensors[0].dtype, facts)


def test_chosen_for_long_sentences_only(installed, caplog):
    tensors, cu_seqlens = inputs([2, 3], dtype=torch.bfloat16, slots=2)
    assert chosen(tensors, cu_seqlens) is None
    assert "from 512 on" in chosen(tensors, cu_seqlens, max_seqlen=511)
    assert "rolling" in chosen(tensors, cu_seqlens, visibility="rolling")
    assert "max_seqlen" in chosen(tensors, cu_seqlens, max_seqlen=None)
    assert "sinks" in chosen(tensors, cu_seqlens, sinks=True)
    narrow, offsets = inputs([2], head_dim=12, dtype=torch.bfloat16)
    assert "8 divides" in chosen(narrow, offsets)
    assert "takes float16, bfloat16" in registry.why_not("latent_attention", "flash", "cpu", torch.float32, {})
    with caplog.at_level("INFO", logger="lmvae_fast"):  # the choice is logged with its reason
        latent_attention(*tensors, cu_seqlens=cu_seqlens, visibility="prefix", scale=1.0, max_seqlen=3)
    assert "from 512 on" in caplog.text


def test_a_long_sentence_takes_it_unasked(installed, monkeypatch):
    monkeypatch.setattr(flash, "LEAST_TOKENS", 3)
    tensors, cu_seqlens = inputs([2, 3], dtype=torch.bfloat16, slots=2)
    ran = []
    monkeypatch.setattr(flash, "latent_attention", lambda *x, **options: ran.append(options) or x[0])
    latent_attention(*tensors, cu_seqlens=cu_seqlens, visibility="prefix", scale=1.0, max_seqlen=3)
    assert len(ran) == 1


def test_torchs_own_where_flash_attn_is_absent(monkeypatch):
    flash.flash_attn_function.cache_clear()
    monkeypatch.setattr(flash, "DEVICES", ("cpu",))
    monkeypatch.setattr(flash, "flash_attn_function", lambda: None)
    tensors, cu_seqlens = inputs([2, 3], dtype=torch.bfloat16, slots=2)
    monkeypatch.setattr(flash, "torch_function", lambda: flash_attn_varlen_func)
    monkeypatch.setitem(registry._DEVICES, "flash", ("cpu",))
    assert chosen(tensors, cu_seqlens) is None
    assert "order of sums" in chosen(tensors, cu_seqlens, graded=True)
    assert "no cap" in chosen(tensors, cu_seqlens, softcap=5.0)
    monkeypatch.setattr(flash, "torch_function", lambda: None)
    assert "not installed" in chosen(tensors, cu_seqlens)


def test_torchs_function_has_the_signature_that_is_used():
    """Only the signature: it runs on CUDA alone."""
    if flash.torch_function() is None:
        pytest.skip("this torch has no attention over sentences of several lengths with windows and grouped heads")
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    inspect.signature(varlen_attn).bind(*range(7), scale=1.0, window_size=(-1, 0), enable_gqa=True)


def test_forced_where_it_cannot_run(installed):
    tensors, cu_seqlens = inputs([2, 3], dtype=torch.float32, slots=3)
    options = {"cu_seqlens": cu_seqlens, "scale": 1.0, "max_seqlen": 3}
    with registry.backend("flash"):
        with raises_naming(registry.BackendError, "float16"):
            latent_attention(*tensors, visibility="prefix", **options)
        half = [x.bfloat16() for x in tensors]
        with raises_naming(registry.BackendError, "rolling"):
            latent_attention(*half, visibility="rolling", **options)
        latent_attention(*half, visibility="prefix", **options)  # short, but asked for
