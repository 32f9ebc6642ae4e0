"""What is said of a model: which normalizations need the statistics of other replicas."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from syncbn._src.models.communication_report import best_group
from syncbn._src.models.statistics_errors import StatisticsError
from syncbn._src.text_tables import rich_table, with_rule


class LayerAdvice(NamedTuple):
    """What is said of a normalization."""

    name: str
    kind: str
    """Its class."""
    elements: float = 0.0
    """The elements that it has for each channel in the batch of a replica, on average."""
    independent: float = 0.0
    """How many independent ones they are worth, for the mean."""
    errors: tuple[StatisticsError, ...] = ()
    """The errors of the statistics of 1, 2, 4, ... replicas, and of all."""
    enough: int | None = None
    """The fewest of these replicas with an error within the tolerance; ``None`` if not even all."""
    seconds: float = 0.0
    """How long a step waits for it if it is synchronized over all replicas."""
    seconds_in_groups: float = 0.0
    """Likewise, in groups as they are advised; the same where that is all replicas."""
    note: str = ""
    """Why nothing is said of it."""

    @property
    def synchronize(self) -> bool:
        """Whether the error of a single replica is beyond the tolerance."""
        return bool(self.errors) and self.enough != 1


class Advice(NamedTuple):
    """What `advise` returns; printed, a table. ``convert_sync_batchnorm(only=)`` takes it.

    Example:
        >>> advice = syncbn.advise(model, [(x, y)], replicas=4, batch=2, verbose=0)
        >>> advice.replicas, advice.batch, advice.synchronized + advice.plain
        (4, 2, ('normalization',))
    """

    layers: tuple[LayerAdvice, ...]
    replicas: int
    batch: int
    """The samples of a replica."""
    tolerance: float
    measured: str = ""
    """The engine that the seconds were measured with; empty if they were calculated."""

    @property
    def group_size(self) -> int | None:
        """The number of replicas to share statistics; ``None`` for all, 1 for no synchronization.

        All, unless together they have more samples than have been found to help.
        """
        needed = [layer.enough or self.replicas for layer in self.layers if layer.synchronize]
        if not needed:
            return 1
        size = best_group(self.replicas, self.batch, max(needed))
        return None if size == self.replicas else size

    @property
    def target_batch(self) -> int:
        """The samples that share statistics: ``target_batch`` of `SyncBatchNormalization`."""
        return (self.group_size or self.replicas) * self.batch

    @property
    def synchronized(self) -> tuple[str, ...]:
        """The names of the layers to synchronize, which need it or gain from it."""
        return tuple(layer.name for layer in self.layers if layer.synchronize)

    @property
    def needed(self) -> tuple[str, ...]:
        """The names of those among them that are beyond twice the tolerance."""
        return tuple(layer.name for layer in self.layers if self._needs(layer))

    @property
    def plain(self) -> tuple[str, ...]:
        """The names of those that may stay plain."""
        return tuple(layer.name for layer in self.layers if layer.enough == 1)

    @property
    def seconds(self) -> tuple[float, float]:
        """How long a step waits: with all layers synchronized, and as advised."""
        every = sum(layer.seconds for layer in self.layers)
        chosen = (layer for layer in self.layers if layer.synchronize)
        return every, sum(layer.seconds_in_groups for layer in chosen)

    def _needs(self, layer: LayerAdvice) -> bool:
        return bool(layer.errors) and layer.errors[0].output > 2 * self.tolerance

    def options(self) -> dict[str, dict[str, Any]]:
        """Returns the arguments of `SyncBatchNormalization` for each layer to synchronize."""
        return {
            layer.name: {"group_size": self.group_size}
            for layer in self.layers
            # Nothing is converted to what only centers, which always is synchronized.
            if layer.synchronize and layer.errors[0].variance is not None
        }

    def to_json(self) -> str:
        """Returns everything in JSON."""
        return json.dumps(
            {
                "replicas": self.replicas,
                "batch": self.batch,
                "tolerance": self.tolerance,
                "group_size": self.group_size,
                "target_batch": self.target_batch,
                "synchronized": self.synchronized,
                "needed": self.needed,
                "plain": self.plain,
                "seconds": dict(zip(("all", "advised"), self.seconds, strict=True)),
                "measured": self.measured,
                "layers": [
                    {
                        **layer._asdict(),
                        "errors": [
                            {
                                **error._asdict(),
                                "gain": layer.errors[0].output - error.output,
                            }
                            for error in layer.errors
                        ],
                    }
                    for layer in self.layers
                ],
            },
            indent=2,
        )

    def draw(self, path: str) -> None:
        """Draws the errors over the sizes of groups; needs matplotlib."""
        from syncbn._src.models.advice_picture import draw_advice

        draw_advice(self, path)

    def __str__(self) -> str:
        return with_rule(*self._table())

    def __rich__(self) -> Any:
        """Returns the table that rich prints."""
        return rich_table(*self._table())

    def _table(self) -> tuple[list[list[str]], list[str], range]:
        headings = self._headings()
        rows = [headings, *map(self._row, self.layers)]
        return rows, self.sentences(), range(1, len(headings) - 1)

    def sentences(self) -> list[str]:
        """Returns what is advised, in sentences."""
        total = len(self.synchronized) + len(self.plain)
        every, advised = (f"{1e3 * seconds:.3g} ms" for seconds in self.seconds)
        how = f"measured over {self.measured}" if self.measured else "calculated"
        size = self.group_size
        lines = [
            "Errors are those of a normalized element, whose deviation is 1, with the statistics "
            f"of so many replicas of {self.batch}; the tolerance is {self.tolerance:g}."
        ]
        if not self.synchronized:
            lines.append(
                f"All {total} may stay plain. To synchronize them would add {every} to a step "
                f"({how})."
            )
            return lines
        over = "all replicas" if size is None else f"{size} replicas (group_size={size})"
        which = f"all {total}" if not self.plain else f"{len(self.synchronized)} of {total}"
        lines.append(
            f"Synchronize {which} over {over}, that is {self.target_batch} samples: "
            f"{advised} in a step, where all layers take {every} ({how})."
        )
        if not self.needed:
            lines.append("None needs it: what is lost without is little, or nothing.")
        short = [layer.name for layer in self.layers if layer.errors and layer.enough is None]
        if short:
            lines.append(
                f"Even all {self.replicas} replicas leave {', '.join(short)} beyond the "
                "tolerance: more samples would gain more."
            )
        return lines

    def _verdict(self, layer: LayerAdvice) -> str:
        if self._needs(layer):
            return "needs it"
        return "gains from it" if layer.synchronize else "may stay plain"

    def _headings(self) -> list[str]:
        sizes = [f"{size}" for size in looked_at_sizes(self.replicas)]
        sizes[0] = f"error with {sizes[0]}"
        return ["layer", "elements", "independent", *sizes, "enough", "ms", "advice"]

    def _row(self, layer: LayerAdvice) -> list[str]:
        if not layer.errors:
            return [layer.name, *[""] * (len(self._headings()) - 2), layer.note]
        return [
            layer.name,
            f"{layer.elements:.0f}",
            f"{layer.independent:.3g}",
            *(f"{error.output:.2f}" for error in layer.errors),
            "more" if layer.enough is None else str(layer.enough),
            f"{1e3 * layer.seconds:.2g}",
            self._verdict(layer),
        ]


def looked_at_sizes(replicas: int) -> list[int]:
    """Returns the sizes of groups that are looked at: 1, 2, 4, ... and all."""
    return [*(2**power for power in range((replicas - 1).bit_length())), replicas]
