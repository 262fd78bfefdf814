"""What is measured: each op, and what an iteration of a solver launches, without its product."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

from tritonimplicit_kernels.bench import unfused
from tritonimplicit_kernels.layout import SHAPES

Values: TypeAlias = dict[str, Tensor]
VECTORS: Final = 8
"""k, in a basis or a history of each system."""


@dataclass(frozen=True)
class Size:
    """B systems of n elements, a multiple of 16."""

    systems: int
    n: int

    @classmethod
    def of(cls, elements: int, systems: int) -> Size:
        """Return the size of about as many elements in all."""
        return cls(systems, max(16, -(-elements // systems) // 16 * 16))


@dataclass(frozen=True)
class Case:
    """Ops, and the same work in plain torch.

    `start` draws the arguments in float64, by the names that ops and `unfused` know them by; sums
    as one partial sum (B, 1). What it leaves out is an output, poisoned before each run, or has a
    common value (`trial`). `results` names the arguments that end as what `unfused` returns, in
    that order. `passes` is how many vectors are read and written: a test counts them.
    """

    name: str
    launches: tuple[str, ...]
    passes: int
    start: Callable[[Size, torch.device], Values]
    unfused: Callable[..., tuple[Tensor, ...]]
    results: tuple[str, ...]
    sizes: tuple[Size, ...] = ()
    """Where they are not the plan's; those beyond it are left out."""
    product: torch.dtype | None = None
    """Of what the matvec returned, where it is not the vectors' dtype."""


def _normal(size: Size, device: torch.device, *names: str) -> Values:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)

    row = size.systems, size.n
    return {
        name: draw(VECTORS, *row) if SHAPES.get(name) == "K, B, ld" else draw(*row)
        for name in names
    }


def _between(low: float, high: float, size: Size, device: torch.device) -> Tensor:
    return torch.linspace(low, high, size.n, dtype=torch.float64, device=device)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    dots: Tensor = torch.linalg.vecdot(a, b)
    return dots[:, None]


def _cg(size: Size, device: torch.device) -> Values:
    """Begin a solve, p = r, with a diagonal matrix from 1 to 2."""
    v = _normal(size, device, "x", "r")
    ap = _between(1, 2, size, device) * v["r"]
    return v | {"p": v["r"].clone(), "ap": ap, "rr": _dot(v["r"], v["r"])}


def _cg_with_dots(size: Size, device: torch.device) -> Values:
    v = _cg(size, device)
    dots = torch.stack([_dot(v["p"], v["ap"]), _dot(v["ap"], v["ap"])])
    return v | {"dots": dots}


def _cg_in_half(size: Size, device: torch.device) -> Values:
    v = _cg(size, device)
    return v | {"ap": v["ap"].bfloat16().double()}  # the oracle gets what the ops get


def _pcg(size: Size, device: torch.device) -> Values:
    """Begin a solve, p = d r, with a diagonal matrix from 1 to 2 and d from 1 to 3."""
    v = _normal(size, device, "x", "r")
    d = _between(1, 3, size, device).repeat(size.systems, 1)
    p = d * v["r"]
    ap = _between(1, 2, size, device) * p
    return v | {"p": p, "ap": ap, "d": d, "rr": _dot(v["r"], v["r"]), "rz": _dot(v["r"], p)}


def _pcg_with_dots(size: Size, device: torch.device) -> Values:
    v = _pcg(size, device)
    dots = torch.stack([_dot(v["p"], v["ap"]), _dot(v["ap"], v["d"] * v["ap"])])
    return v | {"dots": dots}


def _neumann(size: Size, device: torch.device) -> Values:
    v = _normal(size, device, "x", "ax", "b")
    alpha = torch.linspace(0.1, 0.2, size.systems, dtype=torch.float64, device=device)
    return v | {"alpha": alpha, "rr": _dot(v["b"], v["b"])}


def _bicgstab(size: Size, device: torch.device) -> Values:
    """Begin a solve, p = r^ = r, with a diagonal matrix from 1 to 2."""
    v = _normal(size, device, "x", "r")
    r, diagonal = v["r"], _between(1, 2, size, device)
    rho = _dot(r, r)
    s = r - rho / _dot(r, diagonal * r) * diagonal * r
    v |= {"p": r.clone(), "shadow": r.clone(), "v": diagonal * r, "s": s, "t": diagonal * s}
    return v | {"rho": rho[:, 0], "rr": rho}


def _bicgstab_with_dots(size: Size, device: torch.device) -> Values:
    v = _bicgstab(size, device)
    (dots,) = unfused.bicgstab_dots(v["shadow"], v["v"])
    return v | {"shadow_dots": dots.view(3, -1, 1)}


def _bicgstab_half_way(size: Size, device: torch.device) -> Values:
    v = _bicgstab_with_dots(size, device)
    (dots,) = unfused.bicgstab_half_dots(v["shadow"], v["s"], v["t"])
    alpha = v.pop("rho") / v["shadow_dots"][0, :, 0]
    v |= {"r": v["s"], "y": v["p"].clone(), "z": v["s"].clone(), "ss": _dot(v["s"], v["s"])}
    return v | {"half_dots": dots.view(4, -1, 1), "alpha": alpha}


def _arnoldi(size: Size, device: torch.device) -> Values:
    """Begin iteration k of a cycle: w has a part in each basis vector, and one in none of them.

    The basis is that of a cosine transform, with random signs: orthonormal, no two rows alike.
    """
    signs = _normal(size, device, "signs")["signs"].sign()
    degrees = torch.arange(1, VECTORS + 2, dtype=torch.float64, device=device)[:, None, None]
    angles = math.pi / size.n * (torch.arange(size.n, device=device) + 0.5).double()
    basis = torch.cos(degrees * angles) * signs * (2 / size.n) ** 0.5
    w = unfused.combination(_spread(1, 2, (VECTORS + 1, size.systems), device), basis)
    basis[VECTORS] = math.nan  # there is room for it
    left = _spread(1, 2, (size.systems, VECTORS + 2), device)
    norm = _spread(1, 2, (size.systems,), device)
    rr = norm[:, None].square() / left[:, :VECTORS].square().sum(1, keepdim=True)
    return {"w": w, "basis": basis, "left": left, "norm": norm, "rr": rr}


def _arnoldi_with_dots(size: Size, device: torch.device) -> Values:
    """Give half of the dots, so that the rest has some too: else they would be rounding alone."""
    v = _arnoldi(size, device)
    return v | {"first": unfused.dots(v["basis"][:VECTORS], v["w"])[..., None] / 2}


def _arnoldi_projected(size: Size, device: torch.device) -> Values:
    v = _arnoldi_with_dots(size, device)
    v["w_out"] = v.pop("w")
    return v | {"second": 2 * v["first"], "ww": _dot(v["w_out"], v["w_out"])}


def _anderson(size: Size, device: torch.device) -> Values:
    v = _normal(size, device, "image", "z", "z_before", "residual", "residuals", "moves")
    return v | {"coefficients": _spread(-1, 1, (size.systems, VECTORS), device)}


def _spread(low: float, high: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
    count = math.prod(shape)
    return torch.linspace(low, high, count, dtype=torch.float64, device=device).view(shape)


def _dense(size: Size, device: torch.device) -> Values:
    """Draw matrices with eigenvalues from 1 to 5, or a little more."""
    v = _normal(Size(size.systems, size.n * size.n), device, "g")
    g = v["g"].view(size.systems, size.n, size.n) / size.n**0.5
    rhs = _normal(size, device, "rhs")
    return rhs | {"a": torch.eye(size.n, device=device, dtype=torch.float64) + g @ g.mT}


_XRP = ("x", "r", "p", "rr_out")
_XRP_RHO = ("x", "r", "p", "rho", "rr_out")
_SHADOW = ("shadow_dots",)
_BICGSTAB = ("bicgstab_dots", "bicgstab_half_step", "bicgstab_half_dots", "bicgstab_step")
_ARNOLDI = ("basis", "column", "left", "rr_out")
_ANDERSON = ("residual", "residuals", "moves", "row", "products", "squares")
_DENSE_SIZES = (Size(1, 128), Size(64, 64), Size(1024, 32))

CASES: Final = (
    Case("cg_dots", ("cg_dots",), 2, _cg, unfused.cg_dots, ("dots",)),
    Case("cg_step", ("cg_step",), 7, _cg_with_dots, unfused.cg_step, _XRP),
    Case("cg", ("cg_dots", "cg_step"), 9, _cg, unfused.cg, _XRP),
    Case(
        *("cg_bf16", ("cg_dots", "cg_step"), 9, _cg_in_half, unfused.cg_in_half, _XRP),
        product=torch.bfloat16,
    ),
    Case("pcg_dots", ("pcg_dots",), 3, _pcg, unfused.pcg_dots, ("dots",)),
    Case("pcg_step", ("pcg_step",), 8, _pcg_with_dots, unfused.pcg_step, (*_XRP, "rz_out")),
    Case("pcg", ("pcg_dots", "pcg_step"), 11, _pcg, unfused.pcg, (*_XRP, "rz_out")),
    Case("bicgstab_dots", ("bicgstab_dots",), 2, _bicgstab, unfused.bicgstab_dots, _SHADOW),
    Case(
        *("bicgstab_half_step", ("bicgstab_half_step",), 3, _bicgstab_with_dots),
        *(unfused.bicgstab_half_step, ("r", "alpha", "ss")),
    ),
    Case(
        *("bicgstab_half_dots", ("bicgstab_half_dots",), 3, _bicgstab),
        *(unfused.bicgstab_half_dots, ("half_dots",)),
    ),
    Case(
        *("bicgstab_step", ("bicgstab_step",), 8, _bicgstab_half_way),
        *(unfused.bicgstab_step, _XRP_RHO),
    ),
    Case(
        *("pbicgstab_step", ("pbicgstab_step",), 10, _bicgstab_half_way),
        *(unfused.pbicgstab_step, _XRP_RHO),
    ),
    Case("bicgstab", _BICGSTAB, 16, _bicgstab, unfused.bicgstab, _XRP_RHO),
    Case("dense_cg", ("dense_cg",), 1, _dense, unfused.dense_cg, ("solution",), _DENSE_SIZES),
    Case("multi_dot", ("multi_dot",), VECTORS + 1, _arnoldi, unfused.multi_dot, ("first",)),
    Case(
        *("arnoldi_project", ("arnoldi_project",), VECTORS + 2, _arnoldi_with_dots),
        *(unfused.arnoldi_project, ("w_out", "second", "ww")),
    ),
    Case(
        *("arnoldi_step", ("arnoldi_step",), VECTORS + 2, _arnoldi_projected),
        *(unfused.arnoldi_step, _ARNOLDI),
    ),
    Case(
        *("arnoldi", ("multi_dot", "arnoldi_project", "arnoldi_step"), 3 * VECTORS + 5),
        *(_arnoldi, unfused.arnoldi, _ARNOLDI),
    ),
    Case(
        *("anderson_dots", ("anderson_dots",), VECTORS + 6, _anderson),
        *(unfused.anderson_dots, _ANDERSON),
    ),
    Case(
        *("anderson_mix", ("anderson_mix",), VECTORS + 3, _anderson),
        *(unfused.anderson_mix, ("z_out",)),
    ),
    Case(
        *("anderson", ("anderson_dots", "anderson_mix"), 2 * VECTORS + 9, _anderson),
        *(unfused.anderson, (*_ANDERSON, "z_out")),
    ),
    Case("neumann_step", ("neumann_step",), 4, _neumann, unfused.neumann_step, ("x", "rr_out")),
)
BY_NAME: Final = {case.name: case for case in CASES}
