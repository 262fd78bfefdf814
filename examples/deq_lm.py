"""Train a deep equilibrium language model on bytes of text: one transformer layer, tied to itself.

The features of a sequence are the fixed point of the layer in `byte_lm.py`, found by Anderson's
iteration; the backward pass is one linear system a sequence, by GMRES. Both solve each sequence to
its own tolerance, and neither keeps the iterates. The text is the source of Python's standard
library, found on this machine, or files of yours. One block in forty is held out; bigrams and
interpolated trigrams of bytes, counted on the same text, say what the model has to beat.

    python examples/deq_lm.py [--quick] [--steps N] [--text FILE ...] [--resume] [--out DIR] [...]
    torchrun --nproc-per-node N examples/deq_lm.py [...]

The preset is small on a CPU, larger and in bfloat16 on a GPU. Every evaluation writes a checkpoint,
DIR/deq_lm.pt, which --resume goes on from, bit for bit. At the end: a table, DIR/deq_lm.png, and
the weights alone in half precision, DIR/byte_lm.pt. Exits with 1 if a whole training does not beat
the trigrams.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import rich
import torch
import torch.distributed as dist

# Before there is a process group, which the defaults of its functions would keep, and its threads
# with it, until the interpreter is half gone. DDP imports it later.
import torch.distributed.nn
from byte_lm import ByteLM, Config, NGrams, Text, batch, bits, read, save
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

LEARNING_RATE, BETAS, WEIGHT_DECAY, WARM_UP, CLIP = 3e-3, (0.9, 0.98), 0.01, 40, 1.0
STRENGTHS = [2.0**k for k in range(8)]  # of the trigrams' prior: the best on the held-out text
SAMPLE = 10  # evaluations during training see one held-out window in so many


@dataclass(frozen=True)
class Preset:
    """A model and its training; `batch` sequences a step, over all processes."""

    model: Config
    batch: int
    steps: int
    every: int  # steps between evaluations


PRESETS = {
    "cpu": Preset(Config(), batch=16, steps=1000, every=50),
    "cuda": Preset(Config(width=512, heads=8, context=256), batch=64, steps=5000, every=250),
}
QUICK_STEPS = 20


@dataclass(frozen=True)
class World:
    """This process among those of a torchrun, or alone."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @staticmethod
    def join(device: torch.device) -> World:
        if not dist.is_torchelastic_launched():
            return World(device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return World(device, dist.get_rank(), dist.get_world_size())

    def share(self, tensor: Tensor) -> Tensor:
        """Every `size`-th row, on this process's device."""
        return tensor[self.rank :: self.size].to(self.device)

    def total(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


class Training:
    """A model with its optimiser, and the history of both."""

    def __init__(self, text: Text, preset: Preset, seed: int, amp: bool, world: World):
        if preset.batch % world.size:
            raise ValueError(f"a batch of {preset.batch} cannot be shared by {world.size} equally.")
        self.text, self.preset, self.seed, self.amp, self.world = text, preset, seed, amp, world
        torch.manual_seed(seed)
        self.model = ByteLM(preset.model).to(world.device)
        self.shared: nn.Module = self.model
        if world.size > 1:
            self.shared = DistributedDataParallel(self.model)  # gradients become their mean
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, self.rate)
        self.inputs, self.targets = text.windows(preset.model.context)
        self.seconds = 0.0
        self.steps: list[list[float]] = []  # of each step: bits a byte, most iterations, unsolved
        self.evaluations: list[tuple[int, float, float]] = []  # step, seconds, bits a byte

    def rate(self, step: int) -> float:
        """The learning rate's factor: linear warm-up, then half a cosine down to a tenth."""
        cosine = math.cos(math.pi * min(step / self.preset.steps, 1))
        return min((step + 1) / WARM_UP, 1) * (0.55 + 0.45 * cosine)

    def step(self) -> list[float]:
        """One step; the batch depends on the seed and the number of the step alone."""
        sizes = self.preset.batch, self.preset.model.context
        x, y = map(self.world.share, batch(self.text, *sizes, self.seed, len(self.steps)))
        self.optimiser.zero_grad()
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.amp):
            loss = math.log(2) * bits(self.shared(x), y).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimiser.step()
        self.schedule.step()
        solved = self.model.deq.last.forward, self.model.deq.last.backward
        iterations = [solution.iterations.max() for solution in solved]
        unsolved = [(solution.status != 0).double().mean() for solution in solved]
        return torch.stack([loss.detach() / math.log(2), *iterations, *unsolved]).tolist()

    @torch.no_grad()
    def evaluate(self, every: int = 1) -> float:
        """Bits a byte of every `every`-th held-out window."""
        total = torch.zeros(2, dtype=torch.float64)
        x, y = (self.world.share(t[::every]) for t in (self.inputs, self.targets))
        for inputs, targets in zip(x.split(64), y.split(64), strict=True):
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.amp):
                losses = bits(self.model(inputs), targets)
            total += torch.tensor([losses.double().sum().item(), losses.numel()])
        summed, count = self.world.total(total.to(self.world.device)).tolist()
        return summed / count

    def run(self, checkpoint: Path) -> None:
        """Train to the last step, with a checkpoint at each evaluation."""
        start = time.perf_counter() - self.seconds
        first, last = len(self.steps), self.preset.steps
        with tqdm(initial=first, total=last, unit="step", disable=self.world.rank > 0) as bar:
            while len(self.steps) < last:
                self.steps.append(self.step())
                loss, forward, backward, *_ = self.steps[-1]
                solves = f"{forward:.0f}+{backward:.0f}"
                bar.set_postfix(bits=f"{loss:.3f}", iterations=solves, refresh=False)
                bar.update()
                if len(self.steps) % self.preset.every == 0 or len(self.steps) == last:
                    held_out = self.evaluate(SAMPLE)
                    self.seconds = time.perf_counter() - start
                    self.evaluations.append((len(self.steps), self.seconds, held_out))
                    self.save(checkpoint)

    # What it takes to go on as if nothing had happened.

    def settings(self) -> dict[str, Any]:
        bytes_of_text = len(self.text.train) + self.text.held_out.numel()
        return {"preset": asdict(self.preset), "seed": self.seed, "bytes of text": bytes_of_text}

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimiser": self.optimiser, "schedule": self.schedule}

    def save(self, path: Path) -> None:
        if self.world.rank == 0:
            state = {name: part.state_dict() for name, part in self.parts().items()}
            history = {key: getattr(self, key) for key in ("seconds", "steps", "evaluations")}
            written = path.with_suffix(".new")
            torch.save({"settings": self.settings(), "history": history, **state}, written)
            written.replace(path)  # at once: an interrupted run leaves a whole checkpoint

    def resume(self, path: Path) -> None:
        """Raises ValueError if the checkpoint is of another training."""
        saved = torch.load(path, map_location=self.world.device, weights_only=True)
        if saved["settings"] != self.settings():
            raise ValueError(f"{path} is of {saved['settings']}, not of {self.settings()}.")
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])
        vars(self).update(saved["history"])


# -- what the table and the picture show ---------------------------------------------------------


def baselines(text: Text, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Bits of every held-out byte, by models that count."""
    counts = NGrams(text.train)
    trigrams = [counts.trigram_bits(inputs, targets, strength) for strength in STRENGTHS]
    best = min(trigrams, key=lambda each: each.mean().item())
    return {"bigrams": counts.bigram_bits(inputs, targets), "trigrams": best}


def draw(training: Training, sample: dict[str, float], path: Path) -> None:
    loss, forward, backward, *_ = torch.tensor(training.steps).T
    numbers = torch.arange(1, len(loss) + 1)
    steps, _, held_out = zip(*training.evaluations, strict=True)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(numbers, loss, "C0", alpha=0.3, linewidth=0.7, label="each training batch")
    left.plot(steps, held_out, "C1", label="held out")
    for (name, value), style in zip(sample.items(), (":", "--"), strict=True):
        left.axhline(value, color="k", linewidth=1, linestyle=style, label=name)
    left.set(title="Byte language model", xlabel="step", ylabel="bits per byte")
    right.plot(numbers, forward, "C0", linewidth=0.7, label="forward (Anderson)")
    right.plot(numbers, backward, "C3", linewidth=0.7, label="backward (GMRES)")
    right.set(title="Iterations of the slowest sequence", xlabel="step", ylim=(0, None))
    for panel in (left, right):
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def report(training: Training, out: Path) -> tuple[float, float]:
    """The table and the picture; returns the held-out bits per byte and those of the trigrams."""
    counted = baselines(training.text, training.inputs, training.targets)
    whole = {name: losses.mean().item() for name, losses in counted.items()}
    sample = {name: losses[::SAMPLE].mean().item() for name, losses in counted.items()}
    held_out = training.evaluate()
    if training.world.rank > 0:
        return held_out, whole["trigrams"]
    draw(training, sample, out / "deq_lm.png")
    save(training.model, out / "byte_lm.pt")
    history = torch.tensor(training.steps)
    device = training.world.device
    table = Table("Deep equilibrium language model", f"{training.targets.numel()} held-out bytes")
    table.add_row("bits per byte", f"{held_out:.3f}")
    for name, value in whole.items():
        passed = [f"{s:.0f} s, step {k}" for k, s, b in training.evaluations if b < sample[name]]
        table.add_row(f"byte {name}", f"{value:.3f}; passed after {passed[0] if passed else '-'}")
    table.add_row("training", f"{training.seconds:.0f} s, {len(history)} steps")
    for name, k in (("forward", 1), ("backward", 2)):
        most, unsolved = history[:, k], history[:, k + 2].mean()
        spread = f"median {most.median():.0f}, max {most.max():.0f}"
        table.add_row(f"{name} iterations", f"{spread}; {unsolved:.2%} unsolved")
    radius = training.model.deq.last.spectral_radius()
    spread = f"median {radius.median():.1f}, max {radius.max():.1f}"
    table.add_row("spectral radius of df/dz", f"{spread}, of {len(radius)} held-out sequences")
    table.add_row("parameters", f"{sum(p.numel() for p in training.model.parameters())}")
    threads = f"threads: {torch.get_num_threads()}, processes: {training.world.size}"
    on_gpu = device.type == "cuda"
    table.add_row("device", torch.cuda.get_device_name(device) if on_gpu else f"cpu, {threads}")
    table.add_row("picture", str(out / "deq_lm.png"))
    rich.print(table)
    return held_out, whole["trigrams"]


def run(options: argparse.Namespace) -> tuple[float, float]:
    world = World.join(options.device)
    amp = world.device.type == "cuda" if options.amp is None else options.amp
    preset = PRESETS[world.device.type]
    preset = replace(preset, steps=options.steps or preset.steps)
    if amp:  # no residual falls far below bfloat16's rounding, 4e-3
        preset = replace(preset, model=replace(preset.model, forward_rtol=1e-2, backward_rtol=2e-2))
    options.out.mkdir(parents=True, exist_ok=True)
    training = Training(read(options.text), preset, options.seed, amp, world)
    checkpoint = options.out / "deq_lm.pt"
    if options.resume:
        training.resume(checkpoint)
    training.run(checkpoint)
    result = report(training, options.out)
    if world.size > 1:
        training.shared = training.model  # nothing of DDP's outlives the group
        dist.barrier()  # nor does a process leave while others are at work
        dist.destroy_process_group()
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Train a deep equilibrium language model.")
    parser.add_argument("--text", type=Path, nargs="+", default=(), metavar="FILE")
    parser.add_argument("--steps", type=int, help="of the whole training, resumed or not")
    parser.add_argument("--quick", dest="steps", action="store_const", const=QUICK_STEPS)
    parser.add_argument("--resume", action="store_true", help="go on from DIR/deq_lm.pt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16; on GPUs")
    parser.add_argument("--device", type=torch.device, default=auto)
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR")
    options = parser.parse_args(arguments)
    held_out, trigrams = run(options)
    if not options.steps and not held_out < trigrams:
        print(
            f"deq_lm: {held_out:.3f} bits per byte; trigrams take {trigrams:.3f}", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
