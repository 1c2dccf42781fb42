"""The way of an argument through the package: into which modules it is handed on, call by call, as the code is written.

A *stay* is a run of calls into functions of one module; a *return* is a stay in a module that was left before. What
is followed is the argument itself: under any name, a section of it, a copy with other values, and an object that was
made from it to hold it. What is worked out from it is not. Only the source is read; branches are walked one after the
other, and a function that was walked before is a stay, but not walked again.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from floors import PACKAGE, python_module

__all__ = ["Walk", "threaded", "walk"]

COPIES = {"model_copy", "replace"}


@dataclass
class Walk:
    """The modules in which an argument stays, in order."""

    stays: list[str] = field(default_factory=list)

    @property
    def returns(self) -> int:
        """Stays in a module that was left before."""
        return len(self.stays) - len(set(self.stays))

    def enter(self, module: str) -> None:
        """A call hands the argument on into a module."""
        if not self.stays or self.stays[-1] != module:
            self.stays.append(module)


@dataclass(frozen=True)
class _Function:
    module: str
    owner: str | None
    node: ast.FunctionDef


class _Package:
    """All functions and classes of the package, by module and name, and what the modules import."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.functions: dict[tuple[str, str], _Function] = {}
        self.fields: dict[tuple[str, str], dict[str, str]] = {}
        self.imports: dict[str, dict[str, tuple[str, str]]] = {}
        for path, source in sources.items():
            module = python_module(path)
            tree = ast.parse(source)
            self.imports[module] = dict(self._imported(tree))
            for node in tree.body:
                if isinstance(node, ast.FunctionDef):
                    self.functions[module, node.name] = _Function(module, None, node)
                elif isinstance(node, ast.ClassDef):
                    self._add_class(module, node)

    def _add_class(self, module: str, node: ast.ClassDef) -> None:
        fields = self.fields.setdefault((module, node.name), {})
        for member in node.body:
            if isinstance(member, ast.FunctionDef):
                self.functions[module, f"{node.name}.{member.name}"] = _Function(module, node.name, member)
            elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                fields[member.target.id] = ast.unparse(member.annotation)

    @staticmethod
    def _imported(tree: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
                home = (node.module or "").removeprefix(f"{PACKAGE}.")
                for alias in node.names:
                    yield alias.asname or alias.name, (home, alias.name)

    def home(self, module: str, name: str) -> tuple[str, str]:
        """Module and name of what a module calls ``name``."""
        return self.imports[module].get(name, (module, name))


def carriers_of(package: _Package, names: frozenset[str]) -> frozenset[str]:
    """The classes that hold the argument: in a field, or in an attribute that their constructor sets."""
    carriers = set(names)
    while True:
        more = {
            name
            for (module, name), fields in package.fields.items()
            if any(carriers & set(_words(annotation)) for annotation in fields.values())
            or _keeps(package.functions.get((module, f"{name}.__init__")), carriers)
        }
        if more <= carriers:
            return frozenset(carriers)
        carriers |= more


def _keeps(constructor: _Function | None, carriers: set[str]) -> bool:
    """Whether a constructor puts a parameter of these types down in an attribute."""
    if constructor is None:
        return False
    handed = {
        argument.arg
        for argument in _arguments(constructor.node)
        if argument.annotation is not None and carriers & set(_words(ast.unparse(argument.annotation)))
    }
    for node in ast.walk(constructor.node):
        if isinstance(node, ast.Assign):
            targets = [
                target
                for each in node.targets
                for target in (each.elts if isinstance(each, ast.Tuple) else [each])
            ]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            kept = any(_root(value) in handed for value in values)
            if kept and any(isinstance(target, ast.Attribute) for target in targets):
                return True
        is_attribute = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute)
        if is_attribute and node.value is not None and _root(node.value) in handed:
            return True
    return False


def _root(value: ast.expr) -> str:
    """The name whose value or section an expression is; nothing where it is neither."""
    if isinstance(value, ast.Attribute) and value.attr in SECTIONS:
        return _root(value.value)
    return value.id if isinstance(value, ast.Name) else ""


def _words(annotation: str) -> list[str]:
    return "".join(c if c.isalnum() or c == "_" else " " for c in annotation).split()


def _arguments(node: ast.FunctionDef) -> list[ast.arg]:
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


def walk(sources: Mapping[str, str], start: tuple[str, str], names: frozenset[str]) -> Walk:
    """Follow what has one of these types from a function on.

    Args:
        sources: text of each module, by its path.
        start: module and name of the function, ``Class.method`` for a method.
        names: the type of the argument, and the types of its sections.
    """
    package = _Package(sources)
    follower = _Follower(package, carriers_of(package, names))
    follower.trip.enter(start[0])
    follower.follow(package.functions[start])
    return follower.trip


class _Follower:
    def __init__(self, package: _Package, carriers: frozenset[str]) -> None:
        self.trip = Walk()
        self._package = package
        self._carriers = carriers
        self._walked: set[int] = set()

    def follow(self, function: _Function) -> None:
        """Walk the calls of a function in the order in which they are made."""
        if id(function.node) in self._walked:
            return
        self._walked.add(id(function.node))
        held = {
            argument.arg
            for argument in _arguments(function.node)
            if argument.annotation is not None and self._names(ast.unparse(argument.annotation))
        }
        if function.owner in self._carriers:
            held.add("self")
        types: dict[str, str] = {"self": function.owner or ""}
        for argument in _arguments(function.node):
            if argument.arg in held and argument.annotation is not None:
                words = _words(ast.unparse(argument.annotation))
                types[argument.arg] = next(word for word in words if word in self._carriers)
        for statement in function.node.body:
            self._statement(statement, function, held, types)

    def _names(self, annotation: str) -> bool:
        return bool(self._carriers & set(_words(annotation)))

    def _statement(
        self, statement: ast.stmt, function: _Function, held: set[str], types: dict[str, str]
    ) -> None:
        for node in _in_order(statement):
            if isinstance(node, ast.Call):
                self._call(node, function, held, types)
            elif isinstance(node, ast.Assign):
                self._assign(node.targets, node.value, function, held, types)
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                self._assign([node.target], node.value, function, held, types)
            elif isinstance(node, ast.withitem) and node.optional_vars is not None:
                self._assign([node.optional_vars], node.context_expr, function, held, types)

    def _assign(
        self,
        targets: list[ast.expr],
        value: ast.expr,
        function: _Function,
        held: set[str],
        types: dict[str, str],
    ) -> None:
        for target in targets:
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                for one, its in zip(target.elts, value.elts, strict=True):
                    self._assign([one], its, function, held, types)
                return
        made = self._made(value, function)
        if self._holds(value, held) or made:
            for target in targets:
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(name, ast.Name):
                        held.add(name.id)
                        types[name.id] = made or types.get(ast.unparse(value), "")

    def _made(self, value: ast.expr, function: _Function) -> str:
        """The carrier that a call makes or returns, if it does; else nothing."""
        for node in ast.walk(value):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                home = self._package.home(function.module, node.func.id)
                if home[1] in self._carriers and home in self._package.fields:
                    return home[1]
                callee = self._package.functions.get(home)
                if callee is not None and callee.node.returns is not None:
                    words = _words(ast.unparse(callee.node.returns))
                    if found := [word for word in words if word in self._carriers]:
                        return found[0]
        return ""

    def _holds(self, value: ast.expr, held: set[str]) -> bool:
        """Whether an expression is the argument, a section of it, or a copy."""
        match value:
            case ast.Name(id=name):
                return name in held
            case ast.Attribute(value=inner, attr=attribute):
                return self._holds(inner, held) and attribute.removeprefix("_") in SECTIONS
            case ast.Call(func=ast.Attribute(value=inner, attr=attribute)) if attribute in COPIES:
                return self._holds(inner, held)
            case ast.Call(func=ast.Name(id="replace"), args=[first, *_]):
                return self._holds(first, held)
            case ast.Starred(value=inner):
                return self._holds(inner, held)
            case _:
                return False

    def _call(self, call: ast.Call, function: _Function, held: set[str], types: dict[str, str]) -> None:
        handed = any(
            self._holds(argument, held) for argument in [*call.args, *(k.value for k in call.keywords)]
        )
        callee = self._callee(call.func, function, held, types)
        if callee is None:
            return
        through_self = callee.owner in self._carriers and isinstance(call.func, ast.Attribute)
        if not (handed or through_self):
            return
        self.trip.enter(callee.module)
        self.follow(callee)

    def _callee(
        self, called: ast.expr, function: _Function, held: set[str], types: dict[str, str]
    ) -> _Function | None:
        functions = self._package.functions
        match called:
            case ast.Name(id=name):
                home, real = self._package.home(function.module, name)
                return functions.get((home, real)) or functions.get((home, f"{real}.__init__"))
            case ast.Attribute(value=ast.Call(func=ast.Name(id=name)), attr=method):
                home, real = self._package.home(function.module, name)
                return functions.get((home, f"{real}.{method}"))
            case ast.Attribute(value=ast.Name(id=name), attr=method):
                owner = types.get(name) or name
                home, real = self._package.home(function.module, owner)
                if (home, real) not in self._package.fields:
                    home = next((m for m, n in self._package.fields if n == owner and name in held), home)
                return functions.get((home, f"{real}.{method}"))
            case _:
                return None


SECTIONS = {"config", "train", "memory", "data", "setup", "run"}
"""Attributes under which the argument and its sections are held."""


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, those that are evaluated first before what uses them."""
    for child in ast.iter_child_nodes(node):
        yield from _in_order(child)
    yield node


def threaded(sources: Mapping[str, str], most: int) -> dict[str, list[str]]:
    """Parameters that are handed on unchanged, under any name, through more than ``most`` modules.

    Returns:
        The modules of the longest way of each, by its name and the annotation that it has where the way begins.
    """
    package = _Package(sources)
    edges: dict[tuple[int, str], set[tuple[int, str]]] = {}
    of = {id(function.node): function for function in package.functions.values()}
    for function in package.functions.values():
        own = {argument.arg for argument in _arguments(function.node)} - {"self", "cls"}
        for call in ast.walk(function.node):
            if isinstance(call, ast.Call):
                for mine, callee, theirs in _handed_on(package, function, call, own):
                    edges.setdefault((id(function.node), mine), set()).add((id(callee.node), theirs))

    def longest(place: tuple[int, str], passed: tuple[tuple[int, str], ...]) -> list[str]:
        ways = [longest(to, (*passed, place)) for to in edges.get(place, ()) if to not in passed]
        way = max(ways, key=lambda modules: len(set(modules)), default=[])
        return [of[place[0]].module, *way]

    found: dict[str, list[str]] = {}
    for node, name in edges:
        way = longest((node, name), ())
        modules = list(dict.fromkeys(way))
        annotation = next(a.annotation for a in _arguments(of[node].node) if a.arg == name)
        kind = "" if annotation is None else ast.unparse(annotation)
        label = f"{name}: {kind}"
        if len(modules) > max(most, len(found.get(label, []))):
            found[label] = modules
    return found


def _handed_on(
    package: _Package, function: _Function, call: ast.Call, own: set[str]
) -> Iterator[tuple[str, _Function, str]]:
    """Which parameters a call hands on unchanged: their name here, the function called, their name there."""
    called = call.func
    if isinstance(called, ast.Name):
        home, real = package.home(function.module, called.id)
        callee = package.functions.get((home, real)) or package.functions.get((home, f"{real}.__init__"))
    elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
        owner = function.owner if called.value.id == "self" else called.value.id
        home, real = package.home(function.module, owner or "")
        callee = package.functions.get((home, f"{real}.{called.attr}"))
    else:
        callee = None
    if callee is None:
        return
    names = [argument.arg for argument in _arguments(callee.node)]
    if names[:1] in (["self"], ["cls"]):
        names = names[1:]
    places = [*zip(names, call.args, strict=False), *((k.arg or "", k.value) for k in call.keywords)]
    for theirs, value in places:
        if isinstance(value, ast.Name) and value.id in own and theirs in names:
            yield value.id, callee, theirs
