"""The floors, the fences around `unsafe` and the other rules that a compiler does not know.

First the rules on the project as it is, then each check on something made up, so that a check that sees nothing
is noticed. The tables are in `floors.py`.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import floors

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / floors.PACKAGE
CORE = ROOT / "rust" / "src"
BINDINGS = ROOT / "rust" / "py" / "src"


def texts(*folders: str, suffix: str) -> dict[str, str]:
    """Relative path to text of every file with that suffix."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob(f"*{suffix}"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def nothing_wrong(problems: list[str]) -> None:
    """Fails with one problem a line."""
    assert not problems, "\n" + "\n".join(problems)


@pytest.fixture(scope="module")
def package() -> dict[str, str]:
    """Module name to source of the Python package."""
    sources = texts(PACKAGE.relative_to(ROOT).as_posix(), suffix=".py")
    return {
        floors.python_module(os.path.relpath(ROOT / path, PACKAGE)): text for path, text in sources.items()
    }


def crate(folder: Path) -> dict[str, str]:
    """Module name to source of a Rust crate."""
    sources = texts(folder.relative_to(ROOT).as_posix(), suffix=".rs")
    return {floors.rust_module(os.path.relpath(ROOT / path, folder)): text for path, text in sources.items()}


@pytest.fixture(scope="module")
def core() -> dict[str, str]:
    """Module name to source of the Rust core."""
    return crate(CORE)


@pytest.fixture(scope="module")
def bindings() -> dict[str, str]:
    """Module name to source of the extension."""
    return crate(BINDINGS)


@pytest.fixture(scope="module")
def rust_files() -> dict[str, str]:
    """Path to source of every Rust file."""
    return texts("rust", "tests", "benches", suffix=".rs")


# ------------------------------------------------------------------------------ the project as it is


def test_every_module_is_on_a_floor(package: dict[str, str], core: dict[str, str]) -> None:
    nothing_wrong(floors.homeless(package))
    nothing_wrong(floors.unlisted(core, floors.RUST_FLOORS))


def test_no_python_room_imports_upwards_or_sideways(package: dict[str, str]) -> None:
    nothing_wrong(floors.wrong_imports(floors.python_graph(package)))


def test_no_python_module_imports_in_a_circle(package: dict[str, str]) -> None:
    nothing_wrong(floors.circles(floors.python_graph(package)))


def test_no_rust_module_imports_upwards(core: dict[str, str]) -> None:
    nothing_wrong(floors.upward_imports(floors.rust_graph(core), floors.RUST_FLOORS))


def test_no_two_rust_modules_use_each_other(core: dict[str, str], bindings: dict[str, str]) -> None:
    nothing_wrong(floors.circles(floors.rust_module_graph(core)))
    nothing_wrong(floors.circles(floors.rust_module_graph(bindings)))


def test_no_import_is_hidden_in_a_string(package: dict[str, str]) -> None:
    nothing_wrong(floors.hidden_imports(package))


def test_every_module_declares_what_others_import(package: dict[str, str]) -> None:
    nothing_wrong(floors.undeclared(package))


def test_the_extension_is_imported_by_few(package: dict[str, str]) -> None:
    nothing_wrong(floors.side_doors(package))


def test_files_are_opened_in_one_place(package: dict[str, str]) -> None:
    """A pipe as configuration hung for good; metrics could be read by everybody."""
    nothing_wrong(floors.unguarded_opens(package))


def test_what_must_answer_at_once_imports_nothing_heavy(package: dict[str, str]) -> None:
    nothing_wrong(floors.heavy_imports(package))


def test_a_room_can_be_entered_without_its_other_modules(package: dict[str, str]) -> None:
    nothing_wrong(floors.furnished_rooms(package))


def test_the_core_knows_nothing_of_python(rust_files: dict[str, str]) -> None:
    nothing_wrong(floors.names_pyo3(rust_files))
    manifest = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))
    assert not [name for name in manifest["dependencies"] if name.startswith("pyo3")]


def test_the_reference_imports_torch_and_transformers_only() -> None:
    """What streamed training must equal owes nothing to the code under test."""
    allowed = {*sys.stdlib_module_names, "torch", "transformers", "reference"}
    for path, source in texts("tests/reference", suffix=".py").items():
        names = floors.python_imports(source, package="reference")
        runner = {"pytest"} if Path(path).name.startswith("test_") else set()
        assert floors.foreign(names) <= allowed | runner, path
        assert not floors.own(names), path


def test_unsafe_stays_inside_its_fences(rust_files: dict[str, str]) -> None:
    nothing_wrong(floors.unfenced(floors.unsafe_sites(rust_files)))


def test_the_list_of_unsafe_sites_is_complete(rust_files: dict[str, str]) -> None:
    document = ROOT / "docs" / "unsafe.md"
    text = document.read_text(encoding="utf-8") if document.exists() else ""
    nothing_wrong(floors.miscounted(floors.unsafe_sites(rust_files), text))


def test_files_are_named_for_what_is_in_them(rust_files: dict[str, str]) -> None:
    python_files = texts("python", "tests", "examples", "benches", suffix=".py")
    nothing_wrong(floors.named_for_nothing(python_files | texts("python", suffix=".pyi") | rust_files))


def test_help_imports_nothing_heavy() -> None:
    """`--help` answers at once; one import of torch takes seconds."""
    command = [sys.executable, "-X", "importtime", "-m", floors.PACKAGE, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage" in result.stdout
    imported = {
        name.partition(".")[0]
        for name in re.findall(r"^import time:.*\|\s*(\S+)$", result.stderr, re.MULTILINE)
    }
    assert floors.PACKAGE in imported, "the import log was not understood"
    assert imported & floors.HEAVY == set()


# --------------------------------------------------------------------------------- the checks themselves


def test_a_module_in_no_room_is_noticed() -> None:
    assert floors.homeless(["store.layout", "cache.lru", "swap", "__main__"]) == [
        "cache.lru is in no room: give cache a floor in tests/python/support/floors.py",
        "swap is in no room: give swap a floor in tests/python/support/floors.py",
    ]
    assert floors.unlisted(["store.commit", "cache"], floors.RUST_FLOORS) == [
        "cache is on no floor: give it a row"
    ]


@pytest.mark.parametrize(
    "statement",
    [
        "import megatrain_io.training.trainer",
        "from megatrain_io.training import trainer",
        "from megatrain_io.training.trainer import train",
        "def f():\n    from megatrain_io.training.trainer import train",
        "if TYPE_CHECKING:\n    from megatrain_io.training.trainer import train",
    ],
)
def test_an_upward_import_in_python_is_caught(statement: str) -> None:
    graph = floors.python_graph({"store.layout": statement, "training.trainer": ""})
    assert floors.wrong_imports(graph) == [
        "store.layout (floor 2) imports training.trainer (floor 5), which is above it"
    ]


def test_an_import_from_a_neighbour_is_caught() -> None:
    graph = floors.python_graph({"store.layout": "from megatrain_io.models.probe import probe"})
    assert len(floors.wrong_imports(graph)) == 1
    graph = floors.python_graph(
        {"store.layout": "from megatrain_io.models.probe import probe", "models.probe": ""}
    )
    assert floors.wrong_imports(graph) == [
        "store.layout (floor 2) imports models.probe (floor 2), which is on the same floor"
    ]


@pytest.mark.parametrize(
    "statement", ["import megatrain_io", "from megatrain_io import Store", "from . import Store"]
)
def test_going_out_by_the_front_door_is_caught(statement: str) -> None:
    sources = {"paging.step": statement, "__init__": "from megatrain_io.planning.plan import Plan"}
    problems = floors.wrong_imports(floors.python_graph({**sources, "planning.plan": ""}))
    assert len(problems) == 1, problems
    assert problems[0].startswith("paging.step imports ")


def test_downward_and_foreign_imports_are_allowed() -> None:
    source = "import torch.nn\nfrom collections import abc\nfrom megatrain_io.errors import DataError\n"
    graph = floors.python_graph({"data.files": source, "errors": ""})
    assert graph == {"data.files": {"errors"}, "errors": set()}
    assert floors.wrong_imports(graph) == []


def test_a_whole_room_as_a_name_is_caught() -> None:
    sources = {"store": "", "store.layout": "from megatrain_io import store as s", "store.schedule": ""}
    assert floors.wrong_imports(floors.python_graph(sources)) == [
        "store.layout imports the room store: import its modules, so that it is seen which"
    ]


@pytest.mark.parametrize(
    "source",
    ["importlib.import_module(name)", "from importlib import import_module as f", "__import__(name)"],
)
def test_an_import_by_a_string_is_caught(source: str) -> None:
    sources = {"store.layout": source, "__init__": source, "store.pool": "import importlib"}
    assert floors.hidden_imports(sources) == ["store.layout imports by a string: write an import statement"]


def test_names_that_are_not_declared_are_caught() -> None:
    sources = {
        "config.schema": '__all__ = ["A", "C"]\nA = 1\nB: int = 2\n_D = 3\ndef f(): ...',
        "config.parse": "from megatrain_io.config.schema import A, B, _D",
    }
    assert floors.undeclared(sources) == [
        "config.schema: B is imported elsewhere, and not in __all__",
        "config.schema: C is in __all__, and not defined there",
    ]


def test_a_circle_between_rooms_is_caught() -> None:
    sources = {
        "store.pool": "from megatrain_io.store import layout",
        "store.layout": "def f():\n    import megatrain_io.models.probe",
        "models.probe": "import megatrain_io.store.pool, megatrain_io.config.schema",
        "config.schema": "",
    }
    assert floors.circles(floors.python_graph(sources)) == [
        "models.probe -> store.pool -> store.layout -> models.probe"
    ]


def test_a_circle_inside_a_room_is_caught() -> None:
    sources = {
        "paging.step": "from megatrain_io.paging.gradient import Gradient",
        "paging.gradient": "if TYPE_CHECKING:\n    from megatrain_io.paging import step",
    }
    graph = floors.python_graph(sources)
    assert floors.wrong_imports(graph) == []
    assert floors.circles(graph) == ["paging.gradient -> paging.step -> paging.gradient"]


@pytest.mark.parametrize(
    "statement",
    ["from megatrain_io import _lib", "from megatrain_io._lib import Store", "from ._lib import Store"],
)
def test_a_side_door_to_the_extension_is_caught(statement: str) -> None:
    found = floors.side_doors({"training.trainer": statement, "store.paged_store": statement})
    assert found == [
        "training.trainer imports _lib; only machine.extension, machine.measure, store.inspect, store.paged_store may"
    ]


def test_torch_behind_a_light_module_is_caught() -> None:
    sources = {
        "config.schema": "import json\ndef f():\n    import torch.nn",
        "runs.status": "from megatrain_io.runs.folder import RunFolder",
        "runs.folder": (
            "if TYPE_CHECKING:\n    import torch\n"
            "try:\n    from megatrain_io.models import probe\nfinally:\n    pass"
        ),
        "models.probe": "import torch",
    }
    assert floors.heavy_imports(sources) == [
        f"{way}: {module} must be imported without it"
        for module, way in (
            ("runs.folder", "runs.folder -> models.probe -> torch"),
            ("runs.status", "runs.status -> runs.folder -> models.probe -> torch"),
        )
    ]


def test_a_file_that_is_opened_past_its_room_is_caught() -> None:
    source = "open(x)\nPath(x).read_text()\nwith x.open('wb'): pass\nos.open(x, 0)\nGenerator.open(x)\nopen_file(x)"
    found = floors.unguarded_opens({"runs.metrics": source, "files": source})
    assert [line.partition(":")[0] for line in found] == [f"runs.metrics, line {n}" for n in (1, 2, 3, 4)]


def test_a_room_that_brings_its_modules_along_is_caught() -> None:
    sources = {
        "store": "from megatrain_io.store.pool import pool_sizes",
        "store.pool": '"""x"""\nimport json',
    }
    assert floors.furnished_rooms(sources) == []
    assert floors.furnished_rooms({**sources, "store": '"""Stores."""\nimport json'}) == [
        "store/__init__.py holds more than a docstring"
    ]


@pytest.mark.parametrize(
    "source",
    [
        "use crate::store::Store;",
        "use crate::{error::Result, store::{self, Store as S}};",
        "use super::{super::store::Store};",
        "use super::super::store::*;",
        "fn f() -> crate::store::Store { todo!() }",
        "mod inner { use super::super::super::store::Store; }",
        "#[cfg(test)] mod tests { use super::*; use crate::store::Store; }",
    ],
)
def test_an_upward_import_in_rust_is_caught(source: str) -> None:
    found = floors.upward_imports(floors.rust_graph({"io.uring": source}), floors.RUST_FLOORS)
    assert found == ["io (floor 2) imports store (floor 3), which is above it"]


def test_a_name_of_the_crate_root_is_caught() -> None:
    graph = floors.rust_graph({"io.pool": "use crate::Error;"})
    assert floors.upward_imports(graph, floors.RUST_FLOORS) == [
        "io (floor 2) imports lib (floor 5), which is above it"
    ]


def test_what_is_no_import_in_rust_is_left_alone() -> None:
    source = """
        //! Beneath [`crate::store::Store`].
        /* crate::pipeline::run */
        mod commit;
        use crate::units::{Group, round_up};
        use std::{io, os::fd::OwnedFd};
        const HINT: &str = "crate::pipeline::run \\" unsafe";
        const RAW: &str = r#"unsafe "crate::pipeline" "#;
        const QUOTE: char = '"';
        impl<'a> Deref for View<'a> { fn get(&'a self) -> crate::error::Result<u8> { commit::now('\\'') } }
        mod tests { use super::*; }
    """
    assert floors.rust_graph({"store": source, "lib": "pub use store::Store;"})["store"] == {"error", "units"}
    assert floors.unsafe_sites({"rust/src/store.rs": source}) == {}


@pytest.mark.parametrize(
    ("path", "line", "circle"),
    [
        ("measure.scratch", "use crate::measure::Transfers;", "measure.transfers -> measure.scratch"),
        ("units", "fn f(pool: &crate::memory::pool::Pool) {}", "units -> "),
        ("store.state", "use super::commit; fn f(s: &commit::Sequence) {}", "store.commit -> store.state"),
    ],
)
def test_a_circle_put_into_the_core_is_found(core: dict[str, str], path: str, line: str, circle: str) -> None:
    """Between siblings by the name that their parent re-exports, between rooms, and by a path."""
    found = floors.circles(floors.rust_module_graph(core | {path: core[path] + line}))
    assert found != floors.circles(floors.rust_module_graph(core))
    assert any(circle in f"{walk} -> {walk}" for walk in found), found


@pytest.mark.parametrize(
    ("parent", "child", "is_circle"),
    [
        ("mod child; pub use child::A;", "use super::B;", False),
        ("mod child; pub use child::{A, C}; struct B(C);", "use super::B;", True),
        ("mod child; use child::A; struct B(A);", "use crate::room::B;", True),
        ("mod child; struct B(child::A);", "fn f(b: super::B) {}", True),
        ("mod child; mod other; pub use other::B; use child::A;", "use super::B;", False),
        ("mod child; use child::A;", "use super::other; fn f(b: other::B) {}", False),
        ("mod child; use child::A;", "pub(in crate::room) struct A; pub(super) fn f() {}", False),
        ("mod child; use child::A;", "#[cfg(test)] mod tests { use super::super::B; }", False),
        ("mod child; use child::A;", "use super::*;", True),
        ("mod child; use child::inner::A;", "pub mod inner { use super::super::B; }", True),
        ("#[cfg(test)]\nmod child; use child::A;", "use super::B;", False),
    ],
)
def test_a_parent_may_re_export_its_child_but_not_use_it_back(
    parent: str, child: str, *, is_circle: bool
) -> None:
    sources = {"lib": "mod room; pub use room::A;", "room": parent, "room.child": child, "room.other": ""}
    found = floors.circles(floors.rust_module_graph(sources))
    assert found == ["room -> room.child -> room"] * is_circle


def test_paths_are_modules() -> None:
    python = {"__init__.py": "__init__", "swap.py": "swap", "x/__init__.py": "x", "x/y.py": "x.y"}
    assert {path: floors.python_module(path) for path in python} == python
    rust = {"lib.rs": "lib", "engine/uring.rs": "engine.uring", "store/mod.rs": "store"}
    assert {path: floors.rust_module(path) for path in rust} == rust


def test_python_in_the_core_is_caught() -> None:
    files = {
        "rust/src/store.rs": "use pyo3::prelude::*; // pyo3",
        "rust/py/src/lib.rs": "use pyo3::prelude::*;",
    }
    assert floors.names_pyo3(files) == ["rust/src/store.rs names pyo3; only rust/py may"]
    assert floors.names_pyo3({"rust/src/store.rs": "// not for pyo3"}) == []


def test_unsafe_outside_the_fences_is_caught_and_counted() -> None:
    code = "#![deny(unsafe_code)] unsafe impl Send for R {} // unsafe\nfn f() { unsafe { g() } }"
    sites = floors.unsafe_sites(
        {"rust/src/memory/slot.rs": code, "rust/src/pool.rs": "unsafe fn f() {}", "x.rs": ""}
    )
    assert sites == {"rust/src/memory/slot.rs": 2, "rust/src/pool.rs": 1}
    assert [sentence.partition(";")[0] for sentence in floors.unfenced(sites)] == [
        "rust/src/pool.rs has 1 unsafe sites"
    ]


def test_a_wrong_row_about_unsafe_is_caught() -> None:
    document = "| file | sites | why |\n|---|---|---|\n| `a.rs` | 2 | x |\n| `b.rs` | 1 | y |\n| `gone.rs` | 1 | z |\n"
    assert floors.miscounted({"a.rs": 2, "b.rs": 3, "new.rs": 1}, document) == [
        "docs/unsafe.md says 1 of b.rs; the row should begin: | `b.rs` | 3 |",
        "docs/unsafe.md says 1 of gone.rs; the row should begin: | `gone.rs` | 0 |",
        "docs/unsafe.md says nothing of new.rs; the row should begin: | `new.rs` | 1 |",
    ]


def test_nameless_files_are_caught() -> None:
    names = [
        "rust/src/units.rs",
        "rust/src/io_utils.rs",
        "python/common/x.py",
        "tests/helpers.py",
        "a/manager.rs",
    ]
    assert [sentence.partition(":")[0] for sentence in floors.named_for_nothing(names)] == names[1:]
