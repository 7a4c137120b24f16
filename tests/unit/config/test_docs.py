"""The examples of docs/reference/configuration.md do what the page says."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gradclip.config import dump, load
from gradclip.errors import ConfigError

PAGE = (Path(__file__).parents[3] / "docs" / "reference" / "configuration.md").read_text(
    encoding="utf-8"
)


def block(language, start):
    """Return the first code block of a language that begins with some text."""
    (found, *_) = re.findall(rf"```{language}\n({re.escape(start)}.*?)```", PAGE, re.DOTALL)
    return found


def test_the_pipeline_of_the_page_loads_and_builds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text(block("yaml", "# train.yaml"), encoding="utf-8")
    config = load("train.yaml")
    dump(config, "train.toml")
    assert load("train.toml") == config
    assert [type(hook).__name__ for hook in config().registered_sets] == [
        "GradientClippingHook",
        "OptimizerHook",
    ]


def test_the_class_of_the_page_can_be_configured(monkeypatch):
    module = ModuleType("my_noise")
    monkeypatch.setitem(sys.modules, "my_noise", module)
    exec(block("python", "from gradclip.config import Ceiling"), vars(module))
    assert (module.hook.scale, module.hook.seed) == (0.1, 3)


def test_the_error_of_the_page_is_the_true_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mistake.yaml").write_text(block("yaml", "# mistake.yaml"), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load("mistake.yaml")
    assert str(caught.value) + "\n" == block("text", "error")
