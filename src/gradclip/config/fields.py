"""What a configuration's fields accept: every field known by name, every number a number."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from math import inf, isnan
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

__all__ = ["allow_infinite_defaults", "make_numbers_strict", "refuse_unknown_fields"]

_SUGGESTIONS = 10
_NO_SCHEMAS = {"default", "metadata", "config", "serialization", "expected"}


def make_numbers_strict(schema: Any) -> None:
    """Keep pydantic from reading True, "2.5" or "yes" as a number or a boolean, in place.

    Its own ``strict=True`` would also refuse a list for a tuple, and a list is all a file has.

    Args:
        schema: A model's core schema, or a part of it. Other models in it are only references.
    """
    for part in _parts(schema):
        if part.get("type") in ("float", "int", "bool"):
            part.setdefault("strict", True)


def allow_infinite_defaults(schema: Any) -> None:
    """Let a float be infinite where its default is, or holds one that is, and "inf" in a file.

    Args:
        schema: A model's core schema, or a part of it; changed in place. Other models in it are
            only references.
    """
    for part in _parts(schema):
        if part.get("type") == "default" and _holds_infinity(part.get("default")):
            floats = [each for each in _parts(part["schema"]) if each.get("type") == "float"]
            for number in floats:
                inner = number | {"allow_inf_nan": True}
                number.clear()
                number.update(
                    core_schema.no_info_before_validator_function(
                        _read_number,
                        inner,
                        serialization=core_schema.plain_serializer_function_ser_schema(
                            _write_number, when_used="json"
                        ),
                    )
                )


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield the schema and the schemas in it."""
    if isinstance(schema, list | tuple):
        for item in schema:
            yield from _parts(item)
    elif isinstance(schema, dict):
        yield schema
        for key, part in schema.items():
            if key not in _NO_SCHEMAS:
                yield from _parts(part)


def _holds_infinity(default: Any) -> bool:
    if isinstance(default, Mapping):
        return any(map(_holds_infinity, default.values()))
    if isinstance(default, list | tuple | set | frozenset):
        return any(map(_holds_infinity, default))
    return isinstance(default, float) and default in (inf, -inf)


def _read_number(value: Any) -> Any:
    if value in ("inf", "-inf") and isinstance(value, str):
        return float(value)
    if isinstance(value, float) and isnan(value):
        raise PydanticCustomError("finite_number", "NaN is no value: expected a number")
    return value


def _write_number(value: Any) -> Any:
    return str(value) if value in (inf, -inf) else value


def refuse_unknown_fields(cls: type[BaseModel], data: Mapping[Any, Any]) -> None:
    """Say which field was probably meant, before pydantic says only that one is too many.

    Raises:
        ValidationError: ``data`` has a key that is no field of ``cls``.
    """
    names = list(_accepted_keys(cls))
    unknown = [key for key in data if key not in names]
    if not unknown:
        return
    missing = [
        f"`{name}` is required and is now missing"
        + (f": {field.description}" if field.description else "")
        for name, field in cls.model_fields.items()
        if field.is_required() and name not in data and field.alias not in data
    ]
    described, valid = _described(cls), f"valid fields: {', '.join(names)}"
    details = []
    for number, key in enumerate(unknown):
        # To look for near names takes long where there are thousands, and nobody reads them.
        near = get_close_matches(str(key), names, n=1) if number < _SUGGESTIONS else ()
        lines = [
            f"unknown field `{ascii(str(key))[1:-1]}` in {described}",
            *(f"did you mean `{name}`?" for name in near),
            *missing,
            valid,
        ]
        kind = PydanticCustomError("unknown_field", "\n".join(lines))
        details.append(InitErrorDetails(type=kind, loc=(str(key),), input=data[key]))
    raise ValidationError.from_exception_data(cls.__name__, details)


def _accepted_keys(cls: type[BaseModel]) -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield name
        if isinstance(field.alias, str):
            yield field.alias


def _described(cls: type[BaseModel]) -> str:
    """Name a member of a union as a file does, by the one value that tells it apart."""
    for name, field in cls.model_fields.items():
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            return f'{name} "{get_args(field.annotation)[0]}"'
    return cls.__name__
