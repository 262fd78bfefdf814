"""Pytrees of whatever a user registers with optree, globally or in this library's namespace."""

from __future__ import annotations

import functools
from typing import Any

import optree

NAMESPACE = "tritonimplicit"
HOW_TO_REGISTER = (
    f'optree.dataclasses.dataclass(namespace="{NAMESPACE}") in the place of dataclasses.dataclass, '
    f'or optree.register_pytree_node(cls, flatten, unflatten, namespace="{NAMESPACE}")'
)

tree_flatten: Any = functools.partial(optree.tree_flatten, namespace=NAMESPACE)
tree_leaves: Any = functools.partial(optree.tree_leaves, namespace=NAMESPACE)
tree_map: Any = functools.partial(optree.tree_map, namespace=NAMESPACE)
tree_structure: Any = functools.partial(optree.tree_structure, namespace=NAMESPACE)
tree_unflatten: Any = optree.tree_unflatten
