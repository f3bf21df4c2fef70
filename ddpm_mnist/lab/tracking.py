"""Send a run's log and images to TensorBoard, Weights & Biases or Trackio, through accelerate."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

TRACKERS = ("none", "tensorboard", "wandb", "trackio")


def check_tracker(name: str) -> None:
    """Raise ValueError if the tracker `name` does not exist or its package is not installed."""
    if name not in TRACKERS:
        raise ValueError(f'tracker must be one of {", ".join(TRACKERS)}, not "{name}"')
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f'tracker "{name}" needs its package: pip install {name}')


class Tracker:
    """Sends a run's log to an experiment tracker; "none" does nothing.

    TensorBoard's files are written to `tensorboard/` in the run folder.
    """

    def __init__(self, name: str, folder: Path):
        self.name = name
        if name == "none":
            return
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        self._tracker = kind(name, folder) if name == "tensorboard" else kind("efficientdm", name=folder.name)
        # accelerate drops the logs of all ranks but 0; in a ladder every rank trains students and logs.
        self._tracker.main_process_only = False
        self._tracker.start()

    def log(self, row: dict[str, Any]) -> None:
        """Log the numbers of `row` at the step `row["update"]`."""
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
