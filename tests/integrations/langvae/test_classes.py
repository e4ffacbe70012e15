"""LangVAE by its own names: shapes, figures of the golden records, files, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from lmvae_fast.errors import CheckpointError, ConfigError, LatentError, OutputError
from lmvae_fast.integrations.langvae import (
    LangVAE,
    SentenceDecoder,
    SentenceEncoder,
    TokenizedAnnotatedDataSet,
    TokenizedDataSet,
    VAEConfig,
    collate_sparse_fn,
    load_checkpoint,
)
from lmvae_fast.testing import SENTENCES, make_model
from tests.integrations.langvae.parts_on_disk import MAX_LEN, NZ, build, write_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


def batch_of(model, sentences=SENTENCES[:3]):
    data = TokenizedDataSet(list(sentences), model.decoder.tokenizer, model.decoder.max_len)
    return collate_sparse_fn([data[i] for i in range(len(data))])


@pytest.fixture(scope="module", params=["langvae_gpt2", "langvae_llama"])
def golden(request, shared):
    folder = shared / "golden" / request.param
    record, settings = load_file(folder / "record.safetensors"), json.loads((folder / "record.json").read_text())
    model = LangVAE.load_from_folder(folder / "langvae_checkpoint")
    model.cur_beta, model.target_kl = settings["beta"], settings["target_kl"]
    model._sample_gauss = lambda mu, std: (mu + record["eps"] * std, record["eps"])
    return model, record, settings


def test_a_step_has_the_figures_that_langvae_recorded(golden):
    model, record, settings = golden
    model.zero_grad()
    out = model(batch_of(model, settings["sentences"]))
    for name, value in (("loss", out.loss), ("recon_loss", out.recon_loss), ("kl_loss", out.reg_loss)):
        assert value.item() == pytest.approx(record[name].item(), rel=1e-5), name
    torch.testing.assert_close(out.recon_x, record["probabilities"], rtol=0, atol=2e-5)
    torch.testing.assert_close(out.z, record["z"], rtol=0, atol=2e-6)
    out.loss.backward()
    gradients = {"grad_encoder_linear": model.encoder.linear.weight.grad}
    for name in ("weight", "bias"):
        for layer, gradient in enumerate(getattr(model.decoder.projector, name).grad):
            gradients[f"grad_context_hidden.{layer}.{name}"] = gradient
    assert gradients.keys() == {name for name in record if name.startswith("grad_")}
    for name, gradient in gradients.items():
        assert ((gradient - record[name]).norm() / record[name].norm()).item() < 1e-4, name


@torch.no_grad()
def test_loss_function_encode_and_decode_as_langvae_does(golden):
    model, record, settings = golden
    batch = batch_of(model, settings["sentences"])
    terms = model.loss_function(record["probabilities"], batch["data"], record["mu"], record["logvar"], record["z"])
    for name, value in zip(("loss", "recon_loss", "kl_loss"), terms, strict=True):
        assert value.item() == pytest.approx(record[name].item(), rel=1e-5), name
    encoded = model.encoder(batch["data"])
    torch.testing.assert_close(encoded.embedding, record["mu"], rtol=0, atol=2e-6)
    torch.testing.assert_close(encoded.log_covariance, record["logvar"], rtol=0, atol=2e-6)
    z, labels = model.encode_z(batch["data"])
    torch.testing.assert_close(z, record["z"], rtol=0, atol=2e-6)
    assert labels == []
    assert model.decode_sentences(record["decode_z"]) == settings["decoded"]
    assert torch.equal(model.decoder(record["decode_z"])["reconstruction"].argmax(-1), record["decode_ids"])


def test_probabilities_carry_a_gradient_and_are_those_of_the_step(parts):
    """In training too: the same dropout."""
    model = build(parts).train()
    model.cur_beta = 1.0
    out = model(batch_of(model))
    targets = batch_of(model)["data"].to_dense().argmax(-1)
    loss, *_ = model.loss_function(out.recon_x, batch_of(model)["data"], *[torch.zeros(3, NZ)] * 3)
    assert out.recon_x.shape == (3, targets.shape[1], model.decoder.part.vocab_size)
    assert loss.item() == pytest.approx(out.recon_loss.item(), rel=1e-4)
    out.recon_x.square().sum().backward()
    assert model.decoder.projector.weight.grad.abs().sum() > 0 and model.encoder.linear.weight.grad.abs().sum() > 0


def test_one_hot_dense_and_ids_are_one_batch(parts):
    model = build(parts).eval()
    sparse = batch_of(model)["data"]
    model({"data": sparse})  # settles the width
    pad = model.decoder.tokenizer.pad_token_id
    dense = sparse.to_dense()
    ids = torch.where(dense.any(-1), dense.argmax(-1), pad)
    for data in (sparse, ids):
        torch.manual_seed(1)
        out = model({"data": data})
        torch.manual_seed(1)
        assert torch.equal(out.loss, model({"data": sparse}).loss)


def test_seeds_are_torchs_as_in_langvae(parts):
    model = build(parts).eval()
    model(batch_of(model))  # settles the width
    torch.manual_seed(5)
    out = model(batch_of(model))
    torch.manual_seed(5)
    encoded = model.encoder(batch_of(model)["data"])
    want = encoded.embedding + torch.randn(3, NZ) * torch.exp(0.5 * encoded.log_covariance)
    assert torch.equal(out.z, want)


def test_caching_keeps_features(parts):
    model, plain = build(parts), build(parts, caching=False)
    ids = TokenizedDataSet(list(SENTENCES[:3]), model.decoder.tokenizer, MAX_LEN).ids
    first = model.encoder.recode(ids)
    assert len(model.encoder.cache) == 3 and not plain.encoder.cache
    torch.testing.assert_close(first, plain.encoder.recode(ids))
    model.encoder._part[0] = None  # only the cache is left
    assert torch.equal(model.encoder.recode(ids[::-1]), first.flip(0))


def test_save_and_load(parts, tmp_path):
    model = build(parts).eval()
    with pytest.raises(CheckpointError, match="no weights yet"):
        model.save(tmp_path / "model")
    model(batch_of(model))
    model.save(tmp_path / "model")
    model.save(tmp_path / "model")  # its own folder may be replaced
    again = LangVAE.load_from_folder(tmp_path / "model")
    assert not again.training and again.encoder.caching
    for ours, theirs in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
    assert {"decoder.context_hidden.1.bias", "encoder.linear.weight"} <= model.state_dict().keys()
    z = torch.randn(2, NZ)
    assert again.decode_sentences(z) == model.decode_sentences(z)
    as_ours = load_checkpoint(tmp_path / "model")
    assert [text.strip() for text in again.decode_sentences(z)] == as_ours.decode(z, max_new_tokens=MAX_LEN)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError):
        model.save(tmp_path / "foreign")


def test_a_model_of_ours_under_langvaes_names_shares_its_weights(parts, tmp_path):
    build_one = build(parts)
    build_one(batch_of(build_one))
    build_one.save(tmp_path / "model")
    ours = load_checkpoint(tmp_path / "model")
    theirs = LangVAE.from_lmvae(ours)
    with torch.no_grad():
        ours.projector.weight.mul_(0.5)
    assert theirs.decoder.projector is ours.projector and theirs.lmvae is ours
    assert theirs.encoder(batch_of(theirs)["data"]).embedding.shape == (3, NZ)
    with pytest.raises(CheckpointError, match="LangVAE cannot express"):
        LangVAE.from_lmvae(make_model(system="optimus"))


def test_hub(parts, tmp_path, monkeypatch):
    import huggingface_hub

    model = build(parts)
    model(batch_of(model))
    uploaded = {}

    class Api:
        def create_repo(self, name, exist_ok):
            uploaded["repo"] = name

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            import shutil

            shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model.push_to_hf_hub("someone/model")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert (
        uploaded["repo"] == "someone/model" and card.startswith("---\nlanguage: en\n") and "LangVAE.load_from" in card
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path / "hub"))
    z = torch.randn(1, NZ)
    assert LangVAE.load_from_hf_hub("someone/model").decode_sentences(z) == model.eval().decode_sentences(z)

    def absent(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(CheckpointError, match="cannot download someone/model"):
        LangVAE.load_from_hf_hub("someone/model")


WORDS = [["a", "cat", "sleeps"], ["the", "sun", "is", "a", "star"]]
ROLES = [["O", "A", "V"], ["O", "A", "V", "O", "P"]]
KINDS = {"srl": ["O", "A", "V", "P"]}


def annotated(model):
    data = TokenizedAnnotatedDataSet((WORDS, ROLES), model.decoder.tokenizer, MAX_LEN, KINDS)
    return collate_sparse_fn([data[i] for i in range(len(data))])


@pytest.mark.parametrize("conditional", [False, True])
def test_labels_condition_encoder_and_decoder(parts, tmp_path, conditional):
    model = build(parts, conditional=conditional).eval()
    batch = annotated(model)
    out = model(batch)
    labels = len(KINDS["srl"])
    assert model.encoder.annotated and model.encoder.linear.weight.shape[1] == model.encoder.part.width + labels
    assert out.z.shape == (2, NZ + labels * conditional)
    z, pooled = model.encode_z(batch["data"], {"srl": batch["srl"]})
    places = batch["data"].shape[1]
    weights = torch.linspace(0.1, 1, places) / places
    assert torch.allclose(pooled[0], (weights[:, None] * batch["srl"].to_dense()).sum(1))
    assert len(model.decode_sentences(z, pooled)) == 2
    model.save(tmp_path / "model")
    assert LangVAE.load_from_folder(tmp_path / "model").decode_sentences(z, pooled) == model.decode_sentences(z, pooled)
    with pytest.raises(ConfigError, match="number of labels"):
        model(batch_of(model))


def test_what_cannot_be_honoured_is_named(parts):
    tokenizer = build(parts).decoder.tokenizer
    bert, gpt2 = str(parts / "bert"), str(parts / "gpt2")
    for call, name in (
        (lambda: SentenceEncoder(bert, NZ, tokenizer, args={}), "args"),
        (lambda: SentenceDecoder(gpt2, NZ, MAX_LEN, args={}), "args"),
        (lambda: SentenceEncoder(bert, 0, tokenizer), "latent_size"),
        (lambda: SentenceDecoder(gpt2, NZ, -1), "max_len"),
        (lambda: SentenceEncoder(bert, NZ, tokenizer, automodel_preset={"pooling_method": "max"}), "pooling_method"),
        (lambda: SentenceEncoder(bert, NZ, tokenizer, automodel_preset={"cls": "AutoModelForCausalLM"}), "cls"),
        (lambda: SentenceEncoder(bert, NZ, tokenizer, automodel_preset={"layers": 3}), "layers"),
    ):
        with pytest.raises(ConfigError, match=name):
            call()
    good = build(parts)
    for config, name in (
        (VAEConfig(latent_dim=NZ + 1), "latent_size"),
        (VAEConfig(latent_dim=NZ, input_dim=(3, 4)), "input_dim"),
        (VAEConfig(latent_dim=NZ, reconstruction_loss="bce"), "reconstruction_loss"),
        (object(), "latent_dim"),
    ):
        with pytest.raises(ConfigError, match=name):
            LangVAE(config, good.encoder, good.decoder)
    with pytest.raises(ConfigError, match="stays float32"):
        good.to(torch.float16)


def test_parts_of_another_kind_are_refused(parts):
    good = build(parts)
    for encoder, decoder, name in (
        (None, good.decoder, "encoder must be a SentenceEncoder"),
        (good.encoder, torch.nn.Linear(2, 2), "decoder must be a SentenceDecoder"),
        (make_model(), good.decoder, "do not mix"),
    ):
        with pytest.raises(ConfigError, match=name):
            LangVAE(VAEConfig(latent_dim=NZ), encoder, decoder)
    with pytest.raises(CheckpointError, match="missing"):
        LangVAE.load_from_folder(parts / "gpt2")


def test_bad_latents_and_batches(parts):
    model = build(parts)
    with pytest.raises(LatentError, match="wrong shape"):
        model.decode_sentences(torch.zeros(2, NZ + 1))
    with pytest.raises(LatentError, match="finite"):
        model.decode_sentences(torch.full((1, NZ), float("nan")))
    with pytest.raises(ConfigError, match="longer than the decoder"):
        model({"data": torch.ones(2, MAX_LEN + 1, dtype=torch.int64)})
    with pytest.raises(ConfigError, match="number of labels"):
        model({"data": torch.ones(2, 4, dtype=torch.int64), "srl": torch.zeros(2, 4, 2)})
    with pytest.raises(ConfigError, match="one-hot over the sentences"):
        build(parts)({"data": torch.ones(2, 4, dtype=torch.int64), "srl": torch.zeros(2, 3, 2)})


def test_copies_and_devices(parts):
    model = build(parts).eval()
    model(batch_of(model))
    twin = copy.deepcopy(model)
    z = torch.randn(2, NZ)
    assert twin.decode_sentences(z) == model.decode_sentences(z)
    assert twin.lmvae.projector is twin.decoder.projector is not model.decoder.projector
    assert model.to("cpu") is model and model.device == torch.device("cpu")
