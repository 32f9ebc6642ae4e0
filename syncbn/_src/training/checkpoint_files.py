"""The files of a checkpoint: a folder that is there as a whole, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import tensorflow as tf

_PREFIX, _ASIDE = "checkpoint-", ".writing-"
_PROGRESS, _VARIABLES = "progress.json", "variables"


class CheckpointFiles:
    """The checkpoints in a folder, of which the last one is kept.

    Each is a folder in it, written under another name and renamed when all is on the disk: what has
    its name is whole. Then the one before it is deleted.

    Args:
        path: The folder, which need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    def latest(self) -> int:
        """Returns the number of the last checkpoint, from 1; 0 if there is none."""
        numbers = [found.name.removeprefix(_PREFIX) for found in self.path.glob(f"{_PREFIX}[0-9]*")]
        return max((int(number) for number in numbers if number.isdigit()), default=0)

    def progress(self, number: int) -> dict[str, Any]:
        """Returns what a checkpoint says of the training.

        Raises:
            ValueError: it cannot be read.
        """
        file = self._folder(number) / _PROGRESS
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"A checkpoint of PreemptionCheckpoint must have a readable {_PROGRESS}. "
                f"Received: {file} ({error}). Delete its folder to train without it."
            ) from error

    def read(self, number: int, variables: tf.train.Checkpoint) -> None:
        """Gives variables the values of a checkpoint.

        Raises:
            ValueError: it has none for some of them, or of other shapes, or cannot be read.
        """
        prefix = self._folder(number) / _VARIABLES
        try:
            variables.read(str(prefix)).assert_existing_objects_matched()
        except (AssertionError, ValueError, tf.errors.OpError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                "A checkpoint must be of this model and optimizer. Received: "
                f"{self._folder(number)} ({reason}). Name another folder."
            ) from error

    def write(
        self, variables: tf.train.Checkpoint, progress: dict[str, Any], others_read: bool
    ) -> None:
        """Writes a checkpoint, and deletes the one before.

        Args:
            variables: The variables.
            progress: What it says of the training.
            others_read: Whether other workers are in `read_with_others`.

        Raises:
            RuntimeError: it cannot be written. The one before is still there.
        """
        number = self.latest() + 1
        aside = self.path / f"{_ASIDE}{number}"
        read = False
        try:
            self._remove(_ASIDE)  # of a process that was killed
            aside.mkdir(parents=True)
            read = True
            variables.write(str(aside / _VARIABLES))
            (aside / _PROGRESS).write_text(json.dumps(progress, indent=1))
            for file in (*aside.iterdir(), aside):
                _to_disk(file)
            aside.rename(self._folder(number))
            _to_disk(self.path)
        except (OSError, tf.errors.OpError) as error:
            if others_read and not read:
                read_with_others(variables)  # or they would wait for ever
            shutil.rmtree(aside, ignore_errors=True)
            reason = str(error).partition("\n")[0]
            kept = self.latest()
            there = f"{self._folder(kept)} is whole, and still there" if kept else "there is none"
            raise RuntimeError(
                f"A checkpoint must be written to {self.path}. Received: {reason}. Make room, or "
                f"name another folder. Of the checkpoints before, {there}."
            ) from error
        self._remove(_PREFIX, but=self._folder(number))

    def _folder(self, number: int) -> Path:
        return self.path / f"{_PREFIX}{number}"

    def _remove(self, prefix: str, but: Path | None = None) -> None:
        for found in self.path.glob(f"{prefix}[0-9]*"):
            # What is not only a number behind it is somebody's copy.
            if found != but and found.name.removeprefix(prefix).isdigit():
                shutil.rmtree(found, ignore_errors=True)  # somebody may be looking at it


def read_with_others(variables: tf.train.Checkpoint) -> None:
    """Takes part in the writing of another worker.

    Under a strategy of several workers, reading the moving statistics takes all of them, in the
    order in which TensorFlow saves. So it writes to this machine's temporary folder what it reads.
    """
    with tempfile.TemporaryDirectory() as discarded:
        variables.write(os.path.join(discarded, _VARIABLES))


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some file systems cannot do so for folders.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
