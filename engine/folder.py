"""The folder of a run: claimed for one process, resumed from, and the snapshot that a checkpoint is written of."""

import shutil
from dataclasses import asdict
from pathlib import Path

import configurator
import optim
from base.errors import UserError
from base.files import lock
from engine import checkpoint, parallel, restore
from engine.journal import Progress
from engine.run import Run


def claim(run: Run, out: Path, resuming: bool):
    """The lock of the run's folder. An earlier run in it is moved aside, with a message, unless this one resumes it.
    UserError if nobody can write there, or if there is no room for a checkpoint.
    """
    if not run.world.is_main:
        return None
    taken = f"another process is training in {out}: use --out_dir=another/folder, or stop it first"
    try:
        if not resuming and out.is_dir() and any(out.iterdir()):
            if not (out / "log.jsonl").is_file():
                raise UserError(f"out_dir={out} contains something that is not a run: use --out_dir=another/folder")
            lock(out, taken).release()  # nobody trains in it
            aside = next(p for n in range(1, 10_000) if not (p := out.with_name(f"{out.name}.{n}")).exists())
            out.rename(aside)
            print(f"{out} contained an earlier run: moved to {aside} (to continue a run instead: python train.py {out})")
        out.mkdir(parents=True, exist_ok=True)
        held = lock(out, taken)
        checkpoint.clean_up(out)
        (out / ".writing_probe").mkdir()  # a folder may hold files that can be written, and take no new ones
        (out / ".writing_probe").rmdir()
        checkpoint.write_config(out, run.cfg)
        needed, free = 12 * sum(p.numel() for p in run.model.parameters()), shutil.disk_usage(out).free
    except OSError as e:
        raise UserError(f"cannot write to out_dir={out}: {e.strerror}; use --out_dir=another/folder") from None
    if free < needed:
        sizes = f"a checkpoint takes {needed / 2**30:.1f} GiB, {out} has {free / 2**30:.1f} GiB left"
        raise UserError(f"{sizes}: use --out_dir=another/folder, or make room")
    return held


def resume(run: Run, out: Path) -> Progress:
    """Load the newest checkpoint into the run. UserError if it is of another model or data set."""
    say = print if run.world.is_main else lambda _: None
    folder = restore.newest(out, say)
    before = restore.read_config(folder)
    changed = configurator.diff(before, run.cfg)
    changed = {name: values for name, values in changed.items() if name not in ("resume", "out_dir", "curve")}
    shape = set(configurator.GPTConfig.__dataclass_fields__) - {"attention", "dropout"}
    if fixed := [name for name in changed if name in shape | {"dataset"}]:
        trained = ", ".join(f"{name}={changed[name][0]!r}, not {changed[name][1]!r}" for name in fixed)
        rest = "".join(f" --{name}={new}" for name, (_, new) in changed.items() if name not in fixed)
        raise UserError(f"{folder} was trained with {trained}, which cannot change: use python train.py {out}{rest}")
    for name, (old, new) in changed.items():
        say(f"resuming with {name} = {new!r} (was {old!r})")
    rates = [optim.learning_rate(c, checkpoint.step_of(folder)) for c in (before, run.cfg)]
    if rates[0] != rates[1]:
        say(f"the learning rate continues at {rates[1]:.2e}; the schedule before had {rates[0]:.2e} here")
    restore.load_weights(folder, run.model)
    training = restore.load_training(folder, run.model, run.optimizer, run.world.rank, run.device)
    if training["data_sha256"] != run.dataset.sha256:
        raise UserError(f"{run.dataset.folder} has changed since {folder} was saved: prepare the same data again")
    if training["scaler"]:  # empty unless the run was in float16
        try:
            run.scaler.load_state_dict(training["scaler"])
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise UserError(f"{folder}/training.json: scaler is no state of a GradScaler ({e!r})") from None
    run.outliers.load(training["outliers"])
    return Progress(**{name: training[name] for name in Progress.__dataclass_fields__ if name in training})


def snapshot(run: Run, progress: Progress) -> checkpoint.Snapshot:
    """The state of a run, to be written. Every process must call it."""
    states = parallel.gather(checkpoint.rng_states(run.device).to(run.device))
    extra = asdict(progress) | {
        "sequences_seen": progress.step * run.cfg.tokens_per_step // run.cfg.T,  # the data's cursor: batches follow from it
        "data_sha256": run.dataset.sha256,
        "start": run.dataset.tokenizer.start,
        "scaler": run.scaler.state_dict(),
        "outliers": run.outliers.state(),
    }
    tensors = checkpoint.state_tensors(run.model, run.optimizer)
    return checkpoint.Snapshot(
        progress.step, *tensors, [state.cpu() for state in states], run.cfg, run.dataset.tokenizer, extra
    )
