"""What checkpoints may not do when they are read: run code, be unpickled, put an adapter on, name another backbone."""

import ast
import builtins
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from small_models import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import parscale
from parscale import load, wrap
from parscale.checkpoints.conversion.convert import convert
from parscale.checkpoints.description import describe
from parscale.checkpoints.models import find_tokenizer, load_any, load_plain
from parscale.checkpoints.training.model_loading import check_trainable, open_for_training
from parscale.config import ParScaleConfig
from parscale.format.folders import Checkpoint, backbone_location
from parscale.format.pretrained import read_pretrained
from parscale.format.values import configuration_of

ROOT = Path(__file__).parents[3]
IDS = torch.arange(8)[None]
TRAINS = ("streams", "lora", "everything")


def wrapped_on(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    return wrap(model, 2, prefix_length=3, init="random", seed=1).eval()


@pytest.fixture
def folders(tmp_path):
    """A backbone, streams alone that name it, and a full checkpoint."""
    tiny_llama().save_pretrained(tmp_path / "backbone")
    model = wrapped_on(tmp_path / "backbone")
    model.save_streams(tmp_path / "streams")
    model.save_pretrained(tmp_path / "full")
    return tmp_path


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS).logits


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- one way in


def test_one_function_calls_from_pretrained():
    """Every other mention of such a method, or of what unpickles, is a call that passes its rules by."""
    doors = {ROOT / "parscale" / "format" / "pretrained.py"}
    found = []
    for room in ("parscale", "kernels", "checkpoints", "scaling_laws"):
        for path in set((ROOT / room).rglob("*.py")) - doors:
            for node in ast.walk(ast.parse(path.read_text())):
                named = isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
                unpickles = isinstance(node, ast.Attribute) and ast.unparse(node) in UNPICKLING
                if named or unpickles:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found


UNPICKLING = {"torch.load", "pickle.load", "pickle.loads", "joblib.load", "numpy.load", "np.load"}


def test_what_the_caller_says_counts(folders):
    class Reader(LlamaForCausalLM):
        @classmethod
        def from_pretrained(cls, *arguments, **options):
            return arguments, options

    arguments, options = read_pretrained(Reader, folders / "backbone")
    assert arguments == (folders / "backbone",)
    assert (options["trust_remote_code"], options["use_safetensors"]) == (False, True)
    _, options = read_pretrained(Reader, folders / "backbone", trust_remote_code=True, use_safetensors=False)
    assert (options["trust_remote_code"], options["use_safetensors"]) == (True, False)


# -- code


WAYS = {
    "load": lambda folders: load(folders / "streams"),
    "load with backbone=": lambda folders: load(folders / "streams", backbone=folders / "backbone"),
    "load a plain model": lambda folders: load_plain(str(folders / "backbone")),
    "load any": lambda folders: load_any(str(folders / "backbone")),
    "convert": lambda folders: convert(str(folders / "backbone"), folders / "new", ParScaleConfig(2, init="random")),
    "train": lambda folders: open_for_training(str(folders / "streams"), trains="streams"),
    "train quantized": lambda folders: open_for_training(str(folders / "streams"), trains="streams", quantize="int8"),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_code_that_a_backbone_brings_does_not_run(folders, way, monkeypatch):
    """Nobody is asked on standard input, where an answer may be waiting."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked whether to run code"))
    bring_code(folders / "backbone", "config.json", "AutoConfig")
    edit(folders / "backbone" / "config.json", model_type="of_its_own")
    edit(folders / "streams" / "parscale_config.json", backbone_model_type="of_its_own")
    with pytest.raises((ValueError, OSError), match=r"needs to run its own code.*trust_remote_code=True"):
        way(folders)
    assert not (folders / "ran").exists()


def test_code_that_a_tokenizer_brings_does_not_run(folders, backbone, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked whether to run code"))
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folders / "backbone")
    edit(folders / "backbone" / "tokenizer_config.json", tokenizer_class="OfItsOwn")
    bring_code(folders / "backbone", "tokenizer_config.json", "AutoTokenizer", ["code.Config", "code.Config"])
    with pytest.raises(ValueError, match="needs to run its own code"):
        find_tokenizer(str(folders / "backbone"))
    assert not (folders / "ran").exists()


def bring_code(folder, name, auto, place="code.Config"):
    edit(folder / name, auto_map={auto: place})
    (folder / "code.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedConfig\n"
        f"Path({str(folder.parent / 'ran')!r}).touch()\nclass Config(PreTrainedConfig): model_type = 'of_its_own'\n"
    )


# -- pickles


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


def unpickled(folder):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_backbone_in_pickles_is_refused(folders, way):
    unpickled(folders / "backbone")
    with pytest.raises((ValueError, OSError), match="parscale reads safetensors only"):
        way(folders)


@pytest.mark.parametrize(
    "way", [WAYS["load"], WAYS["load a plain model"], WAYS["train"]], ids=["load", "plain", "train"]
)
def test_pickles_of_a_repository_on_the_hub_are_refused(folders, way, monkeypatch):
    unpickled(folders / "backbone")
    on_the_hub(folders, monkeypatch)
    with pytest.raises((ValueError, OSError), match=r"has no model\.safetensors"):
        way(InCache(folders))


@pytest.mark.parametrize(
    "way", [WAYS["load"], WAYS["load a plain model"], WAYS["train"]], ids=["load", "plain", "train"]
)
def test_a_repository_on_the_hub_is_read(folders, way, monkeypatch):
    on_the_hub(folders, monkeypatch)
    assert way(InCache(folders)).config.hidden_size == 16


def on_the_hub(folders, monkeypatch):
    """Moves the backbone into the cache of the Hub's client, as `org/model`, and has the streams name it so."""
    repository = folders / "cache" / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folders / "backbone", repository / "snapshots" / ("0" * 40))
    shutil.rmtree(folders / "backbone")
    fields = json.loads((folders / "streams" / "parscale_config.json").read_text())
    fields.pop("backbone_path")
    (folders / "streams" / "parscale_config.json").write_text(
        json.dumps(fields | {"base_model_name_or_path": "org/model"})
    )
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.TRANSFORMERS_CACHE"):
        monkeypatch.setattr(name, str(folders / "cache"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


class InCache:
    """The folders, with the name of the repository for the backbone's."""

    def __init__(self, folders):
        self.folders = folders

    def __truediv__(self, name):
        return "org/model" if name == "backbone" else self.folders / name


# -- an adapter beside the model


@pytest.fixture
def adapter(folders):
    """An adapter that PEFT saved; the logits with it are others."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(load(folders / "full"), config).eval()
    adapted.save_pretrained(folders / "adapter")
    return adapted


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("full", load),
        ("full", AutoModelForCausalLM.from_pretrained),
        ("full", lambda folder: load_any(str(folder))),
        ("streams", load),
        ("backbone", lambda folder: load_plain(str(folder))),
    ],
    ids=["full", "full by Auto", "full by a command", "streams", "plain"],
)
def test_an_adapter_beside_a_model_is_left_to_peft(folders, adapter, name, read):
    """It is said, and one line of PEFT puts it on; what lies in its file does not matter before that."""
    import peft

    expected = logits_of(read(folders / name))
    shutil.copytree(folders / "adapter", folders / name, dirs_exist_ok=True)
    with pytest.warns(UserWarning, match=r"also holds an adapter.*not applied: peft.PeftModel.from_pretrained\(model"):
        model = read(folders / name)
    assert torch.equal(logits_of(model), expected)
    assert not any("lora" in key for key, _ in model.named_parameters())
    if name == "full":
        with_adapter = peft.PeftModel.from_pretrained(model, folders / name).eval()
        assert torch.equal(logits_of(with_adapter), logits_of(adapter))
        assert not torch.equal(logits_of(adapter), expected)
    (folders / name / "adapter_model.safetensors").unlink()
    (folders / name / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.warns(UserWarning, match="also holds an adapter"):
        read(folders / name)


def test_an_adapter_does_not_send_the_reader_to_another_backbone(folders, adapter):
    tiny_llama(seed=5).save_pretrained(folders / "other")
    expected = logits_of(load(folders / "full"))
    shutil.copytree(folders / "adapter", folders / "full", dirs_exist_ok=True)
    edit(folders / "full" / "adapter_config.json", base_model_name_or_path=str(folders / "other"))
    with pytest.warns(UserWarning, match="not applied"):
        assert torch.equal(logits_of(load(folders / "full")), expected)


@pytest.mark.parametrize("use", [load_any, *(lambda folder, it=it: check_trainable(folder, it) for it in TRAINS)])
def test_streams_of_an_adapter_are_no_model_for_a_command_until_it_is_merged(folders, adapter, use):
    """By the line that the error gives."""
    import peft

    place = str(folders / "adapter")
    with pytest.raises(
        ValueError, match=r"holds an adapter \(adapter_config.json\) and the streams.*Merge it"
    ) as error:
        use(place)
    line, names = str(error.value).rpartition(": ")[2], {"peft": peft, "parscale": parscale}
    with pytest.warns(UserWarning, match="also holds an adapter"):
        eval(line, names | {"FOLDER": folders / "merged"})
    use(str(folders / "merged"))
    torch.testing.assert_close(logits_of(load_any(str(folders / "merged"))), logits_of(adapter), atol=1e-5, rtol=1e-5)
    assert describe(place)["adapter"] == "LORA"
    assert "adapter" not in describe(str(folders / "merged"))


# -- where the backbone of streams is


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another working directory."""
    folder = tmp_path / "a" / "elsewhere"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def test_streams_saved_beside_a_backbone_that_was_named_relatively(folders, monkeypatch, elsewhere):
    monkeypatch.chdir(folders)
    model = wrapped_on("backbone")
    model.save_streams("again")
    monkeypatch.chdir(elsewhere)
    model.save_streams("from_elsewhere")
    monkeypatch.chdir(folders)
    for saved in (folders / "again", elsewhere / "from_elsewhere"):
        assert torch.equal(logits_of(load(saved)), logits_of(model))


@pytest.mark.parametrize("depth", ["streams", "runs/deep/streams"])
@pytest.mark.parametrize("how", ["saved", "converted"])
def test_streams_and_backbone_that_moved_together(folders, elsewhere, depth, how):
    (folders / "work").mkdir()
    shutil.move(folders / "backbone", folders / "work" / "backbone")
    if how == "saved":
        wrapped_on(folders / "work" / "backbone").save_streams(folders / "work" / depth)
    else:
        config = ParScaleConfig(2, 3, init="random", seed=1)
        convert(str(folders / "work" / "backbone"), folders / "work" / depth, config, streams_only=True)
    expected = logits_of(wrapped_on(folders / "work" / "backbone"))
    assert torch.equal(logits_of(load(folders / "work" / depth)), expected)
    shutil.move(folders / "work", elsewhere / "moved")
    assert torch.equal(logits_of(load(elsewhere / "moved" / depth)), expected)


def test_where_the_backbone_was_counts_before_where_it_lay(folders, elsewhere):
    """The streams moved alone, to where another backbone lies in the same place beside them."""
    expected = logits_of(load(folders / "streams"))
    shutil.move(folders / "streams", elsewhere / "streams")
    tiny_llama(seed=5).save_pretrained(elsewhere / "backbone")
    assert torch.equal(logits_of(load(elsewhere / "streams")), expected)
    shutil.rmtree(folders / "backbone")
    assert not torch.equal(logits_of(load(elsewhere / "streams")), expected)


@pytest.mark.parametrize("name", ["../backbone", "./../backbone", "backbone"])
def test_a_relative_path_starts_from_the_streams(folders, elsewhere, name):
    """Not from the working directory, where another of that name may lie; that one is read if there is no such."""
    target = os.path.normpath(folders / "streams" / name)
    if not os.path.isdir(target):
        shutil.copytree(folders / "backbone", target)
    config = folders / "streams" / "parscale_config.json"
    fields = json.loads(config.read_text())
    del fields["backbone_path"]  # as older versions wrote it
    config.write_text(json.dumps(fields | {"base_model_name_or_path": name}))
    expected = logits_of(wrapped_on(folders / "backbone"))
    other = tiny_llama(seed=5)
    other.save_pretrained(os.path.normpath(elsewhere / name))
    assert torch.equal(logits_of(load(folders / "streams")), expected)
    shutil.rmtree(target)
    assert not torch.equal(logits_of(load(folders / "streams")), expected)


def test_a_backbone_on_the_hub_gets_no_path(folders):
    model = wrapped_on(folders / "backbone")
    model.config._name_or_path = "org/model"
    model.save_streams(folders / "again")
    fields = json.loads((folders / "again" / "parscale_config.json").read_text())
    assert fields["base_model_name_or_path"] == "org/model"
    assert "backbone_path" not in fields


def test_a_name_on_the_hub_that_was_put_in_place_of_a_folder_counts(folders):
    fields = json.loads((folders / "streams" / "parscale_config.json").read_text())
    streams = Checkpoint(folders / "streams")
    assert backbone_location(streams, fields) == str(folders / "backbone")
    assert backbone_location(streams, fields | {"base_model_name_or_path": "org/model"}) == "org/model"
    for name in (None, "", 5, ["a"]):
        assert backbone_location(streams, fields | {"base_model_name_or_path": name}) is None


# -- errors of the machine


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["a device", "the CPU", "Python"],
)
def test_too_little_memory_is_not_damage(folders, error, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fails)
    with pytest.raises(type(error)) as caught:
        load_plain(str(folders / "backbone"))
    assert caught.value is error
    with pytest.raises(type(error)) as caught, configuration_of("a checkpoint"):
        fails()
    assert caught.value is error
