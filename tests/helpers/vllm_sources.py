"""What a version of vLLM has, read from its sources: the build for GPUs cannot be imported without their libraries."""

import ast
import contextlib
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Parameters(NamedTuple):
    """Of a function, without `self` or `cls`.

    Attributes:
        positional: in order.
        required: of all, those without a default.
        keywords: those that are passed by name only.
        takes_more: whether further ones are taken by position.
        takes_others: whether others are taken by name.
    """

    positional: list[str]
    required: set[str]
    keywords: set[str]
    takes_more: bool
    takes_others: bool

    @classmethod
    def of(cls, function: Any, *, is_method: bool) -> "Parameters":
        """Those of a function's definition."""
        given = function.args
        is_static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
        names = [argument.arg for argument in [*given.posonlyargs, *given.args]]
        required = names[: len(names) - len(given.defaults)]
        first = 1 if is_method and not is_static else 0
        keywords = [argument.arg for argument in given.kwonlyargs]
        required += [name for name, default in zip(keywords, given.kw_defaults, strict=True) if default is None]
        more, others = given.vararg is not None, given.kwarg is not None
        return cls(names[first:], set(required[first:]), set(keywords), more, others)

    def faults(self, call: ast.Call) -> list[str]:
        """What is wrong with a call."""
        number = len([value for value in call.args if not isinstance(value, ast.Starred)])
        names = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
        is_open = number < len(call.args) or len(names) < len(call.keywords)
        others = set() if self.takes_others else names - {*self.positional, *self.keywords}
        found = [f"no parameter {name}" for name in sorted(others)]
        if number > len(self.positional) and not self.takes_more:
            found.append(f"{number} values for {len(self.positional)} parameters")
        missing = self.required - names - set(self.positional[:number])
        return found if is_open else found + [f"{name} is not given" for name in sorted(missing)]

    def refused(self, caller: "Parameters") -> list[str]:
        """What a method with the caller's parameters can be given, and this one does not take."""
        pairs = zip(self.positional, caller.positional, strict=False)
        found = [f"{own} in place of {name}" for own, name in pairs if own != name]
        known = {*self.positional, *self.keywords}
        further = [] if self.takes_more else caller.positional[len(self.positional) :]
        named = [] if self.takes_others else sorted(caller.keywords)
        found += [f"{name} is not taken" for name in [*further, *named] if name not in known]
        given = {*caller.positional, *caller.keywords}
        return found + [f"{name} is not given" for name in sorted(self.required - given)]


class Sources:
    """A version of vLLM as files.

    Args:
        folder: of the package `vllm`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def module(self, name: str) -> list[ast.stmt]:
        """A module's statements; none if there is no such module."""
        path = self.folder.joinpath(*name.split(".")[1:])
        files = [path / "__init__.py", path.with_suffix(".py")]
        return next((parsed(file) for file in files if file.is_file()), [])

    def find(self, path: str) -> tuple[str, Any]:
        """The module that defines a name, and its definition; `None` for what is not vLLM's.

        Args:
            path: `module.name`; modules that only import it lead on to the one that defines it.

        Raises:
            LookupError: there is none.
        """
        module, _, name = path.rpartition(".")
        if module.partition(".")[0] != "vllm":
            return module, None
        for node in self.module(module):
            if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and node.name == name:
                if not any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list):
                    return module, node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    return module, node
            elif isinstance(node, ast.ImportFrom):
                origin = self._origin(module, node)
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(f"{origin}.{alias.name}")
                    if alias.name == "*" and origin.startswith("vllm."):
                        with contextlib.suppress(LookupError):
                            return self.find(f"{origin}.{name}")
        raise LookupError(path)

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        """The module that a statement in `module` imports from."""
        if not node.level:
            return str(node.module)
        is_package = self.folder.joinpath(*module.split(".")[1:], "__init__.py").is_file()
        parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
        return ".".join([*parents, *([node.module] if node.module else [])])

    def bases(self, path: str) -> list[tuple[str, ast.ClassDef]]:
        """A class and those that it derives from, as far as they are vLLM's, with their modules."""
        module, node = self.find(path)
        if not isinstance(node, ast.ClassDef):
            return []
        names = (base.value if isinstance(base, ast.Subscript) else base for base in node.bases)
        return [(module, node), *(found for name in names for found in self._bases_by_name(module, name))]

    def _bases_by_name(self, module: str, name: ast.expr) -> list[tuple[str, ast.ClassDef]]:
        return self.bases(f"{module}.{name.id}") if isinstance(name, ast.Name) else []

    def attributes(self, path: str) -> set[str]:
        """What objects of a class have: fields, members, and what methods set."""
        found: set[str] = set()
        for module, node in self.bases(path):
            found |= declared(node) | stored(node)
            for base in node.bases:
                found |= self._of_others(module, base)
        return found

    def _of_others(self, module: str, base: ast.expr) -> set[str]:
        """What a class has of a base that is not vLLM's, but torch's or Python's."""
        first, *further = ast.unparse(base.value if isinstance(base, ast.Subscript) else base).split(".")
        for node in self.module(module):
            for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
                origin = self._origin(module, node) if isinstance(node, ast.ImportFrom) else alias.name
                if (alias.asname or alias.name) != first or origin.startswith("vllm."):
                    continue
                names = [alias.name, *further] if isinstance(node, ast.ImportFrom) else further
                cls = functools.reduce(getattr, names, importlib.import_module(origin))
                return {name for each in getattr(cls, "__mro__", ()) for name in vars(each)}
        return set()

    def parameters(self, path: str) -> Parameters:
        """Those of a function, or of a class when it is called: its fields, if it has no `__init__`."""
        _, node = self.find(path)
        if isinstance(node, FUNCTIONS):
            return Parameters.of(node, is_method=False)
        found = self.method(path, "__init__")
        if found is not None:
            return found
        fields = {ast.unparse(x.target): x.value for x in node.body if isinstance(x, ast.AnnAssign)}
        required = {name for name, value in fields.items() if value is None}
        return Parameters(list(fields), required, set(), takes_more=False, takes_others=False)

    def method(self, path: str, name: str) -> Parameters | None:
        """Those of a class's method; `None` if it has none of this name."""
        for _, node in self.bases(path):
            for found in statements(node.body):
                if isinstance(found, FUNCTIONS) and found.name == name:
                    return Parameters.of(found, is_method=True)
        return None


@functools.cache
def parsed(file: Path) -> list[ast.stmt]:
    """The statements of a module, those under a condition among them."""
    return list(statements(ast.parse(file.read_text(encoding="utf-8")).body))


def statements(body: list[Any]) -> Iterator[Any]:
    """Those of a body, and of what it does under a condition, in order."""
    for node in body:
        yield node
        for part in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
                yield from statements(getattr(node, part, []))


def declared(node: ast.ClassDef, *, bare: bool = True) -> set[str]:
    """What a class's body names; without `bare`, no annotation that has no value."""
    found = set()
    for statement in statements(node.body):
        if isinstance(statement, (ast.ClassDef, *FUNCTIONS)):
            found.add(statement.name)
        elif isinstance(statement, ast.AnnAssign) and (bare or statement.value is not None):
            found.add(ast.unparse(statement.target))
        elif isinstance(statement, ast.Assign):
            found |= {ast.unparse(target) for target in statement.targets}
    return found


def stored(node: ast.AST) -> set[str]:
    """The attributes of `self` that code sets."""
    attributes = (inner for inner in ast.walk(node) if isinstance(inner, ast.Attribute))
    return {each.attr for each in attributes if isinstance(each.ctx, ast.Store) and ast.unparse(each.value) == "self"}
