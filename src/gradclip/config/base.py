"""``Config``: an immutable set of checked values that can be written to a file and read back."""

import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, core_schema

from gradclip.config.class_type import (
    check_allow,
    class_name,
    configuration_of,
    register,
    resolve,
)
from gradclip.config.fields import (
    allow_infinite_defaults,
    make_numbers_strict,
    refuse_unknown_fields,
)
from gradclip.config.parse import Format, parse
from gradclip.config.report import Document, explain
from gradclip.config.robo_orchard import CONFIG_TYPE
from gradclip.config.write import write
from gradclip.errors import ClassTypeError, ConfigError, GradClipError

__all__ = ["AnyConfig", "Config", "ConfigOf", "read"]

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """The base of every configuration: frozen, without unknown fields, and strict about numbers.

    A number is never read from a text or a boolean, NaN is refused, and infinity is too except in
    fields whose default it is, and in those that say otherwise, such as ``Ceiling``. A value that
    is wrong raises pydantic's ``ValidationError``, a ``ValueError``. A field may hold an object of
    any class; such a configuration cannot be written to a file.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        arbitrary_types_allowed=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        register(cls)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler, /
    ) -> CoreSchema:
        schema = handler(source)
        fields = handler.resolve_ref_schema(schema)
        make_numbers_strict(fields)
        allow_infinite_defaults(fields)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _know_every_field(cls, data: Any, info: ValidationInfo) -> Any:
        if isinstance(data, Mapping) and CONFIG_TYPE in data:
            data = _of_class(cls, data, info.context)
        if isinstance(data, Mapping) and cls.model_config.get("extra") == "forbid":
            refuse_unknown_fields(cls, data)
        return data

    @model_validator(mode="after")
    def _call_post_init(self) -> Self:
        type(self).__post_init__(self)
        return self

    def __post_init__(self) -> None:
        """Check what needs all fields, in a class of one's own: raise ValueError.

        The name is RoboOrchardLab's.
        """

    @model_serializer(mode="wrap")
    def _leave_out_default_none(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        if _known(info.context) is not None:  # on its way to a file, where TOML has no null
            for name, field in type(self).model_fields.items():
                if field.default is None and name in data and data[name] is None:
                    del data[name]
        return data

    def to_dict(self, mode: Literal["python", "json"] = "python") -> dict[str, Any]:
        """Return the fields as a dictionary, configurations in them too.

        Args:
            mode: "python" keeps classes and numbers as they are; "json" gives what a file can hold.
        """
        return self.model_dump(mode=mode)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, allow: Collection[str] = ()) -> Self:
        """Check a dictionary; ``allow`` is that of ``gradclip.config.load``."""
        return cls.model_validate(data, context={"allow": check_allow(allow)})

    def to_str(self, format: Format = "json") -> str:  # noqa: A002, the word users know
        """Write the text of a file, and make sure that it says the same when it is read.

        Raises:
            ConfigError: GC001, a value cannot be written, or would not come back equal.
            MissingDependencyError: GC401, TOML needs ``gradclip[pipeline]``.
        """
        context: dict[str, Any] = {"known": {}}
        cannot = f"{type(self).__name__} cannot be written as {format}"
        try:
            text = write(_with_class_type(self, "json", context), format)
            document = parse(text, format, type(self).__name__)
            again = _build(document.data, type(self), context)
        except GradClipError:
            raise
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{cannot}\n{error}") from error
        # Equal mappings may differ in order, and the first pattern that matches wins.
        ordered = [json.dumps(each.to_dict("json"), default=str) for each in (again, self)]
        if again != self or ordered[0] != ordered[1]:
            raise ConfigError(
                f"{cannot}: it would be read as something else, or in another order (TOML puts "
                "tables behind plain values; YAML and JSON keep the order)\n"
                f"written  {self!r}\nread     {again!r}"
            )
        return text

    @classmethod
    def from_str(
        cls,
        data: str,
        format: Format = "json",  # noqa: A002, the word users know
        *,
        allow: Collection[str] = (),
    ) -> Self:
        """Read the text of a file; ``class_type`` may be left out where it would name this class.

        Raises:
            ConfigError: GC001 to GC003, with the place in the text.
        """
        return read(parse(data, format, "text"), cls, allow)

    def replace(self, **overrides: Any) -> Self:
        """Return a copy with other values, checked like the first ones."""
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self).model_validate({**kept, **overrides})


def read(document: Document, expected: type[ConfigT], allow: Collection[str] = ()) -> ConfigT:
    """Build the configuration that a parsed file describes.

    Args:
        document: The file.
        expected: What the configuration must be; a subclass will do.
        allow: See ``gradclip.config.load``.

    Raises:
        ConfigError: GC001 or GC002, with the place in the file.
    """
    try:
        return _build(document.data, expected, {"allow": check_allow(allow)})
    except ValidationError as error:
        raise explain(error, document) from None


def _build(data: Any, expected: type[ConfigT], context: Any) -> ConfigT:
    """Choose the configuration class that ``class_type`` asks for, and let it check the rest."""
    if isinstance(data, expected):
        return data
    if not isinstance(data, Mapping):
        message = f"expected a mapping with the fields of {expected.__name__}"
        raise _invalid(expected, (), message, data)
    key = CONFIG_TYPE if CONFIG_TYPE in data else "class_type"
    if key not in data:
        if expected is Config:
            message = "`class_type` is missing\nit says what to build, as module:Class"
            raise _invalid(expected, (), message, data)
        return expected.model_validate(data, context=context)
    try:
        cls = as_class(data[key], context)
        config = cls if issubclass(cls, Config) else configuration_of(cls)
        if config is None:
            raise ClassTypeError(  # noqa: TRY301, reported like those of as_class
                f"class_type {class_name(cls)!r} has no configuration\n"
                "write a ClassConfig whose class_type has that class as its default"
            )
        if key == CONFIG_TYPE and issubclass(expected, config):
            config = expected
        if not issubclass(config, expected):
            raise ClassTypeError(  # noqa: TRY301
                f"{key} {data[key]!r} is configured by {config.__name__}, and here "
                f"a {expected.__name__} is expected"
            )
    except ClassTypeError as error:
        raise _invalid(expected, (key,), error, data[key]) from None
    fields = {name: value for name, value in data.items() if name != key}
    if not issubclass(cls, Config):
        fields = {"class_type": cls, **fields}
    return config.model_validate(fields, context=context)


def _of_class(cls: type[Config], data: Mapping[Any, Any], context: Any) -> dict[Any, Any]:
    """Return fields without the key that names their class, which has to be this one.

    Raises:
        ClassTypeError: GC002, it is another.
    """
    named = as_class(data[CONFIG_TYPE], context)
    if not issubclass(cls, named):
        raise ClassTypeError(
            f"{CONFIG_TYPE} {data[CONFIG_TYPE]!r} is {named.__name__}, and here a {cls.__name__} "
            "is expected"
        )
    return {name: value for name, value in data.items() if name != CONFIG_TYPE}


def as_class(value: Any, context: Any) -> type:
    """Return a class, given itself or what a file names it.

    Raises:
        ClassTypeError: GC002, see ``gradclip.config.class_type.resolve``.
    """
    if isinstance(value, str):
        allow = context.get("allow", ()) if isinstance(context, dict) else ()
        return resolve(value, allow, _known(context))
    if isinstance(value, type):
        return value
    raise ClassTypeError(f"class_type is {value!r}\nexpected module:Class, or in Python a class")


def _with_class_type(config: Config, mode: str, context: Any) -> dict[str, Any]:
    """Dump a configuration together with the ``class_type`` that leads back to its class.

    Where that would be a configuration too, and so be read as itself, both are written, as
    RoboOrchardLab writes them.
    """
    data = config.model_dump(mode=mode, context=context)
    cls = getattr(config, "class_type", None)
    if isinstance(cls, type) and issubclass(cls, Config):
        return {CONFIG_TYPE: spell(type(config), mode, context), **data}
    if not isinstance(cls, type) or configuration_of(cls) is not type(config):
        cls = type(config)
    fields = {name: value for name, value in data.items() if name != "class_type"}
    return {"class_type": spell(cls, mode, context), **fields}


def spell(cls: type, mode: str, context: Any) -> Any:
    """Return what stands for a class in a dump; remember the class, for reading the dump back."""
    if mode == "python":
        return cls
    name = class_name(cls)
    known = _known(context)
    if known is not None:
        known[name] = cls
    return name


def _known(context: Any) -> dict[str, type] | None:
    """Return the classes by name that a dump collects, and that reading it back may use."""
    return context.get("known") if isinstance(context, dict) else None


def _invalid(
    expected: type, loc: tuple[str, ...], error: Exception | str, value: object
) -> ValidationError:
    error = error if isinstance(error, Exception) else ConfigError(error)
    detail = InitErrorDetails(type="value_error", loc=loc, input=value, ctx={"error": error})
    return ValidationError.from_exception_data(expected.__name__, [detail])


class _ConfigOf:
    """Any configuration of a kind, told apart by its ``class_type``."""

    def __get_pydantic_core_schema__(self, source: Any, handler: object) -> CoreSchema:
        expected: type[Config] = source.__pydantic_generic_metadata__["origin"] or source

        def validate(value: Any, info: ValidationInfo) -> Config:
            return _build(value, expected, info.context)

        def serialize(value: Config, info: SerializationInfo) -> dict[str, Any]:
            return _with_class_type(value, info.mode, info.context)

        return core_schema.with_info_plain_validator_function(
            validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                serialize, info_arg=True
            ),
        )


ConfigOf = Annotated[ConfigT, _ConfigOf()]
"""A field that holds any configuration of a kind, its subclasses too: ``ConfigOf[Base]``."""

AnyConfig = ConfigOf[Config]
"""A field that holds any configuration at all."""
