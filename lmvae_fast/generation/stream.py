"""Any number of latents from a file to a file of texts: in order, resumable, the same bytes however often it was killed.

The output is made of blocks of a fixed number of latents. A block is decoded by itself, so its text does not depend on
what was decoded before it, and written at once; a resumed run cuts a half-written block off and goes on behind the last
whole one. Beside ``out.jsonl`` stands ``out.jsonl.meta.json`` with what made it, and a run that would continue with
another model, other latents or other settings is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError, OutputError
from lmvae_fast.generation.engine import Generated, generate, token_limit
from lmvae_fast.generation.workers import Workers
from lmvae_fast.models.lmvae import LMVAE

BLOCKS_PER_BATCH = 8  # a block refills its rows this often before its tail runs in a smaller batch


def generate_file(
    model: LMVAE,
    blocks: Callable[[int, int], Iterable[Tensor]],
    output: str | os.PathLike[str],
    config: GenerationConfig,
    *,
    source: str,
    total: int,
    prompt: str | None = None,
    text_only: bool = False,
    overwrite: bool = False,
    workers: Workers | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Decode latents into a file; continues one that is already there.

    Args:
        model: any LMVAE.
        blocks: ``blocks(block_size, skip)`` gives the latents behind the first ``skip``, in blocks of that size.
        output: ``.jsonl`` with ``index``, ``text``, ``tokens``, ``finished`` per line (and ``sample``, ``logprobs`` where
            asked for), or one text per line with ``text_only``.
        config: how to decode; a draw needs a ``seed``, without which no run could be continued.
        source: identity of the latents (a content hash, say); kept beside the output.
        total: how many latents there are.
        prompt: text that every sentence begins with.
        overwrite: begin anew instead of continuing.
        workers: processes that decode the blocks; this one does where None. They hold a model of their own, which must be
            ``model``.
        progress: called with (sentences, tokens) as they come; sentences found in the file count first.

    Returns:
        number of lines in the file.

    Raises:
        ConfigError: a draw without a seed.
        OutputError: the output cannot be written, or belongs to another model, other latents or other settings.
    """
    if config.do_sample and config.seed is None:
        raise ConfigError("a drawn output can only be continued under a seed", value="seed=None", remedy="set seed")
    token_limit(model, config, 0 if prompt is None else len(model.decoder.tokenizer.encode([prompt])[0]))
    output = Path(output)
    meta_path = output.with_name(output.name + ".meta.json")
    block_size = BLOCKS_PER_BATCH * config.batch_size
    per_latent = config.num_samples
    meta = {
        "model": model_fingerprint(model), "latents": source, "total": total, "block_size": block_size, "prompt": prompt,
        "text_only": text_only, "generation": config.to_dict(),
    }  # fmt: skip
    try:
        done = _continue_from(output, meta_path, meta, block_size * per_latent, total * per_latent, overwrite)
        if progress is not None and done:
            progress(done, 0)
        first = done // per_latent
        decode = partial(_decode, model) if workers is None else workers.decode
        decoded: Iterator[Iterable[Generated]] = decode(blocks(block_size, first), config, prompt, first)
        with output.open("ab") as file:
            for sentences in decoded:
                lines = []
                for out in sentences:
                    lines.append(_line(out, config, text_only))
                    if progress is not None:
                        progress(1, len(out.ids))
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
                done += len(lines)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"cannot write {output}: {error}", remedy="free space or choose another place; then run again to continue"
        ) from error
    return done


def model_fingerprint(model: LMVAE) -> str:
    """SHA-256 over the configuration and every weight that decides what is decoded, hexadecimal."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for part in (model.projector, model.embedding_shift, model.decoder.model):
        if part is not None:
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _decode(model, blocks, config, prompt, first_index) -> Iterator[Iterable[Generated]]:
    for block in blocks:
        yield generate(model, block, config, prompts=prompt, first_index=first_index)
        first_index += block.shape[0]


def _line(out: Generated, config: GenerationConfig, text_only: bool) -> str:
    if text_only:
        return " ".join(out.text.splitlines()) + "\n"
    row = {"index": out.index, "text": out.text, "tokens": len(out.ids), "finished": out.finished}
    if config.num_samples > 1:
        row["sample"] = out.sample
    if out.logprobs is not None:
        row["logprobs"] = [round(value, 6) for value in out.logprobs]
    return json.dumps(row, ensure_ascii=False) + "\n"


def _continue_from(output: Path, meta_path: Path, meta: dict, block_lines: int, total: int, overwrite: bool) -> int:
    """Lines of whole blocks already there, everything behind them cut off; 0 for a new file."""
    if overwrite or not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = meta_path.with_name(meta_path.name + ".partial")
        temporary.write_text(json.dumps(meta, indent=2) + "\n")
        temporary.replace(meta_path)
        output.write_bytes(b"")
        return 0
    try:
        before = json.loads(meta_path.read_text())
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{output} exists and nothing says what made it ({meta_path.name}: {error})",
            remedy="choose another output, or overwrite it",
        ) from error
    different = sorted(key for key in meta if before.get(key) != meta[key])
    if different:
        raise OutputError(
            f"{output} was begun with another {', '.join(different)}", value=before.get(different[0]),
            limit=meta[different[0]], remedy="choose another output, or overwrite it",
        )  # fmt: skip
    lines, end, place = 0, 0, 0
    with output.open("rb+") as file:
        for line in file:
            place += len(line)
            if not line.endswith(b"\n"):
                break
            lines += 1
            if lines % block_lines == 0 or lines == total:
                end = place
        whole = lines if lines == total else lines - lines % block_lines
        file.truncate(end)
    return whole
