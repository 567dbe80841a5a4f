"""Which checkpoints are served, and how: sets of streams, the released format, one stream, windows, what is refused."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

import parscale

IDS = list(range(40, 75))


def agrees(llm, serving, model, new=12):
    """The first request computes the prompt; the second finds it in the cache."""
    tokens, _ = serving.reference(model, IDS, new)
    return [list(output.outputs[0].token_ids) for output in serving.greedy(llm, [IDS, IDS], new)] == [tokens, tokens]


def model_of(folder, **arguments):
    return parscale.load(folder, dtype=torch.float32, **arguments).eval()


@pytest.fixture(scope="module")
def two_sets(make_folder, fill, tmp_path_factory):
    """Four streams, active, and two under another name and with another length."""
    model = model_of(make_folder("Llama", 4))
    model.add_streams("other", 2, prefix_length=5, smoothing=0.2, init="random")
    model.set_streams("other")
    fill(model)
    model.set_streams("default")
    folder = tmp_path_factory.mktemp("sets") / "two"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["default", "other"])
def test_a_set_by_its_name(two_sets, serving, name):
    model = model_of(two_sets)
    model.set_streams(name)
    with serving.engine(two_sets, hf_overrides={"parscale_name": name}) as llm:
        assert agrees(llm, serving, model)


def test_no_such_set(two_sets, serving):
    match = r"no set of streams 'third' in .*; there are: 'default', 'other': choose one by --hf-overrides"
    refused(serving, two_sets, match, hf_overrides={"parscale_name": "third"})


@pytest.mark.parametrize(
    "overrides",
    [
        {"parscale_attn_smooth": 0.5},
        {"parscale_n": 2, "parscale_name": "other"},
        {"parscale_kv": "shared"},
        {"parscale_unknown": 1},
    ],
)
def test_streams_are_what_the_folder_says(two_sets, serving, overrides):
    """What is given beside it would be ignored."""
    match = rf"--hf-overrides cannot set {next(iter(overrides))}: streams are served as config\.json of .* says\. Leave"
    refused(serving, two_sets, match, hf_overrides=overrides)


def test_an_override_by_a_function(make_folder, serving):
    def smoothed(config):
        config.parscale_attn_smooth = 0.5
        return config

    refused(serving, make_folder("Qwen2", 4), "cannot set parscale_attn_smooth", hf_overrides=smoothed)
    refused(serving, make_folder("Qwen2", 1), "cannot set parscale_n", hf_overrides={"parscale_n": 4})


def test_the_released_format(make_folder, serving, tmp_path):
    """The configuration as the released code writes it: names of transformers 4, and no field that it does not know."""
    folder = shutil.copytree(make_folder("Qwen2", 4), tmp_path / "released")
    config = json.loads((folder / "config.json").read_text())
    for field in ("rope_parameters", "dtype", "layer_types", "parscale_init", "parscale_seed", "head_dim"):
        config.pop(field)
    assert {"rope_theta", "torch_dtype", "parscale_n", "parscale_n_tokens"} <= config.keys()
    config["parscale_attn"] = True
    config["auto_map"] = {
        "AutoConfig": "configuration_qwen2_parscale.Qwen2ParScaleConfig",
        "AutoModelForCausalLM": "modeling_qwen2_parscale.Qwen2ParScaleForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_parscale.py").unlink()
    with serving.engine(folder) as llm:
        assert agrees(llm, serving, model_of(folder))


def test_one_stream_is_vllms_own_class(make_folder, serving):
    """So it costs nothing: neither a slot nor a class of parscale is in the way."""
    refused(serving, make_folder("Qwen2", 1), "--model-impl transformers", model_impl="transformers")
    with serving.engine(make_folder("Qwen2", 1)) as llm:
        names = llm.apply_model(lambda model: f"{type(model).__module__}.{type(model).__qualname__}")
        assert names == ["vllm.model_executor.models.qwen2.Qwen2ForCausalLM"]
        assert llm.llm_engine.vllm_config.scheduler_config.scheduler_cls is None


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("Mistral", {"sliding_window": 24}),
        ("Mistral", {"sliding_window": 4096}),
        ("Qwen3", {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 0}),
    ],
)
def test_no_window_hides_the_prefix(make_folder, serving, family, fields):
    """Neither a short one, nor one that is longer than the text but not than the text and the prefix."""
    folder = make_folder(family, 2, **fields)
    prompts = serving.prompts([1, 20, 23, 24, 25, 70, 300])
    model = model_of(folder)
    with serving.engine(folder, max_num_batched_tokens=64) as llm:
        outputs = serving.greedy(llm, prompts, 8)
        assert agrees(llm, serving, model)
    for ids, output in zip(prompts, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == serving.reference(model, ids, 8)[0]


def test_a_window_as_long_as_the_text(make_folder, serving):
    """It hides no token, and must not hide the slots in front of the longest text."""
    folder = make_folder("Mistral", 2, sliding_window=64)
    with serving.engine(folder, max_model_len=64) as llm:
        ids = serving.prompts([58])[0]
        assert list(serving.greedy(llm, [ids], 6)[0].outputs[0].token_ids) == serving.reference(folder, ids, 6)[0]


def test_tied_embeddings(make_folder, serving):
    folder = make_folder("Qwen2", 2, tie_word_embeddings=True)
    with serving.engine(folder) as llm:
        assert agrees(llm, serving, model_of(folder))


# -- What is refused, at the start


def refused(serving, folder, match, **arguments):
    with pytest.raises(ValueError, match=match), serving.engine(folder, **arguments):
        pass


def test_another_family(serving, make_folder):
    folder = make_folder("GPTNeoX", 2)
    match = "serves Qwen2ForCausalLM, .* this checkpoint is GPTNeoXParScaleForCausalLM"
    refused(serving, folder, match)
    refused(serving, folder, match, model_impl="transformers")


def test_another_kind_of_model(serving, tmp_path):
    size = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 1024}
    model = BertForMaskedLM(BertConfig(vocab_size=64, **size))
    parscale.wrap(model, 2, prefix_length=4).save_pretrained(tmp_path)
    refused(serving, tmp_path, "serves Qwen2ForCausalLM, .* this checkpoint is BertParScaleForMaskedLM")


@pytest.mark.parametrize("version", ["0.31.5", "0.34.0", "1.2.3+cpu"])
def test_another_version_of_vllm(serving, make_folder, monkeypatch, version):
    import vllm

    from parscale.integrations.vllm import register

    try:
        monkeypatch.setattr(vllm, "__version__", version)
        register()
        match = rf"vLLM {re.escape(version)} is installed, .* by vLLM 0.32 and 0.33: pip install"
        refused(serving, make_folder("Qwen2", 4), match)
        refused(serving, make_folder("Qwen2", 1), match)
    finally:
        monkeypatch.undo()
        register()


@pytest.mark.parametrize("transform", ["prompt", "lora"])
def test_another_transform(serving, tiny, tmp_path, transform):
    model = tiny("Qwen2")
    parscale.wrap(model, 2, prefix_length=4, transform=transform, init="random")
    model.save_pretrained(tmp_path)
    refused(serving, tmp_path, rf"transform='{transform}', and vLLM serves those of 'prefix' only")


def test_a_number_of_streams_that_the_tensors_do_not_have(serving, make_folder, tmp_path):
    folder = shutil.copytree(make_folder("Qwen2", 4), tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"parscale_n": 3}))
    refused(serving, folder, r"layer.2.weight of .* \(4, 128\), but its configuration says \(3, hidden size\)")


def test_streams_of_another_backbone(serving, make_folder, tmp_path):
    """One head of keys and values would be broadcast over both."""
    folder = shutil.copytree(make_folder("Qwen2", 4), tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    cut = {name: tensor[:, :1].contiguous() if "prefix" in name else tensor for name, tensor in tensors.items()}
    save_file(cut, folder / "model.safetensors", metadata={"format": "pt"})
    refused(serving, folder, r"prefix .* is \(4, 1, 16, 32\) and does not fit the backbone's heads")


def test_streams_that_are_missing(serving, make_folder, tmp_path):
    folder = shutil.copytree(make_folder("Qwen2", 4), tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "prefix" not in name and "aggregate" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    refused(serving, folder, "should have 4 streams, but has no prefix_k")


def test_a_folder_of_streams_alone(serving, make_folder, tmp_path):
    model_of(make_folder("Qwen2", 2)).save_streams(tmp_path)
    refused(serving, tmp_path, r"config\.json")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"enable_lora": True}, "--enable-lora"),
        ({"model_impl": "transformers"}, "--model-impl transformers"),
        ({"model_impl": "terratorch"}, "without --model-impl terratorch: leave it out"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
        ({"runner": "pooling"}, "--runner pooling"),
        ({"tensor_parallel_size": 3}, "divisible by tensor parallel size"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}}, "--kv-transfer-config"),
        ({"kv_offloading_size": 1}, "--kv-offloading-size"),
    ],
)
def test_settings_that_do_not_go_with_streams(serving, make_folder, arguments, match):
    refused(serving, make_folder("Qwen2", 4), match, **arguments)


def test_a_draft_model_with_streams(serving, tiny, make_folder, tmp_path):
    """Beside a plain model, of which the plugin hears nothing."""
    tiny("Qwen2").save_pretrained(tmp_path / "plain")
    draft = {"model": str(make_folder("Qwen2", 4)), "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match="has parallel streams, and a model with streams cannot draft"):
        serving.configured(tmp_path / "plain", speculative_config=draft)
