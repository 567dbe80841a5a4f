"""`--recipe`: what a recipe says holds unless an option is given beside it, and every name in it is one."""

import json
import tomllib

import pytest

from parscale.checkpoints.training import train as training
from parscale.cli import recipes
from parscale.cli.application import BAD_INPUT, run
from parscale.cli.recipes import RECIPES


@pytest.fixture
def settings_of(monkeypatch, tmp_path):
    """The settings that a command line trains with, without training."""

    class StoppedError(ValueError):
        pass

    def stop(checkpoint, output, settings, **options):
        stop.settings = settings
        raise StoppedError

    def settings(*arguments):
        monkeypatch.setattr(training, "train", stop)
        assert (
            run(["train", "checkpoint", "--data", "a.txt", "--output", str(tmp_path / "run"), *arguments]) == BAD_INPUT
        )
        return stop.settings

    return settings


def test_of_nd_lora(settings_of):
    settings = settings_of("--recipe", "nd-lora")
    assert (settings.tokens, settings.sequence_length, settings.batch_size) == (20_000_000, 976, 64)
    assert (settings.trains, settings.streams_learning_rate, settings.seed) == ("streams", 3e-4, 42)
    assert settings.data == ["a.txt"]
    assert settings_of().tokens is None


def test_what_is_given_beside_it_counts_more(settings_of):
    settings = settings_of("--tokens", "1M", "--recipe", "nd-lora", "--seed", "0")
    assert (settings.tokens, settings.seed, settings.batch_size) == (1_000_000, 0, 64)


def test_converts_by_a_recipe(backbone, tmp_path, capsys):
    assert run(["convert", str(backbone), str(tmp_path / "parallel"), "--recipe", "nd-lora", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_streams"], report["transform"], report["rank"], report["seed"]) == (4, "lora", 16, 42)


def test_a_file_of_ones_own(settings_of, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[train]\neval-data = ["code=x.txt", "prose=y.txt"]\nkeep-checkpoints = 3\nbf16 = false\n')
    settings = settings_of("--recipe", str(path))
    assert settings.eval_data == {"code": "x.txt", "prose": "y.txt"}
    assert (settings.keep_checkpoints, settings.bf16) == (3, False)


def test_a_string_is_a_list_of_one(settings_of, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[train]\neval-data = "code=x.txt"\nreport-to = "wandb"\n')
    settings = settings_of("--recipe", str(path))
    assert (settings.eval_data, settings.report_to) == ({"code": "x.txt"}, ["wandb"])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_name_in_a_recipe_is_an_option(path):
    import typer

    from parscale.cli.application import app

    commands = typer.main.get_command(app).commands
    for command, options in tomllib.loads(path.read_text()).items():
        known = {name for parameter in commands[command].params for name in parameter.opts}
        assert {f"--{option}" for option in options} <= known


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (None, "There is no recipe 'nothing'; give one of nd-lora, or the path of a TOML file."),
        ("train: [", "is not TOML"),
        ("[convert]", "says nothing of train"),
        ("[train]\nepochs = 3", "gives train 'epochs', which is not one of its options"),
        ("[train]\ntokens = 'many'", "'many' is not a size"),
        ("[train]\neval-data = ['a.txt', 3]", "gives 'eval-data' the value ['a.txt', 3]; give a list of strings."),
        ("[train.eval-data]\ncode = 'a.txt'", "gives 'eval-data' the value {'code': 'a.txt'}; give a list of strings."),
        ("[train]\nseed = [1, 2]", "gives 'seed' the value [1, 2]; give a single one."),
    ],
)
def test_what_is_wrong_is_said_in_one_line(contents, said, tmp_path, capsys):
    name = "nothing"
    if contents is not None:
        name = str(tmp_path / "wrong.toml")
        (tmp_path / "wrong.toml").write_text(contents)
    assert run(["train", "x", "--data", "a.txt", "--output", str(tmp_path / "run"), "--recipe", name]) == BAD_INPUT
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_recipes_lie_where_the_package_takes_them():
    assert {path.stem for path in recipes.RECIPES.iterdir()} == {"nd-lora"}
