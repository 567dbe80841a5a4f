"""`evaluate_places` against losses computed directly, one prediction at a time."""

import pytest
import torch
from small_models import small_llama

from parscale.checkpoints.evaluation.places import BEGINNING, MIDDLE, evaluate_places

BEGIN, END = 62, 63
LENGTH = 8
LONG = "a quick brown fox jumps over the lazy dog and far beyond it"
DOCUMENTS = [("long", LONG), ("one", "a"), ("none", ""), ("short", "abcde"), ("exact", "abcdefghijklmno")]


class Letters:
    """A tokenizer with an id for each letter, an end-of-text token and, if wanted, a beginning-of-text token."""

    def __init__(self, begins=False, end=END):
        self.begins, self.eos_token_id = begins, end

    def __call__(self, texts, add_special_tokens=True, **_):
        front = [BEGIN] if self.begins and add_special_tokens else []
        return {"input_ids": [front + [ord(letter) % 60 for letter in text] for text in texts]}


@pytest.fixture(scope="module")
def model():
    return small_llama(initializer_range=0.5).double()


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
    result = evaluate_places(model, Letters(), DOCUMENTS, sequence_length=LENGTH, middles=2, batch_size=batch_size)
    ids = {name: [ord(letter) % 60 for letter in text] for name, text in DOCUMENTS}
    begin = {name: losses(model, [END, *ids[name][: LENGTH - 1]], 1) for name in ("long", "one", "short", "exact")}
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
    result = evaluate_places(model, Letters(begins=True), DOCUMENTS[:1], sequence_length=LENGTH, middles=1)
    ids = [BEGIN, *(ord(letter) % 60 for letter in LONG)]
    assert result[BEGINNING].loss == pytest.approx(mean(losses(model, ids[:LENGTH], 1)))
    assert result[MIDDLE].loss == pytest.approx(mean(losses(model, [BEGIN, *ids[LENGTH : 2 * LENGTH - 1]], 4)))


def test_without_either_the_first_token_is_not_predicted(model):
    result = evaluate_places(model, Letters(end=None), DOCUMENTS[1:4], sequence_length=LENGTH)
    assert [document.name for document in result[BEGINNING].documents] == ["short"]
    assert result[BEGINNING].tokens == 4
    assert MIDDLE not in result


def test_bad_input_is_refused(model):
    with pytest.raises(ValueError, match="sequence_length is 3, middles 4 and batch_size 8"):
        evaluate_places(model, Letters(), DOCUMENTS, sequence_length=3)
    with pytest.raises(ValueError, match="No document has a token to score"):
        evaluate_places(model, Letters(), [("none", "")], sequence_length=LENGTH)
