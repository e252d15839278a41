# SPDX-License-Identifier: MIT
"""QuAILoRA: quantization-aware initialization for LoRA (arXiv 2410.14713), in one file.

QLoRA trains a LoRA adapter, started at zero, on a base rounded to 4 bits. QuAILoRA starts it where
it cancels as much of the rounding as rank r can, on inputs that the layer really sees. One problem
a linear layer, solved by alternating least squares (ALS):

    (1)  min over A, B of  1/2 || (W - (Q + A B^T)) X ||_F^2
    (2)  min over A, B of  1/2 || W - (Q + A B^T) ||_F^2       without data, that is X X^T = I

    (3)  E = W - Q = U S V^T                      the start: an SVD of the rounding error,
    (4)  A = U_r sqrt(S_r),  B = V_r sqrt(S_r)    cut off at rank r
    (5)  A   = E H B (B^T H B)^-1                 the best A for this B,
    (6)  B^T = (A^T A)^-1 A^T E                   the best B for that A; 20 times in turn

    in code    paper    shape                  meaning
    W          W        (out, in)              full-precision weight (the paper: m x n)
    Q          Q        (out, in)              W after rounding, `quantize(W).dequantize()`
    E          W - Q    (out, in)              rounding error
    X          X        (in, tokens)           inputs of the layer in the full-precision model
    H          X X^T    (in, in)               their products; X itself is never stored
    A, B       A, B     (out, r), (in, r)      low-rank factors
    lora_A              (r, in)                trained; its rows span what the columns of B do
    lora_B              (out, r)               trained; scaling * lora_B lora_A = A B^T
    scaling                                    alpha / r, or alpha / sqrt(r) with rsLoRA

    rows = apply_quailora(model, batches)    # replaces the linear layers; then train as usual

    rows = initialize_peft(model, batches)   # the same on a rounded model that peft has adapted

Part one is the paper, on torch alone; it runs without what follows the ruler at its end, and knows
of it by INITS, LAYER_OF, WAY, `LoRALinear.rounding` and `QuantizedWeight.kernels` alone. Part two:
adapters on disk, bitsandbytes' kernels, other starts (LoftQ, CLoQ, joint), block by block,
sequential starts, QA-LoRA and its GGUF, and the start for peft. Not here: dropout on the adapter of
LoRALinear, rounding of activations, experts that are 3-D parameters."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.linalg import pinv, qr, svd
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

# --------------------------------------------------------------------- 1  The paper: E, H -> A, B


@contextlib.contextmanager
def _exactly():
    """Without gradients, and without autocast and TF32, which would multiply in fewer digits."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    off = partial(torch.autocast, enabled=False)
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), off("cpu"), off("cuda"):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@_exactly()
def svd_init(E: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best A B^T of rank r for E, (out, in), without data: the optimum of (2).
    Results and errors raised as for `als_init`."""
    _check(E, None, rank)
    U, sigma, Vt = svd(_float(E), full_matrices=False)  # (3) E = U S V^T
    root = sigma[:rank].sqrt()
    return U[:, :rank] * root, Vt[:rank].T * root  # (4) A = U_r sqrt(S_r), B = V_r sqrt(S_r)


@_exactly()
def als_init(E: Tensor, H: Tensor, rank: int, steps=20, return_errors=False):
    """QuAILoRA: A and B by (3) to (6), with `steps` rounds of (5) and (6).

    E: (out, in), W - Q. H: (in, in), X X^T, of any scale, may be singular. Returns A (out, r) and
    B (in, r) in the form of (4), in float32, or float64 if E is; with return_errors also objective
    (1) at the start and after every (5) and (6), for two products E H more a step. ValueError if
    rank is not within 1 .. min(out, in), the shapes do not fit, or E or H is not finite."""
    _check(E, H, rank, steps=steps)
    E = _float(E)
    H = H.to(E.dtype)
    U, sigma, V = _truncated_svd(E, rank)  # (3) E = U S V^T, nearly: see there
    A, B = U * sigma.sqrt(), V * sigma.sqrt()  # (4) A = U_r sqrt(S_r), B = V_r sqrt(S_r)
    errors = [calibrated_error(E, A, B, H)] if return_errors else []
    EH = E @ H if len(E) < steps * rank else None  # once, where that is less than H B every time
    for _ in range(steps):
        EHB = E @ (H @ B) if EH is None else EH @ B
        # (5) A = E H B (B^T H B)^-1. The r x r factor changes the basis of A, not its span, and
        # the span is all that (6) sees: so A gets an orthonormal basis, and nothing is inverted.
        # With (6) this is a subspace iteration on E H E^T
        A = qr(EHB).Q
        if return_errors:
            errors.append(_error_after_5(E, A, B, H))
        # (6) B^T = (A^T A)^-1 A^T E, and A^T A = I. H cancels: the best B does not depend on it
        B = E.T @ A
        if return_errors:
            errors.append(calibrated_error(E, A, B, H))
    if not B.isfinite().all():
        raise ValueError(f"E H is beyond the largest {E.dtype}: E or H is too large")
    A, B = _balanced(A, B)
    return (A, B, errors) if return_errors else (A, B)


@_exactly()
def exact_init(E: Tensor, H: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A global optimum of (1) in closed form (QERA, arXiv 2410.06040; CLoQ, 2501.18475): A = U_r,
    the top r eigenvectors of E H E^T, and B^T = U_r^T E. ALS converges to it from all but special
    starts. Computed in float64; arguments, results and errors raised as for `als_init`."""
    _check(E, H, rank)
    P, R = qr(E.double())  # E = P R: the same problem for R, of min(out, in) rows
    U = torch.linalg.eigh(R @ H.double() @ R.T).eigenvectors[:, -rank:]  # in ascending order
    A, B = _balanced(P @ U, R.T @ U)
    dtype = _float(E).dtype
    return A.to(dtype), B.to(dtype)


@_exactly()
def calibrated_error(E: Tensor, A: Tensor, B: Tensor, H: Tensor | None) -> float:
    """Objective (1), 1/2 || (E - A B^T) X ||_F^2 = 1/2 tr (E - A B^T) H (E - A B^T)^T, computed in
    the dtype of A and B, summed in float64. H = None is the identity: (2), without data."""
    D = torch.addmm(E.to(A.dtype), A, B.T, alpha=-1)
    H = H if H is None else H.to(D.dtype)
    parts = ((rows if H is None else rows @ H) * rows for rows in D.split(1024))
    error = sum(part.sum(dtype=torch.float64) for part in parts)
    return max(float(error), 0.0) / 2  # NaN stays


def _error_after_5(E, A, B, H):
    """Objective (1) after (5), from the orthonormal basis A of its span: the A of (5) is A C with
    C = A^T E H B (B^T H B)^-1, (r, r) in float64, so its product is A (B C^T)^T."""
    B = B.double()
    HB = H.double() @ B
    C = (E.T @ A).double().T @ HB @ pinv(B.T @ HB, hermitian=True)
    return calibrated_error(E, A, (B @ C.T).to(E.dtype), H)


def _truncated_svd(E, rank):
    """U (out, r), sigma (r,), V (in, r) of (3), from a random sketch of E and a power iteration:
    exact where min(out, in) <= r + 24, else an approximation, and the same one every time."""
    width, generator = min(rank + 24, *E.shape), torch.Generator(E.device).manual_seed(0)
    V = torch.randn(E.shape[1], width, generator=generator, dtype=E.dtype, device=E.device)
    V = qr(E.T @ qr(E @ V).Q).Q  # a power iteration
    P = qr(E @ V).Q  # E = P P^T E, nearly
    V, sigma, Ut = svd(E.T @ P, full_matrices=False)
    return P @ Ut[:rank].T, sigma[:rank], V[:, :rank]


def _balanced(A, B):
    """A B^T as U sqrt(S), V sqrt(S): in the form of (4), A^T A = B^T B = S."""
    P, R = qr(A)
    V, sigma, Tt = svd(B @ R.T, full_matrices=False)  # B R^T = V S T^T
    return P @ Tt.T * sigma.sqrt(), V * sigma.sqrt()


def _float(M):
    return M.to(_wide(M.dtype))


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)  # float64 stays


def _check(W, H=None, rank=1, name="", alpha=1, init="svd", steps=0):
    """ValueError, with the numbers, for what cannot be rounded, W or E (out, in), or started."""
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    of, shape = name and f" of {name}", tuple(W.shape)
    if len(shape) != 2 or not W.is_floating_point() or 0 in shape:
        raise ValueError(f"expected a 2-D float weight{of}, got {W.dtype} of shape {shape}")
    if type(W) is Tensor and W.is_meta:
        raise ValueError(f"the weight{of} is on the meta device: load it")
    if H is not None and H.shape != (shape[1], shape[1]):
        raise ValueError(f"H{of} must be {(shape[1], shape[1])}, got {tuple(H.shape)}")
    if not 1 <= rank <= min(shape):
        raise ValueError(f"rank {rank} is not within 1 .. min(out, in) = {min(shape)}{of}")
    for M, entries in (W, "weights"), (H, "entries of H"):
        if M is not None and not M.sum().isfinite() and not M.isfinite().all():
            bad = (~M.isfinite()).sum()
            raise ValueError(f"{bad} of {M.numel()} {entries}{of} are NaN or inf")


# ------------------------------------------------------------------------- 2  Quantization: W -> Q


@torch.no_grad()
def quantize(W: Tensor, bits=4, block_size=64, double_quant=True) -> QuantizedWeight:
    """Round W, (out, in) of any float dtype, to the nearest level of its block.

    2, 3, 4 bits: NormalFloat (arXiv 2305.14314) in blocks of `block_size` weights, rows joined;
    `double_quant` rounds their scales to 8 bits too. With 4, NF4, bit for bit what bitsandbytes
    makes on a CPU, if installed; without it 2 of 1,000 scales differ, where its code misses the
    nearest. 8 bits: int8 with a scale a row, as in LLM.int8 (arXiv 2208.07339). 16 bits: W as it
    is. Raises ValueError for a W that is not 2-D, float and finite, and other bits or sizes."""
    _check(W)
    if bits not in (2, 3, 4, 8, 16):
        raise ValueError(f"bits must be 2, 3, 4, 8 or 16, got {bits}")
    if block_size < 2 or block_size % 2:
        raise ValueError(f"block_size must be even and positive, got {block_size}")
    make = partial(QuantizedWeight, W.shape, W.dtype, bits)
    if bits == 16:
        return make(None, codes=W.clone())
    W = W.float()
    if bits == 8:
        absmax = W.abs().amax(1)
        codes = W * (127 / absmax.clamp(min=1e-36))[:, None]
        return make(None, codes=codes.round().to(torch.int8), absmax=absmax)
    codes, absmax = _round_blocks(W.reshape(-1), normal_float(bits), block_size)
    buffers = {"codes": _pack(codes, bits)[:, None], "absmax": absmax}
    if double_quant:
        offset, kernels = absmax.mean(), QuantizedWeight.kernels
        round_scales = kernels.round_blocks if kernels and bits == 4 else _round_blocks
        codes, nested = round_scales(absmax - offset, dynamic_map(absmax.device), 256)
        buffers |= {"absmax": codes, "nested_absmax": nested, "offset": offset}
    return make(block_size, **buffers)


class QuantizedWeight(nn.Module):
    """Q = scale * level. Buffers: `codes`, uint8 as in `_pack`, int8 (out, in) or with 16 bits W;
    `absmax`, the float32 scale of each block or row, or with double quantization its uint8 code,
    with `nested_absmax`, a float32 for 256 of them, and `offset`, a float32."""

    kernels, format, group_size = None, "nf", None  # for sections 7, 6 and 10

    def __init__(self, shape, dtype, bits, block_size, **buffers):
        super().__init__()
        self.shape, self.dtype, self.bits = torch.Size(shape), dtype, bits
        self.block_size, self.double_quant = block_size, "offset" in buffers  # block None: a row
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def _apply(self, fn, recurse=True):
        """Follow moves to a device, but not casts: model.half() would round the scales."""
        return super()._apply(lambda M: M.to(fn(M.new_empty(0)).device), recurse)

    def forward(self, x):
        """x Q^T, (..., in) -> (..., out), in the dtype of x."""
        return _FrozenProduct.apply(x, self)

    def dequantize(self, dtype=None):
        """Q, (out, in), in `dtype` (default: that of W)."""
        dtype = dtype or self.dtype
        if self.bits == 16:
            return self.codes.to(dtype)
        if self.kernels and self.kernels.has(self, dtype):
            return self.kernels.dequantize(self, dtype)
        return (self.values() * self.of_each(self.scales())).to(dtype)

    def values(self):
        """The level of each weight, (out, in)."""
        if self.bits == 8:
            return self.codes.float() / 127
        return normal_float(self.bits, self.codes.device)[self.unpacked()]

    def unpacked(self):
        """The code of each weight, (out, in) in int32."""
        codes = _pack(self.codes.view(-1), 8, self.bits)
        return codes[: self.shape.numel()].view(self.shape).int()

    def scales(self):
        """float32 (blocks,), or (out,) for 8 bits."""
        if not self.double_quant:
            return self.absmax
        nested = self.nested_absmax.repeat_interleave(256)[: len(self.absmax)]
        return dynamic_map(nested.device)[self.absmax.int()] * nested + self.offset

    def of_each(self, values):
        """`values` of the blocks, (blocks,), for every weight of them: (out, in)."""
        each = values.repeat_interleave(self.block_size or self.shape[1])
        return each[: self.shape.numel()].view(self.shape)


class _FrozenProduct(torch.autograd.Function):
    """Keeps the codes for backward, where F.linear would keep Q."""

    @staticmethod
    def forward(ctx, x, base):
        ctx.base = base
        return nn.functional.linear(x, base.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.base.dequantize(grad.dtype), None


def _round_blocks(x, levels, block_size):
    """Scale each block of a flat float32 x to [-1, 1] and take the nearest level, at a tie the
    lower one: uint8 codes (n,) and the scales (blocks,), the largest magnitude of each block."""
    blocks = nn.functional.pad(x, (0, -len(x) % block_size)).view(-1, block_size)
    absmax = torch.maximum(blocks.amax(1), -blocks.amin(1))
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).view(-1)[: len(x)]
    codes = torch.zeros_like(scaled, dtype=torch.uint8)
    midpoints = ((levels[:-1] + levels[1:]) / 2).tolist()
    for part, code in zip(scaled.split(2**17), codes.split(2**17), strict=True):  # fit a cache
        for midpoint in midpoints:
            code += part > midpoint
    return codes, absmax


def _pack(codes, bits, to=8):
    """uint8 codes (n,) below 2^bits, their bits in a row, the highest first, cut into codes below
    2^to: into bytes, and back with (bytes, 8, bits). The last byte is filled up (level 0).
    [1, 2, 3, 0] of 2 bits is [0b01101100]."""
    size = math.lcm(bits, to)  # of a word
    n, dtype = size // bits, torch.uint8 if size == 8 else torch.int32  # n codes in a word
    codes = nn.functional.pad(codes, (0, -len(codes) % n), value=2 ** (bits - 1) - 1).view(-1, n)
    words = sum(codes[:, i].to(dtype) << (size - bits - bits * i) for i in range(n))
    cut = [words >> shift & 2**to - 1 for shift in range(size - to, -1, -to)]
    return torch.stack(cut, 1).to(torch.uint8).view(-1)


@cache
def normal_float(bits: int, device=None) -> Tensor:
    """The 2^bits levels of NormalFloat (arXiv 2305.14314, appendix E), ascending: quantiles of a
    normal distribution, scaled to [-1, 1], half of them above an exact zero, one fewer below."""
    half = 2 ** (bits - 1)
    most = round(1 - (0.5 / 2**bits + 0.5 / (2**bits - 1)) / 2, 7)  # 7 digits, as bitsandbytes' NF4
    linspace = partial(torch.linspace, dtype=torch.float32)
    above = torch.special.ndtri(linspace(0.5, most, half + 1).double())  # 0 and up
    below = torch.special.ndtri(linspace(most, 0.5, half)[:-1].double())
    levels = torch.cat([-below, above]).float()
    return (levels / levels[-1]).to(device)


@cache
def dynamic_map(device=None) -> Tensor:
    """The 256 levels for scales (arXiv 1511.04561): 0, 1, and, with both signs, the centers of
    2^i cells in the decade below 10^(i-6), i < 7."""
    edges = [torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32) for i in range(7)]
    centers = [10 ** (i - 6) * (edge[:-1] + edge[1:]) / 2 for i, edge in enumerate(edges)]
    centers = torch.cat(centers)
    return torch.cat([-centers, centers, centers.new_tensor([0, 1])]).sort().values.to(device)


# --------------------------------------------- 3  The layer: x -> Q x + scaling * lora_B lora_A x


def split_product(A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """lora_A (r, in) and lora_B (out, r) with scaling * lora_B lora_A = A B^T, to train from. (1)
    fixes their product alone, but the gradient of each is multiplied by the other: lora_A gets
    orthogonal rows, of the norm of a normal draw of deviation 1 / sqrt(r), and lora_B the rest.
    Not as in (4): README.md says what it is worth."""
    V, R = qr(B.double())  # B = V R
    if not B.any():  # nothing to repair: not the first r inputs, but random directions
        V = qr(torch.randn_like(V)).Q
    size = math.sqrt(len(B) / B.shape[1])
    lora_B = A.double() @ R.T / (size * scaling)
    return (V.T * size).to(A.dtype).contiguous(), lora_B.to(A.dtype)


class Init(NamedTuple):
    """A way to start: how A, B are found for E = W - Q, and Q if it is not quantize(W)."""

    solve: Callable  # E, H, rank, steps -> A, B
    needs_data: bool
    choose: Callable | None = None  # W, H, base, rounding, solve -> another base


def _zero_init(E, H, rank, steps):
    return E.new_zeros(len(E), rank), E.new_empty(E.shape[1], rank).normal_()


INITS = {
    "qlora": Init(_zero_init, needs_data=False),  # QLoRA: A = 0, B random, split as the others
    "svd": Init(lambda E, H, rank, steps: svd_init(E, rank), needs_data=False),
    "quailora": Init(als_init, needs_data=True),
    "exact": Init(lambda E, H, rank, steps: exact_init(E, H, rank), needs_data=True),
}


class LoRALinear(nn.Module):
    """x -> Q x + scaling lora_B lora_A x + bias. `base`, a QuantizedWeight, and `bias`, (out,) or
    None, are frozen; `lora_A` (r, in) and `lora_B` (out, r) train, in float32 (or float64)."""

    kind = nn.Linear  # the class of the layer that it replaced
    own_base = False  # whether Q is not quantize(W)
    init = report = None  # the method, and the errors that a row has
    rounding = staticmethod(quantize)  # W, bits, **layout -> base

    def __init__(self, base, lora_A=None, lora_B=None, alpha=1.0, rslora=False, bias=None):
        super().__init__()
        self.base, (self.out_features, self.in_features) = base, base.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.set_adapter(lora_A, lora_B, alpha, rslora)

    def set_adapter(self, lora_A, lora_B, alpha, rslora=False):
        """None for no adapter: x -> Q x. A factor that is a Parameter stays that one."""
        self.rank = 0 if lora_A is None else len(lora_A)
        self.alpha, self.rslora = alpha, rslora
        self.scaling = alpha / max(1, math.sqrt(self.rank) if rslora else self.rank)
        self.lora_A = lora_A if isinstance(lora_A, nn.Parameter | None) else nn.Parameter(lora_A)
        self.lora_B = lora_B if isinstance(lora_B, nn.Parameter | None) else nn.Parameter(lora_B)

    @staticmethod
    def solver(init, rank, steps, **layout):
        return partial(INITS[init].solve, rank=rank, steps=steps)  # E, H -> A, B

    @classmethod
    @_exactly()
    def from_linear(
        cls, linear, H=None, rank=64, alpha=16, bits=4, init="quailora", steps=20, rslora=False,
        floor=False, **layout,
    ):  # fmt: skip
        """Quantize `linear` (nn.Linear or Conv1D) and start its adapter from H, (in, in), or None
        for the identity. Options, errors raised and `report` as `apply_quailora` has them."""
        W, began = _weight(linear), time.perf_counter()
        _check(W, H, rank, "", alpha, init, steps)
        method = INITS[init]
        if H is not None:
            H = H.to(W.device)
        elif floor or method.needs_data:
            H = torch.eye(W.shape[1], device=W.device)
        rounding = partial(cls.rounding, bits=bits, **layout)
        solve = cls.solver(init, rank, steps, **layout)
        base = nearest = rounding(W)
        own_base = method.choose is not None and bits < 8  # with 8, nothing is left to gain
        if own_base:
            base = method.choose(_float(W), H, nearest, rounding, solve)
        E = _rounding_error(W, base)
        A, B = solve(E, H)
        factors = split_product(A, B, alpha / (math.sqrt(rank) if rslora else rank))
        layer = cls(base, *factors, alpha, rslora, linear.bias)
        layer.kind, layer.init, layer.own_base = type(linear), init, own_base
        layer.report = {"seconds": time.perf_counter() - began}
        least = cls.solver("exact", rank, steps, **layout)(E, H) if floor else None
        whole = None
        if own_base:
            whole = calibrated_error(_rounding_error(W, nearest), 0 * A, B, H)
        layer.report |= _left(E, A, B, H, least, whole)
        return layer

    def forward(self, x):
        """(..., in) -> (..., out), in the dtype of x, or of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = self.base(x)
        if self.rank:
            h = nn.functional.linear(self.adapter_input(x.to(self.lora_A.dtype)), self.lora_A)
            y = y + nn.functional.linear(h * self.scaling, self.lora_B).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def adapter_input(self, x):
        return x

    def update(self):
        """What is added to Q, (out, in)."""
        return self.scaling * self.lora_B @ self.lora_A

    @_exactly()
    def merged_weight(self):
        """Q + scaling * lora_B lora_A, (out, in), in the dtype of the factors; without them Q."""
        if not self.rank:
            return self.base.dequantize(_wide(self.base.dtype))
        return self.base.dequantize(self.lora_A.dtype) + self.update()

    def merged(self):
        """The layer that was replaced, with the merged weight in the dtype of W."""
        weight = self.merged_weight().to(self.base.dtype)
        if self.kind is nn.Linear:
            linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        else:  # Conv1D
            linear, weight = self.kind(self.out_features, self.in_features), weight.T.contiguous()
        linear.weight, linear.bias = nn.Parameter(weight), self.bias
        return linear

    def extra_repr(self):
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, rank={self.rank}, scaling={self.scaling:g}, bits={self.base.bits}"


def _rounding_error(W, base):
    """E = W - Q, (out, in), in float32 at least."""
    W = _float(W)
    return W - base.dequantize(W.dtype)


def _left(E, A, B, H, least=None, whole=None):
    """The errors of a row: that of A, B and that of `least`, another A, B, over the square root of
    `whole`, by default (1) without an adapter."""
    left = {"initialized": calibrated_error(E, A, B, H)}
    if least:
        left["floor"] = calibrated_error(E, *least, H)
    if whole is None:  # || E X ||^2 = || (E - A B^T) X ||^2 + 2 <E X, A B^T X> - || A B^T X ||^2
        HB = B if H is None else H.to(B.dtype) @ B
        taken = A * (2 * E @ HB - A @ (B.T @ HB))
        whole = max(left["initialized"] + taken.sum(dtype=torch.float64).item() / 2, 0.0)
    return {key: math.sqrt(error / (whole or 1)) for key, error in left.items()}


def _weight(linear):
    """The weight as (out, in): GPT-2's Conv1D holds it transposed."""
    weight = linear.weight.detach()
    return weight if isinstance(linear, nn.Linear) else weight.T


# ------------------------------------------------------------------------------- 4  Whole models

FACTORS = (".lora_A", ".lora_B")
LAYER_OF = {}  # an option of the rounding -> the subclass of LoRALinear that it is for


@torch.no_grad()
def apply_quailora(
    model: nn.Module, batches: Iterable | None, rank=64, alpha=16, bits=4, init="quailora",
    steps=20, rslora=False, skip=(), H=None, floor=False, progress=list, **layout,
) -> list[dict]:  # fmt: skip
    """Replace the `linear_layers` by LoRALinears, in place, and freeze all but their adapters.

    batches: calibration data as for `input_correlations`, or None where `H` holds what that
    returned, or `init`, one of INITS, needs none. They go through the model block by block: the H
    of one block exist at a time, and all hidden states, twice. bits, layout (block_size,
    double_quant): as for `quantize`. progress wraps the list of blocks, or of layers without
    batches: tqdm, say.

    A model that accelerate has offloaded to disk (`device_map` of transformers) is read a layer at
    a time; what is returned is in memory.

    Returns a dict for each layer: `name`; `shape`, (out, in); `calibrated`, whether X is data, or
    X X^T the identity; `initialized`, || (W - (Q + A B^T)) X || over || (W - quantize(W)) X ||;
    with floor=True `floor`, the least of that for this Q and rank (slow on large layers);
    `seconds`, without these errors. Raises ValueError, with the model as it was, for options out
    of range, an H that does not fit, and NaN or inf in a weight; with the blocks before it replaced
    if a layer reads NaN, inf, or nothing."""
    options = rank, alpha, bits, init, steps, skip, H, rslora, floor
    layers, start = prepared(model, *options, **layout)
    calibrated, done = _calibrated(init, batches, H), dict.fromkeys(layers)

    def start_layer(name, H):
        layer = layers.pop(name)  # so that its weight goes
        with _in_memory(layer):
            done[name] = start(layer, H)
        _replace(model, layer, done[name])

    _start_each(layers, start_layer, _body(model), batches, H, progress, [_evaluating])
    _load_offloaded(model)
    _freeze_base(model)
    return [_row(name, layer, calibrated, layer.report) for name, layer in done.items()]


def _start_each(layers, start_layer, model, batches, H, progress, passes):
    """start_layer(name, H) for each of `layers`: with the H given, or None without data, or else
    part by part, with what its layers read in each of `passes`, contexts to run the model in."""
    if H is not None or batches is None:
        for name in progress([*layers]):
            start_layer(name, H and H[name])
        return
    with passes[0](model) as stack:
        walk = WAY(model, batches, stack)
        for names in walk.parts(layers, progress):
            for context in passes:
                with context(model):
                    found = _correlations({name: layers[name] for name in names}, walk)
                for name in names:
                    start_layer(name, found.pop(name))


def _calibrated(init, batches, H):
    """Whether there is data; ValueError if there is none and `init` needs it."""
    calibrated = H is not None or batches is not None
    if INITS[init].needs_data and not calibrated:
        raise ValueError(f"init {init!r} needs calibration data: batches or H")
    return calibrated


def _row(name, layer, calibrated, report):
    shape = [layer.out_features, layer.in_features]
    return {"name": name, "shape": shape, "calibrated": calibrated, **report}


def _freeze_base(model):
    """All but the adapters and new heads."""
    trained = _trained(model)
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)


def _trained(model):
    """The factors, and what a transformers model has outside its body if that is no language
    model's: the head of a classifier, which is new."""
    body = _body(model)
    if body is not model and model.get_output_embeddings() is not None:
        body = model
    frozen, named = {id(p) for p in body.parameters()}, model.named_parameters()
    return {name: p for name, p in named if name.endswith(FACTORS) or id(p) not in frozen}


def _body(model):
    """A transformers model without its head; another as it is."""
    return getattr(model, "base_model", model)


def linear_layers(model: nn.Module, skip=()) -> dict[str, nn.Module]:
    """The layers to replace, by name: every nn.Linear (no subclass: its forward is not known) and
    Conv1D but weights tied to an embedding, heads (what a transformers model has outside its
    `base_model`, and its output embedding), and what `skip` names: layers or blocks, each by its
    name, or all by the last parts of theirs, as "mlp". ValueError if a name is of nothing."""
    return _layers_without(_skipped(model, skip), model)


def _layers_without(skipped, model):
    body = {*_body(model).modules()} - {model, *skipped}
    if hasattr(model, "get_output_embeddings"):
        body.discard(model.get_output_embeddings())
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: m
        for name, m in model.named_modules()
        if (type(m) is nn.Linear or type(m).__name__ == "Conv1D")
        and (m in body and id(m.weight) not in tied)
    }


def _skipped(model, skip):
    modules, skipped = dict(model.named_modules(remove_duplicate=False)), []
    for name in [skip] if isinstance(skip, str) else skip:
        found = [name] if name in modules else [key for key in modules if key.endswith("." + name)]
        if not found:
            raise ValueError(f"nothing to skip by the name {name!r}")
        skipped += [m for key in found for m in modules[key].modules()]
    return skipped


def prepared(
    model, rank, alpha, bits, init, steps, skip=(), H=None, rslora=False, floor=False, **layout
):  # fmt: skip
    """`linear_layers`, and linear, H -> what replaces it; ValueError for what would stop that."""
    kind = type(model).__name__
    for name, m in model.named_modules():
        if hasattr(m, "lora_A"):
            what = "initialize_peft starts it, if it is peft's"
            raise ValueError(f"{name} of {kind} has an adapter already: {what}")
    rounded = getattr(model, "is_quantized", False) and model.quantization_method
    if rounded and rounded != "gguf":  # that becomes floats
        what = "load it in full precision, or take get_peft_model and initialize_peft"
        raise ValueError(f"{kind} is quantized already ({rounded.value}): {what}")
    skipped = _skipped(model, skip)
    if not (layers := _layers_without(skipped, model)):
        raise ValueError(f"{kind} has no linear layers to replace")
    _warn_of_others(model, [*layers.values(), *skipped])
    layer_class = next((LAYER_OF[key] for key in layout if key in LAYER_OF), LoRALinear)
    for name, layer in layers.items():
        if H is not None and name not in H:
            raise ValueError(f"H has nothing for {name}")
        with _in_memory(layer):
            W = _weight(layer)
            _check(W, H and H[name], rank, name, alpha, init, steps)
        layer_class.rounding(torch.zeros(1, W.shape[1]), bits, **layout)  # refuses other layouts
    options = dict(rank=rank, alpha=alpha, bits=bits, init=init, steps=steps)
    return layers, partial(layer_class.from_linear, **options, rslora=rslora, floor=floor, **layout)


def _warn_of_others(model, layers):
    """If more than 5% of the body's weights are in none of these layers: in experts, say."""
    inside = {id(p) for p in _body(model).parameters() if p.ndim > 1}
    known = [*layers, *(m for m in model.modules() if isinstance(m, nn.Embedding))]
    known = {id(p) for layer in known for p in layer.parameters()}
    sizes = {name: p.numel() for name, p in model.named_parameters() if id(p) in inside}
    others = [name for name, p in model.named_parameters() if id(p) in inside - known]
    share = sum(map(sizes.get, others)) / sum(sizes.values())
    if share > 0.05:
        names = f"{others[0]}, {len(others)} in all"
        warnings.warn(f"{share:.0%} of the weights stay in full precision: {names}", stacklevel=4)


def _replace(model, old, new):
    """In all places where `old` is registered."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new.train(old.training))


def merge(model: nn.Module) -> nn.Module:
    """Turn every LoRALinear back into the layer it replaced, with its `merged_weight`, in place:
    `merge(model).save_pretrained(folder)` is a full-precision checkpoint. A QALoRALinear stays,
    merged into its zero points."""
    for layer in [m for m in model.modules() if isinstance(m, LoRALinear)]:
        _replace(model, layer, layer.merged())
    return model


def _in_memory(layer):
    """A context in which a layer that accelerate has offloaded has its weights."""
    if not hasattr(layer, "_hf_hook"):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(layer)


def _load_offloaded(model):
    """In memory what accelerate has offloaded."""
    offloaded = [m for m in model.modules() if any(p.is_meta for p in m.parameters(False))]
    if not offloaded:
        return
    from accelerate.hooks import remove_hook_from_module

    for m in offloaded:
        with _in_memory(m):
            tensors = {name: x.data.clone() for name, x in m.named_parameters(recurse=False)}
        remove_hook_from_module(m)
        for name, x in tensors.items():
            setattr(m, name, nn.Parameter(x, requires_grad=False))
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    if len({p.device for p in model.parameters()}) == 1:
        remove_hook_from_module(model, recurse=True)  # they would keep inputs on one device
        vars(model).pop("hf_device_map", None)


# --------------------------------------------------------------------- 5  Calibration: batches -> H


def input_correlations(model: nn.Module, batches: Iterable, skip=()) -> dict[str, Tensor]:
    """name -> H = X X^T, (in, in) in float32 or float64, of each of `linear_layers`, over all of
    `batches`, and over all processes of torch.distributed; one H for all that read the same tensor.
    All H are there at once, of a LLaMA of 7B 22 GB: `apply_quailora` with batches needs less.

    A batch is what the model takes: keyword arguments as a mapping (`labels` are dropped), a tuple,
    or a tensor. Positions where a 2-D `attention_mask` is 0 do not count, where a layer reads all.
    The model runs in eval mode and without its head. Raises ValueError if a layer reads nothing,
    NaN or inf; RuntimeError if two layers read the same tensor in some calls only."""
    with _evaluating(model) as stack:
        return _correlations(linear_layers(model, skip), _Walk(_body(model), batches, stack))


@torch.no_grad()
def _correlations(layers, walk):
    """`input_correlations` of these layers, in the present part of the walk."""
    H = {}

    def add(name, x):
        if name not in H:
            H[name] = x.new_zeros(x.shape[1], x.shape[1], dtype=_wide(x.dtype))
        _add_products(H[name], x)

    readers = _readers(layers, walk, add)
    for name, found in readers.items():
        if found != found[:1] * len(readers[found[0]]):  # the same one, as often as it was called
            raise RuntimeError(f"{name} reads the same tensor as {found[0]} in some calls only")
    H = {name: _summed(H[name], name) for name in layers if name in H}  # everywhere in one order
    return {name: H[readers[name][0]] for name in layers}


def _readers(layers, walk, add):
    """Run the present part, with add(name, x) for each tensor that is read, x (tokens, in), and the
    layer that reads it first. Returns layer -> that one, for each of its calls: q for k and v."""
    readers = {}
    first = WeakIdKeyDictionary()  # tensor -> its version, which a write changes -> that layer

    def read(name, layer, args):
        x = args[0]
        reader = first.setdefault(x, {}).setdefault(_version(x), name)
        readers.setdefault(name, []).append(reader)
        if reader == name:
            add(name, walk.tokens(layer, x))

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(partial(read, name)))
        for i in range(len(walk.calls)):
            walk.run(i)
    if missing := [name for name in layers if name not in readers]:
        what = "is there a batch? If it is never called, leave it out (skip; peft: exclude_modules)"
        raise ValueError(f"{missing[0]} read nothing in calibration: {what}")
    return readers


def _version(x):
    """How often x was written to; not known in inference mode."""
    return 0 if x.is_inference() else x._version


@_exactly()
def _add_products(H, x):
    """H += x^T x, for x, (tokens, in). Products of 16-bit numbers are exact in float32: those CUDA
    makes on its tensor cores."""
    if x.is_cuda and x.itemsize == 2:
        H += torch.mm(x.T, x, out_dtype=H.dtype)
    else:
        x = x.to(H.dtype)
        H.addmm_(x.T, x)


def _summed(H, name):
    """H, (in, in), over all processes, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(H)
    if not H.isfinite().all():
        raise ValueError(f"{name} read NaN or inf in calibration, or too much for {H.dtype}")
    return H


class _Walk:
    """The way of the batches through a model, here as a whole; part two goes block by block."""

    def __init__(self, model, batches, stack):
        self.model, self.decodes = model, _decoding(model, stack)
        self.calls = [_arguments(batch, model) for batch in batches]  # args, kwargs, masks

    def parts(self, layers, progress=list):
        """The names of those of `layers` that a part of the way goes through, part by part."""
        for _ in progress([self.model]):
            yield [*layers]

    def run(self, i):
        """The present part on batch i."""
        args, kwargs, self.masks = self.calls[i]
        return self.model(*args, **kwargs)

    def tokens(self, layer, x):
        """What `layer` reads, (..., in), as (tokens, in), without what the mask leaves out."""
        mask = self.masks[self.decodes(layer, x)]  # of the encoder's inputs, or the decoder's
        x = x.reshape(-1, x.shape[-1])
        return x if mask is None or len(mask) != len(x) else x[mask.to(x.device)]


WAY = _Walk  # for the batches of apply_quailora; section 9 puts a longer one here


def _arguments(batch, model):
    """What a model is called with, and which positions count, (batch * positions,), or None for
    all, of its inputs and of a decoder that reads an encoder."""
    if not isinstance(batch, Mapping | tuple | list | Tensor):
        raise ValueError(f"expected a list of batches, found {type(batch).__name__} in it")
    device = _device(model)
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    batch = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
    if not isinstance(batch, dict):
        return batch if isinstance(batch, tuple | list) else [batch], {}, [None, None]
    labels = batch.pop("labels", None) is not None and _has_encoder(model)
    if labels and not batch.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
        raise ValueError("labels are dropped in calibration: give decoder_input_ids too")
    masks = [batch.get(key) for key in ("attention_mask", "decoder_attention_mask")]
    masks = [None if m is None or m.ndim != 2 or m.all() else m.bool().view(-1) for m in masks]
    return (), batch, masks


def _device(model):
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _has_encoder(model):
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def _decoding(model, stack):
    """layer, x -> whether x, which it reads, has the positions of a decoder, and not those of the
    encoder beside it; as long as `stack` is open."""
    if not _has_encoder(model):
        return lambda layer, x: False
    encoder, encoded = model.get_encoder(), [None]

    def encode(_, args, output):
        encoded[0] = output[0]

    stack.enter_context(encoder.register_forward_hook(encode))
    inside = {*encoder.modules()}
    return lambda layer, x: layer not in inside and x is not encoded[0]


def _evaluating(model):
    """Eval mode, no keys and values kept, no fast path past the layers, until what is returned is
    closed."""
    stack, modes = contextlib.ExitStack(), {}  # by names, as layers may be replaced in between

    def restore():
        for name, module in model.named_modules():
            layer = name.rpartition(".")[0]  # what is inside a new one has its mode
            module.training = modes.get(name, modes.get(layer, True))

    stack.callback(restore)
    for name, module in model.named_modules():
        modes[name], config = module.training, getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            stack.callback(setattr, config, "use_cache", True)
            config.use_cache = False
    model.eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
    torch.backends.mha.set_fastpath_enabled(False)  # it goes past the layers
    return stack


# ==================================================================================================
# The paper ends here: what follows can be deleted, and what stands above still runs.
# ==================================================================================================


import copy
import json
import os
import tempfile
from pathlib import Path

# ------------------------------------------------------------------ 6  Adapters on disk, and bases


def save_adapter(model, folder):
    """Write the adapter to `folder` as peft does (which loads LoRA's, not QA-LoRA's), with a
    record of its base. A file is complete or is not there. Needs safetensors. Raises ValueError
    without an adapter, OSError on a full disk."""
    from safetensors.torch import save

    layers, trained = lora_layers(model), _trained(model)
    heads = {name.split(".")[0] for name in trained if not name.endswith(FACTORS)}
    if not any(layer.rank for layer in layers.values()):
        raise ValueError(f"{type(model).__name__} has no adapter to save")
    first = next(iter(layers.values()))
    path = getattr(getattr(model, "config", None), "_name_or_path", None)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "modules_to_save": sorted(heads) or None,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "use_rslora": first.rslora,
        "base_model_name_or_path": path,
        "lora_dropout": 0.0,
        "target_modules": list(layers),
        "bias": "none",
        "fan_in_fan_out": first.kind is not nn.Linear,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    record = {"init": first.init, "own_base": first.own_base, "model": path, **_record(first.base)}
    tensors = {}
    for name, p in trained.items():
        end = ".weight" if name.endswith(FACTORS) else ""
        tensors[f"base_model.model.{name}{end}"] = p.detach().cpu().contiguous()
    content = save(tensors, {"quailora": json.dumps(record)})
    Path(folder).mkdir(parents=True, exist_ok=True)
    _write(Path(folder) / "adapter_model.safetensors", content)
    _write(Path(folder) / "adapter_config.json", json.dumps(config, indent=2).encode())


def lora_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


RECORD = "groups float16_scales bits block_size double_quant check init own_base model".split()


def _record(base):
    """What an adapter fits on, from its first layer: how it was rounded, with scales that float16
    holds in QA-LoRA, but not in its first version, and as a check the mean magnitude of Q."""
    groups = base.format == "int"
    return {
        "groups": groups,
        "float16_scales": groups and bool((base.absmax.half() == base.absmax).all()),
        "bits": base.bits,
        "block_size": base.block_size or 0,
        "double_quant": base.double_quant,
        "check": base.dequantize(torch.float32).abs().mean().item(),
    }


def _write(file, content):
    with _in_one_piece(file) as started:
        started.write_bytes(content)


@contextlib.contextmanager
def _in_one_piece(file):
    """A file to write in place of `file`, which is complete then, or as it was."""
    started = file.with_name(f".{file.name}.partial")
    try:
        yield started
        with open(started, "rb+") as written:
            os.fsync(written.fileno())
        started.replace(file)
    except OSError as error:
        raise OSError(f"{file} could not be written: {error.strerror or error}") from error
    finally:
        started.unlink(missing_ok=True)


def load_adapter(model, folder, base=None):
    """Load what `save_adapter` wrote into a model of `apply_quailora`, or into a full-precision
    one, which is quantized first. base: the folder of `save_base`, for an adapter on a base of
    its own. Needs safetensors. Raises ValueError, naming the difference, if the base is not the
    one that it was made for, or a file is damaged; FileNotFoundError if one is missing."""
    (rank, alpha, rslora, targets), theirs, factors = _read_adapter(Path(folder))
    owned = [layer.own_base for layer in lora_layers(model).values()]
    if theirs["own_base"] and base is None and not (owned and all(owned)):
        raise ValueError(
            f"the adapter was made for a base of its own ({theirs['init']}): "
            "give the folder of save_base too"
        )
    if base is not None:
        load_base(model, base)
    elif not owned:
        _quantize_for(model, rank, targets, theirs)
    layers = lora_layers(model)
    for key, ours in _record(next(iter(layers.values())).base).items():
        if not math.isclose(ours, theirs[key], rel_tol=1e-4):
            weights = f"weights of {theirs['model']} (mean magnitude of the first layer's)"
            what = weights if key == "check" else key
            raise ValueError(
                f"the adapter was made for another base: {what} {theirs[key]}, and here {ours}"
            )
    for layer in layers.values():
        if not layer.rank:
            (out, n), zeros = layer.base.shape, layer.base.scales().new_zeros  # at least float32
            inputs = n // (layer.base.group_size or 1)
            layer.set_adapter(zeros(rank, inputs), zeros(out, rank), alpha, rslora)
    parameters = _trained(model)
    for name in sorted(factors.keys() | parameters.keys()):
        shapes = [tuple(f[name].shape) if name in f else "missing" for f in (factors, parameters)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]} in the adapter and {shapes[1]} in the model")
    model.load_state_dict(factors, strict=False)
    for layer in layers.values():
        layer.set_adapter(layer.lora_A, layer.lora_B, alpha, rslora)
        layer.init, layer.own_base = theirs["init"], theirs["own_base"]


def _read_adapter(folder):
    """rank, alpha, rslora, layers; our record; the factors by the names of their parameters."""
    from safetensors import SafetensorError, safe_open

    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text())
        adapter = [config[key] for key in ("r", "lora_alpha", "use_rslora", "target_modules")]
        file = folder / "adapter_model.safetensors"
        with safe_open(file, "pt") as content:
            record = json.loads((content.metadata() or {})["quailora"])
            record = {"float16_scales": False} | record  # it came later
            record = {key: record[key] for key in RECORD}
            factors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
    except (json.JSONDecodeError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{file} is damaged or was not written by save_adapter: {error!r}"
        ) from error
    ours = {}
    for key, factor in factors.items():
        name = key.removeprefix("base_model.model.")
        factor_name = name.removesuffix(".weight")
        ours[factor_name if factor_name.endswith(FACTORS) else name] = factor
    return adapter, record, ours


def _quantize_for(model, rank, targets, record):
    """Round the layers of a full-precision model as the adapter's base was."""
    layers = linear_layers(model)
    for name in targets:
        if name not in layers:
            kind = type(model).__name__
            raise ValueError(f"the adapter has a layer {name}, which {kind} has not")
    size, skip = record["block_size"] or 64, layers.keys() - set(targets)
    layout = {"block_size": size, "double_quant": record["double_quant"]}
    if record["groups"]:
        layout = {"group_size": size}
    apply_quailora(model, None, rank, bits=record["bits"], init="qlora", skip=skip, **layout)


def save_base(model, folder):
    """Write the rounded model of `apply_quailora` without its adapter as a checkpoint that
    transformers loads with bitsandbytes (4-bit NormalFloat), for bases that are not `quantize(W)`:
    of loftq, cloq, joint, `apply_sequentially`. Other bits, and merged QA-LoRA models, in the same
    keys are for `load_base`. Needs transformers. A full disk is safetensors' SafetensorError."""
    layers, config, tensors = lora_layers(model), model.config, model.state_dict()
    first = next((layer.base for layer in layers.values()), None)
    if first is None or first.bits == 16:
        raise ValueError(f"{type(model).__name__} has no rounded weights to save")
    for name, layer in layers.items():
        for key in layer.state_dict().keys() - {"bias"}:
            del tensors[f"{name}.{key}"]
        tensors |= _packed(f"{name}.weight", layer.base)
    if first.bits == 4 and first.format == "nf":
        kinds = (nn.Linear, *{layer.kind for layer in layers.values()})
        config.quantization_config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": first.double_quant,
            "llm_int8_skip_modules": [n for n, m in model.named_modules() if isinstance(m, kinds)],
        }
    try:
        state = {key: x.clone() for key, x in tensors.items()}
        model.save_pretrained(folder, state_dict=state)
    finally:
        vars(config).pop("quantization_config", None)


def _packed(key, base):
    """A rounded weight in the tensors of bitsandbytes."""
    kind = f"{base.format}{base.bits}"
    state = {
        "quant_type": kind,
        "blocksize": base.block_size,
        "shape": list(base.shape),
        "dtype": str(base.dtype).removeprefix("torch."),
    }
    tensors = {f"{key}.{name}": buffer for name, buffer in base.named_buffers()}
    tensors |= {key: tensors.pop(f"{key}.codes"), f"{key}.quant_map": _levels(base)}
    if base.double_quant:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        state["nested_offset"] = tensors.pop(f"{key}.offset").item()
        tensors[f"{key}.nested_quant_map"] = dynamic_map()
    state = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors | {f"{key}.quant_state.bitsandbytes__{kind}": state}


def load_base(model, folder):
    """Load what `save_base` wrote into a full-precision model (or one made from its configuration)
    or one of `apply_quailora`. Layers that were rounded get that base, and have the adapter that
    they had: none in a full-precision model. Needs safetensors. Raises FileNotFoundError if there
    is no checkpoint, ValueError, with the model as it was, if it does not fit."""
    from safetensors.torch import load_file

    tensors = {}
    for file in Path(folder).glob("*.safetensors"):
        tensors |= load_file(file)
    mark = ".weight.quant_state."
    states = {key.partition(mark)[0]: key for key in tensors if mark in key}
    if not states:
        error = ValueError if tensors else FileNotFoundError
        raise error(f"{folder} holds no *.safetensors of save_base")
    modules, own, found = dict(model.named_modules()), model.state_dict(), {}
    for name, state in states.items():
        old, state = modules.get(name), json.loads(bytes(tensors.pop(state).tolist()))
        found[name] = base = _unpacked(tensors, f"{name}.weight", state)
        theirs, ours = (*base.shape, base.group_size), None
        if isinstance(old, LoRALinear):
            ours = (*old.base.shape, old.base.group_size)
        elif old is not None:
            ours = (*_weight(old).shape, base.group_size)
        if theirs != ours:
            differ = f"{theirs} in {folder} and {ours} in the model"
            raise ValueError(f"(out, in, group_size) of {name}.weight is {differ}")
    for key, x in tensors.items():
        if key in own and own[key].shape != x.shape:
            ours, theirs = tuple(own[key].shape), tuple(x.shape)
            raise ValueError(f"{key} is {theirs} in {folder} and {ours} in the model")
    filled = {own[key].data_ptr() for key in own.keys() & tensors.keys()}  # tied ones too
    replaced = tuple(f"{name}." for name in found)
    for key, x in own.items():
        kept = not key.startswith(replaced) or key.endswith(".bias")
        if kept and x.data_ptr() not in filled:
            raise ValueError(f"{folder} holds no {key}")
    for name, base in found.items():  # now that all fit
        layer = old = modules[name]
        if not isinstance(old, LoRALinear):
            kind = QALoRALinear if base.group_size else LoRALinear
            with _in_memory(old):
                layer = kind(base.to(old.weight.device), bias=old.bias)
            layer.kind = type(old)
            _replace(model, old, layer)
        layer.base, layer.own_base = base.to(layer.base.codes.device), True
    _load_offloaded(model)
    model.load_state_dict(tensors, strict=False)
    _freeze_base(model)


def _unpacked(tensors, key, state):
    """The weight that `_packed` wrote, taken out of `tensors`."""
    mine = [name for name in tensors if name.startswith(f"{key}.")]
    buffers = {name.removeprefix(f"{key}."): tensors.pop(name) for name in mine}
    buffers = {name: x for name, x in buffers.items() if not name.endswith("quant_map")}
    if "nested_offset" in state:
        buffers["offset"] = torch.tensor(state["nested_offset"])
    make = GroupedWeight if "zero" in buffers else QuantizedWeight
    layout = state["shape"], getattr(torch, state["dtype"]), int(state["quant_type"].strip("intf"))
    return make(*layout, state["blocksize"], codes=tensors.pop(key), **buffers)


# ------------------------------------------ 7  bitsandbytes' kernels, and a weight for who reads it


class _Bitsandbytes:
    """Scales and unrounding of 4 bits, so that the base is the one that QLoRA has."""

    @staticmethod
    def round_blocks(x, levels, block_size):
        codes, state = bitsandbytes.functional.quantize_blockwise(x, levels, blocksize=block_size)
        return codes, state.absmax

    @staticmethod
    def has(base, dtype):
        """Whether it unrounds `base` to `dtype`."""
        sizes = [2**i for i in range(5, 13)] if base.bits == 4 and base.format == "nf" else []
        even = base.shape.numel() % 2 == 0
        return base.block_size in sizes and even and dtype != torch.float64

    @staticmethod
    def dequantize(base, dtype):
        make, offset, nested = bitsandbytes.functional.QuantState, None, None
        if base.double_quant:
            offset, scales = base.offset, dynamic_map(base.codes.device)
            nested = make(base.nested_absmax, None, scales, 256, dtype=torch.float32)
        row = 1, base.shape.numel()  # their AVX-512 kernel mistakes the scales of a block in two
        state = make(base.absmax, row, None, base.block_size, "nf4", dtype, offset, nested)
        return bitsandbytes.functional.dequantize_4bit(base.codes, state).reshape(base.shape)


with contextlib.suppress(ImportError):
    import bitsandbytes

    QuantizedWeight.kernels = _Bitsandbytes


class _Weight(Tensor):
    """The merged weight of a LoRALinear, as the layer before had it, differentiable, for who reads
    a layer's weight (T5, nn.TransformerEncoderLayer). It is made where it is used, not where its
    dtype, shape or device is read."""

    @staticmethod
    def of(layer):
        shape = layer.base.shape if layer.kind is nn.Linear else layer.base.shape[::-1]
        empty = torch.empty((), dtype=layer.base.dtype, device=layer.base.codes.device)
        weight = empty.expand(shape).as_subclass(_Weight)
        weight.layer = layer
        return weight

    def made(self):
        layer, weight = self.layer, self.layer.base.dequantize()
        if layer.rank:
            weight = weight + layer.update().to(weight.dtype)
        return weight if layer.kind is nn.Linear else weight.T

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (Tensor.dtype.__get__, Tensor.shape.__get__, Tensor.device.__get__):
            return super().__torch_function__(function, types, args, kwargs)
        args, kwargs = tree_map(lambda x: cls.made(x) if isinstance(x, cls) else x, (args, kwargs))
        return function(*args, **kwargs or {})


LoRALinear.weight = property(_Weight.of)


# ------------------------------ 8  The family: rounding with the adapter, or the data, in view


def loftq_base(W, H, base, rounding, solve, rounds=5):
    """LoftQ (arXiv 2310.08659): W - A B^T is rounded, then W - Q is solved for, in turn; the best
    of the rounds."""

    def again(_, A, B):
        return rounding((W - A @ B.T).to(base.dtype))

    return _best_base(W, None, base, solve, rounds, again)


def cloq_base(W, H, base, rounding, solve):
    """CLoQ (arXiv 2501.18475): calibrated rounding."""
    return round_calibrated(W, base, residual_metric(H))


def joint_base(W, H, base, rounding, solve, rounds=4):
    """QuAILoRA with Q in the loop, an extension of the paper: W is rounded again with what the
    best A for the last B repairs left out of account, then solved for, in turn; the best of the
    rounds."""

    plain = base

    def again(base, A, B):
        M = residual_metric(H, B)
        if base is plain:
            base = round_calibrated(W, base, M)
        for _ in range(2):
            base = round_calibrated(W, base, M, descent=True)
        return base

    return _best_base(W, H, base, solve, rounds, again)


def _best_base(W, H, base, solve, rounds, again):
    """The base with the least error (1) of `rounds`, each from the one before by `again`."""
    least, best = math.inf, base
    for turn in range(rounds):
        E = _rounding_error(W, base)
        A, B = solve(E, H)
        error = calibrated_error(E, A, B, H)
        if error < least:
            least, best = error, base
        if turn + 1 < rounds:
            base = again(base, A, B)
    return best


INITS["loftq"] = Init(INITS["svd"].solve, needs_data=False, choose=loftq_base)
INITS["cloq"] = Init(INITS["exact"].solve, needs_data=True, choose=cloq_base)
INITS["joint"] = Init(INITS["quailora"].solve, needs_data=True, choose=joint_base)


def residual_metric(H, B=None, damping=0.03):
    """M, (in, in) in float64, with 1/2 e M e^T the part of (1) that the rounding errors e of a
    row, (in,), are to blame for. M is H, or given the B, (in, r), of an adapter whose best A, (5),
    takes its part of any errors, H - H B (B^T H B)^-1 B^T H. Damped by a share of its mean
    diagonal, so that H may be singular, and errors are not fitted to correlations that the
    calibration data have by chance; by more where M as rounded is not positive definite."""
    H = H.double()
    M = H.clone()
    if B is not None:
        V = qr(B[:, B.norm(dim=0) > 0].double()).Q
        HV = H @ V
        M -= HV @ pinv(V.T @ HV, hermitian=True) @ HV.T
    shift = damping * M.diagonal().mean().clamp(min=0)
    shift = shift + 1e-9 * H.diagonal().mean() + 1e-300
    M.diagonal().add_(shift)
    while torch.linalg.cholesky_ex(M.flip(0, 1)).info and shift.isfinite():  # flipped, as factored
        M.diagonal().add_(9 * shift)
        shift = 10 * shift
    return M


@_exactly()
def round_calibrated(W, base, M, descent=False):
    """Round W, (out, in), again to the levels and scales of `base`, input by input, each weight to
    the level where e M e^T is least, with the errors e in the inputs before it as they are, and
    those after it free to make up for it: the feedback of GPTQ, arXiv 2210.17323. With `descent`
    from the codes of `base` on, those of all others as they are: e M e^T never rises.
    M: (in, in), of `residual_metric`. In blocks of 32 inputs, by matrix products."""
    # feedback: e M e^T = sum_j d_j (e_j + sum_{i<j} e_i U_ij)^2, M = U diag(d) U^T and U unit upper
    # triangular. So with K = U^T - I, or in a descent M / diag(M) - I, -K_j e is the best e_j
    K = M if descent else torch.linalg.cholesky(M.flip(0, 1)).flip(0, 1).T
    K = (K / K.diagonal()[:, None]).fill_diagonal_(0).to(W.dtype)
    E = _rounding_error(W, base).T.contiguous()  # (in, out), as all from here
    scale = base.of_each(base.scales()).to(W.dtype).T.contiguous()
    levels, codes = _levels(base), base.unpacked().T.contiguous()
    target = E + levels[codes] * scale  # W, or W + scale * zero: beside levels * scale
    midpoints = (levels[:-1] + levels[1:]) / 2
    divisor = scale.where(scale != 0, 1)
    for start in range(0, len(E), 32):
        rows = slice(start, start + 32)
        best = target[rows] + K[rows] @ E
        for j in range(start, min(start + 32, len(E))):
            codes[j] = torch.bucketize(best[j - start] / divisor[j], midpoints, out_int32=True)
            e = target[j] - levels[codes[j]] * scale[j]
            best.addr_(K[rows, j], e - E[j])
            E[j] = e
    base = copy.deepcopy(base)
    base.codes = _pack(codes.T.reshape(-1).to(torch.uint8), base.bits)[:, None]
    return base


def _levels(base):
    """What a code stands for, before the scale, (2^bits,)."""
    device = base.codes.device
    if base.format == "int":
        return torch.arange(2.0**base.bits, device=device)
    return torch.arange(-127, 128) / 127 if base.bits == 8 else normal_float(base.bits, device)


# ----------------------------------------- 9  Block by block, and each on what those before it left


class _Stop(Exception):
    """A run of the model need not go on, or its blocks are no chain."""


class _BlockWalk(_Walk):
    """First through the blocks of a model, each on the hidden states that the one before it made,
    then through what is outside of them. As a whole, if blocks do more than hand those on."""

    def __init__(self, model, batches, stack):
        super().__init__(model, batches, stack)
        self.blocks, self.at = _blocks(model), 0  # the present part
        self.hidden = []  # batch -> what the present block reads
        self.block_calls = []  # batch, block -> args, kwargs that it is called with beside that
        try:
            if self.blocks and self.calls:
                self._check()
            for i in range(len(self.calls) if self.blocks else 0):
                x, calls, _ = self._recorded(i, lambda k, forward, x, *others: x)
                self.hidden.append(x)
                self.block_calls.append(calls)
        except _Stop:
            self.blocks = []
        others = torch.tensor(float(not self.blocks), device=_device(model))
        if _summed(others, "the walk"):  # in some process: all go one way
            self.blocks, self.hidden = [], []
        self.next_hidden = [None] * len(self.calls)

    def _check(self):
        """_Stop unless, in the first batch, each block reads what the one before returned, and
        nothing but what the last one returns depends on it."""
        made, last = None, len(self.blocks) - 1

        def run(k, forward, x, args, kwargs):
            nonlocal made
            if made is not None and not _same(x, made):
                raise _Stop
            out = forward(x.clone(), *args, **kwargs)
            self.more = out[1:] if type(out) is tuple else None  # what else it returns
            out = out if self.more is None else out[0]
            if not isinstance(out, Tensor) or out.shape != x.shape:
                raise _Stop
            made = out.clone()
            return out

        _, *ran = self._recorded(0, run)
        self.more = tree_map(_unknown, self.more)
        _, *handed_on = self._recorded(0, lambda k, forward, x, *others: made if k == last else x)
        if not _same(ran, handed_on):
            raise _Stop

    def _recorded(self, i, returned):
        """Batch i, with returned(k, forward, x, args, kwargs) for the hidden states that block k
        returns: those that the first reads, what else each is called with, what the model makes."""
        first, calls = [], []

        def call(k, forward, *args, **kwargs):
            if k != len(calls) or not args or not isinstance(args[0], Tensor):
                raise _Stop
            x, *rest = args
            if k == 0:
                first.append(x.clone())
            calls.append((rest, kwargs))
            out = returned(k, forward, x, rest, kwargs)
            return out if self.more is None else (out, *self.more)

        with contextlib.ExitStack() as stack:
            for k, block in enumerate(self.blocks):
                _patch(stack, block, partial(call, k, block.forward))
            made = super().run(i)
        if len(calls) < len(self.blocks):
            raise _Stop
        return first[0], calls, made

    def run(self, i):
        """The present part on batch i."""
        if not self.blocks:
            return super().run(i)
        x = self.hidden[i].clone()  # who writes to it does not write to ours
        last = len(self.blocks) - 1
        if self.at > last:  # what is outside of the blocks
            return self._recorded(i, lambda k, forward, read, *others: x if k == last else read)
        (args, kwargs), self.masks = self.block_calls[i][self.at], self.calls[i][2]
        out = self.blocks[self.at].forward(x, *args, **kwargs)
        self.next_hidden[i] = out[0] if isinstance(out, tuple) else out

    def parts(self, layers, progress=list):
        """In turn the names of those of `layers` that each part has. Its user runs it on all
        batches, and what the last run returns is what the next block reads."""
        place = {m: k for k, block in enumerate(self.blocks) for m in block.modules()}
        parts = [[] for _ in range(len(self.blocks) + 1)]
        for name in layers:
            parts[place.get(layers[name], -1)].append(name)
        del place  # it would keep them all
        for at, names in enumerate(progress(parts if parts[-1] else parts[:-1])):
            self.at = at
            yield names
            self.hidden, self.next_hidden = self.next_hidden, self.hidden


def _unknown(x):
    return torch.full_like(x, math.nan) if isinstance(x, Tensor) and x.is_floating_point() else x


def _same(a, b):
    """Whether nested structures have equal tensors."""
    a, b = ([x for x in tree_leaves(M) if isinstance(x, Tensor)] for M in (a, b))
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _blocks(model):
    """The layers of a transformer: of its lists of modules the one with the most weights. None
    where a module has two places, as H would be that of one."""

    def size(blocks):
        return sum(p.numel() for p in blocks.parameters())

    places = [m for _, m in model.named_modules(remove_duplicate=False) if [*m.parameters(False)]]
    if _has_encoder(model) or len(places) > len({*places}):
        return []
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    blocks = [*max(lists, key=size, default=())]
    return [] if any(isinstance(block, nn.Linear) for block in blocks) else blocks


def _patch(stack, module, forward):
    """module.forward = forward, until `stack` is closed."""
    if "forward" in vars(module):  # of accelerate's, say
        stack.callback(setattr, module, "forward", module.forward)
    else:
        stack.callback(delattr, module, "forward")
    module.forward = forward


WAY = _BlockWalk


@torch.no_grad()
def apply_sequentially(
    model, batches, rank=64, alpha=16, bits=4, init="quailora", steps=20, skip=(), progress=list,
    **options,
):  # fmt: skip
    """`apply_quailora`, but each layer repairs what those before it left: from the inputs Y that
    it gets in the model as it is initialized so far, it solves min || W X - (Q + A B^T) Y ||, and
    its row has the error on Y, of the W' that is best for that, over that of quantize(W'). The
    bases are not `quantize(W)`: save them with `save_base`. Block by block: in each, layers that
    read the same tensor are started from all batches in full precision and as initialized so far,
    then the layers that read what those made. Layers outside of the blocks come last. A model
    without blocks (T5) runs as a whole for each such tensor, which takes long. Raises ValueError
    also for an init without data, RuntimeError if a layer reads other rows as initialized."""
    layers, start = prepared(model, rank, alpha, bits, init, steps, skip, None, **options)
    _calibrated(init, batches, None)
    if not INITS[init].needs_data:
        raise ValueError(f"a sequential start needs a method that uses data, not {init!r}")
    done, order = {}, [*layers]

    def start_layer(layer, H, D):
        with _in_memory(layer):
            new = start(_shifted(layer, H, D), H)
            new.base.dtype, new.kind = layer.weight.dtype, type(layer)
        new.own_base = bits < 16
        return new

    with _evaluating(model) as stack:
        full = WAY(_body(model), batches, stack)
        ours = copy.copy(full)  # the same in the model as initialized so far
        ours.hidden, ours.next_hidden = [*full.hidden], [*full.next_hidden]
        for names, _ in zip(full.parts(layers, progress), ours.parts(layers), strict=True):
            part, started = {name: layers.pop(name) for name in names}, {}
            alike = {}  # layer -> those that read the same tensor as it
            for name, readers in _readers(part, full, lambda name, x: None).items():
                alike.setdefault(readers[0], []).append(name)
            for first in alike:
                H, D = _compared(full, ours, part, started, first)
                for name in alike[first]:
                    done[name] = new = start_layer(part[name], H, D)
                    weight = new.merged_weight().to(new.base.dtype)  # unrounded once, for all runs
                    started[name] = partial(nn.functional.linear, weight=weight, bias=new.bias)
            for i in range(len(full.calls)):
                with _as_started(part, started):
                    ours.run(i)
            for name in names:
                _replace(model, part.pop(name), done[name])
    _load_offloaded(model)
    _freeze_base(model)
    return [_row(name, done[name], True, done[name].report) for name in order]


@contextlib.contextmanager
def _as_started(part, started):
    with contextlib.ExitStack() as stack:
        for name, forward in started.items():
            _patch(stack, part[name], forward)
        yield


def _compared(full, ours, part, started, name):
    """H = Y Y^T and D = (X - Y) Y^T: X is what layer `name` of `part` reads first in each batch in
    full precision, and Y in the model as initialized so far."""
    H = D = None
    for i in range(len(full.calls)):
        x = _first_read(full, i, part[name])
        with _as_started(part, started):
            y = _first_read(ours, i, part[name])
        if len(x) != len(y):
            what = f"{len(x)} and {len(y)} rows in full precision and as started"
            raise RuntimeError(f"{name} reads {what}: not the same ones")
        if not len(y):
            continue
        if H is None:
            H, D = y.new_zeros(2, y.shape[1], y.shape[1])
        with _exactly():
            H.addmm_(y.T, y)
            D.addmm_((x - y).T, y)
    if H is None:
        raise ValueError(f"{name} read no tokens in calibration")
    return _summed(H, name), _summed(D, name)


def _first_read(walk, i, layer):
    """What `layer` reads first in batch i, (tokens, in), or () for nothing."""
    read = []

    def see(_, args):
        read.append(_float(walk.tokens(layer, args[0])).clone())
        raise _Stop

    with contextlib.suppress(_Stop), layer.register_forward_pre_hook(see):
        walk.run(i)
    return read[0] if read else ()


def _shifted(layer, H, D):
    """A layer with W' = W X Y^T H^-1 = W + W D H^-1 in place of W, for H = Y Y^T and
    D = (X - Y) Y^T: the W' for which || W X - W' Y || is least. For any other M,
    || W X - M Y ||^2 is that least and || (W' - M) Y ||^2: what is left is (1), for W' and H. The
    change of W is damped by 1% of the mean diagonal of H."""
    H, D = H.double(), D.double()
    damped = H.clone()
    damped.diagonal().add_(0.01 * H.diagonal().mean().clamp(min=1e-30))
    W = _weight(layer)
    shift = W.double() @ torch.linalg.solve(damped, D.T).T  # 0 where X = Y
    linear = nn.Linear(1, 1, device="meta")
    linear.weight, linear.bias = nn.Parameter((W + shift).to(_wide(W.dtype))), layer.bias
    return linear


# ----------------------------------------- 10  QA-LoRA: an adapter that merges into the zero points


class GroupedWeight(QuantizedWeight):
    """Q = scale * (code - zero), with a scale (`absmax`) and a zero point for each group of inputs
    of a row, in float32, or float64 if W is."""

    format = "int"

    group_size = property(lambda self: self.block_size)

    def values(self):
        return self.unpacked() - self.of_each(self.zero)


def quantize_groups(W, bits=4, group_size=32, **other):
    """Round each `group_size` consecutive inputs of a row of W, (out, in), to 2^bits equal steps
    from their least to their greatest weight (arXiv 2309.14717). The zero point is not rounded, the
    scale to float16, as GGUF has it, where that changes it by less than 1%. Raises ValueError for
    other than 2, 3, 4, 8 bits, or if group_size does not divide `in`."""
    _check(W)
    if other:
        raise ValueError(f"group_size does not go with {', '.join(sorted(other))}")
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"bits must be 2, 3, 4, 8 with a group_size, got {bits}")
    if group_size < 1 or W.shape[1] % group_size:
        raise ValueError(f"group_size {group_size} does not divide in = {W.shape[1]}")
    groups, most = _float(W).reshape(-1, group_size), 2**bits - 1
    least, size = groups.amin(1), groups.abs().amax(1)
    scale = (groups.amax(1) / most - least / most).maximum(torch.finfo(groups.dtype).eps * size)
    scale = scale.where(scale > 0, 1)
    half = scale.half().to(scale.dtype)  # before the codes are chosen
    scale = half.where((half - scale).abs() < scale / 100, scale)
    zero = -least / scale
    codes = (groups / scale[:, None] + zero[:, None]).round().clamp(0, most).to(torch.uint8)
    buffers = {"codes": _pack(codes.view(-1), bits)[:, None], "absmax": scale, "zero": zero}
    return GroupedWeight(W.shape, W.dtype, bits, group_size, **buffers)


def _pooled(M, group_size):
    """M P^T, (..., in / group_size): sums over the inputs of each group."""
    return M.unflatten(-1, (-1, group_size)).sum(-1)


def pooled_problem(E, H, group_size):
    """F (out, in/g) and K (in/g, in/g) in float64, to stand for E and H in (1) where the adapter
    reads the inputs summed over groups, P x with P (in/g, in). With K = P H P^T and
    F = E H P^T K^-, the regression of E X on P X, as F K = E H P^T also for a singular K:

        1/2 || (E - A B^T P) X ||^2 = 1/2 || (F - A B^T) P X ||^2 + 1/2 tr (E H E^T - F K F^T)

    The last term is a constant: what solves (1) solves this (reduced-rank regression)."""
    noise, E, H = 8 * torch.finfo(_float(H).dtype).eps, E.double(), H.double()
    K = _pooled(_pooled(H, group_size).T, group_size)
    # in these units a sum is as exact as another, and large ones hide no others
    size = _pooled(_pooled(H.abs(), group_size).T, group_size).diagonal()
    size = size.where(size > 0, 1).sqrt()
    inverse = pinv(K / size / size[:, None], rtol=noise, hermitian=True)
    return _pooled(E @ H, group_size) / size @ inverse / size, K


class QALoRALinear(LoRALinear):
    """QA-LoRA (arXiv 2309.14717): x -> Q x + scaling lora_B lora_A P x, where P x, (in/g,), is the
    sum of the inputs of each group (not their mean), and Q a GroupedWeight with these groups.

    So the update is the same for all weights of a row in a group, and `merge` puts it into their
    zero point. `lora_A` is (r, in/g), the rest as in LoRALinear. A rank beyond in/g repairs no
    more."""

    rounding = staticmethod(quantize_groups)

    @staticmethod
    def solver(init, rank, steps, group_size):
        def solve(E, H):
            """A (out, k) and B (in, k), the same in all inputs of a group."""
            k = min(rank, E.shape[1] // group_size)
            if H is None or not INITS[init].needs_data:
                H = torch.eye(E.shape[1], device=E.device)
            A, B = INITS[init].solve(*pooled_problem(E, H, group_size), k, steps)
            return A.to(E.dtype), B.to(E.dtype).repeat_interleave(group_size, 0)

        return solve

    @classmethod
    @_exactly()
    def from_linear(cls, linear, H=None, rank=64, *options, group_size=32, **more):
        """As `LoRALinear.from_linear`, with group_size in place of block_size, double_quant."""
        layer = super().from_linear(linear, H, rank, *options, group_size=group_size, **more)
        lora_A, lora_B = layer.lora_A.detach()[:, ::group_size], layer.lora_B.detach()
        lora_A, lora_B = _to_rank(lora_A, lora_B, rank)
        layer.set_adapter(lora_A.contiguous(), lora_B, layer.alpha, layer.rslora)
        return layer

    def adapter_input(self, x):
        return _pooled(x, self.base.group_size)

    def update(self):
        return super().update().repeat_interleave(self.base.group_size, 1)

    def merged(self):
        self.merge()
        return self

    @_exactly()
    def merge(self):
        """Put the adapter into the zero points, in place, and drop it: codes, scales and outputs
        stay what they are."""
        if self.rank:
            update = super().update().reshape(-1).to(self.base.zero.dtype)  # (blocks,)
            self.base.zero = self.base.zero - update / self.base.absmax
            self.set_adapter(None, None, self.alpha, self.rslora)


def _to_rank(lora_A, lora_B, rank):
    """The same product with `rank` rows of lora_A, in random directions."""
    if rank == len(lora_A):
        return lora_A, lora_B
    turn = qr(torch.randn(rank, len(lora_A)).to(lora_A)).Q
    return turn @ lora_A, lora_B @ turn.T


LAYER_OF["group_size"] = QALoRALinear


def save_gguf(model, template, file):
    """Write a merged QA-LoRA model as `file`, for llama.cpp: a copy of `template`, a GGUF of the
    same model in any type, where each QALoRALinear has its tensor in Q4_1, w = d code + m in blocks
    of 32 inputs: the codes as they are, and in float16 d, the scale, and m = -scale * zero.

    For 2, 3, 4 bits, and group sizes that are multiples of 32. Needs gguf. Raises ValueError for
    another layout, an adapter that is not merged, and a template that is damaged, of another model,
    or without such a tensor; OSError if it is missing, or on a full disk."""
    from gguf import GGUFReader, GGUFWriter

    layers = {name: m for name, m in lora_layers(model).items() if isinstance(m, QALoRALinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers of QA-LoRA")
    try:
        reader = GGUFReader(template)
        names, heads = _gguf_layout(reader)
    except (IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise ValueError(f"{template} is no GGUF of a model, or damaged: {error!r}") from error
    new = _q4_1_tensors(layers, reader, names, heads, template)
    fields = {key: x for key, x in reader.fields.items() if not key.startswith("GGUF.")}
    writer = GGUFWriter(None, fields.pop("general.architecture").contents())
    writer.data_alignment = reader.alignment
    for key, field in fields.items():
        sub_type = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        data, kind = new.get(tensor.name, (tensor.data, tensor.tensor_type))
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    with _in_one_piece(Path(file)) as started:
        writer.write_header_to_file(started)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        size = writer.fout[0].tell()
        writer.close()
        if started.stat().st_size < size:  # numpy does not say so
            raise OSError("No space left on device")


def _gguf_layout(reader):
    """gguf's map from a name in transformers to that of the tensor, and the numbers of heads."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    def value(key):
        return reader.fields[key].contents() if key in reader.fields else None

    kind = value("general.architecture")
    architecture = next(known for known, name in MODEL_ARCH_NAMES.items() if name == kind)
    heads = set()
    for key in ("head_count", "head_count_kv"):
        count = value(f"{kind}.attention.{key}")
        heads |= {*count} if isinstance(count, list) else {count}  # a list has one for each block
    return get_tensor_name_map(architecture, value(f"{kind}.block_count")), heads - {None, 0}


def _q4_1_tensors(layers, reader, names, heads, template):
    """Name in the GGUF -> bytes, (out, in / 32 * 20), of each layer, and their type."""
    from gguf import GGMLQuantizationType

    known, new = {tensor.name: tensor for tensor in reader.tensors}, {}
    for name, layer in layers.items():
        base, tensor = layer.base, known.get(names.get_name(f"{name}.weight", (".weight",)))
        if layer.rank:
            raise ValueError(f"the adapter of {name} is not merged: call merge(model) before")
        if base.bits > 4 or base.group_size % 32:
            layout = f"{base.bits} bits in groups of {base.group_size}"
            raise ValueError(f"{name} has {layout}; Q4_1 has up to 4, in groups of 32")
        if tensor is None or (*tensor.shape,) != (*base.shape[::-1],):
            shape = "missing" if tensor is None else (*map(int, tensor.shape[::-1]),)
            raise ValueError(f"{name} is {(*base.shape,)}, and {shape} in {template}")
        rows, far = _rows_as_in(tensor, layer.merged_weight().float().cpu(), heads)
        if not far < 1:
            raise ValueError(f"{template} is of another model: {name} is {far:.2f} || W || away")
        new[tensor.name] = _q4_1(base, rows, name).numpy(), GGMLQuantizationType.Q4_1
    return new


def _rows_as_in(tensor, W, heads):
    """The order of rows in which llama.cpp keeps W, (out, in): the one of those that its converter
    makes which is nearest to `tensor`, of the GGUF, and how far it is, over || W ||."""
    from gguf import dequantize

    theirs = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    orders = [rows := torch.arange(len(W))]
    for h in heads:
        if len(W) % (2 * h) == 0:  # q, k of LLaMA: the halves of a head in turn
            orders.append(rows.view(h, 2, -1).mT.reshape(-1))
        if len(W) % (3 * h) == 0:  # BLOOM, GPT-NeoX: q of all heads, k, v
            orders.append(rows.view(h, 3, -1).transpose(0, 1).reshape(-1))
    distances = [(theirs - W[order]).norm() for order in orders]
    least = min(distances)
    return orders[distances.index(least)], (least / W.norm().clamp(min=1e-30)).item()


def _q4_1(base, rows, name):
    """Blocks of d and m in float16 and 32 codes: 16 bytes, each with one of the first half low and
    one of the second high."""
    out, n = base.shape
    codes = base.unpacked()[rows].view(out, n // 32, 2, 16).to(torch.uint8).cpu()
    blocks = [base.absmax, -base.absmax * base.zero]
    blocks = [x.view(out, -1)[rows].repeat_interleave(base.group_size // 32, 1) for x in blocks]
    halves = torch.stack(blocks, -1).to(torch.float16).cpu()  # (out, n / 32, 2)
    off = (halves[:, :, 0] - blocks[0].cpu()).abs() > blocks[0].max().cpu() / 64  # of the layer's
    if off.any() or not halves.isfinite().all():
        raise ValueError(f"{name} has a scale or a zero point that float16 cannot hold")
    packed = codes[:, :, 0] + 16 * codes[:, :, 1]
    return torch.cat([halves.view(torch.uint8), packed], -1).view(out, -1)


# --------------------------------------- 11  The model you already have: the adapter that peft made


@torch.no_grad()
def initialize_peft(
    model, batches, weights=None, init="quailora", steps=20, H=None, floor=False, progress=list,
):  # fmt: skip
    """Start the active adapter of a peft model, in place, in each LoRA layer on a linear layer,
    whatever base that has (bitsandbytes, GPTQ, AWQ, torchao, ...). Only lora_A, lora_B change.

    Q is what the base does to the identity. W comes from `weights`, one layer at a time: a folder,
    a Hub id, or a full-precision model; None is where the base was loaded from. X is nearly the one
    in full precision that the paper takes: each block is started twice, from what its layers read
    with its adapters off, and then on, behind the blocks started before it. batches, H (by names in
    the base model), floor, progress, and the rows returned: as for `apply_quailora`, but errors are
    over || (W - Q) X ||.

    Needs transformers 5 and accelerate. Raises ValueError, with the model as it was, also for
    variants of LoRA (DoRA), an init that chooses Q (loftq, cloq, joint), and a W that is missing or
    not what was rounded; what transformers raises if it finds no model."""
    _check(torch.zeros(1, 1), init=init, steps=steps)
    if INITS[init].choose:
        raise ValueError(f"init {init!r} chooses Q, and this base is rounded: see apply_quailora")
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers, calibrated = _peft_layers(model), _calibrated(init, batches, H)
    if H is not None and (missing := layers.keys() - H.keys()):
        raise ValueError(f"H has nothing for {min(missing)}")
    modules = {name: layer.module for name, layer in layers.items()}
    body = _body(model)
    if not {*modules.values()} <= {*body.modules()}:  # the head has an adapter
        body = model
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    solve, reports = partial(INITS[init].solve, steps=steps), {}
    passes = [partial(_calibrating, adapters_on=on) for on in (False, True)]
    passes = passes if INITS[init].needs_data else passes[:1]

    def start_layer(name, H):
        new = _restarted(name, layers[name], found[name], H, dtype, solve, floor)
        lora_A, lora_B, reports[name] = new
        layers[name].lora_A.copy_(lora_A)
        layers[name].lora_B.copy_(lora_B)

    with _originals(model, layers, weights) as found, _restored_on_errors(layers):
        _start_each(modules, start_layer, body, batches, H, progress, passes)
    return [_row(name, layers[name].module, calibrated, reports[name]) for name in layers]


class _PeftLayer(NamedTuple):
    module: nn.Module
    lora_A: nn.Parameter  # (r, in) and (out, r), of the active adapter
    lora_B: nn.Parameter
    scaling: float
    shape: tuple  # (out, in)


def _peft_layers(model):
    """name -> a LoRA layer of peft's on a linear layer."""
    layers = {}
    for name, m in model.named_modules():
        lora_A, other = getattr(m, "lora_A", None), ("MultiheadAttention", "ParamWrapper")
        if not isinstance(lora_A, nn.ModuleDict) or type(m).__name__ in other:
            continue
        active = [key for key in m.active_adapters if key in lora_A]
        if not active or not isinstance(lora_A[active[0]], nn.Linear):  # of a convolution
            continue
        if len(active) > 1:
            raise ValueError(f"{name} has {len(active)} active adapters: set_adapter to one")
        if variant := m.lora_variant.get(active[0]):
            kind = type(variant).__name__
            raise ValueError(f"{name} is no plain LoRA ({kind}): its start is not known")
        if m.merged:
            raise ValueError(f"the adapter of {name} is merged: call unmerge_adapter() before")
        factors = lora_A[active[0]].weight, m.lora_B[active[0]].weight
        shape = m.out_features, m.in_features
        layers[name] = _PeftLayer(m, *factors, m.scaling[active[0]], shape)
    if not layers:
        what = "get_peft_model goes before, or apply_quailora in its place"
        raise ValueError(f"{type(model).__name__} has no LoRA layers of peft's: {what}")
    return layers


@contextlib.contextmanager
def _restored_on_errors(layers):
    before = [(p, p.clone()) for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    try:
        yield
    except BaseException:
        for p, old in before:
            p.copy_(old)
        raise


def _calibrating(model, adapters_on):
    """A context: in eval mode, adapters of peft on or off."""
    stack = _evaluating(model)
    for m in model.modules():
        if hasattr(m, "_disable_adapters"):
            stack.callback(setattr, m, "_disable_adapters", m._disable_adapters)
            m._disable_adapters = not adapters_on
        if hasattr(m, "support_avx512bf16_for_cpu"):
            m.train()  # bitsandbytes packs 4 bits for inference here, and gradients are wrong then
    return stack


def _effective_weight(base, shape, like):
    """Q, (out, in) in float32 at least, of any linear layer: what it makes of the identity, in
    slices and in the dtype of `like`, less its bias."""
    bias, (out, n) = getattr(base, "bias", None), shape
    Q = _float(like).new_empty(out, n)
    kept = None if bias is None else bias.data
    if bias is not None:
        bias.data = torch.zeros_like(kept)  # a large one would take the digits of Q
    try:
        rest = base(like.new_zeros(1, n))  # of a bias by another name
        for inputs in torch.arange(n, device=like.device).split(512):
            x = nn.functional.one_hot(inputs, n).to(like.dtype)
            Q[:, inputs] = (base(x) - rest).T.to(Q.dtype)
    finally:
        if bias is not None:
            bias.data = kept
    return Q


@_exactly()
def _restarted(name, layer, original, H, dtype, solve, floor):
    """lora_A, lora_B and errors for a layer of peft's, from the layer in full precision."""
    from accelerate.utils import align_module_device

    began, device, base = time.perf_counter(), layer.lora_A.device, layer.module.base_layer
    if type(base) is nn.Linear or type(base).__name__ == "Conv1D":
        dtype = base.weight.dtype  # T5 keeps some in float32
    with _calibrating(base, adapters_on=False):
        Q = _effective_weight(base, layer.shape, layer.lora_A.new_empty(0, dtype=dtype))
    with align_module_device(original, device):  # reads it, if it is on disk
        W = original.weight.detach()
    # a Conv1D has W^T, and where its base was rounded it may be a Linear
    W = min((M for M in (W, W.T) if M.shape == Q.shape), key=lambda M: (M - Q).norm())
    if H is not None:
        H = H.to(device)
    elif floor:
        H = torch.eye(Q.shape[1], device=device)
    rank, scaling = len(layer.lora_A), layer.scaling
    k = min(rank, *Q.shape)
    _check(W, H, k, name, scaling)
    E = Q.neg_().add_(W)
    if (far := (E.norm() / _float(W).norm()).item()) > 1:
        raise ValueError(f"|| W - Q || is {far:.2f} || W || in {name}: not the W of this base")
    del W
    A, B = solve(E, H, k)
    factors = _to_rank(*split_product(A, B, scaling), rank)
    seconds = time.perf_counter() - began
    least = exact_init(E, H, k) if floor else None
    return *factors, {**_left(E, A, B, H, least), "seconds": seconds}


@contextlib.contextmanager
def _originals(model, layers, weights):
    """name -> the layer in full precision; its weight stays on disk, if `weights` is no model."""
    with tempfile.TemporaryDirectory() as folder:
        missing = ()
        if not isinstance(weights, nn.Module):
            weights, missing = _on_disk(model, weights, folder)
        found = dict(weights.named_modules())
        for name, layer in layers.items():
            W, shape = getattr(found.get(name), "weight", None), layer.shape
            if W is None or f"{name}.weight" in missing:
                raise ValueError(f"weights: {name}.weight is not there")
            if tuple(W.shape) not in (shape, shape[::-1]):
                raise ValueError(f"weights: {name}.weight is {tuple(W.shape)}, its base is {shape}")
        yield found


def _on_disk(model, source, folder):
    """The model of a folder or Hub id, its weights on disk (in `folder` those that are not in
    safetensors, or that transformers converts: all experts), and the names of missing ones."""
    revision = None
    if source is None:
        source = getattr(model, "name_or_path", "")
        revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    if not source:
        raise ValueError("weights: where the base was loaded from is not known")
    kind = type(model)
    config, _ = kind.config_class.get_config_dict(source, revision=revision)
    if "quantization_config" in config:
        raise ValueError(f"weights: {source} is quantized; say where it is in full precision")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    theirs, ours = [part.get("model_type") for part in parts], model.config.model_type
    if config and ours not in theirs:
        raise ValueError(f"weights: {source} has a model of {theirs[0]}, not of {ours}")
    loaded, info = kind.from_pretrained(
        source, revision=revision, dtype="auto", device_map={"": "disk"}, offload_folder=folder,
        output_loading_info=True,
    )  # fmt: skip
    return loaded, info["missing_keys"]


# -------------------------------------------------------------------------------- A demonstration


def demonstrate(out=384, n=512, rank=32, steps=20):
    """One layer: the error (1) after (4) and after each (5) and (6), beside its floor."""
    torch.manual_seed(0)
    X = torch.randn(n, 2000) * torch.linspace(0, -6, n).exp()[:, None]  # strong and weak inputs
    W, H = torch.randn(out, n), X @ X.T
    E = W - quantize(W).dequantize()
    A, B, errors = als_init(E, H, rank, steps, return_errors=True)
    qlora = calibrated_error(E, 0 * A, B, H)
    floor = calibrated_error(E, *exact_init(E, H, rank), H)
    print(f"|| (W - (Q + A B^T)) X || of a layer ({out}, {n}), NF4, rank {rank}, over QLoRA's")
    halves = [f"round {i // 2 + 1}, after ({5 + i % 2})" for i in range(2 * steps)]
    titles = ["QLoRA, A B^T = 0", "SVD (nearly), after (4)", *halves, "floor, closed form"]
    for title, error in zip(titles, [qlora, *errors, floor], strict=True):
        left = math.sqrt(error / qlora)
        print(f"{title:24} {left:.4f}  {'#' * round(60 * left)}")


if __name__ == "__main__":
    demonstrate()
