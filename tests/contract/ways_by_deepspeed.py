"""The way in through DeepSpeed: lowered before the engine is made, and observed after each step."""

from functools import cache

from deepspeed_runs import accelerator, on_two
from features import FEATURES
from tiny_model import TinyModel, batches, sgd, weights
from trained import Trained

from gradclip.integrations.deepspeed import EngineWatch, lower, observe


def lowered(feature, gradients, folder):
    """Return the outcome of one launch for all features, which takes longer than they do."""
    outcome = launched()[feature.name]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


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
            outcomes[feature.name] = _trained(feature)
        except Exception as error:  # noqa: BLE001 - the cell that it belongs to raises it
            outcomes[feature.name] = error
    return outcomes


def _trained(feature):
    accelerated = accelerator(stage=2)
    lower(accelerated, **feature.clip)
    model = TinyModel()
    engine, _ = accelerated.prepare(model, sgd(model))
    watch = EngineWatch(engine, **feature.clip)
    after = []
    for batch in batches(feature.gradients):
        accelerated.backward(engine(**batch))
        observe(engine, **feature.clip)
        watch.observe()
        after.append(weights(engine.module))
        feature.assign(watch, after)
    return Trained(after, watch.stats)
