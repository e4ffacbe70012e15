"""The recipe of CVAE with G-Skip by three commands on a tiny decoder: fine-tune it, let it answer, train the CVAE on its
answers; and what each command refuses."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers as hf

import lmvae_fast as lf
from lmvae_fast.testing import tiny_decoder, tiny_tokenizer
from tests.cli.test_cli import as_json, call
from tests.training.helpers import prompt_pairs

QUIET = ("--set", "train.tensorboard=false")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a decoder and prompts with responses."""
    folder = tmp_path_factory.mktemp("recipe")
    tokenizer = tiny_tokenizer()
    tiny_decoder("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "decoder")
    tokenizer.save_pretrained(folder / "decoder")
    lf.PromptDataset(prompt_pairs(12)).write_jsonl(folder / "pairs.jsonl")
    return folder


def test_three_commands(place, capsys):
    sft, answers, cvae = place / "sft", place / "answers.jsonl", place / "cvae"
    done = as_json(
        capsys, "finetune", "--data", place / "pairs.jsonl", "--decoder", place / "decoder", "--output", sft,
        "--max-len", 9, "--max-prompt-len", 20, "--max-steps", 6, "--batch-size", 8, "--lr", "1e-2", *QUIET,
    )  # fmt: skip
    assert done["step"] == 6 and done["best"]["kl"] == 0 and done["best"]["reconstruction"] > 0
    done = as_json(
        capsys, "generate", sft, "--prompts", place / "pairs.jsonl", "--num-samples", 4, "--sample", "--top-p", "0.95",
        "--min-new-tokens", 2, "--output", answers,
    )  # fmt: skip
    assert done["sentences"] == 4 * 12
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    pairs = lf.read_prompts(place / "pairs.jsonl")
    assert [row["prompt"] for row in rows[::4]] == pairs.prompts and [row["sample"] for row in rows[:4]] == [0, 1, 2, 3]
    assert all(row["tokens"] >= 2 for row in rows) and len({row["response"] for row in rows[:4]}) > 1
    done = as_json(
        capsys, "train", "--system", "cvae", "--data", answers, "--decoder", sft / "model", "--output", cvae,
        "--latent-dim", 8, "--max-steps", 3, "--set", "train.accumulation=1", "--set", "model.kl_samples=4", *QUIET,
    )  # fmt: skip
    assert done["step"] == 3
    model = lf.LMVAE.from_pretrained(cvae / "model")
    assert (model.config.max_len, model.config.max_prompt_len, model.config.stage) == (9, 20, 2)  # of the fine-tuning
    tuned = hf.AutoModelForCausalLM.from_pretrained(sft / "model").state_dict()
    ours = model.decoder.model.state_dict()
    assert ours.keys() == tuned.keys() and all(torch.equal(ours[name], tuned[name]) for name in tuned)


def test_a_stage_in_which_the_decoder_trains_begins_from_it_too(place, capsys, tmp_path):
    done = as_json(
        capsys, "train", "--system", "cvae", "--penalty", "FB-VAE", "--data", place / "pairs.jsonl", "--decoder",
        place / "decoder", "--output", tmp_path, "--latent-dim", 8, "--max-len", 9, "--max-steps", 1, "--set",
        "model.stage=1", *QUIET,
    )  # fmt: skip
    assert done["step"] == 1
    config = lf.LMVAE.from_pretrained(tmp_path / "model").config
    assert (config.kl_mode, config.stage, config.output_residual) == ("free_bits", 1, "gskip")


def test_answers_continue_after_a_kill_and_are_the_same(place, capsys, tmp_path):
    ask = (
        "generate", place / "decoder", "--prompts", place / "pairs.jsonl", "--num-samples", 3, "--sample", "--seed", 5,
        "--max-new-tokens", 4, "--batch-size", 2,
    )  # fmt: skip
    call(capsys, *ask, "--output", tmp_path / "a.jsonl")
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(whole[: len(whole) // 2])
    call(capsys, *ask, "--output", tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == whole
    shown = as_json(capsys, *ask)
    assert [(row["index"], row["text"]) for row in shown] == [
        (row["index"], re.split(r"\[PAD\]|<s>", row["response"])[0].strip())
        for row in map(json.loads, whole.decode().splitlines())
    ]


def test_adapters_are_added_to_the_weights_and_stored_by_themselves(place, capsys, tmp_path):
    peft = pytest.importorskip("peft")
    call(
        capsys, "finetune", "--data", place / "pairs.jsonl", "--decoder", place / "decoder", "--output", tmp_path,
        "--max-len", 9, "--max-steps", 2, "--lr", "1e-2", "--lora", *QUIET,
    )  # fmt: skip
    ids = torch.tensor([[1, 5, 9, 20]])
    before = hf.AutoModelForCausalLM.from_pretrained(place / "decoder").eval()
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(ids).logits
    assert not torch.allclose(merged, before(ids).logits, atol=1e-3)
    adapted = peft.PeftModel.from_pretrained(before, tmp_path / "model" / "adapter").eval()
    torch.testing.assert_close(adapted(ids).logits, merged, rtol=1e-4, atol=1e-4)


def test_a_resumed_fine_tuning_is_the_unbroken_one(place, capsys, tmp_path):
    def run(output, steps, *more):
        options = ("--max-len", 9, "--batch-size", 4, "--lr", "1e-2", "--set", "train.save_every=2", *QUIET)
        call(
            capsys, "finetune", "--data", place / "pairs.jsonl", "--decoder", place / "decoder", "--output", output,
            "--max-steps", steps, *options, *more,
        )  # fmt: skip
        return hf.AutoModelForCausalLM.from_pretrained(output / "model").state_dict()

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 4)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000004")
    again = run(tmp_path / "parts", 4, "--resume")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("finetune", "--data", "pairs.jsonl", "--decoder", "decoder", "--set", "data.column=text"), "unknown field"),
        (("finetune", "--decoder", "decoder"), "no data"),
        (("finetune", "--data", "pairs.jsonl", "--decoder", "decoder", "--set", "model.stage=1"), "unknown field"),
        (("finetune", "--data", "pairs.jsonl", "--decoder", "decoder", "--output", "decoder"), "neither empty nor"),
        (("train", "--system", "optimus", "--penalty", "Vanilla", "--data", "corpus"), "prompts with responses"),
        (("generate", "decoder", "--prompts", "pairs.jsonl", "--z", "prior"), "no latent"),
        (("generate", "decoder", "--prompts", "pairs.jsonl", "--stop", "the sun is"), "one token"),
        (("generate", "decoder", "--prompts", "pairs.jsonl", "--num-samples", "4"), "only act when tokens are drawn"),
        (("generate", "decoder"), "one source of latents"),
    ],
)
def test_what_is_refused(place, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    assert message in " ".join(call(capsys, *arguments, code=3)[1].split())


def test_a_model_of_prompts_answers_from_no_latent_by_default(place, capsys, tmp_path):
    lf.testing.make_model("llama", system="cvae", latent_dim=6, queries=2).save_pretrained(tmp_path / "model")
    ask = ("generate", tmp_path / "model", "--prompts", place / "pairs.jsonl")
    assert "never chosen silently" in call(capsys, *ask, code=3)[1]
    drawn = as_json(capsys, *ask, "--z", "prior", "--num-samples", 3)
    assert len(drawn) == 36 and drawn[0]["prompt"] == drawn[2]["prompt"] != drawn[3]["prompt"]
    assert len({row["text"] for row in drawn[:3]}) > 1  # each of a latent of its own
    zero = as_json(capsys, *ask, "--z", "zero")
    assert len(zero) == 12
    known = as_json(capsys, "generate", tmp_path / "model", "--texts", place / "pairs.jsonl")
    pairs = lf.read_prompts(place / "pairs.jsonl")
    assert [row["prompt"] for row in known] == [pair.prompt for pair in pairs]
    sentences = tmp_path / "sentences"
    lf.testing.make_model().save_pretrained(sentences)
    assert "writes sentences" in call(capsys, "generate", sentences, "--prompts", place / "pairs.jsonl", code=3)[1]


def test_a_model_of_prompts_is_measured_within_prompts_and_by_its_answers(place, capsys, tmp_path):
    pytest.importorskip("rouge_score")
    lf.testing.make_model("llama", system="cvae", latent_dim=6, queries=2).save_pretrained(tmp_path / "model")
    call(
        capsys, "generate", tmp_path / "model", "--texts", place / "pairs.jsonl", "--min-new-tokens", 2, "--output",
        tmp_path / "posterior.jsonl",
    )  # fmt: skip
    found = as_json(capsys, "eval", tmp_path / "model", place / "pairs.jsonl")
    pairs = lf.read_prompts(place / "pairs.jsonl")
    assert found["within_prompts"]["prompts"] == len(pairs.prompts) and found["sentences"] == len(pairs)
    assert 0 <= found["within_prompts"]["mutual_information"] <= 2
    several = lf.PromptDataset([row for _, rows in pairs.by_prompt() if len(rows) > 1 for row in rows])
    several.write_jsonl(tmp_path / "several.jsonl")
    ask = ("eval", tmp_path / "model", tmp_path / "several.jsonl", "--metrics", "elbo")
    found = as_json(capsys, *ask, "--answers", tmp_path / "posterior.jsonl", "--paired")
    assert found["answers"].keys() >= {"self_bleu", "rouge_lsum"} and "within_prompts" not in found
    assert "within prompts" in call(capsys, *ask, "--answers", tmp_path / "posterior.jsonl", "--paired")[0]
    lf.PromptDataset([lf.PromptResponse("another", " one")] * 2).write_jsonl(tmp_path / "other.jsonl")
    assert "answers not all" in call(capsys, *ask, "--answers", tmp_path / "other.jsonl", code=3)[1]
    lf.testing.make_model().save_pretrained(tmp_path / "sentences")
    (tmp_path / "s.txt").write_text("the sun is a star\nwater is a liquid\n")
    for more in (("--answers", tmp_path / "other.jsonl"), ("--metrics", "within_prompts")):
        assert call(capsys, "eval", tmp_path / "sentences", tmp_path / "s.txt", *more, code=3)[1]
