"""`evaluate_places` against losses computed directly, one prediction at a time."""

import pytest
import torch
from byte_tokenizers import tokenizer_of_bytes
from small_models import small_llama

from parscale.checkpoints.evaluation.places import BEGINNING, MIDDLE, evaluate_places

LETTERS, WITH_BEGINNING = tokenizer_of_bytes(), tokenizer_of_bytes(begins=True)
LENGTH = 8
LONG = "a quick brown fox jumps over the lazy dog and far beyond it"
DOCUMENTS = [("long", LONG), ("one", "a"), ("none", ""), ("short", "abcde"), ("exact", "abcdefghijklmno")]


@pytest.fixture(scope="module")
def model():
    return small_llama(vocab_size=len(WITH_BEGINNING), initializer_range=0.5).double()


def losses(model, ids, first):
    """Of the tokens from `first` on, each by a forward pass of its own."""
    found = []
    for position in range(first, len(ids)):
        logits = model(torch.tensor([ids[:position]])).logits[0, -1]
        found.append(-torch.log_softmax(logits, -1)[ids[position]].item())
    return found


def mean(values):
    return sum(values) / len(values)


def documents_of(evaluation):
    return {document.name: document.loss for document in evaluation.documents}


@pytest.mark.parametrize("batch_size", [1, 16])
def test_an_end_of_text_token_stands_in_front_of_beginnings_alone(model, batch_size):
    result = evaluate_places(model, LETTERS, DOCUMENTS, sequence_length=LENGTH, middles=2, batch_size=batch_size)
    ids = {name: LETTERS(text)["input_ids"] for name, text in DOCUMENTS}
    begin = {
        name: losses(model, [LETTERS.eos_token_id, *ids[name][: LENGTH - 1]], 1)
        for name in ("long", "one", "short", "exact")
    }
    assert documents_of(result[BEGINNING]) == pytest.approx({name: mean(found) for name, found in begin.items()})
    assert result[BEGINNING].tokens == 7 + 1 + 5 + 7
    assert result[BEGINNING].loss == pytest.approx(sum(map(sum, begin.values())) / 20)

    # behind the first seven letters: the first and the last window that fit
    middles = {
        "long": losses(model, ids["long"][7:15], 4) + losses(model, ids["long"][-8:], 4),
        "exact": losses(model, ids["exact"][7:], 4),
    }
    assert documents_of(result[MIDDLE]) == pytest.approx({name: mean(found) for name, found in middles.items()})
    assert result[MIDDLE].tokens == 3 * 4


def test_a_beginning_of_text_token_stands_in_front_of_every_window(model):
    result = evaluate_places(model, WITH_BEGINNING, DOCUMENTS[:1], sequence_length=LENGTH, middles=1)
    begin = WITH_BEGINNING.bos_token_id
    ids = [begin, *LETTERS(LONG)["input_ids"]]
    assert result[BEGINNING].loss == pytest.approx(mean(losses(model, ids[:LENGTH], 1)))
    assert result[MIDDLE].loss == pytest.approx(mean(losses(model, [begin, *ids[LENGTH : 2 * LENGTH - 1]], 4)))


def test_without_either_the_first_token_is_not_predicted(model):
    result = evaluate_places(model, tokenizer_of_bytes(ends=False), DOCUMENTS[1:4], sequence_length=LENGTH)
    assert [document.name for document in result[BEGINNING].documents] == ["short"]
    assert result[BEGINNING].tokens == 4
    assert MIDDLE not in result


def test_bad_input_is_refused(model):
    with pytest.raises(ValueError, match="sequence_length is 3, middles 4 and batch_size 8"):
        evaluate_places(model, LETTERS, DOCUMENTS, sequence_length=3)
    with pytest.raises(ValueError, match="No document has a token to score"):
        evaluate_places(model, LETTERS, [("none", "")], sequence_length=LENGTH)
