"""Every way into gradclip has every feature, or refuses it: see ``ways_in.py``, ``features.py``."""

import gc
from importlib.util import find_spec

import pytest
from accelerate.state import AcceleratorState, GradientState
from features import FEATURES
from tiny_model import MOMENTUM
from trained import Trained, told_by_record
from ways_in import PAGE, WAYS, Absent, Fault, Refusal, filled

CLOSE = {"rel": 1e-5, "abs": 1e-5}


def marks(way, feature):
    cell = way.cells.get(feature.name)
    if isinstance(cell, Fault):
        yield pytest.mark.xfail(reason=cell.why, raises=cell.error, strict=True)
    if way.needs is not None:
        yield pytest.mark.framework
        yield pytest.mark.skipif(
            find_spec(way.needs) is None,
            reason=f"needs {way.needs}: make test-integrations or test-robo-orchard installs it",
        )
    elif feature is FEATURES[0]:
        yield pytest.mark.smoke


CELLS = [
    pytest.param(
        way,
        feature,
        id=f"{way.name}-{feature.name}".replace("`", ""),
        marks=[*marks(way, feature)],
    )
    for way in WAYS
    for feature in FEATURES
    if not isinstance(way.cells.get(feature.name), Absent)
]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trained(way, feature, folder):
    """Return what one run, or two, came to."""
    train, feature = way.train(), feature.recording(folder / "record")
    (folder / "run").mkdir()
    runs = [feature.gradients]
    if (first := feature.interrupted_after) is not None:
        runs = [feature.gradients[:first], feature.gradients[first:]]
    outcomes: list[Trained] = []
    for run in runs:
        outcomes.append(train(feature, run, folder / "run"))
        gc.collect()  # as where Python ends: what was not closed is written
    *before, last = outcomes
    steps = [*(step for run in before for step in run), *last]
    if feature.told is not None and feature.told[0] == "recorded" and last.recorded is None:
        last.recorded = told_by_record(folder / "record")
    return Trained(steps, last.stats, last.logged, last.recorded)


def added(one, other, factor):
    return {
        name: [a + factor * b for a, b in zip(layer, other[name], strict=True)]
        for name, layer in one.items()
    }


@pytest.mark.parametrize(("way", "feature"), CELLS)
def test_a_way_in_has_a_feature_or_refuses_it(way, feature, tmp_path):
    cell = way.cells.get(feature.name)
    if isinstance(cell, Refusal):
        with pytest.raises(cell.error) as caught:
            trained(way, feature, tmp_path)
        assert (caught.type, caught.value.code) == (cell.error, cell.code)
        return

    found = trained(way, feature, tmp_path)
    before = exact = velocity = {"body": [0.0] * 3, "head": [0.0] * 2}
    for after, step in zip(found, feature.expected(feature.gradients), strict=True):
        if step is None:
            assert after == before
        else:
            velocity = added(step, velocity, MOMENTUM)
            exact = added(exact, velocity, -1.0)
        for name, wanted in exact.items():
            assert after[name] == pytest.approx(wanted, **CLOSE)
        before = after
    if feature.told is not None:
        what, wanted = feature.told
        told = vars(found.stats) if what == "stats" else vars(found)[what]
        if what == "recorded":  # of parameters DeepSpeed tells nothing; a norm has three digits
            norm = wanted["head.weight"]
            wanted = {name: value for name, value in wanted.items() if name != "head.weight"}
            assert way.needs == "deepspeed" or told["head.weight"] == pytest.approx(norm, rel=5e-3)
        assert {name: told[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)


def test_no_column_passes_with_the_policy_of_another():
    whole = [feature for feature in FEATURES if feature.interrupted_after is None]
    steps = [str(feature.expected(feature.gradients)) for feature in whole]
    assert len(set(steps)) == len(whole)


def test_the_page_shows_the_grid():
    page = PAGE.read_text(encoding="utf-8")
    assert "<!-- ways in: generated" in page
    assert filled(page) == page
