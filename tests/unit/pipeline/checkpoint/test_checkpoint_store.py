import json
import os
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest

from gradclip.errors import CheckpointError
from gradclip.pipeline.checkpoint import store
from gradclip.pipeline.checkpoint.manifest import verify
from gradclip.pipeline.checkpoint.progress import TrainerProgressState
from manifests import change_manifest


class KilledError(BaseException):
    """Stands for SIGKILL: nothing may catch it and clean up."""


def progress(step, epoch=0):
    return TrainerProgressState(epoch_id=epoch, step_id=step, global_step_id=step)


def fill(folder):
    (folder / "sub").mkdir()
    (folder / "model.bin").write_bytes(b"weights")
    (folder / "sub" / "state.json").write_text("{}")


def names(root):
    return sorted(each.name for each in root.iterdir())


@pytest.mark.smoke
def test_a_checkpoint_says_what_it_holds(tmp_path):
    place = store.write(tmp_path, progress(12, epoch=3), fill)
    assert place == tmp_path / "epoch-0003-step-00000012"
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["schema"] == 2
    assert manifest["progress"]["global_step_id"] == 12
    digest = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    assert manifest["files"]["model.bin"] == {"size": 7, "sha256": digest}
    assert set(manifest["files"]) == {"model.bin", "sub/state.json"}
    assert store.find(place) == (place, verify(place))
    assert store.find(place)[1].progress == progress(12, epoch=3)


def test_the_last_ones_are_kept_in_the_order_of_writing(tmp_path):
    for step in (30, 10, 20, 40):
        store.write(tmp_path, progress(step), fill, keep_last=2)
    assert names(tmp_path) == ["epoch-0000-step-00000020", "epoch-0000-step-00000040"]
    store.write(tmp_path, progress(5), fill, keep_last=1)
    assert names(tmp_path) == ["epoch-0000-step-00000005"]


def test_all_are_kept_without_a_limit(tmp_path):
    for step in range(5):
        store.write(tmp_path, progress(step), fill)
    assert len(names(tmp_path)) == 5


def test_one_that_is_there_already_is_not_replaced(tmp_path):
    first = store.write(tmp_path, progress(1), fill)
    second = store.write(tmp_path, progress(1), fill)
    assert second.name == f"{first.name}-2"
    assert store.find(tmp_path)[0] == second


def test_the_newest_is_the_last_that_was_written(tmp_path):
    store.write(tmp_path, progress(30), fill)
    last = store.write(tmp_path, progress(10), fill)
    assert store.find(tmp_path)[0] == last


def damage_byte(place):
    (place / "model.bin").write_bytes(b"weighty")


def damage_size(place):
    (place / "model.bin").write_bytes(b"weight")


def damage_missing(place):
    (place / "sub" / "state.json").unlink()


def damage_no_manifest(place):
    (place / "manifest.json").unlink()


def damage_manifest(place):
    (place / "manifest.json").write_text('{"schema": 1')


def damage_schema(place):
    change_manifest(place, lambda content: content.update(schema=99))


def damage_progress(place):
    change_manifest(place, lambda content: content["progress"].update(step_id="many"))


def damage_signature(place):
    manifest = place / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"micro_step_id": 0', '"micro_step_id": 1'))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_byte, "model.bin is"),
        (damage_size, "model.bin is"),
        (damage_missing, "sub/state.json is missing"),
        (damage_no_manifest, "never finished"),
        (damage_manifest, "cannot be read"),
        (damage_schema, "not of schema"),
        (damage_progress, "step_id"),
        (damage_signature, "its SHA-256 is another"),
    ],
)
def test_a_damaged_one_is_passed_over_in_a_folder_and_an_error_by_name(tmp_path, damage, said):
    good = store.write(tmp_path, progress(1), fill)
    bad = store.write(tmp_path, progress(2), fill)
    damage(bad)
    with pytest.raises(CheckpointError, match=said):
        store.find(bad)
    with pytest.warns(UserWarning, match=said):
        assert store.find(tmp_path)[0] == good
    damage(good)
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(CheckpointError, match="no complete checkpoint"),
    ):
        store.find(tmp_path)


def test_a_folder_without_checkpoints_and_none_at_all_are_errors(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        store.find(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("nowhere", "file", "file/below", "circle", "x" * 5000):
        with pytest.raises(CheckpointError, match="no such folder"):
            store.find(tmp_path / name)


def killing(monkeypatch, at):
    """Count what touches the disk, and die at one of these moments."""
    done = [0]

    def deadly(function):
        def call(*args, **kwargs):
            done[0] += 1
            if done[0] == at:
                raise KilledError
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (os, "fsync"),
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "write_text"),
        (Path, "write_bytes"),
        (shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, deadly(getattr(owner, name)))
    return done


def test_killed_at_any_moment_there_is_always_a_whole_checkpoint(tmp_path, monkeypatch):
    moments = 0
    for at in range(1, 100):
        root = tmp_path / str(at)
        for step in (1, 2):
            store.write(root, progress(step), fill)
        with monkeypatch.context() as patch:
            done = killing(patch, at)
            try:
                store.write(root, progress(3), fill, keep_last=2)
            except KilledError:
                moments += 1
        # No warning: what a reader looks at is never half of something.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step = store.find(root)[1].progress.global_step_id
        assert step in (2, 3)
        store.write(root, progress(4), fill, keep_last=2)
        assert not [name for name in names(root) if name.startswith(".")]
        assert len(names(root)) == 2
        assert store.find(root)[1].progress.global_step_id == 4
        if done[0] < at:
            break
    assert moments == at - 1 >= 12


def test_a_removal_that_was_cut_short_leaves_no_damaged_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        store.write(tmp_path, progress(step), fill)

    def half(folder):
        (folder / "model.bin").unlink()
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(KilledError):
            store.write(tmp_path, progress(3), fill, keep_last=2)
    assert [verify(p).progress.global_step_id for p in sorted(tmp_path.glob("epoch*"))] == [
        2,
        3,
    ]
    store.write(tmp_path, progress(4), fill, keep_last=2)
    assert names(tmp_path) == ["epoch-0000-step-00000003", "epoch-0000-step-00000004"]


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "epoch-old").mkdir()
    for step in range(3):
        store.write(tmp_path, progress(step), fill, keep_last=1)
    assert names(tmp_path) == [".hidden", "epoch-0000-step-00000002", "epoch-old", "notes.txt"]
    assert store.find(tmp_path)[1].progress.global_step_id == 2


def test_other_processes_fill_and_wait_and_leave_the_rest_to_the_main_one(tmp_path):
    waits = []
    draft = tmp_path / ".epoch-0000-step-00000001.tmp"
    draft.mkdir()

    @contextmanager
    def together():
        yield
        waits.append(names(tmp_path))

    place = store.write(tmp_path, progress(1), fill, main=False, together=together)
    assert place is None
    assert len(waits) == 3
    assert names(draft) == ["model.bin", "sub"]
