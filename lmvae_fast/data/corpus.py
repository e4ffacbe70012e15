"""The bundled corpus: explanation-like sentences from a grammar of ours, with semantic roles and known factors.

Every sentence says one thing of one noun: ``most young bears often eat fish for energy``. It is made from one fact of
the lexicon and four free choices (determiner, modifier, adverb, adjunct), so its generative factors are known, and no
two derivations give the same sentence. The corpus needs no download, and is the same for a seed everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from lmvae_fast.data.dataset import DataReport, SentenceDataset
from lmvae_fast.data.lexicon import FACTS, NOUNS, Fact, Noun
from lmvae_fast.data.stable_random import distinct_below, generator, shuffled
from lmvae_fast.errors import DataError

#: One word and its semantic role.
Word = tuple[str, str]

_ANY = ("a", "the", "none", "some", "many", "most")


@dataclass(frozen=True)
class _Predicate:
    """What may be chosen with a predicate: quantifiers of count and of mass nouns, adverbs, adjuncts of every fact."""

    count: tuple[str, ...] = _ANY
    mass: tuple[str, ...] = ("none", "some", "most")
    adverbs: tuple[str, ...] = ()
    adjuncts: tuple[str, ...] = ()


#: A corpus of explanations mostly says what is so: how many true facts to each false one, where both are to be had.
_HOLDS_WEIGHT = 3

_FREQUENCY = ("often", "usually", "sometimes")

_PREDICATES = {
    "kind": _Predicate(count=("a", "the", "none"), mass=("none",)),
    "have": _Predicate(),
    "eat": _Predicate(adverbs=_FREQUENCY, adjuncts=("for energy",)),
    "live": _Predicate(adverbs=_FREQUENCY),
    "grow": _Predicate(adverbs=_FREQUENCY, adjuncts=("in spring", "in summer")),
    "need": _Predicate(),
    "produce": _Predicate(),
    "made": _Predicate(),
    "contain": _Predicate(),
    "use": _Predicate(adverbs=_FREQUENCY),
    "cause": _Predicate(adverbs=_FREQUENCY, adjuncts=("in spring", "in summer", "in winter")),
    "can": _Predicate(adverbs=("easily",)),
    "if": _Predicate(count=("a", "the", "none", "some"), mass=("none", "some", "the")),
    "define": _Predicate(count=("a", "none", "some", "many"), mass=("none", "some")),
    "found": _Predicate(adverbs=_FREQUENCY),
}

# Verbs with an object of their own: third person singular; plural, also the form after "does not"; roles of subject
# and object.
_VERBS = {
    "have": ("has", "have", "ARG0", "ARG1"),
    "eat": ("eats", "eat", "ARG0", "ARG1"),
    "live": ("lives", "live", "ARG0", "ARGM-LOC"),
    "grow": ("grows", "grow", "ARG1", "ARGM-LOC"),
    "need": ("needs", "need", "ARG0", "ARG1"),
    "produce": ("produces", "produce", "ARG0", "ARG1"),
    "contain": ("contains", "contain", "ARG0", "ARG1"),
    "cause": ("causes", "cause", "ARG0", "ARG1"),
}

# is/are + participle: the participle, the words before the object and the object's role.
_PASSIVES = {"made": ("made", "of", "ARG2"), "use": ("used", "for", "ARGM-PRP"), "found": ("found", "", "ARGM-LOC")}

# What a process does, with the verb for one and for many: "melting is when <noun> changes into a liquid".
_PROCESSES = {
    "melting": ("changes", "change", "into a liquid"),
    "freezing": ("changes", "change", "into a solid"),
    "boiling": ("changes", "change", "into a gas"),
    "evaporation": ("becomes", "become", "a gas in the air"),
    "hunting": ("eats", "eat", "small animals"),
    "migration": ("moves", "move", "to a warm place"),
    "pollination": ("carries", "carry", "nectar between flowers"),
    "digestion": ("breaks", "break", "down food"),
    "breathing": ("takes", "take", "in oxygen"),
    "growth": ("becomes", "become", "larger"),
    "photosynthesis": ("makes", "make", "sugar from sunlight"),
    "hibernation": ("lives", "live", "in a cave"),
    "erosion": ("breaks", "break", "down rocks"),
    "cooking": ("is", "are", "heated in a pot"),
    "recycling": ("is", "are", "made into new objects"),
    "burning": ("changes", "change", "into smoke and heat"),
    "transport": ("carries", "carry", "people to a place"),
}

_PLURAL_OF_CONDITION = {"is": "are", "gets": "get"}

_ADJUNCT_ROLES = {"to": "ARGM-PRP", "for": "ARGM-PRP", "in": "ARGM-TMP", "at": "ARGM-TMP", "by": "ARGM-MNR"}


@dataclass(frozen=True)
class _Block:
    """All sentences about one fact: every choice of determiner, modifier, adverb and adjunct."""

    predicate: str
    fact: Fact

    @property
    def noun(self) -> Noun:
        return NOUNS[self.fact.noun]

    @property
    def choices(self) -> tuple[Sequence[str], ...]:
        rules = _PREDICATES[self.predicate]
        adverbs = rules.adverbs
        if not self.fact.holds:
            # "does not sometimes eat" and "can not easily fly" are not what anybody says.
            adverbs = tuple(word for word in adverbs if word not in ("sometimes", "easily"))
        return (
            rules.count if self.noun.plural else rules.mass,
            ("none", *self.noun.modifiers),
            ("none", *adverbs),
            ("none", *rules.adjuncts, *self.fact.adjuncts),
        )

    @property
    def size(self) -> int:
        size = 1
        for options in self.choices:
            size *= len(options)
        return size

    def factors(self, index: int) -> dict[str, str]:
        """Factors of sentence ``index`` in [0, size)."""
        chosen = []
        for options in self.choices:
            index, place = divmod(index, len(options))
            chosen.append(options[place])
        quantifier, modifier, adverb, adjunct = chosen
        noun, thing = self.noun, self.fact.thing
        if self.predicate == "if":
            adjunct, thing = (part.strip() for part in thing.split("="))
        return {
            "predicate": self.predicate,
            "topic": noun.topic,
            "subject": noun.singular,
            "number": "mass" if noun.plural is None else "singular" if quantifier in ("a", "the") else "plural",
            "quantifier": quantifier,
            "modifier": modifier,
            "object": thing,
            "negation": "affirmative" if self.fact.holds else "negative",
            "adverb": adverb,
            "adjunct": adjunct,
        }

    def sentence(self, index: int) -> tuple[str, tuple[str, ...], dict[str, str]]:
        """Text, labels and factors of sentence ``index`` in [0, size)."""
        factors = self.factors(index)
        words = _clause(self.noun, factors)
        return " ".join(word for word, _ in words), tuple(label for _, label in words), factors


def _noun_phrase(noun: Noun, factors: dict[str, str]) -> list[str]:
    quantifier, modifier, number = factors["quantifier"], factors["modifier"], factors["number"]
    head = noun.plural if number == "plural" and noun.plural is not None else noun.singular
    words = [head] if modifier == "none" else [modifier, head]
    if quantifier == "a":
        return ["an" if words[0][0] in "aeiou" else "a", *words]
    return words if quantifier == "none" else [quantifier, *words]


def _labelled(words: str | Sequence[str], label: str) -> list[Word]:
    return [(word, label) for word in (words.split() if isinstance(words, str) else words)]


def _clause(noun: Noun, factors: dict[str, str]) -> list[Word]:
    """The words and roles of the sentence with these factors. Nothing else goes in: they say all there is to say."""
    predicate, thing, adverb, adjunct = (factors[name] for name in ("predicate", "object", "adverb", "adjunct"))
    plural, holds = factors["number"] == "plural", factors["negation"] == "affirmative"
    subject = _noun_phrase(noun, factors)
    be = "are" if plural else "is"
    negation = [] if holds else [("not", "ARGM-NEG")]
    often = [] if adverb == "none" else [(adverb, "ARGM-MNR" if adverb == "easily" else "ARGM-TMP")]
    tail = [] if adjunct == "none" else _labelled(adjunct, _ADJUNCT_ROLES.get(adjunct.split()[0], "ARGM-ADV"))

    if predicate in _VERBS:
        singular, base, agent, patient = _VERBS[predicate]
        head = _labelled(subject, agent)
        if holds:
            verb = [*often, (base if plural else singular, "V")]
        else:
            verb = [("do" if plural else "does", "O"), *negation, *often, (base, "V")]
        return [*head, *verb, *_labelled(thing, patient), *tail]

    if predicate in _PASSIVES:
        participle, preposition, role = _PASSIVES[predicate]
        verb = [(be, "O"), *negation, *often, (participle, "V")]
        return [*_labelled(subject, "ARG1"), *verb, *_labelled(f"{preposition} {thing}", role)]

    if predicate == "kind":
        return [*_labelled(subject, "ARG1"), (be, "V"), *negation, *_labelled(f"a kind of {thing}", "ARG2")]

    if predicate == "can":
        ability, *rest = thing.split()
        head = [*_labelled(subject, "ARG0"), ("can", "ARGM-MOD"), *negation, *often, (ability, "V")]
        return [*head, *_labelled(rest, "ARG1")]

    if predicate == "if":
        condition = adjunct.split()
        if plural:
            condition[0] = _PLURAL_OF_CONDITION[condition[0]]
        result, *rest = thing.split()
        return [
            *_labelled(["if", *subject, *condition], "ARGM-ADV"),
            ("then", "O"),
            ("they" if plural else "it", "ARG1"),
            ("will", "ARGM-MOD"),
            *negation,
            (result, "V"),
            *_labelled(rest, "ARG2"),
        ]

    assert predicate == "define", predicate
    singular, base, complement = _PROCESSES[thing]
    event = ["when", *subject, base if plural else singular, *complement.split()]
    return [(thing, "ARG1"), ("is", "V"), *_labelled(event, "ARG2"), *_labelled(adjunct if tail else "", "ARG2")]


@lru_cache(maxsize=1)
def _blocks() -> tuple[_Block, ...]:
    return tuple(_Block(predicate, fact) for predicate, facts in FACTS.items() for fact in facts)


@lru_cache(maxsize=1)
def _factors() -> dict[str, tuple[str, ...]]:
    values: dict[str, set[str]] = {name: set() for name in _blocks()[0].factors(0)}
    for block in _blocks():
        choices = block.choices
        # The first and the last quantifier show every grammatical number; the choices are their own values.
        for index in (0, len(choices[0]) - 1):
            for name, value in block.factors(index).items():
                values[name].add(value)
        for name, options in zip(("quantifier", "modifier", "adverb", "adjunct"), choices, strict=True):
            values[name].update(options)
    return {name: tuple(sorted(found)) for name, found in values.items()}


@lru_cache(maxsize=1)
def corpus_size() -> int:
    """How many distinct sentences the grammar can give."""
    return sum(block.size for block in _blocks())


def generate_corpus(num_sentences: int = 20000, seed: int = 0) -> SentenceDataset:
    """Draw distinct sentences, balanced over predicates, nouns and facts, in random order.

    Args:
        num_sentences: how many, from 1 to :func:`corpus_size`.
        seed: non-negative integer; the same seed gives the same corpus on every platform and Python version.

    Returns:
        A dataset whose every example has ``labels`` (one semantic role per word: V, ARG0, ARG1, ARG2, ARGM-..., O) and
        ``factors`` (each name of :data:`FACTORS`, ``"none"`` where a sentence has no such part).

    Raises:
        DataError: more sentences asked for than the grammar has, fewer than one, or a negative seed.
    """
    if not isinstance(num_sentences, int) or isinstance(num_sentences, bool) or not 1 <= num_sentences <= corpus_size():
        raise DataError(
            "the bundled grammar cannot give that many distinct sentences",
            value=repr(num_sentences),
            limit=f"an integer from 1 to {corpus_size()}",
            remedy="ask for fewer, or read a corpus of your own with lmvae_fast.data.read",
        )
    source = generator(seed)
    blocks = _blocks()
    drawn: list[tuple[_Block, int]] = []
    for block, count in zip(blocks, _shares(blocks, num_sentences, source), strict=True):
        drawn += [(block, index) for index in distinct_below(source, block.size, count)]
    sentences = [block.sentence(index) for block, index in shuffled(drawn, source)]
    texts, labels, factors = zip(*sentences, strict=True)
    report = DataReport(f"bundled corpus, seed {seed}", "generated", read=num_sentences, kept=num_sentences)
    return SentenceDataset(texts, labels, factors, report)


def _shares(blocks: Sequence[_Block], total: int, source: random.Random) -> list[int]:
    """How many sentences each block gives: even over predicates, within one over nouns, within one over facts.

    A fact that holds gets ``_HOLDS_WEIGHT`` times the share of one that does not. A group that runs out of sentences
    leaves its share to the others of its level.
    """

    def weight(group: list[int], level: int) -> int:
        return _HOLDS_WEIGHT if level == len(keys) - 1 and blocks[group[0]].fact.holds else 1

    def divide(members: list[int], total: int, level: int) -> None:
        if level == len(keys):
            (member,) = members  # two blocks of one fact would repeat each other's sentences
            shares[member] = total
            return
        key = keys[level]
        groups = [list(group) for _, group in groupby(sorted(members, key=key), key)]
        capacities = [sum(blocks[member].size for member in group) for group in groups]
        weights = [weight(group, level) for group in groups]
        for group, share in zip(groups, _fill(capacities, weights, total, source), strict=True):
            divide(group, share, level + 1)

    shares = [0] * len(blocks)
    keys: list[Callable[[int], str]] = [
        lambda member: blocks[member].predicate,
        lambda member: blocks[member].fact.noun,
        lambda member: f"{blocks[member].fact.holds} {blocks[member].fact.thing}",
    ]
    divide(list(range(len(blocks))), total, 0)
    return shares


def _fill(capacities: Sequence[int], weights: Sequence[int], total: int, source: random.Random) -> list[int]:
    """Integers that sum to ``total``, as proportional to the weights as capacities allow; leftovers fall at random."""
    shares = [0] * len(capacities)
    open_places = shuffled(range(len(capacities)), source)
    while total:
        each = total // sum(weights[place] for place in open_places)
        for place in open_places:
            # When less than one weight's worth is left, the first places of the random order take one each.
            wanted = each * weights[place] if each else 1
            given = min(wanted, capacities[place] - shares[place], total)
            shares[place] += given
            total -= given
        open_places = [place for place in open_places if shares[place] < capacities[place]]
    return shares


#: Every factor of the corpus and its sorted values.
FACTORS: dict[str, tuple[str, ...]] = _factors()
