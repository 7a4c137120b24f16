"""What ranks do in the tests of sharded trainings: each ``fits`` below runs on every rank.

Lightning's FSDP asks for CUDA by the type of its strategy. A subclass that changes nothing runs on
the CPU, where the layers have to be told their device.
"""

import warnings

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import ModelParallelStrategy as FabricParallel
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning_runs import BATCH, LIMIT, Net, fused_adamw, half, loader, momentum, trainer
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

import gradclip
from gradclip.clipping.collect.sources import clean_name
from gradclip.integrations.lightning import GradientClippingCallback

RANKS, STEPS = 2, 6
OVERFLOW = 3


class OnCPU(FSDPStrategy):
    """FSDP1, as it is."""


class Flat(Net):
    """Each layer in FSDP1; Lightning leaves what is wrapped as it is."""

    def configure_model(self):
        for name in ("up", "norm", "down"):
            wrapped = FullyShardedDataParallel(
                getattr(self, name), device_id=torch.device("cpu"), use_orig_params=True
            )
            setattr(self, name, wrapped)


class Sharded(Net):
    """Each layer in FSDP2."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.up, self.norm, self.down):
            fully_shard(layer, mesh=mesh)


class Overflowing(Sharded):
    """Finds an infinity once, in the shard of one rank alone."""

    def on_after_backward(self):
        if self.backwards == OVERFLOW and self.global_rank == 1:
            self.up.weight.grad.to_local()[0, 0] = torch.inf
        self.backwards += 1


class Keep(Callback):
    """Keeps what each step was, and what this rank has of weights and moments."""

    def __init__(self, clipping):
        self.clipping = clipping
        self.results, self.states = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.results.append(self.clipping.last.to_host())
        optimizer = trainer.optimizers[0]
        held = [p for group in optimizer.param_groups for p in group["params"]]
        moments = [v for p in held for v in optimizer.state[p].values() if v is not None]
        self.states.append([local(each).detach().clone() for each in held + moments])


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(model):
    weights = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        weights[name] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
    return weights


def fsdp2():
    return ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)


def trained(rank, model, strategy, plugins=()):
    """Train clipped on two ranks; return losses, results, and states after each step."""
    clipping = GradientClippingCallback(LIMIT)
    keep = Keep(clipping)
    fit_on(rank, model, clipping, keep, strategy=strategy, plugins=plugins)
    return model.losses, keep.results, keep.states


def fit_on(rank, model, *callbacks, plugins=(), ckpt_path=None, **options):
    made = trainer(
        *callbacks,
        devices=RANKS,
        plugins=[LightningEnvironment(), *plugins],
        use_distributed_sampler=False,
        **options,
    )
    made.fit(model, loader(STEPS, BATCH, rank, RANKS), ckpt_path=ckpt_path)
    return made


def fits_ddp(rank):
    quiet()
    model = Net(momentum)
    losses, results, _ = trained(rank, model, "ddp")
    return losses, results, whole(model)


def fits_fsdp1(rank):
    quiet()
    model = Flat(momentum)
    losses, results, _ = trained(rank, model, OnCPU())
    layers = model.up, model.norm, model.down
    weights = {}
    for layer, name in zip(layers, ("up", "norm", "down"), strict=True):
        with FullyShardedDataParallel.summon_full_params(layer):
            named = layer.module.named_parameters()
            weights |= {f"{name}.{each}": value.detach().clone() for each, value in named}
    theirs = "nothing"
    try:
        fit_on(rank, Flat(momentum), strategy=OnCPU(), gradient_clip_val=LIMIT)
    except Exception as error:  # noqa: BLE001 - which one it is, is what the test asks
        theirs = f"{type(error).__name__}: {error}"
    return losses, results, weights, theirs


def fits_fsdp2(rank):
    quiet()
    model = Sharded(momentum)
    losses, results, _ = trained(rank, model, fsdp2())
    return losses, results, whole(model)


def resumes_fsdp2(rank, folder):
    """Save after an epoch, go on for another; return how many steps the clippers counted."""
    quiet()
    strategies = fsdp2(), fsdp2()
    first, second = GradientClippingCallback(LIMIT), GradientClippingCallback(LIMIT)
    made = fit_on(rank, Sharded(momentum), first, strategy=strategies[0])
    made.save_checkpoint(f"{folder}/last.ckpt")
    going_on = {"max_epochs": 2, "ckpt_path": f"{folder}/last.ckpt"}
    fit_on(rank, Sharded(momentum), second, strategy=strategies[1], **going_on)
    return first.clippers[0].step, second.clippers[0].step


def fits_fsdp2_in_half(rank):
    """Train with a fused optimizer and a loss scaler, and an overflow that one rank alone sees."""
    quiet()
    plugin = half()
    _, results, states = trained(rank, Overflowing(fused_adamw), fsdp2(), plugins=[plugin])
    unchanged = [all(map(torch.equal, states[n - 1], states[n])) for n in range(1, len(states))]
    return results, unchanged, plugin.scaler.get_scale()


def quiet():
    warnings.filterwarnings("ignore")


def fits_fabric(rank):
    """Train under Fabric with FSDP2, clipped by an attachment; then try to attach to FSDP1."""
    quiet()
    strategy = FabricParallel(shard, data_parallel_size=RANKS, tensor_parallel_size=1)
    plugins = [LightningEnvironment()]
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=RANKS, plugins=plugins)
    fabric.launch()
    model = fabric.setup_module(Net())
    model.mark_forward_method("loss_of")
    optimizer = fabric.setup_optimizers(momentum(model.named_parameters()))
    handle = gradclip.attach(optimizer, LIMIT)
    norms = []
    for batch in loader(STEPS, BATCH, rank, RANKS):
        fabric.backward(model.loss_of(batch))
        optimizer.step()
        optimizer.zero_grad()
        norms.append(float(handle.last.norm_pre))
    flat = FullyShardedDataParallel(Net().up, device_id=torch.device("cpu"), use_orig_params=True)
    refusal = "nothing"
    try:
        gradclip.attach(momentum(flat.named_parameters()), LIMIT)
    except Exception as error:  # noqa: BLE001 - which one it is, is what the test asks
        refusal = f"{type(error).__name__}: {error}"
    return norms, {clean_name(name): each for name, each in whole(model).items()}, refusal


def shard(module, mesh):
    for layer in (module.up, module.norm, module.down):
        fully_shard(layer, mesh=mesh["data_parallel"])
    return module
