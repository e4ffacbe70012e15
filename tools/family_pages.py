"""The tables of docs/decoders.md and docs/encoders.md, made of the records of `tools/families.py`."""

from __future__ import annotations

from typing import Any

_DECODERS = """# Decoders

Every causal model type that transformers {transformers} maps, as a tiny random model in float32, against its own eager code:
`make families` writes this page. {count[right]} of {total} are right, {count[refused]} are refused, and none is computed wrong.

*Right* means a relative difference of at most {tolerance:g} in every column: without memory; under each visibility, past every
window of the configuration, at the positions the model counts itself and, where it takes them, at explicit ones; logits along
greedy decoding over the static cache, and the same tokens; the memory's gradient. Past the last position a decoder is refused
(`check_positions`). What reads what is in [adding_a_decoder.md](adding_a_decoder.md).

"*in window*": right for sentences that do not outgrow the sliding window, and refused beyond.

| type | class | memory none / prefix / interleaved | rolling | generation | gradient | refused because it |
|---|---|---|---|---|---|---|
"""

_ENCODERS = """# Encoders

Every encoder type that transformers {transformers} can build from text, as a tiny random model in float32: `make families`
writes this page. {count[right]} of {total} are right and {count[refused]} are refused.

*Right* means: a sentence's features do not depend on what it is padded with, nor on the sentences beside it (relative
difference at most {tolerance:g}); a text as long as the limit we state runs, where there is one; and the width is that of
the model's output. Types whose output is no sequence of token states are not listed.

| type | class | width | longest text | refused because |
|---|---|---|---|---|
"""


def decoders_page(record: dict[str, Any]) -> str:
    """docs/decoders.md."""
    return _page(_DECODERS, record, _decoder_row)


def encoders_page(record: dict[str, Any]) -> str:
    """docs/encoders.md."""
    return _page(_ENCODERS, record, _encoder_row)


def _page(head: str, record: dict[str, Any], row: Any) -> str:
    lines = [row(name, result) for name, result in record["types"].items()]
    where = record["machine"]
    foot = (
        f"\nMeasured in {record['seconds']:.0f} s with {record['jobs']} processes on {where['cpu']}, torch {where['torch']}, "
        f"commit {where['commit'][:12]}, {where['date'][:10]}.\n"
    )
    return head.format(total=len(record["types"]), **record) + "\n".join(lines) + "\n" + foot


def _decoder_row(name: str, result: dict[str, Any]) -> str:
    reason = _clean(result["reason"])
    if result["status"] != "right":
        said = {"refused": "", "wrong": "WRONG: ", "unbuilt": "not built: ", "unmeasured": "not measured: "}
        return f"| {name} | {result.get('class', '')} | | | | | {said[result['status']]}{_about(reason, result)} |"
    figures = result["figures"]
    others = "*in window*" if "within_window" in figures else "right"
    rolling = "*in window*" if "rolling_within_window" in figures else others
    return f"| {name} | {result['class']} | {others} | {rolling} | right | right | |"


def _encoder_row(name: str, result: dict[str, Any]) -> str:
    if result["status"] == "right":
        return f"| {name} | {result['class']} | {result['width']} | {result['longest'] or 'any'} | |"
    said = {"refused": "", "wrong": "WRONG: ", "unbuilt": "not built: ", "unmeasured": "not measured: "}[
        result["status"]
    ]
    return f"| {name} | {result.get('class', '')} | | | {said}{_about(_clean(result['reason']), result)} |"


def _about(reason: str, result: dict[str, Any]) -> str:
    """The reason without the class it begins with."""
    return reason.removeprefix(result.get("class", "\0")).lstrip(" :")


def _clean(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
