"""The site that ``make docs`` built: its reference is whole, and its search finds the answers."""

import re
import shutil
import subprocess
import zlib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "_build" / "html"
MODULES = [
    "gradclip",
    "gradclip.config",
    "gradclip.diagnostics",
    "gradclip.hook",
    "gradclip.integrations.accelerate",
    "gradclip.integrations.deepspeed",
    "gradclip.integrations.lightning",
    "gradclip.integrations.torch_optim",
    "gradclip.integrations.transformers",
    "gradclip.pipeline",
    "gradclip.pipeline.hooks",
    "gradclip.presets",
]
# Described as what they are, and not as names.
ELSEWHERE = {"__version__", "config", "errors", "presets"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def described():
    """Every name that the reference describes, by its last part."""
    inventory = (SITE / "objects.inv").read_bytes()
    lines = zlib.decompress(inventory.split(b"\n", 4)[4]).decode().splitlines()
    return {line.split()[0].rpartition(".")[2] for line in lines if " py:" in line}


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_every_public_name(module, described):
    assert set(import_module(module).__all__) - ELSEWHERE <= described


def test_the_reference_has_every_error(described):
    errors = vars(import_module("gradclip.errors"))
    assert {name for name in errors if name.endswith("Error")} <= described


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_outside_of_the_site_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        assert (ROOT / path).exists(), link
        if anchor:
            built = SITE / Path(path).relative_to("docs").with_suffix(".html")
            assert f'id="{anchor}"' in built.read_text(encoding="utf-8"), link


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("NaN", "how-to/loss-is-nan"),
        ("loss is nan", "how-to/loss-is-nan"),
        ("choose max_norm", "how-to/choosing-a-limit"),
        ("which layer", "how-to/which-layer"),
        ("clip_grad_norm_", "reference/api/clipping"),
        ("lightning", "how-to/coming-from-torch"),
        ("torchtitan", "reference/integrations/loops"),
    ],
)
def test_the_search_finds_the_answer_first(asked, answer):
    page = (SITE / "search.html").as_uri() + "?q=" + asked.replace(" ", "+")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000"]
    found = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", page],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    assert re.findall(r'<li class="kind-\w+"><a href="([\w/-]+)\.html', found)[:1] == [answer]
