import subprocess
import sys
from importlib import import_module

import pytest

import gradclip.pipeline
from gradclip.errors import MissingDependencyError
from patience import seconds


def test_hooks_need_no_accelerate_and_the_package_no_torch():
    code = (
        "import sys, gradclip.pipeline; assert 'torch' not in sys.modules;"
        "import gradclip.pipeline.hooks; assert 'accelerate' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=seconds())


def test_the_trainer_without_accelerate_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "gradclip.pipeline.hook_based_trainer", raising=False)
    with pytest.raises(MissingDependencyError, match=r"gradclip\[pipeline\]"):
        gradclip.pipeline.HookBasedTrainer  # noqa: B018 - the attribute is imported


def test_the_adapter_without_robo_orchard_lab_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "robo_orchard_lab", None)
    monkeypatch.delitem(sys.modules, "gradclip.integrations.robo_orchard", raising=False)
    with pytest.raises(MissingDependencyError, match=r"pip install robo-orchard-lab==0\.4\.0"):
        import_module("gradclip.integrations.robo_orchard")


def test_every_public_name_is_there():
    for name in gradclip.pipeline.__all__:
        assert name in dir(gradclip.pipeline)
        assert getattr(gradclip.pipeline, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        gradclip.pipeline.Trainer  # noqa: B018
