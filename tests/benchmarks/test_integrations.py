"""The comparison of integrations: what counts as the same work, rows and their table, and every plan's side."""

from __future__ import annotations

import pytest

from benchmarks.common import records
from benchmarks.integrations import compare, our_sides, tables
from tests.benchmarks.test_generation import MACHINE


def test_sides_must_agree_before_anything_is_timed():
    same = {"numbers": [1.0, -200.0], "texts": ["a"]}
    assert compare.difference(same, {"numbers": [1.01, -200.0], "texts": ["a"]}) == pytest.approx(5e-5)
    assert compare.difference({"ids": [[1, 2]]}, {"ids": [[1, 2]]}) == 0.0
    for other in (
        {"numbers": [1.0, -201.0], "texts": ["a"]}, {"numbers": [1.0, -200.0], "texts": ["b"]}, {"texts": ["a"]},
        {"numbers": [1.0, float("nan")], "texts": ["a"]}, {"numbers": [1.0], "texts": ["a"]},
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            compare.difference(same, other)
    for nothing in ({}, {"ids": [[1]]}):
        with pytest.raises(SystemExit):
            compare.difference({}, nothing)


def test_rows_and_their_table(tmp_path, monkeypatch):
    case = {"shape": "4x256", "batch": 32, "latents": 8, "data": ["a"] * 64}
    plan = compare.PLANS["langvae"]
    times = {"LangVAE 0.6.13": [4.0, 4.4, 4.0, 4.0], "ours": [2.0, 2.0, 2.0, 2.0], "ours, teacher forcing": [0.5] * 4}
    rows = [compare.row_of(plan, case, work, times) for work in plan.works]
    assert [row["case"] for row in rows] == ["4x256, 64 sentences, batch 32"] * 2 + ["4x256, 8 latents"]
    assert rows[0]["speedup"] == {"ours": 2.0, "ours, teacher forcing": 8.0} and rows[0]["rounds"] == 4
    assert rows[0]["quartiles"]["ours"] == [2.0, 2.15]
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.integrations() == "Not measured."
    record = {
        "command": "python -m x", "machine": MACHINE, "integration": "langvae", "before": plan.before,
        "compared": plan.compared, "rows": [{**row, "difference": 2e-6} for row in rows],
    }  # fmt: skip
    records.write(record, tmp_path / "amd-zen4" / "integrations" / "langvae.json")
    table = tables.integrations()
    assert (
        "| langvae | an epoch's steps | 4x256, 64 sentences, batch 32 | LangVAE 0.6.13, 4.00 s | ours, 2.00 s | 2.00 |"
        in table
    )
    assert "ours, teacher forcing, 500 ms | 8.00 | 8.00 to 8.60 | no: another objective |" in table
    records.write({**record, "integration": "first make"}, tmp_path / "integrations" / "langvae.json")
    assert "first make" in tables.integrations() and "| langvae |" not in tables.integrations()


def test_every_plan_has_its_sides():
    for name, plan in compare.PLANS.items():
        assert compare.OURS in plan.ours and all(
            work.amount.format(batch=1, latents=1, sentences=1) for work in plan.works
        )
        assert plan.before in plan.ours or (compare.HERE / plan.script).is_file(), name
        if name != "langvae":
            side = our_sides.SIDES[name]
            assert all(hasattr(side, work.request) for work in plan.works) and hasattr(side, "check")


def test_one_comparison_from_end_to_end(tmp_path, monkeypatch):
    """Tiny, in processes as ever: embeddings agree, and a record is written."""
    pytest.importorskip("sentence_transformers")
    output = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["compare", "sentence-transformers", "--shapes", "tiny", "--rounds", "2", "--threads", "1",
                                     "--output", str(output)])  # fmt: skip
    assert compare.main() == 0
    record = records.json.loads(output.read_text())
    (row,) = record["rows"]
    assert (
        row["work"] == "encode"
        and 0 <= row["difference"] < 1e-4
        and row["seconds"].keys() == {"its encoder alone", "ours"}
    )
