"""The generator of the demo world, and the demo model trained on it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvslim.demo import MODEL_DIR
from kvslim.demo.lexicon import EVENTS, KINDS, NAMES
from kvslim.demo.world import (
    RecallQuestion,
    calibration_text,
    document,
    heldout_text,
    recall_questions,
    values_of,
)

ROOT = Path(__file__).parents[1]
NOUNS = "|".join(kind.noun for kind in KINDS)
FACT = re.compile(rf"(\w+)'s ({NOUNS}) is (\w+)\.")
ASKED = re.compile(rf"Question: what \w+ is \w+'s (?:{NOUNS})\? Answer: (\w+)'s ({NOUNS}) is (\w+)\.")
KIND_OF_NOUN = {kind.noun: kind for kind in KINDS}


def count_pieces(text: str) -> int:
    """Counts words and punctuation marks, close to what the tokenizer counts."""
    return len(re.findall(r"'s|\w+|[^\w\s]", text))


def facts(text: str) -> set[tuple[str, ...]]:
    return set(FACT.findall(text))


def split_at_fact(question: RecallQuestion) -> tuple[str, str, str, str]:
    """Returns the asked name and noun, and the text between fact and question."""
    story, _, asked = question.prompt.rpartition(" Question: ")
    found = re.search(rf"Answer: (\w+)'s ({NOUNS}) is$", asked)
    assert found
    name, noun = found.groups()
    before, _, between = story.partition(f"{name}'s {noun} is{question.answer}.")
    return name, noun, before, between


def test_document_repeats_when_seed_repeats() -> None:
    assert document(3, "train", 200) == document(3, "train", 200)
    assert document(3, "train", 200) != document(4, "train", 200)


@pytest.mark.parametrize("words", [1, 50, 700])
def test_document_has_the_length_asked_for(words: int) -> None:
    assert words <= len(document(0, "heldout", words).split(" ")) < words + 60


def test_document_raises_when_words_not_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        document(0, "train", 0)


def test_world_import_leaves_torch_alone() -> None:
    code = "import sys, kvslim.demo.world\nsys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_values_are_split_without_overlap() -> None:
    for name in NAMES:
        for kind in KINDS:
            train, heldout = (set(values_of(s, name, kind)) for s in ("train", "heldout"))
            assert len(heldout) > 1
            assert train | heldout == set(kind.values)
            assert not train & heldout


def test_texts_of_the_splits_share_no_fact() -> None:
    train = set().union(*map(facts, calibration_text(30, 600)))
    heldout = set().union(*map(facts, heldout_text(30, 600)))
    assert len(train) > 300
    assert len(heldout) > 300
    assert not train & heldout


def test_answers_agree_with_facts_told_before() -> None:
    for text in heldout_text(5, 1200):
        for asked in ASKED.finditer(text):
            assert asked.groups() in facts(text[: asked.start()])


@pytest.mark.parametrize("distance", [64, 128, 512, 1024, 1800])
def test_recall_questions_keep_the_distance(distance: int) -> None:
    for question in recall_questions(10, distance, count_pieces):
        *_, between = split_at_fact(question)
        asked = question.prompt[question.prompt.rindex("Question:") :]
        pieces = count_pieces("." + between + asked + question.answer)
        assert question.distance == pieces
        assert abs(pieces - distance) <= 0.05 * distance


def test_recall_questions_are_not_answered_in_between() -> None:
    for question in recall_questions(40, 512, count_pieces):
        name, noun, before, between = split_at_fact(question)
        assert f"{name}'s {noun}" not in before + between
        values = {value for _, other, value in facts(between) if other == noun}
        assert values - {question.answer.strip()}
        assert question.answer.strip() in values_of("heldout", name, KIND_OF_NOUN[noun])


def test_recall_questions_follow_the_seed() -> None:
    first = recall_questions(5, 128, count_pieces)
    assert first == recall_questions(5, 128, count_pieces)
    assert first != recall_questions(5, 128, count_pieces, seed=1)


def test_recall_questions_raise_when_distance_too_short() -> None:
    with pytest.raises(ValueError, match="5 tokens"):
        recall_questions(1, 5, count_pieces)


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()


def test_tokenizer_has_one_token_for_each_word(tokenizer) -> None:
    words = {*NAMES, *re.findall(r"\b[A-Za-z]+\b", " ".join(EVENTS))} - {"name"}
    words.update(*({kind.noun, kind.category, *kind.values} for kind in KINDS))
    for word in words:
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1, word


def test_tokenizer_starts_with_bos_and_keeps_any_text(tokenizer) -> None:
    text = "Zoë's lamp — 灯 is\n red."
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_model_recalls_heldout_facts_over_512_tokens(model, tokenizer) -> None:
    from kvslim.demo.card import recall_accuracy

    assert recall_accuracy(model, tokenizer, distance=512, count=40) >= 0.9


def test_model_is_small_and_groups_its_heads(model) -> None:
    config = model.config
    assert config.num_attention_heads >= 2 * config.num_key_value_heads
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 9_000_000


def test_model_card_gives_the_figures() -> None:
    card = (MODEL_DIR / "README.md").read_text()
    assert card.startswith("---\n")
    recall = dict(re.findall(r"\| (\d+) \| ([\d.]+)% \|", card))
    assert float(recall["512"]) >= 95
    assert float(recall["1024"]) >= 90
    model, bigram, unigram = (
        float(re.search(rf"\| {row} \| ([\d.]+) \|", card)[1]) for row in ("this model", "bigram", "unigram")
    )
    assert 2 * model < bigram < unigram
