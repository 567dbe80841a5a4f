"""`train_controls`: what is trained beside a run, on which tokens, how it is compared, and how it goes on."""

import dataclasses
import io
import json
import shutil
from statistics import fmean

import pytest
import torch
from rich.console import Console
from torch.nn import Linear
from torch.nn.functional import cross_entropy
from training_runs import losses_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from parscale import ParScaleConfig, load, wrap
from parscale.checkpoints import control_runs
from parscale.checkpoints.control_runs import check_controls, controls_of, train_controls, train_with_controls
from parscale.checkpoints.evaluation.places import evaluate_places
from parscale.checkpoints.texts.chat_tokens import as_text
from parscale.checkpoints.texts.documents import Chat, Completion, Source
from parscale.checkpoints.training.model_loading import rank_with_parameters
from parscale.checkpoints.training.packing import Shuffled, pack_documents
from parscale.checkpoints.training.run_folder import Run
from parscale.checkpoints.training.run_result import card_of
from parscale.checkpoints.training.train import TrainSettings, train
from parscale.checkpoints.training.upload import _renamed_card

S, BATCH, P, T = 16, 2, 3, 4
TRAIN = [(f"{n}.py", f"def f{n}(x):\n    return x + {n}\n" * 3) for n in range(12)]
HELD_OUT = [(f"{n}.py", f"def g{n}(y):\n    return y * {n}\n" * 4) for n in range(3)]
SETTINGS = TrainSettings(
    data=[Source.of("train", TRAIN)],
    eval_data={"code": Source.of("code", HELD_OUT)},
    tokens=3 * BATCH * S,
    sequence_length=S,
    batch_size=BATCH,
    streams_learning_rate=3e-2,
    warmup=0.0,
    decay=0.0,
    freeze_backbone=True,
    bf16=False,
    eval_every=3,
    seed=5,
)


def trained(full, folder):
    train(str(full), folder, SETTINGS)
    return folder


@pytest.fixture(scope="module")
def finished(full, tmp_path_factory):
    """A run and its controls: the run's folder and the report."""
    folder = trained(full, tmp_path_factory.mktemp("controls") / "run")
    return folder, train_controls(str(full), folder, SETTINGS)


def test_the_backbone_alone_sees_the_batches_of_the_run(finished, full, backbone):
    folder, _ = finished
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.bfloat16).float()
    tokenizer = AutoTokenizer.from_pretrained(full)
    rows = Shuffled(pack_documents(TRAIN, tokenizer, S), 3 * BATCH, seed=5)
    batch = [rows[index] for index in range(BATCH)]
    inputs = {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"]).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    assert losses_of(folder / "controls" / "alone")[0] == pytest.approx(loss.item(), abs=1e-5)
    after = load_plain(folder / "controls" / "alone")
    assert any(not torch.equal(after[name], tensor.bfloat16()) for name, tensor in model.state_dict().items())


def load_plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(("name", "length"), [("prefix", T), ("long-prefix", P * T)])
def test_one_prefix_is_two_streams_that_stay_equal_on_the_same_backbone(finished, full, name, length):
    folder, _ = finished
    model, run = load(folder / "controls" / name), load(full)
    prefixes = {key: tensor for key, tensor in model.state_dict().items() if "prefix_" in key}
    assert prefixes
    for tensor in prefixes.values():
        assert tensor.shape[0] == 2
        assert tensor.shape[2] == length
        assert torch.equal(tensor[0], tensor[1])
    backbone = {
        key: tensor for key, tensor in run.state_dict().items() if "prefix_" not in key and "aggregate" not in key
    }
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in backbone.items())


def test_the_report_pairs_the_run_with_each_control(finished, full):
    folder, report = finished
    assert report["controls"] == {
        "alone": "backbone alone",
        "prefix": "one prefix of 4 tokens",
        "long-prefix": "one prefix of 12 tokens",
        "adapter": "one adapter of rank 4, as many parameters",
    }
    assert json.loads((folder / "controls.json").read_text()) == report
    tokenizer = AutoTokenizer.from_pretrained(full)
    models = {
        "trained": load(folder),
        "untrained": load(full),
        "prefix": load(folder / "controls" / "prefix"),
        "alone": AutoModelForCausalLM.from_pretrained(folder / "controls" / "alone"),
    }
    found = {name: evaluate_places(model, tokenizer, HELD_OUT, sequence_length=S) for name, model in models.items()}
    mean = {name: fmean(document.loss for document in places["middle"].documents) for name, places in found.items()}
    for baseline in ("prefix", "alone", "untrained"):
        (entry,) = [
            entry
            for entry in report["comparisons"]
            if (entry["arm"], entry["baseline"], entry["where"]) == ("trained", baseline, "middle")
        ]
        assert entry["difference"] == pytest.approx(mean["trained"] - mean[baseline], abs=1e-4)
        decides = baseline != "untrained"
        assert (f"{entry['difference']:+.4f}" in report["sentences"][0]) == decides
    assert report["sentences"][0].startswith("Streams in the middle of code: ")


def test_the_model_card_states_the_controls(finished):
    folder, report = finished
    card = (folder / "README.md").read_text()
    assert "one prefix of 12 tokens" in card
    assert "| streams before training |" in card
    assert "is not yet a gain of streams" not in card
    assert report["sentences"][0].split(". Difference")[0].removeprefix("Streams in the middle of code: ") in card


def test_a_card_that_the_run_wrote_again_states_the_controls_again(finished, full, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    stated = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card_of(folder, Run(folder).report()))
    assert (folder / "README.md").read_text() != stated
    assert train_controls(str(full), folder, SETTINGS) == finished[1]
    assert (folder / "README.md").read_text() == stated


def test_all_that_is_there_is_not_trained_again(finished, full, monkeypatch):
    folder, report = finished
    monkeypatch.setattr(control_runs, "train", None)
    assert train_controls(str(full), folder, SETTINGS) == report


def test_an_adapter_has_about_as_many_parameters_as_the_streams(full):
    model = load(full)
    layers = [layer for layer in model.model.layers.modules() if isinstance(layer, Linear)]
    per_rank = sum(layer.in_features + layer.out_features for layer in layers)
    for rank in (1, 5, 17):
        assert rank_with_parameters(model, rank * per_rank + per_rank // 3) == rank
    assert rank_with_parameters(model, 1) == 1
    assert rank_with_parameters(model, 10**9) == max(min(layer.weight.shape) for layer in layers)


def test_without_peft_the_adapter_is_left_out_and_said(run_alone, full, monkeypatch):
    printed = io.StringIO()
    monkeypatch.setattr(control_runs.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(control_runs, "_train_control", lambda *args: None)
    monkeypatch.setattr(control_runs, "_compare", lambda controls, *args: {"controls": [c.name for c in controls]})
    monkeypatch.setattr(control_runs, "_rewrite_card", lambda *args: None)
    report = train_controls(str(full), run_alone, SETTINGS, console=Console(file=printed, width=200))
    assert report["controls"] == ["alone", "prefix", "long-prefix"]
    assert "pip install 'parscale[peft]'" in printed.getvalue()


@pytest.fixture
def run_alone(finished, tmp_path):
    """The finished run without its controls."""
    return shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("controls", "controls.json"))


@pytest.mark.parametrize("how", ["copied", pytest.param("trained", marks=pytest.mark.nightly)])
def test_an_end_in_between_is_gone_on_from(finished, run_alone, full, monkeypatch, how):
    """By day what trains a control copies the finished one."""
    folder, calls = run_alone, []

    def counted(start, place, settings, **options):
        calls.append(place.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        if how == "trained":
            return train(start, place, settings, **options)
        assert options["resume"]
        shutil.copytree(finished[0] / "controls" / place.name, place)
        return Run(place).report()

    monkeypatch.setattr(control_runs, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        train_controls(str(full), folder, SETTINGS)
    assert sorted(path.name for path in (folder / "controls").iterdir()) == ["alone"]
    assert not (folder / "controls.json").exists()
    (folder / "README.md").write_text("My own card.")
    assert train_controls(str(full), folder, SETTINGS) == finished[1]
    assert calls == ["alone", "prefix", "prefix", "long-prefix", "adapter"]
    assert (folder / "README.md").read_text() == "My own card."


def test_other_data_than_the_run_had_is_refused(full, run_alone):
    other = dataclasses.replace(SETTINGS, data=[Source.of("train", TRAIN[::-1])])
    with pytest.raises(ValueError, match=r"data is not, or no longer, what the run in .*; give the data that the run"):
        train_controls(str(full), run_alone, other)
    assert not (run_alone / "controls").exists()


def test_a_control_that_was_trained_on_other_data_is_refused(full, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("controls.json"))
    path = folder / "controls" / "alone" / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_digest": "another"}))
    with pytest.raises(ValueError, match=r"differs from the run in .* by data_digest: give the data"):
        train_controls(str(full), folder, SETTINGS)


def test_what_cannot_be_compared_is_refused_before_any_work(full, backbone, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="give some by --eval-data"):
        check_controls(str(full), dataclasses.replace(SETTINGS, eval_data={}))
    with pytest.raises(ValueError, match="has no streams, which controls are for"):
        check_controls(str(backbone), SETTINGS)
    with pytest.raises(ValueError, match="holds no finished run"):
        train_controls(str(full), tmp_path, SETTINGS)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Controls train in one process"):
        check_controls(str(full), SETTINGS)


def test_held_out_text_is_looked_for_once_beside_a_run(finished, full, tmp_path, monkeypatch):
    """Before the run, and not again after it."""
    sources, check = [], control_runs.text_documents
    monkeypatch.setattr(control_runs, "text_documents", lambda source: sources.append(source.name) or check(source))
    monkeypatch.setattr(control_runs, "train", lambda *_, **options: Run(finished[0]).report() | options)
    report = train_with_controls(str(full), finished[0], SETTINGS, resume=True)
    assert report.items() >= (finished[1] | {"resume": True}).items()
    assert sources == ["code"]
    with pytest.raises(ValueError, match="give some by --eval-data"):
        train_with_controls(str(full), tmp_path / "other", dataclasses.replace(SETTINGS, eval_data={}))


RUN = {"trains": "streams", "learning_rate": 3e-5, "streams_learning_rate": 1e-2, "lora_rank": None, "quantize": None}
EVERYTHING = {"trains": "everything"}


@pytest.mark.parametrize(
    ("streams", "run", "names"),
    [
        ({"transform": "prompt"}, {}, ["one prompt of 48 tokens", "one prompt of 192 tokens"]),
        ({}, EVERYTHING, ["one prefix of 48 tokens and backbone", "one prefix of 192 tokens and backbone"]),
        ({"transform": "lora"}, {}, ["one adapter of rank 8", "one adapter of rank 32"]),
        ({"transform": "lora"}, EVERYTHING, []),
    ],
)  # fmt: skip
def test_controls_by_what_the_streams_are_and_what_trains(streams, run, names):
    alone, *others = controls_of(ParScaleConfig(**streams), RUN | run)
    assert (alone.title, [control.title for control in others]) == ("backbone alone", names)


def test_adapters_train_at_the_rate_of_low_rank_streams():
    """What one of these streams has; at an adapter's own default, a fifteenth of theirs, it would be a weak control."""
    _, *adapters = controls_of(ParScaleConfig(transform="lora"), RUN)
    assert [control.learning_rate for control in adapters] == [RUN["streams_learning_rate"]] * 2


def test_an_adapter_of_as_many_parameters_on_a_frozen_backbone():
    (*_, adapter) = controls_of(ParScaleConfig(), RUN, equal_rank=3)
    assert (adapter.name, adapter.lora_rank, adapter.arm.prefix) == ("adapter", 3, False)
    assert "adapter" not in [each.name for each in controls_of(ParScaleConfig(), RUN | EVERYTHING, equal_rank=3)]
    quantized = controls_of(ParScaleConfig(), RUN | {"quantize": "int8"}, equal_rank=8)  # which the backbone's own has
    assert "adapter" not in [each.name for each in quantized]


@pytest.mark.parametrize(("largest", "ranks"), [(64, [8, 32]), (20, [8, 20]), (8, [8]), (4, [4])])
def test_no_adapter_has_a_higher_rank_than_a_layer(largest, ranks):
    _, *adapters = controls_of(ParScaleConfig(transform="lora"), RUN, largest_rank=largest)
    assert [control.lora_rank for control in adapters] == ranks
    assert [control.name for control in adapters] == ["adapter", "wide-adapter"][: len(ranks)]


@pytest.mark.slow
def test_streams_of_a_higher_rank_in_all_than_their_layers_have_controls(backbone, tmp_path):
    """Three of rank 16, where the largest layer has rank 32."""
    pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    wrap(model, P, transform="lora", rank=16, seed=1).save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path / "start")
    folder = trained(tmp_path / "start", tmp_path / "run")
    report = train_controls(str(tmp_path / "start"), folder, SETTINGS)
    titles = {"adapter": "one adapter of rank 16", "wide-adapter": "one adapter of rank 32"}
    assert report["controls"] == {"alone": "backbone alone"} | titles


def test_of_a_quantized_backbone_an_adapter_trains_alone():
    (alone, *_) = controls_of(ParScaleConfig(), RUN | {"quantize": "int8"})
    assert (alone.title, alone.lora_rank) == ("backbone alone (adapter of rank 8)", 8)
    assert alone.learning_rate == 2e-4  # an adapter's own default, and not a whole backbone's
    (alone, *_) = controls_of(ParScaleConfig(), RUN | {"quantize": "int8", "learning_rate": 1e-3})
    assert alone.learning_rate == 1e-3  # as it was given


def test_a_rate_that_was_given_for_the_streams_is_not_the_backbones():
    for rate in (1e-2, 3e-5):
        (alone, *_) = controls_of(ParScaleConfig(), RUN | {"learning_rate": rate})
        assert alone.learning_rate == 3e-5


@pytest.mark.parametrize("trains", ["everything", "lora"])
def test_where_the_backbone_trains_too_its_rate_may_be_that_of_the_streams(trains):
    run = RUN | {"trains": trains, "learning_rate": 1e-3, "streams_learning_rate": 1e-3}
    (alone, *_) = controls_of(ParScaleConfig(transform="prompt"), run | {"lora_rank": 8 if trains == "lora" else None})
    assert alone.learning_rate == 1e-3


def test_an_adapter_of_as_many_parameters_trains_faster_as_the_backbone_does():
    """Ten times the backbone's default rate is ten times the adapter's."""
    for factor in (1, 10):
        (*_, adapter) = controls_of(ParScaleConfig(), RUN | {"learning_rate": factor * 3e-5}, equal_rank=3)
        assert adapter.learning_rate == pytest.approx(factor * 2e-4)


def test_beside_an_adapter_low_rank_streams_have_adapters_of_both_ranks():
    run = RUN | {"trains": "lora", "lora_rank": 5, "learning_rate": 2e-4}
    alone, *adapters = controls_of(ParScaleConfig(transform="lora", rank=8), run)
    assert (alone.lora_rank, alone.learning_rate) == (5, 2e-4)
    assert [(each.lora_rank, each.learning_rate) for each in adapters] == [(13, 1e-2), (37, 1e-2)]


def test_streams_that_were_trained_before_have_no_controls(finished, full):
    with pytest.raises(ValueError, match="were trained before, and controls would begin without that training"):
        check_controls(str(finished[0]), SETTINGS)


def test_another_checkpoint_than_the_run_began_with_is_refused(backbone, run_alone, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.bfloat16)
    wrap(model, P, prefix_length=2 * T, init="random", seed=1).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is not, or no longer, what the run in .* was trained from"):
        train_controls(str(tmp_path / "other"), run_alone, SETTINGS)


def test_other_held_out_text_is_measured_without_training_again(finished, full, tmp_path, monkeypatch):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.setattr(control_runs, "train", None)
    other = dataclasses.replace(SETTINGS, eval_data={"other": Source.of("other", HELD_OUT[:2])})
    for _ in range(2):  # the second time after an end between the card and the report
        report = train_controls(str(full), folder, other)
        assert {entry["text"] for entry in report["comparisons"]} == {"other"}
        assert report["controls"] == finished[1]["controls"]
        assert json.loads((folder / "controls.json").read_text()) == report
        card = (folder / "README.md").read_text()
        for found, is_stated in ((report, True), (finished[1], False)):
            (entry,) = [each for each in found["comparisons"] if is_against_the_long_prefix(each)]
            assert (f"{entry['difference']:+.4f}" in card) is is_stated
        assert _renamed_card(folder, "me/mine") is not None
        (folder / "controls.json").write_text(json.dumps(finished[1]))


def is_against_the_long_prefix(entry):
    return (entry["arm"], entry["baseline"], entry["where"]) == ("trained", "long-prefix", "middle")


CHAT = Chat([{"role": "user", "content": "What is one?"}, {"role": "assistant", "content": "def one(): return 1"}])


def test_chats_are_trained_on_and_not_held_out_alone(full, tmp_path, monkeypatch):
    chats = dataclasses.replace(SETTINGS, eval_data={"chats": Source.of("chats", [("a", CHAT)])})
    with pytest.raises(ValueError, match="--eval-data holds chats alone; add some text"):
        check_controls(str(full), chats)
    tokenizer = AutoTokenizer.from_pretrained(full)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}|{% endfor %}"
    examples = [("chat", CHAT), ("completion", Completion("def two", "(): return 2"))]
    settings = dataclasses.replace(SETTINGS, data=[Source.of("chats", examples)])
    texts = control_runs._beginning(settings, tokenizer, ParScaleConfig(2, 4), len(tokenizer))
    assert texts.shape == (2, 4)
    assert as_text(*examples[0], tokenizer) == "What is one?|def one(): return 1|"
    assert as_text(*examples[1], tokenizer) == "def two(): return 2"


def test_low_rank_streams_need_peft_before_any_work(backbone, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(backbone)
    wrap(model, P, transform="lora", seed=1).save_pretrained(tmp_path / "low-rank")
    monkeypatch.setattr(control_runs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="are adapters, which need: pip install 'parscale"):
        check_controls(str(tmp_path / "low-rank"), SETTINGS)


def test_a_quantized_backbone_needs_peft_before_any_work(full, monkeypatch):
    quantized = dataclasses.replace(SETTINGS, quantize="int8")
    check_controls(str(full), quantized)
    monkeypatch.setattr(control_runs.importlib.util, "find_spec", lambda name: None)
    check_controls(str(full), SETTINGS)
    with pytest.raises(ValueError, match=r"Controls of a quantized backbone are adapters.*parscale\[peft\]"):
        check_controls(str(full), quantized)


def test_a_prompt_that_leaves_no_positions_for_the_text_is_refused_before_the_run(backbone, tmp_path):
    """The longest takes 3 * 40 of the model's 128."""
    model = AutoModelForCausalLM.from_pretrained(backbone)
    wrap(model, P, prefix_length=40, transform="prompt", init="random").save_pretrained(tmp_path / "prompts")
    for length in (S, None):
        with pytest.raises(ValueError, match=r"one prompt of 3 \* 40 tokens.* give --sequence-length 8 or less"):
            check_controls(str(tmp_path / "prompts"), dataclasses.replace(SETTINGS, sequence_length=length))
        check_controls(
            str(tmp_path / "prompts"), dataclasses.replace(SETTINGS, sequence_length=length), {"sequence_length": 8}
        )
    check_controls(str(tmp_path / "prompts"), dataclasses.replace(SETTINGS, sequence_length=8))


@pytest.mark.parametrize("how", ["save_pretrained", "save_streams"])
def test_dropout_is_refused_since_one_prefix_would_become_two(how, tmp_path):
    plain = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=32, attn_pdrop=0.0))
    plain.save_pretrained(tmp_path / "plain")
    model = wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), 2, prefix_length=2, init="random")
    getattr(model, how)(tmp_path / "streams")
    with pytest.raises(ValueError, match=r"with dropout \(embd_pdrop = 0.1, resid_pdrop = 0.1\)"):
        check_controls(str(tmp_path / "streams"), SETTINGS)


def test_a_control_starts_the_same_each_time_also_of_streams_without_a_seed(full, tmp_path):
    control = controls_of(ParScaleConfig(P, T), RUN)[1]
    tokenizer = AutoTokenizer.from_pretrained(full)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = tmp_path / str(seed)
        control_runs._save_start(control, str(full), folder, SETTINGS, ParScaleConfig(P, T, seed=None), tokenizer)
        states.append(load(folder).state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
