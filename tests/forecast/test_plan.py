"""plan.py: what it says of a run's memory, loss, time and disk against runs, and the flag of each refusal against itself."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from made_results import ladder
from torch._subclasses.fake_tensor import FakeTensorMode

import model
from base.errors import UserError
from configurator import Config, GPTConfig
from engine import machine
from forecast import cluster, plan
from model import GPT
from report import results

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]
CPU = dict(device="cpu", compile=False, fused_adamw=True, reuse_memory=False, compile_scope="model", dtype="float32")
SMALL = dict(n_layer=3, n_head=2, n_embd=64, block_size=64, vocab_size=500, batch_size=4, tokens_per_step=256)


def config(**changes) -> Config:
    """A small resolved config."""
    return Config(**CPU | SMALL | changes)


def parameters(cfg: Config) -> int:
    return sum(p.numel() for p in GPT(cfg).parameters())


# ---- against runs -----------------------------------------------------------------------------------------------------

# Activations outweigh the rest of the process, or come near it. In bf16 where the hardware multiplies it.
SIZES = dict(n_layer=4, n_head=6, n_embd=384, block_size=256, batch_size=16, tokens_per_step=16 * 256, max_steps=2)
DTYPE = machine.best_dtype(torch.device("cpu"))
RUNS = {
    "eager, naive attention, looped AdamW": dict(attention="naive", fused_adamw=False),
    "eager, accumulation, memory kept": dict(dtype=DTYPE, batch_size=8, reuse_memory=True),
    "compiled, accumulation, memory kept": dict(
        dtype=DTYPE, compile=True, reuse_memory=True, n_layer=3, tokens_per_step=2 * 16 * 256
    ),
}

MEASURE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import plan, train
from configurator import Config
imported = plan.held_now()
run, _ = run_module.build(Config(**json.loads(sys.argv[2])))
for step in range(run.cfg.max_steps):
    train.train_step(run, step)
print(json.dumps([imported, train.machine.memory_gib(run.device) * 2**30]))
"""


@pytest.fixture(scope="module")
def measured(prepared, tiny_run) -> dict[str, list[float]]:
    """{run: bytes that a fresh process held when it had imported train.py, and at the most in three steps}."""
    where = {name: tiny_run[name] for name in ("dataset", "data_dir", "vocab_size")}

    def measure(changes: dict) -> list[float]:
        cfg = Config(**CPU | SIZES | where | changes)
        command = [sys.executable, "-c", MEASURE, str(ROOT), json.dumps(asdict(cfg))]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    if reason := machine.why_no_compile(torch.device("cpu")):
        pytest.skip(f"no compiler: {reason}")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(measure, RUNS.values()), strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_predicted_peak_is_within_15_percent_of_a_run(name, measured, tiny_run):
    cfg = Config(**CPU | SIZES | dict(vocab_size=tiny_run["vocab_size"], background_save=False) | RUNS[name])
    imported, peak = measured[name]
    base = plan.program(cfg, int(imported))
    assert base < 0.7 * peak  # there is something to predict
    found = plan.memory(cfg, 1, base).peak
    print(f"{name}: predicted {found / MIB:.0f} MiB, measured {peak / MIB:.0f}, {found / peak - 1:+.1%}")
    assert found == pytest.approx(peak, rel=0.15)


def committed() -> list:
    """Runs of the 124M, whose peaks lie in results/."""
    found = []
    for path in sorted(ROOT.glob("results/*/ladder.json")):
        result = results.load(path)
        for e in results.measured(result) if result["machine"]["device"] == "cpu" else []:
            found.append(pytest.param(e, id=f"{path.parent.name} {e['name']}"))
    return found


@pytest.mark.parametrize("entry", committed())
def test_predicted_peak_is_within_15_percent_of_each_rung_of_the_ladder(entry, measured):
    cfg = replace(plan.known(entry["requested"]), background_save=False)
    imported = int(next(iter(measured.values()))[0])
    found = plan.memory(cfg, entry["effective"]["processes"], plan.program(cfg, imported)).peak
    assert found / plan.GIB == pytest.approx(entry["memory_gib"], rel=0.15)


@pytest.mark.parametrize("init", ["gpt2", "pytorch"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_at_step_0_is_that_of_a_model(init, tied):
    cfg = GPTConfig(n_layer=2, n_head=4, n_embd=512, block_size=64, vocab_size=2000, init=init, tie_weights=tied)
    torch.manual_seed(0)
    x, y = torch.randint(2000, (2, 16, 64))
    with torch.no_grad():
        found = GPT(cfg)(x, y).item()
    log, more = plan.expected_loss(cfg)
    assert more > 0.09
    assert found == pytest.approx(log + more, abs=0.05)


@pytest.mark.parametrize("changes", [{}, dict(tie_weights=False, vocab_multiple=128), dict(bias=False, n_layer=1)])
def test_parameters_are_counted_as_a_model_counts_them(changes):
    cfg = config(**changes)
    assert plan.parameters(cfg) == (parameters(cfg), GPT(cfg).n_params())


# ---- the ledger -------------------------------------------------------------------------------------------------------


def test_a_ledger_counts_what_lives_by_hand():
    ledger = plan.Ledger()
    with FakeTensorMode(), ledger:
        a = torch.empty(1000)  # 4,000 bytes
        b = a.view(10, 100)[3:]  # a view takes nothing
        c = a * 2  # 4,000 more
        del a
        d = torch.empty(500)  # a lives on behind b
        del b
        e = c.to(torch.bfloat16)  # 2,000
        del c, d, e
    assert [size for _, size in ledger.events] == [4000, 4000, 2000, -4000, 2000, -4000, -2000, -2000]
    assert max(itertools.accumulate(size for _, size in ledger.events)) == 10_000


def test_kinds_have_the_sizes_that_can_be_told_without_following_anything():
    cfg = config()
    found = plan.memory(cfg, 1, 0)
    P = parameters(cfg)
    tensors = len(list(GPT(cfg).parameters()))
    assert found.at_most["weights"] == found.at_most["gradients"] == 4 * P
    assert found.at_most["AdamW's moments"] == 8 * P + 4 * tensors  # and a counter each
    assert found.at_most["weights as {dtype}"] == 0
    assert found.training == sum(found.at_peak.values())
    assert all(found.at_peak[kind] <= size for kind, size in found.at_most.items())


def test_activations_are_those_of_the_formula_in_docs_scale():
    """36 C + 4 H + 16 bytes a token and layer in bf16 with the fused kernel. On top: what an operator passes on."""
    cfg = config(dtype="bfloat16", n_layer=6, n_embd=256, vocab_size=65, block_size=128, tokens_per_step=512)
    kept = cfg.batch_size * cluster.activation_bytes(cfg, cfg.T)
    assert kept < plan.memory(cfg, 1, 0).at_most["activations"] < 1.1 * kept


def test_matmul_weights_are_kept_in_16_bits():
    cfg = config(dtype="bfloat16")
    matmul = 12 * cfg.n_layer * cfg.n_embd**2 + cfg.padded_vocab_size * cfg.n_embd
    biases = cfg.n_layer * 9 * cfg.n_embd
    assert plan.memory(cfg, 1, 0).at_most["weights as {dtype}"] == 2 * (matmul + biases)


def live(**changes) -> int:
    """The most bytes of tensors that live together."""
    events = plan.trace(config(**changes), 1).of(2, [], 0)
    return max(itertools.accumulate(size for _, size in events))


def test_settings_take_and_save_memory_as_they_should():
    V, C, rows = 500, 64, 256
    long = dict(block_size=256, tokens_per_step=1024)
    assert live(**long, attention="naive") > live(**long, attention="blocked") > live(**long)
    assert live(tie_weights=False, tokens_per_step=64) - live(tokens_per_step=64) >= 4 * 4 * V * C * 0.7
    assert live(vocab_multiple=512) > live()
    assert live(dropout=0.1) > live()
    assert live(compile=True) < live() - 4 * V * rows
    assert live(dtype="bfloat16", vocab_size=5000) < live(vocab_size=5000)
    assert live(batch_size=2) < live(batch_size=4)
    assert live(batch_size=1) == live(batch_size=1, tokens_per_step=1024)  # two micro-steps stand for many


def test_compiled_gradients_of_a_later_micro_step_arrive_together():
    alone, added = (dict(batch_size=b, compile=True, tokens_per_step=128, vocab_size=5000, block_size=64) for b in (2, 1))
    eager = {n: live(**how | dict(compile=False)) for n, how in (("alone", alone), ("added", added))}
    P = parameters(config(vocab_size=5000))
    assert live(**added) > live(**alone | dict(batch_size=1, tokens_per_step=64)) + 3 * P
    assert eager["added"] < eager["alone"] + 5 * P


def test_a_later_step_finds_the_moments_and_leaves_nothing_more():
    found = plan.trace(config(), 1)
    held = [sum(size for _, size in found.of(steps, [], 0)) for steps in (1, 2, 5)]
    assert held[0] == held[1] == held[2]
    assert held[0] == pytest.approx(12 * parameters(config()), rel=0.01)  # weights and moments
    most = [max(itertools.accumulate(size for _, size in found.of(steps, [], 0))) for steps in (1, 2, 5)]
    assert most[0] < most[1] == most[2]


def test_following_changes_nothing_and_is_the_same_twice():
    before = F.dropout, model.naive_attention, dict(model.ATTENTION)
    seed = torch.get_rng_state()
    cfg = config(dropout=0.1, compile=True, attention="naive", dtype="bfloat16")
    first, again = plan.trace(cfg, 1), plan.trace(cfg, 1)
    assert first.events == again.events
    assert (F.dropout, model.naive_attention, dict(model.ATTENTION)) == before
    assert torch.equal(torch.get_rng_state(), seed)
    with pytest.raises(RuntimeError), plan.as_it_runs(cfg):
        raise RuntimeError
    assert (F.dropout, model.naive_attention, dict(model.ATTENTION)) == before
    assert not torch.cuda.is_initialized()


def test_a_gpus_kernels_keep_no_dropout_of_attention():
    how = dict(dropout=0.1, device="cuda", block_size=512, tokens_per_step=1024, batch_size=2)
    assert live(**how) < live(**how | dict(device="cpu")) - 2 * 2 * 512**2
    assert live(**how) < live(**how | dict(attention="naive"))


@pytest.mark.parametrize("parallel", ["ddp", "zero1", "fsdp"])
def test_processes_share_what_cluster_says(parallel):
    cfg = config(parallel=parallel, tokens_per_step=1024, background_save=False)
    one, four = plan.memory(replace(cfg, tokens_per_step=256), 1, 0), plan.memory(cfg, 4, 0)
    shared = cluster.state_bytes(cfg, parallel, 4) - cluster.state_bytes(cfg, "ddp", 4)
    assert four.at_peak.get("held by other processes", 0) == int(shared)
    assert (shared < 0) == (parallel != "ddp")
    if parallel == "ddp":  # buckets hold gradients all the time
        assert four.at_peak["gradients"] == 4 * parameters(cfg)
        assert four.training >= one.training


# ---- malloc -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not machine.set_reuse_memory(), reason="no glibc")
def test_a_heap_that_is_kept_has_holes():
    events = [(0, 100 * MIB), (1, 1000), (0, -100 * MIB), (2, 101 * MIB)]
    given = [(True, 201 * MIB), (False, 101 * MIB)]
    for keep, expected in given:
        found = plan.heap(config(reuse_memory=keep, compile=True), events)
        assert found == pytest.approx(max(expected, keep * 202 * MIB), rel=0.01)
    assert plan.heap(config(), [(0, 40 * MIB), (0, -40 * MIB), (1, 40 * MIB)]) == pytest.approx(40 * MIB, rel=0.01)


def test_without_glibc_what_lives_is_counted(monkeypatch):
    monkeypatch.setattr(plan.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "no mallinfo2"))
    assert plan.heap(config(), [(0, 100), (1, 50), (0, -100), (2, 20)]) == 150


# ---- saves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "checkpoint", "evaluate", "best"), [(10, 3, 4, True), (10, 3, 4, False), (12, 4, 6, True), (5, 9, 9, True)]
)
def test_saves_are_those_of_the_loop(steps, checkpoint, evaluate, best):
    cfg = config(max_steps=steps, checkpoint_interval=checkpoint, eval_interval=evaluate, keep_best=best)
    loop = [s for s in range(1, steps + 1) if s == steps or s % checkpoint == 0 or (best and s % evaluate == 0)]
    assert plan.saves(cfg) == len(loop)


def test_checkpoints_on_the_disk_are_as_many_as_a_run_leaves_and_writes(tmp_path):
    cfg = config(max_steps=50, checkpoint_interval=10, eval_interval=7, keep_checkpoints=2, out_dir=str(tmp_path / "a" / "b"))
    assert plan.check_disk(cfg, 1000, False)[:2] == (12_000, 4)
    assert plan.check_disk(replace(cfg, keep_best=False), 1000, False)[1] == 3
    assert plan.check_disk(replace(cfg, max_steps=10), 1000, False)[1] == 2
    assert plan.check_disk(replace(cfg, max_steps=5), 1000, False)[1] == 1


def test_a_copy_to_be_saved_is_counted_once_it_is_there():
    cfg = config(max_steps=100, eval_interval=100, checkpoint_interval=100)
    copies = 12 * parameters(cfg)
    last, early = plan.memory(cfg, 1, 0), plan.memory(replace(cfg, checkpoint_interval=10), 1, 0)
    assert last.at_most["copy to be saved"] == 0
    assert last.saving >= copies + copies
    assert early.at_peak["copy to be saved"] == copies
    assert early.saving == 0
    assert early.training > last.training
    none = plan.memory(replace(cfg, background_save=False), 1, 0)
    assert (none.saving, none.host, none.training) == (0, 0, last.training)
    gpu = plan.memory(replace(cfg, device="cuda"), 1, 0)
    assert (gpu.host, gpu.saving) == (copies, 0)


# ---- speed ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path) -> Path:
    """A ladder of two measured rungs on "A machine, 2 cores": 100 ms and 50 ms a step of 256 tokens."""
    result = ladder()
    slow, _, fast = result["rungs"]
    for rung, cfg, ms in ((slow, config(), 100), (fast, config(compile=True), 50)):
        rung |= dict(requested=asdict(cfg), step_s=[[ms / 1e3] * 3], first_step_s=[2.0, 3.0, 4.0])
    (tmp_path / "a-machine").mkdir()
    (tmp_path / "a-machine" / "ladder.json").write_text(json.dumps(result), encoding="utf-8")
    return tmp_path


HERE = "A machine, 2 cores"


def test_speed_is_that_of_the_nearest_result(results):
    found = plan.rate(config(), 1, HERE, results)
    assert found.tokens_per_s == pytest.approx(2560)
    assert (found.source, found.unlike) == ("measured: results/a-machine/ladder.json r00_fp32", ())
    found = plan.rate(config(compile=True), 1, HERE, results)
    assert (round(found.tokens_per_s), found.first_step_s) == (5120, 3.0)


def test_speed_of_other_sizes_is_scaled_by_flops_and_says_so(results):
    larger = config(n_layer=6)
    found = plan.rate(larger, 1, HERE, results)
    assert found.tokens_per_s == pytest.approx(2560 * config().flops_per_token(64) / larger.flops_per_token(64))
    assert re.fullmatch(r"scaled by FLOPs from \S+ r00_fp32", found.source)
    assert found.unlike == ("n_layer",)
    assert plan.rate(config(n_layer=60, n_embd=640), 1, HERE, results).source.startswith("a guess, by FLOPs")


def test_speed_is_not_taken_from_other_hardware(results):
    assert plan.rate(config(), 1, "Another machine, 2 cores", results).tokens_per_s is None
    assert plan.rate(config(), 1, None, results).tokens_per_s is None
    cfg = config(device="cuda")
    found = plan.rate(cfg, 2, "NVIDIA H200", results)
    assert found.tokens_per_s == pytest.approx(2 * 989e12 / cfg.flops_per_token(64))
    assert found.source.startswith("AT MOST")
    assert plan.rate(cfg, 1, "NVIDIA Nothing", results).tokens_per_s is None


def test_results_of_older_versions_are_read(results):
    path = results / "a-machine" / "ladder.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    slow, _, fast = result["rungs"]
    slow["requested"]["a_setting_that_went"] = 1
    del slow["requested"]["parallel"]
    fast["requested"]["attention"] = "a kernel that went"
    path.write_text(json.dumps(result), encoding="utf-8")
    found = plan.rate(config(compile=True), 1, HERE, results)
    assert found.source.endswith("r00_fp32")
    assert found.unlike == ("compile",)


VOCABULARY = 18  # of the text that tests learn from


# ---- refusals, and the page ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(prepared, tiny_run, tmp_path, monkeypatch):
    """run(free=…, **changes) -> the page of a small run on a CPU with so many bytes free."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def plan_it(free: int = 2**40, **changes) -> str:
        monkeypatch.setattr(machine, "free_memory", lambda: free)
        assert tiny_run["vocab_size"] == VOCABULARY
        cfg = Config(**tiny_run | dict(out_dir=str(tmp_path / "run"), eval_interval=100) | changes)
        return plan.plan(cfg, ROOT / "results", 0)

    return plan_it


def flags(message: str) -> dict:
    """What a message says to type, as settings."""
    found = re.findall(r"--(\w+)=([^\s,]+)", message.rpartition(": type ")[2])
    values = {"True": True, "False": False}
    return {name: values[v] if v in values else int(v) if v.isdigit() else v for name, v in found}


def need(page: str) -> int:
    return int(float(re.search(r"(?:predicted peak|while it saves) +([\d.]+)", page)[1]) * plan.GIB)


def test_too_large_a_batch_is_refused_with_the_largest_that_fits(run):
    how = dict(n_layer=2, n_embd=512, batch_size=64, tokens_per_step=64 * 32, background_save=False)
    cfg = config(**how | dict(block_size=32, vocab_size=VOCABULARY))
    base = plan.program(cfg, 0)
    free = plan.memory(replace(cfg, batch_size=16), 1, base).peak + 5 * MIB
    assert plan.memory(replace(cfg, batch_size=32), 1, base).peak > free
    with pytest.raises(UserError, match=r"micro-batches of 64 sequences take .* are free: type --batch_size=16$") as e:
        run(free=free, **how)
    assert "x 16 x 32" in run(free=free, **how | flags(str(e.value)))
    assert "x 16 x 32" in run(free=free, **how | dict(batch_size="auto"))


WIDE = dict(n_embd=256, n_layer=4)


@pytest.mark.parametrize(
    ("how", "mends"),
    [
        (dict(attention="naive", block_size=512, tokens_per_step=512), dict(attention="sdpa")),
        (dict(block_size=1024, tokens_per_step=1024), dict(dtype="bfloat16")),
        (WIDE | dict(max_steps=1, background_save=True), dict(background_save=False, dtype="bfloat16")),
        (dict(block_size=1024, tokens_per_step=1024, dtype="bfloat16"), dict(sequence_length=512)),
        (WIDE | dict(dtype="bfloat16"), dict(n_layer=2)),
        (WIDE | dict(dtype="bfloat16", n_layer=40), dict(n_layer=5, n_embd=32)),
    ],
)
def test_what_cannot_fit_is_refused_with_flags_that_mend_it(run, how, mends):
    how = dict(background_save=False, batch_size=1) | how
    small = config(**dict(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=VOCABULARY) | how | mends)
    free = plan.memory(small, 1, plan.program(small, 0)).peak + MIB // 4
    with pytest.raises(UserError) as e:
        run(free=free, **how)
    assert "\n" not in str(e.value)
    typed = flags(str(e.value))
    assert typed.keys() <= mends.keys() | {"batch_size"}, str(e.value)
    run(free=free, **how | typed)


def test_what_no_flag_mends_is_refused_all_the_same(run):
    with pytest.raises(UserError, match="no smaller form of this model fits"):
        run(free=50 * MIB)


def test_checkpoints_that_do_not_fit_on_the_disk_are_refused(run, monkeypatch):
    often = dict(max_steps=50, checkpoint_interval=5, keep_checkpoints=8)
    page = run(**often)
    assert "10 at a time x 12 bytes a parameter" in page
    usage = plan.shutil.disk_usage(ROOT)
    room = int(12 * plan.parameters(config(n_layer=2, n_embd=32, block_size=32, vocab_size=VOCABULARY))[0] * 6.5)  # for six
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage._replace(free=room))
    with pytest.raises(UserError, match=r"type --keep_checkpoints=4, or --out_dir=another/folder$"):
        run(**often)
    assert "6 at a time" in run(**often | dict(keep_checkpoints=4))
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(UserError, match=r"type --out_dir=another/folder, or make room$"):
        run(**often)
    monkeypatch.setattr(plan, "ask_for_gpu", lambda: None)
    assert "10 at a time" in run(**often | dict(device="cuda"))  # elsewhere, where there is another disk


def test_data_that_does_not_fit_the_model_is_refused_and_absent_data_only_told(run, tmp_path):
    with pytest.raises(UserError, match=r"type --vocab_size=\d+$"):
        run(vocab_size=1000)
    absent = {name: run(dataset=name, data_dir=str(tmp_path)) for name in ("shakespeare", "fineweb_edu")}
    assert re.search(r"data +\? .*: not here: python prepare_data.py shakespeare$", absent["shakespeare"], re.MULTILINE)
    assert re.search(r"data +18\.63 .*; not here: python prepare_data.py fineweb_edu$", absent["fineweb_edu"], re.MULTILINE)


def test_the_page_is_one_page_and_the_same_twice(run):
    page = run()
    assert page == run()
    lines = page.splitlines()
    assert len(lines) <= 40
    assert max(len(re.sub(r"/\S+", "a/folder", line)) for line in lines) <= 128
    for name in (
        "parameters",
        "FLOPs per token",
        "tokens per step",
        "loss at step 0",
        "weights",
        "gradients",
        "predicted peak",
    ):
        assert sum(line.startswith(f"  {name}") for line in lines) == 1, name
    assert "2 x 4 x 32 x 1: micro-steps x sequences x T x processes" in page
    assert "1,536 tokens" in page


def test_the_page_says_what_is_odd(run):
    assert "the learning rate never comes down" in run(warmup_steps=6, max_steps=6)
    assert "batch_size=3 does not divide a process's share of the step: 2 does" in run(batch_size=3)
    assert "not of random ones" in run(init_from="gpt2")
    assert "notes" not in run()


def test_a_gpu_is_planned_for_without_one(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    page = run(free=0, device="cuda", dtype="auto", compile="auto", reuse_memory="auto", processes=2, parallel="zero1")
    assert page.startswith("a GPU that is not here: cuda, bfloat16, sdpa attention, compiled by model, ")
    assert "2 processes, zero1" in page
    assert "held by other processes" in page
    assert not torch.cuda.is_initialized()


def test_a_gpu_that_is_here_is_asked_for_by_its_drivers_tool(run, monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771, 9.0'\necho 'NVIDIA H200, 143771, 9.0'\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    page = run(device="cuda", dtype="auto", compile="auto")
    assert page.startswith("NVIDIA H200: cuda, bfloat16")
    assert "of 140.40;" in page
    assert "AT MOST" in page
    tool.write_text("#!/bin/sh\necho 'Tesla T4, 100, 7.5'\n", encoding="utf-8")
    assert plan.ask_for_gpu() == ("Tesla T4", 100 * MIB, 7.5)
    assert "cuda, float16" in run(device="cuda", dtype="auto")
    with pytest.raises(UserError, match=r"0\.10 are free"):
        run(device="cuda", n_embd=512, n_layer=12)
    tool.write_text("#!/bin/sh\necho 'No devices were found'\n", encoding="utf-8")
    assert plan.ask_for_gpu() is None


# ---- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_page_or_one_line(run_script, tiny_flags, tmp_path):
    done = run_script("plan.py", *tiny_flags, "--plan", f"--out_dir={tmp_path / 'run'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "predicted peak" in done.stdout
    assert not (tmp_path / "run").exists()
    done = run_script("plan.py", *tiny_flags, "--n_layer=4000", "--n_embd=8192", f"--out_dir={tmp_path / 'run'}")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .* type --\w+.*\n", done.stderr)
    assert run_script("plan.py", *tiny_flags, env={"RANK": "1", "WORLD_SIZE": "2"}).stdout == ""


def test_expected_loss_of_the_124m_lies_where_public_figures_do():
    assert 10.8 < sum(plan.expected_loss(GPTConfig())) < 11.1
    assert plan.expected_loss(GPTConfig())[0] == pytest.approx(math.log(50257))
