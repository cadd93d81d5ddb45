"""report.py: every number comes out of JSON, differences are told from noise, and the page stands alone in a real browser."""

import copy
import json
import math
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from browser import CHROMIUM, Browser

import report
from configurator import GPTConfig
from report import page, tables

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)> | <!-- end -->"


# ---- results as bench.py writes them, made by hand -----------------------------------------------------------------------

MACHINE = dict(hardware="A machine, 2 cores", device="cpu", threads=2, torch="2.13", commit="abc1234", dirty=False)
SIZES = dict(batch_size=4, sequence_length=32, tokens_per_step=128, n_layer=2, rounds=3)
SHAPE = dict(n_layer=2, n_embd=64, vocab_size=100, vocab_multiple=1, block_size=64, sequence_length=32)
SHAPE |= dict(dtype="float32", fp32_precision="ieee")
ON = dict(device="cpu", processes=1)


def head(kind: str) -> dict:
    command = f"python bench.py {kind}"
    return dict(kind=kind, date="2026-11-20T05:00:00+00:00", command=command, machine=dict(MACHINE), sizes=dict(SIZES))


def rung(name: str, versus: str, changes: dict, ms: list[list[float]], losses: list[float], **more) -> dict:
    times = [[t / 1e3 for t in times] for times in ms]
    entry = dict(name=name, title=name, versus=versus, changes=changes, requested=SHAPE, effective=ON, losses=losses)
    return entry | dict(memory_gib=1.5, first_step_s=[2.0], step_s=times) | more


def ladder(factor: float = 1.0, kind: str = "ladder") -> dict:
    """Three rungs, the middle one skipped; `factor` slows the last one down."""
    last = [[100 * factor, 102 * factor], [101 * factor, 99 * factor], [98 * factor, 100 * factor]]
    rungs = [
        rung("r00_fp32", "r00_fp32", {}, [[200, 202], [198, 200], [201, 199]], [4.6, 4.5]),
        dict(name="r01_tf32", title="", versus="r00_fp32", changes={"fp32_precision": ["ieee", "tf32"]}, skipped="not here"),
        rung("r03_compile", "r01_tf32", {"compile": [False, True]}, last, [4.6, 4.50004]),
    ]
    rates = dict(peak_flops=None, gemm_float32_flops=1e11, gemm_bfloat16_flops=4e11, copy_bytes_per_s=2e10)
    return head(kind) | dict(ceilings=rates, rungs=rungs)


def verify(status: str = "passed") -> dict:
    row = dict(check="alone: compile=True", against="float64", tolerance=1e-5, errors={"loss": 1e-7, "update": None})
    skipped = dict(check="alone: fp32_precision=tf32", against="float64", tolerance=1e-3, errors={}, status="skipped: no")
    return head("verify") | dict(rows=[row | {"status": status}, skipped], passed=status == "passed")


def why() -> dict:
    parts = [("GEMM", 60.0, 40.0, 4e9, 0), ("optimizer", 35.0, 20.0, 0, 4e8), ("other", 5.0, 0.0, 0, 0)]
    shares = [dict(part=p, ms=ms, share=ms / 100, floor_ms=floor, flops=f, bytes=b) for p, ms, floor, f, b in parts]
    advice = [dict(setting="compile=True", saves_ms=12.0, why="fewer passes"), dict(setting="x=1", saves_ms=0.1, why="")]
    return head("why") | dict(step_ms=100.0, profiled_ms=110.0, floor_ms=60.0, shares=shares, advice=advice, trace="trace.json")


def stages() -> dict:
    stage = dict(config="s2.py", title="Stage 2: one batch", parameters=163_040_000, losses=[11.06, 0.0029], seconds=9.0)
    std = {"scaled": [0.1, 0.2, 0.3], "unscaled": [0.1, 0.4, 0.9]}
    return head("stages") | dict(ln_vocab_size=math.log(50257), stages=[stage], residual_std=std)


def shakespeare(sample: str = "ROMEO:\nBut soft") -> dict:
    end = dict(first_step_s=9.0, step_s=[[0.2, 0.3]], losses=[9.0, 8.0, 7.0], val_loss=6.5, parameters=124_439_808)
    asked = dict(tokens_per_step=256)
    return head("shakespeare") | end | dict(seconds=dict(train=120.0, sample=5.0), requested=asked, sample=sample)


def sampling() -> dict:
    speeds = dict(cached=[30.0, 31.0], uncached=[10.0, 10.0])
    return head("sampling") | dict(prompt_tokens=64, new_tokens=8, same_tokens=True, tokens_per_s=speeds)


def ab() -> dict:
    sides = [
        dict(config=f"{name}.py", requested=dict(tokens_per_step=128), step_s=[[t, t], [t * 1.01, t]], losses=[[4.0], [4.1]])
        for name, t in (("a", 0.2), ("b", 0.1))
    ]
    return head("ab") | dict(sides=sides, changes={})


def scale() -> dict:
    """Two budgets on two sizes each; the second budget's parabola has no minimum."""
    law, ran = dict(E=1.0, A=10.0, alpha=0.3, B=50.0, beta=0.4), dict(flops=7e9, C=6e9, started="2026-11-20T04:00", seconds=9.0)
    runs = [ran | dict(budget=c, N=n, D=round(c / 6 / n), loss=3.0) for c in (6e9, 2.4e10) for n in (5000, 20_000)]
    best = dict(N=9000.0, ratio=12.0, N_interval=[8000.0, 10_000.0], ratio_interval=[9.0, None])
    lost = dict.fromkeys(("N", "ratio", "loss", "N_interval", "ratio_interval"))
    levels = [dict(budget=c, law=best, parabola=p) for c, p in ((6e9, best | {"loss": 2.9}), (2.4e10, lost))]
    fit = dict(law=law, intervals={k: [v / 2, 2 * v] for k, v in law.items()}, noise=0.002, misfit=0.003, levels=levels)
    fit["exponent"] = dict(law=0.57, law_interval=[0.4, 0.7], parabolas=None, parabolas_interval=None)
    held = dict(budget=9.6e10, N=20_000, D=800_000, predicted=dict(loss=2.8, low=2.7, high=2.9))
    held |= dict(predicted_at="2026-11-20T05:00", runs=[ran | dict(N=20_000, D=800_000, loss=2.75, started="2026-11-20T06:00")])
    asked = dict(dataset="shakespeare_char", bootstraps=9, sequence_length=32, tokens_per_step=128)
    return head("scale") | dict(sizes=asked, runs=runs, fit=fit, held_out=held, jobs=2, train_tokens=1_000_000)


ALL = [ladder(), ladder(kind="ablate"), verify(), why(), stages(), shakespeare(), sampling(), ab(), scale()]


def put(root, *results: dict) -> None:
    for result in results:
        path = root / "results" / "a-machine" / f"{result['kind']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result), encoding="utf-8")


def block(words: str) -> str:
    return f"<!-- begin results/a-machine/{words} -->\n<!-- end -->\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with results of all kinds, a README that shows each and a rung's page; report.write() has been called on it."""
    root = tmp_path_factory.mktemp("built")
    put(root, *ALL)
    readme = "".join(block(f"{result['kind']}.json") for result in ALL)
    (root / "README.md").write_text(f"# title\n\n{readme}\nthe end\n", encoding="utf-8")
    (root / "docs" / "ladder").mkdir(parents=True)
    rung_page = block("ladder.json r03_compile") + block("verify.json compile=True")
    (root / "docs" / "ladder" / "r03_compile.md").write_text(rung_page, encoding="utf-8")
    assert report.write(root) == []
    return root


@pytest.fixture
def house(built, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(built, tmp_path, dirs_exist_ok=True)


# ---- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0], [2.0] * 5, list(map(float, range(11)))])
def test_quartiles_are_numpys(values):
    assert tables.quartiles(values) == pytest.approx(np.percentile(values, [25, 50, 75]))


def test_ratio_is_taken_round_by_round():
    slow, fast = {"step_s": [[2.0, 4.0, 3.0], [8.0]]}, {"step_s": [[1.0], [2.0, 2.0]]}  # medians 3 and 8; 1 and 2
    assert tables.ratio(slow, fast) == (3.5, 3.0, 4.0)


def test_interval_of_a_worked_example():
    """1, 2, 3: mean 2, standard deviation 1, t(2) = 4.303: 2 ± 4.303 / sqrt(3)."""
    assert tables.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 2.4843, 2 + 2.4843), abs=1e-4)
    assert tables.interval([1.0]) == (1.0, -math.inf, math.inf)


def test_difference_of_a_worked_example():
    """Variances 1 and 4 over 3 values each: error² 1/3 + 4/3, freedom (5/3)² / ((1/3)²/2 + (4/3)²/2) = 2.94, t(2) = 4.303."""
    middle, low, high = tables.difference([1.0, 2.0, 3.0], [8.0, 10.0, 12.0])
    assert (middle, high - middle, middle - low) == pytest.approx((8.0, *[4.303 * math.sqrt(5 / 3)] * 2))


@pytest.mark.parametrize(
    "shape", [{}, {"vocab_multiple": 128}, {"sequence_length": 256}, {"n_layer": 3, "n_embd": 96, "n_head": 3}]
)
def test_flops_are_the_models(shape):
    cfg = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, vocab_multiple=1, block_size=1024) | shape
    T = cfg.get("sequence_length", 0)
    model = GPTConfig(**{k: v for k, v in cfg.items() if k != "sequence_length"})
    assert tables.flops_per_token({"sequence_length": 0} | cfg) == model.flops_per_token(T or 1024)


def test_numbers_of_the_ladders_table():
    """128 tokens in 200 and 100 ms; the row in between is skipped, so the last is compared with the first."""
    table, *notes = tables.blocks(ladder())
    first, skipped, last = table.rows
    assert first[1:3] == ["200 [199, 201]", "640"]
    assert skipped[1] == "skipped"
    assert "not here" in notes[0]
    assert last[0] == "compile False → True"
    assert last[2:6] == ["1,280", "1.99× [1.99, 2.02]", "1.99×", "50%"]
    flops = 6 * (12 * 2 * 64**2 + 100 * 64) + 12 * 2 * 64 * 32  # per token
    assert last[8:] == [f"{1280 * flops / 1e11:.0%}", "4.0e-05"]


def test_why_sums_to_its_step_and_advises_what_is_worth_it():
    table, *_, advice = tables.blocks(why())
    assert table.rows[-1] == ["step", "100.0", "100.0%", "60.0", "1.7×", "4.0", "400"]
    assert "compile=True" in advice
    assert "88.0" in advice
    assert "x=1" not in advice
    assert "do not trust it" not in advice
    assert "do not trust it" in tables.what_next(why() | {"profiled_ms": 200.0})
    assert "Furthest from its floor: GEMM, 20.0 ms" in tables.what_next(why() | {"advice": []})


def test_verify_says_what_failed():
    text = tables.as_text(verify("FAILED: loss"))
    assert "0 passed, 1 FAILED, 1 skipped" in text
    assert "alone: compile=True: FAILED: loss." in text
    assert "not finite" in text
    assert "1 passed, 0 FAILED, 1 skipped" in tables.as_text(verify())


@pytest.mark.parametrize("result", ALL, ids=lambda r: r["kind"])
def test_every_kind_has_text_for_a_terminal(result):
    text = report.as_text(result)
    assert MACHINE["hardware"] in text
    assert "|" not in text.replace("|Δ loss|", "")


def test_torch_is_not_imported(root):
    code = "import sys, report; report.as_text; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


# ---- blocks and --check -----------------------------------------------------------------------------------------------


def test_what_was_written_passes_the_check(house, capsys):
    assert report.check(house) == []
    assert report.write(house) == []
    assert "README" not in capsys.readouterr().out.splitlines()[-1]  # nothing was stale
    text = (house / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# title\n")
    assert text.endswith("\nthe end\n")


def test_every_changed_number_of_a_block_is_found(house):
    """Any digit of any block, in the README and in a rung's page: the line names the document and the JSON."""
    for path in (house / "README.md", house / "docs" / "ladder" / "r03_compile.md"):
        text = path.read_text(encoding="utf-8")
        digits = [m.start() for b in report.BLOCK.finditer(text) for m in re.finditer(r"\d", text[b.start(4) : b.end(4)])]
        starts = [b.start(4) for b in report.BLOCK.finditer(text) for _ in re.finditer(r"\d", text[b.start(4) : b.end(4)])]
        places = [start + at for start, at in zip(starts, digits, strict=True)]
        for at in random.Random(0).sample(places, 25):
            path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :], encoding="utf-8")
            wrong = [line for line in report.check(house) if path.name in line]
            assert len(wrong) == 1
            assert "results/a-machine/" in wrong[0]
        path.write_text(text, encoding="utf-8")
    assert report.check(house) == []


@pytest.mark.parametrize("kind", ["ladder", "ablate", "why", "stages", "shakespeare", "sampling", "scale"])
def test_changed_json_is_found(house, kind):
    """In the README, in each plot that is drawn from it, and in the page."""
    path = house / "results" / "a-machine" / f"{kind}.json"
    result = json.loads(path.read_text(encoding="utf-8"))

    def double(value):
        if isinstance(value, dict):
            return {k: double(v) for k, v in value.items()}
        if isinstance(value, list):
            return [double(v) for v in value]
        return 2 * value if isinstance(value, float) else value

    path.write_text(json.dumps(double(result)), encoding="utf-8")
    wrong = "\n".join(report.check(house))
    assert f"README.md differs from results/a-machine/{kind}.json" in wrong
    assert "docs/index.html differs" in wrong
    for name, *_ in page.PLOTS.get(kind, []):
        assert f"docs/{name}-a-machine.svg" in wrong
    assert report.write(house) == []
    assert report.check(house) == []


def test_changed_page_and_missing_plot_are_found(house):
    html = house / "docs" / "index.html"
    text = html.read_text(encoding="utf-8")
    html.write_text(text.replace("1,280", "1,281"), encoding="utf-8")
    assert any("docs/index.html" in line for line in report.check(house))
    html.write_text(text, encoding="utf-8")
    (house / "docs" / "ladder-a-machine.svg").unlink()
    assert any("ladder-a-machine.svg" in line for line in report.check(house))


def test_missing_file_is_one_line_that_names_its_command(tmp_path, capsys):
    (tmp_path / "README.md").write_text(block("ladder.json") + block("ladder.json r00_fp32"), encoding="utf-8")
    for argv in ([], ["--check"]):
        with pytest.raises(SystemExit) as e:
            report.main(argv, tmp_path)
        assert e.value.code == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "type python bench.py ladder" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (block("ladder.json r99_nothing"), "there is no rung r99_nothing"),
        (block("verify.json rotary"), "no check in it names rotary"),
        (block("stages.json two"), "only a part of"),
        (block("broken.json"), "JSONDecodeError"),
        (block("other.json"), "'other' is none of"),
        ("<!-- begin results/a-machine/ladder.json -->\n| 1 |\n", "has no <!-- end -->"),
    ],
)
def test_block_that_cannot_be_made_is_an_error_and_stays(house, text, said):
    (house / "results" / "a-machine" / "broken.json").write_text('{"kind": ')
    put(house, {"kind": "other"})
    if "broken" not in text:
        (house / "results" / "a-machine" / "broken.json").unlink()
    (house / "README.md").write_text(text, encoding="utf-8")
    found = report.generated(text, "README.md", house)
    assert found[0] == text
    assert len(found[1]) == 1
    assert said in found[1][0]


def test_damaged_result_is_one_line(house, capsys):
    path = house / "results" / "a-machine" / "why.json"
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    with pytest.raises(SystemExit):
        report.main(["--check"], house)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "results/a-machine/why.json is damaged" in said


def test_every_rung_has_a_page_that_is_about_it(root):
    index = (root / "docs" / "ladder" / "README.md").read_text(encoding="utf-8")
    rungs = sorted(p.stem for p in (root / "config" / "ladder").glob("r*.py"))
    assert rungs == sorted(p.stem for p in (root / "docs" / "ladder").glob("r*.md"))
    for name in rungs:
        text = (root / "docs" / "ladder" / f"{name}.md").read_text(encoding="utf-8")
        assert f"]({name}.md)" in index
        assert [m[3].split() for m in report.BLOCK.finditer(text) if m[2].endswith("/ladder.json")] == [[name]]
        assert sum(m[2].endswith("/verify.json") for m in report.BLOCK.finditer(text)) == 1
        assert text.count("\n## ") == 5
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            assert (root / "docs" / "ladder" / link).resolve().exists(), link


def test_this_repository_is_in_step(root):
    if not (root / "results").is_dir():
        pytest.skip("nothing was measured yet")
    assert report.check(root) == []


def test_forgotten_end_does_not_swallow_what_follows(house):
    text = f"<!-- begin results/a-machine/ladder.json -->\nkeep this\n{block('why.json')}"
    fresh, errors = report.generated(text, "README.md", house)
    assert "keep this\n<!-- begin results/a-machine/why.json -->" in fresh
    assert "GEMM" in fresh
    assert len(errors) == 1


# ---- escaping ---------------------------------------------------------------------------------------------------------


def test_hostile_names_do_not_become_markup(house):
    result, sides = copy.deepcopy(ladder()), ab()
    result["rungs"][1]["skipped"] = result["machine"]["hardware"] = result["command"] = HOSTILE
    result["rungs"][2]["changes"] = {HOSTILE: [HOSTILE, 1]}
    sides["sides"][0]["config"] = HOSTILE
    put(house, result, sides, shakespeare(sample=HOSTILE), verify(status=f"FAILED: {HOSTILE}"))
    assert report.write(house) == []
    assert report.check(house) == []  # the blocks still end where they ended
    readme = (house / "README.md").read_text(encoding="utf-8")
    tables_only = re.sub(r"^    .*$", "", readme, flags=re.MULTILINE)  # indented: code, in which nothing is markup
    assert "<script" not in tables_only
    assert readme.count("<!-- end -->") == len(ALL)
    html = (house / "docs" / "index.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;script&gt;" in html


# ---- comparing --------------------------------------------------------------------------------------------------------


def noisy(seed: int, slower: float = 1.0, rounds: int = 3) -> dict:
    """A ladder whose rounds and steps scatter by half a percent."""
    r, result = random.Random(seed), ladder()
    for entry in tables.measured(result):
        factor = slower if entry["name"] == "r03_compile" else 1.0
        entry["step_s"] = [
            [0.1 * factor * f * r.gauss(1, 0.005) for _ in range(8)] for f in [r.gauss(1, 0.005) for _ in range(rounds)]
        ]
    return result


def verdict(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))


def test_a_regression_of_five_percent_is_told_from_noise():
    found = 0
    for seed in range(20):
        text, failed = report.compare(noisy(seed), noisy(1000 + seed, slower=1.05), 0.03)
        found += failed and "SLOWER by more than 0.03" in verdict(text, "r03_compile")
        assert "MACHINE" not in text
    assert found >= 18


def test_noise_is_called_a_difference_as_often_as_the_interval_says():
    """A 95% interval misses in one of twenty: of 400 comparisons of a ladder with itself, near 20 a rung; never by 3%."""
    slow = 0
    for seed in range(400):
        text, failed = report.compare(noisy(seed), noisy(1000 + seed), 0.03)
        assert not failed
        slow += "within" not in verdict(text, "r03_compile")
    assert slow <= 40


def test_compare_shows_what_was_compared_and_fails_without_a_limit_only_where_nothing_can_be():
    a, b = ladder(), ladder(factor=2.0)
    b["machine"] |= dict(torch="2.14", commit="fff0000", dirty=True)
    text, failed = report.compare(a, b)
    assert not failed
    for word in ("2.13", "2.14", "abc1234", "fff0000 + changes", "r00_fp32", "SLOWER", "1,280"):
        assert word in text
    assert report.compare(a, verify())[1]
    assert report.compare(verify(), verify())[1]


@pytest.mark.parametrize("change", ["missing", "machine", "sizes"])
def test_a_gate_fails_what_it_cannot_judge(change):
    a, b = noisy(0), noisy(1)
    if change == "missing":
        b["rungs"][2] = b["rungs"][1] | {"name": "r03_compile"}
    else:
        b[change][{"machine": "hardware", "sizes": "sequence_length"}[change]] = 64
    text, failed = report.compare(a, b, 0.5)
    assert failed
    assert {"missing": "not in B: r03_compile"}.get(change, "not measured alike") in text
    assert not report.compare(a, b)[1]


def test_one_round_is_compared_by_its_steps_and_says_so():
    text, failed = report.compare(noisy(0, rounds=1), noisy(1, slower=1.2, rounds=1), 0.03)
    assert failed
    assert "drift between rounds is unknown" in text


def test_a_spread_too_wide_to_judge_is_said():
    a, b = ladder(), ladder()
    a["rungs"][2]["step_s"] = [[0.1], [0.2], [0.3]]
    text, failed = report.compare(a, b, 0.03)
    assert not failed
    assert "Too noisy to see a loss of 0.03: r03_compile" in text


# ---- the curves of a run ----------------------------------------------------------------------------------------------


def lines_drawn(monkeypatch, folder) -> dict[str, list[tuple]]:
    """{label: points} of what report.py draws of a run."""
    drawn = {}
    plt = page.pyplot()
    monkeypatch.setattr(
        plt,
        "close",
        lambda figure: drawn.update({x.get_label(): [*zip(*x.get_data(), strict=True)] for x in figure.axes[0].lines}),
    )
    assert report.draw_run(folder) == []
    return drawn


def test_curves_of_a_resumed_run_that_was_killed_while_writing(tmp_path, monkeypatch, capsys):
    """Step 2 was done twice: the later record counts. Half a line lies in the middle (resumed behind it) and one at the end."""
    records = ['{"config": {}}', '{"step": 1, "loss": 5.0}', '{"step": 2, "loss": 9.0}', '{"step": 2, "val_loss": 4.5}']
    records += [
        '{"step": 3, "lo{"event": "resume"}',
        '{"step": 2, "loss": 4.0}',
        '{"step": 3, "loss": null}',
        '{"step": 4, "loss": 3.0}',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(records) + '\n{"step": 5, "loss": 2.', encoding="utf-8")
    drawn = lines_drawn(monkeypatch, tmp_path)
    assert drawn == {"training": [(1, 5.0), (2, 4.0), (4, 3.0)], "validation": [(2, 4.5)]}
    assert "2 damaged line(s)" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", '{"config": {}}\n'])
def test_run_without_a_loss_is_one_line(tmp_path, capsys, text):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    assert "holds no loss yet" in capsys.readouterr().err


def test_wrong_argument_is_one_line(capsys):
    with pytest.raises(SystemExit) as e:
        report.main(["out/nothing"])
    assert e.value.code == 2
    assert "type python report.py" in capsys.readouterr().err


# ---- the page ---------------------------------------------------------------------------------------------------------


def test_page_holds_everything_and_asks_for_nothing(house):
    html = (house / "docs" / "index.html").read_text(encoding="utf-8")
    assert '<html lang="en">' in html
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    assert html.count("<svg") == html.count('role="img" aria-label="') == 6
    assert set(page.SECTIONS) >= set(tables.KINDS)
    shown = {json.loads(path.read_text(encoding="utf-8"))["kind"] for path in report.result_files(house)}
    assert len(shown) > 5
    for kind, (title, _) in page.SECTIONS.items():
        assert (f"<h3>{title}</h3>" in html) == (kind in shown)
    asks = re.findall(r"""(?:src|href|action|data)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import""", html)
    assert all(a.startswith(("#", "data:,")) or b.strip("\"'").startswith("#") for a, b in asks)


def test_same_numbers_give_the_same_plots(house):
    first = {p.name: p.read_bytes() for p in (house / "docs").glob("*.svg")}
    for path in (house / "docs").glob("*.svg"):
        path.unlink()
    report.write(house)
    assert {p.name: p.read_bytes() for p in (house / "docs").glob("*.svg")} == first


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no chromium on the PATH (Debian: apt install chromium): the page is not looked at")
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_page_in_a_browser(house, browser, width, scheme):
    """As wide as the window, in the asked scheme, readable, and without a request but for the page itself."""
    url = (house / "docs" / "index.html").as_uri()
    browser.show(url, width, scheme)
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.requests() == [url]
    assert browser.complaints() == []
    ground, text = (
        [int(n) for n in re.findall(r"\d+", browser.value(f"getComputedStyle(document.body).{name}"))[:3]]
        for name in ("backgroundColor", "color")
    )
    assert (sum(ground) > sum(text)) == (scheme == "light")
    assert abs(sum(ground) - sum(text)) > 3 * 150
    labels = browser.value("getComputedStyle(document.querySelector('svg text')).fill")
    assert [int(n) for n in re.findall(r"\d+", labels)[:3]] == text  # plots write in the page's colour
    assert browser.value("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 100)")
    assert browser.value("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == browser.value(
        "document.querySelectorAll('[id]').length"
    )
    picture = house / f"{width}{scheme}.png"
    browser.screenshot(picture)
    assert picture.stat().st_size > 20_000


def test_browser_sees_what_leaves_the_page(browser, tmp_path):
    """The test above could not fail otherwise: a page that loads something is caught."""
    path = tmp_path / "leaks.html"
    path.write_text('<img src="http://example.invalid/x.png"><div style="width: 900px">wide</div>', encoding="utf-8")
    browser.show(path.as_uri(), 360, "light")
    assert browser.requests() == [path.as_uri(), "http://example.invalid/x.png"]
    assert browser.value("document.documentElement.scrollWidth") > 360


def test_a_rung_that_learns_something_else_is_marked():
    """Within rounding it is a number, beyond it the row says so."""
    result = ladder()
    assert "TOO FAR" not in report.as_text(result)
    result["rungs"][2]["losses"] = [4.6, 4.5004]  # float32
    assert "TOO FAR" in report.as_text(result)
