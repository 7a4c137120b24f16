"""The trainer on several processes: it ends where one ends, resumes, and fails together."""

import math
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from gradclip.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CheckpointError,
    NonFiniteGradientError,
    TooManySkipsError,
)
from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.checkpoint.own_state import keeps_its_state
from gradclip.pipeline.checkpoint.weights import gathered_weights, load_weights, write_weights
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    LossTrackerConfig,
    PipelineHookArgs,
    PipelineHooks,
    SaveCheckpointConfig,
)
from gradclip.pipeline.preparation import prepared_dataloader
from pairwise import ALL_COMBINATIONS
from processes import together

GLOBAL_BATCH, SAMPLES = 8, 48
ENGINES = ["DDP", "FSDP2", "FSDP2 by Accelerate"]


def forward(model, batch):
    inputs, targets = batch
    outputs = model(inputs)
    return outputs, nn.functional.mse_loss(outputs, targets)


def samples(bad=None):
    """Samples of which one, the last of the third global batch, may be no number."""
    inputs = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(1))
    if bad is not None:
        inputs[3 * GLOBAL_BATCH - 1, 0] = bad
    return TensorDataset(inputs, 5 * inputs.sum(1, keepdim=True))


def accelerator_of(engine, accumulate):
    plugin = None
    if engine == "FSDP2 by Accelerate":
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        fsdp_plugin=plugin,
        step_scheduler_with_optimizer=False,  # or it steps once for each process
    )
    if plugin is None:
        return accelerator
    # Accelerate goes this way on accelerators alone; all behind this switch is its own code.
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


class Remembering:
    """No DataLoader: gives a process its share of each batch, and knows its place."""

    def __init__(self, dataset, batch_size, shuffle):
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.dataset, self.mine = dataset, slice(rank * batch_size, (rank + 1) * batch_size)
        self.batch_size = batch_size * size
        self.place = {"seed": int(torch.randint(10**6, ())), "batches": 0}

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.place["seed"])
        order = torch.randperm(len(self.dataset), generator=generator).split(self.batch_size)
        for items in order[self.place["batches"] :]:
            self.place["batches"] += 1
            yield self.dataset[items[self.mine]]
        self.place = {"seed": self.place["seed"] + 1, "batches": 0}

    def state_dict(self):
        return self.place

    def load_state_dict(self, state):
        self.place = dict(state)


def of_torchdata(dataset, batch_size, shuffle):
    from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: PLC0415 - where it is there

    return StatefulDataLoader(dataset, batch_size, shuffle)


class Run:
    """A run of the trainer under an engine; None is one process."""

    def __init__(
        self,
        engine,
        *,
        dropout=0.0,
        accumulate=2,
        bad=None,
        clip=None,
        hooks=(),
        loader=DataLoader,
        seed=0,
        **fields,
    ):
        torch.manual_seed(seed)
        self.accelerator = accelerator_of(engine, accumulate)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 1))
        if engine == "FSDP2":
            fully_shard(model[0])
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        self.said = []
        note = PipelineHooks()
        note.register_hook("on_step", HookContext.from_callable("note", after=self.note))
        dataloader = loader(
            samples(bad),
            batch_size=GLOBAL_BATCH // self.accelerator.num_processes,
            shuffle=dropout > 0,
        )
        self.trainer = HookBasedTrainer(
            accelerator=self.accelerator,
            model=model,
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9),
            dataloader=dataloader,
            batch_processor=SimpleBatchProcessor.from_callable(forward),
            grad_clip=clip or GradientClippingHookConfig(clip_mode="norm", max_norm=0.5),
            hooks=[note, *hooks],
            **fields,
        )

    def note(self, arg):
        result = arg.clip_result
        if result is not None:
            self.said.append(
                (
                    result.norm_pre.item().hex(),
                    result.coefficient.item().hex(),
                    bool(result.skipped),
                    arg.is_optimizer_step_committed,
                )
            )

    def weights(self):
        model = self.accelerator.unwrap_model(self.trainer.model)
        found = {name: p.detach() for name, p in model.named_parameters()}
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).clone()
            for name, p in found.items()
        }


def trained(rank, engine, **fields):
    run = Run(engine, **fields)
    run.trainer()
    state = run.trainer.trainer_progress_state
    lr = run.trainer.optimizer.param_groups[0]["lr"]
    return run.weights(), run.said, (state.global_step_id, state.optimizer_step_id, lr)


def train(engine, ranks, **fields):
    """Train, and return what all ranks say alike: weights, clipping, and how far they are."""
    together_ = [_Alike(*each) for each in together(_trained, ranks, engine, fields)]
    assert all(each == together_[0] for each in together_)
    return together_[0].weights, together_[0].said, together_[0].progress


@cache
def train_alone(**fields):
    """Train on one process: what several tests compare with."""
    return train(None, 1, **fields)


def _trained(rank, engine, fields):
    return trained(rank, engine, **fields)


class _Alike:
    def __init__(self, weights, said, progress):
        self.weights, self.said, self.progress = weights, said, progress

    def __eq__(self, other):
        same = all(torch.equal(self.weights[name], other.weights[name]) for name in self.weights)
        return same and (self.said, self.progress) == (other.said, other.progress)

    __hash__ = None


def assert_close(found, wanted):
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("engine", "ranks"),
    product(ENGINES, [2, 4])
    if ALL_COMBINATIONS
    else [*((each, 2) for each in ENGINES), ("FSDP2", 4)],
)
def test_it_ends_where_one_process_ends(engine, ranks):
    wanted, clipped, progress = train_alone(max_epoch=3)
    found, said, reached = train(engine, ranks, max_epoch=3)
    assert_close(found, wanted)
    assert reached == progress
    assert len(said) == len(clipped) == 9
    for (norm, *_), (expected, *_) in zip(said, clipped, strict=True):
        assert math.isclose(float.fromhex(norm), float.fromhex(expected), rel_tol=1e-4)


def checkpoints(root, **fields):
    return SaveCheckpointConfig(save_root=str(root), **fields)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(engine, tmp_path):
    """The same batches, dropout, moments and clipping, from the middle of an epoch."""
    whole, said, progress = train(engine, 2, dropout=0.3, max_epoch=3)
    save = [checkpoints(tmp_path, save_step_freq=2, save_epoch_freq=None)]
    train(engine, 2, dropout=0.3, max_step=10, hooks=save)
    found, rest, reached = train(engine, 2, dropout=0.3, max_epoch=3, resume_from=str(tmp_path))
    assert reached == progress
    assert rest == said[5:]
    assert all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("loader", [Remembering, of_torchdata])
def test_a_loader_that_keeps_its_state_goes_on_on_each_process(loader, tmp_path):
    """Each process has a state of its own, so another number of them cannot go on."""
    if loader is of_torchdata:
        pytest.importorskip("torchdata.stateful_dataloader")
    run = {"dropout": 0.3, "loader": loader}
    whole, said, progress = train("DDP", 2, max_epoch=3, **run)
    train("DDP", 2, max_step=10, hooks=[checkpoints(tmp_path, save_epoch_freq=9)], **run)
    resumed = {"max_epoch": 3, "resume_from": str(tmp_path), "seed": 7, **run}
    found, rest, reached = train("DDP", 2, **resumed)
    assert reached == progress
    assert rest == said[5:]
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    together(refuses_the_epoch, 1, resumed)


def refuses_the_epoch(rank, resumed):
    with pytest.raises(CheckpointError, match="inside an epoch by 2 processes"):
        Run(None, **resumed)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(16))


def counts_a_stream(rank):
    configuration = DataLoaderConfiguration(use_stateful_dataloader=True)
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    loader = of_torchdata(Stream(), batch_size=2, shuffle=None)
    assert not keeps_its_state(prepared_dataloader(accelerator, loader))
    assert configuration.use_stateful_dataloader
    with pytest.raises(ArgumentValueError, match=r"before accelerator\.prepare"):
        prepared_dataloader(accelerator, accelerator.prepare(loader))


def test_a_stream_that_processes_share_is_counted_whatever_loads_it():
    """Behind Accelerate's wrapper, its loader's state does not tell where it is."""
    pytest.importorskip("torchdata.stateful_dataloader")
    together(counts_a_stream, 2)


@pytest.mark.parametrize(
    ("before", "ranks_before", "after", "ranks_after"),
    [
        ("DDP", 2, "DDP", 4),
        ("FSDP2", 4, "FSDP2", 2),
        ("FSDP2 by Accelerate", 2, None, 1),
        (None, 1, "FSDP2", 2),
        ("DDP", 2, "FSDP2 by Accelerate", 2),
    ],
)
def test_a_run_resumes_on_other_processes(before, ranks_before, after, ranks_after, tmp_path):
    """The state of the policy comes back, and no batch is lost: transformers#34053."""
    wanted, _, progress = train_alone(max_epoch=3)
    save = [checkpoints(tmp_path, save_epoch_freq=9)]
    train(before, ranks_before, max_step=8, hooks=save)
    (folder,) = tmp_path.glob("epoch*")
    assert len(list(folder.glob("process_*.pt"))) == ranks_before
    found, said, reached = train(after, ranks_after, max_epoch=3, resume_from=str(tmp_path))
    assert_close(found, wanted)
    assert reached == progress
    assert len(said) == 5


class Factored(torch.optim.SGD):
    """Keeps the mean square of each row and of each column, as Adafactor does, and a count."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            count = self.state[parameter].setdefault("count", torch.zeros(1))
            count += 1
            parameter.grad /= count.item()
            if parameter.dim() > 1:
                means = self.state[parameter].setdefault("means", {})
                for dim in range(2):
                    mean = parameter.grad.square().mean(dim)
                    if isinstance(mean, DTensor):
                        mean = mean.redistribute(placements=[Replicate()] * mean.device_mesh.ndim)
                    means[dim] = means.get(dim, mean).lerp(mean, 0.1)
                parameter.grad /= (means[1][:, None] + means[0]).sqrt()
        super().step()


LAYOUTS = {"FSDP2": 2, "FSDP2, offloaded": 2, "TP": 2, "FSDP2 over TP": 4}


def laid_out(layout, optimizer, seed=0):
    """A network whose first layer divides over two processes, and not over four."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if layout == "FSDP2 over TP":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])
    elif layout == "TP":
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    elif layout == "FSDP2, offloaded":
        fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    elif layout == "FSDP2":
        fully_shard(model)
    accelerator = Accelerator(cpu=True)
    stepped = optimizer(model.parameters(), lr=0.1)
    accelerator._models, accelerator._optimizers = [model], [stepped]
    return accelerator, model, stepped


def two_steps(model, optimizer):
    for inputs in torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2)):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model):
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def saved_and_loaded(rank, layout, optimizer, folder):
    accelerator, *saved = laid_out(layout, optimizer)
    two_steps(*saved)
    write_weights(folder, gathered_weights(accelerator))
    torch.distributed.barrier()
    accelerator, *again = laid_out(layout, optimizer, seed=1)
    load_weights(folder, accelerator)
    plain_accelerator, *plain = laid_out(None, optimizer, seed=1)
    load_weights(folder, plain_accelerator)
    torch.testing.assert_close(whole(plain[0]), whole(saved[0]), rtol=0, atol=0)
    for each in (saved, again, plain):
        two_steps(*each)
    torch.testing.assert_close(whole(again[0]), whole(saved[0]), rtol=0, atol=0)
    torch.testing.assert_close(whole(plain[0]), whole(saved[0]), rtol=1e-4, atol=1e-5)
    for parameter in again[0].parameters():
        for state in again[1].state[parameter].values():
            if isinstance(state, DTensor) and state.shape == parameter.shape:
                assert state.placements == parameter.placements
                local = state.to_local()  # and no view that would keep the whole tensor alive
                assert local.untyped_storage().nbytes() == local.nbytes


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, Factored])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_process_has_its_part_again_and_one_process_has_all(layout, optimizer, tmp_path):
    """Uneven parts too, and states that are no images of their parameter."""
    together(saved_and_loaded, LAYOUTS[layout], layout, optimizer, tmp_path)


def test_an_open_window_comes_back_with_the_processes_that_had_it(tmp_path):
    wanted, _, _ = train("DDP", 2, max_epoch=2)
    save = [checkpoints(tmp_path, save_epoch_freq=9)]
    train("DDP", 2, max_step=7, hooks=save)
    found, _, _ = train("DDP", 2, max_epoch=2, resume_from=str(tmp_path))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    together(refuses_the_window, 1, str(tmp_path))


def refuses_the_window(rank, root):
    with pytest.raises(CheckpointError, match="window by 2 processes"):
        Run(None, max_epoch=2, resume_from=root)


def test_a_window_that_fsdp2_keeps_to_itself_is_not_lost_in_silence(tmp_path):
    together(ends_in_a_window, 2, str(tmp_path))
    found, said, _ = train("FSDP2 by Accelerate", 2, max_epoch=2, resume_from=str(tmp_path))
    assert len(said) == 3  # 7 batches are done: of the 5 left one ends the epoch alone
    assert all(bool(value.isfinite().all()) for value in found.values())


def ends_in_a_window(rank, root):
    hooks = [checkpoints(root, save_epoch_freq=9)]
    with pytest.warns(UserWarning, match="1 batches into an accumulation window"):
        trained(rank, "FSDP2 by Accelerate", max_step=7, hooks=hooks)


@pytest.mark.parametrize(
    ("engine", "bad"),
    product(ENGINES, [math.nan, math.inf])
    if ALL_COMBINATIONS
    else [*((each, math.nan) for each in ENGINES), ("FSDP2", math.inf)],
)
def test_a_step_is_skipped_on_every_process(engine, bad):
    """One sample of one process is no number; nobody steps, the scheduler neither."""
    skipping = {"bad": bad, "accumulate": 1, "max_step": 5}
    found, said, (steps, committed, lr) = train(engine, 2, **skipping)
    wanted, _, (_, expected, expected_lr) = train_alone(**skipping)
    assert [(skipped, made) for *_, skipped, made in said] == [
        (number == 2, number != 2) for number in range(5)
    ]
    assert (steps, committed, lr) == (5, expected, expected_lr)
    assert committed == 4
    assert_close(found, wanted)


def raised(rank, engine, clip, error):
    run = Run(engine, bad=math.nan, accumulate=1, clip=clip, max_step=6)
    with pytest.raises(error) as caught:
        run.trainer()
    return str(caught.value).splitlines()[0], len(run.said), run.weights()


@pytest.mark.parametrize("engine", ENGINES)
def test_it_raises_on_every_process(engine):
    clip = GradientClippingHookConfig(clip_mode="norm", max_norm=0.5, nonfinite="raise")
    first, second = together(raised, 2, engine, clip, NonFiniteGradientError)
    assert "step 2" in first[0]
    assert first[1] == second[1] == 2
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])


def test_too_many_skips_raise_on_every_process():
    clip = GradientClippingHookConfig(clip_mode="norm", max_norm=0.5, max_consecutive_skips=0)
    said = together(raised, 2, "FSDP2", clip, TooManySkipsError)
    assert [each[1] for each in said] == [2, 2]


class FailsOnOne(PipelineHooks):
    """Has a state that one process cannot give: as if its disk were full."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def state_dict(self):
        self.asked += 1
        if torch.distributed.get_rank() == 0 and self.asked > 1:  # first when the run begins
            raise OSError("no space left")
        return {}


def fails_to_save(rank, root):
    hooks = [FailsOnOne(), checkpoints(root, save_step_freq=2)]
    run = Run("FSDP2", max_step=4, hooks=hooks)
    with pytest.raises(CheckpointError, match="no space left") as caught:
        run.trainer()
    return "cannot be written" in str(caught.value), "process 0 failed" in str(caught.value)


def test_a_process_that_cannot_save_fails_all(tmp_path):
    assert together(fails_to_save, 2, str(tmp_path)) == [(True, False), (True, True)]
    assert not list(tmp_path.iterdir())


class Unsaveable(PipelineHooks):
    def state_dict(self):
        return {"thing": object()}


class AsksTheOthers(PipelineHooks):
    def state_dict(self):
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        return {"total": total}


def has_an_object(rank, root):
    Run("DDP", max_step=1, hooks=[AsksTheOthers(), checkpoints(f"{root}/asks")]).trainer()
    assert list(Path(root, "asks").iterdir())
    run = Run("DDP", max_step=2, hooks=[Unsaveable(), checkpoints(root)])
    with pytest.raises(ArgumentTypeError, match=r"\['thing'\] is of type"):
        run.trainer()


def test_a_state_is_asked_for_on_all_processes(tmp_path):
    together(has_an_object, 2, str(tmp_path))


def means(rank):
    """Losses 1 and 3 of two batches on the first process, 5 and 7 on the second."""
    tracker = LossTrackerConfig(step_log_freq=2)()
    logged = []
    accelerator = Accelerator(cpu=True)
    accelerator.log = lambda values, step: logged.append((values, step))
    for step in range(2):
        outputs = {"loss": torch.tensor([4.0 * rank + 2 * step + 1])}
        if rank:
            outputs["loss_2"] = torch.tensor(1.0)
        arg = PipelineHookArgs(accelerator, step_id=step, model_outputs=outputs)
        with tracker.begin("on_step", arg):
            pass
    return logged


def test_losses_are_means_over_all_processes_also_of_those_that_one_has():
    first, second = together(means, 2)
    assert first == [({"Loss/loss": 4.0, "Loss/loss_2": 1.0}, 0)]
    assert second == []


def nothing_to_resume(rank, root):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        Run("DDP", max_step=4, resume_from=root)


def test_all_are_told_that_there_is_nothing_to_resume_from(tmp_path):
    together(nothing_to_resume, 2, str(Path(tmp_path)))
