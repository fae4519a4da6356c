"""Tiny tokenizers whose characters take several tokens, and one whose tokens are words."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers


def byte_tokenizer() -> Tokenizer:
    """256 tokens, none of them special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def fallback_tokenizer() -> Tokenizer:
    """Letters and a few words, and a token per byte for all else, with the decoder of Llama's tokenizers."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"ehlo", "▁hello"]
    vocab = {word: index for index, word in enumerate(words)}
    merges = [("▁", "h"), ("▁h", "e"), ("▁he", "l"), ("▁hel", "l"), ("▁hell", "o")]
    vocab |= {piece: len(vocab) + index for index, piece in enumerate(["▁h", "▁he", "▁hel", "▁hell"])}
    model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """Words whose decoder strips the space in front of the first one, and no bytes."""
    tokenizer = Tokenizer(models.WordLevel({"▁the": 0, "▁old": 1, "▁cat": 2, "s": 3, "<unk>": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer
