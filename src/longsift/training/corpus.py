"""Documents to token ids: a tokenizer, and the tokenised corpus in one array."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from longsift.documents import BadRow, ReadOptions, read_documents
from longsift.errors import InputError, UsageError
from longsift.shards import write_json
from longsift.sources import find_sources
from longsift.tables import publish

END_OF_TEXT = "<|endoftext|>"
# Llama 3's split: contractions, words with one leading mark, digits by three, punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Ids = npt.NDArray[np.uint16]


def read_texts(inputs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Give (text, category) of every document of files, folders, globs or urls, as `longsift run` reads them.

    Raises:
        InputError: nothing to read, or a row that is no document of text.
    """
    for source in find_sources(inputs):
        for row in read_documents(source, ReadOptions()):
            if isinstance(row, BadRow):
                raise InputError(f"{row.file}, row {row.row}: {row.reason}")
            if row.text is not None:
                yield row.text, row.group


def sample_texts(
    documents: Iterable[tuple[str, str]], weights: Mapping[str, float], group_chars: int, document_chars: int
) -> Iterator[str]:
    """Give one random slice of each document, at most `group_chars` · weight characters a category."""
    chance = random.Random(0)
    left: dict[str, float] = {}
    for text, group in documents:
        left.setdefault(group, group_chars * weights.get(group, 1.0))
        size = int(min(document_chars, left[group], len(text)))
        if size > 0:
            start = chance.randint(0, len(text) - size)
            left[group] -= size
            yield text[start : start + size]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a lossless byte-level BPE tokenizer.

    Args:
        texts: any text; all 256 bytes are in the vocabulary whatever it holds.
        vocab_size: tokens in all, the one special token `<|endoftext|>` (id 0) included.

    Returns:
        A tokenizer that adds no special token and decodes to exactly the text it was given.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` so that AutoTokenizer loads them."""
    folder.mkdir(parents=True, exist_ok=True)
    with publish(folder / "tokenizer.json") as path:
        tokenizer.save(str(path), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
    }
    write_json(folder / "tokenizer_config.json", settings)


@dataclass(frozen=True, slots=True)
class Packed:
    """Tokenised documents end to end.

    Attributes:
        tokens: all token ids, (total,); every document ends with `<|endoftext|>`.
        ends: offset after each document's last token, (documents,).
        groups: each document's category.
        token_bytes: UTF-8 bytes that each vocabulary entry stands for, (vocab_size,); 0 for the special token.
    """

    tokens: Ids
    ends: npt.NDArray[np.int64]
    groups: tuple[str, ...]
    token_bytes: npt.NDArray[np.int64]

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Offset of each document's first token, (documents,)."""
        return np.concatenate(([0], self.ends[:-1])).astype(np.int64)


def pack(documents: Iterable[tuple[str, str]], tokenizer: tokenizers.Tokenizer, batch_chars: int = 1 << 25) -> Packed:
    """Tokenise documents on all cores.

    Args:
        documents: (text, category) of each.
        tokenizer: as `train_tokenizer` makes it.
        batch_chars: characters to hold and tokenise at a time; many, so that one long document delays few.

    Raises:
        UsageError: the vocabulary does not fit 16 bits, or has no `<|endoftext|>`.
        InputError: there is no document.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None or tokenizer.get_vocab_size() > 1 << 16:
        raise UsageError(f"the tokenizer needs {END_OF_TEXT} and at most 65,536 tokens; make it with `tokenizer`")
    pieces: list[Ids] = []
    groups: list[str] = []

    def encode(texts: list[str]) -> None:
        # The longest first, so that the last core at work is busy with a short one.
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        encodings = tokenizer.encode_batch_fast([texts[place] for place in order])
        found = dict(zip(order, encodings, strict=True))
        pieces.extend(np.array([*found[place].ids, end], dtype=np.uint16) for place in range(len(texts)))

    waiting: list[str] = []
    chars = 0
    for text, group in documents:
        waiting.append(text)
        groups.append(group)
        chars += len(text)
        if chars >= batch_chars:
            encode(waiting)
            waiting, chars = [], 0
    encode(waiting)
    if not pieces:
        raise InputError("no documents to pack; give at least one row with a `text`")
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    return Packed(np.concatenate(pieces), np.cumsum(lengths), tuple(groups), token_bytes(tokenizer))


def token_bytes(tokenizer: tokenizers.Tokenizer) -> npt.NDArray[np.int64]:
    """UTF-8 bytes that each entry of a byte-level vocabulary stands for, (vocab_size,); 0 for the special token."""
    # Such a vocabulary writes each byte as one character, so a token's length is its number of bytes.
    sizes = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        sizes[index] = 0 if token == END_OF_TEXT else len(token)
    return sizes


def save_packed(packed: Packed, folder: Path) -> None:
    """Write a `Packed` as a folder of `tokens.npy` and `documents.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    with publish(folder / "tokens.npy") as path, path.open("wb") as file:
        np.save(file, packed.tokens)
    index = {
        "ends": packed.ends.tolist(),
        "groups": list(packed.groups),
        "token_bytes": packed.token_bytes.tolist(),
    }
    write_json(folder / "documents.json", index)


def load_packed(folders: Sequence[Path]) -> Packed:
    """Read folders written by `save_packed` as one.

    Raises:
        InputError: a folder is not a packed one, or they were made with different tokenizers.
    """
    tokens: list[Ids] = []
    ends: list[npt.NDArray[np.int64]] = []
    groups: list[str] = []
    sizes: list[npt.NDArray[np.int64]] = []
    total = 0
    for folder in folders:
        try:
            index = json.loads((folder / "documents.json").read_text(encoding="utf-8"))
            tokens.append(np.load(folder / "tokens.npy"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} is not a packed folder ({error}); make one with `pack`") from error
        ends.append(np.array(index["ends"], dtype=np.int64) + total)
        groups += index["groups"]
        sizes.append(np.array(index["token_bytes"], dtype=np.int64))
        total += len(tokens[-1])
    if any(not np.array_equal(sizes[0], other) for other in sizes):
        raise InputError("the packed folders have different vocabularies; pack them with one tokenizer")
    return Packed(np.concatenate(tokens), np.concatenate(ends), tuple(groups), sizes[0])
