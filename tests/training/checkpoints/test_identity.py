"""A resumed run equals an unbroken one, bit for bit."""

import warnings

import pytest

from lmvae_fast.errors import CheckpointError, ConfigError, DataError, OutputError
from lmvae_fast.training import train
from lmvae_fast.training.checkpoints import folder as checkpoint
from tests.training.fake_model import FakeModel, sentences
from tests.training.helpers import StopAt, assert_same_checkpoint, assert_same_history, run, settings, untimed

RECIPES = {
    "plain": {},
    "accumulation": {"batch_size": 3, "accumulation": 3},
    # evaluations every 3 steps and no patience: the plateau's factor moves during the run
    "plateau": {"schedule": "plateau", "plateau_patience": 0, "eval_every": 3, "learning_rate": 0.3},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16", "beta_schedule": "constant", "grad_clip": None},
    "evaluation between": {"eval_every": 2, "monitor": "loss", "early_stop": 50, "keep_checkpoints": 1},
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of an uninterrupted run of each recipe, made once."""
    made = {}

    def folder(recipe):
        if recipe not in made:
            made[recipe] = tmp_path_factory.mktemp("unbroken")
            run(made[recipe], **RECIPES[recipe])
        return made[recipe]

    return folder


# At the start, amid an epoch and a log window, at an epoch's end, just before the end; and several times.
@pytest.mark.parametrize("stops", [(1,), (11,), (8,), (20,), (2, 3, 13, 17)], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_interrupted_equals_unbroken(tmp_path, unbroken, recipe, stops):
    for stop in stops:
        result = run(tmp_path, StopAt(stop), resume=True, **RECIPES[recipe])
        assert (result.stop_reason, result.step) == ("test", stop)
    result = run(tmp_path, model=FakeModel(seed=9), resume=True, **RECIPES[recipe])
    expected = unbroken(recipe)
    assert result.stop_reason == "completed"
    final = checkpoint.complete(expected / "checkpoints")[0]
    assert_same_checkpoint(result.checkpoint, final)
    assert_same_history(tmp_path, expected)


def test_the_recipes_use_what_they_test(unbroken):
    """Otherwise the tests above could pass without testing anything."""
    from lmvae_fast.training.callbacks import read_records

    rates = {
        record["learning_rate"]
        for record in read_records(unbroken("plateau") / "metrics.jsonl")[1:]
        if "learning_rate" in record
    }
    assert len(rates) > 1
    records = read_records(unbroken("plain") / "metrics.jsonl")
    assert len({record["beta"] for record in records}) > 1
    last = checkpoint.load(checkpoint.complete(unbroken("fp16") / "checkpoints")[0])
    assert last.state["scaler"]["scale"] > 1


def test_dropout_and_noise_matter(tmp_path):
    """Two runs with other seeds of torch differ, so the equality above is not that of a deterministic model."""
    run(tmp_path / "a")
    run(tmp_path / "b", seed=1)
    with pytest.raises(AssertionError):
        assert_same_history(tmp_path / "a", tmp_path / "b")


def test_evaluation_leaves_training_alone(tmp_path):
    run(tmp_path / "a", evaluated=False)
    run(tmp_path / "b", eval_every=1)
    assert_same_checkpoint(tmp_path / "a/checkpoints/step-00000024", tmp_path / "b/checkpoints/step-00000024")


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    first = run(tmp_path)
    again = run(tmp_path, resume=True)
    assert again.checkpoint == first.checkpoint
    assert untimed(again.history) == untimed(first.history)
    assert (again.step, again.tokens, again.seconds) == (first.step, first.tokens, first.seconds)


def test_resume_true_starts_a_fresh_run(tmp_path):
    assert run(tmp_path, resume=True).stop_reason == "completed"


def test_resume_from_a_named_checkpoint_sets_newer_ones_aside(tmp_path):
    result = run(tmp_path, save_every=6, keep_checkpoints=4)
    folder = tmp_path / "checkpoints"
    again = run(tmp_path, save_every=6, keep_checkpoints=1, resume=str(folder / "step-00000012"))
    assert_same_checkpoint(again.checkpoint, folder / "aside-step-00000024")
    assert untimed(again.history) == untimed(result.history)
    assert checkpoint.of_step(folder, 18) is None


def test_resume_into_another_folder(tmp_path):
    run(tmp_path / "a", StopAt(9))
    run(tmp_path / "c")
    again = run(tmp_path / "b", resume=str(tmp_path / "a"))
    assert_same_checkpoint(again.checkpoint, tmp_path / "c/checkpoints/step-00000024")
    with pytest.raises(OutputError, match="already holds the checkpoints"):
        run(tmp_path / "c", resume=str(tmp_path / "a"))


def test_a_damaged_newest_checkpoint_falls_back(tmp_path):
    run(tmp_path / "unbroken", save_every=6)
    run(tmp_path / "run", StopAt(14), save_every=6)
    newest = tmp_path / "run/checkpoints/step-00000014/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="skipping a damaged checkpoint.*step-00000014"):
        result = run(tmp_path / "run", save_every=6, keep_checkpoints=1, resume=True)
    assert_same_checkpoint(result.checkpoint, tmp_path / "unbroken/checkpoints/step-00000024")
    with pytest.raises(CheckpointError, match="truncated"):
        run(tmp_path / "run", resume=str(tmp_path / "run/checkpoints/aside-step-00000014"))


def test_starting_anew_on_top_of_a_run_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(OutputError, match="resume=True"):
        run(tmp_path)


def test_other_recipe_data_or_model_is_refused(tmp_path):
    run(tmp_path, StopAt(4))
    with pytest.raises(ConfigError, match=r"batch_size: 8 -> 4.*restore these"):
        run(tmp_path, resume=True, batch_size=4)
    with pytest.raises(CheckpointError, match="another model: dropout"):
        run(tmp_path, resume=True, model=FakeModel(dropout=0.3))
    with pytest.raises(CheckpointError, match="another model: weights of the frozen parts"):
        run(tmp_path, resume=True, model=FakeModel(encoder_seed=1))
    with pytest.raises(DataError, match="other training sentences"):
        train(FakeModel(), sentences(59), sentences(20, seed=1), settings(tmp_path, resume=True))
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        run(tmp_path / "other", resume=str(tmp_path / "absent"))


def test_a_longer_run_is_allowed_and_said(tmp_path):
    run(tmp_path, schedule="constant", beta_schedule="constant")
    with pytest.warns(UserWarning, match="epochs: 3 -> 4"):
        result = run(tmp_path, schedule="constant", beta_schedule="constant", epochs=4, resume=True)
    assert result.step == 32


def test_what_does_not_matter_may_change(tmp_path):
    run(tmp_path, StopAt(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, resume=True, save_every=3, log_every=2, keep_checkpoints=3)
