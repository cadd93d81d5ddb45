"""Weights in fewer bits, for decoding: one token at a time, a model takes as long as its weights take to be read.

    python sample.py out/run --quantize=int8 --dtype=bfloat16
    python bench.py decode out/run         what each form costs in validation loss, and how fast each decodes

int8: each row of a linear layer as integers from -127 to 127 and one scale, its largest absolute value / 127. int4: groups of
32 neighbours of a row as integers from 0 to 15, with a scale and a minimum per group. The error of a weight is at most half a
step. Only weights are quantized: activations are not, nor are embeddings, of which a token reads one row. The output head gets
integers of its own, also where its matrix is the token embedding.

Both are approximations: sample.py uses them only on request.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import UserError
from model import GPT

GROUP = 32  # neighbours that share a scale in int4; torch's CPU kernel takes 32, 64, 128 and 256


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(integers (out, in) int8, scales (out,) float32): weight ≈ integers · scales, wrong by scale / 2 at most."""
    scales = weight.float().abs().amax(1).clamp(min=1e-30) / 127
    return (weight.float() / scales[:, None]).round().to(torch.int8), scales


def to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(integers (out, in) uint8 from 0 to 15, scales and least values, each (out, in / 32) float32), by groups of a row."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(2), groups.amax(2)
    scales = ((high - low) / 15).clamp(min=1e-30)
    integers = ((groups - low[..., None]) / scales[..., None]).round().clamp(0, 15)
    return integers.flatten(1).to(torch.uint8), scales, low


def has_kernel(device: torch.device) -> bool:
    """Whether torch multiplies by integers there without restoring the weights first."""
    return device.type == "cpu"


class Int8Linear(nn.Module):
    """x Wᵀ + b with W in int8. On a CPU by torch's kernel, which reads the integers as they are; elsewhere W is restored in x's
    precision by a product that torch.compile fuses into the matmul. For one token there is kernels/decode.py.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        integers, scales = to_int8(linear.weight.detach())
        self.register_buffer("integers", integers)
        self.register_buffer("scales", scales)
        self.register_buffer("row_sums", integers.sum(1, dtype=torch.int32))
        self.bias, self.packed = linear.bias, has_kernel(linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        scales = self.scales.to(x.dtype)
        if self.packed:
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.integers, scales).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.integers.to(x.dtype)) * scales
        return y if self.bias is None else y + self.bias


class Int4Linear(nn.Module):
    """x Wᵀ + b with W in int4, two to a byte."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        if weight.size(1) % GROUP:
            raise UserError(f"int4 needs widths that are multiples of {GROUP}, not {weight.size(1)}: use --quantize=int8")
        integers, scales, low = to_int4(weight)
        self.packed = has_kernel(weight.device)
        if self.packed:
            # torch's kernel computes (integer - 8) · scale + middle, for rows in whole 16s
            more = (0, 0, 0, -len(integers) % 16)
            integers, scales, low = (F.pad(t, more) for t in (integers, scales, low))
            pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
            self.register_buffer("integers", pack(integers.to(torch.int32), 1))
            both = torch.stack((scales, low + 8 * scales), dim=-1).transpose(0, 1)  # (in / 32, out, 2)
            self.register_buffer("scales", both.to(weight.dtype).contiguous())
        else:
            self.register_buffer("integers", integers[:, ::2] | integers[:, 1::2] << 4)
            self.register_buffer("scales", torch.stack((scales, low), dim=-1).to(weight.dtype))  # (out, in / 32, 2)
        self.bias, self.rows = linear.bias, len(weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            flat = x.flatten(0, -2)
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.integers, GROUP, self.scales)
            y = y[:, : self.rows].reshape(*x.shape[:-1], -1)
        else:
            nibbles = torch.stack((self.integers & 15, self.integers >> 4), dim=-1).flatten(1)
            scales, low = self.scales[..., None].unbind(2)
            y = F.linear(x, (nibbles.unflatten(1, (-1, GROUP)).to(x.dtype) * scales + low).flatten(1))
        return y if self.bias is None else y + self.bias


FORMS = {"int8": Int8Linear, "int4": Int4Linear}


def convert(model: GPT, form: Literal["int8", "int4"]) -> GPT:
    """Replace every linear layer of a model, on its device and in its precision, by one in that form. Changes it in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, FORMS[form](child))
    return model


def bytes_per_token(model: GPT) -> int:
    """Bytes of weights that decoding one token reads: all but the embeddings, of which it reads a row each."""
    read = (m for m in model.modules() if not isinstance(m, nn.Embedding))
    return sum(t.nbytes for m in read for t in (*m.parameters(recurse=False), *m.buffers(recurse=False)))
