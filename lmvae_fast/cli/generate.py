"""Command ``lmvae-fast generate``: latents to text, any number."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from lmvae_fast.cli.common import (
    INTERRUPTED,
    Backend,
    Json,
    Model,
    SamplingOptions,
    console,
    load_model,
    print_json,
    takes_sampling,
)
from lmvae_fast.errors import ConfigError
from lmvae_fast.signals import HANGUP, StopSignals


@takes_sampling
def generate(
    model: Model,
    latents: Annotated[Path | None, typer.Option(help="Latents to decode: safetensors, npy or jsonl.")] = None,
    prior: Annotated[int | None, typer.Option(help="Decode this many latents drawn from the prior instead.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Reconstruct the sentences of a file instead.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write (jsonl, or txt for bare texts); continues one begun.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin the output anew.")] = False,
    batch_size: Annotated[int, typer.Option(help="Sentences decoded at a time.")] = 64,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens per sentence; default: the model's max_len.")
    ] = None,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008
    min_p: Annotated[float, typer.Option(help="Drop tokens less than this many times as probable as the best.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that came before become less probable.")
    ] = 1.0,
    num_samples: Annotated[int, typer.Option(help="Sentences drawn per latent.")] = 1,
    prompt: Annotated[str | None, typer.Option(help="Text that every sentence begins with.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of one prompt per latent: lines of txt, or jsonl.")] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="For conditional decoders, per latent: its words' labels (lines of txt), or pooled labels (npy, safetensors, jsonl)."  # noqa: E501
        ),
    ] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Write each token's log-probability too.")] = False,
    workers: Annotated[
        int, typer.Option(help="Processes that decode (with --output); one GPU each where there are any.")
    ] = 1,
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
    if prompt is not None and prompts is not None:
        raise ConfigError("one source of prompts", limit="--prompt TEXT or --prompts FILE", remedy="give one")
    config = sampling.config(
        batch_size=batch_size, max_new_tokens=max_new_tokens, min_p=min_p, repetition_penalty=repetition_penalty,
        num_samples=num_samples, logprobs=logprobs,
    )  # fmt: skip
    if workers > 1 and output is None:
        raise ConfigError("workers write to a file", value=f"--workers {workers}", remedy="give --output")
    from lmvae_fast.generation import latent_sources as sources
    from lmvae_fast.generation.text_files import check_text_file, generate_all, generate_file
    from lmvae_fast.generation.workers import Workers
    from lmvae_fast.kernels.backend import backend as use_backend

    if output is not None:
        check_text_file(output, overwrite=overwrite)
    loaded = load_model(model)
    width = loaded.config.latent_dim
    beginnings = prompt if prompts is None else sources.read_prompts(prompts)
    labels = None
    if annotations is not None:
        labels = sources.read_annotations(annotations, loaded.config.annotations, loaded.config.max_len)
    with use_backend(backend):
        if latents is not None:
            source = sources.latents_of_file(latents, width)
        elif prior is not None:
            source = sources.latents_of_prior(prior, width, sampling.seed or 0)
        else:
            assert texts is not None
            source = sources.latents_of_texts(loaded, texts)
    several = None if workers == 1 else Workers(load_model, str(model), workers, backend)
    bar = tqdm(total=source.total * num_samples, unit="sentence", disable=as_json and output is None)
    # Ctrl-C ends at once; who asks for an end in order, or whose terminal is gone, gets the block that is being decoded
    signals = StopSignals(signal.SIGTERM, *HANGUP)
    with (
        use_backend(backend),
        bar,
        several or contextlib.nullcontext(),
        signals if output else contextlib.nullcontext(),
    ):
        tokens, begun = 0, time.perf_counter()

        def progress(sentences: int, new_tokens: int | None) -> None:
            nonlocal tokens
            if new_tokens is None:  # found in the file: they are no part of this run's rate
                bar.initial = sentences
            tokens += new_tokens or 0
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - begun):,.0f} tokens/s", refresh=False)
            bar.update(sentences)

        if output is None:
            rows = []
            for out in generate_all(loaded, source, config, prompts=beginnings, annotations=labels):
                progress(1, len(out.ids))
                if as_json:
                    rows.append({"index": out.index, "text": out.text})
                else:
                    bar.write(out.text, file=sys.stdout)
            if as_json:
                print_json(rows)
            return
        lines = generate_file(
            loaded, source, output, config, prompts=beginnings, annotations=labels, text_only=output.suffix == ".txt",
            overwrite=overwrite, workers=several, progress=progress, stop=lambda: signals.received,
        )  # fmt: skip
    if as_json:
        print(json.dumps({"output": str(output), "sentences": lines}))
    else:
        console.print(f"{lines} sentences in {output}")
    if signals.received is not None and lines < source.total * num_samples:
        console.print(f"{signals.received}: the same command continues", style="yellow")
        raise typer.Exit(INTERRUPTED)
