"""The tables of docs/decoders.md and docs/encoders.md, made of the records of `tools/families.py`."""

from __future__ import annotations

from typing import Any

_DECODERS = """# Decoders

Every causal model type that transformers {transformers} maps, as a tiny random model in float32, against its own eager code:
`make families` writes this page. {count[right]} of {total} are right, {count[refused]} are refused, {count[absent]} cannot be
built here, and {count[wrong]} are computed wrong.

*Right* means a relative difference of at most {tolerance:g} in every column: without memory; under each visibility, past every
window of the configuration, at the positions the model counts itself and, where it takes them, at explicit ones; logits along
greedy decoding over the static cache, and the same tokens; the memory's gradient; a sentence up to the last position. Past that
a decoder is refused (`check_positions`). What reads what is in [adding_a_decoder.md](adding_a_decoder.md).

"*in window*": right for sentences that do not outgrow the sliding window, and refused beyond.

| type | class | memory none / prefix / interleaved | rolling | generation | gradient | refused because it |
|---|---|---|---|---|---|---|
"""

_ENCODERS = """# Encoders

Every encoder type that transformers {transformers} can build from text, as a tiny random model in float32: `make families`
writes this page. {count[right]} of {total} are right, {count[refused]} are refused, {count[absent]} cannot be built, and
{count[wrong]} are computed wrong.

*Right* means: a sentence's features do not depend on what it is padded with, nor on the sentences beside it (relative
difference at most {tolerance:g}); a text as long as the limit we state runs, where there is one; and the width is that of
the model's output. Types whose output is no sequence of token states are not listed.

| type | class | width | longest text | refused because |
|---|---|---|---|---|
"""


_VARIANTS = """
## Rotations and windows

The same check over the kinds of rotary scaling that configurations name, each in a tiny decoder whose original length is 22
positions (no sentence reaches past it) and in one where it is 8 (every sentence does). *Refused* is every visibility past the
original length, by `check_positions` with that length: there all positions of a pass turn by other angles, those of its short
sentences too (`longrope`, `dynamic`). Within it these are right. Windows are of 4 tokens; under *rolling* visibility a sentence
that outgrows one is refused.

| type | rotation | window | within the original length | past it |
|---|---|---|---|---|
"""
_SAID = {
    "refused": "",
    "absent": "not built: ",
    "wrong": "WRONG: ",
    "unexplained": "UNEXPLAINED: ",
    "unmeasured": "NOT MEASURED: ",
}


def decoders_page(record: dict[str, Any]) -> str:
    """docs/decoders.md."""
    variants = record.get("variants", {})
    more = (
        _VARIANTS + "".join(_variant_row(name, result) + "\n" for name, result in variants.items()) if variants else ""
    )
    return _page(_DECODERS, record, _decoder_row, more)


def encoders_page(record: dict[str, Any]) -> str:
    """docs/encoders.md."""
    return _page(_ENCODERS, record, _encoder_row)


def _page(head: str, record: dict[str, Any], row: Any, more: str = "") -> str:
    lines = [row(name, result) for name, result in record["types"].items()]
    where = record["machine"]
    foot = (
        f"\nMeasured in {record['seconds']:.0f} s ({record['cpu_seconds']:.0f} s of processor time) with {record['jobs']} "
        f"processes on {where['cpu']}, torch {where['torch']}, commit {where['commit'][:12]}, {where['date'][:10]}.\n"
    )
    return head.format(total=len(record["types"]), **record) + "\n".join(lines) + "\n" + more + foot


def _decoder_row(name: str, result: dict[str, Any]) -> str:
    reason = _clean(result["reason"])
    if result["status"] != "right":
        return f"| {name} | {result.get('class', '')} | | | | | {_SAID[result['status']]}{_about(reason, result)} |"
    figures = result["figures"]
    others = "*in window*" if "within_window" in figures else "right"
    rolling = "*in window*" if "rolling_within_window" in figures else others
    return f"| {name} | {result['class']} | {others} | {rolling} | right | right | |"


def _variant_row(name: str, result: dict[str, Any]) -> str:
    model_type, rope, *window = name.split(":")
    past = result["status"] if result["status"] in ("right", "refused") else _SAID[result["status"]] + result["reason"]
    within = "" if "within" not in result or result["status"] == "wrong" else "right"
    return f"| {model_type} | {rope} | {'yes' if window else 'no'} | {within} | {_clean(past)} |"


def _encoder_row(name: str, result: dict[str, Any]) -> str:
    if result["status"] == "right":
        return f"| {name} | {result['class']} | {result['width']} | {result['longest'] or 'any'} | |"
    return f"| {name} | {result.get('class', '')} | | | {_SAID[result['status']]}{_about(_clean(result['reason']), result)} |"


def _about(reason: str, result: dict[str, Any]) -> str:
    """The reason without the class it begins with."""
    return reason.removeprefix(result.get("class", "\0")).lstrip(" :")


def _clean(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
