"""Results that prove something -> blocks: verification against float64, faults, kills, and what safety costs."""

import statistics

from report.render import Block, Table
from report.results import machine_line
from report.stats import extent, too_few


def verify_table(result: dict, words: list[str] | None = None) -> list[Block]:
    """Each toggle's errors against its reference. words: only the checks that name one of them, for a rung's page."""
    chosen = [r for r in result["rows"] if not words or any(w in r["check"] for w in words)]
    if not chosen:
        raise ValueError(f"no check in it names {' or '.join(words)}")
    kinds = list(dict.fromkeys(kind for r in result["rows"] for kind in r["errors"]))

    def number(e: float | None) -> str:
        return "not finite" if e is None else f"{e:.1e}"

    rows = []
    for r in chosen:
        errors = [number(r["errors"][kind]) if kind in r["errors"] else "" for kind in kinds]
        rows.append([r["check"], r["against"], r["status"].split(":")[0], number(r["tolerance"]), *errors])
    notes = [f"{r['check']}: {r['status'].rstrip('.')}." for r in chosen if r["status"] != "passed"]
    failed, skipped = (sum(r["status"].startswith(how) for r in chosen) for how in ("FAILED", "skipped"))
    counts = f"{len(chosen) - failed - skipped} passed, {failed} FAILED, {skipped} skipped."
    how = "Each number is the largest ‖found − expected‖ / ‖expected‖ over the tensors of its kind, after one real train_step."
    table = Table(["check", "against", "status", "tolerance", *kinds], rows, left=(0, 1, 2))
    return [table, *notes, f"{how} {counts} {machine_line(result)}."]


def safety_table(result: dict) -> list[Block]:
    """What reproducible kernels and saving cost."""
    free, fixed = ([statistics.median(r) for r in result["kernels_s"][name]] for name in ("any", "deterministic"))
    costs = [b / a - 1 for a, b in zip(free, fixed, strict=True)]
    rows = []
    for name, runs in result["saving"].items():
        pauses = [p for run in runs for p in run["pause_ms"][1:]]  # the first also allocates the copy
        first = [run["pause_ms"][0] for run in runs]
        slow = [max(run["step_ms"][s] for s in run["after_steps"]) for run in runs]
        saves, steps = ([t for run in runs for t in run[key]] for key in ("save_ms", "step_ms"))
        rows.append([name, *(f"{statistics.median(v):,.0f}" for v in (first, pauses, saves, slow, steps))])
    head = ["saving", "first pause ms", "later pauses ms", "whole save ms", "slowest step after ms", "step ms"]
    return [
        Table(head, rows),
        f"Medians of {len(free)} runs. Only kernels that always give the same bits (`deterministic=True`): "
        f"{extent(costs).text('{:+.1%}'.format, ' step time')}. {machine_line(result)}.{too_few(len(costs), 'run')}",
    ]


def kills_table(result: dict) -> list[Block]:
    """The real run, killed again and again, against the undisturbed one."""
    lost = [e["last_step"] - int((e["newest"] or "step_0").removeprefix("step_")) for e in result["events"]]
    steps, seconds = result["requested"]["max_steps"], result["seconds"]
    every = result["requested"]["checkpoint_interval"]
    return [
        f"`config/shakespeare_124m.py` (deterministic, a checkpoint every {every} steps) was killed by SIGKILL at "
        f"{result['kills']} random moments, {result['in_a_save']} of them in the middle of a save, and resumed each time: "
        f"losses, gradient norms and learning rates of all {steps} steps are equal in hex to the undisturbed run's, and "
        f"parameters, moments, random states and data cursor in sha256 ({result['sha256'][:16]}…). At most {max(lost)} steps "
        f"were run again after a kill; {seconds['whole']:,.0f} s became {seconds['broken']:,.0f} s. {machine_line(result)}."
    ]


def faults_table(result: dict) -> list[Block]:
    """The scorecard of tests/faults.py, and the matrix of kills and resumptions."""

    def shown(value: float | None, unit: str = "") -> str:
        return "–" if value is None else f"{value:,}{unit}"

    rows = []
    for f in result["faults"]:
        row = [f"{f['id']} {f['title']}", f["expected"], "passed" if f["passed"] else "FAILED", str(f["tries"])]
        row += [shown(f["seconds_to_detect"], " s"), shown(f["steps_lost"]), shown(f["seconds_to_recover"], " s")]
        rows.append(row)
    head = ["fault", "passes if", "", "tries", "time to detect", "steps lost", "time to recover"]
    blocks: list[Block] = [Table(head, rows, left=(0, 1, 2))] * bool(rows)
    blocks += [f"{f['id']} FAILED: {f['detail'].rstrip('.')}." for f in result["faults"] if not f["passed"]]
    cells = {(f"{c['dtype']}, {'compiled' if c['compile'] else 'eager'}", c["processes"]): c for c in result["matrix"]}
    if cells:
        kinds, processes = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
        head = ["SIGKILL at a random step, then --resume", *(f"{n} process{'es' * (n > 1)}" for n in processes)]
        equal = {True: "bit for bit", False: "FAILED"}
        blocks.append(Table(head, [[k, *(equal[cells[k, n]["passed"]] for n in processes)] for k in kinds]))
        blocks += [f"{k}, {n} process(es) FAILED: {c['detail'].rstrip('.')}." for (k, n), c in cells.items() if not c["passed"]]
    counts = [f"{sum(f['passed'] for f in found)}/{len(found)}" for found in (result["faults"], result["matrix"])]
    parts = [f"{n} {what}" for n, what in zip(counts, ("faults", "of the matrix"), strict=True) if not n.endswith("/0")]
    return [
        *blocks,
        f"{', '.join(parts)} in {result['seconds'] / 60:.0f} minutes ({result['cpu_seconds'] / 60:.0f} of CPU time). Times "
        "and steps are the worst of all tries, and starting Python and torch is part of them. Time to detect: from the fault "
        "(a bad file: from the start) until the process that reports it has ended. Steps lost: done again after resuming. Time "
        f"to recover: from starting with --resume until the run is where it was. {machine_line(result)}.",
    ]
