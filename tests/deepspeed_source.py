"""Find in DeepSpeed's source which keys of a configuration it reads, with which defaults and pydantic models.

The source is walked, not run, so a key is found whatever a configuration holds: an abstract interpreter follows the
configuration object through the functions of DeepSpeed's config class, and records each key that they ask it for.
"""

import ast
import copy
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType
from typing import Any, get_args

from pydantic import BaseModel

# The path to a section: () is the top level.
Place = tuple[str, ...]
Places = frozenset[Place]
REMOVED = {"_REMOVED_TOP_LEVEL_CONFIG_KEYS": "", "_REMOVED_ZERO_CONFIG_KEYS": "zero_optimization."}


@dataclass
class Known:
    """The keys of one version of DeepSpeed."""

    keys: dict[Place, set[str]] = field(default_factory=lambda: defaultdict(set))  # of sections, class or not
    classes: dict[Place, type[BaseModel]] = field(default_factory=dict)  # of sections that have one
    defaults: dict[Place, Any] = field(default_factory=dict)  # of keys in sections without a class
    removed: dict[str, str] = field(default_factory=dict)  # dotted key -> what DeepSpeed says about it

    def default(self, place: Place, key: str) -> Any:
        """The default of a key in a section; None if it has none."""
        in_class = self.classes[place].model_fields if place in self.classes else {}
        return in_class[key].default if key in in_class else self.defaults.get((*place, key))


@cache
def known_to(config_class: type) -> Known:
    """Collect what DeepSpeed's config class, and every function that it hands the configuration to, ask it for."""
    reader = _Reader()
    reader.follow(config_class.__init__, config_class, frozenset([()]))  # type: ignore[misc]
    for place, model in list(reader.known.classes.items()):
        reader.add_class(place, model)
    # Some models are built from the whole configuration, to read a few of its sections.
    reader.known.classes.pop((), None)
    module = inspect.getmodule(config_class)
    for name, before in REMOVED.items():
        for key, why in getattr(module, name, {}).items():
            reader.known.removed[before + key] = why
    return reader.known


def classes_in(annotation: Any) -> Iterator[type[BaseModel]]:
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield part


class _Reader:
    """Follows the configuration object through assignments and calls.

    The value of an expression is the set of places that it may be, a Python object where that is known, or None.
    """

    def __init__(self) -> None:
        self.known = Known()
        self._attributes: dict[tuple[type, str], Places] = {}
        self._results: dict[tuple[Any, ...], Places | None] = {}

    def add_class(self, place: Place, model: type[BaseModel]) -> None:
        if place:
            self.known.classes[place] = model
        for name, info in model.model_fields.items():
            self.known.keys[place] |= {name, info.alias or name}
            for inner in classes_in(info.annotation):
                self.add_class((*place, name), inner)

    def follow(self, function: Any, *given: Any) -> Places | None:
        """Walk a function that is called with these values; return the places that it may return."""
        seen = (function, *(value if isinstance(value, frozenset | type) else None for value in given))
        if seen in self._results:
            return self._results[seen]
        self._results[seen] = None
        try:
            (code,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
            bound = inspect.signature(function).bind_partial(*given)
        except (OSError, TypeError, SyntaxError, ValueError):
            return None
        bound.apply_defaults()
        scope = {**function.__globals__, **bound.arguments, "return": None}
        assert isinstance(code, ast.FunctionDef)
        for statement in code.body:
            self._value(statement, scope)
        self._results[seen] = scope["return"]
        return self._results[seen]

    def _value(self, node: ast.AST, scope: dict[str, Any]) -> Any:
        match node:
            case ast.Name(id=name):
                return scope.get(name)
            case ast.Constant(value=value):
                return value
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return self._attributes.get((scope["self"], name), getattr(scope["self"], name, None))
            case ast.Attribute(value=inner, attr=name):
                return getattr(self._value(inner, scope), name, None)
            case ast.Subscript(value=of, slice=key):
                return self._under(self._value(of, scope), self._value(key, scope))
            case ast.Compare(left=key, ops=[ast.In() | ast.NotIn()], comparators=[of]):
                self._under(self._value(of, scope), self._value(key, scope))
                return None
            case ast.Assign(targets=[target], value=right):
                self._assign(target, self._value(right, scope), scope)
                return None
            case ast.Return(value=ast.expr() as right):
                value = self._value(right, scope)
                scope["return"] = _either(scope["return"], value) if isinstance(value, frozenset) else scope["return"]
                return None
            case ast.DictComp(
                value=right, generators=[ast.comprehension(target=ast.Name(id=name), iter=ast.Tuple(elts))]
            ):
                found = [self._value(right, {**scope, name: self._value(key, scope)}) for key in elts]
                return frozenset(place[:-1] for places in found for place in places or ())
            case ast.Call():
                return self._call(node, scope)
        for child in ast.iter_child_nodes(node):
            self._value(child, scope)
        return None

    def _assign(self, target: ast.expr, value: Any, scope: dict[str, Any]) -> None:
        match target:
            case ast.Name(id=name):
                old = scope.get(name)
                if isinstance(value, frozenset) or not isinstance(old, frozenset):
                    scope[name] = _either(old, value) if isinstance(value, frozenset) else value
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if isinstance(value, frozenset):
                at = (scope["self"], name)
                self._attributes[at] = _either(self._attributes.get(at), value)

    def _call(self, node: ast.Call, scope: dict[str, Any]) -> Any:
        given = [self._value(argument, scope) for argument in node.args]
        named = {keyword.arg: self._value(keyword.value, scope) for keyword in node.keywords}
        if isinstance(node.func, ast.Attribute) and isinstance(of := self._value(node.func.value, scope), frozenset):
            return self._under(of, given[0]) if node.func.attr == "get" else of
        function = self._value(node.func, scope)
        if function is copy.copy:
            return given[0]
        if getattr(function, "__name__", "") == "get_scalar_param":
            found = self._under(given[0], given[1])
            self.known.defaults |= dict.fromkeys(found or (), given[2])
            return found
        if isinstance(function, type) and issubclass(function, BaseModel):
            for place in named.get(None) or ():
                self.known.classes[place] = function
            return None
        if (
            isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "self"
        ):
            return self.follow(function, scope["self"], *given) if isinstance(function, FunctionType) else None
        if any(isinstance(value, frozenset) for value in given):
            if isinstance(function, type) and isinstance(function.__init__, FunctionType):  # type: ignore[misc]
                self.follow(function.__init__, function, *given)  # type: ignore[misc]
            elif isinstance(function, FunctionType):
                return self.follow(function, *given)
        return None

    def _under(self, of: Any, key: Any) -> Places | None:
        if not (isinstance(of, frozenset) and isinstance(key, str)):
            return None
        for place in of:
            self.known.keys[place].add(key)
        return frozenset((*place, key) for place in of)


def _either(a: Any, b: Places) -> Places:
    return a | b if isinstance(a, frozenset) else b
