"""Loading: through parscale.load and through transformers' own AutoModelForCausalLM, onto devices, from the Hub."""

import copy
import io
import json
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, LlamaConfig, LlamaForCausalLM

from parscale import load, unwrap, wrap
from parscale.format.folders import Checkpoint

IDS = torch.arange(18).remainder(17).view(2, 9) + 3


@torch.no_grad()
def logits_of(model):
    return model.eval()(IDS).logits


@pytest.fixture
def wrapped(zoo):
    return zoo.Case(zoo.FAMILIES["llama"], "sdpa").wrapped(4)


@pytest.fixture
def folder(wrapped, tmp_path):
    """A full checkpoint of `wrapped`."""
    wrapped.save_pretrained(tmp_path / "full")
    return tmp_path / "full"


@pytest.fixture(params=[load, AutoModelForCausalLM.from_pretrained], ids=["load", "auto"])
def read(request):
    return request.param


# -- both ways


def test_the_class_and_the_configuration_are_the_backbones(folder, wrapped, read, zoo):
    model = read(folder)
    assert type(model) is LlamaForCausalLM
    assert type(model.config) is LlamaConfig
    assert model.config.model_type == "llama"
    assert not model.training
    assert (model.config.parscale_n, model.config.parscale_n_tokens) == (4, zoo.T)
    zoo.close(logits_of(model), logits_of(wrapped), 1e-5)
    zoo.close(logits_of(unwrap(model)), logits_of(zoo.FAMILIES["llama"].build("sdpa")), 1e-5)
    leftover = {"auto_map", "parscale_n", "parscale_sets", "parscale_name", "parscale_version", "parscale_backbone"}
    assert not leftover & model.config.to_dict().keys()


def test_nothing_is_complained_of(folder, read, caplog, recwarn):
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            read(folder)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not caplog.records
    assert not [warning for warning in recwarn if "parscale" in str(warning.message)]


def test_a_class_is_left_as_it_was(folder, read):
    before = dict(vars(LlamaForCausalLM))
    model = read(folder)
    assert dict(vars(LlamaForCausalLM)) == before
    assert model._keys_to_ignore_on_load_unexpected == set()


def test_dtype(folder, read):
    assert {p.dtype for p in read(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in read(folder, dtype="float64").parameters()} == {torch.float64}
    assert {p.dtype for p in read(folder).parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="dtype"):
        load(folder, dtype="no dtype")


def test_attention_implementation(folder, wrapped, read, zoo):
    model = read(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    zoo.close(logits_of(model), logits_of(wrapped), 1e-4)


def test_a_device_map_of_nothing(folder):
    with pytest.raises(ValueError, match=r"device_map names no module, got \{\}: leave it out"):
        load(folder, device_map={})


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(folder, wrapped, read, device_map, zoo):
    zoo.close(logits_of(read(folder, device_map=device_map)), logits_of(wrapped), 1e-5)


def test_the_meta_device(folder, wrapped, read):
    model = read(folder, device_map="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in wrapped.named_parameters()}


def test_a_layer_on_the_disk(folder, wrapped, tmp_path, zoo):
    """Its weights are on the meta device between calls; its prefix is not. It is saved whole again."""
    places = dict.fromkeys(["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places["model.layers.0"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offloaded")
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert not any(parameter.is_meta for parameter in model.parscale.tensors(model.parscale.active).values())
    for _ in range(2):
        zoo.close(logits_of(model), logits_of(wrapped), 1e-5)
    model.save_pretrained(tmp_path / "again")
    zoo.close(logits_of(load(tmp_path / "again")), logits_of(wrapped), 1e-5)


def test_a_quantized_backbone(folder, wrapped, zoo):
    pytest.importorskip("optimum.quanto")
    quantization = transformers.QuantoConfig(weights="int8")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "QLinear"
    zoo.close(logits_of(model), logits_of(wrapped), 0.1)


def test_copies_and_pickles(folder, wrapped):
    model = load(folder)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), restored):
        assert other.parscale.model is other
        assert torch.equal(logits_of(other), logits_of(model))
        other.add_streams("code", 2, prefix_length=2, init="random")
        other.set_streams("code")
        unwrap(other)
        assert not other._load_state_dict_pre_hooks
    assert model.num_streams == 4


def test_the_type_of_the_backbone_is_enough(folder, wrapped, zoo):
    """As in a folder that the backbone's own save_pretrained wrote."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
    zoo.close(logits_of(load(folder)), logits_of(wrapped), 1e-5)


# -- AutoConfig and AutoModelForCausalLM


def test_autoconfig_is_the_backbones_and_more(folder):
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, LlamaConfig)
    assert (type(config).model_type, config.model_type) == ("llama_parscale", "llama")
    assert (config.parscale_n, config.hidden_size) == (4, 32)
    assert type(pickle.loads(pickle.dumps(config))) is type(config)
    config.save_pretrained(folder)
    assert load(folder).num_streams == 4
    assert AutoConfig.for_model("llama_parscale", hidden_size=8).hidden_size == 8
    assert AutoConfig.for_model("opt_parscale", hidden_size=8).model_type == "opt_parscale"


def test_another_process_reads_a_pickled_configuration(folder, tmp_path, programs):
    """As servers hand it to their workers."""
    (tmp_path / "pickled").write_bytes(pickle.dumps(AutoConfig.from_pretrained(folder)))
    program = "import pickle; c = pickle.load(open('pickled', 'rb')); print(type(c), c.parscale_n, c.model_type)"
    read = programs.run("-c", program, cwd=tmp_path)
    assert read.stdout.strip() == "<class 'parscale.auto.LlamaParScaleConfig'> 4 llama", read.stderr


@pytest.mark.parametrize(
    "use",
    [
        "from parscale import wrap",
        pytest.param("from parscale import load", marks=pytest.mark.nightly),
        "from parscale.format.architectures import config_class; config_class('llama'); import parscale.auto",
    ],
)
def test_auto_classes_read_it_after_any_use_of_the_package(use, folder, programs):
    program = (
        f"import sys; {use}; from transformers import AutoModelForCausalLM\n"
        "print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).num_streams)"
    )
    read = programs.run("-c", program, folder, cwd="/")
    assert read.stdout.strip() == "4", read.stderr


def test_other_fields_through_the_configuration(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, parscale_attn_smooth=0.5, use_cache=False)
    assert model.parscale.active.config.smoothing == 0.5
    assert model.config.use_cache is False


def test_a_model_from_a_configuration_alone(folder):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert type(model) is LlamaForCausalLM
    assert model.num_streams == 4
    assert logits_of(model).isfinite().all()


@pytest.mark.parametrize("name", ["AutoModelForMaskedLM", "AutoModel"])
def test_an_encoder_from_a_configuration_alone(name, tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    auto = getattr(transformers, name)
    plain = auto.from_config(config)
    wrap(plain, 3, prefix_length=2, init="random").save_pretrained(tmp_path)
    for trusted in (False, True):
        config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=trusted)
        model = auto.from_config(config, trust_remote_code=trusted)
        assert type(model) is type(plain)
        assert model.num_streams == 3
        assert model.state_dict().keys() == plain.state_dict().keys()


def test_the_loading_report(folder):
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())


def test_other_tasks_do_not_take_it_for_the_plain_backbone(folder):
    for auto in (transformers.AutoModel, transformers.AutoModelForSequenceClassification):
        with pytest.raises(
            ValueError, match=r"LlamaForCausalLM with streams.*use AutoModelForCausalLM\. parscale\.load.*base_model"
        ):
            auto.from_pretrained(folder)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        transformers.AutoModelForMaskedLM.from_pretrained(folder)


def test_the_tokenizer_is_the_one_that_the_backbone_has(zoo, tmp_path):
    """transformers chooses it by the type of the model too, and sometimes against what the folder says."""
    letters = {letter: number for number, letter in enumerate(["<unk>", "<s>", "</s>", "▁", *"abc"])}
    for family in ("llama", "mistral", "qwen2"):
        model = zoo.Case(zoo.FAMILIES[family]).wrapped(2)
        model.save_pretrained(tmp_path / "full" / family)
        unwrap(model).save_pretrained(tmp_path / "plain" / family)
        classes = []
        for kind in ("full", "plain"):
            transformers.LlamaTokenizer(vocab=letters, merges=[]).save_pretrained(tmp_path / kind / family)
            classes.append(type(transformers.AutoTokenizer.from_pretrained(tmp_path / kind / family)))
        assert classes[0] is classes[1]


def test_a_subfolder(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path / "a" / "b")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", subfolder="b")
    assert model.num_streams == 4


WITHOUT_PARSCALE = """
import sys, warnings
from transformers import AutoConfig, AutoModelForCausalLM
folder, released = sys.argv[1:]
for read in (AutoModelForCausalLM.from_pretrained, AutoConfig.from_pretrained):
    for path in (folder, released):
        try:
            read(path)
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        else:
            raise AssertionError("a plain backbone was loaded")
assert "parscale" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers."), type(model)
assert model.num_streams == 4
assert AutoModelForCausalLM.from_pretrained(released).num_streams == 2
sys.modules["parscale.auto"] = None
for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
    del sys.modules[name]
try:
    import importlib.util
    spec = importlib.util.spec_from_file_location("copied", folder + "/modeling_parscale.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
except ImportError as error:
    assert "from a clone of its repository: pip install ." in str(error), error
else:
    raise AssertionError("it was imported without the package")
print("done")
"""


@pytest.mark.slow
def test_a_process_that_did_not_import_parscale(folder, tmp_path, programs):
    """Without remote code it fails and says so; with it, it works; without the package, it says what to install."""
    released = Path(__file__).parents[1] / "golden" / "p2-theta1e6"
    result = programs.run("-c", WITHOUT_PARSCALE, folder, released, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("done\n")


# -- the Hub


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A cache as the Hub's client leaves it: a repository `org/model` of two revisions, its files links to blobs."""
    cache = tmp_path / "cache"
    repository = cache / "models--org--model"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    golden = Path(__file__).parents[1] / "golden"
    for number, (branch, source) in enumerate([("main", folder), ("other", golden / "p2-tied-smooth")]):
        commit = str(number) * 40
        (repository / "refs" / branch).write_text(commit)
        snapshot = repository / "snapshots" / commit
        for path in [path for path in source.rglob("*") if path.is_file()]:
            blob = repository / "blobs" / f"{branch}-{path.parent.name}-{path.name}"
            blob.write_bytes(path.read_bytes())
            link = snapshot / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for module in ("transformers.utils.hub.TRANSFORMERS_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(module, str(cache), raising=False)
    return cache


def test_a_name_on_the_hub(hub, wrapped, read, zoo):
    zoo.close(logits_of(read("org/model")), logits_of(wrapped), 1e-5)
    assert read("org/model", revision="other").config.tie_word_embeddings


def test_the_two_licences_of_a_released_checkpoint_are_said_once(hub, recwarn):
    (hub / "models--org--model").rename(hub / "models--ParScale--ParScale-9B")
    for _ in range(2):
        load("ParScale/ParScale-9B")
    said = [str(warning.message) for warning in recwarn if "licences" in str(warning.message)]
    assert said == [
        "ParScale/ParScale-9B carries two licences: Apache-2.0 in its card's metadata, academic use only in the card's "
        "text; ask its authors before any other use."
    ]


def test_a_snapshot_in_the_cache(hub, wrapped, read, zoo):
    """A folder of links to files outside it."""
    zoo.close(logits_of(read(hub / "models--org--model" / "snapshots" / ("0" * 40))), logits_of(wrapped), 1e-5)


def test_further_sets_on_the_hub(wrapped, folder, request, zoo):
    wrapped.add_streams("code", 2, prefix_length=2, init="random")
    zoo.fill_streams(wrapped, name="code")
    wrapped.save_pretrained(folder)
    request.getfixturevalue("hub")
    model = load("org/model")
    model.set_streams("code")
    wrapped.set_streams("code")
    zoo.close(logits_of(model), logits_of(wrapped), 1e-5)


@pytest.mark.parametrize("name", ["org/nothing", "nothing"])
def test_a_name_that_the_hub_does_not_have(hub, name):
    with pytest.raises(FileNotFoundError, match=f"no folder {name}, and the Hugging Face Hub"):
        load(name)


def test_without_a_connection_the_hub_is_asked_once(monkeypatch):
    """Each question waits for several tries of huggingface_hub."""
    asked = []

    def unanswered(repo, name, local_files_only=False):
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("parscale.format.folders.hf_hub_download", unanswered)
    with pytest.raises(FileNotFoundError, match="cannot be reached"):
        load("org/model")
    assert asked == [False] + [True] * (len(asked) - 1)


def test_a_further_set_in_a_subfolder_of_the_hub(monkeypatch):
    asked = []

    def download(repo, name, subfolder):
        asked.append((repo, subfolder, name))
        return "nowhere"

    monkeypatch.setattr("parscale.format.folders.hf_hub_download", download)
    Checkpoint("org/model", subfolder="runs").inside("code").file("streams.safetensors")
    assert asked == [("org/model", "runs/code", "streams.safetensors")]


# -- streams only


def test_a_backbone_that_is_given_as_a_model_takes_no_options(wrapped, zoo, tmp_path):
    wrapped.save_streams(tmp_path)
    with pytest.raises(ValueError, match="is a loaded model: omit dtype"):
        load(tmp_path, backbone=zoo.FAMILIES["llama"].build(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"wrapped already: .*load_streams\(folder\) a saved one"):
        load(tmp_path, backbone=wrapped)
    with pytest.raises(ValueError, match="got int"):
        load(tmp_path, backbone=3)


def test_streams_fit_the_model_inside_and_the_one_around(wrapped, zoo, tmp_path):
    """As weights do in `from_pretrained`, though the names of one begin with `model.`."""
    wrapped.save_streams(tmp_path / "around")
    inside = load(tmp_path / "around", backbone=zoo.FAMILIES["llama"].build("sdpa").model)
    with torch.no_grad():
        assert torch.equal(inside(IDS)[0], wrapped.model(IDS)[0])
    inside.save_streams(tmp_path / "inside")
    around = load(tmp_path / "inside", backbone=zoo.FAMILIES["llama"].build("sdpa"))
    assert torch.equal(logits_of(around), logits_of(wrapped))


def test_a_full_checkpoint_takes_no_backbone(folder, zoo):
    with pytest.raises(ValueError, match="omit backbone="):
        load(folder, backbone=zoo.FAMILIES["llama"].build())


def test_streams_from_a_newer_version_warn(wrapped, zoo, tmp_path):
    wrapped.save_streams(tmp_path)
    path = tmp_path / "parscale_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2, "twist": 1, "version": "9.1"}))
    with pytest.warns(UserWarning, match=r"another version of parscale \(9.1\); ignored: twist"):
        load(tmp_path, backbone=zoo.FAMILIES["llama"].build())


def test_a_full_checkpoint_from_a_newer_version_warns(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parscale_twist": 1}))
    with pytest.warns(UserWarning, match="parscale_twist"):
        load(folder)


def test_no_smoothing_in_the_configuration_means_the_released_default(folder):
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    del fields["parscale_attn_smooth"]
    path.write_text(json.dumps(fields))
    assert load(folder).parscale.active.config.smoothing == 0.01


# -- backbones that transformers does not know


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


def test_a_backbone_of_the_users_own(zoo, tmp_path):
    """Once its class is registered, as for any model; before, the error says so."""
    torch.manual_seed(0)
    model = wrap(OwnForCausalLM(OwnConfig(**zoo.COMMON)), 2, prefix_length=3, init="random")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"knows no model_type 'own_llama'.*AutoConfig.register"):
        load(tmp_path)
    AutoConfig.register("own_llama", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
    for loaded in (load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is OwnForCausalLM
        zoo.close(logits_of(loaded), logits_of(model), 1e-5)


def test_a_subclass_comes_back_as_the_class_of_its_type(zoo, tmp_path):
    class Tuned(LlamaForCausalLM):
        pass

    model = wrap(Tuned(LlamaConfig(**zoo.COMMON)), 2, prefix_length=3, init="random")
    model.save_pretrained(tmp_path)
    assert type(load(tmp_path)) is LlamaForCausalLM
