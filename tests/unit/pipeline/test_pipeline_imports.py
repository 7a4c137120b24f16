import subprocess
import sys

import pytest

import gradclip.pipeline
from gradclip.errors import MissingDependencyError


def test_hooks_need_no_accelerate_and_the_package_no_torch():
    code = (
        "import sys, gradclip.pipeline; assert 'torch' not in sys.modules;"
        "import gradclip.pipeline.hooks; assert 'accelerate' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_trainer_without_accelerate_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "gradclip.pipeline.trainer", raising=False)
    with pytest.raises(MissingDependencyError, match=r"gradclip\[pipeline\]"):
        gradclip.pipeline.HookBasedTrainer  # noqa: B018 - the attribute is imported


def test_every_public_name_is_there():
    for name in gradclip.pipeline.__all__:
        assert name in dir(gradclip.pipeline)
        assert getattr(gradclip.pipeline, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        gradclip.pipeline.Trainer  # noqa: B018
