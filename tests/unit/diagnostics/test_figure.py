import math
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree as ET

import matplotlib as mpl
import pytest

from gradclip.diagnostics import GroupRecord, StepRecord, clipping_figure, save_figure
from gradclip.errors import ArgumentValueError, MissingDependencyError

CLIPPED = [
    StepRecord(
        step=step,
        loss=4.0 - step / 50,
        norm_pre=100.0 / (1 + step),
        threshold=2.0,
        clipped=step < 49,
    )
    for step in range(100)
]
UNCLIPPED = [
    replace(record, loss=record.loss + 1, threshold=math.inf, clipped=False) for record in CLIPPED
]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_two_panels_share_the_steps_and_the_title_states_the_finding():
    figure = clipping_figure(CLIPPED, UNCLIPPED)
    above, below = figure.axes

    assert (above.get_yscale(), below.get_yscale()) == ("log", "linear")
    assert above.get_xlim() == below.get_xlim() == (0, 99)
    assert figure.get_suptitle() == (
        "Clipped 49 of 100 steps (49 %) at max_norm 2.0: loss 2.51; without: 3.51"
    )
    assert clipping_figure(CLIPPED, title="a run").get_suptitle() == "A run"


def test_the_curves_are_the_records():
    above, below = clipping_figure(CLIPPED, UNCLIPPED).axes
    unclipped_norm, norm, threshold = above.lines
    unclipped_loss, loss = below.lines

    assert list(norm.get_ydata()) == [record.norm_pre for record in CLIPPED]
    assert list(unclipped_norm.get_ydata()) == [record.norm_pre for record in UNCLIPPED]
    assert set(threshold.get_ydata()) == {2.0}
    assert list(loss.get_ydata()) == [record.loss for record in CLIPPED]
    assert list(unclipped_loss.get_ydata()) == [record.loss for record in UNCLIPPED]
    assert texts(above) == ["threshold 2.0", "clipped 49 of 100"]
    assert texts(below) == ["unclipped 3.51", "clipped 2.51"]


TEXTS = [
    r"$\frac{1}{$",
    r"a run with $\frac{1}{$ in its name " + "and more " * 20,
    "a $ b $ c",
    r"from \$1 to $2",
    r"\alpha",
    "50 % of $10_000",
    "{0} %s",
]


def shown(figure, path):
    """Return the words of a figure as a reader sees them."""
    with mpl.rc_context({"svg.fonttype": "none"}):
        save_figure(figure, path)
    return " ".join(ET.parse(path).getroot().itertext())


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("rc", [{}, {"text.parse_math": False}, {"text.usetex": True}])
def test_a_title_is_shown_as_it_is(tmp_path, text, rc):
    with mpl.rc_context(rc):
        words = shown(clipping_figure(CLIPPED[:2], title=text), tmp_path / "x.svg")
    assert " ".join((text[:1].upper() + text[1:]).split()) in " ".join(words.split())


@pytest.mark.parametrize("text", TEXTS[:1] + TEXTS[2:])
def test_a_pattern_is_shown_as_it_is(tmp_path, text):
    groups = {text: GroupRecord(norm_pre=1.0, threshold=0.5)}
    records = [StepRecord(step=0, norm_pre=1.0, groups=groups)]
    words = shown(clipping_figure(records), tmp_path / "x.svg")
    assert f"threshold 0.5 of {text}" in words
    assert f"at max_norm 0.5 ({text})" in words


def by_group(count):
    """A run whose group number n has the norm n + 1 and the limit (n + 1) / 2."""
    groups = {
        f"_layer{n}.*": GroupRecord(norm_pre=n + 1.0, threshold=(n + 1) / 2) for n in range(count)
    }
    return [replace(record, groups=groups) for record in CLIPPED]


@pytest.mark.parametrize("count", [1, 2, 6, 9])
def test_each_group_has_its_norm_and_its_limit_in_a_colour_of_its_own(tmp_path, count):
    figure = clipping_figure(by_group(count))
    above, _ = figure.axes
    drawn = min(count, 6)
    norms, limits = above.lines[: 2 * drawn : 2], above.lines[1 : 2 * drawn : 2]

    assert [set(line.get_ydata()) for line in norms] == [{n + 1.0} for n in range(drawn)]
    assert [set(line.get_ydata()) for line in limits] == [{(n + 1) / 2} for n in range(drawn)]
    colors = [line.get_color() for line in norms]
    assert colors == [line.get_color() for line in limits]
    assert len(set(colors)) == drawn
    legend = above.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        f"threshold {(n + 1) / 2} of _layer{n}.*" for n in range(drawn)
    ]
    assert legend.get_title().get_text() == ("6 of 9 patterns" if count == 9 else "")
    assert not [text for text in texts(above) if text.startswith("threshold")]
    save_figure(figure, tmp_path / "groups.png")


def test_clipped_steps_are_ticks_and_nonfinite_ones_crosses():
    bad = {7: math.inf, 60: math.nan}
    records = [
        replace(record, norm_pre=bad[record.step], nonfinite=1, clipped=False, skipped=True)
        if record.step in bad
        else record
        for record in CLIPPED
    ]
    above, _ = clipping_figure(records).axes
    (ticks,) = above.collections
    crosses = above.lines[-1]

    assert [segment[0][0] for segment in ticks.get_segments()] == [
        step for step in range(49) if step != 7
    ]
    assert (crosses.get_marker(), list(crosses.get_xdata())) == ("x", [7, 60])
    assert "non-finite 2 of 100" in texts(above)


def test_a_diverged_run_is_marked_where_it_stopped():
    diverged = [
        record if record.step < 5 else replace(record, loss=math.nan, norm_pre=math.nan)
        for record in UNCLIPPED
    ]
    _, below = clipping_figure(CLIPPED, diverged).axes

    assert "unclipped NaN from step 5" in texts(below)
    assert [
        (list(line.get_xdata()), list(line.get_ydata()))
        for line in below.lines
        if line.get_marker() == "x"
    ] == [([4], [UNCLIPPED[4].loss])]


def test_one_huge_loss_does_not_flatten_the_rest():
    spiked = [replace(r, loss=900.0) if r.step == 3 else r for r in CLIPPED]
    _, below = clipping_figure(spiked).axes

    assert below.get_ylim()[1] < 5
    assert "up to 900 at step 3" in texts(below)


def test_labels_that_would_overlap_are_moved_apart():
    close = [replace(record, loss=record.loss + 0.001) for record in CLIPPED]
    _, below = clipping_figure(CLIPPED, close).axes
    upper, lower = (text.xy[1] for text in below.texts)

    assert upper - lower == pytest.approx(0.09)


def test_a_run_without_losses_or_a_single_step_is_drawn(tmp_path):
    bare = [StepRecord(step=4, norm_pre=0.5)]
    figure = clipping_figure(bare, bare)

    save_figure(figure, tmp_path / "bare.PNG")

    assert (tmp_path / "bare.PNG").read_bytes().startswith(b"\x89PNG")
    (above,) = figure.axes  # nothing is said of losses, nor of clipping
    assert above.get_xlabel() == "optimizer step"
    assert texts(above) == []


@pytest.mark.parametrize("norm", [None, math.nan])
def test_nothing_to_draw_is_an_error(norm):
    with pytest.raises(ArgumentValueError, match="no step of the run has a finite gradient norm"):
        clipping_figure([StepRecord(step=0, loss=1.0, norm_pre=norm)])


def test_the_svg_is_the_same_bytes_each_time_and_small(tmp_path):
    paths = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for path in paths:
        save_figure(clipping_figure(CLIPPED, UNCLIPPED), path)

    one, two = (path.read_bytes() for path in paths)
    assert one == two
    assert b"<dc:date>" not in one
    assert len(one) < 120_000
    assert ET.fromstring(one).tag.endswith("svg")


def test_many_steps_do_not_make_a_large_svg(tmp_path):
    many = [replace(CLIPPED[step % 100], step=step) for step in range(30_000)]
    many[7_777] = replace(many[7_777], norm_pre=1e4)
    figure = clipping_figure(many)
    save_figure(figure, tmp_path / "many.svg")

    assert (tmp_path / "many.svg").stat().st_size < 300_000
    norm, above = figure.axes[0].lines[0], figure.axes[0]
    assert len(norm.get_xdata()) < 9_000
    assert (7_777, 1e4) in zip(norm.get_xdata(), norm.get_ydata(), strict=True)  # what stands out
    (ticks,) = above.collections
    assert 900 < len(ticks.get_segments()) < 2_100
    assert "clipped 14700 of 30000" in texts(above)


def test_no_global_state_and_no_window(tmp_path):
    script = (
        "import sys\n"
        "from gradclip.diagnostics import StepRecord, clipping_figure\n"
        "assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules\n"
        "clipping_figure([StepRecord(step=0, norm_pre=1.0, loss=1.0)])\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_matplotlib_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(MissingDependencyError, match=r'pip install "gradclip\[report\]"'):
        clipping_figure(CLIPPED)


@pytest.mark.parametrize(
    ("norm_at", "ticks"),
    [
        (lambda step: 2.1 + step / 50, ["3", "4"]),
        (lambda step: 3.0 + step / 500, ["2.99", "3.21"]),
        (lambda step: 10.0 ** (step - 50), ["1e-54", "1e-40", "1e-26"]),
        (lambda step: 0.0, []),
    ],
)
def test_any_norms_have_an_axis(tmp_path, norm_at, ticks):
    records = [StepRecord(step=step, norm_pre=norm_at(step), loss=-3.0) for step in range(100)]
    above, _ = clipping_figure(records).axes

    save_figure(above.figure, tmp_path / "norms.png")
    assert [label.get_text() for label in above.get_yticklabels()][: len(ticks)] == ticks
