"""The readers of JSON and YAML, and the limits: nothing is taken for what it is not, and nothing takes the machine."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from lmvae_fast.config.base import read_mapping
from lmvae_fast.documents import parse_json, parse_yaml, read_json, read_object, read_text
from lmvae_fast.errors import CheckpointError, ConfigError, DataError, LMVAEError, shown
from lmvae_fast.limits import DEFAULTS, limit

DEEP = 100_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "key twice.*'a'"),
        ('{"a": {"b": 1, "b": 2}}', "key twice.*'b'"),
        ("[" * DEEP + "]" * DEEP, "levels"),
        ('{"a":' * 150 + "1" + "}" * 150, "levels"),
        ("1" * 5000, "integer is too long.*5000 digits"),
        ("[" + "9" * 301 + "]", "too long"),
        ("{", "malformed JSON"),
        ("", "malformed JSON"),
        ("[1, 2", "malformed JSON"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(DataError, match=message) as caught:
        parse_json(text, "data.jsonl, line 3")
    assert "data.jsonl, line 3" in str(caught.value) and len(str(caught.value)) < 1000


def test_json_that_is_read():
    assert parse_json('\ufeff{"a": [1, 2.5, null, "\\u00e9"]}', "x") == {"a": [1, 2.5, None, "é"]}
    nested = "[" * 99 + "1" + "]" * 99
    assert parse_json(nested, "x") and parse_json("[" + nested + ", " + nested + "]", "x")
    assert parse_json("9" * 300, "x") == int("9" * 300)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + chr(ord(name) - 1)] * 9)}]\n" for name in "bcdefghi"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "'a' twice"),
        ("x: {b: 1, 'b': 2}", "'b' twice"),
        ("1: a\n0x1: b", "1 twice"),
        (BOMB, "aliases stand for too many"),
        ("a: &a [*a]", "within what it names"),
        ("[" * 1000 + "]" * 1000, "levels"),
        ("[" * 120 + "]" * 120, "levels"),
        ("a: " + "1" * 5000, "not valid YAML"),
        ("a: 2020-13-45", "not valid YAML"),
        ("a: !!bool maybe", "not valid YAML"),
        ("a: !!timestamp soon", "not valid YAML"),
        ("a: !!python/object/apply:os.system [id]", "not valid YAML"),
        ("? [a, b]\n: 1", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("a: \x01", "not valid YAML"),
    ],
)
def test_yaml_that_is_refused(text, message):
    started = time.monotonic()
    with pytest.raises(ConfigError, match=message) as caught:
        parse_yaml(text, "c.yaml")
    assert len(str(caught.value)) < 1000 and time.monotonic() - started < 10


def test_yaml_that_is_read():
    assert parse_yaml("\ufeffa: 1e-3\nb: &x [1, 2]\nc: *x\nd: {<<: {e: 1}, f: 2}") == {
        "a": 1e-3, "b": [1, 2], "c": [1, 2], "d": {"e": 1, "f": 2},
    }  # fmt: skip
    assert parse_yaml("") is None


def test_a_short_bomb_in_a_configuration_is_a_short_message(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {encoder: " + "[" * 9 + "]" * 9 + "}\n" + BOMB)
    with pytest.raises(ConfigError) as caught:
        read_mapping(path)
    assert len(str(caught.value)) < 1000


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "folder.json").mkdir()
    for name, message in {
        "pipe.json": "no ordinary file", "latin.json": "UTF-8.*0xe9", "folder.json": "folder", "none.json": "missing",
        "a\0b.json": "cannot open",
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            read_json(f"{tmp_path}/{name}", error=CheckpointError)
    with pytest.raises(DataError, match="object"):
        read_object(tmp_path / "list.json")
    with pytest.raises(DataError, match="no ordinary file"):
        read_text("/dev/zero")


def test_limits_are_raised_and_lowered_by_name(tmp_path, monkeypatch):
    text = "[" * 150 + "]" * 150
    with pytest.raises(DataError, match="LMVAE_LIMITS=nesting="):
        parse_json(text, "x")
    monkeypatch.setenv("LMVAE_LIMITS", "nesting=200, digits=4")
    assert limit("nesting") == 200 and limit("line") == DEFAULTS["line"]
    parse_json(text, "x")
    with pytest.raises(DataError, match="digits"):
        parse_json("12345", "x")
    monkeypatch.setenv("LMVAE_LIMITS", "document=10")
    (tmp_path / "long.txt").write_text("x" * 11)
    with pytest.raises(DataError, match="too large"):
        read_text(tmp_path / "long.txt")
    for bad in ("nests=3", "nesting=-1", "nesting", "nesting=x"):
        monkeypatch.setenv("LMVAE_LIMITS", bad)
        with pytest.raises(ConfigError, match="LMVAE_LIMITS"):
            limit("nesting")


def test_values_in_messages_are_shortened():
    huge = ["lol"]
    for _ in range(40):
        huge = [huge] * 9
    circle: list = []
    circle.append(circle)
    for value in ("x" * 10**6, huge, circle, 10**5000, {"a": ["x" * 10**5] * 100}):
        error = LMVAEError("p" * 10**5, value=value, limit="l" * 10**5, remedy="r" * 10**5)
        assert len(str(error)) < 8000 and all(len(text) <= 2000 for text in error.fields().values())
    assert str(LMVAEError("bad", value=3, limit=[1, 2], remedy="mend")) == "bad; got: 3; allowed: [1, 2]; remedy: mend"
    assert shown([1, "a"]) == "[1, 'a']"


#: Files that json.load reads, waits for or dies of, and none of ours takes.
HOSTILE = {
    "a key twice": b'{"max_len": 1, "max_len": 2}', "deep": b'{"a": ' + b"[" * 5000,
    "long": b'{"max_len": ' + b"9" * 5000 + b"}",
    "latin1": b'{"a": "\xe9"}', "cut": b'{"a": 1',
}  # fmt: skip


def _of_a_public_cvae(path):
    from lmvae_fast.reference.cvae import load_checkpoint

    (path / "config.json").symlink_to(path / "file")
    load_checkpoint(path, base_model="none")


def _of_a_fine_tuned_decoder(path):
    from lmvae_fast.models.plain_decoder import SETTINGS, limits_of

    (path / SETTINGS).symlink_to(path / "file")
    limits_of(path)


def _of_tokens(path):
    from lmvae_fast.integrations.langvae.tokenization import _read_cache

    _read_cache(path / "file")


def _of_prompts(path):
    from lmvae_fast.cli.prompt_data import read_distinct_prompts

    (path / "p.jsonl").symlink_to(path / "file")
    read_distinct_prompts(path / "p.jsonl", decoder="none", layout=None, turn_end=None)


@pytest.mark.parametrize("content", HOSTILE.values(), ids=list(HOSTILE))
@pytest.mark.parametrize("reader", [_of_a_public_cvae, _of_a_fine_tuned_decoder, _of_tokens, _of_prompts])
def test_every_reader_is_this_one(tmp_path, reader, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises((CheckpointError, DataError)):
        reader(tmp_path)


def test_nothing_else_reads_json_or_yaml():
    """But for what was written by this package into itself, or by a library a moment before."""
    root = Path(__file__).resolve().parents[1]
    own = {
        "lmvae_fast/documents.py", "lmvae_fast/profiling/measure.py",  # the latter: of the build, beside the extension
        "kernels/backend.py", "kernels/packed_linear/choices.py", "lmvae_fast/integrations/langvae/tokenization.py",
    }  # fmt: skip
    found = {
        str(path.relative_to(root))
        for folder in ("lmvae_fast", "kernels")
        for path in (root / folder).rglob("*.py")
        if re.search(r"json\.loads?\(|yaml\.(safe_)?load", path.read_text())
    }
    assert found == own


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path, encoding):
    path = tmp_path / "x.json"
    path.write_bytes('["a cat"]'.encode(encoding))
    with pytest.raises(ConfigError, match=f"iconv -f {encoding.replace('16-', '16')} -t utf-8"):
        read_json(path, error=ConfigError)
    path.write_bytes(b'["a\\0cat", "\0"]')
    with pytest.raises(DataError, match="byte 0"):
        read_text(path)
