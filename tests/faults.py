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
import itertools
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are flat modules, not an installed package

import torch
from rig import killing, saving, surroundings  # noqa: F401 (they register the faults)
from rig.processes import need
from rig.runs import FAULTS, Box, Stage, judged

from base import system
from base.errors import entry
from base.files import ROOT
from base.scripts import read_log
from engine import machine
from measure.results import write

TITLES = {  # what is done, and what is demanded then
    "F01": ("SIGKILL in a save, at 10 byte offsets, and in the first save", "the newest complete checkpoint loads, G2"),
    "F02": ("SIGKILL before each fsync, rename and removal of a save", "as F01, and leftovers are cleaned up"),
    "F03": ("disk full: for a save, the last save, the log", "a warning or a clean failure, old checkpoint intact; then G2"),
    "F04": ("newest checkpoint truncated to 25, 50, 99%", "refused, resumes from the one before with a warning, G2"),
    "F05": ("one bit of a checkpoint flipped, at 100 places", "100 of 100 refused"),
    "F06": ("a malicious pickle as weights, moments, tokenizer, config, shard, Hugging Face weights", "refused, nothing run"),
    "F07": ("a tensor of a checkpoint is missing, extra, of another shape or dtype", "clean failure that names file and key"),
    "F08": ("unknown format version of checkpoint or data", "clean failure that names it"),
    "F09": ("two writers, one out_dir: a second run, a resumption, three at once", "one runs and is whole, others are refused"),
    "F10": ("out_dir is read-only, on a read-only file system, or below a file", "found before step 1"),
    "F11": ("SIGKILL at 20 random moments of one run", "G2 after each of them"),
    "F12": ("SIGKILL of process 1 of 2", "the other is out within 60 s; --resume and --max-restarts give G2"),
    "F13": ("SIGTERM, SIGINT; 1 and 2 processes (to torchrun, to one)", "saved, out within 30 s, 0 steps lost, G2"),
    "F14": ("resumed on 1 process after 2, on 2 after 1", "the same tokens in each step, losses within 1e-5 (relative)"),
    "F15": ("SIGKILL between two micro-batches of a step", "G2"),
    "F16": ("other intervals of validation, samples, log lines, checkpoints", "every step equal in hex, and the last weights"),
    "F17": ("resumed with another configuration", "differences are shown, what does not fit is refused"),
    "F18": ("NaN in the loss, in a gradient", "stops before the update, weights unchanged, names step and module"),
    "F19": ("NaN on one process of 2", "both stop, no hang, the process is named"),
    "F20": ("a loss or gradient norm far out", "flagged and counted; continue, skip and stop do what they say"),
    "F21": ("one bit of one process's weights changes", "found at the next comparison, which names step, weight and process"),
    "F22": ("a shard is cut off, of odd length, or has a wrong header", "clean failure that names the shard"),
    "F23": ("a token id beyond the vocabulary", "found on the CPU, with shard and place"),
    "F24": ("a shard is missing, empty or too short", "clean failure that names it"),
    "F25": ("the data changed between save and resumption", "refused"),
    "F26": ("the run goes over the end of the data, twice, on 2 processes", "each token once per epoch, processes disjoint"),
    "F27": ("SIGSTOP of one process of 2", "time-out (here 9 s) that names it, no orphans"),
    "F28": ("port in use, no such host, no address, nobody there, somebody else there", "clean failure within 30 s"),
    "F29": ("two processes started with different settings, data", "found before step 1, the difference is named"),
    "F30": ("prompts that are long, empty, not in the alphabet, no UTF-8; top_k above the vocabulary; T=0", "defined"),
    "F31": ("unknown setting in a file, a flag, a checkpoint", "refused with the near name"),
    "F32": ("out of memory: micro-batch, or one sequence, too large; 1 and 2 processes", "halved with a message; or clean"),
    "F33": ("no C++ compiler", "eager with a message; asked for by name: clean failure"),
}
# what CI does at every change: one of saves, files, kills, signals, numbers, ranks, data, settings and machine each
QUICK = ("F01", "F05", "F06", "F11", "F12", "F13", "F18", "F22", "F26", "F29", "F31", "F33")
CELLS = [
    dict(dtype=dtype, compile=compile, processes=ranks)
    for dtype, compile, ranks in itertools.product(("float32", "bfloat16"), (False, True), (1, 2))
]


def kill_and_resume(box: Box, dtype: str, compile: bool, processes: int) -> None:
    """SIGKILL of every process at a random moment, resumption, G2."""
    how = dict(dtype=dtype, compile=compile, max_steps=60, checkpoint_interval=5, eval_interval=20)
    whole, out = box.whole(processes, **how), box.path()
    process = box.train(out, processes, **how)
    box.killed(process, out, box.random.randint(6, 55))
    on = next(r["effective"] for r in read_log(out)[0] if "effective" in r)
    need((on["compile"], on["processes"], on["deterministic"]) == (compile, processes, True), f"what ran is {on}")
    box.resumed(out, whole, processes, resume="auto", **how)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", choices=[[], *TITLES])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--matrix", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--lanes", type=int, default=system.cores())
    asked = parser.parse_args(argv)
    everything = not (asked.quick or asked.matrix or asked.ids)
    chosen = asked.ids or (QUICK if asked.quick else [] if asked.matrix else TITLES)
    cells = {", ".join(map(str, cell.values())): cell for cell in CELLS if everything or asked.matrix}
    began, stage = time.monotonic(), Stage()
    results: dict[str, dict] = {}

    def do(name: str, title: str, parts: list) -> None:
        results[name] = found = judged(stage, name, parts, asked.quick, asked.seed)
        verdict = "passed" if found["passed"] else "FAILED"
        numbers = "detect {seconds_to_detect} s, lost {steps_lost}, recover {seconds_to_recover} s".format_map(found)
        print(f"{name} {verdict} in {found['seconds']} s: {found['detail']} ({numbers}): {title}", flush=True)

    try:
        with ThreadPoolExecutor(asked.lanes) as pool:
            for name, cell in cells.items():
                pool.submit(do, name, "SIGKILL, resumed", [(kill_and_resume, [tuple(cell.values())])])
            for id in sorted(chosen, key=lambda id: (id not in ("F27", "F02"), id)):  # the longest first
                pool.submit(do, id, TITLES[id][0], FAULTS[id])
    finally:
        stage.close()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, cpu_seconds = time.monotonic() - began, used.ru_utime + used.ru_stime
    passed = sum(found["passed"] for found in results.values())
    print(f"{passed}/{len(results)} passed in {seconds:.0f} s ({cpu_seconds:.0f} s of CPU time)")
    if everything or asked.out:
        path = asked.out or ROOT / "results" / "faults.json"
        faults = [dict(id=id, title=TITLES[id][0], expected=TITLES[id][1]) | results[id] for id in sorted(chosen)]
        result = {
            "kind": "faults",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": "python tests/faults.py" + "".join(f" {a}" for a in argv if not a.startswith("--out")),
            "machine": machine.describe(torch.device("cpu")) | {"threads": 1},
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),  # of all processes: what it takes where nothing else runs
            "faults": faults,
            "matrix": [cell | results[name] for name, cell in cells.items()],
        }
        write(path, result)
        print(f"wrote {path}")
    sys.exit(int(passed < len(results)))


if __name__ == "__main__":
    entry(main)
