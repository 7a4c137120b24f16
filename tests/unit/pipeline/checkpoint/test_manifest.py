"""A manifest that changed in any bit, or says what cannot be, is refused: soon, and alone."""

import json
import os
import shutil
import time
from contextlib import suppress

import pytest

from gradclip.errors import CheckpointError
from gradclip.pipeline.checkpoint import store
from gradclip.pipeline.checkpoint.manifest import read_manifest, verify
from gradclip.pipeline.checkpoint.progress import TrainerProgressState
from manifests import change_manifest, signed
from patience import seconds


def write(root, step, name="model.bin"):
    progress = TrainerProgressState(step_id=step, global_step_id=step)
    return store.write(root, progress, lambda folder: (folder / name).write_bytes(b"weights"))


@pytest.fixture(name="good")
def _good(tmp_path):
    return write(tmp_path, 1)


@pytest.fixture(name="bad")
def _bad(tmp_path, good):  # written after the good one
    return write(tmp_path, 2)


def refused_alone(bad, good, words):
    """Check that a checkpoint is refused where it is named, and hides no older one."""
    started = time.process_time()
    with pytest.raises(CheckpointError, match=words) as caught:
        store.find(bad)
    assert len(str(caught.value)) < 1_500
    assert time.process_time() - started < seconds(1)
    started = time.process_time()
    with pytest.warns(UserWarning, match=words):
        assert store.find(bad.parent)[0] == good
    assert time.process_time() - started < seconds(1)


@pytest.mark.smoke
def test_no_bit_of_a_manifest_changes_unseen(bad):
    def fill(folder):
        for name in ("model.safetensors", "optimizer.bin", "hooks.pt", "process_0.pt"):
            (folder / name).write_bytes(name.encode())

    place = store.write(bad.parent, TrainerProgressState(epoch_id=3, global_step_id=12), fill)
    manifest = place / "manifest.json"
    data = bytearray(manifest.read_bytes())
    assert len(data) * 8 > 5456
    accepted = []
    with manifest.open("r+b", buffering=0) as file:
        for bit in range(len(data) * 8):
            byte, mask = bit // 8, 1 << bit % 8
            os.pwrite(file.fileno(), bytes([data[byte] ^ mask]), byte)
            with suppress(CheckpointError):
                accepted.append((bit, read_manifest(place)))
            os.pwrite(file.fileno(), data[byte : byte + 1], byte)
    assert accepted == []
    assert verify(place).progress.global_step_id == 12


@pytest.mark.parametrize("cut", [0, 1, 2, 100, -1])
def test_a_manifest_that_is_cut_or_longer_is_refused(good, bad, cut):
    manifest = bad / "manifest.json"
    data = manifest.read_bytes()
    manifest.write_bytes(data + b" " if cut == -1 else data[:cut])
    refused_alone(bad, good, r"SHA-256 is another|cannot be read|not of schema")


HOSTILE = {
    "a step beyond 64 bits": ("progress", {"global_step_id": 10**40}, "no valid"),
    "an integer of 5000 digits": ("progress", {"global_step_id": "LONG"}, "cannot be read"),
    "a step below zero": ("progress", {"step_id": -1}, "no valid"),
    "a step that is true": ("progress", {"step_id": True}, "no valid"),
    "a step that is no whole number": ("progress", {"step_id": 2.0}, "no valid"),
    "a step that is missing": ("progress", {"step_id": None}, "no valid"),
    "another step than its folder's": ("progress", {"global_step_id": 3}, "of another checkpoint"),
    "another epoch than its folder's": ("progress", {"epoch_id": 1}, "of another checkpoint"),
    "no file": ("files", {}, "names no file"),
    "files that are a list": ("files", ["model.bin"], "is incomplete"),
    "a file that is a number": ("files", {"model.bin": 7}, "has no valid"),
    "a file of another size": ("files", {"model.bin": {"size": 8}}, "model.bin is"),
    "a file elsewhere": ("files", {"../x": {"size": 1, "sha256": ""}}, "has no valid"),
    "a file of the system": ("files", {"/etc/passwd": {"size": 1}}, "has no valid"),
    "a file without a name": ("files", {"": {"size": 1}}, "has no valid"),
    "a file of a long name": ("files", {"x" * 5000: {"size": 1}}, "cannot be read|is missing"),
    "a file of a name that no disk has": ("files", {"a\0b": {"size": 1}}, "is missing"),
    "a file of half a character": ("files", {"\ud800": {"size": 1}}, "is missing"),
    "a schema that is true": ("schema", True, "not of schema"),
    "a schema that is no whole number": ("schema", 2.0, "not of schema"),
    "a schema of the future": ("schema", 3, "not of schema"),
    "no schema": ("schema", None, "not of schema"),
    "a sequence that is true": ("sequence", True, "is incomplete"),
    "a sequence below zero": ("sequence", -1, "is incomplete"),
    "no progress": ("progress", None, "is incomplete"),
}


@pytest.mark.parametrize(("key", "value", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_manifest_that_signs_what_cannot_be_is_refused(good, bad, key, value, words):
    def change(content):
        if key == "progress" and isinstance(value, dict):
            content[key] |= value
        else:
            content[key] = value

    change_manifest(bad, change)
    if "LONG" in str(value):
        body = (bad / "manifest.json").read_text().rpartition(',\n "sha256"')[0]
        (bad / "manifest.json").write_bytes(signed(body.replace('"LONG"', "1" * 5000)))
    refused_alone(bad, good, words)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        '{"schema": 2, "schema": 2',
        '{"schema": 2, "files": {"a": {}, "a": {}}',
        "[1]",
        "null",
        "",
        "\ufeff{",
        '{"a": "' + "x" * 2**24 + '"',
    ],
    ids=lambda text: ascii(text[:20]),
)
@pytest.mark.parametrize("sign", [False, True])
def test_hostile_text_is_refused_soon(good, bad, text, sign):
    (bad / "manifest.json").write_bytes(signed(text) if sign else text.encode())
    refused_alone(bad, good, "cannot be read|not of schema")


@pytest.mark.parametrize(
    "text",
    [
        "[" + "{}," * 690_000 + "{}]",
        "{" + ",".join(f'"{number}":0' for number in range(190_000)) + "}",
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_as_much_as_is_read_at_all_is_refused_soon(good, bad, text):
    (bad / "manifest.json").write_text(text)
    refused_alone(bad, good, "not of schema")


def test_a_file_that_is_no_text_is_refused(good, bad):
    (bad / "manifest.json").write_bytes(b"\xff\xfe{\x00")
    refused_alone(bad, good, "cannot be read")


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to itself", "link to nothing", "device"])
def test_what_is_no_file_is_refused_without_waiting(good, bad, kind):
    manifest = bad / "manifest.json"
    manifest.unlink()
    if kind == "fifo":
        os.mkfifo(manifest)
    elif kind == "folder":
        manifest.mkdir()
    else:
        manifest.symlink_to({"link to itself": manifest, "device": "/dev/zero"}.get(kind, "absent"))
    refused_alone(bad, good, "cannot be read|never finished")


def test_a_pipe_in_place_of_another_file_is_refused_without_waiting(good, bad):
    (bad / "model.bin").unlink()
    os.mkfifo(bad / "model.bin")
    refused_alone(bad, good, "model.bin is missing")


def test_a_checkpoint_under_the_name_of_another_is_refused(tmp_path, good):
    renamed = tmp_path / "epoch-0000-step-00000007"
    shutil.copytree(good, renamed)
    with pytest.raises(CheckpointError, match="is of epoch 0 and step 1: of another checkpoint"):
        store.find(renamed)
    kept = good.rename(tmp_path / "best")  # any other name is the user's
    assert store.find(kept)[0] == kept


def test_a_file_that_the_manifest_does_not_name_is_left_alone(good):
    (good / "notes.txt").write_text("mine")
    assert set(store.find(good)[1].files) == {"model.bin"}


def test_a_manifest_from_before_the_signature_is_read(tmp_path, good):
    """Schema 1; each check but that of the signature holds for it too."""
    content = json.loads((good / "manifest.json").read_text()) | {"schema": 1}
    del content["sha256"]
    (good / "manifest.json").write_text(json.dumps(content, indent=1) + "\n")
    assert store.find(tmp_path)[1].progress.global_step_id == 1
    for change in ({"files": {}}, {"schema": True}, {"schema": 2}):
        (good / "manifest.json").write_text(json.dumps(content | change))
        with pytest.raises(CheckpointError):
            store.find(good)


@pytest.mark.parametrize("name", ["epoch-1-step-2", "epoch-0001-step-00000002", "epoch-0001"])
def test_a_folder_of_checkpoints_may_be_named_like_one(tmp_path, name):
    root = tmp_path / name
    root.mkdir()
    with pytest.raises(CheckpointError):
        store.find(root)
    last = [write(root, step) for step in (1, 2)][-1]
    assert store.find(root)[0] == last
    assert store.find(last)[0] == last
