"""Who may import whom, and the checks of it: pure functions from sources to sentences about what is wrong.

The floors are those of `docs/design.md`: a module imports from its own floor or from those below, never upwards
and never in a circle. A module that is not in a table has its parent's row (`store.commit` belongs to `store`);
one whose parent has none is refused until it gets a row here.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

PACKAGE = "megatrain_io"
ROOT_MODULE = {"python": "__init__", "rust": "lib"}

PYTHON_ROOMS: tuple[frozenset[str], ...] = (
    frozenset({"arguments", "config", "errors", "files", "interrupt", "text"}),
    frozenset({"data", "machine"}),
    frozenset({"models", "store"}),
    frozenset({"paging", "runs"}),
    frozenset({"generate", "planning"}),
    frozenset({"training"}),
    frozenset({"cli"}),
)
"""Rooms of the package by floor, 0 first: a room imports from lower floors alone; ``SERVE_ALL`` serve all."""
SERVE_ALL = {"errors", "files"}
OPENERS = {"open": None, "read_bytes": 0, "read_text": None, "write_bytes": 1, "write_text": None}
"""Methods that open a file without a look at it, or with the rights that the umask leaves; number of arguments."""
OPENED_CLASSES = {"Generator", "PagedModel", "TensorStore"}
"""Classes of ours with an ``open`` of their own."""
OPENS_FILES = {"files", "machine.hardware", "machine.drive", "models.safetensors"}
"""Modules that call the system's ``open`` themselves, or read what came with the package."""
DOORS = {"__init__", "__main__"}
"""Nobody inside goes through them."""
RUST_FLOORS: dict[str, int] = {
    **dict.fromkeys(["error", "units"], 0),
    **dict.fromkeys(["memory", "optimizer"], 1),
    **dict.fromkeys(["io"], 2),
    **dict.fromkeys(["store"], 3),
    **dict.fromkeys(["measure", "pipeline", "tensors"], 4),
    **dict.fromkeys(["lib"], 5),
}

EXTENSION_IMPORTERS = {"machine.extension", "machine.measure", "store.inspect", "store.paged_store"}
HEAVY = {"numpy", "torch", "transformers"}
"""What takes seconds to import."""
TORCH = {"torch", "transformers"}
LIGHT = {
    *(
        "__init__",
        "__main__",
        "arguments",
        "cli",
        "config",
        "data",
        "errors",
        "files",
        "interrupt",
        "machine",
        "text",
    ),
    *(
        "runs.cleanup",
        "runs.folder",
        "runs.metrics",
        "runs.state",
        "runs.status",
        "store.inspect",
        "store.layout",
        "store.state_format",
    ),
}
"""Rooms and modules that are imported without torch, by themselves or through others."""
TENSORS_IN_LIGHT_ROOMS = {"data.batch", "data.packed_dataset", "data.prepare"}
UNSAFE_FILES = {
    "rust/py/src/dlpack.rs",
    "rust/src/optimizer/vector.rs",
    "rust/src/memory/slot.rs",
    "rust/src/io/engine/uring/driver.rs",
    "rust/src/io/fork.rs",
}
NAMES_THAT_SAY_NOTHING = {"common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"}

Graph = dict[str, set[str]]


# ------------------------------------------------------------------------------------- any language


def unit_of(module: str, floors: Mapping[str, int]) -> str | None:
    """The row that `module`, or whatever path into it, belongs to: the longest one that fits."""
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in floors), None)


def unlisted(modules: Iterable[str], floors: Mapping[str, int]) -> list[str]:
    """Modules that have no row."""
    return [
        f"{module} is on no floor: give it a row" for module in modules if unit_of(module, floors) is None
    ]


def graph_of(imports: Mapping[str, set[str]], floors: Mapping[str, int], root: str) -> Graph:
    """Which row imports from which: what fits no row is a name of the root module."""
    graph: Graph = {}
    for module, targets in imports.items():
        unit = unit_of(module, floors) or module
        units = {unit_of(target, floors) or root for target in targets}
        graph.setdefault(unit, set()).update(units - {unit})
    return graph


def upward_imports(graph: Graph, floors: Mapping[str, int]) -> list[str]:
    """Imports from a floor above."""
    return [
        f"{unit} (floor {floors[unit]}) imports {target} (floor {floors[target]}), which is above it"
        for unit in sorted(graph.keys() & floors.keys())
        for target in sorted(graph[unit] & floors.keys())
        if floors[target] > floors[unit]
    ]


def circles(graph: Graph) -> list[str]:
    """Circles of imports: one for each place where a walk meets its own path."""
    found: list[str] = []
    done: set[str] = set()

    def walk(unit: str, path: list[str]) -> None:
        if unit in path:
            found.append(" -> ".join([*path[path.index(unit) :], unit]))
        elif unit not in done:
            for target in sorted(graph.get(unit, ())):
                walk(target, [*path, unit])
            done.add(unit)

    for unit in sorted(graph):
        walk(unit, [])
    return found


def named_for_nothing(paths: Iterable[str]) -> list[str]:
    """Files whose name does not say what is in them."""
    return [
        f"{path}: name it for what is in it"
        for path in paths
        if any(
            word in NAMES_THAT_SAY_NOTHING
            for part in PurePosixPath(path).parts
            for word in re.split(r"[_.-]", part)
        )
    ]


# ------------------------------------------------------------------------------------------- Python


def python_module(path: str) -> str:
    """`x/y.py` below the package is `x.y`, and `x/__init__.py` is `x`."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def python_imports(source: str, package: str = PACKAGE) -> set[str]:
    """Every dotted name that `source` imports, wherever the statement stands: `from a import b` gives `a.b`."""
    return _imported(ast.walk(ast.parse(source)), package)


def imports_at_once(source: str) -> set[str]:
    """Those that importing the module itself makes: not in functions, and not for types alone."""
    names: set[str] = set()
    waiting: list[ast.stmt] = [*ast.parse(source).body]
    for node in waiting:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names |= _imported([node], PACKAGE)
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return names


def _imported(nodes: Iterable[ast.AST], package: str) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Relative imports are refused by the linter but at the top, where a dot means the package itself.
            base = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def own(names: Iterable[str]) -> set[str]:
    """Those of the dotted names that are the package's own, without its name in front."""
    inside = (name.partition(".") for name in names)
    return {rest or ROOT_MODULE["python"] for top, _, rest in inside if top == PACKAGE}


def foreign(names: Iterable[str]) -> set[str]:
    """The top-level packages among the dotted names that are not the package's own."""
    return {name.partition(".")[0] for name in names} - {PACKAGE}


def room_of(module: str) -> str:
    """The room, or the module at the top, that a module is in."""
    return module.partition(".")[0]


def floor_of(room: str) -> int | None:
    """The floor of a room; None for one that is on none."""
    return next((floor for floor, rooms in enumerate(PYTHON_ROOMS) if room in rooms), None)


def homeless(modules: Iterable[str]) -> list[str]:
    """Modules in no room of the table."""
    return [
        f"{module} is in no room: give {room_of(module)} a floor in tests/python/support/floors.py"
        for module in modules
        if floor_of(room_of(module)) is None and module not in DOORS
    ]


def python_graph(sources: Mapping[str, str]) -> Graph:
    """Which module imports which, each by its own name: also inside a room. The extension is nobody's module."""

    def module(name: str) -> str:
        parts = name.split(".")
        known = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((prefix for prefix in known if prefix in sources), name)

    return {
        importer: {module(name) for name in own(python_imports(source)) if room_of(name) != "_lib"}
        - {importer}
        for importer, source in sources.items()
    }


def wrong_imports(graph: Graph) -> list[str]:
    """Imports between rooms that do not go down, and any through a door."""
    problems: list[str] = []
    for importer, targets in sorted(graph.items()):
        for target in sorted(targets):
            here, there = floor_of(room_of(importer)), floor_of(room_of(target))
            if any(name.startswith(f"{target}.") for name in graph):
                problems.append(
                    f"{importer} imports the room {target}: import its modules, so that it is seen which"
                )
            elif target in DOORS or there is None:
                problems.append(f"{importer} imports {target}: nobody inside goes through the door")
            elif importer in DOORS or room_of(importer) == room_of(target) or room_of(target) in SERVE_ALL:
                continue
            elif here is None or there >= here:
                relation = "is above it" if here is None or there > here else "is on the same floor"
                problems.append(
                    f"{importer} (floor {here}) imports {target} (floor {there}), which {relation}"
                )
    return problems


def hidden_imports(sources: Mapping[str, str]) -> list[str]:
    """Imports by a string, which no graph shows; the front door's are seen by whoever calls them."""
    return [
        f"{module} imports by a string: write an import statement"
        for module, source in sources.items()
        if module not in DOORS
        if any(
            {getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "name", "")}
            & {"import_module", "__import__"}
            for node in ast.walk(ast.parse(source))
        )
    ]


def undeclared(sources: Mapping[str, str]) -> list[str]:
    """Public names that other modules import, or that `__all__` has, without the other."""
    problems: list[str] = []
    taken = {name for source in sources.values() for name in own(python_imports(source))}
    for module, source in sorted(sources.items()):
        if module in DOORS:
            continue
        declared: set[str] = set()
        defined: set[str] = set()
        for node in ast.parse(source).body:
            names = {
                child.id
                for child in ast.walk(node)
                if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)
            }
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif names == {"__all__"} and isinstance(node, ast.Assign):
                declared = set(ast.literal_eval(node.value))
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                defined |= names
        wanted = {name for name in defined if not name.startswith("_") and f"{module}.{name}" in taken}
        problems += [
            f"{module}: {name} is imported elsewhere, and not in __all__"
            for name in sorted(wanted - declared)
        ]
        problems += [
            f"{module}: {name} is in __all__, and not defined there" for name in sorted(declared - defined)
        ]
    return problems


def unguarded_opens(sources: Mapping[str, str]) -> list[str]:
    """Calls that open a file past `files`: a pipe may hang them, and others may read what they write."""
    found = []
    for module, source in sorted(sources.items()):
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        for node in sorted(calls, key=lambda call: call.lineno):
            if module in OPENS_FILES:
                continue
            call = node.func
            name = getattr(call, "attr", getattr(call, "id", ""))
            owner = getattr(getattr(call, "value", None), "id", "")
            is_method = isinstance(call, ast.Attribute) and owner not in OPENED_CLASSES and name in OPENERS
            if name == getattr(call, "id", "") == "open" or (
                is_method and OPENERS[name] in {None, len(node.args)}
            ):
                found.append(f"{module}, line {node.lineno}: {name} opens a file; the functions of files do")
    return found


def side_doors(sources: Mapping[str, str]) -> list[str]:
    """Modules that import the extension, and may not."""
    return [
        f"{module} imports _lib; only {', '.join(sorted(EXTENSION_IMPORTERS))} may"
        for module, source in sources.items()
        if module not in EXTENSION_IMPORTERS
        if any(room_of(name) == "_lib" for name in own(python_imports(source)))
    ]


def heavy_imports(sources: Mapping[str, str]) -> list[str]:
    """Modules that must be imported without torch, and are not: with the way to it."""
    at_once = {module: imports_at_once(source) for module, source in sources.items()}
    ways: dict[str, list[str]] = {}

    def way(module: str) -> list[str]:
        """From a module to torch; empty if there is none."""
        if module not in ways:
            ways[module] = []  # of a circle, which has a check of its own
            heavy = sorted(foreign(at_once[module]) & TORCH)
            inner = sorted(name for name in graph[module] if name in at_once)
            longer = next(([module, *rest] for name in inner if (rest := way(name))), [])
            ways[module] = [module, heavy[0]] if heavy else longer
        return ways[module]

    graph = python_graph(
        {
            module: "\n".join(f"import {name}" for name in sorted(names) if name.startswith(f"{PACKAGE}."))
            for module, names in at_once.items()
        }
    )
    return [
        f"{' -> '.join(found)}: {module} must be imported without it"
        for module in sorted(sources)
        if (module in LIGHT or room_of(module) in LIGHT) and module not in TENSORS_IN_LIGHT_ROOMS
        if (found := way(module))
    ]


def furnished_rooms(sources: Mapping[str, str]) -> list[str]:
    """Rooms whose `__init__` holds more than a docstring: then one module could not be imported without others."""
    rooms = {name.rpartition(".")[0] for name in sources}
    return [
        f"{module}/__init__.py holds more than a docstring"
        for module, source in sources.items()
        if module in rooms and len(ast.parse(source).body) > 1
    ]


# --------------------------------------------------------------------------------------------- Rust

NOT_CODE = re.compile(
    r"""//[^\n]* | /\*.*?\*/                   # comments
    | \b[bc]?r(?P<hashes>\#*)".*?"(?P=hashes)  # raw strings
    | \b[bc]?"(?:\\.|[^"\\])*"                 # strings, with their prefix
    | "(?:\\.|[^"\\])*"
    | b?'(?:\\.[^']*|[^\\'])'                  # characters, but not lifetimes
    """,
    re.DOTALL | re.VERBOSE,
)
TOKEN = re.compile(r"\w+|::|\S")


def rust_tokens(source: str) -> list[str]:
    """The words and signs of the code itself, without comments and strings."""
    return TOKEN.findall(NOT_CODE.sub(" ", source))


def rust_module(path: str) -> str:
    """`engine/uring.rs` below `rust/src` is `engine.uring`, and `store/mod.rs` is `store`."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "mod" else parts)


def rust_imports(module: str, source: str) -> set[str]:
    """Every path of the crate that `source` names, in a `use` or elsewhere, as dotted names from the root."""
    tokens = rust_tokens(source)
    here, children = _place(module), _declared(tokens)
    inline: list[tuple[str, int]] = []
    depth = 0
    names: set[str] = set()
    for i, word in enumerate(tokens):
        if word == "{":
            depth += 1
            if i >= 2 and tokens[i - 2] == "mod":
                inline.append((tokens[i - 1], depth))
        elif word == "}":
            if inline and inline[-1][1] == depth:
                inline.pop()
            depth -= 1
        elif tokens[i + 1 : i + 2] == ["::"] and (i == 0 or tokens[i - 1] != "::"):
            current = [*here, *(name for name, _ in inline)]
            if word in {"crate", "super", "self"}:
                names.update(".".join(path) for path in _absolute(current, _paths(tokens, i)[0]))
            elif word in children and not inline:
                names.update(".".join([*here, *path]) for path in _paths(tokens, i)[0])
    return names


def _paths(tokens: list[str], i: int) -> tuple[list[list[str]], int]:
    """The paths that start at token `i` and the token after them: `a::{b, c::d}` gives `a b` and `a c d`."""
    path = [tokens[i]]
    i += 1
    while tokens[i : i + 1] == ["::"]:
        i += 1
        if tokens[i] == "{":
            branches, i = _group(tokens, i + 1)
            return [[*path, *branch] for branch in branches], i
        if not tokens[i].isidentifier():  # a glob, or the `<` of generics
            break
        path.append(tokens[i])
        i += 1
    return [path], i


def _group(tokens: list[str], i: int) -> tuple[list[list[str]], int]:
    """The branches of a group from after its `{` on, and the token after its `}`."""
    branches: list[list[str]] = []
    while tokens[i] != "}":
        paths, i = _paths(tokens, i)
        branches.extend([] if path == ["self"] else path for path in paths)
        while tokens[i] not in {",", "}"}:  # `as name`
            i += 1
        i += tokens[i] == ","
    return branches, i + 1


def _absolute(current: list[str], paths: Iterable[list[str]]) -> Iterator[list[str]]:
    """Paths that begin with `crate`, `self` or `super`, from the root."""
    for path in paths:
        base = [] if path[0] == "crate" else list(current)
        rest = path[1:] if path[0] in {"crate", "self"} else path
        while rest[:1] == ["super"]:
            base, rest = base[:-1], rest[1:]
        yield [*base, *rest] or [ROOT_MODULE["rust"]]


def rust_graph(sources: Mapping[str, str]) -> Graph:
    """Which module imports which."""
    imports = {module: rust_imports(module, source) for module, source in sources.items()}
    return graph_of(imports, RUST_FLOORS, ROOT_MODULE["rust"])


# ----------------------------------------------------------------------- Rust, one module from another

TESTS_ONLY = (["#", "[", "cfg", "(", "test", ")"], ["#", "[", "cfg", "(", "any", "(", "test", ","])
GLOB = "*"


class RustUse(NamedTuple):
    """One name that a `use` brings in."""

    path: list[str]
    name: str  # what it is called here; `GLOB` for all names of `path`
    is_public: bool


class RustModule(NamedTuple):
    """What the code of one module names; paths begin with `crate`, or with a name as the module knows it."""

    uses: list[RustUse]
    paths: list[list[str]]  # every other path
    words: set[str]  # every word outside the `use`s


Bound = dict[
    str, dict[str, list[str]]
]  # module, name that a `use` gives it there, path of that from the root


def rust_module_graph(sources: Mapping[str, str]) -> Graph:
    """Which module uses what another defines, between all modules of one crate, also inside a room.

    An edge is an item (a function, a type, a constant) that the code of one module names and another defines:

    * A name is followed through every `use` to the module that defines it: who takes `Table` from a parent that
      says `pub use table::Table` uses `table`, not the parent.
    * `mod child;` is no edge, nor is a `pub use` of a name that its own module does not use: a parent may declare
      and re-export its children. Importing a module is none either; naming something in it is.
    * What is built for tests only is not looked at: `cfg(test)`, `cfg(any(test, ..))`, and what lies below a module
      declared so.

    So a child that uses an item of its parent, whose code uses an item of that child, is a circle: the item
    wants a module of its own. Calls of methods are not followed, as no path names where their `impl` stands.
    """
    tests = _test_modules(sources)
    modules = {module: rust_code(module, source) for module, source in sources.items() if module not in tests}
    bound: Bound = {module: {} for module in modules}
    for module, code in modules.items():
        paths = {use.name: _from_root(module, use.path, bound) for use in code.uses if use.name != GLOB}
        bound[module] = {name: path for name, path in paths.items() if path is not None}
    graph: Graph = {}
    for module, code in modules.items():
        named = [
            [*use.path, GLOB] if use.name == GLOB else use.path
            for use in code.uses
            if not use.is_public or use.name in code.words
        ]
        definers = {_definer(_from_root(module, path, bound), bound) for path in [*named, *code.paths]}
        graph[module] = {target for target in definers if target is not None} - {module}
    return graph


def _from_root(module: str, path: list[str], bound: Bound) -> list[str] | None:
    """`path`, as `module` writes it, from the root; none when it leads to another crate."""
    if path[0] == "crate":
        return path[1:]
    if ".".join([*_place(module), path[0]]) in bound:
        return [*_place(module), *path]
    start = bound[module].get(path[0])
    return None if start is None else [*start, *path[1:]]


def _definer(path: list[str] | None, bound: Bound) -> str | None:
    """The module that defines what `path` names; none when that is a module, or of another crate."""
    seen: list[list[str]] = []
    while path is not None and path not in seen:
        seen.append(path)
        depth = next(n for n in range(len(path), -1, -1) if n == 0 or ".".join(path[:n]) in bound)
        module, rest = ".".join(path[:depth]) or ROOT_MODULE["rust"], path[depth:]
        if not rest or rest[0] not in bound.get(module, {}):
            return module if rest else None
        path = [*bound[module][rest[0]], *rest[1:]]
    return None


def _place(module: str) -> list[str]:
    """The path of a module from the root."""
    return [] if module == ROOT_MODULE["rust"] else module.split(".")


def _test_modules(sources: Mapping[str, str]) -> set[str]:
    """Those of the modules that are built for tests only."""
    roots: set[str] = set()
    for module, source in sources.items():
        tokens = rust_tokens(source)
        roots.update(
            ".".join([*_place(module), name])
            for name in _declared(tokens) - _declared(_without_tests(tokens))
        )
    return {module for module in sources if any(f"{module}.".startswith(f"{root}.") for root in roots)}


def _declared(tokens: list[str]) -> set[str]:
    """The modules that `mod name;` declares."""
    return {tokens[i + 1] for i, word in enumerate(tokens[:-2]) if word == "mod" and tokens[i + 2] == ";"}


def rust_code(module: str, source: str) -> RustModule:
    """The names in the code of `module`, without what is built for tests only."""
    tokens = _without_tests(rust_tokens(source))
    here = _place(module)
    code = RustModule([], [], set())
    inline: list[tuple[str, int]] = []
    depth = i = 0

    def absolute(path: list[str]) -> list[str]:
        if path[0] not in {"crate", "self", "super"} or path == ["self"]:
            return path
        return ["crate", *next(_absolute([*here, *(name for name, _ in inline)], [path]))]

    while i < len(tokens):
        word, after = tokens[i], tokens[i + 1 : i + 2]
        if word == "use" and after != ["<"]:
            is_public = i > 0 and tokens[i - 1] in {"pub", ")"}
            leaves, i = _use_tree(tokens, i + 1)
            code.uses.extend(RustUse(absolute(path), name, is_public) for path, name in leaves)
            continue
        if after == ["::"] and tokens[max(i - 2, 0) : i] != ["(", "in"]:
            code.words.add(word)
            paths, i = _paths(tokens, i)
            code.paths.extend(absolute(path) for path in paths)
            continue
        if word == "{":
            depth += 1
            if tokens[max(i - 2, 0) : i - 1] == ["mod"]:
                inline.append((tokens[i - 1], depth))
        elif word == "}":
            if inline and inline[-1][1] == depth:
                inline.pop()
            depth -= 1
        code.words.add(word)
        i += 1
    return code


def _use_tree(tokens: list[str], i: int) -> tuple[list[tuple[list[str], str]], int]:
    """Each path of the `use` that starts at token `i` with the name it gets, and the token after them."""
    path: list[str] = []
    while tokens[i] not in {"{", GLOB}:
        path.append(tokens[i])
        i += 1
        if tokens[i] != "::":
            path = path[:-1] if path[-1] == "self" and len(path) > 1 else path
            is_renamed = tokens[i] == "as"
            name = tokens[i + 1] if is_renamed else path[-1]
            return [(path, name)], i + 2 * is_renamed
        i += 1
    if tokens[i] == GLOB:
        return [(path, GLOB)], i + 1
    leaves: list[tuple[list[str], str]] = []
    i += 1
    while tokens[i] != "}":
        branch, i = _use_tree(tokens, i)
        for tail, name in branch:
            own = tail == ["self"]
            leaves.append(([*path, *([] if own else tail)], path[-1] if own and name == "self" else name))
        i += tokens[i] == ","
    return leaves, i + 1


def _without_tests(tokens: list[str]) -> list[str]:
    """The tokens but those of items that are built for tests only."""
    kept: list[str] = []
    i = 0
    while i < len(tokens):
        if not any(tokens[i : i + len(attribute)] == attribute for attribute in TESTS_ONLY):
            kept.append(tokens[i])
            i += 1
            continue
        while tokens[i] == "#":
            i = _closed(tokens, i + 1)
        while tokens[i] not in {";", "{"}:
            i = _closed(tokens, i)
        i = _closed(tokens, i)
    return kept


def _closed(tokens: list[str], i: int) -> int:
    """The token after token `i`, or after the bracket that closes it."""
    depth = 0
    while True:
        depth += (tokens[i] in {"(", "[", "{"}) - (tokens[i] in {")", "]", "}"})
        i += 1
        if depth == 0:
            return i


def names_pyo3(files: Mapping[str, str]) -> list[str]:
    """Files outside `rust/py` that know of Python."""
    return [
        f"{path} names pyo3; only rust/py may"
        for path, source in files.items()
        if not path.startswith("rust/py/")
        if any(word.startswith("pyo3") for word in rust_tokens(source))
    ]


def unsafe_sites(files: Mapping[str, str]) -> dict[str, int]:
    """How often each file that does says `unsafe`: blocks, functions, implementations, attributes."""
    counts = {path: rust_tokens(source).count("unsafe") for path, source in files.items()}
    return {path: count for path, count in counts.items() if count}


def unfenced(sites: Mapping[str, int]) -> list[str]:
    """Files with `unsafe` in them that are not allowed any."""
    return [
        f"{path} has {sites[path]} unsafe sites; only {', '.join(sorted(UNSAFE_FILES))} may"
        for path in sorted(sites.keys() - UNSAFE_FILES)
    ]


def miscounted(sites: Mapping[str, int], document: str) -> list[str]:
    """Where the table of `docs/unsafe.md` (rows ``| `path` | count | ...``) differs from the sources."""
    rows = {
        path: int(n) for path, n in re.findall(r"^\|\s*`([^`]+)`\s*\|\s*(\d+)\s*\|", document, re.MULTILINE)
    }
    return [
        f"docs/unsafe.md says {rows.get(path, 'nothing')} of {path}; the row should begin: | `{path}` | {count} |"
        for path in sorted(sites.keys() | rows.keys())
        if rows.get(path) != (count := sites.get(path, 0))
    ]
