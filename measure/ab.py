"""Two configs, or two results, side by side."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import configurator
from base.errors import UserError
from configurator import Config
from measure.config import BenchConfig
from measure.fresh import in_fresh_process
from measure.ladder import climb, load_ladder, top_rung
from measure.results import header
from measure.rounds import UntilCtrlC, say
from report import results
from report.compare import compare as compare_results

TOP = "top"  # where a config file would stand: the ladder's top rung


def sides(paths: list[str], asked: BenchConfig, device: torch.device) -> list[tuple[str, Config]]:
    """[(path, config), …]: files as they are (sizes only where given); beside the top rung, a file at the ladder's sizes."""
    if TOP not in paths:
        return [(p, asked.of_file(configurator.load_file(p))) for p in paths]
    rungs, sizes = load_ladder(), asked.by_device(device.type)
    top = top_rung(*climb(rungs, sizes, device))
    base = rungs[0].cfg.batch_size
    return [
        (f"config/ladder/{top.name}.py", top.cfg) if p == TOP else (p, sizes.apply(configurator.load_file(p), base))
        for p in paths
    ]


def ab(paths: list[str], asked: BenchConfig, device: torch.device) -> dict:
    """Two configs, seed by seed, in alternating order."""
    if len(paths) != 2:
        raise UserError("ab compares two config files: run python bench.py ab A.py B.py")
    sizes = asked.by_device(device.type)  # for how often; the files say how large
    pair = sides(paths, asked, device)
    runs: list[list[dict]] = [[], []]
    with UntilCtrlC() as until, tqdm(total=2 * sizes.seeds, disable=None, unit="run") as bar:
        for seed in range(sizes.seeds):
            for which in (0, 1) if seed % 2 == 0 else (1, 0):
                path, cfg = pair[which]
                bar.set_description(f"seed {seed + 1}/{sizes.seeds} {Path(path).stem}")
                result = in_fresh_process(replace(cfg, seed=cfg.seed + seed), steps=sizes.steps, min_timed=3)
                bar.update()
                if "error" in result:
                    raise UserError(f"{path}: {result['error']}")
                say(f"seed {cfg.seed + seed} {Path(path).stem}", result)
                runs[which].append(result)
    note, pairs = until.note(all(runs)), min(map(len, runs))
    both = [
        {
            "config": path,
            "requested": side[0]["requested"],
            "effective": side[0]["effective"],
            "step_s": [r["step_s"][r["warmup"] :] for r in side[:pairs]],
            "losses": [r["losses"] for r in side[:pairs]],
        }
        for (path, _), side in zip(pair, runs, strict=True)
    ]
    changes = {k: list(v) for k, v in configurator.diff(pair[0][1], pair[1][1]).items() if k != "out_dir"}
    return header("ab", asked) | note | {"sides": both, "changes": changes}


def compare(paths: list[str], asked: BenchConfig) -> None:
    """Print two result files side by side; exit status 1 if B is slower than A by more than --max_regression."""
    if len(paths) != 2:
        raise UserError("compare takes two result files: run python bench.py compare A.json B.json")
    try:
        limit = float(asked.max_regression.removesuffix("%")) / 100 if asked.max_regression else None
    except ValueError:
        raise UserError(f"max_regression={asked.max_regression!r} is not a percentage: use --max_regression=3%") from None
    try:
        text, failed = compare_results(*(results.load(Path(p)) for p in paths), limit)
    except results.DAMAGED as e:
        raise UserError(f"cannot compare {' and '.join(paths)}: {type(e).__name__}: {e}") from None
    print(text)
    if failed:
        sys.exit(1)
