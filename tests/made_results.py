"""Results of each kind, as bench.py writes them, made by hand."""

import json
import math

MACHINE = dict(hardware="A machine, 2 cores", device="cpu", threads=2, torch="2.13", commit="abc1234", dirty=False)
SIZES = dict(batch_size=4, sequence_length=32, tokens_per_step=128, n_layer=2, rounds=3)
SHAPE = dict(n_layer=2, n_head=2, n_embd=64, vocab_size=100, vocab_multiple=1, block_size=64, sequence_length=32)
SHAPE |= dict(dtype="float32", fp32_precision="ieee")
ON = dict(device="cpu", processes=1)


def head(kind: str) -> dict:
    command = f"python bench.py {kind}"
    return dict(kind=kind, date="2026-11-20T05:00:00+00:00", command=command, machine=dict(MACHINE), sizes=dict(SIZES))


def rung(name: str, versus: str, changes: dict, ms: list[list[float]], losses: list[float], **more) -> dict:
    times = [[t / 1e3 for t in times] for times in ms]
    entry = dict(name=name, title=name, versus=versus, changes=changes, requested=SHAPE, effective=ON, losses=losses)
    return entry | dict(memory_gib=1.5, first_step_s=[2.0], step_s=times) | more


def ladder(factor: float = 1.0, kind: str = "ladder") -> dict:
    """Three rungs, the middle one skipped; `factor` slows the last one down."""
    last = [[100 * factor, 102 * factor], [101 * factor, 99 * factor], [98 * factor, 100 * factor]]
    rungs = [
        rung("r00_fp32", "r00_fp32", {}, [[200, 202], [198, 200], [201, 199]], [4.6, 4.5]),
        dict(name="r01_tf32", title="", versus="r00_fp32", changes={"fp32_precision": ["ieee", "tf32"]}, skipped="not here"),
        rung("r03_compile", "r01_tf32", {"compile": [False, True]}, last, [4.6, 4.50004]),
    ]
    rates = dict(peak_flops=None, gemm_float32_flops=1e11, gemm_bfloat16_flops=4e11, copy_bytes_per_s=2e10)
    return head(kind) | dict(ceilings=rates, rungs=rungs)


def verify(status: str = "passed") -> dict:
    row = dict(check="alone: compile=True", against="float64", tolerance=1e-5, errors={"loss": 1e-7, "update": None})
    skipped = dict(check="alone: fp32_precision=tf32", against="float64", tolerance=1e-3, errors={}, status="skipped: no")
    return head("verify") | dict(rows=[row | {"status": status}, skipped], passed=status == "passed")


def why() -> dict:
    parts = [("GEMM", 60.0, 40.0, 4e9, 0), ("optimizer", 35.0, 20.0, 0, 4e8), ("other", 5.0, 0.0, 0, 0)]
    shares = [dict(part=p, ms=ms, share=ms / 100, floor_ms=floor, flops=f, bytes=b) for p, ms, floor, f, b in parts]
    advice = [dict(setting="compile=True", saves_ms=12.0, why="fewer passes"), dict(setting="x=1", saves_ms=0.1, why="")]
    return head("why") | dict(step_ms=100.0, profiled_ms=110.0, floor_ms=60.0, shares=shares, advice=advice, trace="trace.json")


def stages() -> dict:
    stage = dict(config="s2.py", title="Stage 2: one batch", parameters=163_040_000, losses=[11.06, 0.0029], seconds=9.0)
    std = {"scaled": [0.1, 0.2, 0.3], "unscaled": [0.1, 0.4, 0.9]}
    return head("stages") | dict(ln_vocab_size=math.log(50257), stages=[stage], residual_std=std)


def shakespeare(sample: str = "ROMEO:\nBut soft") -> dict:
    run = dict(first_loss_s=4.0, first_step_s=9.0, train_s=120.0, sample_s=5.0, val_losses={"20": 4.0}, bits_per_byte=2.25)
    runs = [run | dict(seed=1), run | dict(seed=2, bits_per_byte=2.15)]
    asked = dict(tokens_per_step=256, max_steps=20)
    more = dict(step_s=[[0.2, 0.3], [0.2, 0.4]], parameters=1_240_000, requested=asked, sample=sample)
    return head("shakespeare") | dict(runs=runs) | more


def sampling() -> dict:
    speeds = dict(cached=[30.0, 31.0], uncached=[10.0, 10.0])
    return head("sampling") | dict(prompt_tokens=64, new_tokens=8, same_tokens=True, tokens_per_s=speeds)


def ab() -> dict:
    asked = dict(tokens_per_step=128)
    sides = [
        dict(config=f"{name}.py", requested=asked, step_s=[[t, t], [t * 1.01, t]], losses=[[4.0], [4.0 + t]])
        for name, t in (("a", 0.2), ("b", 0.1))
    ]
    return head("ab") | dict(sides=sides, changes={})


def scale() -> dict:
    """Two budgets on two sizes each; the second budget's parabola has no minimum."""
    law, ran = dict(E=1.0, A=10.0, alpha=0.3, B=50.0, beta=0.4), dict(flops=7e9, C=6e9, started="2026-11-20T04:00", seconds=9.0)
    runs = [ran | dict(budget=c, N=n, D=round(c / 6 / n), loss=3.0) for c in (6e9, 2.4e10) for n in (5000, 20_000)]
    best = dict(N=9000.0, ratio=12.0, N_interval=[8000.0, 10_000.0], ratio_interval=[9.0, None])
    lost = dict.fromkeys(("N", "ratio", "loss", "N_interval", "ratio_interval"))
    levels = [dict(budget=c, law=best, parabola=p) for c, p in ((6e9, best | {"loss": 2.9}), (2.4e10, lost))]
    fit = dict(law=law, intervals={k: [v / 2, 2 * v] for k, v in law.items()}, noise=0.002, misfit=0.003, levels=levels)
    fit["exponent"] = dict(law=0.57, law_interval=[0.4, 0.7], parabolas=None, parabolas_interval=None)
    held = dict(budget=9.6e10, N=20_000, D=800_000, predicted=dict(loss=2.8, low=2.7, high=2.9))
    held |= dict(predicted_at="2026-11-20T05:00", runs=[ran | dict(N=20_000, D=800_000, loss=2.75, started="2026-11-20T06:00")])
    asked = dict(dataset="shakespeare_char", bootstraps=9, sequence_length=32, tokens_per_step=128)
    return head("scale") | dict(sizes=asked, runs=runs, fit=fit, held_out=held, jobs=2, train_tokens=1_000_000)


ALL = [ladder(), ladder(kind="ablate"), verify(), why(), stages(), shakespeare(), sampling(), ab(), scale()]


def put(root, *results: dict) -> None:
    for result in results:
        path = root / "results" / "a-machine" / f"{result['kind']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result), encoding="utf-8")


def block(words: str) -> str:
    return f"<!-- begin results/a-machine/{words} -->\n<!-- end -->\n"
