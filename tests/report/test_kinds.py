"""report: the numbers in the tables come out of the JSON, and the statistics are those of numpy and scipy."""

import copy
import json
import re
from collections import Counter

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from made_results import ALL, ab, ladder, rung, scale, shakespeare, verify, why

from base.files import ROOT
from report import kinds, render, results, stats

SOME = st.lists(st.floats(-100, 100).map(lambda v: round(v, 3)), min_size=2, max_size=12)


@given(SOME, SOME)
def test_intervals_are_the_values_that_a_t_test_does_not_reject(a, b):
    """At either end of the 95% interval p = 0.05: Student's for one sample, Welch's for two."""
    mean, low, high = stats.interval(a)
    assert mean == pytest.approx(np.mean(a), abs=1e-9)
    if np.std(a) > 1e-3:
        for end in (low, high):
            assert scipy.stats.ttest_1samp(a, end).pvalue == pytest.approx(0.05, rel=1e-4)
    middle, low, high = stats.difference(a, b)
    assert middle == pytest.approx(np.mean(b) - np.mean(a), abs=1e-9)
    if min(np.std(a), np.std(b)) > 0.1:
        for end in (low, high):
            moved = [v - end for v in b]
            assert scipy.stats.ttest_ind(a, moved, equal_var=False).pvalue == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("kind", ["ladder", "ablate", "sampling", "ab"])
def test_one_round_is_too_few_for_an_interval_and_says_so(kind, rounds):
    """It used to print [57.1, 57.1], and infinite ends for two configs."""
    result = copy.deepcopy(next(r for r in ALL if r["kind"] == kind))
    result["sizes"]["rounds"] = rounds
    for entry in [*result.get("rungs", []), *result.get("sides", [])]:
        for name in {"step_s", "losses"} & entry.keys() if kind == "ab" else {"step_s"} & entry.keys():
            entry[name] = entry[name][:rounds]
    for speeds in result.get("tokens_per_s", {}).values():
        speeds[rounds:] = []
    text = kinds.as_text(result)
    assert "inf" not in text
    assert ("No intervals: 1 " in text) == (rounds == 1)
    if rounds == 1:
        assert not re.search(r"\[([^],]*), \1\]|is faster|is lower", text)
    else:
        assert re.search(r"\[[-+.,\d]+, [-+.,\d]+\]", text)


def test_a_law_at_its_bound_has_no_interval_and_a_prediction_without_one_no_verdict():
    """It used to print E 0.00355 [0.000912, 0.000912], and "inside the 95% interval" of six models."""
    result = scale()
    result["fit"]["intervals"]["E"] = [0.9, 0.9]
    result["held_out"]["predicted"] |= dict(low=None, high=None)
    assert kinds.blocks(result)[1].rows[0][1] == "1"
    text = kinds.as_text(result)
    assert "No intervals: 4 models are too few" in text
    assert "95% interval" not in text.lower().replace("[95%]", "")


def test_numbers_of_the_ladders_table():
    """128 tokens in 200 and 100 ms; the row in between is skipped, so the last is compared with the first."""
    table, skipped, *_ = kinds.blocks(ladder())
    first, middle, last = table.rows
    assert first[:4] == ["plain fp32", "", "200 [199, 201]", "640"]
    assert middle[:3] == ["TF32", "fp32_precision ieee → tf32", "skipped"]
    assert skipped == "Skipped on this machine: TF32 (not here)."
    assert last[:2] == ["torch.compile", "compile False → True"]
    assert last[3:7] == ["1,280", "1.99× [1.99, 2.02]", "1.99×", "50%"]
    flops = 6 * (12 * 2 * 64**2 + 100 * 64) + 12 * 2 * 64 * 32  # per token
    assert last[8:] == [f"{1280 * flops / 1e11:.0%}", "4.0e-05"]
    (summary,) = kinds.blocks(ladder(), ["summary"])
    assert "**1.99× as fast** [1.99, 2.02] as plain fp32, 640 → 1,280 tokens/s" in summary


def test_skipped_rows_with_one_reason_share_a_line():
    result, why_not = ladder(), "x='y' was asked for, but 'z' is what runs: no such unit: {} --x=z"
    more = dict(name="r02", title="", versus="r01_tf32", changes={"fp32_precision": ["ieee", "bf16"]})
    result["rungs"][1]["skipped"] = why_not.format("type")
    result["rungs"].insert(2, more | {"skipped": why_not.format("use")})
    assert "Skipped on this machine: TF32, fp32 matmuls in bf16 (no such unit)." in kinds.as_text(result)


def test_the_gemm_rate_is_that_of_the_precision_and_a_row_is_named_after_what_changed():
    ceilings = dict(gemm_float32_flops=1.0, gemm_tf32_flops=2.0, gemm_bfloat16_flops=3.0)
    assert [results.gemm_rate("float32", how, ceilings) for how in ("ieee", "tf32", "bf16")] == [1.0, 2.0, 3.0]
    assert results.gemm_rate("float16", "tf32", ceilings) == 3.0
    assert results.gemm_rate("float32", "tf32", {}) is None
    changes = {"dtype": ["bfloat16", "float32"]}, {"batch_size": [4, 8]}, {"compile_mode": ["default", "max-autotune"]}
    rows = [rung("x", "x", change, [[1]], [1.0]) for change in changes]
    assert [results.label(row, "ablate") for row in rows[:1]] == ["without bf16 autocast"]
    assert [results.label(row, "candidates") for row in rows[1:]] == ["micro-batch 8", "compile_mode=max-autotune"]


def test_a_rung_that_learns_something_else_is_marked_and_mfu_shown_where_the_peak_is_known():
    result = ladder()
    assert not any(words in kinds.as_text(result) for words in ("TOO FAR", "MFU"))
    result["rungs"][2]["losses"] = [4.6, 4.5004]  # float32
    assert "TOO FAR" in kinds.as_text(result)
    result["ceilings"]["peak_flops"] = 1e12
    table = kinds.blocks(result)[0]
    assert "MFU" in table.head
    assert {len(row) for row in table.rows} == {len(table.head)}


def test_why_sums_to_its_step_and_advises_what_is_worth_it():
    table, *_, advice = kinds.blocks(why())
    assert table.rows[-1] == ["step", "100.0", "100.0%", "60.0", "1.7×", "4.0", "400"]
    assert "compile=True" in advice
    assert "88.0" in advice
    assert "x=1" not in advice
    assert "do not trust it" not in advice
    assert "do not trust it" in kinds.as_text(why() | {"profiled_ms": 200.0})
    assert "Furthest from its floor: GEMM, 20.0 ms" in kinds.as_text(why() | {"advice": []})


def test_what_failed_and_what_trains_differently_is_said_and_a_sample_can_be_left_out():
    text = kinds.as_text(verify("FAILED: loss"))
    assert "0 passed, 1 FAILED, 1 skipped" in text
    assert "alone: compile=True: FAILED: loss." in text
    assert "not finite" in text
    assert "1 passed, 0 FAILED, 1 skipped" in kinds.as_text(verify())
    result = ab()
    assert "do not train alike" not in kinds.as_text(result)
    result["changes"] = {"learning_rate": [1e-3, 5e-4], "compile": [False, True]}
    assert "do not train alike (learning_rate 0.001 → 0.0005):" in kinds.as_text(result)
    assert "ROMEO" in kinds.as_markdown(shakespeare())
    numbers = kinds.as_markdown(shakespeare(), ["numbers"])
    assert "ROMEO" not in numbers
    assert "| bits per byte, whole validation split | 2.250 | 2.150 | 2.200 | 0.071 |" in numbers


# Files from earlier versions included: what was measured stays readable.
RECORDED = [p for p in sorted((ROOT / "results").rglob("*.json")) if "kind" in json.loads(p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("result", [*map(results.load, RECORDED), *ALL], ids=lambda r: r["kind"])
def test_tables_fit_the_terminal(result, monkeypatch):
    """No line is longer, no word is lost, and each part begins with the rows' names. The ladder was 160 columns wide."""
    monkeypatch.setenv("COLUMNS", "80")
    assert "commit" in kinds.as_text(result)
    assert "| " not in kinds.as_text(result)  # no Markdown
    for table in (b for b in kinds.blocks(result) if isinstance(b, render.Table)):
        text = render.text([table])
        assert max(map(len, text.splitlines())) <= 80
        parts = len(re.findall("^-", text, re.MULTILINE))
        expected = Counter(" ".join(cell for row in [table.head, *table.rows] for cell in row).split())
        names = Counter(" ".join(row[0] for row in [table.head, *table.rows]).split())
        assert Counter(re.sub(r"^-[- ]*$", "", text, flags=re.MULTILINE).split()) == expected + Counter(
            {word: (parts - 1) * n for word, n in names.items()}
        )
