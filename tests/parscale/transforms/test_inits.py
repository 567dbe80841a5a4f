"""`"documents"`, the default start: each stream has read a text that ends with the end-of-text token."""

import pytest
import torch

import parscale
from parscale import ParScaleConfig
from parscale.checkpoints.training.settings import STREAMS_RATES
from parscale.config import FROM_TEXTS, INITS, SHARING, TRANSFORMS
from parscale.streams.naming import LABELS, PARAMETERS
from parscale.transforms import CLASSES, SHARED_CLASSES
from parscale.transforms.inits import default_init

TOLERANCE = 2e-4  # as for "context": logits in float32 beside the backbone's own
END, T = 2, 12  # the small models' eos_token_id
FAMILIES = ["llama", "qwen2", "gpt_neox", "gemma3", "deepseek_v3", "gpt_oss"]


def prefixes(model):
    return {n: tensor.detach() for n, tensor in model.named_parameters() if n.endswith(("prefix_k", "prefix_v"))}


def equal(model, other):
    return all(torch.equal(a, b) for a, b in zip(prefixes(model).values(), prefixes(other).values(), strict=True))


def texts(zoo):
    return zoo.token_ids(3, T, seed=8)


def ended(calibration, end=END):
    return torch.cat([calibration[:, :-1], torch.full((len(calibration), 1), end)], dim=1)


def options(family):
    return {"sliding_window": 64} if family.family.window is not None else {}  # text and input fit into it


def test_init_is_one_of_three():
    assert INITS == ("context", "documents", "random")


def test_every_transform_is_in_every_table():
    for table in (CLASSES, LABELS, PARAMETERS, STREAMS_RATES):
        assert table.keys() == set(TRANSFORMS)
    assert SHARED_CLASSES.keys() == set(SHARING) < set(TRANSFORMS)
    assert set(FROM_TEXTS) < set(TRANSFORMS)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_transform_that_reads_no_texts_and_shares_no_keys_need_not_say_so(family, monkeypatch):
    monkeypatch.setattr("parscale.config.TRANSFORMS", (*TRANSFORMS, "another"))
    model = parscale.wrap(family.plain(), 1)
    assert default_init(model.parscale, ParScaleConfig(2, transform="another")) == "random"
    with pytest.raises(ValueError, match="starts from texts, which transform='another' cannot do"):
        ParScaleConfig(2, transform="another", init="context")
    with pytest.raises(ValueError, match="kv='shared' takes transform='prefix' or 'lora', got 'another'"):
        ParScaleConfig(2, transform="another", kv="shared")


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_every_way_in_has_the_same_default(family, zoo):
    explicit = parscale.wrap(family.plain(), 3, prefix_length=T, init="documents", seed=1)
    by_numbers = parscale.wrap(family.plain(), 3, prefix_length=T, seed=1)
    by_config = parscale.wrap(family.plain(), parscale.ParScaleConfig(3, T, seed=1))
    added = parscale.wrap(family.plain(), 1)
    added.add_streams("more", 3, prefix_length=T, seed=1)
    added.set_streams("more")
    for model in (by_numbers, by_config, added):
        assert model.config.parscale_init == "documents"
    assert equal(explicit, by_numbers)
    assert equal(explicit, by_config)
    ids = zoo.token_ids()
    with torch.no_grad():
        assert torch.equal(added(input_ids=ids).logits, explicit(input_ids=ids).logits)


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@torch.no_grad()
def test_each_stream_has_read_its_text_to_the_end(family, zoo):
    """By itself it is the backbone that reads text, end-of-text token and input."""
    model, plain = family.plain(**options(family)), family.plain(**options(family))
    calibration, ids = texts(zoo), zoo.token_ids()
    given = calibration.clone()
    parscale.wrap(model, 3, prefix_length=T, smoothing=0.0, init="documents", calibration=calibration)
    assert torch.equal(calibration, given)  # the caller's own
    last = model.get_decoder().aggregate_layer[2]
    for p, text in enumerate(ended(calibration)):
        last.bias.fill_(-1e4)[p] = 1e4  # all weight on one stream
        expected = plain(input_ids=torch.cat([text.expand(zoo.B, -1), ids], dim=1)).logits[:, T:]
        zoo.close(model(input_ids=ids).logits, expected, TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"], indirect=True)
def test_no_text_is_longer_than_the_model_reads(family):
    """Whether its positions are learned or rotate, a longer one would be sampled beyond them; drawn, any length is."""
    most = family.plain().config.max_position_embeddings
    for T in (most + 1, 10**12):  # the latter is refused before memory for it is
        with pytest.raises(ValueError, match=f"has {most:,} positions for a text.*cannot read {T:,} tokens"):
            parscale.wrap(family.plain(), 2, prefix_length=T)
    read = parscale.wrap(family.plain(), 2, prefix_length=most)
    assert all(prefix.shape[2] == most for prefix in prefixes(read).values())
    drawn = parscale.wrap(family.plain(), 2, prefix_length=most + 1, init="random")
    assert all(prefix.shape[2] == most + 1 for prefix in prefixes(drawn).values())


@pytest.mark.parametrize("family", ["llama", "gpt_neox"], indirect=True)
def test_sampled_texts_end_with_the_end_of_text_token(family, zoo):
    """They are the texts that "context" samples, but for the last token."""
    model = parscale.wrap(family.plain(), 3, prefix_length=T, init="documents", seed=4)
    context = parscale.wrap(family.plain(), 3, prefix_length=T, init="context", seed=4)
    end = torch.full((3, 1), END)
    alone = parscale.wrap(family.plain(), 3, prefix_length=1, init="context", calibration=end)
    for name, prefix in prefixes(model).items():
        zoo.close(prefix[:, :, :-1], prefixes(context)[name][:, :, :-1], 1e-5)  # nothing before sees the last
    first = next(name for name in prefixes(model) if name.endswith("prefix_v"))  # before any attention
    zoo.close(prefixes(model)[first][:, :, -1:], prefixes(alone)[first], 1e-5)
    assert len({tuple(row.tolist()) for row in prefixes(model)[first].flatten(1)}) == 3


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_texts_are_sampled(family):
    """Those of streams 0 and V go on from the same token, and differ."""
    V = family.plain().config.vocab_size
    model = parscale.wrap(family.plain(), V + 1, prefix_length=6, init="context", seed=4)
    for prefix in prefixes(model).values():
        assert not torch.allclose(prefix[0], prefix[V])


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("of_config", "of_generation", "end"),
    [(7, 5, 7), ([7, 5], 3, 7), (None, 5, 5), (None, [5, 7], 5), (96, 5, 5), (-1, None, None), (None, None, None)],
)
def test_which_token_ends_a_text(family, zoo, of_config, of_generation, end):
    model = family.plain()
    model.config.eos_token_id, model.generation_config.eos_token_id = of_config, of_generation
    parscale.wrap(model, 3, prefix_length=T, init="documents", calibration=texts(zoo))
    read = texts(zoo) if end is None else ended(texts(zoo), end)
    assert equal(model, parscale.wrap(family.plain(), 3, prefix_length=T, init="context", calibration=read))


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_one_token_has_no_room_for_an_end(family, zoo):
    """Streams that all read the end alone would be one stream P times, and could not be trained apart."""
    calibration = torch.tensor([[3], [4], [5]])
    model = parscale.wrap(family.plain(), 3, prefix_length=1, init="documents", calibration=calibration)
    expected = parscale.wrap(family.plain(), 3, prefix_length=1, init="context", calibration=calibration)
    assert equal(model, expected)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_an_end_that_the_calibrations_integers_cannot_hold(family, zoo):
    """Token ids of 8 bits, in a vocabulary of more: the end is not cut to 8 bits."""
    models = [family.plain(vocab_size=400), family.plain(vocab_size=400)]
    calibration = texts(zoo).to(torch.uint8)
    for model, init in zip(models, ("documents", "context"), strict=True):
        model.config.eos_token_id = 300
        read = calibration if init == "documents" else ended(texts(zoo), 300)
        parscale.wrap(model, 3, prefix_length=T, init=init, calibration=read)
    assert equal(*models)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_seeds(family):
    def made(seed):
        return parscale.wrap(family.plain(), 3, prefix_length=6, init="documents", seed=seed)

    state = torch.get_rng_state()
    first, second, other = made(1), made(1), made(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(first, second)
    assert not equal(first, other)
