"""Packed sequences against their documents one by one, and their order."""

import copy
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from flash_stand_in import StandIn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

from parscale import wrap
from parscale.checkpoints.texts.documents import Source
from parscale.checkpoints.training.packing import (
    IGNORED,
    Blocks,
    Encoder,
    Shuffled,
    Streamed,
    as_row,
    keeps_documents_apart,
    pack,
)
from parscale.compat import flash

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "window": MistralConfig(**SIZES, sliding_window=5),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, initializer_range=0.3),
}


OTHERS = {
    "opt": OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=64,
        init_std=0.3,
    ),
    "gpt_bigcode": GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64),
}


def make(name, P):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy((CONFIGS | OTHERS)[name])).double()
    return wrap(model, P, prefix_length=3, init="random", seed=0) if P > 1 else model


@pytest.mark.grid
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("P", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_batch_has_the_loss_of_its_documents(name, P, attention):
    """Also of pieces of a document that a border cuts, each of which begins anew."""
    model = make(name, P).eval()
    model.set_attn_implementation(attention)
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 64, size).tolist() for size in (7, 1, 30, 4, 2, 11, 9)]
    rows = [as_row(block) for block in pack(documents, 16)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    assert batch["input_ids"].shape == (4, 16)
    output = model(**batch, use_cache=False)
    loss = cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    total, count = 0.0, 0
    for row in rows:
        starts = [*torch.nonzero(row["position_ids"] == 0).flatten().tolist(), 16]
        for start, end in pairwise(starts):
            ids = row["input_ids"][None, start:end]
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            total += cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += end - start - 1
    precise = attention == "sdpa"  # eager attention takes its softmax in float32
    assert loss.item() == pytest.approx(total / count, abs=1e-12 if precise else 2e-6)
    assert output.loss.item() == pytest.approx(total / count, abs=2e-6)  # transformers takes it in float32


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 25), max_size=12), st.integers(2, 9), st.booleans())
def test_every_token_once_and_in_order(lengths, S, padded):
    documents, first = [], 0
    for length in lengths:
        documents.append(list(range(first, first + length)))
        first += length
    blocks = list(pack(copy.deepcopy(documents), S, padding=999 if padded else None))
    whole, rest = divmod(first, S)
    assert len(blocks) == whole + (padded and rest > 0)
    ids = [int(token) for block in blocks for token in block[0]]
    assert ids[:first] == list(range(first))[: len(ids)]
    assert all(token == 999 for token in ids[first:])
    starts = {document[0] for document in documents if document}
    for block_ids, positions in blocks:
        for place, (token, position) in enumerate(zip(block_ids, positions, strict=True)):
            begins = place == 0 or token in starts or token == 999
            assert position == (0 if begins else positions[place - 1] + 1)
        labels = as_row((block_ids, positions))["labels"].numpy()
        assert ((labels == IGNORED) == (positions == 0)).all()
        assert (labels[positions > 0] == block_ids[positions > 0]).all()


class Counted(list):
    """A list that counts the elements that are copied out of it, and out of what was copied."""

    copied = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        if not isinstance(place, slice):
            return found
        Counted.copied += len(found)
        return Counted(found)


@pytest.mark.parametrize("lengths", [[10_000], [1] * 3000, [7, 5000, 0, 1, 900]])
@pytest.mark.parametrize("S", [2, 128])
def test_packing_copies_every_token_once(lengths, S):
    """Also of one long document, which a text file is."""
    Counted.copied = 0
    blocks = list(pack([Counted(range(length)) for length in lengths], S))
    assert len(blocks) == sum(lengths) // S
    assert Counted.copied == sum(lengths)


def test_every_document_ends_with_the_end_of_text(byte_tokenizer):
    encode = Encoder(byte_tokenizer, 257)
    end = byte_tokenizer.eos_token_id
    assert [ids[-1] for ids in encode([("a", "x"), ("b", ""), ("c", "yz")])] == [end] * 3
    assert next(encode([("a", "x<end>")])).count(end) == 1


def test_a_tokenizer_of_another_vocabulary(byte_tokenizer):
    with pytest.raises(ValueError, match="gives the token id 256, but the model has only 200 ids"):
        list(Encoder(byte_tokenizer, 200)([("a", "x")]))


def test_every_block_once_in_each_round_whatever_is_read_first():
    blocks = Blocks(pack([list(range(40))], 4), 4)
    rows = Shuffled(blocks, 25, seed=3)
    order = [int(rows[index]["input_ids"][0]) // 4 for index in range(25)]
    assert len(rows) == 25
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20] != list(range(10))
    again = Shuffled(blocks, 25, seed=3)
    assert [int(again[index]["input_ids"][0]) // 4 for index in reversed(range(25))] == order[::-1]
    assert [int(Shuffled(blocks, 25, seed=4)[index]["input_ids"][0]) // 4 for index in range(25)] != order


@pytest.mark.parametrize("chats", [(), (1,), (0, 3)])
def test_blocks_in_memory_are_the_blocks(chats):
    """Where one of them has parts that are not learned, all of the others are."""
    pairs = list(pack([list(range(16))], 4))
    mask = np.array([False, True, True, False])
    blocks = Blocks(((*pair, mask) if number in chats else pair for number, pair in enumerate(pairs)), 4)
    assert [row.tolist() for row in blocks.ids] == [ids.tolist() for ids, _ in pairs]
    assert [row.tolist() for row in blocks.positions] == [[0, 1, 2, 3]] * 4
    expected = [mask.tolist() if number in chats else [True] * 4 for number in range(4)]
    assert (blocks.learned is None) is (not chats)
    assert not chats or blocks.learned.tolist() == expected
    assert Blocks([], 4).ids.shape == (0, 4)


def test_a_token_in_memory_takes_eight_bytes_and_no_copy():
    """The room that a growing array keeps at its end is at most an eighth."""
    count, S = 2000, 512
    block = np.arange(S, dtype=np.int32)
    tracemalloc.start()
    try:
        blocks = Blocks(((block.copy(), block.copy()) for _ in range(count)), S)
        kept, _ = tracemalloc.get_traced_memory()
        blocks.fingerprint()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert blocks.ids.nbytes + blocks.positions.nbytes == 8 * count * S
    assert kept <= peak <= 1.15 * 8 * count * S


def test_blocks_of_another_length_are_refused():
    """Eight of four tokens would else be read as four of eight."""
    with pytest.raises(ValueError, match="A block holds 4 tokens, and sequence_length is 8; give the length"):
        Blocks(pack([list(range(32))], 4), 8)


def test_streamed_blocks_are_the_same_and_begin_again(byte_tokenizer):
    documents = [("a", "hello"), ("b", "streams of text")]
    source = Source("text", lambda: iter(documents))
    encode = Encoder(byte_tokenizer, 257)
    once = [ids.tolist() for ids, _ in pack(encode(documents), 4)]
    streamed = [row["input_ids"].tolist() for row in Streamed([source], encode, 4, 2 * len(once) + 1)]
    assert streamed == [*once, *once, once[0]]
    other = Source.of("other", [("c", "0123")])
    mixed = next(iter(Streamed([source, other], encode, 16, 1)))["input_ids"]
    assert byte_tokenizer.decode(mixed) == "hello<end>0123<end>strea"
    with pytest.raises(ValueError, match="The data holds 22 tokens, fewer than one sequence of 64"):
        next(iter(Streamed([source], encode, 64, 1)))


@pytest.mark.grid
@pytest.mark.parametrize("P", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_with_masks_keep_documents_apart(name, P):
    model = make(name, P)
    assert keeps_documents_apart(model, 64)
    assert model.training


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("P", [1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "gpt_bigcode"])
def test_models_with_flash_attention_keep_them_apart_in_one_row(name, P, rows, monkeypatch):
    """What is said of a model that cannot run yet is what a run says; GPT-BigCode passes no positions on."""
    stand_in = StandIn()
    stand_in.install(monkeypatch)
    model = make(name, P).float()
    if name == "gpt_bigcode":  # which starts close to zero
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
    model.config._attn_implementation = "flash_attention_2"
    with monkeypatch.context() as patched:
        patched.setattr(flash, "flash_cannot_run", lambda *where: False)
        expected = keeps_documents_apart(model, 64, rows)
    assert stand_in.calls
    stand_in.strict = True
    assert keeps_documents_apart(model, 64, rows) is expected is (rows == 1 and name != "gpt_bigcode")
    assert model.config._attn_implementation == "flash_attention_2"


def test_models_with_a_state_do_not():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.5)
    )
    assert not keeps_documents_apart(model, 64)
