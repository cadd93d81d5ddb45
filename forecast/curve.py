"""Is this run on track? The reference loss curve of a config, how it is recorded, and how a run is compared with it.

    config/shakespeare.curve.json     beside config/shakespeare.py: the mean training loss over a few seeds, and its band
    python train.py config/shakespeare.py --record_curve      makes one (three whole runs)

A training loss is noisy from step to step, so both sides are means over `window` steps, compared every `window` steps.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import configurator
from base.errors import UserError
from base.files import ROOT, write_atomically
from configurator import Config
from engine import machine

SEEDS = 3
POINTS = 40  # in a curve
IN_A_ROW = 3  # checks outside the band before it is said why that might be

# What decides the loss, in the order in which it is usually to blame.
CAUSES = {
    "learning rate": ("learning_rate", "min_lr", "warmup_steps", "schedule", "max_steps", "beta1", "beta2", "weight_decay"),
    "batch": ("tokens_per_step", "sequence_length", "batch_order", "grad_clip", "on_outlier"),
    "precision": ("dtype", "fp32_precision", "dropout", "attention"),
    "data": ("dataset",),
}
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "tie_weights", "init", "scale_residual_init")


def path_of(config_file: str) -> Path:
    """Where the curve of a config file lies."""
    return Path(config_file).with_suffix(".curve.json")


class Tracker:
    """Compares a run with a curve as it goes."""

    def __init__(self, cfg: Config, data_sha256: str):
        self.curve = read(Path(cfg.curve))
        self.settings, self.data_sha256 = asdict(cfg), data_sha256
        self.recent: deque[float] = deque(maxlen=self.curve["window"])
        self.points = {p["step"]: p for p in self.curve["train"]}
        self.validations = {p["step"]: p for p in self.curve["val"]}
        self.off, self.told, self.side = 0, False, ""

    def unlike(self) -> list[str]:
        """What makes the run another one than the curve's: then they are not compared."""
        recorded = self.curve["config"]
        return [f"{n}={recorded[n]!r}" for n in SHAPE if n in recorded and recorded[n] != self.settings[n]]

    def step(self, done: int, loss: float) -> str:
        """After step `done`: the verdict, if this step is checked and the verdict is another than at the last check."""
        self.recent.append(loss)
        point = self.points.get(done)
        if not point or len(self.recent) < self.curve["window"]:
            return ""
        before, self.side = self.side, ""
        verdict = self._judge(statistics.fmean(self.recent), point, "loss")
        return verdict if self.side != before else ""

    def validated(self, done: int, val_loss: float) -> str:
        """The same for a validation, where the curve has one at this step."""
        point = self.validations.get(done)
        return self._judge(val_loss, point, "val_loss") if point else ""

    def _judge(self, found: float, point: dict, what: str) -> str:
        within = (
            abs(found - point["loss"]) <= point["band"] if not point.get("at_most") else found <= point["loss"] + point["band"]
        )
        self.off = 0 if within else self.off + 1
        self.told = self.told and not within
        side = "on track" if within else "BELOW the curve" if found < point["loss"] else "ABOVE the curve"
        mean = f"mean of {self.curve['window']} {found:.3f}, " if what == "loss" and self.curve["window"] > 1 else ""
        bound = "at most " if point.get("at_most") else ""
        if what == "loss":
            self.side = side
        return f"{side} ({mean}expected {bound}{point['loss']:.3f} ± {point['band']:.3f})"

    def causes(self) -> str | None:
        """Once three checks in a row lay outside the band: what might be to blame, the likely first. Told once for each time
        that the run leaves the curve.
        """
        if self.off < IN_A_ROW or self.told:
            return None
        self.told = True
        recorded, known = self.curve["config"], []
        for cause, names in CAUSES.items():
            other = [
                f"{n}={self.settings[n]!r}, there {recorded[n]!r}"
                for n in names
                if recorded.get(n, self.settings[n]) != self.settings[n]
            ]
            known += [f"{cause} ({'; '.join(other)})"] if other else []
        if self.curve["data_sha256"] not in (None, self.data_sha256):
            known.append("data (its sha256 is another)")
        source = f"{self.curve['source']}, seeds {self.curve['seeds']}" if self.curve["seeds"] else self.curve["source"]
        if known:
            return f"off track {IN_A_ROW} checks running; unlike the curve ({source}): {'; '.join(known)}"
        return (
            f"off track {IN_A_ROW} checks running with the curve's own settings ({source}): look at the learning rate "
            f"(grad_norm in log.jsonl), the batch, the precision (try --dtype=float32), the data, in this order"
        )


class Untracked:
    """In place of a Tracker where there is no curve to compare with."""

    def step(self, done: int, loss: float) -> str:
        return ""

    def validated(self, done: int, val_loss: float) -> str:
        return ""

    def causes(self) -> None:
        return None


def tracker(cfg: Config, data_sha256: str, say: Callable[[str], None]) -> Tracker | Untracked:
    """What compares a run with its config's curve; says so if the curve was recorded with another model."""
    if cfg.curve in ("", "off"):
        return Untracked()
    found = Tracker(cfg, data_sha256)
    if unlike := found.unlike():
        say(f"not compared with {cfg.curve}, which was recorded with {', '.join(unlike)}")
        return Untracked()
    return found


def read(path: Path) -> dict[str, Any]:
    """A curve file, checked. UserError in one line."""
    try:
        curve = json.loads(path.read_text(encoding="utf-8"))
        for point in [*curve["train"], *curve["val"]]:
            if not (type(point["step"]) is int and math.isfinite(point["loss"]) and point["band"] >= 0):
                raise ValueError(f"no point of a curve: {point}")
        if not (type(curve["window"]) is int and curve["window"] > 0 and isinstance(curve["config"], dict)):
            raise ValueError("window or config")
        if not isinstance(curve["source"], str) or "data_sha256" not in curve or "seeds" not in curve:
            raise ValueError("source, seeds or data_sha256")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is no loss curve ({type(e).__name__}: {e}): type --curve=off, or --record_curve") from None
    return curve


def record(argv: list[str]) -> None:
    """Train a config once for each of a few seeds and write the curve beside it."""
    files, _ = configurator.split_positional(Config(), argv)
    cfg = configurator.load(argv, __doc__)
    if len(files) != 1:
        raise UserError("a curve is recorded of a config file: type python train.py config/x.py --record_curve")
    window = max(1, cfg.max_steps // POINTS)
    losses, validations, sha256 = [], [], None
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(cfg.seed, cfg.seed + SEEDS):
            out = Path(folder, str(seed))
            one = replace(cfg, seed=seed, out_dir=str(out), curve="off", keep_checkpoints=1, resume=False)
            print(f"seed {seed}: {cfg.max_steps} steps")
            flags = [f"--{name}={value}" for name, value in asdict(one).items()]
            done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"seed {seed} ended with {done.returncode}: {(done.stderr.strip().splitlines() or [''])[0]}")
            lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            losses.append([r["loss"] for r in lines if "loss" in r])
            validations.append({r["step"]: r["val_loss"] for r in lines if "val_loss" in r})
            last = max(out.glob("step_*"))
            sha256 = json.loads((last / "training.json").read_text(encoding="utf-8"))["data_sha256"]
            recorded = json.loads((last / "config.json").read_text(encoding="utf-8"))
    decides = [*SHAPE, *(name for names in CAUSES.values() for name in names)]
    curve = {
        "source": f"our own runs on {machine.hardware_name(machine.pick_device(cfg.device)).partition(',')[0]}",
        "seeds": list(range(cfg.seed, cfg.seed + SEEDS)),
        "window": window,
        "data_sha256": sha256,
        "config": {name: recorded[name] for name in decides},
        "train": points(
            {
                step: [statistics.fmean(run[step - window : step]) for run in losses]
                for step in range(window, cfg.max_steps + 1, window)
            }
        ),
        "val": points({step: [run[step] for run in validations] for step in validations[0]}),
    }
    path = path_of(files[0])
    rows = {k: "[\n  " + ",\n  ".join(map(json.dumps, curve[k])) + "\n ]" for k in ("train", "val")}  # a point a line
    text = ",\n".join(f" {json.dumps(k)}: {rows.get(k) or json.dumps(v)}" for k, v in curve.items())
    write_atomically(path, f"{{\n{text}\n}}\n".encode())
    print(f"wrote {path}: from now on a run of {files[0]} says whether it is on track")


def points(found: dict[int, list[float]]) -> list[dict]:
    """{step: the value of each seed} -> points with a band in which a further seed should lie.

    The band is three standard deviations of one value about the mean of the others, with the deviation pooled over a point
    and its two neighbours on each side: three seeds alone tell it badly.
    """
    steps = sorted(found)
    n = len(found[steps[0]])
    spread = [statistics.stdev(found[s]) if n > 1 else 0.0 for s in steps]
    pooled = [math.sqrt(statistics.fmean(v * v for v in spread[max(0, i - 2) : i + 3])) for i in range(len(steps))]
    return [
        {"step": s, "loss": round(statistics.fmean(found[s]), 4), "band": round(3 * sd * math.sqrt(1 + 1 / n), 4)}
        for s, sd in zip(steps, pooled, strict=True)
    ]
