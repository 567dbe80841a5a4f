"""Documents packed into blocks of equal length, in which no token attends to another document.

A document that does not fit into a block continues in the next one, as if it began there. `position_ids` restart at 0
where a document begins; from this, transformers makes a mask that keeps documents apart. `labels` are -100 there, so
nothing is predicted from the end of another document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parscale.checkpoints.texts.documents import Document, Source
from parscale.checkpoints.texts.token_ids import encode, require_known

IGNORED = -100  # as a label: nothing is predicted here
_DOCUMENTS_AT_ONCE = 64

Block = tuple[np.ndarray, np.ndarray]  # token ids and positions, both (S,)
Row = dict[str, torch.Tensor]


class Encoder:
    """Turns documents into token ids: each with its tokenizer's special tokens, and the end-of-text token after it.

    Args:
        tokenizer: the model's tokenizer.
        vocabulary: number of token ids that the model has; without it, ids are not checked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary

    def __call__(self, documents: Iterable[Document]) -> Iterator[list[int]]:
        """The token ids of one document after another.

        Raises:
            ValueError: the tokenizer gives an id outside the vocabulary, or a text holds half a surrogate pair.
        """
        end = self.tokenizer.eos_token_id
        rest = iter(documents)
        while batch := list(islice(rest, _DOCUMENTS_AT_ONCE)):
            for ids in encode(batch, self.tokenizer):
                if end is not None and (not ids or ids[-1] != end):
                    ids.append(end)
                if self.vocabulary is not None:
                    require_known(ids, self.vocabulary)
                yield ids


def pack(encoded: Iterable[list[int]], sequence_length: int, *, padding: int | None = None) -> Iterator[Block]:
    """Blocks of `sequence_length` tokens; an incomplete last block is dropped, or padded.

    Args:
        encoded: token ids by document.
        sequence_length: S.
        padding: a token id that fills the last block; its positions restart at 0, so no token sees it.

    Returns:
        The blocks, one by one.
    """
    ids: list[int] = []
    positions: list[int] = []
    for document in encoded:
        start = 0
        while start < len(document):
            piece = document[start : start + sequence_length - len(ids)]
            ids += piece
            positions += range(len(piece))
            start += len(piece)
            if len(ids) == sequence_length:
                yield np.array(ids, dtype=np.int32), np.array(positions, dtype=np.int32)
                ids, positions = [], []
    if ids and padding is not None:
        missing = sequence_length - len(ids)
        ids += [padding] * missing
        # every padding token is a document of its own, in which nothing is predicted
        positions += [0] * missing
        yield np.array(ids, dtype=np.int32), np.array(positions, dtype=np.int32)


class Blocks(Dataset[Row]):
    """Packed blocks in memory, as rows for the Trainer: `input_ids`, `position_ids` and `labels`, each `(S,)`.

    Attributes:
        ids: the tokens of all blocks, `(n, S)`.
        positions: of each token in its document, or in its piece of a document, `(n, S)`.
    """

    def __init__(self, blocks: Iterable[Block], sequence_length: int) -> None:
        pairs = list(blocks)
        shape = (len(pairs), sequence_length)
        self.ids = np.stack([ids for ids, _ in pairs]) if pairs else np.zeros(shape, dtype=np.int32)
        self.positions = np.stack([positions for _, positions in pairs]) if pairs else np.zeros(shape, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Row:
        return as_row((self.ids[index], self.positions[index]))

    def fingerprint(self) -> str:
        """A digest of tokens and document boundaries."""
        digest = hashlib.sha256(self.ids.tobytes())
        digest.update(self.positions.tobytes())
        return digest.hexdigest()


def pack_documents(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    vocabulary: int | None = None,
) -> Blocks:
    """Documents as rows for the Trainer, each followed by the end-of-text token, as `train` packs them.

    An incomplete last block is dropped.

    Args:
        documents: pairs of a name and a text.
        tokenizer: the model's tokenizer.
        sequence_length: S, of a block, in tokens.
        vocabulary: number of token ids that the model has; without it, ids are not checked.

    Returns:
        The rows.

    Raises:
        ValueError: `sequence_length` is below 1, the tokenizer gives an id outside the vocabulary, or a text holds half
            a surrogate pair.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length is {sequence_length}, and must be at least 1.")
    return Blocks(pack(Encoder(tokenizer, vocabulary)(documents), sequence_length), sequence_length)


class Shuffled(Dataset[Row]):
    """`count` rows drawn from blocks: all of them in one random order, then all in another, and so on.

    The order depends only on the seed, not on the number of processes or devices.
    """

    def __init__(self, blocks: Blocks, count: int, seed: int) -> None:
        self.blocks, self.count, self.seed = blocks, count, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        epoch, place = divmod(index, len(self.blocks))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.blocks), generator=generator)
        return self.blocks[int(self._order[place])]


class Streamed(IterableDataset[Row]):
    """`count` rows packed from sources while they are read; after the end of the sources it starts again.

    Iterating raises `ValueError` if the sources hold less than one block or are damaged.
    """

    def __init__(self, sources: list[Source], encode: Encoder, sequence_length: int, count: int) -> None:
        self.sources, self.encode, self.sequence_length, self.count = sources, encode, sequence_length, count

    def __iter__(self) -> Iterator[Row]:
        left = self.count
        while left:
            found = False
            for block in islice(pack(self.encode(documents_of(self.sources)), self.sequence_length), left):
                found, left = True, left - 1
                yield as_row(block)
            if not found:
                raise too_few(self.sources, self.encode, self.sequence_length)


def as_row(block: Block) -> Row:
    """A block as the model's inputs, with labels."""
    ids, positions = (torch.from_numpy(part.astype(np.int64)) for part in block)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, IGNORED)}


def documents_of(sources: Sequence[Source]) -> Iterator[Document]:
    """The documents of all sources, one source after another."""
    return (document for source in sources for document in source)


def too_few(sources: Sequence[Source], encode: Encoder, sequence_length: int) -> ValueError:
    """The error for data with less text than one block."""
    tokens = sum(map(len, encode(documents_of(sources))))
    return ValueError(
        f"The data holds {tokens:,} tokens, fewer than one sequence of {sequence_length:,}; give more text, or a "
        "smaller sequence length."
    )


def keeps_documents_apart(model: PreTrainedModel, vocabulary: int) -> bool:
    """Whether a model's outputs for a document stay the same if another document comes before it in one block.

    This fails for models with layers that carry a state along (such as Mamba), or that make no mask from positions.
    """
    weight: Any = model.get_input_embeddings().weight
    ids = torch.arange(2, 14, device=weight.device).remainder(vocabulary)[None]  # (1, 12)
    positions = torch.arange(6, device=weight.device).repeat(2)[None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 6:].float()
            alone = model(input_ids=ids[:, 6:], position_ids=positions[:, 6:], use_cache=False).logits.float()
    finally:
        model.train(was_training)
    scale = max(1.0, float(alone.abs().max()))
    return bool((packed - alone).abs().max() < 0.02 * scale)
