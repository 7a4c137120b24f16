"""Ways in that need no framework: loops of one's own, and gradclip's trainer."""

from functools import partial

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tiny_model import TinyModel, batches, sgd, weights
from trained import Trained

import gradclip
from gradclip import NormClip
from gradclip.integrations.accelerate import AcceleratorClipper
from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    PipelineHooks,
    SaveCheckpointConfig,
    TrackerHookConfig,
)


def function(feature, gradients, folder):
    """The function has arguments for a norm alone: any other policy is given as ``max_norm``."""
    model = TinyModel()
    optimizer = sgd(model)
    policy = feature.clip.get("policy")
    limit = {"max_norm": policy} if policy is not None else feature.clip
    if isinstance(policy, NormClip):
        fields = {name: getattr(policy, name) for name in ("max_norm", "norm_type")}
        limit = fields if policy == NormClip(**fields) else limit

    def step():
        gradclip.clip_grad_norm_(model.parameters(), **limit, error_if_nonfinite=True)
        optimizer.step()

    return Trained(_stepped(model, optimizer, gradients, step))


def clipper(feature, gradients, folder):
    model = TinyModel()
    optimizer = sgd(model)
    by_group = isinstance(feature.clip.get("policy"), list)
    clipper = gradclip.GradientClipper(optimizer if by_group else model, **feature.clip)

    def step():
        clipper.note(lr=1.0)  # it knows the model alone
        with gradclip.withhold(optimizer, clipper.clip().skipped):
            optimizer.step()

    assign = partial(feature.assign, clipper)
    return _kept(model, optimizer, clipper, folder, gradients, step, assign)


def attached(feature, gradients, folder, *, fused=False):
    model = TinyModel()
    optimizer = sgd(model, fused=fused)
    handle = gradclip.attach(optimizer, **feature.clip)
    assign = partial(feature.assign, handle)
    after = _kept(model, optimizer, handle.clipper, folder, gradients, optimizer.step, assign)
    return Trained(after, handle.stats)


def attached_to_fused(feature, gradients, folder):
    return attached(feature, gradients, folder, fused=True)


def _stepped(model, optimizer, gradients, step, assign=lambda after: None):
    after = []
    for batch in batches(gradients):
        model(**batch).backward()
        step()
        optimizer.zero_grad()
        after.append(weights(model))
        assign(after)
    return after


def _kept(model, optimizer, clipper, folder, gradients, step, assign):
    """Train, and save what a loop of one's own saves: the clipper's history is a part of it."""
    path = folder / "run.pt"
    parts = {"model": model, "optimizer": optimizer, "clipper": clipper}
    if path.exists():
        for name, state in torch.load(path, weights_only=True).items():
            parts[name].load_state_dict(state)
    after = _stepped(model, optimizer, gradients, step, assign)
    torch.save({name: part.state_dict() for name, part in parts.items()}, path)
    return Trained(after, clipper.stats)


def on_accelerate(feature, gradients, folder):
    accelerator = Accelerator(cpu=True)
    model = TinyModel()
    prepared, optimizer = accelerator.prepare(model, sgd(model))
    clipper = AcceleratorClipper(accelerator, optimizer, model=prepared, **feature.clip)
    accelerator.register_for_checkpointing(clipper)
    path = folder / "run"
    if path.exists():
        accelerator.load_state(path)
    after = []
    for batch in batches(gradients):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch))
            clipper.clip()
            optimizer.step()
            optimizer.zero_grad()
        after.append(weights(model))
        feature.assign(clipper, after)
    accelerator.save_state(path)
    return Trained(after, clipper.stats)


class LastLog(GeneralTracker):
    """Keeps the last log."""

    name = "last log"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.logged = None

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **_):
        self.logged = values


def hook(feature, gradients, folder):
    model = TinyModel()
    after = []
    note = PipelineHooks()
    clipping = GradientClippingHookConfig(**feature.fields)()

    def noted(arg):
        after.append(weights(model))
        feature.assign(clipping, after)

    note.register_hook("on_step", HookContext.from_callable("note", after=noted))
    resumed = any(folder.iterdir())
    accelerator = Accelerator(cpu=True, log_with=(last := LastLog()))
    accelerator.init_trackers("grid")
    HookBasedTrainer(
        accelerator,
        model,
        batches(gradients),
        SimpleBatchProcessor.from_callable(lambda model, batch: (None, model(**batch))),
        sgd(model),
        hooks=[
            note,
            SaveCheckpointConfig(save_root=str(folder)),
            TrackerHookConfig(every=len(gradients)),
        ],
        grad_clip=clipping,
        max_epoch=2 if resumed else 1,  # each run is an epoch
        resume_from=folder if resumed else None,
    )()
    return Trained(after, clipping.stats, last.logged)
