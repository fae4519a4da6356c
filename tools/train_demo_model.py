"""Trains the demo model on generated stories and writes it with its model card.

    python tools/train_demo_model.py [--million-tokens 16] [--out kvslim/demo/model]
    python tools/train_demo_model.py --mha --out tests/mha_model    # each query head with a key-value head of its own

Recall asks for a chain of attention heads: some fetch the words just before, others
match what those fetched. Learning the first kind takes most of the time of so small a
run, so layer 0 starts with heads that look 1 to 4 tokens back (Elhage et al., "A
Mathematical Framework for Transformer Circuits", 2021, name them previous-token heads);
the rest is learned.
"""

import argparse
import logging
import math
import random
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
from kvslim.demo.world import document, values_of

BOS, EOS = "<bos>", "<eos>"
MAX_LENGTH = 2048
RECALL_WEIGHT = 5.0
PEAK_LR = 4e-3
GQA, MHA = (4, 2, 64), (8, 8, 32)  # query heads, key-value heads, their size
WARMUP_STEPS = 50
# (end of the phase as a share of the run, tokens per text, texts per step, share of
# drills). Recall circuits form quickest on short texts dense in facts told again.
CURRICULUM = (
    (0.25, 128, 20, 0.8),
    (0.45, 256, 10, 0.5),
    (0.63, 512, 6, 0.25),
    (0.82, 1024, 4, 0.1),
    (1.0, MAX_LENGTH, 2, 0.0),
)
LOOK_BACK_PAIRS = 10  # RoPE pairs that turn fast enough to tell neighbours apart
LOOK_BACK_SHARPNESS = 14.0  # attention logit of the wanted neighbour

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


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, heads: tuple[int, int, int]) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    q_heads, kv_heads, head_dim = heads
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=q_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.03,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        look_back(model)
    return model


def look_back(model: LlamaForCausalLM) -> None:
    """Makes query head h of layer 0 attend h + 1 tokens back, by position alone.

    All embeddings get a common part. Every key reads it as one vector u; query head h
    reads it as u turned by RoPE's angles for h + 1 positions, so that q . k, a sum of
    cosines of the angle between them, peaks h + 1 positions before the query.
    """
    config, layer = model.config, model.model.layers[0].self_attn
    size, half = config.head_dim, config.head_dim // 2
    common = torch.full((config.hidden_size,), config.hidden_size**-0.5)
    embedding = model.model.embed_tokens.weight
    embedding += 0.5 * config.initializer_range * config.hidden_size**0.5 * common
    share = (embedding @ common / embedding.norm(dim=1)).mean().item()
    gain = (LOOK_BACK_SHARPNESS * size**0.5) ** 0.5 / (config.hidden_size**0.5 * share)
    angle = model.model.rotary_emb.inv_freq[:LOOK_BACK_PAIRS]
    keys = layer.k_proj.weight.mul_(0.1).view(-1, size, config.hidden_size)
    queries = layer.q_proj.weight.mul_(0.1).view(-1, size, config.hidden_size)
    for heads, steps in ((keys, [0] * len(keys)), (queries, range(1, len(queries) + 1))):
        for head, back in zip(heads, steps, strict=True):
            turned = torch.zeros(size)
            turned[:LOOK_BACK_PAIRS] = torch.cos(-back * angle)
            turned[half : half + LOOK_BACK_PAIRS] = torch.sin(-back * angle)
            head += gain * torch.outer(turned / LOOK_BACK_PAIRS**0.5, common)


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Returns Muon for the layers' matrices and AdamW for embeddings and norms."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [embedding, *(p for p in model.parameters() if p.ndim < 2)]
    return [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def drill(seed: int, words: int) -> str:
    """Returns a text of at least ``words`` words that tells few facts again and again."""
    rng = random.Random(f"drill/{seed}")
    names = rng.sample(NAMES, rng.randint(2, max(4, min(12, words // 30))))
    kinds = rng.sample(KINDS, rng.randint(2, max(3, min(len(KINDS), words // 40))))
    facts = [(n, k.noun, rng.choice(values_of("train", n, k))) for n in names for k in kinds]
    sentences = [f"Here is a story of {', '.join(names[:-1])} and {names[-1]}."]
    for _ in range(words // 3):
        name, noun, value = rng.choice(facts)
        sentences.append(f"{name}'s {noun} is {value}.")
    return " ".join(sentences)


class TextBatches:
    """Batches of fresh train texts, each row one text cut to the length."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.next_seed = seed * 1_000_000_000
        self.possessive, self.copula = tokenizer.encode("'s is", add_special_tokens=False)

    def batch(self, length: int, rows: int, drills: float) -> torch.Tensor:
        """Returns token ids, shape [rows, length]; a share ``drills`` of rows are drills."""
        texts = []
        for row in range(rows):
            seed = self.next_seed + row
            is_drill = row < round(drills * rows)
            texts.append(drill(seed, length) if is_drill else document(seed, "train", length))
        self.next_seed += rows
        encoded = self.tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        return torch.tensor(encoded)

    def weights(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the loss weight of each target ``ids[:, 1:]``, same shape.

        Values of facts told before in the text weigh RECALL_WEIGHT, all else 1.
        """
        weights = torch.ones(ids.shape[0], ids.shape[1] - 1)
        for row, line in enumerate(ids.tolist()):
            told = set()
            for i in range(3, len(line) - 1):
                if line[i] == self.copula and line[i - 2] == self.possessive:
                    subject = line[i - 3], line[i - 1]
                    if subject in told:
                        weights[row, i] = RECALL_WEIGHT
                    told.add(subject)
        return weights


def curriculum(progress: float) -> tuple[int, int, float]:
    """Returns (tokens per text, texts, share of drills) at ``progress`` in [0, 1]."""
    return next((p[1:] for p in CURRICULUM if progress < p[0]), CURRICULUM[-1][1:])


def learning_rate(step: int, progress: float) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * cosine)


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Returns the weighted mean cross-entropy in nats, and that of recalled values."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights.flatten()
    recalled = losses.detach()[weights > 1].mean().item()
    return (losses * weights).sum() / weights.sum(), recalled


@dataclass
class Run:
    """One training run over ``million_tokens`` of generated text."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    million_tokens: float
    seed: int
    checkpoints: Path | None = None

    def __post_init__(self) -> None:
        self.batches = TextBatches(self.tokenizer, self.seed)
        self.optimizers = build_optimizers(self.model)
        self.tokens = 0
        self.minutes = 0.0

    def train(self) -> None:
        """Trains through the whole curriculum, logging recall every minute."""
        start = reported = time.monotonic()
        step, progress = 0, 0.0
        while progress < 1:
            losses = self._step(curriculum(progress), learning_rate(step, progress))
            step += 1
            progress = self.tokens / (1e6 * self.million_tokens)
            if time.monotonic() - reported > 60:
                self._report(step, progress, losses)
                reported = time.monotonic()
        self.minutes = (time.monotonic() - start) / 60

    def _step(self, phase: tuple[int, int, float], lr: float) -> tuple[float, float]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        ids = self.batches.batch(*phase)
        weights = self.batches.weights(ids).to(self.model.device)
        loss, recalled = weighted_loss(self.model, ids.to(self.model.device), weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.tokens += ids.numel()
        return loss.item(), recalled

    def _report(self, step: int, progress: float, losses: tuple[float, float]) -> None:
        recalls = {d: recall_accuracy(self.model, self.tokenizer, d, 25) for d in (64, 256, 1024)}
        log.info(
            "step %d, %.0f %%, %.1f M tokens, shape %s, loss %.3f, of recalls %.3f, recall %s",
            step, 100 * progress, self.tokens / 1e6, curriculum(progress), *losses, recalls,
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
    (out / "model.safetensors").chmod(0o644)


def write_card(run: Run, out: Path) -> None:
    """Measures the saved, rounded weights and writes the model card beside them."""
    mha = " --mha" if run.model.config.num_key_value_heads == MHA[1] else ""
    record = TrainingRecord(
        minutes=run.minutes,
        million_tokens=run.tokens / 1e6,
        device=run.model.device.type.upper(),
        command=f"python tools/train_demo_model.py{mha} --million-tokens {run.million_tokens:g} --seed {run.seed}",
    )
    stored = LlamaForCausalLM.from_pretrained(out).eval()
    (out / "README.md").write_text(model_card(stored, run.tokenizer, record), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--million-tokens", type=float, default=16.0)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mha", action="store_true", help="a key-value head for every query head")
    parser.add_argument("--checkpoints", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    tokenizer = build_tokenizer()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(tokenizer, args.seed, MHA if args.mha else GQA).to(device)
    run = Run(model, tokenizer, args.million_tokens, args.seed, args.checkpoints)
    run.train()
    save(model, tokenizer, args.out)
    write_card(run, args.out)


if __name__ == "__main__":
    main()
