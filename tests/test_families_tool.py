"""What `tools/families.py` makes of a type that fails, and of one that cannot be built: only the first fails the run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lmvae_fast.errors import UnsupportedDecoderError

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))

import families  # noqa: E402


def outcome(monkeypatch, capsys, build=None, check=None, seconds=60):
    """Exit code and result of one type."""
    if build is not None:
        monkeypatch.setattr(families.mapped_types, "tiny_model", build)
    if check is not None:
        monkeypatch.setattr(families.family_check, "check_decoder", check)
    code = families.main(["decoders", "--types", "llama", "--json", "--jobs", "1", "--seconds", str(seconds)])
    return code, json.loads(capsys.readouterr().out)["types"]["llama"]


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


def test_a_right_type(monkeypatch, capsys):
    code, result = outcome(monkeypatch, capsys)
    assert code == 0 and result["status"] == "right", result


def test_a_missing_package_is_a_reason(monkeypatch, capsys):
    code, result = outcome(
        monkeypatch, capsys, build=raises(ImportError("Model requires timm.\n`pip install timm`. Restart."))
    )
    assert code == 0 and result["status"] == "absent" and result["reason"].endswith("(timm)")


def test_a_configuration_that_is_not_built_fails(monkeypatch, capsys):
    code, result = outcome(monkeypatch, capsys, build=raises(ValueError("sizes do not match")))
    assert code == 1 and result["status"] == "unmeasured" and "sizes" in result["reason"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnsupportedDecoderError("Llama has layers without keys and values"), "refused"),
        (UnsupportedDecoderError("Llama cannot be run through our attention: 'X' object has no attribute 'y'"), "unexplained"),
        (AttributeError("'X' object has no attribute 'y'"), "unmeasured"),
    ],
)  # fmt: skip
def test_only_a_reason_about_the_model_is_a_refusal(monkeypatch, capsys, error, status):
    code, result = outcome(monkeypatch, capsys, check=raises(error))
    assert (code, result["status"]) == (int(status != "refused"), status)
    assert str(error).split(": ")[-1] in result["reason"] or error.args[0] in result["reason"]


def test_a_wrong_figure_fails(monkeypatch, capsys):
    figures = {"no_memory": 0.0, "prefix": 2e-5, "rolling": 0.0, "interleaved": 0.0}
    code, result = outcome(monkeypatch, capsys, check=lambda *_, **__: figures)
    assert code == 1 and result["status"] == "wrong" and result["reason"] == "prefix"


def test_a_type_that_takes_too_long_fails(monkeypatch, capsys):
    def forever(*_, **__):
        while True:
            pass

    code, result = outcome(monkeypatch, capsys, check=forever, seconds=1)
    assert code == 1 and result == {**result, "status": "unmeasured", "reason": "took more than 1 s"}
