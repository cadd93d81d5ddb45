"""scaling.py: budgets are spent as planned, the fit finds laws that are known, and a study that is killed goes on."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import UserError
from configurator import Config
from measure import scaling
from model import GPT
from report import documents, page
from report.kinds import as_text
from report.results import law_loss

LAW = dict(E=1.2, A=8.0, alpha=0.3, B=60.0, beta=0.35)
BUDGETS = [5e9, 1e10, 2e10, 4e10]


def family(most_tokens: int = 1_003_854, **changes) -> scaling.Family:
    return scaling.Family(scaling.ScalingConfig(**changes), 65, most_tokens)


def invented(law: dict = LAW, seeds: int = 3, noise: float = 0.003, misfit: float = 0.002, number: int = 0) -> list[dict]:
    """Runs of the usual study whose losses follow a law: a point misses it by `misfit`, and its seeds differ by `noise`."""
    random, lab, runs = np.random.default_rng(number), family(), []
    for p in (p for c in BUDGETS for p in lab.level(c)):
        middle = law_loss(law, p.N, p.D) * math.exp(misfit * random.standard_normal())
        for seed in range(seeds):
            loss = middle * math.exp(noise * random.standard_normal())
            run = dict(N=p.N, D=p.D, C=p.C, flops=1.1 * p.C, n_embd=p.n_embd, n_layer=2, steps=p.D // 128, learning_rate=1e-2)
            runs.append({"budget": p.budget} | run | dict(seed=seed, loss=loss, seconds=1.0, started="2026-11-20T05:00:01"))
    return runs


def result(runs: list[dict], held_loss: float | None = 2.0) -> dict:
    """As scaling.py writes it."""
    analysis = scaling.Analysis(runs, 40)
    larger = family().point(1.6e11, 28_000)
    machine = dict(hardware="A machine, 2 cores", device="cpu", torch="2.13", commit="abc1234", dirty=False)
    head = dict(kind="scale", date="2026-11-20T05:00:00+00:00", command="python scaling.py", machine=machine)
    head |= dict(sizes=asdict(scaling.ScalingConfig()), limited_by="the data", train_tokens=1_003_854, jobs=2)
    held = dict(budget=1.6e11, n_embd=larger.n_embd, N=larger.N, D=larger.D, predicted=analysis.predict(larger.N, larger.D))
    ran = dict(runs[0], N=larger.N, D=larger.D, loss=held_loss, started="2026-11-20T07:00:00")
    held |= dict(predicted_at="2026-11-20T06:00:00", runs=[ran] * (held_loss is not None))
    return head | dict(runs=runs, fit=analysis.summary(), held_out=held)


# ---- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_embd", [8, 22, 64, 190, 192, 768])
def test_parameters_are_the_models(n_embd):
    point = scaling.Point(1.0, n_embd, scaling.n_params(n_embd, 65, 32), 128)
    cfg = family().config(point, 1, torch.device("cpu"))
    with torch.device("meta"):
        assert GPT(cfg).n_params() == point.N


def test_the_family_ends_in_gpt2():
    assert scaling.depth(768) == 12
    assert scaling.n_params(768, 50257, 1024) == 124_439_808


@given(
    budget=st.floats(1e9, 1e14),
    ratio=st.floats(5.0, 200.0),
    sizes=st.integers(3, 9),
    tokens_per_step=st.sampled_from([32, 128, 1024]),
    most_tokens=st.sampled_from([20_000, 1_000_000, 10**9]),
)
def test_budgets_are_spent(budget, ratio, sizes, tokens_per_step, most_tokens):
    """6·N·D is within 2% of the budget, in whole steps, with the data that there is, and sizes rise."""
    lab = family(most_tokens, tokens_per_parameter=ratio, sizes=sizes, tokens_per_step=tokens_per_step)
    points = lab.level(budget)
    for p in points:
        assert abs(6 * p.N * p.D / budget - 1) <= 0.02
        assert p.D % tokens_per_step == 0
        assert most_tokens >= p.D
        cfg = lab.config(p, 1, torch.device("cpu"))
        assert cfg.max_steps * cfg.tokens_per_step == p.D
    assert [p.N for p in points] == sorted({p.N for p in points})
    assert len(points) <= sizes


def test_sizes_lie_around_the_ratio_that_was_asked_for():
    points = family(10**9, tokens_per_parameter=50.0).level(1e12)
    ratio, spread = points[2].D / points[2].N, points[-1].N / points[0].N
    assert ratio == pytest.approx(50, rel=0.1)
    assert spread == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize(("minutes", "why", "seeds"), [(1000.0, "the data", 10), (4.0, "the data", 3), (0.5, "the minutes", 3)])
def test_plan_fits_into_minutes_and_data(minutes, why, seeds):
    """A step takes 1 ms + 0.1 µs for each parameter."""
    lab = family(minutes=minutes)

    def seconds(p: scaling.Point) -> float:
        return (1e-3 + 1e-7 * p.N) * p.D / 128

    plan = scaling.make_plan(lab, seconds, jobs=2)
    assert plan.why == why
    assert len(plan.budgets) == 4
    assert plan.seeds >= seeds
    whole = plan.seeds * sum(seconds(p) for c in plan.budgets for p in lab.level(c)) / 2
    assert whole <= 60 * minutes
    assert plan.budgets[-1] / plan.budgets[0] == pytest.approx(8, rel=0.05)
    if why == "the data":
        assert plan.budgets[-1] == scaling.round_down(lab.largest_budget())


@pytest.mark.parametrize(("tokens", "minutes", "more"), [(2_000, 10.0, "--epochs"), (1_000_000, 1e-4, "--minutes")])
def test_no_plan_is_one_line(tokens, minutes, more):
    with pytest.raises(UserError, match=more):
        scaling.make_plan(family(tokens, minutes=minutes), lambda p: 1e-3 * p.D / 128, 1)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--budgets=1e9", "--budgets=1e10,2e10,4e10"),
        ("--budgets=1e9,many", "--budgets=1e10,2e10,4e10"),
        ("--tokens_per_step=100", "--tokens_per_step=96"),
        ("--sizes=2", "at least 3"),
        ("--minutes=0", "above 0"),
        ("--epoch=1", "did you mean epochs"),
        ("config.py", "settings only"),
        ("--dataset=nothing", "prepare_data.py"),
    ],
)
def test_wrong_settings_are_one_line(flag, said, tmp_path):
    with pytest.raises(UserError, match=said) as e:
        scaling.main([flag, f"--out={tmp_path}", f"--keep={tmp_path}", f"--data_dir={tmp_path}"])
    assert "\n" not in str(e.value)


def test_without_scipy_it_says_so_before_it_trains(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scipy"):
        scaling.main(["--quick", f"--out={tmp_path}", f"--keep={tmp_path}"])


# ---- the law ----------------------------------------------------------------------------------------------------------


@settings(max_examples=10)  # half a second each
@given(E=st.floats(0.3, 3.0), alpha=st.floats(0.2, 0.8), beta=st.floats(0.2, 0.8), A=st.floats(0.2, 2.0), B=st.floats(0.2, 2.0))
def test_an_exact_law_is_found(E, alpha, beta, A, B):
    """A and B: what the terms are for 10,000 parameters and 200,000 tokens."""
    law = dict(E=E, A=A * 1e4**alpha, alpha=alpha, B=B * 2e5**beta, beta=beta)
    runs = invented(law, seeds=1, noise=0.0, misfit=0.0)
    found = scaling.Analysis(runs, bootstraps=1).law
    for name in ("E", "alpha", "beta"):
        assert found[name] == pytest.approx(law[name], rel=0.02)
    for run in runs:
        assert law_loss(found, run["N"], run["D"]) == pytest.approx(run["loss"], rel=1e-5)


def test_intervals_cover_the_truth():
    """In 95% of invented studies, or a little less often, with so few points and resamples; asked is 12 of 16. And the law is
    found: the middle of the estimates lies near it.
    """
    number, hits, laws = 16, dict.fromkeys((*scaling.PARAMETERS, "prediction", "ratio", "a"), 0), []
    lab = family()
    for i in range(number):
        analysis = scaling.Analysis(invented(number=i), bootstraps=60)
        random = np.random.default_rng(1000 + i)
        laws.append(analysis.law)
        larger = lab.point(1.6e11, scaling.best_size(analysis.law, 1.6e11))
        truth = law_loss(LAW, larger.N, larger.D) * math.exp(random.normal(0, math.hypot(0.002, 0.003 / math.sqrt(3))))
        summary, said = analysis.summary(), analysis.predict(larger.N, larger.D)
        top, a = summary["levels"][-1]["law"], LAW["beta"] / (LAW["alpha"] + LAW["beta"])
        ratio = 4e10 / 6 / scaling.best_size(LAW, 4e10) ** 2
        ends = {k: (summary["intervals"][k], LAW[k]) for k in scaling.PARAMETERS}
        ends |= {"prediction": ((said["low"], said["high"]), truth), "ratio": (top["ratio_interval"], ratio)}
        ends |= {"a": (summary["exponent"]["law_interval"], a)}
        for name, ((low, high), true) in ends.items():
            hits[name] += low <= true <= high
    assert all(count >= 0.75 * number for count in hits.values()), hits
    for name in ("E", "alpha", "beta"):
        assert np.median([law[name] for law in laws]) == pytest.approx(LAW[name], rel=0.1)


def test_intervals_narrow_as_the_noise_does():
    widths = []
    for noise in (0.01, 0.001):
        said = scaling.Analysis(invented(noise=noise, misfit=noise), bootstraps=60).predict(28_000, 950_000)
        widths.append(said["high"] - said["low"])
    assert widths[1] < 0.3 * widths[0]


def test_noise_is_the_seeds():
    assert scaling.Analysis(invented(seeds=1), 1).noise is None
    assert scaling.Analysis(invented(seeds=8, noise=0.01, misfit=0.05), 1).noise == pytest.approx(0.01, rel=0.2)


def test_one_run_that_went_wrong_does_not_carry_the_law_away():
    runs = invented(seeds=1, noise=0.0, misfit=0.0)
    runs[7]["loss"] *= 1.2
    found = scaling.Analysis(runs, 1).law
    assert law_loss(found, 28_000, 950_000) == pytest.approx(law_loss(LAW, 28_000, 950_000), rel=2e-3)


def test_the_same_runs_give_the_same_numbers():
    runs = invented()
    assert json.dumps(result(runs)) == json.dumps(result(runs))


def test_too_few_points_are_one_line():
    with pytest.raises(UserError, match="5 points are too few"):
        scaling.Analysis(invented()[:15], 10)


@given(alpha=st.floats(0.1, 1.0), beta=st.floats(0.1, 1.0), C=st.floats(1e9, 1e14))
def test_best_size_is_the_minimum_along_a_budget(alpha, beta, C):
    law = LAW | dict(alpha=alpha, beta=beta)
    best = scaling.best_size(law, C)
    least = law_loss(law, best, C / 6 / best)
    assert all(least <= law_loss(law, best * f, C / 6 / (best * f)) for f in (0.5, 0.9, 1.1, 2.0))


def analysis_of_parabolas(minimum: float, seeds: int = 3, noise: float = 0.002) -> scaling.Analysis:
    """Losses that are parabolas over ln N, least at `minimum` times the middle of each budget's sizes."""
    random, runs = np.random.default_rng(1), invented(seeds=seeds)
    for run in runs:
        sizes = [math.log(r["N"]) for r in runs if r["budget"] == run["budget"]]
        away = math.log(run["N"]) - (min(sizes) + max(sizes)) / 2 - math.log(minimum)
        run["loss"] = (2 + 0.05 * away**2) * math.exp(noise * random.standard_normal())
    return scaling.Analysis(runs, 50)


def test_minimum_of_a_parabola():
    exact, _ = analysis_of_parabolas(1.3, seeds=1, noise=0.0).parabola(1e10)
    sizes = [p.N for p in family().level(1e10)]
    assert exact["N"] == pytest.approx(1.3 * math.sqrt(sizes[0] * sizes[-1]), rel=1e-6)
    assert exact["loss"] == pytest.approx(2.0)
    assert exact["ratio"] == pytest.approx(1e10 / 6 / exact["N"] ** 2)
    assert exact["N_interval"] is None
    noisy, _ = analysis_of_parabolas(1.3).parabola(1e10)
    assert noisy["N_interval"][0] < exact["N"] < noisy["N_interval"][1]
    assert noisy["N_interval"][1] / noisy["N_interval"][0] < 2


def test_a_budget_without_a_minimum_has_none():
    found, _ = analysis_of_parabolas(5.0).parabola(1e10)
    assert found == dict.fromkeys(("N", "ratio", "loss", "N_interval", "ratio_interval"))


# ---- what is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "said"), [(2.06, "inside the 95%"), (2.3, "OUTSIDE the 95%"), (None, "not trained yet")])
def test_the_verdict(loss, said):
    text = as_text(result(invented(), loss))
    assert said in text
    assert "about 20" in text
    assert ("before it was trained" in text) == (loss is not None)


@pytest.mark.parametrize(("seeds", "minimum"), [(1, 5.0), (3, 1.0)])
def test_picture_and_page_bear_what_could_not_be_computed(tmp_path, seeds, minimum):
    found = result(analysis_of_parabolas(minimum, seeds).runs, None)
    path = tmp_path / "results" / "a-machine" / "scaling.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(found, allow_nan=False))
    (tmp_path / "README.md").write_text("<!-- begin results/a-machine/scaling.json -->\n<!-- end -->\n")
    assert documents.write(tmp_path) == []
    assert documents.check(tmp_path) == []
    assert "4·10¹⁰" in (tmp_path / "docs" / "isoflop-a-machine.svg").read_text()
    assert page.SECTIONS["scale"][0] in (tmp_path / "docs" / "index.html").read_text()


# ---- a whole study, killed and resumed --------------------------------------------------------------------------------


def children_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition, what: str, seconds: float = 60.0):
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, what
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def killed(tmp_path_factory, prepared, root):
    """(folder, command, (kept file: its time) before, worker pids, exit status): a study that was interrupted after a run."""
    folder = tmp_path_factory.mktemp("study")
    flags = ["--quick", "--dataset=tiny", f"--data_dir={prepared}", f"--out={folder}", f"--keep={folder}", "--jobs=2"]
    command = [sys.executable, str(root / "scaling.py"), *flags, "--device=cpu", "--sequence_length=16", "--tokens_per_step=32"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")
    wait_until(lambda: process.poll() is not None or list(folder.glob("run_*.json")), "no run was kept")
    workers = children_of(process.pid) if Path("/proc/self/task").is_dir() else []
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    kept = {p: p.stat().st_mtime_ns for p in folder.glob("run_*.json")}
    return folder, command, kept, workers, (process.returncode, complaint)


def test_ctrl_c_keeps_what_is_done_and_leaves_nobody(killed):
    _, _, kept, workers, (status, complaint) = killed
    assert status == 130, complaint
    assert complaint.strip().endswith("stopped")
    assert 1 <= len(kept) < 6
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "a worker is left over")


def test_the_same_command_goes_on_and_ends(killed):
    """It leaves the kept runs alone, and predicts before it trains."""
    folder, command, kept, _, _ = killed
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert len(list(folder.glob("run_*.json"))) == 7
    (path,) = folder.glob("*/scaling.trial.json")
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [r["budget"] for r in found["runs"]] == sorted(r["budget"] for r in found["runs"])
    for run in found["runs"]:
        assert 6 * run["N"] * run["D"] == pytest.approx(run["budget"], rel=0.02)
        assert 0 < run["loss"] < math.log(30)
    held = found["held_out"]
    assert held["predicted_at"] < held["runs"][0]["started"]
    assert held["runs"][0]["D"] == held["D"]
    assert as_text(found) in done.stdout
    # a third time: nothing is trained, and the prediction keeps its time
    files = {p: p.stat().st_mtime_ns for p in folder.glob("*_*.json")}
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*_*.json")} == files
    assert json.loads(path.read_text())["held_out"] == held


def test_a_kept_run_is_what_training_gives(killed, prepared):
    """Trained again by itself: the same loss, to the last bit (eager and one thread)."""
    folder = killed[0]
    kept = min((json.loads(p.read_text()) for p in folder.glob("run_*.json")), key=lambda k: k["result"]["steps"])
    again = scaling.train_one(Config(**kept["config"]))
    assert again["loss"] == kept["result"]["loss"]
    assert again["N"] == kept["result"]["N"]


def test_other_settings_code_or_data_make_other_runs(tmp_path):
    """Where the data lies does not count."""
    a, b = (scaling.RunCache(tmp_path, {"data": name}) for name in "ab")
    cfg = asdict(Config(max_steps=5))
    assert a.path("run", cfg) == a.path("run", cfg | {"data_dir": "elsewhere"})
    assert len({a.path("run", cfg), b.path("run", cfg), a.path("plan", cfg), a.path("run", cfg | {"seed": 2})}) == 4


def test_a_run_that_diverges_is_one_line(prepared, tiny_run, tmp_path):
    """The worker's error comes back with the model that it happened to; the worker goes on."""
    good = asdict(Config(**tiny_run))
    with scaling.workers(1, 1) as ask:
        with pytest.raises(UserError, match=r"n_embd=32, 6 steps.*finite"):
            ask({"what": "train", "config": good | {"learning_rate": 1e30, "grad_clip": 0.0}, "path": str(tmp_path / "x")})
        assert ask({"what": "train", "config": good, "path": str(tmp_path / "y")})["loss"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["y"]


def test_a_worker_that_dies_is_one_line(tiny_run, tmp_path):
    if not Path("/proc/self/task").is_dir():
        pytest.skip("needs /proc, to find the worker")
    before, cfg = set(children_of(os.getpid())), asdict(Config(**tiny_run | dict(max_steps=30)))
    with scaling.workers(1, 1) as ask:
        assert ask({"what": "time", "config": cfg})["seconds"] > 0
        (pid,) = set(children_of(os.getpid())) - before
        os.kill(pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(UserError, match="ended with -9"):
                ask({"what": "train", "config": cfg, "path": str(tmp_path / "x")})
