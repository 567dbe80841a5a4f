"""Full and streams-only folders: what they hold, and that they come back as they were."""

import json
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from huggingface_hub import HfApi
from model_calls import exact_logits_of
from peft_versions import peft_for_add_adapter
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from parscale import load, unwrap, wrap
from parscale.version import __version__


def names_in(folder):
    """Tensors of the safetensors files of a folder, by file."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            files[path.name] = sorted(file.keys())
    return files


# -- round trips


@pytest.mark.grid
@pytest.mark.parametrize("num_streams", [1, 4])
def test_every_family_comes_back_bit_for_bit(family, num_streams, tmp_path):
    model = family.wrapped(num_streams)
    model.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved", attn_implementation=family.attention)
    assert type(loaded) is type(model)
    assert loaded.num_streams == num_streams
    assert loaded.config.model_type == model.config.model_type
    assert torch.equal(exact_logits_of(loaded), exact_logits_of(model))
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"], indirect=True)
@pytest.mark.parametrize("tied", [True, False])
def test_shards_tied_and_untied(family, tied, tmp_path):
    model = family.wrapped(4, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(names_in(tmp_path)) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, names in names_in(tmp_path).items() for name in names}
    loaded = load(tmp_path)
    assert torch.equal(exact_logits_of(loaded), exact_logits_of(model))
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied


def test_bfloat16_stays(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path / "a")
    model = load(tmp_path / "a", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "b")
    loaded = load(tmp_path / "b")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(exact_logits_of(loaded), exact_logits_of(model))


@pytest.mark.parametrize("transform", ["prompt", "prefix"])
def test_the_dtype_on_file_is_the_backbones(tiny, transform, tmp_path):
    model = wrap(tiny().to(torch.bfloat16), 2, transform=transform, prefix_length=3, init="random")
    model.freeze_backbone()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.config.dtype == "bfloat16"
    assert load(tmp_path).get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("active", ["default", "code", "one", None])
def test_all_sets_come_back_and_the_active_one_is_active(wrapped, active, tmp_path):
    wrapped.set_streams(active)
    wrapped.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.num_streams == wrapped.num_streams
    assert loaded.parscale.sets.keys() == wrapped.parscale.sets.keys()
    for name in ("default", "code", "one", None):
        wrapped.set_streams(name)
        loaded.set_streams(name)
        assert torch.equal(exact_logits_of(loaded), exact_logits_of(wrapped))
        if name is not None:
            assert loaded.parscale.sets[name].config == wrapped.parscale.sets[name].config


@pytest.mark.parametrize("active", ["default", "code", "one", None])
def test_a_models_own_state_dict_comes_back_whatever_set_is_active(wrapped, active):
    wrapped.set_streams(active)
    saved = {key: tensor.clone() for key, tensor in wrapped.state_dict().items()}
    with torch.no_grad():
        for tensor in wrapped.parameters():
            tensor.add_(1)
    wrapped.load_state_dict(saved)
    assert all(torch.equal(tensor, saved[key]) for key, tensor in wrapped.state_dict().items())


@torch.no_grad()
def test_a_further_prompt_of_a_model_that_is_its_own_backbone(tiny, tmp_path):
    model = wrap(tiny().model, 2, prefix_length=3, transform="prompt", init="random", seed=0)
    model.add_streams("two", 3, prefix_length=4, transform="prompt", init="random", seed=1)
    model.set_streams("two")
    ids = torch.arange(3, 12)[None]
    expected = model(ids).last_hidden_state
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.allclose(again(ids).last_hidden_state, expected, rtol=0, atol=1e-6)
    prompts = {name: tuple(p.shape) for name, p in again.named_parameters() if "prompt" in name}
    assert prompts == {"prompt": (2, 3, 32), "prompt@two": (3, 4, 32)}


def test_training_goes_on_where_it_was(wrapped, tmp_path):
    """The active set trains, further sets are frozen, as after wrap."""
    wrapped.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in wrapped.named_parameters()
    }


def test_streams_only(wrapped, tiny, tmp_path):
    wrapped.save_streams(tmp_path / "streams")
    assert sorted(path.name for path in (tmp_path / "streams").iterdir()) == [
        "parscale_config.json",
        "streams.safetensors",
    ]
    backbone = tiny()
    loaded = load(tmp_path / "streams", backbone=backbone)
    assert loaded is backbone
    assert torch.equal(exact_logits_of(loaded), exact_logits_of(wrapped))
    assert torch.equal(exact_logits_of(unwrap(loaded)), exact_logits_of(tiny()))


def test_streams_only_names_its_backbone(tiny, zoo, tmp_path):
    tiny().save_pretrained(tmp_path / "backbone")
    model = wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "backbone"), 4, prefix_length=3, init="random")
    zoo.fill_streams(model)
    model.save_streams(tmp_path / "streams")
    fields = json.loads((tmp_path / "streams" / "parscale_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(tmp_path / "backbone")
    assert torch.equal(exact_logits_of(load(tmp_path / "streams")), exact_logits_of(model))
    (tmp_path / "backbone").rename(tmp_path / "elsewhere")
    loaded = load(tmp_path / "streams", backbone=tmp_path / "elsewhere", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_a_name_on_the_hub_stays_one(tiny, tmp_path, monkeypatch):
    """Also where a folder of that name is made later, as the streams' own."""
    monkeypatch.chdir(tmp_path)
    model = tiny()
    model.config.name_or_path = "org/model"
    wrap(model, 2, prefix_length=3, init="random").save_streams("org/model/streams")
    model.save_streams("org/model/again")
    for name in ("streams", "again"):
        fields = json.loads((tmp_path / "org" / "model" / name / "parscale_config.json").read_text())
        assert fields["base_model_name_or_path"] == "org/model"
        assert "backbone_path" not in fields


def test_streams_find_their_backbone_through_links(tiny, tmp_path):
    """Both are written through one link, read through another, and moved together."""
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/deep")
    tiny().save_pretrained(tmp_path / "link" / "backbone")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "link" / "backbone")
    wrap(model, 2, prefix_length=3, init="random").save_streams(tmp_path / "disk" / "deep" / "streams")
    (tmp_path / "link").unlink()
    (tmp_path / "disk").rename(tmp_path / "moved")
    (tmp_path / "other").symlink_to("moved/deep/streams")
    for place in ("moved/deep/streams", "other"):
        assert torch.equal(exact_logits_of(load(tmp_path / place)), exact_logits_of(model))


def test_a_full_folder_lends_its_backbone(wrapped, tmp_path):
    """To streams of its own in a sub-folder, and to others; its own streams are left out."""
    wrapped.save_pretrained(tmp_path / "full")
    wrapped.set_streams("code")
    wrapped.save_streams(tmp_path / "streams")
    for loaded in (load(tmp_path / "full" / "code"), load(tmp_path / "streams", backbone=tmp_path / "full")):
        assert list(loaded.parscale.sets) == ["code"]
        assert torch.equal(exact_logits_of(loaded), exact_logits_of(wrapped))


def test_saving_does_not_change_the_model(wrapped, tmp_path):
    names, config, logits = list(wrapped.state_dict()), wrapped.config.to_dict(), exact_logits_of(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert list(wrapped.state_dict()) == names
    assert torch.equal(exact_logits_of(wrapped), logits)
    changed = {"architectures", "dtype"}  # the class writes these two itself
    assert {k: v for k, v in wrapped.config.to_dict().items() if k not in changed} == {
        k: v for k, v in config.items() if k not in changed
    }


# -- what the folders hold


def test_a_full_folder(wrapped, tmp_path):
    wrapped.generation_config = GenerationConfig(max_new_tokens=7, temperature=0.5, do_sample=True)
    wrapped.save_pretrained(tmp_path / "saved")
    files = sorted(path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*.*"))
    assert files == [
        "code/parscale_config.json",
        "code/streams.safetensors",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_parscale.py",
        "one/parscale_config.json",
        "one/streams.safetensors",
    ]
    layers = [f"model.layers.{i}.self_attn.prefix_{x}" for i in range(2) for x in "kv"]
    aggregator = [f"model.aggregate_layer.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")]
    backbone = list(unwrap(load(tmp_path / "saved")).state_dict())
    assert names_in(tmp_path / "saved")["model.safetensors"] == sorted(backbone + layers + aggregator)
    assert names_in(tmp_path / "saved" / "code")["streams.safetensors"] == sorted(layers + aggregator)
    assert names_in(tmp_path / "saved" / "one")["streams.safetensors"] == []
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == "llama_parscale"
    assert config["architectures"] == ["LlamaParScaleForCausalLM"]
    assert {key: value for key, value in config.items() if key.startswith("parscale_")} == {
        "parscale_n": 4,
        "parscale_n_tokens": 4,
        "parscale_attn_smooth": 0.1,
        "parscale_init": "random",
        "parscale_seed": None,
        "parscale_sets": ["code", "one"],
        "parscale_version": __version__,
    }
    assert load(tmp_path / "saved").generation_config.max_new_tokens == 7


def test_the_backbone_s_name_on_the_hub_goes_from_save_to_save(wrapped, tiny, tmp_path, recwarn):
    """One that the model got from its folder does not; nor does the plain model keep anything."""
    plain = tiny()
    plain.config.name_or_path = "org/backbone"
    wrap(plain, 2, prefix_length=3, init="random").save_pretrained(tmp_path / "first")
    model = load(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    for name in ("first", "second"):
        assert json.loads((tmp_path / name / "config.json").read_text())["parscale_backbone"] == "org/backbone"
    assert not [key for key in unwrap(model).config.to_dict() if key in ("parscale_backbone", "parscale_version")]
    unwrap(plain).save_pretrained(tmp_path / "folder")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    wrap(read, 2, prefix_length=3, init="random").save_pretrained(tmp_path / "third")
    assert "parscale_backbone" not in json.loads((tmp_path / "third" / "config.json").read_text())
    assert not [str(warning.message) for warning in recwarn if "unknown fields" in str(warning.message)]


def test_the_streams_configuration(wrapped, tmp_path):
    wrapped.set_streams("code")
    wrapped.save_streams(tmp_path)
    text = (tmp_path / "parscale_config.json").read_text()
    fields = json.loads(text)
    assert text == json.dumps(fields, indent=2, sort_keys=True) + "\n"
    assert fields.pop("version")
    assert fields == {
        "backbone_class": "LlamaForCausalLM",
        "backbone_hidden_size": 32,
        "backbone_model_type": "llama",
        "backbone_num_layers": 2,
        "base_model_name_or_path": None,
        "format_version": 1,
        "name": "code",
        "parscale_attn_smooth": 0.2,
        "parscale_init": "random",
        "parscale_n": 2,
        "parscale_n_tokens": 3,
        "parscale_seed": None,
    }


def test_class_names_of_the_released_kind(zoo, tmp_path):
    for family, name in (("gpt2", "GPT2ParScaleForCausalLM"), ("qwen2", "Qwen2ParScaleForCausalLM")):
        zoo.Case(zoo.FAMILIES[family], "sdpa").wrapped(2).save_pretrained(tmp_path / family)
        config = json.loads((tmp_path / family / "config.json").read_text())
        assert (config["architectures"], config["model_type"]) == ([name], f"{family}_parscale")


def test_qwen2_is_written_for_the_released_code(zoo, tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e6}
    model = zoo.Case(zoo.FAMILIES["qwen2"], "sdpa").wrapped(2, rope_parameters=rope)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 1e6
    assert config["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert load(tmp_path).config.rope_parameters == model.config.rope_parameters
    assert torch.equal(exact_logits_of(load(tmp_path)), exact_logits_of(model))


# -- arguments of save_pretrained


def test_a_gathered_state_dict_is_what_is_saved(wrapped, tmp_path):
    """As the Trainer passes it under FSDP: all sets under the names that they have in memory."""
    wrapped.set_streams("code")
    gathered = {name: tensor + 1 for name, tensor in wrapped.state_dict().items()}
    wrapped.save_pretrained(tmp_path, state_dict=gathered)
    loaded = load(tmp_path)
    assert all(torch.equal(tensor, gathered[name]) for name, tensor in loaded.state_dict().items())


def test_an_empty_state_dict_leaves_the_weights_to_others(wrapped, tmp_path):
    """The Trainer does so under DeepSpeed, which writes the weights itself, perhaps before."""
    wrapped.save_pretrained(tmp_path / "new", state_dict={})
    assert not list((tmp_path / "new").rglob("*.safetensors"))
    assert (tmp_path / "new" / "config.json").exists()
    wrapped.save_pretrained(tmp_path / "old")
    before = (tmp_path / "old" / "model.safetensors").read_bytes()
    wrapped.save_pretrained(tmp_path / "old", state_dict={})
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == before


def test_another_process_writes_nothing(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_distributed_checkpoint_is_refused(wrapped, tmp_path):
    with pytest.raises(ValueError, match="omit distributed_checkpoint"):
        wrapped.save_pretrained(tmp_path, distributed_checkpoint=True)


@pytest.mark.parametrize(("size", "beginning"), [("5GB", "model.half.safetensors"), ("30KB", "model.half-0000")])
def test_variant(wrapped, size, beginning, tmp_path):
    """`load` says what reads it."""
    wrapped.save_pretrained(tmp_path, variant="half", max_shard_size=size)
    assert all(name.startswith(beginning) for name in names_in(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, variant="half")
    assert torch.equal(exact_logits_of(loaded), exact_logits_of(wrapped))
    said = r"are missing\. There is model\..*half.*, which AutoModelForCausalLM.*\(.*, variant='half'\) reads"
    with pytest.raises(FileNotFoundError, match=said):
        load(tmp_path)


def test_a_variant_replaces_its_own_files_alone(wrapped, tmp_path):
    expected = exact_logits_of(wrapped)
    wrapped.save_pretrained(tmp_path)
    wrapped.save_pretrained(tmp_path, variant="fp16")
    wrapped.save_pretrained(tmp_path, variant="fp16", max_shard_size="30KB")
    names = names_in(tmp_path).keys()
    assert "model.safetensors" in names
    assert "model.fp16.safetensors" not in names
    assert torch.equal(exact_logits_of(load(tmp_path)), expected)


def test_push_to_hub_uploads_what_was_written(wrapped, tmp_path, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, name, **kwargs):
            calls.append(name)
            return type("Repo", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, **kwargs):
            calls.append(kwargs)

    monkeypatch.setattr("parscale.format.saving.HfApi", Api)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "optimizer.pt").touch()
    wrapped.save_pretrained(tmp_path / "model", push_to_hub=True, token="t", commit_message="m")
    token, name, upload = calls
    assert (token, name, upload["repo_id"], upload["commit_message"]) == ("t", "model", "me/model", "m")
    assert "optimizer.pt" not in upload["allow_patterns"]
    assert {"config.json", "code/streams.safetensors"} < set(upload["allow_patterns"])


def test_what_is_said_of_the_repository_reaches_the_hub(wrapped, tmp_path, monkeypatch):
    client = create_autospec(HfApi)
    hub = client.return_value
    hub.create_repo.return_value = SimpleNamespace(repo_id="org/name")
    monkeypatch.setattr("parscale.format.saving.HfApi", client)
    upload = {"repo_id": "org/name", "create_pr": True, "revision": "dev"}
    wrapped.save_pretrained(tmp_path / "model", push_to_hub=True, private=True, **upload)
    assert hub.create_repo.call_args.args == ("org/name",)
    assert hub.create_repo.call_args.kwargs["private"] is True
    assert upload.items() <= hub.upload_folder.call_args.kwargs.items()
    hub.upload_folder.reset_mock()
    hub.model_info.return_value = SimpleNamespace(private=False)
    with pytest.raises(ValueError, match="org/name exists and is public, so nothing was uploaded"):
        wrapped.save_pretrained(tmp_path / "model", push_to_hub=True, private=True, **upload)
    assert not hub.upload_folder.called


# -- what cannot be saved


def test_no_streams_to_save(wrapped, tmp_path):
    wrapped.set_streams(None)
    with pytest.raises(ValueError, match="set_streams"):
        wrapped.save_streams(tmp_path / "streams")
    assert not list(tmp_path.iterdir())


def test_streams_on_the_meta_device(tiny, tmp_path):
    with torch.device("meta"):
        model = tiny()
    wrap(model, 2, init="random")
    for save in (model.save_streams, model.save_pretrained):
        with pytest.raises(ValueError, match="meta device"):
            save(tmp_path / "streams")
    assert not list(tmp_path.iterdir())


def test_streams_beside_a_full_checkpoint(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another folder"):
        wrapped.save_streams(tmp_path)


def test_an_adapter_leaves_the_model_in_its_folder(wrapped, tiny, tmp_path):
    """The class writes the adapter alone, as it does without streams."""
    peft = peft_for_add_adapter(tiny())
    tiny().save_pretrained(tmp_path / "plain", max_shard_size="30KB")
    wrapped.save_pretrained(tmp_path / "full", max_shard_size="30KB")
    before = {folder: names_in(tmp_path / folder) for folder in ("plain", "full", "full/code")}
    wrapped.config.name_or_path = str(tmp_path / "plain")
    streams = exact_logits_of(wrapped)
    wrapped.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="full checkpoint: save the streams alone in another folder"):
        wrapped.save_pretrained(tmp_path / "full")
    wrapped.save_pretrained(tmp_path / "plain")
    beside = {"adapter_model.safetensors", "streams.safetensors"}
    assert names_in(tmp_path / "plain").keys() == before["plain"].keys() | beside
    with pytest.warns(UserWarning, match="adapter"):
        assert torch.equal(exact_logits_of(load(tmp_path / "plain")), streams)  # a new adapter changes nothing
    wrapped.set_streams(None)
    wrapped.save_pretrained(tmp_path / "full")
    assert names_in(tmp_path / "full").keys() == before["full"].keys() | {"adapter_model.safetensors"}
    assert names_in(tmp_path / "full" / "code") == before["full/code"]


def test_arguments_by_position(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path / "nothing", False)
    assert not (tmp_path / "nothing").exists()
    given = {name: tensor + 1 for name, tensor in wrapped.state_dict().items()}
    wrapped.save_pretrained(tmp_path / "saved", True, given)
    saved = load(tmp_path / "saved").state_dict()
    assert all(torch.equal(saved[name], given[name]) for name in ("model.norm.weight", "model.embed_tokens.weight"))


@pytest.mark.parametrize(
    ("default", "other"),
    [
        ({"transform": "lora", "rank": 2}, {"prefix_length": 4, "init": "random"}),
        ({"prefix_length": 4, "init": "random", "kv": "shared"}, {"prefix_length": 3, "init": "random"}),
        ({"prefix_length": 4, "init": "random"}, {"transform": "lora", "rank": 2}),
    ],
)
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_the_set_of_a_block_is_saved_as_it_is(family, default, other, tmp_path):
    """Nothing that the configuration records of the set outside of the block comes along."""
    model = wrap(family.plain(), 2, seed=0, **default)
    model.add_streams("other", 3, seed=1, **other)
    with model.use_streams("other"):
        expected = exact_logits_of(model)
        model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.num_streams == 3
    assert loaded.parscale.active.config == model.parscale.sets["other"].config
    assert torch.equal(exact_logits_of(loaded), expected)
