"""Policies whose limit follows the norms: their formulas, and what they do not remember."""

import math
import warnings
from copy import deepcopy
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from every_policy import ADAPTIVE as POLICIES
from every_policy import FOLLOWING, SPIKING
from gradclip import EMAClip, GradientClipper, QuantileClip, ZScoreClip, presets, replay
from gradclip.clipping import flags
from gradclip.clipping.policies import Measurement, Scopes
from gradclip.clipping.policies.checks import decide_by_shared
from gradclip.errors import ArgumentValueError

each_policy = pytest.mark.parametrize("name", SPIKING)
either = pytest.mark.parametrize("on_spike", ["clip", "skip"])


def lognormal(steps, *scopes, seed=0, sigma=0.2):
    """Norms as a run has them, around 1."""
    return np.exp(np.random.default_rng(seed).normal(0, sigma, (steps, *scopes)))


def of_shape(policy, norms):
    """Give a policy by tensor three norms at each step."""
    if policy.scope == "group":
        return norms
    return np.stack([norms, 3 * norms, 0.1 * norms], 1)


class TestFormulas:
    """Parity with the sources, written here from their formulas."""

    def norms(self):
        norms = lognormal(400)
        norms[[60, 61, 200]] *= [5, 40, 3]
        norms[250:] *= np.linspace(1, 0.2, 150)
        return norms

    def test_zclip(self):
        norms, z_limit, decay = self.norms(), 2.5, 0.97
        seen, mean, variance, expected = [], None, None, []
        for norm in norms:
            if mean is None:
                seen.append(norm)
                expected.append(norm)
                if len(seen) == 25:
                    mean, variance = np.mean(seen), np.var(seen)
                continue
            deviation = math.sqrt(variance)
            z = (norm - mean) / (deviation + 1e-6)
            kept = norm
            if z > z_limit:
                kept = mean + z_limit * deviation / (z / z_limit)
            mean = decay * mean + (1 - decay) * kept
            variance = decay * variance + (1 - decay) * (kept - mean) ** 2
            expected.append(kept)
        found = replay(norms, presets.zclip_paper())
        assert np.allclose(found.norms_post, expected, rtol=1e-6, atol=0)
        assert found.clip_fraction > 0.01

    def test_autoclip(self):
        norms = self.norms()
        limits = [np.percentile(norms[max(0, n - 99) : n + 1], 10) for n in range(len(norms))]
        found = replay(norms, presets.autoclip(window=100))
        assert np.allclose(found.thresholds, limits, rtol=1e-12, atol=0)
        assert np.allclose(found.norms_post, np.minimum(norms, limits), rtol=1e-6, atol=0)

    def test_adagc(self):
        norms = np.stack([self.norms(), 2 * self.norms()[::-1], lognormal(400, seed=1)], 1)
        gammas, expected = np.full(3, np.inf), []
        for step, row in enumerate(norms):
            if step < 100:
                kept = row * min(1, 1.0 / np.linalg.norm(row))
                gammas = np.minimum(gammas, kept)
            else:
                kept = row * np.minimum(1, 1.05 * gammas / row)
                gammas = 0.98 * gammas + 0.02 * kept
            expected.append(kept)
        found = replay(norms, presets.adagc_paper())
        assert np.allclose(found.norms_post, expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("window", [1, 5, 16, 40])
    def test_quantiles_of_tensors_are_those_of_the_last_norms(self, window):
        """Each is found anew at every 16th step; an idle tensor has its own last norms."""
        norms = lognormal(200, 40)
        norms[np.random.default_rng(1).random(norms.shape) < 0.3] = 0
        policy = QuantileClip(scope="tensor", q=0.7, window=window, warmup=0)
        thresholds = replay(norms, policy).thresholds.numpy()
        renewed = np.zeros(40, dtype=int)
        for step in range(1, 200):
            for tensor in np.nonzero(thresholds[step] != thresholds[step - 1])[0]:
                shown = norms[: step + 1, tensor]
                last = shown[shown > 0][-window:]
                assert thresholds[step, tensor] == pytest.approx(np.quantile(last, 0.7), rel=1e-12)
                renewed[tensor] += 1
        assert renewed.min() >= 4

    def test_an_average_begins_as_the_median_of_warm_up(self):
        norms = lognormal(26)
        found = replay(norms, EMAClip(ratio=3.0, warmup=25))
        assert found.thresholds[:25].isinf().all()
        assert float(found.thresholds[25]) == pytest.approx(3 * np.median(norms[:25]), rel=1e-12)

    def test_targets_of_a_spike(self):
        norms = np.append(lognormal(40), 50.0)
        found = {
            target: replay(norms, ZScoreClip(target=target))
            for target in ("reciprocal", "threshold", "mean")
        }
        limit = float(found["threshold"].thresholds[-1])
        got = {target: float(each.norms_post[-1]) for target, each in found.items()}
        assert got["threshold"] == pytest.approx(limit, rel=1e-6)
        assert got["mean"] < got["reciprocal"] < 1.01 * got["mean"] < limit


@each_policy
class TestWhatIsNotRemembered:
    def test_a_nan_an_infinity_and_a_zero_leave_no_trace(self, name):
        """One NaN ended AutoClip and ZClip for good, and made OLMo-core skip 129 steps.

        One 0 froze a tensor in AdaGC for good.
        """
        policy = SPIKING[name]()
        norms = of_shape(policy, lognormal(150))
        wrong = np.array([np.nan, np.inf, 0, np.nan, 0])
        wrong = wrong if norms.ndim == 1 else wrong[:, None]
        bad = np.insert(norms, [3, 10, 80, 80, 149], wrong, 0)
        first = bad.reshape(len(bad), -1)[:, 0]
        sane = np.isfinite(first) & (first > 0)
        expected, found = replay(norms, policy), replay(bad, policy)
        assert torch.equal(found.coefficients[sane], expected.coefficients)
        assert torch.equal(found.skipped[sane], expected.skipped)
        assert found.skipped[~np.isfinite(first)].all()
        assert found.skipped.sum() < 0.3 * len(bad)
        spike = replay(np.concatenate([bad, bad[-1:] * 1000]), policy)
        assert spike.norms_post[-1].max() < 3 * norms.max()

    def test_the_first_norms_are_not_set_to_zero(self, name):
        """bitsandbytes began with zeros: 95 gradients were zeroed."""
        policy = SPIKING[name]()
        found = replay(of_shape(policy, lognormal(100)), policy)
        assert (found.coefficients[0] > 0.2).all()
        assert (found.coefficients[~found.skipped] > 0.1).all()


@pytest.mark.parametrize("name", [each for each in POLICIES if "tensor" in each or each == "adagc"])
def test_an_idle_tensor_has_a_limit_of_its_own_when_it_wakes(name):
    """The norm of what has no gradient is 0, for 200 steps; an expert froze for 5000."""
    policy = POLICIES[name]()
    norms = of_shape(policy, lognormal(600))
    norms[:200, 0] = 0
    found = replay(norms, policy)
    if name == "adagc":
        assert found.norms_post[-1, 0] > 0.1
    else:
        assert found.coefficients[200:].min() > 0.3
        assert found.coefficients[-50:, 0].mean() > 0.95


@either
@pytest.mark.parametrize("name", FOLLOWING)
def test_a_level_that_rises_for_good_ends_neither_stuck_nor_in_an_error(name, on_spike):
    policy = POLICIES[name](on_spike=on_spike, **({"q": 0.99} if "quantile" in name else {}))
    norms = lognormal(1000)
    norms[150:] *= 10
    found = replay(of_shape(policy, norms), policy)
    assert found.skipped.any() == (on_spike == "skip")
    in_a_row = max(map(len, "".join(map(str, found.skipped.int().tolist())).split("0")))
    assert in_a_row == (3 if on_spike == "skip" else 0)
    last = found.coefficients[-100:]
    assert last.mean() > 0.9
    assert (last > 0).to(torch.float64).mean() > 0.9


def test_a_spike_of_warm_up_does_not_spoil_the_start():
    norms = lognormal(60)
    norms[10] = 1000.0
    assert replay(norms, ZScoreClip()).thresholds[25] < 4.0
    paper = replay(norms, presets.zclip_paper())
    assert paper.thresholds[25] > 100.0


def test_fewer_skips_than_a_policy_asks_for_are_refused():
    weight = torch.nn.Parameter(torch.zeros(2))
    skipping = ZScoreClip(on_spike="skip", max_spikes=3)
    with pytest.raises(ArgumentValueError, match=r"skips=2 is below the max_spikes=3"):
        GradientClipper([weight], skipping, max_consecutive_skips=2)
    clipper = GradientClipper([weight], ZScoreClip(), max_consecutive_skips=2)
    with pytest.raises(ArgumentValueError, match="max_consecutive_skips=2"):
        clipper.policy = skipping
    clipper.policy = ZScoreClip(on_spike="skip", max_spikes=2)


def test_norms_without_scatter_allow_another_level():
    """A constant gradient has no deviation: a limit at its norm would be there for ever."""
    norms = [1e-3] * 60 + [1e-2] * 600
    for policy in (ZScoreClip(), ZScoreClip(on_spike="skip")):
        found = replay(norms, policy)
        assert found.coefficients[:60].min() == 1
        assert found.coefficients[-20:].min() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they are just at the limit, and nothing else clips them
        weight = nn.Parameter(torch.zeros(1))
        clipper = GradientClipper([weight], QuantileClip(warmup=3))
        for _ in range(40):
            weight.grad = torch.ones(1)
            clipper.clip()
        assert clipper.stats.steps == 40


class TestRecovery:
    """The table of the design: steps until the limit is at 3/4 of a level that rose tenfold."""

    TABLE: ClassVar = {
        "zscore": (ZScoreClip(scope="tensor"), 35, 0.02, 1.00),
        "ema 1.05": (EMAClip(ratio=1.05), 2190, 0.67, 0.96),
        "ema 2": (EMAClip(), 65, 0.0, 2.00),
        "quantile": (QuantileClip(window=200), 20, 0.09, 1.22),
    }

    @pytest.mark.parametrize("name", TABLE)
    def test_it_takes_as_many_steps_as_the_table_says(self, name):
        policy, steps, clipped, spike = self.TABLE[name]
        norms = lognormal(500 + int(1.3 * steps) + 10, 5)
        norms[500:] *= 10
        single = norms[:501].copy()
        single[500] = 100
        if policy.scope == "group":
            runs = [replay(column, policy) for column in norms.T]
            thresholds = torch.stack([run.thresholds for run in runs], 1)
            after = [float(replay(column, policy).norms_post[-1]) for column in single.T]
        else:
            thresholds = replay(norms, policy).thresholds
            after = replay(single, policy).norms_post[-1].tolist()
        there = (thresholds[500:] >= 7.5).to(torch.int64)
        assert np.median(there.argmax(0)) == pytest.approx(steps, rel=0.2)
        above = torch.from_numpy(norms)[150:500] > thresholds[150:500]
        assert float(above.to(torch.float64).mean()) == pytest.approx(clipped, rel=0.2, abs=0.01)
        assert np.median(after) == pytest.approx(spike, rel=0.2)

    def test_the_paper_never_recovers(self):
        norms = lognormal(700)
        norms[200:] *= 10
        assert replay(norms, presets.zclip_paper()).coefficients[200:].max() < 1

    def test_spikes_do_not_raise_the_limit(self):
        """smartclip's limit rose from 0.2 to 8.5, as it remembered spikes as they were."""
        norms = lognormal(400)
        norms[50::30] *= 100
        for name in ("zscore", "ema", "ema by tensor", "quantile"):
            found = replay(of_shape(POLICIES[name](), norms), POLICIES[name]())
            assert (found.thresholds[-1] < 3 * found.thresholds[49]).all(), name
        raw = replay(norms, ZScoreClip(feedback="raw"))
        assert raw.thresholds[-1] > 10 * raw.thresholds[49]


def test_cap_counts_from_the_first_step_and_beside_the_limit():
    norms = lognormal(60)
    norms[40] = 50
    for policy in (ZScoreClip(cap=0.9), EMAClip(cap=0.9, scope="group"), QuantileClip(cap=0.9)):
        found = replay(norms, policy)
        assert found.norms_post.max() <= 0.9
        assert found.norms_post[0] == pytest.approx(min(norms[0], 0.9), rel=1e-6)
        free = replay(norms, type(policy)(**policy.model_dump() | {"cap": None}))
        # What is remembered does not depend on it.
        assert torch.equal(found.thresholds, free.thresholds.clamp(max=0.9))


@pytest.mark.parametrize("name", SPIKING)
def test_where_reading_waits_the_answers_are_the_same(name, monkeypatch):
    policy = SPIKING[name]()
    norms = of_shape(policy, lognormal(120))
    norms[[60, 61]] *= 100
    looked = replay(norms, policy)
    monkeypatch.setattr(flags, "host_waits_for", lambda device: True)
    unlooked = replay(norms, policy)
    assert torch.equal(unlooked.thresholds, looked.thresholds)
    assert torch.equal(unlooked.skipped, looked.skipped)


@pytest.mark.parametrize("name", SPIKING)
def test_on_ranks_a_skip_follows_from_what_all_of_them_know(name):
    policy = SPIKING[name]()
    count = 1 if policy.scope == "group" else 3
    names = [f"w{number}" for number in range(count)]
    device = torch.device("cpu")
    state = policy.initial_state(Scopes(names, torch.ones(count, dtype=torch.int64), device))
    norms_S = torch.ones(count, dtype=torch.float64)
    flag, number = torch.tensor(True), torch.tensor(0)
    seen = Measurement(
        norms_S=norms_S, total_norm=norms_S.norm(), committed=flag, step=number, skips=number
    )
    decide_by_shared(policy, seen, state)  # an error if it did not


def test_replay_refuses_what_norms_do_not_tell():
    from gradclip import ValueClip  # noqa: PLC0415

    for policy, norms, message in (
        (ValueClip(clip_value=1.0), [1.0], "bounds elements"),
        (1.0, [[1.0, 2.0]], "one limit for all gradients, and norms has 2 at each step"),
        (1.0, [1.0, -1.0], "below 0 at step 1"),
        (1.0, [[[1.0]]], "expected .steps,. or .steps, scopes."),
        (1.0, ["one"], "cannot be read"),
        (1.0, [10**400], "cannot be read"),
        ({"*": 1.0}, [1.0], "policy"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            replay(norms, policy)


@pytest.mark.parametrize("name", FOLLOWING)
def test_what_is_taken_back_leaves_no_trace(name):
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    clipper = GradientClipper(weights, POLICIES[name]())

    def clip(norm):
        for weight in weights:
            weight.grad = torch.full_like(weight, norm)
        clipper.clip()
        return str(clipper.state_dict()["states"])

    with torch.inference_mode():  # what is made there serves outside of it, too
        clip(1.0)
    before = [clip(norm) for norm in lognormal(30)][-1]
    for _ in range(2):  # the second is told what the first left
        assert clip(2.0) != before
        clipper.take_back()
        assert str(clipper.state_dict()["states"]) == before
    # Neither a copy nor a state that was loaded since has a step to take back from another one.
    clip(2.0)
    after = str(clipper.state_dict())
    deepcopy(clipper).take_back()
    assert str(clipper.state_dict()) == after
    clipper.load_state_dict(clipper.state_dict())
    clipper.take_back()
    assert str(clipper.state_dict()) == after
