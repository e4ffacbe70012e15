"""Commands ``lmvae-fast profile``: time of training and decoding, beside the eager reference and the machine's limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lmvae_fast.cli.common import (
    Backend,
    Json,
    SamplingOptions,
    column_name,
    console,
    load_model,
    print_json,
    takes_sampling,
)
from lmvae_fast.errors import ConfigError
from lmvae_fast.limits import whole_number
from lmvae_fast.memory import memory_guard

if TYPE_CHECKING:
    from lmvae_fast.models.lmvae import LMVAE

KIND = "profile"  # what the folder of a profile is marked as

app = typer.Typer(
    no_args_is_help=True, help="Where time, bytes and FLOPs go: the fast path beside the eager reference."
)


Source = Annotated[
    str | None, typer.Argument(help="Folder of a trained model, or a hub name; none with --tiny or --preset.")
]
Tiny = Annotated[bool, typer.Option("--tiny", help="A tiny random model, to see what the report looks like.")]
Preset = Annotated[
    str | None, typer.Option(help="Random weights of published shapes: ENCODER,DECODER (bert-base-cased,gpt2).")
]
System = Annotated[str, typer.Option(help="With --tiny and --preset: langvae or optimus.")]
LatentDim = Annotated[int, typer.Option(help="With --tiny and --preset: width of the latent.")]
MaxLen = Annotated[int, typer.Option(help="With --tiny and --preset: most tokens per sentence.")]
Output = Annotated[Path, typer.Option(help="Folder of report, record and traces.")]


@app.command("train")
def train(
    model: Source = None,
    tiny: Tiny = False,
    preset: Preset = None,
    system: System = "langvae",
    data: Annotated[str, typer.Option(help="Sentences: a file, or `corpus`, the bundled one.")] = "corpus",
    column: Annotated[str | None, typer.Option(help="Column or field with the sentence.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sentences of the step.")] = 32,
    latent_dim: LatentDim = 128,
    max_len: MaxLen = 32,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    seconds: Annotated[float, typer.Option(min=0.0, help="Of timing, both sides together.")] = 10.0,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference/--no-reference", help="Measure the eager reference as well (a second copy of both models)."
        ),
    ] = True,
    output: Output = Path("runs/profile"),
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Profile a training step: time per part, FLOPs, bytes, memory, energy, each against what this machine can do.

    Writes `OUTPUT/report.html`, `profile.json`, and one trace per side for ui.perfetto.dev.

    Example: `lmvae-fast profile train runs/first/model --data sentences.txt --batch-size 64`
    """
    from lmvae_fast.config import TrainConfig
    from lmvae_fast.files import claim
    from lmvae_fast.kernels.backend import backend as use_backend
    from lmvae_fast.profiling.train import profile_train
    from lmvae_fast.reports.page import style
    from lmvae_fast.reports.profile import write_train

    style()  # without matplotlib, it is refused before anything is timed
    claim(output, KIND)
    config = TrainConfig(batch_size=batch_size, precision=precision, learning_rate=1e-5, max_steps=10**6)
    texts = _texts(data, column, batch_size)
    with use_backend(backend):
        subject = _subject(model, tiny, preset, system, latent_dim, max_len, texts)
        record = profile_train(subject, texts, config, folder=output, seconds=seconds, reference=reference)
    if _written(record, write_train, output, as_json):
        return
    for side in record["sides"].values():
        _print_side(side, f"{side['seconds'] * 1e3:.1f} ms a step, {side['tokens_per_s']:,.0f} tokens/s")
    if "speedup" in record:
        console.print(f"\nthe fast path is {record['speedup']:.2f} times as fast")


@app.command("generate")
@takes_sampling
def generate(
    model: Source = None,
    tiny: Tiny = False,
    preset: Preset = None,
    system: System = "langvae",
    batch_sizes: Annotated[str, typer.Option(help="Sentences at a time, as 1,32,256.")] = "1,32,256",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens per sentence; default: the model's max_len.")
    ] = None,
    latent_dim: LatentDim = 128,
    max_len: MaxLen = 32,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or bf16: what the decoder's weights are held in; default: as they are.")
    ] = None,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008
    seconds: Annotated[float, typer.Option(min=0.0, help="Of timing, all sides and sizes together.")] = 20.0,
    reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="Measure the eager loop as well.")
    ] = True,
    output: Output = Path("runs/profile-generate"),
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Profile decoding over batch sizes: sentences/s, first token, time per part, FLOPs, bytes, memory, the machine's limits.

    Latents come from the prior, and every sentence gets all its tokens. Writes `OUTPUT/report.html`, `profile.json`, and
    one trace per side and size for ui.perfetto.dev.

    Example: `lmvae-fast profile generate runs/first/model --batch-sizes 1,64,512 --precision bf16`
    """
    import torch

    from lmvae_fast.files import claim
    from lmvae_fast.kernels.backend import backend as use_backend
    from lmvae_fast.profiling.generate import profile_generate
    from lmvae_fast.reports.page import style
    from lmvae_fast.reports.profile import write_generate

    style()  # without matplotlib, it is refused before anything is timed
    claim(output, KIND)
    sizes, dtypes = _sizes(batch_sizes), {"fp32": torch.float32, "bf16": torch.bfloat16}
    if precision is not None and precision not in dtypes:
        raise ConfigError("unknown precision", value=precision, limit=", ".join(dtypes), remedy="choose one of these")
    config = sampling.config(max_new_tokens=max_new_tokens)
    with use_backend(backend):
        subject = _subject(model, tiny, preset, system, latent_dim, max_len, _texts("corpus", None, 32)).eval()
        if precision is not None:
            torch.nn.Module.to(subject.decoder.model, dtypes[precision])
        with memory_guard(
            f"batches of {max(sizes):,} sentences", "lower --batch-sizes", needed=_batch_bytes(subject, max(sizes))
        ):
            record = profile_generate(
                subject, config, batches=sizes, folder=output, seconds=seconds, reference=reference
            )
    if _written(record, write_generate, output, as_json):
        return
    for row in record["batches"]:
        console.print(f"\nbatch {row['batch']}")
        for side in row["sides"].values():
            speed = f"{side['sentences_per_s']:,.1f} sentences/s, {side['tokens_per_s']:,.0f} tokens/s"
            step = f"{side['seconds_per_step'] * 1e3:.2f} ms a step, {side['share_of_limit']:.0%} of the limit"
            first = f"first token after {side['first_token_seconds'] * 1e3:.1f} ms"
            _print_side(side, f"{speed}, {step} ({side['bound_by']}), {first}")
        if "speedup" in row:
            console.print(f"the engine is {row['speedup']:.2f} times as fast")


def _batch_bytes(model: LMVAE, batch: int) -> int:
    """What latents, memory and cache of a batch take, at least."""
    decoder, config = model.decoder, model.config
    per_token = 2 * decoder.num_layers * decoder.kv_heads * decoder.head_dim * decoder.dtype.itemsize
    return batch * (8 * config.latent_dim + per_token * (config.max_len + 2 * int(config.slots or 0)))


def _written(
    record: dict[str, Any], write: Callable[[dict[str, Any], Path], Path], output: Path, as_json: bool
) -> bool:
    """Write record and report; whether nothing is left to print."""
    (output / "profile.json").write_text(json.dumps(record, indent=1) + "\n")
    report = write(record, output / "report.html")
    if as_json:
        print_json({**record, "report": str(report)})
    else:
        console.print(f"report: {report}", markup=False)
    return as_json


def _print_side(side: dict[str, Any], speed: str) -> None:
    table = Table("part", "ms", "share", "GFLOP", "of matrix rate", "of bandwidth")
    for row in side["parts"]:
        table.add_row(
            row["part"], f"{row['seconds'] * 1e3:.2f}", f"{row['share']:.1%}", f"{row['flops'] / 1e9:.3f}",
            f"{row['share_of_matrix_rate']:.1%}", f"{row['share_of_bandwidth']:.1%}",
        )  # fmt: skip
    memory = f"{side['peak_extra_bytes'] / 2**20:,.1f} MiB beside the {side['held_bytes'] / 2**20:,.1f} held"
    console.print(f"\n{side['name']}: {speed}, {memory}")
    console.print(table)


def _sizes(text: str) -> list[int]:
    """Batch sizes of a text: ``"1,32"`` -> ``[1, 32]``. Raises ConfigError for anything but numbers of at least 1."""
    sizes = [whole_number(part.strip()) for part in text.split(",")]
    if not all(sizes):
        raise ConfigError(
            "--batch-sizes wants numbers", value=text[:200], limit="at least 1 each", remedy="for example 1,32,256"
        )
    return [size for size in sizes if size]


def _texts(data: str, column: str | None, batch_size: int) -> list[str]:
    """Sentences, a batch at least. Raises DataError when the file has too few."""
    from lmvae_fast.data import generate_corpus, read
    from lmvae_fast.errors import DataError

    wanted = (
        16 * batch_size
    )  # as many as one window of the batch plan: batches then are of even lengths, as in training
    dataset = (
        generate_corpus(wanted, seed=0) if data == "corpus" else read(data, limit=wanted, column=column_name(column))
    )
    texts = list(dataset.texts)
    if len(texts) < batch_size:
        raise DataError(
            "too few sentences for a batch", value=len(texts), limit=f">= {batch_size}",
            remedy="lower --batch-size or give more data",
        )  # fmt: skip
    return texts


def _subject(
    model: str | None, tiny: bool, preset: str | None, system: str, latent_dim: int, max_len: int, texts: list[str]
) -> LMVAE:
    """The model to profile. Raises ConfigError unless exactly one is named."""
    import torch

    from lmvae_fast.config import LMVAEConfig
    from lmvae_fast.profiling.presets import random_model

    if (model is not None) + tiny + (preset is not None) != 1:
        raise ConfigError(
            "name one model to profile", value=f"MODEL={model}, tiny={tiny}, preset={preset}",
            limit="one of MODEL, --tiny and --preset", remedy="for a first look: lmvae-fast profile train --tiny",
        )  # fmt: skip
    if model is not None:
        return load_model(model)
    encoder, comma, decoder = ("tiny,tiny" if preset is None else preset).partition(",")
    if not comma:
        raise ConfigError(
            "--preset wants two names", value=preset, limit="ENCODER,DECODER", remedy="--preset bert-base-cased,gpt2"
        )
    options: dict[str, Any] = {"pooling": "mean"} if encoder not in ("tiny", "bert-base-cased") else {}
    config = LMVAEConfig(system=system, latent_dim=latent_dim, max_len=max_len, **options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return random_model(encoder, decoder, config, texts, device=device)
