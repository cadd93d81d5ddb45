"""machine.py: what a device has is used, what it has not is refused with a remedy, and what is measured is true."""

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch

import configurator
from base import errors, settings
from base.errors import UserError
from engine import machine

CPU = torch.device("cpu")


@pytest.fixture
def a_gpu(monkeypatch):
    """Enough of one for resolve(), whatever is here."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(machine, "find_spec", lambda name: name)


# ---- settings against the device ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("lacking", [None, "a compiler"])
def test_nothing_stays_auto_and_each_choice_is_reported(plain, monkeypatch, a_gpu, kind, lacking):
    """Whatever else is chosen; and what was named stays."""
    monkeypatch.setattr(machine, "why_no_compile", lambda device: lacking)
    autos = ("device", "dtype", "compile", "compile_scope", "fused_adamw", "reuse_memory")
    values = {f: ("auto", getattr(plain, f)) for f in autos}
    values |= dict(device=("auto", kind), compile_scope=("auto", "block"), reuse_memory=("auto", False))
    for chosen in itertools.product(*values.values()):
        asked = replace(plain, **dict(zip(autos, chosen, strict=True)))
        resolved, notes = machine.resolve(asked, torch.device(kind))
        assert "auto" not in vars(resolved).values()
        assert machine.not_available(resolved, torch.device(kind)) is None
        changed = {name: new for name, (_, new) in configurator.diff(asked, resolved).items()}
        assert all(getattr(asked, name) == "auto" for name in changed)
        if not resolved.compile:
            changed.pop("compile_scope", None)  # the scope of nothing
        assert [note.partition(" (")[0] for note in notes] == [f"{name} = {changed[name]}" for name in autos if name in changed]
    resolved, notes = machine.resolve(replace(plain, compile="auto"), torch.device(kind))
    assert resolved.compile is (lacking is None)
    assert lacking is None or any(lacking in note for note in notes)


UNAVAILABLE = [
    ("cuda", dict(reuse_memory=True), "reuse_memory=True is not available"),
    ("mps", dict(compile=True), "compile=True is not available"),
    ("mps", dict(fp32_precision="tf32"), "fp32_precision=tf32 is not available on mps"),
    ("cuda", dict(fp32_precision="bf16"), "fp32_precision=bf16 is not available on cuda"),
    ("cpu", dict(sdpa_backend="flash"), "sdpa_backend=flash is not available on cpu"),
    ("cpu", dict(compile=True, compile_mode="reduce-overhead"), "compile_mode=reduce-overhead is not available on cpu"),
    ("cuda", dict(compile=False, compile_mode="reduce-overhead"), "compile_mode=reduce-overhead needs --compile=True"),
    ("cpu", dict(parallel="fsdp", dtype="float16"), "parallel=fsdp is not available with dtype=float16"),
]


@pytest.mark.parametrize(("kind", "change", "message"), UNAVAILABLE)
def test_a_setting_that_is_not_available_is_refused_with_one_that_is(plain, monkeypatch, a_gpu, kind, change, message):
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    device = torch.device(kind)
    with pytest.raises(UserError, match=message) as e:
        machine.resolve(replace(plain, **change), device)
    assert str(e.value) == machine.not_available(replace(plain, **change), device)
    flags = re.findall(r"--\w+=[^\s,;)]+", str(e.value))
    remedied = settings.parse(replace(plain, **change), flags, "")
    assert machine.not_available(remedied, device) is None


def test_a_machine_without_glibc_or_compiler_does_without_and_says_why(plain, monkeypatch):
    """The compiler that is named is the one that is used."""
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setenv("CXX", "/nonexistent -O2")
    resolved, notes = machine.resolve(replace(plain, compile="auto", reuse_memory="auto"), CPU)
    assert (resolved.compile, resolved.reuse_memory) == (False, False)
    assert any(note.startswith("compile = False (there is no C++ compiler") for note in notes)
    for name, reason in (("reuse_memory", "glibc"), ("compile", r"there is no C\+\+ compiler")):
        with pytest.raises(UserError, match=rf"{reason}.*--{name}=False"):
            machine.resolve(replace(plain, **{name: True}), CPU)


def gpus(monkeypatch, count: int, mps: bool = True) -> None:
    """The machine has so many, and perhaps Apple's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_a_process_takes_its_own_of_the_first_kind_of_device_there_is(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    gpus(monkeypatch, 4)
    assert machine.pick_device("auto") == torch.device("cuda", 3)
    gpus(monkeypatch, 2)
    with pytest.raises(UserError, match="--nproc_per_node=2"):
        machine.pick_device("auto")
    gpus(monkeypatch, 0)
    assert machine.pick_device("auto").type == "mps"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="mps trains in one process only"):
        machine.pick_device("mps")
    gpus(monkeypatch, 0, mps=False)
    assert machine.pick_device("auto") == machine.pick_device("cpu") == CPU
    for kind in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"device={kind} is not available on this machine: use --device=auto .it has cpu"):
            machine.pick_device(kind)


# ---- what the hardware does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("digits", "name"), [(23, "ieee"), (10, "tf32"), (7, "bf16")])
def test_precision_is_found_from_the_error(monkeypatch, digits, name):
    """Matmuls whose inputs are rounded to so many bits of mantissa, as the hardware does it."""

    def rounded(t: torch.Tensor) -> torch.Tensor:
        mantissa, exponent = torch.frexp(t)
        return torch.ldexp(torch.round(mantissa * 2 ** (digits + 1)) / 2 ** (digits + 1), exponent)

    exact = torch.Tensor.__matmul__

    def matmul(a, b):
        return exact(rounded(a), rounded(b)) if a.dtype == torch.float32 else exact(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    assert machine.fp32_precision_measured(CPU) == name


def test_the_best_precision_is_one_the_hardware_multiplies(plain, monkeypatch):
    gpu, expected = torch.device("cuda"), {1: ("bfloat16", "bfloat16", "float32"), 0: ("float16", "float32", "float32")}
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for bf16, best in expected.items():
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=1, b=bf16: including_emulation or b)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=bf16: has)
        assert tuple(machine.best_dtype(torch.device(kind)) for kind in ("cuda", "cpu", "mps")) == best
    with pytest.raises(UserError, match="use --dtype=float16"):
        machine.resolve(replace(plain, dtype="bfloat16"), gpu)


def test_the_peak_is_that_of_the_longest_name_that_matches(monkeypatch):
    """Bytes and makers follow a name; another model's digits do not."""
    peaks = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12}
    peaks |= {"NVIDIA L40S": 362e12, "NVIDIA L40": None, "NVIDIA A10": None}  # an L40 is half an L40S, and no L4
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert machine.peak_flops(torch.device("cuda")) == peak
    assert machine.peak_flops(CPU) is None


# ---- memory -------------------------------------------------------------------------------------------------------------

# Prints, of a fresh process, whether freed memory is reused at first and, in five forks with heaps as odd as those of real
# programs, after set_reuse_memory().
FRESH = """
import os, random, sys
from engine import machine
print(machine.reuses_memory(), flush=True)
for seed in range(5):
    if os.fork() == 0:
        sizes = random.Random(seed)
        held = [bytearray(sizes.randrange(16, 200_000)) for _ in range(sizes.randrange(200))]
        print(machine.set_reuse_memory() and machine.reuses_memory(), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(machine.platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these settings")
@pytest.mark.slow
@pytest.mark.parametrize("huge", ["0", "1"])
def test_freed_memory_is_kept_once_malloc_is_set_to(root, huge):
    """Huge pages are not taken for it: faulted in 2 MiB at a time, 40 MiB are 20 faults, and each is zeroed anew."""
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": huge}
    done = subprocess.run([sys.executable, "-c", FRESH], env=env, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"] + ["True"] * 5


def limited(share: float, processes: int) -> list[str]:
    """What allocating a share of the free memory in two halves, untouched, gives before and after machine.limit_memory()."""
    free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)
    found = []
    for _ in range(2):
        try:
            held = [torch.empty(int(free * share / 2), dtype=torch.uint8) for _ in range(2)]
            found.append("granted")
            del held
        except RuntimeError as e:
            found.append("out of memory" if errors.is_out_of_memory(e) else str(e))
        machine.limit_memory()
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="memory can be limited on Linux only")
@pytest.mark.parametrize(
    ("share", "processes", "after"), [(0.7, 1, "granted"), (1.2, 1, "out of memory"), (0.7, 2, "out of memory")]
)
def test_more_than_is_free_is_refused_instead_of_granted(tmp_path, share, processes, after):
    """Without it, the kernel grants what it does not have and kills whoever uses it."""
    ((before, found),) = ranks.run(1, tmp_path / "ranks", limited, share, processes)
    if before != "granted":
        pytest.skip("this kernel grants no more than there is")
    assert found == after


# ---- what is written down of it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            {"cpu family": 25, "model": 17, "model name": "EPYC", "flags": "fpu avx512_bf16"},
            "family 25, model 17, AVX512-BF16",
        ),
        ({"cpu family": 23, "model": 49, "model name": "EPYC", "flags": "fpu avx512f"}, "family 23, model 49"),
        ({"model name": "EPYC", "flags": "amx_tile avx512_bf16 amx_bf16"}, "AVX512-BF16, AMX"),
        ({"Features": "asimd"}, None),  # Linux on ARM
        (None, None),  # macOS
    ],
)
def test_hardware_has_the_name_that_people_use(monkeypatch, cpuinfo, name):
    def read_text(*_, **__):
        if cpuinfo is None:
            raise FileNotFoundError
        return 2 * ("".join(f"{key}\t: {value}\n" for key, value in {"processor": 0, **cpuinfo}.items()) + "\n")

    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(Path, "read_text", read_text)
    expected = f"EPYC ({name})" if name else "arm64"
    assert machine.hardware_name(CPU) == f"{expected}, {len(os.sched_getaffinity(0))} cores"


def test_a_machine_is_described_in_json_values(root, monkeypatch):
    where = machine.describe(CPU)
    assert (where["device"], where["torch"]) == ("cpu", torch.__version__)
    assert all(v is None or isinstance(v, str | int | bool) for v in where.values())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, encoding="utf-8")
    if head.returncode == 0:
        assert head.stdout.startswith(where["commit"])
        assert type(where["dirty"]) is bool
    monkeypatch.setenv("PATH", "/nonexistent")
    assert (machine.describe(CPU)["commit"], machine.describe(CPU)["dirty"]) == (None, None)
