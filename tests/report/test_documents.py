"""python -m report: --check finds every changed number, and results that nobody vouches for cannot inject markup."""

import copy
import random
import re

import pytest
from made_results import ALL, ab, block, ladder, put, shakespeare, verify

from report import __main__ as command
from report import documents, plots

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)> | [x](javascript:alert(3)) $\\frac$ <!-- end -->"


def test_what_was_written_passes_the_check(house, root, capsys):
    assert documents.check(house) == documents.write(house) == []
    assert "README" not in capsys.readouterr().out  # nothing was stale
    text = (house / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# title\n")
    assert text.endswith("\nthe end\n")
    assert documents.check(root) == []  # this repository


def test_links_and_commands_of_the_documents_lead_to_files_that_exist(root):
    """Of every command that a reader may copy: scripts, modules and config files."""
    commands = []
    for path in documents.documents(root):
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (path.parent / link).exists(), f"{path}: {link}"
        commands += re.findall(r"^    (?:python|torchrun) .*$|`python [^`]+`", text, re.MULTILINE)
    assert len(commands) > 50
    for line in (found.partition("#")[0] for found in commands):
        for found in re.findall(r"(?<= )(?:tests/|config/\S+/|config/)?\w+\.py\b", line):
            assert found in ("A.py", "B.py") or (root / found).is_file(), line
        for found in re.findall(r"python -m (\w[\w.]*)", line):
            assert any((root / (found.replace(".", "/") + end)).is_file() for end in (".py", "/__main__.py")), line


def test_every_changed_number_of_a_block_is_found(house):
    for path in (house / "README.md", house / "docs" / "ladder" / "r03_compile.md"):
        text = path.read_text(encoding="utf-8")
        spans = [b.span(4) for b in documents.BLOCK.finditer(text)]
        places = [m.start() for m in re.finditer(r"\d", text) if any(a <= m.start() < b for a, b in spans)]
        for at in random.Random(0).sample(places, 10):
            changed = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
            path.write_text(changed, encoding="utf-8")
            (wrong,) = [e for e in documents.check(house) if path.name in e]
            assert "results/a-machine/" in wrong
        path.write_text(text, encoding="utf-8")
    assert documents.check(house) == []


@pytest.mark.parametrize("kind", ["ladder", "why", "scale"])
def test_changed_json_is_found_and_a_missing_plot(house, kind):
    path = house / "results" / "a-machine" / f"{kind}.json"

    path.write_text(re.sub(r"\d+\.\d+", lambda number: f"{2 * float(number[0])}", path.read_text()))
    wrong = "\n".join(documents.check(house))
    assert f"README.md differs from results/a-machine/{kind}.json" in wrong
    assert "docs/index.html differs" in wrong
    for name, *_ in plots.PLOTS[kind]:
        assert f"docs/{name}-a-machine.svg" in wrong
        (house / "docs" / f"{name}-a-machine.svg").unlink()
        assert f"{name}-a-machine.svg" in "".join(documents.check(house))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (block("ladder.json r99_nothing"), "there is no rung r99_nothing"),
        (block("verify.json rotary"), "no check in it names rotary"),
        (block("stages.json two"), "only a part of"),
        (block("shakespeare.json two"), "the only part of a run is numbers"),
        (block("other.json"), "'other' is none of"),
        ("<!-- begin results/a-machine/ladder.json -->\n| 1 |\n", "has no <!-- end -->"),
    ],
)
def test_block_that_cannot_be_made_is_an_error_and_stays_and_a_forgotten_end_swallows_nothing(house, text, message):
    put(house, {"kind": "other"})
    after = block("why.json")
    fresh, (error,) = documents.generated(f"{text}\n{after}", "README.md", house)
    assert fresh.startswith(f"{text}\n{after.partition(' -->')[0]}")
    assert "GEMM" in fresh
    assert message in error


@pytest.mark.parametrize(
    "content", ['{"kind": "why", ', "[]", "\xff", '{"kind": "why"}', '{"kind": []}', '{"kind": "ladder", "rungs": 3}']
)
def test_damaged_result_is_named_without_a_traceback(house, capsys, content):
    (house / "results" / "a-machine" / "why.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(SystemExit) as e:
        command.main(["--check"], house)
    assert e.value.code == 1
    errors = capsys.readouterr().err.splitlines()
    assert "results/a-machine/why.json is damaged" in errors[-1]
    assert all(line.startswith("error: ") for line in errors)


def test_hostile_names_do_not_become_markup(house):
    """In Markdown, in the page and in plots; $ does not start a formula, and the blocks still end where they ended."""
    result, sides = copy.deepcopy(ladder()), ab()
    result["rungs"][1]["skipped"] = result["machine"]["hardware"] = result["command"] = HOSTILE
    result["rungs"][2]["changes"] = {HOSTILE: [HOSTILE, 1]}
    sides["sides"][0]["config"] = HOSTILE
    put(house, result, sides, shakespeare(sample=HOSTILE), verify(status=f"FAILED: {HOSTILE}"))
    assert documents.write(house) == []
    assert documents.check(house) == []
    readme = (house / "README.md").read_text(encoding="utf-8")
    markup = re.sub(r"^    .*$", "", readme, flags=re.MULTILINE)  # indented: code, in which nothing is markup
    assert not any(found in markup for found in ("<script", "](javascript"))
    assert readme.count("<!-- end -->") == len(ALL)
    html = (house / "docs" / "index.html").read_text(encoding="utf-8")
    assert not any(found in html for found in ("<script", "<img"))
    assert "&lt;script&gt;" in html
    for svg in (house / "docs").glob("*.svg"):
        assert "<script" not in svg.read_text(encoding="utf-8")


def test_curves_of_a_resumed_run_that_was_killed_while_writing(tmp_path, monkeypatch, capsys):
    """Step 2 was done twice: the later record counts. Half a line lies in the middle (resumed behind it) and one at the end."""
    records = ['{"config": {}}', '{"step": 1, "loss": 5.0}', '{"step": 2, "loss": 9.0}', '{"step": 2, "val_loss": 4.5}']
    records += ['{"step": 3, "lo{"event": "resume"}', '{"step": 2, "loss": 4.0}', '{"step": 3, "loss": null}']
    records += ['{"step": 4, "loss": 3.0}', '{"step": 5, "loss": 2.']
    (tmp_path / "log.jsonl").write_text("\n".join(records), encoding="utf-8")
    figures, plain = [], plots.plot_log
    monkeypatch.setattr(plots, "plot_log", lambda *of: figures.append(plain(*of)) or figures[0])
    command.main([str(tmp_path)])
    drawn = {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in figures[0].axes[0].lines}
    assert drawn == {"training": [(1, 5.0), (2, 4.0), (4, 3.0)], "validation": [(2, 4.5)]}
    assert "2 damaged line(s)" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_result_and_a_folder_without_a_loss_are_one_line_each(tmp_path, capsys):
    (tmp_path / "README.md").write_text(block("ladder.json") + block("ladder.json r00_fp32"), encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("")
    for argv, status, message in (
        (["--check"], 1, "run python bench.py ladder"),
        ([str(tmp_path / "run")], 2, "holds no loss yet"),
        ([str(tmp_path)], 2, "use python -m report"),
    ):
        with pytest.raises(SystemExit) as e:
            command.main(argv, tmp_path)
        assert e.value.code == status
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
