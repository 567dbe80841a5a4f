"""`parscale train`."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from parscale.checkpoints.training.settings import TrainSettings
from parscale.cli.options import Json, Private, Special, count, takes_settings
from parscale.cli.output import for_tables, print_figures, print_json, quiet_libraries
from parscale.cli.recipes import Recipe
from parscale.config import ParScaleConfig
from parscale.descriptions import descriptions, plain

_NEW = "Of a new model"
_OF_STREAMS = descriptions(ParScaleConfig)


def _named(texts: list[str]) -> dict[str, str]:
    """`["code=a.txt", "b.txt"]` as `{"code": "a.txt", "b": "b.txt"}`."""
    named: dict[str, str] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals or Path(text).exists():
            name, source = Path(text).stem or text, text
        name = "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in name)
        if name in named:
            raise ValueError(f"Two evaluation texts are called {name!r}; give each its own name, as in NAME={source}.")
        named[name] = source
    return named


@takes_settings(
    TrainSettings,
    "settings",
    data=Special(list[str], option={"metavar": "FILE_OR_DATASET..."}),
    eval_data=Special(list[str] | None, read=_named, option={"metavar": "[NAME=]FILE..."}),
    tokens=Special(option={"parser": count, "metavar": "COUNT"}),
    report_to=Special(list[str] | None, option={"metavar": "TRACKER..."}),
    seed=Special(option={"min": 0}),
)
def train(
    output: Annotated[Path, typer.Option(help="The folder of the run; new or empty, unless --resume is given.")],
    settings: TrainSettings,
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="A checkpoint's folder, or its name on the Hugging Face Hub; or give --from-config."),
    ] = None,
    from_config: Annotated[
        Path | None,
        typer.Option(
            help="Train a new model from nothing: of this config.json, or a Qwen2 of about this size, such as 20M, "
            "in parameters without embeddings.",
            metavar="CONFIG.json_OR_SIZE",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help=f"{_NEW}: a folder with its tokenizer, or a name on the Hugging Face Hub.")
    ] = None,
    num_streams: Annotated[int | None, typer.Option(help=f"{_NEW}: {plain(_OF_STREAMS['num_streams'])}")] = None,
    prefix_length: Annotated[int | None, typer.Option(help=f"{_NEW}: {plain(_OF_STREAMS['prefix_length'])}")] = None,
    kv: Annotated[str | None, typer.Option(help=f"{_NEW}: {plain(_OF_STREAMS['kv'])}")] = None,
    recipe: Recipe = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the output folder from its last checkpoint.")
    ] = False,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Also train what a gain of streams has to beat, the backbone alone and one prefix of T and of P * T "
            "tokens, on the same tokens in the same order, and compare; with --resume also beside a finished run.",
        ),
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the result to this repository on the Hugging Face Hub.", metavar="NAME")
    ] = None,
    private: Private = None,
    json: Json = False,
) -> None:
    """Train a checkpoint, or a new model, on text and chats; also under torchrun or accelerate launch."""
    from parscale.checkpoints.control_runs import train_with_controls
    from parscale.checkpoints.training.train import Interrupted
    from parscale.checkpoints.training.train import train as train_checkpoint

    of_new = {"num_streams": num_streams, "prefix_length": prefix_length, "kv": kv}
    start = _start(checkpoint, from_config, tokenizer, of_new, settings)
    if controls and checkpoint is None:
        raise ValueError("--controls trains the untouched backbone, and a new model has none; leave it out.")
    if private is not None and push_to_hub is None:
        raise ValueError(f"--{'' if private else 'no-'}private is of --push-to-hub: give both, or leave it out.")
    quiet_libraries()
    if push_to_hub is not None:
        from parscale.checkpoints.training.upload import check_repository, push

        check_repository(push_to_hub)
        _require_streams(start)
    command = shlex.join(["parscale", *sys.argv[1:]])
    try:
        run = train_with_controls if controls else train_checkpoint
        report = run(start, output, settings, resume=resume, command=command, name=push_to_hub)
    except Interrupted as interruption:
        with contextlib.suppress(OSError):  # the terminal may be closed
            print(f"parscale: {interruption}", file=sys.stderr)
        raise
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    if push_to_hub is not None:
        report = report | {"uploaded_to": push(output, push_to_hub, private=private)}
    if json:
        print_json(report)
    else:
        _print(report)


def _start(
    checkpoint: str | None,
    config: Path | None,
    tokenizer: str | None,
    streams: dict[str, Any],
    settings: TrainSettings,
) -> Any:
    """The checkpoint's name, or the new model that stands in its place."""
    if config is None:
        given = [name for name, value in {"tokenizer": tokenizer, **streams}.items() if value is not None]
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise ValueError(f"{option} is of a new model: give --from-config with it, or leave it out.")
        if checkpoint is None:
            raise ValueError("Missing argument 'CHECKPOINT', or --from-config for a new model.")
        return checkpoint
    if checkpoint is not None:
        raise ValueError(f"--from-config makes a new model, and {checkpoint} is one; give one of the two.")
    if tokenizer is None or streams["num_streams"] is None:
        raise ValueError("--from-config needs --tokenizer and --num-streams (1 for a model without streams).")
    from parscale.checkpoints.training.new_model import NewModel

    chosen = {name: value for name, value in streams.items() if value is not None}
    return NewModel(config, tokenizer, ParScaleConfig(**chosen), settings.seed, settings.sequence_length)


def _require_streams(start: Any) -> None:
    """Refuses what cannot be uploaded after it has trained."""
    from parscale.checkpoints.description import describe

    streams = describe(start)["num_streams"] if isinstance(start, str) else start.streams.num_streams
    if streams == 1:
        raise ValueError(
            f"--push-to-hub uploads checkpoints with streams, and {start} has none; add some with parscale convert, or "
            "leave it out."
        )


def _print(report: dict[str, Any]) -> None:
    if report["finished_before"]:
        print(f"The run in {report['output']} had already finished; there was nothing to do.")
    losses = {
        f"loss on {name}": ", ".join(f"{when} {value:.4f}" for when, value in found.items())
        for name, found in report["losses"].items()
    }
    shown = ("checkpoint", "output", "trains", "trained_parameters", "tokens", "tokens_per_second", "seconds")
    uploaded = {"uploaded_to": report["uploaded_to"]} if "uploaded_to" in report else {}
    print_figures({name: report[name] for name in shown} | _made(report) | losses | uploaded)
    if report.get("comparisons"):
        _print_comparisons(report)


def _made(report: dict[str, Any]) -> dict[str, Any]:
    """What came of a size that was given in place of a configuration."""
    new = report.get("new_model") or {}
    if "configuration" not in new:
        return {}
    fields = new["configuration"]
    shape = {"width": fields["hidden_size"], "layers": fields["num_hidden_layers"], "mlp": fields["intermediate_size"]}
    return {f"a Qwen2 for {new['config']}": {"parameters_without_embeddings": new["parameters"], **shape}}


def _print_comparisons(report: dict[str, Any]) -> None:
    """The trained model against the untouched backbone and, where they were trained, against controls."""
    from parscale.checkpoints.description import describe
    from parscale.checkpoints.evaluation.paired_differences import table_of
    from parscale.checkpoints.training.held_out import NOT_TRAINED, TRAINED, UNTOUCHED, sentences
    from parscale.checkpoints.training.run_folder import Run

    trained = [entry for entry in report["comparisons"] if entry["arm"] == TRAINED]
    controls = report.get("controls", {})
    console = for_tables()
    for text in dict.fromkeys(entry["text"] for entry in trained):
        entries = [entry for entry in trained if entry["text"] == text]
        console.print(table_of(entries, {TRAINED: "the trained model"} | NOT_TRAINED | controls))
    for sentence in sentences([entry for entry in trained if entry["baseline"] == UNTOUCHED]):
        print(sentence)
    for sentence in report.get("sentences", []):
        print(sentence)
    if not controls and describe(report["output"])["num_streams"] > 1:
        beaten = (
            "A lower loss than the untouched backbone's is not yet a gain of streams: the backbone trained alone and "
            "one trained prefix have to be beaten too, after the same tokens."
        )
        if Run(Path(report["checkpoint"])).report() is not None:
            print(f"{beaten} The streams were trained before, so --controls refuses: train each by hand in both runs.")
            return
        print(f"{beaten} This trains them and compares:")
        print(f"  {_with_controls(report['command'] or 'parscale train ...')}")


def _with_controls(command: str) -> str:
    """The command of a run, to train its controls."""
    missing = [option for option in ("--resume", "--controls") if option not in command.split()]
    return " ".join([command, *missing])
