"""Lightning's Trainer: from the begin of a fit to its end, and what may happen in between."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning_runs import (
    BATCHES,
    LIMIT,
    QUIET,
    SAME,
    Keep,
    Manual,
    Net,
    adamw,
    fit,
    fused_adamw,
    half,
    loader,
    momentum,
    trainer,
    weights,
)

import gradclip
from gradclip import ObserveClip
from gradclip.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    DoubleClippingError,
    NonFiniteGradientError,
    StateError,
)
from gradclip.integrations.lightning import GradientClippingCallback

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*weights_only")]


# Checkpoints that were saved before there was a clipper, or are not for it.


@pytest.mark.parametrize("clipping", [True, False])
def test_a_learning_rate_can_be_searched_first(tmp_path, clipping):
    callbacks = [GradientClippingCallback(LIMIT)] if clipping else []
    model = Net(momentum)
    model.lr = 0.1
    made = trainer(*callbacks, default_root_dir=tmp_path)
    Tuner(made).lr_find(model, loader(), num_training=5, early_stop_threshold=None)
    made.fit(model, loader())
    assert not clipping or callbacks[0].clippers[0].step == BATCHES


def test_what_was_saved_before_fitting_is_resumed(tmp_path):
    made = trainer(GradientClippingCallback(LIMIT), default_root_dir=tmp_path)
    made.validate(Validated(), loader(), verbose=False)
    made.save_checkpoint(tmp_path / "before.ckpt")
    clipping = GradientClippingCallback(LIMIT)
    trainer(clipping).fit(Net(), loader(), ckpt_path=tmp_path / "before.ckpt")
    assert clipping.clippers[0].step == BATCHES


class Validated(Net):
    def validation_step(self, batch):
        pass

    test_step = validation_step


def saved(tmp_path):
    made = trainer(GradientClippingCallback(LIMIT))
    made.fit(Net(), loader())
    made.save_checkpoint(tmp_path / "one.ckpt")
    return tmp_path / "one.ckpt"


def test_a_history_that_was_refused_is_forgotten(tmp_path):
    clipping = GradientClippingCallback({"up.*": 1.0, "*": None})
    with pytest.raises(StateError, match=r"callbacks'\]\.pop\('GradientClippingCallback'\)"):
        trainer(clipping, max_epochs=2).fit(Net(), loader(), ckpt_path=saved(tmp_path))
    trainer(clipping).fit(Net(), loader())
    assert clipping.clippers[0].step == BATCHES


def test_the_way_out_that_the_error_names(tmp_path):
    path = saved(tmp_path)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["callbacks"].pop("GradientClippingCallback")
    torch.save(checkpoint, path)
    clipping = GradientClippingCallback({"up.*": 1.0, "*": None})
    trainer(clipping, max_epochs=2).fit(Net(), loader(), ckpt_path=path)
    assert clipping.clippers[0].step == BATCHES


def test_a_test_of_a_checkpoint_leaves_no_history(tmp_path):
    clipping = GradientClippingCallback(LIMIT)
    made = trainer(clipping)
    made.test(Validated(), loader(), ckpt_path=saved(tmp_path), verbose=False)
    made.fit(Net(), loader())
    assert clipping.clippers[0].step == BATCHES


@pytest.mark.parametrize("wrong", [{"clippers": None}, {"other": []}, {"clippers": [{}]}])
def test_a_damaged_history_is_refused(wrong):
    clipping = GradientClippingCallback(LIMIT)
    clipping.load_state_dict(wrong)
    with pytest.raises(StateError):
        fit(Net(), clipping)


def test_of_several_histories_none_is_taken_where_one_is_damaged():
    clipping = GradientClippingCallback(LIMIT)
    fit(Manual(), clipping)
    state = copy.deepcopy(clipping.state_dict())
    state["clippers"][0]["step"], state["clippers"][1]["version"] = 99, 7
    again, seen = GradientClippingCallback(LIMIT), []

    class Loads(Callback):
        def on_train_start(self, trainer, pl_module):
            with pytest.raises(StateError):
                again.load_state_dict(state)
            seen.extend(clipper.step for clipper in again.clippers)

    fit(Manual(), again, Loads())
    assert seen == [0, 0]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_it_can_be_copied_after_a_fit(way):
    clipping = GradientClippingCallback(LIMIT)
    fit(Net(), clipping)
    assert way(clipping).last.to_host() == clipping.last.to_host()


def test_the_last_result_is_of_this_fit():
    clipping = GradientClippingCallback(LIMIT)
    seen = []

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(clipping.last)

    for _ in range(2):
        fit(Net(), clipping, Looks())
    assert seen == [None, None]


# Limits by name.


@pytest.mark.parametrize("make", [adamw, fused_adamw])
@pytest.mark.parametrize("plugins", [False, True], ids=["float32", "scaler"])
def test_limits_by_name(make, plugins):
    clipping = GradientClippingCallback({"up.*": 0.1, "norm.*": None, "*": 0.2})
    options = {"plugins": [half()]} if plugins else {}
    fit(Net(make, broken={3: torch.inf}), clipping, Keep(clipping), **options)
    groups = clipping.last.to_host().groups
    assert groups["up.*"].norm_post <= 0.1
    assert groups["*"].norm_post <= 0.2


def test_limits_by_name_are_for_all_optimizers_together():
    """Of which one has names of its own, relative to a part, and one has none."""

    class Named(Manual):
        def configure_optimizers(self):
            return momentum(self.up.named_parameters()), adamw(self.down.parameters())

    clipping = GradientClippingCallback({"up.*": 0.1, "down.*": 0.2, "*": None})
    fit(Named(), clipping)
    up, down = (clipper.last.to_host().groups for clipper in clipping.clippers)
    assert 0 < up["up.*"].norm_post <= 0.1
    assert 0 < down["down.*"].norm_post <= 0.2
    with pytest.raises(ArgumentValueError, match=r"the pattern 'upp\.\*' of policy matches no"):
        fit(Named(), GradientClippingCallback({"upp.*": 0.1, "*": None}))


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.up)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.up, optimizer)


def test_limits_by_name_of_what_is_frozen_at_first():
    def make(parameters):
        return momentum([p for _, p in parameters if p.requires_grad])

    class Frozen(Net):
        def on_after_backward(self):
            pass

    clipping = GradientClippingCallback({"up.*": 0.1, "*": 0.2})
    fit(Frozen(make), clipping, Unfreezes(), max_epochs=2)
    assert 0 < clipping.last.to_host().groups["up.*"].norm_post <= 0.1


# Who steps, and who clips.


class Raw(Net):
    automatic_optimization = False

    def training_step(self, batch):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss_of(batch))
        optimizer.step()


def test_a_step_that_lightning_does_not_see_is_refused():
    model = Raw()
    model.automatic_optimization = False
    before = weights(model)
    with pytest.raises(ArgumentValueError, match="not with use_pl_optimizer=False"):
        fit(model, GradientClippingCallback(LIMIT))
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def test_to_measure_beside_lightnings_clipping_is_fine():
    observing = GradientClippingCallback(ObserveClip())
    model, reference = Net(), Net()
    keep = Keep(observing)
    fit(model, observing, keep, gradient_clip_val=LIMIT)
    fit(reference, gradient_clip_val=LIMIT)
    torch.testing.assert_close(weights(model), weights(reference), **SAME)
    assert all(each.norm_pre == each.norm_post > LIMIT for each in keep.results)


def test_to_measure_beside_another_is_fine():
    class Second(GradientClippingCallback):
        """Lightning takes one callback of a class."""

    clipping, observing = GradientClippingCallback(LIMIT), Second(ObserveClip())
    fit(Net(), clipping, observing)
    assert observing.last.norm_pre == clipping.last.norm_post
    with pytest.raises(DoubleClippingError):
        fit(Net(), GradientClippingCallback(LIMIT), Second(1.0))


def test_an_override_that_was_set_on_the_module_is_found():
    model = Net()
    model.configure_gradient_clipping = lambda *_, **__: None
    with pytest.raises(DoubleClippingError, match="which was set on it"):
        fit(model, GradientClippingCallback(LIMIT))


class Hookless(torch.optim.Optimizer):
    def __init__(self, optimizer):
        self.optimizer = optimizer
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.defaults = optimizer.defaults

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_an_optimizer_without_hooks_is_clipped_and_withheld():
    """As timm's Lookahead, whose ``__init__`` does not call that of torch."""
    given = []

    def make(parameters):
        given.append(Hookless(momentum(parameters)))
        return given[-1]

    clipping = GradientClippingCallback(LIMIT)
    keep = Keep(clipping)
    model = Net(make, {3: torch.nan})
    fit(model, clipping, keep)
    assert [bool(each.skipped) for each in keep.results[:5]] == [False, False, False, True, False]
    assert all(torch.isfinite(each).all() for each in model.parameters())
    assert "step" not in vars(given[0])


def test_all_are_let_go_where_one_that_came_later_is_refused():
    class Swaps(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.strategy.optimizers = [torch.optim.LBFGS(pl_module.parameters())]

    model = Net(momentum)
    optimizers = []
    clipping = GradientClippingCallback(LIMIT)

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            optimizers.extend(trainer.optimizers)

    with pytest.raises(ArgumentTypeError, match="LBFGS"):
        fit(model, clipping, Looks(), Swaps())
    assert not optimizers[0]._optimizer_step_pre_hooks
    gradclip.attach(optimizers[0], 1.0)


# What is logged.


class FromIterator(Net):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.loss_of(batch)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_takes_the_iterator_is_logged_too(tmp_path):
    logger = CSVLogger(tmp_path)
    made = fit(FromIterator(), GradientClippingCallback(LIMIT), logger=logger)
    assert made.logged_metrics["gradclip/norm_pre"] > 0
    assert 0 < made.logged_metrics["gradclip/clip_fraction"] <= 1


# Between batches.


class Extra(Net):
    """Steps by itself when an epoch has ended, which is no training of Lightning's."""

    def __init__(self, *args, left_out=None, **options):
        super().__init__(*args, **options)
        self.left_out, self.moved = left_out, None

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == self.left_out else None

    def on_train_epoch_end(self):
        optimizer = self.optimizers(use_pl_optimizer=False)
        before = weights(self)
        optimizer.zero_grad()
        self.loss_of(next(iter(loader()))).backward()
        optimizer.step()
        self.moved = any(not torch.equal(before[name], w) for name, w in weights(self).items())


@pytest.mark.parametrize("left_out", [None, 2])
@pytest.mark.parametrize("plugins", [False, True], ids=["float32", "scaler"])
def test_a_step_between_batches_is_ones_own(left_out, plugins):
    """Also where Lightning left a batch before its end, or a scaler asked for no last step."""
    model = Extra(momentum, left_out=left_out, broken={BATCHES - 1: torch.inf})
    fit(model, GradientClippingCallback(LIMIT), **({"plugins": [half()]} if plugins else {}))
    assert model.moved


def test_a_history_of_ones_own_is_kept_until_a_fit():
    first = GradientClippingCallback(LIMIT)
    fit(Net(), first)
    clipping = GradientClippingCallback(LIMIT)
    clipping.load_state_dict(first.state_dict())
    made = trainer(clipping)
    made.validate(Validated(), loader(), verbose=False)
    made.fit(Net(), loader())
    assert clipping.clippers[0].step == 2 * BATCHES


@pytest.mark.parametrize("make", [momentum, fused_adamw])
def test_it_fits_again_after_a_step_that_was_unscaled_and_not_made(make):
    """With the optimizer of before, which the scaler would not unscale a second time."""
    model, plugin = Net(broken={0: torch.inf}), half()
    optimizer = make(model.named_parameters())
    model.make = lambda _: optimizer
    clipping = GradientClippingCallback(LIMIT, nonfinite="raise")
    with pytest.raises(NonFiniteGradientError):
        fit(model, clipping, plugins=[plugin])
    fit(model, clipping, plugins=[plugin])
    assert clipping.clippers[0].step == BATCHES
    assert clipping.last.norm_pre < 100  # a scaled one would be 1024 times as much
