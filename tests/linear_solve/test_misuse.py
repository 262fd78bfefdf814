"""Bad settings and bad input get an error that says what is wrong."""

import functools

import pytest
import torch
from torch.autograd import forward_ad

import tritonimplicit as ti
from tritonimplicit.fixed_point import Picard
from tritonimplicit.linear_solve import (
    CG,
    Dense,
    Neumann,
    NormalCG,
    solve_auto,
    solve_bicgstab,
    solve_cg,
    solve_gmres,
    solve_inv,
    solve_minres,
    solve_normal_cg,
)


@pytest.mark.parametrize("build", [CG, NormalCG, Neumann, Dense])
@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"maxitre": 3}, TypeError, "maxitre"),
        ({"batch_ndim": -1}, ValueError, "batch_ndim"),
        ({"batch_ndim": 1.0}, TypeError, "batch_ndim"),
        ({"ridge": "big"}, TypeError, "ridge"),
        ({"ridge": float("nan")}, ValueError, "ridge"),
        ({"on_failure": "shout"}, ValueError, "'warn', 'raise', 'ignore'"),
        ({"ridge": torch.ones((), dtype=torch.int32)}, TypeError, "int32"),
    ],
)
def test_settings_of_every_solver(build, fields, error, message):
    with pytest.raises(error, match=message):
        build(**fields)


@pytest.mark.parametrize("build", [CG, NormalCG, Neumann])
@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"maxiter": -1}, ValueError, "maxiter"),
        ({"maxiter": 2.0}, TypeError, "maxiter"),
        ({"maxiter": True}, TypeError, "maxiter"),
        ({"maxiter": 2**31}, ValueError, "maxiter must be at most 2147483647, not 2147483648"),
        ({"rtol": -1e-5}, ValueError, "rtol"),
        ({"rtol": float("inf")}, ValueError, "rtol"),
        ({"atol": "small"}, TypeError, "atol"),
        ({"check_every": -2}, ValueError, "check_every"),
        ({"backend": "cuda"}, ValueError, "'auto', 'reference', 'triton'"),
        ({"cuda_graph": 1}, TypeError, "bool"),
        ({"cuda_graph": True, "check_every": 3}, ValueError, "even"),
        ({"cuda_graph": True, "check_every": 0}, ValueError, "even"),
    ],
)
def test_settings_of_iterative_solvers(build, fields, error, message):
    with pytest.raises(error, match=message):
        build(**fields)


def test_alpha_must_move_the_iterate():
    with pytest.raises(ValueError, match="alpha"):
        Neumann(alpha=0.0)


def test_overrides_are_checked_as_fields_are():
    with pytest.raises(TypeError, match=r"CG has no field tol; it has .* rtol, atol, maxiter"):
        CG()(lambda v: v, torch.ones(2), tol=1e-3)
    with pytest.raises(ValueError, match="maxiter"):
        CG()(lambda v: v, torch.ones(2), maxiter=-1)


@pytest.mark.parametrize(
    "factory",
    [
        solve_auto,
        solve_bicgstab,
        solve_cg,
        solve_gmres,
        solve_inv,
        solve_minres,
        solve_normal_cg,
    ],
)
def test_factories_name_the_fields_there_are(factory):
    with pytest.raises(TypeError, match="has no field maxitre; it has ridge, batch_ndim"):
        factory(maxitre=3)


def test_factories_take_torchopts_extra_keywords_and_build_solvers():
    b = torch.ones(2)
    assert solve_cg(matvec=torch.sin, b=b, ridge=1.0) == CG(ridge=1.0)
    assert solve_normal_cg(maxiter=5, atol=0) == NormalCG(maxiter=5, atol=0)
    assert solve_inv(ns=True, maxiter=3, alpha=0.1) == Neumann(maxiter=3, alpha=0.1)
    assert solve_inv(matvec=torch.sin, b=b, ns=False) == Dense()
    x = solve_inv(matvec=torch.sin, b=b, ridge=1.0)(matvec=lambda v: v, b=b)
    assert x.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("solver", [CG(), NormalCG(), Neumann(), Dense()], ids=str)
@pytest.mark.parametrize(
    ("matvec", "error", "message"),
    [
        (lambda v: (v,), TypeError, "structure"),
        (lambda v: v[:2], ValueError, r"shape \(2,\)"),
        (lambda v: v.double(), TypeError, "float64"),
        (lambda v: v.to("meta"), ValueError, "meta"),
    ],
)
def test_a_matvec_that_does_not_fit_b(solver, matvec, error, message):
    with pytest.raises(error, match=message):
        solver(matvec, torch.ones(3))


@pytest.mark.parametrize("solver", [CG(), NormalCG(), Neumann(), Dense()], ids=str)
@pytest.mark.parametrize(
    ("b", "error"),
    [({}, ValueError), (torch.ones(3, dtype=torch.int64), TypeError), ([1.0], TypeError)],
)
def test_a_b_that_is_no_vector(solver, b, error):
    with pytest.raises(error):
        solver(lambda v: v, b)


def test_a_matrix_is_no_matvec():
    with pytest.raises(TypeError, match=r"linalg\.cg"):
        CG()(torch.eye(3), torch.ones(3))


def test_init_must_have_the_shapes_of_b():
    with pytest.raises(ValueError, match="Tensors in x0 and b must have matching shapes"):
        CG(init=torch.zeros(2))(lambda v: v, torch.ones(3))
    with pytest.raises(TypeError, match="float64"):
        CG(init=torch.zeros(3, dtype=torch.float64))(lambda v: v, torch.ones(3))


def test_a_ridge_must_fit_the_batch():
    with pytest.raises(ValueError, match="the batch's shape"):
        CG(ridge=torch.ones(3), batch_ndim=1)(lambda v: v, torch.ones(2, 3))


def test_solve_is_not_silently_cut_off_from_autograd():
    scale = torch.ones(3, requires_grad=True)
    for solver in (CG(), NormalCG(), Neumann(), Dense()):
        with pytest.raises(RuntimeError, match="is not differentiated"):
            solver.solve(lambda v: v, torch.ones(3, requires_grad=True))
        with torch.no_grad():
            solver.solve(lambda v: v * scale, torch.ones(3))
        with pytest.raises(RuntimeError, match="is not differentiated"):
            solver.solve(lambda v: v * scale, torch.ones(3))


def test_a_matvec_that_works_in_place_is_noticed():
    for solver in (CG(), Neumann(), Dense()):
        with pytest.raises(RuntimeError, match="in place"):
            solver(lambda v: v.mul_(2), torch.ones(32))


def test_an_initial_guess_that_requires_grad_is_taken_as_its_values():
    guess = torch.ones(3, requires_grad=True)
    assert CG(init=guess)(lambda v: 2 * v, torch.ones(3)).tolist() == [0.5] * 3


def test_a_forced_backend_is_never_replaced_in_silence():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        CG(backend="triton")(lambda v: v, torch.ones(3))


def test_the_status_enum_is_public():
    assert ti.Status(6) is ti.Status.NON_FINITE


DIAGONAL = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))


def by_backward(v):
    with torch.enable_grad():
        (0.5 * v.requires_grad_() @ DIAGONAL @ v).backward()
    return v.grad


def with_hooks(v):
    with torch.enable_grad():
        v.requires_grad_().register_hook(lambda g: DIAGONAL @ g)
        (product,) = torch.autograd.grad(0.5 * v @ v, v)
    v.requires_grad_(False)
    return product


def rebinding(v):
    v.data = DIAGONAL @ v
    return v.detach().clone()


@functools.lru_cache(maxsize=4)
def memoised(v):
    return DIAGONAL @ v


@pytest.mark.parametrize("matvec", [by_backward, with_hooks, rebinding, memoised])
def test_what_a_matvec_does_to_its_argument_does_not_reach_the_next_product(matvec):
    b = torch.ones(3, dtype=torch.float64)
    solution = CG(rtol=1e-12).solve(matvec, b)
    assert solution.status == ti.Status.CONVERGED
    torch.testing.assert_close(solution.value, b / DIAGONAL.diagonal())


def test_what_a_matvec_does_to_its_arguments_structure_does_not_reach_the_next_product():
    b = torch.ones(2, 2, dtype=torch.float64)

    def transposing(tree):
        v = tree.pop("v")
        v.data = v.data.t()
        return {"v": (torch.arange(1.0, 5).view(2, 2).double() * v.t()).clone()}

    value = CG(rtol=1e-12)(transposing, {"v": b})["v"]
    torch.testing.assert_close(value, 1 / torch.arange(1.0, 5).view(2, 2).double())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which a dual level calls
@pytest.mark.parametrize("n", [5, 16])  # which is copied, and which is read where it lies
@pytest.mark.parametrize("solve", [CG().solve, NormalCG().solve, Picard().solve])
def test_a_tangent_that_would_be_lost_is_an_error(solve, n):
    with forward_ad.dual_level():
        scale = forward_ad.make_dual(torch.full((n,), 0.5), torch.ones(n))
        with pytest.raises(RuntimeError, match="forward-mode AD"):
            solve(lambda v: scale * v, torch.ones(n))
