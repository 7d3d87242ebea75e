"""Which assignments there are: the modules of ``advbn_lib.assignments`` that hold an ``ASSIGNMENT``."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

from advbn_lib.grading.task import Assignment

PACKAGE = "advbn_lib.assignments"


def names() -> list[str]:
    """The assignments' names, in order of their numbers."""
    return [assignment.name for assignment in all_assignments()]


def all_assignments() -> list[Assignment]:
    """The assignments, in order of their numbers."""
    if importlib.util.find_spec(PACKAGE) is None:
        return []
    package = importlib.import_module(PACKAGE)
    modules = [importlib.import_module(f"{PACKAGE}.{found.name}") for found in pkgutil.iter_modules(package.__path__)]
    found = [module.ASSIGNMENT for module in modules if isinstance(getattr(module, "ASSIGNMENT", None), Assignment)]
    return sorted(found, key=lambda assignment: assignment.number)


def find(name: str) -> Assignment:
    """The assignment of that name; ValueError, with the names there are, for another."""
    assignments = all_assignments()
    for assignment in assignments:
        if assignment.name == name:
            return assignment
    raise ValueError(f"there is no assignment {name!r}; there are {', '.join(a.name for a in assignments) or 'none'}")
