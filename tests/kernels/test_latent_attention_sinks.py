"""Attention sinks: a score in every softmax's sum that gives nothing, in the packed pass and over a cache."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.backend import backend, extension
from lmvae_fast.kernels.latent_attention import latent_attention, latent_attention_decode, latent_attention_step

BACKENDS = ["reference", *(["cpp"] if extension()[0] else [])]


def problem(dtype=torch.float64, slots=3, head_dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (7, 4, head_dim),
        (7, 2, head_dim),
        (7, 2, head_dim),
        (2, 2, slots, head_dim),
        (2, 2, slots, head_dim),
        (4,),
    ]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    return tensors, torch.tensor([0, 4, 7], dtype=torch.int32)


def by_hand(q, k, v, memory_k, memory_v, sinks, window=None):
    """One token and head at a time, prefix visibility."""
    rows = []
    for sentence, (start, end) in enumerate(((0, 4), (4, 7))):
        for token in range(start, end):
            heads = []
            for head in range(4):
                keys = torch.cat([memory_k[sentence, head // 2], k[start : token + 1, head // 2]])
                values = torch.cat([memory_v[sentence, head // 2], v[start : token + 1, head // 2]])
                keys, values = (x if window is None else x[-window:] for x in (keys, values))
                weights = torch.exp(keys @ q[token, head] * 0.4)
                heads.append(weights @ values / (weights.sum() + sinks[head].exp()))
            rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", BACKENDS)
def test_equals_the_sum_by_hand_with_gradients(name, window):
    tensors, cu_seqlens = problem()
    *attended, sinks = tensors
    with backend(name):
        out = latent_attention(
            *attended, cu_seqlens=cu_seqlens, visibility="prefix", scale=0.4, window=window, sinks=sinks
        )
    expected = by_hand(*tensors, window=window)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    got = torch.autograd.grad((out * weights).sum(), tensors)
    want = torch.autograd.grad((expected * weights).sum(), tensors)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_sink_far_below_changes_nothing_and_one_far_above_leaves_nothing(name):
    (*attended, sinks), cu_seqlens = problem(torch.float32)
    options = {"cu_seqlens": cu_seqlens, "visibility": "prefix", "scale": 0.4}
    with backend(name), torch.no_grad():
        plain = latent_attention(*attended, **options)
        torch.testing.assert_close(latent_attention(*attended, sinks=torch.full_like(sinks, -1e4), **options), plain)
        assert latent_attention(*attended, sinks=torch.full_like(sinks, 1e4), **options).abs().max() == 0


def test_a_step_over_a_cache_equals_the_packed_pass():
    (q, k, v, memory_k, memory_v, sinks), cu_seqlens = problem()
    with torch.no_grad():
        packed = latent_attention(
            q, k, v, memory_k, memory_v, cu_seqlens=cu_seqlens, visibility="prefix", scale=0.4, sinks=sinks
        )
        keys = torch.cat([memory_k[:1], k[:4].transpose(0, 1)[None]], 2)
        values = torch.cat([memory_v[:1], v[:4].transpose(0, 1)[None]], 2)
        options = {"scale": 0.4, "sinks": sinks}
        lengths = torch.tensor([7])
        torch.testing.assert_close(latent_attention_decode(q[3:4], keys, values, lengths, **options), packed[3:4])
        keys[:, :, 6], values[:, :, 6] = 9.0, 9.0
        position = torch.tensor([6])
        got = latent_attention_step(q[3:4], k[3:4], v[3:4], keys, values, position, lengths, **options)
        torch.testing.assert_close(got, packed[3:4])


@pytest.mark.parametrize(
    ("sinks", "error"), [(torch.zeros(3), ValueError), (torch.zeros(4, dtype=torch.int64), TypeError)]
)
def test_sinks_that_do_not_fit_are_refused(sinks, error):
    (*attended, _), cu_seqlens = problem(torch.float32)
    with pytest.raises(error, match="sinks"):
        latent_attention(*attended, cu_seqlens=cu_seqlens, visibility="prefix", scale=0.4, sinks=sinks)
