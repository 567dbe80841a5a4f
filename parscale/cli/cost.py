"""`parscale cost`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parscale.cli.law import LAW_HELP, print_rows, read_law
from parscale.cli.options import Json, Plot
from parscale.cli.output import print_json, quiet_hub
from parscale.config import KV
from parscale.format.staging import require_plot_path, staged_file

if TYPE_CHECKING:
    from parscale.scaling_laws import ParallelScalingLaw
    from parscale.scaling_laws.costs import Cost
    from parscale.scaling_laws.shapes import ModelShape

GIB = 2**30


def cost(
    config_or_checkpoint: Annotated[
        str, typer.Argument(help="A config.json, a checkpoint's folder, or its name on the Hugging Face Hub.")
    ],
    num_streams: Annotated[list[int], typer.Option(min=1, help="P, the number of streams.", metavar="P...")],
    batch_size: Annotated[list[int], typer.Option(min=1, help="Prompts in a batch.", metavar="B...")],
    input_length: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 256,
    output_length: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 256,
    hardware: Annotated[
        str, typer.Option(help="The device, such as a100-80gb, h100, rtx-4090 or cpu-desktop.")
    ] = "a100-80gb",
    hardware_file: Annotated[
        Path | None, typer.Option(help="A CSV file with your own devices; columns as in the package's hardware.csv.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; weights also int8, fp8, int4.")] = "bfloat16",
    method: Annotated[str, typer.Option(help="'roofline', or 'paper' for the paper's method.")] = "roofline",
    kv: Annotated[
        list[str] | None,
        typer.Option(
            help="'own', keys and values of each stream, 'shared', stream 0's for all, or both. Default: as the "
            "checkpoint has them, or 'own'.",
            metavar="KV...",
        ),
    ] = None,
    overhead: Annotated[
        float, typer.Option(min=0, help="Seconds that kernel launches take, for each layer and step.")
    ] = 0.0,
    law: Annotated[str, typer.Option(help="What streams are worth: " + LAW_HELP)] = "stack",
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Estimate memory and time of generation, and compare with the plain model of equal loss."""
    from parscale.scaling_laws import cost as count
    from parscale.scaling_laws import read_hardware, read_shape
    from parscale.scaling_laws.configs import read_config

    if plot is not None:
        require_plot_path(plot)
    devices = read_hardware(hardware_file) if hardware_file is not None else {}
    config, of_streams = _config_file(config_or_checkpoint)
    contents = read_config(config) | of_streams
    shape = read_shape(contents)
    work: dict[str, Any] = {"input_length": input_length, "output_length": output_length, "dtype": dtype}
    work |= {"hardware": devices.get(hardware, hardware), "method": method, "overhead": overhead}
    fitted = read_law(law)
    kinds = list(dict.fromkeys(kv or [contents.get(KV, "own")]))
    counted, rows = [], []
    for streams, kind, batch in itertools.product(dict.fromkeys(num_streams), kinds, dict.fromkeys(batch_size)):
        chosen = work | {"num_streams": streams, "batch_size": batch, "kv": kind}
        item = count(shape, **chosen)
        counted.append(((streams, batch) if kv is None else (streams, kind, batch), item))
        rows.append(_row(item, chosen, shows_kv=kv is not None) | _versus_dense(fitted, shape, chosen))
    several = [P for P in dict.fromkeys(num_streams) if P > 1]
    crossovers = [
        found | ({} if kv is None else {"kv": kind})
        for kind in kinds
        for found in _crossovers(fitted, shape, several, work | {"kv": kind})
    ]
    if plot is not None:
        from parscale.scaling_laws import plots

        with staged_file(plot) as beside:
            plots.save(plots.cost_curves(dict(counted)), beside)
    notes = list(counted[0][1].notes)
    if json:
        for row, (_, item) in zip(rows, counted, strict=True):
            row |= {"memory": item.memory, "time": item.time}
        named = {"model": config_or_checkpoint, "params": shape.params(), "hardware": hardware}
        named |= {"input_length": input_length, "output_length": output_length, "dtype": dtype, "method": method}
        print_json(named | {"costs": rows, "crossovers": crossovers, "notes": notes})
        return
    print_rows(rows)
    if crossovers:
        typer.echo(
            "vs dense: divided by the cost of the plain, wider model that the law predicts to have the same loss."
        )
    for sentence in (*map(_sentence, crossovers), *notes):
        typer.echo(sentence)


def _row(item: Cost, work: dict[str, Any], *, shows_kv: bool) -> dict[str, Any]:
    """The row of the table for one number of streams, kind of keys and batch size."""
    return {
        "streams": work["num_streams"],
        **({"kv": work["kv"]} if shows_kv else {}),
        "batch_size": work["batch_size"],
        "memory_gib": item.memory_bytes / GIB,
        "seconds": item.seconds,
        "prefill_seconds": item.prefill_seconds,
        "fits": item.fits,
    }


def _versus_dense(fitted: ParallelScalingLaw, shape: ModelShape, work: dict[str, Any]) -> dict[str, float]:
    """Memory and time divided by those of the plain model of equal loss; nothing for one stream."""
    from parscale.scaling_laws import versus

    if work["num_streams"] == 1:
        return {}
    comparison = versus(fitted, shape, **work)
    return {
        "memory_vs_dense": comparison.ratio("memory_bytes"),
        "seconds_vs_dense": comparison.ratio("seconds"),
    }


def _crossovers(
    fitted: ParallelScalingLaw, shape: ModelShape, streams: list[int], work: dict[str, Any]
) -> list[dict[str, Any]]:
    """The batch size, and with one prompt the prompt length, from which streams cost more than the plain model.

    For each also whether streams cost more at some smaller power of 2, and less between.
    """
    from parscale.scaling_laws import crossover
    from parscale.scaling_laws.worth import loses_below

    found = []
    for count in streams:
        row: dict[str, Any] = {"streams": count}
        for word, quantity in (("slower", "seconds"), ("larger", "memory_bytes")):
            for axis in ("batch_size", "input_length"):
                options = work | {"num_streams": count, "quantity": quantity, "along": axis}
                start = row[f"{word}_from_{axis}"] = crossover(fitted, shape, **options)
                row[f"{word}_at_smaller_{axis}"] = loses_below(fitted, shape, start, **options)
        found.append(row)
    return found


def _sentence(found: dict[str, Any]) -> str:
    def since(word: str, axis: str, what: str, several: str) -> str:
        start, smaller = found[f"{word}_from_{axis}"], found[f"{word}_at_smaller_{axis}"]
        if start is None:
            return f"{word} at some {several} only" if smaller else f"never {word}"
        return f"{word} from {what.format(start)} on" + (f" (and at some {several})" if smaller else "")

    def both(*axis: str) -> str:
        return " and ".join(since(word, *axis) for word in ("slower", "larger"))

    batches = both("batch_size", "batch {}", "small batches")
    lengths = both("input_length", "{} prompt tokens", "short prompts")
    kind = f", {found['kv']} keys and values" if "kv" in found else ""
    return f"P = {found['streams']}{kind}: {batches} than the model of equal loss; at batch 1, {lengths}."


def _config_file(source: str) -> tuple[Path, dict[str, Any]]:
    """The `config.json` that a user names, or that of the backbone of streams alone with the fields of these.

    Raises:
        OSError: the file does not exist.
        ValueError: the folder or repository has no such file.
    """
    from parscale.format.folders import CONFIG, STREAMS_CONFIG, Checkpoint, backbone_location

    if Path(source).exists() and not Path(source).is_dir():
        return Path(source), {}
    if source.endswith(".json"):
        raise FileNotFoundError(
            f"There is no file {source}; give a config.json, a checkpoint's folder or its name on the Hub."
        )
    quiet_hub()
    checkpoint = Checkpoint(source)
    config = checkpoint.file(CONFIG)
    if config is not None:
        return config, {}
    if checkpoint.file(STREAMS_CONFIG) is None:
        raise FileNotFoundError(
            f"There is no {CONFIG} at {source}; give a config.json, a checkpoint's folder or its name on the Hub."
        )
    fields = checkpoint.read_json(STREAMS_CONFIG)
    backbone = backbone_location(checkpoint, fields)
    if backbone is None:
        raise ValueError(f"{source} holds streams only and names no backbone; give the backbone's config.json.")
    config = Checkpoint(backbone).file(CONFIG)
    if config is None:
        raise FileNotFoundError(
            f"The backbone {backbone} of {source} has no {CONFIG}; give the backbone's config.json."
        )
    return config, fields
