"""Read a schema's keys: the types that a field takes, the sections in it, every dotted key as it is typed."""

from collections.abc import Collection, Iterator
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel


@cache
def kinds_of(model: type[BaseModel], field: str) -> frozenset[Any]:
    """Return the types that a field's annotation names, at any depth."""
    return frozenset(_named_in(model.model_fields[field].annotation))


def _named_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        # Not the values of a Literal, some of which have no hash.
        if isinstance(part, type) or get_args(part):
            yield from _named_in(part)


def section_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    """Return the section at this location of pydantic's; None if it is none.

    A number is an index of a list, and the part after a field of a dict is a name of the user's.
    """
    found: type[BaseModel] | None = model
    is_name = False
    for part in loc:
        if isinstance(part, str) and not is_name:
            info = found.model_fields.get(part) if found else None
            found = next(models_in(info.annotation), None) if info else None
            is_name = info is not None and get_origin(info.annotation) is dict
        else:
            is_name = False
    return found


def keys_at(root: type[BaseModel], loc: tuple[int | str, ...]) -> Collection[str]:
    """Return the names of the keys of the section at a location; none where there is no section."""
    section = section_at(root, loc)
    return section.model_fields if section else ()


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the pydantic models that an annotation names: `M` itself, or those of `M | None` or `tuple[M, ...]`."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield part


@cache
def typed_keys(root: type[BaseModel], section: str = "") -> frozenset[str]:
    """Return every dotted key of a model and of the sections in it, as on a command line.

    Those within lists, and within sections that a user names, are left out.
    """
    return frozenset(_typed_keys(root, section))


def _typed_keys(root: type[BaseModel], section: str) -> Iterator[str]:
    for name, info in root.model_fields.items():
        dotted = f"{section}.{name}" if section else name
        yield dotted
        if not any(get_origin(kind) in (tuple, dict) for kind in kinds_of(root, name)):
            for model in models_in(info.annotation):
                yield from _typed_keys(model, dotted)
