"""What wrapping promises, held against a tiny random model of a class: float32, on the CPU."""

from __future__ import annotations

import dataclasses
import inspect
import re
import tempfile
import warnings
from typing import Any

import tiny_models
import torch
from torch import nn
from transformers import DynamicCache
from transformers.generation.utils import ALL_CACHE_NAMES

import parscale

CACHE_ARGUMENTS = ("past_key_values", "cache")  # the second since transformers 5.24
TRANSFORMS = {  # columns of the table by what they give `wrap`
    "prefix": {},
    "prompt": {"transform": "prompt"},
    "lora": {"transform": "lora"},
    "shared": {"kv": "shared"},
}
P, T, B = 3, 4, 2
TEXT = 6  # tokens of a stream that starts as a text
# How tokens come with a cache: so many at a time, and whether with their positions. A way counts in which the plain
# backbone gives the same as in one pass; the note of the first that does says what it needs.
WAYS = {
    ((4, 1, 1, 3), False): "",
    ((5, 1, 1, 1, 1), False): "its cache takes one token at a time",
    ((5, 1, 1, 1, 1), True): "with a cache, it has to be told the positions, as `generate` does",
}
NO_WAY = "with a cache, its own logits are others"
NEW_TOKENS = 5
TOLERANCE = 2e-5  # of the largest logit
CONTEXT_TOLERANCE = 2e-4
POWER = 1e-3  # by which streams have to change the logits
SUPPORTED, NOT, NOT_BUILT = "supported", "not", "cannot be built"


class BrokenPromiseError(Exception):
    """A promise that a model does not keep."""


@dataclasses.dataclass
class Verdict:
    """What was found for a class in one column.

    Attributes:
        verdict: `"supported"`, `"not"` or `"cannot be built"`.
        reason: why it is not.
        without: kinds of layers that have no prefix.
        context: whether a stream that starts as a text is the backbone that reads the text: `"exact"`,
            `"approximate"`, or `"refused"`; with `", without a warning"` where wrap should have given one.
        notes: what the plain backbone itself does not do.
    """

    verdict: str
    reason: str = ""
    without: list[str] = dataclasses.field(default_factory=list)
    context: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)


def examine(name: str, transform: str = "prefix") -> Verdict:
    """Builds a tiny model of a class and holds it to the promises.

    Args:
        name: of the class.
        transform: the column, one of `TRANSFORMS`.
    """
    tiny = tiny_models.Tiny(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plain = tiny.build()
            logits(plain, ids())
        except Exception as error:  # whatever it is, it is not parscale's
            return Verdict(NOT_BUILT, f"transformers raises {type(error).__name__}: {one_line(error)}")
        verdict = Verdict(SUPPORTED)
        try:
            Examination(tiny, plain, transform, verdict).run()
        except (BrokenPromiseError, parscale.UnsupportedModelError) as error:
            verdict.verdict, verdict.reason = NOT, str(error)
        except Exception as error:
            verdict.verdict, verdict.reason = NOT, f"{type(error).__name__}: {one_line(error)}"
    return verdict


class Examination:
    """The promises, one method for each.

    Args:
        tiny: the class.
        plain: a model of it.
        transform: the column, one of `TRANSFORMS`.
        verdict: to which notes are added.
    """

    def __init__(self, tiny: Any, plain: Any, transform: str, verdict: Verdict) -> None:
        self.tiny, self.plain, self.verdict = tiny, plain, verdict
        self.options, self.shares_keys = TRANSFORMS[transform], transform == "shared"
        self.ids = ids()
        self.expected = logits(plain, self.ids)
        self.known = {name for name, _ in plain.named_parameters()}

    def added(self, model: Any) -> list[tuple[str, nn.Parameter]]:
        """The parameters that wrapping added, by name."""
        return [(name, parameter) for name, parameter in model.named_parameters() if name not in self.known]

    def run(self) -> None:
        """All of them, the cheap ones first."""
        self.one_stream_is_the_backbone()
        model = self.tiny.build()
        parscale.wrap(model, P, prefix_length=T, init="random", seed=0, **self.options)
        fill_streams(self.added(model))
        self.streams_matter(model)
        self.cached_is_full(model)
        self.generates(model)
        self.loads_what_it_saved(model)
        self.gradients_reach_every_stream(model)
        if self.shares_keys:
            self.the_cache_is_the_backbones(model)
        else:
            self.equal_streams_are_one(model)
        if not self.options:
            self.verdict.without = layers_without_prefix(model)
        parscale.unwrap(model)
        if not torch.equal(logits(model, self.ids), self.expected):
            raise BrokenPromiseError("after unwrap, the logits are not the backbone's to the last bit")
        if not self.options:
            self.verdict.context = self.context()

    def one_stream_is_the_backbone(self) -> None:
        """P = 1: the same logits to the last bit, no new parameters."""
        model = self.tiny.build()
        names = [name for name, _ in model.named_parameters()]
        parscale.wrap(model, 1, **self.options)
        if [name for name, _ in model.named_parameters()] != names:
            raise BrokenPromiseError("P = 1 adds parameters")
        if not torch.equal(logits(model, self.ids), self.expected):
            raise BrokenPromiseError("P = 1 changes the logits")

    def streams_matter(self, model: Any) -> None:
        """Streams that differ give other logits than the backbone, and each gives its own."""
        mixed = logits(model, self.ids)
        if mixed.shape != self.expected.shape:
            raise BrokenPromiseError(f"the logits are {tuple(mixed.shape)}, not {tuple(self.expected.shape)}")
        if not mixed.isfinite().all():
            raise BrokenPromiseError("the logits are not finite")
        if difference(mixed, self.expected) < POWER:
            raise BrokenPromiseError(f"streams change the logits by {difference(mixed, self.expected):.0e} only")

    def cached_is_full(self, model: Any) -> None:
        """All tokens at once, and in pieces with a cache, in each way in which the plain backbone gives the same."""
        errors = {}
        for way in WAYS:
            try:
                own = cached(self.plain, self.ids, *way)
                error = 0.0 if own is None else difference(own, self.expected)
            except Exception:  # takes no positions, or does not go on from its cache with several rows
                continue
            if own is None:
                self.verdict.notes.append("no cache")
                return
            errors[way] = error
        full = logits(model, self.ids)
        for way, error in errors.items():
            if error > TOLERANCE:
                continue
            pieces = cached(model, self.ids, *way)
            if pieces is None:
                raise BrokenPromiseError("with streams, the model makes no cache")
            check(pieces, full, "in pieces, with a cache, the logits")
        note = next((note for way, note in WAYS.items() if errors.get(way, 1.0) <= TOLERANCE), NO_WAY)
        if note:
            self.verdict.notes.append(note)

    def generates(self, model: Any) -> None:
        """Greedy tokens with the cache and without."""
        try:
            same = torch.equal(generated(self.plain, self.ids, True), generated(self.plain, self.ids, False))
        except Exception:  # its own, whatever it is
            self.verdict.notes.append("its own `generate` fails on text alone")
            return
        if not same:
            self.verdict.notes.append("with a cache, its own `generate` writes something else")
        elif NO_WAY in self.verdict.notes:  # that its own tokens were the same was chance
            return
        elif not torch.equal(generated(model, self.ids, True), generated(model, self.ids, False)):
            raise BrokenPromiseError("generate writes something else with a cache than without")

    def loads_what_it_saved(self, model: Any) -> None:
        """A full checkpoint, and the streams alone."""
        expected = logits(model, self.ids)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            check(logits(parscale.load(folder), self.ids), expected, "after saving and loading, the logits", 1e-6)
        with tempfile.TemporaryDirectory() as folder:
            model.save_streams(folder)
            loaded = parscale.load(folder, backbone=self.tiny.build())
            check(logits(loaded, self.ids), expected, "with streams saved alone, the logits", 1e-6)

    def gradients_reach_every_stream(self, model: Any) -> None:
        """In training, every tensor of every stream; and the last token sees each prefix token, window or not."""
        model.train()
        loss_of(model, self.ids, own=takes_labels(self.plain, self.ids)).backward()
        for name, parameter in self.added(model):
            gradient = parameter.grad
            if gradient is None or not gradient.isfinite().all():
                raise BrokenPromiseError(f"{name} has no gradient")
            own = model.get_submodule(name.rpartition(".")[0])._parameters.get("weight")
            if "stream_" in name and own is not None and (own.grad is None or not own.grad.any()):
                continue  # nor has the layer itself one, such as a router whose choice alone counts
            if not all(part.any() for part in ([gradient] if "aggregate_layer" in name else gradient)):
                raise BrokenPromiseError(f"the gradient of {name} is zero")
        model.zero_grad()
        model.eval()
        if self.options and not self.shares_keys:
            return
        model(input_ids=self.ids).logits[:, -1].square().sum().backward()
        for name, parameter in self.added(model):
            if name.endswith("prefix_v") and not parameter.grad.any(-1).all():  # (P, heads, T)
                raise BrokenPromiseError(f"the last token does not see all of {name}")
        model.zero_grad()

    def equal_streams_are_one(self, model: Any) -> None:
        """Streams with the same tensors mix to one of them, whatever the aggregator and however many."""
        model.add_streams("pair", 2, prefix_length=T, init="random", seed=1, **self.options)
        own = {name: parameter for name, parameter in self.added(model) if "@" not in name}
        with torch.no_grad():
            for name, parameter in self.added(model):
                if "aggregate_layer" not in name:
                    parameter.copy_(own[name.split("@")[0]][:1].expand_as(parameter))
        three = logits(model, self.ids)
        fill_streams([(name, own[name]) for name in own if "aggregate_layer" in name], seed=7)
        check(logits(model, self.ids), three, "with equal streams and another aggregator, the logits")
        model.set_streams("pair")
        check(logits(model, self.ids), three, "with two equal streams in place of three, the logits")
        model.set_streams("default")

    @torch.no_grad()
    def the_cache_is_the_backbones(self, model: Any) -> None:
        """As many rows; and the last positions by two passes, where the model can keep those alone."""
        full = logits(model, self.ids)
        output = model(input_ids=self.ids, use_cache=True)
        cache = next((output[name] for name in ALL_CACHE_NAMES if getattr(output, name, None) is not None), None)
        layers = [layer for layer in getattr(cache, "layers", ()) if getattr(layer, "keys", None) is not None]
        if any(layer.keys.shape[0] != B for layer in layers):
            raise BrokenPromiseError("the cache has rows of other streams")
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            kept = model(input_ids=self.ids, logits_to_keep=2).logits
            check(kept, full[:, -2:], "of the last positions alone, the logits")

    def context(self) -> str:
        """A stream that starts as a text, alone, against the backbone that reads the text first."""
        plain, model = self.tiny.build(window=48), self.tiny.build(window=48)
        texts = ids(2, TEXT, seed=8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                parscale.wrap(model, 2, prefix_length=TEXT, smoothing=0.0, init="context", calibration=texts)
            except ValueError as error:
                if "init='context'" not in str(error):
                    raise
                return "refused"
        warned = any("approximation" in str(warning.message) for warning in caught)
        error = 0.0
        for p, text in enumerate(texts):
            choose_stream(model, p)
            read = logits(plain, torch.cat([text.expand(B, -1), self.ids], dim=1))[:, TEXT:]
            error = max(error, difference(logits(model, self.ids), read))
        if error <= CONTEXT_TOLERANCE:
            return "exact, with a warning" if warned else "exact"
        return "approximate" if warned else "approximate, without a warning"


def ids(rows: int = B, length: int = 9, seed: int = 2) -> torch.Tensor:
    """Random token ids `(rows, length)`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny_models.FIRST_SPECIAL, (rows, length), generator=generator)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens).logits


@torch.no_grad()
def cached(model: Any, tokens: torch.Tensor, sizes: tuple[int, ...], positions: bool = False) -> torch.Tensor | None:
    """The logits of all tokens, some at a time; None for a model that neither makes nor takes a cache.

    Args:
        model: the model.
        tokens: `(B, S)`.
        sizes: of the pieces.
        positions: whether it is told at which positions a piece stands, as `generate` does.
    """
    pieces, cache, arguments, start = [], {}, {}, 0
    for piece in tokens.split(sizes, dim=1):
        if positions:
            arguments["position_ids"] = torch.arange(start, start + piece.shape[1])[None].expand(len(piece), -1)
        output = model(input_ids=piece, use_cache=True, **arguments, **cache)
        cache |= {name: output[name] for name in ALL_CACHE_NAMES if getattr(output, name, None) is not None}
        taken = [name for name in CACHE_ARGUMENTS if name in inspect.signature(model.forward).parameters]
        if not cache and taken:  # takes one, and gives none
            cache = {taken[0]: DynamicCache(config=model.config)}
            output = model(input_ids=piece, use_cache=True, **arguments, **cache)
        if not cache:
            return None
        pieces.append(output.logits)
        start += piece.shape[1]
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def generated(model: Any, tokens: torch.Tensor, use_cache: bool) -> torch.Tensor:
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )


@torch.no_grad()
def takes_labels(model: Any, tokens: torch.Tensor) -> bool:
    """Whether the model computes a loss from labels that are its input."""
    try:
        return getattr(model(input_ids=tokens, labels=tokens), "loss", None) is not None
    except ValueError:  # some want labels of another shape
        return False


def loss_of(model: Any, tokens: torch.Tensor, own: bool) -> torch.Tensor:
    """Next-token loss, the model's own or taken from its logits."""
    if own:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss
    found = model(input_ids=tokens, use_cache=False).logits
    return nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def fill_streams(streams: list[tuple[str, nn.Parameter]], seed: int = 1) -> None:
    """Streams that differ and that matter: prefixes of size 1, aggregation weights far from equal."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in streams:
        scale = 1.0
        if "aggregate_layer" in name:
            scale = 0.3 if parameter.ndim == 1 else 3.0 * parameter.shape[-1] ** -0.5
        elif "prefix_" not in name:  # a matrix for each stream
            scale = parameter.shape[-1] ** -0.5
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def choose_stream(model: Any, p: int) -> None:
    """The aggregator gives stream p all weight."""
    last = next(module for name, module in model.named_modules() if name.endswith("aggregate_layer"))[2]
    last.weight.zero_()
    last.bias.fill_(-1e4)[p] = 1e4


def layers_without_prefix(model: Any) -> list[str]:
    """Kinds of layers of which none has a prefix."""
    names = [name for name, _ in model.named_parameters() if name.endswith("prefix_k")]
    stacks = {match[1]: model.get_submodule(match[1]) for name in names if (match := re.match(r"(.*?)\.\d+\.", name))}
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    with_prefix, without = set(), []
    for stack, layers in stacks.items():
        for i, layer in enumerate(layers):
            kind = kinds[i] if len(kinds) == len(layers) else type(layer).__name__
            if any(name.startswith(f"{stack}.{i}.") for name in names):
                with_prefix.add(kind)
            elif kind not in without:
                without.append(kind)
    return [kind for kind in without if kind not in with_prefix]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest number that was expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def check(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    if found.shape != expected.shape:
        raise BrokenPromiseError(f"{what} are {tuple(found.shape)}, not {tuple(expected.shape)}")
    error = difference(found, expected)
    if not error <= tolerance:
        raise BrokenPromiseError(f"{what} are off by {error:.0e}")


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
