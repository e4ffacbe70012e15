"""`train --from`: a run that goes on from a saved model, in another stage or not; and which weights a run saves."""

from __future__ import annotations

import json

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.testing import make_model
from lmvae_fast.training.checkpoints import folder as checkpoint

from .test_cli import as_json, call

Z = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
SMALL = ["--set", "train.tensorboard=false", "--set", "train.batch_size=2"]


@pytest.fixture
def saved(tmp_path):
    make_model("gpt2", latent_dim=4, max_len=12, seed=3).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text(
        "".join(f"a {animal} eats {food}\n" for animal in ("cat", "dog", "bee") for food in ("meat", "corn"))
    )
    return path


@pytest.mark.parametrize("stage", [[], ["--set", "model.train_decoder=true"], ["--set", "model.train_encoder=true"]])
def test_a_run_begins_with_the_weights_of_a_saved_model(capsys, saved, data, tmp_path, stage):
    """A step of next to no length leaves them as they were; and what the stage adds trains."""
    out = as_json(capsys, "train", "--from", saved, "--data", data, "--output", tmp_path / "run", "--max-steps", "1",
                  "--lr", "1e-20", *stage, *SMALL)  # fmt: skip
    assert (out["step"], out["weights"]) == (1, "last")
    before, after = lf.LMVAE.from_pretrained(saved), lf.LMVAE.from_pretrained(out["model"])
    assert after.decode(Z) == before.decode(Z)
    torch.testing.assert_close(after.encode(["a cat"]).mu, before.encode(["a cat"]).mu)
    trains = {name: any(p.requires_grad for p in getattr(after, name).parameters()) for name in ("encoder", "decoder")}
    assert trains == {name: f"model.train_{name}=true" in stage for name in ("encoder", "decoder")}


def test_what_is_no_saved_model_starts_no_run(capsys, data, tmp_path):
    error = call(capsys, "train", "--from", tmp_path / "absent", "--data", data, "--output", tmp_path / "run", code=3)[
        1
    ]
    assert "absent" in error
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("final", ["last", "best"])
def test_a_run_saves_the_last_or_the_best_weights_and_says_which(capsys, saved, data, tmp_path, final):
    """With a learning rate at which every evaluation is worse than the first one."""
    run = tmp_path / "run"
    out = as_json(capsys, "train", "--from", saved, "--data", data, "--output", run, "--max-steps", "6", "--lr", "0.5",
                  "--set", f"train.final_model={final}", "--set", "train.eval_every=2", "--set", "train.save_every=2",
                  "--set", "train.keep_checkpoints=1", *SMALL)  # fmt: skip
    best = out["best"]["step"]
    assert best < 6, "the learning rate is not too high"
    assert out["weights"] == (f"best, of step {best}" if final == "best" else "last")
    kept = {path.name for path in (run / "checkpoints").iterdir() if path.name.startswith("step-")}
    assert {f"step-{best:08}", "step-00000006"} <= kept, "the best one is kept beside the newest"
    stored = checkpoint.load(run / "checkpoints" / f"step-{best if final == 'best' else 6:08}").tensors["model"]
    model = dict(lf.LMVAE.from_pretrained(run / "model").named_parameters())
    for name, value in stored.items():
        assert torch.equal(model[name], value), name
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record.get("improved")][-1] == best
