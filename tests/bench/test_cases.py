"""Each family's cases: what ours answers passes the gate, and what is wrong does not."""

from __future__ import annotations

import pytest
import torch

from bench.case import OURS, Absent, Entry, Setting
from bench.models import load
from bench.registry import ABOUT, CASES, select
from bench.runner import checked
from bench.solvers import multiply
from bench.systems import MAKERS, SPD, system

QUICK = Setting(torch.device("cpu"), quick=True)
OF_EACH_KIND = (
    "hypergradient/linear-cg-5",
    "hypergradient/conv-normal_cg-5",
    "hypergradient/mlp-module-cg-20",
    "batched/maml-cg-4",
    "hyperparameter/ridge",
    "hyperparameter/logistic",
    "deq/backward-conv-1e-6-whole",
    "deq/backward-lm-1e-3-worst",
    "deq/forward-multiscale-1e-3-worst",
    "deq/forward-lm-1e-5-whole",
    "deq/gradients-conv",
    "deq/training-lm",
    "solvers/spd-strakos",
    "solvers/spd-batch",
    "solvers/general-grcar",
    "solvers/indefinite-strakos",
    "scaling/size-1e3",
    "scaling/leaves-100",
    "scaling/batch-4",
    "steps/cg-1e5",
    "memory/neumann",
)


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_the_gate_lets_what_is_right_pass_and_nothing_else(name):
    (case,) = select([name])
    problem = case.build(QUICK)
    ours = [e for e in problem.entries if isinstance(e, Entry) and e.provider == OURS]
    (entry,) = ours
    answer = tuple(t.clone() for t in entry.prepare()())
    right = checked(entry, answer, problem)
    assert right.remark == ""
    assert right.error < 0.1
    assert right.error <= (entry.tolerance or problem.tolerance) < 1  # the error of nothing done
    wrong = checked(entry, tuple(1.2 * t for t in answer), problem)
    assert wrong.remark.endswith("not timed")
    broken = tuple(torch.full_like(t, torch.nan) for t in answer)
    assert checked(entry, broken, problem).remark.endswith("not timed")


def test_a_training_with_a_longer_gradient_or_none_is_wrong():
    (case,) = select(["deq/training-lm"])
    problem = case.build(QUICK)
    (entry,) = (e for e in problem.entries if isinstance(e, Entry) and e.provider == OURS)
    before = tuple(p.detach() for p in load("lm", QUICK.device).parameters())
    after = entry.prepare()()
    for factor, wrong in ((0.0, True), (1.0, False), (1.6, True)):
        answer = tuple(p + factor * (q - p) for p, q in zip(before, after, strict=True))
        assert bool(checked(entry, answer, problem).remark) == wrong


def test_every_family_is_told_of():
    assert {case.family for case in CASES} == set(ABOUT)


def test_without_peers_each_is_named_with_a_reason(monkeypatch):
    from bench import libraries

    for peer in libraries.PEERS.values():
        for module in (peer.module.split(".")[0], peer.module):
            monkeypatch.setitem(__import__("sys").modules, module, None)
    (case,) = select(["solvers/spd-strakos"])
    absent = {e.provider: e.reason for e in case.build(QUICK).entries if isinstance(e, Absent)}
    assert set(absent) == {"TorchOpt", "hypertorch", "linear_operator", "JAXopt, CG", "lineax, CG"}
    assert all(reason.startswith("not installed") for reason in absent.values())


@pytest.mark.parametrize("name", MAKERS)
def test_systems_are_what_they_say(name):
    given = system(name, QUICK.device)
    assert given.a.dtype == torch.float64
    assert multiply(given.a, given.b).shape == given.b.shape
    if name.startswith("general"):
        assert (given.a != given.a.mT).any()
        return
    assert torch.equal(given.a, given.a.mT)
    values = torch.linalg.eigvalsh(given.a)
    assert bool((values > 0).all()) == (given.kind == SPD)
    if name == "spd-batch":
        conditions = values[:, -1] / values[:, 0]
        torch.testing.assert_close(conditions, torch.logspace(0, 3, 64).double(), rtol=1e-6, atol=0)
