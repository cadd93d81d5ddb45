"""measure/fresh.py and base/scripts.py: each measurement is a process of its own, and none is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from processes import is_running, wait_until

from base import scripts
from measure import fresh, worker
from safety import prove


@pytest.fixture
def in_place_of_the_worker(monkeypatch, tmp_path):
    """in_place_of_the_worker(code): each fresh process runs this code, with `job` and `result_path`, instead of the worker."""

    def arrange(code: str) -> None:
        script = tmp_path / "stand_in.py"
        start = "import json, os, signal, sys\njob, result_path = json.load(open(sys.argv[1])), sys.argv[2]\n"
        script.write_text(start + code, encoding="utf-8")
        plain = scripts.command
        monkeypatch.setattr(scripts, "command", lambda _, *args, **how: plain(str(script), *args, **how))

    return arrange


def test_every_job_is_a_fresh_process_that_is_told_all(cfg, in_place_of_the_worker):
    in_place_of_the_worker("json.dump({'pid': os.getpid(), 'job': job}, open(result_path, 'w'))")
    first = fresh.in_fresh_process(cfg, steps=7, min_timed=3)
    second = fresh.in_fresh_process(cfg, "ceilings")
    assert len({first["pid"], second["pid"], os.getpid()}) == 3
    job = {"what": "measure", "config": asdict(cfg), "cwd": os.getcwd(), "steps": 7, "min_timed": 3}
    assert first["job"] == job
    assert second["job"]["what"] == "ceilings"


@pytest.mark.parametrize(
    ("code", "word", "processes"),
    [
        ("raise ValueError('no such thing')", "exit status 1: ValueError: no such thing", 1),
        ("print('error: the data is gone', file=sys.stderr); sys.exit(2)", "status 2: error: the data is gone", 1),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL, probably out of memory", 1),
        # torchrun's own exit status is 1 whatever became of its processes, and its last line is a rule
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL", 2, marks=pytest.mark.slow),
        ("sys.stderr.buffer.write(b'caf\\xe9\\n'); sys.exit(1)", "status 1: caf", 1),
    ],
)
def test_a_worker_that_dies_is_one_line_that_names_the_signal(cfg, in_place_of_the_worker, code, word, processes):
    in_place_of_the_worker(code)
    found = fresh.in_fresh_process(replace(cfg, processes=processes))
    assert word in found["error"]
    assert "\n" not in found["error"]
    assert "====" not in found["error"]
    assert found["out_of_memory"] == ("SIGKILL" in word)


def test_what_cannot_be_built_is_a_workers_result(cfg, tmp_path, monkeypatch):
    """Whichever process it is; and an exit status that makes torchrun end the others."""
    monkeypatch.setenv("RANK", "1")
    job, result_path = tmp_path / "job.json", tmp_path / "result.json"
    config = asdict(replace(cfg, dataset="missing"))
    job.write_text(json.dumps({"what": "measure", "config": config, "cwd": os.getcwd(), "steps": 1, "min_timed": 1}))
    with pytest.raises(SystemExit) as stop:
        worker.main([str(job), str(result_path)])
    assert stop.value.code == 1
    assert "prepare_data.py" in json.loads(result_path.read_text())["error"]


@pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL leaves a process no time to end its own, but on Linux")
@pytest.mark.parametrize(
    ("how", "processes"),
    [
        *((how, 1) for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)),
        *(pytest.param(how, 2, marks=pytest.mark.slow) for how in (signal.SIGKILL, signal.SIGTERM)),
    ],
)
def test_killing_a_script_leaves_no_worker_running(how, processes, tmp_path, root):
    """The worker takes its time to end, as a training run that saves; `timeout` and others send SIGTERM twice."""
    note = f"open({str(tmp_path)!r} + '/pid' + os.environ.get('RANK', '0'), 'w').write(str(os.getpid()))"
    slowly = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit()))"
    (tmp_path / "worker.py").write_text(f"import os, signal, sys, time\n{slowly}\n{note}\ntime.sleep(300)")
    start = f"scripts.run({str(tmp_path / 'worker.py')!r}, processes={processes})"
    code = f"from base import scripts\nscripts.end_on_sigterm()\n{start}"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.PIPE, encoding="utf-8")

    def pids() -> list[int]:
        return [int(text) for path in tmp_path.glob("pid*") if (text := path.read_text())]

    wait_until(lambda: len(pids()) == processes, "it does not start")
    process.send_signal(how)
    if how == signal.SIGTERM:
        time.sleep(0.2)
        process.send_signal(how)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode != 0
    if how == signal.SIGTERM:
        assert complaint == "stopped by SIGTERM\n"
        assert not any(map(is_running, pids()))  # before it, not after
    wait_until(lambda: not any(map(is_running, pids())), "a worker is left running")


def test_stopping_a_series_of_kills_ends_the_run_that_was_to_be_killed(cfg, monkeypatch):
    """It is in a session of its own, so Ctrl-C in the terminal does not reach it."""
    runs, popen = [], subprocess.Popen

    def start(*_, **how):
        runs.append(popen([sys.executable, "-c", "import time; time.sleep(300)"], **how))
        return runs[0]

    monkeypatch.setattr(prove, "train", lambda cfg: None)
    monkeypatch.setattr(prove, "last_step", lambda out: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        prove.prove_kills(replace(cfg, max_steps=20, checkpoint_interval=5), kills=1)
    assert runs[0].poll() is not None
