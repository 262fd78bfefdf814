"""The ops, registered once with torch.library: checked, and picked by device.

On CUDA and ROCm devices they run as Triton kernels, elsewhere as plain torch. `layout` says what
the tensors look like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import torch
from torch import Tensor

from tritonimplicit_kernels.backends import backend
from tritonimplicit_kernels.layout import check_counts, check_layout, check_memory

_LIBRARY: Final = torch.library.Library("tritonimplicit", "DEF")
SCHEMAS: Final = {
    "cg_dots": "Tensor p, Tensor ap, Tensor state, Tensor(a!) dots",
    "cg_step": "Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor ap, Tensor dots, Tensor rr, "
    "Tensor state, Tensor threshold, int maxiter, Tensor(d!) rr_out, Tensor(e!) state_out, "
    "Tensor(f!) residual_sq",
    "pcg_dots": "Tensor p, Tensor ap, Tensor d, Tensor state, Tensor(a!) dots",
    "pcg_step": "Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor ap, Tensor d, Tensor dots, "
    "Tensor rr, Tensor rz, Tensor state, Tensor threshold, int maxiter, Tensor(d!) rr_out, "
    "Tensor(e!) rz_out, Tensor(f!) state_out, Tensor(g!) residual_sq",
    "neumann_step": "Tensor(a!) x, Tensor ax, Tensor b, Tensor alpha, Tensor rr, Tensor state, "
    "Tensor threshold, Tensor limit, int maxiter, Tensor(b!) rr_out, Tensor(c!) state_out, "
    "Tensor(d!) residual_sq",
    "multi_dot": "Tensor w, Tensor basis, int count, Tensor state, Tensor(a!) products",
    "arnoldi_project": "Tensor w, Tensor basis, int count, Tensor first, Tensor state, "
    "Tensor(a!) w_out, Tensor(b!) second, Tensor(c!) ww",
    "arnoldi_step": "Tensor w, Tensor(a!) basis, int count, Tensor first, Tensor second, "
    "Tensor ww, Tensor(b!) left, Tensor(c!) column, Tensor norm, Tensor rr, Tensor state, "
    "Tensor threshold, int maxiter, Tensor(d!) rr_out, Tensor(e!) state_out, "
    "Tensor(f!) residual_sq",
    "anderson_dots": "Tensor image, Tensor z, Tensor z_before, Tensor(a!) residual, "
    "Tensor(b!) residuals, Tensor(c!) moves, int slot, int count, float beta, Tensor state, "
    "Tensor(d!) row, Tensor(e!) products, Tensor(f!) squares",
    "anderson_mix": "Tensor z, Tensor residual, Tensor moves, Tensor coefficients, int count, "
    "float beta, Tensor state, Tensor(a!) z_out",
    "bicgstab_dots": "Tensor shadow, Tensor v, Tensor state, Tensor(a!) shadow_dots",
    "bicgstab_half_step": "Tensor(a!) r, Tensor v, Tensor shadow_dots, Tensor rho, Tensor rr, "
    "Tensor state, Tensor threshold, Tensor limit, int maxiter, Tensor(b!) alpha, "
    "Tensor(c!) ss, Tensor(d!) state_out, Tensor(e!) residual_sq",
    "bicgstab_half_dots": "Tensor shadow, Tensor s, Tensor t, Tensor state, Tensor(a!) half_dots",
    "bicgstab_step": "Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor(d!) shadow, Tensor v, "
    "Tensor t, Tensor shadow_dots, Tensor ss, Tensor half_dots, Tensor alpha, Tensor unit, "
    "Tensor threshold, Tensor state, Tensor(e!) rho, Tensor(f!) rr_out",
    "pbicgstab_step": "Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor(d!) shadow, Tensor y, "
    "Tensor z, Tensor v, Tensor t, Tensor shadow_dots, Tensor ss, Tensor half_dots, Tensor alpha, "
    "Tensor unit, Tensor threshold, Tensor state, Tensor(e!) rho, Tensor(f!) rr_out",
    "dense_cg": "Tensor a, Tensor rhs, Tensor threshold, int maxiter, Tensor(a!) solution, "
    "Tensor(b!) state, Tensor(c!) residual_sq",
}
_Value: TypeAlias = Tensor | int | float


def _register(name: str, arguments: str) -> None:
    _LIBRARY.define(f"{name}({arguments}) -> ()")
    names = [argument.split()[1] for argument in arguments.split(", ")]

    def check(*values: _Value) -> dict[str, Tensor]:
        pairs = list(zip(names, values, strict=True))
        named = {key: value for key, value in pairs if isinstance(value, Tensor)}
        check_layout(**named)
        check_counts({key: value for key, value in pairs if isinstance(value, int)}, **named)
        return named

    def fake(*values: _Value) -> None:
        check(*values)

    def run(*values: _Value) -> None:
        named = check(*values)
        check_memory(**named)
        vector = named[names[0]]
        op: Callable[..., None] = getattr(backend("auto", vector.device, vector.dtype), name)
        op(*values)

    _LIBRARY.impl(name, fake, "Meta")
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)


for _name, _arguments in SCHEMAS.items():
    _register(_name, _arguments)


def cg_dots(p: Tensor, ap: Tensor, state: Tensor, dots: Tensor) -> None:
    """Write the partial sums of p.Ap into `dots[0]` and of Ap.Ap into `dots[1]`: 2 passes.

    p, ap: (B, ld); state: (2, B) int32; dots: (2, B, P) float64, zero for a frozen system.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride or alignment.
    """
    torch.ops.tritonimplicit.cg_dots(p, ap, state, dots)


def cg_step(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    ap: Tensor,
    dots: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    rr_out: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> None:
    """Do the rest of a CG iteration after `cg_dots`, or stop a system: 7 passes.

    Predict-and-recompute conjugate gradients (Chen and Carson 2020, doi 10.1137/19M1276856):
    alpha = r.r / p.Ap and beta = max(alpha^2 Ap.Ap - r.r, 0) / r.r in float64, rounded once to
    the vectors' dtype; x += alpha p; r -= alpha Ap; p = r + beta p.

    x, r, p, ap: (B, ld); dots: (2, B, P); rr, rr_out: (B, P) partial sums of r.r before and
    after; state, state_out: (2, B) int32; threshold: (B,), the squared residual norm at which a
    system has converged; residual_sq: (B,), r.r before the step. A system that stops, or has
    stopped, keeps x, r, p; its `rr_out` is zero.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride or alignment.
    """
    torch.ops.tritonimplicit.cg_step(
        x, r, p, ap, dots, rr, state, threshold, maxiter, rr_out, state_out, residual_sq
    )


def pcg_dots(p: Tensor, ap: Tensor, d: Tensor, state: Tensor, dots: Tensor) -> None:
    """Write the partial sums of p.Ap into `dots[0]` and of Ap.(d Ap) into `dots[1]`: 3 passes.

    p, ap, d: (B, ld); state: (2, B) int32; dots: (2, B, P) float64, zero for a frozen system.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride or alignment.
    """
    torch.ops.tritonimplicit.pcg_dots(p, ap, d, state, dots)


def pcg_step(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    ap: Tensor,
    d: Tensor,
    dots: Tensor,
    rr: Tensor,
    rz: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    rr_out: Tensor,
    rz_out: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> None:
    """Do the rest of a CG iteration with the preconditioner M = diag(d): 8 passes.

    Predict-and-recompute preconditioned conjugate gradients (Chen and Carson 2020, doi
    10.1137/19M1276856). As z.Ap = p.Ap for z = d r, the next r.z is alpha^2 Ap.(d Ap) - r.z:
    alpha = r.z / p.Ap and beta = max(alpha^2 Ap.(d Ap) - r.z, 0) / r.z in float64, rounded once
    to the vectors' dtype; x += alpha p; r -= alpha Ap; p = d r + beta p.

    x, r, p, ap: (B, ld); d: (B, ld), positive (PRECONDITIONER where r.z or Ap.(d Ap) shows that
    it is not); dots: (2, B, P); rr, rr_out and rz, rz_out: (B, P) partial sums of r.r and of r.z
    before and after; state, state_out: (2, B) int32; threshold: (B,), the squared norm of r at
    which a system has converged; residual_sq: (B,), r.r before the step. A system that stops, or
    has stopped, keeps x, r, p; its `rr_out` and `rz_out` are zero.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride or alignment.
    """
    torch.ops.tritonimplicit.pcg_step(
        *(x, r, p, ap, d, dots, rr, rz, state, threshold),
        *(maxiter, rr_out, rz_out, state_out, residual_sq),
    )


def neumann_step(
    x: Tensor,
    ax: Tensor,
    b: Tensor,
    alpha: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    limit: Tensor,
    maxiter: int,
    rr_out: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> None:
    """Do one Richardson iteration x += alpha (b - A x), or stop a system: 4 passes.

    After k iterations from x = 0 that is the Neumann series of A^-1 b, cut after k terms.

    x, ax, b: (B, ld); alpha: (B,) float64; rr, rr_out: (B, P) partial sums of the squared
    residual of the previous iterate, and of this one; state, state_out: (2, B) int32; threshold,
    limit: (B,), the squared residual norms at which a system has converged and above which it
    has diverged; residual_sq: (B,), the sum of `rr`. A system that stops, or has stopped, keeps
    x; its `rr_out` is zero.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride or alignment.
    """
    torch.ops.tritonimplicit.neumann_step(
        x, ax, b, alpha, rr, state, threshold, limit, maxiter, rr_out, state_out, residual_sq
    )


def multi_dot(w: Tensor, basis: Tensor, count: int, state: Tensor, products: Tensor) -> None:
    """Write the partial sums of basis[j].w into `products[j]` for j < count = k: k + 1 passes.

    w: (B, ld); basis: (K, B, ld), of which the first `count` vectors are read; state: (2, B) int32;
    products: (K, B, P) float64, zero for a frozen system. On a CPU the sums are in the vectors'
    dtype, where those of a basis far from norm 1 may over- or underflow.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride, alignment or count.
    """
    torch.ops.tritonimplicit.multi_dot(w, basis, count, state, products)


def arnoldi_project(
    w: Tensor,
    basis: Tensor,
    count: int,
    first: Tensor,
    state: Tensor,
    w_out: Tensor,
    second: Tensor,
    ww: Tensor,
) -> None:
    """Take from w its part in an orthonormal basis, once, after `multi_dot`: k + 2 passes.

    w_out = w - sum over j < count = k of h_j basis[j], h_j the sum of `first[j]`; and the partial
    sums of basis[j].w_out and of w_out.w_out, for `arnoldi_step` to do the same again: classical
    Gram-Schmidt, twice (Giraud, Langou, Rozloznik and van den Eshof, Numer. Math. 101, 2005).

    w, w_out: (B, ld); basis: (K, B, ld); first, second: (K, B, P); state: (2, B) int32; ww:
    (B, P). Of a frozen system `second` and `ww` are zero, and w_out may be anything.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride, alignment or count.
    """
    torch.ops.tritonimplicit.arnoldi_project(w, basis, count, first, state, w_out, second, ww)


def arnoldi_step(
    w: Tensor,
    basis: Tensor,
    count: int,
    first: Tensor,
    second: Tensor,
    ww: Tensor,
    left: Tensor,
    column: Tensor,
    norm: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    maxiter: int,
    rr_out: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> None:
    """Do the rest of a GMRES iteration after `arnoldi_project`, or stop a system: k + 2 passes.

    The second projection of w (what was `w_out`), divided by its norm, becomes basis[k], k =
    count, where there is room for it; the coefficients of both and that norm are `column`, H's
    k-th. The residual norm is that of the cycle's start over |g|, g H = 0 with g_0 = 1 (Ayachour,
    J. Comput. Appl. Math. 159, 2003): `left` holds g, and gets its next element. A rest at rounding
    level means that the Krylov space is invariant: it gives no vector, the residual norm zero,
    and BREAKDOWN where H is singular.

    w: (B, ld); basis: (K, B, ld); first, second: (K, B, P); ww: (B, P); left, column: (B, K + 1)
    float64; norm: (B,) float64, the residual norm at the cycle's start; rr, rr_out: (B, P) partial
    sums of the squared residual norm before and after; state, state_out: (2, B) int32;
    threshold: (B,), the squared residual norm at which a system has converged; residual_sq: (B,),
    the sum of `rr`. A system that stops, or has stopped, keeps basis, left and column; its
    `rr_out` is zero.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride, alignment or count.
    """
    torch.ops.tritonimplicit.arnoldi_step(
        *(w, basis, count, first, second, ww, left, column, norm, rr, state, threshold),
        *(maxiter, rr_out, state_out, residual_sq),
    )


def anderson_dots(
    image: Tensor,
    z: Tensor,
    z_before: Tensor,
    residual: Tensor,
    residuals: Tensor,
    moves: Tensor,
    slot: int,
    count: int,
    beta: float,
    state: Tensor,
    row: Tensor,
    products: Tensor,
    squares: Tensor,
) -> None:
    """Remember the last step of an Anderson iteration, and add up its dots: k + 6 passes.

    r = image - z takes the place of `residual`; dr, r less what was there, that of
    residuals[slot], and (z - z_before) + beta dr that of moves[slot]. Then the partial sums of
    residuals[j].dr into `row[j]` and of residuals[j].r into `products[j]` for j < count = k, and
    of r.r and image.image into `squares`.

    image, z, z_before, residual: (B, ld); residuals, moves: (K, B, ld); state: (2, B) int32; row,
    products: (K, B, P); squares: (2, B, P). Of a frozen sample the sums are zero, and what is
    remembered may be anything.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride, alignment or count.
    """
    torch.ops.tritonimplicit.anderson_dots(
        *(image, z, z_before, residual, residuals, moves, slot, count, beta, state),
        *(row, products, squares),
    )


def anderson_mix(
    z: Tensor,
    residual: Tensor,
    moves: Tensor,
    coefficients: Tensor,
    count: int,
    beta: float,
    state: Tensor,
    z_out: Tensor,
) -> None:
    """Write z + beta residual - sum over j < count = k of c_j moves[j] into z_out: k + 3 passes.

    Anderson acceleration as of Walker and Ni (SIAM J. Numer. Anal. 49, 2011).

    z, residual, z_out: (B, ld); moves: (K, B, ld); coefficients: (B, K) float64, the c; state:
    (2, B) int32. The z_out of a frozen sample is its z.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride, alignment or count.
    """
    torch.ops.tritonimplicit.anderson_mix(
        z, residual, moves, coefficients, count, beta, state, z_out
    )


def bicgstab_dots(shadow: Tensor, v: Tensor, state: Tensor, shadow_dots: Tensor) -> None:
    """Write the partial sums of r^.v, r^.r^ and v.v of v = A p: 2 passes, the first of 4 launches.

    shadow (r^), v: (B, ld); state: (2, B) int32; shadow_dots: (3, B, P) float64, zero for a frozen
    system.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride or alignment.
    """
    torch.ops.tritonimplicit.bicgstab_dots(shadow, v, state, shadow_dots)


def bicgstab_half_step(
    r: Tensor,
    v: Tensor,
    shadow_dots: Tensor,
    rho: Tensor,
    rr: Tensor,
    state: Tensor,
    threshold: Tensor,
    limit: Tensor,
    maxiter: int,
    alpha: Tensor,
    ss: Tensor,
    state_out: Tensor,
    residual_sq: Tensor,
) -> None:
    """Do the first half of a BiCGSTAB iteration after `bicgstab_dots`, or stop a system: 3 passes.

    van der Vorst 1992 (doi 10.1137/0913035): alpha = rho / r^.v in float64, rounded once to the
    vectors' dtype; r becomes s = r - alpha v. Where r^.v is rounding alpha is zero: the second half
    is done alone, and then a fresh start; where that was one already, it is a BREAKDOWN.

    r, v: (B, ld); shadow_dots: (3, B, P); rho: (B,) float64, r^.r, or zero for a system that
    begins afresh, with r^ = r; rr: (B, P) partial sums of the squared residual norm; state,
    state_out: (2, B) int32; threshold and limit: (B,), the squared residual norm at which a system
    has converged, and that beyond which it has DIVERGED; alpha: (B,) and ss: (B, P), partial sums
    of s.s, for `bicgstab_step`; residual_sq: (B,), the sum of `rr`. A system that stops, or has
    stopped, keeps r; its `ss` is zero.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride or alignment.
    """
    torch.ops.tritonimplicit.bicgstab_half_step(
        *(r, v, shadow_dots, rho, rr, state, threshold, limit),
        *(maxiter, alpha, ss, state_out, residual_sq),
    )


def bicgstab_half_dots(
    shadow: Tensor, s: Tensor, t: Tensor, state: Tensor, half_dots: Tensor
) -> None:
    """Write the partial sums of t.s, t.t, r^.s and r^.t of t = A s: 3 passes.

    shadow (r^), s, t: (B, ld); state: (2, B) int32, after `bicgstab_half_step`; half_dots:
    (4, B, P) float64, zero for a frozen system.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride or alignment.
    """
    torch.ops.tritonimplicit.bicgstab_half_dots(shadow, s, t, state, half_dots)


def bicgstab_step(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    shadow: Tensor,
    v: Tensor,
    t: Tensor,
    shadow_dots: Tensor,
    ss: Tensor,
    half_dots: Tensor,
    alpha: Tensor,
    unit: Tensor,
    threshold: Tensor,
    state: Tensor,
    rho: Tensor,
    rr_out: Tensor,
) -> None:
    """Do the rest of a BiCGSTAB iteration after `bicgstab_half_dots`: 8 passes.

    omega = t.s / t.t, the next rho = r^.s - omega r^.t, beta = rho / (r^.v omega) in float64,
    rounded once to the vectors' dtype; x += unit (alpha p + omega s); r = s - omega t;
    p = r + beta (p - omega v). Where s is at the threshold already, or t.s is rounding, omega is
    zero. A system whose alpha, omega or rho is lost begins afresh: rho = 0, p = r^ = r, a ninth
    pass.

    x, p, v, t: (B, ld); r: (B, ld), s before and r after; shadow (r^): (B, ld); unit: (B,)
    float64, the size of residual that all vectors but x are in units of, so that products with A
    stay small; shadow_dots: (3, B, P); ss: (B, P); half_dots: (4, B, P); alpha, threshold: (B,);
    state: (2, B) int32, after `bicgstab_half_step`; rho: (B,), the next; rr_out: (B, P) partial
    sums of the squared residual norm, in x's units, zero for a frozen system, which keeps all its
    vectors.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride or alignment.
    """
    torch.ops.tritonimplicit.bicgstab_step(
        *(x, r, p, shadow, v, t, shadow_dots, ss, half_dots),
        *(alpha, unit, threshold, state, rho, rr_out),
    )


def pbicgstab_step(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    shadow: Tensor,
    y: Tensor,
    z: Tensor,
    v: Tensor,
    t: Tensor,
    shadow_dots: Tensor,
    ss: Tensor,
    half_dots: Tensor,
    alpha: Tensor,
    unit: Tensor,
    threshold: Tensor,
    state: Tensor,
    rho: Tensor,
    rr_out: Tensor,
) -> None:
    """Do `bicgstab_step` with a right preconditioner M: 10 passes.

    x += unit (alpha y + omega z), where y = M p and z = M s, (B, ld) each, and the products are
    v = A y and t = A z. The other arguments are those of `bicgstab_step`.

    Raises TypeError or ValueError for a wrong dtype, shape, device, stride or alignment.
    """
    torch.ops.tritonimplicit.pbicgstab_step(
        *(x, r, p, shadow, y, z, v, t, shadow_dots, ss, half_dots),
        *(alpha, unit, threshold, state, rho, rr_out),
    )


def dense_cg(
    a: Tensor,
    rhs: Tensor,
    threshold: Tensor,
    maxiter: int,
    solution: Tensor,
    state: Tensor,
    residual_sq: Tensor,
) -> None:
    """Solve small dense systems from zero by conjugate gradients, each whole solve in one launch.

    The recurrence, its rules and its statuses are those of `cg_step`; on a GPU the matrix is read
    once. A system is CONVERGED where the true residual b - A x, recomputed in float64, meets the
    threshold or eps ‖b‖, and STAGNATED where only the recurrence's did.

    a: (B, n, n), n from 1 to 128, symmetric (which is not checked) and positive or negative
    definite (INDEFINITE where it is seen that it is not); rhs: (B, n); threshold: (B,) float64, the
    squared residual norm at which a system has converged; solution: (B, n), NaN for a NON_FINITE
    system, else the last iterate; state: (2, B) int32, statuses and iterations; residual_sq: (B,)
    float64, the true one.

    Raises TypeError or ValueError for a wrong dtype, shape, device or stride.
    """
    torch.ops.tritonimplicit.dense_cg(a, rhs, threshold, maxiter, solution, state, residual_sq)
