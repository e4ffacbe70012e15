"""The arithmetic of benchmarks/roofline.py, by hand for sizes that can be counted, and what docs/gpu.md says of it."""

from __future__ import annotations

import json

import pytest

from benchmarks import roofline
from benchmarks.roofline import CARDS, Card, Shape, Work, compare, loops, ops, rows_of
from lmvae_fast.kernels.backend import _state
from tests.conftest import REPOSITORY

CARD = Card("a card", bandwidth=1e12, bf16=100e12, tf32=50e12, fp32=10e12, launch=1e-6, host_launch=5e-6)


def test_a_kernel_takes_what_its_nearer_limit_takes():
    moves = Work("op", "bytes", bytes=10**6, flops=10**6)
    assert moves.perfect(CARD) == pytest.approx(1e-6 + 1e-6)
    multiplies = Work(
        "op", "flops", bytes=10**6, flops=10**10, kind="tf32", launches=3, rereads=10**6, share=0.5, serial=7e-6
    )
    assert multiplies.perfect(CARD) == pytest.approx(200e-6 + 1e-6)
    assert multiplies.ours(CARD) == pytest.approx(400e-6 + 7e-6 + 3e-6)
    assert multiplies.ours(CARD, recorded=False) == pytest.approx(400e-6 + 7e-6 + 15e-6)
    early = Work("op", "bytes", bytes=0, flops=0, launches=5, dependent=4)
    assert early.ours(CARD) == pytest.approx(1e-6 + 4 * 0.8e-6)
    assert early.ours(CARD, recorded=False) == pytest.approx(25e-6)
    again = Work("op", "rereads", bytes=10**6, flops=0, rereads=3 * 10**6, share=0.5)
    assert again.ours(CARD) == pytest.approx(8e-6 + 1e-6)


def test_the_bytes_of_small_shapes_counted_by_hand():
    shape = Shape(layers=2, hidden=8, heads=2, head_dim=4, inner=32, vocab=100, latent=4, slots=3)
    assert shape.body == 2 * (4 * 8 * 8 + 2 * 8 * 32)
    assert shape.memory == 2 * 2 * 2 * 3 * 4 and shape.projector == shape.memory * 4
    work = {w.op: w for w in ops(shape, batch=5, tokens=6)}
    assert work["latent_kv forward"].bytes == 4 * 384 + 2 * 5 * 96
    assert work["latent_kv AdamW"].bytes == 2 * 5 * 96 + 6 * 4 * 384  # weight and two moments, read and written
    assert (
        work["latent_kv norm"].flops == 3 * 2 * 5 * 384
    )  # more sentences than the latent is wide: tiles, no Gram matrix
    assert work["latent_attention forward"].flops == 4 * 30 * 8 * 6  # 3 slots and 3 of 6 tokens, on average
    assert work["lm_head_loss forward and backward"].flops == 4 * 30 * 8 * 100
    assert work["latent_attention_decode"].bytes == 2 * 5 * 2 * 8 * 9
    step, decode = loops(shape, batch=5, tokens=6)
    assert decode.bytes == 2 * (shape.body + 8 * 100) + 2 * 2 * 5 * 2 * 8 * 9
    assert step.flops == 2 * 2 * 30 * shape.body + 2 * 2 * 30 * 8 * 100


@pytest.mark.parametrize("card", CARDS)
def test_every_op_of_a_gpu_and_both_loops_have_a_row(card):
    rows = rows_of(CARDS[card])
    named = " ".join(row["op"] for row in rows)
    import lmvae_fast.kernels.aggregate_logpdf
    import lmvae_fast.kernels.coupling_flow  # noqa: F401

    for op, backends in _state.ops.items():
        if "triton" in backends:
            assert op.removesuffix("_adamw") in named, f"{op} has no row"
    assert "training step" in named and "decode step" in named
    assert all(row["perfect_us"] <= row["expected_us"] <= row["expected_launched_us"] for row in rows)


def test_rows_that_have_few_kernels_are_those_of_the_op():
    from lmvae_fast.kernels.row_product import MOST_ROWS

    assert roofline.FEW == MOST_ROWS


def test_the_record_is_what_the_arithmetic_says_and_the_page_says_what_it_is():
    record = json.loads(roofline.RECORD.read_text())
    assert record["rows"] == {name: rows_of(card) for name, card in CARDS.items()}
    page = (REPOSITORY / "docs" / "gpu.md").read_text()
    assert roofline.table() in page and "expected, not measured" in page


def test_measured_stands_beside_expected():
    rows = rows_of(CARDS["h200"])
    row = next(row for row in rows if row["op"] == "decode step" and row["case"] == "batch 1")
    lines = compare({"decode step, batch 1": 2 * row["expected_us"], "something else": 1.0}, rows)
    assert len(lines) == 1 and "(2.0 x expected)" in lines[0]
    record = {"rows": [
        {"what": "training step", "precision": "bf16", "batch": 32, "milliseconds": {"ours": 3.0}},
        {"what": "training step", "precision": "fp32", "batch": 32, "milliseconds": {"ours": 9.0}},
        {"what": "greedy decoding of 32 tokens at most", "precision": "bf16", "batch": 32, "milliseconds": {"ours": 16.0}},
    ]}  # fmt: skip
    assert roofline.steps_of(record) == {"training step, batch 32": 3000.0, "decode step, batch 32": 500.0}
