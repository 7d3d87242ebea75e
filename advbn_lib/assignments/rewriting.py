"""The same program in another hand: what a layer's source does stays, what it looks like does not.

Students' tests are judged by layers that they are not to recognise. A submission could compare a layer's bytecode with that
of one that it has seen. So each layer is written anew for each question: with other names of its own, its methods in
another order, and lines between that do nothing.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import random
import string

PUBLIC = frozenset(
    {"Layer", "attack", "forward", "predict", "tail", "features", "labels", "eps", "step_size", "steps", "branch"}
)
_PAUSES = 0.35  # the share of places between two lines that get a line


def rewritten(source: str, draw: random.Random) -> str:
    """``source`` (modules of functions and classes) with new private names, methods reordered, and idle lines.

    What is public stays: the names in ``PUBLIC``, imported and built-in names, and all attributes but those that the
    source itself defines.
    """
    tree = ast.parse(source)
    names = {old: _new_name(draw) for old in sorted(_own_names(tree))}
    tree = _Renamed(names).visit(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            draw.shuffle(node.body)
        elif isinstance(node, ast.FunctionDef):
            node.body = _with_pauses(node.body, draw)
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _own_names(tree: ast.Module) -> set[str]:
    """Names of functions, methods, classes and variables that the source defines."""
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
    return {
        name for name in own - PUBLIC
        if not name.startswith("__") and name not in _WITH_A_MEANING and not hasattr(builtins, name) and not keyword.iskeyword(name)
    }  # fmt: skip


# Names that PyTorch gives a meaning, as attributes or as keywords.
_WITH_A_MEANING = frozenset({"self", "training", "mode", "norm", "clean", "adversarial", "mean", "loss"})


class _Renamed(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]):
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.arg = self.names.get(node.arg, node.arg)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.Attribute:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            node.attr = self.names.get(node.attr, node.attr)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.name = self.names.get(node.name, node.name)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.name = self.names.get(node.name, node.name)
        return node


def _new_name(draw: random.Random) -> str:
    return "_" + "".join(draw.choices(string.ascii_lowercase, k=10))


def _with_pauses(body: list[ast.stmt], draw: random.Random) -> list[ast.stmt]:
    """The lines with assignments between them that nothing uses."""
    longer: list[ast.stmt] = []
    for line in body:
        if draw.random() < _PAUSES:
            idle = ast.Assign([ast.Name(_new_name(draw), ast.Store())], ast.Constant(draw.randrange(10**6)))
            longer.append(idle)
        longer.append(line)
    return longer
