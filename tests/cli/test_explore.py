"""The commands that walk the latent space: tables, JSON, drawings, labels, errors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lmvae_fast.exploration.drawings import overlap
from lmvae_fast.generation.latent_files import write_latents
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.testing import make_model
from tests.cli.test_cli import as_json, call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("explore") / "model"
    make_model("gpt2", latent_dim=4, max_len=12).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    path = tmp_path_factory.mktemp("labelled") / "model"
    model = make_model("gpt2", latent_dim=4, max_len=12, annotations=("ARG0", "V"), conditional_decoder=True)
    model.save_pretrained(path)
    return path


def test_neighbourhood(capsys, folder):
    out = as_json(capsys, "neighbourhood", folder, "a cat eats", "--samples", "5", "--scale", "0.5", "--seed", "3")
    assert len(out["neighbours"]) == 5 and len(out["center"]) == 4
    distances = [row["distance"] for row in out["neighbours"]]
    assert distances == sorted(distances) and distances[0] > 0
    again = as_json(capsys, "neighbourhood", folder, "a cat eats", "--samples", "5", "--scale", "0.5", "--seed", "3")
    assert again == out
    assert "distance" in call(capsys, "neighbourhood", folder, "a cat eats", "--samples", "2")[0]


def test_average(capsys, folder):
    out = as_json(capsys, "average", folder, "a cat eats", "water boils", "dogs bark")
    mu = LMVAE.from_pretrained(folder).encode(["a cat eats", "water boils", "dogs bark"]).mu
    torch.testing.assert_close(torch.tensor(out["latent"]), mu.mean(0))
    assert len(out["sentences"]) == 3
    assert "distance" in call(capsys, "average", folder, "a cat eats", "water boils")[0]


def test_traversal_over_quantiles(capsys, folder, tmp_path):
    (tmp_path / "few.txt").write_text("a cat eats\nwater boils\ndogs bark\n")
    posterior = LMVAE.from_pretrained(folder).encode(["a cat eats", "water boils", "dogs bark"])
    save_file({"mu": posterior.mu, "logvar": posterior.logvar}, tmp_path / "posterior.safetensors")
    write_latents(tmp_path / "z.npy", torch.arange(20.0).view(5, 4))
    start = ("traverse", folder, "a cat eats", "--dims", "1", "--steps", "3", "--tail", "0.25", "--quantiles-of")
    of_texts = as_json(capsys, *start, tmp_path / "few.txt")
    assert of_texts["probabilities"] == pytest.approx([0.25, 0.5, 0.75])
    assert of_texts["values"][0] == sorted(of_texts["values"][0])
    assert as_json(capsys, *start, tmp_path / "posterior.safetensors")["values"][0] == pytest.approx(
        of_texts["values"][0]
    )
    assert as_json(capsys, *start, tmp_path / "z.npy")["values"] == [[5.0, 9.0, 13.0]]


@pytest.mark.parametrize("ending", ["html", "png"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("interpolate", "a cat eats", "water boils", "--steps", "3"),
        ("traverse", "a cat eats", "--dims", "0-1", "--steps", "3"),
        ("arithmetic", "a cat eats - water boils"),
        ("neighbourhood", "a cat eats", "--samples", "4"),
        ("average", "a cat eats"),
    ],
)
def test_drawings(capsys, folder, tmp_path, arguments, ending):
    path = tmp_path / "new" / f"drawing.{ending}"
    command, *rest = arguments
    printed, _ = call(capsys, command, folder, *rest, "--output", path)
    assert "drawn" in printed
    data = path.read_bytes()
    if ending == "png":
        assert data.startswith(b"\x89PNG")
    else:
        assert b"<svg" in data and b"<table" in data


def test_a_drawing_of_quantiles_says_so(capsys, folder, tmp_path):
    write_latents(tmp_path / "z.npy", torch.randn(9, 4))
    path = tmp_path / "way.html"
    call(capsys, "traverse", folder, "a cat", "--dims", "0", "--quantiles-of", tmp_path / "z.npy", "--output", path)
    page = path.read_text()
    assert "quantiles of the aggregate posterior" in page and "95.0%" in page


def test_labels_stand_behind_the_sentence(capsys, labelled):
    a, b = "a cat eats & ARG0 ARG0 V", "water boils & ARG0 V"
    assert len(as_json(capsys, "interpolate", labelled, a, b, "--steps", "3")) == 3
    assert len(as_json(capsys, "traverse", labelled, a, "--dims", "0", "--steps", "2")["texts"][0]) == 2
    assert as_json(capsys, "arithmetic", labelled, f"{a} - {b}")["terms"] == [
        [1.0, "a cat eats"],
        [-1.0, "water boils"],
    ]
    assert len(as_json(capsys, "neighbourhood", labelled, a, "--samples", "2")["neighbours"]) == 2
    assert len(as_json(capsys, "average", labelled, a, b)["sentences"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["interpolate", "MODEL", "a cat", "water", "--output", "way.pdf"], ".html, .png"),
        (["neighbourhood", "MODEL", "a cat", "--samples", "0"], "at least 1"),
        (["neighbourhood", "MODEL", "a cat", "--scale", "0"], "> 0"),
        (["traverse", "MODEL", "a cat", "--quantiles-of", "none.txt"], "none.txt"),
        (["traverse", "MODEL", "a cat", "--quantiles-of", "none.npy"], "none.npy"),
        (["traverse", "MODEL", "a cat", "--quantiles-of", "BROKEN"], "truncated or corrupt"),
        (["interpolate", "LABELLED", "a cat", "water & V"], "sentence & label label"),
        (["interpolate", "LABELLED", "a cat & V", "water & V"], "labels and words differ"),
    ],
)
def test_bad_input(capsys, folder, labelled, tmp_path, arguments, message):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    names = {"MODEL": folder, "LABELLED": labelled, "BROKEN": broken}
    _, err = call(capsys, *(names.get(argument, argument) for argument in arguments), code=3)
    assert message in " ".join(err.split())


def test_overlap_of_words():
    assert overlap("a b b c", "b a d") == pytest.approx(2 * 2 / 7)
    assert overlap("", "") == 1.0 and overlap("a", "") == 0.0
