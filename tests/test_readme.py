"""README.md: its library snippet runs as it is printed, and its counts are true."""

import json
import re

import pytest

import train
from configurator import Config

NUMBERS = dict(nine=9, ten=10, eleven=11, twelve=12)


def test_the_library_snippet_runs(root, tiny_run, tmp_path, monkeypatch, capsys):
    """On a data set of milliseconds in place of config/shakespeare.py's; it trains, then continues a prompt."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    cfg = Config(**tiny_run, out_dir="out/shakespeare", curve="off")
    monkeypatch.setattr("config.shakespeare.config", cfg)
    monkeypatch.chdir(tmp_path)
    train.train(cfg)
    logged = re.search(r"step +1/6 \| loss ([\d.]+)", capsys.readouterr().out)[1]
    exec(compile(snippet.replace("ROMEO:", "the cat"), "README.md", "exec"), {})  # letters that the tiny alphabet has
    *steps, text = capsys.readouterr().out.split("\n", 3)
    assert [line.split()[0] for line in steps] == ["1", "2", "3"]
    assert float(steps[0].split()[1]) == pytest.approx(float(logged), abs=1e-4)
    assert text.startswith("the cat")
    assert len(text) > 100


def test_as_many_scripts_as_it_says(root):
    counted = re.search(r"in (\w+) readable Python scripts", (root / "README.md").read_text(encoding="utf-8"))[1]
    assert len(list(root.glob("*.py"))) == NUMBERS[counted]


@pytest.mark.parametrize("name", ["README.md", "Makefile", "docs/safety.md"])
def test_as_many_faults_as_were_caused(root, name):
    caused = json.loads((root / "results" / "faults.json").read_text(encoding="utf-8"))["faults"]
    assert set(re.findall(r"(?<![/\d])(\d+) faults", (root / name).read_text(encoding="utf-8"))) == {str(len(caused))}
