"""How streams start: `"context"` as the backbone having read a text, `"random"` as independent normal numbers."""

import warnings

import pytest
import torch
from model_calls import choose_stream, logits_of
from transformers import GenerationConfig

import parscale

# interface.md's figure for float32; measured on these small models: 1e-5 at most.
TOLERANCE = 2e-4
ROTARY = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "gpt_neox",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
]
SDPA = [name for name in ROTARY if name not in ("gemma2", "gpt_oss")]
WIDE = 64  # a window that text and input fit into


def options(family):
    return {"sliding_window": WIDE} if family.family.window is not None else {}


def prefixes(model, name="default"):
    suffix = "" if name == "default" else f"@{name}"
    ends = (f"prefix_k{suffix}", f"prefix_v{suffix}")
    return {n: tensor.detach() for n, tensor in model.named_parameters() if n.endswith(ends)}


def texts(zoo, rows=3, length=12):
    return zoo.token_ids(rows, length, seed=8)


def assert_reads(model, plain, calibration, zoo):
    """Each stream by itself is the backbone that reads its text first."""
    ids, T = zoo.token_ids(), calibration.shape[1]
    for p, text in enumerate(calibration):
        choose_stream(model, p)
        expected = logits_of(plain, torch.cat([text.expand(zoo.B, -1), ids], dim=1))[:, T:]
        zoo.close(logits_of(model, ids), expected, TOLERANCE)


@pytest.mark.parametrize("case", [f"{n}-eager" for n in ROTARY] + [f"{n}-sdpa" for n in SDPA], indirect=True)
def test_each_stream_has_read_its_text(case, zoo):
    model, plain = case.plain(**options(case)), case.plain(**options(case))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing here is an approximation
        parscale.wrap(model, 3, prefix_length=12, smoothing=0.0, init="context", calibration=texts(zoo))
    assert_reads(model, plain, texts(zoo), zoo)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_start_from_texts_in_bfloat16_is_exact(family, zoo):
    """It says nothing of an approximation."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        parscale.wrap(family.plain(dtype=torch.bfloat16), 3, prefix_length=12, init="context", calibration=texts(zoo))


@pytest.mark.parametrize("family", ROTARY, indirect=True)
def test_texts_that_the_backbone_samples(family, zoo):
    """The values of the first layer tell which tokens were read; reading those again gives the same prefixes."""
    model, plain = family.plain(**options(family)), family.plain(**options(family))
    state = torch.get_rng_state()
    parscale.wrap(model, 3, prefix_length=12, smoothing=0.0, init="context", seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    first = next(tensor for name, tensor in prefixes(model).items() if name.endswith("prefix_v"))  # (P, G, T, D)
    calibration = torch.zeros(3, 12, dtype=torch.long)
    every_token = torch.arange(zoo.VOCABULARY)[:, None]
    parscale.wrap(plain, zoo.VOCABULARY, prefix_length=1, init="context", calibration=every_token)
    known = next(tensor for name, tensor in prefixes(plain).items() if name.endswith("prefix_v"))  # (V, G, 1, D)
    parscale.unwrap(plain)
    for p in range(3):
        for t in range(12):
            distance = (known[:, :, 0] - first[p, :, t]).flatten(1).norm(dim=1)
            calibration[p, t] = distance.argmin()
            assert distance.min() < 1e-4
    assert len({tuple(row.tolist()) for row in calibration}) == 3  # another text for each stream
    assert len(calibration.unique()) > 6  # and texts, not one token
    assert_reads(model, plain, calibration, zoo)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_more_streams_than_tokens_start_from_texts(family):
    model = family.plain(vocab_size=8)
    assert parscale.wrap(model, 9, prefix_length=3, init="context", seed=0).num_streams == 9


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_sampling_asks_nothing_of_the_models_own_generation_settings(family, zoo):
    model, expected = family.plain(), family.plain()
    own = GenerationConfig(
        num_beams=3,
        num_return_sequences=2,
        return_dict_in_generate=True,
        max_length=5,
        stop_strings=["end"],
        eos_token_id=list(range(zoo.VOCABULARY)),
    )
    model.generation_config = own
    for each in (model, expected):
        parscale.wrap(each, 3, prefix_length=12, init="context", seed=4)
    assert model.generation_config is own
    assert all(torch.equal(a, b) for a, b in zip(prefixes(model).values(), prefixes(expected).values(), strict=True))


@pytest.mark.grid
@pytest.mark.parametrize("init", ["random", "context"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"], indirect=True)
def test_seeds(family, init):
    def made(seed, before=0):
        torch.manual_seed(before)
        model = parscale.wrap(family.plain(), 3, prefix_length=6, init=init, seed=seed)
        return torch.cat([tensor.flatten() for _, tensor in sorted(model.named_parameters())])

    assert torch.equal(made(1, before=0), made(1, before=5))
    assert not torch.equal(made(1), made(2))
    assert torch.equal(made(None, before=3), made(None, before=3))
    assert not torch.equal(made(None, before=3), made(None, before=4))
    state = torch.get_rng_state()
    parscale.wrap(family.plain(), 3, prefix_length=6, init=init, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    parscale.wrap(family.plain(), 3, prefix_length=6, init=init)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"], indirect=True)
def test_further_sets_read_with_the_plain_backbone(family, zoo):
    fresh, busy = family.plain(), family.wrapped().train()
    arguments = {"prefix_length": 12, "init": "context", "calibration": texts(zoo)}
    parscale.wrap(fresh, 3, **arguments)
    busy.add_streams("more", 3, **arguments)
    assert busy.training
    pairs = zip(prefixes(fresh).values(), prefixes(busy, "more").values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_aggregator_starts_with_equal_weights(family, zoo):
    model = family.plain()
    model.config.initializer_range = 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        parscale.wrap(model, 4, prefix_length=6, init="context", seed=0)
    first, _, last = model.get_decoder().aggregate_layer
    assert abs(first.weight.std().item() / 0.05 - 1) < 0.05  # of 4096 numbers: the standard error is 1.1 %
    assert not any(tensor.any() for tensor in (first.bias, last.weight, last.bias))
    weights = model.stream_report(zoo.token_ids()).weights
    zoo.close(weights, torch.full_like(weights, 0.25), 1e-7)


def test_random_prefixes(family):
    model = family.plain()
    std = 0.07
    setattr(model.config, "init_std" if family.family.name == "OPT" else "initializer_range", std)
    parscale.wrap(model, 4, prefix_length=48, init="random", seed=0)
    tensors = torch.stack(
        [x.flatten(1) for x in prefixes(model).values() if x.shape == next(iter(prefixes(model).values())).shape]
    )
    numbers = tensors.flatten()
    error = len(numbers) ** -0.5
    assert abs(numbers.mean() / std) < 4 * error
    assert abs(numbers.std() / std - 1) < 4 * error / 2**0.5
    assert abs((numbers / std).pow(4).mean() - 3) < 4 * error * 96**0.5  # the kurtosis of a normal
    streams = tensors.transpose(0, 1).flatten(1)  # (P, ...): no two streams have anything in common
    correlation = torch.corrcoef(streams) - torch.eye(4)
    assert correlation.abs().max() < 5 * streams.shape[1] ** -0.5
    assert len(numbers.unique()) > 0.99 * len(numbers)


@pytest.mark.parametrize("family", ["opt"], indirect=True)
def test_random_prefixes_have_the_size_of_the_backbones_start(family):
    """Which OPT calls `init_std`."""
    model = parscale.wrap(family.plain(init_std=0.5), 2, prefix_length=64, init="random", seed=0)
    numbers = torch.cat([prefix.flatten() for prefix in prefixes(model).values()])
    assert numbers.std().item() == pytest.approx(0.5, rel=4 * (2 * len(numbers)) ** -0.5)


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3_next"], indirect=True)
def test_a_context_start_that_is_an_approximation_warns(family, zoo):
    model, ids = family.plain(), zoo.token_ids()
    reason = "layers without keys and values" if family.family.attention_layers else "learned positions"
    with pytest.warns(UserWarning, match=f"{reason}.*approximation") as warned:
        parscale.wrap(model, 3, prefix_length=12, smoothing=0.0, init="context", calibration=texts(zoo))
    assert {warning.filename for warning in warned} == {__file__}  # where wrap was called
    choose_stream(model, 1)
    assert logits_of(model, ids).isfinite().all()
    assert not torch.equal(prefixes(model).popitem()[1][0], prefixes(model).popitem()[1][1])


@pytest.mark.parametrize("family", ["gpt2", "opt"], indirect=True)
def test_learned_positions_end_somewhere(family):
    model = family.plain()
    with pytest.raises(ValueError, match=r"has 64 positions.*65 tokens.*prefix_length.*init='random'"):
        parscale.wrap(model, 2, prefix_length=65, init="context")
    parscale.wrap(model, 2, prefix_length=65, init="random")


@pytest.mark.parametrize("family", ["gpt2", "opt"], indirect=True)
def test_a_prompt_takes_learned_positions(family, zoo):
    """64 positions: 4 of the prompt and 60 of the text, in one pass and in several."""
    model = parscale.wrap(family.plain(), 2, prefix_length=4, init="random", transform="prompt")
    match = r"prompt of 4 tokens and a text of 61 need 65 positions.*has 64: give at most 60 tokens, or.*'prefix'"
    logits_of(model, zoo.token_ids(2, 60))
    with pytest.raises(ValueError, match=match):
        logits_of(model, zoo.token_ids(2, 61))
    options = {"do_sample": False, "eos_token_id": 10**6, "pad_token_id": 0}
    ids = zoo.token_ids(1, 58)
    assert model.generate(ids, max_new_tokens=3, **options).shape == (1, 61)  # the last one is not read
    with pytest.raises(ValueError, match=match):
        model.generate(ids, max_new_tokens=4, **options)
    padding = torch.cat([ids.new_zeros(1, 6), torch.ones_like(ids)], dim=1)
    padded = torch.cat([ids.new_zeros(1, 6), ids], dim=1)
    assert model.generate(padded, attention_mask=padding, max_new_tokens=3, **options).shape == (1, 67)


BAD_TEXTS = {
    "another P": torch.ones(2, 12, dtype=torch.long),
    "another T": torch.ones(3, 11, dtype=torch.long),
    "one text": torch.ones(12, dtype=torch.long),
    "a list": [[1] * 12] * 3,
    "words": "three texts",
    "numbers with a point": torch.ones(3, 12),
    "truth values": torch.ones(3, 12, dtype=torch.bool),
    "below the vocabulary": torch.full((3, 12), -1),
    "above the vocabulary": torch.full((3, 12), 96),
}


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize("bad", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_texts_that_cannot_be_read(family, zoo, bad):
    model = family.plain()
    message = (
        r"token ids( outside 0\.\.95|, a tensor of integers of shape \(num_streams, prefix_length\) = \(3, 12\), got )"
    )
    with pytest.raises(ValueError, match=message):
        parscale.wrap(model, 3, prefix_length=12, init="context", calibration=bad)
    assert not hasattr(model, "parscale")
    parscale.wrap(model, 2, prefix_length=2, init="random")
    with pytest.raises(ValueError, match=message):
        model.add_streams("more", 3, prefix_length=12, init="context", calibration=bad)
    assert list(model.parscale.sets) == ["default"]


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_texts_beside_a_random_start(family, zoo):
    with pytest.raises(
        ValueError, match=r"calibration is read by init='context' or 'documents' only, got init='random'"
    ):
        parscale.wrap(family.plain(), 3, prefix_length=12, init="random", calibration=texts(zoo))


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_texts_in_other_integers(family, zoo, dtype):
    model, expected = family.plain(), family.plain()
    parscale.wrap(model, 3, prefix_length=12, init="context", calibration=texts(zoo).to(dtype))
    parscale.wrap(expected, 3, prefix_length=12, init="context", calibration=texts(zoo))
    assert all(torch.equal(a, b) for a, b in zip(prefixes(model).values(), prefixes(expected).values(), strict=True))


def test_the_meta_device_has_no_weights_to_read_with(family):
    with torch.device("meta"):
        model = family.family.build(family.attention)
    fields = model.config.to_dict()
    with pytest.raises(ValueError, match=r"no weights on the meta device.*init='random'"):
        parscale.wrap(model, 2, prefix_length=3, init="context")
    assert model.config.to_dict() == fields
    assert not any("prefix_" in name for name, _ in model.named_parameters())
