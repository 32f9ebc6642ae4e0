"""The picture of an advice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncbn._src.models.synchronization_advice import Advice, LayerAdvice


def draw_advice(advice: Advice, path: str | Path) -> None:
    """Draws what each layer has, and the errors over the sizes of groups.

    Args:
        advice: With at least one layer that something is said of.
        path: The file to write, in the format that its name says; its folder is made.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    import matplotlib.figure

    layers = [layer for layer in advice.layers if layer.errors]
    if not layers:
        raise ValueError(
            "A picture needs layers. Received: an advice in which nothing is said of any."
        )
    figure = matplotlib.figure.Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_elements(left, layers, advice.batch)
    _draw_errors(right, layers, advice.tolerance)
    figure.suptitle(f"{advice.replicas} replicas with {advice.batch} samples each")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_elements(axes: Any, layers: Sequence[LayerAdvice], batch: int) -> None:
    numbers = range(1, len(layers) + 1)
    axes.plot(
        numbers,
        [layer.elements for layer in layers],
        "o",
        color="0.6",
        label="elements",
        mfc="none",
    )
    for kind, colour, name in (
        (True, "#D55E00", "synchronize"),
        (False, "#0072B2", "may stay plain"),
    ):
        chosen = [n for n in numbers if layers[n - 1].synchronize == kind]
        values = [layers[n - 1].independent for n in chosen]
        axes.plot(chosen, values, "o", color=colour, label=f"independent ones: {name}")
    axes.axhline(batch, color="0.8", linewidth=1, zorder=0)
    axes.set(
        yscale="log",
        xlabel="normalization, in the order of the model",
        ylabel="elements per channel in a replica",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)


def _draw_errors(axes: Any, layers: Sequence[LayerAdvice], tolerance: float) -> None:
    for layer in layers:
        colour = "#D55E00" if layer.synchronize else "#0072B2"
        sizes = [error.replicas for error in layer.errors]
        outputs = [error.output for error in layer.errors]
        axes.plot(sizes, outputs, "o-", color=colour, alpha=0.6, linewidth=1.2, markersize=3)
    axes.axhline(tolerance, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        "tolerance", (1, tolerance), xytext=(2, 3), textcoords="offset points", fontsize="small"
    )
    worst = max(layers, key=lambda layer: layer.errors[0].output)
    axes.annotate(
        worst.name,
        (1, worst.errors[0].output),
        xytext=(4, 4),
        textcoords="offset points",
        fontsize="small",
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="replicas that share statistics",
        ylabel="error of a normalized element, its deviation being 1",
    )
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
