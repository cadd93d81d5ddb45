"""The crash capsule: the batch of a step that was stopped, the first module that went wrong, and how to run it again.

out/<run>/crash_00000124/     a checkpoint from before the step (checkpoint.py) without AdamW's moments, and
    batch.safetensors         inputs and targets of the whole step, (micro-step, rank, B, T)
    training.json             what was wrong, in which module first, how the step was split

python train.py --replay out/<run>/crash_00000124 --dtype=float32
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import optim
from base import settings
from base.errors import UserError
from configurator import Config
from engine import checkpoint, parallel, pretrained, restore
from engine.outliers import TrainingStopped
from engine.run import Run, build

# ---- where it went wrong ----------------------------------------------------------------------------------------------


@contextmanager
def first_bad_module(model: nn.Module) -> Iterator[list[str]]:
    """Inside, the model runs uncompiled. The list gets the name of the first module whose output is not finite or, if all
    outputs are, of the first parameter whose gradient is not.
    """
    found: list[str] = []

    def look(name: str, what: str):
        def hook(*args):
            value = args[0].grad if what == "gradient" else args[2]
            if not found and isinstance(value, Tensor) and not optim.local_shard(value).isfinite().all():
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


def first_nonfinite_module(run: Run, step: int, random_before: Tensor) -> str:
    """Run the forward and backward passes of a step again; returns what went wrong first, on the lowest rank where it did."""
    run.model.zero_grad(set_to_none=True)
    checkpoint.set_rng_states(random_before, run.device)
    with first_bad_module(run.model) as found:
        for micro in range(run.accumulation):
            with run.autocast():
                loss = run.model(*run.read(step, micro)) / run.accumulation
            loss.backward()
    run.model.zero_grad(set_to_none=True)
    text = torch.zeros(200, dtype=torch.uint8, device=run.device)
    content = torch.tensor(list((found[0] if found else "").encode()[:200]), dtype=torch.uint8)
    text[: len(content)] = content
    for rank, name_bytes in enumerate(parallel.gather(text)):
        if name := bytes(name_bytes.tolist()).rstrip(b"\0").decode():
            # a sharded gradient is summed over the processes before anyone sees it
            shared = optim.is_sharded(run.train_model) and name.endswith("(gradient)")
            return name + (f" in process {rank}" if run.world.size > 1 and not shared else "")
    return "nothing, when the step was run again without the compiler"


# ---- the capsule ------------------------------------------------------------------------------------------------------


class ReplayBatch:
    """The one batch of a capsule, in place of data.TrainBatches, for any number of processes that divides it."""

    def __init__(self, inputs: Tensor, targets: Tensor):
        self.sequences = [t.flatten(0, 2) for t in (inputs, targets)]  # (all of the step, T)

    def batch(self, step: int, micro: int, batch_size: int, accumulation: int, rank: int, world: int) -> list[Tensor]:
        """As TrainBatches.batch: inputs and targets, (batch_size, T) each."""
        first = (micro * world + rank) * batch_size
        return [t[first : first + batch_size] for t in self.sequences]


def report(run: Run, out: Path, stopped: TrainingStopped, snapshot: checkpoint.Snapshot) -> str:
    """Write the capsule of a step that was stopped; returns the error message. Every process must call it."""
    step, world, folder = stopped.step, run.world, out / f"crash_{stopped.step + 1:08d}"
    states = [state.cpu() for state in parallel.gather(stopped.random_before.to(run.device))]
    try:
        module = first_nonfinite_module(run, step, stopped.random_before)
        weights = {n: full(t) for n, t in snapshot.weights.items()}
        if world.is_main:
            shares = (run.micro_batch, run.accumulation)
            cut = [[run.batches.batch(step, m, *shares, r, world.size) for r in range(world.size)] for m in range(shares[1])]
            inputs, targets = (torch.stack([torch.stack([part[i] for part in row]) for row in cut]) for i in (0, 1))
            crash = {"step": step + 1, "reason": str(stopped), "first_wrong": module}
            crash |= {"processes": world.size, "micro_batch": run.micro_batch, "accumulation": run.accumulation}
            snapshot = replace(snapshot, random_states=states, extra=snapshot.extra | {"crash": crash})
            tensors = {"model": weights, "training": snapshot.random, "batch": {"inputs": inputs, "targets": targets}}
            checkpoint.write(folder, snapshot, {f"{name}.safetensors": content for name, content in tensors.items()})
    except UserError as e:
        return f"{stopped}; no crash capsule could be written: {e}"
    again = f"python train.py --replay {folder} --dtype=float32"
    return f"{stopped}. First wrong: {module}. To run that step again: {again}"


def full(t: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded, on every process."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def read_capsule(folder: Path) -> tuple[Config, dict, ReplayBatch]:
    """(configuration, what was wrong, the batch) of a verified capsule."""
    restore.verify(folder)
    crash = restore.read_training(folder).get("crash")
    expected = {"step": int, "reason": str, "first_wrong": str, "processes": int, "micro_batch": int, "accumulation": int}
    known = isinstance(crash, dict) and all(type(crash.get(name)) is kind for name, kind in expected.items())
    if not known or not (folder / "batch.safetensors").is_file():
        raise UserError(f"{folder} is not a crash capsule: use the folder that the message named, out/<run>/crash_<step>")
    cfg, path = restore.read_config(folder), folder / "batch.safetensors"
    batch = pretrained.read_safetensors(path)
    for name in ("inputs", "targets"):
        t = batch.get(name)
        if t is None or t.dtype != torch.int64 or t.dim() != 4 or t.size(-1) != cfg.T or t.numel() != cfg.tokens_per_step:
            raise UserError(f"{path}: {name} is not a batch of {cfg.tokens_per_step} ids in sequences of {cfg.T}")
        if t.min() < 0 or t.max() >= cfg.vocab_size:
            raise UserError(f"{path}: {name} has ids outside the vocabulary of {cfg.vocab_size}")
    return cfg, crash, ReplayBatch(batch["inputs"], batch["targets"])


def random_states(folder: Path) -> list[Tensor]:
    """The random states of all ranks before a capsule's step."""
    found = pretrained.read_safetensors(folder / "training.safetensors")
    if not found or found.keys() != {f"random.{rank}" for rank in range(len(found))}:
        raise UserError(f"{folder}/training.safetensors must hold the random states of all ranks, and nothing else")
    return [found[f"random.{rank}"] for rank in range(len(found))]


def replay(folder: Path, flags: list[str], accumulate: Callable[[Run, int], Tensor]) -> None:
    """Run the forward and backward passes of a crash capsule again, with other settings if flags are given. UserError if they
    go wrong again. accumulate: train.accumulate."""
    cfg, crash, recorded = read_capsule(folder)
    cut = cfg.T, cfg.tokens_per_step
    # the capsule may be untrusted: no file or name in its settings is followed, and its weights are the only ones
    cfg = settings.parse(replace(cfg, processes=0, curve="off", resume=False), flags, __doc__)
    cfg = replace(cfg, init_from="")
    if (cfg.T, cfg.tokens_per_step) != cut:
        raise UserError(f"sequence_length and tokens_per_step are the capsule's, {cut[0]} and {cut[1]}: change other settings")
    run = build(cfg, recorded)
    say = print if run.world.is_main else lambda *_: None
    say(f"{folder}: {crash['reason']}\nfirst wrong at the time: {crash['first_wrong']}")
    for line in run.chosen:
        say(f"chosen: {line}")
    restore.load_weights(folder, run.model)
    states = random_states(folder)
    checkpoint.set_rng_states(states[run.world.rank % len(states)], run.device)
    if run.world.size != crash["processes"] and cfg.dropout:
        say(f"dropout differs from then: {crash['processes']} processes ran this step")
    before = checkpoint.rng_states(run.device)
    loss = (parallel.all_reduce_sum(accumulate(run, 0)) / run.world.size).item()
    run.scaler.unscale_(run.optimizer)
    norm = optim.gradient_norm(run.model).item()
    module = first_nonfinite_module(run, 0, before)
    run.close()
    say(f"step {crash['step']} again, dtype={run.cfg.dtype}: loss {loss}, gradient norm {norm}; first wrong: {module}")
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError("the step goes wrong again with these settings")
    say("the step is fine with these settings")
