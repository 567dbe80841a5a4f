"""`parscale law`: fit the scaling law, predict from it, plot it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parscale.cli.options import Json, ListOptionCommand, Plot, size
from parscale.cli.output import for_tables, print_figures, print_json
from parscale.format.staging import require_plot_path, require_writable_folder, staged_file

if TYPE_CHECKING:
    from parscale.scaling_laws import ParallelScalingLaw, Points
    from parscale.scaling_laws.sweep import Report, Run

app = typer.Typer(help="The scaling law: fit it to runs, predict from it, plot it.")

CORPORA = ("stack", "pile")
LAW_HELP = "'stack' or 'pile' for a published one, a CSV file of runs to fit, or a JSON file from 'law fit --json'."

Runs = Annotated[
    str,
    typer.Argument(
        help="Runs: a CSV file with the columns params, streams, loss; or 'stack' or 'pile', the published runs.",
        metavar="FILE.csv",
    ),
]
Bootstrap = Annotated[int, typer.Option(min=0, help="Resampled datasets for the intervals; 0 for no intervals.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the resampling.")]


@app.command("fit", cls=ListOptionCommand)
def fit(
    file: Runs,
    plot: Plot = None,
    form: Annotated[
        str, typer.Option(help="log, rho, power, dense; with a column tokens also joint, joint-both.")
    ] = "log",
    compare: Annotated[
        bool, typer.Option("--compare", help="Also predict held-out sizes and held-out P with each form.")
    ] = False,
    bootstrap: Bootstrap = 1000,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Fit the law to finished runs: E, A, alpha and k with 90 % intervals, and what the runs leave undetermined."""
    from parscale.scaling_laws import compare as compare_forms
    from parscale.scaling_laws import fit_form

    points, tokens = _runs(file, with_tokens=form.startswith("joint"))
    if plot is not None and form != "log":
        raise ValueError(f"--plot draws the form log, not {form}; omit one of the two")
    if plot is not None:
        require_plot_path(plot)
    fitted = fit_form(form, *points, tokens, bootstrap=bootstrap, seed=seed)
    figures: dict[str, Any] = {"runs": file, "points": len(points.losses), "form": form, **fitted.values}
    figures |= {"r2": fitted.r2, "huber": fitted.huber, "intervals": fitted.intervals, "notes": list(fitted.notes)}
    if compare:
        figures["comparison"] = [
            {"form": row.form, "r2": row.r2, "size_error": row.size_error, "streams_error": row.streams_error}
            for row in compare_forms(*points)
        ]
    if plot is not None:
        import parscale.scaling_laws.plots as plots

        with staged_file(plot) as beside:
            plots.save(plots.measured_and_predicted(read_law(file, bootstrap=0), points), beside)
    if json:
        print_json(figures)
        return
    rows, notes = figures.pop("comparison", None), figures.pop("notes")
    print_figures(figures)
    if rows:
        print_rows(rows)
    for note in notes:
        typer.echo(note)


@app.command("predict", cls=ListOptionCommand)
def predict(
    law: Annotated[str, typer.Argument(help=LAW_HELP)],
    params: Annotated[
        list[float],
        typer.Option(parser=size, help="N: non-embedding parameters with the streams' own, such as 1.6e9 or 1.6B."),
    ],
    streams: Annotated[list[int], typer.Option(min=1, help="P, the number of streams.")],
    bootstrap: Bootstrap = 1000,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Predict the loss for each size and number of streams, and the plain model with the same loss."""
    fitted = read_law(law, bootstrap=bootstrap, seed=seed)
    rows = []
    for number in params:
        for count in streams:
            row = {"params": number, "streams": count, "loss": float(fitted.predict(number, count))}
            if fitted.draws is not None:
                row["low"], row["high"] = (float(end) for end in fitted.predict_interval(number, count))
            rows.append(row | {"equivalent_params": float(fitted.equivalent_params(number, count))})
    if json:
        print_json({"law": fitted.to_dict(), "predictions": rows})
    else:
        print_rows(rows)


@app.command("plot")
def plot(
    law: Annotated[str, typer.Argument(help=LAW_HELP)],
    output: Annotated[Path, typer.Argument(help="The file to write: .png, .pdf or .svg.")],
    kind: Annotated[str, typer.Option(help="contours, measured or isoloss.")] = "contours",
    bootstrap: Bootstrap = 200,
    seed: Seed = 0,
) -> None:
    """Plot the law: loss over size and P, runs against predictions, or curves of equal loss."""
    import numpy as np

    import parscale.scaling_laws.plots as plots

    if kind not in ("contours", "measured", "isoloss"):
        raise ValueError(f"--kind is {kind!r}; give contours, measured or isoloss")
    require_plot_path(output)
    points = None if law.lower().endswith(".json") else _runs(law)[0]
    fitted = read_law(law, bootstrap=bootstrap if kind == "isoloss" else 0, seed=seed)
    if kind == "isoloss":
        of_runs = () if points is None else (np.geomspace(points.params.min(), points.params.max(), 4),)
        figure = plots.isoloss(fitted, *of_runs)
    elif kind == "contours":
        figure = plots.contours(fitted, points)
    elif points is not None:
        figure = plots.measured_and_predicted(fitted, points)
    else:
        raise ValueError(
            "--kind measured draws runs, but a law from a JSON file has none; give the CSV file of its runs"
        )
    with staged_file(output) as beside:
        plots.save(figure, beside)


@app.command("sweep")
def sweep(
    output: Annotated[Path, typer.Argument(help="The folder of the sweep; finished runs in it are not repeated.")],
    preset: Annotated[
        str,
        typer.Option(help="smoke (about half an hour on one CPU core) or gpu (tens of minutes; --source packages)."),
    ] = "smoke",
    source: Annotated[
        str, typer.Option(help="The text: stdlib, packages (all installed Python source) or the name of a dataset.")
    ] = "stdlib",
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time. Default: one for each GPU.")] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Run on the machines of a Ray cluster, one run for each GPU or core.")
    ] = False,
    json: Json = False,
) -> None:
    """Train small models of several sizes and P on real text, then fit the law to them."""
    from parscale import wrap
    from parscale.cli.output import quiet_libraries
    from parscale.scaling_laws import fit_form
    from parscale.scaling_laws.sweep import PRESETS, RUNS
    from parscale.scaling_laws.sweep import sweep as train_all

    if preset not in PRESETS:
        raise ValueError(f"--preset is {preset!r}; give one of {', '.join(PRESETS)}")
    require_writable_folder(output)
    quiet_libraries()
    runs = PRESETS[preset](source)
    with _progress(runs) as report:
        rows = train_all(runs, output, wrap, workers=workers, on_ray=ray, report=report)
    columns = zip(*((row.params, row.streams, row.loss) for row in rows), strict=True)
    fitted = fit_form("log", *columns, bootstrap=1000)
    figures: dict[str, Any] = {"runs": str(output / RUNS), "points": len(rows), **fitted.values, "r2": fitted.r2}
    figures |= {"intervals": fitted.intervals, "profile": fitted.profile_intervals(), "notes": list(fitted.notes)}
    if json:
        print_json(figures)
    else:
        notes = figures.pop("notes")
        print_figures(figures)
        for note in notes:
            typer.echo(note)


@contextmanager
def _progress(runs: Sequence[Run]) -> Iterator[Report]:
    """A progress bar over all runs on standard error, weighted by the arithmetic of each; the first report shows it."""
    from rich.progress import Progress

    from parscale.terminal.console import Terminal

    weights = {run: run.layers * run.hidden**2 * run.streams * run.tokens for run in runs}
    shares = dict.fromkeys(runs, 0.0)
    progress = Progress(console=Terminal(stderr=True))
    bar = progress.add_task(f"{len(runs)} runs", total=sum(weights.values()))
    with ExitStack() as shown:

        def report(run: Run, share: float) -> None:
            if not progress.live.is_started:
                shown.enter_context(progress)
            shares[run] = share
            title = f"width {run.hidden}, P = {run.streams}"
            progress.update(bar, completed=sum(weights[one] * shares[one] for one in runs), description=title)

        yield report


def _runs(source: str, *, with_tokens: bool = False) -> tuple[Points, Any]:
    """The runs that a user names, and their training tokens if requested."""
    from parscale.scaling_laws import data

    if source in CORPORA and not Path(source).exists():
        if with_tokens:
            raise ValueError(
                f"the published runs of {source} all have 42B tokens; a joint form needs several numbers of tokens"
            )
        return data.published(source), None
    columns = (*data.COLUMNS, "tokens") if with_tokens else data.COLUMNS
    table = data.read_csv(source, columns)
    points = data.check_points(table["params"], table["streams"], table["loss"], table.get("tokens"))
    return points, table.get("tokens")


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints a table with a column for each name in any of the rows."""
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    for_tables().print(table)


def _cell(value: object) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.5g}" if abs(value) >= 1e-3 else f"{value:.3g}"  # keeps times of small models narrow


def read_law(source: str, *, bootstrap: int = 0, seed: int = 0) -> ParallelScalingLaw:
    """The law that a user names: a published corpus, a CSV file of runs, or a JSON file that `law fit --json` printed.

    Raises:
        OSError: there is no such file.
        ValueError: it has neither a law nor runs to fit one to.
    """
    from parscale.scaling_laws import ParallelScalingLaw, fit
    from parscale.scaling_laws.files import read_json, require_file

    if not source.lower().endswith(".json"):
        return fit(*_runs(source)[0], bootstrap=bootstrap, seed=seed)
    wanted = "a file that 'parscale law fit --json' printed"
    require_file(source, wanted)
    try:
        contents = read_json(source, wanted)
    except ValueError:
        contents = None
    if not isinstance(contents, dict):
        raise ValueError(f"{source} is not a law; give {wanted}")
    if (form := contents.get("form", "log")) != "log":
        raise ValueError(f"{source} holds a law of the form {form}, and this takes the form log alone; fit that one")
    try:
        return ParallelScalingLaw.from_dict(contents)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
