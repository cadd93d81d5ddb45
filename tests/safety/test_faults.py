"""tests/faults.py: the part of it that CI runs at every change, and that its own verdicts can fail."""

import json
import signal

import faults
import pytest
from processes import wait_until
from rig.processes import Done, Failed, clean, need
from rig.runs import Box, Stage, judged

from report import kinds


@pytest.fixture(scope="module")
def stage():
    stage = Stage()
    yield stage
    stage.close()


@pytest.mark.slow
@pytest.mark.parametrize("id", faults.QUICK)
def test_a_fault_in_a_quick_form(stage, id):
    """One place each; `python tests/faults.py` does them all, at several."""
    found = judged(stage, id, faults.FAULTS[id], quick=True)
    assert found["passed"], found["detail"]


def test_each_title_has_its_fault():
    assert sorted(faults.FAULTS) == list(faults.TITLES) == [f"F{n:02d}" for n in range(1, 34)]
    assert set(faults.QUICK) <= set(faults.FAULTS)


def test_a_fault_that_is_not_survived_is_reported_with_its_try(stage):
    def run(box: Box, case: str) -> None:
        need(case != "b", "it hung")
        assert case != "d"

    for tries, said in ((["a"], "1 of 1"), (["a", "b", "c"], "try 2 (b): it hung"), (lambda box: ["d"], "try 1 (d): assert ")):
        found = judged(stage, "F00", [(run, tries)])
        assert found["passed"] == (said == "1 of 1")
        assert found["detail"].startswith(said)


# ---- the judge --------------------------------------------------------------------------------------------------------

ERROR = "error: model.safetensors is damaged\n"
TRACEBACK = "Traceback (most recent call last):\n  File …\nKeyError: 'step'\n"


def done(err: str = ERROR, status: int = 2, seconds: float = 3.0, orphans: tuple = ()) -> Done:
    return Done(status, seconds, "", err, list(orphans))


@pytest.mark.parametrize(
    ("done", "why"),
    [
        (done(status=0), "exit status 0"),
        (done(seconds=61.0), "61 s to fail"),
        (done(orphans=("process 7 (rank 1)",)), "left over: .*process 7"),
        (done(TRACEBACK), "a traceback: .*\n.*\nKeyError: 'step'$"),
        (done(TRACEBACK + ERROR), "traceback"),
        (done(""), "0 different error lines"),
        (done("error: one\nerror: two\n"), "2 different error lines"),
        (done(ERROR + "and more\n"), "more than one line .*and more"),
        (done("error: something is wrong\n"), r"does not name \['model.safetensors'\]"),
    ],
)
def test_a_clean_failure_is_one_and_any_other_is_not(done, why):
    both = "".join(f"[rank {rank}] {ERROR}[W1120 07:00:00.000 socket.cpp:1] retrying\n" for rank in range(2))
    assert clean(Done(2, 3.0, "", both, []), "model.safetensors") == "model.safetensors is damaged"
    with pytest.raises(Failed, match=why):
        clean(done, "model.safetensors")


def test_what_a_process_leaves_behind_is_found_and_killed_and_one_that_does_not_end_has_failed(stage):
    """Also in another session, whose parent has ended."""
    box = Box(stage, "orphan")
    sleep = "import subprocess, sys, time; time.sleep(100)"
    leave = f"print(subprocess.Popen([sys.executable, '-c', {sleep!r}], start_new_session=True).pid)"
    process = box.start(["-c", sleep.replace("time.sleep(100)", leave)])
    done = process.wait()
    assert done.status == 0
    assert done.orphans == [f"process {done.out.strip()} (rank ?)"]
    wait_until(lambda: not process.family(), "killed, they still have to get round to dying")
    process = box.start(["-c", sleep])
    with pytest.raises(Failed, match="still running 1 s later"):
        process.wait(1)
    assert process.popen.returncode == -signal.SIGKILL
    box.close()


# ---- the scorecard ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_writes_what_the_readme_shows(tmp_path, run_script):
    """With one fault: the status is that of the faults, the JSON makes a table, nothing but the asked file is written."""
    arguments = ["tests/faults.py", "F31", "--quick", f"--out={tmp_path}/faults.json"]
    assert run_script(*arguments, "F34", cwd=tmp_path).returncode == 2
    done = run_script(*arguments, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1/1 passed" in done.stdout
    result = json.loads((tmp_path / "faults.json").read_text(encoding="utf-8"))
    table, _ = kinds.blocks(result)
    assert table.rows[0][0].startswith("F31 ")
    assert table.rows[0][2] == "passed"
    failed = result | {"faults": [result["faults"][0] | {"passed": False, "detail": "it hung."}]}
    cells = [dict(dtype="float32", compile=c, processes=n, passed=n == 1, detail="no") for c in (False, True) for n in (1, 2)]
    said = kinds.as_markdown(failed | {"matrix": cells})
    assert "F31 FAILED: it hung." in said
    assert "| float32, compiled | bit for bit | FAILED |" in said
