"""evaluate.py against slow references: one row or sequence at a time, and counts by hand."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from runs import records
from trained import build

import evaluate
import train
from base.errors import UserError
from configurator import Config, GPTConfig
from corpus import bpe
from corpus.hellaswag import Row, encode_row, load_rows
from corpus.shards import TokenStream
from engine import restore
from engine import run as training
from evaluate import hellaswag, score_rows, validation
from model import GPT
from report import kinds
from tokenizer import CharTokenizer

CPU = torch.device("cpu")
LETTERS = CharTokenizer.train("abcdefghijklmnopqrstuvwxyz .,ž🙂\n")
OWN = bpe.train(["the cat sat on the mat. žluť 🙂 the dog ran after the cat. " * 3], 300)


def random_model(cfg: GPTConfig) -> GPT:
    """Random weights, large enough that an ending's score depends on its context."""
    return build(replace(cfg, init="pytorch"))


def made_up(count: int, seed: int = 0) -> list[Row]:
    """Questions of random words: contexts of 1 to 9 words, endings of 1 to 6."""
    random = np.random.default_rng(seed)
    words = ["the", "cat", "sat", "on", "a", "mat,", "and", "ran", "after", "its", "tail", "fell."]  # as in the tiny run's text

    def text(most: int) -> str:
        return " ".join(random.choice(words, random.integers(1, most + 1)))

    return [Row(text(9), tuple(text(6) for _ in range(4)), int(random.integers(4))) for _ in range(count)]


# ---- HellaSwag: scores and answers


@torch.inference_mode()
def by_definition(model, tokenizer, rows: list[Row]) -> tuple[torch.Tensor, dict]:
    """(score of each ending, what hellaswag() should say): one sequence at a time, no padding, no cache, sums in float64."""
    scores, best, best_norm = [], [], []
    for row in rows:
        context, totals, means = tokenizer.encode(row.context), [], []
        for ending in row.endings:
            ids = tokenizer.encode(" " + ending)
            logits = model(torch.tensor([context + ids]))[0, len(context) - 1 : -1]
            log_p = logits.double().log_softmax(-1)
            totals.append(sum(log_p[k, token].item() for k, token in enumerate(ids)))
            means.append(totals[-1] / len(ids))
        scores.append(totals)
        best.append(totals.index(max(totals)))
        best_norm.append(means.index(max(means)))
    assert best != best_norm  # the two ways of counting are told apart
    acc, acc_norm = (sum(b == row.label for b, row in zip(found, rows, strict=True)) / len(rows) for found in (best, best_norm))
    return torch.tensor(scores, dtype=torch.float64), {"acc": acc, "acc_norm": acc_norm, "rows": len(rows), "cut": 0}


def encoded(model: GPT, tokenizer, rows: list[Row]) -> list[tuple]:
    return [encode_row(row, tokenizer, model.cfg.block_size) for row in rows]


@pytest.mark.parametrize("changes", [{}, dict(vocab_multiple=64), dict(attention="naive")], ids=str)
@pytest.mark.parametrize("tokenizer", [LETTERS, OWN], ids=["char", "bpe"])
def test_scores_are_the_definitions_whatever_the_batch(tiny, tokenizer, changes):
    model = random_model(tiny(vocab_size=tokenizer.vocab_size, block_size=128, **changes))
    rows = made_up(40)
    scores, answers = by_definition(model, tokenizer, rows)
    assert scores.std() > 10
    for size in (1, 300):
        found = score_rows(model, encoded(model, tokenizer, rows), batch_tokens=size)
        torch.testing.assert_close(found, scores, rtol=0, atol=1e-4)
        assert hellaswag(model, tokenizer, rows, batch_tokens=size) == answers


def test_reduced_precision_is_near_and_float64_is_exact(tiny):
    """float64 used to be rounded to float32 before the softmax."""
    model, rows = random_model(tiny(vocab_size=OWN.vocab_size, block_size=128)).double(), made_up(20)
    pairs, (exact, _) = encoded(model, OWN, rows), by_definition(model, OWN, rows)
    torch.testing.assert_close(score_rows(model, pairs, batch_tokens=500), exact, rtol=1e-12, atol=0)
    near = score_rows(model.float(), pairs, batch_tokens=500, autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    assert not torch.allclose(near, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(near, exact, rtol=0.02, atol=0.5)
    torch.testing.assert_close(score_rows(model.bfloat16(), pairs, batch_tokens=500), exact, rtol=0.02, atol=0.5)


def test_a_model_that_is_not_finite_gets_no_score_and_a_block_of_one_is_refused(tiny):
    model = random_model(tiny(vocab_size=OWN.vocab_size, block_size=128))
    model.transformer.ln_f.weight.data[0] = math.nan
    found = hellaswag(model, OWN, made_up(3), batch_tokens=500)
    assert math.isnan(found["acc"])
    assert math.isnan(found["acc_norm"])
    assert found["cut"] == 0
    short, shortest = (random_model(tiny(vocab_size=OWN.vocab_size, block_size=size)) for size in (7, 1))
    assert hellaswag(short, OWN, made_up(20), batch_tokens=100)["cut"] > 0
    with pytest.raises(UserError, match="block_size=1"):
        hellaswag(shortest, OWN, made_up(1), batch_tokens=10)


def in_a_group(cfg: Config, rows: list[Row]) -> tuple[torch.Tensor, dict, dict]:
    run = training.build(cfg)
    tokenizer, how = run.dataset.tokenizer, dict(world=run.world, autocast=run.autocast)
    pairs = encoded(run.model, tokenizer, rows)
    several, one = (score_rows(run.model, part, batch_tokens=150, **how) for part in (pairs, pairs[:1]))
    answers = hellaswag(run.model, tokenizer, rows, batch_tokens=150, **how)
    sizes = dict(tokens=9 * 32, T=32, batch_size=4, device=run.device)
    loss = validation(run.compiled, run.dataset.split("val"), tokenizer, **sizes, **how)
    assert run.model.training  # as build() left it
    run.close()
    return torch.cat((several, one)), answers, loss


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_answer_as_one(tiny_run, tmp_path, engine):
    """Over gloo, with whole and with sharded weights, which need all processes in each pass; also if one has no row."""
    cfg = Config(**tiny_run | dict(parallel=engine, init="pytorch", block_size=128, sequence_length=32))
    rows = made_up(20)
    alone = in_a_group(cfg, rows)
    for scores, answers, loss in ranks.run(2, tmp_path / "ranks", in_a_group, cfg, rows):
        assert torch.equal(scores, alone[0])
        assert answers == alone[1]
        assert loss == pytest.approx(alone[2], rel=1e-7)


def test_it_can_be_broken_off(tiny):
    model = random_model(tiny(vocab_size=OWN.vocab_size, block_size=128)).train()
    asked = iter([False, False, True])
    assert hellaswag(model, OWN, made_up(30), batch_tokens=100, broken_off=lambda: next(asked)) is None
    stream = TokenStream([np.zeros(100, dtype=np.uint16)])
    assert validation(model, stream, OWN, tokens=99, T=8, batch_size=1, device=CPU, broken_off=lambda: True) is None
    assert model.training


def test_compiled_blocks_run_as_they_are(tiny):
    """In a training run blocks may be compiled for one shape: others must not make them compile again and again."""
    model = random_model(tiny(vocab_size=OWN.vocab_size, block_size=128))
    for block in model.transformer.h:
        block.compile(backend=lambda *_: pytest.fail("compiled"))
    assert hellaswag(model, OWN, made_up(10), batch_tokens=100)["rows"] == 10


# ---- validation


@pytest.mark.parametrize(("T", "batch_size"), [(8, 1), (4, 3), (10, 100)])
def test_bits_per_byte_by_hand(tiny, T, batch_size):
    """log2 V bits for each token, over the bytes of the text behind the first; the end of a document has none."""
    texts = ["the cat sat. žluť 🙂", "the dog ran."]
    ids = [*OWN.encode(texts[0]), OWN.end_of_text, *OWN.encode(texts[1])]
    stream = TokenStream([np.array(ids, dtype=np.uint16)])
    sizes = dict(tokens=10**6, T=T, batch_size=batch_size, device=CPU)
    uniform = GPT(tiny(vocab_size=OWN.vocab_size))
    torch.nn.init.zeros_(uniform.transformer.ln_f.weight)  # all tokens are equally likely
    found = validation(uniform, stream, OWN, **sizes)
    size = sum(len(text.encode()) for text in texts) - len(OWN.decode_bytes(ids[:1]))
    assert (found["tokens"], found["bytes"]) == (len(ids) - 1, size)
    assert found["perplexity"] == pytest.approx(OWN.vocab_size, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(math.log2(OWN.vocab_size) * (len(ids) - 1) / size, rel=1e-6)
    stream = TokenStream([np.full(20, OWN.end_of_text, dtype=np.uint16)])  # which is no text
    assert math.isnan(validation(uniform, stream, OWN, **sizes)["bits_per_byte"])


@pytest.mark.parametrize(("T", "tokens"), [(32, 1), (32, 32), (32, 33), (8, 10**6)])
def test_validation_is_the_mean_over_the_first_targets_whatever_the_batch(tiny, T, tokens):
    """By definition: each sequence of T alone, log-softmax in float64. The standard error is how much the loss varies when as
    many sequences are drawn again, with replacement; one alone has none.
    """
    model = random_model(tiny(vocab_size=OWN.vocab_size))
    ids = torch.tensor(OWN.encode("the cat sat on the mat. žluť 🙂 the dog ran after the cat. " * 4 + "xyz 123 qqq. " * 9))
    ids = ids[: len(ids) // 32 * 32 + 4]  # the last sequence is shorter
    last = min(tokens, len(ids) - 1)
    rows = [ids[a : min(a + T, last) + 1] for a in range(0, last, T)]
    log_p = [model(row[None, :-1])[0].double().log_softmax(-1) for row in rows]
    nats = np.array([-p[torch.arange(len(p)), row[1:]].sum().item() for p, row in zip(log_p, rows, strict=True)])
    sizes = np.array([len(row) - 1 for row in rows])
    drawn = np.random.default_rng(0).integers(0, len(rows), (20_000, len(rows)))
    spread = (nats[drawn].sum(1) / sizes[drawn].sum(1)).std() * math.sqrt(len(rows) / max(1, len(rows) - 1))
    stream = TokenStream([ids.numpy().astype(np.uint16)])
    for batch_size in (1, 7):
        how = dict(tokens=tokens, T=T, batch_size=batch_size, device=CPU)
        found, plain = (validation(model, stream, OWN, **how, standard_error=asked) for asked in (True, False))
        assert found["loss"] == pytest.approx(nats.sum() / last, rel=1e-6)
        assert plain["loss"] == pytest.approx(nats.sum() / last, rel=1e-6)
        assert (found["tokens"], found["bytes"]) == (last, len(OWN.decode_bytes(ids[1 : last + 1].tolist())))
        assert found["sequences"] == len(rows)
        if len(rows) > 20:
            assert found["standard_error"] == pytest.approx(spread, rel=0.03)
        else:
            assert (found["standard_error"] is None) == (len(rows) == 1)


# ---- the command line

# Rows that the tiny run's alphabet can spell.
SPELLED = [Row("the cat", ("sat on a mat,", "ran", "fell.", "after the cat"), i % 4) for i in range(12)]


@pytest.fixture
def few_rows(monkeypatch):
    """SPELLED in place of the real rows; the list of the folders that they came from."""
    folders = []
    for script in (evaluate, train):
        monkeypatch.setattr(script, "load_rows", lambda where, count, _: folders.append(where) or SPELLED[: count or 99])
    return folders


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_run_is_measured_on_what_it_validated_on_and_report_shows_it(own_run, capsys):
    val_loss = [r["val_loss"] for r in records(Config(out_dir=own_run)) if "val_loss" in r][-1]
    evaluate.main([own_run, "--device=cpu"])
    shown = last_line(capsys)
    assert shown["val_loss"] == pytest.approx(val_loss, rel=1e-5)
    assert (shown["step"], shown["dataset"], shown["tokens"]) == (6, "tiny", 1000)
    evaluate.main([f"{own_run}/step_00000006", "--device=cpu", "--tokens=64", "--sequence_length=16"])
    assert last_line(capsys)["tokens"] == 64
    first, second = (json.loads(line) for line in Path(own_run, "eval.jsonl").read_text().splitlines())
    assert first["validation"]["loss"] == pytest.approx(val_loss, rel=1e-6)
    assert second["settings"]["tokens"] == 64
    assert second["validation"]["sequence_length"] == 16
    assert {"kind", "date", "command", "machine", "processes", "parameters"} <= first.keys()
    first["hellaswag"] = {"acc": 0.2859, "acc_norm": 0.2955, "rows": 10_042, "cut": 3, "seconds": 61.0}
    text, found = kinds.as_text(first), first.pop("validation")
    shown = [f"{found['loss']:.4f}", f"± {found['standard_error']:.4f}", "28.59%", "29.55%", "10,042"]
    shown += [f"± one standard error over the {found['sequences']} sequences", "rows_cut: 3 rows are longer than the model's"]
    assert [words for words in shown if words not in text] == []
    assert "bits" not in kinds.as_markdown(first)


def test_training_scores_the_rows_of_its_own_data_folder(tiny_run, tmp_path, few_rows):
    """As evaluate.py scores the checkpoint of that step."""
    steps = dict(max_steps=4, hellaswag_interval=2, hellaswag_rows=9, curve="off", out_dir=str(tmp_path / "run"))
    cfg = Config(**tiny_run | steps)
    train.train(cfg)
    scored = [r for r in records(cfg) if "hellaswag" in r]
    assert [r["step"] for r in scored] == [2, 4]
    assert few_rows == [tiny_run["data_dir"]]
    expected = hellaswag(*restore.load_model(str(tmp_path / "run")), SPELLED[:9], batch_tokens=128)
    assert (scored[-1]["hellaswag"], scored[-1]["hellaswag_norm"]) == (expected["acc"], expected["acc_norm"])


def test_hellaswag_from_the_command_line(own_run, prepared, few_rows, tmp_path, capsys):
    path = tmp_path / "new" / "evaluate.json"
    evaluate.main([own_run, "--hellaswag", "--rows=8", f"--out={path}", "--device=cpu", "--dtype=bfloat16"])
    shown, record = last_line(capsys), json.loads(path.read_text())
    assert shown["rows"] == record["hellaswag"]["rows"] == 8
    assert "val_loss" not in shown
    assert "validation" not in record
    assert not Path(own_run, "eval.jsonl").exists()
    evaluate.main([own_run, "--hellaswag", "--dataset=tiny", f"--data_dir={prepared}", f"--out={path}", "--device=cpu"])
    assert {"val_loss", "hellaswag_acc", "hellaswag_acc_norm"} <= last_line(capsys).keys()
    assert json.loads(path.read_text()).keys() > {"validation", "hellaswag"}
    assert few_rows == ["data", str(prepared)]  # it used to be data/ whatever --data_dir was


def test_two_processes_say_what_one_says(own_run, prepared, tmp_path):
    argv = [own_run, "--device=cpu", "--tokens=900", "--batch_size=2"]
    evaluate.main([*argv, f"--out={tmp_path}/one.json"])
    ranks.run(2, tmp_path / "ranks", evaluate.main, [*argv, f"--out={tmp_path}/two.json"])
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("loss", "standard_error", "perplexity", "bits_per_byte", "tokens", "bytes", "sequences"):
        assert two["validation"][name] == pytest.approx(one["validation"][name], rel=1e-12)
    printed = [(tmp_path / "ranks" / f"{n}.out").read_text() for n in (0, 1)]
    assert printed[0].count("val_loss") == 1
    assert printed[1] == ""


@pytest.mark.network
def test_the_real_weights_have_their_known_answer():
    """build-nanogpt's and llm.c's docstrings; they multiplied in TF32, which may turn a few of 10,042 rows."""
    if not torch.cuda.is_available():
        pytest.skip("HellaSwag's 10,042 rows take GPT-2 over an hour on a CPU: there run python evaluate.py gpt2 --hellaswag")
    try:
        rows, (model, tokenizer) = load_rows("data"), restore.load_model("gpt2")
    except UserError as e:
        pytest.skip(f"HellaSwag's known answer is not tested here: {e}")
    found = hellaswag(model.cuda().eval(), tokenizer, rows, batch_tokens=16_384)
    assert found["acc"] == pytest.approx(0.2859, abs=5e-4)
    assert found["acc_norm"] == pytest.approx(0.2955, abs=5e-4)
