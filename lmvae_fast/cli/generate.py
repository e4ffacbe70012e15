"""``lmvae-fast generate``: latents to text, any number."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from lmvae_fast.cli.app import app
from lmvae_fast.cli.common import (
    Backend,
    Json,
    Model,
    Sample,
    Seed,
    Temperature,
    TopK,
    TopP,
    console,
    generation_config,
    load_model,
    print_json,
)
from lmvae_fast.errors import ConfigError


@app.command("generate")
def generate(
    model: Model,
    latents: Annotated[Path | None, typer.Option(help="Latents to decode: safetensors, npy or jsonl.")] = None,
    prior: Annotated[int | None, typer.Option(help="Decode this many latents drawn from the prior instead.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Reconstruct the sentences of a file instead.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write (jsonl, or txt for bare texts); continues one begun.")] = None,  # noqa: E501
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin the output anew.")] = False,
    batch_size: Annotated[int, typer.Option(help="Sentences decoded at a time.")] = 64,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens per sentence; default: the model's max_len.")] = None,
    sample: Sample = False,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less than this many times as probable as the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens said before become less probable.")] = 1.0,
    num_samples: Annotated[int, typer.Option(help="Sentences drawn per latent.")] = 1,
    prompt: Annotated[str | None, typer.Option(help="Text that every sentence begins with.")] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Write each token's log-probability too.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that decode (with --output); one GPU each where there are any.")] = 1,
    seed: Seed = 0,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Decode latents: of a file, from the prior, or of sentences.

    With `--output`, texts are written in the order of the latents; the same command run again after a kill continues and
    ends with the same file. Without it they are printed.

    Example: `lmvae-fast generate runs/first --prior 1000 --output samples.jsonl`
    """
    if sum(source is not None for source in (latents, prior, texts)) != 1:
        raise ConfigError("one source of latents", limit="--latents FILE, --prior N or --texts FILE", remedy="give one")
    if prior is not None and prior < 1:
        raise ConfigError("--prior draws at least one latent", value=prior, limit=">= 1")
    config = generation_config(
        sample, temperature, top_k, top_p, seed, batch_size=batch_size, max_new_tokens=max_new_tokens, min_p=min_p,
        repetition_penalty=repetition_penalty, num_samples=num_samples, logprobs=logprobs,
    )  # fmt: skip
    if workers > 1 and output is None:
        raise ConfigError("workers write to a file", value=f"--workers {workers}", remedy="give --output")
    import contextlib

    import torch

    from lmvae_fast.generation.engine import generate as decode
    from lmvae_fast.generation.latent_files import count_latents, read_latents
    from lmvae_fast.generation.stream import generate_file
    from lmvae_fast.generation.workers import Workers
    from lmvae_fast.kernels.backend import backend as use_backend

    loaded = load_model(model)
    width = loaded.config.latent_dim
    if latents is not None:
        total, source = count_latents(latents), _file_hash(latents)

        def blocks(block: int, skip: int):
            return read_latents(latents, latent_dim=width, block=block, skip=skip)
    elif prior is not None:
        total, source = prior, f"prior seed={seed}"

        def blocks(block: int, skip: int):
            from lmvae_fast.kernels import philox

            # A latent's noise depends on the seed and its row only, so a continued run draws the same latents.
            key = philox.seed_tensor(seed or 0, "cpu")
            for start in range(skip, prior, block):
                pair = torch.stack([key[0], torch.tensor(start)])
                yield philox.normal(pair, (min(block, prior - start), width))
    else:
        from lmvae_fast.data import read

        assert texts is not None
        sentences = read(texts).texts
        mu = loaded.encode(sentences).mu.cpu()
        total, source = len(sentences), _file_hash(texts)

        def blocks(block: int, skip: int):
            return iter(mu[skip:].split(block))

    several = None if workers == 1 else Workers(load_model, str(model), workers, backend)
    bar = tqdm(total=total * num_samples, unit="sentence", disable=as_json and output is None)
    with use_backend(backend), bar, several or contextlib.nullcontext():
        tokens = 0

        def progress(sentences: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.update(sentences)
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)

        if output is None:
            rows = []
            for out in decode(loaded, blocks(512, 0), config, prompts=prompt):
                progress(1, len(out.ids))
                if as_json:
                    rows.append({"index": out.index, "text": out.text})
                else:
                    bar.write(out.text, file=sys.stdout)
            if as_json:
                print_json(rows)
            return
        lines = generate_file(
            loaded, blocks, output, config, source=source, total=total, prompt=prompt, text_only=output.suffix == ".txt",
            overwrite=overwrite, workers=several, progress=progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps({"output": str(output), "sentences": lines}))
    else:
        console.print(f"{lines} sentences in {output}")


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else hashlib.sha256(
                file.read()
            ).hexdigest()
    except OSError as error:
        from lmvae_fast.errors import DataError

        raise DataError(f"cannot read {path}: {error}", remedy="check the path") from error
