"""CUDA graphs: a stretch of iterations recorded once, and launched as one from then on."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator

import torch

from tritonimplicit.linear_solve.progress import Progress


def capture(steps: Callable[[], None], progress: Progress) -> Callable[[], None] | None:
    """Record what `steps` launches, without running it; None and a warning where that fails.

    `steps` swaps the buffers of `progress` an even number of times, so that a replay begins with
    those that it ends with.
    """
    device = progress.rr.device
    if device.type != "cuda":
        _warn_of_eager(f"the tensors are on {device}")
        return None
    buffers = dict(vars(progress))
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            steps()
    except RuntimeError as error:
        vars(progress).update(buffers)  # nothing was launched: they are where they were
        _warn_of_eager(str(error).partition("\n")[0])
        return None
    return graph.replay


def _warn_of_eager(reason: str) -> None:
    warnings.warn(
        f"cuda_graph=True: no graph could be captured ({reason}); the solve goes on without one. "
        "A matvec in a graph must not synchronise, nor allocate or branch by values.",
        UserWarning,
        stacklevel=2,
    )


@contextlib.contextmanager
def stream_for_graphs(wanted: bool, device: torch.device) -> Iterator[None]:
    """Run on a stream that graphs can be captured from, if that is wanted and possible.

    Autograd launches a backward on the stream of its forward, so that a Jacobian that a graph is to
    replay has to be recorded on the stream of the capture, which cannot be the default stream.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    outer, inner = torch.cuda.current_stream(device), _capture_stream(device)
    inner.wait_stream(outer)
    with torch.cuda.stream(inner):
        yield
    outer.wait_stream(inner)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
