"""The way in through DeepSpeed: lowered before the engine is made, and observed after each step."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from deepspeed_runs import accelerator, on_two
from features import FEATURES
from tiny_model import TinyModel, batches, sgd, weights
from trained import Trained, told_by_record

from gradclip.integrations.deepspeed import EngineWatch, lower, observe


def lowered(feature, gradients, folder):
    """Return the outcome of one launch for all features, which takes longer than they do."""
    outcome = launched()[feature.name]
    if isinstance(outcome, Exception):
        raise outcome
    first = gradients[0] is feature.gradients[0]
    steps = outcome[: len(gradients)] if first else outcome[-len(gradients) :]
    return Trained(steps, outcome.stats, outcome.logged, outcome.recorded)


@cache
def launched():
    try:
        return on_two(_all_features)
    except Exception as error:  # noqa: BLE001 - or each cell would launch again, and wait
        return dict.fromkeys((feature.name for feature in FEATURES), error)


def _all_features(rank):
    outcomes = {}
    for feature in FEATURES:
        try:
            with TemporaryDirectory() as folder:
                outcome = outcomes[feature.name] = _trained(feature.recording(Path(folder)))
                if feature.told is not None and feature.told[0] == "recorded" and rank == 0:
                    outcome.recorded = told_by_record(folder)
        except Exception as error:  # noqa: BLE001 - the cell that it belongs to raises it
            outcomes[feature.name] = error
    return outcomes


def _trained(feature):
    accelerated = accelerator(stage=2)
    clip = {name: value for name, value in feature.clip.items() if name != "record"}
    lower(accelerated, **clip)
    model = TinyModel()
    engine, _ = accelerated.prepare(model, sgd(model))
    watch = EngineWatch(engine, **feature.clip)
    after = []
    for batch in batches(feature.gradients):
        accelerated.backward(engine(**batch))
        observe(engine, **clip)
        watch.observe()
        after.append(weights(engine.module))
        feature.assign(watch, after)
    watch.close()
    return Trained(after, watch.stats)
