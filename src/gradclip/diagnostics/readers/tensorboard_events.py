"""TensorBoard's event files, by the reader of the ``tensorboard`` package."""

from collections.abc import Iterator

from gradclip.diagnostics.readers.source import Source
from gradclip.diagnostics.readers.table import Table
from gradclip.errors import MissingDependencyError

__all__ = ["claims", "read"]


def claims(source: Source) -> bool:
    """Return whether the first event says the version of the format."""
    return source.holds_events


def read(source: Source) -> Table:
    """Read the scalars, each in a row of its own with its step."""
    table = Table("TensorBoard events")
    try:
        for step, tag, value in _scalars(source):
            table.add({"step": step, tag: value})
    except (ValueError, TypeError, OSError, OverflowError, MemoryError) as error:
        raise source.error(f"an event is damaged, {error}") from None
    return table


def _scalars(source: Source) -> Iterator[tuple[int, str, float]]:
    try:
        from google.protobuf.message import DecodeError  # noqa: PLC0415 - an extra
        from tensorboard.backend.event_processing.event_file_loader import (  # noqa: PLC0415
            EventFileLoader,
        )
        from tensorboard.util.tensor_util import make_ndarray  # noqa: PLC0415
    except ImportError as error:
        raise MissingDependencyError(
            f"{source.path} is a TensorBoard event file, and tensorboard is not installed.\n"
            '  pip install "gradclip[logs]"'
        ) from error
    try:
        for event in EventFileLoader(str(source.path)).Load():
            for value in event.summary.value:
                if value.WhichOneof("value") != "tensor" or _is_no_scalar(value):
                    continue
                found = make_ndarray(value.tensor)
                if found.size == 1:
                    yield event.step, value.tag, float(found.item())
    except DecodeError as error:
        raise ValueError(error) from None


def _is_no_scalar(value: object) -> bool:
    plugin: str = value.metadata.plugin_data.plugin_name  # type: ignore[attr-defined]
    return plugin not in ("", "scalars")
