"""Is this run on track? The reference loss curve of a config, how it is recorded, and how a run is compared with it.

    config/shakespeare.curve.json     beside config/shakespeare.py: the mean training loss over a few seeds, and its band
    python train.py config/shakespeare.py --record_curve      records one (three whole runs)

A training loss is noisy from step to step, so both sides are means over `window` steps, compared every `window` steps.
"""

import itertools
import json
import math
import statistics
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import configurator
from base import files, scripts, settings
from base.errors import UserError, printable
from configurator import Config
from corpus import shards
from engine import machine

SEEDS = 3
POINTS = 40  # in a curve
IN_A_ROW = 3  # checks outside the band before possible causes are reported
LARGEST_FILE, LONGEST_WINDOW = 2**20, 10**6  # of a curve: ours are a few KB and 500 steps

# What decides the loss, in the order in which it is usually to blame.
CAUSES = {
    "learning rate": ("learning_rate", "min_lr", "warmup_steps", "schedule", "max_steps", "beta1", "beta2", "weight_decay"),
    "batch": ("tokens_per_step", "sequence_length", "batch_order", "grad_clip", "on_outlier"),
    "precision": ("dtype", "fp32_precision", "dropout", "attention"),
    "data": ("dataset",),
}
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "tie_weights", "init", "scale_residual_init")


class Tracker:
    """Compares a run with a curve while it trains."""

    def __init__(self, cfg: Config, data_sha256: str, curve: dict[str, Any]):
        self.curve, self.settings, self.data_sha256 = curve, asdict(cfg), data_sha256
        self.recent: deque[float] = deque(maxlen=curve["window"])
        self.points, self.validations = ({p["step"]: p for p in curve[which]} for which in ("train", "val"))
        self.side = ""  # of the curve, on which the last check of the training loss found the run
        self.off = 0  # checks in a row outside the band
        self.reported = False  # whether causes() has reported this time outside the band

    def step(self, done: int, loss: float) -> str:
        """After step `done`: the verdict, if this step is checked and the run has changed sides since the last check."""
        self.recent.append(loss)
        point, window = self.points.get(done), self.curve["window"]
        if not point or len(self.recent) < window:
            return ""
        before, mean = self.side, statistics.fmean(self.recent)
        self.side = self._check(mean, point)
        found = f"mean of {window} {mean:.3f}, " if window > 1 else ""
        return f"{self.side} ({found}{_expected(point)})" if self.side != before else ""

    def validated(self, done: int, val_loss: float) -> str:
        """The verdict on a validation, where the curve has one at this step."""
        point = self.validations.get(done)
        return f"{self._check(val_loss, point)} ({_expected(point)})" if point else ""

    def _check(self, found: float, point: dict) -> str:
        above = found > point["loss"] + point["band"]
        below = found < point["loss"] - point["band"] and not point.get("at_most")
        self.off = self.off + 1 if above or below or math.isnan(found) else 0
        self.reported = self.reported and self.off > 0
        return "BELOW the curve" if below else "ABOVE the curve" if self.off else "on track"

    def causes(self) -> str | None:
        """After three checks in a row outside the band: what might be the cause, the likely first. Reported once for each time
        that the run leaves the curve.
        """
        if self.off < IN_A_ROW or self.reported:
            return None
        self.reported = True
        recorded, known = self.curve["config"], []
        for cause, names in CAUSES.items():
            mine = {n: (self.settings[n], recorded.get(n, self.settings[n])) for n in names}
            if other := [f"{n}={here!r}, there {there!r}" for n, (here, there) in mine.items() if here != there]:
                known.append(f"{cause} ({'; '.join(other)})")
        if self.curve["data_sha256"] not in (None, self.data_sha256):
            known.append("data (its sha256 is another)")
        source = self.curve["source"] + (f", seeds {self.curve['seeds']}" if self.curve["seeds"] else "")
        why = f" with the curve's own settings ({source}): check the learning rate (grad_norm in log.jsonl), the batch, the "
        why += "precision (try --dtype=float32), the data, in this order"
        if known:
            why = f"; the run differs from the curve ({source}) in: {'; '.join(known)}"
        return printable(f"off track in {IN_A_ROW} checks in a row{why}")


def _expected(point: dict) -> str:
    return f"expected {'at most ' if point.get('at_most') else ''}{point['loss']:.3f} ± {point['band']:.3f}"


def tracker(cfg: Config, data_sha256: str, say: Callable[[str], None]) -> Tracker:
    """What compares a run with its config's curve. It has no points to compare with where there is no curve, or, with a line on
    it, one of another model."""
    none = Tracker(cfg, data_sha256, {"window": 1, "train": [], "val": []})
    if cfg.curve in ("", "off"):
        return none
    curve = read(Path(cfg.curve))
    recorded = curve["config"]
    if unlike := [f"{n}={recorded[n]!r}" for n in SHAPE if n in recorded and recorded[n] != getattr(cfg, n)]:
        say(f"not compared with {cfg.curve}, which was recorded with {', '.join(unlike)}")
        return none
    return Tracker(cfg, data_sha256, curve)


def read(path: Path) -> dict[str, Any]:
    """A curve file, checked: it may be untrusted. UserError in one line."""
    try:
        curve = json.loads(files.read_text(path, LARGEST_FILE))
        for point in [*curve["train"], *curve["val"]]:
            if not (type(point["step"]) is int and math.isfinite(point["loss"]) and point["band"] >= 0):
                raise ValueError(f"not a point of a curve: {point}")
        if not (type(curve["window"]) is int and 0 < curve["window"] <= LONGEST_WINDOW and isinstance(curve["config"], dict)):
            raise ValueError("window or config")
        if not isinstance(curve["source"], str) or "data_sha256" not in curve or "seeds" not in curve:
            raise ValueError("source, seeds or data_sha256")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise UserError(f"{path} is not a loss curve ({type(e).__name__}: {e}): use --curve=off, or --record_curve") from None
    return curve


# ---- recording --------------------------------------------------------------------------------------------------------


def record(argv: list[str]) -> None:
    """Train a config once for each of a few seeds and write the curve beside it."""
    names, _ = settings.split_positional(Config(), argv)
    cfg = configurator.load(argv, __doc__)
    if len(names) != 1:
        raise UserError("a curve is recorded of a config file: run python train.py config/x.py --record_curve")
    window, seeds, logs = max(1, cfg.max_steps // POINTS), range(cfg.seed, cfg.seed + SEEDS), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            out = Path(folder, str(seed))
            one = replace(cfg, seed=seed, out_dir=str(out), curve="off", keep_checkpoints=1, resume=False)
            print(f"seed {seed}: {cfg.max_steps} steps")
            scripts.run("train.py", *settings.flags(one))
            logs.append(scripts.read_log(out)[0])
    losses = [[r["loss"] for r in log if "loss" in r] for log in logs]
    validations = [{r["step"]: r["val_loss"] for r in log if "val_loss" in r} for log in logs]
    resolved = next(r["config"] for r in logs[0] if r.get("event") == "start")
    means = {s: [statistics.fmean(run[s - window : s]) for run in losses] for s in range(window, cfg.max_steps + 1, window)}
    curve = {
        "source": f"our own runs on {machine.hardware_name(machine.pick_device(cfg.device)).rsplit(', ', 1)[0]}",
        "seeds": list(seeds),
        "window": window,
        "data_sha256": shards.open_dataset(Path(cfg.data_dir) / cfg.dataset).sha256,
        "config": {name: resolved[name] for name in itertools.chain(SHAPE, *CAUSES.values())},
        "train": points(means),
        "val": points({step: [run[step] for run in validations] for step in validations[0]}),
    }
    path = configurator.find_file(names[0]).with_suffix(".curve.json")
    rows = {k: "[\n  " + ",\n  ".join(map(json.dumps, curve[k])) + "\n ]" for k in ("train", "val")}  # a point a line
    text = ",\n".join(f" {json.dumps(k)}: {rows.get(k) or json.dumps(v)}" for k, v in curve.items())
    files.write_atomically(path, f"{{\n{text}\n}}\n".encode())
    print(f"wrote {path}: from now on a run of {names[0]} reports whether it is on track")


def points(found: dict[int, list[float]]) -> list[dict]:
    """{step: the value of each seed} -> points with a band in which a further seed should lie.

    The band is three standard deviations of one value about the mean of the others, with the deviation pooled over a point
    and its two neighbours on each side: three seeds alone tell it badly.
    """
    steps, n = sorted(found), len(next(iter(found.values())))
    spread = [statistics.stdev(found[s]) if n > 1 else 0.0 for s in steps]
    pooled = [math.sqrt(statistics.fmean(v * v for v in spread[max(0, i - 2) : i + 3])) for i in range(len(steps))]
    return [
        {"step": s, "loss": round(statistics.fmean(found[s]), 4), "band": round(3 * sd * math.sqrt(1 + 1 / n), 4)}
        for s, sd in zip(steps, pooled, strict=True)
    ]
