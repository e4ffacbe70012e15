"""Does the real LangVAE 0.6.13 load what we write, and does it then compute what we compute?

Makes a virtual environment of its own for LangVAE (it needs transformers 4.48) in ``.venv-langvae``, once. From each
golden checkpoint we load a model, write it with ``save_checkpoint``, and let LangVAE read that folder back, decode, and
take a training step on sentences of unequal length (the golden records have no padding). A second model, written with
random weights, has labels in encoder and decoder. A third consists of tiny parts saved by transformers 5, which
LangVAE's transformers 4.48 can read only as the copies that ``save_checkpoint`` makes.

usage: python -m tests.peers.check_langvae_loads            (or ``make test-peers``)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.common.langvae_environment import langvae_python
from lmvae_fast.config import LMVAEConfig
from lmvae_fast.integrations.langvae import load_checkpoint, load_reference, save_checkpoint
from lmvae_fast.integrations.langvae.files import read_folder, write_folder
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.reference.langvae import pool_annotations
from lmvae_fast.testing import tiny_decoder, tiny_encoder, tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
SENTENCES = ["ice", "a cat is a", "the sun", "plants need light to grow"]
RECORD = REPOSITORY / "tests" / "golden" / "padded.json"
RECORDING: dict[str, dict] | None = None  # filled by --record
NEW_DECODERS = ("gpt2", "llama", "qwen2", "gpt_neox")
BETA, TARGET_KL = 0.7, 0.5


def run_langvae(checkpoint: Path, inputs: dict, sentences: list[str], folder: Path) -> tuple[dict, list[str] | None]:
    """What LangVAE computes from a checkpoint folder: tensors, and the decoded sentences."""
    save_file({name: value.contiguous() for name, value in inputs.items()}, folder / "inputs.safetensors")
    (folder / "sentences.json").write_text(json.dumps(sentences))
    outputs = folder / "outputs.safetensors"
    child = Path(__file__).with_name("langvae_child.py")
    files = [checkpoint, folder / "inputs.safetensors", folder / "sentences.json", outputs]
    run = subprocess.run(
        [str(langvae_python()), str(child), *map(str, files)], capture_output=True, text=True, cwd=folder
    )
    if run.returncode:
        raise RuntimeError(f"LangVAE failed on {checkpoint}:\n{run.stderr[-3000:]}")
    decoded = Path(str(outputs) + ".json")
    return load_file(outputs), json.loads(decoded.read_text()) if decoded.exists() else None


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def gradients(model) -> dict[str, torch.Tensor]:
    """Gradients of the eager reference under LangVAE's parameter names."""
    names = {"encoder.linear.weight": model.linear.weight}
    names |= {f"decoder.{name}": value for name, value in model.named_parameters() if name.startswith("context_hidden")}
    return {name: parameter.grad for name, parameter in names.items()}


def compare(reference, theirs: dict, eps: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, float | bool]:
    """Differences of the eager reference from LangVAE on the same sentences and noise."""
    annotations = None if labels is None else pool_annotations(labels)
    ours = reference.loss(SENTENCES, beta=BETA, target_kl=TARGET_KL, eps=eps, annotations=annotations)
    reference.zero_grad()
    ours.loss.backward()
    return {
        "target ids equal": torch.equal(ours.target_ids, theirs["target_ids"]),
        "padded places": int((ours.target_ids == reference.pad_token_id).sum()),
        "probabilities, max abs": (ours.probabilities - theirs["probabilities"]).abs().max().item(),
        "loss, relative": abs(ours.loss.item() / theirs["loss"].item() - 1),
        "kl, relative": abs(ours.kl.item() / theirs["kl_loss"].item() - 1),
        "gradients, worst relative": max(
            relative(gradient, theirs[f"grad.{name}"]) for name, gradient in gradients(reference).items()
        ),
    }


def check_golden(golden: Path, folder: Path) -> dict[str, float | bool]:
    """One golden checkpoint: loaded, written by us, read by LangVAE."""
    model = load_checkpoint(
        golden / "langvae_checkpoint", objective="langvae-0.6", free_running=True, kl_target=TARGET_KL
    )
    written = save_checkpoint(model, folder / "written")
    record = load_file(golden / "record.safetensors")
    generator = torch.Generator().manual_seed(3)
    eps = torch.randn(len(SENTENCES), model.config.latent_dim, generator=generator)
    inputs = {
        "z": record["decode_z"],
        "eps": eps,
        "beta": torch.tensor([BETA]),
        "target_kl": torch.tensor([TARGET_KL]),
    }
    theirs, decoded = run_langvae(written, inputs, SENTENCES, folder)
    if RECORDING is not None:
        RECORDING[golden.name] = padded_record(theirs, eps)
    reference = load_reference(written)
    figures = compare(reference, theirs, eps)
    figures["decoded ids equal"] = torch.equal(theirs["decode_ids"], record["decode_ids"])
    figures["decoded sentences equal"] = decoded == reference.decode(record["decode_z"])

    batch = model.make_batch(model.tokenize(SENTENCES))
    out = model(batch, beta=BETA, eps=eps)
    out.loss.backward()
    figures["LMVAE loss, relative"] = abs(out.loss.item() / theirs["loss"].item() - 1)
    layers = range(model.projector.weight.shape[0])
    figures["LMVAE gradients, worst relative"] = max(
        relative(model.posterior_head.weight.grad, theirs["grad.encoder.linear.weight"]),
        *(relative(model.projector.weight.grad[i], theirs[f"grad.decoder.context_hidden.{i}.weight"]) for i in layers),
        *(relative(model.projector.bias.grad[i], theirs[f"grad.decoder.context_hidden.{i}.bias"]) for i in layers),
    )
    return figures


def padded_record(theirs: dict, eps: torch.Tensor) -> dict:
    """LangVAE's own figures on the padded batch, small enough to keep beside the tests."""
    return {
        "sentences": SENTENCES,
        "eps": eps.tolist(),
        "beta": BETA,
        "target_kl": TARGET_KL,
        "target_ids": theirs["target_ids"].tolist(),
        **{name: theirs[name].item() for name in ("loss", "recon_loss", "kl_loss")},
        "gradient_norms": {
            name.removeprefix("grad."): value.norm().item()
            for name, value in theirs.items()
            if name.startswith("grad.")
        },
    }


def check_labels(golden: Path, folder: Path) -> dict[str, float | bool]:
    """A conditional model: three labels per word, in encoder and decoder, random weights."""
    plain = read_folder(golden / "langvae_checkpoint")
    generator = torch.Generator().manual_seed(4)

    def wider(weight: torch.Tensor) -> torch.Tensor:
        extra = 0.3 * torch.randn(*weight.shape[:-1], 3, generator=generator)
        return torch.cat([weight, extra], dim=-1)

    contents = type(plain)(
        **{
            **plain.__dict__,
            "conditional": True,
            "posterior_weight": wider(plain.posterior_weight),
            "projector_weight": wider(plain.projector_weight),
        }
    )
    written = write_folder(contents, folder / "conditional")
    reference = load_reference(written)
    steps = reference.target_ids(SENTENCES).shape[1]
    labels = torch.nn.functional.one_hot(torch.randint(3, (len(SENTENCES), steps), generator=generator), 3).float()
    labels[0, 2:] = 0  # a short sentence has no labels past its words
    eps = torch.randn(len(SENTENCES), plain.latent_dim, generator=generator)
    inputs = {
        "z": torch.zeros_like(eps),  # not decoded: LangVAE would want labels for it too
        "eps": eps,
        "beta": torch.tensor([BETA]),
        "target_kl": torch.tensor([TARGET_KL]),
        "labels": labels,
    }
    theirs, _ = run_langvae(written, inputs, SENTENCES, folder)
    return compare(reference, theirs, eps, labels)


def check_new_parts(decoder: str, folder: Path) -> dict[str, float | bool]:
    """Encoder and decoder saved by the transformers of this environment; a rotary base that is not the default."""
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    for name, part in (
        ("encoder", tiny_encoder("bert", vocab_size=size)),
        ("decoder", tiny_decoder(decoder, layers=2, vocab_size=size)),
    ):
        part.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    config = folder / "decoder" / "config.json"
    values = json.loads(config.read_text())
    if "rope_parameters" in values:
        values["rope_parameters"]["rope_theta"] = 50.0
        config.write_text(json.dumps(values))
    model = LMVAE(
        LMVAEConfig(encoder=str(folder / "encoder"), decoder=str(folder / "decoder"), latent_dim=8, max_len=10)
    )
    written = save_checkpoint(model, folder / "written")
    generator = torch.Generator().manual_seed(5)
    eps = torch.randn(len(SENTENCES), 8, generator=generator)
    z = torch.randn(3, 8, generator=generator)
    inputs = {"z": z, "eps": eps, "beta": torch.tensor([BETA]), "target_kl": torch.tensor([TARGET_KL])}
    theirs, decoded = run_langvae(written, inputs, SENTENCES, folder)
    reference = load_reference(written)
    figures = compare(reference, theirs, eps)
    figures["decoded ids equal"] = torch.equal(theirs["decode_ids"], reference.decode_ids(z))
    figures["decoded sentences equal"] = decoded == reference.decode(z)
    return figures


LIMITS = {"probabilities, max abs": 2e-5, "loss, relative": 1e-5, "kl, relative": 1e-5}


def failures(figures: dict[str, float | bool]) -> list[str]:
    """The figures that miss their limit: equality, 2e-5 (probabilities), 1e-5 (losses), 1e-4 (gradients)."""
    bad = []
    for name, value in figures.items():
        if name == "padded places":
            good = value > 0  # else the padding was not tested
        elif isinstance(value, bool):
            good = value
        else:
            good = value <= LIMITS.get(name.removeprefix("LMVAE "), 1e-4)
        if not good:
            bad.append(f"{name}: {value}")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, default=REPOSITORY.parent / "shared" / "golden")
    parser.add_argument("--record", action="store_true", help=f"write LangVAE's padded figures to {RECORD.name}")
    arguments = parser.parse_args()
    global RECORDING
    RECORDING = {} if arguments.record else None
    checks = [
        (check, golden) for golden in sorted(arguments.golden.iterdir()) for check in (check_golden, check_labels)
    ]
    checks += [(check_new_parts, decoder) for decoder in NEW_DECODERS]
    status = 0
    for check, subject in checks:
        with tempfile.TemporaryDirectory() as temporary:
            figures = check(subject, Path(temporary))
        bad = failures(figures)
        status |= bool(bad)
        name = getattr(subject, "name", subject)
        print(json.dumps({"model": name, "check": check.__name__, **figures, "failed": bad}, indent=1), flush=True)
    if RECORDING is not None:
        RECORD.write_text(json.dumps(RECORDING, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
