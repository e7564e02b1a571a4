"""Tokenizers of the kinds that models come with, as small as can be."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>")
VOCABULARY = 6000
# How Llama 3 and Qwen split: line ends go with the full stop before them, several of them together.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_level(texts: Iterable[str], *, start: bool = False) -> Any:
    """Byte-level BPE that splits as Llama 3 does; with `start`, it puts a start token before every text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_LLAMA_3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _wrapped(inner, start=start)


def sentence_piece(
    texts: Iterable[str], *, start: bool = False, doubles: bool = False, more: tuple[str, ...] = ()
) -> Any:
    """BPE over characters that writes a blank before every text and falls back to bytes, as Llama 2's.

    Args:
        doubles: a blank comes before a text that has one already.
        more: pieces that are whole from the beginning.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(
        (text.replace("\n", " ") for text in texts), trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *more]
    pieces += [piece for piece in model["vocab"] if piece not in pieces]
    merges = [tuple(pair) for pair in model["merges"]]
    merges += [(piece[0], piece[1:]) for piece in more if len(piece) == 2]
    inner = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    if doubles:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _wrapped(inner, start=start)


def _wrapped(inner: Any, *, start: bool) -> Any:
    if start:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=10**6
    )
