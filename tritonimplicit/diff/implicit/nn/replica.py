"""Copies of a module that share everything with it but the tensors to be replaced."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def replicate(module: M, replace: Callable[[Tensor], Tensor]) -> M:
    """Return a copy of the module tree in which `replace(tensor)` stands for each tensor.

    Modules are copied, whatever else they hold is shared. References to modules and tensors are
    followed through pytrees, bound methods, partials and closures, but not through the attributes
    of other objects.

    Raises:
        TypeError: a scripted submodule with parameters, which lie out of reach.
    """
    replica: M = _Replication(replace).value(module)
    return replica


class _Replication:
    """One pass over a module tree; each object met is copied once."""

    def __init__(self, replace: Callable[[Tensor], Tensor]) -> None:
        self.replace = replace
        self.done: dict[int, Any] = {}  # id of the original -> its copy

    def tree(self, tree: Any) -> Any:
        """Copy a pytree; one in which nothing changes is returned itself."""
        # Shortcut for most of what a module holds: switches, and tables of hooks that are empty.
        if isinstance(tree, (bool, int, float, str)) or (isinstance(tree, dict) and not tree):
            return tree
        leaves, treespec = optree.tree_flatten(tree)
        copies = [self.value(leaf) for leaf in leaves]
        if all(copy is leaf for copy, leaf in zip(copies, leaves, strict=True)):
            return tree
        return treespec.unflatten(copies)

    def value(self, value: Any) -> Any:
        """Copy a leaf."""
        if id(value) in self.done:
            return self.done[id(value)]
        if isinstance(value, Tensor):
            self.done[id(value)] = self.replace(value)
        elif isinstance(value, torch.jit.ScriptModule):
            if next(value.parameters(), None) is not None:
                raise TypeError(
                    "the parameters of a scripted submodule cannot be replaced, so there are no "
                    "implicit gradients for it: use the module that was scripted."
                )
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, types.MethodType):
            owner = self.value(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        elif isinstance(value, functools.partial):
            args, keywords = self.tree((value.args, value.keywords))
            return functools.partial(self.value(value.func), *args, **keywords)
        elif isinstance(value, types.FunctionType) and value.__closure__:
            self._closure(value, value.__closure__)
        return self.done.get(id(value), value)

    def _module(self, module: nn.Module) -> None:
        copy = self.done[id(module)] = object.__new__(type(module))
        for name, attribute in vars(module).items():
            vars(copy)[name] = self.tree(attribute)
        for slots in ("_parameters", "_buffers"):  # never the module's own dicts: they change
            vars(copy)[slots] = dict(vars(copy)[slots])

    def _closure(self, function: types.FunctionType, closure: tuple[types.CellType, ...]) -> None:
        code, name = function.__code__, function.__name__
        cells = tuple(types.CellType() for _ in closure)
        copy = types.FunctionType(code, function.__globals__, name, function.__defaults__, cells)
        copy.__kwdefaults__ = function.__kwdefaults__
        vars(copy).update(vars(function))
        self.done[id(function)] = copy
        changed = False
        for cell, original in zip(cells, closure, strict=True):
            with contextlib.suppress(ValueError):  # a cell that is still empty
                content = original.cell_contents
                cell.cell_contents = self.tree(content)
                changed |= cell.cell_contents is not content and content is not function
        if not changed:
            self.done[id(function)] = function
