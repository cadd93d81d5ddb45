"""What this machine is and can do: its device, precisions, compiler, memory allocator and peak rates.

resolve() turns a config into one that this device can run, set_up() applies it to this process, and what was applied is read
back here for effective().
"""

import contextlib
import ctypes
import functools
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from base import system
from base.errors import UserError
from base.files import ROOT
from configurator import Config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NO_TRITON = "Triton needs a GPU of compute capability 7.0 (V100) or newer"
NO_REUSE = "it needs a CPU and glibc"


# ---- what is available -----------------------------------------------------------------------------------------------


def pick_device(wanted: str) -> torch.device:
    """The device of this process. UserError if it was named and is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(n for n, ok in there.items() if ok) if wanted == "auto" else wanted
    if not there[name]:
        have = ", ".join(n for n, ok in there.items() if ok)
        raise UserError(f"device={wanted} is not available on this machine: use --device=auto (it has {have})")
    if name == "mps" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("mps trains in one process only: run python train.py …, or use --device=cpu")
    if name != "cuda":
        return torch.device(name)
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"there is no GPU for local rank {local}, only {count}: use torchrun --nproc_per_node={count} … or --device=cpu"
        )
    return torch.device(name, local)


def best_dtype(device: torch.device) -> str:
    """The fastest autocast precision that the hardware multiplies by itself."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bfloat16"
    return "float32"


def why_no_compile(device: torch.device) -> str | None:
    """What torch.compile lacks here, or None."""
    if device.type == "mps":
        return "torch.compile on mps is still a prototype"
    variable, names = "CXX", ["g++", "clang++", "c++"]
    if device.type == "cuda":
        if not find_spec("triton"):
            return "the package triton is not installed"
        if torch.cuda.get_device_capability(device) < (7, 0):
            return NO_TRITON
        variable, names = "CC", ["gcc", "clang", "cc"]  # Triton builds a launcher in C for its kernels
    if not any(shutil.which(c) for c in shlex.split(os.environ.get(variable, ""))[:1] or names):
        return f"there is no {'C' if variable == 'CC' else 'C++'} compiler (Debian: apt install g++)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python.h is missing (Debian: apt install python3-dev)"
    return None


@dataclass(frozen=True)
class Abilities:
    """What decides whether a setting is available on a device."""

    dtype: str  # the fastest autocast precision
    no_compile: str | None  # what torch.compile lacks
    no_reuse: str | None  # what reuse_memory lacks


def abilities(device: torch.device) -> Abilities:
    """Those of a device of this machine."""
    glibc = device.type == "cpu" and platform.libc_ver()[0] == "glibc"
    return Abilities(best_dtype(device), why_no_compile(device), None if glibc else NO_REUSE)


def gpu_abilities(capability: float) -> Abilities:
    """Those of a GPU of this compute capability, wherever it is."""
    return Abilities("bfloat16" if capability >= 8 else "float16", None if capability >= 7 else NO_TRITON, NO_REUSE)


def not_available(cfg: Config, device: torch.device, able: Abilities | None = None) -> str | None:
    """Why this device (able: one that is not here, of these abilities) cannot run a config, with the remedy; None if it can. An
    "auto" is never a reason. What is available and still has no effect, effective() finds after the first step.
    """
    kind, able = device.type, able or abilities(device)
    precisions = {"cuda": ("ieee", "tf32"), "cpu": ("ieee", "tf32", "bf16"), "mps": ("ieee",)}[kind]
    if cfg.dtype == "bfloat16" and kind == "cuda" and able.dtype != "bfloat16":
        return "dtype=bfloat16 is not available: this GPU has no bf16 matmuls; use --dtype=float16"
    if cfg.parallel == "fsdp" and cfg.dtype == "float16":  # its scaler looks for overflows in each process's own share only
        return "parallel=fsdp is not available with dtype=float16: use --dtype=bfloat16 or float32"
    if cfg.fp32_precision not in precisions:
        return f"fp32_precision={cfg.fp32_precision} is not available on {kind}: use --fp32_precision={' or '.join(precisions)}"
    if cfg.sdpa_backend != "any" and kind != "cuda":
        return f"sdpa_backend={cfg.sdpa_backend} is not available on {kind}, only on cuda: use --sdpa_backend=any"
    if cfg.compile is True and able.no_compile:
        return f"compile=True is not available: {able.no_compile}; or use --compile=False"
    if cfg.compile_mode != "default" and cfg.compile is False:
        return f"compile_mode={cfg.compile_mode} needs --compile=True"
    if cfg.compile_mode == "reduce-overhead" and kind != "cuda":
        return f"compile_mode=reduce-overhead is not available on {kind}: it records CUDA graphs; use --compile_mode=default"
    if cfg.reuse_memory is True and able.no_reuse:
        return f"reuse_memory=True is not available: {able.no_reuse}; use --reuse_memory=False"
    return None


def resolve(cfg: Config, device: torch.device, able: Abilities | None = None) -> tuple[Config, list[str]]:
    """(cfg without any "auto", a line on each choice). UserError if a setting is not_available()."""
    able = able or abilities(device)
    choices = {
        "device": (device.type, None),
        "dtype": (able.dtype, None if able.dtype == "bfloat16" else "no bf16 in hardware"),
        "compile": (able.no_compile is None, able.no_compile),
        "compile_scope": ("block" if cfg.parallel == "fsdp" else "model", None),
        "fused_adamw": (True, None),  # CUDA, MPS and CPU all have the kernel
        "reuse_memory": (able.no_reuse is None, able.no_reuse),
    }
    chosen = {name: choice for name, choice in choices.items() if getattr(cfg, name) == "auto"}
    cfg = replace(cfg, **{"device": device.type} | {name: value for name, (value, _) in chosen.items()})
    if reason := not_available(cfg, device, able):
        raise UserError(reason)
    if not cfg.compile:
        chosen.pop("compile_scope", None)
    return cfg, [f"{name} = {value}" + (f" ({why})" if why else "") for name, (value, why) in chosen.items()]


# ---- applying a config to this process -------------------------------------------------------------------------------


def set_up(cfg: Config, device: torch.device) -> None:
    """Apply a resolved config to this process: memory, precision, attention kernels. UserError if malloc refuses."""
    if cfg.reuse_memory and not set_reuse_memory():
        raise UserError("reuse_memory=True has no effect: malloc refused; use --reuse_memory=False")
    set_fp32_precision(cfg.fp32_precision, device)
    set_sdpa_backend(cfg.sdpa_backend, device)
    if device.type == "cpu":
        limit_memory()


def set_fp32_precision(how: str, device: torch.device) -> None:
    """How float32 matmuls are multiplied inside, by the current API (torch.backends.*.fp32_precision)."""
    if device.type != "mps":
        backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
        backend.fp32_precision = how


def set_sdpa_backend(which: str, device: torch.device) -> None:
    """Which fused attention kernels PyTorch may choose from on CUDA."""
    if device.type == "cuda":
        torch.backends.cuda.enable_flash_sdp(which in ("any", "flash"))
        torch.backends.cuda.enable_mem_efficient_sdp(which in ("any", "efficient"))
        torch.backends.cuda.enable_cudnn_sdp(which in ("any", "cudnn"))
        torch.backends.cuda.enable_math_sdp(which == "any")


def set_deterministic(on: bool) -> None:
    """Allow only kernels that give the same bits for the same inputs every time, also under torch.compile."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help for debugging that costs a write of each tensor
    if torch.backends.cudnn.is_available():
        torch.backends.cudnn.deterministic = on


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """The context in which matmuls read numbers of that precision; weights stay float32."""
    return contextlib.nullcontext() if dtype == "float32" else torch.autocast(device.type, dtype=DTYPES[dtype])


def set_reuse_memory() -> bool:
    """Tell glibc's malloc to keep what is freed instead of returning it to the kernel. True if it took.

    Large tensors are otherwise mapped and unmapped at every step, and each page is zeroed by the kernel when it is touched
    again: a quarter of a CPU step of GPT-2 124M. Costs: the process holds its peak memory until it ends.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False  # not glibc
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def limit_memory() -> None:
    """On Linux, make an allocation beyond the free memory fail with an error that can be handled: by default the kernel grants
    it, and kills the process without a message once it is used. Processes of one machine share what is free.
    """
    free = system.free_memory()
    if free is None:
        return
    used = 1024 * int(re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    first, hard = _limits_at_first()
    most = used + free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    resource.setrlimit(resource.RLIMIT_DATA, (most if first == resource.RLIM_INFINITY else min(most, first), hard))


@functools.cache
def _limits_at_first() -> tuple[int, int]:
    """The limits that this process was started with: those set by limit_memory() must not add up."""
    return resource.getrlimit(resource.RLIMIT_DATA)


def keep_compiled_code() -> None:
    """Let torch.compile keep its code where a reboot does not remove it, so that a second start finds it."""
    with contextlib.suppress(OSError):  # then it stays in the temporary folder, torch.compile's own default
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(system.user_cache() / "compiled"))


# ---- reading back what is on -----------------------------------------------------------------------------------------


def sdpa_backend(device: torch.device) -> str:
    """Which fused attention kernels PyTorch may choose from, read back."""
    c = torch.backends.cuda
    flags = {"flash": c.flash_sdp_enabled(), "efficient": c.mem_efficient_sdp_enabled(), "cudnn": c.cudnn_sdp_enabled()}
    on = [name for name, enabled in flags.items() if enabled]
    return "any" if device.type != "cuda" or len(on) == 3 else "+".join(on)


def fp32_precision_measured(device: torch.device) -> str:
    """How float32 matmuls are multiplied here, found from their error against float64, whatever the setting says.

    Rounding inputs to 23, 10 or 7 bits of mantissa leaves relative errors near 3e-7, 3e-4 and 2e-3.
    """
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(512, 512, generator=random), torch.randn(512, 512, generator=random)
    exact = a.double() @ b.double()
    found = (a.to(device) @ b.to(device)).cpu().double()
    error = ((found - exact).norm() / exact.norm()).item()
    if error < 2e-6:
        return "ieee"
    return "tf32" if error < 1e-3 or device.type == "cuda" else "bf16"  # tensor cores may cut off instead of rounding


def reuses_memory() -> bool:
    """Whether a large block that was freed comes back without page faults: tries it, at most 16 times 40 MiB.

    40, because glibc maps blocks over 32 MiB one by one whatever it has learned; several times, because a heap may first have
    to grow until the block and its alignment fit (9 of them, seen from heaps of many sizes).
    """
    for _ in range(16):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        try:
            torch.empty(10 * 2**20).fill_(1.0)
        except RuntimeError:
            return False  # out of memory
        if resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 10:  # 10,240 pages of 4 KiB, or 20 huge ones
            return True
    return False


# ---- rates, memory, names --------------------------------------------------------------------------------------------


# Dense bf16/fp16 matmul peaks in FLOP/s, without sparsity, from the makers' data sheets. Longest matching name wins.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Data-sheet bf16 peak of the device in FLOP/s, None if it is not in the table."""
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_of(name: str) -> float | None:
    """The same of a GPU by its name, wherever it is."""
    matches = [k for k in PEAK_FLOPS if re.match(rf"{k}(?![A-Za-z0-9])", name)]  # an L40 is no L4
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the device on CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return system.peak_memory() / 2**30


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def best_seconds(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Seconds that `work` takes, the best of some repeats: the first may compile or allocate."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def hardware_name(device: torch.device) -> str:
    """What this hardware is called: "NVIDIA H200", or "AMD EPYC (family 26, model 2, AVX512-BF16), 2 cores": the CPU's name and
    how many cores this process may use. Virtual machines of two CPU generations that differ by 2x in bf16 carry one model name:
    family, model and the bf16 instructions tell them apart.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, parts = platform.processor() or platform.machine(), []
    with contextlib.suppress(OSError):  # not Linux
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        found = dict(re.findall(r"^(model name|cpu family|model|flags)\s*: *(.*)$", text, re.MULTILINE))
        name = found.get("model name", name)  # ARM has none of them
        parts = [f"{what} {found[key]}" for what, key in (("family", "cpu family"), ("model", "model")) if key in found]
        flags = found.get("flags", "").split()
        parts += [what for what, flag in (("AVX512-BF16", "avx512_bf16"), ("AMX", "amx_bf16")) if flag in flags]
    which = f" ({', '.join(parts)})" if parts else ""
    return f"{name.strip()}{which}, {system.cores()} cores" + (" (mps)" if device.type == "mps" else "")


def describe(device: torch.device) -> dict:
    """Hardware, versions and the state of the source tree, for every record of a measurement."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=ROOT)
        except OSError:
            return None  # no git here
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "hardware": hardware_name(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": None if status is None else bool(status),
    }
