"""Files that somebody broke, or that are no logs: each is read, or is an error, at once."""

import json
import os
import time

import pytest

from gradclip.diagnostics import read_log
from gradclip.errors import GradClipError

LINE = '{"step": %d, "grad_norm": 1.5, "loss": 2.0}\n'
GOOD = "".join(LINE % n for n in range(3))
READ = {
    "a number of 400 digits": (GOOD + '{"step": 3, "grad_norm": %s}\n' % ("1" * 400), 4, 1),
    "a number of 6000 digits": (GOOD + '{"step": 3, "grad_norm": %s}\n' % ("1" * 6000), 4, 1),
    "400 digits in a text": ("step 1 grad_norm 1\nstep 2 grad_norm %s\n" % ("1" * 400), 2, 1),
    "400 digits in CSV": ("step,grad_norm\n1,1\n2,%s\n" % ("1" * 400), 2, 1),
    "nulls": (GOOD + '{"step": null, "grad_norm": null}\n', 3, 0),
    "a line break of Unicode": (GOOD + '{"step": 3, "grad_norm": 1, "note": "a\u2028b"}\n', 4, 0),
    "the same in CSV": ("step,note,grad_norm\n1,a\u2028b,2\n2,c,3\n", 2, 0),
    "a byte order mark": ("\ufeffstep,grad_norm\n1,2\n2,3\n", 2, 0),
    "a torn line": (GOOD + '{"step": 3, "gra', 3, 0),
    "bare words": (GOOD + '{"step": 3, "grad_norm": nan, "note": "nan"}\n', 4, 1),
    "words with signs": (GOOD + '{"step": 3, "grad_norm": -nan(ind), "a": [True, +inf]}\n', 4, 1),
    "steps too far apart": ("step,grad_norm\n-1e308,1\n1e308,2\n", 2, 0),
    "a cell of CSV that is cut off": ('step,grad_norm\n1,2\n2,3\n3,"4', 2, 0),
    "a header that is longer than what is looked at": (
        ",".join(f"column {n} of very many" for n in range(4000))
        + ",grad_norm\n"
        + "," * 4000
        + "5\n",
        1,
        0,
    ),
    "norms that no gradients have": (GOOD + '{"step": 3, "grad_norm": 1.7e308}\n', 4, 1),
    "a line of words": ("step 1 grad_norm 2\n" + "a b " * 500_000 + "\n", 1, 0),
    "a line of letters": ("step 1 grad_norm 2\n" + "a" * 3_000_000 + "\n", 1, 0),
    "blanks": ("step 1 grad_norm 2\nloss" + " " * 60_000 + "x\n", 1, 0),
}
REFUSED = {
    "empty": ("", "is empty"),
    "blank": ("\n \n", "is empty"),
    "deep in one line": (GOOD + "[" * 100_000 + "\n", "log:4 cannot be read as a log: .*too deep"),
    "deep": ("{\n" + '"a":{' * 100_000, "log:1 cannot be read as a log: .*too deep"),
    "a broken line": (GOOD + '{"step": 3, "gra\n' + GOOD, "log:4 .*the line is not JSON"),
    "a state that is cut off": ('{\n"log_history": [\n{"step": 1},\n', "log:3 .*not JSON"),
    "prose": ("the quick brown fox\n" * 99, "the columns are:\n  none"),
    "a cell without an end": ('step,grad_norm\n1,2\n2,"3\n' + "4,5\n" * 99_999, "not CSV"),
    "a short one": ('step,grad_norm\n1,2\n2,"3\n' + "4,5\n" * 99, "log:3 .*not CSV"),
    "quotes in a string without an end": (
        GOOD + '{"a": "' + 'a\\"' * 200_000 + "\n" + GOOD,
        "log:4",
    ),
    "names that change": (
        GOOD * 4 + '{"step": 9, "gnorm": 1.5}\n' * 12,
        r"12 norms named 'grad_norm' and, in other rows, 12 named 'gnorm'.*--norm-key",
    ),
    "steps that count nothing": (
        "step,grad_norm\n" + "".join(f"{n % 2},1.{n}\n" for n in range(99)),
        "'step' goes back 49 times among 99 norms.*--step-key",
    ),
    "compressed": (b"\x1f\x8b\x08\0" * 9, "compressed by gzip; unpack it first"),
    "parentheses": ("a(b=" * 50_000 + "\n", "no column"),
    "names that count": (
        "".join(f"key_of_iteration{n}=1 " + "\n" * (n % 99 == 0) for n in range(21_000)),
        "and 19960 more",
    ),
    "braces": ("x{" * 100_000 + "'a': " * 100_000 + "\n", "no column"),
    "quotes": ("[\n" + '"' * 300_001, "no column|not JSON"),
    "binary": (b"\x7fELF\0\1\2" * 100, "neither text nor"),
}


def timed_read(path):
    begin = time.thread_time()
    try:
        return read_log(path)
    finally:
        assert time.thread_time() - begin < 1


@pytest.mark.parametrize("name", READ)
def test_it_is_read(name, tmp_path):
    text, norms, nonfinite = READ[name]
    path = tmp_path / "log"
    path.write_text(text, encoding="utf-8", newline="\n")
    (run,) = timed_read(path)
    assert (len(run.norms), run.nonfinite) == (norms, nonfinite)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_an_error_that_says_where(name, tmp_path):
    text, message = REFUSED[name]
    path = tmp_path / "log"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(GradClipError, match=message):
        timed_read(path)


def test_a_line_without_an_end_is_not_read_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr("gradclip.diagnostics.readers.source._LONGEST_LINE", 1000)
    path = tmp_path / "log"
    path.write_text(GOOD + '{"a": "' + "a" * 2000 + '"}\n')
    with pytest.raises(GradClipError, match=r"log:4 .*longer than 1000 characters"):
        read_log(path)


def test_text_of_windows_shells_is_read(tmp_path):
    path = tmp_path / "log"
    path.write_bytes("step,grad_norm\r\n1,2\r\n2,3\r\n".encode("utf-16"))
    (run,) = read_log(path)
    assert run.norms.tolist() == [2, 3]


def test_what_is_no_file_is_an_error(tmp_path):
    (tmp_path / "metrics.csv").write_text("a")
    with pytest.raises(GradClipError, match=r"(?s)name a record or a log in it.*metrics\.csv"):
        read_log(tmp_path)
    with pytest.raises(GradClipError, match="No such file"):
        read_log(tmp_path / "missing")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(GradClipError, match="it is no file"):
            read_log(tmp_path / "pipe")


def test_a_damaged_event_file_is_an_error_or_read_up_to_there(tmp_path):
    pytest.importorskip("tensorboard", reason="in the extra `logs`")
    head = b"\x18\0\0\0\0\0\0\0\xa3\x7f\x4b\x22\x09\0\0\xc0%\xdd\x75\xd9A\x1a\rbrain.Event:2"
    (tmp_path / "log").write_bytes(head + json.dumps(READ["nulls"][0]).encode())
    with pytest.raises(GradClipError, match="no column"):
        timed_read(tmp_path / "log")
