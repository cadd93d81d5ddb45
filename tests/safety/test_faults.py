"""tests/faults.py: the part of it that CI runs at every change, and that its own verdicts can fail."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import faults
import pytest
from rig.processes import Done, Failed, clean
from rig.runs import Box, Stage

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
    found = faults.judged(stage, id, faults.FAULTS[id].run, quick=True)
    assert found.passed, found.detail


def test_there_are_33_and_the_quick_ones_are_among_them():
    assert sorted(faults.FAULTS) == [f"F{n:02d}" for n in range(1, 34)]
    assert set(faults.QUICK) <= set(faults.FAULTS)


# ---- the judge --------------------------------------------------------------------------------------------------------

GOOD = Done(2, 3.0, {0: ("", "error: model.safetensors is damaged\n")}, [])
TRACEBACK = "Traceback (most recent call last):\n  File …\nKeyError: 'step'\n"


def with_error(text: str) -> Done:
    return dataclasses.replace(GOOD, texts={0: ("", text)})


def test_a_clean_failure_is_one():
    assert clean(GOOD, "model.safetensors") == "model.safetensors is damaged"
    both = {rank: ("", f"[rank {rank}] error: step 3: no\n[W1120 07:00:00.000 socket.cpp:1] retrying\n") for rank in range(2)}
    assert clean(dataclasses.replace(GOOD, texts=both), "step 3") == "step 3: no"


@pytest.mark.parametrize(
    ("done", "why"),
    [
        (dataclasses.replace(GOOD, status=0), "exit status 0"),
        (dataclasses.replace(GOOD, seconds=61.0), "61 s to fail"),
        (dataclasses.replace(GOOD, orphans=["process 7 (rank 1)"]), "left over: .*process 7"),
        (with_error(TRACEBACK), "traceback: KeyError: 'step'"),
        (with_error(TRACEBACK + "error: model.safetensors is damaged\n"), "traceback"),
        (with_error(""), "0 different error lines"),
        (with_error("error: one\nerror: two\n"), "2 different error lines"),
        (with_error("error: model.safetensors is damaged\nand more\n"), "more than one line .*and more"),
        (with_error("error: something is wrong\n"), "does not name 'model.safetensors'"),
    ],
)
def test_any_other_failure_is_not(done, why):
    with pytest.raises(Failed, match=why):
        clean(done, "model.safetensors")


def test_what_a_process_leaves_behind_is_found_and_killed(stage):
    """Also in another session, whose parent has ended."""
    box = Box(stage, "orphan")
    script = box.folder / "parent.py"
    script.write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'], start_new_session=True)\n"
        f"open({str(box.folder / 'pid')!r}, 'w').write(str(child.pid))\n"
    )
    process = box.start([str(script)])
    done = process.wait()
    assert done.status == 0
    assert done.orphans == [f"process {(box.folder / 'pid').read_text()} (rank ?)"]
    until = time.monotonic() + 10
    while process.family() and time.monotonic() < until:  # killed, it still has to get round to dying
        time.sleep(0.01)
    assert not process.family()
    box.close()


def test_a_process_that_does_not_end_has_failed(stage):
    box = Box(stage, "endless")
    process = box.start(["-c", "import time; time.sleep(100)"])
    with pytest.raises(Failed, match="still running 1 s later"):
        process.wait(1)
    assert process.popen.returncode == -signal.SIGKILL
    box.close()


# ---- the scorecard ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_writes_what_the_readme_shows(tmp_path, root):
    """With one fault: the status is that of the faults, the JSON makes a table, nothing but the asked file is written."""
    command = [sys.executable, str(root / "tests" / "faults.py"), "F31", "--quick", f"--out={tmp_path}/faults.json"]
    assert subprocess.run([*command, "F34"], cwd=tmp_path, capture_output=True).returncode == 2
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1/1 faults" in done.stdout
    result = json.loads((tmp_path / "faults.json").read_text(encoding="utf-8"))
    table, _ = kinds.blocks(result)
    assert table.rows[0][0].startswith("F31 ")
    assert table.rows[0][2] == "passed"
    failed = result | {"faults": [result["faults"][0] | {"passed": False, "detail": "it hung."}]}
    cells = [dict(dtype="float32", compile=c, processes=n, passed=n == 1, detail="no") for c in (False, True) for n in (1, 2)]
    said = kinds.as_markdown(failed | {"matrix": cells})
    assert "F31 FAILED: it hung." in said
    assert "| float32, compiled | bit for bit | FAILED |" in said
