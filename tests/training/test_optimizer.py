"""The projector's weight updated in the backward pass: the same training as AdamW over everything."""

import pytest
import torch
from safetensors.torch import load_file

from lmvae_fast.config import TrainConfig
from lmvae_fast.errors import NumericalError
from lmvae_fast.testing import make_model
from lmvae_fast.training import Callback
from lmvae_fast.training.loop import Trainer
from lmvae_fast.training.optimizer import Optimizer
from tests.training.helpers import StopAt, plain_sentences, run, settings

# What each adds: dropout's mask in the fused gradient; micro-batches of unequal size; a GELU layer before the map and a
# bf16 memory, for few steps (a weight's last bit may turn a bf16 rounding, which later steps amplify on both sides
# alike); the sequential objective over greedy tokens.
CASES = {
    "dropout": ({"projector_dropout": 0.2}, {}),
    "accumulation": ({}, {"batch_size": 3, "accumulation": 3, "weight_decay": 0.1}),
    "mlp bf16": ({"projector": "mlp", "projector_hidden": 5}, {"precision": "bf16", "max_steps": 3, "log_every": 1}),
    "free running": ({"free_running": True, "objective": "langvae-0.6"}, {"grad_clip": None}),
}
OPTIONS = {"max_steps": 12, "learning_rate": 0.01, "schedule": "linear", "evaluated": False}


def trained(folder, case, **changes):
    model = make_model(max_len=12, **CASES[case][0])
    return model, run(folder, model=model, **{**OPTIONS, **CASES[case][1], **changes})


@pytest.mark.parametrize("case", CASES)
def test_weights_and_state_equal_those_of_one_adamw(tmp_path, case):
    fused, one = trained(tmp_path / "fused", case)
    plain, two = trained(tmp_path / "plain", case, fused_projector_update=False)
    start = make_model(max_len=12, **CASES[case][0])
    for (name, got), (_, want), (_, before) in zip(
        fused.named_parameters(), plain.named_parameters(), start.named_parameters(), strict=True
    ):
        if want.requires_grad:
            moved = (want - before).norm()
            assert moved > 0, name
            # AdamW divides by the gradient's own size, so rounding shows where a gradient is near zero.
            assert (got - want).norm() < 1e-3 * moved, name
    for group in ("optimizer", "model"):
        first, second = (load_file(result.checkpoint / f"{group}.safetensors") for result in (one, two))
        assert first.keys() == second.keys()
    norms = [[record["grad_norm"] for record in result.history] for result in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("system", [{}, {"system": "optimus"}, {"system": "lmvae", "lora_rank": 2}], ids=str)
def test_a_step_counts_as_a_change_of_all_that_trains(tmp_path, system):
    """By a tensor's version others see that what they made from it is old: a fused AdamW does not count its own writes."""
    if system.get("lora_rank"):
        pytest.importorskip("peft")
    versions = []

    class Watch(Callback):
        def on_step(self, run):
            versions.append([weight._version for weight in run.model.parameters() if weight.requires_grad])

    run(tmp_path, Watch(), model=make_model(max_len=12, **system), max_steps=2, evaluated=False)
    assert versions[0] and all(after > before for before, after in zip(*versions, strict=True))


def test_a_head_that_a_run_has_spoilt_is_noticed():
    """It was looked at before, when it was sound."""
    model = make_model(system="optimus")
    decoder = model.decoder
    decoder.check_head()
    head = decoder.head_weight
    head.grad = torch.full_like(head, float("nan"))
    optimizer = Optimizer(model, {"head": head}, TrainConfig(output_dir="unused"))
    optimizer.step(torch.tensor(1.0))
    with pytest.raises(NumericalError, match="head holds NaN"):
        decoder.check_head()


def test_the_weight_never_has_a_gradient_and_the_projector_is_given_back(tmp_path):
    class Watch(Callback):
        def on_step(self, run):
            assert run.model.projector.fused is not None
            assert run.model.projector.weight.grad is None

    model = make_model(max_len=12)
    before = model.projector.weight.clone()
    run(tmp_path, Watch(), model=model, max_steps=2)
    assert model.projector.fused is None
    assert not torch.equal(model.projector.weight, before)


def test_a_gradient_that_is_not_finite_is_found_before_the_update(tmp_path):
    model = make_model(max_len=12)
    trainer = Trainer(model, plain_sentences(60), None, settings(tmp_path), ())
    before = model.projector.weight.clone()

    def poison(*_):
        fused = trainer.state.optimizer.fused
        fused._kept = [(grad * float("nan"), *rest) for grad, *rest in fused._kept]

    model.posterior_head.weight.register_hook(poison)  # runs after the memory's gradient was kept
    with pytest.raises(NumericalError, match="gradient norm of step 1"):
        trainer.run()
    assert torch.equal(model.projector.weight, before)
    assert model.projector.fused is None


def test_a_run_goes_on_with_the_other_update(tmp_path):
    options = {**OPTIONS, "log_every": 3}
    run(tmp_path, StopAt(6), model=make_model(max_len=12), **options, fused_projector_update=False)
    with pytest.warns(UserWarning, match="fused_projector_update"):
        result = run(tmp_path, model=make_model(max_len=12), resume=True, **options)
    whole = run(tmp_path / "whole", model=make_model(max_len=12), **options)
    one, two = (load_file(r.checkpoint / "optimizer.safetensors") for r in (result, whole))
    assert one["projector.weight/step"] == two["projector.weight/step"] == 12
    torch.testing.assert_close(one["projector.weight/exp_avg"], two["projector.weight/exp_avg"], rtol=1e-3, atol=1e-6)


def test_what_cannot_be_fused_is_not(tmp_path):
    def trainer(model, **changes):
        return Trainer(model, plain_sentences(20), None, settings(tmp_path, **changes), ()).state.optimizer

    assert trainer(make_model(max_len=12)).fused is not None
    assert trainer(make_model(max_len=12), precision="fp16").fused is None
    assert trainer(make_model(system="optimus", max_len=12)).fused is None
    frozen = make_model(max_len=12)
    frozen.projector.weight.requires_grad_(False)
    assert trainer(frozen).fused is None
