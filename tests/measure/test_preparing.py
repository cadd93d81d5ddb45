"""preparing.py: every way encodes the same text, and the yardstick is the fastest of tiktoken's."""

import pytest

from measure import preparing
from tokenizer import GPT2Tokenizer

TEXT = "The quick brown fox — jumps over the lazy dog.\n" * 60_000  # 2.9 MB: worker processes start


@pytest.mark.slow
@pytest.mark.usefixtures("gpt2_files")
def test_every_way_encodes_the_same_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    result = preparing.measure(path, tmp_path, processes=2, rounds=1)
    expected = len(GPT2Tokenizer().encode(TEXT))
    (timed,) = result["rounds"]
    assert {call: timed[call]["tokens"] for call in preparing.CALLS} == dict.fromkeys(preparing.CALLS, expected)
    assert abs(timed["whole"]["tokens"] - expected) <= 2  # the cut between train and val
    assert len(timed["whole"]["worker_peak_bytes"]) == 2
    assert all(peak > 2**20 for peak in timed["whole"]["worker_peak_bytes"])
    assert timed["whole"]["cpu_s"] > 0
    assert all(learnt["bytes_per_token"]["own"] > 4 for (learnt,) in result["learnt"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt"]


def test_a_ratio_is_to_the_fastest_way_of_its_round():
    ways = {call: {"s": 2.0 + i, "cpu_s": 4.0, "tokens": 1000} for i, call in enumerate(preparing.CALLS)}
    timed = {"rounds": [ways | {"whole": {"s": 2.5, "cpu_s": 5.0, "tokens": 1000}}]}
    (found,) = preparing.ratios(timed)
    assert found["yardstick"] == next(iter(preparing.CALLS))
    assert found["tokens_per_s"] == pytest.approx(400)
    assert (found["wall"], found["cpu"]) == (pytest.approx(0.8), pytest.approx(0.8))
