"""transformers' own model tests on wrapped models: which pass on the plain model and not on the wrapped one, and why.

    git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers build/transformers
    python benchmarks/mixins.py build/transformers

needs `pip install parameterized`. A mixin comes from the first of the given folders that has it: a source distribution,
which lacks `GenerationTesterMixin`, may stand before a clone of another version. Each test of a mixin runs on a small
random model as its class makes it, and then on one that is wrapped as soon as it is made or loaded, once for each P and
each `kv`. The exit code is 1 if a test fails on a wrapped model alone and is not listed here with a reason. What an
earlier run of the same tests has written for other families, and for another P or `kv`, stays.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import re
import signal
import sys
import tempfile
import types
import unittest
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from outcomes import row_of, unexpected
from transformers import EncoderDecoderCache

import parscale
from parscale.auto import ParScaleModel

RESULTS = Path(__file__).with_name("results") / "mixins.json"
SECONDS = 120  # of processor time, for one test
MIXINS = ("ModelTesterMixin", "GenerationTesterMixin")
ROWS, LENGTH = 3, 7
STREAMS: dict[str, Any] = {"prefix_length": 3, "init": "random", "seed": 0}

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}

_COLUMNS = "attention weights have one column more for each token of the prefix"
# Tests that should fail on a wrapped model: patterns of the name and of what the test says, and why.
EXPECTED = (
    ("^test_attention_outputs$", "Lists differ", _COLUMNS),
    ("^test_sliding_window_mask$", "shape of the mask", _COLUMNS),
    (
        "^test_batching_equivalence$",
        "encoder_last_hidden_state",
        "an encoder's output has P rows for each source, stream-major",
    ),
    (
        "^test_retain_grad_hidden_states_attentions$",
        "unexpectedly None",
        'with `kv="shared"` the attention weights are those of several calls joined for the caller; the output does '
        "not go through the joined tensor, so its retained gradient stays `None`",
    ),
    (
        "^test_model_weights_reload_no_missing_tied_weights$",
        "has no prefix_k",
        "it takes all weights out of a saved folder, and one that should hold streams and has none is refused",
    ),
    (
        "^test_init_weights_can_init_buffers$",
        "are not finite",
        'with `kv="shared"` wrapping tries the model, here before its weights are initialised, and refuses it if '
        "what the memory holds is not finite",
    ),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """Classes of one architecture, and the configuration that their tests are run with."""

    config: str
    classes: tuple[str, ...]
    options: dict[str, Any]

    @property
    def reads_twice(self) -> bool:
        """Whether it is an encoder with a decoder."""
        return self.config.startswith("T5")

    @property
    def shares_keys(self) -> bool:
        """Whether `kv="shared"` is for it: a decoder without an encoder."""
        return not self.config.startswith(("T5", "Bert"))


FAMILIES = {
    "llama": Family("LlamaConfig", ("LlamaModel", "LlamaForCausalLM"), GROUPED),
    "qwen2": Family("Qwen2Config", ("Qwen2Model", "Qwen2ForCausalLM"), GROUPED),
    "gpt2": Family(
        "GPT2Config",
        ("GPT2Model", "GPT2LMHeadModel"),
        {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "mixtral": Family(
        "MixtralConfig",
        ("MixtralModel", "MixtralForCausalLM"),
        GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        ("Gemma3TextModel", "Gemma3ForCausalLM"),
        GROUPED | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    ),
    "opt": Family(
        "OPTConfig",
        ("OPTModel", "OPTForCausalLM"),
        {key: value for key, value in SIZES.items() if key != "intermediate_size"}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "bert": Family("BertConfig", ("BertModel", "BertForMaskedLM", "BertForSequenceClassification"), SIZES),
    "t5": Family(
        "T5Config",
        ("T5Model", "T5ForConditionalGeneration"),
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    ),
}


class ModelTester:
    """What the mixins ask of a model's own tests.

    Args:
        family: whose configuration and inputs.
        case: the test case, which asserts.
    """

    batch_size, seq_length, is_training = ROWS, LENGTH, True
    encoder_seq_length = decoder_seq_length = key_length = LENGTH
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99

    def __init__(self, family: Family, case: unittest.TestCase) -> None:
        self.family = family
        self.parent = case

    def get_config(self) -> Any:
        """A new configuration."""
        return getattr(transformers, self.family.config)(**self.family.options)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """A configuration, and inputs of random tokens that are no special ones."""
        inputs = {"input_ids": torch.randint(3, 99, (ROWS, LENGTH)), "attention_mask": torch.ones(ROWS, LENGTH).long()}
        if self.family.reads_twice:
            inputs |= {f"decoder_{name}": value.clone() for name, value in inputs.items()}
        return self.get_config(), inputs

    def prepare_config_and_inputs_for_model_class(self, model_class: type) -> tuple[Any, dict[str, torch.Tensor]]:
        """The same for every class."""
        return self.prepare_config_and_inputs_for_common()


class StreamChecks:
    """The mixins' own checks of shapes, told which rows and columns streams add; a case inherits it first."""

    num_streams: int
    kv: str

    def _check_attentions_for_generate(self, batch_size: int, attentions: Any, *args: Any, **kwargs: Any) -> None:
        attentions = tuple(tuple(self._of_stream_0(layer, batch_size) for layer in step) for step in attentions)
        super()._check_attentions_for_generate(batch_size, attentions, *args, **kwargs)  # type: ignore[misc]

    def _check_encoder_attention_for_generate(
        self, attentions: Any, batch_size: int, *args: Any, **kwargs: Any
    ) -> None:
        attentions = tuple(self._of_stream_0(layer, batch_size) for layer in attentions)
        super()._check_encoder_attention_for_generate(attentions, batch_size, *args, **kwargs)  # type: ignore[misc]

    def _check_hidden_states_for_generate(self, batch_size: int, hidden_states: Any, *args: Any, **kwargs: Any) -> None:
        """Each layer's have P rows for each sequence; the last ones are mixed."""
        steps = []
        for *layers, last in hidden_states:
            assert {len(layer) for layer in layers} == {self.num_streams * batch_size}
            steps.append((*(layer[:batch_size] for layer in layers), last))
        super()._check_hidden_states_for_generate(batch_size, tuple(steps), *args, **kwargs)  # type: ignore[misc]

    def _check_encoder_hidden_states_for_generate(
        self, hidden_states: Any, batch_size: int, *args: Any, **kwargs: Any
    ) -> None:
        rows = self.num_streams * batch_size
        super()._check_encoder_hidden_states_for_generate(hidden_states, rows, *args, **kwargs)  # type: ignore[misc]

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: Any, *args: Any, **kwargs: Any
    ) -> None:
        if self.kv == "own" and not isinstance(past_key_values, EncoderDecoderCache):  # its two are checked one by one
            batch_size *= self.num_streams
        super()._check_past_key_values_for_generate(batch_size, past_key_values, *args, **kwargs)  # type: ignore[misc]

    def _of_stream_0(self, weights: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Stream 0's attention weights of real tokens, `(B, heads, S, K)`."""
        assert len(weights) == self.num_streams * batch_size
        return weights[:batch_size, ..., STREAMS["prefix_length"] :]


class Wrapping:
    """While it is on, every model of some classes is wrapped as soon as it is made or loaded."""

    def __init__(self, classes: Sequence[Any], **streams: Any) -> None:
        self.classes = classes
        self.streams = STREAMS | streams
        self.depth = 0  # of constructors, or of a loader, that run

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Patches the classes in this block."""
        own = {cls: (cls.__dict__.get("__init__"), cls.__dict__.get("from_pretrained")) for cls in self.classes}
        for cls in self.classes:
            cls.__init__ = self._wrapped_after(cls.__init__)
            cls.from_pretrained = classmethod(self._loaded_by(cls.from_pretrained.__func__))
        try:
            yield
        finally:
            for cls, (init, loader) in own.items():
                for name, function in (("__init__", init), ("from_pretrained", loader)):
                    if function is None:
                        delattr(cls, name)
                    else:
                        setattr(cls, name, function)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[bool]:
        self.depth += 1
        try:
            yield self.depth == 1
        finally:
            self.depth -= 1

    def _wrapped_after(self, init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def construct(model: Any, *args: Any, **kwargs: Any) -> None:
            with self._inside() as outermost:
                init(model, *args, **kwargs)
                if outermost and type(model) in self.classes:
                    parscale.wrap(model, **self.streams)

        return construct

    def _loaded_by(self, loader: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(loader)
        def load(cls: type, *args: Any, **kwargs: Any) -> Any:
            with self._inside() as outermost:
                path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
                if outermost and _holds_streams(cls, path):
                    return ParScaleModel.from_pretrained(*args, **kwargs)
                result = loader(cls, *args, **kwargs)
                model = result[0] if isinstance(result, tuple) else result
                if outermost:
                    parscale.wrap(model, **self.streams)
            return result

        return load


def _holds_streams(cls: type, path: Any) -> bool:
    """Whether a folder is of this class with streams."""
    config = None if path is None else Path(path, "config.json")
    names = json.loads(config.read_text()).get("architectures") if config is not None and config.exists() else None
    return bool(names) and "ParScale" in names[0] and names[0].replace("ParScale", "") == cls.__name__


def mixins_of(sources: list[Path]) -> tuple[type, ...]:
    """The mixins that models' own test cases inherit, each from the first source tree that has it."""
    package = types.ModuleType("tests")
    package.__path__ = [str(source / "tests") for source in sources]
    sys.modules["tests"] = package
    if not any((source / "tests" / "exporters").is_dir() for source in sources):
        # Bases of the mixins that a source distribution lacks; `tests_of` chooses none of their tests.
        bases: Any = types.ModuleType("tests.exporters.test_export")
        bases.ExportTesterMixin = type("ExportTesterMixin", (), {})
        bases.ExportGenerateTesterMixin = type("ExportGenerateTesterMixin", (), {})
        sys.modules |= {"tests.exporters": types.ModuleType("tests.exporters"), bases.__name__: bases}
    models = importlib.import_module("tests.test_modeling_common").ModelTesterMixin
    return models, importlib.import_module("tests.generation.test_utils").GenerationTesterMixin


def version_of(mixin: type) -> str:
    """The version of the source tree that a mixin comes from."""
    file = Path(inspect.getfile(mixin))
    root = next(folder for folder in file.parents if folder.name == "tests").parent
    text = (root / "src" / "transformers" / "__init__.py").read_text()
    return re.findall(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)[0]


def case_of(family: Family, mixins: tuple[type, ...], **streams: Any) -> Any:
    """The test case of a family, a class; with streams, for models that have them."""

    def set_up(case: Any) -> None:
        torch.manual_seed(0)
        case.model_tester = ModelTester(family, case)

    classes = tuple(getattr(transformers, name) for name in family.classes)
    members = {
        "all_model_classes": classes,
        "all_generative_model_classes": tuple(cls for cls in classes if cls.can_generate()),
        "is_encoder_decoder": family.reads_twice,
        "setUp": set_up,
    }
    checks = (StreamChecks,) if streams else ()
    return type("Case", (*checks, *mixins, unittest.TestCase), members | streams)


def tests_of(case: type[unittest.TestCase], mixin: str, only: str) -> list[str]:
    """The names of the tests that one mixin defines."""
    names = [name for name in unittest.TestLoader().getTestCaseNames(case) if re.search(only, name)]
    return [name for name in names if mixin == next(cls.__name__ for cls in case.__mro__[1:] if name in vars(cls))]


def outcome_of(case: unittest.TestCase) -> str:
    """`"passes"`, `"skipped"` or what went wrong, in one line."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    result = unittest.TestResult()
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        case.run(result)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    problems = result.failures + result.errors
    if problems:
        lines = [
            line for line in problems[0][1].strip().splitlines() if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)
        ]
        message = (lines or problems[0][1].strip().splitlines())[-1]
        return re.sub(re.escape(tempfile.gettempdir()) + r"/\w+", "FOLDER", message)[:300]
    return "skipped" if result.skipped else "passes"


def run_all(case: type[unittest.TestCase], names: list[str]) -> dict[str, str]:
    """The outcome of each test."""
    return {name: outcome_of(case(name)) for name in names}


def examine(family: Family, mixins: tuple[type, ...], names: list[str], grid: list[dict[str, Any]]) -> dict[str, Any]:
    """Outcomes on the plain model, and for each set of streams those that differ on the wrapped one."""
    plain = run_all(case_of(family, mixins), names)
    passing = [name for name, outcome in plain.items() if outcome == "passes"]
    outcomes = list(plain.values())
    result: dict[str, Any] = {
        "tests": len(plain),
        "do not apply to the plain model": outcomes.count("skipped"),
        "fail on the plain model": {k: v for k, v in plain.items() if v not in ("passes", "skipped")},
        "wrapped": [],
    }
    for streams in grid:
        case = case_of(family, mixins, **streams)
        with Wrapping(case.all_model_classes, **streams).on():
            wrapped = run_all(case, passing)
        result["wrapped"].append(row_of(streams, wrapped, EXPECTED))
    return result


def report(family: str, found: dict[str, Any]) -> int:
    """Prints the outcomes of a family, and returns how many failures have no reason."""
    for row in found["wrapped"]:
        print(f"{family} P = {row['num_streams']} {row['kv']}: {row['pass']} tests pass on both")
        for test, failure in row["fail"].items():
            label = "UNEXPECTED" if failure["reason"] is None else "expected  "
            print(f"  {label} {test}: {failure['outcome']}", flush=True)
    return sum(map(unexpected, found["wrapped"]))


def earlier_mixins(output: Path, versions: dict[str, Any]) -> dict[str, Any]:
    """What earlier runs with the same versions have found, by mixin and by the tests chosen."""
    earlier = json.loads(output.read_text()) if output.exists() else {}
    mixins: dict[str, Any] = earlier.pop("mixins", {})
    return mixins if earlier == versions else {}


def with_earlier(earlier: dict[str, Any] | None, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a family, with those of sets of streams that only an earlier run of the same tests has measured."""
    same = earlier is not None and all(earlier[key] == found[key] for key in found.keys() - {"wrapped"})
    rows = {(row["kv"], row["num_streams"]): row for row in [*(earlier["wrapped"] if same else []), *found["wrapped"]]}
    return [rows[key] for key in sorted(rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="folders of transformers' source, with its tests")
    parser.add_argument("--mixins", nargs="+", choices=MIXINS, default=list(MIXINS))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--num-streams", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--kv", nargs="+", choices=("own", "shared"), default=["own", "shared"])
    parser.add_argument("--only", default="", help="a regular expression for the tests' names")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    for file in (Path("tests", "test_modeling_common.py"), Path("tests", "generation", "test_utils.py")):
        if not any((source / file).exists() for source in args.sources):
            parser.error(f"none of the folders has {file}: clone transformers' repository")
    if importlib.util.find_spec("parameterized") is None:
        parser.error("transformers' tests need a package that is not installed: pip install parameterized")
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    mixins = mixins_of(args.sources)
    results: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__}
    results["mixins"] = earlier_mixins(args.output, results)
    without_reason = 0
    for mixin in args.mixins:
        version = version_of(next(each for each in mixins if each.__name__ == mixin))
        title = f"{mixin} {args.only}".strip()
        section = {"mixin": mixin, "version": version, "only": args.only, "families": {}}
        earlier = results["mixins"].get(title, section)
        if earlier["version"] == version:
            section = earlier
        results["mixins"][title] = section
        for name in args.families:
            case = case_of(FAMILIES[name], mixins)
            if mixin == "GenerationTesterMixin" and not case.all_generative_model_classes:
                continue  # its tests would pass without a model
            kinds = [kv for kv in args.kv if kv == "own" or FAMILIES[name].shares_keys]
            grid = [{"num_streams": count, "kv": kv} for kv in kinds for count in args.num_streams]
            found = examine(FAMILIES[name], mixins, tests_of(case, mixin, args.only), grid)
            found["wrapped"] = with_earlier(section["families"].get(name), found)
            section["families"][name] = found
            without_reason += report(name, found)
            args.output.write_text(json.dumps(results, indent=2) + "\n")
    return int(without_reason > 0)


if __name__ == "__main__":
    sys.exit(main())
