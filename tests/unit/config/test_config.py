"""What a configuration accepts, and what it builds."""

import gc
import math
import weakref
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from gradclip.config import (
    AnyConfig,
    Ceiling,
    ClassConfig,
    ClassInitFromConfigMixin,
    ClassType,
    Config,
    ConfigOf,
    NormOrder,
)
from gradclip.errors import ClassTypeError, ConfigError


class Color(Enum):
    RED = "red"


class Values(Config):
    rate: float = 0.5
    count: int = 1
    flag: bool = False
    path: Path = Path("x")
    color: Color = Color.RED
    pair: tuple[float, int] = (1.0, 2)
    by_name: dict[str, float | None] = Field(default_factory=dict)


class Limits(Config):
    max_norm: Ceiling = Field(description="nothing else bounds the gradients")
    norm_type: NormOrder = 2.0


class Tagged(Config):
    clip_mode: Literal["norm"] = "norm"
    max_norm: Ceiling


class Thing(ClassInitFromConfigMixin):
    def __init__(self, cfg, *args, **others):
        self.cfg, self.args, self.others = cfg, args, others


class SubThing(Thing):
    pass


class ThingConfig(ClassConfig[Thing]):
    class_type: ClassType[Thing] = Thing
    rate: float = 0.5


class Plain:
    def __init__(self, *args, **others):
        self.args, self.others = args, others


class SubPlain(Plain):
    """No running code registers it."""


class PlainConfig(ClassConfig[Plain]):
    """As configurations of the re-imagined system are written: without ClassType."""

    class_type: type[Plain] = Plain
    rate: float = 0.5
    inner: Limits = Limits(max_norm=1)


class Holder(Config):
    thing: ConfigOf[ThingConfig] | None = None
    anything: AnyConfig | None = None
    many: tuple[ConfigOf[ClassConfig[Any]], ...] = ()


def refused(cls, **fields):
    with pytest.raises(ValidationError) as caught:
        cls(**fields)
    return str(caught.value)


# Values


@pytest.mark.parametrize("value", [True, "2.5", "inf", None, [1.0], math.nan, math.inf, -math.inf])
def test_a_float_is_a_finite_number_and_nothing_that_looks_like_one(value):
    assert "rate" in refused(Values, rate=value)
    assert "by_name.x" in refused(Values, by_name={"x": [value]})


@pytest.mark.parametrize("value", [True, "5", 5.0, 1.5])
def test_an_integer_is_an_integer(value):
    assert "count" in refused(Values, count=value)


@pytest.mark.parametrize("value", [1, 0, "yes", "true", 1.0])
def test_a_boolean_is_a_boolean(value):
    assert "flag" in refused(Values, flag=value)


def test_what_a_file_has_no_type_for_is_still_read():
    values = Values(rate=1, path="a/b", color="red", pair=[1, 2], by_name={"a": None})
    assert values.rate == 1.0
    assert type(values.rate) is float
    assert values.path == Path("a/b")
    assert values.color is Color.RED
    assert values.pair == (1.0, 2)
    assert values.by_name == {"a": None}


def test_a_field_can_ask_for_a_lax_number():
    class Lax(Config):
        rate: Annotated[float, Field(strict=False)]

    assert Lax(rate="2.5").rate == 2.5


def test_a_default_that_looks_like_a_schema_and_a_foreign_model_are_left_alone():
    class Foreign(BaseModel):
        rate: float

    class Outer(Config):
        table: Any = {"type": "float"}  # noqa: RUF012, pydantic copies it
        foreign: Foreign

    assert Outer(foreign={"rate": "2.5"}).foreign.rate == 2.5
    assert Outer(foreign=Foreign(rate="1")).table == {"type": "float"}
    assert Foreign(rate="2.5").rate == 2.5


def test_a_configuration_is_frozen_and_hashable():
    limits = Limits(max_norm=1)
    with pytest.raises(ValidationError, match="frozen"):
        limits.max_norm = 2
    assert {limits, Limits(max_norm=1.0)} == {limits}


class Foreign:
    """A class that pydantic does not know."""


class Loose(Config):
    limit: float = math.inf
    floor: float | None = -math.inf
    ranges: dict[str, tuple[float, ...]] = {"x": (-math.inf, math.inf)}  # noqa: RUF012 - pydantic copies it
    thing: Foreign | None = None


def test_a_float_may_be_infinite_where_its_default_is():
    assert Loose.from_str(Loose().to_str("yaml"), "yaml") == Loose()
    assert Loose.from_str('{"limit": "inf", "floor": 2.0}') == Loose(floor=2.0)
    assert Loose.from_str('{"ranges": {"y": [1.0, "inf"]}}').ranges == {"y": (1.0, math.inf)}
    for wrong in (math.nan, "1", "infinity"):
        for fields in ({"limit": wrong}, {"ranges": {"x": (wrong,)}}):
            with pytest.raises(ValidationError):
                Loose(**fields)
    with pytest.raises(ValidationError):
        Finite(limit=math.inf)


class Finite(Config):
    limit: float = 1.0


def test_a_field_may_hold_an_object_that_no_file_can():
    thing = Foreign()
    assert Loose(thing=thing).thing is thing
    with pytest.raises(ValidationError, match="Foreign"):
        Loose(thing=1)
    with pytest.raises(ConfigError, match="Loose cannot be written as json"):
        Loose(thing=thing).to_str()


def test_an_unknown_field_is_refused_with_what_was_probably_meant():
    message = refused(Limits, max_nrom=1.0)
    assert "unknown field `max_nrom` in Limits\ndid you mean `max_norm`?\n" in message
    assert "`max_norm` is required and is now missing: nothing else bounds" in message
    assert "valid fields: max_norm, norm_type" in message
    assert 'unknown field `x` in clip_mode "norm"\n`max_norm` is' in refused(Tagged, x=1)


def test_a_mistyped_key_cannot_write_to_the_terminal():
    message = refused(Limits, max_norm=1, **{"a\x1b[2J\nb": 1})
    assert "unknown field `a\\x1b[2J\\nb`" in message


def test_aliases_are_known_fields():
    class Aliased(Config):
        rate: float = Field(alias="lr")

    assert Aliased(lr=0.5).rate == 0.5
    assert "valid fields: rate, lr" in refused(Aliased, lrr=0.5)


def test_a_subclass_may_allow_unknown_fields():
    class Open(Config, extra="allow"):
        pass

    assert Open(x=1).x == 1


def test_replace_checks_the_new_values_and_leaves_the_original():
    limits = Limits(max_norm=1)
    assert limits.replace(max_norm="inf") == Limits(max_norm=math.inf)
    assert limits.max_norm == 1.0
    with pytest.raises(ValidationError, match=">= 0"):
        limits.replace(max_norm=-1)
    with pytest.raises(ValidationError, match="did you mean `max_norm`"):
        limits.replace(max_nrom=1)


def test_replace_keeps_what_was_set():
    config = ThingConfig(class_type=SubThing, rate=2.0)
    assert config.replace(rate=3.0) == ThingConfig(class_type=SubThing, rate=3.0)
    assert config.replace(class_type=Thing) == ThingConfig(rate=2.0)


def test_a_default_is_checked_too():
    class Wrong(Config):
        max_norm: Ceiling = -1.0

    assert ">= 0" in refused(Wrong)


# Building


def test_a_class_that_takes_its_configuration_is_given_it():
    config = ThingConfig(rate=0.25)
    thing = config("positional", other=3)
    assert type(thing) is Thing
    assert thing.cfg is config
    assert thing.args == ("positional",)
    assert thing.others == {"other": 3}


def test_keywords_that_are_fields_override_them_checked():
    config = ThingConfig()
    thing = config(rate=2, other=3)
    assert thing.cfg == ThingConfig(rate=2.0)
    assert thing.others == {"other": 3}
    assert config.rate == 0.5
    with pytest.raises(ValidationError, match="valid number"):
        config(rate="fast")


def test_any_other_class_is_given_the_fields_as_keywords():
    plain = PlainConfig()(7, rate=0.25, other=3)
    assert plain.args == (7,)
    assert plain.others == {"rate": 0.25, "inner": Limits(max_norm=1), "other": 3}


def test_class_type_may_be_a_class_or_its_name():
    by_name = ThingConfig(class_type=f"{__name__}:SubThing")
    assert by_name == ThingConfig(class_type=SubThing)
    assert type(by_name()) is SubThing


@pytest.mark.parametrize("config", [ThingConfig, PlainConfig])
@pytest.mark.parametrize("value", [Limits, int, f"{__name__}:Limits", "os:system", 3, None, [int]])
def test_class_type_must_be_a_subclass_of_what_is_configured(config, value):
    assert "class_type" in refused(config, class_type=value)


def test_a_refused_name_carries_our_error():
    with pytest.raises(ValidationError) as caught:
        ThingConfig(class_type="os:system")
    (problem,) = caught.value.errors()
    assert isinstance(problem["ctx"]["error"], ClassTypeError)


def test_a_plain_annotation_reads_and_writes_names_too():
    config = PlainConfig(class_type=SubPlain)
    assert type(config()) is SubPlain
    text = config.to_str()
    with pytest.raises(ClassTypeError):
        PlainConfig.from_str(text)
    assert PlainConfig.from_str(text, allow=(__name__,)) == config
    assert PlainConfig(class_type=f"{__name__}:Plain") == PlainConfig()


def test_a_mixin_may_opt_out_of_taking_the_configuration():
    class ByKeyword(ClassInitFromConfigMixin):
        InitFromConfig = False

        def __init__(self, rate):
            self.rate = rate

    class ByKeywordConfig(ClassConfig[ByKeyword]):
        class_type: ClassType[ByKeyword] = ByKeyword
        rate: float = 0.5

    assert ByKeywordConfig()().rate == 0.5


# Any configuration in a field


def test_a_field_of_configurations_chooses_by_class_type():
    holder = Holder(
        thing={"class_type": f"{__name__}:SubThing", "rate": 2.0},
        anything={"class_type": f"{__name__}:Limits", "max_norm": "inf"},
        many=[PlainConfig(), {"class_type": Thing, "rate": 1.0}],
    )
    assert holder.thing == ThingConfig(class_type=SubThing, rate=2.0)
    assert holder.anything == Limits(max_norm=math.inf)
    assert holder.many == (PlainConfig(), ThingConfig(rate=1.0))


def test_a_field_of_one_kind_may_leave_class_type_out():
    assert Holder(thing={"rate": 2.0}).thing == ThingConfig(rate=2.0)


def test_a_field_of_configurations_refuses_other_kinds():
    assert "a ThingConfig is expected" in refused(Holder, thing={"class_type": Plain})
    assert "has no configuration" in refused(Holder, anything={"class_type": Path})
    assert "`class_type` is missing" in refused(Holder, anything={"max_norm": 1})
    assert "a mapping with the fields of Config" in refused(Holder, anything=3)
    assert "many.0" in refused(Holder, many=[Limits(max_norm=1)])
    assert "thing.rate" in refused(Holder, thing={"class_type": Thing, "rate": "fast"})


def test_to_dict_and_back():
    holder = Holder(thing=ThingConfig(class_type=SubThing), anything=Limits(max_norm=math.inf))
    data = holder.to_dict()
    assert data["thing"] == {"class_type": SubThing, "rate": 0.5}
    assert data["anything"] == {"class_type": Limits, "max_norm": math.inf, "norm_type": 2.0}
    assert Holder.from_dict(data) == holder
    data = holder.to_dict(mode="json")
    assert data["thing"]["class_type"] == f"{__name__}:SubThing"
    assert data["anything"]["max_norm"] == "inf"
    assert Holder.from_dict(data) == holder


def mortal_classes():
    class Mortal(ClassInitFromConfigMixin):
        pass

    class MortalConfig(ClassConfig[Any]):
        class_type: type[Mortal] = Mortal  # typing itself caches ClassType[Mortal]

    return weakref.ref(Mortal), weakref.ref(MortalConfig)


def test_classes_are_not_kept_alive_by_being_configurable():
    alive = mortal_classes()
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
