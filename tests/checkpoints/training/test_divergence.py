"""Runs whose numbers are no numbers any more: they stop with one line, and nothing of them is saved as a result."""

import json
import math
import types

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from parscale import ParScaleConfig, load
from parscale.checkpoints.conversion.convert import convert
from parscale.checkpoints.finite_values import first_not_finite
from parscale.checkpoints.training.divergence import DivergedError, StopWhenDiverged
from parscale.checkpoints.training.run_folder import Run, damage
from parscale.checkpoints.training.train import TrainSettings, train
from parscale.cli.application import BAD_INPUT, run

S, BATCH = 16, 4
TOO_FAST = 1e30


def settings(text_file, **options):
    return TrainSettings(
        **{
            "data": [str(text_file)],
            "tokens": 6 * BATCH * S,
            "sequence_length": S,
            "batch_size": BATCH,
            "warmup": 0.0,
            "decay": 0.0,
            "save_every": 1,
            "bf16": False,
        }
        | options
    )


def assert_nothing_of_it_is_saved(folder):
    """Checkpoints are whole and finite, the metrics are JSON, and there is no result."""
    for step in Run(folder).steps():
        assert damage(Run(folder).checkpoint(step)) is None
        for path in Run(folder).checkpoint(step).glob("*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    for path in folder.rglob("*.json*"):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=pytest.fail)
    names = {path.name for path in folder.iterdir()}
    assert not names & {"model.safetensors", "streams.safetensors", "training.json", "README.md"}


WAYS = {
    "everything": {"learning_rate": TOO_FAST},
    "lora": {"lora_rank": 2, "learning_rate": TOO_FAST},
    "in parts": {"learning_rate": TOO_FAST, "micro_batch_size": 1},
    "checkpointed": {"learning_rate": TOO_FAST, "gradient_checkpointing": True},
    "bfloat16": {"learning_rate": TOO_FAST, "bf16": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_diverges_stops(full, text_file, tmp_path, way):
    with pytest.raises(DivergedError, match=r"(is|are) (nan|inf|not finite).*smaller.*learning.rate"):
        train(str(full), tmp_path / "run", settings(text_file, **WAYS[way]))
    assert_nothing_of_it_is_saved(tmp_path / "run")


def test_on_the_command_line_it_is_one_line(full, text_file, tmp_path, capsys):
    sizes = ["--sequence-length", S, "--batch-size", BATCH, "--tokens", 6 * BATCH * S, "--warmup", "0", "--json"]
    arguments = ["train", full, "--data", text_file, "--output", tmp_path / "run", *sizes, "--save-every", "1"]
    assert run([*map(str, arguments), "--learning-rate", "1e30"]) == BAD_INPUT
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = (line for line in printed.err.splitlines() if line.startswith("parscale: "))
    assert "smaller --learning-rate" in line
    assert_nothing_of_it_is_saved(tmp_path / "run")


@pytest.mark.parametrize("frozen", [True, False])
def test_the_last_good_checkpoint_is_named(full, text_file, tmp_path, monkeypatch, frozen):
    """The step that diverges is the fourth."""
    spoil_step(monkeypatch, 3, float("nan"))
    said = r"The loss is nan after step 4, and the loss before it was \d.*checkpoint-3 is"
    with pytest.raises(DivergedError, match=said):
        train(str(full), tmp_path / "run", settings(text_file, learning_rate=1e-3, freeze_backbone=frozen))
    assert Run(tmp_path / "run").newest_checkpoint() == tmp_path / "run" / "checkpoint-3"
    assert [line["step"] for line in Run(tmp_path / "run").metrics()] == [1, 2, 3]
    assert_nothing_of_it_is_saved(tmp_path / "run")


def spoil_step(monkeypatch, after, value):
    """Makes one loss another value, which the gradients do not see."""
    from parscale.checkpoints.training.trainer import StreamsTrainer

    step, seen = StreamsTrainer.training_step, []

    def spoiled(self, *args, **kwargs):
        seen.append(None)
        loss = step(self, *args, **kwargs)
        return loss * value if len(seen) == after + 1 else loss

    monkeypatch.setattr(StreamsTrainer, "training_step", spoiled)


@pytest.mark.parametrize("micro", [1, 2])
def test_one_part_of_a_batch_is_enough(full, text_file, tmp_path, monkeypatch, micro):
    spoil_step(monkeypatch, 5, float("inf"))  # of the parts
    with pytest.raises(DivergedError, match="The loss is inf after step "):
        train(str(full), tmp_path / "run", settings(text_file, learning_rate=1e-3, micro_batch_size=micro))
    assert_nothing_of_it_is_saved(tmp_path / "run")


def test_a_gradient_norm(full, text_file, tmp_path, monkeypatch):
    """The loss is finite, and its gradient is not."""
    from parscale.checkpoints.training.trainer import StreamsTrainer

    step = StreamsTrainer.training_step

    def spoiled(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 2:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(StreamsTrainer, "training_step", spoiled)
    with pytest.raises(DivergedError, match=r"The gradient norm is (inf|nan) after step 3"):
        train(str(full), tmp_path / "run", settings(text_file, learning_rate=1e-3))
    assert sorted(Run(tmp_path / "run").steps()) == [1, 2]
    assert_nothing_of_it_is_saved(tmp_path / "run")


def spoil_weights(monkeypatch, after):
    """Makes a weight infinite in one optimizer step, whose loss and gradient are finite."""
    step, seen = torch.optim.AdamW.step, []

    def spoiled(self, *args, **kwargs):
        step(self, *args, **kwargs)
        seen.append(None)
        if len(seen) == after + 1:
            self.param_groups[0]["params"][-1].data.view(-1)[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiled)


@pytest.mark.parametrize("frozen", [True, False])
def test_weights_that_a_step_has_made_infinite(full, text_file, tmp_path, monkeypatch, frozen):
    """Also of the last step, after which no loss is computed."""
    spoil_weights(monkeypatch, 5)
    said = r"After step 6, .* has values that are not finite; .*checkpoint-5 is complete"
    with pytest.raises(DivergedError, match=said):
        train(str(full), tmp_path / "run", settings(text_file, learning_rate=1e-3, freeze_backbone=frozen))
    assert_nothing_of_it_is_saved(tmp_path / "run")


def test_a_measured_loss(full, text_file, tmp_path, monkeypatch):
    from parscale.checkpoints.training import trainer

    monkeypatch.setattr(trainer, "_sums_by_row", lambda logits, labels: torch.full((len(labels), 2), math.inf))
    options = {"eval_data": {"code": str(text_file)}, "eval_every": 2}
    with pytest.raises(DivergedError, match=r"The loss on code is nan before the first step; .*--no-bf16"):
        train(str(full), tmp_path / "run", settings(text_file, **options))
    assert_nothing_of_it_is_saved(tmp_path / "run")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_checkpoint_that_is_not_finite_is_refused_before_anything_is_written(
    full, text_file, tmp_path, value, frozen
):
    model = load(full)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    model.save_pretrained(tmp_path / "damaged")
    AutoTokenizer.from_pretrained(full).save_pretrained(tmp_path / "damaged")
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.up_proj\.weight of .*damaged holds values that are not finite"
    ):
        train(str(tmp_path / "damaged"), tmp_path / "run", settings(text_file, freeze_backbone=frozen))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, r"k_proj\.weight of .* holds values that are not finite: .*damaged is damaged"),
        (
            3e38,
            "prefix_k would start with values that are not finite: .*damaged is damaged",
        ),  # finite itself
    ],
)
def test_streams_do_not_start_from_a_backbone_that_is_not_finite(backbone, tmp_path, value, said):
    model = LlamaForCausalLM.from_pretrained(backbone)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0] = value
    model.save_pretrained(tmp_path / "damaged")
    with pytest.raises(ValueError, match=said):
        convert(str(tmp_path / "damaged"), tmp_path / "model", ParScaleConfig(2, 4, init="context", seed=0))
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_values_that_do_not_fit_the_dtype_of_the_checkpoint(full, text_file, tmp_path):
    """Trained in float32, and too large for the float16 that it is to be saved in."""
    model = load(full).to(torch.float16)
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(full).save_pretrained(tmp_path / "half")
    chosen = settings(text_file, tokens=BATCH * S, freeze_backbone=True, streams_learning_rate=1e6)
    with pytest.raises(
        ValueError, match=r"do not fit into float16, the dtype of .*half; .*The trained values are in float32 in"
    ):
        train(str(tmp_path / "half"), tmp_path / "run", chosen)
    assert Run(tmp_path / "run").steps() == [1]
    assert_nothing_of_it_is_saved(tmp_path / "run")


def test_scaled_gradients_may_be_infinite():
    """With float16 such a step is left out, and the scale is lowered."""
    stop, state = StopWhenDiverged("go slower", str), types.SimpleNamespace(global_step=2)
    stop.scaled = True
    stop.on_log(None, state, None, logs={"loss": 1.0, "grad_norm": math.inf})
    with pytest.raises(DivergedError):
        stop.on_log(None, state, None, logs={"loss": math.nan, "grad_norm": 1.0})


def test_what_is_not_finite_is_found_in_every_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tensors = {"a": torch.zeros(3, dtype=dtype), "b": torch.tensor([0, math.inf], dtype=dtype)}
        assert first_not_finite(tensors.items()) == "b"
    others = {"ids": torch.arange(3), "byte": torch.zeros(2, dtype=torch.uint8), "meta": torch.empty(2, device="meta")}
    assert first_not_finite(others.items()) is None


def test_figures_that_are_not_finite_are_null_in_json(capsys, tmp_path):
    from parscale.cli.output import print_json, write_json

    figures = {"loss": math.nan, "of": [math.inf, 1.0, {"x": -math.inf}], "name": "NaN"}
    print_json(figures)
    write_json(tmp_path / "figures.json", figures)
    expected = {"loss": None, "of": [None, 1.0, {"x": None}], "name": "NaN"}
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "figures.json").read_text()) == expected
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        Run(tmp_path).add_metrics({"loss": math.nan})
    assert not (tmp_path / "metrics.jsonl").exists()
