"""What peers answer passes the gate, where they are installed (the extra `bench`)."""

from __future__ import annotations

import pytest
import torch

from bench.case import Absent, Setting
from bench.registry import select
from bench.runner import checked

QUICK = Setting(torch.device("cpu"), quick=True)

PEERS = (
    ("hypergradient/linear-cg-5", "TorchOpt"),
    ("hypergradient/linear-cg-5", "hypertorch"),
    ("hypergradient/linear-cg-5", "JAXopt"),
    ("hypergradient/conv-normal_cg-5", "JAXopt"),
    ("hyperparameter/logistic", "hypertorch, fixed point"),
    ("hyperparameter/logistic", "JAXopt, CG"),
    ("deq/backward-conv-1e-3-worst", "torchdeq, fixed point"),
    ("deq/backward-conv-1e-3-worst", "torchdeq, Anderson"),
    ("deq/backward-lm-1e-3-worst", "torchdeq, Broyden"),
    ("deq/forward-lm-1e-3-worst", "torchdeq, Broyden"),
    ("deq/gradients-conv", "torchdeq, phantom(5, 0.5)"),
    ("solvers/spd-benign", "linear_operator"),
    ("solvers/spd-batch", "JAXopt, CG"),
    ("solvers/spd-batch", "lineax, CG"),
    ("solvers/general-benign", "lineax, GMRES"),
    ("solvers/indefinite-benign", "JAXopt, GMRES"),
    ("scaling/size-1e3", "linear_operator"),
    ("scaling/leaves-10", "JAXopt"),
    ("scaling/batch-4", "JAXopt, vmap"),
)


@pytest.mark.filterwarnings("default")  # theirs
@pytest.mark.parametrize(("name", "provider"), PEERS)
def test_what_a_peer_answers_is_right(name, provider):
    (case,) = select([name])
    problem = case.build(QUICK)
    entries = {entry.provider: entry for entry in problem.entries}
    if provider not in entries:  # an absent library may go by its own name alone
        (provider,) = [known for known in entries if provider.startswith(known)]
    entry = entries[provider]
    if isinstance(entry, Absent):
        pytest.skip(entry.reason)
    assert checked(entry, entry.prepare()(), problem).remark == ""
    if entry.matvecs:
        assert entry.matvecs() > 0
