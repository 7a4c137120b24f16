"""Configuration files: what is written is read back equal, and what is wrong is shown in place."""

import json
import math
import os
import re
import stat
import sys
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from gradclip.config import (
    Ceiling,
    ClassConfig,
    ClassInitFromConfigMixin,
    ClassType,
    Config,
    ConfigOf,
    NormOrder,
    dump,
    load,
)
from gradclip.errors import ClassTypeError, ConfigError, ConfigFileError, MissingDependencyError

HERE = __name__
FORMATS = ("yaml", "yml", "toml", "json")


class Norm(Config):
    clip_mode: Literal["norm"] = "norm"
    max_norm: Ceiling
    norm_type: NormOrder = 2.0


class Value(Config):
    clip_mode: Literal["value"] = "value"
    clip_value: Ceiling


class Hook(ClassInitFromConfigMixin):
    def __init__(self, cfg):
        self.cfg = cfg


class SubHook(Hook):
    pass


class HookConfig(ClassConfig[Hook]):
    class_type: type[Hook] = Hook
    policy: Annotated[Norm | Value, Field(discriminator="clip_mode")] = Norm(max_norm=1.0)
    rate: float = 0.5
    warmup: int | None = None
    required: float | None = 1.0


class OtherHookConfig(HookConfig):
    extra: str = ""


class HookList(ClassInitFromConfigMixin):
    pass


class HookListConfig(ClassConfig[HookList]):
    class_type: ClassType[HookList] = HookList
    hooks: tuple[ConfigOf[HookConfig], ...] = ()


class Concrete(Config):
    hook: HookConfig = HookConfig()
    plain: type[Hook] = Hook


class Texts(Config):
    text: str = ""
    by_name: dict[str, Any] = Field(default_factory=dict)


class Loose(Config):
    """Fields that a file can hold and not give back."""

    norm: Norm = Norm(max_norm=1)
    anything: Any = 1
    limit: Annotated[float, Field(allow_inf_nan=True)] = 1.0


class SubNorm(Norm):
    more: int = 1


LIST = HookListConfig(
    hooks=(
        HookConfig(policy=Value(clip_value=math.inf), rate=1e-05),
        HookConfig(class_type=SubHook, policy=Norm(max_norm=0, norm_type="inf"), warmup=3),
        OtherHookConfig(extra="ü"),
    )
)


def write(path, text):
    path.write_bytes(text.encode())
    return path


def listed(folder):
    return [path.name for path in folder.iterdir()]


def shown(error_class, path, text, **options):
    """Return the error of loading a text, without the folder of the file."""
    with pytest.raises(error_class) as caught:
        load(write(path, text), **options)
    assert type(caught.value) is error_class
    return str(caught.value).replace(f"{path.parent}{os.sep}", "")


# Writing and reading


@pytest.mark.smoke
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("config", [LIST, HookConfig(), Norm(max_norm="inf"), HookListConfig()])
def test_what_is_dumped_loads_back_equal(tmp_path, suffix, config):
    path = tmp_path / f"config.{suffix}"
    dump(config, path)
    loaded = load(path)
    assert loaded == config
    assert type(loaded) is type(config)
    assert listed(tmp_path) == [path.name]


def test_the_text_of_a_file_is_plain(tmp_path):
    assert LIST.to_str("yaml") == (
        f"class_type: {HERE}:HookList\n"
        "hooks:\n"
        f"- class_type: {HERE}:Hook\n"
        "  policy:\n"
        "    clip_mode: value\n"
        "    clip_value: inf\n"
        "  rate: 1.0e-05\n"
        "  required: 1.0\n"
        f"- class_type: {HERE}:SubHook\n"
        "  policy:\n"
        "    clip_mode: norm\n"
        "    max_norm: 0.0\n"
        "    norm_type: inf\n"
        "  rate: 0.5\n"
        "  warmup: 3\n"
        "  required: 1.0\n"
        f"- class_type: {HERE}:OtherHookConfig\n"
        "  policy:\n"
        "    clip_mode: norm\n"
        "    max_norm: 1.0\n"
        "    norm_type: 2.0\n"
        "  rate: 0.5\n"
        "  required: 1.0\n"
        "  extra: ü\n"
    )
    assert json.loads(Norm(max_norm=math.inf).to_str()) == {
        "class_type": f"{HERE}:Norm",
        "clip_mode": "norm",
        "max_norm": "inf",
        "norm_type": 2.0,
    }


@settings(deadline=None)  # a busy machine takes its time
@given(
    st.text(),
    st.dictionaries(
        st.text(),
        st.text()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.integers()
        | st.booleans(),
    ),
)
def test_any_text_and_number_survives_every_format(text, by_name):
    config = Texts(text=text, by_name=by_name)
    for format_ in ("yaml", "toml", "json"):
        assert Texts.from_str(config.to_str(format_), format_) == config


@pytest.mark.parametrize(
    "text",
    ["1e-3", "1.5", ".5e3", "12", "0x1f", "yes", "on", "null", "~", "", "2024-01-01", "1:30",
     "010", "0o17", "08", "1e-400", "1:30:00.5",
     "<<", "=", "!tag", "&anchor", "*alias", "# no comment", "a: b", "[", "inf", ".inf", ".nan",
     " padded ", "two\nlines\n", "tab\t", "\r\n", "\x85\u2028", "\ufeff", "\x00\x07"],
)  # fmt: skip
def test_text_that_looks_like_something_else_stays_text(tmp_path, text):
    for suffix in FORMATS:
        dump(Texts(text=text, by_name={text: text}), tmp_path / f"x.{suffix}")
        assert load(tmp_path / f"x.{suffix}") == Texts(text=text, by_name={text: text})


def test_numbers_are_read_as_people_write_them(tmp_path):
    literals = {
        "1e-3": 0.001, "1E5": 100000.0, "-.5": -0.5, "+1.5e+3": 1500.0, "1_000.5": 1000.5,
        "0": 0, "-0": 0, "10": 10, "1_000": 1000, "0x1f": 31, "0b11": 3, "0.5": 0.5, "00.5": 0.5,
        "0e-999": 0.0, "5e-324": 5e-324, "-.INF": -math.inf,
        "1:60": "1:60", "a:30": "a:30", "12:30h": "12:30h", "10.0.0.1": "10.0.0.1",
    }  # fmt: skip
    for literal, value in literals.items():
        text = f"class_type: {HERE}:Texts\nby_name: {{a: {literal}}}\n"
        read = load(write(tmp_path / "x.yaml", text)).by_name["a"]
        assert (read, type(read)) == (value, type(value))
    infinite = f"class_type: {HERE}:Norm\nmax_norm: {{}}\n"
    for literal in (".inf", "inf", '"inf"'):
        assert load(write(tmp_path / "x.yaml", infinite.format(literal))) == Norm(max_norm=math.inf)
    toml = f'class_type = "{HERE}:Norm"\nmax_norm = inf\n'
    assert load(write(tmp_path / "x.toml", toml)) == Norm(max_norm=math.inf)


def test_none_is_left_out_where_it_is_the_default_and_kept_elsewhere(tmp_path):
    assert "warmup" not in HookConfig().to_str()
    config = HookConfig(required=None)
    assert '"required": null' in config.to_str()
    assert HookConfig.from_str(config.to_str("yaml"), "yaml") == config
    with pytest.raises(ConfigError, match="required is None, which TOML cannot say"):
        dump(config, tmp_path / "x.toml")
    with pytest.raises(ConfigError, match=re.escape("by_name.a[1] is None")):
        Texts(by_name={"a": [1, None]}).to_str("toml")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_a_byte_order_mark_do_not_matter(tmp_path, end):
    json_text = f'\ufeff{{"class_type": "{HERE}:Norm",{end}"max_norm": 1}}{end}'
    assert load(write(tmp_path / "x.json", json_text)) == Norm(max_norm=1)
    text = f"\ufeffclass_type: {HERE}:Norm{end}max_norm: 1{end}"
    assert load(write(tmp_path / "x.yaml", text)) == Norm(max_norm=1)
    message = shown(ConfigError, tmp_path / "x.yaml", text.replace("1", "-1"))
    assert "x.yaml:2:11\n   |\n 2 | max_norm: -1\n" in message


@pytest.mark.parametrize("suffix", ["YAML", "Json", "TOML"])
def test_the_suffix_may_be_in_capitals(tmp_path, suffix):
    dump(Norm(max_norm=1), tmp_path / f"x.{suffix}")
    assert load(str(tmp_path / f"x.{suffix}")) == Norm(max_norm=1)


def test_from_str_knows_its_class():
    assert Norm.from_str("max_norm: 2", "yaml") == Norm(max_norm=2)
    assert Norm.from_str(f'{{"class_type": "{HERE}:Norm", "max_norm": 2}}') == Norm(max_norm=2)
    with pytest.raises(ConfigError, match="a Value is expected"):
        Value.from_str(Norm(max_norm=2).to_str())
    with pytest.raises(ConfigError, match="text: max_nrm"):
        Norm.from_str('{"max_nrm": 1}')


class Built(Config):
    """A configuration that another one builds, as RoboOrchardCore has them."""

    size: int = 1


class SubBuilt(Built):
    pass


class BuiltConfig(ClassConfig[Built]):
    class_type: ClassType[Built] = Built
    size: int = 2


class Buildings(Config):
    any_kind: tuple[ConfigOf[Config], ...] = ()
    one_kind: BuiltConfig = BuiltConfig()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "config",
    [
        BuiltConfig(),
        BuiltConfig(class_type=SubBuilt, size=3),
        Built(size=4),
        Buildings(
            any_kind=(BuiltConfig(class_type=SubBuilt), Built(size=5), BuiltConfig()),
            one_kind=BuiltConfig(class_type=SubBuilt),
        ),
    ],
)
def test_a_configuration_that_another_one_builds_is_written_and_read(tmp_path, suffix, config):
    path = tmp_path / f"x.{suffix}"
    dump(config, path)
    again = load(path)
    assert again == config
    if isinstance(again, BuiltConfig):
        built = again()
        assert type(built) is config.class_type
        assert built.size == config.size


# Writing only what can be read


@pytest.mark.parametrize(
    "config",
    [
        OtherHookConfig(class_type=SubHook),
        Loose(norm=SubNorm(max_norm=1)),
        Loose(anything=(1, 2)),
        Loose(anything=object()),
        Loose(anything=lambda: None),
        Loose(limit=math.inf),
        Loose(limit=math.nan),
    ],
)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_what_would_be_read_as_something_else_is_not_written(tmp_path, config):
    path = write(tmp_path / "x.json", "as it was")
    with pytest.raises(ConfigError, match=f"{type(config).__name__} cannot be written as json"):
        dump(config, path)
    assert path.read_text() == "as it was"
    assert listed(tmp_path) == ["x.json"]


def test_a_dump_does_not_write_into_the_file_that_somebody_reads(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("as it was")
    with path.open() as reader:
        dump(Norm(max_norm=1), path)
        assert reader.read() == "as it was"


def test_a_local_class_cannot_be_written():
    class Local(Hook):
        pass

    with pytest.raises(ConfigError, match="top level of a module"):
        HookConfig(class_type=Local).to_str()


def test_a_dump_that_fails_on_the_way_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.yaml"
    dump(Norm(max_norm=1), path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        dump(Norm(max_norm=2), path)
    assert load(path) == Norm(max_norm=1)
    assert listed(tmp_path) == ["x.yaml"]


def test_a_dump_replaces_the_file_behind_a_link_and_has_the_usual_permissions(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("{}")
    usual = stat.S_IMODE(target.stat().st_mode)
    link.symlink_to(target)
    dump(Norm(max_norm=1), link)
    assert link.is_symlink()
    assert load(target) == Norm(max_norm=1)
    assert stat.S_IMODE(target.stat().st_mode) == usual


def test_writing_toml_without_tomli_w_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomli_w", None)
    with pytest.raises(MissingDependencyError, match=r"gradclip\[pipeline\]"):
        dump(Norm(max_norm=1), tmp_path / "x.toml")
    assert listed(tmp_path) == []


def test_dump_refuses_an_unknown_suffix(tmp_path):
    with pytest.raises(ConfigFileError, match=r"must end in one of \.yaml, \.yml, \.toml, \.json"):
        dump(Norm(max_norm=1), tmp_path / "x.ini")


# Errors


def test_an_unknown_field_is_shown_in_its_line(tmp_path):
    text = (
        f"class_type: {HERE}:Hook\n# a comment\npolicy:\n    clip_mode: norm\n    max_nrom: 1.0\n"
    )
    assert shown(ConfigError, tmp_path / "train.yaml", text) == (
        'error[GC001]: unknown field `max_nrom` in clip_mode "norm"\n'
        "  --> train.yaml:5:5\n"
        "   |\n"
        " 5 |     max_nrom: 1.0\n"
        "   |     ^^^^^^^^ did you mean `max_norm`?\n"
        "   |\n"
        "   = `max_norm` is required and is now missing\n"
        "   = valid fields: clip_mode, max_norm, norm_type"
    )


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (
            "json",
            (
                f'{{"class_type": "{HERE}:HookList",'
                ' "hooks": [{"policy": {"clip_mode": "norm", "max_nrom": 1.0}}]}'
            ),
        ),
        (
            "toml",
            (
                f'class_type = "{HERE}:HookList"\n[[hooks]]\n'
                'policy = {clip_mode = "norm", max_nrom = 1.0}\n'
            ),
        ),
    ],
)
def test_json_and_toml_show_the_path_of_the_key(tmp_path, suffix, text):
    assert shown(ConfigError, tmp_path / f"train.{suffix}", text) == (
        'error[GC001]: unknown field `max_nrom` in clip_mode "norm"\n'
        f"  --> train.{suffix}: hooks[0].policy.max_nrom\n"
        "   |\n"
        "   = did you mean `max_norm`?\n"
        "   = `max_norm` is required and is now missing\n"
        "   = valid fields: clip_mode, max_norm, norm_type"
    )


@pytest.mark.parametrize(
    ("line", "place", "words"),
    [
        ("rate: true", "2:7", "`rate` is True"),
        ("rate: '2.5'", "2:7", "`rate` is '2.5'"),
        ("rate: .inf", "2:7", "`rate` is inf"),
        ("warmup: 1.5", "2:9", "`warmup` is 1.5"),
        ("policy: {clip_mode: norm}", "2:9", "`max_norm` is missing"),
        ("policy: {clip_mode: norm, max_norm: -1}", "2:37", "max_norm is -1.0"),
        ("policy: {clip_mode: norm, max_norm: '1'}", "2:37", "max_norm is '1', of type str"),
        ("policy: {clip_mode: nrom}", "2:9", "`policy` is {'clip_mode': 'nrom'}"),
        ("policy: {max_norm: 1}", "2:9", "`policy` has no `clip_mode`"),
        ("policy:", "2:8", "`policy` is None"),
        ("polcy: 1", "2:1", "unknown field `polcy` in HookConfig"),
    ],
)
def test_a_wrong_value_is_shown_in_its_place(tmp_path, line, place, words):
    message = shown(ConfigError, tmp_path / "x.yaml", f"class_type: {HERE}:Hook\n{line}\n")
    first, second = message.split("\n")[:2]
    assert first == f"error[GC001]: {words}" or first.startswith(f"error[GC001]: {words}: ")
    assert second == f"  --> x.yaml:{place}"


def test_a_class_of_another_kind_is_a_class_type_error(tmp_path):
    text = f"class_type: {HERE}:Concrete\nhook:\n  class_type: {HERE}:HookList\n"
    message = shown(ClassTypeError, tmp_path / "x.yaml", text)
    assert message.startswith(
        f"error[GC002]: `hook.class_type` is {HERE}:HookList, which is no subclass of Hook\n"
        "  --> x.yaml:3:15\n"
    )
    text = f"class_type: {HERE}:Concrete\nplain: os:system\n"
    assert "`plain` is 'os:system'" in shown(ClassTypeError, tmp_path / "x.yaml", text)


def test_every_error_of_a_file_is_shown_at_once(tmp_path):
    text = f"class_type: {HERE}:HookList\nhooks:\n- rate: fast\n  warmup: x\n- {{polcy: 1}}\n"
    message = shown(ConfigError, tmp_path / "x.yaml", text)
    assert re.findall(r"x.yaml:(\d+:\d+)", message) == ["3:9", "4:11", "5:4"]


def test_a_value_is_shown_short_and_without_control_characters(tmp_path):
    text = f'{{"class_type": "{HERE}:Hook", "rate": "{"x" * 10_000}\\u001b[2J"}}'
    message = shown(ConfigError, tmp_path / "x.json", text)
    assert len(message) < 300
    assert "\x1b" not in message
    key = json.dumps({"class_type": f"{HERE}:Texts", "by_name": 1, "\x1b[2J": 1})
    assert "\x1b" not in shown(ConfigError, tmp_path / "x.json", key)


@pytest.mark.parametrize(
    "data",
    [
        {"class_type": "x" * 500_000},
        {"class_type": f"{HERE}:Norm", "max_norm": "x" * 500_000},
        {"class_type": f"{HERE}:Norm", "max_norm": ["x" * 500_000] * 2},
        {"class_type": f"{HERE}:Norm", "x" * 500_000: 1},
        {"class_type": f"{HERE}:Norm", "clip_mode": "x" * 500_000},
        {"class_type": f"{HERE}:Texts", "by_name": {"x" * 500_000: 1}, "text": 1},
        {"class_type": f"{HERE}:HookList", "hooks": {"x" * 500_000: 1}},
    ],
)
def test_an_error_is_short_however_long_the_file(tmp_path, data):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path / "x.json", json.dumps(data)))
    assert len(str(caught.value)) < 1_000
    text = json.dumps(data).replace("x" * 500_000, "x" * 200_000)
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path / "x.yaml", text))
    assert len(str(caught.value)) < 1_200


def test_a_long_line_is_cut_around_the_place(tmp_path):
    padding = " " * 5_000
    text = f'{{class_type: "{HERE}:Hook",{padding} rate: fast,{padding} warmup: 1}}'
    lines = shown(ConfigError, tmp_path / "x.yaml", text).split("\n")
    assert max(map(len, lines)) < 120
    column = lines[4].index("^")
    assert lines[3][column : column + 4] == "fast"
    assert lines[4].strip("| ") == "^^^^"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.ini", b"", "the file's name must end in one of .yaml"),
        ("x", b"", "the file's name must end in one of .yaml"),
        ("x.yaml", b"\xff\xfe", "not UTF-8 text"),
        ("x.yaml", b"", "expected a mapping with the fields of Config"),
        ("x.json", b"", "not valid JSON: Expecting value"),
        ("x.toml", b"", "`class_type` is missing"),
        ("x.yaml", b"max_norm: 1\n", "`class_type` is missing"),
        ("x.yaml", b"- 1\n", "expected a mapping with the fields of Config"),
        ("x.json", b"3", "expected a mapping with the fields of Config"),
        ("x.yaml", b"class_type: 3\n", "class_type is 3"),
        ("x.yaml", b"class_type:\n", "class_type is None"),
        ("x.json", b'{"class_type": ["a:b"]}', "class_type is ['a:b']"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(words)):
        load(path)


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(ConfigFileError, match=r"absent.yaml") as caught:
        load(tmp_path / "absent.yaml")
    assert "No such file" in str(caught.value)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigFileError, match="Is a directory"):
        load(tmp_path / "folder.json")
