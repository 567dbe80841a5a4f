"""Whether the streams of a model differ: the loss of each alone, the correlation of their losses, their weights.

These are the figures of `model.stream_report`, taken over many documents. Token losses are summed in float64, so the
result equals that of one call with all the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parscale.checkpoints.evaluation.text_loss import (
    batches_of,
    checked_length,
    evaluating,
    padded,
    shown_threshold,
    windows_of,
)
from parscale.checkpoints.texts.documents import Document
from parscale.checkpoints.texts.token_ids import vocabulary_of
from parscale.format.staging import require_plot_path, staged_file
from parscale.hooks.stream_losses import measure_streams
from parscale.streams.sets import StreamSet
from parscale.streams.state import active_streams

# Thresholds of the mean correlation of token losses, above which streams are said to differ hardly, or little. Models
# that are trained apart correlate by 0.94 (`benchmarks/results/evidence.md`, "average of 2"): the same tokens are hard.
HARDLY, LITTLE = 0.99, 0.97
# Shares of the tokens, those where stream 0 is least certain, that get all streams; the other tokens get stream 0.
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Proposal:
    """A threshold for `adaptive`, and what came of it on the text.

    Attributes:
        wanted: the share of the tokens that should get all streams.
        threshold: entropy of stream 0's prediction, nats, above which they run.
        share: of the tokens that lie above it.
        mean_streams: how many streams run for a token on average.
        loss: with all streams on these tokens, and stream 0 on the others.
    """

    wanted: float
    threshold: float
    share: float
    mean_streams: float
    loss: float


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`. Losses are in nats per predicted token; every token has the same weight.

    Attributes:
        streams: the name of the set.
        losses: of each stream alone, `(P,)`.
        mixture_loss: of the model, which mixes the streams.
        correlation: of the token losses of each pair of streams, `(P, P)`; NaN where a stream's losses are all equal.
        rms_difference: root mean square of the difference between the token losses of two streams, `(P, P)`.
        weights: mean aggregation weights by position in the window, `(S - 1, P)`: position s predicts token s + 1.
        entropy: mean entropy of the weights by position, in nats, `(S - 1,)`; `log(P)` for equal weights.
        counts: number of tokens predicted from each position, `(S - 1,)`.
        gains: how much the loss falls below that of stream 0 alone when the least certain tokens of stream 0 get all
            streams, `(len(SHARES),)`; the last value is the gain of the mixture over stream 0.
        thresholds: the entropy of stream 0's prediction, in nats, above which these tokens lie, `(len(SHARES),)`: a
            value for `adaptive` in `model.generate`.
        tokens: number of predicted tokens.
        sequence_length: the length of the windows in tokens; S is that of the longest window in the text.
        proposal: a threshold, if a share was wanted.
    """

    streams: str
    losses: np.ndarray
    mixture_loss: float
    correlation: np.ndarray
    rms_difference: np.ndarray
    weights: np.ndarray
    entropy: np.ndarray
    counts: np.ndarray
    gains: np.ndarray
    thresholds: np.ndarray
    tokens: int
    sequence_length: int
    proposal: Proposal | None = None

    @property
    def num_streams(self) -> int:
        """P."""
        return len(self.losses)

    @property
    def mean_weights(self) -> np.ndarray:
        """The mean weights over all tokens, `(P,)`."""
        return self.counts @ self.weights / self.tokens

    @property
    def mean_entropy(self) -> float:
        """The mean entropy over all tokens, in nats."""
        return float(self.counts @ self.entropy / self.tokens)

    @property
    def mean_correlation(self) -> float:
        """The mean correlation over all pairs of streams."""
        return _mean_of_pairs(self.correlation)

    @property
    def gain_over_best(self) -> float:
        """How much the loss of the mixture is below that of the best stream alone."""
        return float(self.losses.min()) - self.mixture_loss

    @property
    def kept(self) -> list[float | None]:
        """By share of the tokens, the share of the gain over stream 0 that is kept; None where there is no gain."""
        whole = float(self.gains[-1])
        return [gain / whole if whole > 0 else None for gain in self.gains.tolist()]

    @property
    def by_mean_streams(self) -> list[tuple[float, float]]:
        """For each of `SHARES`, how many streams run for a token on average, and the loss."""
        first, others = float(self.losses[0]), self.num_streams - 1
        return [(1 + others * share, first - gain) for share, gain in zip(SHARES, self.gains.tolist(), strict=True)]

    @property
    def proposal_as_json(self) -> dict[str, Any]:
        """The proposal, with an infinite threshold as text."""
        assert self.proposal is not None
        return asdict(self.proposal) | {"threshold": shown_threshold(self.proposal.threshold)}

    def to_dict(self) -> dict[str, Any]:
        """All figures in types that JSON supports; None for NaN."""
        correlation = [[None if math.isnan(value) else value for value in row] for row in self.correlation.tolist()]
        mean = self.mean_correlation
        return {
            "streams": self.streams,
            "num_streams": self.num_streams,
            "losses": self.losses.tolist(),
            "mixture_loss": self.mixture_loss,
            "gain_over_best": self.gain_over_best,
            "gain_over_first": float(self.gains[-1]),
            "gain_by_share": [
                {
                    "tokens": share,
                    "gain": gain,
                    "kept": kept,
                    "entropy_above": threshold,
                    "mean_streams": streams,
                    "loss": loss,
                }
                for share, gain, kept, threshold, (streams, loss) in zip(
                    SHARES,
                    self.gains.tolist(),
                    self.kept,
                    self.thresholds.tolist(),
                    self.by_mean_streams,
                    strict=True,
                )
            ],
            **({} if self.proposal is None else {"proposal": self.proposal_as_json}),
            "correlation": correlation,
            "mean_correlation": None if math.isnan(mean) else mean,
            "rms_difference": self.rms_difference.tolist(),
            "mean_weights": self.mean_weights.tolist(),
            "mean_entropy": self.mean_entropy,
            "weights_by_position": self.weights.tolist(),
            "entropy_by_position": self.entropy.tolist(),
            "tokens": self.tokens,
            "sequence_length": self.sequence_length,
        }


def diagnose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    sequence_length: int | None = None,
    batch_size: int = 1,
    share: float | None = None,
    progress: bool = False,
) -> Diagnosis:
    """Measures the active streams one by one and mixed, on documents cut into windows as `evaluate` does.

    Args:
        model: with active streams; it runs on its own device and in its own dtype.
        tokenizer: its tokenizer.
        documents: pairs of a name and a text.
        sequence_length: tokens in a window, as in `evaluate`.
        batch_size: windows in a batch. Every stream has its own logits here, so memory for them grows with
            `(P + 1) * batch_size * sequence_length * vocabulary`.
        share: of streams that share keys and values: the share of the tokens, 0 to 1, that should get all streams; a
            threshold for it is proposed.
        progress: whether to show a progress bar on standard error.

    Returns:
        The figures.

    Raises:
        ValueError: no streams are active, a number is out of range, a share is wanted of streams that do not share
            keys, or no document has three tokens.
    """
    streams = active_streams(model)
    if streams is None or streams.num_streams == 1:
        raise ValueError(
            "No streams are active (or P is 1), so there is nothing to compare; choose a set of two or more."
        )
    length = checked_length(model, sequence_length)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, and must be at least 1.")
    if share is not None:
        _check_share(share, streams)
    windows = windows_of(documents, tokenizer, length, vocabulary_of(model))
    if sum(len(window.ids) - 1 for window in windows) < 2:
        raise ValueError("No document has three tokens, and a correlation needs two predictions; give more text.")

    sums = _Sums(streams.num_streams, len(windows[0].ids) - 1)
    with evaluating(model), torch.inference_mode():
        for batch in batches_of(windows, batch_size, progress):
            input_ids = padded([window.ids for window in batch], model.device)  # (B, S)
            measured = measure_streams(model, input_ids, input_ids, mixture=True)
            for row, window in enumerate(batch):
                predicted = len(window.ids) - 1
                sums.add(
                    measured.losses[:, row, :predicted],
                    measured.weights[row, :predicted],
                    measured.uncertainty[row, :predicted],
                )
    return sums.result(streams.name, length, share)


def _check_share(share: float, streams: StreamSet) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share:g}, and must be between 0 (no token gets all streams) and 1 (every token).")
    if not streams.shares_keys:
        raise ValueError(
            "A threshold is proposed for streams that share keys and values (kv='shared'), which can run on some "
            f"tokens only; {streams.name!r} have their own. Leave share out."
        )


class _Sums:
    """Running sums over tokens, in float64, of the streams' losses and, in the last entry, the mixture's."""

    def __init__(self, num_streams: int, positions: int) -> None:
        self.losses = np.zeros(num_streams + 1)
        self.products = np.zeros((num_streams + 1, num_streams + 1))
        self.weights = np.zeros((positions, num_streams))
        self.entropy = np.zeros(positions)
        self.counts = np.zeros(positions, dtype=np.int64)
        self.by_token: list[np.ndarray] = []

    def add(self, losses: torch.Tensor, weights: torch.Tensor, uncertainty: torch.Tensor) -> None:
        """Adds one window: losses `(P + 1, n)`, weights `(n, P)`, and the entropy of stream 0's prediction `(n,)`."""
        values, shares = losses.double().cpu().numpy(), weights.double().cpu()
        n = values.shape[1]
        self.losses += values.sum(axis=1)
        self.products += values @ values.T
        self.weights[:n] += shares.numpy()
        self.entropy[:n] -= torch.special.xlogy(shares, shares).sum(-1).numpy()
        self.counts[:n] += 1
        self.by_token.append(np.stack([values[0] - values[-1], uncertainty.double().cpu().numpy()]))

    def result(self, name: str, length: int, share: float | None) -> Diagnosis:
        tokens = int(self.counts.sum())
        means, squares = self.losses / tokens, self.products[:-1, :-1] / tokens
        covariance = squares - np.outer(means[:-1], means[:-1])
        variance, diagonal = np.diag(covariance), np.diag(squares)
        deviations = np.sqrt(np.where(variance > 1e-12 * diagonal, variance, np.nan))  # below it is what rounding left
        by_token = np.concatenate(self.by_token, axis=1)
        gains, thresholds = _gains_by_share(by_token)
        return Diagnosis(
            streams=name,
            losses=means[:-1],
            mixture_loss=float(means[-1]),
            correlation=(covariance / np.outer(deviations, deviations)).clip(-1, 1),
            rms_difference=np.sqrt((diagonal[:, None] + diagonal - 2 * squares).clip(min=0)),
            weights=self.weights / self.counts[:, None],
            entropy=self.entropy / self.counts,
            counts=self.counts,
            gains=gains,
            thresholds=thresholds,
            tokens=tokens,
            sequence_length=length,
            proposal=None if share is None else _propose(by_token, share, float(means[0]), len(means) - 1),
        )


def _gains_by_share(by_token: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of `SHARES`: the gain in nats per token of all, and the lowest entropy of the tokens in that share.

    Args:
        by_token: each token's gain over stream 0 and the entropy of stream 0's prediction, `(2, N)`.
    """
    gain, entropy = by_token[:, np.argsort(-by_token[1], kind="stable")]
    counts = np.ceil(np.array(SHARES) * len(gain) - 1e-9).astype(int)
    return np.cumsum(gain)[counts - 1] / len(gain), entropy[counts - 1]


def _propose(by_token: np.ndarray, wanted: float, first: float, num_streams: int) -> Proposal:
    """A threshold between the entropies of the last token that should get all streams and of the next one.

    Args:
        by_token: as for `_gains_by_share`.
        wanted: the share of the tokens.
        first: the loss of stream 0 alone.
        num_streams: P.
    """
    gain, entropy = by_token
    count = math.ceil(wanted * len(entropy) - 1e-9)
    threshold = math.inf if count == 0 else 0.0
    if 0 < count < len(entropy):
        threshold = float(np.sort(entropy)[::-1][count - 1 : count + 1].mean())
    chosen = (entropy > threshold) | (threshold == 0)
    share = float(chosen.mean())
    loss = first - float(gain[chosen].sum()) / len(gain)
    return Proposal(wanted, threshold, share, 1 + (num_streams - 1) * share, loss)


def sentences(diagnosis: Diagnosis) -> list[str]:
    """The diagnosis in words."""
    best, worst = int(diagnosis.losses.argmin()), int(diagnosis.losses.argmax())
    spread = diagnosis.losses[worst] - diagnosis.losses[best]
    gain, of_first = diagnosis.gain_over_best, diagnosis.gains[-1]
    share = diagnosis.mean_entropy / math.log(diagnosis.num_streams)
    weights = diagnosis.mean_weights
    said = "better" if gain >= 0 else "worse"
    return [
        f"Alone, the streams have losses of {diagnosis.losses[best]:.4f} (stream {best}) to "
        f"{diagnosis.losses[worst]:.4f} (stream {worst}) nats per token: they differ by {spread:.4f}.",
        f"Mixed, their loss is {diagnosis.mixture_loss:.4f}, {abs(gain):.4f} {said} than that of the best one alone.",
        _gain_by_tokens(diagnosis)
        if of_first > 0
        else f"Mixed, their loss is {-of_first:.4f} above that of stream 0 alone: there is no gain on any tokens.",
        f"Their token losses correlate by {diagnosis.mean_correlation:.4f} and differ by "
        f"{_mean_of_pairs(diagnosis.rms_difference):.4f} nats (root mean square): {_verdict(diagnosis)}.",
        f"Their weights are {weights.min():.3f} to {weights.max():.3f} on average, and the entropy of the weights is "
        f"{100 * share:.1f} % of that of equal weights.",
        *([] if diagnosis.proposal is None else [_proposal_in_words(diagnosis.proposal, diagnosis)]),
    ]


def _proposal_in_words(proposal: Proposal, diagnosis: Diagnosis) -> str:
    worse = proposal.loss - float(diagnosis.losses[0])
    helps = "choose another share" if diagnosis.gains.max() > 0 else "no share in the table is better"
    warned = f"; that is {worse:.4f} worse than stream 0 alone, at more cost: {helps}"
    return (
        f"For all streams on {100 * proposal.wanted:.3g} % of the tokens, take adaptive = {proposal.threshold:.4g} "
        f"nats: here {100 * proposal.share:.1f} % lie above it, {proposal.mean_streams:.2f} streams run for a token on "
        f"average, and the loss is {proposal.loss:.4f}{warned if proposal.share and worse >= 0 else ''}."
    )


def _gain_by_tokens(diagnosis: Diagnosis) -> str:
    """On which tokens the gain over stream 0 is found."""
    kept = ", ".join(f"{100 * (diagnosis.kept[i] or 0):.0f} % on {100 * SHARES[i]:.0f} %" for i in (1, 3, 4))
    return (
        f"They gain {diagnosis.gains[-1]:.4f} over stream 0 alone. On the tokens where stream 0 is least certain lie "
        f"{kept} of the tokens."
    )


def _verdict(diagnosis: Diagnosis) -> str:
    correlation = diagnosis.mean_correlation
    if math.isnan(correlation):
        return "a stream has the same loss on every token, so there is no correlation"
    if correlation >= HARDLY:
        return "the streams hardly differ"
    return "the streams differ little" if correlation >= LITTLE else "the streams differ"


def plot_diagnosis(diagnosis: Diagnosis, path: str | Path) -> None:
    """Save a figure: losses alone and mixed, correlation of token losses, mean weights by position, adaptive losses.

    Args:
        diagnosis: the result of `diagnose`.
        path: the file to write, `.png`, `.pdf` or `.svg`.

    Raises:
        ValueError: the path ends otherwise, is not a file, or its folder does not exist.
        OSError: the file cannot be written.
    """
    require_plot_path(path)
    P = diagnosis.num_streams
    figure = Figure(figsize=(18, 4), layout="constrained")
    left, middle, right, last = figure.subplots(1, 4)
    left.plot(range(P), diagnosis.losses, "o", label="a stream alone")
    left.axhline(diagnosis.mixture_loss, color="black", linewidth=1, label="mixed")
    left.set(title=f"Loss, {diagnosis.tokens:,} tokens", xlabel="stream", ylabel="nats per token")
    left.set_xticks(range(P))
    left.legend()

    image = middle.imshow(diagnosis.correlation)
    shade = {"color": "black", "alpha": 0.4, "pad": 1}
    for (row, column), value in np.ndenumerate(diagnosis.correlation if P <= 8 else np.empty((0, 0))):
        middle.text(column, row, f"{value:.3f}", ha="center", va="center", color="white", fontsize=8, bbox=shade)
    middle.set(title="Correlation of token losses", xlabel="stream", ylabel="stream")
    middle.set_xticks(range(P))
    middle.set_yticks(range(P))
    figure.colorbar(image, ax=middle)

    width = max(1, len(diagnosis.counts) // 64)  # at most about 64 points
    starts = np.arange(0, len(diagnosis.counts), width)
    counts = np.add.reduceat(diagnosis.counts, starts)
    weights = np.add.reduceat(diagnosis.weights * diagnosis.counts[:, None], starts) / counts[:, None]
    for stream in range(P):
        right.plot(starts, weights[:, stream], label=f"stream {stream}")
    right.axhline(1 / P, color="black", linewidth=0.8, linestyle=":")
    entropy = f"entropy {diagnosis.mean_entropy:.3f} of at most {math.log(P):.3f}"
    right.set(title=f"Mean weights; {entropy}", xlabel="position in the window", ylabel="weight")
    if P <= 16:  # more would leave no room for the plots
        right.legend(fontsize=8)

    first = float(diagnosis.losses[0])
    streams, losses = zip((1.0, first), *diagnosis.by_mean_streams, strict=True)
    last.plot(streams, losses, "o-")
    last.plot((1, P), (first, losses[-1]), color="black", linewidth=0.8, linestyle=":")
    last.set(title="All streams on the least certain tokens", xlabel="streams for a token on average", ylabel="loss")
    with staged_file(path) as beside:
        figure.savefig(beside, dpi=150)


def _mean_of_pairs(matrix: np.ndarray) -> float:
    return float(matrix[np.triu_indices(len(matrix), 1)].mean())
