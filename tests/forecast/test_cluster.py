"""forecast.cluster: its formulas against rings that are really gone round, what a step really keeps, and dice."""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_results import ladder

import train
from base.errors import UserError
from configurator import Config, GPTConfig
from forecast import cluster
from forecast.cluster import ENGINES, GPUS, NAMES, Assumptions, collective, state_bytes, step
from forecast.memory import follow
from model import GPT
from report import results

A = Assumptions()
PLAIN = replace(A, pipelined=False, tree=False)
FAST = 1e9 * A.nvlink_gb_s * A.nvlink_achieved, cluster.NVLINK_HOP
SLOW = 1e9 * A.network_gb_s * A.network_achieved, cluster.NETWORK_HOP
FLOPS = 4e14


def go_round(data: np.ndarray, rate: float, hop: float) -> float:
    """A ring all-reduce, done: every rank's row becomes the sum of all. Each number is a byte. Returns the seconds."""
    n = len(data)
    parts = data.reshape(n, n, -1)  # rank, part
    for k in range(2 * n - 2):  # reduce-scatter: rank r sends part r - k, and its neighbour adds it; then all-gather
        sent = [parts[r, (r - k) % n].copy() for r in range(n)]
        for r in range(n):
            parts[(r + 1) % n, (r - k) % n] = sent[r] + (parts[(r + 1) % n, (r - k) % n] if k < n - 1 else 0)
    return (2 * n - 2) * (data.shape[1] / n / rate + hop)


@pytest.mark.parametrize(("nodes", "local"), [(3, 4), (4, 2), (1, 4)])
def test_collective_by_node_takes_what_its_rings_take(nodes, local):
    """Inside each node, then each GPU's share between the nodes, one after the other. Inside, rings are counted as one."""
    share = 24 * nodes
    data = np.random.default_rng(0).random((nodes, local, local * share))
    total = data.sum((0, 1))
    inside, *_ = (go_round(node, *FAST) for node in data)  # all at the same time
    for j in range(local):
        mine = slice(j * share, (j + 1) * share)
        same = data[:, j, mine].copy()
        between = go_round(same, *SLOW)
        assert same == pytest.approx(np.tile(total[mine], (nodes, 1)))
    plain = replace(PLAIN, gpus_per_node=local)
    assert collective(plain, nodes * local, local * share, 2) == pytest.approx(inside + between)
    assert collective(plain, nodes * local, local * share, 1) == pytest.approx((inside + between) / 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_lies_between_its_bounds_and_one_gpu_sends_nothing(engine):
    for size, n in [(size, n) for size in NAMES for n in GPUS]:
        s = step(A, size, engine, n, FLOPS)
        expected, least, most = s.seconds()
        assert least <= expected * (1 + 1e-12) <= most * (1 + 1e-11)
        assert 0 <= s.exposed <= s.communication * (1 + 1e-12)
        assert s.tokens == s.micro_batch * s.accumulation * n * A.sequence_length
        assert (s.communication == 0) == (n == 1)
    # tokens are raised only where a GPU would get no equal share
    assert [step(A, "gpt2", engine, n, FLOPS).tokens // A.tokens_per_step for n in GPUS] == [1, 1, 1, 2]


def test_public_figures_are_met_as_docs_say():
    """124M on 8, 16 and 64 H100 and the all-reduce of 1,984 GPUs within 10%; the larger sizes within a quarter."""
    off = [float(row[-1].rstrip("%")) for row in cluster.checks_table(A).rows]
    assert all(abs(off[i]) < 10 for i in (0, 2, 3, 4, 5, 6))
    assert all(abs(x) < 25 for x in (off[1], off[9]))


@pytest.mark.parametrize("size", NAMES)
def test_state_falls_with_gpus_from_that_of_the_model_under_ddp(size):
    with torch.device("meta"):
        model = GPT(cluster.shape(size))
    cfg, P = model.cfg, sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for p in model.transformer.h.parameters())
    assert cluster.parameters(cfg) == (blocks, P - blocks)
    for engine in ENGINES:
        sizes = [state_bytes(cfg, engine, n) for n in range(1, 1025)]
        assert 16 * P < sizes[0] < 18 * P
        assert sizes == sorted(sizes, reverse=True)
    assert state_bytes(cfg, "fsdp", 1024) < state_bytes(cfg, "zero1", 1024) < state_bytes(cfg, "ddp", 1024)


def at_peak(B: int, **sizes) -> dict[str, int]:
    """Bytes by kind in a training step of B sequences of 128, by the ledger, which test_plan.py compares with torch's own."""
    how = dict(block_size=128, vocab_multiple=128, dtype="bfloat16", device="cpu", compile=False, fused_adamw=True)
    return follow(Config(**how, **sizes, batch_size=B, tokens_per_step=128 * B), 1, train.accumulate).at_peak


@pytest.mark.parametrize(("n_layer", "n_head"), [(5, 2), (3, 8)])
def test_activations_and_logits_are_those_of_a_step(n_layer, n_head):
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=128)
    formula = cluster.activation_bytes(GPTConfig(**sizes), 128)
    few, many = (at_peak(B, **sizes, vocab_size=1000)["activations"] for B in (2, 6))
    assert many - few == 4 * formula
    few, many = (sum(at_peak(B, **sizes, vocab_size=10_000).values()) for B in (4, 8))  # logits at their worst moment
    assert (many - few) / 4 == pytest.approx(formula + cluster.LOGITS_BYTES * 128 * 10_000, rel=0.01)


def lost(interval: float, save: float, mtbf: float, restart: float) -> float:
    """The share of 3,000 hours lost in a run with failures thrown as dice."""
    dice, now, done = random.Random(1), 0.0, 0.0
    failure = dice.expovariate(1 / mtbf)
    while now < 3600 * 3000:
        if now + interval + save < failure:
            now, done = now + interval + save, done + interval
        else:
            now = failure + restart
            failure = now + dice.expovariate(1 / mtbf)
    return 1 - done / now


@pytest.mark.parametrize("mtbf", [20_000.0, 180_000.0])
def test_failures_cost_what_dice_say_and_least_at_that_interval(mtbf):
    interval, *shares = cluster.failures(30.0, mtbf, 100.0)
    least = lost(interval, 30.0, mtbf, 100.0)
    assert least == pytest.approx(sum(shares), rel=0.1)
    assert all(lost(interval * f, 30.0, mtbf, 100.0) > least for f in (0.25, 4))


def test_rate_is_public_until_a_gpu_was_measured(tmp_path):
    public, source = cluster.one_gpu(A, tmp_path)
    assert "not measured here" in source
    result = ladder()
    path = tmp_path / "results" / "a-machine" / "ladder.json"
    path.parent.mkdir(parents=True)
    for device in ("cpu", "cuda"):
        result["machine"] |= dict(device=device, hardware=f"A {device}")
        for entry in result["rungs"]:
            entry |= dict(effective=dict(device=device, processes=1))
        path.write_text(json.dumps(result), encoding="utf-8")
        found = cluster.one_gpu(A, tmp_path)
        assert (found == (public, source)) == (device == "cpu")
    last = result["rungs"][2]
    assert found[0] == pytest.approx(results.tokens_per_s(result, last) * results.flops_per_token(last["requested"]))
    assert found[1].startswith("measured: r03_compile")


def test_the_document_is_made_again_checked_and_left_alone(tmp_path, root, capsys):
    path = tmp_path / cluster.DOCUMENT
    path.parent.mkdir()
    path.write_text((root / cluster.DOCUMENT).read_text(encoding="utf-8"), encoding="utf-8")
    cluster.main([], tmp_path)
    text = path.read_text(encoding="utf-8")
    cluster.main(["--check"], tmp_path)
    for name in ("steps", "memory", "checks", "failures"):
        rest = text.index("| ---", text.index(f"<!-- cluster {name} -->"))
        path.write_text(text[:rest] + re.sub(r"\d", "7", text[rest:], count=2), encoding="utf-8")
        with pytest.raises(SystemExit, match="1"):
            cluster.main(["--check"], tmp_path)
        assert "run python -m forecast.cluster" in capsys.readouterr().err
    cluster.main([], tmp_path)
    cluster.main(["--network_gb_s=25", "--tokens_per_s=1000"], tmp_path)  # other assumptions are printed
    assert "from --tokens_per_s=1,000, not measured here" in capsys.readouterr().out
    assert path.read_text(encoding="utf-8") == text
    for wrong in (text.replace("<!-- cluster memory -->", ""), text + text, text.replace("<!-- end -->", "", 1)):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(UserError, match="once"):
            cluster.main(["--check"], tmp_path)
    for flag, message in (("--network_gb_s=0", "above 0"), ("--gpus_per_node=6", "power of two")):
        with pytest.raises(UserError, match=message):
            cluster.main([flag])
