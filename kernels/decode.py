"""One token through GPT-2, on a CPU with AVX512, as one call: the kernel is decode.c, its plain reference GPT.forward().

    model = decode.wrap(model)          the same to call; one sequence's one new token goes through the kernel
    decode.why_not(model)               why the kernel cannot be used here, or None

For one sequence, a token takes the time to read all weights once. In bfloat16 PyTorch reads them at 0.6 of the rate of a copy
here, and loses more between its hundreds of calls on small tensors (LOG.md). The C compiler builds the kernel in a second, once
for each version of the source and kind of CPU.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_int, c_long, c_void_p, pointer
from pathlib import Path

import torch
from torch import Tensor, nn

from base import system
from engine import machine, restore
from model import GPT, KVCache
from variants import quantize
from variants.quantize import Int8Linear

SOURCE = Path(__file__).with_suffix(".c")
WIDEST, LONGEST = 16384, 16384  # the longest vector, the most positions: what the kernel's stack has room for
# In two calls: a library that is *linked* with -ffast-math switches denormal numbers off in the process that loads it.
COMPILE = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c", f"-DWIDEST={WIDEST}", f"-DLONGEST={LONGEST}"]
LINK = ["-shared", "-fopenmp"]
FEATURES = ("avx512f", "avx512bw", "avx512_bf16", "avx512_vnni")


class _Linear(Structure):
    _fields_ = [(name, c_void_p) for name in ("weight", "scales", "row_sums", "bias")] + [("rows", c_long), ("width", c_long)]


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class _Layer(Structure):
    _fields_ = [
        *((name, _Norm) for name in ("ln_1", "ln_2")),
        *((name, _Linear) for name in ("c_attn", "attn_proj", "c_fc", "mlp_proj")),
        *((name, c_void_p) for name in ("keys", "values")),
    ]


class _Model(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("wte", "wpe")),
        ("layers", POINTER(_Layer)),
        ("ln_f", _Norm),
        ("head", _Linear),
        *((name, c_long) for name in ("n_layer", "n_head", "n_embd", "tokens", "positions")),
    ]


@functools.cache
def build() -> ctypes.CDLL | str:
    """The loaded kernel, or why there is none."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"it is written for Linux on x86_64, not {platform.system()} on {platform.machine()}"
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    if missing := [f for f in FEATURES if f not in flags.split()]:
        return f"this CPU lacks {', '.join(missing)}"
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join([flags, *COMPILE, *LINK]).encode()).hexdigest()[:16]
    try:
        library = system.user_cache() / f"decode_{key}.so"
        if not library.is_file():
            compiler = next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
            if not compiler:
                return "there is no C compiler (Debian: apt install gcc)"
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                half, made = Path(folder, "decode.o"), Path(folder, "decode.so")
                for command in ([*COMPILE, SOURCE, "-o", half], [*LINK, half, "-o", made, "-lm"]):
                    done = subprocess.run([compiler, *command], capture_output=True, text=True)
                    if done.returncode:
                        message = (done.stderr.strip().splitlines() or ["no message"])[0]
                        return f"{compiler} cannot build {SOURCE.name}: {message}"
                os.replace(made, library)
        loaded = ctypes.CDLL(str(library))
    except OSError as e:
        return f"cannot build {SOURCE.name}: {e}"
    loaded.decode.argtypes, loaded.decode.restype = [POINTER(_Model), c_long, c_long, c_void_p, c_int], c_int
    return loaded


def why_not(model: GPT, dtype: torch.dtype | None = None) -> str | None:
    """Why the kernel cannot decode this model here, or None. dtype: as if its weights were of that one."""
    cfg, weight = model.cfg, model.transformer.wte.weight
    dtype = dtype or weight.dtype
    if weight.device.type != "cpu" or dtype != torch.bfloat16:
        return f"it computes bfloat16 on a CPU, not {str(dtype).removeprefix('torch.')} on {weight.device.type}"
    odd = {type(m).__name__ for m in linears(model)} - {"Linear", "Int8Linear"}
    if odd:
        return f"it does not know {', '.join(odd)}"
    if cfg.n_embd % 64 or cfg.n_embd // cfg.n_head % 32 or cfg.n_embd // cfg.n_head > 256:
        return f"it takes widths in whole 64s and heads in whole 32s up to 256, not {cfg.n_embd} and {cfg.n_embd // cfg.n_head}"
    if 4 * cfg.n_embd > WIDEST or cfg.block_size > LONGEST:
        return f"it takes widths up to {WIDEST // 4} and {LONGEST} positions"
    found = build()
    return found if isinstance(found, str) else None


def linears(model: GPT) -> list[nn.Module]:
    """Every linear layer, in the kernel's order, the head last."""
    return [m for b in model.transformer.h for m in (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj)] + [model.lm_head]


def _linear(module: nn.Module) -> _Linear:
    bias = None if module.bias is None else module.bias.data_ptr()
    if isinstance(module, Int8Linear):
        integers = module.integers
        return _Linear(integers.data_ptr(), module.scales.data_ptr(), module.row_sums.data_ptr(), bias, *integers.shape)
    return _Linear(module.weight.data_ptr(), None, None, bias, *module.weight.shape)


def _norm(module: nn.LayerNorm) -> _Norm:
    return _Norm(module.weight.data_ptr(), None if module.bias is None else module.bias.data_ptr())


class Decoder(nn.Module):
    """A model that is called like GPT. Keeps the addresses of its weights: they must not be replaced afterwards."""

    def __init__(self, model: GPT):
        super().__init__()
        assert why_not(model) is None, "the caller asks first"
        self.model, self.cfg, self.transformer = model, model.cfg, model.transformer
        self.cache = None  # the one whose addresses are in the structs
        cfg, parts = model.cfg, [_linear(m) for m in linears(model)]
        layers = (_Layer * cfg.n_layer)()
        for n, block in enumerate(model.transformer.h):
            layers[n] = _Layer(_norm(block.ln_1), _norm(block.ln_2), *parts[4 * n : 4 * n + 4], None, None)
        wte, wpe = (model.transformer[name].weight.data_ptr() for name in ("wte", "wpe"))
        sizes = cfg.n_layer, cfg.n_head, cfg.n_embd, len(model.transformer.wte.weight), len(model.transformer.wpe.weight)
        self.structs = _Model(wte, wpe, layers, _norm(model.transformer.ln_f), parts[-1], *sizes)

    def forward(self, idx: Tensor, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Logits as GPT.forward gives them, float32 from the kernel. idx (B, T). IndexError for an id without a row."""
        if cache is None or idx.shape != (1, 1):
            return self.model(idx, cache=cache, last_only=last_only)
        if cache is not self.cache:
            self.cache = cache
            for n in range(self.cfg.n_layer):
                self.structs.layers[n].keys, self.structs.layers[n].values = cache.k[n].data_ptr(), cache.v[n].data_ptr()
        logits = torch.empty(self.structs.head.rows)
        token, position = idx.item(), cache.length
        if build().decode(pointer(self.structs), token, position, logits.data_ptr(), torch.get_num_threads()):
            sizes = self.structs.tokens, self.structs.positions
            raise IndexError(f"token {token} at position {position}: the model has {sizes[0]} tokens and {sizes[1]} positions")
        cache.length += 1
        return logits[: self.cfg.vocab_size].view(1, 1, -1)


def wrap(model: GPT) -> GPT | Decoder:
    """The model behind the kernel, or the model itself where why_not() gives a reason."""
    return model if why_not(model) else Decoder(model)


def prepare(
    model: GPT, name: str, device: torch.device, dtype: str = "auto", bits: str = "none", one_token: bool = True
) -> tuple[GPT | Decoder, str]:
    """A model ready for decoding on a device, and its precision. UserError if it has weights that are no numbers.

    dtype: auto: the fastest precision that gives float32's greedy text: bfloat16 with the kernel, else float32. bits: as
    variants.quantize names them; those weights are decoded in 16 bits. one_token: whether it reads one at a time, as the kernel
    does.
    """
    model = model.to(device)
    if dtype == "auto":
        dtype = "bfloat16" if bits != "none" or (one_token and not why_not(model, torch.bfloat16)) else "float32"
    model = model.to(machine.DTYPES[dtype]).eval()
    restore.check_finite(model, f"{name} in {dtype}")
    return wrap(quantize.convert(model, bits) if bits != "none" else model), dtype
