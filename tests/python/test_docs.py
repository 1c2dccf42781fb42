"""What the documents say: links lead somewhere, commands and keys are those of the program."""

import re
from pathlib import Path

import pytest
import typer
import yaml

from megatrain_io import errors
from megatrain_io.cli.app import app
from megatrain_io.config.parse import load

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benches").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
VERBS = {command.name for command in app.registered_commands}


def blocks(language: str) -> list[str]:
    """The contents of the README's fenced blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Relative targets of links, without what stands behind a #."""
    found = (target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text))
    return [target for target in found if target and "://" not in target]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_of_the_project(document):
    text = document.read_text(encoding="utf-8")
    assert [target for target in links(text) if not (document.parent / target).exists()] == []


def test_a_link_that_leads_nowhere_is_noticed():
    assert links("[a](b.md#c) [d](https://e.org/f) [g](#h) [i](../j)") == ["b.md", "../j"]


def test_every_command_of_make_in_the_readme_is_a_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make ([a-z-]+)$", README.replace("`", "\n"), re.MULTILINE))
    assert {"demo", "test", "wheel", "wheel-check"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def test_installing_comes_before_make():
    assert 0 < README.index("\npip install megatrain-io\n") < README.index("\nmake ")


def test_every_verb_that_the_readme_names_exists():
    named = set(re.findall(r"megatrain-io ([a-z]+)", README))
    assert {"import", "train", "generate", "export"} <= named
    assert named <= VERBS


def test_every_option_that_the_readme_names_exists():
    commands = typer.main.get_command(app).commands
    for verb, rest in re.findall(r"megatrain-io ([a-z]+)([^`\n]*)", README):
        known = {option for parameter in commands[verb].params for option in parameter.opts}
        assert set(re.findall(r" (--[a-z-]+)", rest)) <= known, verb


def test_the_configuration_of_the_readme_loads_as_it_is_meant(tmp_path):
    (example,) = blocks("yaml")
    path = tmp_path / "my.yaml"
    path.write_text(example, encoding="utf-8")
    config, notes = load(path)
    assert notes == []
    written = yaml.safe_load(example)
    assert Path(config.model) == Path(written["model"])
    assert Path(config.output_dir) == Path(written["output_dir"])
    assert [Path(source) for source in config.data.train] == [Path(written["data"]["train"])]
    for name, value in written["train"].items():
        assert getattr(config.train, name) == value, name


def test_the_python_of_the_readme_can_be_imported():
    lines = [line for example in blocks("python") for line in example.splitlines()]
    imports = [line for line in lines if line.startswith(("from ", "import "))]
    assert imports
    for line in imports:
        exec(line, {})  # noqa: S102 - a line of our own README


def test_every_row_of_figures_names_its_command():
    """A figure without the command that gives it is a claim."""
    body = README.partition("## Measured")[2].partition("## Limits")[0]
    rows = [line for line in body.splitlines() if line.startswith("|")][2:]
    assert rows
    assert [row for row in rows if "`" not in row.split("|")[4]] == []


def test_tests_that_documents_name_exist():
    files = {path.name for folder in ("tests", "rust") for path in (ROOT / folder).rglob("*.*")}
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "rust" / "src").rglob("*.rs"))
    sources += "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert [name for name in re.findall(r"\btest_\w+\.py\b", text) if name not in files] == []
    for name in re.findall(
        r"`([a-z]+(?:_[a-z]+){2,})`", README + (ROOT / "docs/unsafe.md").read_text("utf-8")
    ):
        assert f"fn {name}(" in sources or f"def {name}(" in sources or name in sources, name


RELIABILITY = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
FAULTS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in RELIABILITY.partition("## Faults")[2].partition("\n## ")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| fault")
]


def names_of_tests():
    """Every test of the project, in either language."""
    found = set()
    for folder, pattern, definition in (
        ("tests", "*.py", r"^def (test_\w+)\("),
        ("rust", "*.rs", r"^\s*(?:async )?fn (\w+)\(\)"),
    ):
        for path in (ROOT / folder).rglob(pattern):
            found.update(re.findall(definition, path.read_text(encoding="utf-8"), re.MULTILINE))
    return found


def test_each_fault_is_shown_by_tests_that_exist():
    assert len(FAULTS) > 15
    named = [name for row in FAULTS for name in re.findall(r"`(\w+)`", row[4])]
    assert all(re.search(r"`\w+`", row[4]) for row in FAULTS)
    assert sorted(set(named) - names_of_tests()) == []


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: row[0])
def test_each_fault_has_the_exit_code_of_its_error(row):
    classes = [getattr(errors, name) for name in re.findall(r"`(\w+Error)`", row[1])]
    codes = {"-"} if not classes else {str(kind.exit_code) for kind in classes}
    assert {row[2]} == codes
