"""forecast.cluster: its formulas against rings that are really gone round, tensors that torch really saves, and dice."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from made_results import ladder

import train
from base.errors import UserError
from configurator import Config, GPTConfig
from forecast import cluster
from forecast.cluster import ENGINES, GPUS, NAMES, Assumptions, collective, ring, state_bytes, step
from forecast.memory import follow
from model import GPT
from report import results

A = Assumptions()
PLAIN = replace(A, pipelined=False, tree=False)
FAST = 1e9 * A.nvlink_gb_s * A.nvlink_achieved, cluster.NVLINK_HOP
SLOW = 1e9 * A.network_gb_s * A.network_achieved, cluster.NETWORK_HOP
FLOPS = 4e14


def go_round(data: list[list[float]], rate: float, hop: float) -> float:
    """A ring all-reduce, done: every rank's list becomes the sum of all. Each number is a byte. Returns the seconds."""
    n, seconds = len(data), 0.0
    size = len(data[0]) // n

    def part(i: int) -> slice:
        return slice(i % n * size, (i % n + 1) * size)

    for k in range(n - 1):  # reduce-scatter: rank r sends part r - k, and its neighbour adds it
        sent = [data[r][part(r - k)] for r in range(n)]
        for r in range(n):
            mine = data[(r + 1) % n]
            mine[part(r - k)] = [x + y for x, y in zip(mine[part(r - k)], sent[r], strict=True)]
        seconds += size / rate + hop
    for k in range(n - 1):  # all-gather: what is complete goes round
        sent = [data[r][part(r + 1 - k)] for r in range(n)]
        for r in range(n):
            data[(r + 1) % n][part(r + 1 - k)] = sent[r]
        seconds += size / rate + hop
    return seconds


@pytest.mark.parametrize("n", [1, 2, 5])
def test_ring_takes_what_going_round_takes(n):
    data = [[random.Random(r).random() for _ in range(120 * n)] for r in range(n)]
    total = [sum(column) for column in zip(*data, strict=True)]
    seconds = go_round(data, rate=1e3, hop=0.5)
    assert all(mine == pytest.approx(total) for mine in data)
    assert sum(ring(n, 120 * n, 1e3, 0.5, passes=2)) == pytest.approx(seconds)


@pytest.mark.parametrize(("nodes", "local"), [(3, 4), (4, 2)])
def test_collective_by_node_takes_what_its_rings_take(nodes, local):
    """Inside each node, then each GPU's share between the nodes, one after the other. Inside, rings are counted as one."""
    nbytes = 24 * nodes * local
    data = [[[random.Random(9 * i + j).random() for _ in range(nbytes)] for j in range(local)] for i in range(nodes)]
    total = [sum(column) for column in zip(*(gpu for node in data for gpu in node), strict=True)]
    for node in data:
        seconds = go_round(node, *FAST)  # all at the same time
    share = nbytes // local
    for j in range(local):
        same = [data[i][j][j * share : (j + 1) * share] for i in range(nodes)]
        between = go_round(same, *SLOW)
        assert all(mine == pytest.approx(total[j * share : (j + 1) * share]) for mine in same)
    plain = replace(PLAIN, gpus_per_node=local)
    assert collective(plain, nodes * local, nbytes, 2) == pytest.approx(seconds + between)
    assert collective(plain, nodes * local, nbytes, 1) == pytest.approx((seconds + between) / 2)


@pytest.mark.parametrize("n", [2, 8, 64, 1024])
def test_better_ways_are_never_slower(n):
    for nbytes in (4, 1e6, 1e9):
        plain = collective(PLAIN, n, nbytes, 2)
        assert collective(A, n, nbytes, 2) <= collective(replace(A, tree=False), n, nbytes, 2) <= plain
        assert plain <= sum(ring(n, nbytes, *SLOW, 2))  # the textbook's one ring over the slowest link


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_lies_between_its_bounds_and_one_gpu_sends_nothing(engine):
    for size, n in [(size, n) for size in NAMES for n in GPUS]:
        s = step(A, size, engine, n, FLOPS)
        expected, least, most = s.seconds()
        assert least <= expected * (1 + 1e-12) <= most * (1 + 1e-11)
        assert 0 <= s.exposed <= s.communication * (1 + 1e-12)
        assert s.tokens == s.micro_batch * s.accumulation * n * A.sequence_length
        assert (s.communication == 0) == (n == 1)


def test_tokens_are_raised_only_where_a_gpu_would_get_no_equal_share():
    assert [step(A, "gpt2", "ddp", n, FLOPS).tokens // A.tokens_per_step for n in GPUS] == [1, 1, 1, 2]
    assert step(replace(A, tokens_per_step=3 * 1024), "gpt2", "ddp", 8, FLOPS).tokens == 8 * 3 * 1024


def test_public_figures_are_met_as_docs_say():
    """124M on 8, 16 and 64 H100 and the all-reduce of 1,984 GPUs within 10%; the larger sizes within a quarter."""
    off = [float(row[-1].rstrip("%")) for row in cluster.checks_table(A).rows]
    assert all(abs(off[i]) < 10 for i in (0, 2, 3, 4, 5, 6))
    assert all(abs(x) < 25 for x in (off[1], off[9]))


def test_parameters_are_those_of_the_model():
    with torch.device("meta"):
        model = GPT(cluster.shape("gpt2"))
    assert sum(cluster.parameters(model.cfg)) == sum(p.numel() for p in model.parameters())
    assert cluster.parameters(model.cfg)[0] == sum(p.numel() for p in model.transformer.h.parameters())


@pytest.mark.parametrize("size", NAMES)
def test_state_falls_with_gpus_from_that_of_ddp(size):
    cfg = cluster.shape(size)
    whole = state_bytes(cfg, "ddp", 1)
    for engine in ENGINES:
        sizes = [state_bytes(cfg, engine, n) for n in range(1, 1025)]
        assert sizes[0] == whole
        assert sizes == sorted(sizes, reverse=True)
    assert state_bytes(cfg, "fsdp", 1024) < state_bytes(cfg, "zero1", 1024) < whole


def kept_for_backward(cfg: GPTConfig, B: int, T: int) -> int:
    """Bytes of the storages that torch saves in a forward pass under bf16 autocast, each once, parameters left out."""
    model, x = GPT(cfg), torch.randint(0, cfg.vocab_size, (B, T))
    own, found, alive = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its address would be given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model(x, x.clone())
    return sum(found.values())


@pytest.mark.parametrize("sizes", [dict(n_layer=5, n_head=2, n_embd=128), dict(n_layer=1, n_head=8, n_embd=512)])
def test_activations_are_what_torch_saves(sizes):
    """To 0.2%, and that is indices: int64 ids, targets and positions. Logits: log-softmax, 4 bytes each."""
    T, V = 128, 1000
    cfg = GPTConfig(block_size=T, vocab_size=V, vocab_multiple=128, **sizes)
    kept = {B: kept_for_backward(cfg, B, T) for B in (2, 6)}
    sequence = (kept[6] - kept[2]) / 4
    formula = cluster.activation_bytes(cfg, T) + 4 * V * T
    assert formula <= sequence <= formula + 2 * 8 * T
    assert sequence == pytest.approx(formula, rel=2e-3)
    casts = 2 * (12 * cfg.n_layer * cfg.n_embd**2 + cfg.padded_vocab_size * cfg.n_embd)
    assert kept[2] - 2 * sequence == pytest.approx(casts, abs=8 * T + 8)  # what does not grow with B


def test_logits_take_twelve_bytes_at_their_worst():
    T = 128
    how = dict(n_layer=2, n_head=4, n_embd=128, block_size=T, vocab_size=10_000, vocab_multiple=128, dtype="bfloat16")
    how |= dict(device="cpu", compile=False, fused_adamw=True)
    cfg = {B: Config(**how, batch_size=B, tokens_per_step=B * T) for B in (4, 8)}
    most = {B: sum(follow(c, 1, train.accumulate).at_peak.values()) for B, c in cfg.items()}
    expected = cluster.activation_bytes(cfg[4], T) + cluster.LOGITS_BYTES * T * cfg[4].vocab_size
    assert (most[8] - most[4]) / 4 == pytest.approx(expected, rel=0.01)


def lost(interval: float, save: float, mtbf: float, restart: float, hours: float = 3000.0) -> float:
    """The share of the time lost in a run with failures thrown as dice."""
    dice, now, done, kept = random.Random(1), 0.0, 0.0, 0.0
    failure = dice.expovariate(1 / mtbf)
    while now < 3600 * hours:
        if now + interval + save < failure:
            now, done = now + interval + save, done + interval
            kept = done
        else:
            now, done = failure + restart, kept
            failure = now + dice.expovariate(1 / mtbf)
    return 1 - done / now


@pytest.mark.parametrize("mtbf", [20_000.0, 180_000.0])
def test_failures_cost_what_dice_say(mtbf):
    interval, *shares = cluster.failures(30.0, mtbf, 100.0)
    assert interval == math.sqrt(2 * 30 * mtbf)
    assert lost(interval, 30.0, mtbf, 100.0) == pytest.approx(sum(shares), rel=0.1)
    assert all(lost(interval * f, 30.0, mtbf, 100.0) > lost(interval, 30.0, mtbf, 100.0) for f in (0.25, 4))


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
    for name in ("steps", "memory", "checks", "failures"):  # a changed number is stale
        where = text.index("| ---", text.index(f"<!-- cluster {name} -->"))
        digit = next(i for i in range(where, len(text)) if text[i].isdigit())
        path.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :], encoding="utf-8")
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


@pytest.mark.parametrize(("flag", "message"), [("--network_gb_s=0", "above 0"), ("--gpus_per_node=6", "power of two")])
def test_a_wrong_flag_is_one_line(flag, message):
    with pytest.raises(UserError, match=message):
        cluster.main([flag])
