"""Raw measurements (results/<hardware>/*.json) -> the generated blocks of README.md and docs/, plots, docs/index.html.

    python -m report                        make all of them
    python -m report --check                fail if a number in them is not the one in its JSON
    python -m report out/shakespeare        draw a run's curves from its log.jsonl, into out/shakespeare/curves.png

--check makes blocks and page again and compares them to the last character. It draws no plot: each holds the sha256 of the JSON
that it was drawn from, and that is compared.
"""

import sys
from pathlib import Path

from base.files import ROOT
from base.scripts import read_log
from report import documents, plots


def draw_run(run: Path) -> list[str]:
    """Draw a run's curves beside its log. The errors, one line each."""
    records, damaged = read_log(run)
    if not any("loss" in r or "val_loss" in r for r in records):
        return [f"{run}/log.jsonl holds no loss yet"]
    plots.plot_log(records, run.resolve().name).savefig(run / "curves.png", metadata={"Software": None})
    print(f"wrote {run / 'curves.png'}" + (f" ({damaged} damaged line(s) of log.jsonl left out)" if damaged else ""))
    return []


def main(argv: list[str], root: Path = ROOT) -> None:
    """root: the folder of README.md, results/ and docs/."""
    all_of_it = argv in ([], ["--check"])
    try:
        if all_of_it:
            errors = documents.check(root) if argv else documents.write(root)
        elif argv in (["-h"], ["--help"]):
            return print(__doc__.strip())
        elif len(argv) == 1 and (Path(argv[0]) / "log.jsonl").is_file():
            errors = draw_run(Path(argv[0]))
        else:
            use = "use python -m report, python -m report --check, or python -m report out/<run>"
            errors = [f"{' '.join(argv)} is not a run (it has no log.jsonl): {use}"]
    except (OSError, ValueError) as e:
        errors = [str(e)]
    except ModuleNotFoundError as e:
        errors = [f"the module {e.name} is not installed: run pip install {e.name}"]
    for line in dict.fromkeys(errors):  # a missing file once, however many blocks show it
        print(f"error: {line}", file=sys.stderr)
    if errors:
        sys.exit(1 if all_of_it else 2)


if __name__ == "__main__":
    main(sys.argv[1:])
