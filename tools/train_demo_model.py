"""Trains the demo model on generated stories and writes it with its model card.

    python tools/train_demo_model.py [--minutes 45] [--out kvslim/demo/model]

The length of a run is wall-clock time, so two machines train on different
numbers of stories; the order of the stories depends on the seed only.
"""

import argparse
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvslim.demo import MODEL_DIR
from kvslim.demo.card import TrainingRecord, model_card, recall_accuracy
from kvslim.demo.lexicon import EVENTS, KINDS, NAMES
from kvslim.demo.world import document

BOS, EOS = "<bos>", "<eos>"
MAX_LENGTH = 2048
ANSWER_WEIGHT = 8.0
PEAK_LR = 4e-3
WARMUP_STEPS = 100
# (end of the phase as a share of the run, tokens per story, stories per step). Recall
# circuits form quickest where few facts compete, and short steps are cheap.
CURRICULUM = (
    (0.15, 128, 16),
    (0.35, 256, 12),
    (0.55, 512, 8),
    (0.78, 1024, 4),
    (1.0, MAX_LENGTH, 2),
)

log = logging.getLogger("train_demo_model")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE in which every word of the world is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_tokenizer_text(), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _tokenizer_text() -> Iterator[str]:
    """Yields stories, then each word on its own, as rare words need merges too."""
    for seed in range(200):
        yield document(seed, "train", 500)
    words = [*NAMES, *" ".join(EVENTS).replace(".", "").split()]
    for kind in KINDS:
        words += [kind.noun, kind.category, *kind.values]
    for word in words:
        yield f" {word}" * 50


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.03,
    )
    return LlamaForCausalLM(config)


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Returns Muon for the layers' matrices and AdamW for embeddings and norms."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [embedding, *(p for p in model.parameters() if p.ndim < 2)]
    return [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class StoryBatches:
    """Batches of fresh train stories, each row one story cut to the length."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.next_seed = seed * 1_000_000_000
        self.answer_mark = tokenizer.encode(" Answer:", add_special_tokens=False)[-2:]

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """Returns token ids, shape [rows, length]."""
        texts = [document(self.next_seed + i, "train", length) for i in range(rows)]
        self.next_seed += rows
        encoded = self.tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        return torch.tensor(encoded)

    def weights(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the loss weight of each target ``ids[:, 1:]``, same shape."""
        weights = torch.ones(ids.shape[0], ids.shape[1] - 1)
        first, second = self.answer_mark
        answers = (ids[:, :-2] == first) & (ids[:, 1:-1] == second)
        weights[:, 1:][answers] = ANSWER_WEIGHT
        return weights


def batch_shape(progress: float) -> tuple[int, int]:
    """Returns the curriculum's (stories, tokens per story) at ``progress`` in [0, 1]."""
    _, length, rows = next((p for p in CURRICULUM if progress < p[0]), CURRICULUM[-1])
    return rows, length


def learning_rate(step: int, progress: float) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * cosine)


def answer_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns the weighted mean cross-entropy of the next tokens, in nats."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum()


@dataclass
class Run:
    """One training run; ``train`` ends after ``minutes`` of wall-clock time."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    minutes: float
    seed: int
    checkpoints: Path | None = None

    def __post_init__(self) -> None:
        self.batches = StoryBatches(self.tokenizer, self.seed)
        self.optimizers = build_optimizers(self.model)
        self.tokens = 0

    def train(self) -> None:
        start = reported = time.monotonic()
        step, progress = 0, 0.0
        while progress < 1:
            loss = self._step(batch_shape(progress), learning_rate(step, progress))
            step += 1
            progress = (time.monotonic() - start) / (60 * self.minutes)
            if time.monotonic() - reported > 90:
                self._report(step, progress, loss)
                reported = time.monotonic()

    def _step(self, shape: tuple[int, int], lr: float) -> float:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        ids = self.batches.batch(*shape)
        weights = self.batches.weights(ids).to(self.model.device)
        loss = answer_loss(self.model, ids.to(self.model.device), weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.tokens += ids.numel()
        return loss.item()

    def _report(self, step: int, progress: float, loss: float) -> None:
        recalls = {d: recall_accuracy(self.model, self.tokenizer, d, 50) for d in (128, 512, 1024)}
        log.info(
            "step %d, %.0f %%, %.1f M tokens, shape %s, loss %.3f, recall %s",
            step, 100 * progress, self.tokens / 1e6, batch_shape(progress), loss, recalls,
        )  # fmt: skip
        if self.checkpoints:
            save(self.model, self.tokenizer, self.checkpoints)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes weights rounded to bfloat16; the configuration loads them as float32."""
    rounded = {k: v.detach().to(torch.bfloat16) for k, v in model.state_dict().items()}
    # Tied to the embedding, which holds it already.
    del rounded["lm_head.weight"]
    model.save_pretrained(out, state_dict=rounded)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    tokenizer = build_tokenizer()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(tokenizer, args.seed).to(device)
    run = Run(model, tokenizer, args.minutes, args.seed, args.checkpoints)
    run.train()
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
