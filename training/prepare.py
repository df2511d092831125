"""Turn a folder of texts into a tokenizer and packed tokens, ready for train.py.

    python training/prepare.py --corpus texts --out tokens

Reads every *.txt and *.txt.xz directly in the corpus folder: UTF-8, documents separated by a line that holds
only `<|endoftext|>`. Writes three files to the output folder:

    tokenizer.json  byte-level BPE, in the format of the `tokenizers` library
    train.npy       [tokens] uint16: every document followed by one `<|endoftext|>` (id 0)
    val.npy         the same for the documents held out

No random number is drawn. The SHA-256 of a document's text decides its place and whether it is held out, so
adding, renaming or compressing files moves no other document between training and validation.
"""

import argparse
import hashlib
import lzma
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

END_OF_TEXT = "<|endoftext|>"  # id 0; also what separates two documents in a corpus file
PADDING = "<|padding|>"  # id 1
CHAT_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
)  # the last two ids; MPT's chat models have them, this corpus does not
SMALLEST_VOCAB = 2 + 256 + len(CHAT_TOKENS)  # the special tokens and one token per byte: no merges at all
ENCODE_BATCH = 256  # documents handed to the tokenizer at once; bounds memory, changes no result


def read_documents(folder: Path) -> dict[str, str]:
    """Return the folder's distinct documents, text by SHA-256 hex digest, in digest order.

    The order is a shuffle that needs no seed. A document that occurs twice, in one file or in two, is kept
    once. Subfolders are not read.
    """
    documents = {}
    for path in sorted(folder.glob("*.txt")) + sorted(folder.glob("*.txt.xz")):
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
            content = file.read()
        for part in re.split(rf"^{re.escape(END_OF_TEXT)}$", content, flags=re.MULTILINE):
            if text := part.strip("\n"):
                documents[hashlib.sha256(text.encode()).hexdigest()] = text
    if not documents:
        raise SystemExit(f"no documents in {folder}: it needs *.txt or *.txt.xz files")
    return dict(sorted(documents.items()))


def split_documents(documents: dict[str, str], val_every: int) -> tuple[list[str], list[str]]:
    """Return the texts to train on and those held out: about one in val_every, picked by digest."""
    train: list[str] = []
    val: list[str] = []
    for digest, text in documents.items():
        (val if int(digest, 16) % val_every == 0 else train).append(text)
    if not train or not val:
        raise SystemExit(
            f"`--val-every` {val_every} splits {len(documents)} documents into {len(train)} to train on and "
            f"{len(val)} held out; both need one at least"
        )
    return train, val


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of vocab_size tokens, special tokens included.

    The recipe is GPT-NeoX-20B's (arXiv 2204.06745), whose tokenizer MPT uses: NFC, bytes as symbols, no space
    put in front. Fewer tokens come out when the texts do not hold enough pairs that occur twice.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CHAT_TOKENS),
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so any text has tokens
        min_frequency=2,
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CHAT_TOKENS])
    return tokenizer


def pack(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.uint16]:
    """Return all texts as one row of token ids, [tokens] uint16, with the end-of-text id after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [
        np.array([*encoding.ids, end], dtype=np.uint16)
        for first in range(0, len(texts), ENCODE_BATCH)
        for encoding in tokenizer.encode_batch(texts[first : first + ENCODE_BATCH], add_special_tokens=False)
    ]
    return np.concatenate(pieces)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the checked command line; a bad value ends the program with its name and rule."""
    parser = argparse.ArgumentParser(description="Turn a folder of texts into a tokenizer and packed tokens.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.txt and *.txt.xz files")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json, train.npy and val.npy")
    parser.add_argument("--vocab-size", type=int, default=8192, help="tokens, special ones included (default 8192)")
    parser.add_argument("--val-every", type=int, default=200, help="hold out one document in this many (default 200)")
    arguments = parser.parse_args(argv)
    if not SMALLEST_VOCAB <= arguments.vocab_size <= 2**16:  # ids are stored as uint16
        parser.error(f"`--vocab-size` must be between {SMALLEST_VOCAB} and {2**16}, got {arguments.vocab_size}")
    if arguments.val_every < 2:
        parser.error(f"`--val-every` must be at least 2, got {arguments.val_every}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Write tokenizer.json, train.npy and val.npy; print how much went into each."""
    arguments = parse_arguments(argv)
    documents = read_documents(arguments.corpus)
    train, val = split_documents(documents, arguments.val_every)

    tokenizer = train_tokenizer(list(documents.values()), arguments.vocab_size)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens from {len(documents)} documents", flush=True)

    for name, texts in (("train", train), ("val", val)):
        token_ids = pack(tokenizer, texts)
        np.save(arguments.out / f"{name}.npy", token_ids)
        n_bytes = sum(len(text.encode()) for text in texts)
        print(f"{name}: {len(texts)} documents, {n_bytes} bytes, {len(token_ids)} tokens", flush=True)


if __name__ == "__main__":
    main()
