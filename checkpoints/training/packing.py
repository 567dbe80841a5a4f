"""Documents packed into blocks of equal length, in which no token attends to another document.

Of chats and completions a part is learned: `labels` are -100 elsewhere, and a block with nothing to learn is left out.

A document that does not fit a block goes on in the next one, as if it began there. `position_ids` restart at 0 wherever
a document begins, from which transformers makes a mask that keeps documents apart, and `labels` are -100 there: nothing
is predicted from the end of another document.
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

from parscale.checkpoints.evaluation.text_loss import evaluating
from parscale.checkpoints.texts.chat_tokens import MaskedTokens, encode_chat, encode_completion, learned_from
from parscale.checkpoints.texts.documents import Chat, Completion, Document, Example, Source
from parscale.checkpoints.texts.order import in_turn
from parscale.checkpoints.texts.token_ids import encode, require_known
from parscale.compat.flash import flash_in_torch

IGNORED = -100  # as a label: nothing is predicted here
_DOCUMENTS_AT_ONCE = 64

# Token ids and positions, and of chats which are learned; each (S,).
Block = tuple[np.ndarray, np.ndarray] | tuple[np.ndarray, np.ndarray, np.ndarray]
Encoded = list[int] | MaskedTokens
Row = dict[str, torch.Tensor]


class Encoder:
    """Turns documents into token ids: each with its tokenizer's special tokens, and the end-of-text token after it.

    Chats are as their template writes them.

    Args:
        tokenizer: the model's tokenizer.
        vocabulary: number of token ids that the model has; without it, ids are not checked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary

    def __call__(self, documents: Iterable[Example]) -> Iterator[Encoded]:
        """Token ids of one document after another.

        Raises:
            ValueError: the tokenizer gives an id that the model does not know, a text holds half a character, or the
                chat template refuses a chat.
        """
        rest = iter(documents)
        while batch := list(islice(rest, _DOCUMENTS_AT_ONCE)):
            texts = iter(encode([(name, text) for name, text in batch if isinstance(text, str)], self.tokenizer))
            for name, contents in batch:
                for encoded in self._encoded(name, contents, texts):
                    if self.vocabulary is not None:
                        require_known(_parts(encoded)[0], self.vocabulary)
                    yield encoded

    def _encoded(self, name: str, contents: str | Completion | Chat, texts: Iterator[list[int]]) -> Iterator[Encoded]:
        if isinstance(contents, str):
            ids = next(texts)
            self._end(ids)
            yield ids
        elif isinstance(contents, Chat):
            yield from encode_chat(name, contents, self.tokenizer)
        else:
            ids, start = encode_completion(name, contents, self.tokenizer)
            self._end(ids)
            yield learned_from(start, ids)

    def _end(self, ids: list[int]) -> None:
        end = self.tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)


def pack(encoded: Iterable[Encoded], sequence_length: int, *, padding: int | None = None) -> Iterator[Block]:
    """Blocks of `sequence_length` tokens; what is left at the end and fills none is dropped, or padded.

    Args:
        encoded: token ids by document, of chats with what is learned of them.
        sequence_length: S.
        padding: a token id that fills the last block; its positions restart at 0, so no token sees it.

    Returns:
        The blocks, one by one.
    """
    ids: list[int] = []
    positions: list[int] = []
    learned: list[bool] = []
    for document, is_learned in map(_parts, encoded):
        start = 0
        while start < len(document):
            piece = document[start : start + sequence_length - len(ids)]
            ids += piece
            positions += range(len(piece))
            learned += is_learned[start : start + len(piece)]
            start += len(piece)
            if len(ids) == sequence_length:
                yield from _block(ids, positions, learned)
                ids, positions, learned = [], [], []
    if ids and padding is not None:
        missing = sequence_length - len(ids)
        ids += [padding] * missing
        # every padding token is a document of its own, in which nothing is predicted
        positions += [0] * missing
        learned += [True] * missing
        yield from _block(ids, positions, learned)


def _parts(encoded: Encoded) -> tuple[list[int], list[bool]]:
    """A document's token ids, and for each whether it is learned."""
    if isinstance(encoded, MaskedTokens):
        return encoded.ids, encoded.loss_mask
    return encoded, [True] * len(encoded)


def _block(ids: list[int], positions: list[int], learned: list[bool]) -> Iterator[Block]:
    """The block, unless nothing of it is learned: a batch of such blocks would have no loss."""
    pair = np.array(ids, dtype=np.int32), np.array(positions, dtype=np.int32)
    if all(learned):
        yield pair
    elif any(is_learned and position for is_learned, position in zip(learned, positions, strict=True)):
        yield *pair, np.array(learned)


class Blocks(Dataset[Row]):
    """Packed blocks in memory, as rows for the Trainer: `input_ids`, `position_ids` and `labels`, each `(S,)`.

    A token takes 8 bytes, and of chats 9.

    Attributes:
        ids: the tokens of all blocks, `(n, S)`.
        positions: of each in its document or piece of one, `(n, S)`.
        learned: whether each is learned, `(n, S)`; None if all are.

    Args:
        blocks: of one length.
        sequence_length: that length, S.

    Raises:
        ValueError: a block has another length.
    """

    def __init__(self, blocks: Iterable[Block], sequence_length: int) -> None:
        ids, positions, learned = bytearray(), bytearray(), bytearray()  # which grow without a second copy
        for number, block in enumerate(blocks):
            if len(block[0]) != sequence_length:
                raise ValueError(
                    f"A block holds {len(block[0])} tokens, and sequence_length is {sequence_length}; give the length "
                    "that the blocks were packed to."
                )
            ids += block[0].astype(np.int32, copy=False).tobytes()
            positions += block[1].astype(np.int32, copy=False).tobytes()
            if len(block) > 2:
                learned += b"\1" * (number * sequence_length - len(learned)) + block[2].tobytes()
        self.ids, self.positions = (np.frombuffer(x, np.int32).reshape(-1, sequence_length) for x in (ids, positions))
        self.learned: np.ndarray | None = None
        if learned:
            learned += b"\1" * (self.ids.size - len(learned))
            self.learned = np.frombuffer(learned, bool).reshape(self.ids.shape)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Row:
        pair = self.ids[index], self.positions[index]
        return as_row(pair if self.learned is None else (*pair, self.learned[index]))

    def fingerprint(self) -> str:
        """A digest of tokens, document boundaries and what is learned."""
        digest = hashlib.sha256(self.ids.data)
        digest.update(self.positions.data)
        if self.learned is not None:
            digest.update(self.learned.data)
        return digest.hexdigest()


def pack_documents(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    vocabulary: int | None = None,
) -> Blocks:
    """Documents as rows for the Trainer, each followed by the end-of-text token, as `train` packs them.

    An incomplete last block is dropped. `position_ids` keep the documents of a block apart; flash-attention reads them
    in a batch of one row only, so use a batch size of 1 with it, or `sdpa`.

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
    """`count` rows packed from sources while they are read, a document of each in turn; at their end it starts again.

    Iterating raises `ValueError` if the sources hold less than one block or are damaged.
    """

    def __init__(self, sources: list[Source], encode: Encoder, sequence_length: int, count: int) -> None:
        self.sources, self.encode, self.sequence_length, self.count = sources, encode, sequence_length, count

    def __iter__(self) -> Iterator[Row]:
        left = self.count
        while left:
            found = False
            for block in islice(pack(self.encode(in_turn(self.sources)), self.sequence_length), left):
                found, left = True, left - 1
                yield as_row(block)
            if not found:
                raise too_few(self.sources, self.encode, self.sequence_length)


def as_row(block: Block) -> Row:
    """A block as the model's inputs, with labels."""
    ids, positions = (torch.from_numpy(part.astype(np.int64)) for part in block[:2])
    ignored = positions == 0
    if len(block) > 2:
        ignored |= torch.from_numpy(~block[2])
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(ignored, IGNORED)}


def documents_of(sources: Sequence[Source]) -> Iterator[Example]:
    """The documents of all sources, one source after another."""
    return (document for source in sources for document in source)


def too_few(sources: Sequence[Source], encode: Encoder, sequence_length: int) -> ValueError:
    """The error for less text than one block, or for chats whose learned parts lie outside of all blocks."""
    tokens = sum(map(len, encode(documents_of(sources))))
    if tokens >= sequence_length:
        return ValueError(
            f"Nothing is learned in any sequence of {sequence_length:,} tokens, since what the assistant says stands "
            "beyond them; give a larger sequence length."
        )
    return ValueError(
        f"The data holds {tokens:,} tokens, fewer than one sequence of {sequence_length:,}; give more text, or a "
        "smaller sequence length."
    )


def keeps_documents_apart(model: PreTrainedModel, vocabulary: int, rows: int = 1) -> bool:
    """Whether a model's outputs for a document stay the same if another document comes before it in one block.

    This fails for models with layers that carry a state along (such as Mamba), or that make no mask from positions.
    Flash-attention finds documents by the positions that reach its function, which some models do not pass to it, and
    in one row only. Where it cannot run yet, since the model is on the CPU or in float32, the same is tried in plain
    torch.

    Args:
        model: to try.
        vocabulary: its number of token ids.
        rows: blocks at once.
    """
    weight: Any = model.get_input_embeddings().weight
    ids = torch.arange(2, 14, device=weight.device).remainder(vocabulary).expand(rows, -1)  # (rows, 12)
    positions = torch.arange(6, device=weight.device).repeat(2).expand(rows, -1)
    with evaluating(model), torch.no_grad(), flash_in_torch(model, weight.device):
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 6:].float()
        alone = model(input_ids=ids[:, 6:], position_ids=positions[:, 6:], use_cache=False).logits.float()
    scale = max(1.0, float(alone.abs().max()))
    return bool((packed - alone).abs().max() < 0.02 * scale)
