"""Any number of latents from a file to a file of texts: in order, resumable, the same bytes however often it was killed.

The output is made of blocks of a fixed number of latents. A block is decoded by itself, so its text does not depend on
what was decoded before it, and written at once; a resumed run cuts a half-written block off and goes on behind the last
whole one. Beside ``out.jsonl`` stands ``out.jsonl.meta.json`` with what made it, and a run that would continue with
another model, other latents or other settings is refused; and ``out.jsonl.blocks`` with a hash of every block, by which one
that was changed is found.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lmvae_fast.config import GenerationConfig
from lmvae_fast.documents import read_object
from lmvae_fast.errors import ConfigError, DataError, LatentError, OutputError
from lmvae_fast.files import fsync_file, replacing, tensor_bytes, write_json
from lmvae_fast.generation.engine import Generated, token_limit
from lmvae_fast.generation.latent_sources import LatentSource
from lmvae_fast.generation.workers import Block, Workers
from lmvae_fast.models.inputs import beginnings
from lmvae_fast.models.lmvae import LMVAE

BLOCKS_PER_BATCH = 8  # a block refills its rows this often before its tail runs in a smaller batch


def generate_file(
    model: LMVAE,
    latents: LatentSource,
    output: str | os.PathLike[str],
    config: GenerationConfig,
    *,
    prompts: str | Sequence[str] | None = None,
    annotations: Tensor | None = None,
    text_only: bool = False,
    pairs: bool = False,
    overwrite: bool = False,
    workers: Workers | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    stop: Callable[[], object] | None = None,
) -> int:
    """Decode latents into a file; continues one that is already there.

    Args:
        model: any LMVAE.
        latents: where they come from.
        output: ``.jsonl`` with ``index``, ``text``, ``tokens``, ``finished`` per line (and ``sample``, ``logprobs`` where
            asked for), or one text per line with ``text_only``; with ``pairs``, of a model of prompts, ``prompt`` and
            ``response`` in place of ``text``, as ``read_prompts`` reads them.
        config: how to decode; a draw needs a ``seed``, without which no run could be continued.
        prompts: text that every sentence begins with, or one text per latent.
        annotations: pooled labels ``[N, labels]`` of a conditional decoder; default: those of the source.
        overwrite: begin anew instead of continuing what an earlier call wrote; nothing else is overwritten.
        workers: processes that decode the blocks; this one does where None. They hold a model of their own, which must be
            ``model``.
        stop: asked after each block; when it answers with anything true, the run ends in order, to be continued.
        progress: called with (sentences, tokens) as they come; first, if some are found in the file, with (those, None).

    Returns:
        number of lines in the file.

    Raises, before anything is decoded or written:
        ConfigError: a draw without a seed; more tokens asked for than model and prompts allow; pairs of a model of sentences,
            or as bare texts.
        DataError: prompts and latents of different number.
        LatentError: annotations that do not fit model and latents, or with NaN or Inf.
        OutputError: the output cannot be written, is no file of ours, belongs to another model, other latents or other
            settings, or was changed; later, where it is removed meanwhile.
    """
    if config.do_sample and config.seed is None:
        raise ConfigError("a drawn output can only be continued under a seed", value="seed=None", remedy="set seed")
    if pairs and (text_only or not model.config.prompted):
        raise ConfigError(
            "pairs of prompt and response are objects a line, of a model of prompts",
            value="bare texts" if text_only else "a model of sentences", limit=".jsonl, and a decoder or system='cvae'",
        )  # fmt: skip
    annotations, limited = _checked(model, latents, config, prompts, annotations)
    output = Path(output)
    block_size = _block_size(config)
    per_latent = config.num_samples
    meta = {
        "model": model_fingerprint(model),
        "latents": latents.identity,
        "total": latents.total,
        "block_size": block_size,
        "prompt": prompts
        if prompts is None or isinstance(prompts, str)
        else _digest(json.dumps(list(prompts)).encode()),
        "annotations": None
        if annotations is None
        else _digest(annotations.float().cpu().contiguous().numpy().tobytes()),
        "text_only": text_only,
        **({"pairs": True} if pairs else {}),
        "generation": config.to_dict(),
    }
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab") as file:
            _lock(file, output)
            hashes = BlockHashes(output)
            done = _continue_from(output, meta, block_size * per_latent, latents.total * per_latent, overwrite)
            if progress is not None and done:
                progress(done, None)
            blocks = _blocks(latents, done // per_latent, block_size, prompts, annotations)
            decoded: Iterable[Iterable[Generated]] = (
                (block.decode(model, limited) for block in blocks)
                if workers is None
                else workers.decode(blocks, limited)
            )
            for sentences in decoded:
                lines = []
                for out in sentences:
                    lines.append(_line(out, config, text_only, _prompt_of(prompts, out.index) if pairs else None))
                    if progress is not None:
                        progress(1, len(out.ids))
                written = "".join(lines).encode()
                file.write(written)
                file.flush()
                os.fsync(file.fileno())
                _check_still_there(file, output)
                hashes.append(written)
                done += len(lines)
                if stop is not None and stop():
                    break
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"cannot write {output}: {error}", remedy="free space or choose another place; then run again to continue"
        ) from error
    return done


def generate_all(
    model: LMVAE,
    latents: LatentSource,
    config: GenerationConfig,
    *,
    prompts: str | Sequence[str] | None = None,
    annotations: Tensor | None = None,
) -> Iterator[Generated]:
    """The sentences that :func:`generate_file` writes, one by one; arguments and errors as there."""
    annotations, limited = _checked(model, latents, config, prompts, annotations)
    for block in _blocks(latents, 0, _block_size(config), prompts, annotations):
        yield from block.decode(model, limited)


def model_fingerprint(model: LMVAE) -> str:
    """SHA-256 over the configuration and every weight that decides what is decoded, hexadecimal."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for part in (model.projector, model.embedding_shift, model.residual, model.decoder.model):
        if part is not None:
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _block_size(config: GenerationConfig) -> int:
    """Latents of a block: as many as give its sentences, of which each has several where samples are drawn. What is written
    at once, and what a stop waits for, does not grow with their number."""
    return max(1, BLOCKS_PER_BATCH * config.batch_size // config.num_samples)


def _blocks(
    latents: LatentSource, first: int, size: int, prompts: str | Sequence[str] | None, annotations: Tensor | None
) -> Iterator[Block]:
    """The latents from the first-th on in blocks, each with what goes with it."""
    for z in latents.read(size, first):
        rows = slice(first, first + z.shape[0])
        each = prompts if prompts is None or isinstance(prompts, str) else list(prompts[rows])
        yield Block(z, first, each, None if annotations is None else annotations[rows])
        first = rows.stop


def _checked(
    model: LMVAE,
    latents: LatentSource,
    config: GenerationConfig,
    prompts: str | Sequence[str] | None,
    annotations: Tensor | None,
) -> tuple[Tensor | None, GenerationConfig]:
    """The annotations that hold, and the configuration with the limit that the longest prompt leaves: the same for every
    block, whatever prompts are in it."""
    annotations = latents.annotations if annotations is None else annotations
    _check_annotations(model, annotations, latents.total)
    longest = _longest_prompt(model, prompts, latents.total)
    return annotations, config.replace(max_new_tokens=token_limit(model, config, longest))


def _longest_prompt(model: LMVAE, prompts: str | Sequence[str] | None, total: int) -> int:
    """Tokens of the longest prompt; DataError unless there is one, or one for each of so many latents."""
    if prompts is None:
        prompts = ""
    if isinstance(prompts, str):
        prompts = [prompts]
    elif len(prompts) != total:
        raise DataError(
            "prompts and latents differ in number", value=len(prompts), limit=total, remedy="give one per latent"
        )
    return max(map(len, beginnings(prompts, model.config, model.decoder))) - 1


def _check_annotations(model: LMVAE, annotations: Tensor | None, total: int) -> None:
    labels = model.config.annotations if model.config.conditional_decoder else ()
    if annotations is None:
        if labels:
            raise LatentError(
                "a conditional decoder needs annotations beside the latents",
                limit=f"pooled labels [{total}, {len(labels)}]",
                remedy="give annotations",
            )
        return
    if not labels:
        raise LatentError(
            "this decoder is conditioned on no labels", value=list(annotations.shape), remedy="leave them out"
        )
    if annotations.shape != (total, len(labels)):
        raise LatentError(
            "annotations do not fit the latents and the model's labels",
            value=list(annotations.shape),
            limit=[total, len(labels)],
            remedy=f"one row per latent: {', '.join(labels)}",
        )
    if not bool(torch.isfinite(annotations).all()):
        row = int((~torch.isfinite(annotations)).any(1).nonzero()[0])
        raise LatentError("annotations contain NaN or Inf", value=f"row {row}", remedy="drop or mend that row")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _prompt_of(prompts: str | Sequence[str] | None, index: int) -> str:
    return prompts or "" if prompts is None or isinstance(prompts, str) else prompts[index]


def _line(out: Generated, config: GenerationConfig, text_only: bool, prompt: str | None) -> str:
    """A line of the output; with a prompt, as a pair of it and what was answered."""
    if text_only:
        return " ".join(out.text.splitlines()) + "\n"
    said = {"text": out.text} if prompt is None else {"prompt": prompt, "response": out.response}
    row: dict[str, Any] = {"index": out.index, **said, "tokens": len(out.ids), "finished": out.finished}
    if config.num_samples > 1:
        row["sample"] = out.sample
    if out.logprobs is not None:
        row["logprobs"] = [round(value, 6) for value in out.logprobs]
    return json.dumps(row, ensure_ascii=False) + "\n"


def check_text_file(output: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Before any work: OutputError unless the file is not there, is empty, or is one that :func:`generate_file` writes."""
    output = Path(output)
    if not output.exists() or (output.is_file() and output.stat().st_size == 0 and not meta_path(output).exists()):
        return
    if not output.is_file():
        raise OutputError(f"{output} is no file", remedy="choose another output")
    meta, reason = {}, f"{meta_path(output).name} is another program's"
    try:
        meta = read_object(meta_path(output))
    except DataError as error:
        reason = error.problem
    if not {"model", "latents", "block_size"} <= meta.keys():
        raise OutputError(
            f"{output} exists and nothing says what made it ({reason})",
            remedy="choose another output" + ("; only files made here are overwritten" if overwrite else ""),
        )


def meta_path(output: Path) -> Path:
    """Where it stands what made a file of texts."""
    return output.with_name(output.name + ".meta.json")


def _lock(file: BinaryIO, output: Path) -> None:
    """Keeps other runs from writing until the file is closed; OutputError where one is at it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            f"another run is writing {output}", value=_holder(file), remedy="stop it, or choose another output"
        ) from error


def _holder(file: BinaryIO) -> str | None:
    """Which process holds a file's lock; None where the system does not say."""
    try:
        inode = str(os.fstat(file.fileno()).st_ino)
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
                return f"process {fields[4]}"
    except (OSError, ValueError):
        pass
    return None


def _check_still_there(file: BinaryIO, output: Path) -> None:
    """OutputError where the file that is being written is no longer the one of its name."""
    try:
        same = os.path.samestat(os.fstat(file.fileno()), os.stat(output))
    except FileNotFoundError:
        same = False
    if not same:
        raise OutputError(f"{output} was removed or replaced while it was written", remedy="run again to begin it anew")


class BlockHashes:
    """The sha256 of every block, a line each, in a file beside the output: what a resumed run verifies before it goes on."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(output.name + ".blocks")

    def append(self, block: bytes) -> None:
        """Record a block that has been written and fsynced."""
        with self.path.open("a", encoding="ascii") as file:
            file.write(_digest(block) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def begin(self) -> None:
        """Forget what was recorded."""
        with replacing(self.path) as temporary:
            temporary.touch()

    def recorded(self) -> list[str] | None:
        """The hashes that were recorded, in order; None where nothing was."""
        if not self.path.is_file():
            return None
        return self.path.read_text(encoding="ascii", errors="replace").splitlines()

    def verified(self, output: Path, ends: list[int]) -> int:
        """How many of the blocks that end at these bytes are as they were written; the records of others are dropped.

        A file without records was begun before there were any, and is recorded now. Raises OutputError for a block that was
        changed.
        """
        recorded = self.recorded()
        found, start = [], 0
        with output.open("rb") as file:
            for number, end in enumerate(ends):
                if recorded is not None and number >= len(recorded):
                    break
                found.append(_digest(file.read(end - start)))
                start = end
                if recorded is not None and found[-1] != recorded[number]:
                    raise OutputError(
                        f"block {number + 1} of {output} is not what was written", value=f"sha256 {found[-1][:16]}",
                        limit=recorded[number][:16], remedy="restore it from a copy, or overwrite the output",
                    )  # fmt: skip
        if recorded != found:
            with replacing(self.path) as temporary:
                temporary.write_text("".join(line + "\n" for line in found), encoding="ascii")
                fsync_file(temporary)
        return len(found)


def _continue_from(output: Path, meta: dict, block_lines: int, total: int, overwrite: bool) -> int:
    """Lines of whole blocks already there, verified, and all behind them cut off; 0 for a new file, which is an empty one."""
    path, hashes = meta_path(output), BlockHashes(output)
    check_text_file(output, overwrite=overwrite)
    if overwrite or (output.stat().st_size == 0 and not path.exists()):
        hashes.begin()
        with replacing(path) as temporary:
            write_json(temporary, meta)
        output.write_bytes(b"")
        return 0
    before = read_object(path)
    different = sorted(key for key in meta if before.get(key) != meta[key])
    if different:
        raise OutputError(
            f"{output} was begun with another {', '.join(different)}",
            value=before.get(different[0]),
            limit=meta[different[0]],
            remedy="choose another output, or overwrite it",
        )
    lines, place, ends = 0, 0, []
    with output.open("rb+") as file:
        for line in file:
            place += len(line)
            if not line.endswith(b"\n"):
                break
            lines += 1
            if lines % block_lines == 0 or lines == total:
                ends.append(place)
        whole = hashes.verified(output, ends)
        file.truncate(ends[whole - 1] if whole else 0)
    return min(whole * block_lines, total)
