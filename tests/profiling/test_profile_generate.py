"""Profiles of decoding: parts that add up, FLOPs known by hand, a record for every batch size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmvae_fast.cli.app import app
from lmvae_fast.config import GenerationConfig, LMVAEConfig
from lmvae_fast.data import generate_corpus
from lmvae_fast.errors import ConfigError
from lmvae_fast.files import MARK
from lmvae_fast.generation import decode_rows as rows
from lmvae_fast.models.decoder.cache import LatentCache
from lmvae_fast.profiling import generate as profiling
from lmvae_fast.profiling.parts import DECODING_PARTS
from lmvae_fast.profiling.presets import random_model
from tests.cli.test_cli import call

TEXTS = list(generate_corpus(64, seed=0).texts)
LIMITS = {
    "copy_bytes_per_s": 1e10, "matmul_float32_flops_per_s": 1e11, "matmul_bfloat16_flops_per_s": 1e11
}  # fmt: skip
TOKENS = 6


@pytest.fixture(autouse=True)
def _no_long_measurements(monkeypatch):
    monkeypatch.setattr(profiling, "machine_limits", lambda *_: LIMITS)


@pytest.fixture(scope="module")
def model():
    return random_model("tiny", "tiny", LMVAEConfig(latent_dim=8, max_len=12), TEXTS).eval()


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_p": 0.9, "seed": 1}])
def test_profile_of_batch_sizes(tmp_path, model, options):
    config, eos = GenerationConfig(max_new_tokens=TOKENS, **options), model.decoder.tokenizer.eos_token_id
    functions = (LatentCache.attend, LatentCache.place, rows.sample_token)
    found = profiling.profile_generate(model, config, batches=(1, 3), folder=tmp_path, seconds=0.0)
    json.dumps(found)
    assert [row["batch"] for row in found["batches"]] == [1, 3]
    weights = [m.weight for m in model.decoder.body.modules() if type(m).__name__ == "Conv1D"]
    head = model.decoder.head_weight.numel()
    body = sum(weight.numel() for weight in weights)
    assert found["weight_bytes"] == 4 * (body + head)
    for row in found["batches"]:
        batch = row["batch"]
        assert row["speedup"] > 0
        for name, side in row["sides"].items():
            parts = {part["part"]: part for part in side["parts"]}
            assert list(parts) == list(DECODING_PARTS)
            assert sum(part["share"] for part in side["parts"]) == pytest.approx(1.0)
            # nothing ends early: every step multiplies every row by every weight
            assert parts["products"]["flops"] == 2 * batch * TOKENS * body
            assert parts["head"]["flops"] == 2 * batch * TOKENS * head
            # slots that no token will see are not made
            assert (
                parts["latent_kv"]["flops"] == 2 * batch * model.projector.weight.numel() * TOKENS // model.config.slots
            )
            assert parts["attention"]["flops"] > 0
            # greedy decoding has the head say the token
            assert all(part["seconds"] > 0 for part in side["parts"] if options or part["part"] != "choosing")
            assert side["flops_per_step"] == pytest.approx((side["flops"] - parts["latent_kv"]["flops"]) / TOKENS)
            assert side["sentences_per_s"] == pytest.approx(batch / side["seconds"])
            assert side["tokens_per_s"] == pytest.approx(TOKENS * side["sentences_per_s"])
            assert side["first_token_seconds"] > 0
            assert side["peak_extra_bytes"] > 0
            events = json.loads((tmp_path / f"trace-{name}-{batch}.json").read_text())["traceEvents"]
            assert {"part:products", "part:attention"} <= {event.get("name") for event in events}
    # nothing stays changed
    assert model.decoder.tokenizer.eos_token_id == eos
    assert functions == (LatentCache.attend, LatentCache.place, rows.sample_token)
    assert "inject" not in vars(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_conditional_decoder_and_no_reference(tmp_path):
    config = LMVAEConfig(latent_dim=8, max_len=12, annotations=("V", "ARG0"), conditional_decoder=True)
    model = random_model("tiny", "tiny", config, TEXTS).eval()
    found = profiling.profile_generate(
        model, GenerationConfig(max_new_tokens=2), batches=(2,), folder=tmp_path, seconds=0.0, reference=False
    )
    assert list(found["batches"][0]["sides"]) == ["fast"]
    assert "speedup" not in found["batches"][0]


@pytest.mark.parametrize(
    ("config", "batches", "says"),
    [
        (GenerationConfig(), (), "sizes of at least 1"),
        (GenerationConfig(), (4, 0), "sizes of at least 1"),
        (GenerationConfig(max_new_tokens=99), (1,), "max_len"),
        (GenerationConfig(num_beams=2), (1,), "beam search"),
    ],
)
def test_what_cannot_be_profiled(tmp_path, model, config, batches, says):
    with pytest.raises(ConfigError, match=says):
        profiling.profile_generate(model, config, batches=batches, folder=tmp_path)


def test_command_writes_report_record_and_traces(tmp_path):
    out = tmp_path / "profile"
    options = ["--tiny", "--batch-sizes", "1,2", "--latent-dim", "8", "--max-len", "8", "--precision", "bf16"]
    result = CliRunner().invoke(
        app, ["profile", "generate", *options, "--seconds", "0", "--output", str(out), "--json"]
    )
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout[result.stdout.index("{") :])
    assert printed["matrix_dtype"] == "bfloat16"
    assert printed["batches"][1]["sides"]["fast"]["sentences_per_s"] > 0
    page = Path(printed["report"]).read_text()
    assert page.count("<svg") == 3
    traces = {f"trace-{side}-{batch}.json" for side in ("fast", "reference") for batch in (1, 2)}
    assert {path.name for path in out.iterdir()} == {MARK, "report.html", "profile.json", *traces}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batch-sizes", "1,x"], "numbers"),
        (["--precision", "fp8"], "fp32, bf16"),
        (["--top-p", "2", "--sample"], "top_p"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, says):
    _, message = call(capsys, "profile", "generate", "--tiny", *arguments, code=3)
    assert says in " ".join(message.split())
