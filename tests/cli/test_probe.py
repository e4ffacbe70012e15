"""``lmvae-fast probe``: the page, its JSON, two models side by side, and what is refused."""

from __future__ import annotations

import json

import pytest

from tests.cli.test_cli import as_json, call
from tests.probes.tiny import tiny_model

QUICK = ("--limit", "150", "--decoded", "6", "--resamples", "5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("probe") / "model"
    tiny_model().save_pretrained(path)
    return path


def test_page_and_json(capsys, folder, tmp_path):
    output = tmp_path / "page.html"
    options = ("--probes", "overview,neighbourhoods,reconstruction,generation,traversal", "--output", output, *QUICK)
    found = as_json(capsys, "probe", folder, *options)
    assert found["data"]["sentences"] == 150 and set(found["sections"]) == set(options[1].split(","))
    assert json.loads(output.with_suffix(".json").read_text()) == found
    page = output.read_text()
    assert page.startswith("<!doctype html>") and "active dimensions" not in page and "kept neighbours" in page
    assert "<svg" in page and "http-equiv" not in page and "src=" not in page  # nothing is loaded from elsewhere
    assert (tmp_path / ".probes_cache").is_dir()
    out, _ = call(capsys, "probe", folder, *options)
    assert "kept neighbours" in out.replace("\n", " ") or "kept" in out
    assert "linguistic" in call(capsys, "probe", "--probes", "help")[0]


def test_two_models(capsys, folder, tmp_path):
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    output = tmp_path / "both.html"
    options = ("--probes", "overview,neighbourhoods", "--output", output, *QUICK)
    found = as_json(capsys, "probe", "--compare", folder, other, *options)
    assert found["models"] == [str(folder), str(other)] and "neighbourhoods.kept_neighbours" in found["differences"]
    assert "95 % interval" in output.read_text()
    # An earlier run's JSON stands for its model; one of other sentences is refused.
    first = tmp_path / "first.html"
    as_json(capsys, "probe", folder, "--probes", "overview", "--output", first, "--limit", "60", "--resamples", "5")
    _, error = call(capsys, "probe", "--compare", first.with_suffix(".json"), other, *options, code=3)
    assert "different" in error


def test_factors_of_columns(capsys, folder, tmp_path):
    table = tmp_path / "rows.csv"
    rows = [f"a cat number {n} eats,{'old' if n % 2 else 'young'}" for n in range(60)]
    table.write_text("text,age\n" + "\n".join(rows))
    options = (
        "--data",
        table,
        "--factor",
        "age",
        "--probes",
        "clusters",
        "--output",
        tmp_path / "p.html",
        "--resamples",
        "3",
    )
    found = as_json(capsys, "probe", folder, *options)
    assert "age: silhouette" in found["sections"]["clusters"]["scores"]


def test_refusals(capsys, folder, tmp_path):
    def refused(*arguments):
        return " ".join(call(capsys, "probe", *arguments, code=3)[1].split())  # long paths move the ends of lines

    page, broken = tmp_path / "p.html", tmp_path / "broken.json"
    broken.write_text("[]")
    assert "one model, or two" in refused()
    assert "one model, or two" in refused(folder, "--compare", folder, folder)
    assert ".html file" in refused(folder, "--output", tmp_path / "page.pdf")
    assert "unknown probe" in refused(folder, "--probes", "colour", "--output", page)
    assert "no probe report" in refused("--compare", broken, folder, "--output", page)
