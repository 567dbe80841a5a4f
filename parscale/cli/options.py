"""Options that several commands share, and list options that take several values after one name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from parscale.checkpoints.training.model_size import read_size
from parscale.checkpoints.training.settings import TrainSettings
from parscale.descriptions import descriptions, plain
from parscale.distributed.processes import number_of_processes

Checkpoint = Annotated[str, typer.Argument(help="A checkpoint's folder, or its name on the Hugging Face Hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


def _in_one_process(context: typer.Context, device: str | None) -> str | None:
    """Refuses several processes, each of which would do all that the command does."""
    if (count := number_of_processes()) > 1:
        shared = "; lm-eval's own command shares its tasks out among processes" if context.info_name == "eval" else ""
        raise ValueError(
            f"parscale {context.info_name} runs in one process on one device, and WORLD_SIZE is {count}: each of them "
            f"would do all of it. Start it without torchrun or accelerate launch{shared}."
        )
    return device


Private = Annotated[
    bool | None,
    typer.Option(
        "--private/--no-private",
        help="Whether a repository that is made is private. Default: what its owner's settings on the Hub say. With "
        "--private, one that exists has to be private.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Where to run, such as cpu or cuda:1. Default: a GPU if there is one.", callback=_in_one_process),
]
Streams = Annotated[
    str | None,
    typer.Option(help="The set of streams to use, by name, or 'off' for the plain backbone. Default: the active set."),
]
Adaptive = Annotated[
    float | None,
    typer.Option(
        help="Of streams that share keys and values: run them where the entropy of stream 0's prediction is above "
        "H nats. 0: always, inf: never.",
        metavar="H",
    ),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes what is random repeatable.")]
Files = list[Path]
DATA = typer.Option(help="Text files, each one document, or files of rows of text.", metavar="FILE...")
Plot = Annotated[Path | None, typer.Option(help="Also plot it to this file: .png, .pdf or .svg.", metavar="FILE.png")]
TextColumn = Annotated[str, typer.Option(help=descriptions(TrainSettings).get("text_column"))]


def size(text: str) -> float:
    """A number of parameters, such as 1.6e9, 1600000000 or 1.6B; `BadParameter` for other text."""
    try:
        return read_size(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a size; give a number such as 1.6e9 or 1.6B") from None


def count(text: str) -> int:
    """A whole number, such as 20000000, 2e7 or 20M; `BadParameter` for other text."""
    value = size(text)
    if not value.is_integer():
        raise typer.BadParameter(f"{text!r} is not a whole number; give one such as 20000000 or 20M")
    return int(value)


_NO_ARGUMENT = "--from-config"  # stands in place of the argument of a command


class ListOptionCommand(TyperCommand):
    """A command whose list options take several values after one name, as in `--data a.txt b.txt`.

    `--data a.txt --data b.txt` works too. While a positional argument is missing, the value after the first one becomes
    that argument: `--data a.txt CHECKPOINT` and `CHECKPOINT --data a.txt` mean the same.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Splits the arguments as typer does, after adding the option's name before each further value of a list."""
        return super().parse_args(ctx, repeat_list_options(args, self.params))


def repeat_list_options(arguments: Sequence[str], parameters: Iterable[Any]) -> list[str]:
    """Turns `["--data", "a", "b"]` into `["--data", "a", "--data", "b"]` for parameters that take several values."""
    options = {name: parameter for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    positional_left = sum(parameter.param_type_name == "argument" for parameter in parameters)
    if any(argument.partition("=")[0] == _NO_ARGUMENT for argument in arguments):
        positional_left = 0
    result: list[str] = []
    values_of: str | None = None  # the list option of the further values
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*result, argument, *rest]
        if argument.startswith("-") and argument != "-":
            name, equals, _ = argument.partition("=")
            option = options.get(name)
            values_of = name if option is not None and option.multiple else None
            result.append(argument)
            if option is not None and not option.is_flag and not equals:
                result.extend(value for value in [next(rest, None)] if value is not None)
        elif positional_left:
            positional_left -= 1
            result.append(argument)
        elif values_of is not None:
            result += [values_of, argument]
        else:
            result.append(argument)
    return result


@dataclasses.dataclass(frozen=True)
class Special:
    """The properties of a field's option that its type and default do not determine.

    Attributes:
        type: the option's type in place of the field's.
        required: the option must be given, even if the field has a default.
        read: converts the option's value to the field's value.
        option: arguments of `typer.Option`.
    """

    type: Any = None
    required: bool = False
    read: Callable[[Any], Any] | None = None
    option: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def takes_settings(
    settings: type, argument: str, **special: Special
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replaces a command's argument of a dataclass by an option for each field.

    An option has its field's name, type and default; its help is the field's description in the class docstring.

    Args:
        settings: the dataclass.
        argument: name of the command's argument.
        **special: properties of single options, by field name.
    """
    fields = dataclasses.fields(settings)
    types, said = get_type_hints(settings), descriptions(settings)

    def option(field: dataclasses.Field[Any]) -> inspect.Parameter:
        own = special.get(field.name, Special())
        kind = own.type or types[field.name]
        default = None if field.default is dataclasses.MISSING else field.default
        if own.required or field.default is field.default_factory:  # MISSING for both
            default = inspect.Parameter.empty
        declared = typer.Option(*_declarations(field.name, kind), help=plain(said.get(field.name, "")), **own.option)
        annotation = Annotated[kind, declared]  # type: ignore[valid-type]
        return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            is_settings = parameter.name == argument
            parameters += map(option, fields) if is_settings else [parameter.replace(kind=parameter.KEYWORD_ONLY)]

        def run(**values: Any) -> None:
            given = {field.name: values.pop(field.name) for field in fields}
            read = {name: own.read for name, own in special.items() if own.read is not None}
            chosen = {
                name: read[name](value) if name in read else value for name, value in given.items() if value is not None
            }
            command(**values, **{argument: settings(**chosen)})

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _declarations(name: str, kind: object) -> list[str]:
    """The option's names where they differ from typer's own: a flag that is off by default has no negative form."""
    dashed = f"--{name.replace('_', '-')}"
    if kind is bool:
        return [dashed]
    return [f"{dashed}/--no-{dashed[2:]}"] if kind == bool | None else []
