"""Measures a demo model on held-out stories and writes its model card."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvslim.demo.lexicon import KINDS
from kvslim.demo.world import calibration_text, heldout_text, recall_questions

DISTANCES = (128, 256, 512, 1024)
QUESTIONS = 300
_DOCUMENTS, _NGRAM_DOCUMENTS, _WORDS = 20, 500, 1500

_CARD = """---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- kv-cache
- recall
- synthetic
---

# KVSlim demo model

A small Llama that KVSlim ships to try its methods on: really trained, on generated
stories that tell facts and ask for them later (`kvslim.demo.world`). It knows
nothing outside that world.

- Parameters: {parameters:,}; {layers} layers, hidden size {hidden}, {heads} query heads \
on {kv_heads} key-value heads of size {head_dim}, RoPE, context of {context} tokens.
- Weights: stored as bfloat16, loaded as float32; all figures are of the stored weights.
- Training: {minutes:.0f} minutes, {tokens:.0f} million tokens, on {device}.
- Command: `{command}`
- Each sequence starts with `<bos>`, which the tokenizer adds.

## Recall of held-out facts

The share of {questions} questions whose most probable next token is the answer. The
fact is told once; up to the question, the story goes on with other people's facts.
No training story tells these facts.

| Tokens between fact and answer | Right |
|---:|---:|
{recall}

Chance, a uniform guess among the values of the asked kind: {chance:.1%}.

## Perplexity per token on held-out stories

| Model | Perplexity |
|---|---:|
| this model | {perplexity:.2f} |
| bigram | {bigram:.1f} |
| unigram | {unigram:.1f} |

The n-gram models are counted on {ngram_documents} training stories, with Witten-Bell \
smoothing; the text is {documents} stories of up to {context} tokens.
"""


@dataclass(frozen=True)
class TrainingRecord:
    """How a model was trained: wall-clock minutes, millions of tokens, device, command."""

    minutes: float
    million_tokens: float
    device: str
    command: str


def model_card(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: TrainingRecord) -> str:
    """Measures the model and returns the text of its README.md."""
    recall = {d: recall_accuracy(model, tokenizer, d, QUESTIONS) for d in DISTANCES}
    config = model.config
    heldout = _token_ids(tokenizer, heldout_text(_DOCUMENTS, _WORDS))
    unigram, bigram = ngram_perplexities(
        _token_ids(tokenizer, calibration_text(_NGRAM_DOCUMENTS, _WORDS)), heldout, len(tokenizer)
    )
    return _CARD.format(
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        context=config.max_position_embeddings,
        minutes=record.minutes,
        tokens=record.million_tokens,
        device=record.device,
        command=record.command,
        questions=QUESTIONS,
        recall="\n".join(f"| {d} | {share:.1%} |" for d, share in recall.items()),
        chance=chance_level(DISTANCES[-1], tokenizer),
        perplexity=perplexity(model, heldout),
        bigram=bigram,
        unigram=unigram,
        ngram_documents=_NGRAM_DOCUMENTS,
        documents=_DOCUMENTS,
    )


@torch.no_grad()
def recall_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, distance: int, count: int) -> float:
    """Returns the share of held-out recall questions whose top-1 token is the answer."""
    right = 0
    for question in recall_questions(count, distance, lambda text: len(tokenizer.encode(text))):
        ids = torch.tensor([tokenizer.encode(question.prompt)], device=model.device)
        best = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].argmax()
        right += tokenizer.decode([int(best)]) == question.answer
    return right / count


def chance_level(distance: int, tokenizer: PreTrainedTokenizerBase) -> float:
    """Returns the expected share of right answers of a uniform guess among the kind's values."""
    choices = {value: len(kind.values) for kind in KINDS for value in kind.values}
    questions = recall_questions(QUESTIONS, distance, lambda text: len(tokenizer.encode(text)))
    return sum(1 / choices[question.answer.strip()] for question in questions) / QUESTIONS


@torch.no_grad()
def perplexity(model: PreTrainedModel, documents: list[list[int]]) -> float:
    """Returns exp of the mean cross-entropy over all tokens except the first of each text."""
    total, count = 0.0, 0
    for ids in documents:
        batch = torch.tensor([ids], device=model.device)
        logits = model(input_ids=batch, use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, batch[0, 1:], reduction="sum").item()
        count += len(ids) - 1
    return exp(total / count)


def ngram_perplexities(train: list[list[int]], heldout: list[list[int]], vocab_size: int) -> tuple[float, float]:
    """Returns the perplexities (unigram, bigram) of models counted on ``train``.

    The unigram model adds one to each count; the bigram model backs off to it with
    Witten-Bell weights.
    """
    singles = Counter(token for ids in train for token in ids[1:])
    pairs = Counter(pair for ids in train for pair in pairwise(ids))
    starts = Counter(a for ids in train for a in ids[:-1])
    followers = Counter(a for a, _ in pairs)
    total = singles.total() + vocab_size
    unigram_nats = bigram_nats = 0.0
    targets = [pair for ids in heldout for pair in pairwise(ids)]
    for a, b in targets:
        single = (singles[b] + 1) / total
        seen = starts[a] + followers[a]
        unigram_nats -= log(single)
        bigram_nats -= log((pairs[a, b] + followers[a] * single) / seen if seen else single)
    return exp(unigram_nats / len(targets)), exp(bigram_nats / len(targets))


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    limit = tokenizer.model_max_length
    return [tokenizer.encode(text, truncation=True, max_length=limit) for text in texts]
