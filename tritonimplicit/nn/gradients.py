"""The gradients that a deep equilibrium model can have: exact, and cheaper than that."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Final, Protocol

import optree
import torch
from torch import Tensor

from tritonimplicit.diagnostics import Solution, Status, TensorTree
from tritonimplicit.diff.implicit.decorator import check_solve
from tritonimplicit.fixed_point import Broyden, Picard
from tritonimplicit.fixed_point.base import ADVICE, Map
from tritonimplicit.fixed_point.broyden import InverseJacobian
from tritonimplicit.linear_solve import GMRES, Neumann
from tritonimplicit.linear_solve.base import LinearSolver, check_count, check_real
from tritonimplicit.linear_solve.family import OwnSolver
from tritonimplicit.linear_solve.iterative import IterativeSolver
from tritonimplicit.linear_solve.observed import Observed
from tritonimplicit.nn.equilibrium import Problem
from tritonimplicit.operators import Solve


class Gradient(Protocol):
    """How a DEQ finds its fixed point and what autograd sees of it."""

    def equilibrium(self, problem: Problem) -> TensorTree:
        """Return the fixed point with a gradient."""
        ...


@dataclass(frozen=True)
class Implicit:
    """The gradient of the fixed point, by the implicit function theorem: one linear solve.

    (I - J^T) u = dl/dz, J = df/dz, then u is pulled back through one evaluation of f. `solve` is a
    solver of `linear_solve` (any function of (matvec, b)); by default each sample of a batch is its
    own system, to a true residual of 1e-3. Exact as far as the solve is; every order and transform
    of `custom_fixed_point`.

    Cheaper: `GMRES(batch_ndim=1, maxiter=k)` stops after k vjps. The truncated Neumann series of k
    terms is `Neumann(batch_ndim=1, maxiter=k - 1)`, damped by its `alpha`; unlike GMRES it goes
    wrong where f is no contraction, and then says so.
    """

    solve: Solve = field(default_factory=lambda: GMRES(rtol=1e-3, batch_ndim=1))

    def __post_init__(self) -> None:
        """Check the field."""
        check_solve("solve", self.solve)

    def equilibrium(self, problem: Problem) -> TensorTree:
        """Return the fixed point with its implicit gradient."""
        return problem.root(_observed(self.solve, problem))


@dataclass(frozen=True)
class SHINE:
    """The gradient of the fixed point, by the inverse that a Broyden forward pass has left behind.

    The solver must be `Broyden`, and its `memory` should hold all its iterations: where it begins
    again, what it knew is lost. Its low-rank inverse of I - J, transposed, is the preconditioner
    `M` of `solve`, one of the iterative solvers of `linear_solve` that take any matrix. The default
    takes the inverse at its word, whatever residual is left: one vjp tells it to
    `deq.last.backward`. For the same vjp, `GMRES(batch_ndim=1, maxiter=1)` brings each answer to
    the length of least residual. With `GMRES(batch_ndim=1, rtol=1e-3)` the gradient is exact, in
    fewer vjps. The inverse lives until the backward pass: 2 vectors an iteration.

    The inverse is of no use to second derivatives and forward mode, whose systems have the other
    transpose. They are solved without it where `solve` has a tolerance and no `maxiter`, and raise
    RuntimeError otherwise.

    Ramzi, Mannel, Bai, Starck, Ciuciu and Moreau, "SHINE: sharing the inverse estimate from the
    forward pass for bi-level optimization and implicit models", ICLR 2022.
    """

    solve: IterativeSolver = field(
        default_factory=lambda: Neumann(batch_ndim=1, maxiter=0, on_failure="ignore")
    )

    def __post_init__(self) -> None:
        """Check the field."""
        if not isinstance(self.solve, IterativeSolver) or self.solve.symmetric:
            raise TypeError(
                "solve must be an iterative solver of tritonimplicit.linear_solve that takes a "
                f"nonsymmetric matrix, such as GMRES(batch_ndim=1), not {self.solve!r}."
            )
        if self.solve.M is not None:
            raise ValueError("solve has an M already, in whose place SHINE puts the inverse.")

    def equilibrium(self, problem: Problem) -> TensorTree:
        """Return the fixed point with its gradient."""
        solver = problem.solver
        if not isinstance(solver, Broyden):
            raise TypeError(
                "SHINE takes its inverse from Broyden's method: give the DEQ such a solver, as "
                f"solver=Broyden(batch_ndim=1, memory=50), not {type(solver).__name__}."
            )
        found: list[InverseJacobian] = []

        def search(f: Map, z0: TensorTree) -> Solution:
            solution, inverse = solver.solve_with_inverse(f, z0)
            found.append(inverse.T)
            return solution

        solve = dataclasses.replace(self.solve, M=lambda r: found[0](r))
        on_leaves = solve.on_leaves(optree.tree_structure(problem.z0))
        return problem.root(_observed(on_leaves, problem, _Shared), search)


@dataclass(frozen=True)
class Phantom:
    """The gradient through `steps` damped steps from the fixed point, which is taken for constant.

    z <- (1 - damping) z + damping f(z). No linear solve; biased.

    Geng, Zhang, Bai, Wang and Lin, "On training implicit models", NeurIPS 2021.
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        """Check the fields."""
        check_steps(self.steps)
        check_real("damping", self.damping)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping!r}.")

    def equilibrium(self, problem: Problem) -> TensorTree:
        """Return the fixed point, moved on by the steps."""
        z: TensorTree = optree.tree_map(Tensor.detach, problem.root())
        return problem.iterate(z, self.steps, self.damping)


@dataclass(frozen=True)
class JFB:
    """The gradient through one evaluation of f at the fixed point: `Phantom(1, 1.0)`.

    Fung, Heaton, Li, McKenzie, Osher and Yin, "JFB: Jacobian-free backpropagation for implicit
    networks", AAAI 2022.
    """

    def equilibrium(self, problem: Problem) -> TensorTree:
        """Return f of the fixed point."""
        return Phantom(steps=1, damping=1.0).equilibrium(problem)


_ADVICE: Final = {
    **ADVICE,
    Status.MAX_ITERATIONS: (
        "did not converge: give Unrolled more steps, loosen the solver's rtol/atol, or make f more "
        "of a contraction; the value is the last iterate"
    ),
}


@dataclass(frozen=True)
class Unrolled:
    """The gradient through all of `steps` iterations z <- f(z) from z0, in place of the solver.

    Memory and time are in proportion to `steps`. The solver's tolerance judges the result.
    """

    steps: int = 30

    def __post_init__(self) -> None:
        """Check the field."""
        check_steps(self.steps)

    def equilibrium(self, problem: Problem) -> TensorTree:
        """Return the last iterate."""
        z = problem.iterate(problem.z0, self.steps, damping=1.0)
        settings = {f.name: getattr(problem.solver, f.name) for f in dataclasses.fields(Picard)}
        judge = Picard(**{**settings, "maxiter": 0})

        def search(f: Map, z: TensorTree) -> Solution:
            return dataclasses.replace(judge.solve(f, z), solver="Unrolled")

        with torch.no_grad():
            at_the_end = dataclasses.replace(problem, z0=z, solver=judge)
            at_the_end.root(search=search, advice=_ADVICE)
        return z


@dataclass(frozen=True)
class _Shared(Observed):
    """A solver whose M is the inverse of a forward pass, transposed."""

    def transposed(self) -> OwnSolver:
        """Return the solver without M. Raises RuntimeError if it would end short of a tolerance."""
        solve = self.inner
        assert isinstance(solve, IterativeSolver)
        if solve.maxiter is not None or solve.rtol == solve.atol == 0:
            raise RuntimeError(
                "SHINE's inverse is that of the backward pass's matrix. Second derivatives and "
                "forward mode solve with its transpose, without the inverse, and "
                f"{type(solve).__name__} with its maxiter or without a tolerance would leave any "
                "error: give the DEQ gradient=SHINE(GMRES(batch_ndim=1, rtol=1e-3)), with no "
                "maxiter, or Implicit()."
            )
        return super().transposed()


def _observed(solve: Solve, problem: Problem, kind: type[Observed] = Observed) -> Solve:
    """`solve`, from the warm starts, telling `deq.last` and the warm starts what became of it."""
    starts, last = problem.starts, problem.last
    if not isinstance(solve, LinearSolver):
        return solve
    if starts is not None and starts.u is not None:
        solve = dataclasses.replace(solve, init=starts.u)  # type: ignore[call-arg]

    def show(solution: Solution) -> None:
        last.show_backward(solution)
        if starts is not None:
            starts.keep_adjoint(solution)

    return kind(solve, show, told_by="`deq.last.backward`")


def check_steps(steps: object) -> None:
    """Raise unless `steps` is a positive int."""
    check_count("steps", steps)
    if steps == 0:
        raise ValueError("steps must be at least 1: without a step there is no gradient.")
