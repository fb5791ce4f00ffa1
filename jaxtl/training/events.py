"""TensorBoard's events of a run: what metrics.jsonl holds, and at the end the figures of the report.

metrics.jsonl stays the truth: a run that goes on writes the events anew from it, so that none is there twice, or of
steps that were taken again. Written with tensorboardX's record writer, in the thread that trains: its `SummaryWriter`
hands events to a thread that an error (a full disk) ends, and then waits for it for ever (tensorboardX 2.6.5,
`EventFileWriter`). A record is a hundred bytes into a buffer.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtl.evaluation.figures import Figure
from jaxtl.progress import say_once

_FILE = "events.out.tfevents."  # how TensorBoard knows them
_NOT_SCALARS = ("step", "epoch", "split")


class Events:
    """Writes the events; from the first that cannot be written on, none, which is said once."""

    def __init__(self, folder: Path, history: Sequence[str]):
        """Begins a file in `folder`, with the lines of metrics.jsonl so far; those that are there are removed."""
        self._folder, self._writer = folder, None
        with self._guarded():
            with _without_torch():
                from tensorboardX.event_file_writer import EventsWriter
            folder.mkdir(exist_ok=True)
            for old in folder.glob(f"{_FILE}*"):
                old.unlink()
            self._writer = EventsWriter(str(folder / "events"))
            for line in history:
                self._add(line)
            self._writer.flush()

    def add(self, line: str, *, flush: bool = False) -> None:
        """Adds the numbers of a line of metrics.jsonl; `flush`: have them be seen now."""
        with self._guarded():
            self._add(line)
            if self._writer and flush:
                self._writer.flush()

    def add_figures(self, figures: Sequence[Figure], step: int) -> None:
        """Adds figures as images."""
        with self._guarded():
            for figure in figures:
                width, height = figure.size
                picture = {"width": width, "height": height, "colorspace": 4, "encoded_image_string": figure.png}
                self._event(step, [{"tag": f"report/{figure.name}", "image": picture}])

    def close(self) -> None:
        """Writes what waits to be written."""
        with self._guarded():
            if self._writer:
                writer, self._writer = self._writer, None
                writer.close()

    def _add(self, line: str) -> None:
        found = json.loads(line)
        numbers = {
            name: value for name, value in found.items() if name not in _NOT_SCALARS and isinstance(value, int | float)
        }
        split = found["split"]
        self._event(
            found["step"], [{"tag": f"{split}/{name}", "simple_value": number} for name, number in numbers.items()]
        )

    def _event(self, step: int, values: list[dict[str, Any]]) -> None:
        if self._writer and values:
            from tensorboardX.proto.event_pb2 import Event

            self._writer.write_event(Event(wall_time=time.time(), step=step, summary={"value": values}))

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            say_once(
                f"{self._folder} cannot be written: {error.strerror or error}; TensorBoard will not show all of this "
                "run, metrics.jsonl does"
            )
            writer, self._writer = self._writer, None
            with contextlib.suppress(OSError):
                if writer:
                    writer.close()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Keeps an import from importing torch where that is installed: seconds, and memory that nothing here needs.

    tensorboardX 2.6.5 does, in `x2num.py`; no longer needed when `python -X importtime -c "import tensorboardX"` shows
    no torch.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None
    try:
        yield
    finally:
        del sys.modules["torch"]
