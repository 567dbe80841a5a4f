"""Architectures that do something that others do not; `tests/test_support.py` goes through all there are."""

import json
import warnings

import pytest
import torch
from model_calls import choose_stream, logits_of
from scripts import load_script
from transformers import AutoModelForCausalLM

import parscale

TEXT = 6
tiny_models = load_script("tiny_models")


def build(name):
    """The same weights at every call; windows are longer than all that is read here."""
    if name not in tiny_models.names():
        pytest.skip(f"no {name} in this transformers")
    return tiny_models.Tiny(name).build(window=48)


def from_texts(name, zoo):
    """A model whose two streams start as texts, and these."""
    texts = zoo.token_ids(2, TEXT, seed=8).clamp(max=tiny_models.FIRST_SPECIAL - 1)
    model = build(name)
    parscale.wrap(model, 2, prefix_length=TEXT, smoothing=0.0, init="context", calibration=texts)
    return model, texts


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MllamaForCausalLM", "Phi4MultimodalForCausalLM"])
def test_a_start_that_is_exact_says_nothing(name, zoo):
    """Mllama's cross-attention does nothing without an image; Phi-4's tables of positions are of images."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, texts = from_texts(name, zoo)
    plain, ids = build(name), zoo.token_ids().clamp(max=tiny_models.FIRST_SPECIAL - 1)
    for p, text in enumerate(texts):
        choose_stream(model, p)
        expected = logits_of(plain, torch.cat([text.expand(zoo.B, -1), ids], dim=1))[:, TEXT:]
        zoo.close(logits_of(model, ids), expected, 2e-4)


@pytest.mark.parametrize(
    "name",
    [
        "CTRLLMHeadModel",  # sinusoids at absolute positions
        "DogeForCausalLM",  # hides keys by their values
        "FalconH1ForCausalLM",  # a Mamba beside each attention
        "HunYuanDenseV1ForCausalLM",  # weights its keys after their rotation
        "InklingForCausalLM",  # convolutions in front of attention
        "MusicgenForCausalLM",  # absolute positions
        "ZayaForCausalLM",  # convolutions over keys
    ],
)
def test_a_start_that_is_an_approximation_says_so(name, zoo):
    with pytest.warns(UserWarning, match=r"learned positions.*approximation|approximation for \w+: .* differ by \d+%"):
        from_texts(name, zoo)


def test_no_gradient_is_missing_where_a_further_model_advises(zoo):
    """Blt's patcher decides where patches end; what comes out of it is no function of a prefix."""
    model = build("BltForCausalLM")
    parscale.wrap(model, 2, prefix_length=3, init="random", seed=0)
    zoo.fill_streams(model)
    ids = zoo.token_ids().clamp(max=tiny_models.FIRST_SPECIAL - 1)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    streams = {name: parameter for name, parameter in model.named_parameters() if "prefix_" in name}
    assert not any("patcher" in name for name in streams)
    assert {name.split(".")[1] for name in streams} == {"local_encoder", "global_transformer", "local_decoder"}
    assert all(parameter.grad.any() for parameter in streams.values())


def test_a_table_of_positions_under_another_name(zoo):
    """Whisper's configuration has no `max_position_embeddings`."""
    with pytest.raises(ValueError, match=f"WhisperForCausalLM has {tiny_models.POSITIONS} positions"):
        parscale.wrap(build("WhisperForCausalLM"), 2, prefix_length=tiny_models.POSITIONS + 1, init="context")
    with pytest.warns(UserWarning, match="learned positions"):
        from_texts("WhisperForCausalLM", zoo)


def test_several_tables_of_tokens(zoo):
    """Musicgen has one for each codebook."""
    model = build("MusicgenForCausalLM")
    size = model.get_input_embeddings()[0].num_embeddings
    with pytest.raises(ValueError, match=f"outside 0..{size - 1}"):
        parscale.wrap(model, 2, prefix_length=3, init="context", calibration=torch.full((2, 3), size))


def test_positions_are_given_for_each_text(zoo):
    """Qwen4 looks up the positions of its row."""
    model, _ = from_texts("Qwen4ExpForCausalLM", zoo)
    prefixes = [parameter for name, parameter in model.named_parameters() if name.endswith("prefix_k")]
    assert prefixes
    assert all((prefix[0] - prefix[1]).abs().max() > 0.1 for prefix in prefixes)


@pytest.fixture
def emu3(zoo, tmp_path):
    """A full checkpoint of a class whose configuration is a part of that of its model type, and the model."""
    model = build("Emu3ForCausalLM")
    parscale.wrap(model, 2, prefix_length=3, init="random", seed=0)
    zoo.fill_streams(model)
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("read", [parscale.load, AutoModelForCausalLM.from_pretrained])
def test_a_class_of_a_part_of_a_configuration(read, emu3, zoo):
    model, folder = emu3
    loaded = read(folder)
    assert type(loaded) is type(model)
    assert loaded.num_streams == 2
    zoo.close(logits_of(loaded, zoo.token_ids()), logits_of(model, zoo.token_ids()), 1e-6)


def test_such_a_class_in_a_new_process(emu3, programs):
    code = (
        "import sys, parscale.auto, transformers\n"
        "print(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    result = programs.run("-c", code, emu3[1], cwd="/")
    assert result.stdout.strip() == "Emu3ForCausalLM", result.stderr[-2000:]


@pytest.mark.parametrize("architectures", [None, ["Emu3ParScaleModel"], ["LlamaParScaleForCausalLM"], [3]])
def test_such_a_checkpoint_has_to_name_its_class(architectures, emu3):
    config = emu3[1] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": architectures}))
    with pytest.raises(ValueError, match=r"knows no class for model_type|does not describe a model"):
        parscale.load(emu3[1])
