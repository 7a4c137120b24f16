"""From plain data to the text of a file."""

import json
from typing import Any

from gradclip.config.parse import Format
from gradclip.config.yaml_nodes import write_yaml
from gradclip.errors import ConfigError, MissingDependencyError

__all__ = ["write"]


def write(data: dict[str, Any], format: Format) -> str:  # noqa: A002, the word users know
    """Write data that ``parse`` reads back.

    Raises:
        ConfigError: GC001, TOML cannot hold a None in the data.
        MissingDependencyError: GC401, TOML needs tomli-w.
    """
    if format == "json":
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if format == "yaml":
        return write_yaml(data)
    try:
        import tomli_w  # noqa: PLC0415, an optional dependency
    except ImportError:
        raise MissingDependencyError(
            "writing TOML needs tomli-w, which is not installed\n"
            "  pip install 'gradclip[pipeline]', or write YAML or JSON"
        ) from None
    if (path := _path_of_none(data)) is not None:
        raise ConfigError(f"{path} is None, which TOML cannot say; write YAML or JSON")
    return tomli_w.dumps(data)


def _path_of_none(data: object, path: str = "") -> str | None:
    if data is None:
        return path
    children: list[tuple[str, object]] = []
    if isinstance(data, dict):
        children = [(f"{path}.{key}".removeprefix("."), child) for key, child in data.items()]
    elif isinstance(data, list):
        children = [(f"{path}[{i}]", child) for i, child in enumerate(data)]
    found = (_path_of_none(child, name) for name, child in children)
    return next((name for name in found if name is not None), None)
