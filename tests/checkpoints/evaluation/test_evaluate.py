"""`evaluate` against losses computed directly, one document at a time."""

import copy
import math

import pytest
import torch
from byte_tokenizers import tokenizer_of_bytes
from small_models import small_llama
from transformers import GPT2Config, GPT2LMHeadModel

from parscale import wrap
from parscale.checkpoints.evaluation.text_loss import evaluate, perplexity_of

LETTERS, WITH_BEGINNING = tokenizer_of_bytes(), tokenizer_of_bytes(begins=True)
VOCABULARY = len(WITH_BEGINNING)
DOCUMENTS = [
    ("short", "ab"),
    ("empty", ""),
    ("one", "a"),
    ("long", "the quick brown fox " * 5),
    ("middle", "jumps over"),
]


@pytest.fixture(scope="module")
def model():
    return small_llama(vocab_size=VOCABULARY, max_position_embeddings=128, initializer_range=0.5).double()


def losses_one_by_one(model, text, sequence_length):
    """Each token's loss from what stands before it in its window, one forward pass for each prediction."""
    ids = LETTERS(text)["input_ids"]
    losses = []
    for position in range(1, len(ids)):
        start = (position - 1) // (sequence_length - 1) * (sequence_length - 1)
        logits = model(torch.tensor([ids[start:position]])).logits[0, -1]
        losses.append(-torch.log_softmax(logits, -1)[ids[position]].item())
    return losses


@pytest.mark.grid
@pytest.mark.parametrize("sequence_length", [2, 3, 16, 100, 128, None])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_losses_are_those_of_single_predictions(model, sequence_length, batch_size):
    result = evaluate(model, LETTERS, DOCUMENTS, sequence_length=sequence_length, batch_size=batch_size)
    with torch.no_grad():
        direct = {name: losses_one_by_one(model, text, sequence_length or 128) for name, text in DOCUMENTS}
    counted = {name: losses for name, losses in direct.items() if losses}
    assert [document.name for document in result.documents] == list(counted) == ["short", "long", "middle"]
    for document in result.documents:
        losses = counted[document.name]
        assert document.tokens == len(losses)
        assert document.loss == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    everything = [loss for losses in counted.values() for loss in losses]
    assert result.tokens == len(everything)
    assert result.loss == pytest.approx(sum(everything) / len(everything), rel=1e-9)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.sequence_length == (sequence_length or 128)


def test_a_perplexity_that_is_too_large_for_a_float_is_infinite():
    assert perplexity_of(2.0) == pytest.approx(7.389056)
    assert perplexity_of(1e4) == math.inf


def test_tokens_do_not_depend_on_the_windows(model):
    counts = {evaluate(model, LETTERS, DOCUMENTS, sequence_length=length).tokens for length in (2, 7, 128)}
    assert counts == {sum(max(len(text) - 1, 0) for _, text in DOCUMENTS)}


def test_special_tokens_of_the_tokenizer_are_context(model):
    """With a token in front, a document's first letter is predicted too."""
    result = evaluate(model, WITH_BEGINNING, [("a", "abc")], sequence_length=128)
    assert result.tokens == 3


def test_equals_the_loss_of_the_model(model):
    ids = torch.tensor(LETTERS([DOCUMENTS[3][1]])["input_ids"])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert evaluate(model, LETTERS, DOCUMENTS[3:4]).loss == pytest.approx(expected, rel=1e-6)


def test_low_precision_logits_are_summed_in_full(model):
    """Of bfloat16 logits, the loss is right to float32's precision."""
    low = copy.deepcopy(model).bfloat16()
    ids = torch.tensor(LETTERS([DOCUMENTS[3][1]])["input_ids"])
    with torch.no_grad():
        logits = low(ids).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    assert evaluate(low, LETTERS, DOCUMENTS[3:4]).loss == pytest.approx(expected, rel=1e-6)


def test_the_mode_is_put_back(model):
    model.train()
    evaluate(model, LETTERS, DOCUMENTS)
    assert model.training
    model.eval()
    evaluate(model, LETTERS, DOCUMENTS)
    assert not model.training


def test_progress_goes_to_standard_error(model, capsys):
    evaluate(model, LETTERS, DOCUMENTS, progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("length", [1, 0, -5, 129])
def test_sequence_length_out_of_range(model, length):
    with pytest.raises(ValueError, match=rf"sequence_length is {length}, and must be between 2 and .* 128"):
        evaluate(model, LETTERS, DOCUMENTS, sequence_length=length)


@pytest.mark.parametrize(("transform", "positions"), [("prefix", 64), ("prompt", 56)])
def test_prompts_take_positions_and_prefixes_none(transform, positions):
    """Learned positions end where their table does."""
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    model = wrap(GPT2LMHeadModel(config), 2, prefix_length=8, transform=transform, init="random", seed=0)
    assert evaluate(model, LETTERS, DOCUMENTS).sequence_length == positions
    with pytest.raises(ValueError, match=rf"sequence_length is {positions + 1}, .* 2 and the model's {positions} "):
        evaluate(model, LETTERS, DOCUMENTS, sequence_length=positions + 1)
    with model.use_streams(None):
        assert evaluate(model, LETTERS, DOCUMENTS).sequence_length == 64


@pytest.mark.parametrize(("tokens", "left"), [(63, 1), (64, 0), (70, 0)])
def test_prompts_that_leave_no_positions(tokens, left):
    model = small_llama(vocab_size=VOCABULARY, max_position_embeddings=64)
    wrap(model, 2, prefix_length=tokens, transform="prompt", init="random", seed=0)
    with pytest.raises(ValueError, match=f"prompts of {tokens} tokens leave {left} of the model's 64 positions"):
        evaluate(model, LETTERS, DOCUMENTS)


def test_batch_size_out_of_range(model):
    with pytest.raises(ValueError, match="batch_size is 0, and must be at least 1"):
        evaluate(model, LETTERS, DOCUMENTS, batch_size=0)


@pytest.mark.parametrize("documents", [[], [("empty", "")], [("one", "a"), ("another", "b")]])
def test_nothing_to_predict(model, documents):
    with pytest.raises(ValueError, match="No document has two tokens"):
        evaluate(model, LETTERS, documents)
