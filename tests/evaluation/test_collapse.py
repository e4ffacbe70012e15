"""Posterior collapse is said aloud, and nothing else is."""

from __future__ import annotations

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.evaluation.collapse import collapsed, warn_of_prior
from lmvae_fast.models.posterior import Posterior
from lmvae_fast.testing import SENTENCES, make_model


def test_what_counts_as_collapsed():
    assert collapsed(0.01) and collapsed(5.0, 0)
    assert not collapsed(5.0) and not collapsed(5.0, 3)


def test_evaluation_warns(caplog):
    model = make_model("gpt2").eval()
    lf.evaluate(model, list(SENTENCES), metrics=("elbo", "active_units"))
    assert "collapsed" not in caplog.text
    with torch.no_grad():
        model.posterior_head.weight.zero_()
    lf.evaluate(model, list(SENTENCES), metrics=("elbo", "active_units"))
    assert "collapsed" in caplog.text and "free_bits" in caplog.text


def test_the_prior_as_posterior():
    zeros = torch.zeros(2, 6)
    assert warn_of_prior(Posterior(zeros, zeros), "interpolation")
    assert not warn_of_prior(Posterior(zeros + 2.0, zeros), "interpolation")


def test_a_walk_between_collapsed_posteriors_warns(caplog):
    model = make_model("gpt2").eval()
    lf.interpolate(model, *SENTENCES[:2], steps=3)
    assert "collapsed" not in caplog.text
    with torch.no_grad():
        model.posterior_head.weight.zero_()
    lf.interpolate(model, *SENTENCES[:2], steps=3)
    assert "these sentences: the posterior has collapsed" in caplog.text


@pytest.mark.parametrize(
    "ends", [{"max_steps": 2}, {"max_steps": 9, "eval_every": 1, "early_stop": 1}], ids=["end", "stop"]
)
def test_a_run_that_ends_collapsed_warns(tmp_path, caplog, ends):
    """At its last step, and where it is stopped before."""
    options = {"tensorboard": False, "progress": False, "learning_rate": 1e-20, "beta_schedule": "constant", **ends}
    for name, collapsed_at in (("well", False), ("collapsed", True)):
        model = make_model("gpt2")
        with torch.no_grad():
            model.posterior_head.weight.mul_(0.0 if collapsed_at else 5.0)
        caplog.clear()
        lf.train(model, list(SENTENCES), list(SENTENCES), lf.TrainConfig(output_dir=str(tmp_path / name), **options))
        assert ("training ends, and: the posterior has collapsed" in caplog.text) == collapsed_at, name
