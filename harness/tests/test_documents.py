"""README and docs: links lead somewhere, code compiles, commands and options exist, TOML and YAML can be read."""

import re
import shlex
from dataclasses import fields

import pytest
import torch
from torch import nn

from harness import Case
from harness.commands.main import COMMANDS, main
from harness.conformance import __main__ as conformance
from harness.devices import Stack
from harness.judging.preset_names import PRESET_NAMES
from harness.models.aimv2_layouts import layout_names
from harness.plugin.options import OPTIONS
from harness.tests.test_commands import ROOT
from harness.upgrade.tables import tomllib

README = ROOT / "README.md"
PAGES = [README, ROOT / ".github" / "CONTRIBUTING.md", *sorted((ROOT / "harness" / "docs").rglob("*.md"))]
PAGES += [ROOT / "harness" / "emulator" / "README.md"]
if not README.exists():  # a wheel holds no documents
    pytest.skip("these are tests of a checkout", allow_module_level=True)


def named(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def of_pages(language):
    return [
        pytest.param(text, id=f"{named(path)}-{n}") for path in PAGES for n, text in enumerate(blocks(path, language))
    ]


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings_that_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S))
    for link in links:
        if link.startswith("http"):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{named(page)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{named(page)} links to {link}"


def test_every_page_is_reached_from_the_readme_which_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    seen, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        waiting += [
            (page.parent / link).resolve()
            for link in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
            if "://" not in link
        ]
    assert {*PAGES} <= seen


def files_named(page):
    """(file, folder) of every file in code in a page's tables; a name without a folder is of the last one before it."""
    for line in page.read_text().splitlines():
        folder = ROOT
        for name in re.findall(r"`([\w./*-]+)`", line) if line.startswith("|") else ():
            if name.endswith("/") and (ROOT / name).is_dir():
                folder = ROOT / name
            elif re.search(r"\.(py|c|h|csv|txt|toml)$", name):
                folder = (ROOT / name).parent if name.startswith("harness/") else folder
                yield (name if name.startswith("harness/") else str(folder.relative_to(ROOT) / name)).removeprefix("./")


def test_the_files_that_contributors_are_sent_to_exist():
    names = list(files_named(ROOT / ".github" / "CONTRIBUTING.md"))
    assert len(names) > 50 and [name for name in names if not [*ROOT.glob(name)]] == []


def test_a_file_that_is_no_more_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "| `harness/report/` | rows (`rows.py`), judged again (`again.py`) |\n| `harness/no/gone.py` | x |\n"
    )
    assert list(files_named(page)) == ["harness/report/rows.py", "harness/report/again.py", "harness/no/gone.py"]


class MyModel(nn.Module):
    """What the blocks call a model of one's own."""

    def __init__(self):
        super().__init__()
        self.out = nn.Conv2d(3, 4, 16, stride=16)

    def forward(self, x):
        return self.out(x)


@pytest.mark.parametrize("text", of_pages("python"))
def test_python_can_be_read(text):
    compile(text.replace("\n    ...\n", "\n    pass\n"), "block", "exec")


@pytest.mark.parametrize(
    "page", [README, ROOT / "harness" / "docs" / "models.md", ROOT / "harness" / "docs" / "zh" / "README.md"], ids=named
)
def test_a_case_of_ones_own_runs_as_it_is_shown(page):
    (text,) = [block for block in blocks(page, "python") if "Case(" in block]
    names = {"MyModel": MyModel, "torch": torch}
    exec(text, names)
    (case,) = [name for name in names.values() if isinstance(name, Case)]
    inputs = case.inputs(torch.Generator().manual_seed(0))
    assert case.model()(inputs).shape == (1, 4, 14, 14)


def test_the_options_of_pytest_are_those_there_are():
    """Each option is in the table, and the table names no other."""
    page = (ROOT / "harness" / "docs" / "commands.md").read_text()
    table = page[page.index("## Options of pytest") : page.index("## Commands")]
    told = set(re.findall(r"`--([a-z-]+)", table)) - {"NAME", "junitxml"} - {"precision-"}
    assert told == {option.name for option in OPTIONS} - HIDDEN


def test_the_commands_are_those_there_are():
    page = (ROOT / "harness" / "docs" / "commands.md").read_text()
    table = page[page.index("| command | what it does |") :]
    assert set(re.findall(r"^\| `([a-z]+)` \|", table, re.M)) == {command.name for command in COMMANDS}
    measuring = table[table.index("`python -m harness.conformance") :]
    assert {*re.findall(r"`([a-z]+)`", measuring), "architectures"} >= set(conformance.PARTS)


def test_the_presets_are_those_there_are():
    for page in (ROOT / "harness" / "docs" / "judging.md", ROOT / "harness" / "docs" / "zh" / "judging.md"):
        rows = re.findall(r"^\| `([a-z]+)`.*\|.*\|.*\|$", page.read_text(), re.M)
        assert tuple(rows) == PRESET_NAMES, page


@pytest.mark.parametrize("page", ["commands.md", "models.md"])
def test_the_layouts_are_those_there_are(page):
    text = (ROOT / "harness" / "docs" / page).read_text()
    assert re.findall(r"^\|.*AIMv2.* layout:? (.*? or \w+) \|", text, re.M) == [layout_names()]


HIDDEN = {"locate-case", "locate-seed", "locate-backward"}  # what `python -m harness locate` hands to pytest


def lines():
    """The lines of shell: of blocks, and of what a workflow runs."""
    for page in PAGES:
        for language in ("bash", "yaml"):
            for text in blocks(page, language):
                for line in text.replace("\\\n", " ").splitlines():
                    yield page, line.split("   #")[0].strip()


def commands(pattern):
    """What follows a command in blocks, each once."""
    result = {}
    for page, line in lines():
        match = re.search(rf"{pattern} (.*)$", line)
        if match:
            result.setdefault(f"{named(page)}: {match[1]}", match[1].split(" && ")[0].split(" > ")[0])
    ids = [f"{key.split(':')[0]}-{number}" for number, key in enumerate(result)]  # without words that `-k` selects by
    return [pytest.param(words, id=item) for item, words in zip(ids, result.values())]


@pytest.mark.parametrize("words", commands(r"python -m harness"))
def test_a_command_and_its_options_exist(words, capsys):
    command, *rest = shlex.split(words)
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    help_text = capsys.readouterr().out
    assert ended.value.code == 0
    for argument in rest:
        if argument.startswith("--"):
            assert re.search(rf"(?<![\w-]){re.escape(argument.partition('=')[0])}(?![\w-])", help_text), argument


OTHERS = {"--junitxml", "--dist", "-n", "-k"}  # of pytest and of pytest-xdist


@pytest.mark.parametrize("words", commands(r"(?<!install )\bpytest"))
def test_an_option_of_pytest_exists(words):
    known = OTHERS | {name for option in OPTIONS for name in (option.flag, option.short)}
    options = {word.partition("=")[0] for word in shlex.split(words) if word.startswith("-")}
    assert options <= known, options - known


@pytest.mark.parametrize(
    "module, there",
    [
        ("harness", {command.name for command in COMMANDS}),
        ("harness.conformance", set(conformance.PARTS)),
        ("harness.benchmarks", {path.stem for path in (ROOT / "harness" / "benchmarks").glob("[a-z]*.py")}),
    ],
)
def test_commands_that_the_text_names_exist(module, there):
    named_in_text = {
        name for page in PAGES for name in re.findall(rf"`python -m {re.escape(module)} ([a-z]\w*)", page.read_text())
    }
    assert named_in_text and named_in_text <= there, named_in_text - there


def test_the_table_of_the_stack_has_every_field():
    page = (ROOT / "harness" / "docs" / "stack.md").read_text()
    first_cells = re.findall(r"^\| (`[^|]*) \|", page, re.M)
    told = [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(told) == sorted(field.name for field in fields(Stack))


@pytest.mark.parametrize("text", of_pages("toml"))
def test_toml_can_be_read(text):
    assert tomllib.loads(text)


@pytest.mark.parametrize("text", of_pages("yaml"))
def test_yaml_can_be_read(text):
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(text)
