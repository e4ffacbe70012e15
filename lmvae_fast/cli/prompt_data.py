"""Prompts with responses on the command line: files of every layout, their published lengths, and prompts alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmvae_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lmvae_fast.data import PromptDataset

Layout = Annotated[
    str | None,
    typer.Option(
        help="Of prompts with responses: jsonl, tsv, csv, dailydialog, plato, yelp or agnews; default: by the file's ending."
    ),
]
TurnEnd = Annotated[str | None, typer.Option(help="What every turn of a dialogue ends in; default: <|eot_id|>.")]
MaxPromptLen = Annotated[int | None, typer.Option(help="Most tokens of a prompt; longer ones lose their left end.")]

#: Fields of the section `data` of a configuration.
FIELDS = ("path", "eval_path", "layout", "turn_end", "columns", "label_column", "acts", "limit", "held_out")


def with_lengths(values: dict[str, dict[str, Any]]) -> None:
    """Fill lengths under what was said of prompts and responses: those that the decoder was fine-tuned with, or the published
    ones of a layout."""
    from lmvae_fast.data import LENGTHS
    from lmvae_fast.models.plain_decoder import limits_of

    own = limits_of(values["model"].get("decoder", ""))
    lengths = LENGTHS.get(str(values["data"].get("layout")))
    published = {} if lengths is None else {"max_prompt_len": lengths.prompt, "max_len": lengths.response}
    values["model"] = {**published, **own, **values["model"]}


def load_pairs(data: dict[str, Any], model: dict[str, Any], seed: int) -> tuple[PromptDataset, PromptDataset]:
    """Training and held-out pairs from the sections ``data`` and ``model``; parted by prompts where one file is given."""
    unknown = set(data) - set(FIELDS)
    if unknown:
        raise ConfigError(
            "unknown field(s) in section data", value=sorted(unknown), limit=", ".join(FIELDS),
            remedy="prompts with responses have no others",
        )  # fmt: skip
    if not data.get("path"):
        raise ConfigError("no data", remedy="give --data FILE of prompts with responses")
    options = {name: value for name, value in data.items() if name not in ("path", "eval_path", "held_out")}
    pairs = read_pairs(data["path"], decoder=str(model.get("decoder")), model=model, **options)
    if data.get("eval_path"):
        return pairs, read_pairs(data["eval_path"], decoder=str(model.get("decoder")), model=model, **options)
    return pairs.split(held_out=data.get("held_out", 0.1), seed=seed)


def read_pairs(
    path: str | Path, *, decoder: str, model: dict[str, Any], layout: str | None = None, **options: Any
) -> PromptDataset:
    """The pairs of a file; texts of `yelp` and `agnews` are cut by the decoder's tokens to the model's lengths."""
    from lmvae_fast.data import LENGTHS, cut_texts, read_prompts, read_texts

    options = {name: value for name, value in options.items() if value is not None}
    if layout not in ("yelp", "agnews"):
        if "columns" in options:
            options["columns"] = tuple(options["columns"])
        return read_prompts(path, layout=layout, **options)
    unfit = sorted(options.keys() - {"limit"})
    if unfit:
        raise ConfigError(
            "texts that are cut have no such option", value=unfit[0], limit="limit", remedy="leave it out"
        )
    from transformers import AutoTokenizer

    from lmvae_fast.pretrained import load_pretrained

    lengths = LENGTHS[layout]
    return cut_texts(
        read_texts(path, layout=layout, **options), load_pretrained(AutoTokenizer, decoder, "decoder tokenizer"),
        prompt_tokens=model.get("max_prompt_len") or lengths.prompt, response_tokens=model.get("max_len") or lengths.response,
    )  # fmt: skip


def read_distinct_prompts(path: Path, *, decoder: str, layout: str | None, turn_end: str | None) -> list[str]:
    """The different prompts of a file in the order in which they come: of prompts with responses in any layout, or of prompts
    alone (lines of txt, or of jsonl)."""
    from lmvae_fast.generation.latent_sources import read_prompts

    if layout is None and (path.suffix == ".txt" or _alone(path)):
        return list(dict.fromkeys(read_prompts(path)))
    return read_pairs(path, decoder=decoder, model={}, layout=layout, turn_end=turn_end).prompts


def _alone(path: Path) -> bool:
    """Whether the objects of a jsonl, by the first of them, have no responses."""
    from lmvae_fast.data.lines import decoded_lines, open_file
    from lmvae_fast.documents import parse_json

    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with open_file(path) as file:
        try:
            number, line = next(decoded_lines(file, path), (1, ""))
            first = parse_json(line, f"{path} line {number}")
        except DataError:  # what reads all of it says so, and of which kind it should be
            return False
    return not isinstance(first, dict) or not {"response", "responses"} & first.keys()
