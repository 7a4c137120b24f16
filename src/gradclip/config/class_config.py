"""``ClassConfig``: a configuration that names a class, and builds an instance of it when called."""

from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import (
    BeforeValidator,
    PlainSerializer,
    SerializationInfo,
    ValidationInfo,
    field_serializer,
    field_validator,
)

from gradclip.config.base import Config, as_class, spell
from gradclip.config.class_type import register, set_configuration

__all__ = ["ClassConfig", "ClassInitFromConfigMixin", "ClassType"]

T_co = TypeVar("T_co", covariant=True)


def _read(value: Any, info: ValidationInfo) -> type:
    return as_class(value, info.context)


def _write(value: type, info: SerializationInfo) -> Any:
    return spell(value, info.mode, info.context)


ClassType = Annotated[type[T_co], BeforeValidator(_read), PlainSerializer(_write)]
"""A field that holds a class: ``ClassType[Base]`` takes Base and its subclasses.

In Python any class will do; as text, ``module:Class`` is looked up by the rules of
``gradclip.config.load``, and is what the field is written as.
"""


class ClassInitFromConfigMixin:
    """Makes a class configurable: files may name it, and it is built from its configuration."""

    InitFromConfig: ClassVar[bool] = True
    """Whether the constructor takes the configuration itself, and not its fields as keywords."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register(cls)


class ClassConfig(Config, Generic[T_co]):
    """The configuration of a class: the class, and what an instance of it is built from.

    Declaring a subclass whose ``class_type`` has a class as its default makes that class
    configurable, and the subclass its configuration: a file that names the class is read as it.

    Example:
        >>> class Decay(ClassInitFromConfigMixin):
        ...     def __init__(self, cfg, start=1.0):
        ...         self.rate, self.start = cfg.rate, start
        >>> class DecayConfig(ClassConfig[Decay]):
        ...     class_type: ClassType[Decay] = Decay
        ...     rate: float = 0.1
        >>> DecayConfig()(rate=0.5, start=2.0).rate
        0.5
    """

    class_type: ClassType[T_co]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        default = cls.model_fields["class_type"].default
        if isinstance(default, type) and "class_type" in cls.__annotations__:
            set_configuration(default, cls)

    # Also for subclasses that declare `class_type: type[X] = X`, without ClassType.
    _read_class = field_validator("class_type", mode="before")(_read)
    _write_class = field_serializer("class_type")(_write)

    def __call__(self, *args: Any, **kwargs: Any) -> T_co:
        """Build an instance of ``class_type``.

        Args:
            *args: Go to the constructor, after the configuration if it takes that.
            **kwargs: Those that are fields replace the field's value for this instance, and are
                checked as such; the others go to the constructor.

        Returns:
            ``class_type(config, *args, **others)`` where ``class_type.InitFromConfig`` is true,
            else ``class_type(*args, **fields, **others)``.
        """
        names = [name for name in type(self).model_fields if name != "class_type"]
        overrides = {name: kwargs.pop(name) for name in names if name in kwargs}
        config = self.replace(**overrides) if overrides else self
        build: Any = self.class_type
        if getattr(build, "InitFromConfig", False):
            instance: T_co = build(config, *args, **kwargs)
        else:
            fields = {name: getattr(config, name) for name in names}
            instance = build(*args, **fields, **kwargs)
        return instance
