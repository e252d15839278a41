# SPDX-License-Identifier: MIT
"""QuAILoRA: quantization-aware initialization for LoRA (arXiv 2410.14713), in one file that needs torch alone.

QLoRA fine-tunes a LoRA adapter on a frozen base that was rounded to 4 bits. Instead of starting the adapter at zero,
QuAILoRA starts it where it cancels as much of the rounding as rank r can, on inputs that the layer really sees:

    (1)      min_{A,B}  1/2 || (W - (Q + A B^T)) X ||_F^2              one such problem for each linear layer

    (3)      E = W - Q = U S V^T                                       start: the SVD of the rounding error,
    (4)      A = U_r sqrt(S_r),  B = V_r sqrt(S_r)                     cut off at rank r
    (5)      A   = E H B (B^T H B)^-1                                  then alternating least squares (ALS): the best A
    (6)      B^T = (A^T A)^-1 A^T E                                    for this B, the best B for that A, 20 times

    in code          paper     shape, meaning
    W                W         (out, in)    full-precision weight (the paper: m x n)
    Q, quantize      Q         (out, in)    W after rounding, `quantize(W).dequantize()`
    E                W - Q     (out, in)    rounding error
    X                X         (in, s)      inputs of the layer in the full-precision model on calibration data; never stored
    H                X X^T     (in, in)     their correlations, `input_correlations`
    A, B             A, B      (out, r), (in, r)    low-rank factors, from `svd_init`, `als_init`, `exact_init`
    lora_A, lora_B             (r, in), (out, r)    trained factors: scaling * lora_B lora_A = A B^T, `split_product`
    scaling                    alpha / r, or alpha / sqrt(r) with rsLoRA
    G                E H E^T   (k, k)       what (1) depends on, seen from the smaller side of E: k = min(out, in), `_Problem`

QLoRA, LoftQ, QERA, CLoQ are neighbours: other choices of how W is rounded, how A, B are found, and how often in turn, `INITS`.
QA-LoRA is a sibling: an adapter on sums of inputs, which merges into the rounded weights without loss, `QALoRALinear`.

Usage:      rows = apply_quailora(model, batches)     # replaces the linear layers of a torch model; then train as usual
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

try:  # rounds and unrounds 4-bit weights where it is installed, so that the base is the one QLoRA has on that device
    import bitsandbytes
except ImportError:
    bitsandbytes = None


def _check(W: Tensor, H: Tensor | None = None, rank: int = 1, group_size: int | None = None, name: str = "") -> None:
    """ValueError, with the numbers, for a weight or error W, (out, in), that cannot be rounded or solved for."""
    of = name and f" of {name}"
    if W.ndim != 2 or not W.is_floating_point() or not W.numel():
        raise ValueError(f"expected a 2-D float weight{of}, got {W.dtype} of shape {tuple(W.shape)}")
    if H is not None and H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(f"H{of} must be {(W.shape[1], W.shape[1])}, got {tuple(H.shape)}")
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"rank {rank} is not within 1 .. min(out, in) = {min(W.shape)}{of}")
    if group_size is not None and (group_size < 1 or W.shape[1] % group_size):
        raise ValueError(f"group_size {group_size} does not divide in = {W.shape[1]}{of}")
    for M, entries in (W, "weights"), (H, "entries of H"):
        if M is not None and not M.sum().isfinite() and not M.isfinite().all():  # an inf or a NaN stays one in a sum
            raise ValueError(f"{(~M.isfinite()).sum()} of {M.numel()} {entries}{of} are NaN or inf")


def _at_least_float32(M: Tensor) -> torch.dtype:
    return torch.promote_types(M.dtype, torch.float32)


def _exactly(call: Callable) -> Callable:
    """Without gradients, and without autocast, which would multiply matrices in 16 bits."""
    return torch.no_grad()(torch.autocast("cuda", enabled=False)(torch.autocast("cpu", enabled=False)(call)))


# ---------------------------------------------------------------------------------------------- 1  Quantization: W -> Q

BITSANDBYTES_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@functools.cache
def normal_float(bits: int, device: torch.device | None = None) -> Tensor:
    """The 2^bits levels of NormalFloat (arXiv 2305.14314, appendix E), ascending: quantiles of a normal distribution, scaled
    to [-1, 1], 2^(bits-1) above an exact zero and one fewer below. For 4 bits the table of bitsandbytes, NF4."""
    # most: rounded to 7 digits, and float32 where bitsandbytes has it, for its table to the last bit
    half, most = 2 ** (bits - 1), round(1 - (2.0 ** -(bits + 1) + 0.5 / (2**bits - 1)) / 2, 7)
    share = (torch.linspace(most, 0.5, n + 1, dtype=torch.float32)[:-1].double() for n in (half, half - 1))
    above, below = (torch.special.ndtri(p).float() for p in share)
    return (torch.cat([-below, above.new_zeros(1), above.flip(0)]) / above[0]).to(device)


@functools.cache
def dynamic_map(device: torch.device | None = None) -> Tensor:
    """The 256 levels for scales (arXiv 1511.04561): 0, 1, and 2^i cell centers in the decade below 10^(i-6), i < 7, signed."""
    edges = [torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32) for i in range(7)]
    centers = torch.cat([10 ** (i - 6) * (edge[:-1] + edge[1:]) / 2 for i, edge in enumerate(edges)])
    return torch.cat([-centers, centers, centers.new_tensor([0, 1])]).sort().values.to(device)


def _round_blocks(x: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Scale each block of a flat float32 x to [-1, 1] and take the nearest level, at a tie the lower one.
    Returns uint8 codes (x.numel(),) and the float32 scales (blocks,), the largest magnitude of each block."""
    blocks = (F.pad(x, (0, -len(x) % block_size)) if len(x) % block_size else x).view(-1, block_size)
    absmax = torch.maximum(blocks.amax(1), -blocks.amin(1)).abs()  # not -0
    size = absmax.clamp(min=1e-38)
    scaled = blocks * (1 / size)[:, None]
    if len(x) % block_size:  # bitsandbytes divides in a trailing partial block; the last bit can differ
        scaled[-1] = blocks[-1] / size[-1]
    scaled, midpoints = scaled.view(-1)[: len(x)], ((levels[:-1] + levels[1:]) / 2).to(x.device)
    if len(levels) > 16:
        return torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8), absmax
    # in a fifth of a search's time, by a table for 255 cells of [-1, 1]: how many midpoints are below a cell, and the next one
    codes, edges = torch.empty_like(scaled, dtype=torch.uint8), torch.linspace(-1, 1, 256, device=x.device)[:-1]
    below = torch.bucketize(edges, midpoints, out_int32=True)
    following, below = F.pad(midpoints, (0, 1), value=2)[below], below.to(torch.uint8)
    for part, y in zip(codes.split(2**18), scaled.split(2**18), strict=True):  # as large as fits in a cache
        cell = ((y + 1) * 127).int().clamp_(0, 254)  # that of y or the one before; together they hold one midpoint at most
        torch.add(below.index_select(0, cell), y > following.index_select(0, cell), out=part)
    return codes, absmax


def _pack(codes: Tensor, bits: int, to: int = 8) -> Tensor:
    """uint8 codes (n,) below 2^bits, their bits in a row, the highest first, cut into codes below 2^to: into bytes, 4 codes of
    2 bits or 2 of 4 in each, 8 of 3 in three, the last one filled up with the code of level 0; and back with bits=8."""
    size = math.lcm(bits, to)  # of a word
    n, m, dtype = size // bits, size // to, torch.uint8 if size == 8 else torch.int32  # codes in a word, before and after
    codes = F.pad(codes, (0, -len(codes) % n), value=2 ** (bits - 1) - 1).view(-1, n)
    word = codes[:, 0] if n == 1 else sum(codes[:, i].to(dtype) << bits * (n - 1 - i) for i in range(n))
    return torch.stack([(word >> to * (m - 1 - i) & 2**to - 1).to(torch.uint8) for i in range(m)], 1).view(-1)


class _FrozenProduct(torch.autograd.Function):
    """x Q^T for a frozen Q. Keeps the codes for backward and unrounds them again there, where F.linear would keep Q."""

    @staticmethod
    def forward(ctx, x, base):
        ctx.base = base
        return F.linear(x, base.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.base.dequantize(grad.dtype), None


class QuantizedWeight(nn.Module):
    """What `quantize` returns. It stands for scale * (level - zero), with zero = 0 but for groups.
    Buffers: `codes`, uint8 as in `_pack` or int8 (out, in), for 16 bits W itself; `absmax`, the scale of each block or row in
    float32, or with double quantization as uint8 codes with `nested_absmax` (a float32 for 256 scales) and `offset` (float32);
    `zero`, (groups,), and there `absmax`, in float32, or float64 if W is."""

    def __init__(self, shape, dtype, bits, block_size, codes, absmax=None, nested_absmax=None, offset=None, zero=None):
        super().__init__()
        self.shape, self.dtype, self.bits, self.block_size = torch.Size(shape), dtype, bits, block_size
        for name, buffer in dict(codes=codes, absmax=absmax, nested_absmax=nested_absmax, offset=offset, zero=zero).items():
            self.register_buffer(name, buffer)

    def _apply(self, fn, recurse=True):
        """Follow moves to a device, but not casts: model.half() would round the scales."""
        return super()._apply(lambda buffer: buffer.to(fn(buffer.new_empty(0)).device), recurse)

    def _state(self, dtype: torch.dtype, shape: tuple[int, int]):
        """The buffers as bitsandbytes takes them for a result in `dtype`, or None where it has no kernel for them."""
        known = self.bits == 4 and self.zero is None and self.block_size in BITSANDBYTES_BLOCK_SIZES
        if not (bitsandbytes and known) or self.shape.numel() % 2 or dtype == torch.float64:
            return None
        QuantState, scales = bitsandbytes.functional.QuantState, dynamic_map(self.codes.device)
        nested = None if self.offset is None else QuantState(self.nested_absmax, None, scales, 256, dtype=torch.float32)
        return QuantState(self.absmax, shape, None, self.block_size, "nf4", dtype, self.offset, nested)

    def forward(self, x: Tensor) -> Tensor:
        """x Q^T, (..., in) -> (..., out), in the dtype of x. What it keeps for backward is the codes."""
        state = self._state(x.dtype, self.shape)
        if state is None or self.shape[1] % self.block_size:  # their AVX-512 kernel mistakes the scales of a block in two rows
            return _FrozenProduct.apply(x, self)
        return bitsandbytes.matmul_4bit(x, self.codes, state)

    def scales(self) -> Tensor:
        """float32 (blocks,), or (out,) for 8 bits; for groups in float64 if W was."""
        if self.nested_absmax is None:
            return self.absmax
        nested = self.nested_absmax.repeat_interleave(256)[: len(self.absmax)]
        return dynamic_map(nested.device)[self.absmax.int()] * nested + self.offset

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Q, (out, in), computed in the dtype of the scales and rounded to `dtype` (default: the dtype of W)."""
        dtype, n = dtype or self.dtype, self.shape.numel()
        if self.bits == 16:
            return self.codes.to(dtype)
        if self.bits == 8 and self.zero is None:
            return (self.codes * self.scales()[:, None] * (1 / 127)).to(dtype)
        if (state := self._state(dtype, (1, n))) is not None:  # one row, see `forward`
            return bitsandbytes.functional.dequantize_4bit(self.codes, state).reshape(self.shape)
        values = self.levels()[_pack(self.codes[:, 0], 8, self.bits)[:n].int()].view(self.shape)
        values = values if self.zero is None else values - self.of_each(self.zero)
        return (values * self.of_each(self.scales())).to(dtype)

    def levels(self) -> Tensor:
        """What a code stands for, before the zero point and the scale, (2^bits,); for int8 whole numbers over 127."""
        device = self.codes.device
        if self.zero is not None:
            return torch.arange(2**self.bits, dtype=torch.float32, device=device)
        return torch.arange(-127, 128, device=device) / 127 if self.bits == 8 else normal_float(self.bits, device)

    def of_each(self, values: Tensor) -> Tensor:
        """`values` of the blocks, scales or zero points, (blocks,), for every weight: (out, in)."""
        values = values[:, None].expand(-1, self.block_size or self.shape[1]).reshape(-1)
        return values[: self.shape.numel()].view(self.shape)


@torch.no_grad()
def quantize(
    W: Tensor, bits: int = 4, block_size: int = 64, double_quant: bool = True, group_size: int | None = None
) -> QuantizedWeight:
    """Round W, (out, in) of any float dtype, to the nearest level of its block: `quantize(W).dequantize()` is Q.

    2, 3, 4 bits: NormalFloat (arXiv 2305.14314) in blocks of `block_size` consecutive weights, rows joined; `double_quant`
    rounds the scales of the blocks to 8 bits too. 4 bits are rounded as by bitsandbytes, bit for bit; only where it is not
    installed, double quantization differs from that of its CPU code, which misses the nearest of 256 scales 2 times in 1,000.
    8 bits: int8 with one scale a row (the weights of LLM.int8, arXiv 2208.07339), block_size and double_quant are not used.
    16 bits: a copy of W in its own dtype, not rounded, for plain LoRA beside the others.

    group_size, for QA-LoRA (arXiv 2309.14717): each `group_size` consecutive inputs of a row take 2^bits equal steps from their
    least to their greatest weight, scale * (code - zero), with a zero point that is not rounded; 2, 3, 4 or 8 bits.

    Raises ValueError if W is not a 2-D float matrix, holds NaN or inf, bits or block_size are not supported, or group_size does
    not divide `in`."""
    _check(W.float() if W.is_floating_point() and not group_size else W, group_size=group_size)
    if bits not in (2, 3, 4, 8, 16) or (bits == 16 and group_size is not None):
        raise ValueError(f"bits must be 2, 3, 4, 8 or{' (without group_size)' * (group_size is not None)} 16, got {bits}")
    if block_size < 2 or block_size % 2:
        raise ValueError(f"block_size must be even and positive, got {block_size}")
    if bits == 16:
        return QuantizedWeight(W.shape, W.dtype, 16, None, W.clone())
    x = W.float()
    if group_size:
        groups = W.to(_at_least_float32(W)).reshape(-1, group_size)
        least, size = groups.amin(1), groups.abs().amax(1)
        scale = (groups.amax(1) / (2**bits - 1) - least / (2**bits - 1)).maximum(torch.finfo(groups.dtype).eps * size)
        scale = scale.where(size > 0, 1).clamp(min=torch.finfo(groups.dtype).tiny)
        zero = -least / scale
        codes = (groups / scale[:, None] + zero[:, None]).round().clamp(0, 2**bits - 1).to(torch.uint8)
        return QuantizedWeight(W.shape, W.dtype, bits, group_size, _pack(codes.view(-1), bits)[:, None], scale, zero=zero)
    if bits == 8:
        absmax = x.abs().amax(1)
        codes = (x * (127 / absmax.clamp(min=1e-36))[:, None]).round().to(torch.int8)
        return QuantizedWeight(W.shape, W.dtype, 8, None, codes, absmax)
    theirs = bits == 4 and bitsandbytes and block_size in BITSANDBYTES_BLOCK_SIZES
    if theirs and x.device.type != "cpu":  # on a CPU they take three times as long for the same codes
        codes, state = bitsandbytes.functional.quantize_nf4(x, blocksize=block_size, compress_statistics=double_quant)
        nested_absmax = state.state2.absmax if double_quant else None
        return QuantizedWeight(W.shape, W.dtype, 4, block_size, codes, state.absmax, nested_absmax, state.offset)
    codes, absmax = _round_blocks(x.reshape(-1), normal_float(bits), block_size)
    if len(codes) % block_size:
        absmax[-1].clamp_(min=1e-38)  # as in bitsandbytes
    codes, offset, nested_absmax = _pack(codes, bits)[:, None], None, None
    if double_quant:
        offset = absmax.mean()
        if theirs:
            absmax, state = bitsandbytes.functional.quantize_blockwise(absmax - offset, blocksize=256)
            nested_absmax = state.absmax
        else:
            absmax, nested_absmax = _round_blocks(absmax - offset, dynamic_map(), 256)
    return QuantizedWeight(W.shape, W.dtype, bits, block_size, codes, absmax, nested_absmax, offset)


# ----------------------------------------------------------------------------------- 2  The low-rank part: E, H -> A, B


def _symmetric(R: Tensor, left: Callable, right: Callable) -> Tensor:
    """M = left(R) right(R)^T, (k, k) in float64, where that is symmetric, from the rows of R, (k, n), at most 512 at a time:
    half of the work of the product for a large k, and never all of left(R) or right(R)."""
    size = math.ceil(len(R) / math.ceil(len(R) / 512))
    parts = [slice(start, start + size) for start in range(0, len(R), size)]
    M = R.new_empty(len(R), len(R), dtype=torch.float64)
    for i, rows in enumerate(parts):
        L = left(R[rows])
        for columns in parts[: i + 1]:
            block = (L @ right(R[columns]).T).double()
            M[rows, columns], M[columns, rows] = block, block.T
        M[rows, rows] = (block + block.T) / 2
    return M


def _thin_qr(E: Tensor, make_E: Callable) -> tuple[Callable, Tensor]:
    """R, (n, n) in float64, of E = P R with orthonormal columns P, (m, n), m >= n, and the function A -> P A, for
    which `make_E` makes E once more. By the Cholesky factor R of E^T E, in a third of the time, where that leaves P^T P within
    some 3e-5 (E in float32) or 1e-9 of I: the error (1) has a minimum there, so it changes by the square of that."""
    for dtype in dict.fromkeys((E.dtype, torch.float64)):
        cast = functools.partial(Tensor.to, dtype=dtype)
        gram, of = _symmetric(E.T, cast, cast), torch.finfo(dtype)
        (R, failed), size = torch.linalg.cholesky_ex(gram, upper=True), gram.diagonal()[:, None]
        solve = functools.partial(torch.linalg.solve_triangular, R, upper=True)
        x = torch.ones_like(size)
        x[1::2] = -1
        for _ in range(4):  # power iteration: |x| becomes 1 / sigma^2, sigma the least singular value of E with unit columns
            x = size.sqrt() * solve(torch.linalg.solve_triangular(R.T, size.sqrt() * x / x.norm(), upper=False))
        if not failed and (size > of.tiny / of.eps).all() and x.norm() * of.eps < (1e-9 if of.bits == 64 else 3e-5):

            def lift(A: Tensor, to: Callable = cast, solve: Callable = solve) -> Tensor:
                C = to(solve(A))  # R^-1 A
                return torch.cat([to(rows) @ C for rows in make_E().split(4096)]).double()

            return lift, R
    P, R = torch.linalg.qr(E.double())
    return lambda A: P @ A, R


def _orthonormal(A: Tensor) -> Tensor:
    """An orthonormal basis, (m, min(m, n)), of the span of A, (m, n), to 10 digits in float64 and 4 in float32."""
    R, failed = torch.linalg.cholesky_ex(A.T @ A, upper=True)  # R^T R = A^T A, in half of the time of a QR
    V = torch.linalg.solve_triangular(R, A, upper=True, left=False)
    off = (V.T @ V).sub_(torch.eye(len(R), dtype=V.dtype, device=V.device)).norm()
    good = not failed and off < (1e-10 if V.dtype == torch.float64 else 1e-4)
    return V if good else torch.linalg.qr(A.double())[0].to(A.dtype)


def _largest(M: Tensor) -> float:
    """The largest magnitude in M, and no less than what numbers can be divided by."""
    return max(-float(M.amin()), float(M.amax()), 16 * torch.finfo(M.dtype).tiny)


def _sandwich(R: Tensor, H: Tensor | None) -> Tensor:
    """R H R^T in float64, (k, k), by products in float32 where H is in float32. None stands for the identity.
    An input feature 1,000 times the others, as language models have, has 10^6 times their share: in float32 nothing would be
    left of the others' digits. So products with features of 10 times the median size are apart, in float64."""
    if H is None:
        return _symmetric(R, Tensor.double, Tensor.double)
    large = ((size := H.diagonal()) > 100 * H.diagonal().median()).nonzero()[:, 0]
    if H.dtype == torch.float64 or len(large) > len(size) / 8:
        H = H.double()
        return _symmetric(R, lambda rows: rows.double() @ H, Tensor.double)
    r, h = _largest(R), math.sqrt(float(size.index_fill(0, large, 0).max()) or 1.0)

    def rest(rows):  # without large features, in units in which the products stay within the range of float32
        return (rows / r).div_(h).float().index_fill_(1, large, 0)

    G = _symmetric(R, lambda rows: rest(rows) @ H, rest)
    T = torch.cat([rest(rows) @ H[:, large] for rows in R.split(512)]).double()  # (k, number of large features)
    R = R[:, large].double() / (r * h)
    return G.addmm_(T, R.T).addmm_(R, T.T).addmm_(R @ H[large][:, large].double(), R.T).mul_(r**2).mul_(h**2)


class _Problem:
    """Objective (1) for one layer, seen from the smaller side of E.

    For an orthonormal A, (6) gives B = E^T A, and the error left is 1/2 (tr G - tr A^T G A) with G = E H E^T, (out, out).
    If out > in, take the thin QR E = P R first: P is orthonormal, so what A, B are for R, (in, in), P A, B are for E.
    So R (= E if out <= in) and G = R H R^T, (k, k) with k = min(out, in), are all that the iterations need.

    G is in float64, and so are the errors at the start and the end, or one could be below the least possible. It comes from
    products in float32, see `_sandwich`, or in float64 where float32 could not tell apart what A, B leave of it, `_resolved`.

    QA-LoRA adds an adapter to the inputs summed over groups of group_size = g, P x with P (in/g, in): as if B was the same in
    all inputs of a group, B P for B. The least of 1/2 || (E - A B^T P) X ||_F^2 is (1) again, with K = P H P^T for H and
    F = E H P^T K^+, the regression of E X on P X, for E: as F K = E H P^T, also for a singular K, the two differ by a constant,

        1/2 || (E - A B^T P) X ||_F^2  =  1/2 || (F - A B^T) P X ||_F^2  +  1/2 (tr E H E^T - tr F K F^T)

    So (5) is A = E H P^T B (B^T K B)^-1, (6) is B^T = (A^T A)^-1 A^T E H P^T K^+, and the optimum is A = U_r, B^T = U_r^T F
    with the top eigenvectors of F K F^T (reduced-rank regression). Of a rank beyond in/g, further columns of A, B are zero."""

    def __init__(self, make_E: Callable, H: Tensor | None, rank: int, group_size: int = 1):
        """make_E makes E, (out, in); where out > in it is not kept, but made once more in `factors`."""
        _check(E := make_E(), H, rank, group_size)
        self.columns, self.dtype, self.group_size, total = rank, _at_least_float32(E), group_size, None
        noise = 8 * torch.finfo(self.dtype if H is None else _at_least_float32(H)).eps
        E, H = E.to(self.dtype), None if H is None else H.to(torch.promote_types(H.dtype, self.dtype))
        if group_size > 1:
            E, H = E.double(), (torch.eye(E.shape[1], device=E.device) if H is None else H).double()
            EH, pooled = E @ H, lambda M: M.unflatten(-1, (-1, group_size)).sum(-1)  # M -> M P^T
            total, K, size = float((EH * E).sum()), pooled(pooled(H).T), pooled(pooled(H.abs()).T).diagonal()  # K (in/g, in/g)
            size = size.where(size > 0, 1).sqrt()  # in these units a sum is as exact as another, and large ones hide no others
            E, H = pooled(EH) / size @ torch.linalg.pinv(K / size / size[:, None], rtol=noise, hermitian=True) / size, K  # F, K
        self.rank, self.H = min(rank, *E.shape), H
        make_E = make_E if group_size == 1 else lambda F=E: F
        self.lift, self.R = _thin_qr(E, make_E) if E.shape[0] > E.shape[1] else (lambda A: A, E)
        del E
        self.G = _sandwich(self.R, H)
        self.total = float(self.G.trace()) if total is None else total

    def _resolved(self, captured: float) -> bool:
        """Whether float32 can tell apart what is left of G. If not, as for inputs with a large mean, G is made in float64."""
        left = (float(self.G.trace()) - captured) / len(self.G)
        if self.H is None or self.H.dtype == torch.float64 or 1.2e-7 * float(self.G.norm()) < 0.01 * left:
            return True
        self.H = self.H.double()
        self.G = _sandwich(self.R, self.H)
        self.total = float(self.G.trace())
        return False

    def error(self, captured: float) -> float:
        """1/2 || (E - A B^T) X ||_F^2, where captured = tr A^T G A."""
        return max(0.0, self.total - captured) / 2

    def factors(self, A: Tensor) -> tuple[Tensor, Tensor]:
        """A (out, r) and B (in, r) from an orthonormal A (k, r), in the SVD-balanced form A = U sqrt(S), B = V sqrt(S)."""
        B = sum(part.T @ R.double() for R, part in zip(self.R.split(1024), A.split(1024), strict=True)).T  # (6), by parts
        U = torch.linalg.eigh(B.T @ B).eigenvectors.flip(1)  # A B^T = (A U) (B U)^T, and B U = V S
        A, B = self.lift(A) @ U, (B @ U).repeat_interleave(self.group_size, 0)  # P^T B; not V S: a row as exact as E's column
        root = B.norm(dim=0).sqrt()
        A, B = A * root, B / root.where(root > 0, 1)
        return tuple(F.pad(M, (0, self.columns - self.rank)).to(self.dtype) for M in (A, B))

    def start(self) -> Tensor:
        """U_r of (3), (k, r): exact for k <= 256, else from a random sketch of E and two power iterations;
        singular values below 1e-8 of the largest are not told apart."""
        if len(self.R) <= 256:
            R = self.R.double()
            return torch.linalg.eigh(R @ R.T).eigenvectors.flip(1)[:, : self.rank]  # R R^T = U S^2 U^T
        R, size = self.R.to(self.dtype), _largest(self.R)
        A = torch.randn(R.shape[1], self.rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(R)
        for _ in range(2):
            A = R.T @ (_orthonormal(R @ (A / size)) / size)
        return _orthonormal((R @ (A / size)).double())

    def als(self, steps: int, every_half_step: bool = False) -> tuple[Tensor, list[float]]:
        """`steps` rounds of (5) and (6): an orthonormal A (k, r), the last iterate or a better one before it, and errors, the
        first that of the start, the last that of this A, with every_half_step all of those between them.

        With B = R^T A, (5) is A = G A (A^T G A)^-1. The r x r factor changes the basis of A but not its span, and the span
        is all that (6) sees, so A = orth(G A) does for both: a subspace iteration, with no system that could be singular.
        Where H is in float32, the steps from the third on are so too, unless their errors are asked for."""
        A, step, most, errors = self.start(), 0, 0.0, []
        best = torch.zeros_like(A)
        while True:
            Y = self.G @ A  # (6) B^T = (A^T A)^-1 A^T E = A^T E, so that Y = E H B
            captured = max(0.0, float((A * Y).sum()))  # tr A^T G A
            errors.append(self.error(captured))
            if captured > most:  # only rounding can make a later iterate the worse one
                best, most = A, captured
            if step == min(1, steps) and not self._resolved(captured):
                return self.als(steps, every_half_step)
            if step == steps:
                errors[-1] = self.error(most)  # of the A returned
                return best, errors
            if every_half_step:  # (5) alone leaves 1/2 (tr G - tr (B^T H B)^+ Y^T Y)
                lam, V = torch.linalg.eigh(A.T @ Y)  # B^T H B, (r, r)
                keep = lam > lam.amax().clamp(min=0) * self.rank * torch.finfo(lam.dtype).eps
                errors.append(self.error(float(((Y @ V[:, keep]).square().sum(0) / lam[keep]).sum())))
            A, step = _orthonormal(Y), step + 1  # (5) A = E H B (B^T H B)^-1, in another basis
            if step == 2 < steps and not every_half_step and self.H is not None and self.H.dtype == torch.float32:
                size = self.G.norm()
                G, A = torch.empty_like(self.G, dtype=torch.float32), A.float()
                for part, rows in zip(G.split(1024), self.G.split(1024), strict=True):
                    part.copy_(rows / size)
                for i in range(step, steps):  # every other basis will do: the span is the same
                    A = _orthonormal(G @ A) if i % 2 else G @ A
                A, step = _orthonormal(A.double()), steps

    def exact(self) -> tuple[Tensor, list[float]]:
        """The top r eigenvectors of G, (k, r), and the least possible error: half the sum of the other eigenvalues."""
        lam, U = (M[..., -self.rank :] for M in torch.linalg.eigh(self.G))  # in ascending order
        return (U, [self.error(float(lam.sum()))]) if self._resolved(float(lam.sum())) else self.exact()


@_exactly
def svd_init(E: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation A B^T of E, (out, in), without data: the optimum of (2), by equations (3) and (4).
    Results and errors raised as for `als_init`."""
    _check(E, None, rank)
    U, sigma, Vt = torch.linalg.svd(E.to(_at_least_float32(E)), full_matrices=False)  # (3) E = U S V^T
    root = sigma[:rank].sqrt()
    return U[:, :rank] * root, Vt[:rank].T * root  # (4) A = U_r sqrt(S_r), B = V_r sqrt(S_r)


@_exactly
def als_init(E: Tensor, H: Tensor, rank: int, steps: int = 20, return_errors: bool = False, group_size: int = 1):
    """QuAILoRA: A and B from `steps` rounds of (5) and (6), started at (4); beyond min(out, in) = 256 at a sketch of (4).

    E: (out, in), the rounding error W - Q; H: (in, in), symmetric positive semidefinite, of any scale, may be singular.
    Returns A (out, rank), B (in, rank) in float32, or float64 if E is, in the SVD-balanced form A^T A = B^T B diagonal; with
    `return_errors` also the 2 steps + 1 calibrated errors: at the start and after every half-step, (5), (6), (5), ...
    Costs one product with H and two with E, then O(min(out, in)^2 rank) a step. group_size: for QA-LoRA, B is the same in all
    inputs of a group, see `_Problem`. Raises ValueError if rank is not within 1 .. min(out, in), the shapes do not fit,
    group_size does not divide `in`, or E or H is not finite."""
    problem = _Problem(lambda: E, H, rank, group_size)
    A, errors = problem.als(steps, return_errors)
    return (*problem.factors(A), errors) if return_errors else problem.factors(A)


@_exactly
def exact_init(E: Tensor, H: Tensor, rank: int, group_size: int = 1) -> tuple[Tensor, Tensor]:
    """A global optimum of (1) in closed form (QERA, arXiv 2410.06040; CLoQ, 2501.18475), also where H is singular.
    With U_r the top r eigenvectors of E H E^T, A = U_r and B^T = U_r^T E, here SVD-balanced. Arguments, results and errors
    raised as for `als_init`. Costs an eigendecomposition of order min(out, in)."""
    problem = _Problem(lambda: E, H, rank, group_size)
    return problem.factors(problem.exact()[0])


@_exactly
def calibrated_error(E: Tensor, A: Tensor, B: Tensor, H: Tensor | None) -> float:
    """Objective (1): 1/2 || (E - A B^T) X ||_F^2 = 1/2 tr (E - A B^T) H (E - A B^T)^T. H = None is the identity: (2)."""
    D = E.double() - A.double() @ B.double().T
    return max(0.0, float(((D if H is None else D @ H.double()) * D).sum())) / 2


# ------------------------------------------------------------- 3  The family: W, H -> Q, A, B by three choices of parts

INITS = {  # name: (how W is rounded, how A and B are found for W - Q, rounds of the two in turn)
    "qlora": ("nearest", None, 1),  # the baseline: A = 0, B random normal
    "svd": ("nearest", "svd", 1),  # LQER, arXiv 2402.02446, without its scaling: the optimum of (2)
    "loftq": ("nearest", "svd", 5),  # LoftQ, 2310.08659
    "quailora": ("nearest", "als", 1),  # the paper
    "exact": ("nearest", "exact", 1),  # QERA, 2410.06040: the optimum of (1) for the nearest Q
    "cloq": ("calibrated", "exact", 1),  # CLoQ, 2501.18475
    "joint": ("calibrated", "als", 4),  # QuAILoRA with Q in the loop: an extension, not in the paper
}


def needs_data(init: str) -> bool:
    return INITS[init][0] == "calibrated" or INITS[init][1] in ("als", "exact")


def residual_metric(H: Tensor, B: Tensor | None = None, damping: float = 0.03) -> Tensor:
    """M, (in, in) in float64, with 1/2 e M e^T the part of (1) that the rounding errors e of a row, (in,), are to blame for.
    M is H, or given the B, (in, r), of an adapter whose best A takes its part of any errors, H - H B (B^T H B)^-1 B^T H. Damped
    by a share of its mean diagonal, so that H may be singular, and errors are not fitted to correlations that the calibration
    data have by chance; by more where M, as it was rounded, is not positive definite."""
    M = H = H.double()
    if B is not None:
        HB = H @ (B := _orthonormal(B[:, B.norm(dim=0) > 0].double()))
        M = H - HB @ torch.linalg.pinv(B.T @ HB, hermitian=True) @ HB.T
    least = 1e-9 * H.diagonal().mean()
    shift = damping * M.diagonal().mean().clamp(min=0) + (least if least > 0 else 1)
    while torch.linalg.cholesky_ex(damped := M + torch.diag(shift.expand(len(M)))).info and shift.isfinite():
        shift = 10 * shift
    return damped


def _rounding_error(W: Tensor, base: QuantizedWeight) -> Tensor:
    """E = W - Q, (out, in), in the dtype of W and the memory of Q."""
    Q = base.dequantize(W.dtype)
    return torch.sub(W, Q, out=None if base.bits == 16 else Q)


@_exactly
def round_calibrated(W: Tensor, base: QuantizedWeight, M: Tensor, descent: bool = False) -> QuantizedWeight:
    """Round W, (out, in), once more, input by input, to the levels, scales and zero points of `base`; M of `residual_metric`.
    Each weight goes to the level where the sum of e M e^T over the rows is least, with the errors in the inputs before it as
    they are, and those after it free to make up for it (the feedback of GPTQ, arXiv 2210.17323). With `descent` from the codes
    of `base` on, those of all others as they are: then that sum never rises. In blocks of 32 inputs, by matrix products."""
    # without: e M e^T = sum_j d_j (e_j + sum_{i<j} e_i U_ij)^2, M = U diag(d) U^T with U unit upper triangular, and K = U^T - 1
    K = M if descent else torch.linalg.cholesky(M.flip(0, 1)).flip(0, 1).T
    K = (K / K.diagonal()[:, None]).fill_diagonal_(0).to(W.dtype)  # (in, in): -K_j E is the best error in input j
    E, levels, scale = _rounding_error(W, base), base.levels(), base.of_each(base.scales()).to(W.dtype)
    W = W if base.zero is None else W + base.of_each(base.zero).to(W.dtype) * scale
    W, E, scale = (x.T.clone(memory_format=torch.contiguous_format) for x in (W, E, scale))  # (in, out), W near level * scale
    midpoints, divisor = (levels[:-1] + levels[1:]) / 2, scale.where(scale != 0, 1)
    codes = torch.empty_like(W, dtype=torch.uint8)
    for start in range(0, len(W), 32):
        rows = slice(start, start + 32)
        best = W[rows] + K[rows] @ E
        for j in range(*rows.indices(len(W))):
            codes[j] = torch.bucketize(best[j - start] / divisor[j], midpoints, out_int32=True)
            e = W[j] - levels[codes[j].int()] * scale[j]
            best.addr_(K[rows, j], e - E[j])
            E[j] = e
    int8, codes = base.codes.dtype == torch.int8, codes.T.contiguous()
    codes = (codes.int() - 127).to(torch.int8) if int8 else _pack(codes.view(-1), base.bits)[:, None]
    return QuantizedWeight(base.shape, base.dtype, base.bits, base.block_size, **dict(base.named_buffers()) | {"codes": codes})


@_exactly
def initialize(
    W: Tensor, H: Tensor | None, rank: int, init: str = "quailora", steps: int = 20, bits: int = 4, floor: bool = False,
    **layout,
) -> tuple[QuantizedWeight, Tensor, Tensor, dict]:  # fmt: skip
    """Q, A (out, rank) and B (in, rank) for W, (out, in), by one of INITS.

    Nearest rounding takes W - A B^T to Q, with A, B of the round before; calibrated rounding takes W to Q, with the scales of
    the nearest one and the `residual_metric` of that B: with feedback the first time, and where there are several rounds with
    two descents in each. Then A and B are found for W - Q. Several rounds start at the nearest Q, and the best of them counts.
    H: (in, in), None stands for the identity. `steps` of ALS; `bits`, `layout` as for `quantize`, group_size as for `als_init`
    too; raises ValueError as these. Returns the calibrated errors (1) as well: of the nearest Q without A B^T (`quantized`), at
    the start (`svd`) and the end (`als`) of its ALS, of the result (`initialized`), with floor=True the least for its Q
    (`floor`), and the `seconds` taken, without those for errors that no step needs."""
    began, group, seen = time.perf_counter(), layout.get("group_size") or 1, H if needs_data(init) else None
    rounding, solver, rounds = INITS[init] if bits < 16 else ("nearest", INITS[init][1], 1)
    plain, W = quantize(W, bits, **layout), W.to(_at_least_float32(W))
    base, best, A, B = plain, None, W.new_zeros(len(W), rank), W.new_zeros(W.shape[1], rank)
    _check(W, H, rank)
    for turn in range(rounds):
        if rounding == "nearest" and turn:
            base = quantize((W - A @ B.T).to(plain.dtype), bits, **layout)
        elif rounding == "calibrated" and (turn or rounds == 1):
            M = residual_metric(W.new_ones(W.shape[1]).diag() if H is None else H, B if turn else None)
            for descent in [False] * (turn <= 1) + [True] * (2 * (rounds > 1)):
                base = round_calibrated(W, base, M, descent)
        make_E = functools.partial(_rounding_error, W, base)
        if solver in ("als", "exact") or solver and group > 1:
            problem = _Problem(make_E, seen, rank, group)
            U, reached = problem.als(steps) if solver == "als" else problem.exact()
            A, B = problem.factors(U)
        else:
            A, B = svd_init(make_E(), rank) if solver else (A, torch.randn_like(B))
            problem, reached = None, [calibrated_error(make_E(), A, B, None) if rounds > 1 else 0.0]
        if best is None or reached[-1] < best[-1][-1]:
            best = base, A, B, make_E, problem, reached
    (base, A, B, make_E, problem, reached), seconds = best, time.perf_counter() - began
    known = problem is not None and seen is H  # then it knows the errors, without further products with H
    reached, als = reached if known else [calibrated_error(make_E(), A, B, H)], solver == "als"
    errors = {
        "quantized": problem.error(0.0) if known and base is plain
        else calibrated_error(_rounding_error(W, plain), 0 * A, B, H),
        "svd": reached[0] if als else None, "als": reached[-1] if als else None, "initialized": reached[-1],
        "floor": (problem if known else _Problem(make_E, H, rank, group)).exact()[1][0] if floor else None, "seconds": seconds,
    }  # fmt: skip
    return base, A, B, errors


# ------------------------------------------------------------------- 4  The layer: x -> Q x + scaling * lora_B lora_A x


def split_product(A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """lora_A (r, in) and lora_B (out, r) with scaling * lora_B lora_A = A B^T: the factorization that training starts from.
    (1) determines only the product, but the gradient of each factor is multiplied by the other, so the split decides how
    fast each is trained. Here lora_A gets orthonormal rows times sqrt(in / r), which has the norm of a normal draw of
    deviation 1 / sqrt(r), and lora_B the rest. README.md, "How the product is split", has the measurement. Where r > in, which
    QA-LoRA allows, it gets random orthonormal columns instead."""
    V = _orthonormal(B.double())  # B = V R, (in, r) (r, r)
    R, size = V.T @ B.double(), math.sqrt(B.shape[0] / min(B.shape))
    if V.shape[1] < B.shape[1]:
        turn = _orthonormal(torch.randn(B.shape[::-1], dtype=V.dtype, device=V.device)).T  # (in, r), turn turn^T = I
        V, R = V @ turn, turn.T @ R  # (in, r), (r, r)
    return (V.T * size).to(A.dtype).contiguous(), (A.double() @ R.T / (size * scaling)).to(A.dtype)


def _check_options(alpha: float, init: str, steps: int) -> None:
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be positive, got {alpha}")
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")


def _scaling(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def _weight(linear: nn.Module) -> Tensor:
    """The weight as (out, in): GPT-2's Conv1D holds it transposed."""
    return linear.weight.detach().T if type(linear).__name__ == "Conv1D" else linear.weight.detach()


class LoRALinear(nn.Module):
    """A linear layer with a frozen quantized weight and a trainable low-rank update: x -> Q x + scaling lora_B lora_A x.
    `base` is the QuantizedWeight; `lora_A` (rank, in) and `lora_B` (out, rank) are the trainable parameters, in float32 (or
    float64); `bias`, (out,) or None, is kept and frozen; `scaling` is alpha / rank, or alpha / sqrt(rank) with rsLoRA."""

    # set by from_linear; kind: the class of the layer that was replaced; own_base: whether Q is another than quantize(W)
    init, report, kind, own_base = None, None, nn.Linear, False

    def __init__(self, base: QuantizedWeight, lora_A: Tensor, lora_B: Tensor, alpha: float, rslora: bool = False, bias=None):
        super().__init__()
        (self.out_features, self.in_features), self.base = base.shape, base
        self.group_size = 1 if base.zero is None else base.block_size  # how many inputs the adapter reads as their sum
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.set_adapter(lora_A, lora_B, alpha, rslora)

    def set_adapter(self, lora_A: Tensor | None, lora_B: Tensor | None, alpha: float, rslora: bool = False) -> None:
        """None for no adapter: x -> Q x. A factor that is a Parameter already stays that one."""
        self.rank, self.alpha, self.rslora = 0 if lora_A is None else len(lora_A), alpha, rslora
        self.scaling = _scaling(alpha, max(self.rank, 1), rslora)
        self.lora_A, self.lora_B = (M if isinstance(M, nn.Parameter | None) else nn.Parameter(M) for M in (lora_A, lora_B))

    @classmethod
    @_exactly
    def from_linear(
        cls, linear: nn.Module, H: Tensor | None = None, rank: int = 64, alpha: float = 16, bits: int = 4, steps: int = 20,
        init: str = "quailora", rslora: bool = False, floor: bool = False, W: Tensor | None = None, **layout,
    ) -> LoRALinear:  # fmt: skip
        """Quantize `linear` (nn.Linear or Conv1D) and start its adapter from H = X X^T, (in, in); None stands for the identity.
        W, (out, in): what to approximate instead of the layer's weight. Options and errors raised as for `apply_quailora`. The
        errors of `initialize`, as || (W - (Q + A B^T)) X ||_F / || W X ||_F, and its `seconds` are kept as `report`."""
        _check_options(alpha, init, steps)
        weight, nearest = _weight(linear), W is None and INITS[init][::2] == ("nearest", 1)
        W = weight if W is None else W
        base, A, B, report = initialize(W, H, rank, init, steps, bits, floor, **layout)
        factors = split_product(A, B[:: layout.get("group_size", 1)], _scaling(alpha, rank, rslora))
        layer = cls(base, *factors, alpha, rslora, linear.bias)
        base.dtype, layer.own_base = weight.dtype, bits < 16 and not nearest
        h = 1.0 if H is None else float(H.diagonal().max()) or 1.0  # W / h times H stays within float32
        W = W.to(_at_least_float32(W))
        H = None if H is None else H.to(W.dtype)
        parts = ((w if H is None else (w / h) @ H).mul(w) for w in W.split(1024))
        norm = h / 2 * sum(float(part.sum(dtype=torch.float64)) for part in parts)
        relative = lambda error: error and (math.sqrt(error / norm) if norm > 0 else 0.0)  # noqa: E731
        layer.report = {key: value if key == "seconds" else relative(value) for key, value in report.items()}
        layer.init, layer.kind = init, type(linear)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x, or of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = self.base(x)
        if self.lora_A is not None:
            x = x.to(self.lora_A.dtype)
            x = x if self.group_size == 1 else x.unflatten(-1, (-1, self.group_size)).sum(-1)  # P x
            out = out + F.linear(F.linear(x, self.lora_A) * self.scaling, self.lora_B).to(out.dtype)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @_exactly
    def merged_weight(self) -> Tensor:
        """Q + scaling * lora_B lora_A, (out, in), in the dtype of the factors; without an adapter Q."""
        if self.lora_A is None:
            return self.base.dequantize(_at_least_float32(self.base.scales()))
        update = self.scaling * self.lora_B @ self.lora_A
        return self.base.dequantize(self.lora_A.dtype) + update.repeat_interleave(self.group_size, 1)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, rank={self.rank}, scaling={self.scaling:g}, bits={self.base.bits}, block_size={self.base.block_size}"


class QALoRALinear(LoRALinear):
    """QA-LoRA (arXiv 2309.14717): x -> Q x + scaling lora_B lora_A P x, where P x, (in / group_size,), is the sum of the inputs
    of each group (not their mean), and Q = scale * (codes - zero) has a scale and a zero point a group.

    So the update is the same for all weights of a row in a group, and `merge` puts it into their zero point. `lora_A` is (rank,
    in / group_size), the rest as in LoRALinear. A rank beyond in / group_size gains nothing but speed of training."""

    @classmethod
    def from_linear(
        cls, linear: nn.Module, H: Tensor | None = None, rank: int = 64, bits: int = 4, group_size: int = 32, alpha: float = 16,
        steps: int = 20, init: str | None = None, rslora: bool = False, floor: bool = False, W: Tensor | None = None,
    ) -> QALoRALinear:  # fmt: skip
        """Quantize `linear` and start its adapter from H = X X^T, (in, in), as derived in `_Problem`; without H at zero.
        init: one of INITS, by default "quailora", and "qlora" without H. The rest as for LoRALinear; errors as `quantize`."""
        init = init or ("qlora" if H is None else "quailora")
        return super().from_linear(linear, H, rank, alpha, bits, steps, init, rslora, floor, W, group_size=group_size)

    @_exactly
    def merge(self) -> None:
        """Put the adapter into the zero points, in place, and drop it: codes, scales and outputs stay what they are."""
        if self.lora_A is not None:
            update = self.scaling * self.lora_B @ self.lora_A  # (out, in / group_size)
            self.base.zero = self.base.zero - update.reshape(-1).to(self.base.zero.dtype) / self.base.absmax
            self.set_adapter(None, None, self.alpha, self.rslora)


# ------------------------------------------------------------------------------------------------------ 5  Whole models


def linear_layers(model: nn.Module, skip: Iterable[str] = ()) -> dict[str, nn.Module]:
    """The layers to replace, by name: every nn.Linear and Conv1D but heads, weights tied to an embedding, and those in `skip`.
    Heads are what a transformers model has outside its `base_model`, and its output embedding. Subclasses of nn.Linear are
    left alone: their forward is not known. Raises ValueError if a name in `skip` does not exist."""
    skip = {skip} if isinstance(skip, str) else set(skip)
    if unknown := skip - {name for name, _ in model.named_modules()}:
        raise ValueError(f"nothing to skip by the name {sorted(unknown)[0]!r}")
    body = set(getattr(model, "base_model", model).modules())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or type(module).__name__ == "Conv1D")
        and (name and module in body and module is not head and id(module.weight) not in tied and name not in skip)
    }


def checked_layers(model: nn.Module, rank: int, skip: Iterable[str] = (), group_size: int | None = None) -> dict:
    """`linear_layers`, or ValueError if there are none, `rank` or `group_size` does not fit one, or a weight is NaN or inf."""
    if not (layers := linear_layers(model, skip)):
        raise ValueError(f"{type(model).__name__} has no linear layers to replace")
    for name, layer in layers.items():
        _check(_weight(layer), None, rank, group_size, name)
    return layers


def input_correlations(model: nn.Module, batches: Iterable, skip: Iterable[str] = ()) -> dict[str, Tensor]:
    """H = X X^T, (in, in) in float32 or float64, of every layer in `linear_layers(model, skip)`, over all of `batches`.

    A batch is what the model takes: a mapping of keyword arguments (`labels` are dropped), a tuple, or one tensor. Positions
    where a 2-D `attention_mask` is 0 do not count. Layers that read the same tensor share one H object. The model runs in
    eval mode and without its head. All H are held at once, on the model's device. In a torch.distributed process group each
    process gives batches of its own, and all get the sum. Raises ValueError if a layer reads nothing, NaN or inf,
    RuntimeError if two layers read the same tensor in some calls and not in others."""
    return next(correlation_passes(model, batches, skip), {})


def correlation_passes(model: nn.Module, batches: Iterable, skip: Iterable = (), memory: float = math.inf) -> Iterator[dict]:
    """What `input_correlations` gives, in parts whose H take at most `memory` bytes, each from a pass over `batches`.
    A layer whose H does not fit in what is left is put off to the next pass, so the model must stay as it is until the last
    one. Raises ValueError also if one H alone is larger than `memory`, or `batches` can be passed over only once."""
    layers = linear_layers(model, skip)
    while layers:
        if (H := _one_pass(model, batches, layers, memory)).keys() != layers.keys() and iter(batches) is batches:
            raise ValueError(f"{memory:.0f} bytes hold the H of {len(H)} of {len(layers)} layers: batches must be a list")
        layers = {name: layer for name, layer in layers.items() if name not in H}
        yield H


def _arguments(batch, device: torch.device) -> tuple[tuple, dict, Tensor | None]:
    """What a model is called with for a batch, and which positions count, (batch * positions,), or None where all do."""
    if not isinstance(batch, Mapping):
        return tuple(x.to(device) for x in (batch if isinstance(batch, (tuple, list)) else (batch,))), {}, None
    batch = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items() if key != "labels"}
    mask = batch.get("attention_mask")
    return (), batch, mask.bool().reshape(-1) if mask is not None and mask.ndim == 2 and not mask.all() else None


def _tokens(x: Tensor, keep: Tensor | None) -> Tensor:
    """What a layer read, (..., in), as (tokens, in) in float32 at least, without the positions that do not count."""
    x = x.reshape(-1, x.shape[-1])
    x = x if keep is None or len(keep) != len(x) else x[keep]
    return x.to(_at_least_float32(x))


def _evaluating(model: nn.Module) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    for module in model.modules():
        stack.callback(setattr, module, "training", module.training)
    model.eval()
    return stack


def _reduced(H: Tensor, name: str) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(H)
    if not H.isfinite().all():
        raise ValueError(f"{name} read NaN or inf in calibration, or values beyond the root of {H.dtype}'s largest")
    return H


@torch.no_grad()
def _one_pass(model: nn.Module, batches: Iterable, layers: dict[str, nn.Module], memory: float) -> dict[str, Tensor]:
    """H of as many of the `layers` as fit in `memory`, in the order in which they are called."""
    body, device, keep = getattr(model, "base_model", model), next(model.parameters()).device, None
    H, readers = {}, {name: [] for name in layers}  # layer -> for each of its calls, the first reader of the same tensor
    first_reader = WeakIdKeyDictionary()  # tensor -> its version, which a write to it changes -> layer

    def read(name: str, x: Tensor):
        reader = first_reader.setdefault(x, {}).setdefault(0 if x.is_inference() else x._version, name)
        readers[name].append(reader)
        if reader != name:
            return
        x = _tokens(x, keep)
        if name not in H:
            need = x.shape[1] ** 2 * x.element_size()
            if sum(M.nbytes for M in H.values()) + need > memory:
                if H:  # put off: it will not fit in this pass any more
                    return
                raise ValueError(f"the H of {name} takes {need} bytes, more than the {memory:.0f} allowed")
            H[name] = x.new_zeros(x.shape[1], x.shape[1])
        H[name].addmm_(x.T, x)  # in place, so autocast lets it be

    with _evaluating(model) as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(lambda _, args, name=name: read(name, args[0])))
        for batch in batches:
            args, kwargs, keep = _arguments(batch, device)
            body(*args, **kwargs)
    for name, found in readers.items():
        if not found:
            raise ValueError(f"{name} read nothing in calibration: is there a batch, and does the model use this layer?")
        if found != found[:1] * len(readers[found[0]]):
            raise RuntimeError(f"{name} reads the same tensor as {found[0]} in some calls, and not in others")
    H = {name: _reduced(H[name], name) for name in layers if name in H}  # in the same order in every process
    return {name: H[found[0]] for name, found in readers.items() if found[0] in H}


@torch.no_grad()
def _one_after_the_other(model: nn.Module, batches: Iterable, layers: dict[str, nn.Module], start: Callable) -> dict:
    """start(name, H, W) for each layer, H and W such that its LoRALinear repairs what those before it left: name -> result.

    To come as close as it can to the full-precision output, from the inputs X^ that the layer gets in the model as it is
    initialized so far, a layer solves min || W X - (Q + A B^T) X^ ||. That is (1) with H = X^ X^^T and W X X^^T H^-1 for W; of
    that W, its change is damped by 1% of the mean diagonal of H. A layer that is called again keeps what its first call gave.
    One forward pass over two copies of all batches: in one half of the rows the layers compute in full precision, in the other
    as they are initialized, just before they are called."""
    device, results, known = next(model.parameters()).device, {}, WeakIdKeyDictionary()
    parts = [kwargs or dict(enumerate(args)) for args, kwargs, _ in (_arguments(batch, device) for batch in batches)]
    if len({tuple((key, getattr(x, "shape", ())[1:]) for key, x in part.items()) for part in parts}) != 1:
        raise ValueError("sequential=True needs batches of the same keys, with sequences of one length")
    whole = {key: torch.cat([part[key] for part in parts] * 2) if isinstance(x, Tensor) else x for key, x in parts[0].items()}
    rows = next(len(x) for x in whole.values() if isinstance(x, Tensor))
    args, kwargs, keep = _arguments(tuple(whole.values()) if 0 in whole else whole, device)

    def forward(name: str, x: Tensor) -> Tensor:
        if len(x) % rows:
            raise RuntimeError(f"{name} reads {len(x)} rows for a batch of {rows}: sequential=True cannot tell whose they are")
        layer, (full, ours), version = layers[name], x.chunk(2), 0 if x.is_inference() else x._version
        if name not in results:
            if known.get(x, (None,))[0] != version:
                X, Y = _tokens(x, keep).chunk(2)
                with torch.autocast(x.device.type, enabled=False):
                    H, C = (_reduced(half.T @ Y, name).double() for half in (Y, X))
                damped = H + torch.diag((0.01 * H.diagonal().mean()).clamp(min=1e-30).expand(len(H)))
                known[x] = version, H.to(X.dtype), torch.linalg.solve(damped, (C - H).T).T  # 0 where X = X^
            _, H, shift = known[x]
            W = _weight(layer)
            results[name] = start(name, H, (W.double() @ shift + W.double()).to(_at_least_float32(W)))
        return torch.cat([type(layer).forward(layer, full), results[name](ours)])

    with _evaluating(model) as stack:
        for name, layer in layers.items():
            layer.forward = functools.partial(forward, name)
            stack.callback(delattr, layer, "forward")
        getattr(model, "base_model", model)(*args, **kwargs)
    if missing := [name for name in layers if name not in results]:
        raise ValueError(f"{missing[0]} read nothing in calibration: does the model use this layer?")
    return results


def apply_quailora(
    model: nn.Module, batches: Iterable | None, rank: int = 64, alpha: float = 16, bits: int = 4, steps: int = 20,
    init: str = "quailora", rslora: bool = False, skip: Iterable[str] = (), H: dict[str, Tensor] | None = None,
    memory: float = math.inf, sequential: bool = False, floor: bool = True, progress: Callable = list, **layout,
) -> list[dict]:  # fmt: skip
    """Replace every layer of `linear_layers(model, skip)` by a LoRALinear, in place, and freeze everything but the adapters.

    batches: calibration data for `input_correlations`, or None where `H` holds what that function returned or `init` needs
    no data. memory: bytes that all H together may take, see `correlation_passes`. init: one of INITS. sequential: each layer
    repairs what those before it left, see `_one_after_the_other`; takes `batches` in one piece through the model, and memory
    for that. layout: block_size and double_quant, see `quantize`; or group_size, for QALoRALinear instead. floor=False spares
    its eigenvalues, which take longer than ALS on layers beyond about 2,000. progress wraps the list of names: tqdm, say.

    Returns a row for each layer: `name`, `shape` (out, in), and the `report` of `LoRALinear.from_linear`, None where something
    was not computed. Without data `calibrated` is False, and X X^T the identity. Raises ValueError, with the model as it was,
    for options out of range, an H that does not fit, and NaN or inf in a weight."""
    _check_options(alpha, init, steps)
    if layout.get("group_size") is not None and len(layout) > 1:
        raise ValueError(f"group_size does not go with {', '.join(sorted(layout.keys() - {'group_size'}))}")
    group_size, skip = layout.get("group_size"), [skip] if isinstance(skip, str) else list(skip)
    layers, kind = checked_layers(model, rank, skip, group_size), LoRALinear if group_size is None else QALoRALinear
    quantize(torch.zeros(1, group_size or 2), bits, **layout)  # raises for its options
    done, order, passes, calibrated = {}, list(layers), [dict.fromkeys(layers)], not (batches is None and H is None)
    options = dict(rank=rank, alpha=alpha, bits=bits, steps=steps, init=init, rslora=rslora, floor=floor, **layout)
    start = lambda name, H, W=None: kind.from_linear(layers[name], H, W=W, **options)  # noqa: E731
    if sequential and (batches is None or H is not None or not needs_data(init)):
        raise ValueError(f"sequential=True needs batches, no H, and a method that uses them, not {init!r}")
    if H is not None:
        passes = [dict(H)]
        if missing := [name for name in layers if name not in H]:
            raise ValueError(f"H has nothing for {missing[0]}")
        for name, layer in layers.items():
            _check(_weight(layer), H[name], name=name)
    elif sequential:
        bar = iter(progress(order))
        done, passes = _one_after_the_other(model, batches, layers, lambda *args: (next(bar, None), start(*args))[1]), []
        next(bar, None)
    elif batches is not None:
        passes = correlation_passes(model, batches, skip, memory)
    elif needs_data(init):
        raise ValueError(f"init {init!r} needs calibration data: batches or H")
    for H in passes:
        names = [name for name in layers if name in H]
        last = len(done) + len(names) == len(order)  # until then, calibration needs the full-precision model
        for name in progress(names):
            done[name] = start(name, H.pop(name))
            for ready in done.keys() & layers.keys() if last else ():
                _replace(model, layers.pop(ready), done[ready])
    for name, layer in layers.items():
        _replace(model, layer, done[name])
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith((".lora_A", ".lora_B")))
    return [{"name": name, "shape": [*done[name].base.shape], "calibrated": calibrated, **done[name].report} for name in order]


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a module can be registered in several places
        if module is old:
            model.set_submodule(name, new.train(old.training))


def merge(model: nn.Module) -> nn.Module:
    """Turn every LoRALinear back into the layer it replaced, with the weight Q + scaling lora_B lora_A, in place.
    The result is a full-precision model again: `merge(model).save_pretrained(folder)`. Weights get the dtype that W had. Every
    QALoRALinear is merged into its zero points instead and stays: `save_base(merge(model), folder)`."""
    for lora in _lora_layers(model).values():
        if isinstance(lora, QALoRALinear):
            lora.merge()
            continue
        weight = lora.merged_weight().to(lora.base.dtype)
        linear = nn.Linear(lora.in_features, lora.out_features, bias=False, device="meta")
        if lora.kind is not nn.Linear:
            linear, weight = lora.kind(lora.out_features, lora.in_features), weight.T.contiguous()
        linear.weight, linear.bias = nn.Parameter(weight), lora.bias
        _replace(model, lora, linear)
    return model


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


# ----------------------------------------------------------------------------------------------------------- 6  On disk


def _record(base: QuantizedWeight) -> dict:
    """What an adapter fits on, from its first layer: how it was rounded, and in `check` the mean magnitude of Q."""
    return {
        "bits": base.bits, "block_size": base.block_size or 0, "double_quant": base.nested_absmax is not None,
        "groups": base.zero is not None, "check": base.dequantize(torch.float32).abs().mean().item(),
    }  # fmt: skip


def _factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith((".lora_A", ".lora_B"))}


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter to `folder` as peft does (which loads LoRA's, not QA-LoRA's), with a record of its base.
    A file is complete or is not there. Raises ValueError without an adapter, OSError on a full disk. Needs safetensors."""
    from safetensors.torch import save

    layers = _lora_layers(model)
    if not layers or not _factors(model):
        raise ValueError(f"{type(model).__name__} has no adapter to save")
    first = next(iter(layers.values()))
    factors = {f"base_model.model.{name}.weight": p.detach().cpu().contiguous() for name, p in _factors(model).items()}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": first.rank, "lora_alpha": first.alpha, "use_rslora": first.rslora,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None), "lora_dropout": 0.0,
        "target_modules": list(layers), "bias": "none", "fan_in_fan_out": first.kind is not nn.Linear,
        "inference_mode": True, "init_lora_weights": True,
    }  # fmt: skip
    record = {**_record(first.base), "init": first.init, "own_base": first.own_base, "model": config["base_model_name_or_path"]}
    Path(folder).mkdir(parents=True, exist_ok=True)
    contents = save(factors, {"quailora": json.dumps(record)}), json.dumps(config, indent=2).encode()
    for name, content in zip(("adapter_model.safetensors", "adapter_config.json"), contents, strict=True):
        partial = Path(folder) / f".{name}.partial"
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(Path(folder) / name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"{Path(folder) / name} could not be written: {error.strerror}") from error


def save_base(model: nn.Module, folder: str | Path) -> None:
    """Write the rounded model of `apply_quailora` without its adapter as a checkpoint that transformers loads with bitsandbytes
    (4-bit NormalFloat), for bases that are not `quantize(W)`: of loftq, cloq, joint and sequential=True. Other bits, and merged
    QA-LoRA models, in the same keys are for `load_base`. Needs transformers and safetensors. Raises OSError on a full disk."""
    layers, config = _lora_layers(model), model.config
    if not layers or next(iter(layers.values())).base.bits == 16:
        raise ValueError(f"{type(model).__name__} has no rounded weights to save")
    own = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict() if key != "bias"}
    tensors = {key: x for key, x in model.state_dict().items() if key not in own}
    for name, layer in layers.items():
        base, key, dtype = layer.base, f"{name}.weight", str(layer.base.dtype).removeprefix("torch.")
        kind = f"{'nf' if base.zero is None else 'int'}{base.bits}"
        state = {"quant_type": kind, "blocksize": base.block_size, "shape": list(base.shape), "dtype": dtype}
        buffers = {f"{key}.{buffer}": x for buffer, x in base.named_buffers() if buffer not in ("codes", "offset")}
        tensors |= {key: base.codes, f"{key}.quant_map": base.levels(), **buffers}
        if base.nested_absmax is not None:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": base.offset.item()}
            tensors[f"{key}.nested_quant_map"] = dynamic_map()
        tensors[f"{key}.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    if base.bits == 4 and base.zero is None:
        linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
        config.quantization_config = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": linear,
            "bnb_4bit_use_double_quant": base.nested_absmax is not None,  # and transformers' defaults: float32, in uint8
        }  # fmt: skip
    try:
        model.save_pretrained(folder, state_dict={key: x.clone() for key, x in tensors.items()})
    finally:
        vars(config).pop("quantization_config", None)


def load_base(model: nn.Module, folder: str | Path) -> None:
    """Load what `save_base` wrote into a full-precision model (or one made from its configuration) or one of `apply_quailora`.
    Layers that were rounded get that base, and have the adapter that they had: none in a full-precision model. Raises
    FileNotFoundError if there is no checkpoint, ValueError if it does not fit the model. Needs safetensors."""
    from safetensors.torch import load_file

    tensors = {key: x for file in Path(folder).glob("*.safetensors") for key, x in load_file(file).items()}
    states = {key.partition(".weight.quant_state.")[0]: key for key in tensors if ".weight.quant_state." in key}
    if not states:
        raise (ValueError if tensors else FileNotFoundError)(f"{folder} holds no *.safetensors of save_base")
    own, modules, found = model.state_dict(), dict(model.named_modules()), []
    rest = {key: x for key, x in tensors.items() if f"{key}.".rpartition(".weight.")[0] not in states}
    if wrong := next((key for key, x in rest.items() if key in own and own[key].shape != x.shape), None):
        raise ValueError(f"{wrong} is {tuple(rest[wrong].shape)} in {folder} and {tuple(own[wrong].shape)} in the model")
    for name, state in states.items():
        state, key, layer = json.loads(bytes(tensors[state].tolist())), f"{name}.weight", modules.get(name)
        codes, absmax, nested, zero = (tensors.get(key + s) for s in ("", ".absmax", ".nested_absmax", ".zero"))
        offset = torch.tensor(state["nested_offset"]) if "nested_offset" in state else None
        layout = state["shape"], getattr(torch, state["dtype"]), int(state["quant_type"].strip("intf")), state["blocksize"]
        base = QuantizedWeight(*layout, codes, absmax, nested, offset, zero)
        shape = None if layer is None else layer.base.shape if isinstance(layer, LoRALinear) else _weight(layer).shape
        if shape != base.shape:
            raise ValueError(f"{key} is {tuple(base.shape)} in {folder} and {shape and tuple(shape)} in the model")
        grouped = [b.block_size if b.zero is not None else "none" for b in (base, getattr(layer, "base", base))]
        if grouped[0] != grouped[1]:
            raise ValueError(f"{key} has a group_size of {grouped[0]} in {folder} and {grouped[1]} in the model")
        found.append((layer, base))
    for layer, base in found:  # now that all shapes fit
        if isinstance(layer, LoRALinear):
            layer.base, layer.own_base = base.to(layer.base.codes.device), True
        else:
            kind = LoRALinear if base.zero is None else QALoRALinear
            _replace(model, layer, rounded := kind(base.to(layer.weight.device), None, None, 1.0, bias=layer.bias))
            rounded.kind, rounded.own_base = type(layer), True
    model.load_state_dict(rest, strict=False)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith((".lora_A", ".lora_B")))


def load_adapter(model: nn.Module, folder: str | Path, base: str | Path | None = None) -> None:
    """Load what `save_adapter` wrote into a model of `apply_quailora`, or into a full-precision one, which is quantized first.
    base: the folder of `save_base`, for an adapter on a base of its own. Raises ValueError, naming the difference, if the base
    is not the one that it was made for, or a file is damaged; FileNotFoundError if it is missing. Needs safetensors."""
    from safetensors import SafetensorError, safe_open

    file = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(file.read_text())
        rank, alpha, rslora, targets = (config[key] for key in ("r", "lora_alpha", "use_rslora", "target_modules"))
        file = Path(folder) / "adapter_model.safetensors"
        with safe_open(file, "pt") as content:
            record = json.loads((content.metadata() or {})["quailora"])
            factors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        theirs = {key: record[key] for key in ("groups", "bits", "block_size", "double_quant", "check")}
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except (json.JSONDecodeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged or was not written by save_adapter: {error!r}") from error
    prepared = _lora_layers(model).values()
    if record["own_base"] and base is None and not (prepared and all(layer.own_base for layer in prepared)):
        raise ValueError(f"the adapter was made for a base of its own ({record['init']}): give the folder of save_base too")
    if base is not None:
        load_base(model, base)
    elif not prepared:
        layers = linear_layers(model)
        if missing := [name for name in targets if name not in layers]:
            raise ValueError(f"the adapter has a layer {missing[0]}, which {type(model).__name__} has not")
        size, skip = record["block_size"] or 64, set(layers) - set(targets)
        layout = {"group_size": size} if record["groups"] else {"block_size": size, "double_quant": record["double_quant"]}
        apply_quailora(model, None, rank, alpha, record["bits"], init="qlora", rslora=rslora, skip=skip, floor=False, **layout)
    ours = _record(next(iter(_lora_layers(model).values())).base)
    for key in theirs:
        if not math.isclose(ours[key], theirs[key], rel_tol=1e-4):
            what = f"weights of {record['model']} (mean magnitude of the first layer's)" if key == "check" else key
            raise ValueError(f"the adapter was made for another base: {what} {theirs[key]}, and here {ours[key]}")
    for layer in _lora_layers(model).values():
        if layer.lora_A is None:
            (out, n), like = layer.base.shape, layer.base.scales()  # at least float32
            layer.set_adapter(like.new_zeros(rank, n // layer.group_size), like.new_zeros(out, rank), alpha, rslora)
    factors = {key.removeprefix("base_model.model.").removesuffix(".weight"): factor for key, factor in factors.items()}
    parameters = _factors(model)
    for name in sorted(factors.keys() | parameters.keys()):
        found, expected = (tuple(f[name].shape) if name in f else "missing" for f in (factors, parameters))
        if found != expected:
            raise ValueError(f"{name} is {found} in the adapter and {expected} in the model")
    model.load_state_dict(factors, strict=False)
    for layer in _lora_layers(model).values():
        layer.set_adapter(layer.lora_A, layer.lora_B, alpha, rslora)
        layer.init, layer.own_base = record["init"], record["own_base"]


if __name__ == "__main__":
    from test_quailora import compare_sizes

    compare_sizes(sys.argv[1:])  # what a start costs by size: a benchmark
