"""Tiny random encoders with a byte tokenizer that frames texts as BERT's does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FAMILIES = ("bert", "distilbert", "roberta")
TASKS = {"feature-extraction": "Model", "fill-mask": "ForMaskedLM"}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD_ID = {"bert": 0, "distilbert": 0, "roberta": 1}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "distilbert": {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 160},
    "roberta": {**SIZES, "type_vocab_size": 1},
}


def save_encoder(family: str, task: str, folder: Path) -> Path:
    """Writes model and tokenizer; weights are large enough that every part of the graph shows in the output."""
    import torch
    import transformers

    tokenizer = _tokenizer(PAD_ID[family])
    config = transformers.AutoConfig.for_model(
        family, **CONFIGS[family], vocab_size=len(tokenizer), initializer_range=0.2, pad_token_id=PAD_ID[family]
    )
    loader = transformers.AutoModelForMaskedLM if task == "fill-mask" else transformers.AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = loader.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(pad_id: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = list(SPECIAL)
    special.insert(pad_id, special.pop(0))
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    frame = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
