"""GPT-2 as a function of its tokens: the mathematics and nothing else (no devices, no optimizer, no files).

The architecture is GPT-2's: pre-norm blocks, tanh GELU, learned positions, biases (Radford et al. 2019). Parameter names are
those of the Hugging Face layout, so that weights travel both ways by name (engine/pretrained.py). What changes the speed but
not the mathematics (compilation, precision, several devices) wraps this module from outside, in engine/run.py.

Shapes: B sequences, T tokens, C = n_embd, H heads of D = C / H, V = vocab_size, S = keys seen so far (cache included).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import GPTConfig

# The four released sizes (https://github.com/openai/gpt-2).
GPT2_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S) booleans, True where the query may look. The T queries are the last T of the S positions."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v as in the paper: q (B, H, T, D), k and v (B, H, S, D). Stores B·H·T·S scores."""
    T, S = q.size(-2), k.size(-2)
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    scores = scores.masked_fill(~causal_mask(T, S, q.device), float("-inf"))
    # In fp32 even under autocast, on every device: a bf16 sum over S terms loses what the softmax is for.
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return F.dropout(weights, dropout) @ v


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The same, a block of queries at a time, each with the keys that some query of it may see: with n blocks, (n + 1) / 2n of
    the scores are computed and stored. Blocks of 128 queries, or two of them for a shorter text. Shapes as above.
    """
    T, S = q.size(-2), k.size(-2)
    rows = max(16, min(128, T // 2))  # below 16 rows a block is no longer a matmul worth starting
    seen = [S - T + min(start + rows, T) for start in range(0, T, rows)]  # the queries are the last T of the S positions
    blocks = zip(q.split(rows, dim=-2), seen, strict=True)
    return torch.cat([naive_attention(part, k[..., :s, :], v[..., :s, :], dropout) for part, s in blocks], dim=-2)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The same, fused: the scores stay in cache tiles, so memory grows with T instead of T². Shapes as above."""
    T, S = q.size(-2), k.size(-2)
    # is_causal reaches the flash kernels; it means the top-left triangle, so it is only right when T == S.
    # One new token (T == 1) sees every key: no mask at all.
    mask = None if T in (1, S) else causal_mask(T, S, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=T == S and T > 1)


ATTENTION = {"naive": naive_attention, "blocked": blocked_attention, "sdpa": sdpa_attention}


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Nats, at least in fp32: logits (B, T, V), targets (B, T), -100 where a position does not count. "none": (B·T,)."""
    # fp32 by hand: autocast does so on CUDA but not everywhere, and the loss must not depend on the device
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


class KVCache:
    """Keys and values of the tokens seen so far, so that each new token costs one position instead of all of them.

    Holds 2 · n_layer tensors of (B, H, block_size, D), allocated once: 2·L·B·T·C numbers (75 MB in fp32 for 124M, B=1).
    """

    def __init__(self, cfg: GPTConfig, B: int, device: torch.device, dtype: torch.dtype):
        shape = (cfg.n_layer, B, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens stored; GPT.forward advances it once all layers have written

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H, T, D) of one layer after what it has; return all its keys and values (B, H, S, D)."""
        end = self.length + k.size(-2)
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Attention(nn.Module):
    def __init__(self, cfg: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, cfg.n_head, cfg.dropout
        self.attend = ATTENTION[cfg.attention]
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias)  # q, k and v in one matmul
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        # (B, T, 3C) -> three views of (B, H, T, D): no copy is made here
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        y = self.attend(q, k, v, dropout)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, dropout)


class MLP(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.dropout = cfg.dropout
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=cfg.bias)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # the tanh form is GPT-2's; the exact one shifts its logits
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, cfg: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
        self.attn = Attention(cfg, layer)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)  # the stream itself is never normalised, only what the branches read
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only transformer. Built on the default device (`with torch.device("meta")` costs no memory) with weights
    drawn from torch's global generator: the same seed gives the same weights, padded vocabulary or not.
    """

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.cfg = cfg
        with torch.device("meta"):  # shapes only: init_weights() draws each number once, in one fixed order
            self.transformer = nn.ModuleDict(
                dict(
                    wte=nn.Embedding(cfg.padded_vocab_size, cfg.n_embd),
                    wpe=nn.Embedding(cfg.block_size, cfg.n_embd),
                    h=nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer)),
                    ln_f=nn.LayerNorm(cfg.n_embd, bias=cfg.bias),
                )
            )
            self.lm_head = nn.Linear(cfg.n_embd, cfg.padded_vocab_size, bias=False)
        self.to_empty(device=torch.get_default_device())
        self.tie_weights()
        self.init_weights()

    def tie_weights(self) -> None:
        """Make the output head and the token embedding one parameter, if the config says so."""
        if self.cfg.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every weight. Padding rows of the vocabulary are zero and draw nothing."""
        cfg, V = self.cfg, self.cfg.vocab_size
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding | nn.Linear):
                rows = V if name in ("transformer.wte", "lm_head") else None
                if rows and name == "transformer.wte" and cfg.tie_weights and cfg.init == "pytorch":
                    continue  # the shared matrix keeps the head's initialisation, as `wte.weight = lm_head.weight` does
                if rows and name == "lm_head" and cfg.tie_weights and cfg.init == "gpt2":
                    continue  # drawn already, as wte
                weight = module.weight[:rows]  # all of it, but for the vocabulary's padding
                if cfg.init == "gpt2":
                    # std 0.02, positions 0.01, biases 0: openai/gpt-2 src/model.py
                    nn.init.normal_(weight, std=0.01 if name == "transformer.wpe" else 0.02)
                elif isinstance(module, nn.Embedding):
                    nn.init.normal_(weight)  # nn.Embedding's own default
                else:
                    bound = 1 / math.sqrt(weight.size(1))  # nn.Linear's own default, weight and bias alike
                    nn.init.uniform_(weight, -bound, bound)
                if rows:
                    module.weight[V:].zero_()
                if getattr(module, "bias", None) is not None:
                    if cfg.init == "gpt2":
                        nn.init.zeros_(module.bias)
                    else:
                        nn.init.uniform_(module.bias, -bound, bound)
                if cfg.scale_residual_init and name.endswith("c_proj"):
                    # 2·L branches add into the stream; dividing each by sqrt(2·L) keeps its variance near one branch's
                    module.weight.div_(math.sqrt(2 * cfg.n_layer))

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """The mean cross-entropy (a scalar in nats, at least fp32) if targets are given, else the logits.

        idx: (B, T) int64 token ids. targets: (B, T) int64, -100 where a position does not count.
        cache: the tokens before idx; idx is added to it. Returns logits (B, T, V), or (B, 1, V) with last_only.
        The padding rows of the vocabulary are cut off before the softmax and before anything is returned: padded ids
        have no probability, add nothing to the loss and receive a gradient of exactly zero.
        """
        past = cache.length if cache is not None else 0
        T = idx.size(1)
        assert past + T <= self.cfg.block_size, f"{past + T} tokens, but block_size is {self.cfg.block_size}"
        positions = torch.arange(past, past + T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        x = F.dropout(x, self.cfg.dropout, self.training)
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            cache.length += T
        return self.head(x[:, -1:] if last_only else x, targets)

    def head(self, x: Tensor, targets: Tensor | None) -> Tensor:
        """From the residual stream (B, T, C) to forward's result: its own method, so that it can be compiled on its own."""
        logits = self.lm_head(self.transformer.ln_f(x))[..., : self.cfg.vocab_size]
        if targets is None:
            return logits
        return cross_entropy(logits, targets)

    def n_params(self) -> int:
        """How many parameters, shared ones once, without the padding rows: 124,439,808 for GPT-2 124M."""
        total = sum(p.numel() for p in self.parameters())
        matrices = 1 if self.cfg.tie_weights else 2
        return total - matrices * (self.cfg.padded_vocab_size - self.cfg.vocab_size) * self.cfg.n_embd
