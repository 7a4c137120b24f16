"""A checkpoint that the disk does not take is an error of ours, and costs no other one."""

import errno
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from gradclip.errors import ArgumentValueError, CheckpointError
from gradclip.pipeline.checkpoint import store
from gradclip.pipeline.checkpoint.progress import TrainerProgressState
from gradclip.pipeline.checkpoint.state_file import write_state
from gradclip.pipeline.checkpoint.weights import write_weights
from gradclip.pipeline.hooks import PipelineHookArgs, PipelineHooks, SaveCheckpointConfig

resource = pytest.importorskip("resource", reason="limits of a process are a thing of Unix")


@contextmanager
def at_most(size):
    """Let no file grow beyond a size: the system answers as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(root):
    return sorted(each.name for each in root.iterdir())


def progress(step):
    return TrainerProgressState(step_id=step, global_step_id=step)


def fill(folder):
    (folder / "model.bin").write_bytes(b"weights" * 100)


def refused(write, root, place, words=""):
    """Check that a checkpoint is refused by name, with what to do, and leaves no trace."""
    before = names(root)
    with pytest.raises(CheckpointError, match=f"{place.name} cannot be written: .*{words}") as seen:
        write()
    assert "Make room there" in str(seen.value)
    assert names(root) == before
    return seen.value


class Ballast(PipelineHooks):
    """Makes ``hooks.pt`` larger than the weights, and smaller than the random states."""

    def state_dict(self):
        return {"ballast": torch.zeros(1000)}


def test_a_full_disk_is_an_error_whatever_file_meets_it(tmp_path):
    """In place of "unexpected pos 64 vs 0" and other words about zip archives."""
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    save = SaveCheckpointConfig(save_root=str(tmp_path), keep_last=1)()
    hooks = PipelineHooks.from_hooks([Ballast(), save])
    arg = PipelineHookArgs(accelerator, model=model, optimizer=optimizer, hooks=hooks)
    save.save(arg, progress(1))
    (good,) = tmp_path.iterdir()
    order = ["model.safetensors", "optimizer.bin", "hooks.pt", "process_0.pt"]
    sizes = [(good / name).stat().st_size for name in order]
    assert sizes == sorted(sizes)  # so that each is the first that is too large
    for size in sizes:
        with at_most(size - 1):
            error = refused(
                lambda: save.save(arg, progress(2)),
                tmp_path,
                tmp_path / "epoch-0000-step-00000002",
                "File too large",
            )
        assert error.__cause__ is not None
        assert store.find(tmp_path)[0] == good
    save.save(arg, progress(2))
    assert names(tmp_path) == ["epoch-0000-step-00000002"]


@pytest.mark.parametrize("room", [0, 1, 64, 4096, 100_000, 399_999])
@pytest.mark.parametrize("form", ["torch", "safetensors", "text"])
def test_a_large_file_may_end_anywhere(tmp_path, room, form):
    tensors = {"weight": torch.zeros(100_000)}

    def write_large(folder):
        if form == "torch":
            write_state(tensors, folder / "state.pt")
        elif form == "safetensors":
            write_weights(folder, {"model.safetensors": tensors})
        else:
            (folder / "text").write_text("x" * 400_000)

    with at_most(room):
        refused(
            lambda: store.write(tmp_path, progress(1), write_large),
            tmp_path,
            tmp_path / "epoch-0000-step-00000001",
        )


def failing(function, moments):
    """Answer some calls as a full disk does."""
    calls = iter(range(100))

    def call(*args, **kwargs):
        if next(calls) in moments:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("owner", "name", "moments"),
    [
        (Path, "mkdir", [0]),  # of the root
        (Path, "mkdir", [1]),  # of the draft
        (Path, "write_bytes", [0]),  # of the weights
        (os, "fsync", [0]),
        (Path, "write_bytes", [1]),  # of the manifest
        (os, "fsync", [1]),
        (Path, "rename", [0]),
    ],
)
def test_at_every_moment_the_last_checkpoint_stays(tmp_path, monkeypatch, owner, name, moments):
    good = store.write(tmp_path, progress(1), fill, keep_last=1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), moments))
        refused(
            lambda: store.write(tmp_path, progress(2), fill, keep_last=1),
            tmp_path,
            tmp_path / "epoch-0000-step-00000002",
            "No space left on device",
        )
    assert store.find(tmp_path)[0] == good


@pytest.mark.parametrize("root", ["file", "file/below"])
def test_a_root_that_is_no_folder_is_named(tmp_path, root):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        store.write(tmp_path / root, progress(1), fill)


def test_an_error_that_is_not_of_the_disk_stays_what_it_is(tmp_path):
    for error in (KeyError("no"), ArgumentValueError("no")):

        def fail(_, error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            store.write(tmp_path, progress(1), fail)
        assert caught.value is error
        assert names(tmp_path) == []


def test_an_old_one_that_cannot_be_removed_does_not_lose_the_new_one(tmp_path, monkeypatch):
    store.write(tmp_path, progress(1), fill)

    def stuck(folder, **_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stuck)
        with pytest.warns(UserWarning, match="cannot be removed: .*busy"):
            new = store.write(tmp_path, progress(2), fill, keep_last=1)
    assert store.find(tmp_path)[0] == new
    store.write(tmp_path, progress(3), fill, keep_last=1)
    assert names(tmp_path) == ["epoch-0000-step-00000003"]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_lies_where_a_draft_goes_is_removed_and_not_followed(tmp_path, kind):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("kept")
    root.mkdir()
    draft = root / ".epoch-0000-step-00000001.tmp"
    if kind == "link":
        draft.symlink_to(elsewhere)
    else:
        draft.write_text("")
    store.write(root, progress(1), fill)
    assert names(root) == ["epoch-0000-step-00000001"]
    assert names(elsewhere) == ["mine"]
