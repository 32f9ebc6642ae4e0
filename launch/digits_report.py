"""The table and the picture of `train_digits`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np


class Run(NamedTuple):
    """The results of a training run."""

    test_loss: np.ndarray
    """Cross-entropy after each epoch, in nats."""
    test_accuracy: np.ndarray
    """After each epoch, in percent."""
    step_ms: float
    """Median time of a step."""
    early_weights: list[np.ndarray]
    """The weights after the first few steps."""


Results = dict[str, list[Run]]
"""The runs of each setup, one for each seed, with the seeds in the same order."""

# Okabe & Ito, "Color Universal Design" (2008). The reference comes last, as a broad line below the
# others: it stays visible where they lie on top of it.
_COLOURS = ("#D55E00", "#0072B2", "#000000")


def print_table(results: Results, reference: str | None, early_steps: int) -> None:
    """Prints a line for each setup; with a reference, also how far from it the others are."""
    seeds = len(next(iter(results.values())))
    spread = "mean ± sd" if seeds > 1 else ""
    rows = [
        ["", "accuracy, %", "loss, nats", "step, ms"],
        ["", spread, spread, "median"],
    ]
    if reference:
        rows[0] += ["|Δ weights|", "|Δ loss|"]
        rows[1] += [f"after {early_steps} steps", "any epoch"]
    for setup, runs in results.items():
        rows.append(
            [
                setup,
                _mean_and_deviation([run.test_accuracy[-1] for run in runs], 2),
                _mean_and_deviation([run.test_loss[-1] for run in runs], 4),
                f"{np.median([run.step_ms for run in runs]):.1f}",
            ]
        )
        if reference == setup:
            rows[-1] += ["reference", "reference"]
        elif reference:
            pairs = list(zip(runs, results[reference], strict=True))
            weights = max(_difference(a.early_weights, b.early_weights) for a, b in pairs)
            loss = max(_difference([a.test_loss], [b.test_loss]) for a, b in pairs)
            rows[-1] += [f"{weights:.1e}", f"{loss:.1e}"]
    print("\nTest after the last epoch. Setups: batch normalization, replicas x images of each.")
    if reference:
        print("|Δ|: the largest difference from the reference with the same seed; the weights")
        print("include the moving statistics.")
    print()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *cells in rows:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        # In one piece, or a launcher would put its tags between the cells.
        print("   ".join([first.ljust(widths[0]), *aligned]))


def draw_digits(results: Results, reference: str | None, path: Path) -> None:
    """Draws test loss and accuracy over the epochs: the mean of the seeds, and their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for panel, part, label in (
        (panels[0], "test_loss", "test loss (cross-entropy, nats)"),
        (panels[1], "test_accuracy", "test accuracy (%)"),
    ):
        for (setup, runs), colour in zip(results.items(), _COLOURS, strict=False):
            curves = np.array([getattr(run, part) for run in runs])
            epochs = np.arange(1, curves.shape[1] + 1)
            below = setup == reference
            panel.plot(
                epochs,
                curves.mean(0),
                color=colour,
                linewidth=6 if below else 1.8,
                alpha=0.3 if below else 1,
                marker=None if below else "o",
                markersize=4,
                zorder=1 if below else 2,
                label=setup + " (reference)" * below,
            )
            panel.fill_between(epochs, curves.min(0), curves.max(0), color=colour, alpha=0.15, lw=0)
        panel.set(xlabel="epoch", ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    panels[0].yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    panels[0].yaxis.set_minor_formatter(ticker.NullFormatter())
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        title="batch normalization, replicas x images per step",
    )
    seeds = len(next(iter(results.values())))
    figure.suptitle("Handwritten digits" + f": mean and range over {seeds} seeds" * (seeds > 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _difference(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    return max(float(np.max(np.abs(x - y))) for x, y in zip(a, b, strict=True))


def _mean_and_deviation(values: list[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"
