"""What the layout promises to a reader, and no tool of ``make check`` looks at."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "gradclip"
FILES = sorted(SOURCE.rglob("*.py"))


def classes():
    """Return each class of ours by name: its bases by name, and the names that it defines."""
    found = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
                defined = {
                    each.name
                    for each in node.body
                    if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
                }
                where = f"{file.relative_to(SOURCE)}:{node.name}"
                found.setdefault(node.name, []).append((where, bases, defined))
    return found


def test_no_class_overrides_a_private_method_of_another_of_ours():
    known, overridden = classes(), []
    for entries in known.values():
        for where, bases, defined in entries:
            private = {n for n in defined if n.startswith("_") and not n.startswith("__")}
            waiting, seen = list(bases), set()
            while waiting:
                base = waiting.pop()
                if base in seen:
                    continue
                seen.add(base)
                for _, further, theirs in known.get(base, ()):
                    overridden += [f"{where}.{name} of {base}" for name in private & theirs]
                    waiting += further
    assert overridden == []
    assert len(known) > 100  # they were found


def test_the_engine_has_its_rooms_and_no_other_loose_file():
    loose = {file.name for file in (SOURCE / "clipping").glob("*.py")}
    assert loose == {
        "__init__.py",
        "arguments.py",
        "clipper.py",
        "engine.py",
        "flags.py",
        "functional.py",
        "result.py",
        "saved.py",
        "state.py",
    }


def test_files_stay_short():
    lines = {file: file.read_text(encoding="utf-8").count("\n") for file in FILES}
    assert [str(file) for file, count in lines.items() if count > 500] == []
    assert lines[SOURCE / "clipping" / "clipper.py"] <= 250


def test_the_engine_reads_from_collect_to_apply():
    text = (SOURCE / "clipping" / "engine.py").read_text(encoding="utf-8")
    stages = [text.index(f"    # {stage}\n") for stage in ("collect", "measure", "decide", "apply")]
    assert stages == sorted(stages)


def test_prose_is_at_most_120_characters_wide():
    wide = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        in_code = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            in_code ^= line.lstrip().startswith("```")
            prose = not in_code and not line.startswith(("|", "!", "```"))
            if prose and len(line) > 120:
                wide.append(f"{page.name}:{number}")
    assert wide == []


def test_pages_name_files_that_exist():
    path = re.compile(r"\b(?:tests|src|benchmarks|docs|examples)/[\w./-]+\.(?:py|md|csv|yaml|svg)")
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {name for page in pages for name in path.findall(page.read_text(encoding="utf-8"))}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    assert len(named) > 10


def test_the_page_for_those_who_come_from_robo_orchard_lab_has_a_test_for_each_difference():
    place = ROOT / "tests" / "robo_orchard" / "differences.py"
    known: dict[str, object] = {}
    exec(compile(place.read_text(encoding="utf-8"), str(place), "exec"), known)
    page = (ROOT / "docs" / "how-to" / "coming-from-roboorchard.md").read_text(encoding="utf-8")
    assert known["table"]() in page
    for row in known["ROWS"]:
        file, _, name = row.test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
