"""Which classes a name resolves to, and what is imported for it."""

import sys

import pytest

from gradclip.config import (
    AnyConfig,
    ClassConfig,
    ClassInitFromConfigMixin,
    ClassType,
    Config,
    load,
    register,
)
from gradclip.config.class_type import ROOTS, _registry, class_name, configuration_of, resolve
from gradclip.errors import ArgumentTypeError, ArgumentValueError, ClassTypeError

HERE = __name__


class Base(ClassInitFromConfigMixin):
    def __init__(self, cfg):
        self.cfg = cfg

    class Inner(ClassInitFromConfigMixin):
        pass


class Derived(Base):
    pass


class Unrelated(ClassInitFromConfigMixin):
    pass


class Unregistered:
    pass


class BaseConfig(ClassConfig[Base]):
    class_type: ClassType[Base] = Base
    rate: float = 0.5


class SecondConfig(BaseConfig):
    """Another way to configure the same class; files name it by its own name."""

    warmup: int = 0


class Holder(Config):
    anything: AnyConfig


@pytest.fixture
def my_pkg(tmp_path, monkeypatch):
    """Two packages whose modules count how often they run."""
    for package in ("my_pkg", "my_pkg2"):
        folder = tmp_path / package / "deep"
        folder.mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("from .things import Thing\n")
        (tmp_path / package / "__main__.py").write_text("raise SystemExit('ran')\n")
        (folder / "__init__.py").write_text("class Deep: pass\n")
        (tmp_path / package / "things.py").write_text(
            "import subprocess\n"
            "from subprocess import Popen\n"
            "from collections import OrderedDict as Renamed\n"
            "class Thing:\n"
            "    class Part: pass\n"
            "    alias = subprocess.Popen\n"
            "class Impostor: pass\n"
            "Impostor.__qualname__ = 'Thing'\n"
            "Alias = Thing\n"
            "instance = Thing()\n"
            "def function(): pass\n"
            "def __getattr__(name):\n"
            "    if name == '__path__': raise AttributeError(name)\n"
            "    raise RuntimeError('a getattr ran: ' + name)\n"
        )
        (tmp_path / package / "registering.py").write_text(
            "from gradclip.config import ClassConfig, ClassInitFromConfigMixin, ClassType\n"
            "class Mine(ClassInitFromConfigMixin):\n"
            "    def __init__(self, cfg): self.cfg = cfg\n"
            "class MineConfig(ClassConfig[Mine]):\n"
            "    class_type: ClassType[Mine] = Mine\n"
            "    rate: float = 0.5\n"
            "class Hidden(ClassInitFromConfigMixin): pass\n"
            "kept = Hidden\n"
            "del Hidden\n"
        )
        (tmp_path / package / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for table in (sys.modules, _registry):
        for name in [name for name in table if name.startswith("my_pkg")]:
            del table[name]


# What running code made configurable


@pytest.mark.smoke
@pytest.mark.parametrize(
    "cls", [Base, Base.Inner, Derived, BaseConfig, SecondConfig, Holder, Unrelated]
)
def test_mixin_subclasses_and_configurations_are_registered(cls):
    assert resolve(class_name(cls)) is cls


def test_any_class_can_be_registered():
    name = class_name(Unregistered)
    with pytest.raises(ClassTypeError):
        resolve(name)
    assert register(Unregistered) is Unregistered
    assert resolve(name) is Unregistered


def test_the_default_of_class_type_is_registered_and_configured_by_it():
    class Foreign:
        pass

    Foreign.__qualname__ = "Foreign"

    class ForeignConfig(ClassConfig[Foreign]):
        class_type: type[Foreign] = Foreign

    assert resolve(f"{HERE}:Foreign") is Foreign
    assert configuration_of(Foreign) is ForeignConfig


def test_a_configuration_is_found_along_the_mro_and_inheriting_it_changes_nothing():
    assert configuration_of(Base) is BaseConfig
    assert configuration_of(Derived) is BaseConfig
    assert configuration_of(Unrelated) is None


def test_a_class_made_in_a_function_has_no_name_for_a_file():
    class Local(ClassInitFromConfigMixin):
        pass

    with pytest.raises(ClassTypeError, match="top level of a module"):
        class_name(Local)
    with pytest.raises(ClassTypeError, match="not of the form"):
        resolve(f"{HERE}:{Local.__qualname__}")


def test_close_names_are_suggested():
    with pytest.raises(ClassTypeError, match=f"did you mean '{HERE}:Derived'"):
        resolve(f"{HERE}:Derved")
    with pytest.raises(ClassTypeError, match=f"did you mean '{HERE}:Derived'"):
        resolve("other.module:Derived")


# Allowed packages


@pytest.mark.usefixtures("my_pkg")
@pytest.mark.parametrize(
    ("name", "allow"),
    [
        ("my_pkg.things:Thing", ["my_pkg"]),
        ("my_pkg.things:Thing", ["other", "my_pkg.things"]),
        ("my_pkg.things:Thing.Part", ("my_pkg",)),
        ("my_pkg.deep:Deep", {"my_pkg.deep"}),
        ("my_pkg.registering:Mine", ("my_pkg",)),
        ("my_pkg.registering:MineConfig", ("my_pkg",)),
        ("my_pkg.registering:Hidden", ("my_pkg",)),
    ],
)
def test_a_class_of_an_allowed_package_is_imported(name, allow):
    cls = resolve(name, allow)
    assert class_name(cls) == name
    assert cls is resolve(name, allow)


@pytest.mark.usefixtures("my_pkg")
@pytest.mark.parametrize(
    ("name", "allow"),
    [
        ("my_pkg2.things:Thing", ("my_pkg",)),
        ("my_pkg.things:Thing", ("my_pkg2",)),
        ("my_pkg.things:Thing", ("my",)),
        ("my_pkg.things:Thing", ("my_pkg.deep",)),
        ("my_pkg:Thing", ("my_pkg.things",)),
        ("my_pkg.__main__:Thing", ("my_pkg",)),
        ("my_pkg.__init__:Thing", ("my_pkg",)),
        ("my_pkg.things:Thing", ()),
    ],
)
def test_what_is_not_allowed_is_not_imported(name, allow):
    with pytest.raises(ClassTypeError, match="nothing was imported"):
        resolve(name, allow)
    assert not [module for module in sys.modules if module.startswith("my_pkg")]


@pytest.mark.usefixtures("my_pkg")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("my_pkg.things:Popen", "it is subprocess:Popen there"),
        ("my_pkg.things:Renamed", "it is collections:OrderedDict there"),
        ("my_pkg.things:Alias", "it is my_pkg.things:Thing there"),
        ("my_pkg.things:Impostor", "it is my_pkg.things:Thing there"),
        ("my_pkg:Thing", "it is my_pkg.things:Thing there"),
        ("my_pkg.things:Thing.alias", "it is subprocess:Popen there"),
        ("my_pkg.things:Thing.alias.wait", "it is subprocess:Popen there"),
        ("my_pkg.things:subprocess.Popen", "no class of that name"),
        ("my_pkg.things:Thing.__class__", "no class of that name"),
        ("my_pkg.things:Thing.__base__", "no class of that name"),
        ("my_pkg.things:instance.__class__", "no class of that name"),
        ("my_pkg.things:function", "no class of that name"),
        ("my_pkg.things:function.__globals__", "no class of that name"),
        ("my_pkg.things:Missing", "no class of that name"),
        ("my_pkg.things:__builtins__", "no class of that name"),
        ("my_pkg.things:__loader__", "no class of that name"),
        ("my_pkg.missing:Thing", "importing my_pkg.missing failed"),
        ("my_pkg.broken:Thing", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_allowed_module_gives_only_its_own_classes_by_their_own_names(name, reason):
    with pytest.raises(ClassTypeError, match=reason):
        resolve(name, ("my_pkg",))


@pytest.mark.usefixtures("my_pkg")
def test_allow_reaches_nested_configurations(tmp_path):
    path = tmp_path / "nested.yaml"
    path.write_text(
        f"class_type: {HERE}:Holder\n"
        "anything:\n"
        "  class_type: my_pkg.registering:Mine\n"
        "  rate: 2.0\n"
    )
    with pytest.raises(ClassTypeError, match=r"nested.yaml:3:15"):
        load(path)
    mine = load(path, allow=("my_pkg",)).anything
    assert type(mine).__name__ == "MineConfig"
    assert mine().cfg.rate == 2.0
    data = {"anything": {"class_type": "my_pkg.registering:Mine", "rate": 2.0}}
    assert Holder.from_dict(data, allow=("my_pkg",)).anything == mine
    text = '{"anything": {"class_type": "my_pkg.registering:Mine", "rate": 2.0}}'
    assert Holder.from_str(text, allow=("my_pkg",)).anything == mine


@pytest.mark.parametrize("allow", [("",), ("my pkg",), ("a..b",), ("a.",), ("a:b",), (3,), ("ä",)])
def test_allow_takes_dotted_names_only(allow, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ArgumentValueError, match="dotted package names"):
        load(tmp_path / "x.json", allow=allow)


def test_allow_is_not_one_string(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ArgumentTypeError, match=r"allow=\('my_pkg',\)"):
        load(tmp_path / "x.json", allow="my_pkg")


# gradclip's own packages


def test_only_the_root_of_our_own_packages_is_imported(tmp_path, monkeypatch):
    for module in ("__init__", "hidden"):
        (tmp_path / "root_pkg").mkdir(exist_ok=True)
        (tmp_path / "root_pkg" / f"{module}.py").write_text(
            "from gradclip.config import ClassInitFromConfigMixin\n"
            "class Ours(ClassInitFromConfigMixin): pass\n"
            "class NotOurs: pass\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("gradclip.config.class_type.ROOTS", ("root_pkg",))
    assert class_name(resolve("root_pkg:Ours")) == "root_pkg:Ours"
    for name in ("root_pkg:NotOurs", "root_pkg.hidden:Ours", "root_pkg.absent:Ours"):
        with pytest.raises(ClassTypeError, match="root_pkg has no configurable class"):
            resolve(name, ("root_pkg",))
    assert "root_pkg.hidden" not in sys.modules


def test_a_root_that_cannot_be_imported_is_our_error(monkeypatch):
    monkeypatch.setattr("gradclip.config.class_type.ROOTS", ("no_such_root",))
    with pytest.raises(ClassTypeError, match="No module named 'no_such_root'"):
        resolve("no_such_root:Thing")


def test_the_roots_are_those_of_our_configurable_classes():
    assert ROOTS == ("gradclip.pipeline.hooks", "gradclip.clipping.policies")
    assert resolve("gradclip.clipping.policies.norm:NormClip").__name__ == "NormClip"


# Which configuration is built


def test_a_file_may_name_the_configuration_itself():
    text = f'{{"class_type": "{HERE}:SecondConfig", "warmup": 3}}'
    assert Config.from_str(text) == SecondConfig(warmup=3)
    assert BaseConfig.from_str(text) == SecondConfig(warmup=3)


def test_a_class_without_a_configuration_cannot_be_configured():
    with pytest.raises(ClassTypeError, match="has no configuration"):
        Config.from_str(f'{{"class_type": "{HERE}:Unrelated"}}')


def test_another_kind_of_configuration_is_refused():
    with pytest.raises(ClassTypeError, match="a SecondConfig is expected"):
        SecondConfig.from_str(f'{{"class_type": "{HERE}:Base"}}')
