"""Launcher of sample_token's Triton kernel, its configurations, and what the compile gate builds."""

from __future__ import annotations

import math
import struct

import torch

from ..launch import TRITON_TYPES, CompileCase, Config, launch
from .triton_kernels import sample_token_kernel

# ---- configuration and launcher --------------------------------------------------------------------------------------

# Tokens that a filter may keep before the row is searched by bisection.
KEPT = 2048

# Up to so many rows a multiprocessor has one to itself: wide blocks then have more bytes under way. With more rows, two
# programs of narrow blocks share it. (An H200 has 132.)
_FEW_ROWS = 132
_WIDE = Config({"BLOCK": 2048, "KEPT": KEPT}, num_warps=16, max_registers=128)
_NARROW = Config({"BLOCK": 1024, "KEPT": KEPT}, num_warps=8, max_registers=128)


def _config(batch: int, vocab: int, plain_draw: bool) -> Config:
    if plain_draw:  # wide blocks of one spill
        return _NARROW
    if batch > _FEW_ROWS or vocab <= _WIDE.constants["BLOCK"]:
        return _NARROW
    return _WIDE


def sample_token(logits, seed, rows, steps, seen, greedy, temperature, top_k, top_p, min_p, penalty, logprob):
    """The Triton form of lmvae_fast::sample_token."""
    batch, vocab = logits.shape
    ids = torch.empty(batch, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(batch if logprob else 0, dtype=torch.float32, device=logits.device)
    mark = (0, 0) if seen is None else (seen.stride(0), seen.stride(1))
    by_number, by_weight = not greedy and 0 < top_k < vocab, not greedy and top_p < 1.0
    kept = (ids, ids)
    if by_number or by_weight:
        kept = tuple(torch.empty((batch, KEPT), dtype=t, device=logits.device) for t in (torch.float32, torch.int32))
    launch(
        sample_token_kernel, (batch,), logits.device, _config(batch, vocab, not (greedy or by_number or by_weight)),
        logits, seed, rows, steps, ids if seen is None else seen, *kept, ids, logprobs if logprob else ids, vocab,
        1.0 / temperature, top_k, struct.unpack("<q", struct.pack("<d", top_p))[0],
        math.log(min_p) if min_p > 0.0 else -math.inf, penalty, 1.0 / penalty, logits.stride(0), logits.stride(1),
        rows.stride(0), steps.stride(0), *mark,
        GREEDY=greedy, TOP_K=by_number, TOP_P=by_weight, MIN_P=min_p > 0.0, HAS_SEEN=seen is not None,
        LOGPROB=logprob, BITS=vocab.bit_length(),
    )  # fmt: skip
    return ids, logprobs


# ---- compile gate ----------------------------------------------------------------------------------------------------


def _cases() -> list[CompileCase]:
    cases = []
    plain = {"TOP_K": False, "TOP_P": False, "MIN_P": False}
    modes = {
        "greedy": {"GREEDY": True, **plain},
        "draw": {"GREEDY": False, **plain},
        "top_k": {"GREEDY": False, **plain, "TOP_K": True},
        "top_p": {"GREEDY": False, **plain, "TOP_P": True},
        "all": {"GREEDY": False, "TOP_K": True, "TOP_P": True, "MIN_P": True},
    }
    for dtype in TRITON_TYPES.values():
        signature: dict[str, str | int] = {
            "logits": f"*{dtype}", "seed": "*i64", "rows": "*i64", "steps": "*i64", "seen": "*u8", "ids": "*i64",
            "kept_x": "*fp32", "kept_col": "*i32",
            "logprob": "*fp32", "vocab": "i32", "inverse": "fp32", "top_k": "i32", "top_p_bits": "i64",
            "log_min_p": "fp32", "penalty": "fp32", "over_penalty": "fp32", "stride_b": "i32", "stride_v": 1,
            "stride_rows": 1, "stride_steps": 1, "stride_seen_b": "i32", "stride_seen_v": 1,
        }  # fmt: skip
        for name, mode in modes.items():
            everything = name == "all"
            constants = {**mode, "HAS_SEEN": everything, "LOGPROB": everything, "BITS": 16}
            for rows in (1, _FEW_ROWS + 1):
                tag, config = f"{name}-{dtype}-{'few' if rows == 1 else 'many'}", _config(rows, 50_257, name == "draw")
                cases.append(CompileCase(tag, sample_token_kernel, signature, config, constants, max_registers=128))
        one = {**signature, "vocab": 1, "top_k": 1}  # Triton makes a constant of what is 1
        constants = {**modes["all"], "HAS_SEEN": True, "LOGPROB": True, "BITS": 1}
        cases.append(CompileCase(f"one-token-{dtype}", sample_token_kernel, one, _config(1, 1, False), constants))
    return cases


COMPILE_CASES = _cases()
