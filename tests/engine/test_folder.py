"""The folder of a run: what may go there, what is resumed from it, and saves that fail."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from runs import assert_same, contents, events, losses

import train
from base.errors import UserError
from engine import checkpoint, restore

pytestmark = pytest.mark.usefixtures("own_signals")


# ---- where a run goes -------------------------------------------------------------------------------------------------


def test_an_earlier_run_is_moved_aside_with_a_message(cfg, capsys):
    out = Path(cfg.out_dir)
    for number in range(3):
        train.train(replace(cfg, seed=number, max_steps=1))
        assert ("moved to" in capsys.readouterr().out) == (number > 0)
    seeds = [json.loads((p / "config.json").read_text())["seed"] for p in (out.with_name("run.1"), out.with_name("run.2"), out)]
    assert seeds == [0, 1, 2]


def test_a_folder_that_is_no_run_is_refused_and_left_alone(cfg, tmp_path):
    out = Path(cfg.out_dir)
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for place, message in ((out, "not a run: use --out_dir"), (out / "thesis.txt" / "run", "cannot write to out_dir")):
        with pytest.raises(UserError, match=message):
            train.train(replace(cfg, out_dir=str(place)))
    assert contents(out) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 1, "resume": True}, r"trained with n_layer=2, not 1, which cannot change"),
        ({"tie_weights": False, "resume": True}, r"tie_weights=True"),
        ({"wandb": "online"}, "pip install wandb"),
        ({"wandb": "online", "resume": True}, "pip install wandb"),
    ],
)
def test_a_run_that_is_refused_leaves_the_earlier_one_as_it_was(cfg, monkeypatch, changes, message):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    train.train(cfg)
    before = contents(Path(cfg.out_dir).parent)
    with pytest.raises(UserError, match=message):
        train.train(replace(cfg, **changes))
    assert contents(Path(cfg.out_dir).parent) == before


def test_resuming_nothing_is_refused_and_does_not_block_a_fresh_start(cfg, capsys):
    """The runs beside it are listed."""
    with pytest.raises(UserError, match="has no checkpoint"):
        train.train(replace(cfg, resume=True))
    train.train(cfg)
    assert max(losses(cfg)) == 6
    capsys.readouterr()
    with pytest.raises(UserError, match="or use one of the runs listed above"):
        train.train(replace(cfg, resume=True, out_dir=f"{cfg.out_dir}_misspelt"))
    assert f"  {cfg.out_dir}  step 6, val_loss " in capsys.readouterr().out


def test_a_checkpoint_keeps_what_an_empty_prompt_begins_with(cfg, monkeypatch):
    """A line break here, unlike the tokenizer's own answer."""
    monkeypatch.setattr("corpus.shards.start_of", lambda tokenizer, train: 3)
    train.train(cfg)
    assert restore.load_model(cfg.out_dir)[1].start == 3


def test_other_data_is_refused_on_resuming(cfg, tmp_path, text):
    import prepare_data

    train.train(cfg)
    (tmp_path / "tiny.txt").write_text(text[::-1])
    prepare_data.main([str(tmp_path / "tiny.txt"), "--tokenizer=char", f"--data_dir={tmp_path}"])
    with pytest.raises(UserError, match="has changed since"):
        train.train(replace(cfg, resume=True, data_dir=str(tmp_path)))


def test_a_run_can_resume_in_another_precision(cfg, capsys):
    train.train(replace(cfg, dtype="bfloat16"))
    for number, dtype in enumerate(("float32", "float16", "float32"), 4):
        train.train(replace(cfg, dtype=dtype, resume=True, max_steps=2 * number))
        assert max(losses(cfg)) == 2 * number
        assert f"resuming with dtype = '{dtype}'" in capsys.readouterr().out


@pytest.mark.parametrize("resume", [True, "auto"])
def test_what_a_killed_save_left_is_put_right_on_resuming(cfg, resume):
    """What is half written goes; what was moved aside comes back, unless there is a new one. Nothing else is touched."""
    train.train(replace(cfg, max_steps=3))
    out = Path(cfg.out_dir)
    left = (".writing_step_00000006", ".writing_crash_00000003", ".removing_step_00000001")
    for name in (*left, ".replaced_step_00000002", ".replaced_step_00000003", "crash_00000001"):
        shutil.copytree(out / "step_00000003", out / name)
    (out / ".replaced_step_00000003" / "old").touch()
    train.train(replace(cfg, resume=resume, keep_checkpoints=9))
    there = ["crash_00000001", "step_00000002", "step_00000003", "step_00000006"]
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == there
    assert not (out / "step_00000003" / "old").exists()


# ---- saves that fail --------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """The checkpoint of step 4 cannot be written."""
    plain = checkpoint.write_config

    def write_config(folder, cfg):
        if "00000004" in folder.name:
            raise OSError(28, "No space left on device")
        plain(folder, cfg)

    monkeypatch.setattr(checkpoint, "write_config", write_config)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_fails_is_a_warning_and_training_continues(cfg, uninterrupted, capsys, background):
    cfg = replace(cfg, checkpoint_interval=2, eval_interval=6, background_save=background)
    train.train(cfg)
    output = capsys.readouterr()
    assert re.search(r"WARNING: cannot save .*No space left on device.*; training continues", output.err)
    assert [c.name for c in checkpoint.candidates(Path(cfg.out_dir))] == ["step_00000006", "step_00000002"]
    assert ["No space left" in r["reason"] for r in events(cfg, "save_failed")] == [True]
    saved = events(cfg, "saved")
    assert [r["step_done"] for r in saved] == [2, 6]
    assert all(r["save_ms"] > 0 and f"saved {cfg.out_dir}/step_{r['step_done']:08d} in " in output.out for r in saved)
    assert_same(cfg, uninterrupted)
