"""Modules that tell parameters, which a solver finds, from meta-parameters, which it depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import optree
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class MetaGradientModule(nn.Module):
    """A module with parameters and, apart from them, meta-parameters and meta-modules.

    Constructor arguments (pytrees too) are meta: tensors that require grad, modules in training
    mode and what these contain; assigned to an attribute, they are registered as meta. Other leaf
    tensors that require grad are parameters, other modules ordinary submodules. Whatever else shall
    be meta, such as a module in evaluation mode, is declared by `register_meta_parameter` or
    `register_meta_module`. A meta name stays meta when a new value is assigned.

    `to` and its kin move what is meta too. `train`, `zero_grad`, `requires_grad_` and `state_dict`
    leave it alone: it belongs to whoever made it.
    """

    _meta: _MetaSlots
    _meta_inputs: frozenset[Tensor | nn.Module]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note what is meta among the constructor's arguments."""
        self = super().__new__(cls)
        inputs: set[Tensor | nn.Module] = set()
        arguments: Any = (args, kwargs)
        for leaf in optree.tree_leaves(arguments):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                inputs.add(leaf)
            elif isinstance(leaf, nn.Module) and leaf.training:
                inputs.update(leaf.modules(), leaf.parameters())
        # In __dict__, not among the submodules: parameters() must not see it.
        vars(self).update(_meta=_MetaSlots(), _meta_inputs=frozenset(inputs))
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        meta = vars(self)["_meta"]
        for slots in (meta._parameters, meta._modules):
            if name in slots:
                return slots[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        meta = self._meta
        is_variable = isinstance(value, Tensor) and value.requires_grad
        known_as_meta = name in meta._parameters or name in meta._modules
        if is_variable or isinstance(value, nn.Module):
            if "_parameters" not in vars(self):
                kind = "parameters" if is_variable else "module"
                raise AttributeError(f"cannot assign {kind} before Module.__init__() call")
            if known_as_meta or value in self._meta_inputs:
                self._vacate(name, meta._parameters if is_variable else meta._modules)
                register = self.register_meta_parameter if is_variable else self.add_meta_module
                register(name, value)
                return
            # A computed tensor, such as a loss that is kept, is no parameter.
            is_plain = not isinstance(value, (nn.Parameter, nn.Module))
            if is_plain and (value.is_leaf or name in self._parameters):
                self._vacate(name, self._parameters)
                self.register_parameter(name, value)
                return
        elif known_as_meta:
            if value is not None:
                raise TypeError(
                    f"cannot assign '{torch.typename(value)}' to the meta name '{name}' "
                    "(a tensor that requires grad, a module or None expected)"
                )
            (meta._parameters if name in meta._parameters else meta._modules)[name] = None
            return
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        for slots in (self._meta._parameters, self._meta._modules):
            if name in slots:
                del slots[name]
                return
        super().__delattr__(name)

    def __dir__(self) -> list[str]:
        known: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return [*known, *self._meta._parameters, *self._meta._modules]

    def register_parameter(self, name: str, param: Tensor | None) -> None:
        """Add a parameter, which may be any tensor that requires grad, or None.

        Raises:
            KeyError: a name that is taken, empty or contains a dot.
            TypeError: a name that is no string or a value that is no tensor.
            ValueError: a plain tensor that does not require grad, or one that is meta.
        """
        if isinstance(param, Tensor) and param in self._meta_inputs:
            raise ValueError(
                f"parameter '{name}' is meta, for it was an argument of the constructor: "
                "use register_meta_parameter()."
            )
        if not isinstance(param, Tensor) or isinstance(param, nn.Parameter):
            super().register_parameter(name, param)
            return
        _check_requires_grad("parameter", name, param)
        super().register_parameter(name, None)  # torch's checks of the name
        self._parameters[name] = param  # type: ignore[assignment]

    def register_meta_parameter(self, name: str, param: Tensor | None) -> None:
        """Add a meta-parameter: a tensor that requires grad, or None; an attribute of that name.

        Raises:
            KeyError: a name that is taken, empty or contains a dot.
            TypeError: a name that is no string or a value that is no tensor.
            ValueError: a tensor that does not require grad.
        """
        self._check_meta_name("meta-parameter", name, self._meta._parameters)
        if param is not None and not isinstance(param, Tensor):
            raise TypeError(
                f"cannot assign '{torch.typename(param)}' object to meta-parameter '{name}' "
                "(torch.Tensor or None required)"
            )
        if param is not None:
            _check_requires_grad("meta-parameter", name, param)
        self._meta._parameters[name] = param  # type: ignore[assignment]

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add an ordinary submodule.

        Raises:
            KeyError: a name that is taken, empty or contains a dot.
            TypeError: a name that is no string or a value that is no module.
            ValueError: a module that is meta.
        """
        if isinstance(module, nn.Module) and module in self._meta_inputs:
            raise ValueError(
                f"module '{name}' is meta, for it was an argument of the constructor: "
                "use register_meta_module()."
            )
        super().add_module(name, module)

    def add_meta_module(self, name: str, meta_module: nn.Module | None) -> None:
        """Add a meta-module: its parameters, in whatever mode it is, are meta-parameters.

        Raises:
            KeyError: a name that is taken, empty or contains a dot.
            TypeError: a name that is no string or a value that is no module.
        """
        self._check_meta_name("meta-module", name, self._meta._modules)
        if meta_module is not None and not isinstance(meta_module, nn.Module):
            raise TypeError(f"{torch.typename(meta_module)} is not a Module subclass")
        self._meta._modules[name] = meta_module

    def register_meta_module(self, name: str, meta_module: nn.Module | None) -> None:
        """Alias of `add_meta_module`."""
        self.add_meta_module(name, meta_module)

    def meta_parameters(self, recurse: bool = True) -> Iterator[Tensor]:
        """Iterate over the meta-parameters; with `recurse` over those of the meta-modules too."""
        return self._meta.parameters(recurse)

    def named_meta_parameters(
        self, prefix: str = "", recurse: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Iterate over (name, meta-parameter), each tensor once."""
        return self._meta.named_parameters(prefix, recurse)

    def meta_children(self) -> Iterator[nn.Module]:
        """Iterate over the meta-modules registered on this module itself."""
        return self._meta.children()

    def named_meta_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over (name, meta-module) of those registered on this module itself."""
        return self._meta.named_children()

    def meta_modules(self) -> Iterator[nn.Module]:
        """Iterate over the meta-modules and all that they contain, each once."""
        return (module for _, module in self.named_meta_modules())

    def named_meta_modules(self, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
        """Iterate over (name, module) of the meta-modules and all that they contain, each once."""
        named = self._meta.named_modules(prefix=prefix)
        return ((name, module) for name, module in named if module is not self._meta)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._meta._apply(fn, recurse)
        return self

    def _vacate(self, name: str, keep: dict[str, Any]) -> None:
        """Take a name out of all places but the one that is to hold it."""
        meta = self._meta
        own = (vars(self), self._parameters, self._buffers, self._modules)
        for slots in (*own, meta._parameters, meta._modules):
            if slots is not keep:
                slots.pop(name, None)
        self._non_persistent_buffers_set.discard(name)

    def _check_meta_name(self, kind: str, name: str, slots: dict[str, Any]) -> None:
        if not isinstance(name, str):
            raise TypeError(f"{kind} name should be a string. Got {torch.typename(name)}")
        if "." in name:
            raise KeyError(f"{kind} name can't contain '.', got '{name}'")
        if name == "":
            raise KeyError(f"{kind} name can't be empty string ''")
        if hasattr(self, name) and name not in slots:
            raise KeyError(f"attribute '{name}' already exists")


class _MetaSlots(nn.Module):
    """Holds a module's meta-parameters and meta-modules, for torch's own walks over a module."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Torch converts leaves in place; what has a graph is replaced, so that the graph goes on.
        computed = {k: p for k, p in self._parameters.items() if p is not None and not p.is_leaf}
        slots: dict[str, Any] = self._parameters
        slots.update(dict.fromkeys(computed))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.enable_grad():
            slots.update({k: fn(p) for k, p in computed.items()})
        return self


def _check_requires_grad(kind: str, name: str, param: Tensor) -> None:
    if not param.requires_grad:
        raise ValueError(f"{kind} '{name}' must be a tensor that requires grad")
