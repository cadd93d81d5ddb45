"""What stops bad numbers: outliers, the first module that went wrong, and the crash capsule that lets a step be run again.

out/<run>/crash_00000124/     a checkpoint from before the step (checkpoint.py) without AdamW's moments, and
    batch.safetensors         inputs and targets of the whole step, (micro-step, rank, B, T)
    training.json             what was wrong, where it was seen first, into which shares the step was cut

python train.py --replay out/<run>/crash_00000124 --dtype=float32
"""

import math
import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import checkpoint
import parallel
import pretrained
from configurator import Config
from model import UserError

if TYPE_CHECKING:
    from train import Run


class TrainingStopped(UserError):
    """Training cannot go on from here; the parameters are those before step number `step` (0, 1, …)."""

    def __init__(self, step: int, message: str):
        super().__init__(f"step {step + 1}: {message}; the parameters are those before the step")
        self.step = step


class Outliers:
    """Finds losses and gradient norms that stand out from those of the steps before, and counts them.

    The verdict is a function of numbers that all processes share, so all come to the same one.
    """

    def __init__(self, cfg: Config):
        self.z, self.window = cfg.outlier_z, cfg.outlier_window
        self.before: dict[str, deque] = {}
        self.count = 0

    def judge(self, **values: float) -> str | None:
        """What stands out among this step's values ("loss 9.1 is 11.3 standard deviations above …"), or None."""
        found = None
        for name, value in values.items():
            before = self.before.setdefault(name, deque(maxlen=self.window))
            if self.z and len(before) == self.window and math.isfinite(value):
                mean, spread = statistics.fmean(before), statistics.pstdev(before)
                # a spread of nothing (a loss that stays 0) would make anything an outlier
                z = (value - mean) / max(spread, 1e-3 * abs(mean), 1e-12)
                if z > self.z:
                    before_it = f"the {self.window} steps before ({mean:.4g})"
                    found = f"{name} {value:.4g} is {z:.1f} standard deviations above {before_it}"
            if math.isfinite(value):  # an outlier too: if this is how things are from now on, the mean will follow
                before.append(value)
        self.count += found is not None
        return found

    def state(self) -> dict:
        """For training.json, so that a resumed run judges as one that was never interrupted would."""
        return {"count": self.count, "before": {name: list(values) for name, values in self.before.items()}}

    def load(self, state: dict) -> None:
        """The reverse; values that do not fit a smaller window are the oldest."""
        self.count = int(state["count"])
        self.before = {name: deque(map(float, values), maxlen=self.window) for name, values in state["before"].items()}


# ---- where it went wrong ----------------------------------------------------------------------------------------------


@contextmanager
def first_bad_module(model: nn.Module) -> Iterator[list[str]]:
    """Inside, the model runs uncompiled; the list gets the name of the first module whose output is not finite, or, if all
    of forward is, of the first parameter whose gradient is not.
    """
    found: list[str] = []

    def look(name: str, what: str):
        def hook(*args):
            value = args[0].grad if what == "gradient" else args[2]
            if not found and isinstance(value, Tensor) and not parallel.local(value).isfinite().all():
                found.append(f"{name} ({what})")

        return hook

    hooks = [m.register_forward_hook(look(name or "the loss", "output")) for name, m in model.named_modules()]
    hooks += [p.register_post_accumulate_grad_hook(look(name, "gradient")) for name, p in model.named_parameters()]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def seen_first(run: "Run", step: int) -> str:
    """Runs the forward and backward passes of a step again and names what went wrong first, on the lowest rank it did."""
    run.model.zero_grad(set_to_none=True)
    checkpoint.set_rng_states(run.random_before, run.device)
    with first_bad_module(run.model) as found:
        for micro in range(run.accumulation):
            with run.autocast():
                loss = run.model(*run.read(step, micro)) / run.accumulation
            loss.backward()
    run.model.zero_grad(set_to_none=True)
    text = torch.zeros(200, dtype=torch.uint8, device=run.device)
    content = torch.tensor(list((found[0] if found else "").encode()[:200]), dtype=torch.uint8)
    text[: len(content)] = content
    for rank, said in enumerate(parallel.gather(text)):
        if name := bytes(said.tolist()).rstrip(b"\0").decode():
            shared = parallel.is_sharded(run.net) and name.endswith("(gradient)")  # has been added up over the processes
            return name + (f" in process {rank}" if run.world.size > 1 and not shared else "")
    return "nothing, when the step was run again without the compiler"


# ---- the capsule ------------------------------------------------------------------------------------------------------


class Recorded:
    """The one batch of a capsule, in place of data.TrainBatches; cut for any number of processes that divides it."""

    def __init__(self, inputs: Tensor, targets: Tensor):
        self.sequences = [t.flatten(0, 2) for t in (inputs, targets)]  # (all of the step, T)

    def batch(self, step: int, micro: int, batch_size: int, accumulation: int, rank: int, world: int) -> list[Tensor]:
        """As TrainBatches.batch: inputs and targets, (batch_size, T) each."""
        first = (micro * world + rank) * batch_size
        return [t[first : first + batch_size] for t in self.sequences]


def write_capsule(run: "Run", out: Path, stopped: TrainingStopped, snapshot: checkpoint.Snapshot) -> tuple[Path, str]:
    """Write the capsule of a step that was stopped; returns (its folder, the first module that went wrong). Called in all
    processes; the first one writes.
    """
    step, world = stopped.step, run.world
    module = seen_first(run, step)
    folder = out / f"crash_{step + 1:08d}"
    weights = {n: full(t) for n, t in snapshot.weights.items()}
    if world.first:
        shares = (run.micro_batch, run.accumulation)
        cut = [[run.batches.batch(step, m, *shares, r, world.size) for r in range(world.size)] for m in range(shares[1])]
        batch = {
            name: torch.stack([torch.stack([part[i] for part in row]) for row in cut])
            for i, name in enumerate(("inputs", "targets"))
        }
        crash = {
            "step": step + 1,
            "reason": str(stopped),
            "first_wrong": module,
            "processes": world.size,
            "micro_batch": run.micro_batch,
            "accumulation": run.accumulation,
        }
        snapshot = replace(snapshot, weights=weights, moments={}, extra=snapshot.extra | {"crash": crash})
        checkpoint.write(folder, snapshot, more={"batch.safetensors": batch})
    return folder, module


def full(t: Tensor) -> Tensor:
    """A tensor whole, on every process."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def read_capsule(folder: Path) -> tuple[Config, dict, Recorded]:
    """(configuration, what was wrong, the batch) of a verified capsule."""
    checkpoint.verify(folder)
    crash = checkpoint.read_training(folder).get("crash")
    expected = {"step": int, "reason": str, "first_wrong": str, "processes": int, "micro_batch": int, "accumulation": int}
    known = isinstance(crash, dict) and all(type(crash.get(name)) is kind for name, kind in expected.items())
    if not known or not (folder / "batch.safetensors").is_file():
        raise UserError(f"{folder} is no crash capsule: type the folder that the message named, out/<run>/crash_<step>")
    cfg, path = checkpoint.read_config(folder), folder / "batch.safetensors"
    batch = pretrained.read_safetensors(path)
    for name in ("inputs", "targets"):
        t = batch.get(name)
        if t is None or t.dtype != torch.int64 or t.dim() != 4 or t.size(-1) != cfg.T or t.numel() != cfg.tokens_per_step:
            raise UserError(f"{path}: {name} is no batch of {cfg.tokens_per_step} ids in sequences of {cfg.T}")
        if t.min() < 0 or t.max() >= cfg.vocab_size:
            raise UserError(f"{path}: {name} has ids outside the vocabulary of {cfg.vocab_size}")
    return cfg, crash, Recorded(batch["inputs"], batch["targets"])


def random_states(folder: Path) -> list[Tensor]:
    """The random states of all ranks before a capsule's step."""
    found = pretrained.read_safetensors(folder / "training.safetensors")
    if not found or found.keys() != {f"random.{rank}" for rank in range(len(found))}:
        raise UserError(f"{folder}/training.safetensors must hold the random states of all ranks, and nothing else")
    return [found[f"random.{rank}"] for rank in range(len(found))]
