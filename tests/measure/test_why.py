"""measure/why.py: the parts make up the step, the floors are counted right, and what is slow on purpose is found."""

import json
import time
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import optim
import train
from base.errors import UserError
from configurator import Config
from engine import machine
from engine.run import Run, build
from measure import ladder, why
from model import GPT
from report import kinds

CEILINGS = {"gemm_float32_flops": 1e11, "gemm_bfloat16_flops": 4e11, "copy_bytes_per_s": 1e10}
PLAIN = dict(attention="naive", fused_adamw=False, prefetch=False)  # with the tiny run's: everything off, as on rung 0


@pytest.fixture(autouse=True)
def no_other_precision(monkeypatch):
    """Else advise() tries in a process of its own whether float32 matmuls can run as bf16."""
    monkeypatch.setattr(ladder, "precision_that_runs", lambda how, device: "ieee")


def ms(result: dict) -> dict[str, float]:
    return {s["part"]: s["ms"] for s in result["shares"]}


def test_parts_make_up_the_step_and_the_trace_is_the_steps(tiny_run, tmp_path):
    plain = why.why(Config(**tiny_run | PLAIN), CEILINGS, tmp_path / "trace.json")
    assert [s["part"] for s in plain["shares"]] == list(why.PARTS)
    assert sum(ms(plain).values()) == pytest.approx(plain["step_ms"], rel=1e-6)
    assert sum(s["share"] for s in plain["shares"]) == pytest.approx(1)
    assert ms(plain)["other"] == 0
    assert min(ms(plain)[part] for part in why.PARTS if part not in ("launch gaps", "other")) > 0
    recorded = {"kind": "why", "date": "2026-11-20", "machine": {"hardware": "a CPU", "torch": "2", "commit": None}}
    table, *_ = kinds.blocks(plain | recorded)
    assert [row[0] for row in table.rows] == [*why.PARTS, "step"]
    trace = json.loads(open(plain["trace"], encoding="utf-8").read())["traceEvents"]
    assert sum(e.get("name") == "aten::addmm" for e in trace) == 2 * 2 * 4  # micro-batches, layers, linears with a bias


@pytest.mark.parametrize("where", ["data wait", "optimizer"])
def test_sleep_is_found_where_it_is_and_all_of_it(where, tiny_run, tmp_path, monkeypatch):
    """What was profiled is as long as the step by the clock, not by the profiler's own total."""
    owner, name = {"data wait": (Run, "read"), "optimizer": (optim, "gradient_norm")}[where]
    function, step, walls = getattr(owner, name), train.train_step, []

    def slow(*args):
        time.sleep(0.2)  # longer than a busy machine keeps a step waiting
        return function(*args)

    def timed(*args):
        began = time.perf_counter()
        step(*args)
        walls.append(1e3 * (time.perf_counter() - began))

    monkeypatch.setattr(owner, name, slow)
    monkeypatch.setattr(train, "train_step", timed)
    result = why.why(Config(**tiny_run | PLAIN), CEILINGS, tmp_path / "trace.json", warmup=1, timed=1)
    assert max(ms(result), key=ms(result).get) == where
    assert result["profiled_ms"] == pytest.approx(walls[-1], rel=0.05)
    if where == "data wait":
        assert result["advice"][0]["setting"] == "prefetch=True"
    assert getattr(owner, name) is slow  # what named_scopes() replaces, it puts back


@pytest.mark.slow
def test_compiled_kernels_appear_by_name(tiny_run, tmp_path):
    if reason := machine.why_no_compile(torch.device("cpu")):
        pytest.skip(reason)
    torch._dynamo.reset()
    small = dict(compile=True, n_layer=1, tokens_per_step=128)  # one micro-batch
    result = why.why(Config(**tiny_run | small), CEILINGS, tmp_path / "trace.json", 1, 1)
    assert ms(result)["other"] == 0
    assert ms(result)["norms and elementwise"] > 0
    assert ms(result)["cross-entropy"] > 0  # nothing but a compiled kernel's name tells


NAMES = """
GEMM: aten::addmm
GEMM: nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT
GEMM: void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_256x128_16x3_nt_align4>(Params)
GEMM: triton_tem_fused_addmm_3
attention: aten::bmm
attention: aten::_scaled_dot_product_flash_attention_for_cpu_backward
attention: void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>(Flash_fwd_params)
attention: cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7
attention: triton_per_fused__softmax_div_masked_fill_2
cross-entropy: aten::_log_softmax_backward_data
cross-entropy: graph_0_cpp_fused__log_softmax__to_copy_native_layer_norm_nll_loss_forward_8
norms and elementwise: aten::native_layer_norm
norms and elementwise: graph_0_cpp_fused__scaled_dot_product_flash_attention_for_cpu__to_copy_view_1
norms and elementwise: triton_poi_fused_add_gelu_4
norms and elementwise: void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)
norms and elementwise: Memcpy DtoD (Device -> Device)
communication: ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)
communication: gloo:all_reduce
launch gaps: autograd::engine::evaluate_function: AddmmBackward0
launch gaps: Torch-Compiled Region: 0/0
launch gaps: ## Call CompiledFxGraph f32iv2sbaf2uutqnivic2funvxj3acxpocmkvzvnbhn3tbessubf ##
launch gaps: aten::view
launch gaps: cudaLaunchKernel
other: something nobody has heard of
"""


def test_names():
    found = [f"{why.by_name(line.partition(': ')[2])}: {line.partition(': ')[2]}" for line in NAMES.strip().splitlines()]
    assert found == NAMES.strip().splitlines()


# ---- a GPU's trace, made up ---------------------------------------------------------------------------------------------


def gpu_trace() -> list[dict]:
    """1,000 µs of a step: the host on thread 1 and its backward on thread 2, kernels on streams 7 and 20."""
    host = [  # category, name, start, duration, thread, arguments
        ("user_annotation", why.STEP, 0, 1000, 1, {}),
        ("user_annotation", "why: data wait", 0, 150, 1, {}),
        ("cpu_op", "aten::mm", 160, 20, 1, {"Input Dims": [[8, 8], [8, 8]]}),
        ("cuda_runtime", "cudaLaunchKernel", 165, 5, 1, {"correlation": 1}),
        ("cpu_op", "aten::copy_", 180, 20, 1, {"Input Dims": [[128, 65], []]}),
        ("cuda_runtime", "cudaMemcpyAsync", 185, 5, 1, {"correlation": 2}),
        ("cpu_op", "autograd::engine::evaluate_function: BmmBackward0", 300, 50, 2, {}),
        ("cpu_op", "aten::bmm", 310, 20, 2, {}),
        ("cuda_driver", "cuLaunchKernelEx", 315, 5, 2, {"correlation": 3}),
        ("cpu_op", "CompiledFunctionBackward", 400, 50, 2, {}),
        ("cuda_driver", "cuLaunchKernel", 410, 5, 2, {"correlation": 4}),
        ("cpu_op", "Optimizer.step#AdamW.step", 700, 50, 1, {}),
        ("cpu_op", "aten::_fused_adamw_", 705, 40, 1, {}),
        ("cuda_runtime", "cudaLaunchKernel", 710, 5, 1, {"correlation": 5}),
    ]
    device = [
        ("kernel", "sm90_gemm", 200, 100, 7, {"correlation": 1}),
        ("gpu_memcpy", "Memcpy DtoD", 300, 50, 7, {"correlation": 2}),
        ("kernel", "sm90_gemm", 350, 100, 7, {"correlation": 3}),
        ("kernel", "triton_poi_fused_gelu_1", 450, 50, 7, {"correlation": 4}),
        ("kernel", "ncclDevKernel_AllReduce", 480, 120, 20, {}),
        ("kernel", "adam", 750, 200, 7, {"correlation": 5}),
        ("gpu_user_annotation", why.STEP, 200, 750, 7, {}),
    ]
    keys = ("cat", "name", "ts", "dur", "tid", "args")
    return [dict(zip(keys, e, strict=True), ph="X") for e in host + device] + [{"ph": "M", "name": "process_name"}]


def test_gpu_time_is_what_the_kernels_take_and_the_rest_is_idle():
    total, parts = why.attribute(gpu_trace(), Config(vocab_size=65), on_gpu=True)
    assert {part: us for part, us in parts.items() if us} == {
        "GEMM": 100,
        "cross-entropy": 50,  # a copy of logits, told by its shape
        "attention": 100,  # a gemm kernel, but aten::bmm launched it, on the backward's thread
        "norms and elementwise": 50,
        "communication": 100,  # 480-600, of which 480-500 is hidden
        "optimizer": 200,
        "data wait": 150,
        "launch gaps": 50 + 150 + 50,
    }
    assert sum(parts.values()) == total == 1000
    with pytest.raises(UserError, match="recorded nothing"):
        why.attribute([], Config(), on_gpu=False)
    with pytest.raises(UserError, match="no GPU kernels"):
        why.attribute(gpu_trace()[:14], Config(), on_gpu=True)


@pytest.mark.parametrize("changes", [{}, dict(tie_weights=False, vocab_multiple=128, n_layer=3, n_head=4)])
def test_flops_are_those_torch_counts(changes, tiny_run):
    cfg = Config(**tiny_run | dict(attention="naive") | changes)
    model, micro_batch = GPT(cfg), 4
    x = torch.zeros(micro_batch, cfg.T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(x, x).backward()
    floors = why.floors(cfg, CEILINGS)
    steps = cfg.tokens_per_step // (micro_batch * cfg.T)
    whole = 2 * cfg.T / (cfg.T + 1)  # torch counts the masked scores as well
    assert steps * counter.get_total_flops() == floors["GEMM"].flops + whole * floors["attention"].flops


def test_floors_scale_with_the_work(tiny_run):
    """Two processes share the step; more micro-batches read the weights again; fewer bits are fewer bytes."""
    cfg = Config(**tiny_run)
    whole, half = (why.floors(cfg, CEILINGS, processes=n) for n in (1, 2))
    assert half["GEMM"].flops == whole["GEMM"].flops / 2
    assert whole["communication"].bytes == 0 < half["communication"].bytes
    split = why.floors(replace(cfg, batch_size=1), CEILINGS)
    assert split["GEMM"].flops == whole["GEMM"].flops
    assert all(split[part].bytes > whole[part].bytes for part in ("GEMM", "optimizer"))
    short = why.floors(replace(cfg, dtype="bfloat16"), CEILINGS)
    assert short["cross-entropy"].bytes == whole["cross-entropy"].bytes / 2
    assert short["optimizer"] == whole["optimizer"]  # in float32


def test_floors_are_at_measured_rates(tiny_run):
    """TF32's is measured where it exists. The optimizer reads and writes at the rate of memory of that size."""
    for precision, rate in (("ieee", 1e11), ("tf32", 3e11), ("bf16", 4e11)):
        floor = why.floors(Config(dtype="float32", fp32_precision=precision), CEILINGS | {"gemm_tf32_flops": 3e11})["GEMM"]
        assert floor.flops / floor.seconds == pytest.approx(rate)
    cfg = Config(**tiny_run | dict(n_embd=256, batch_size=8))
    P = sum(p.numel() for p in GPT(cfg).parameters())
    floor = why.floors(cfg, CEILINGS | {"memory_bytes_per_s": [[16 * P // 2, 8e10], [16 * P + 1, 4e10]]})["optimizer"]
    assert (floor.bytes, floor.seconds) == (32 * P, pytest.approx(32 * P / 8e10))
    reached = why.raised(CEILINGS, cfg, optimizer_ms=1e3 * 32 * P / 9e10, processes=1)
    assert why.floors(cfg, reached)["optimizer"].seconds == pytest.approx(32 * P / 9e10)  # no floor is above what was reached


def test_a_floor_is_at_the_rate_of_the_smallest_memory_that_holds_it():
    """So that it is not too high: at the fastest rate of all sizes that are not surely smaller; a copy's at least."""
    measured = CEILINGS | {"memory_bytes_per_s": [[100, 9e11], [400, 3e11], [1600, 5e10], [6400, 6e10], [25_600, 5e9]]}
    rates = [why.bytes_per_s(size, measured) for size in (1, 100, 399, 400, 1600, 6400, 30_000)]
    assert rates == [9e11, 9e11, 9e11, 3e11, 6e10, 6e10, 1e10]
    assert why.bytes_per_s(1, CEILINGS) == 1e10  # an old result has the rate of a copy alone


def test_advice_is_what_is_off_and_available_with_what_lies_above_its_floor(tiny_run, monkeypatch):
    monkeypatch.setattr(machine, "why_no_compile", lambda device: None)
    monkeypatch.setattr(ladder, "precision_that_runs", lambda how, device: how if how == "bf16" else "ieee")

    def advised(run: Run) -> dict[str, float]:
        ms = {part: 1e3 * f.seconds + 7.0 for part, f in why.floors(run.cfg, CEILINGS).items()}
        return {a["setting"]: a["saves_ms"] for a in why.advise(run, ms, CEILINGS, kernel_ms=10.0)}

    plain = build(Config(**tiny_run | PLAIN))
    off = {"dtype=bfloat16", "fp32_precision=bf16", "compile=True", "attention=sdpa", "vocab_multiple=128"}
    found = advised(plain)
    assert off | {"fused_adamw=True", "prefetch=True"} == found.keys() - {"reuse_memory=True"}
    assert found["compile=True"] == pytest.approx(14.0)  # two parts
    assert found["fused_adamw=True"] == pytest.approx(7.0)
    assert found["dtype=bfloat16"] > 21.0  # three, and their floors come down
    fast = build(Config(**tiny_run | dict(dtype="bfloat16", fused_adamw=True, vocab_multiple=128)))
    fast.cfg = replace(fast.cfg, compile=True, reuse_memory=True)
    assert set(advised(fast)) == {"attention=blocked"}
    monkeypatch.setattr(machine, "why_no_compile", lambda device: "there is none")
    monkeypatch.setattr(ladder, "precision_that_runs", lambda how, device: "ieee")
    assert not advised(plain).keys() & {"compile=True", "fp32_precision=bf16"}
