"""latent_attention against torch's scaled_dot_product_attention over padded sentences with a mask, and the decode form.

The baseline gets its queries, keys and values already padded (packing costs it nothing) and, as a cache with a memory in
front must, concatenates slots and tokens. A second side gets even that for nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.kernels.harness import Case
from lmvae_fast.kernels.latent_attention import latent_attention, latent_attention_decode
from lmvae_fast.kernels.latent_attention.visibility import visibility_mask

BATCH, HEADS, HEAD_DIM, SLOTS = 32, 12, 64, 33  # GPT-2 small under LangVAE


def _packed(visibility: str, device: str, dtype: torch.dtype, floor: float | None) -> Case:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 23, (BATCH,), generator=generator)
    lengths[0] = 22
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    tokens, longest = int(lengths.sum()), int(lengths.max())
    scale = HEAD_DIM**-0.5

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    packed = [draw(tokens, HEADS, HEAD_DIM).requires_grad_() for _ in range(3)]
    memory = [draw(BATCH, HEADS, SLOTS, HEAD_DIM).requires_grad_() for _ in range(2)]
    grad = draw(tokens, HEADS, HEAD_DIM)

    def pad(x: torch.Tensor) -> torch.Tensor:
        parts = x.detach().split(lengths.tolist())
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).transpose(1, 2).contiguous()

    padded = [pad(x).requires_grad_() for x in packed]
    joined = [torch.cat(pair, 2).detach().requires_grad_() for pair in zip(memory, padded[1:], strict=True)]
    padded_grad = pad(grad)
    real = (torch.arange(longest) < lengths[:, None])[:, None, None]
    seen = visibility_mask(longest, SLOTS, visibility)
    own = F.pad(torch.eye(longest, dtype=torch.bool), (SLOTS, 0))  # padding sees itself: no row without a key
    mask = (seen & F.pad(real, (SLOTS, 0), value=True)) | own
    mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf")).to(device, dtype)

    def ours() -> tuple[torch.Tensor, ...]:
        out = latent_attention(
            *packed, *memory, cu_seqlens=cu_seqlens, visibility=visibility, scale=scale, max_seqlen=longest
        )
        return (out, *torch.autograd.grad(out, (*packed, *memory), grad))

    def sdpa() -> tuple[torch.Tensor, ...]:
        keys, values = (torch.cat(pair, 2) for pair in zip(memory, padded[1:], strict=True))
        out = F.scaled_dot_product_attention(padded[0], keys, values, attn_mask=mask, scale=scale)
        return (out, *torch.autograd.grad(out, (*padded, *memory), padded_grad))

    def sdpa_joined() -> None:
        out = F.scaled_dot_product_attention(padded[0], *joined, attn_mask=mask, scale=scale)
        torch.autograd.grad(out, (padded[0], *joined), padded_grad)

    def check() -> None:
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        for mine, theirs in zip(ours(), sdpa(), strict=True):
            if theirs.shape != mine.shape:
                theirs = torch.cat([x[:, :n].transpose(0, 1) for x, n in zip(theirs, lengths.tolist(), strict=True)])
            torch.testing.assert_close(mine, theirs, **tolerance)

    width = packed[0].element_size()
    rows, columns = tokens * HEADS * HEAD_DIM * width, 2 * BATCH * HEADS * SLOTS * HEAD_DIM * width
    pairs = sum(int(visibility_mask(n, SLOTS, visibility).sum()) for n in lengths.tolist()) * HEADS
    return Case(
        name=f"forward + backward, {visibility}, {BATCH} sentences of 4-22 tokens, {SLOTS} slots, {HEADS} heads x "
        f"{HEAD_DIM}, {str(dtype).removeprefix('torch.')}",
        ours=ours,
        baseline=sdpa,
        baseline_name="padded, masked SDPA",
        others={"SDPA, slots and tokens joined beforehand": sdpa_joined},
        floor=floor,
        # forward: q, k, v, memory in, out out; backward: the same and grad_out in, five gradients out
        bytes=(4 + 4 + 3) * rows + 3 * columns,
        flops=7 * 2 * pairs * HEAD_DIM,  # products over what is visible: two forward, five backward
        dtype=dtype,
        check=check,
    )


def _decode(positions: int, device: str, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(BATCH, HEADS, HEAD_DIM, generator=generator).to(device, dtype)
    k_cache, v_cache = (
        torch.randn(BATCH, HEADS, positions, HEAD_DIM, generator=generator).to(device, dtype) for _ in range(2)
    )
    lengths = torch.randint(positions // 2, positions + 1, (BATCH,), generator=generator)
    mask = (torch.arange(positions) < lengths[:, None])[:, None, None].to(device)
    lengths = lengths.to(device)
    scale = HEAD_DIM**-0.5

    def ours() -> torch.Tensor:
        return latent_attention_decode(q, k_cache, v_cache, lengths, scale=scale)

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache, attn_mask=mask, scale=scale)[:, :, 0]

    def check() -> None:
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(ours(), sdpa(), **tolerance)

    seen = int(lengths.sum()) * HEADS * HEAD_DIM
    return Case(
        name=f"decode step, {BATCH} rows, cache of {positions}, {HEADS} heads x {HEAD_DIM}, "
        f"{str(dtype).removeprefix('torch.')}",
        ours=ours,
        baseline=sdpa,
        baseline_name="masked SDPA",
        bytes=2 * seen * q.element_size(),
        flops=4 * seen,
        dtype=dtype,
        check=check,
    )


def cases(device: str) -> list[Case]:
    return [
        _packed("prefix", device, torch.float32, floor=3.0),
        _packed("rolling", device, torch.float32, floor=3.0),
        _packed("interleaved", device, torch.float32, floor=3.0),
        _packed("rolling", device, torch.bfloat16, floor=None),
        _decode(66, device, torch.float32),
        _decode(1024, device, torch.bfloat16),
    ]
