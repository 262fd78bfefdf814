"""Tune one ridge penalty a feature by its hypergradient, on scikit-learn's diabetes data.

Weights w(a) minimise |X w - y|^2 + sum_j a_j w_j^2 on four fifths of the training data; the error
on the last fifth, averaged over the five ways to choose it, is minimised over the ten penalties a.
`custom_root` gives w(a) its derivative, and vmap makes the five fits, and the five linear systems
of the backward pass, one batch. A grid with the 31 values of one penalty would need 31^10 fits.

    python examples/hyperparameter_ridge.py [--steps N] [--out DIR]

Prints a table, draws DIR/hyperparameter_ridge.png, and exits with 1 if a hypergradient is not that
of the closed form.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rich
import torch
from matplotlib.figure import Figure
from rich.table import Table
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score, train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.func import grad, vmap
from tqdm import trange

from tritonimplicit import LinearOperator, custom_root
from tritonimplicit.linear_solve import solve_cg

FOLDS = KFold(5, shuffle=True, random_state=0)
GRID = np.logspace(-2, 4, 31)  # of the one penalty that all features share
STEPS, LEARNING_RATE = 200, 0.1
CG = solve_cg(rtol=1e-10, maxiter=200, on_failure="raise")  # ten unknowns, in float64
MAX_ERROR = 1e-6  # of a hypergradient, relative


@dataclass(frozen=True)
class Data:
    """Standardised features and targets; `used[k]` is 1 for the rows that fold k is fitted to."""

    x: Tensor  # (n, d)
    y: Tensor  # (n,)
    x_out: Tensor
    y_out: Tensor
    used: Tensor  # (folds, n)
    names: list[str]


def diabetes() -> Data:
    """A quarter of the 442 patients is held out, from scaling and folds too."""
    bunch = load_diabetes(scaled=False)
    x, x_out, y, y_out = train_test_split(bunch.data, bunch.target[:, None], random_state=0)
    scale_x, scale_y = (StandardScaler().fit(part).transform for part in (x, y))
    x, x_out = (torch.from_numpy(scale_x(part)) for part in (x, x_out))
    y, y_out = (torch.from_numpy(scale_y(part))[:, 0] for part in (y, y_out))
    used = torch.ones(FOLDS.get_n_splits(), len(x), dtype=torch.float64)
    for fold, (_, validation) in enumerate(FOLDS.split(x)):
        used[fold, validation] = 0
    return Data(x, y, x_out, y_out, used, bunch.feature_names)


# -- the two levels ------------------------------------------------------------------------------


def objective(w: Tensor, log_penalty: Tensor, x: Tensor, y: Tensor, used: Tensor) -> Tensor:
    """The inner problem, in scikit-learn's convention: sums, not means."""
    return (used * (x @ w - y).square()).sum() + (log_penalty.exp() * w.square()).sum()


# Its gradient in w is zero at the solution; the solution's derivative is wanted in argument 1.
@custom_root(grad(objective), argnums=1, solve=CG)
def fit(w: Tensor, log_penalty: Tensor, x: Tensor, y: Tensor, used: Tensor) -> Tensor:
    """The inner solver; any would do, since nothing is differentiated through it."""
    normal = LinearOperator(normal_product, log_penalty, x, used, positive_definite=True)
    return CG(normal, x.T @ (used * y))


def normal_product(v: Tensor, log_penalty: Tensor, x: Tensor, used: Tensor) -> Tensor:
    return x.T @ (used * (x @ v)) + log_penalty.exp() * v


def fits(log_penalty: Tensor, data: Data) -> Tensor:
    """Weights (folds, d) of all folds, as one batch."""
    start = data.x.new_zeros(data.x.shape[1])
    return vmap(fit, in_dims=(None, None, None, None, 0))(
        start, log_penalty, data.x, data.y, data.used
    )


def validation_error(w: Tensor, data: Data) -> Tensor:
    """Mean over the folds of the mean squared error on the rows that they leave out."""
    left_out = 1 - data.used
    squares = (w @ data.x.T - data.y).square()  # (folds, n)
    return ((left_out * squares).sum(1) / left_out.sum(1)).mean()


def closed_form(log_penalty: Tensor, data: Data) -> Tensor:
    """The hypergradient (d,), that of A w = X^T y, A = X^T X + diag(a), summed over the folds."""
    penalty = log_penalty.detach().exp()
    weighted = data.x.T * data.used[:, None]  # (folds, d, n)
    matrix = weighted @ data.x + penalty.diag()
    w = torch.linalg.solve(matrix, weighted @ data.y).requires_grad_()
    (slope,) = torch.autograd.grad(validation_error(w, data), w)
    return -(penalty * w.detach() * torch.linalg.solve(matrix, slope)).sum(0)


@dataclass(frozen=True)
class Tuned:
    """Penalties, the validation error of every step, the worst error of a hypergradient."""

    penalty: Tensor  # (d,)
    errors: list[float]
    gradient_error: float


def tune(data: Data, start: float, steps: int) -> Tuned:
    """Adam on the logarithms of the penalties, all of which begin at `start`."""
    log_penalty = torch.full((data.x.shape[1],), start, dtype=torch.float64).log().requires_grad_()
    optimiser = torch.optim.Adam([log_penalty], lr=LEARNING_RATE)
    errors, worst = [], 0.0
    for _ in (bar := trange(steps, unit="step")):
        error = validation_error(fits(log_penalty, data), data)
        optimiser.zero_grad()
        error.backward()
        exact = closed_form(log_penalty, data)
        worst = max(worst, ((log_penalty.grad - exact).norm() / exact.norm()).item())
        optimiser.step()
        errors.append(error.item())
        bar.set_postfix(error=f"{errors[-1]:.4f}", refresh=False)
    with torch.no_grad():
        errors.append(validation_error(fits(log_penalty, data), data).item())
    return Tuned(log_penalty.detach().exp(), errors, worst)


# -- what it is compared with --------------------------------------------------------------------


def grid_search(data: Data) -> tuple[float, float]:
    """The best single penalty by scikit-learn, and its validation error."""
    search = GridSearchCV(
        Ridge(fit_intercept=False), {"alpha": GRID}, cv=FOLDS, scoring="neg_mean_squared_error"
    ).fit(data.x.numpy(), data.y.numpy())
    return search.best_params_["alpha"], -search.best_score_


def unpenalised(data: Data) -> float:
    """The validation error of ordinary least squares."""
    model = LinearRegression(fit_intercept=False)
    x, y = data.x.numpy(), data.y.numpy()
    return -cross_val_score(model, x, y, cv=FOLDS, scoring="neg_mean_squared_error").mean()


def held_out_error(penalty: Tensor, data: Data) -> float:
    """Mean squared error on the held-out patients of a fit to all others."""
    w = torch.linalg.solve(data.x.T @ data.x + penalty.diag(), data.x.T @ data.y)
    return (data.x_out @ w - data.y_out).square().mean().item()


def draw(tuned: Tuned, shared: float, shared_error: float, names: list[str], path: Path) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(tuned.errors, "C0", label="one penalty a feature, by hypergradient")
    left.axhline(shared_error, color="C1", linestyle="--", label="one for all, by grid search")
    left.set(title="Validation error, five folds", xlabel="step", ylabel="mean squared error")
    right.bar(names, tuned.penalty.tolist(), color="C0")
    right.axhline(shared, color="C1", linestyle="--")
    right.set(title="Penalties", yscale="log", xlabel="feature")
    left.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.95))
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def run(steps: int, out: Path) -> Tuned:
    data = diabetes()
    shared, shared_error = grid_search(data)
    tuned = tune(data, shared, steps)
    picture = out / "hyperparameter_ridge.png"
    draw(tuned, shared, shared_error, data.names, picture)

    ones = torch.ones_like(tuned.penalty)
    table = Table("Ridge regression, diabetes", "validation error", "held-out error")
    rows = {
        "no penalty": (unpenalised(data), 0 * ones),
        f"one penalty, the best of a grid of {len(GRID)}": (shared_error, shared * ones),
        f"{len(ones)} penalties, {steps} hypergradient steps": (tuned.errors[-1], tuned.penalty),
    }
    for name, (error, penalty) in rows.items():
        table.add_row(name, f"{error:.4f}", f"{held_out_error(penalty, data):.4f}")
    rich.print(table)
    strong = [name for name, p in zip(data.names, tuned.penalty, strict=True) if p > len(data.x)]
    print(f"features all but left out: {', '.join(strong) or 'none'}")
    print(f"hypergradients: at most {tuned.gradient_error:.1e} from the closed form, relative")
    print(f"picture: {picture}")
    return tuned


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tune a ridge penalty for every feature.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    options = parser.parse_args(arguments)
    # Threads wait for each other at each of many small operations: long, where cores are shared.
    torch.set_num_threads(1)
    tuned = run(options.steps, options.out)
    if not tuned.gradient_error <= MAX_ERROR:
        print(
            f"hyperparameter_ridge: a hypergradient is {tuned.gradient_error:.1e} off",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
