"""The arguments of a call, taken apart into tensors for autograd and everything else."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from tritonimplicit.diff.implicit.closures import held_by
from tritonimplicit.diff.implicit.pytrees import HOW_TO_REGISTER, tree_flatten, tree_unflatten
from tritonimplicit.linear_solve.solve import MaybeTensors, replace_at
from tritonimplicit.operators import Tensors
from tritonimplicit.torch_internals import has_derivative

PREFIX = "custom_root(optimality_fn)(solver_fn)(*args):"
Key: TypeAlias = "int | str"
"""What names an argument: its position, or the keyword of one without a position."""


@dataclass(frozen=True)
class Arguments:
    """How the arguments of a call are built from its tensors, of which this holds none.

    The first `init_count` tensors are those of the initial guess, which no derivative needs.
    `differentiable` says for each of the others whether it belongs to a named argument.
    """

    spec: Any
    static: tuple[Any, ...]
    where: tuple[int, ...]
    keywords: tuple[str, ...]
    init_count: int
    differentiable: tuple[bool, ...]

    @classmethod
    def flatten(
        cls, bound: inspect.BoundArguments, named: Sequence[Key]
    ) -> tuple[Arguments, Tensors]:
        """Return the tensors of all arguments, and the way back.

        Raises RuntimeError for a named argument that is missing, without tensors or opaque.
        """
        arguments: dict[Key, Any] = dict(enumerate(bound.args))
        arguments.update(bound.kwargs)
        leaves, spec = tree_flatten(tuple(arguments.values()), none_is_leaf=True)
        counts = [child.num_leaves for child in spec.children()]
        owners = [key for key, n in zip(arguments, counts, strict=True) for _ in range(n)]
        for key in named:
            if key not in arguments:
                raise _missing(key, bound)
            own = [leaf for leaf, owner in zip(leaves, owners, strict=True) if owner == key]
            _check_named(key, arguments[key], own)
        where = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        init_count = sum(owners[i] == 0 for i in where)
        self = cls(
            spec=spec,
            static=replace_at(leaves, where, [None] * len(where)),
            where=where,
            keywords=tuple(bound.kwargs),
            init_count=init_count,
            differentiable=tuple(owners[i] in named for i in where[init_count:]),
        )
        return self, tuple(leaves[i] for i in where)

    def require_grad(self, tensors: Tensors) -> bool:
        """Whether a tensor of a named argument requires grad."""
        given = zip(tensors[self.init_count :], self.differentiable, strict=True)
        return any(named and tensor.requires_grad for tensor, named in given)

    def build(self, tensors: MaybeTensors) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments, positional ones and keywords, with these tensors."""
        arguments = tree_unflatten(self.spec, replace_at(self.static, self.where, tensors))
        n = len(arguments) - len(self.keywords)
        return arguments[:n], dict(zip(self.keywords, arguments[n:], strict=True))


def _missing(key: Key, bound: inspect.BoundArguments) -> RuntimeError:
    named = f"argnums={key}" if isinstance(key, int) else f"argnames={key!r}"
    return RuntimeError(
        f"{PREFIX} {named}, but solver_fn was called with {len(bound.args)} positional arguments "
        f"(counting from 0) and the keywords {list(bound.kwargs)}."
    )


def _check_named(key: Key, argument: Any, leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor) and any(map(has_derivative, held_by(leaf))):
            kind = type(leaf).__name__
            raise RuntimeError(
                f"{PREFIX} argument {key!r} holds a {kind} with tensors that require grad, which "
                f"would get no gradient, for optree cannot look into it. Register its class by "
                f"{HOW_TO_REGISTER}; give a module's parameters as a dict to "
                "torch.func.functional_call."
            )
    if not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
        raise RuntimeError(
            f"{PREFIX} argument of function solver_fn specified with `argnums` should be a "
            f"torch.Tensor or a pytree of torch.Tensor; argument {key!r} is a "
            f"{type(argument).__name__} without floating point tensors."
        )
