"""The memory of a DEQ's training step, and its picture."""

from __future__ import annotations

import pytest
import torch

from bench import deq_memory
from bench.case import OURS, PLAIN, Setting
from bench.peak import peak_bytes
from bench.registry import select
from bench.results import Report
from bench.runner import relative_error, run_case

CPU = torch.device("cpu")


def peaks(iterations, device=CPU):
    problem = deq_memory.build(iterations, Setting(device, quick=True))
    found = {}
    for entry in problem.entries:
        entry.prepare()()  # what is allocated once
        assert relative_error(entry.prepare()(), problem.expected) <= problem.tolerance
        found[entry.provider] = peak_bytes(entry.prepare(), device)
    x, _ = deq_memory.data(Setting(device, quick=True), torch.float32)
    return found, x.nbytes


def check(device):
    (few, vector), (many, _) = peaks(10, device), peaks(40, device)
    for name in (OURS, deq_memory.LEAN):
        assert many[name] <= few[name] + 0.1 * vector  # scalars of the samples
    # Autograd keeps the convolution's argument and the tanh of each iteration.
    assert many[PLAIN] - few[PLAIN] >= 2 * 30 * vector
    assert many[deq_memory.LEAN] < 0.2 * many[PLAIN]


def test_memory_is_constant_in_the_forward_iterations_and_unrolling_is_not():
    check(CPU)


@pytest.mark.gpu
def test_on_a_gpu_too():
    check(torch.device("cuda"))


def test_the_picture(tmp_path):
    setting = Setting(CPU, quick=True)
    cases = [run_case(case, setting) for case in select(["memory-deq"])[:2]]
    assert all(not row.remark for case in cases for row in case.rows)
    file = Report({"date": "2000-01-01T00:00:00+0000", "device": "cpu"}, cases).save(tmp_path)
    picture = tmp_path / "memory.png"
    assert deq_memory.main([str(file), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_results_without_such_a_case(tmp_path):
    report = Report({"date": "2000-01-01T00:00:00+0000", "device": "cpu"}, [])
    with pytest.raises(SystemExit):
        deq_memory.main([str(report.save(tmp_path)), "--out", str(tmp_path / "memory.png")])
