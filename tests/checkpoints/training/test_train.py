"""`train` at a tiny scale: against a loop by hand, in every mode, and what it leaves behind."""

import copy
import functools
import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from training_runs import BATCH, S, is_of_streams, losses_of, run_by_hand
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from parscale import load, wrap
from parscale.checkpoints.description import describe
from parscale.checkpoints.texts.documents import Source
from parscale.checkpoints.training import train as training
from parscale.checkpoints.training.packing import Blocks, Encoder, pack
from parscale.checkpoints.training.train import TrainSettings, train


def settings(text_file, **options):
    return TrainSettings(
        **{
            "data": [str(text_file)],
            "tokens": 5 * BATCH * S,
            "sequence_length": S,
            "batch_size": BATCH,
            "learning_rate": 1e-2,
            "streams_learning_rate": 3e-2,
            "warmup": 0.2,
            "decay": 0.4,
            "bf16": False,
            "save_every": 5,
            "eval_tokens": 128,
        }
        | options
    )


by_hand = functools.partial(run_by_hand, factors=(0.0, 1.0, 1.0, 1.0, 0.5), streams_rate=3e-2)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "everything"])
def test_takes_the_steps_of_a_loop_by_hand(full, text_file, tmp_path, frozen):
    report = train(str(full), tmp_path / "run", settings(text_file, freeze_backbone=frozen))
    losses, parameters = by_hand(full, text_file, frozen=frozen)
    assert losses_of(tmp_path / "run") == pytest.approx(losses, abs=2e-5)
    assert report["tokens"] == 5 * BATCH * S

    before, after = (dict(load(folder).named_parameters()) for folder in (full, tmp_path / "run"))
    for name, parameter in parameters.items():
        assert after[name].dtype == before[name].dtype == torch.bfloat16
        torch.testing.assert_close(after[name].float(), parameter, atol=5e-4, rtol=1e-2)
        moved = not torch.equal(after[name], before[name])
        assert moved is (is_of_streams(name) or not frozen), name


@pytest.mark.parametrize(
    ("frozen", "options"),
    [
        pytest.param(True, {"micro_batch_size": 1}, marks=pytest.mark.nightly),
        (True, {"micro_batch_size": 2}),
        pytest.param(True, {"gradient_checkpointing": True}, marks=pytest.mark.nightly),
        pytest.param(False, {"micro_batch_size": 1}, marks=pytest.mark.nightly),
        pytest.param(False, {"micro_batch_size": 2}, marks=pytest.mark.nightly),
        (False, {"gradient_checkpointing": True}),
    ],
)
def test_a_batch_in_parts_and_checkpointed_activations(full, text_file, tmp_path, frozen, options):
    """Documents of different lengths, so that the parts predict different numbers of tokens."""
    for name, more in (("plain", {}), ("other", options)):
        train(str(full), tmp_path / name, settings(text_file, freeze_backbone=frozen, **more))
    assert losses_of(tmp_path / "other") == pytest.approx(losses_of(tmp_path / "plain"), abs=1e-5)


def test_leaves_a_checkpoint_of_the_same_kind(full, streams_only, backbone, text_file, tmp_path):
    for name, checkpoint, frozen in (("f", full, True), ("s", streams_only, True), ("p", backbone, False)):
        train(str(checkpoint), tmp_path / name, settings(text_file, freeze_backbone=frozen, save_every=None))
        before, after = describe(str(checkpoint)), describe(str(tmp_path / name))
        for key in ("kind", "num_streams", "prefix_length", "smoothing", "init", "seed", "dtype", "parameters"):
            assert after[key] == before[key], (name, key)
    assert AutoTokenizer.from_pretrained(tmp_path / "f")("x")["input_ids"]
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        "checkpoint-4", "checkpoint-5", "README.md", "loss.png", "metrics.jsonl", "parscale_config.json", "run.json",
        "streams.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json",
    }  # fmt: skip
    # the streams are those of the full checkpoint, which were trained on the same text
    alone, whole = load(tmp_path / "s"), load(tmp_path / "f")
    for name, parameter in whole.named_parameters():
        assert torch.equal(alone.get_parameter(name), parameter)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    assert not any(is_of_streams(name) for name, _ in plain.named_parameters())
    assert losses_of(tmp_path / "p")[-1] < losses_of(tmp_path / "p")[0]


def test_streams_train_where_their_backbone_moved_with_them(backbone, text_file, tmp_path):
    """What a processor needs comes along."""
    shutil.copytree(backbone, tmp_path / "first" / "backbone")
    model = wrap(LlamaForCausalLM.from_pretrained(tmp_path / "first" / "backbone"), 2, prefix_length=4, init="random")
    model.save_streams(tmp_path / "first" / "streams")
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path / "first" / "streams")
    (tmp_path / "first" / "streams" / "processor_config.json").write_text("{}")
    (tmp_path / "first").rename(tmp_path / "second")
    train(str(tmp_path / "second" / "streams"), tmp_path / "run", settings(text_file, freeze_backbone=True))
    assert load(tmp_path / "run").config.name_or_path == str(tmp_path / "second" / "backbone")
    assert (tmp_path / "run" / "processor_config.json").read_text() == "{}"


def test_checkpoints_on_the_way_can_be_loaded(full, text_file, tmp_path):
    train(str(full), tmp_path / "all", settings(text_file))
    train(str(full), tmp_path / "streams", settings(text_file, freeze_backbone=True))
    for folder in ("all", "streams"):
        last, final = load(tmp_path / folder / "checkpoint-5"), load(tmp_path / folder)
        for name, parameter in final.named_parameters():
            assert torch.equal(last.get_parameter(name).to(parameter.dtype), parameter)


def test_what_is_measured(full, backbone, text_file, tmp_path):
    """Each text apart, before and after, with streams and without, against losses of whole documents."""
    other = tmp_path / "prose.jsonl"
    documents = ["The quick brown fox.", "It is a truth universally acknowledged."]
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    chosen = settings(
        text_file, freeze_backbone=True, eval_data={"prose": str(other), "code": str(text_file)}, sequence_length=64,
        tokens=5 * BATCH * 64, eval_every=2,
    )  # fmt: skip
    report = train(str(full), tmp_path / "run", chosen)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [(line["step"], line["text"], "backbone_loss" in line) for line in lines if "text" in line]
    assert measured == [
        (0, "prose", True), (0, "code", True), (0, "prose", False), (0, "code", False), (2, "prose", False),
        (2, "code", False), (4, "prose", False), (4, "code", False), (5, "prose", False), (5, "code", False),
    ]  # fmt: skip

    tokenizer = AutoTokenizer.from_pretrained(backbone)

    def loss(model):
        total = count = 0
        for text in documents:
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            total += cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
        return total / count

    plain = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    found = report["losses"]["prose"]
    with torch.no_grad():
        assert found["backbone"] == pytest.approx(loss(plain), abs=1e-5)
        assert found["before"] == pytest.approx(loss(load(full, dtype=torch.float32)), abs=1e-5)
        trained = load(tmp_path / "run" / "checkpoint-5", backbone=str(full), dtype=torch.float32)
        assert found["after"] == pytest.approx(loss(trained), abs=1e-5)


def test_an_adapter_beside_the_streams(full, text_file, tmp_path):
    """It is merged into the backbone: the result has the losses of adapter and streams apart."""
    peft = pytest.importorskip("peft")
    before = load(full, dtype=torch.float32)
    before.save_pretrained(tmp_path / "float32")
    AutoTokenizer.from_pretrained(full).save_pretrained(tmp_path / "float32")
    train(str(tmp_path / "float32"), tmp_path / "run", settings(text_file, lora_rank=4))
    assert losses_of(tmp_path / "run")[-1] < losses_of(tmp_path / "run")[0]
    after = load(tmp_path / "run")
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert {name for name in moved if is_of_streams(name)} == {
        n for n, _ in after.named_parameters() if is_of_streams(n)
    }
    assert {name.split(".")[-2] for name in moved if "layers" in name and not is_of_streams(name)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert not any("norm" in name or "embed" in name for name in moved)
    last = tmp_path / "run" / "checkpoint-5"
    apart = peft.PeftModel.from_pretrained(load(last, backbone=str(tmp_path / "float32")), str(last))
    ids = torch.arange(20)[None]
    torch.testing.assert_close(after(ids).logits, apart(ids).logits, atol=2e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def wide(byte_tokenizer, tmp_path_factory):
    """Full and streams only, of sizes that four-bit blocks of 64 weights fit in."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "backbone")
    model = LlamaForCausalLM.from_pretrained(folder / "backbone")
    wrap(model, 2, prefix_length=3, init="random", seed=0)
    model.save_pretrained(folder / "full")
    model.save_streams(folder / "streams")
    for name in ("full", "streams"):
        byte_tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("kind", ["full", "streams"])
@pytest.mark.parametrize(("quantize", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_quantized_frozen_backbone(wide, text_file, tmp_path, quantize, package, kind):
    """The streams train on it, and are saved with the backbone as it was."""
    pytest.importorskip(package)
    train(str(wide / kind), tmp_path / "run", settings(text_file, freeze_backbone=True, quantize=quantize))
    exact = by_hand(wide / "full", text_file, frozen=True)[0]
    losses = losses_of(tmp_path / "run")
    assert all(abs(one - other) > 1e-5 for one, other in zip(losses, exact, strict=True))
    assert losses == pytest.approx(exact, rel={"int8": 0.005, "nf4": 0.05}[quantize])  # eight bits and four
    before, after = load(wide / "full"), load(tmp_path / "run")
    for name, parameter in after.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)) is not is_of_streams(name)


@pytest.mark.parametrize(("quantize", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_an_adapter_on_a_quantized_backbone(wide, text_file, tmp_path, quantize, package):
    pytest.importorskip(package)
    train(str(wide / "full"), tmp_path / "run", settings(text_file, lora_rank=2, quantize=quantize))
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < losses[0]
    assert load(tmp_path / "run").num_streams == 2


def test_streamed_data_is_the_data_in_its_order(full, text_file, tmp_path):
    train(str(full), tmp_path / "run", settings(text_file, streaming=True, freeze_backbone=True))
    model = load(full, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(full)
    blocks = Blocks(pack(Encoder(tokenizer, 257)([("", text_file.read_text())]), S), S)
    rows = [blocks[index] for index in range(BATCH)]
    inputs = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    assert losses_of(tmp_path / "run")[0] == pytest.approx(model(**inputs).loss.item(), abs=1e-5)


def test_documents_in_memory_train_as_the_same_files_do(full, text_file, tmp_path):
    train(str(full), tmp_path / "files", settings(text_file, eval_data={"same": str(text_file)}))
    source = Source.of("some code", [("text.py", text_file.read_text())])
    report = train(str(full), tmp_path / "memory", settings(text_file, data=[source], eval_data={"same": source}))
    assert losses_of(tmp_path / "memory") == losses_of(tmp_path / "files")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("files", "memory")]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    assert report["data"] == ["some code"]
    assert "`some code`" in (tmp_path / "memory" / "README.md").read_text()


def test_in_bfloat16(full, text_file, tmp_path):
    """A frozen backbone stays in its own dtype; what trains is in float32."""
    train(str(full), tmp_path / "run", settings(text_file, bf16=True, freeze_backbone=True))
    assert losses_of(tmp_path / "run") == pytest.approx(by_hand(full, text_file, frozen=True)[0], rel=0.02)
    stored = load_file(tmp_path / "run" / "checkpoint-5" / "streams.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert {p.dtype for p in load(tmp_path / "run").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("given", "precision"), [(False, False), (None, True), (True, True)])
def test_a_launchers_precision_is_a_default(full, text_file, tmp_path, monkeypatch, given, precision):
    """What the report says is what ran: `accelerate launch` sets this variable by its configuration."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    report = train(str(full), tmp_path / "run", settings(text_file, bf16=given))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    train(str(full), tmp_path / "alone", settings(text_file, bf16=precision))
    assert report["bf16"] is precision
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "alone")


@pytest.mark.parametrize(("apart_in", "micro", "refused"), [(2, None, False), (1, 1, False), (1, 2, True)])
def test_rows_that_mix_their_documents_are_refused(full, text_file, tmp_path, monkeypatch, apart_in, micro, refused):
    """As flash-attention does, which finds documents in one row only."""
    monkeypatch.setattr(training, "keeps_documents_apart", lambda model, vocabulary, rows=1: rows <= apart_in)
    run = functools.partial(train, str(full), tmp_path / "run", settings(text_file, micro_batch_size=micro))
    if refused:
        with pytest.raises(ValueError, match=r"apart only where one sequence runs at once.*--micro-batch-size 1"):
            run()
        assert not (tmp_path / "run").exists()
    else:
        run()


def test_experts_that_are_balanced_are_measured(backbone, text_file, tmp_path):
    """Their outputs begin with the loss that balances them."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        output_router_logits=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = wrap(MixtralForCausalLM(config), 2, prefix_length=2, init="random", seed=0)
    model.save_pretrained(tmp_path / "experts")
    tokenizer.save_pretrained(tmp_path / "experts")
    held_out = {"held-out": str(text_file)}
    report = train(
        str(tmp_path / "experts"), tmp_path / "run", settings(text_file, eval_data=held_out, tokens=BATCH * S)
    )
    assert 0 < report["losses"]["held-out"]["after"] < 10


def test_rates_are_those_of_each_part(full, text_file, tmp_path):
    """Also where those of streams and aggregator are zero; what has no rate does not move."""
    unmoved = {"streams_learning_rate": 0.0, "aggregator_learning_rate": 0.0}
    train(str(full), tmp_path / "run", settings(text_file, **unmoved, warmup=0.0, decay=0.0))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rates"] for line in lines if "loss" in line]
    assert rates == [{"streams": 0.0, "aggregator": 0.0, "backbone": 1e-2}] * 5
    before, after = (dict(load(folder).named_parameters()) for folder in (full, tmp_path / "run"))
    assert {name for name in before if torch.equal(before[name], after[name])} == set(filter(is_of_streams, before))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (1e-2, 1e-3, 3e-5)),
        ({"streams_learning_rate": 3e-4}, (3e-4, 3e-4, 3e-5)),
        ({"streams_learning_rate": 1e-1, "aggregator_learning_rate": 1e-2}, (1e-1, 1e-2, 3e-5)),
        ({"learning_rate": 5e-2, "freeze_backbone": True}, (5e-2, 1e-3, 5e-2)),
    ],
)
def test_the_aggregator_has_a_rate_of_its_own(given, expected):
    """At the rate that prefixes need, it settles on one stream within a hundred steps."""
    assert TrainSettings(data=["x"], **given).rates("prefix") == expected


@pytest.mark.parametrize("given", [{}, {"aggregator_learning_rate": 1e-2}], ids=["default", "given"])
def test_in_a_new_model_the_aggregator_learns_as_the_rest_does(given):
    chosen = TrainSettings(data=["x"], learning_rate=4e-3, streams_learning_rate=8e-3, **given)
    rates = chosen.rates("prefix", new=True)
    assert rates == (8e-3, given.get("aggregator_learning_rate", 4e-3), 4e-3)


def test_only_matrices_of_the_backbone_decay(full, text_file, tmp_path):
    train(str(full), tmp_path / "run", settings(text_file, weight_decay=0.5))
    groups = torch.load(tmp_path / "run" / "checkpoint-5" / "optimizer.pt")["param_groups"]
    found = {(group["part"], group["weight_decay"]): len(group["params"]) for group in groups}
    named = dict(load(full).named_parameters())
    backbone = [p for name, p in named.items() if not is_of_streams(name)]
    matrices = sum(p.ndim == 2 for p in backbone)
    expected = {
        ("streams", 0.0): len(named) - len(backbone) - 4,
        ("aggregator", 0.0): 4,
        ("backbone", 0.5): matrices,
        ("backbone", 0.0): len(backbone) - matrices,
    }
    assert found == expected


def test_a_tenth_of_the_steps_is_the_default():
    arguments = training._arguments(TrainSettings(data=["x"], tokens=100), 40)
    assert (arguments["save_steps"], arguments["eval_steps"]) == (4, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "everything"])
def test_on_a_gpu(full, text_file, tmp_path, frozen):
    """In bfloat16 by itself; begun again from a checkpoint on the way it is the same run."""
    chosen = settings(text_file, bf16=None, freeze_backbone=frozen, save_every=2)
    report = train(str(full), tmp_path / "run", chosen)
    assert report["bf16"]
    losses = losses_of(tmp_path / "run")
    assert losses == pytest.approx(by_hand(full, text_file, frozen=frozen)[0], rel=0.03)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for path in [*(tmp_path / "again").glob("*.json"), tmp_path / "again" / "model.safetensors"]:
        if path.name != "run.json":
            path.unlink()
    shutil.rmtree(tmp_path / "again" / "checkpoint-5")
    train(str(full), tmp_path / "again", chosen, resume=True)
    assert losses_of(tmp_path / "again") == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_compiled(full, text_file, tmp_path, backend, monkeypatch):
    """By day without the code that torch's own backend makes, which takes a compiler of C++ its time."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_(*args, **options | {"backend": backend}))
    torch._dynamo.reset()
    graphs = counters["stats"]["unique_graphs"]
    train(str(full), tmp_path / "run", settings(text_file, compile=True, freeze_backbone=True))
    assert counters["stats"]["unique_graphs"] > graphs
    assert losses_of(tmp_path / "run") == pytest.approx(by_hand(full, text_file, frozen=True)[0], abs=1e-4)


def test_further_sets_stay_as_they_are(full, text_file, tmp_path):
    model = load(full)
    model.add_streams("other", 2, prefix_length=3, init="random", seed=5)
    model.save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(full).save_pretrained(tmp_path / "two")
    kept = copy.deepcopy({name: p for name, p in model.named_parameters() if "@other" in name})
    for name, frozen in (("streams", True), ("everything", False)):
        train(str(tmp_path / "two"), tmp_path / name, settings(text_file, freeze_backbone=frozen))
        after = load(tmp_path / name)
        assert kept
        assert all(torch.equal(after.get_parameter(key), value) for key, value in kept.items())


def test_the_card_states_the_run(full, text_file, tmp_path):
    report = train(
        str(full), tmp_path / "run", settings(text_file, freeze_backbone=True, eval_data={"code": str(text_file)}),
        command="parscale train here",
    )  # fmt: skip
    assert report["backbone"] is None
    card = (tmp_path / "run" / "README.md").read_text()
    assert "base_model" not in card
    for fact in ("LlamaForCausalLM", "parscale train here", "320", f"{report['losses']['code']['after']:.4f}"):
        assert fact in card


def test_the_card_of_a_full_checkpoint_names_its_backbone(full, text_file, tmp_path):
    start = shutil.copytree(full, tmp_path / "start")
    fields = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(fields | {"parscale_backbone": "org/backbone"}))
    report = train(str(start), tmp_path / "run", settings(text_file, freeze_backbone=True))
    assert report["backbone"] == "org/backbone"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["parscale_backbone"] == "org/backbone"
    card = (tmp_path / "run" / "README.md").read_text()
    assert ModelCard(card).data.base_model == "org/backbone"
    assert "`org/backbone` (LlamaForCausalLM) with" in card


@pytest.mark.parametrize(
    ("which", "options", "said"),
    [
        ("full", {"tokens": BATCH * S - 1}, "63 tokens are fewer than the 64 of one step"),
        (
            "full",
            {"sequence_length": 129},
            "sequence_length is 129, and must be between 2 and the model's 128 positions",
        ),
        ("full", {"micro_batch_size": 3}, "must divide each process's 4 sequences"),
        ("full", {"lora_rank": 33}, "lora_rank is 33, and no weight of LlamaForCausalLM has a rank above 32: give at"),
        ("full", {"data": ["short.txt"], "tokens": None}, "fewer than one sequence of 16"),
        ("full", {"data": ["short.txt"], "streaming": True}, "fewer than one sequence of 16"),
        ("full", {"data": ["empty.txt"]}, "empty.txt is empty"),
        ("full", {"data": ["gone.txt"]}, "gone.txt does not exist"),
        ("full", {"eval_data": {"x": "gone.txt"}}, "gone.txt does not exist"),
        ("full", {"eval_data": {"x": "one.txt"}}, None),
        ("streams_only", {}, "holds streams only, so its backbone cannot be trained; add --freeze-backbone"),
        ("backbone", {"freeze_backbone": True}, "has no streams, so with a frozen backbone there is nothing to train"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    request, text_file, tmp_path, monkeypatch, which, options, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "empty.txt").write_text("")
    checkpoint = request.getfixturevalue(which)
    if said is None:  # a letter and the end of text are two tokens
        train(str(checkpoint), tmp_path / "run", settings(text_file, **options))
        return
    with pytest.raises((ValueError, OSError), match=said):
        train(str(checkpoint), tmp_path / "run", settings(text_file, **options))
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_in_use(full, text_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    for resume, said in ((False, "is not empty; give a new one, or --resume"), (True, "holds no run to resume")):
        with pytest.raises(ValueError, match=said):
            train(str(full), tmp_path / "run", settings(text_file), resume=resume)
    with pytest.raises(ValueError, match="is a file"):
        train(str(full), text_file, settings(text_file))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]
