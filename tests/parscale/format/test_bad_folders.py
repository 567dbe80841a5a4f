"""Folders that are not what they should be: each is refused with an error that names it, before anything is built."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import tiny_llama
from transformers import AutoModelForCausalLM

from parscale import load, wrap

PREFIX = "model.layers.0.self_attn.prefix_k"


def backbone(**changes):
    return tiny_llama(max_position_embeddings=64, **changes)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A full checkpoint, the same in shards, its streams alone, and the plain backbone."""
    root = tmp_path_factory.mktemp("originals")
    model = wrap(backbone(), 2, prefix_length=3, init="random")
    model.add_streams("code", 4, prefix_length=2, init="random")
    model.save_pretrained(root / "full")
    model.save_pretrained(root / "shards", max_shard_size="10KB")
    model.save_streams(root / "streams")
    backbone().save_pretrained(root / "plain")
    return root


@pytest.fixture
def copied(originals, tmp_path):
    """Copies one of the originals, to be damaged."""

    def copy(kind):
        return Path(shutil.copytree(originals / kind, tmp_path / kind))

    return copy


def edit(path, **changes):
    """Changes fields of a JSON file; `...` removes one."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def write_header(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def refused(folder, match, kind=ValueError, **options):
    """By both ways of reading; the message also names the folder."""
    with pytest.raises(kind, match=match) as caught:
        load(folder, **options)
    assert str(folder) in str(caught.value)
    config = Path(folder, "config.json")
    if config.is_file() and not options and '"parscale_n"' in config.read_text(errors="replace"):
        with pytest.raises((ValueError, OSError)):
            AutoModelForCausalLM.from_pretrained(folder)


# -- the folder itself


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "no such folder"])
def test_a_missing_folder(name):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load(name)


@pytest.mark.parametrize("given", [None, 3, "", b"folder", torch.nn.Linear(1, 1)], ids=str)
def test_not_a_folder(given):
    with pytest.raises(ValueError, match="must be a folder or a name on the Hub"):
        load(given)


def test_a_file(tmp_path):
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file: give the checkpoint's folder", NotADirectoryError)


def test_an_empty_folder(tmp_path):
    refused(tmp_path, "is empty", FileNotFoundError)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").touch()
    refused(tmp_path, "neither a config.json nor a parscale_config.json", FileNotFoundError)


def test_a_plain_backbone(copied):
    refused(copied("plain"), r"not a ParScale checkpoint but a plain model.*parscale convert")


# -- its configuration


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"3", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"a": 1}}'],
    ids=["empty", "open", "list", "number", "null", "text", "bytes", "deep", "more"],
)
@pytest.mark.parametrize("kind", ["full", "streams"])
def test_a_configuration_that_is_no_object(copied, kind, text):
    folder = copied(kind)
    (folder / ("config.json" if kind == "full" else "parscale_config.json")).write_bytes(text)
    refused(folder, "not JSON|should hold a JSON object")


BAD_NUMBERS = [
    {"parscale_n": 0},
    {"parscale_n": "2"},
    {"parscale_n": 2.5},
    {"parscale_n": True},
    {"parscale_n": None},
    {"parscale_n_tokens": 0},
    {"parscale_n_tokens": -48},
    {"parscale_attn_smooth": 1.5},
    {"parscale_attn_smooth": "0.1"},
    {"parscale_init": "else"},
    {"parscale_seed": -1},
]


@pytest.mark.parametrize("change", BAD_NUMBERS, ids=str)
@pytest.mark.parametrize("kind", ["full", "streams"])
def test_numbers_out_of_range(copied, kind, change):
    folder = copied(kind)
    edit(folder / ("config.json" if kind == "full" else "parscale_config.json"), **change)
    refused(folder, "damaged: (num_streams|prefix_length|smoothing|init|seed) must be")


def test_no_number_of_streams(copied):
    folder = copied("full")
    edit(folder / "config.json", parscale_n=...)
    with pytest.raises(ValueError, match="parscale_n"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"parscale_n": 3}, r"2.weight of .* has the shape \(2, 16\), but its configuration says \(3, hidden size\)"),
        ({"parscale_n_tokens": 4}, r"has the shape \(2, 1, 3, 8\), but its configuration says \(2, heads, 4"),
        ({"parscale_n": 10**12}, "its configuration says"),
        ({"parscale_n": 1}, "one stream .* has no such tensor"),
    ],
    ids=["streams", "tokens", "absurd", "one"],
)
@pytest.mark.parametrize("kind", ["full", "streams"])
def test_streams_of_another_shape_than_the_configuration_says(copied, kind, change, match):
    folder = copied(kind)
    edit(folder / ("config.json" if kind == "full" else "parscale_config.json"), **change)
    refused(folder, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": 32}, r"embed_tokens.weight is \(32, 16\) in the files and should be \(32, 32\)|lm_head"),
        ({"vocab_size": 33}, r"is \(32, 16\) in the files and should be \(33, 16\)"),
        ({"num_hidden_layers": 3}, r"layers.2.*is missing"),
        ({"num_hidden_layers": 1}, r"layers.1.*is unknown"),
        ({"num_hidden_layers": 10**9}, "says num_hidden_layers = 1000000000, and its files hold"),
        ({"num_labels": 10**12}, "says num_labels = 1000000000000, and its files hold"),
        ({"vocab_size": 10**9}, "says vocab_size = 1000000000, and its files hold"),
        ({"vocab_size": 10**7}, "describes a model of .* numbers, but its files hold"),
        ({"num_attention_heads": 0}, "does not describe a model"),
        ({"hidden_act": "no such"}, "does not describe a model"),
        ({"hidden_size": "sixteen"}, "does not describe a model"),
        ({"rope_parameters": {"rope_type": "no such"}}, "does not describe a model"),
        ({"model_type": "no such_parscale"}, "transformers knows no model_type 'no such'"),
        ({"model_type": 5}, "no model_type"),
        ({"model_type": ...}, "no model_type"),
        ({"parscale_sets": "code"}, "should name sets of streams"),
        ({"parscale_sets": ["../code"]}, "should name sets of streams"),
        ({"parscale_sets": ["code", "code"]}, "names a set of streams twice"),
        ({"parscale_name": ["a"]}, "should name sets of streams"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_the_weights(copied, change, match):
    folder = copied("full")
    edit(folder / "config.json", **change)
    with pytest.raises(ValueError, match=match):
        load(folder)


# -- its weights


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_a_pickle_in_place_of_safetensors(copied, name):
    folder = copied("full")
    (folder / "model.safetensors").unlink()
    with (folder / name).open("wb") as file:
        pickle.dump(Trap(), file)
    refused(folder, f"{name} in place of model.safetensors.*can run any code")


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


@pytest.mark.parametrize("contents", ["0", "null", "[1]", '"text"', "{", ""])
def test_another_configuration_that_is_no_object(copied, contents):
    folder = copied("full")
    (folder / "generation_config.json").write_text(contents)
    refused(folder, r"generation_config\.json (should hold a JSON object|is not JSON)")


def test_a_pickle_in_place_of_streams(copied):
    folder = copied("streams")
    (folder / "streams.safetensors").unlink()
    torch.save({}, folder / "streams.bin")
    refused(folder, r"the streams are missing \(streams.bin is not read", FileNotFoundError, backbone=backbone())


def test_a_pickle_under_the_name_of_safetensors(copied):
    folder = copied("full")
    torch.save({}, folder / "model.safetensors")
    refused(folder, "looks like a pickle, which is not read")


def test_what_a_trainer_leaves_is_no_pickle_of_weights(copied):
    folder = copied("full")
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.pt"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    assert load(folder).num_streams == 2
    (folder / "model.safetensors").unlink()
    refused(folder, "the weights are missing", FileNotFoundError)


def test_pickles_are_not_asked_for(copied):
    with pytest.raises(ValueError, match="safetensors only"):
        AutoModelForCausalLM.from_pretrained(copied("full"), use_safetensors=False)


@pytest.mark.parametrize("kind", ["full", "shards", "streams"])
@pytest.mark.parametrize("kept", [0, 3, 8, 100, -1], ids=lambda kept: f"{kept} bytes")
def test_a_truncated_file(copied, kind, kept):
    folder = copied(kind)
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, "truncated|cannot be read|not a sound safetensors")


def test_a_longer_file(copied):
    folder = copied("full")
    with (folder / "model.safetensors").open("ab") as file:
        file.write(bytes(8))
    refused(folder, "not a sound safetensors file")


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({PREFIX: ENTRY | {"shape": [2**62, 2**62]}}, "its header is damaged"),
        ({PREFIX: ENTRY | {"shape": [2**40], "data_offsets": [0, 2**42]}}, "truncated or damaged"),
        ({PREFIX: ENTRY | {"data_offsets": [4, 0]}}, "truncated or damaged"),
        ({PREFIX: ENTRY | {"data_offsets": [-4, 0]}}, "does not describe"),
        ({PREFIX: ENTRY | {"data_offsets": [0]}}, "does not describe"),
        ({PREFIX: ENTRY | {"shape": [-1]}}, "does not describe"),
        ({PREFIX: ENTRY | {"shape": [1.5]}}, "does not describe"),
        ({PREFIX: ENTRY | {"shape": [True]}}, "does not describe"),
        ({PREFIX: ENTRY | {"shape": "1"}}, "does not describe"),
        ({PREFIX: ENTRY | {"dtype": 32}}, "does not describe"),
        ({PREFIX: ENTRY | {"dtype": "F99"}}, "not a sound safetensors"),
        ({PREFIX: 4}, "does not describe"),
        ({PREFIX: ENTRY, "b": ENTRY}, "not a sound safetensors"),
        ([], "should be a JSON object"),
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"a": {}, "a": {}}', "appears twice"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_header_that_promises_what_is_not_there(copied, header, match):
    folder = copied("full")
    write_header(folder / "model.safetensors", header, bytes(4))
    refused(folder, match)


def test_a_header_of_absurd_length(copied):
    folder = copied("full")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    refused(folder, "its header should have 9223372036854775808 bytes, but the file has 10")


def without(name):
    return lambda tensors: tensors.pop(name)


def with_(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


EXTRA = PREFIX.replace("0", "7")
BAD_STREAMS = {
    "missing prefix": (without(PREFIX), f"{PREFIX} is missing"),
    "missing bias": (without("model.aggregate_layer.2.bias"), "aggregate_layer.2.bias is missing"),
    "extra prefix": (with_(EXTRA, torch.ones(2, 1, 3, 8)), f"{EXTRA} is unknown"),
    "extra layer": (with_("model.aggregate_layer.3.x", torch.ones(1)), "aggregate_layer.3.x is unknown"),
    "shape": (with_(PREFIX, torch.ones(2, 2, 3, 8)), r"is \(2, 2, 3, 8\), not \(2, 1, 3, 8\)"),
    "integers": (with_(PREFIX, torch.ones(2, 1, 3, 8).long()), "streams are floating-point numbers"),
}


@pytest.mark.parametrize("kind", ["full", "streams"])
@pytest.mark.parametrize(("change", "match"), BAD_STREAMS.values(), ids=BAD_STREAMS)
def test_streams_that_are_not_all_there(copied, kind, change, match):
    folder = copied(kind)
    path = folder / ("model.safetensors" if kind == "full" else "streams.safetensors")
    change_tensors(path, change)
    options = {} if kind == "full" else {"backbone": backbone()}
    with pytest.raises(ValueError, match=match):
        load(folder, **options)


def test_no_streams_at_all(copied):
    folder = copied("full")
    shutil.copy(copied("plain") / "model.safetensors", folder)
    refused(folder, "should have 2 streams, but has no prefix_k")


BAD_BACKBONES = {
    "missing": (without("model.norm.weight"), r"model.norm.weight is missing"),
    "extra": (with_("extra", torch.ones(1)), "extra is unknown"),
    "shape": (with_("model.norm.weight", torch.ones(8)), r"is \(8,\) in the files and should be \(16,\)"),
}


@pytest.mark.parametrize(("change", "match"), BAD_BACKBONES.values(), ids=BAD_BACKBONES)
def test_a_backbone_that_is_not_all_there(copied, change, match, caplog):
    folder = copied("full")
    change_tensors(folder / "model.safetensors", change)
    refused(folder, match)
    assert "LOAD REPORT" not in caplog.text


def test_experts_that_are_not_all_there(zoo, tmp_path):
    """Tensors that transformers puts together while it reads."""
    zoo.Case(zoo.FAMILIES["mixtral"]).wrapped(2).save_pretrained(tmp_path)
    change_tensors(
        tmp_path / "model.safetensors", lambda t: t.pop("model.layers.0.block_sparse_moe.experts.1.w1.weight")
    )
    with pytest.raises(ValueError, match=r"do not fit|are not those"):
        load(tmp_path)


# -- shards


@pytest.mark.parametrize(
    "shard", ["../full/model.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b", "a\0b", 5, None]
)
def test_shard_names_that_leave_the_folder(copied, shard):
    folder = copied("shards")
    copied("full")
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=places | {PREFIX: shard})
    refused(folder, "a shard lies in the folder of its index")


@pytest.mark.parametrize("change", [{"metadata": ...}, {"weight_map": []}, {"weight_map": ...}], ids=str)
def test_an_index_that_is_none(copied, change):
    folder = copied("shards")
    edit(folder / "model.safetensors.index.json", **change)
    refused(folder, "should hold an object 'metadata' and an object 'weight_map'")


def test_a_missing_shard(copied):
    folder = copied("shards")
    sorted(folder.glob("*.safetensors"))[0].unlink()
    refused(folder, "which model.safetensors.index.json names", FileNotFoundError)


def test_an_index_and_shards_that_do_not_agree(copied):
    folder = copied("shards")
    change_tensors(sorted(folder.glob("*.safetensors"))[0], lambda tensors: tensors.update(extra=torch.ones(1)))
    refused(folder, "do not agree: extra is in the shard alone")
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=places | {"extra": min(places.values()), "other": min(places.values())})
    refused(folder, "do not agree: other is in the index alone")


def test_other_files_than_those_that_were_looked_at_are_not_read(copied):
    folder = copied("full")
    shutil.copy(copied("plain") / "model.safetensors", folder / "else.safetensors")
    edit(folder / "config.json", transformers_weights="else.safetensors")
    assert load(folder).num_streams == 2


# -- further sets


def test_a_further_set_that_is_damaged(copied):
    folder = copied("full")
    (folder / "code" / "streams.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"code has no streams\.safetensors"):
        load(folder)
    shutil.rmtree(folder / "code")
    with pytest.raises(FileNotFoundError, match="full has no folder code"):
        load(folder)


# -- streams only, and their backbone


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_size": 32}, "its hidden_size is 32, but the streams were made for 16"),
        ({"num_hidden_layers": 3}, "its num_layers is 3, but the streams were made for 2"),
        ({"num_key_value_heads": 2}, r"is \(2, 1, 3, 8\), not \(2, 2, 3, 8\)"),
    ],
    ids=["hidden size", "layers", "heads"],
)
@pytest.mark.parametrize("given", ["a model", "a folder"])
def test_a_backbone_that_does_not_fit(copied, tmp_path, changes, match, given):
    model = backbone(**changes).train()
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=match):
        load(copied("streams"), backbone=model if given == "a model" else tmp_path / "other")
    assert not hasattr(model, "parscale")
    assert model.training


def test_a_backbone_of_another_type(copied, zoo):
    with pytest.raises(ValueError, match="its model_type is qwen2, but the streams were made for llama"):
        load(copied("streams"), backbone=zoo.FAMILIES["qwen2"].build())


def test_no_backbone(copied, tmp_path):
    folder = copied("streams")
    refused(folder, "does not name its backbone")
    edit(folder / "parscale_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    refused(folder, "The backbone .*gone of .* cannot be read; pass backbone=", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match=r"elsewhere.*cannot be read"):
        load(folder, backbone=tmp_path / "elsewhere")
