"""`diagnose` against one call of `stream_report`, against streams run alone, and by closed forms."""

import copy
import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch
from byte_tokenizers import tokenizer_of_bytes
from small_models import small_llama

from parscale import wrap
from parscale.checkpoints.evaluation.diagnosis import SHARES, diagnose, plot_diagnosis, sentences
from parscale.checkpoints.evaluation.text_loss import evaluate

LETTERS = tokenizer_of_bytes()
VOCABULARY, P, LENGTH = len(LETTERS), 3, 12


TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs"
DOCUMENTS = [("long", TEXT), ("empty", ""), ("one", "a"), ("short", "five")]


@pytest.fixture(scope="module")
def backbone():
    return small_llama(vocab_size=VOCABULARY, max_position_embeddings=128, initializer_range=0.5).double()


@pytest.fixture
def model(backbone):
    """Streams that differ, in unequal shares."""
    model = wrap(copy.deepcopy(backbone), P, prefix_length=4, init="random", seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prefix_" in name or "aggregate_layer" in name:
                parameter.normal_(std=0.5)
    return model


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_equals_one_report_of_all_windows(model, batch_size):
    """On windows of one length, those of one call with all of them."""
    letters = LETTERS([TEXT[: 7 * (LENGTH - 1) + 1]])["input_ids"][0]
    ids = torch.tensor([letters[start : start + LENGTH] for start in range(0, len(letters) - 1, LENGTH - 1)])
    assert ids.shape == (7, LENGTH)
    report = model.eval().stream_report(ids)
    found = diagnose(model, LETTERS, [("a", TEXT[: len(letters)])], sequence_length=LENGTH, batch_size=batch_size)
    assert found.tokens == ids[:, 1:].numel()
    assert found.losses == pytest.approx(report.losses.numpy(), rel=1e-9)
    assert found.correlation == pytest.approx(report.correlation.numpy(), abs=1e-9)
    assert found.weights == pytest.approx(report.weights[:, :-1].mean(0).numpy(), abs=1e-9)
    assert found.entropy == pytest.approx(report.entropy[:, :-1].mean(0).numpy(), abs=1e-9)
    assert found.mean_entropy == pytest.approx(report.entropy[:, :-1].mean().item(), abs=1e-9)
    assert found.mean_weights == pytest.approx(report.weights[:, :-1].mean((0, 1)).numpy(), abs=1e-9)


def losses_of_single_streams(model, backbone):
    """Token losses `(P, tokens)` of each document of more than one token, each stream as a model of its own."""
    losses = []
    for stream in range(P):
        alone = wrap(copy.deepcopy(backbone), 2, prefix_length=4, init="random", seed=0)
        tensors = model.parscale.tensors(model.parscale.active)
        with torch.no_grad():
            for name, tensor in alone.parscale.tensors(alone.parscale.active).items():
                if "prefix_" in name:
                    tensor.copy_(tensors[name][stream].expand_as(tensor))  # both of its streams are this one
                else:
                    tensor.zero_()
        rows = []
        for _, text in DOCUMENTS:
            letters = torch.tensor(LETTERS([text])["input_ids"], dtype=torch.long)
            for start in range(0, letters.shape[1] - 1, LENGTH - 1):
                window = letters[:, start : start + LENGTH]
                with torch.no_grad():
                    log = alone(window).logits[0, :-1].log_softmax(-1)
                rows.append(-log.gather(1, window[0, 1:, None])[:, 0])
        losses.append(torch.cat(rows))
    return torch.stack(losses).numpy()


def test_streams_are_measured_as_if_alone(model, backbone):
    """Windows of unequal lengths in one batch; each stream held against a model that has no other."""
    expected = losses_of_single_streams(model, backbone)
    found = diagnose(model, LETTERS, DOCUMENTS, sequence_length=LENGTH, batch_size=5)
    assert found.tokens == expected.shape[1] == len(TEXT) - 1 + 3
    assert found.losses == pytest.approx(expected.mean(1), rel=1e-9)
    assert found.correlation == pytest.approx(np.corrcoef(expected), abs=1e-9)
    differences = expected[:, None] - expected[None]
    assert found.rms_difference == pytest.approx(np.sqrt((differences**2).mean(-1)), abs=1e-7)
    assert found.mean_correlation == pytest.approx(np.corrcoef(expected)[[0, 0, 1], [1, 2, 2]].mean())
    assert found.counts.sum() == found.tokens


def test_the_mixture_is_the_model(model):
    found = diagnose(model, LETTERS, DOCUMENTS, sequence_length=LENGTH, batch_size=2)
    assert found.mixture_loss == pytest.approx(evaluate(model, LETTERS, DOCUMENTS, sequence_length=LENGTH).loss)


def test_the_gain_by_share_is_that_of_running_the_rest_on_stream_0(model, backbone):
    """Token by token, with entropies of stream 0 as a model of its own and losses of the whole model."""
    first, mixed, entropies = [], [], []
    alone = wrap(copy.deepcopy(backbone), 2, prefix_length=4, init="random", seed=0)
    tensors = model.parscale.tensors(model.parscale.active)
    with torch.no_grad():
        for name, tensor in alone.parscale.tensors(alone.parscale.active).items():
            tensor.copy_(tensors[name][0].expand_as(tensor)) if "prefix_" in name else tensor.zero_()
        for _, text in DOCUMENTS:
            ids = torch.tensor(LETTERS([text])["input_ids"], dtype=torch.long)
            for start in range(0, ids.shape[1] - 1, LENGTH - 1):
                window = ids[:, start : start + LENGTH]
                for of_model, losses in ((alone, first), (model.eval(), mixed)):
                    log = of_model(window).logits[0, :-1].log_softmax(-1)
                    losses += (-log.gather(1, window[0, 1:, None])[:, 0]).tolist()
                    if of_model is alone:
                        entropies += (-(log.exp() * log).sum(-1)).tolist()
    found = diagnose(model, LETTERS, DOCUMENTS, sequence_length=LENGTH, batch_size=3)
    for share, gain, threshold in zip(SHARES, found.gains, found.thresholds, strict=True):
        chosen = [entropy >= threshold * (1 - 1e-9) for entropy in entropies]
        assert sum(chosen) == math.ceil(share * len(entropies) - 1e-9)
        adaptive = [m if all_streams else f for f, m, all_streams in zip(first, mixed, chosen, strict=True)]
        assert gain == pytest.approx((sum(first) - sum(adaptive)) / len(first))
    assert found.gains[-1] == pytest.approx(found.losses[0] - found.mixture_loss)
    assert found.gain_over_best == pytest.approx(found.losses.min() - found.mixture_loss)
    entries = json.loads(json.dumps(found.to_dict(), allow_nan=False))["gain_by_share"]
    assert [entry["tokens"] for entry in entries] == list(SHARES)
    better = dataclasses.replace(found, gains=np.array([0.1, 0.2, 0.3, 0.3, 0.5, 0.45, 0.4]))
    assert better.kept == pytest.approx([0.25, 0.5, 0.75, 0.75, 1.25, 1.125, 1.0])
    worse = dataclasses.replace(found, gains=-better.gains)
    assert worse.kept == [None] * len(SHARES)


@pytest.fixture
def shared(backbone):
    model = wrap(copy.deepcopy(backbone), P, prefix_length=4, init="random", seed=1, kv="shared")
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prefix_" in name or "aggregate_layer" in name:
                parameter.normal_(std=0.5)
    return model


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.75, 1.0])
def test_a_proposed_threshold_gives_what_it_promises(shared, share):
    """Held against an evaluation that runs streams above it."""
    found = diagnose(shared, LETTERS, DOCUMENTS, sequence_length=LENGTH, batch_size=3, share=share)
    proposal = found.proposal
    evaluation = evaluate(shared, LETTERS, DOCUMENTS, sequence_length=LENGTH, adaptive=proposal.threshold)
    assert proposal.loss == pytest.approx(evaluation.loss, rel=1e-9)
    assert proposal.mean_streams == pytest.approx(evaluation.mean_streams)
    assert proposal.share == math.ceil(share * found.tokens - 1e-9) / found.tokens
    assert {0.0: math.inf, 1.0: 0.0}.get(share, proposal.threshold) == proposal.threshold
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["proposal"]["threshold"] == (proposal.threshold if share else "inf")
    assert any("take adaptive =" in sentence for sentence in sentences(found))


@pytest.mark.parametrize(
    ("gain", "best", "said"),
    [
        (0.01, 0.02, "is 1.9900."),
        (-0.0042, 0.02, "is 2.0042; that is 0.0042 worse than stream 0 alone, at more cost: choose another share."),
        (
            -0.0042,
            -0.001,
            "is 2.0042; that is 0.0042 worse than stream 0 alone, at more cost: no share in the table is",
        ),
    ],
)
def test_a_threshold_that_gains_nothing_says_so(shared, gain, best, said):
    found = diagnose(shared, LETTERS, DOCUMENTS, sequence_length=LENGTH, batch_size=3, share=0.3)
    proposal, gains = dataclasses.replace(found.proposal, loss=2.0 - gain), np.full(len(SHARES), best)
    found = dataclasses.replace(found, losses=np.full(P, 2.0), proposal=proposal, gains=gains)
    assert f"and the loss {said}" in sentences(found)[-1]


def test_losses_by_mean_streams_are_those_of_an_evaluation(shared):
    found = diagnose(shared, LETTERS, DOCUMENTS, sequence_length=LENGTH, batch_size=3)
    for (streams, loss), threshold in zip(found.by_mean_streams, found.thresholds, strict=True):
        below = math.nextafter(threshold * (1 - 1e-9), 0)  # the last token that gets all streams lies at it
        evaluation = evaluate(shared, LETTERS, DOCUMENTS, sequence_length=LENGTH, adaptive=below)
        assert loss == pytest.approx(evaluation.loss, rel=1e-9)
        assert streams == pytest.approx(evaluation.mean_streams, abs=(P - 1) / found.tokens)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_is_between_none_and_all(shared, share):
    with pytest.raises(ValueError, match="must be between 0"):
        diagnose(shared, LETTERS, DOCUMENTS, share=share)


def test_streams_with_keys_of_their_own_get_no_threshold(model):
    with pytest.raises(ValueError, match="'default' have their own"):
        diagnose(model, LETTERS, DOCUMENTS, share=0.5)


@pytest.mark.parametrize("stream", range(P))
def test_an_aggregator_that_chooses_one_stream(model, stream):
    """The mixture is then that stream, and the weights have no entropy."""
    aggregator = model.parscale.aggregator(model.parscale.active)
    aggregator.smoothing = 0.0
    with torch.no_grad():
        for parameter in aggregator.parameters():
            parameter.zero_()
        aggregator[2].bias[stream] = 1e4
    found = diagnose(model, LETTERS, DOCUMENTS, sequence_length=LENGTH)
    assert found.mixture_loss == pytest.approx(found.losses[stream], rel=1e-12)
    assert found.weights[:, stream] == pytest.approx(1)
    assert found.entropy == pytest.approx(0)


def test_identical_streams_correlate_perfectly(model):
    with torch.no_grad():
        for name, tensor in model.parscale.tensors(model.parscale.active).items():
            tensor.copy_(tensor[:1].expand_as(tensor)) if "prefix_" in name else tensor.zero_()
    found = diagnose(model, LETTERS, DOCUMENTS, sequence_length=LENGTH)
    assert found.correlation == pytest.approx(np.ones((P, P)), abs=1e-12)
    assert found.rms_difference == pytest.approx(np.zeros((P, P)), abs=1e-6)
    assert np.ptp(found.losses) < 1e-12
    assert found.mixture_loss == pytest.approx(found.losses[0])
    assert found.weights == pytest.approx(1 / P)
    assert found.mean_entropy == pytest.approx(math.log(P))
    assert "the streams hardly differ" in " ".join(sentences(found))


def test_streams_that_differ_are_said_to(model):
    with torch.no_grad():
        for name, tensor in model.parscale.tensors(model.parscale.active).items():
            if "prefix_" in name:
                tensor.mul_(10)
    found = diagnose(model, LETTERS, DOCUMENTS, sequence_length=LENGTH)
    assert found.mean_correlation < 0.9
    said = " ".join(sentences(found))
    assert "the streams differ." in said
    assert f"{found.losses.min():.4f} (stream {found.losses.argmin()})" in said
    assert f"{found.mixture_loss:.4f}" in said


@pytest.mark.parametrize(
    ("correlation", "said"),
    [(0.969, "differ"), (0.971, "differ little"), (0.989, "differ little"), (0.991, "hardly differ")],
)
def test_how_much_streams_are_said_to_differ(model, correlation, said):
    found = diagnose(model, LETTERS, DOCUMENTS, sequence_length=LENGTH)
    found = dataclasses.replace(found, correlation=np.full((P, P), correlation))
    assert f": the streams {said}." in " ".join(sentences(found))


def test_losses_that_are_all_equal_have_no_correlation(model):
    """A head of zeros loses log V on every token."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = diagnose(model, LETTERS, DOCUMENTS, sequence_length=LENGTH)
    assert found.losses == pytest.approx(math.log(VOCABULARY))
    assert np.isnan(found.correlation).all()
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["mean_correlation"] is None
    assert "there is no correlation" in " ".join(sentences(found))


def test_the_model_is_as_before(model):
    model.train()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(ids).logits
    diagnose(model, LETTERS, DOCUMENTS, sequence_length=LENGTH)
    assert model.training
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_a_further_set(model):
    model.add_streams("two", 2, prefix_length=4, init="random", seed=5)
    model.set_streams("two")
    found = diagnose(model, LETTERS, DOCUMENTS)
    assert (found.streams, found.num_streams) == ("two", 2)


def test_without_streams(model, backbone):
    with model.use_streams(None), pytest.raises(ValueError, match="No streams are active"):
        diagnose(model, LETTERS, DOCUMENTS)
    with pytest.raises(ValueError, match="No streams are active"):
        diagnose(backbone, LETTERS, DOCUMENTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 1}, "sequence_length is 1, and must be between 2 and the model's 128"),
        ({"batch_size": 0}, "batch_size is 0, and must be at least 1"),
        ({"documents": [("two", "ab"), ("one", "a")]}, "No document has three tokens"),
        ({"documents": []}, "No document has three tokens"),
    ],
)
def test_bad_input(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        diagnose(model, LETTERS, **{"documents": DOCUMENTS} | arguments)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot(model, tmp_path, ending):
    found = diagnose(model, LETTERS, DOCUMENTS, sequence_length=LENGTH)
    plot_diagnosis(found, tmp_path / f"plot.{ending}")
    assert [path.name for path in tmp_path.iterdir()] == [f"plot.{ending}"]
    start = (tmp_path / f"plot.{ending}").read_bytes()[:5]
    assert start == {"png": b"\x89PNG\r", "svg": b"<?xml"}[ending]


def test_a_plot_of_many_streams_has_room_for_its_curves(backbone, tmp_path):
    """A legend of all would leave none, of which matplotlib warns."""
    model = wrap(copy.deepcopy(backbone), 40, prefix_length=1, init="random")
    found = diagnose(model, LETTERS, DOCUMENTS[:1], sequence_length=LENGTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_diagnosis(found, tmp_path / "plot.svg")


def test_plot_of_an_unknown_kind(model, tmp_path):
    found = diagnose(model, LETTERS, DOCUMENTS, sequence_length=LENGTH)
    with pytest.raises(ValueError, match=r"plot must end in one of .png, .pdf, .svg"):
        plot_diagnosis(found, tmp_path / "plot")
    with pytest.raises(ValueError, match="There is no folder"):
        plot_diagnosis(found, tmp_path / "nowhere" / "plot.png")
    assert list(tmp_path.iterdir()) == []
