"""Special tokens that a text spells, in tokenizers of every kind."""

from __future__ import annotations

import pytest
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lmvae_fast.text.special_tokens import SpecialTokens

NAMES = ["[PAD]", "</s>", "[UNK]", "[MASK]"]
WORDS = ["a", "cat", "is"]


def of_kind(kind: str) -> hf.PreTrainedTokenizerFast:
    """A tokenizer that puts </s> last, with the special tokens among its words, and a mark that is none of them."""
    if kind == "unigram":
        pieces = [(name, 0.0) for name in NAMES] + [(piece, -5.0) for piece in "▁acistPADMASK[]</>"]
        backend = Tokenizer(models.Unigram(pieces, unk_id=2))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        words = {word: place for place, word in enumerate([*NAMES, *WORDS, *"[]</>"])}
        model = models.WordLevel(words, "[UNK]") if kind == "words" else models.WordPiece(words, unk_token="[UNK]")
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", eos_token="</s>", unk_token="[UNK]", mask_token="[MASK]"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mark>"]})
    return tokenizer


@pytest.mark.parametrize("kind", ["unigram", "words", "pieces"])
@pytest.mark.parametrize("marks", [False, True])
def test_what_is_spelled_is_no_special_token(kind, marks):
    tokenizer = of_kind(kind)
    special = SpecialTokens(tokenizer, marks=marks)
    text = "a </s> cat [MASK] [PAD] is <mark> a"
    plain, rows = tokenizer("a cat is a")["input_ids"], special.encode(["a cat is a", text], add_special_tokens=True)
    assert rows[0] == plain  # as the tokenizer reads it by itself
    assert rows[1][-1] == 1 and not {0, 1, 3} & set(rows[1][:-1])
    mark = tokenizer.convert_tokens_to_ids("<mark>")
    assert rows[1].count(mark) == marks
    assert special.spelled("a [PAD]") and not special.spelled("a cat") and special.spelled("<mark>") != marks
    assert special.encode([text], add_special_tokens=True, longest=3) == [[*rows[1][:2], 1]]
    assert special.encode([text], add_special_tokens=False) == [rows[1][:-1]]
    assert tokenizer(text)["input_ids"].count(3) == 1  # the tokenizer itself is left as it was


def test_the_marks_of_dialogues():
    tokenizer = of_kind("words")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    special = SpecialTokens(tokenizer, marks=True)
    assert special.marks >= {"<mark>", "<|im_end|>"} and special.texts >= {"[PAD]", "[UNK]", "[MASK]"}
