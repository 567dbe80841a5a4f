"""The law's k from the models trained from scratch, in the middle of documents."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np

from parscale.scaling_laws import fit_form

DENSE = ("dense", "twin", "twin, lora=4", "twice as wide")  # of P = 1, at each size's tokens
BySeed = Mapping[int, Mapping[str, Any]]


def law(arms_by_size: Mapping[str, Mapping[str, BySeed]], draws: int = 200) -> dict[str, Any] | None:
    """k from the models from scratch, in the middle of documents; None until there are three sizes with streams.

    Larger models read more, so the form has a term in tokens too, and dense models of every width count as P = 1: they
    say what parameters are worth at equal tokens. Of each size the seeds count that streams were trained with. Fitted
    twice: N counts all parameters without embeddings, as the rule says, and without those of streams. The first k also
    with each size left out: the interval takes residuals for independent, which those of one size are not.

    Args:
        arms_by_size: rows by size, arm and seed.
        draws: of the bootstrap.
    """
    sizes = {size: arms for size, arms in arms_by_size.items() if "dense" in arms and {"P = 2", "P = 4"} & {*arms}}
    if len(sizes) < 3:
        return None
    models = []  # size, parameters, the backbone's, P, tokens, loss
    for size, arms in sizes.items():
        (backbone,) = {row["params"] for row in arms["dense"].values()}
        seeds = {*arms.get("P = 2", ()), *arms.get("P = 4", ())}
        for name in (*DENSE, "P = 2", "P = 4"):
            for row in (row for seed, row in arms.get(name, {}).items() if seed in seeds):
                of_backbone, P = (row["params"], 1) if name in DENSE else (backbone, row["run"]["streams"])
                loss = fmean(row["test"]["middle"])
                models.append((size, row["params"], of_backbone, P, row["run"]["tokens"], loss))
    of_size, params, of_backbones, streams, tokens, losses = map(np.array, zip(*models, strict=True))
    fits = {}
    for counted, N in (("all parameters", params), ("the backbone's parameters", of_backbones)):
        fitted = fit_form("joint", N, streams, losses, tokens, bootstrap=draws)
        assert fitted.intervals is not None
        fits[counted] = fitted.values | {"r2": fitted.r2, "k_interval": fitted.intervals["k"], "notes": fitted.notes}
    without = {}
    for size in sizes:
        kept = of_size != size
        without[size] = fit_form("joint", params[kept], streams[kept], losses[kept], tokens[kept]).values["k"]
    return {"models": len(models), "sizes": len(sizes), "N": fits, "k_without": without}


def law_sentence(found: dict[str, Any] | None) -> str:
    """The law's k, with its interval."""
    if found is None:
        return "The law: fewer than three sizes are finished."
    texts = [
        "k = {k:+.2f} ({:+.2f}, {:+.2f}) where N counts {counted}".format(
            *fitted["k_interval"], counted=counted, **fitted
        )
        for counted, fitted in found["N"].items()
    ]
    return (
        f"The law with a term in tokens, fitted to {found['models']} models of {found['sizes']} sizes, 90 % interval: "
        f"{'; '.join(texts)}. The first k with one size left out: "
        + ", ".join(f"{k:+.2f} (without {size})" for size, k in found["k_without"].items())
        + "."
    )
