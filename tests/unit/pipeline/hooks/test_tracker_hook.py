"""What clipping did, in the trackers of the accelerator: the names, when, and by whom."""

import json
import math
import re
import struct
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import nn

from gradclip.clipping import flags
from gradclip.clipping.kernels import device, foreach
from gradclip.config import dump, load
from gradclip.diagnostics import read_log
from gradclip.errors import ArgumentValueError
from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookListConfig,
    PipelineHookArgs,
    PipelineHooks,
    TrackerHook,
    TrackerHookConfig,
)
from gradclip.record.ring import LAG

NORMS = [5.0, 0.5, math.nan, 10.0, 0.6, 2.0, 50.0]
GRADIENTS = [(0.6 * norm, 0.8 * norm) for norm in NORMS]


class Kept(GeneralTracker):
    """Keeps what is logged, and refuses what MLflow refuses where it has its name."""

    requires_logging_directory = False

    def __init__(self, name="kept"):
        self.name, self.logged = name, []
        super().__init__()

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        assert self.name != "mlflow" or all(re.fullmatch(r"[\w\-. :/]+", name) for name in values)
        self.logged.append((step, values))


def trained(accelerator, policy, every, **options):
    """Train a model of two layers, whose gradients are the batches."""
    model = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in ("body", "head")})

    def forward(model, batch):
        return None, sum(m.weight.sum() * g for m, g in zip(model.values(), batch, strict=True))

    trainer = HookBasedTrainer(
        accelerator,
        model,
        GRADIENTS,
        SimpleBatchProcessor.from_callable(forward),
        torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=TrackerHookConfig(every=every),
        grad_clip=GradientClippingHookConfig(policy=policy, **options),
        max_epoch=1,
    )
    trainer()


def tracked(*names):
    trackers = [Kept(name) for name in names]
    accelerator = Accelerator(cpu=True, log_with=trackers)
    accelerator.init_trackers("test")
    return accelerator, [each.logged for each in trackers]


class OnCpu:
    """Numbers that are on the host, and wait all the same."""

    def __init__(self, values):
        self._values = values.clone()

    def read(self):
        return self._values.reshape(-1).tolist()


@pytest.mark.smoke
@pytest.mark.parametrize("lag", [0, LAG])
def test_what_the_steps_since_the_last_log_came_to(monkeypatch, lag):
    if lag:  # as where to read a number would make the host wait
        monkeypatch.setattr(foreach, "_on_cpu", lambda batch: False)
        monkeypatch.setattr(flags, "host_waits_for", lambda device: True)
        monkeypatch.setattr(device, "HostCopy", OnCpu)
    accelerator, (logged,) = tracked("kept")

    trained(accelerator, 1.0, every=3)

    names = ("norm_pre", "norm_post", "norm_max", "clip_fraction", "skipped")
    wanted = [
        (2, (math.nan, 0.0, 5.0, 1 / 3, 1)),
        (5, (2.0, 1.0, 10.0, 2 / 3, 0)),
        (6, (50.0, 1.0, 50.0, 1.0, 0)),  # the end of the loop
    ]
    # A tracker such as W&B drops what is logged at a step before its last one.
    assert [step for step, _ in logged] == [min(step + lag, 6) for step, _ in wanted]
    for (_, numbers), (_, values) in zip(logged, wanted, strict=True):
        assert list(numbers) == [f"gradclip/{name}" for name in names]
        assert list(numbers.values()) == pytest.approx(values, rel=1e-6, nan_ok=True)


def test_each_pattern_has_its_norm_and_mlflow_gets_names_that_it_takes():
    accelerator, (kept, mlflow) = tracked("kept", "mlflow")

    trained(accelerator, {"head*": 0.5, "*": 1.0}, every=2)

    (step, numbers), *_ = kept
    assert step == 1
    by_pattern = {name: value for name, value in numbers.items() if name.count("/") == 2}
    assert by_pattern == pytest.approx(
        {"gradclip/head*/norm_pre": 0.4, "gradclip/*/norm_pre": 0.3}, rel=1e-6
    )
    cleaned = [(step, {n.replace("*", "_"): v for n, v in each.items()}) for step, each in kept]
    assert str(mlflow) == str(cleaned)  # some are NaN


def test_tensorboard_has_them_and_its_file_is_read_back(tmp_path):
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("test")

    trained(accelerator, 1.0, every=1)
    accelerator.end_training()

    (file,) = tmp_path.rglob("events.out.tfevents*")
    (run,) = read_log(file)
    assert (run.format, run.norm_key) == ("TensorBoard events", "gradclip/norm_pre")
    assert list(run.steps) == list(range(7))
    assert list(run.norms) == pytest.approx(NORMS, rel=1e-6, nan_ok=True)
    for name in ("norm_post", "norm_max", "clip_fraction", "skipped"):
        (run,) = read_log(file, norm_key=f"gradclip/{name}")
        assert len(run.norms) == 7


@pytest.mark.framework
@pytest.mark.skipif(
    find_spec("wandb") is None, reason="needs wandb: make test-integrations installs it"
)
def test_wandb_has_them_and_drops_none(tmp_path, monkeypatch):
    for name in ("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    for name in ("SILENT", "DISABLE_GIT", "_DISABLE_STATS"):
        monkeypatch.setenv(f"WANDB_{name}", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    accelerator = Accelerator(cpu=True, log_with="wandb")
    accelerator.init_trackers("test")

    trained(accelerator, {"head*": 0.5, "*": 1.0}, every=3)
    accelerator.end_training()

    (file,) = tmp_path.rglob("*.wandb")
    steps = [row for row in history(file) if "gradclip/norm_pre" in row]
    assert [row["_step"] for row in steps] == [2, 5, 6]
    assert [row["gradclip/norm_max"] for row in steps] == pytest.approx([5.0, 10.0, 50.0])
    assert steps[2]["gradclip/head*/norm_pre"] == pytest.approx(40.0)


def history(file):
    """Yield what W&B would upload: records in blocks of 32 KiB, as LevelDB's log has them."""
    from wandb.proto.wandb_internal_pb2 import Record  # noqa: PLC0415 - where it is installed

    data, at, pieces = file.read_bytes(), 7, b""
    while at + 7 < len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        pieces, at = pieces + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in {1, 4}:  # whole, or the last piece
            items = Record.FromString(pieces).history.item
            pieces = b""
            yield {
                "/".join(each.nested_key) or each.key: json.loads(each.value_json) for each in items
            }


def test_only_the_main_process_logs():
    (hook, logs) = (TrackerHookConfig(every=1)(), [])
    tracker = SimpleNamespace(name="kept", log=lambda values, step: logs.append(step))
    weight = nn.Parameter(torch.zeros(2))
    clipping = GradientClippingHookConfig(max_norm=1.0)
    hooks = PipelineHooks.from_hooks([clipping, hook])
    for is_main in (False, True):
        accelerator = SimpleNamespace(
            is_main_process=is_main,
            sync_gradients=True,
            scaler=None,
            trackers=[tracker],
            distributed_type="NO",
            torch_device_mesh=None,
        )
        arg = PipelineHookArgs(accelerator=accelerator, optimizer=torch.optim.SGD([weight]))
        with hooks.begin("on_loop", arg), hooks.begin("on_step", arg):
            weight.grad = torch.tensor([3.0, 4.0])
            with hooks.begin("on_optimizer_step", arg):
                pass
        assert logs == [0] * is_main


def test_nothing_to_log_and_nowhere_to_log_are_said():
    hooks = TrackerHookConfig()()
    arg = PipelineHookArgs()
    with pytest.raises(ArgumentValueError, match="no hook clips"), hooks.begin("on_loop", arg):
        pass
    with pytest.warns(UserWarning, match="the accelerator has no tracker"):
        trained(Accelerator(cpu=True), 1.0, every=2)


def test_it_stands_in_a_file(tmp_path):
    path = tmp_path / "hooks.yaml"
    dump(HookListConfig(hooks=(TrackerHookConfig(every=5),)), path)
    (config,) = load(path).hooks
    assert config == TrackerHookConfig(every=5)
    assert isinstance(config(), TrackerHook)
