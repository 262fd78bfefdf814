"""What the host and the device tell each other of B systems in an iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonimplicit.solve_log import recording
from tritonimplicit_kernels import status as codes


class Progress:
    """What the launches read and write of B systems besides their vectors, on the device.

    `rr` (B, P) partial sums of the squared residual norm, `state` (2, B) status codes and
    iterations; what a launch both reads and writes ping-pongs with `rr_out` and `state_out`.
    `threshold` (B,) is the squared tolerance, `residual_sq` (B,) the last known squared residual
    norm. All but `state` are float64.
    """

    def __init__(self, residual_norm: Tensor, tolerance: Tensor, partials: int):
        systems, device = residual_norm.shape[0], residual_norm.device
        self.rr = residual_norm.new_zeros(systems, partials)
        self.rr[:, 0] = residual_norm.square()
        self.rr_out = torch.zeros_like(self.rr)
        self.state = torch.zeros(2, systems, dtype=torch.int32, device=device)
        self.state[0] = codes.RUNNING
        self.state_out = self.state.clone()
        self.threshold = tolerance.square()
        self.residual_sq = residual_norm.square()
        self._norms = [residual_norm] if recording() else None

    @property
    def history(self) -> Tensor | None:
        """(steps + 1, B) residual norms, if a log is open."""
        return None if self._norms is None else torch.stack(self._norms)

    def swap(self) -> None:
        """Make the last launch's output the next one's input."""
        self.rr, self.rr_out = self.rr_out, self.rr
        self.state, self.state_out = self.state_out, self.state

    def note(self) -> None:
        """Remember the residual norms for a log; a frozen system's are its last."""
        if self._norms is not None:
            runs = self.state[0] < 0
            self._norms.append(torch.where(runs, self.total, self.residual_sq).sqrt())

    @property
    def total(self) -> Tensor:
        """(B,) the sums of `rr`, to be read only; zero for a frozen system."""
        return self.rr.squeeze(1) if self.rr.shape[1] == 1 else self.rr.sum(1)

    def any_running(self) -> Tensor:
        """0-dim bool: whether a system is above its threshold."""
        above = self.total > self.threshold
        return above.squeeze(0) if above.shape[0] == 1 else above.any()

    def settle(self) -> None:
        """Give the systems that no launch has stopped the status that the next one would."""
        status, rr = self.state[0], self.total
        running = status < 0
        self.residual_sq = torch.where(running, rr, self.residual_sq)
        status.masked_fill_(running, codes.MAX_ITERATIONS)
        status.masked_fill_(running & (rr <= self.threshold), codes.CONVERGED)
        status.masked_fill_(running & ~(rr < torch.inf), codes.NON_FINITE)

    def stop(self, systems: Tensor, status: int) -> None:
        """Stop those of `systems` (B,) bool that still may iterate, for what the host knows."""
        self.residual_sq = torch.where(systems, self.total, self.residual_sq)
        self.rr.masked_fill_(systems[:, None], 0.0)
        self.state[0].masked_fill_(systems, status)

    def restart(self, again: Tensor, residual_norm: Tensor) -> None:
        """Let the systems where `again` (B,) run again, from these residual norms (B,)."""
        self.state[0].masked_fill_(again, codes.RUNNING)
        self.rr.masked_fill_(again[:, None], 0.0)
        self.rr[:, 0] += torch.where(again, residual_norm.square(), 0.0)


class Poll:
    """Learns from the device whether a system still runs, at a GPU without stalling it.

    On a CPU the answer is read at once. On a GPU it is copied into pinned memory without blocking
    and read one poll late, when the device has long passed that point.
    """

    def __init__(self, device: torch.device):
        self._late = device.type == "cuda"
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, any_running: Tensor) -> bool:
        """Whether a system ran: now, or on a GPU at the poll before."""
        if not self._late:
            return bool(any_running)
        flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        flag.copy_(any_running, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(any_running.device))
        before, self._pending = self._pending, (flag, event)
        if before is None:
            return True
        before[1].synchronize()
        return bool(before[0])
