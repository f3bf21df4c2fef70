"""A run's log and pictures in TensorBoard, Weights & Biases or Trackio, through accelerate."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

TRACKERS = ("none", "tensorboard", "wandb", "trackio")


def check_tracker(name: str) -> None:
    """ValueError where there is no such tracker, or where its package is not installed."""
    if name not in TRACKERS:
        raise ValueError(f'tracker must be one of {", ".join(TRACKERS)}, not "{name}"')
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f'tracker "{name}" needs its package: pip install {name}')


class Tracker:
    """Shows what a run logs. TensorBoard's files lie in `tensorboard/` in the run folder; "none" does nothing."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        if name == "none":
            return
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        self._tracker = kind(name, folder) if name == "tensorboard" else kind("efficientdm", name=folder.name)
        # accelerate would show what its main process logs alone; of a ladder every process has students to show.
        self._tracker.main_process_only = False
        self._tracker.start()

    def log(self, row: dict[str, Any]) -> None:
        """The numbers of `row` at the update that it names."""
        if self.name != "none":
            self._tracker.log({key: value for key, value in row.items() if key != "update"}, step=row["update"])

    def picture(self, name: str, png: bytes, update: int) -> None:
        if self.name == "none":
            return
        image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        if self.name == "tensorboard":
            self._tracker.log_images({name: image[None]}, step=update, dataformats="NHWC")
            self._tracker.writer.flush()
        elif self.name == "wandb":
            self._tracker.log_images({name: [image]}, step=update)
        else:
            import trackio

            self._tracker.log({name: trackio.Image(image)}, step=update)

    def finish(self) -> None:
        if self.name != "none":
            self._tracker.finish()
