"""Bad input of latent_attention is named."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.latent_attention import latent_attention

from .common import (
    on_backend,
    raises_naming,
    require,
)
from .test_latent_attention import (
    ALL,
    NAMES,
    inputs,
)

# ---- bad input --------------------------------------------------------------------------------------------------------


BAD = {
    "q rank": (lambda a: a.update(q=a["q"][0]), ValueError, ("q", "rank 3")),
    "k tokens": (lambda a: a.update(k=a["k"][:5], v=a["v"][:5]), ValueError, ("k", 7, 5)),
    "v shape": (lambda a: a.update(v=a["v"][..., :8]), ValueError, ("v", 16, 8)),
    "heads": (lambda a: a.update(q=a["q"][:, :1]), ValueError, ("q", 1, 2)),
    "head_dim": (lambda a: a.update({n: a[n].repeat(1, 1, 17) for n in "qkv"}), ValueError, ("head_dim", 272, 256)),
    "dtype mix": (lambda a: a.update(k=a["k"].double()), TypeError, ("k", "float64", "float32")),
    "integers": (lambda a: a.update({n: a[n].long() for n in NAMES}), TypeError, ("q", "int64")),
    "device mix": (lambda a: a.update(v=a["v"].to("meta")), ValueError, ("v", "meta", "cpu")),
    "not a tensor": (lambda a: a.update(v=[1.0]), TypeError, ("v", "list")),
    "half a memory": (lambda a: a.update(memory_v=None), ValueError, ("memory_k", "memory_v")),
    "memory rank": (lambda a: a.update(memory_k=a["memory_k"][0]), ValueError, ("memory_k", "rank 4")),
    "memory batch": (lambda a: a.update({n: a[n][:1] for n in NAMES[3:]}), ValueError, ("memory_k", "(2, 2, 9, 16)")),
    "memory shapes": (lambda a: a.update(memory_v=a["memory_v"][:, :, :4]), ValueError, ("memory_v", 9, 4)),
    "memory heads": (lambda a: a.update({n: a[n][:, :1] for n in NAMES[3:]}), ValueError, ("memory_k", "(2, 1, 9, 16)")),
    "visibility": (lambda a: a.update(visibility="causal"), ValueError, ("visibility", "causal", "rolling")),
    "scale": (lambda a: a.update(scale=float("nan")), ValueError, ("scale", "nan")),
    "window": (lambda a: a.update(window=0), ValueError, ("window", 0)),
    "softcap": (lambda a: a.update(softcap=0.0), ValueError, ("softcap", 0.0)),
    "offsets' dtype": (lambda a: a.update(cu_seqlens=a["cu_seqlens"].long()), TypeError, ("cu_seqlens", "int64")),
    "offsets' rank": (lambda a: a.update(cu_seqlens=a["cu_seqlens"][None]), ValueError, ("cu_seqlens", "(1, 3)")),
    "no offsets": (lambda a: a.update(cu_seqlens=a["cu_seqlens"][:0]), ValueError, ("cu_seqlens",)),
    "end": (lambda a: a["cu_seqlens"].copy_(torch.tensor([0, 3, 6])), ValueError, ("cu_seqlens", 7, 6)),
    "start": (lambda a: a["cu_seqlens"].copy_(torch.tensor([1, 3, 7])), ValueError, ("cu_seqlens", 7, 1)),
    "decreasing": (lambda a: a["cu_seqlens"].copy_(torch.tensor([0, 8, 7])), ValueError, ("cu_seqlens", "-1")),
    "max_seqlen": (lambda a: a.update(max_seqlen=3), ValueError, ("max_seqlen", 3, 4)),
    "negative bound": (lambda a: a.update(max_seqlen=-1), ValueError, ("max_seqlen", -1)),
    "slots": (lambda a: a.update({n: a[n][:, :, :3] for n in NAMES[3:]}, visibility="rolling"), ValueError, (4, 3)),
    "no memory": (lambda a: a.update(memory_k=None, memory_v=None, visibility="interleaved"), ValueError, (4, 0)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ALL)
def test_bad_input(name, case):
    require("latent_attention", name)
    spoil, error, words = BAD[case]
    tensors, cu = inputs([3, 4])
    arguments = dict(zip(NAMES, tensors, strict=True), cu_seqlens=cu, visibility="prefix", scale=0.25)
    function = on_backend(latent_attention, name)
    function(**arguments)
    spoil(arguments)
    with raises_naming(error, *words):
        function(**arguments)
