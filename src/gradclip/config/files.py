"""Configuration files: YAML, TOML and JSON."""

import os
from collections.abc import Collection
from pathlib import Path

from gradclip.config.base import Config, read
from gradclip.config.parse import MAX_BYTES, Format, parse
from gradclip.config.report import file_error
from gradclip.whole_file import read_whole, write_whole

__all__ = ["dump", "load"]

_FORMATS: dict[str, Format] = {".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json"}


def load(path: str | os.PathLike[str], *, allow: Collection[str] = ()) -> Config:
    """Read a configuration from a ``.yaml``, ``.yml``, ``.toml`` or ``.json`` file.

    The file's ``class_type`` says what is configured: a configurable class of gradclip, one that
    the running program registered, one in an allowed package, or the configuration class of one.
    Nothing else is imported, and no instance is built: call the configuration for that.

    Args:
        path: The file.
        allow: Packages or modules of which the file may name any class; ``"my_pkg"`` covers
            ``my_pkg.hooks``, not ``my_pkg2``. Their modules are imported when the file names them.

    Returns:
        The configuration.

    Raises:
        ConfigError: GC001, a field is unknown, missing or wrong.
        ClassTypeError: GC002, ``class_type`` names what a file may not name.
        ConfigFileError: GC003, the file cannot be read, or is not what its suffix says.
    """
    path = Path(path)
    return read(parse(_text(path), _format(path), str(path)), Config, allow)


def dump(config: Config, path: str | os.PathLike[str]) -> None:
    """Write a configuration to a file from which ``load`` reads an equal one.

    The file is replaced in one step: at any moment it holds the old text or the new.

    Raises:
        ConfigError: GC001, the configuration cannot be written in that format.
        MissingDependencyError: GC401, TOML needs ``gradclip[pipeline]``.
    """
    path = Path(path).resolve()  # so that a link stays one
    write_whole(path, config.to_str(_format(path)))


def _format(path: Path) -> Format:
    try:
        return _FORMATS[path.suffix.lower()]
    except KeyError:
        suffixes = ", ".join(_FORMATS)
        raise file_error(str(path), f"the file's name must end in one of {suffixes}") from None


def _text(path: Path) -> str:
    try:
        text = read_whole(path, MAX_BYTES + 1).decode("utf-8-sig")
    except OSError as error:
        raise file_error(str(path), f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise file_error(str(path), f"not UTF-8 text: {error.reason}") from error
    except ValueError as error:
        raise file_error(str(path), f"cannot be read: {error}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
