"""ONNX Runtime, and ONNX Runtime GenAI by its configuration file, write what `generate` writes."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from small_models import small_llama
from transformers import Gemma3TextConfig, GenerationConfig, LlamaConfig

from parscale.errors import UnsupportedModelError
from parscale.export.comparison import check_graph, sample
from parscale.export.decoder import CacheShape, cache_shape
from parscale.export.genai import genai_config, longest_text

STEPS = 8
LENGTHS = (1, 2, 17, 500)
NEVER = 10**6  # no token, so that a text does not end
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "olmo2", "granite", "gpt2", "gpt_neox")
MIXTURES = ("mixtral", "qwen3_moe")
STREAMS = ((1, "own"), (2, "own"), (2, "shared"), (4, "own"), (4, "shared"))
DAILY = {("llama", 2, "own"), ("llama", 4, "shared")}
GRID = [
    pytest.param(*case, id="-".join(map(str, case)), marks=() if case in DAILY else pytest.mark.nightly)
    for case in ((family, *streams) for family, streams in itertools.product(FAMILIES + MIXTURES, STREAMS))
]


def padded(zoo, length):
    """Two rows of tokens, the second of them half as long, with padding in front."""
    ids = zoo.token_ids(2, length, seed=length)
    mask = torch.ones_like(ids)
    mask[1, : length // 2] = 0
    return ids.masked_fill(mask == 0, 0), mask


def by_genai(folder, ids):
    """`STEPS` tokens after one row, by the loop that the documentation shows."""
    genai = pytest.importorskip("onnxruntime_genai")
    runner = genai.Model(str(folder))
    parameters = genai.GeneratorParams(runner)
    parameters.set_search_options(max_length=ids.shape[1] + STEPS)
    generator = genai.Generator(runner, parameters)
    generator.append_tokens(ids[0].numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0).tolist()


@pytest.mark.parametrize(("family", "P", "kv"), GRID)
def test_greedy_tokens_are_those_of_generate(family, P, kv, exported, runtime, zoo):
    model, folder = exported(family, P, kv)
    session = runtime(folder)
    for length in LENGTHS:
        ids, mask = padded(zoo, length)
        expected = model.generate(
            ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, eos_token_id=NEVER, pad_token_id=0
        )
        assert session.greedy(ids.numpy(), mask.numpy(), STEPS).tolist() == expected.tolist(), length


@pytest.mark.parametrize(("family", "P", "kv"), GRID)
def test_genai_runs_the_folder_by_its_configuration(family, P, kv, exported, zoo):
    model, folder = exported(family, P, kv)
    for length in LENGTHS:
        ids = zoo.token_ids(1, length, seed=length)
        expected = model.generate(ids, max_new_tokens=STEPS, do_sample=False)[0].tolist()
        found = by_genai(folder, ids)
        assert found == expected[: len(found)], length
        assert len(found) == len(expected) or expected[len(found)] == model.generation_config.eos_token_id


def test_genai_obeys_the_generation_settings(exported, zoo, tmp_path, monkeypatch):
    """A penalty so large that no token comes twice."""
    model, folder = exported("llama", 2, "own")
    folder, ids = shutil.copytree(folder, tmp_path / "copy"), zoo.token_ids(1, 17, seed=17)
    plain = model.generate(ids, max_new_tokens=STEPS)[0].tolist()
    settings = GenerationConfig(**model.generation_config.to_dict() | {"repetition_penalty": 1e3})
    monkeypatch.setattr(model, "generation_config", settings)
    config = genai_config(model, cache_shape(model), "model.onnx", 1024)
    (folder / "genai_config.json").write_text(json.dumps(config))
    expected = model.generate(ids, max_new_tokens=STEPS)[0].tolist()
    found = by_genai(folder, ids)
    assert found == expected[: len(found)]
    assert found != plain[: len(found)]


@pytest.mark.parametrize(
    ("settings", "search"),
    [
        ({}, {"do_sample": False}),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.3},
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.3},
        ),
        ({"do_sample": True, "top_k": 0}, {"do_sample": True, "top_k": 64}),  # of any token, of which there are 64
    ],
)
def test_generation_settings(settings, search):
    model = small_llama()
    model.generation_config = GenerationConfig(**settings)
    found = genai_config(model, CacheShape(2, 2, 2, 8, "past_key_values"), "model.onnx", 64)["search"]
    assert found == search | {"max_length": 64, "past_present_share_buffer": False}


@pytest.mark.parametrize(("family", "P", "kv", "heads"), [("llama", 2, "own", 2 * 2), ("llama", 4, "shared", 2)])
def test_inputs_and_outputs_are_those_of_any_decoder(family, P, kv, heads, exported, runtime):
    session = runtime(exported(family, P, kv)[1])
    caches = [f"past_key_values.0.{part}" for part in ("key", "value")]
    assert list(session.inputs) == ["input_ids", "attention_mask", *caches]
    assert session.outputs == ["logits", *(name.replace("past_key_values", "present") for name in caches)]
    assert all(session.inputs[name].shape == ["batch", heads, "past", 8] for name in caches)


def test_beams_move_all_streams_of_a_row(exported, runtime, zoo):
    """A runtime reorders rows of the cache; each row holds the streams of one text and no other."""
    session = runtime(exported("llama", 2, "own")[1])
    ids, mask = zoo.token_ids(3, 6).numpy(), np.ones((3, 7), np.int64)
    cache = session.step(ids, mask[:, :6], session.cache(3))[1]
    new = zoo.token_ids(3, 1, seed=7).numpy()
    order = [2, 0, 0]
    moved, _ = session.step(new, mask, {name: x[order] for name, x in cache.items()})
    expected, _ = session.step(new, mask, session.step(ids[order], mask[:, :6], session.cache(3))[1])
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-5)


def test_the_folder_is_whole(exported):
    model, folder = exported("llama", 2, "own")
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.onnx.data", "genai_config.json"}
    config = json.loads((folder / "genai_config.json").read_text())["model"]
    graph = onnx.load(folder / config["decoder"]["filename"])
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    made_of = {entry.key: entry.value for entry in graph.metadata_props}
    assert (made_of["checkpoint"], made_of["backbone"]) == ("model", "LlamaForCausalLM")
    assert (made_of["num_streams"], made_of["transform"], made_of["dtype"]) == ("2", "prefix", "float32")
    assert made_of["torch"] == torch.__version__
    assert not any(entry.value for node in graph.graph.node for entry in node.metadata_props)
    assert config["eos_token_id"] == [model.generation_config.eos_token_id]
    assert (config["vocab_size"], config["context_length"]) == (96, 1024)


def test_tokens_that_a_model_has_not():
    """It begins with an id that the tokenizer never gives, and pads with the end of text."""
    model = small_llama(eos_token_id=5, bos_token_id=None, pad_token_id=None)
    found = genai_config(model, CacheShape(2, 2, 2, 8, "past_key_values"), "model.onnx", 64)["model"]
    assert (found["bos_token_id"], found["pad_token_id"], found["eos_token_id"]) == (64, 5, [5])


def test_longrope_is_told_its_original_length():
    """After it `generate` computes the cache anew, and a runtime cannot."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope["original_max_position_embeddings"] = 16
    assert longest_text(LlamaConfig(max_position_embeddings=128, rope_parameters=rope)) == 16
    by_kind = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert longest_text(Gemma3TextConfig(max_position_embeddings=128, rope_parameters=by_kind)) == 16
    assert longest_text(Gemma3TextConfig(max_position_embeddings=128)) == 128


def test_a_graph_that_says_something_else_is_refused(exported, saved):
    """The comparison that every export ends with finds a graph of other weights."""
    (model, _), (other, _) = saved("llama", 2), saved("llama", 1)
    graph, shape, known = exported("llama", 2)[1] / "model.onnx", cache_shape(model), sample(model)
    check_graph(graph, shape, known)
    for wrong in (sample(other), dataclasses.replace(known, logits=known.logits * np.nan)):
        with pytest.raises(UnsupportedModelError, match="differs from the model"):
            check_graph(graph, shape, wrong)


@pytest.mark.nightly
def test_half_precision(exported, runtime, zoo):
    """Logits within float16's rounding of the float32 model's."""
    model, folder = exported("llama", 2, "own", "float16")
    session = runtime(folder)
    ids = zoo.token_ids(2, 30)
    found, cache = session.step(ids.numpy(), np.ones((2, 30), np.int64), session.cache(2))
    with torch.no_grad():
        expected = model(ids).logits
    assert {x.dtype for x in (found, *cache.values())} == {np.dtype(np.float16)}
    assert np.abs(found - expected.numpy()).max() < 16 * torch.finfo(torch.float16).eps * expected.abs().max()
