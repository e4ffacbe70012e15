"""Command ``lmvae-fast generate``: latents to text, any number."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from lmvae_fast.cli.common import (
    INTERRUPTED,
    Backend,
    DryRun,
    Json,
    Model,
    SamplingOptions,
    console,
    load_generator,
    notice,
    print_json,
    show_estimate,
    takes_sampling,
)
from lmvae_fast.cli.prompt_data import Layout, MaxPromptLen, TurnEnd, read_distinct_prompts
from lmvae_fast.errors import ConfigError
from lmvae_fast.memory import check_memory
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
    min_new_tokens: Annotated[int, typer.Option(help="No end or stop token before so many.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Token that ends a sentence, beside the end token: its text (repeatable).")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Sentences drawn per latent, or responses per prompt.")] = 1,
    prompt: Annotated[str | None, typer.Option(help="Text that every sentence begins with.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of one prompt per latent: lines of txt, or jsonl. Without latents: of prompts that are answered."
        ),
    ] = None,
    z: Annotated[
        str | None,
        typer.Option("--z", help="Latents of a model that answers --prompts: prior (one per response) or zero."),
    ] = None,
    layout: Layout = None,
    turn_end: TurnEnd = None,
    max_prompt_len: MaxPromptLen = None,
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
    dry_run: DryRun = False,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Decode latents: of a file, from the prior, or of sentences; or answer prompts, one to many.

    A decoder without a latent (any Hugging Face folder, or what `finetune` wrote), or a model of prompts, answers every
    prompt of `--prompts` `--num-samples` times; `--output answers.jsonl` is then what `train --system cvae` reads.

    With `--output`, texts are written in the order of the latents; the same command run again after a kill continues and
    ends with the same file. Without it they are printed.

    Example: `lmvae-fast generate runs/first --prior 1000 --output samples.jsonl`,
    `lmvae-fast generate runs/sft --prompts prompts.txt --num-samples 32 --sample --top-p 0.95 --output answers.jsonl`
    """
    given = sum(source is not None for source in (latents, prior, texts))
    if given > 1 or (not given and prompts is None and prompt is None):
        raise ConfigError(
            "one source of latents", limit="--latents FILE, --prior N or --texts FILE, or --prompts FILE to be answered",
            remedy="give one",
        )  # fmt: skip
    if prompt is not None and prompts is not None:
        raise ConfigError("one source of prompts", limit="--prompt TEXT or --prompts FILE", remedy="give one")
    if z is not None and given:
        raise ConfigError(
            "--z says which latents answer --prompts", value=z, remedy="leave it, or the other latents, out"
        )
    config = sampling.config(
        batch_size=batch_size, max_new_tokens=max_new_tokens, min_p=min_p, repetition_penalty=repetition_penalty,
        logprobs=logprobs, min_new_tokens=min_new_tokens,
    )  # fmt: skip
    if workers > 1 and output is None:
        raise ConfigError("workers write to a file", value=f"--workers {workers}", remedy="give --output")
    from lmvae_fast.generation import latent_sources as sources
    from lmvae_fast.generation.text_files import check_text_file, generate_all, generate_file
    from lmvae_fast.generation.workers import Workers
    from lmvae_fast.kernels.backend import backend as use_backend

    if output is not None:
        check_text_file(output, overwrite=overwrite)
    load = functools.partial(load_generator, max_prompt_len=max_prompt_len)
    loaded = load(model)
    width = loaded.config.latent_dim
    config = config.replace(stop_tokens=_stop_tokens(loaded, stop or ()))
    asked = None if given else _asked(loaded, prompts or [prompt or ""], layout=layout, turn_end=turn_end)
    beginnings: Any = sources.read_prompts(prompts) if asked is None and prompts is not None else prompt
    labels = None
    if annotations is not None:
        labels = sources.read_annotations(annotations, loaded.config.annotations, loaded.config.max_len)
    with use_backend(backend):
        if asked is not None:
            source, beginnings, num_samples = _answering(loaded, asked, z, num_samples, sampling.seed or 0)
        elif latents is not None:
            source = sources.latents_of_file(latents, width)
        elif prior is not None:
            source = sources.latents_of_prior(prior, width, sampling.seed or 0)
        else:
            assert texts is not None
            source = sources.latents_of_texts(loaded, texts, layout=layout)
            beginnings = beginnings if source.prompts is None or beginnings is not None else source.prompts
    config = config.replace(num_samples=num_samples)
    # a file of a model of prompts says what was answered
    pairs = asked is not None or source.prompts is not None
    from lmvae_fast.generation.estimates import check_estimate, estimate

    found = estimate(
        source.total, config, loaded.config.max_len, output, text_only=output is not None and output.suffix == ".txt"
    )
    if dry_run:
        show_estimate(found.to_dict(), loaded, as_json)
        return
    check_estimate(found, output, as_json=as_json)
    several = None if workers == 1 else Workers(load, str(model), workers, backend)
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
                    asking = {"prompt": beginnings[out.index]} if pairs and not isinstance(beginnings, str) else {}
                    rows.append({"index": out.index, **asking, "text": out.text})
                else:
                    bar.write(out.text, file=sys.stdout)
            if as_json:
                print_json(rows)
            return
        lines = generate_file(
            loaded, source, output, config, prompts=beginnings, annotations=labels, text_only=output.suffix == ".txt",
            pairs=pairs and output.suffix != ".txt", overwrite=overwrite, workers=several,
            progress=progress, stop=lambda: signals.received,
        )  # fmt: skip
    if as_json:
        print_json({"output": str(output), "sentences": lines})
    else:
        console.print(f"{lines} sentences in {output}")
    if signals.received is not None and lines < source.total * num_samples:
        notice(f"{signals.received}: the same command continues")
        raise typer.Exit(INTERRUPTED)


def _asked(model: Any, prompts: Path | list[str], *, layout: str | None, turn_end: str | None) -> list[str]:
    """The prompts that are to be answered; ConfigError of a model of sentences."""
    if not model.config.prompted:
        raise ConfigError(
            "this model writes sentences, from latents", limit="--latents FILE, --prior N or --texts FILE beside --prompts",
            remedy="give one, or take a decoder or a model of prompts",
        )  # fmt: skip
    if isinstance(prompts, list):
        return prompts
    return read_distinct_prompts(prompts, decoder=model.config.decoder, layout=layout, turn_end=turn_end)


def _answering(model: Any, asked: list[str], z: str | None, samples: int, seed: int) -> tuple[Any, list[str], int]:
    """Latents, their prompts, and the samples of each latent, for so many answers to every prompt."""
    from lmvae_fast.generation import latent_sources as sources

    width = model.config.latent_dim
    if width == 0:
        if z is not None:
            raise ConfigError("a decoder by itself has no latent", value=f"--z {z}", remedy="leave it out")
        return sources.latents_of_zero(len(asked), 0), asked, samples
    if z == "zero":
        return sources.latents_of_zero(len(asked), width), asked, samples
    if z != "prior":
        raise ConfigError(
            "latents are never chosen silently", value=z, limit="--z prior (a draw for each response), --z zero",
            remedy="give one; --texts answers from the posteriors of given responses",
        )  # fmt: skip
    # every response has a draw of its own, so each is the only one of its latent
    check_memory("a prompt and a latent for each response", "lower --num-samples", 64 * len(asked) * samples)
    each = [prompt for prompt in asked for _ in range(samples)]
    return sources.latents_of_prior(len(each), width, seed), each, 1


def _stop_tokens(model: Any, texts: Sequence[str]) -> tuple[int, ...]:
    """Ids of tokens given as text; ConfigError for a text that is not one token."""
    found = []
    for text in texts:
        ids = model.decoder.tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ConfigError(
                "a stop is one token of the decoder's tokenizer", value=f"{text!r}: {len(ids)} tokens", limit=1,
                remedy="give the text of one token",
            )  # fmt: skip
        found += ids
    return tuple(found)
