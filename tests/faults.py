"""33 things that go wrong in training runs, each done for real to a small one on the CPU.

    python tests/faults.py                 all of them, and the matrix; writes results/faults.json
    python tests/faults.py F01 F11         only these, in detail
    python tests/faults.py --quick         the few that CI runs at every change, in one place each
    python tests/faults.py --matrix        kill and resume in {float32, bfloat16} x {eager, compiled} x {1, 2 processes}

Options: --out=FILE (where the JSON goes), --seed=N (other random places), --lanes=N (how many at a time; default: cores).

The processes are train.py and sample.py as anyone would run them, on 2 layers of width 32 and a text of 60,000 characters. Only
where a fault cannot be caused from outside (a NaN, a flipped bit, a kill between two system calls) does the process begin in
rig/inject.py, which arranges for it and then trains. What is demanded of them, "clean" and "G2", is in rig/runs.py.
"""

import dataclasses
import json
import re
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are flat modules, not an installed package

import torch
from rig import killing, saving, surroundings  # noqa: F401 (they register the faults)
from rig.processes import PATIENCE, need
from rig.runs import FAULTS, Box, Found, Stage, judged, last_step, log, run_fault

from base import system
from base.errors import UserError, entry
from base.files import ROOT
from engine import machine

# what CI does at every change: one of saves, files, kills, signals, numbers, ranks, data, settings and machine each
QUICK = ("F01", "F05", "F06", "F11", "F13", "F18", "F22", "F26", "F29", "F31", "F33")
MATRIX = [(d, c, r) for d in ("float32", "bfloat16") for c in (False, True) for r in (1, 2)]


def cell_name(dtype: str, compile: bool, ranks: int) -> str:
    return f"{dtype}, {'compiled' if compile else 'eager'}, {ranks} process(es)"


def kill_and_resume(box: Box, dtype: str, compile: bool, ranks: int) -> str:
    """SIGKILL of every process at a random moment, resumption, G2."""
    how = dict(dtype=dtype, compile=compile, max_steps=60, checkpoint_interval=5, eval_interval=20)
    whole, out = box.whole(ranks, **how), box.folder / "run"
    process = box.train(out, ranks, **how)
    goal = box.random.randint(6, 55)
    process.until(lambda: last_step(out) >= goal, f"step {goal}", 4 * PATIENCE)
    process.kill()
    at = last_step(out)
    on = next(r["effective"] for r in log(out) if "effective" in r)
    need((on["compile"], on["processes"], on["deterministic"]) == (compile, ranks, True), f"what ran is {on}")
    box.resumed(out, whole, ranks, resume="auto", **how)
    return f"killed after step {at} of 60"


def line(name: str, title: str, found: Found) -> str:
    def shown(value: float | None, unit: str) -> str:
        return "–" if value is None else f"{value:.1f}{unit}" if isinstance(value, float) else f"{value}{unit}"

    numbers = [f"detect {shown(found.seconds_to_detect, ' s'):>7}", f"lost {shown(found.steps_lost, ''):>3}"]
    numbers.append(f"recover {shown(found.seconds_to_recover, ' s'):>7}")
    verdict = "passed" if found.passed else "FAILED"
    return f"{name:<4} {verdict} {found.seconds:>6.1f} s  {'  '.join(numbers)}  {title}: {found.detail}"


def main(argv: list[str]) -> None:
    options = dict(a.removeprefix("--").split("=", 1) for a in argv if a.startswith("--") and "=" in a)
    switches, ids = {a for a in argv if a in ("--quick", "--matrix")}, [a for a in argv if not a.startswith("--")]
    wrong = [a for a in ids if a not in FAULTS] + [f"--{o}" for o in options if o not in ("out", "seed", "lanes")]
    wrong += [a for a in argv if a.startswith("--") and "=" not in a and a not in switches]
    wrong += [f"--{o}={v}" for o, v in options.items() if o in ("seed", "lanes") and not re.fullmatch(r"[1-9]\d{0,8}", v)]
    if wrong or ("--matrix" in switches and ids):
        raise UserError(f"{(wrong or argv)[0]} is not understood: use F01 … F33, --quick, --matrix, or nothing")
    seed, lanes = int(options.get("seed", 1337)), int(options.get("lanes", system.cores()))
    everything = not switches and not ids
    quick = "--quick" in switches
    chosen = ids or ([] if "--matrix" in switches else list(QUICK) if quick else list(FAULTS))
    chosen.sort(key=lambda id: (id not in ("F27", "F02"), id))  # the longest first: nobody shall wait for them at the end
    cells = MATRIX if everything or "--matrix" in switches else []
    began, stage = time.monotonic(), Stage()
    results: dict[str, Found] = {}
    try:
        with ThreadPoolExecutor(lanes) as pool:

            def do(name: str, title: str, work: Callable[[], Found]) -> None:
                results[name] = work()
                print(line(name, title, results[name]), flush=True)

            for cell in cells:
                pool.submit(
                    do,
                    cell_name(*cell),
                    "SIGKILL and resumption",
                    lambda cell=cell: judged(stage, cell_name(*cell), lambda box: kill_and_resume(box, *cell), seed=seed),
                )
            for id in chosen:
                pool.submit(do, id, FAULTS[id].title, lambda id=id: run_fault(stage, id, quick, seed))
    finally:
        stage.close()
    seconds, used = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    passed = sum(results[id].passed for id in chosen)
    said = [f"{passed}/{len(chosen)} faults"] * bool(chosen)
    cell_results = {cell: results[cell_name(*cell)] for cell in cells}
    said += [f"{sum(f.passed for f in cell_results.values())}/{len(cells)} of the matrix"] * bool(cells)
    print(f"{', '.join(said)} in {seconds:.0f} s ({used.ru_utime + used.ru_stime:.0f} s of CPU time)")
    if everything or "out" in options:
        path = Path(options.get("out", ROOT / "results" / "faults.json"))
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "kind": "faults",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": "python tests/faults.py" + "".join(f" {a}" for a in argv if not a.startswith("--out=")),
            "machine": machine.describe(torch.device("cpu")) | {"threads": 1},
            "seconds": round(seconds, 1),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),  # of all processes: what it takes where nothing else runs
            "faults": [
                dict(id=id, title=FAULTS[id].title, expected=FAULTS[id].expected) | rounded(results[id])
                for id in sorted(chosen)
            ],
            "matrix": [dict(dtype=d, compile=c, processes=r) | rounded(f) for (d, c, r), f in cell_results.items()],
        }
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {path}")
    if not all(f.passed for f in results.values()):
        sys.exit(1)


def rounded(found: Found) -> dict:
    values = dataclasses.asdict(found)
    return {k: round(v, 1) if isinstance(v, float) else v for k, v in values.items()}


if __name__ == "__main__":
    entry(main)
