"""LangVAE checkpoints as LMVAE models and back."""

from __future__ import annotations

import json

import pytest
import torch

import lmvae_fast.models.lmvae as lmvae
from lmvae_fast.config import LMVAEConfig
from lmvae_fast.errors import CheckpointError, OutputError
from lmvae_fast.integrations.langvae import load_checkpoint, load_reference, save_checkpoint
from lmvae_fast.integrations.langvae.files import read_folder, write_folder
from lmvae_fast.testing import SENTENCES, tiny_decoder, tiny_encoder, tiny_tokenizer

NZ, MAX_LEN = 4, 8


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of tiny encoders and decoders, with a tokenizer each."""
    root = tmp_path_factory.mktemp("parts")
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    for name, model in (
        ("bert", tiny_encoder("bert", vocab_size=size)),
        ("t5", tiny_encoder("t5", vocab_size=size)),
        ("qwen2", tiny_encoder("qwen2", vocab_size=size)),
        ("gpt2", tiny_decoder("gpt2", layers=2, vocab_size=size)),
        ("llama", tiny_decoder("llama", layers=2, vocab_size=size)),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def build(parts, encoder="bert", decoder="gpt2", **fields):
    config = LMVAEConfig(
        encoder=str(parts / encoder), decoder=str(parts / decoder), latent_dim=NZ, max_len=MAX_LEN, **fields
    )
    return lmvae.LMVAE(config).eval()


@pytest.mark.parametrize(
    ("encoder", "decoder", "fields"),
    [
        ("bert", "gpt2", {}),
        ("t5", "llama", {"normalize": True}),
        ("qwen2", "gpt2", {"pooling": "last"}),
        ("bert", "llama", {"pooling": "cls", "annotations": ("arg", "verb"), "conditional_decoder": True}),
    ],
)
def test_round_trip(parts, tmp_path, encoder, decoder, fields):
    model = build(parts, encoder, decoder, **fields)
    folder = save_checkpoint(model, tmp_path / "saved")
    again = load_checkpoint(folder, annotations=fields.get("annotations", ()))
    # The parts were saved by transformers 5: the checkpoint has copies that LangVAE's transformers reads.
    copies = {f"{part}": str(folder / f"{part}_model") for part in ("encoder", "decoder")}
    assert again.config.to_dict() == {**model.config.to_dict(), **copies}
    assert not again.training
    state, other = model.trainable_state_dict(), again.trainable_state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert torch.equal(value, other[name]), name
    assert torch.equal(
        model.encoder(*model.encoder.tokenize(SENTENCES)), again.encoder(*again.encoder.tokenize(SENTENCES))
    )


def test_model_and_reference_read_the_same_folder_alike(parts, tmp_path):
    folder = save_checkpoint(build(parts, "bert", "llama"), tmp_path / "saved")
    model, reference = load_checkpoint(folder, objective="langvae-0.6", free_running=True), load_reference(folder)
    texts, eps = list(SENTENCES[:3]), torch.randn(3, NZ)
    got = model(model.make_batch(model.tokenize(texts)), beta=0.5, eps=eps)
    want = reference.loss(texts, beta=0.5, target_kl=2.0, eps=eps)
    assert len({len(model.decoder.tokenizer.encode([text])[0]) for text in texts}) > 1, "some must be padded"
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
    got.loss.backward()
    want.loss.backward()
    for layer, linear in enumerate(reference.context_hidden):
        torch.testing.assert_close(model.projector.weight.grad[layer], linear.weight.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.posterior_head.weight.grad, reference.linear.weight.grad, rtol=1e-3, atol=1e-4)


def test_what_langvae_cannot_express_is_refused(parts, tmp_path):
    for fields, name in (
        ({"visibility": "interleaved"}, "visibility"),
        ({"slots": MAX_LEN + 2}, "slots"),
        ({"projector": "mlp"}, "projector"),
        ({"embedding_shift": True}, "embedding_shift"),
        ({"pooling": "pooler"}, "pooling"),
        ({"train_decoder": True}, "train_decoder"),
    ):
        with pytest.raises(CheckpointError, match=f"with this {name}.*save_pretrained"):
            save_checkpoint(build(parts, **fields), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_parts_without_a_place_are_refused(parts, tmp_path):
    model = build(parts)
    model.encoder.source = None
    with pytest.raises(CheckpointError, match="the encoder came from no folder"):
        save_checkpoint(model, tmp_path / "saved")


def test_parts_that_are_no_longer_what_their_names_say_are_refused(parts, tmp_path):
    for part in ("encoder", "decoder"):
        model = build(parts)
        with torch.no_grad():
            getattr(model, part).model.get_input_embeddings().weight.mul_(2)
        with pytest.raises(CheckpointError, match=f"the {part} has other weights.*{part}=<that folder>"):
            save_checkpoint(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_file_of_the_users_within_a_copied_part_keeps_the_folder(parts, tmp_path):
    model = build(parts)
    folder = save_checkpoint(model, tmp_path / "saved")
    copies = [path for path in folder.iterdir() if path.is_dir()]
    assert copies
    (copies[0] / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"not written with it.*notes\.txt"):
        save_checkpoint(model, folder, overwrite=True)
    assert (copies[0] / "notes.txt").read_text() == "mine"


def test_existing_folder(parts, tmp_path):
    model = build(parts)
    folder = save_checkpoint(model, tmp_path / "saved")
    with pytest.raises(OutputError, match="exists"):
        save_checkpoint(model, folder)
    save_checkpoint(model, folder, overwrite=True)


def test_labels_must_be_named(parts, tmp_path):
    folder = save_checkpoint(build(parts, annotations=("arg", "verb")), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="annotations=<its 2 label names>"):
        load_checkpoint(folder)
    assert load_checkpoint(folder, annotations=("a", "v")).config.annotations == ("a", "v")


def test_parts_that_do_not_fit(parts, tmp_path):
    folder = save_checkpoint(build(parts), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="made for another decoder"):
        load_checkpoint(folder, decoder=str(parts / "llama"))
    with pytest.raises(CheckpointError, match="cannot load"):
        load_checkpoint(folder, decoder="no-such/decoder")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_checkpoint(folder, encoder=str(tmp_path))


def test_dtype_follows_the_decoder_and_the_encoder_stays_fp32(parts, tmp_path):
    half = tmp_path / "half"
    tiny_decoder("gpt2", layers=2, vocab_size=len(tiny_tokenizer())).bfloat16().save_pretrained(half)
    tiny_tokenizer().save_pretrained(half)
    folder = save_checkpoint(build(parts), tmp_path / "saved")
    model = load_checkpoint(folder, decoder=str(half))
    assert model.config.dtype == "bfloat16"
    assert model.decoder.dtype == torch.bfloat16
    assert next(model.encoder.model.parameters()).dtype == torch.float32
    assert load_checkpoint(folder, decoder=str(half), dtype="float32").decoder.dtype == torch.float32


def test_a_relative_checkpoint_can_be_moved_with_its_parts(parts, tmp_path):
    folder = save_checkpoint(build(parts), tmp_path / "saved")
    for part, name in (("encoder", "bert"), ("decoder", "gpt2")):
        cfg = folder / f"{part}_cfg.json"
        cfg.write_text(json.dumps({**json.loads(cfg.read_text()), "model_path": f"../parts/{name}"}))
    (tmp_path / "parts").symlink_to(parts)
    assert load_checkpoint(folder).config.decoder == str((parts / "gpt2").resolve())


def test_a_moved_checkpoint_finds_the_copies_inside_it(parts, tmp_path):
    model = build(parts)
    folder = save_checkpoint(model, tmp_path / "saved").rename(tmp_path / "moved")
    again = load_checkpoint(folder)
    assert again.config.decoder == str(folder / "decoder_model")
    z = torch.randn(3, NZ)
    assert again.decode(z) == model.decode(z)
    assert load_checkpoint(folder, decoder=str(parts / "gpt2")).config.decoder == str(parts / "gpt2")


def test_hub_names_are_kept(parts, tmp_path):
    folder = save_checkpoint(build(parts), tmp_path / "saved")
    contents = read_folder(folder, encoder="bert-base-cased", decoder="openai-community/gpt2")
    again = read_folder(write_folder(contents, tmp_path / "hub"))
    assert (again.encoder_path, again.decoder_path) == ("bert-base-cased", "openai-community/gpt2")
