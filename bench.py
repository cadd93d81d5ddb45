"""Measure train.train_step itself, never a copy of it.

    python bench.py ladder             every rung of config/ladder/, each against the one before it and against the first
    python bench.py ablate             the top rung with one setting put back at a time
    python bench.py candidates         the top rung with one other setting at a time: what else might be faster here
    python bench.py verify             every setting against float64, on the same weights and batch
    python bench.py why [config.py]    where a step's time goes, beside its floor, and what to try next
    python bench.py compare A.json B.json --max_regression=3%
    python bench.py ab A.py B.py       two configs, paired and interleaved: tokens/s and loss with confidence intervals;
                                       "top" for a file is the top rung: python bench.py ab config/peers/nanogpt_cpu.py top
    python bench.py sampling           tokens/s with and without the KV cache
    python bench.py decode [out/run]   tokens/s in each precision, beside the floor and transformers; a run's losses as well
    python bench.py stages             what each stage of config/stages/ reaches
    python bench.py shakespeare        what `make train` does with three seeds, from an empty compiler cache
    python bench.py run config.py      one whole run: its losses, its evaluation, a text that it writes
    python bench.py start              from starting train.py to the end of the first step, with and without a compiler cache
    python bench.py data               tokens/s of prepare_data.py beside tiktoken's own; a BPE trained, timed and compared
    python bench.py safety             what it costs to be reproducible, and to save
    python bench.py kills              config/shakespeare_124m.py killed at twenty random moments, against the same undisturbed
    python bench.py scale              scaling laws of small models, with settings of its own (python bench.py scale --help)

Training steps are timed in a fresh process for each config. Rounds are interleaved (all configs, then all again), so that drift
of a shared machine hits all alike. Results go to results/<hardware>/<command>.json as raw numbers; report/ computes everything
that is printed.
"""

import sys
from pathlib import Path

import torch

from base import scripts, settings
from base.errors import UserError, entry, near_name
from engine import machine
from measure import ab, decoding, ladder, results, verify, whole_runs, why
from measure.config import BenchConfig
from measure.scaling import study
from report import kinds

# command -> (settings with every 0 filled in, device) -> result
MEASURES = {
    "ladder": ladder.ladder,
    "ablate": ladder.ablate,
    "candidates": ladder.candidates,
    "verify": verify.command,
    "sampling": decoding.sampling,
    "stages": whole_runs.stages,
    "shakespeare": whole_runs.shakespeare,
    "start": whole_runs.start,
    "data": whole_runs.data,
    "safety": whole_runs.safety,
    "kills": whole_runs.kills,
}
# command -> (files or folders, settings as given, device) -> result
OF_FILES = {"run": whole_runs.whole_run, "decode": decoding.decode, "why": why.command, "ab": ab.ab}
COMMANDS = [*MEASURES, *OF_FILES, "compare", "scale"]


def result_path(command: str, places: list[str], asked: BenchConfig, device: torch.device) -> Path:
    """Where a result is written; a trial must not replace a measurement."""
    name = command
    if command in ("run", "ab", "decode"):  # one file for each config or run
        name += "".join(f"_{Path(p).stem}" for p in places)
    if command == "ab" and asked.sequence_length:
        name += f"_T{asked.sequence_length}"
    trial = ".trial" if asked.quick or asked.n_layer not in (0, 12) else ""
    return results.results_dir(asked.out, device) / f"{name}{trial}.json"


def show(path: Path, result: dict) -> None:
    """Write a result and print it; what Ctrl-C left of one goes to a file of its own, and a trial is no part of the report."""
    if result.get("interrupted"):
        path = path.with_name(f"{path.name.removesuffix('.json').removesuffix('.trial')}.partial.trial.json")
    results.write(path, result)
    print(kinds.as_text(result))
    if result.get("sizes", {}).get("quick"):
        print("--quick: one round of a small model on short sequences, a first look: leave it out to measure GPT-2 124M")
    if result.get("interrupted"):
        print(f"stopped by Ctrl-C: only what was finished is above, and in {path}")
        sys.exit(130)
    reported = path.parent.parent == Path("results") and ".trial" not in path.name
    print(f"wrote {path}" + ("; python -m report shows it in the README" if reported else ""))
    if result.get("passed") is False:
        sys.exit(1)


def main(argv: list[str]) -> None:
    scripts.end_on_sigterm()
    if argv[:1] == ["scale"]:
        return show(*study.command(argv[1:]))
    words, flags = settings.split_positional(BenchConfig(), argv)
    asked = settings.parse(BenchConfig(), flags, __doc__)
    command, places = (words[0], words[1:]) if words else ("", [])
    if command not in COMMANDS:
        raise UserError(f"{command!r} is not a command of bench.py ({', '.join(COMMANDS)}): {near_name(command, COMMANDS)}")
    if command == "compare":
        return ab.compare(places, asked)
    if places and command in MEASURES:
        raise UserError(f"{places[0]!r} is one argument too many: bench.py {command} takes settings only, as --name=value")
    device = machine.pick_device(asked.device)
    path = result_path(command, places, asked, device)
    if command in OF_FILES:
        result = OF_FILES[command](places, asked, device)
    else:
        result = MEASURES[command](asked.by_device(device.type), device)
    show(path, result)


if __name__ == "__main__":
    entry(main)
