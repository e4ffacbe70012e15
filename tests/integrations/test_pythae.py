"""pythae's samplers, training pipeline and AutoModel on a model of ours."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from lmvae_fast.errors import CheckpointError, ConfigError, DataError
from lmvae_fast.testing import SENTENCES, make_model

if importlib.util.find_spec("pythae") is None:
    pytest.skip("pythae is not installed (make test-peers runs these)", allow_module_level=True)

from pythae.models import VAE, AutoModel, BaseAE, VAEConfig
from pythae.pipelines import TrainingPipeline
from pythae.samplers import (
    GaussianMixtureSampler,
    GaussianMixtureSamplerConfig,
    MAFSampler,
    MAFSamplerConfig,
    NormalSampler,
)
from pythae.trainers import BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback

from lmvae_fast.integrations import pythae as ours


@pytest.fixture
def model():
    return make_model().eval()


def test_an_lmvae_is_a_base_ae(model):
    wrapped, data = ours.as_pythae(model), ours.sentences(model, SENTENCES)
    assert isinstance(wrapped, BaseAE) and wrapped.latent_dim == 6
    out = wrapped({"data": data.data[:3]})
    torch.manual_seed(0)
    want = model(list(SENTENCES[:3]))
    torch.manual_seed(0)
    got = wrapped({"data": data.data[:3].float()})
    assert torch.equal(got.loss, want.loss) and "recon_x" not in got
    assert out.recon_x.shape == (3, 9) and out["recon_x"] is out.recon_x
    mu = model.encode(SENTENCES[:3]).mu
    assert torch.equal(wrapped.encoder(data.data[:3]).embedding, mu)
    decoded = ours.texts(model, wrapped.decoder(mu).reconstruction)
    assert decoded == [text.strip() for text in model.decode(mu, max_new_tokens=9)]


@pytest.mark.parametrize("kind", ["normal", "mixture", "maf"])
def test_samplers(model, kind):
    wrapped = ours.as_pythae(model)
    data = ours.sentences(model, SENTENCES).data
    if kind == "normal":
        sampler = NormalSampler(wrapped)
    elif kind == "mixture":
        sampler = GaussianMixtureSampler(wrapped, GaussianMixtureSamplerConfig(n_components=2))
        sampler.fit(data)
    else:
        sampler = MAFSampler(wrapped, MAFSamplerConfig(n_made_blocks=1, n_hidden_in_made=1, hidden_size=8))
        sampler.fit(data, training_config=BaseTrainerConfig(num_epochs=1, output_dir="."))
    ids = sampler.sample(num_samples=5, batch_size=3)
    assert ids.shape == (5, 9) and len(ours.texts(model, ids)) == 5


def test_its_training_pipeline_trains_saves_and_calls_back(model, tmp_path):
    class Count(TrainingCallback):
        steps = 0

        def on_train_step_end(self, training_config, **kwargs):
            self.steps += 1

    before, count = model.projector.weight.detach().clone(), Count()
    config = BaseTrainerConfig(
        output_dir=str(tmp_path), num_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, steps_saving=1,
        no_cuda=True,
    )  # fmt: skip
    data = ours.sentences(model, SENTENCES)
    TrainingPipeline(model=ours.as_pythae(model), training_config=config)(data, data, callbacks=[count])
    assert count.steps == 4 and not torch.equal(before, model.projector.weight)
    final = next(tmp_path.glob("*/final_model"))
    assert not list(final.rglob("*.pkl")) and not (final / "model.pt").exists()
    again = ours.PythaeLMVAE.load_from_folder(str(final))
    assert again.lmvae.config.latent_dim == 6
    ours.register()
    ours.register()
    assert isinstance(AutoModel.load_from_folder(str(final)), ours.PythaeLMVAE)
    with pytest.raises(FileNotFoundError):
        AutoModel.load_from_folder(str(tmp_path / "nothing"))


def test_what_is_refused(model, tmp_path):
    wrapped = ours.as_pythae(model)
    for data in (torch.rand(2, 9), torch.zeros(2, 3, 4), torch.full((1, 9), 10**6), torch.full((1, 9), 2)):
        with pytest.raises(DataError):
            wrapped({"data": data})
    with pytest.raises(ConfigError, match="without annotations"):
        ours.as_pythae(make_model(annotations=("a", "b")))
    with pytest.raises(ConfigError, match=r"pass its \.lmvae"):
        ours.as_pythae(wrapped)
    with pytest.raises(ConfigError, match=r"pythae\.models\.\S*VAE"):
        ours.as_pythae(VAE(VAEConfig(input_dim=(9,), latent_dim=2)))
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="never loaded"):
        ours.PythaeLMVAE.load_from_folder(str(tmp_path))
