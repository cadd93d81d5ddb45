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

import argparse
import dataclasses
import functools
import itertools
import json
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are flat modules, not an installed package

import torch
from rig import killing, saving, surroundings  # noqa: F401 (they register the faults)
from rig.processes import PATIENCE, need
from rig.runs import FAULTS, Box, Fault, Found, Stage, judged, last_step, log

from base import system
from base.errors import entry
from base.files import ROOT, write_atomically
from engine import machine

# what CI does at every change: one of saves, files, kills, signals, numbers, ranks, data, settings and machine each
QUICK = ("F01", "F05", "F06", "F11", "F12", "F13", "F18", "F22", "F26", "F29", "F31", "F33")
MATRIX = {
    f"{dtype}, {'compiled' if compile else 'eager'}, {ranks} process(es)": dict(dtype=dtype, compile=compile, processes=ranks)
    for dtype, compile, ranks in itertools.product(("float32", "bfloat16"), (False, True), (1, 2))
}


def kill_and_resume(box: Box, dtype: str, compile: bool, processes: int) -> str:
    """SIGKILL of every process at a random moment, resumption, G2."""
    how = dict(dtype=dtype, compile=compile, max_steps=60, checkpoint_interval=5, eval_interval=20)
    whole, out = box.whole(processes, **how), box.folder / "run"
    process = box.train(out, processes, **how)
    box.reach(process, out, 1, 4 * PATIENCE)
    box.killed(process, out, box.random.randint(6, 55))
    at = last_step(out)
    on = next(r["effective"] for r in log(out) if "effective" in r)
    need((on["compile"], on["processes"], on["deterministic"]) == (compile, processes, True), f"what ran is {on}")
    box.resumed(out, whole, processes, resume="auto", **how)
    return f"killed after step {at} of 60"


def line(name: str, title: str, found: Found) -> str:
    detect, recover = (f"{v:.1f} s" if v is not None else "–" for v in (found.seconds_to_detect, found.seconds_to_recover))
    lost = "–" if found.steps_lost is None else found.steps_lost
    numbers = f"detect {detect:>7}  lost {lost:>3}  recover {recover:>7}"
    return f"{name:<4} {'passed' if found.passed else 'FAILED'} {found.seconds:>6.1f} s  {numbers}  {title}: {found.detail}"


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", choices=[[], *FAULTS])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--matrix", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--lanes", type=int, default=system.cores())
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    asked = arguments(argv)
    everything = not (asked.quick or asked.matrix or asked.ids)
    chosen = asked.ids or (list(QUICK) if asked.quick else [] if asked.matrix else list(FAULTS))
    chosen = sorted(chosen, key=lambda id: (id not in ("F27", "F02"), id))  # the longest first
    cells = MATRIX if everything or asked.matrix else {}
    began, stage = time.monotonic(), Stage()
    results: dict[str, Found] = {}

    def do(name: str, what: Fault) -> None:
        results[name] = judged(stage, name, what.run, asked.quick, asked.seed)
        print(line(name, what.title, results[name]), flush=True)

    try:
        with ThreadPoolExecutor(asked.lanes) as pool:
            for name, cell in cells.items():
                run = functools.partial(kill_and_resume, **cell)
                pool.submit(do, name, Fault("SIGKILL, resumed", "G2", run))
            for id in chosen:
                pool.submit(do, id, FAULTS[id])
    finally:
        stage.close()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, cpu_seconds = time.monotonic() - began, used.ru_utime + used.ru_stime
    counts = [f"{sum(results[id].passed for id in chosen)}/{len(chosen)} faults"] * bool(chosen)
    counts += [f"{sum(results[name].passed for name in cells)}/{len(cells)} of the matrix"] * bool(cells)
    print(f"{', '.join(counts)} in {seconds:.0f} s ({cpu_seconds:.0f} s of CPU time)")
    if everything or asked.out:
        path = asked.out or ROOT / "results" / "faults.json"
        faults = [dict(id=id, title=FAULTS[id].title, expected=FAULTS[id].expected) for id in sorted(chosen)]
        result = {
            "kind": "faults",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": "python tests/faults.py" + "".join(f" {a}" for a in argv if not a.startswith("--out")),
            "machine": machine.describe(torch.device("cpu")) | {"threads": 1},
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),  # of all processes: what it takes where nothing else runs
            "faults": [fault | rounded(results[fault["id"]]) for fault in faults],
            "matrix": [cell | rounded(results[name]) for name, cell in cells.items()],
        }
        write_atomically(path, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
        print(f"wrote {path}")
    if not all(f.passed for f in results.values()):
        sys.exit(1)


def rounded(found: Found) -> dict:
    values = dataclasses.asdict(found)
    return {k: round(v, 1) if isinstance(v, float) else v for k, v in values.items()}


if __name__ == "__main__":
    entry(main)
