"""preparing.py: what it counts, and that the yardstick is the fastest of tiktoken's ways."""

import io
import json

import pytest

from measure import preparing

TEXT = "The quick brown fox — jumps over the lazy dog.\n" * 60_000  # 2.9 MB: worker processes start


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("speed") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.mark.usefixtures("gpt2_files")
@pytest.mark.parametrize("call", preparing.CALLS)
def test_tiktoken_by_itself_encodes_the_same_text(path, call, capsys, monkeypatch):
    expected = len(preparing.GPT2Tokenizer().encode(TEXT))
    found = 0
    for share in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO("go\n"))
        preparing.raw(str(path), call, share, 2, 2)
        ready, answer = capsys.readouterr().out.splitlines()
        assert ready == "ready"
        found += json.loads(answer)["tokens"]
    assert found == expected


@pytest.mark.usefixtures("gpt2_files")
def test_the_whole_is_a_data_set_and_its_processes_are_counted(path, tmp_path, capsys):
    preparing.whole(str(path), str(tmp_path), 2)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert abs(found["tokens"] - len(preparing.GPT2Tokenizer().encode(TEXT))) <= 2  # the cut between train and val
    assert len(found["worker_peak_bytes"]) == 2
    assert found["cpu_s"] > 0
    assert (tmp_path / "speed" / "manifest.json").is_file()


def test_a_ratio_is_to_the_fastest_way_of_its_round():
    ways = {call: {"s": 2.0 + i, "cpu_s": 4.0, "tokens": 1000} for i, call in enumerate(preparing.CALLS)}
    timed = {"rounds": [ways | {"whole": {"s": 2.5, "cpu_s": 5.0, "tokens": 1000}}]}
    (found,) = preparing.ratios(timed)
    assert found["yardstick"] == next(iter(preparing.CALLS))
    assert found["tokens_per_s"] == pytest.approx(400)
    assert (found["wall"], found["cpu"]) == (pytest.approx(0.8), pytest.approx(0.8))
