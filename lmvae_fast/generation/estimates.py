"""What a run of generation will take, before it takes it: sentences, disk, memory."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError, OutputError
from lmvae_fast.memory import check_memory, free_disk

#: More sentences than this are not for a terminal; and more than that are hardly meant.
MOST_PRINTED, ABSURD = 10_000_000, 1_000_000_000

# Bytes of a token as text, and of a line's other fields; English takes 4 to 5 a token.
_TOKEN_BYTES, _LINE_BYTES, _LOGPROB_BYTES = 6, 70, 12


@dataclass(frozen=True)
class Estimate:
    """How much will be written at most: ``sentences`` lines of at most ``tokens`` tokens, ``disk_bytes`` of ``disk_free``."""

    sentences: int
    tokens: int
    disk_bytes: int
    disk_free: int | None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def estimate(latents: int, config: GenerationConfig, max_len: int, output: Path | None, *, text_only: bool) -> Estimate:
    """The estimate for so many latents of a model of this max_len."""
    sentences, tokens = latents * config.num_samples, config.max_new_tokens or max_len
    line = 1 if text_only else _LINE_BYTES + _LOGPROB_BYTES * tokens * config.logprobs
    free = None if output is None else free_disk(output)
    return Estimate(sentences, tokens, sentences * (tokens * _TOKEN_BYTES + line), free)


def check_estimate(found: Estimate, output: Path | None, *, as_json: bool) -> None:
    """Before anything is decoded: warns of sizes that are hardly meant.

    Raises OutputError where the disk has not the room, ConfigError for more than a terminal takes, MemoryLimitError for a JSON
    document that does not fit into memory.
    """
    if output is None:
        if found.sentences > MOST_PRINTED:
            raise ConfigError(
                "too many sentences to print", value=f"{found.sentences:,}", limit=f"{MOST_PRINTED:,}",
                remedy="ask for fewer; `generate` writes any number to --output FILE",
            )  # fmt: skip
        if as_json:
            check_memory("one JSON document of all sentences", "give --output FILE", 2 * found.disk_bytes)
        return
    if found.disk_free is not None and found.disk_bytes > found.disk_free:
        raise OutputError(
            f"{output} may not fit on its disk", value=f"up to {found.disk_bytes / 1e9:,.1f} GB",
            limit=f"{found.disk_free / 1e9:,.1f} GB free", remedy="free space, choose another disk, or ask for fewer",
        )  # fmt: skip
    if found.sentences > ABSURD:
        warnings.warn(f"{found.sentences:,} sentences are asked for: is that meant?", stacklevel=2)
