"""What a user mistypes ends as one line that says what to do: exit status 2, no traceback."""

import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from trained import save_run

import configurator
import evaluate
import export
import prepare_data
import sample
import train
from base import errors
from base.errors import UserError
from configurator import GPTConfig
from engine import restore
from engine.pretrained import save_hf_dir
from model import GPT
from tokenizer import CharTokenizer

SCRIPTS = (train, sample, prepare_data, evaluate, export)
MAINS = {f"{script.__name__}.py": script.main for script in SCRIPTS}
TINY = "TINY"  # stands for the flags of the tiny run

# (script, arguments, what the line must say); {new} is an empty folder, {data} holds "tiny", {run} is finished
WRONG = [
    ("train.py", ["--batchsize=4"], "did you mean batch_size"),
    ("train.py", ["config/shakespear.py"], "did you mean config/shakespeare.py"),
    ("train.py", ["{tmp}/missing.py"], "there is no config file"),
    ("train.py", ["{tmp}/typo.py"], "line 3: batch_sise is not a setting: did you mean batch_size"),
    ("train.py", ["config/shakespeare.py", "config/stages/s2_overfit.py"], "one argument too many"),
    ("train.py", [TINY, "--dataset=missing"], "prepare_data.py"),
    ("train.py", [TINY, "--dataset=shakspeare"], "did you mean shakespeare"),
    ("train.py", [TINY, "--vocab_size=50257"], "use --vocab_size=18"),
    ("train.py", [TINY, "--block_size=30000", "--tokens_per_step=30000"], "use --sequence_length="),
    ("train.py", [TINY, "--data_dir={tmp}", "--dataset=damaged"], "train_000000.bin is damaged"),
    ("train.py", [TINY, "--resume", "--out_dir={tmp}/nothing"], "has no checkpoint"),
    ("train.py", [TINY, "--out_dir={tmp}/file/run"], "use --out_dir="),
    ("train.py", [TINY, "--seed=99999999999999999999"], "seed"),
    ("train.py", [TINY, "--n_embd=10000000"], "memory"),
    ("train.py", [TINY, "--device=cuda"], "use --device=auto"),
    ("sample.py", [], "which model?"),
    ("sample.py", ["out/missing"], "not a run, a checkpoint or a model folder"),
    ("sample.py", ["{new}"], "has no checkpoint"),
    ("sample.py", ["{tmp}/hf65"], "65 ids"),
    ("sample.py", ["out/run", "To", "be,"], "use python sample.py out/run --prompt 'To be,'"),
    ("sample.py", ["{run}", "--top_p=0"], "(0, 1]"),
    ("sample.py", ["{run}", "--temperature=-1"], "at least 0"),
    ("sample.py", ["{run}", "--prompt=a", "--prompt_file=b"], "exclude each other"),
    ("sample.py", ["{run}", "--prompt_file={tmp}/missing.txt"], "prompt_file"),
    ("sample.py", ["{run}", "--prompt_file={tmp}/latin1.txt"], "not UTF-8 (byte 3)"),
    ("sample.py", ["{run}", "--prompt=aZ"], "'Z'"),
    ("sample.py", ["{run}", "--quantize=int8", "--dtype=float32"], "leave out --dtype=float32"),
    ("sample.py", ["{run}", "--quantize=int3", "--dtype=bfloat16"], "int4"),
    ("sample.py", ["{run}", "--draft=out/x", "--num_samples=2"], "use --num_samples=1"),
    ("sample.py", ["{run}", "--draft=out/x", "--kv_cache=False"], "leave out --kv_cache=False"),
    ("sample.py", ["{run}", "--draft={tmp}/three"], "different vocabularies"),
    ("sample.py", ["{run}", "--draft_tokens=2"], "use --draft="),
    ("train.py", [TINY, "--sdpa_backend=cudnn"], "use --sdpa_backend=any"),
    ("train.py", [TINY, "--compile=True", "--compile_mode=reduce-overhead"], "use --compile_mode=default"),
    ("train.py", [TINY, "--compile_mode=max-autotune-no-cudagraphs"], "needs --compile=True"),
    ("evaluate.py", [], "which model?"),
    ("evaluate.py", ["{run}", "{run}"], "which model?"),
    ("evaluate.py", ["gpt2", "--rows=3"], "needs --hellaswag"),
    ("evaluate.py", ["{run}", "--sequence_length=33"], "use --sequence_length=32"),
    ("evaluate.py", ["{run}", "--device=cpu", "--out={tmp}/file/x.json"], "cannot write"),
    ("evaluate.py", ["{tmp}/hf"], "use --dataset"),
    ("evaluate.py", ["{tmp}/three", "--dataset=tiny", "--data_dir={data}"], "tokens of char-"),
    ("evaluate.py", ["{tmp}/nan", "--dataset=tiny", "--data_dir={data}"], "not finite"),
    ("export.py", ["out/missing"], "use python export.py"),
    ("prepare_data.py", [], "which text?"),
    ("prepare_data.py", ["shakespear"], "did you mean shakespeare"),
    ("prepare_data.py", ["{tmp}/latin1.txt"], "iconv"),
    ("prepare_data.py", ["{data}/tiny.txt", "--val_fraction=1"], "between 0 and 1"),
    ("prepare_data.py", ["{data}/tiny.txt", "--name=../x"], "plain name"),
    ("prepare_data.py", ["{data}/tiny.txt", "--tokenizer=char", "--data_dir={tmp}/file"], "file"),
]


@pytest.fixture(scope="module")
def spoilt(prepared, finished, tmp_path_factory) -> Path:
    """The folder of what is wrong in the files that the arguments name."""
    folder = tmp_path_factory.mktemp("spoilt")
    shutil.copytree(prepared / "tiny", folder / "damaged")
    os.truncate(folder / "damaged" / "train_000000.bin", 1000)
    (folder / "typo.py").write_text("from configurator import Config\n\nconfig = Config(batch_sise=4)\n")
    (folder / "latin1.txt").write_bytes("café".encode("latin-1"))
    (folder / "file").write_text("")
    shape = dict(n_layer=1, n_head=1, n_embd=4, block_size=8)
    save_hf_dir(GPT(GPTConfig(**shape)), folder / "hf")
    save_hf_dir(GPT(GPTConfig(**shape, vocab_size=65)), folder / "hf65")
    save_run(folder / "three", GPT(GPTConfig(**shape, vocab_size=3)), CharTokenizer(["a", "b", "c"]))
    model, tokenizer = restore.load_model(finished)
    model.transformer.ln_f.bias.data[0] = math.nan
    save_run(folder / "nan", model, tokenizer)
    return folder


@pytest.fixture
def arguments(tmp_path, prepared, finished, spoilt, tiny_flags, root, monkeypatch):
    """arguments(list) -> the list with its placeholders filled in; the working folder is the repository's root."""
    monkeypatch.chdir(root)
    (tmp_path / "new").mkdir()
    places = dict(tmp=spoilt, new=tmp_path / "new", data=prepared, run=finished)

    def fill(argv: list[str]) -> list[str]:
        out = [] if "--resume" in argv or any("--out_dir" in a for a in argv) else [f"--out_dir={tmp_path}/run"]
        filled = [part for a in argv for part in ([*tiny_flags, *out] if a == TINY else [a])]
        return [a.format(**places) for a in filled]

    return fill


def is_one_line_with(word: str, status: int, err: str, begin: str = "error: ") -> None:
    assert status == 2
    assert err.count("\n") == 1, err
    assert err.startswith(begin)
    assert word in err


@pytest.mark.parametrize(("script", "argv", "word"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_a_wrong_command_is_one_line_with_its_remedy(arguments, capsys, monkeypatch, script, argv, word):
    """Through the same entry() that the scripts end with."""
    if "--device=cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(sys, "argv", [script, *arguments(argv)])
    with pytest.raises(SystemExit) as e:
        errors.entry(MAINS[script])
    is_one_line_with(word, e.value.code, capsys.readouterr().err)


def test_a_wrong_command_on_two_processes_is_found_before_any_waits(arguments, capsys, monkeypatch):
    """Each rank finds it by itself, and says which it is."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments([TINY, "--tokens_per_step=96"])])
    with pytest.raises(SystemExit) as e:
        errors.entry(train.main)
    is_one_line_with("use --tokens_per_step=128", e.value.code, capsys.readouterr().err, "[rank 1] error: ")


def test_the_runs_of_a_folder_are_listed_with_step_and_loss(finished, capsys):
    with pytest.raises(UserError, match="is a folder of runs"):
        sample.main([str(Path(finished).parent)])
    assert re.fullmatch(rf"  {finished}  step 6, val_loss \d\.\d{{4}}\n", capsys.readouterr().err)


def test_a_run_knows_its_own_settings_and_refuses_others_with_a_command_that_works(own_run, capsys):
    with pytest.raises(UserError) as e:
        train.main([own_run, "--n_layer=3", "--n_head=4", "--max_steps=7", "--log_interval=1"])
    said = str(e.value)
    assert "n_layer=2, not 3" in said
    assert "n_head=2, not 4" in said
    train.main(said.partition("use python train.py ")[2].split())
    assert "step      7/7" in capsys.readouterr().out
    train.main(["--resume", f"--out_dir={own_run}", "--max_steps=8"])
    assert "step      8/8" in capsys.readouterr().out


def test_a_finished_run_says_so_and_ends_with_three_texts_and_the_commands_that_come_next(own_run, capsys):
    train.main([own_run, "--sample_interval=7"])
    out = capsys.readouterr().out
    more = f"use --max_steps=… to train on: python train.py {own_run} --max_steps=12"
    assert out.splitlines()[-1] == f"{own_run} is finished at step 6; {more}"  # no text after it
    train.main([own_run, "--max_steps=8", "--sample_interval=7", "--sample_prompt=the cat"])
    out = capsys.readouterr().out
    assert out.count("sample | the cat") == 1 + 3
    sample.main([*shlex.split(out.partition("next: python sample.py ")[2].splitlines()[0]), "--max_new_tokens=3"])
    assert capsys.readouterr().out.startswith("the cat")
    train.main(shlex.split(out.rpartition("python train.py ")[2].splitlines()[0]))
    assert "step     16/16" in capsys.readouterr().out


def test_train_without_a_config_lists_them_and_each_data_set_has_a_run_of_its_own(capsys):
    with pytest.raises(UserError, match="give a config file or a run"):
        train.main([])
    assert "config/shakespeare.py " in capsys.readouterr().out
    assert configurator.load(["config/shakespeare.py"], "").out_dir == "out/shakespeare"
    assert configurator.load(["config/shakespeare.py", "--dataset=mine"], "").out_dir == "out/mine"


@pytest.mark.parametrize("script", MAINS)
def test_help_is_no_error(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as e:
        errors.entry(MAINS[script])
    shown = capsys.readouterr()
    assert not e.value.code
    assert shown.out.startswith(f"usage: {script}")
    assert any(f"--{flag} = " in shown.out for flag in ("seed", "tokenizer", "dataset", "to"))
    assert shown.err == ""


def test_a_reader_that_goes_away_is_no_error(run_script):
    """`python train.py --help | head -1`"""
    reader, writer = os.pipe()
    os.close(reader)
    done = run_script("prepare_data.py", "--help", capture_output=False, stdout=writer, stderr=-1)
    os.close(writer)
    assert "Traceback" not in done.stderr
