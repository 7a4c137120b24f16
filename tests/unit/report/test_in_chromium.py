"""The report in a real Chromium: one browser, one record of 5,000 steps x 300 parameters."""

import json
import re
import struct
import zlib
from importlib import resources
from urllib.parse import urlsplit

import pytest

import chromium
from gradclip.diagnostics import read_steps
from gradclip.diagnostics.runs import read_runs
from gradclip.report import write_report
from made_up_record import EXPLODES, write_record
from patience import seconds

pytestmark = pytest.mark.skipif(
    chromium.PROGRAM is None, reason="there is no Chromium here to open the report with"
)

NORM, LOSS, SHARE, HEAT = range(4)
"""The charts, from top to bottom."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_record(folder / "made-up")
    write_report(read_runs(folder / "made-up"), folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def steps(folder):
    return read_steps(folder / "made-up")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = chromium.Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, folder):
    browser.events.clear()
    browser.took = browser.open(folder / "report.html")
    yield browser
    assert noise(browser) == []


def noise(browser):
    """Return what the console says, and what is asked from anywhere but the disk."""
    browser.evaluate("0")  # what came until now is read
    loud = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    said = [event["params"] for event in browser.events if event["method"] in loud]
    asked = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked  # so that requests are seen
    return said + [url for url in asked if urlsplit(url).scheme not in ("file", "data", "about")]


def box(page, chart):
    """Scroll to a chart, and return where it is in the window."""
    text = page.evaluate(
        f"""(() => {{
            const box = document.querySelectorAll(".chart")[{chart}];
            box.scrollIntoView({{ block: "center" }});
            return JSON.stringify(box.getBoundingClientRect());
        }})()"""
    )
    return json.loads(text)


def place(page, chart, share, height=0.5):
    """Return where in the window a share of a chart's steps is."""
    found = box(page, chart)
    left, right = page.evaluate(
        f"""(() => {{
            const clip = document.querySelectorAll(".chart")[{NORM}].querySelector("clipPath rect");
            const left = +clip.getAttribute("x");
            return [left, left + +clip.getAttribute("width")];
        }})()"""
    )
    return found["left"] + left + share * (right - left), found["top"] + height * found["height"]


def shown_range(page):
    return page.evaluate("document.querySelector('.range').textContent")


def ticks(page, chart):
    """Return the steps that are named below a chart."""
    return page.evaluate(
        f"""(() => {{
            const svg = document.querySelectorAll(".chart")[{chart}].querySelector("svg");
            const lowest = svg.viewBox.baseVal.height - 5;
            const texts = [...svg.querySelectorAll("text")];
            return texts.filter((text) => +text.getAttribute("y") === lowest)
                .map((text) => +text.textContent.replaceAll(",", ""));
        }})()"""
    )


def colours(page):
    """Return how many colours the heat map has, and one of them that is often."""
    return page.evaluate(
        """(() => {
            const canvas = document.querySelector(".chart canvas");
            const copy = new OffscreenCanvas(canvas.width, canvas.height);
            const context = copy.getContext("2d", { willReadFrequently: true });
            context.drawImage(canvas, 0, 0);
            const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
            const counts = new Map();
            for (const pixel of new Uint32Array(data.buffer))
                counts.set(pixel, (counts.get(pixel) || 0) + 1);
            return [counts.size, [...counts].sort((a, b) => b[1] - a[1])[0][0]];
        })()"""
    )


def test_it_is_small_opens_soon_and_draws_each_chart(page, folder):
    assert (folder / "report.html").stat().st_size < 3e6
    assert int(page.took) < 1000 * seconds(2)
    title = page.evaluate("document.querySelector('h1').textContent")
    assert re.fullmatch(
        rf"Layer {EXPLODES} makes the spikes: \d+ % of the squared norm in the \d+ clipped steps.",
        title,
    )
    lengths = page.evaluate(
        """[...document.querySelectorAll(".chart")].map((box) =>
            [...box.querySelectorAll("path")]
                .reduce((sum, path) => sum + path.getTotalLength(), 0))"""
    )
    assert len(lengths) == 4
    assert all(length > 500 for length in lengths[:3])
    assert colours(page)[0] > 50
    assert page.evaluate("document.querySelectorAll('.chart .cross').length") == 1
    assert page.evaluate("document.querySelector('.chart .maker').getTotalLength()") > 10
    assert page.evaluate("document.querySelector('.whose').textContent") == f"layer {EXPLODES}"
    above = page.evaluate("document.querySelectorAll('.chart')[1].getBoundingClientRect().bottom")
    assert above < 900  # the finding, the numbers, norms and losses: at first sight


def test_a_hover_tells_the_numbers_of_the_step_in_every_chart(page, steps):
    norms = list(steps.column("norm_pre"))
    for chart, share in ((NORM, 0.5), (LOSS, 0.25), (SHARE, 0.75)):
        page.mouse("mouseMoved", *place(page, chart, share))
        told = page.evaluate("document.getElementById('hint').innerText")
        at = int(re.match(r"Step ([\d,]+)", told)[1].replace(",", ""))
        assert at == pytest.approx(share * (len(steps) - 1), abs=6)
        assert float(re.search(r"norm\s+([\d.]+)", told)[1]) == pytest.approx(norms[at], rel=6e-3)
        assert float(re.search(r"limit\s+([\d.]+)", told)[1]) == steps[at].threshold
        assert float(re.search(r"loss\s+([\d.]+)", told)[1]) == pytest.approx(
            steps[at].loss, rel=6e-3
        )
        places = page.evaluate(
            """[...document.querySelectorAll(".cursor")].map((line) =>
                [line.getAttribute("display"), line.getAttribute("x1")].join())"""
        )
        assert len(places) == 4
        assert len(set(places)) == 1
        assert f"Step {at:,}: " in page.evaluate("document.querySelector('.reading').textContent")
    page.mouse("mouseMoved", *place(page, HEAT, 0.5, (EXPLODES + 0.5) / 34))
    told = page.evaluate("document.getElementById('hint').innerText")
    assert told.startswith(f"model.layers.{EXPLODES}.")  # as a limit by name needs it
    assert "ratio" in told


def test_a_drag_zooms_all_charts_and_keys_and_buttons_do(page):
    whole, map_before = [ticks(page, chart) for chart in range(4)], colours(page)
    from_x, y = place(page, LOSS, 0.4)
    to_x, _ = place(page, LOSS, 0.5)
    page.mouse("mouseMoved", from_x, y)
    page.mouse("mousePressed", from_x, y, button="left", clickCount=1)
    page.mouse("mouseMoved", to_x, y, button="left", buttons=1)
    page.mouse("mouseReleased", to_x, y, button="left", clickCount=1)
    assert re.fullmatch(r"steps (1,99|2,00)\d to 2,(49|50)\d", shown_range(page))
    zoomed = [ticks(page, chart) for chart in range(4)]
    assert zoomed == [zoomed[0]] * 4 != whole
    assert all(1990 <= tick <= 2510 for tick in zoomed[0])
    assert colours(page) != map_before

    page.evaluate(f"document.querySelectorAll('.chart')[{SHARE}].focus()")
    page.key("Escape")
    assert shown_range(page) == "all steps"
    assert [ticks(page, chart) for chart in range(4)] == whole
    said = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.key(key)
        said.append(page.evaluate("document.querySelector('.step').value"))
    page.key("ArrowRight", shift=True)
    said.append(page.evaluate("document.querySelector('.step').value"))
    first, second, third, far = map(int, said)
    assert (second - first, third - second, far - third) == (1, -1, 100)
    spoken = page.evaluate("document.querySelector('.step').getAttribute('aria-valuetext')")
    assert spoken.startswith(f"Step {far:,}: norm ")
    page.key("+")
    assert shown_range(page) != "all steps"
    page.evaluate("document.querySelector('.all').click()")
    assert shown_range(page) == "all steps"
    step = page.evaluate(
        """(() => {
            const button = document.querySelector("[data-go]");
            button.click();
            return +button.dataset.go;
        })()"""
    )
    assert page.evaluate("document.querySelector('.reading').textContent").startswith(
        f"Step {step:,}: "
    )
    low, high = (int(each.replace(",", "")) for each in re.findall(r"[\d,]+", shown_range(page)))
    assert low <= step <= high < low + 200


def test_a_label_that_is_cut_keeps_what_it_differs_in(page):
    names = [f"encoder.{part}" for part in ("a.in_proj_weight", "a.in_proj_bias", "a.out.bias")]
    names += ["encoder.linear1.bias", "encoder.linear2.bias", "3.mlp.gate.weight"]
    names += ["4.mlp.gate.weight", "x" * 20, "y" + "x" * 20]
    script = (resources.files("gradclip.report") / "page" / "frame.js").read_text()
    call = "names.map((name) => fitted(name, 15 * LETTER, names))"
    cut = page.evaluate(
        f"(() => {{ {script}; const names = {json.dumps(names)}; return {call}; }})()"
    )
    assert cut == [
        "\u2026in_proj_weight",
        "\u2026a.in_proj_bias",
        "\u2026a.out.bias",
        "\u2026linear1.bias",
        "\u2026linear2.bias",
        "3\u2026gate.weight",
        "4\u2026gate.weight",
        "x\u2026" + "x" * 13,
        "y\u2026" + "x" * 13,
    ]


def test_light_dark_narrow_and_on_paper(page, folder):
    light = colours(page), page.evaluate("getComputedStyle(document.body).backgroundColor")
    pictures = {"light": page.screenshot()}
    page.look(dark=True)
    page.next_frame()
    dark = colours(page), page.evaluate("getComputedStyle(document.body).backgroundColor")
    pictures["dark"] = page.screenshot()
    assert light[1] == "rgb(255, 255, 255)" != dark[1]
    assert light[0][1] != dark[0][1]  # the usual norm has the page's grey

    pdf = page.pdf()  # of a dark page
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 6
    assert page.evaluate("document.documentElement.className") == ""
    assert colours(page) == dark[0]

    page.open(folder / "report.html", width=400, height=800)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    pictures["narrow"] = page.screenshot()
    outside = page.evaluate(
        """[...document.querySelectorAll(".chart text")].filter((text) => {
            const { left, right } = text.getBoundingClientRect();
            return left < 0 || right > 400;
        }).map((text) => text.textContent)"""
    )
    assert outside == []
    assert {name: colours_of(picture) > 30 for name, picture in pictures.items()} == dict.fromkeys(
        pictures, True
    )


def colours_of(png):
    """Return how many bytes a PNG has that differ from the one before: 0 of a blank picture."""
    data, at = b"", 8
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        if kind == b"IDAT":
            data += png[at + 8 : at + 8 + size]
        at += size + 12
    return len(set(zlib.decompress(data)))


def test_before_it_is_drawn_and_without_javascript_it_says_so(page, folder):
    before = "getComputedStyle(document.querySelector('.chart'), '::before').content"
    assert page.evaluate(before) == "none"
    page.evaluate("document.querySelector('.chart').replaceChildren()")
    assert page.evaluate(before) == '"Drawing \u2026"'
    page.ask("Emulation.setScriptExecutionDisabled", value=True)
    page.ask("Page.navigate", url=(folder / "report.html").as_uri())
    shown = page.wait("document.querySelector('noscript')?.innerText")
    drawn = page.evaluate("document.querySelector('.chart').checkVisibility()")
    page.ask("Emulation.setScriptExecutionDisabled", value=False)
    assert shown.startswith("The charts need JavaScript. The finding and the numbers are above")
    assert drawn is False


def test_text_can_be_read_and_everything_has_a_name(page):
    for is_dark in (False, True):
        page.look(dark=is_dark)
        page.next_frame()
        faint = page.evaluate(
            """(() => {
                const light = (text) => {
                    const parts = text.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
                    const linear = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
                    const [r, g, b] = parts.map(linear);
                    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
                };
                const under = (element) => {
                    for (; element; element = element.parentElement) {
                        const colour = getComputedStyle(element).backgroundColor;
                        if (!colour.endsWith(", 0)")) return colour;
                    }
                };
                const texts = [...document.querySelectorAll("main *")].filter((element) =>
                    [...element.childNodes].some((one) => one.nodeType === 3 && one.data.trim()) &&
                    !["SCRIPT", "OPTION", "title"].includes(element.tagName));
                return texts.filter((element) => {
                    const style = getComputedStyle(element);
                    const colour = element instanceof SVGElement ? style.fill : style.color;
                    const pair = [light(colour), light(under(element))].sort((a, b) => b - a);
                    return pair[0] / pair[1] < 4.5;
                }).map((element) => element.outerHTML.slice(0, 80));
            })()"""
        )
        assert faint == []
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, select, input, [tabindex], svg, summary")]
            .filter((element) => !element.getAttribute("aria-label") &&
                !element.textContent.trim() && !element.labels?.length)
            .map((element) => element.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    assert page.evaluate("document.querySelectorAll('h1').length") == 1
    twice = page.evaluate(
        """(() => {
            const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
            return ids.filter((id, at) => ids.indexOf(id) !== at);
        })()"""
    )
    assert twice == []


def test_several_runs_one_of_very_many_steps(page, folder):
    lines = ["step,grad_norm,loss,max_grad_norm"]
    # It falls so far that no limit is suggested, which saves the test the replay of policies.
    norms = [(1 + at % 7) * (1 if at < 15000 else 1e-3) for at in range(21000)]
    norms[12345] = 50
    lines += [f"{at},{norm},{9 - at / 5000},20" for at, norm in enumerate(norms)]
    (folder / "long.csv").write_text("\n".join([*lines, ""]))
    lines = ["step,grad_norm", *(f"{at},nan" for at in range(5)), ""]
    (folder / "nan.csv").write_text("\n".join(lines))
    runs = [run for name in ("long.csv", "nan.csv") for run in read_runs(folder / name)]
    write_report(runs, folder / "both.html")

    page.open(folder / "both.html")
    titles = page.evaluate("[...document.querySelectorAll('.finding')].map((e) => e.textContent)")
    assert titles == [
        "The limit of 20 clipped 1 of 21,000 logged steps.",
        "No gradient norm is finite, in 5 logged steps.",
    ]
    assert page.evaluate("document.querySelectorAll('.band').length") > 0
    page.mouse("mouseMoved", *place(page, NORM, 12345 / 21000))
    told = page.evaluate("document.getElementById('hint').innerText")
    low, high = re.match(r"Steps ([\d,]+) to ([\d,]+)", told).groups()
    assert int(high.replace(",", "")) - int(low.replace(",", "")) == 2  # buckets of three steps
    peak = page.evaluate("document.querySelector('.chart .name').textContent")
    assert peak == "50 at step 12,345"
