"""Training on whole (tiny) LMVAEs: both systems, frozen and trained parts, resume to the bit."""

import shutil

import pytest
import torch

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.errors import CheckpointError
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.testing import make_model, tiny_decoder, tiny_encoder, tiny_tokenizer
from lmvae_fast.training.checkpoints import folder as checkpoint
from tests.training.helpers import StopAt, assert_same_checkpoint, assert_same_history, run

# What each adds to the loop: free running and padding's NLL; dropout, noise and cached features; everything trained
# (dropout inside the decoder, tied embeddings, no cache); grouped heads and rotary positions under autocast with
# accumulation.
MODELS = {
    "released LangVAE": ({"objective": "langvae-0.6", "free_running": True}, {}),
    "langvae": ({"projector_dropout": 0.1, "visibility": "interleaved"}, {}),
    "optimus": ({"system": "optimus"}, {"learning_rate": 0.005}),
    "llama bf16": ({"family": "llama"}, {"precision": "bf16", "batch_size": 4, "accumulation": 2}),
}  # fmt: skip


def build(name, seed=0):
    return make_model(**{"max_len": 12, **MODELS[name][0]}, seed=seed)


@pytest.mark.parametrize("name", MODELS)
def test_training_resumes_to_the_bit_and_learns(tmp_path, name):
    options = {
        "epochs": 2,
        "max_steps": 14,
        "log_every": 7,
        "beta_schedule": "constant",
        "beta": 0.1,
        **MODELS[name][1],
    }
    model = build(name)
    frozen = {key: value.clone() for key, value in model.named_parameters() if not value.requires_grad}
    unbroken = run(tmp_path / "unbroken", model=model, **options)
    for key, value in model.named_parameters():
        assert value.requires_grad or torch.equal(value, frozen[key]), f"{key} is frozen and has changed"
    first, last = [record["loss"] for record in unbroken.history if record["kind"] == "train"]
    assert last < first

    run(tmp_path / "broken", StopAt(9), model=build(name), **options)
    other = build(name)
    with torch.no_grad():  # what a checkpoint restores must not come from the fresh model
        for value in other.parameters():
            if value.requires_grad:
                value.add_(1.0)
    resumed = run(tmp_path / "broken", model=other, resume=True, **options)
    assert_same_checkpoint(resumed.checkpoint, unbroken.checkpoint)
    assert_same_history(tmp_path / "unbroken", tmp_path / "broken")
    for (key, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), key


def test_a_checkpoint_holds_no_frozen_part(tmp_path):
    model = build("langvae")
    result = run(tmp_path, model=model, max_steps=2)
    stored = checkpoint.load(result.checkpoint).tensors
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert stored["model"].keys() == trained
    assert trained
    assert not any("encoder." in key or "decoder." in key for key in trained)
    assert len(stored["optimizer"]) == 3 * len(trained)


def test_a_run_goes_on_after_its_base_models_moved(tmp_path):
    """By what they hold, not by where they lie: other weights in the old place are another model."""
    places = {name: tmp_path / name for name in ("encoder", "decoder", "new encoder", "new decoder")}
    save_bases(places["encoder"], places["decoder"])
    options = {"max_steps": 6, "save_every": 3, "beta_schedule": "constant"}
    run(tmp_path / "run", StopAt(3), model=from_folders(places["encoder"], places["decoder"]), **options)
    for name in ("encoder", "decoder"):
        places[name].rename(places[f"new {name}"])
    moved = from_folders(places["new encoder"], places["new decoder"])
    result = run(tmp_path / "run", model=moved, resume=True, **options)
    assert result.step == 6
    save_bases(places["encoder"], places["decoder"], seed=7)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    with pytest.raises(CheckpointError, match="another model: weights of the frozen parts"):
        run(tmp_path / "run", model=from_folders(places["encoder"], places["decoder"]), resume=True, **options)


def save_bases(encoder, decoder, seed=0):
    size = len(tiny_tokenizer())
    for folder, model in (
        (encoder, tiny_encoder("bert", vocab_size=size, seed=seed + 1)),
        (decoder, tiny_decoder("gpt2", vocab_size=size, seed=seed)),
    ):
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)


def from_folders(encoder, decoder):
    torch.manual_seed(0)
    return LMVAE(LMVAEConfig(encoder=str(encoder), decoder=str(decoder), latent_dim=6, max_len=12))
