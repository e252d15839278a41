# SPDX-License-Identifier: MIT
"""Properties of quailora.py, each against an oracle: a closed form, dense float64, or bitsandbytes.

Sections as in quailora.py, then train.py.
"""

import collections
import contextlib
import copy
import gc
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
import weakref
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import quailora
import train
from quailora import (
    LoRALinear,
    QALoRALinear,
    als_init,
    apply_quailora,
    calibrated_error,
    exact_init,
    input_correlations,
    quantize,
    svd_init,
)

settings.register_profile("default", deadline=None, max_examples=100)
settings.load_profile("default")
torch.set_num_threads(1)  # for matrices as small as these a second thread only costs

# ---------------------------------------------------------------------------------------------------------------------
# 1  Quantization
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_path(monkeypatch):
    """Both quantize and dequantize in plain torch, as without bitsandbytes."""
    monkeypatch.setattr(quailora, "bitsandbytes", None)


def without_bitsandbytes(call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quailora, "bitsandbytes", None)
        return call()


def bitsandbytes_dequantize(codes, state):
    """As one row: its AVX-512 kernel takes wrong scales where a block crosses rows, and gives (1, 2) back as (2, 1)."""
    shape, state.shape = state.shape, (1, math.prod(state.shape))
    return bitsandbytes.functional.dequantize_4bit(codes, state).reshape(shape)


@st.composite
def weights(draw):
    """A weight of any float dtype and shape, some of its blocks zero, some rows scaled up or down by orders of magnitude."""
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    W = torch.randn(rows, columns, generator=generator) * 10 ** draw(st.floats(-6, 3))
    W *= 10 ** (draw(st.floats(0, 3)) * torch.randn(rows, 1, generator=generator))
    W.view(-1)[: draw(st.sampled_from([0, 64, 200]))] = 0
    return W.clamp(-6e4, 6e4).to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])))


@given(weights(), st.sampled_from([32, 64, 128, 256]))
@example(torch.ones(1, 2), 64)
@example(torch.ones(2, 1), 64)
def test_nf4_equals_bitsandbytes_bit_for_bit(W, block_size):
    ours = without_bitsandbytes(lambda: quantize(W, block_size=block_size, double_quant=False))
    low = W if W.dtype != torch.float64 else W.float()
    codes, state = bitsandbytes.functional.quantize_4bit(low, blocksize=block_size, quant_type="nf4")
    assert torch.equal(ours.codes, codes) and torch.equal(ours.absmax, state.absmax)
    Q = without_bitsandbytes(ours.dequantize)
    theirs = bitsandbytes_dequantize(codes, state)
    assert Q.dtype == W.dtype and torch.equal(Q.to(low.dtype), theirs)
    assert torch.equal(ours.dequantize(), Q), "the bitsandbytes path on the same buffers"


@given(weights())
def test_double_quantization_has_the_offset_blocks_and_map_of_bitsandbytes_and_the_nearest_code(W):
    ours = without_bitsandbytes(lambda: quantize(W))
    plain = without_bitsandbytes(lambda: quantize(W, double_quant=False))
    _, state = bitsandbytes.functional.quantize_4bit(W.float(), blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(quailora.dynamic_map(), state.state2.code)
    assert torch.equal(ours.offset, state.offset) and torch.equal(ours.nested_absmax, state.state2.absmax)
    # nearest, by brute force over all 256 levels
    nested = ours.nested_absmax.repeat_interleave(256)[: len(plain.absmax), None]
    candidates = quailora.dynamic_map().double() * nested
    target = (plain.absmax - ours.offset).double()[:, None]
    best = (candidates - target).abs().amin(1)
    chosen = (candidates.gather(1, ours.absmax.long()[:, None]) - target).abs()[:, 0]
    assert (chosen <= best + 1e-6 * nested[:, 0] + 1e-36).all()
    theirs = (candidates.gather(1, state.absmax.long()[:, None]) - target).abs()[:, 0]
    assert (theirs <= best + 2e-3 * nested[:, 0] + 1e-36).all(), "their table on the CPU is off by little"


def test_double_quantized_scales_differ_from_bitsandbytes_on_the_cpu_in_less_than_half_a_percent():
    W = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))
    ours, theirs = without_bitsandbytes(lambda: quantize(W)), quantize(W)
    assert torch.equal(ours.codes, theirs.codes)
    assert (ours.absmax != theirs.absmax).float().mean() < 0.005


@given(weights())
@example(torch.ones(1, 2))
@example(torch.ones(2, 1))
def test_the_bitsandbytes_path_gives_the_base_of_a_qlora_user(W):
    low = W if W.dtype != torch.float64 else W.float()
    codes, state = bitsandbytes.functional.quantize_4bit(low, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = bitsandbytes_dequantize(codes, state)
    ours = quantize(W)
    assert torch.equal(ours.codes, codes) and torch.equal(ours.dequantize().to(low.dtype), theirs)
    assert torch.equal(without_bitsandbytes(ours.dequantize).to(low.dtype), theirs), "the torch path on the same buffers"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_float_has_the_quantiles_of_its_definition_and_for_4_bits_the_published_table(bits):
    levels, quantile = quailora.normal_float(bits), statistics.NormalDist().inv_cdf
    assert len(levels) == 2**bits and (levels.diff() > 0).all() and levels[2 ** (bits - 1) - 1] == 0
    most = 1 - (1 / (2 * 2**bits) + 1 / (2 * (2**bits - 1))) / 2
    for side, n in (
        (levels[2 ** (bits - 1) :], 2 ** (bits - 1)),
        (-levels[: 2 ** (bits - 1) - 1].flip(0), 2 ** (bits - 1) - 1),
    ):
        expected = [quantile(0.5 + (most - 0.5) * i / n) / quantile(most) for i in range(1, n + 1)]
        assert torch.allclose(side, torch.tensor(expected), rtol=1e-5)
    if bits == 4:
        assert torch.equal(levels, bitsandbytes.functional.get_4bit_type("nf4", device="cpu"))


def test_codes_are_packed_without_a_gap_the_first_in_the_highest_bits():
    codes = torch.tensor([1, 2, 3, 0, 3], dtype=torch.uint8)
    assert quailora._pack(codes, 2).view(-1).tolist() == [0b01_10_11_00, 0b11_01_01_01], "filled up with level 0, code 1"
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0, 7], dtype=torch.uint8)
    packed = [0b001_010_01, 0b1_100_101_1, 0b10_111_000, 0b111_011_01, 0b1_011_011_0, 0b11_011_011]
    assert quailora._pack(codes, 3).view(-1).tolist() == packed
    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, min(2**bits, 255), (1001,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        assert torch.equal(quailora._pack(quailora._pack(codes, bits), 8, bits)[:1001], codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_counts_the_midpoints_below_also_right_beside_them_and_beside_the_edges_of_the_cells(bits):
    levels = quailora.normal_float(bits)
    midpoints = (levels[:-1] + levels[1:]) / 2
    at = torch.cat([midpoints, torch.linspace(-1, 1, 256)])
    beside = [at.nextafter(torch.tensor(to)) for to in (-2.0, 2.0)]
    values = torch.cat([at, *beside, torch.linspace(-1, 1, 300_001)]).clamp(-1, 1)
    codes, _ = quailora._round_blocks(torch.stack([torch.ones_like(values), values], 1).view(-1), levels, 2)
    assert torch.equal(codes[1::2].long(), (values[:, None] > midpoints).sum(1))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bits, size", [(2, 250), (3, 375)])
def test_two_and_three_bits_take_the_nearest_level_and_that_many_bits(bits, size, double_quant):
    W = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    base = quantize(W, bits, double_quant=double_quant)
    assert base.codes.numel() == size and base.codes.dtype == torch.uint8
    grid = base.of_each(base.scales())[..., None] * quailora.normal_float(bits)  # (out, in, levels)
    absmax = F.pad(W.view(-1), (0, 24)).view(-1, 64).abs().amax(1).repeat_interleave(64)[:1000].view(20, 50)
    assert torch.allclose(base.of_each(base.scales()), absmax, rtol=0.04 if double_quant else 1e-6)
    chosen = (absmax[..., None] * quailora.normal_float(bits) - W[..., None]).abs().argmin(-1, keepdim=True)
    assert torch.equal(base.dequantize(), grid.gather(-1, chosen)[..., 0])


@pytest.mark.parametrize("block_size", [16, 48, 64, 8192])
def test_any_even_block_size_is_rounded_with_the_error_of_its_blocks(block_size):
    W = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    Q = quantize(W, block_size=block_size, double_quant=False).dequantize()
    half_gap = (quailora.normal_float(4)[1:] - quailora.normal_float(4)[:-1]).max() / 2
    for block, rounded in zip(W.view(-1).split(block_size), Q.view(-1).split(block_size), strict=True):
        assert ((block - rounded).abs() <= block.abs().max() * half_gap * 1.0001).all()


@given(weights())
def test_nf4_is_idempotent_on_its_own_output(W):
    Q = quantize(W, double_quant=False).dequantize(torch.float32)
    assert torch.equal(quantize(Q, double_quant=False).dequantize(), Q)


def test_nf4_packs_two_codes_a_byte_in_the_documented_order(torch_path):
    W = torch.tensor([[-1.0, 1.0, 0.0], [0.0796, 0.0, -0.0911]])
    assert quantize(W, double_quant=False).codes.view(-1).tolist() == [0x0F, 0x78, 0x76]
    assert quantize(W[:, :1], double_quant=False).codes.view(-1).tolist() == [0x08]
    assert quantize(torch.zeros(1, 3)).codes.view(-1).tolist() == [0x77, 0x77]


@given(weights())
def test_int8_equals_the_rowwise_absmax_quantization_of_bitsandbytes(W):
    ours = quantize(W, bits=8)
    codes, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(W.float())
    rows = absmax > 1e-36  # for a row of zeros bitsandbytes casts NaN to int8
    assert torch.equal(ours.absmax, absmax) and torch.equal(ours.codes[rows], codes[rows])
    assert ours.codes.dtype == torch.int8 and not ours.codes[~rows].any()
    Q = ours.dequantize(torch.float32)
    assert torch.allclose(Q, bitsandbytes.functional.int8_vectorwise_dequant(ours.codes, absmax), rtol=1e-6)
    assert ((Q - W.float()).abs() <= absmax[:, None] / 254 * 1.0001).all()


@pytest.mark.parametrize(
    "W, options, message",
    [
        (torch.ones(2, 3), {"bits": 5}, "bits must be 2, 3, 4, 8 or 16, got 5"),
        (torch.ones(2, 3), {"block_size": 3}, "block_size must be even and positive, got 3"),
        (torch.ones(4), {}, r"expected a 2-D float weight, got torch.float32 of shape \(4,\)"),
        (torch.ones(2, 3, dtype=torch.int8), {}, "expected a 2-D float weight, got torch.int8"),
        (torch.tensor([[1.0, math.nan, math.inf]]), {}, "2 of 3 weights are NaN or inf"),
    ],
)
def test_quantize_refuses_what_it_cannot_round(W, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(W, **options)


# ---------------------------------------------------------------------------------------------------------------------
# 2  Initialization
# ---------------------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw, singular=True):
    """E (out, in), H = X X^T (in, in), both float64, and a rank; H decays; E and H have any rank if `singular`."""
    out, n = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rank = draw(st.integers(1, min(out, n)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    E = normal(out, n)
    decay = torch.logspace(0, -draw(st.floats(0, 3)), n, dtype=torch.float64)
    X = normal(n, 2 * n) * decay[torch.randperm(n, generator=generator), None]
    if singular:
        rank_E, rank_X = draw(st.integers(0, min(out, n))), draw(st.integers(0, n))
        E = normal(out, rank_E) @ normal(rank_E, n) if rank_E < min(out, n) else E
        X = X @ torch.eye(2 * n, dtype=torch.float64)[:, :rank_X] if rank_X < n else X
        if draw(st.booleans()):
            X[draw(st.integers(0, n - 1))] = 0  # a dead input feature
    return E, X @ X.T, rank


def eigenvalues(E, H):
    return torch.linalg.eigvalsh(E @ H @ E.T).flip(0)


def optimum(E, H, rank):
    """The least value of objective (1), by an eigendecomposition of the full E H E^T."""
    return eigenvalues(E, H)[rank:].clamp(min=0).sum().item() / 2


def nothing(E):
    return E.new_zeros(len(E), 1), E.new_zeros(E.shape[1], 1)


def slack(E, H):
    """What rounding may change in an error: 1e-10 of that of E alone."""
    return 1e-10 * calibrated_error(E, *nothing(E), H) + 1e-300


@given(problems())
def test_each_half_step_never_increases_the_error(problem):
    E, H, rank = problem
    *_, errors = als_init(E, H, rank, steps=10, return_errors=True)
    assert len(errors) == 21
    for before, after in zip(errors, errors[1:], strict=False):
        assert after <= before + slack(E, H)


@given(problems(singular=False), st.integers(0, 4))
def test_als_is_equations_5_and_6_half_step_by_half_step(problem, steps):
    E, H, rank = problem
    A, B = svd_init(E, rank)
    expected = [calibrated_error(E, A, B, H)]
    for _ in range(steps):
        A = torch.linalg.solve(B.T @ H @ B, (E @ H @ B).T).T  # (5), with explicit systems
        expected.append(calibrated_error(E, A, B, H))
        B = torch.linalg.solve(A.T @ A, A.T @ E).T  # (6)
        expected.append(calibrated_error(E, A, B, H))
    ours_A, ours_B, errors = als_init(E, H, rank, steps, return_errors=True)
    assert errors == pytest.approx(expected, rel=1e-5, abs=1e4 * slack(E, H))
    if steps and expected[-1] < expected[0]:
        assert torch.allclose(ours_A @ ours_B.T, A @ B.T, rtol=1e-4, atol=1e-4 * E.abs().max().item())


@given(problems())
def test_the_factors_have_the_error_that_als_reports(problem):
    E, H, rank = problem
    A, B, errors = als_init(E, H, rank, return_errors=True)
    assert calibrated_error(E, A, B, H) == pytest.approx(errors[-1], rel=1e-7, abs=slack(E, H))


@given(problems())
def test_no_solution_is_below_the_floor_and_exact_init_is_on_it(problem):
    E, H, rank = problem
    floor = optimum(E, H, rank)
    assert calibrated_error(E, *exact_init(E, H, rank), H) == pytest.approx(floor, rel=1e-7, abs=slack(E, H))
    for A, B in (svd_init(E, rank), als_init(E, H, rank)):
        assert calibrated_error(E, A, B, H) >= floor - slack(E, H)


@given(problems())
def test_als_is_never_above_svd_nor_svd_above_plain_quantization_without_data(problem):
    E, H, rank = problem
    svd = calibrated_error(E, *svd_init(E, rank), H)
    assert calibrated_error(E, *als_init(E, H, rank), H) <= svd + slack(E, H)
    if not singular(E, rank):
        assert calibrated_error(E, *als_init(E, H, rank, steps=0), H) == pytest.approx(svd, rel=1e-6, abs=slack(E, H))
    assert calibrated_error(E, *svd_init(E, rank), None) <= calibrated_error(E, *nothing(E), None)


def singular(E, rank):
    """Whether the SVD leaves the start open: fewer than `rank` singular values, or two equal ones at the cut."""
    sigma = torch.linalg.svdvals(E)
    return sigma[rank - 1] < 1e-9 * sigma[0] + 1e-300 or (rank < len(sigma) and sigma[rank] > (1 - 1e-6) * sigma[rank - 1])


@given(problems(singular=False))
def test_als_reaches_the_floor_when_the_spectrum_has_a_gap(problem):
    E, H, rank = problem
    top = torch.linalg.eigh(E @ H @ E.T).eigenvectors[:, -rank:]
    E = E + 9 * top @ (top.T @ E)  # the top eigenvalues a hundredfold
    start = calibrated_error(E, *nothing(E), H)
    assert calibrated_error(E, *als_init(E, H, rank, steps=60), H) <= optimum(E, H, rank) + 1e-8 * start


@given(problems())
def test_with_the_identity_for_h_the_optimum_is_that_of_the_svd(problem):
    E, _, rank = problem
    H = torch.eye(E.shape[1], dtype=E.dtype)
    svd = calibrated_error(E, *svd_init(E, rank), H)
    for init in (als_init, exact_init):
        A, B = init(E, H, rank)
        assert calibrated_error(E, A, B, H) == pytest.approx(svd, rel=1e-7, abs=slack(E, H))
        if not singular(E, rank):
            U, V = svd_init(E, rank)
            assert torch.allclose(A @ B.T, U @ V.T, atol=1e-3 * E.abs().max().item())


@given(problems())
def test_svd_init_is_eckart_young_optimal(problem):
    E, _, rank = problem
    A, B = svd_init(E, rank)
    tail = torch.linalg.svdvals(E)[rank:].square().sum().item()
    assert (E - A @ B.T).square().sum().item() == pytest.approx(tail, rel=1e-9, abs=slack(E, None))


@given(problems(singular=False), st.sampled_from([1e-12, 1e-3, 7.0, 1e12]))
def test_results_scale_with_e_and_do_not_depend_on_the_scale_of_h(problem, c):
    E, H, rank = problem
    for init in (als_init, exact_init):
        product = torch.matmul(*(M if i == 0 else M.T for i, M in enumerate(init(E, H, rank))))
        for scaled_E, scaled_H, factor in ((c * E, H, c), (E, c * H, 1)):
            A, B = init(scaled_E, scaled_H, rank)
            base = calibrated_error(E, *nothing(E), H)
            assert calibrated_error(E, A / factor, B, H) == pytest.approx(
                (calibrated_error(E, product, torch.eye(E.shape[1]).double(), H)), rel=1e-5, abs=1e-8 * base
            )


@given(problems(singular=False), st.randoms(use_true_random=False))
def test_results_permute_with_the_features(problem, random):
    E, H, rank = problem
    rows, columns = list(range(E.shape[0])), list(range(E.shape[1]))
    random.shuffle(rows), random.shuffle(columns)
    for init in (als_init, exact_init):
        error = calibrated_error(E, *init(E, H, rank), H)
        A, B = init(E[rows][:, columns], H[columns][:, columns], rank)
        back = A[torch.tensor(rows).argsort()], B[torch.tensor(columns).argsort()]
        assert calibrated_error(E, *back, H) == pytest.approx(error, rel=1e-5, abs=1e-8 * calibrated_error(E, *nothing(E), H))


@given(problems())
def test_inputs_are_unchanged_and_factors_finite_balanced_and_shaped(problem):
    E, H, rank = problem
    E_before, H_before = E.clone(), H.clone()
    for A, B in (svd_init(E, rank), als_init(E, H, rank), exact_init(E, H, rank)):
        assert torch.equal(E, E_before) and torch.equal(H, H_before)
        assert A.shape == (E.shape[0], rank) and B.shape == (E.shape[1], rank) and A.dtype == B.dtype == torch.float64
        assert A.isfinite().all() and B.isfinite().all()
        size = max(1e-300, A.square().sum().item())
        for M in (A, B):  # 1e-6: where E has not the rank, the root of what rounding leaves
            assert torch.allclose(M.T @ M, (A.T @ A).diagonal().diag(), atol=1e-6 * size)


@given(problems())
def test_calibrated_error_is_objective_1(problem):
    E, H, rank = problem
    lam, U = torch.linalg.eigh(H)
    X = U * lam.clamp(min=0).sqrt()
    A, B = torch.randn(len(E), rank).double(), torch.randn(E.shape[1], rank).double()
    expected = ((E - A @ B.T) @ X).square().sum().item() / 2
    assert calibrated_error(E, A, B, H) == pytest.approx(expected, rel=1e-9, abs=1e-9 * expected + 1e-300)


@pytest.mark.parametrize("out, n", [(300, 700), (700, 300), (400, 400)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_sized_problem_ends_within_a_percent_of_the_floor_in_float32(out, n, dtype):
    """Beyond 256 the start is a sketch; inputs with a decaying spectrum and outlier channels, as in a language model."""
    generator = torch.Generator().manual_seed(0)
    E = torch.randn(out, n, generator=generator).to(dtype)
    X = torch.randn(n, 4 * n, generator=generator) * torch.linspace(0, -6, n).exp()[:, None]
    X[5] *= 100
    A, B, errors = als_init(E, X @ X.T, 32, return_errors=True)
    assert A.dtype == torch.float32
    E, H = E.double(), X.double() @ X.double().T
    svd = calibrated_error(E, *svd_init(E, 32), H)
    assert calibrated_error(E, A.double(), B.double(), H) < 1.01 * optimum(E, H, 32) < svd
    assert errors[0] == pytest.approx(svd, rel=0.2), "the sketched start is close to the SVD"


@pytest.mark.parametrize("shape", [(96, 128), (128, 96)])
@pytest.mark.parametrize("outlier", [1e2, 1e3, 1e4])
def test_float32_inputs_with_an_outlier_channel_reach_the_optimum_and_report_it(outlier, shape):
    """SmolLM2 has a layer with an input feature 1,300 times the median one."""
    generator = torch.Generator().manual_seed(0)
    E, X = torch.randn(*shape, generator=generator), torch.randn(shape[1], 500, generator=generator)
    X[3] *= outlier
    H = X @ X.T
    best = optimum(E.double(), H.double(), 16)
    A, B, errors = als_init(E, H, 16, return_errors=True)
    for A, B in ((A, B), exact_init(E, H, 16)):  # noqa: B020
        assert A.dtype == torch.float32 and calibrated_error(E, A, B, H) < 1.01 * best
    assert best * (1 - 1e-9) <= errors[-1] < 1.01 * best


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e3])
def test_a_direction_that_all_inputs_share_hides_no_error_in_float32(mean):
    generator = torch.Generator().manual_seed(0)
    E, X = torch.randn(300, 400, generator=generator), torch.randn(400, 800, generator=generator)
    H = (X := X + mean * torch.randn(400, 1, generator=generator)) @ X.T
    problem = quailora._Problem(lambda: E, H, 32)
    A, errors = problem.als(20)
    assert errors[-1] == pytest.approx(calibrated_error(E, *problem.factors(A), H), rel=1e-3)
    least = calibrated_error(E.double(), *exact_init(E.double(), H.double(), 32), H)
    assert quailora._Problem(lambda: E, H, 32).exact()[1][0] == pytest.approx(least, rel=1e-3)
    assert 0.999 * least < errors[-1] < 1.05 * least or mean == 1e3  # H itself is wrong by its rounding there


@pytest.mark.parametrize("case", ["few tokens", "mean", "outliers", "token"])
def test_calibrated_rounding_takes_an_H_that_its_rounding_to_float32_made_indefinite(case):
    generator = torch.Generator().manual_seed(1)
    W, X = torch.randn(96, 128, generator=generator), torch.randn(128, 8 if case == "few tokens" else 600, generator=generator)
    if case == "mean":
        X += 1e3 * torch.randn(128, 1, generator=generator)
    elif case == "outliers":
        X[:3] *= 1e4
    elif case == "token":
        X[:2, ::100] = 1e5
    joint, quailora_ = (quailora.initialize(W, X @ X.T, 16, init)[-1]["initialized"] for init in ("joint", "quailora"))
    assert joint <= quailora_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["random", "chain", "growing", "tiny"])
def test_the_thin_qr_is_one_also_where_a_cholesky_factor_does_not_show_how_near_to_dependent_the_columns_are(case, dtype):
    generator = torch.Generator().manual_seed(0)
    R = torch.eye(24, dtype=torch.float64)  # its diagonal is far from zero beside its columns, its least singular value is not
    if case == "chain":
        R = 0.31 * R + 0.95 * torch.diag(torch.ones(23).double(), 1)
    elif case == "growing":
        R = 0.1 * R + torch.randn(24, 24, generator=generator, dtype=torch.float64).triu(1)
    elif case == "tiny":  # the squares of a column are not within the range of the dtype
        R[:, 5] *= 1e-21 if dtype == torch.float32 else 1e-156
    E = (torch.linalg.qr(torch.randn(300, 24, generator=generator, dtype=torch.float64))[0] @ R).to(dtype)
    lift, R = quailora._thin_qr(E, lambda: E)
    P, eye = lift(torch.eye(24, dtype=torch.float64)), torch.eye(24, dtype=torch.float64)
    assert torch.allclose(P.T @ P, eye, atol=1e-4 if dtype == torch.float32 else 1e-8)
    assert torch.allclose(P @ R, E.double(), atol=1e-5 if dtype == torch.float32 else 1e-10)
    V = quailora._orthonormal(E)
    assert torch.allclose((V.T @ V).double(), eye, atol=1e-4 if dtype == torch.float32 else 1e-9)


def test_autocast_does_not_reach_the_solvers():
    generator = torch.Generator().manual_seed(0)
    linear, X = nn.Linear(96, 64), 10 + torch.randn(96, 400, generator=generator)
    expected = LoRALinear.from_linear(linear, X @ X.T, 16, floor=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer = LoRALinear.from_linear(linear, (X.double() @ X.double().T).float(), 16, floor=True)
    for key in ("quantized", "svd", "als", "floor"):
        assert layer.report[key] == pytest.approx(expected.report[key], rel=1e-4)
    assert torch.allclose(layer.merged_weight(), expected.merged_weight(), atol=1e-4)


def test_autocast_does_not_reach_the_correlations_of_a_sequential_start(monkeypatch):
    """In a model of one layer both halves read the batch itself, so that H is known."""
    data, given = 10 + torch.randn(400, 24, generator=torch.Generator().manual_seed(0)), []
    start = quailora.initialize
    monkeypatch.setattr(quailora, "initialize", lambda W, H, *a, **k: given.append(H) or start(W, H, *a, **k))
    with torch.autocast("cpu", torch.bfloat16):
        apply_quailora(nn.Sequential(nn.Linear(24, 16)), [data], rank=4, sequential=True)
    assert torch.allclose(given[0], data.T @ data, rtol=1e-5)


def test_float32_products_report_no_error_below_the_floor_and_that_of_the_factors():
    generator = torch.Generator().manual_seed(5)
    W, X = torch.randn(64, 96, generator=generator), 30 + torch.randn(96, 400, generator=generator)
    base, A, B, errors = quailora.initialize(W, H := X @ X.T, 48, steps=100, floor=True)
    assert errors["floor"] * (1 - 1e-8) <= errors["initialized"] < 1.0001 * errors["floor"]
    E = (W - base.dequantize()).double()
    slack = 1e-6 * calibrated_error(E, *nothing(E), H)  # H itself is rounded
    assert errors["initialized"] == pytest.approx(calibrated_error(E, A, B, H), abs=slack)


def test_a_layer_whose_outputs_vanish_on_its_inputs_has_finite_errors():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x, linear = torch.randn(64, 3, generator=generator), nn.Linear(64, 8, bias=False)
        Q = torch.linalg.qr(x).Q
        linear.weight.data -= linear.weight.data @ Q @ Q.T
        assert all(
            value is None or math.isfinite(value) for value in LoRALinear.from_linear(linear, x @ x.T, 4).report.values()
        )


@pytest.mark.parametrize("e", [1e-30, 1e30])
@pytest.mark.parametrize("h", [1e-30, 1e30])
def test_the_products_of_large_and_of_small_matrices_stay_in_range(e, h):
    generator = torch.Generator().manual_seed(0)
    E, X = torch.randn(20, 30, generator=generator), torch.randn(30, 90, generator=generator)
    H = X @ X.T
    expected = als_init(E, H, 4)
    A, B = als_init(e * E, h * H, 4)
    assert torch.allclose(A @ B.T / e, expected[0] @ expected[1].T, atol=1e-4)
    assert calibrated_error(e * E, A, B, h * H) == pytest.approx(e**2 * h * calibrated_error(E, *expected, H), rel=1e-4)


@st.composite
def adversarial_problems(draw):
    """E (out, in) and X (in, s) in float32: entries from 1e-30 to 1e30 (those of X X^T too), any rank, duplicated and zero
    columns of E and features of X, one huge outlier."""
    out, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731

    def matrix(rows, columns, largest):
        rank = draw(st.integers(0, min(rows, columns)))
        M = normal(rows, rank) @ normal(rank, columns) if rank < min(rows, columns) else normal(rows, columns)
        spread = draw(st.sampled_from([0, 1, largest]))
        exponents = draw(st.floats(-largest, largest)) + spread * (2 * torch.rand(columns, generator=generator) - 1)
        M = M * 10 ** exponents.clamp(-largest, largest).double()
        column = lambda: draw(st.integers(0, columns - 1))  # noqa: E731
        change = draw(st.sampled_from(["", "duplicate", "opposite", "zero", "outlier"]))
        if change in ("duplicate", "opposite"):
            M[:, column()] = M[:, column()] * (1 if change == "duplicate" else -1)
        elif change:
            M[:, column()] *= 0 if change == "zero" else 10 ** draw(st.floats(1, largest))
        return M.clamp(-(10.0**largest), 10.0**largest).float()

    return matrix(out, n, 30), matrix(2 * n, n, 14).T, draw(st.integers(1, min(out, n)))


@given(adversarial_problems())
@settings(max_examples=2000)
def test_factors_are_finite_and_never_worse_than_plain_quantization_in_float32(problem):
    """Never worse: up to the rounding of H to float32, which is relative to the sum of || E_j || || x_j || over features j."""
    E, X, rank = problem
    H = (X.double() @ X.double().T).float()
    error = lambda A, B: ((E.double() - A.double() @ B.double().T) @ X.double()).norm().item()  # noqa: E731
    rounding = 1e-6 * (E.double().norm(dim=0) @ X.double().norm(dim=1)).item() ** 2
    for A, B in (als_init(E, H, rank), exact_init(E, H, rank)):
        assert A.dtype == B.dtype == torch.float32 and A.isfinite().all() and B.isfinite().all()
        assert error(A, B) ** 2 <= error(*nothing(E)) ** 2 + rounding
        for factor in quailora.split_product(A, B, scaling=0.25):
            assert factor.isfinite().all()
    A, B = svd_init(E, rank)
    assert A.isfinite().all() and B.isfinite().all()
    assert (E.double() - A.double() @ B.double().T).norm() <= E.double().norm() * (1 + 1e-6)


@pytest.mark.parametrize(
    "E, H, rank, message",
    [
        (torch.ones(3, 4), torch.eye(3), 1, r"H must be \(4, 4\), got \(3, 3\)"),
        (torch.ones(3, 4), torch.eye(4), 4, r"rank 4 is not within 1 .. min\(out, in\) = 3"),
        (torch.ones(3, 4), torch.eye(4), 0, r"rank 0 is not within"),
        (torch.ones(3, 4), torch.eye(4) / 0, 1, "16 of 16 entries of H are NaN or inf"),
    ],
)
def test_solvers_refuse_what_has_no_solution(E, H, rank, message):
    for init in (als_init, exact_init):
        with pytest.raises(ValueError, match=message):
            init(E, H, rank)


# ---------------------------------------------------------------------------------------------------------------------
# QA-LoRA
# ---------------------------------------------------------------------------------------------------------------------


@st.composite
def grouped_problems(draw):
    """Those of `problems`, and a group size that divides `in`."""
    E, H, rank = draw(problems())
    n = E.shape[1]
    return E, H, rank, draw(st.sampled_from([g for g in range(1, n + 1) if n % g == 0]))


def pooling(n, group_size):
    return torch.eye(n // group_size, dtype=torch.float64).repeat_interleave(group_size, 1)  # P, (in/g, in)


def grouped_optimum(E, H, rank, group_size):
    """The least || (E - A B^T P) X ||^2 / 2 by reduced-rank regression of E X on P X, through X and its singular vectors."""
    lam, U = torch.linalg.eigh(H)
    X = U * lam.clamp(min=1e-13 * lam[-1].clamp(min=1e-300)).where(lam > 1e-13 * lam[-1], 0).sqrt()
    _, sigma, Vt = torch.linalg.svd(pooling(len(H), group_size) @ X, full_matrices=False)
    row_space = Vt[sigma > 1e-8 * sigma[0]] if sigma[0] > 0 else Vt[:0]
    best = torch.linalg.svdvals(E @ X @ row_space.T)[:rank].square().sum() if len(row_space) else 0.0
    return float((E @ X).square().sum() - best) / 2


@given(grouped_problems(), st.integers(0, 2**31))
def test_the_grouped_objective_is_1_for_the_regression_on_the_pooled_inputs_and_a_constant(problem, seed):
    E, H, rank, g = problem
    inner, P = quailora._Problem(lambda: E, H, rank, g), pooling(len(H), g)
    K = P @ H @ P.T
    F_ = E @ H @ P.T @ torch.linalg.pinv(K, rtol=1e-14, hermitian=True)  # cut off at c, it misses the cross term by sqrt(c)
    assert inner.total / 2 == pytest.approx(calibrated_error(E, *nothing(E), H), rel=1e-9)
    generator = torch.Generator().manual_seed(seed)
    differences = []
    for _ in range(2):
        A, B = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in (len(E), len(K)))
        differences.append(calibrated_error(E, A, P.T @ B, H) - calibrated_error(F_, A, B, K))
    size = sum(calibrated_error(M, *nothing(M), H) for M in (E, A @ B.T @ P))
    assert differences == pytest.approx([inner.total / 2 - calibrated_error(F_, *nothing(F_), K)] * 2, abs=1e-7 * size + 1e-300)


@given(grouped_problems())
def test_grouped_als_never_rises_ends_where_it_says_and_is_never_below_the_floor_which_the_closed_form_reaches(problem):
    E, H, rank, g = problem
    floor, tolerance = grouped_optimum(E, H, rank, g), 1e-8 * calibrated_error(E, *nothing(E), H) + 1e-300
    A, B, errors = als_init(E, H, rank, steps=10, return_errors=True, group_size=g)
    assert A.isfinite().all() and B.isfinite().all() and A.shape == (len(E), rank) and B.shape == (len(H), rank)
    assert torch.equal(B, B[::g].repeat_interleave(g, 0)), "the same in all inputs of a group"
    assert all(after <= before + tolerance for before, after in zip(errors, errors[1:], strict=False))
    assert errors[0] <= calibrated_error(E, *nothing(E), H) + tolerance
    assert calibrated_error(E, A, B, H) == pytest.approx(errors[-1], abs=tolerance) and errors[-1] >= floor - tolerance
    assert calibrated_error(E, *exact_init(E, H, rank, g), H) == pytest.approx(floor, abs=tolerance)


@pytest.mark.parametrize("seed", range(10))
def test_grouped_als_ends_where_it_says_also_for_inputs_that_nearly_cancel_in_their_group(seed):
    generator = torch.Generator().manual_seed(seed)
    E, x = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((1, 8), (8, 1)))
    x[1] = -1.01 * x[0]
    A, B, errors = als_init(E, x @ x.T, 1, return_errors=True, group_size=2)
    plain = calibrated_error(E, *nothing(E), x @ x.T)
    assert calibrated_error(E, A, B, x @ x.T) == pytest.approx(errors[-1], abs=1e-8 * plain)


@given(grouped_problems())
def test_grouped_als_reaches_the_floor_when_the_spectrum_has_a_gap(problem):
    E, H, rank, g = problem
    H = H + 1e-3 * H.diagonal().mean() * torch.eye(len(H)) + 1e-3 * torch.eye(len(H))
    P = pooling(len(H), g)
    C, K = E @ H @ P.T, P @ H @ P.T
    top = torch.linalg.eigh(C @ torch.linalg.solve(K, C.T)).eigenvectors[:, -rank:]
    E = E + 9 * top @ (top.T @ E)
    error = calibrated_error(E, *als_init(E, H, rank, steps=60, group_size=g), H)
    assert error <= grouped_optimum(E, H, rank, g) + 1e-8 * calibrated_error(E, *nothing(E), H) + 1e-300


@given(problems(), st.integers(1, 4), st.integers(0, 3))
def test_grouped_als_is_equations_5_and_6_with_the_pooled_correlation(problem, g, steps):
    """With explicit systems: A = E H P^T B (B^T K B)^-1, B^T = (A^T A)^-1 A^T E H P^T K^-1."""
    generator = torch.Generator().manual_seed(len(problem[0]))
    out, n = problem[0].shape[0] + 2, problem[0].shape[1] * g
    E, X = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((out, n), (n, 3 * n)))
    rank, H, P = min(problem[2], n // g), X @ X.T, pooling(n, g)
    C, K = E @ H @ P.T, P @ H @ P.T
    A, B = svd_init(torch.linalg.solve(K, C.T).T, rank)
    expected = [calibrated_error(E, A, P.T @ B, H)]
    for _ in range(steps):
        A = torch.linalg.solve(B.T @ K @ B, (C @ B).T).T
        expected.append(calibrated_error(E, A, P.T @ B, H))
        B = torch.linalg.solve(K, C.T @ torch.linalg.solve(A.T @ A, A.T).T)
        expected.append(calibrated_error(E, A, P.T @ B, H))
    *_, errors = als_init(E, H, rank, steps, return_errors=True, group_size=g)
    assert errors == pytest.approx(expected, rel=1e-6, abs=slack(E, H))


@given(adversarial_problems(), st.data())
@settings(max_examples=500)
def test_grouped_factors_are_finite_and_never_worse_than_plain_quantization_in_float32(problem, data):
    E, X, rank = problem
    g = data.draw(st.sampled_from([g for g in range(1, len(X) + 1) if len(X) % g == 0]))
    H = (X.double() @ X.double().T).float()
    error = lambda A, B: ((E.double() - A.double() @ B.double().T) @ X.double()).norm().item()  # noqa: E731
    rounding = 1e-6 * (E.double().norm(dim=0) @ X.double().norm(dim=1)).item() ** 2
    for A, B in (als_init(E, H, rank, group_size=g), exact_init(E, H, rank, g)):
        assert A.dtype == B.dtype == torch.float32 and A.isfinite().all() and B.isfinite().all()
        assert error(A, B) ** 2 <= error(*nothing(E)) ** 2 + rounding
        if (A.double() @ B.double().T).abs().amax() < 1e36:  # beyond, lora_B has no float32
            assert all(factor.isfinite().all() for factor in quailora.split_product(A, B[::g], scaling=0.25))


@pytest.mark.parametrize("outlier", [1e2, 1e4])
def test_an_outlier_channel_does_not_pass_the_other_groups_off_as_noise(outlier):
    generator = torch.Generator().manual_seed(0)
    E, X = torch.randn(96, 128, generator=generator), torch.randn(128, 500, generator=generator)
    X[3] *= outlier
    H = X @ X.T
    best, zero = grouped_optimum(E.double(), X.double() @ X.double().T, 16, 8), calibrated_error(E, *nothing(E), H)
    A, B = als_init(E, H, 16, group_size=8)
    assert best < 0.99 * zero and calibrated_error(E, A, B, X.double() @ X.double().T) < best + 1e-3 * best


@given(weights(), st.sampled_from([2, 3, 4, 8]), st.data())
def test_groups_are_rounded_to_equal_steps_from_their_least_to_their_greatest_weight(W, bits, data):
    n = W.shape[1]
    g = data.draw(st.sampled_from([g for g in range(1, n + 1) if n % g == 0]))
    base = quantize(W, bits, group_size=g)
    assert base.codes.numel() == math.ceil(W.numel() / math.lcm(bits, 8) * bits) * math.lcm(bits, 8) // 8
    groups, Q = W.double().view(-1, g), base.dequantize(torch.float64).view(-1, g)
    low, high = groups.aminmax(dim=1, keepdim=True)
    rounding = 1e-6 * groups.abs().amax(1, keepdim=True)
    assert ((Q - low >= -rounding) & (Q - high <= rounding)).all()
    grid = low[..., None] + (high - low)[..., None] * torch.arange(2**bits).double() / (2**bits - 1)
    assert ((Q - groups).abs() <= (grid - groups[..., None]).abs().amin(-1) + 2 * rounding).all(), "the nearest of them"
    assert base.dequantize().dtype == W.dtype


@st.composite
def grouped_layers(draw):
    """A linear layer, its H or None, a group size, bits, and options; float64."""
    g, groups, out = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    linear = nn.Linear(g * groups, out, bias=draw(st.booleans())).double()
    linear.weight.data = torch.randn(out, g * groups, generator=generator, dtype=torch.float64)
    linear.weight.data[draw(st.integers(0, out - 1)), :g] = draw(st.sampled_from([0.0, -3.0, 1e-9]))  # a group without a range
    X = torch.randn(g * groups, 3 * g * groups, generator=generator, dtype=torch.float64)
    options = dict(rank=draw(st.integers(1, min(out, g * groups))), group_size=g, rslora=draw(st.booleans()))
    options |= dict(bits=draw(st.sampled_from([2, 3, 4, 8])), alpha=draw(st.sampled_from([1.0, 16.0])))
    return linear, X @ X.T if draw(st.booleans()) else None, options


@given(grouped_layers(), st.integers(0, 2**31))
def test_a_merged_layer_is_the_same_function_with_the_same_codes(problem, seed):
    linear, H, options = problem
    layer = QALoRALinear.from_linear(linear, H, **options)
    generator = torch.Generator().manual_seed(seed)
    for factor in (layer.lora_A, layer.lora_B):  # as training leaves them
        factor.data += torch.randn(factor.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 2, linear.in_features, generator=generator, dtype=torch.float64)
    before, codes, scale, weight = layer(x), layer.base.codes.clone(), layer.base.absmax.clone(), layer.merged_weight()
    assert torch.allclose(before, F.linear(x, weight, linear.bias), rtol=0, atol=1e-10 * before.abs().max().item())
    layer.merge()
    assert torch.allclose(layer(x), before, rtol=0, atol=1e-10 * before.abs().max().item())
    assert torch.equal(layer.base.codes, codes) and torch.equal(layer.base.absmax, scale)
    assert layer.lora_A is None and not list(p for p in layer.parameters() if p.requires_grad)
    layer.merge()  # nothing is left to merge
    assert torch.allclose(layer.merged_weight(), weight, rtol=0, atol=1e-10 * weight.abs().max().item())


@given(grouped_layers())
def test_a_grouped_layer_starts_at_the_product_of_its_solver_and_without_data_at_zero(problem):
    linear, H, options = problem
    layer, g = QALoRALinear.from_linear(linear, H, **options), options["group_size"]
    Q = quantize(linear.weight.detach(), options["bits"], group_size=g).dequantize()
    W = linear.weight.detach()
    A, B = als_init(W - Q, H, options["rank"], group_size=g) if H is not None else (torch.zeros(len(W), 1), torch.zeros(1, 1))
    expected = Q + (A @ B.T if H is not None else 0)
    assert layer.lora_A.shape == (options["rank"], linear.in_features // g)
    assert torch.allclose(layer.merged_weight(), expected, atol=1e-10)
    norm, reached = (calibrated_error(M, *nothing(M), H) for M in (W, W - expected))
    assert layer.report["initialized"] ** 2 * norm == pytest.approx(reached, rel=1e-6, abs=1e-12 * norm + 1e-300)


@pytest.mark.parametrize("init", quailora.INITS)
def test_every_method_of_the_family_takes_groups(init):
    linear, H = make_linear(n=64, out=40)
    layer = QALoRALinear.from_linear(linear, H, 4, 3, 8, init=init, floor=True)
    assert layer.report["initialized"] <= layer.report["quantized"] * (1 + 1e-9)
    if init in ("als", "exact", "quailora"):
        assert layer.report["floor"] * (1 - 1e-9) <= layer.report["initialized"]
    if init in ("cloq", "joint"):
        assert layer.report["initialized"] < QALoRALinear.from_linear(linear, H, 4, 3, 8).report["initialized"]


def test_joint_rounds_reach_less_than_one_where_the_rank_is_beyond_the_groups():
    linear, H = make_linear(n=128, out=96)
    errors = {
        init: QALoRALinear.from_linear(linear, H, 24, 3, 16, init=init).report["initialized"] for init in ("cloq", "joint")
    }
    assert errors["joint"] < errors["cloq"]


def test_groups_whose_inputs_share_a_mean_or_cancel_are_solved_to_the_floor_in_float32():
    generator = torch.Generator().manual_seed(0)
    E, X = torch.randn(96, 256, generator=generator), 1 + 0.3 * torch.randn(256, 2000, generator=generator)
    floor = grouped_optimum(E.double(), X.double() @ X.double().T, 32, 4)
    A, B = als_init(E, X @ X.T, 32, steps=60, group_size=4)
    assert calibrated_error(E, A, B, X.double() @ X.double().T) < 1.01 * floor
    X = torch.randn(64, 300, generator=generator)
    X.view(16, 4, 300)[:, 3] = -X.view(16, 4, 300)[:, :3].sum(1) + 1e-4 * torch.randn(16, 300, generator=generator)
    H, E = X.double() @ X.double().T, E[:, :64]
    A, B = als_init(E, X @ X.T, 8, group_size=4)
    assert calibrated_error(E, A, B, H) <= calibrated_error(E, *nothing(E), H) * (1 + 1e-6)


def test_gradients_of_a_grouped_layer_are_the_dense_ones():
    linear, H = make_linear(n=48, out=40)
    layer = QALoRALinear.from_linear(linear, H, 8, group_size=8)
    x = torch.randn(5, 48, dtype=torch.float64, requires_grad=True)
    lora_A, lora_B = (M.detach().clone().requires_grad_() for M in (layer.lora_A, layer.lora_B))
    dense = F.linear(x, layer.base.dequantize() + layer.scaling * lora_B @ lora_A @ pooling(48, 8), linear.bias)
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), [x, *M])
        for y, M in ((layer(x), (layer.lora_A, layer.lora_B)), (dense, (lora_A, lora_B)))
    )
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("group_size, bits, message", [
    (7, 4, "group_size 7 does not divide in = 32"), (0, 4, "group_size 0 does not divide"), (8, 16, "bits must be 2, 3, 4, 8"),
])  # fmt: skip
def test_a_group_size_that_does_not_fit_is_refused(group_size, bits, message):
    linear = nn.Linear(32, 16)
    with pytest.raises(ValueError, match=message):
        QALoRALinear.from_linear(linear, rank=4, bits=bits, group_size=group_size)
    model = nn.Sequential(linear)
    with pytest.raises(ValueError, match=message):
        apply_quailora(model, None, 4, bits=bits, init="qlora", group_size=group_size)
    assert model[0] is linear
    if bits == 4:
        with pytest.raises(ValueError, match=message):
            als_init(torch.ones(4, 32), torch.eye(32), 2, group_size=group_size)


# ---------------------------------------------------------------------------------------------------------------------
# 3  The layer
# ---------------------------------------------------------------------------------------------------------------------


def make_linear(n=48, out=40, dtype=torch.float64, conv1d=False, bias=True):
    """A linear layer and the H of inputs with a decaying spectrum."""
    torch.manual_seed(0)
    linear = transformers.pytorch_utils.Conv1D(out, n) if conv1d else nn.Linear(n, out, bias=bias)
    X = torch.randn(n, 200, dtype=torch.float64) * torch.linspace(0, -3, n).double().exp()[:, None]
    nn.init.normal_(linear.bias) if bias else None
    return linear.to(dtype), X @ X.T


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("n, singular", [(12, False), (12, True), (150, False)])
def test_calibrated_rounding_makes_every_error_good_in_the_best_way_in_the_inputs_to_come(n, singular, bits):
    """Against its definition: after each input, the weights of the rest minimize the error that is left, by a dense solve."""
    generator = torch.Generator().manual_seed(n)
    W, X = (torch.randn(5, n, generator=generator).double(), torch.randn(n, 2 * n, generator=generator, dtype=torch.float64))
    if singular:
        X[3], X[5] = 0, X[4]
    H, base = X @ X.T, quantize(W, bits)
    damped = H + 0.03 * H.diagonal().mean() * torch.eye(n)
    levels, scale, rest, Q = (
        base.levels().double(),
        base.of_each(base.scales()).double(),
        W.clone(),
        W.clone(),
    )
    for j in range(n):
        nearest = (rest[:, j, None] - levels * scale[:, j, None]).abs().argmin(1)
        Q[:, j] = levels[nearest] * scale[:, j]
        if j + 1 < n:
            done = (W - Q)[:, : j + 1]
            rest[:, j + 1 :] = W[:, j + 1 :] + torch.linalg.solve(damped[j + 1 :, j + 1 :], damped[j + 1 :, : j + 1] @ done.T).T
    calibrated = quailora.round_calibrated(W, base, quailora.residual_metric(H))
    assert torch.allclose(calibrated.dequantize(torch.float64), Q, atol=1e-5)
    if bits < 8:
        nearest, ours = (calibrated_error(W - b.dequantize(torch.float64), *nothing(W), H) for b in (base, calibrated))
        assert ours < 0.9 * nearest
        base = quantize(W, bits, double_quant=False)
        without_data = quailora.round_calibrated(W.float(), base, quailora.residual_metric(0 * H))
        assert torch.equal(without_data.codes, base.codes)


@pytest.mark.parametrize("layout", [{"bits": 2}, {"bits": 4}, {"bits": 8}, {"bits": 3, "group_size": 12}])
@pytest.mark.parametrize("singular", [False, True])
def test_descent_never_raises_the_error_and_ends_where_no_other_level_of_a_weight_is_better(layout, singular):
    generator = torch.Generator().manual_seed(0)
    W, X = (torch.randn(5, 48, generator=generator).double(), torch.randn(48, 96, generator=generator, dtype=torch.float64))
    if singular:
        X[3], X[5], X[20:] = 0, X[4], 0
    M = quailora.residual_metric(X @ X.T, torch.randn(48, 2, generator=generator, dtype=torch.float64))
    base = quantize(W, **layout)
    scale = base.of_each(base.scales()).double()
    zero = 0 if base.zero is None else base.of_each(base.zero).double()
    costs = lambda Q: ((W - Q) @ M * (W - Q)).sum(-1)  # of the rows  # noqa: E731
    last = costs(base.dequantize(torch.float64)).sum()
    for _ in range(30):
        base = quailora.round_calibrated(W, base, M, descent=True)
        Q = base.dequantize(torch.float64)
        assert costs(Q).sum() <= last * (1 + 1e-12)
        last = costs(Q).sum()
    for j in range(48):
        others = Q.repeat(len(base.levels()), 1, 1)  # (levels, out, in)
        others[:, :, j] = (base.levels()[:, None] - (zero if base.zero is None else zero[:, j])) * scale[:, j]
        assert (costs(others) >= costs(Q) - 1e-4 * costs(Q).mean()).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("init, out", [("joint", 40), ("joint", 60), ("loftq", 40)])
def test_the_error_never_rises_from_one_round_to_the_next(init, out, bits, monkeypatch):
    linear, H = make_linear(out=out)
    rounding, solver, _ = quailora.INITS[init]
    W, errors = linear.weight.detach(), []
    for rounds in range(1, 9):
        monkeypatch.setitem(quailora.INITS, init, (rounding, solver, rounds))
        base, A, B, found = quailora.initialize(W, H, 8, init, bits=bits)
        E = W - base.dequantize(torch.float64)
        errors.append(calibrated_error(E, A, B, H if init == "joint" else None))
        assert found["initialized"] == pytest.approx(calibrated_error(E, A, B, H), rel=1e-6)
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert init == "loftq" or errors[-1] < 0.95 * errors[0]


def test_the_family_is_ordered_as_its_parts_say():
    linear, H = make_linear(out=60)
    error = {init: LoRALinear.from_linear(linear, H, rank=8, init=init).report["initialized"] for init in quailora.INITS}
    floor = LoRALinear.from_linear(linear, H, rank=8, floor=True).report["floor"]
    assert error["qlora"] > error["svd"] > error["quailora"] > 1.02 * error["cloq"] > 1.02 * error["joint"]
    assert error["quailora"] == pytest.approx(error["exact"], rel=1e-3) == pytest.approx(floor, rel=1e-3)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("init", quailora.INITS)
@pytest.mark.parametrize("bits", [4, 8])
def test_forward_and_gradients_equal_those_of_the_dense_weight(bits, init, conv1d):
    linear, H = make_linear(conv1d=conv1d)
    layer = LoRALinear.from_linear(linear, H, rank=8, alpha=5, bits=bits, init=init)
    nn.init.normal_(layer.lora_B)
    W = linear.weight.T if conv1d else linear.weight
    if not layer.own_base:
        assert torch.equal(layer.base.dequantize(), quantize(W, bits).dequantize())
    lora_A, lora_B = layer.lora_A.detach().clone().requires_grad_(), layer.lora_B.detach().clone().requires_grad_()
    merged = layer.base.dequantize() + 5 / 8 * lora_B @ lora_A
    assert torch.allclose(layer.merged_weight(), merged)

    x = torch.randn(2, 7, 48, dtype=torch.float64)
    x_ours, x_dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, dense = layer(x_ours), F.linear(x_dense, merged, linear.bias)
    assert torch.allclose(y, dense)
    y.square().sum().backward(), dense.square().sum().backward()
    assert torch.allclose(x_ours.grad, x_dense.grad)
    assert torch.allclose(layer.lora_A.grad, lora_A.grad) and torch.allclose(layer.lora_B.grad, lora_B.grad)
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


@given(st.floats(1e-3, 1e3), st.booleans(), st.sampled_from(["quailora", "exact", "svd"]))
@settings(max_examples=25)
def test_any_alpha_starts_at_the_same_function(alpha, rslora, init):
    linear, H = make_linear()
    layer = LoRALinear.from_linear(linear, H, rank=8, alpha=alpha, rslora=rslora, init=init)
    assert layer.scaling == pytest.approx(alpha / (8**0.5 if rslora else 8))
    E = linear.weight.detach() - layer.base.dequantize()
    A, B = {"quailora": als_init, "exact": exact_init, "svd": lambda E, H, r: svd_init(E, r)}[init](E, H, 8)
    assert torch.allclose(layer.merged_weight() - layer.base.dequantize(), A @ B.T, atol=1e-9)


def test_the_product_is_split_into_an_orthonormal_in_side_at_the_norm_of_a_normal_draw():
    A, B = torch.randn(30, 6).double(), torch.randn(50, 6).double()
    lora_A, lora_B = quailora.split_product(A, B, scaling=0.25)
    assert torch.allclose(0.25 * lora_B @ lora_A, A @ B.T)
    assert torch.allclose(lora_A @ lora_A.T, 50 / 6 * torch.eye(6).double())


def test_loftq_is_five_rounds_of_quantizing_and_svd_scaled_to_the_layer():
    linear, H = make_linear(dtype=torch.float32)
    layer = LoRALinear.from_linear(linear, H, rank=8, alpha=3, init="loftq", floor=True)
    W, product, rounds = linear.weight.detach(), 0, []
    for _ in range(5):
        Q = quantize(W - product).dequantize()
        U, sigma, Vt = torch.linalg.svd(W - Q)
        product = (U[:, :8] * sigma[:8]) @ Vt[:8]
        rounds.append(((W - Q - product).norm(), Q, product))
    _, Q, product = min(rounds, key=lambda found: found[0])
    assert rounds[0][1] is not Q
    assert torch.equal(layer.base.dequantize(), Q)
    assert torch.allclose(layer.merged_weight(), Q + product, atol=1e-6)
    svd = LoRALinear.from_linear(linear, H, rank=8, init="svd")
    assert (W - layer.merged_weight()).norm() < (W - svd.merged_weight()).norm()
    relative = lambda D: math.sqrt(calibrated_error(D, *nothing(D), H) / calibrated_error(W, *nothing(W), H))  # noqa: E731
    assert layer.report["initialized"] == pytest.approx(relative(W - layer.merged_weight()), rel=1e-4)
    assert layer.report["quantized"] == pytest.approx(relative(W - quantize(W).dequantize()), rel=1e-4)
    assert layer.report["quantized"] == svd.report["quantized"] and layer.report["floor"] < svd.report["initialized"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sixteen_bits_is_plain_lora(dtype):
    linear, H = make_linear(dtype=dtype)
    for init in quailora.INITS:
        layer = LoRALinear.from_linear(linear, H, rank=8, bits=16, init=init)
        x = torch.randn(3, 48, dtype=dtype)
        assert (
            torch.equal(layer(x), linear(x))
            or dtype == torch.bfloat16
            and torch.allclose(layer(x), linear(x), rtol=0.02, atol=0.02)
        )
        assert layer.lora_A.isfinite().all() and not layer.lora_B.any() and layer.report["initialized"] == 0
        assert layer.base.codes.dtype == dtype, "no larger than W"


def test_qlora_starts_at_zero_with_a_random_lora_A_of_the_form_and_size_of_the_others():
    linear, H = make_linear(n=64, out=32, dtype=torch.float32)
    torch.manual_seed(3)
    qlora, again = (LoRALinear.from_linear(linear, rank=16, init="qlora") for _ in range(2))
    ours = LoRALinear.from_linear(linear, H, rank=16)
    assert not qlora.lora_B.any() and not torch.equal(qlora.lora_A, again.lora_A)
    for layer in (qlora, ours):
        assert torch.allclose(layer.lora_A @ layer.lora_A.T, torch.eye(16) * 64 / 16, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_dequantized_weight_is_never_kept_for_backward(bits, monkeypatch):
    linear, _ = make_linear(n=256, out=128, dtype=torch.float32)
    layer = LoRALinear.from_linear(linear, rank=4, bits=bits)
    with_bitsandbytes, x = layer(torch.ones(3, 256)), torch.ones(3, 256)
    monkeypatch.setattr(quailora, "bitsandbytes", None)
    assert torch.allclose(layer(x), with_bitsandbytes, atol=1e-5)
    dequantized, dequantize = [], layer.base.dequantize
    monkeypatch.setattr(layer.base, "dequantize", lambda *a: dequantized.append(weakref.ref(Q := dequantize(*a))) or Q)
    y = layer(torch.randn(3, 256, requires_grad=True))
    gc.collect()
    assert dequantized and dequantized[0]() is None, "freed after forward"
    y.sum().backward()
    assert len(dequantized) == 2, "made again in backward"
    monkeypatch.undo()

    def saved(call):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            call(torch.randn(3, 256, requires_grad=True)).sum().backward()
        return max(sizes)

    assert saved(lambda x: F.linear(x, layer.base.dequantize())) == 128 * 256, "what the layer must not do"
    assert saved(layer) <= 128 * 256 // 2, "with bitsandbytes the codes, without not even these"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_layer_computes_in_its_dtype_with_float32_factors(dtype):
    linear, H = make_linear(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):  # must not reach the initialization
        layer = LoRALinear.from_linear(linear, H, rank=8)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 48, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert torch.allclose(y.float(), F.linear(x.float(), layer.merged_weight(), linear.bias.float()), rtol=0.02, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16
        merged = layer.merged_weight()
    assert torch.equal(merged, layer.merged_weight()), "nor the merged weight"


def test_a_cast_does_not_round_the_scales_and_a_state_dict_restores_the_layer():
    linear, H = make_linear(dtype=torch.float32)
    layer, other = LoRALinear.from_linear(linear, H, rank=8), LoRALinear.from_linear(nn.Linear(48, 40), rank=8)
    Q = layer.base.dequantize()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 48)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(layer.half().base.dequantize(), Q)


def test_repr_says_what_the_layer_is():
    layer = LoRALinear.from_linear(make_linear()[0], rank=8, alpha=4)
    assert "in_features=48, out_features=40, bias=True, rank=8, scaling=0.5" in repr(layer)
    assert "bits=4" in repr(layer)


# ---------------------------------------------------------------------------------------------------------------------
# 4  Whole models
# ---------------------------------------------------------------------------------------------------------------------

T = transformers
TEXT_MODELS = {
    "opt": lambda d: T.OPTForCausalLM(
        T.OPTConfig(vocab_size=384, hidden_size=d, word_embed_proj_dim=d, ffn_dim=2 * d, num_hidden_layers=2,
                    num_attention_heads=4, max_position_embeddings=64, pad_token_id=0)),
    "llama": lambda d: T.LlamaForCausalLM(
        T.LlamaConfig(vocab_size=384, hidden_size=d, intermediate_size=2 * d, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2)),
    "bloom": lambda d: T.BloomForCausalLM(T.BloomConfig(vocab_size=384, hidden_size=d, n_layer=2, n_head=4)),
    "neox": lambda d: T.GPTNeoXForCausalLM(
        T.GPTNeoXConfig(vocab_size=384, hidden_size=d, intermediate_size=2 * d, num_hidden_layers=2, num_attention_heads=4)),
    "gpt2": lambda d: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=384, n_embd=d, n_layer=2, n_head=4, n_positions=64)),
}  # fmt: skip
LAYERS_PER_BLOCK = {"opt": 6, "llama": 7, "bloom": 4, "neox": 4, "gpt2": 4}
SHARED_PER_BLOCK = {"opt": [3], "llama": [3, 2], "bloom": [], "neox": [], "gpt2": []}  # sizes of the groups that share one H


def tiny(family, width=32):
    torch.manual_seed(0)
    return TEXT_MODELS[family](width).eval()


def token_batches(n=4, padded=True):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 384, (n, 3, 20), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[:, 0, 13:] = 0
        mask[:, 2, :4] = 0
    return [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("family", TEXT_MODELS)
def test_h_is_the_sum_over_unpadded_positions_and_shared_where_the_tensor_is(family):
    model, batches = tiny(family), token_batches()
    model.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the head was run"))
    H = input_correlations(model, batches)
    expected, hooks = {}, []
    for name, layer in quailora.linear_layers(model).items():

        def record(_, args, name=name):
            x = args[0].reshape(-1, args[0].shape[-1])[mask.bool().reshape(-1)].double()
            expected[name] = expected.get(name, 0) + x.T @ x

        hooks.append(layer.register_forward_pre_hook(record))
    for batch in batches:
        mask = batch["attention_mask"]
        model.base_model(input_ids=batch["input_ids"], attention_mask=mask)
    assert H.keys() == expected.keys() and len(H) == 2 * LAYERS_PER_BLOCK[family]
    for name in H:
        assert torch.allclose(H[name].double(), expected[name], rtol=1e-4, atol=1e-4 * expected[name].abs().max().item())
    groups = {}
    for matrix in H.values():
        groups[id(matrix)] = groups.get(id(matrix), 0) + 1
    assert sorted(size for size in groups.values() if size > 1) == sorted(2 * SHARED_PER_BLOCK[family])


@pytest.mark.parametrize("family", TEXT_MODELS)
def test_apply_replaces_all_but_the_head_and_brings_the_outputs_closer(family):
    batches = token_batches()
    with torch.no_grad():
        full = [tiny(family)(**batch).logits for batch in batches]
    distance = {}
    for init in ("qlora", "svd", "quailora", "exact"):
        model = tiny(family)
        head, linear_names = model.get_output_embeddings(), list(quailora.linear_layers(model))
        linears = weakref.WeakSet(quailora.linear_layers(model).values())
        rows = apply_quailora(model, batches, rank=8, alpha=3, init=init)
        gc.collect()
        assert not linears, "full-precision layers are freed"
        assert model.get_output_embeddings() is head
        assert [row["name"] for row in rows] == linear_names and len(rows) == 2 * LAYERS_PER_BLOCK[family]
        assert all(isinstance(model.get_submodule(name), LoRALinear) for name in linear_names)
        assert {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
        for row in rows:
            assert row["shape"] == list(model.get_submodule(row["name"]).merged_weight().shape)
            assert row["quantized"] > row["floor"] > 0
            if init == "quailora":
                assert row["quantized"] > row["als"] >= row["floor"] * (1 - 1e-6) and row["svd"] > row["als"]
        with torch.no_grad():
            logits = [model(**batch).logits for batch in batches]
        distance[init] = sum((a - b).square().sum().item() for a, b in zip(logits, full, strict=True))
        model(**batches[0]).loss.backward()
    assert max(distance["quailora"], distance["exact"]) < distance["svd"] < distance["qlora"]


def test_each_layer_is_replaced_before_the_next_one_is_started():
    model, replaced = tiny("opt"), []

    def progress(names):
        for name in names:
            replaced.append(len(quailora._lora_layers(model)))
            yield name

    rows = apply_quailora(model, None, rank=8, H=input_correlations(model, token_batches()), progress=progress)
    assert replaced == list(range(len(rows)))


def test_a_report_has_the_seconds_of_the_start_beside_its_relative_errors(monkeypatch):
    monkeypatch.setattr(quailora.time, "perf_counter", itertools.count(1.0, 2.0).__next__)
    assert LoRALinear.from_linear(nn.Linear(16, 16), rank=4, init="svd").report["seconds"] == 2


def test_sequential_repairs_in_a_layer_what_the_layers_before_it_left():
    """Against the optimum of || W X - (Q + A B^T) X^ || for the Q at hand, by a dense projection (reduced-rank regression)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 16)).double()
    batches, W = [torch.randn(100, 24).double() for _ in range(3)], model[2].weight.detach().clone()
    data = torch.cat(batches)
    with torch.no_grad():
        X, full = model[:2](data).T, model(data)  # (32, 300)
        distance = {}
        for sequential in (False, True):
            ours = copy.deepcopy(model)
            rows = apply_quailora(ours, batches, rank=4, init="exact", bits=2, sequential=sequential)
            distance[sequential] = (ours(data) - full).norm()
        assert distance[True] < 0.95 * distance[False] and [row["name"] for row in rows] == ["0", "2", "4"]
        Xq, layer = ours[:2](data).T, ours[2]
        Y = W @ X - layer.base.dequantize(torch.float64) @ Xq
        Yp = torch.linalg.lstsq(Xq.T, Y.T, driver="gelsd").solution.T @ Xq  # what any A B^T can reach
        least = Y.square().sum() - torch.linalg.svdvals(Yp)[:4].square().sum()
        reached = (W @ X - layer.merged_weight() @ Xq).square().sum()
        assert least <= reached < 1.02 * least
    with pytest.raises(ValueError, match="sequential=True needs batches, no H, and a method that uses them, not 'svd'"):
        apply_quailora(copy.deepcopy(model), batches, rank=4, init="svd", sequential=True)
    with pytest.raises(ValueError, match="sequences of one length"):
        apply_quailora(tiny("opt"), [{"input_ids": torch.ones(1, n).long()} for n in (5, 6)], rank=4, sequential=True)
    half = tiny("llama").to(torch.bfloat16)
    apply_quailora(half, token_batches(padded=False), rank=4, sequential=True)
    assert half(**token_batches()[0]).logits.dtype == quailora.merge(half)(**token_batches()[0]).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("family", TEXT_MODELS)
def test_sequential_takes_any_family_and_comes_nearer_to_its_outputs(family):
    batches = [{**batch, "use_cache": False} for batch in token_batches(padded=False)]
    with torch.no_grad():
        full, distance = [tiny(family)(**batch).logits for batch in batches], {}
        for sequential in (False, True):
            model = tiny(family)
            # not "joint", nor 2 bits: there the last digits of W turn codes, which is percents of the distance
            rows = apply_quailora(model.train(), batches, rank=4, bits=3, sequential=sequential)
            assert len(rows) == 2 * LAYERS_PER_BLOCK[family] and all(row["calibrated"] for row in rows)
            assert all(module.training for module in model.modules())
            logits = [model.eval()(**batch).logits for batch in batches]
            distance[sequential] = sum((a - b).square().sum().item() for a, b in zip(logits, full, strict=True))
    assert distance[True] < distance[False]


@pytest.mark.parametrize("family", TEXT_MODELS)
def test_padding_does_not_count_in_what_sequential_starts_from(family):
    def found(batches):
        model, given = tiny(family), {}
        layers = quailora.linear_layers(model)

        def start(name, H, W):
            given[name], layer = (H, W), layers[name]
            return lambda x: type(layer).forward(layer, 0.9 * x)  # something else than full precision, without codes to turn

        quailora._one_after_the_other(model, batches, layers, start)
        return given

    batches = token_batches(padded=False)
    plain, padded = found(batches), found([{key: F.pad(x, (0, 7)) for key, x in batch.items()} for batch in batches])
    assert len(plain) == 2 * LAYERS_PER_BLOCK[family]
    for name, expected in plain.items():
        for M, other in zip(expected, padded[name], strict=True):
            assert torch.allclose(other, M, atol=1e-4 * float(M.abs().max())), name


@pytest.mark.parametrize("init", ["quailora", "svd", "exact"])
def test_a_row_holds_the_errors_of_the_layer_on_the_calibration_data(init):
    batches, name = token_batches(padded=False), "model.decoder.layers.1.fc2"
    model, inputs = tiny("opt"), []
    layer = model.get_submodule(name)
    W = layer.weight.detach().double().clone()
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().reshape(-1, 64).double()))
    for batch in batches:
        model(**batch)
    handle.remove()
    X = torch.cat(inputs).T
    row = next(row for row in apply_quailora(model, batches, rank=8, init=init) if row["name"] == name)
    lora = model.get_submodule(name)
    E = W - lora.base.dequantize()
    relative = lambda error: math.sqrt(2 * error) / (W @ X).norm().item()  # noqa: E731
    assert row["calibrated"] and row["quantized"] == pytest.approx(((E @ X).norm() / (W @ X).norm()).item(), rel=1e-4)
    assert row["floor"] == pytest.approx(relative(optimum(E, X @ X.T, 8)), rel=1e-4)
    if init == "quailora":
        assert row["svd"] == pytest.approx(relative(calibrated_error(E, *svd_init(E, 8), X @ X.T)), rel=1e-4)
    assert row["initialized"] == pytest.approx((((W - lora.merged_weight()) @ X).norm() / (W @ X).norm()).item(), rel=1e-4)


def test_options_reach_every_layer():
    model, batches = tiny("opt"), token_batches()
    H = input_correlations(model, batches)
    layer = model.model.decoder.layers[0].fc1
    W, name = layer.weight.detach().clone(), "model.decoder.layers.0.fc1"
    rows = apply_quailora(model, None, 8, 3, 8, 1, rslora=True, H=H, floor=False)
    lora, row = model.get_submodule(name), next(row for row in rows if row["name"] == name)
    assert lora.base.bits == 8 and lora.scaling == 3 / 8**0.5 and row["floor"] is None
    A, B = als_init(W - lora.base.dequantize(), H[name], 8, steps=1)
    assert torch.allclose(lora.merged_weight() - lora.base.dequantize(), A @ B.T, atol=1e-6)
    model = tiny("opt")
    apply_quailora(model, None, 8, init="svd", block_size=128, double_quant=False)
    assert model.get_submodule(name).base.block_size == 128 and model.get_submodule(name).base.nested_absmax is None


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_passes_within_a_memory_bound_end_at_the_same_model_bit_for_bit(family):
    batches, whole, bounded = token_batches(), tiny(family), tiny(family)
    largest = max(matrix.nbytes for matrix in input_correlations(whole, batches).values())
    expected = apply_quailora(whole, batches, rank=8)
    passes = list(quailora.correlation_passes(bounded, batches, memory=2 * largest))
    assert len(passes) > 1 and sum(map(len, passes)) == len(expected)
    for H in passes:
        assert sum({id(matrix): matrix.nbytes for matrix in H.values()}.values()) <= 2 * largest
    rows = apply_quailora(bounded, batches, rank=8, memory=2 * largest)
    assert all({**row, "seconds": 0} == {**other, "seconds": 0} for row, other in zip(rows, expected, strict=True))
    state = bounded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (bounded, whole)]
    assert trained[0] == trained[1]


def test_a_memory_bound_that_cannot_be_kept_is_refused_with_the_model_as_it_was():
    model, batches = tiny("opt"), token_batches()
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"the H of model.decoder.layers.0.fc2 takes 16384 bytes, more than the 4096 allowed"):
        apply_quailora(model, batches, rank=8, memory=4096)
    with pytest.raises(ValueError, match="20480 bytes hold the H of 9 of 12 layers: batches must be a list"):
        apply_quailora(model, iter(batches), rank=8, memory=20480)
    assert list(model.modules()) == before and all(p.requires_grad for p in model.parameters())


def test_a_vision_transformer_and_a_plain_module_work_too():
    torch.manual_seed(0)
    vit = T.ViTForImageClassification(
        T.ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16,
                    patch_size=4)
    )  # fmt: skip
    rows = apply_quailora(vit, [{"pixel_values": torch.randn(4, 3, 16, 16)}], rank=8)
    assert len(rows) == 12 and type(vit.classifier) is nn.Linear
    vit(torch.randn(2, 3, 16, 16)).logits.sum().backward()

    shared = nn.Linear(16, 16)
    plain = nn.Sequential(shared, nn.ReLU(), nn.ModuleDict({"again": shared})["again"], nn.Linear(16, 9), nn.Linear(9, 3))
    assert [row["name"] for row in apply_quailora(plain, [torch.randn(50, 16)], rank=3, skip=["4"])] == ["0", "3"]
    assert plain[0] is plain[2] and isinstance(plain[2], LoRALinear) and type(plain[4]) is nn.Linear


def test_calibration_in_inference_mode_gives_the_same():
    model, batches = tiny("opt"), token_batches()
    expected = input_correlations(model, batches)
    with torch.inference_mode():
        H = input_correlations(model, batches)
    assert all(torch.equal(H[name], expected[name]) for name in expected) and len({id(M) for M in H.values()}) == 8


def test_calibration_ignores_dropout_autocast_and_the_masks_of_other_batches():
    model, batches = tiny("opt"), token_batches()
    name = "model.decoder.layers.1.fc2"
    assert quailora.linear_layers(model).keys() - quailora.linear_layers(model, name).keys() == {name}
    expected = input_correlations(model, batches)[name]
    model.config.dropout = 0.5
    for layer in model.model.decoder.layers:
        layer.dropout = 0.5
    assert torch.equal(input_correlations(model.train(), batches)[name], expected)
    assert input_correlations(tiny("opt").half(), batches)[name].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert input_correlations(model, batches)[name].dtype == torch.float32

    class Plain(nn.Sequential):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids)

    plain, x = Plain(nn.Linear(4, 4)), torch.randn(1, 6, 4)
    masked = {"input_ids": x, "attention_mask": torch.tensor([[1, 1, 0, 0, 0, 0]])}
    dense, part = x[0].T @ x[0], x[0, :2].T @ x[0, :2]
    for order in ([masked, x], [x, masked]):
        assert torch.allclose(input_correlations(plain, order)["0"], dense + part)


def test_a_model_without_layers_to_replace_has_no_correlations():
    assert input_correlations(nn.Sequential(nn.ReLU()), [torch.randn(3, 4)]) == {}


def test_a_tensor_that_was_written_to_between_two_layers_is_not_the_same_input():
    class Inplace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            return y + self.b(x.relu_())

    x = torch.randn(9, 4)
    H = input_correlations(Inplace(), [x.clone()])
    assert torch.allclose(H["a"], x.T @ x) and torch.allclose(H["b"], x.relu().T @ x.relu())


def test_tied_weights_are_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.middle, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, ids):
            return self.out(self.middle(self.embedding(ids)))

    model = Tied()
    assert [row["name"] for row in apply_quailora(model, [torch.arange(20)], rank=2)] == ["middle"]
    assert model.out.weight is model.embedding.weight


def test_hooks_are_removed_and_the_mode_restored_even_on_an_exception():
    model = tiny("opt").train()
    model.model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError):
        input_correlations(model, (1 / 0 for _ in range(1)))
    with pytest.raises(ValueError, match="read nothing in calibration"):
        input_correlations(model, [])
    assert modes == [module.training for module in model.modules()] and not any(
        module._forward_pre_hooks for module in model.modules()
    )


def test_layers_that_share_their_input_only_at_times_are_refused_rather_than_given_a_wrong_h():
    class Sometimes(nn.Module):
        def __init__(self, twice):
            super().__init__()
            self.first, self.second, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), twice

        def forward(self, x):
            y = self.first(x) + self.second(x)
            return self.first(y) if self.twice else self.second(y)

    for twice in (False, True):
        with pytest.raises(RuntimeError, match="reads the same tensor as first"):
            input_correlations(Sometimes(twice), [torch.randn(3, 4)])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 33}, r"rank 33 is not within 1 .. min\(out, in\) = 32 of model.decoder.layers.0.self_attn.k_proj"),
        ({"rank": 0}, "rank 0"),
        ({"alpha": 0}, "alpha must be positive, got 0"),
        ({"bits": 5}, "bits must be 2, 3, 4, 8 or 16, got 5"),
        ({"steps": -1}, "steps must not be negative, got -1"),
        ({"skip": "model.lm"}, "nothing to skip by the name 'model.lm'"),
        ({"H": {}}, "H has nothing for model.decoder.layers.0.self_attn.k_proj"),
        ({"block_size": 3}, "block_size must be even"),
        ({"init": "pissa"}, "init must be one of qlora, svd, loftq, quailora, exact, cloq, joint, got 'pissa'"),
    ],
)
def test_bad_options_are_refused_before_any_work_with_the_model_as_it_was(options, message):
    model = tiny("opt")
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        apply_quailora(model, (pytest.fail("calibrated") for _ in range(1)), **{"rank": 8, **options})
    assert list(model.modules()) == before and all(p.requires_grad for p in model.parameters())


def test_weights_and_activations_that_are_not_finite_are_refused_by_name():
    model = tiny("opt")
    model.get_submodule("model.decoder.layers.1.fc1").weight.data[3, :2] = math.nan
    with pytest.raises(ValueError, match="2 of 2048 weights of model.decoder.layers.1.fc1 are NaN or inf"):
        apply_quailora(model, token_batches(), rank=8)
    with pytest.raises(ValueError, match="model.decoder.layers.1.fc2 read NaN or inf in calibration"):
        input_correlations(model, token_batches())
    model = tiny("opt")
    H = input_correlations(model, token_batches())
    H["model.decoder.layers.1.fc2"][0, 1] = math.inf
    with pytest.raises(ValueError, match="1 of 4096 entries of H of model.decoder.layers.1.fc2 are NaN or inf"):
        apply_quailora(model, None, rank=8, H=H)
    assert not quailora._lora_layers(model)
    with pytest.raises(ValueError, match="init 'quailora' needs calibration data"):
        apply_quailora(tiny("opt"), None, rank=8)
    with pytest.raises(ValueError, match="ReLU has no linear layers"):
        apply_quailora(nn.ReLU(), None)


# ---------------------------------------------------------------------------------------------------------------------
# 5  The adapter on disk
# ---------------------------------------------------------------------------------------------------------------------


NF4 = T.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def nf4_base(folder, **config):
    """The base of a QLoRA user: loaded by transformers, rounded by bitsandbytes."""
    model = T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config)
    for module in model.modules():  # else it computes in bfloat16 on a CPU that can, where nothing is trained
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", TEXT_MODELS)
def test_peft_loads_the_adapter_onto_the_bitsandbytes_base_with_the_same_logits(family, rslora, tmp_path):
    model, batches = tiny(family, width=64), token_batches()  # in blocks of 64, or bitsandbytes may mistake the scales
    model.save_pretrained(tmp_path / "full")
    apply_quailora(model, batches, rank=8, alpha=3, rslora=rslora)
    quailora.save_adapter(model, tmp_path / "adapter")
    base = nf4_base(tmp_path / "full", quantization_config=NF4)
    with torch.no_grad():
        expected = model(**batches[0]).logits
        assert not torch.allclose(base(**batches[0]).logits, expected, atol=1e-4), "without its adapter"
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.allclose(theirs(**batches[0]).logits, expected, atol=1e-5)


@pytest.mark.parametrize("bits, init", [(4, "quailora"), (8, "joint"), (16, "qlora"), (4, "loftq"), (3, "cloq")])
@pytest.mark.parametrize("family", TEXT_MODELS)
def test_a_saved_adapter_is_loaded_bit_for_bit_and_merged_into_a_model_that_transformers_loads(family, bits, init, tmp_path):
    model, batches = tiny(family), token_batches()
    apply_quailora(model, batches, rank=8, alpha=3, rslora=True, bits=bits, init=init)
    quailora.save_adapter(model, tmp_path / "adapter")
    fresh, prepared, base = tiny(family), tiny(family), None
    apply_quailora(prepared, None, rank=8, init="qlora", bits=bits)
    if quailora.INITS[init][::2] != ("nearest", 1):
        with pytest.raises(ValueError, match=f"a base of its own .{init}.: give the folder of save_base too"):
            quailora.load_adapter(tiny(family), tmp_path / "adapter")
        base = tmp_path / "base"
        quailora.save_base(model, base)
    with torch.no_grad():
        expected = model(**batches[0]).logits
        for other in (fresh, prepared):
            quailora.load_adapter(other, tmp_path / "adapter", base)
            assert torch.equal(other(**batches[0]).logits, expected)
        quailora.merge(model).save_pretrained(tmp_path / "merged")
        merged = T.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        types = [[type(m) for m in which.modules()] for which in (model, merged, tiny(family))]
        assert types[0] == types[1] == types[2]
        assert torch.allclose(merged(**batches[0]).logits, expected, atol=1e-5)


@pytest.mark.parametrize("init, sequential", [("loftq", False), ("joint", False), ("quailora", True)])
@pytest.mark.parametrize("family", TEXT_MODELS)
def test_transformers_and_peft_load_a_base_that_is_not_the_nearest_one(family, init, sequential, tmp_path):
    model, batches = tiny(family, width=64), token_batches(padded=False)
    apply_quailora(model, batches, rank=8, alpha=3, init=init, sequential=sequential)
    quailora.save_adapter(model, tmp_path / "adapter")
    quailora.save_base(model, tmp_path / "base")
    loaded = nf4_base(tmp_path / "base")
    with torch.no_grad():
        expected = model(**batches[0]).logits
        for name, layer in quailora._lora_layers(model).items():
            assert torch.equal(loaded.get_submodule(name).weight, layer.base.codes)
        theirs = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter")
        assert torch.allclose(theirs(**batches[0]).logits, expected, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("family", ["opt", "gpt2", "bloom"])
def test_a_qa_lora_model_is_saved_loaded_and_merged_without_loss(family, bits, tmp_path):
    batches, model = token_batches(), tiny(family)
    rows = apply_quailora(model, batches, rank=12, bits=bits, group_size=8)
    assert all(type(layer) is QALoRALinear for layer in quailora._lora_layers(model).values())
    assert all(row["floor"] * (1 - 1e-6) <= row["initialized"] <= row["quantized"] for row in rows)
    quailora.save_adapter(model, tmp_path / "adapter")
    loaded = tiny(family)
    quailora.load_adapter(loaded, tmp_path / "adapter")
    expected = model(**batches[0]).logits
    assert torch.equal(loaded(**batches[0]).logits, expected)
    with pytest.raises(ValueError, match="another base: groups True, and here False"):
        other = tiny(family)
        apply_quailora(other, None, rank=12, bits=bits, init="qlora", **({} if bits == 8 else {"block_size": 8}))
        quailora.load_adapter(other, tmp_path / "adapter")
    codes = {name: layer.base.codes.clone() for name, layer in quailora._lora_layers(model).items()}
    assert quailora.merge(model) is model
    merged = model(**batches[0]).logits
    assert torch.allclose(merged, expected, atol=1e-5 * expected.abs().max().item())
    quailora.save_base(model, tmp_path / "merged")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    for blank in (tiny(family), transformers.AutoModelForCausalLM.from_config(config)):
        quailora.load_base(blank.eval(), tmp_path / "merged")
        assert torch.equal(blank(**batches[0]).logits, merged)
        for name, layer in quailora._lora_layers(blank).items():
            assert type(layer) is QALoRALinear and torch.equal(layer.base.codes, codes[name]) and layer.lora_A is None


def test_a_qa_lora_adapter_on_a_base_of_its_own_comes_back_with_it(tmp_path):
    batches, model = token_batches(), tiny("opt")
    apply_quailora(model, batches, rank=8, bits=3, init="cloq", group_size=8)
    quailora.save_adapter(model, tmp_path / "adapter")
    quailora.save_base(model, tmp_path / "base")
    expected = model(**batches[0]).logits
    for prepared in (False, True):
        other = tiny("opt")
        if prepared:
            apply_quailora(other, None, rank=8, bits=3, init="qlora", group_size=8)
        quailora.load_adapter(other, tmp_path / "adapter", tmp_path / "base")
        assert torch.equal(other(**batches[0]).logits, expected)
        trained = [name for name, p in other.named_parameters() if p.requires_grad]
        assert trained and all(name.endswith((".lora_A", ".lora_B")) for name in trained)
    model, other = tiny("opt"), tiny("opt")
    for named in (model, other):
        named.model.decoder.layers[0].weight_proj = nn.Linear(32, 32)
    apply_quailora(model, None, rank=8, init="qlora")
    quailora.save_base(model, tmp_path / "named")
    quailora.load_base(other, tmp_path / "named")  # a layer whose name begins with "weight"
    assert torch.equal(other.model.decoder.layers[0].weight_proj.bias, model.model.decoder.layers[0].weight_proj.bias)
    wrong = tiny("opt")
    apply_quailora(wrong, None, rank=8, init="qlora")
    with pytest.raises(ValueError, match="has a group_size of 8 in .* and none in the model"):
        quailora.load_base(wrong, tmp_path / "base")
    with pytest.raises(ValueError, match="has no adapter to save"):
        quailora.save_adapter(quailora.merge(other), tmp_path / "none")
    tiny("opt").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds no .*of save_base"):
        quailora.load_base(tiny("opt"), tmp_path / "plain")
    with pytest.raises(ValueError, match="group_size does not go with block_size"):
        apply_quailora(tiny("opt"), None, rank=8, init="qlora", group_size=8, block_size=64)


def test_an_adapter_is_refused_on_another_base_and_when_it_is_damaged(tmp_path):
    model = tiny("opt")
    apply_quailora(model, None, rank=8, init="svd")
    quailora.save_adapter(model, tmp_path)

    def refused(message, error=ValueError, family="opt", change=lambda model: None, **options):
        other = tiny(family)
        change(other)
        if options:
            apply_quailora(other, None, init="qlora", **options)
        with pytest.raises(error, match=message):
            quailora.load_adapter(other, tmp_path)

    refused("another base: bits 4, and here 8", rank=8, bits=8)
    of_its_own = tiny("opt")
    apply_quailora(of_its_own, token_batches(padded=False), rank=8, sequential=True)
    quailora.save_adapter(of_its_own, tmp_path / "own")
    quailora.save_base(of_its_own, tmp_path / "base")
    nearest, other_scales = tiny("opt"), tiny("opt")
    apply_quailora(nearest, None, rank=8, init="qlora")
    with pytest.raises(ValueError, match="a base of its own .quailora.: give the folder of save_base too"):
        quailora.load_adapter(nearest, tmp_path / "own")
    apply_quailora(other_scales, None, rank=8, init="qlora", double_quant=False)
    quailora.load_adapter(other_scales, tmp_path / "own", tmp_path / "base")  # the base comes with its scales
    quailora.load_adapter(other_scales, tmp_path / "own")  # which is there now
    batch = token_batches(padded=False)[0]
    assert torch.equal(other_scales(**batch).logits, of_its_own(**batch).logits)
    with pytest.raises(ValueError, match=r"decoder.* is \(.*\) in .*base and None in the model"):
        quailora.load_base(tiny("llama"), tmp_path / "base")
    larger = tiny("opt")
    larger.resize_token_embeddings(larger.config.vocab_size + 1, mean_resizing=False)
    with pytest.raises(ValueError, match=r"weight is \(.*\) in .*base and \(.*\) in the model"):
        quailora.load_base(larger, tmp_path / "base")
    assert not quailora._lora_layers(larger), "a model that does not fit is left as it was"
    with pytest.raises(FileNotFoundError, match="own2 holds no"):
        quailora.load_base(tiny("opt"), tmp_path / "own2")
    refused("another base: block_size 64, and here 128", rank=8, block_size=128)
    refused("another base: double_quant True, and here False", rank=8, double_quant=False)
    refused(
        "another base: weights of .*mean magnitude of the first layer",
        change=lambda m: m.model.decoder.layers[0].self_attn.k_proj.weight.data.mul_(1.01),
    )
    refused(r"layers.0.fc1.lora_A is \(8, 32\) in the adapter and \(4, 32\) in the model", rank=4)
    refused("the adapter has a layer model.decoder.layers.0.self_attn.k_proj, which LlamaForCausalLM has not", family="llama")
    content = (tmp_path / "adapter_model.safetensors").read_bytes()
    save_file(load_safetensors(content), tmp_path / "adapter_model.safetensors")  # without the record
    refused("adapter_model.safetensors is damaged or was not written by save_adapter")
    (tmp_path / "adapter_model.safetensors").write_bytes(content[:-100])
    refused("adapter_model.safetensors is damaged")
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    (tmp_path / "adapter_config.json").write_text('{"r": ')
    refused("adapter_config.json is damaged")
    (tmp_path / "adapter_config.json").unlink()
    refused("adapter_config.json is missing", FileNotFoundError)


def test_a_full_disk_is_named_and_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    model = tiny("opt")
    apply_quailora(model, None, rank=8, init="svd")
    quailora.save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quailora.os, "fsync", full)
    with pytest.raises(OSError, match="adapter_model.safetensors could not be written: No space left on device"):
        quailora.save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---------------------------------------------------------------------------------------------------------------------
# train.py
# ---------------------------------------------------------------------------------------------------------------------


def run_train(*args, **kwargs):
    command = [sys.executable, str(Path(__file__).with_name("train.py")), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="session")
def opt_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "opt"
    tiny("opt").save_pretrained(folder)
    T.ByT5Tokenizer().save_pretrained(folder)
    return folder


TINY_RUN = "--sequence-length 32 --calibration 8 --validation 4 --steps 3 --eval-every 2 --rank 8 --lr 1e-3".split()


def test_train_runs_from_end_to_end_and_repeats_exactly(opt_folder, tmp_path):
    curves = []
    for out in (tmp_path / "a", tmp_path / "b"):
        process = run_train("--model", opt_folder, "--out", out, *TINY_RUN)
        assert process.returncode == 0, process.stderr
        result = json.loads((out / "results.json").read_text())["runs"][0]
        curves.append(result["perplexity"])
    assert curves[0] == curves[1]
    assert result["seconds"]["total"] > sum(value for key, value in result["seconds"].items() if key != "total") * 0.9
    assert [step for step, _ in curves[0]] == [0, 2, 3] and curves[0][-1][1] < curves[0][0][1]
    assert result["init"] == "quailora" and result["bits"] == 4 and result["rank"] == 8 and result["seed"] == 0
    assert len(result["layers"]) == 12 and all(row["als"] < row["quantized"] for row in result["layers"])
    assert result["full_precision_perplexity"] > 1 and result["quantized_perplexity"] > 1 and result["peak_memory_mb"] > 100
    assert set(result["seconds"]) == {"load", "evaluate", "calibrate", "initialize", "train", "merge", "total"}
    assert "| fine-tuned, 3 steps |" in process.stdout and "| adapter merged into the 4 bits |" in process.stdout
    assert result["merged_perplexity"] != pytest.approx(curves[0][-1][1], rel=1e-5), "rounded again"
    assert (tmp_path / "a/adapter/adapter_model.safetensors").is_file()


def test_a_run_that_was_killed_at_any_moment_resumes_to_the_same_adapter_bit_for_bit(opt_folder, tmp_path):
    """SIGKILL as soon as a file of each stage is there, and again in the middle of the resumed run."""
    arguments = ["--model", opt_folder, *TINY_RUN, "--steps", "6"]
    assert run_train(*arguments, "--out", tmp_path / "whole").returncode == 0
    whole = (tmp_path / "whole/adapter/adapter_model.safetensors").read_bytes()
    curve = json.loads((tmp_path / "whole/results.json").read_text())["runs"][0]["perplexity"]
    command = [sys.executable, train.__file__, *map(str, arguments), "--out", tmp_path / "killed", "--resume"]
    for stage in (
        ".",  # made before anything is evaluated or calibrated
        "start/adapter_model.safetensors",
        "start.json",
        "checkpoint-2/optimizer.pt",
        "checkpoint-4/trainer_state.json",
    ):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / "killed" / stage).exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert not (tmp_path / "killed/results.json").exists()
    process = run_train(*arguments, "--out", tmp_path / "killed", "--resume")
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "killed/adapter/adapter_model.safetensors").read_bytes() == whole
    assert json.loads((tmp_path / "killed/results.json").read_text())["runs"][0]["perplexity"] == curve
    assert run_train(*arguments, "--out", tmp_path / "killed", "--resume").stdout.count("| fine-tuned, 6 steps |") == 1
    other = run_train(*arguments, "--alpha", "5", "--out", tmp_path / "killed", "--resume")
    assert other.returncode == 2 and "killed holds a run with alpha 16.0, not 5.0" in other.stderr
    sizes = [path.stat().st_size for path in (tmp_path / "killed").rglob("*.safetensors")]
    assert sizes and max(sizes) == len(whole), "checkpoints hold the adapter, not the base"


def test_a_full_disk_and_a_truncated_checkpoint_are_named_and_the_last_good_state_goes_on(opt_folder, tmp_path, capfd):
    out = tmp_path / "out"

    def run(*options):
        train.main(["--model", str(opt_folder), *TINY_RUN, "--out", str(out), "--resume", *options])

    def error(limit=resource.RLIM_INFINITY):
        """The line of a run in which no file can grow beyond `limit` bytes, which is what a full disk looks like to it."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            with pytest.raises(SystemExit, match="2"):
                run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
        return line

    adapter = 4 * 8 * 2 * (4 * (32 + 32) + 2 * (32 + 64))  # float32 factors of 2 blocks of 6 layers
    error_line = error(adapter)  # not less: what a slow run prints is caught in a file too
    assert "out/start/adapter_model.safetensors could not be written: File too large" in error_line
    assert "out/checkpoint-2 could not be written: " in error(adapter + 5000), "its optimizer is twice the adapter"
    assert not list(out.rglob("*partial")) and (out / "start.json").exists()
    run()
    expected = (out / "adapter/adapter_model.safetensors").read_bytes()
    (out / "results.json").unlink()
    optimizer = out / "checkpoint-2/optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1000])
    shutil.rmtree(out / "checkpoint-3")
    assert "out/checkpoint-2 could not be read (delete it to go on from the one before): " in error()
    shutil.rmtree(out / "checkpoint-2")
    run()
    assert (out / "adapter/adapter_model.safetensors").read_bytes() == expected
    (out / "results.json").write_text('{"runs": [')
    assert "out/results.json could not be read: " in error()


def test_two_processes_end_where_one_does_at_the_same_global_batch(tmp_path):
    """Up to rounding: sums over the calibration set and gradients are added in another order."""
    broken_model(tmp_path / "llama", family="llama")  # OPT has dropout, whose draws differ
    arguments = ["--model", str(tmp_path / "llama"), *TINY_RUN, "--calibration-memory", "5e-5"]
    assert run_train(*arguments, "--batch-size", "4", "--out", tmp_path / "one").returncode == 0
    command = [*arguments, "--batch-size", "2", "--out", str(tmp_path / "two")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", train.__file__]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run([*torchrun, *command], capture_output=True, text=True, env=env, timeout=200)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("| fine-tuned, 3 steps |") == 1
    one, two = (json.loads((tmp_path / out / "results.json").read_text())["runs"][0] for out in ("one", "two"))
    assert [step for step, _ in one["perplexity"]] == [step for step, _ in two["perplexity"]] == [0, 2, 3]
    for key in ("full_precision_perplexity", "quantized_perplexity"):
        assert one[key] == pytest.approx(two[key], rel=1e-6)
    for (_, a), (_, b) in zip(one["perplexity"], two["perplexity"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for a, b in zip(one["layers"], two["layers"], strict=True):
        assert a["name"] == b["name"] and [a["als"], a["floor"]] == pytest.approx([b["als"], b["floor"]], rel=1e-5)


class Inline:
    """Stands in for multiprocessing's spawn context: the process is a call."""

    def __init__(self, target, args):
        self.call, self.exitcode = lambda: target(*args), 0

    def start(self):
        try:
            self.call()
        except SystemExit as stop:
            self.exitcode = stop.code

    def join(self):
        pass


def test_compare_runs_every_method_on_the_same_terms_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: type("Spawn", (), {"Process": Inline}))
    broken_model(tmp_path / "llama", family="llama")
    out, calibrations = tmp_path / "out", []
    arguments = ["--model", str(tmp_path / "llama"), *TINY_RUN, "--compare", "--out", str(out), "--resume"]
    (tmp_path / "other.txt").write_text("Another set, of other words. " * 100)
    arguments += ["--sweep", "1e-3", "1e-2", "--ranks", "2", "4", "6", "8", "--calibrations", str(tmp_path / "other.txt")]
    correlate = quailora.input_correlations
    monkeypatch.setattr(quailora, "input_correlations", lambda *a: calibrations.append(1) or correlate(*a))
    run, ran, draws = train.run, [], set()

    def recorded(args):
        ran.append(args.out)
        result = run(args)
        if (args.init, args.rank, args.lr) == ("qlora", 8, 1e-3):
            with safe_open(args.out / "start/adapter_model.safetensors", "pt") as start:
                draws.add(start.get_tensor("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight").numpy().tobytes())
        return result

    def killed(args):
        if args.bits == 8:
            raise OSError("the disk is full")
        return recorded(args)

    monkeypatch.setattr(train, "run", killed)
    with pytest.raises(SystemExit, match="2"):
        train.main(arguments)
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 5
    ran.clear()
    monkeypatch.setattr(train, "run", recorded)
    train.main(arguments)
    assert len(draws) == 1, "QLoRA's lora_A is the same in 4, 8 and 16 bits, whatever was evaluated or shared before"
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert len(calibrations) == 2 and len(ran) == len(runs) - 5 == 2 + 7 + 1 + 5 * 2 + 3  # methods, sweep, calibration, ranks
    assert len({run["full_precision_perplexity"] for run in runs}) == 1
    methods = train.compared(train.parse_args(arguments))
    of = {name: [r for r in runs if kind.items() <= r["settings"].items()] for name, kind in methods.items()}
    for name in methods:
        (first, *_) = of[name]
        curve = first["perplexity"]
        assert [step for step, _ in curve] == [0, 2, 3] and curve[0][1] > curve[-1][1]
        assert all(row["calibrated"] for row in first["layers"])
        assert [r["settings"]["lr"] for r in of[name][:2]] == [1e-3, 1e-2]
        assert of[name][0]["selection_perplexity"] > of[name][1]["selection_perplexity"] != of[name][1]["perplexity"][-1][1]
    assert of["LoRA, full precision"][0]["perplexity"][0][1] == runs[0]["full_precision_perplexity"]
    lines = capsys.readouterr().out.splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert [row[0] for row in table[1:8]] == list(methods) and all(", at 0.01" in row[0] for row in table[9:16])
    assert table[17][1] == table[5][1] != table[18][1], "calibrated on the same and on another set"
    assert [row[0].rpartition(", step ")[0] for row in table[-10:]] == [name for name in list(methods)[:5] for _ in "03"]
    assert table[-2][1] != table[-2][4] == table[5][1] != table[-10][4] == table[1][1], "QuAILoRA's start depends on the rank"
    assert len(set(table[-2])) == 5 and [cell == "" for cell in table[-1][1:]] == [False, True, False, False], "not fine-tuned"
    assert table[5][4] == f"{of['QuAILoRA, 4 bits'][0]['perplexity'][-1][1]:.3f}"
    assert all((out / figure).stat().st_size > 10_000 for figure in ("perplexity.png", "layers.png", "rank.png"))
    ran.clear()
    train.main(arguments)
    assert not ran
    for done in runs:  # a run that was made before an option existed had its default
        del done["settings"]["als_steps"]
    held = json.loads((out / "results.json").read_text()) | {"runs": runs}
    del held["common"]["als_steps"]
    (out / "results.json").write_text(json.dumps(held))
    train.main(arguments)
    assert not ran
    with pytest.raises(SystemExit, match="2"):
        train.main([*arguments, "--alpha", "5"])
    assert "holds runs with alpha 16.0, not 5.0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        train.main([argument for argument in arguments if argument != "--compare"])
    assert "holds a comparison: give --compare" in capsys.readouterr().err


def test_qa_lora_is_merged_without_loss_and_stands_in_the_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: type("Spawn", (), {"Process": Inline}))
    broken_model(tmp_path / "llama", family="llama")
    arguments = ["--model", str(tmp_path / "llama"), *TINY_RUN, "--group-size", "8", "--bits", "3"]
    train.main([*arguments, "--method", "qa-lora", "--out", str(tmp_path / "one")])
    one = json.loads((tmp_path / "one/results.json").read_text())["runs"][0]
    assert one["merged_perplexity"] == pytest.approx(one["perplexity"][-1][1], rel=1e-5)
    assert one["perplexity"][0][1] != one["quantized_perplexity"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    quailora.load_base(model, tmp_path / "one/merged")
    blocks = train.token_blocks(train.load_texts("python"), T.AutoTokenizer.from_pretrained(tmp_path / "llama"), 32)[-4:]
    with torch.no_grad():
        assert math.exp(model(input_ids=blocks, labels=blocks).loss) == pytest.approx(one["merged_perplexity"], rel=1e-5)
    methods = ["--methods", "qlora", "qa-qlora", "qa-quailora"]
    train.main([*arguments, "--compare", *methods, "--out", str(tmp_path / "compare")])
    runs = json.loads((tmp_path / "compare/results.json").read_text())["runs"]
    assert [(run["settings"]["method"], run["init"], run["bits"]) for run in runs] == [
        ("lora", "qlora", 3), ("qa-lora", "qlora", 3), ("qa-lora", "quailora", 3), ("lora", "qlora", 8), ("lora", "qlora", 16),
    ]  # fmt: skip
    lora, zero, ours, *_ = runs
    assert zero["perplexity"][0][1] == zero["quantized_perplexity"] == ours["quantized_perplexity"]
    assert lora["quantized_perplexity"] != zero["quantized_perplexity"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| QLoRA", "| QA-LoRA", "| LoRA"))]
    assert [line.split(" | ")[0] for line in lines] == [
        "| QLoRA, 3 bits", "| QA-LoRA, zero start, 3 bits", "| QA-LoRA, QuAILoRA, 3 bits", "| QLoRA, 8 bits",
        "| LoRA, full precision",
    ]  # fmt: skip
    assert f" | {ours['merged_perplexity']:.3f} | " in lines[2]


def test_a_run_on_a_base_of_its_own_is_gone_on_with_and_leaves_base_and_adapter(tmp_path, monkeypatch):
    broken_model(tmp_path / "llama", family="llama")
    arguments = ["--model", str(tmp_path / "llama"), *TINY_RUN, "--init", "joint", "--bits", "3"]
    train.main([*arguments, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
        patch.setattr(transformers.Trainer, "train", lambda *_, **__: (_ for _ in ()).throw(OSError("stopped")))
        train.main([*arguments, "--out", str(tmp_path / "stopped")])
    train.main([*arguments, "--out", str(tmp_path / "stopped"), "--resume"])
    whole, resumed = (json.loads((tmp_path / out / "results.json").read_text())["runs"][0] for out in ("whole", "stopped"))
    assert whole["perplexity"] == resumed["perplexity"]
    adapters = [(tmp_path / out / "adapter/adapter_model.safetensors").read_bytes() for out in ("whole", "stopped")]
    assert adapters[0] == adapters[1]
    models = [T.AutoModelForCausalLM.from_pretrained(tmp_path / "llama") for _ in range(2)]
    for model, out in zip(models, ("whole", "stopped"), strict=True):
        quailora.load_adapter(model, tmp_path / out / "adapter", tmp_path / out / "base")
    with torch.no_grad():
        assert torch.equal(*(model(**token_batches()[0]).logits for model in models))


def test_gap_closed_is_that_of_the_paper_in_means_over_seeds():
    def runs(*ends):
        rest = {"layers": [{"seconds": 2.0}], "seconds": {"calibrate": 3.0}, "peak_memory_mb": 5.0}
        return [{"perplexity": [[0, start], [9, end]], **rest} for start, end in ends]

    methods = {
        "4": runs((20, 11), (20, 9)),
        "ours": runs((17, 8), (17, 9)),
        "8": runs((16, 8), (16, 8)),
        "16": runs(
            (15, 10),
        )
        * 2,
    }
    *_, base, ours, eight, full = train.comparison(methods)
    assert base == "| 4 | 20.000 ± 0.000 |  |  | 10.000 ± 1.414 |  |  | 3 + 2 | 5 |"
    assert ours == "| ours | 17.000 ± 0.000 | 75% | 60% | 8.500 ± 0.707 | 75% |  | 3 + 2 | 5 |", (
        "no gap where the reference is no better"
    )
    assert " | 100% | 80% | 8.000" in eight and " | 125% | 100% | 10.000" in full


@pytest.mark.parametrize("suffix", ["json", "jsonl", "txt"])
def test_data_of_every_kind_becomes_texts(tmp_path, suffix):
    records = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "Ho"}]
    text = {"json": json.dumps(records), "jsonl": "\n".join(map(json.dumps, records)) + "\n", "txt": "ä b"}[suffix]
    (tmp_path / f"data.{suffix}").write_text(text, "utf-8")
    texts = train.load_texts(str(tmp_path / f"data.{suffix}"))
    alpaca = ["### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3", "### Instruction:\nHi\n\n### Response:\nHo"]
    assert texts == (["ä b"] if suffix == "txt" else alpaca)


def broken_model(folder, change=lambda model: None, tokenizer=True, family="opt", **config):
    model = tiny(family)
    change(model)
    model.config.update(config)
    model.save_pretrained(folder)
    if tokenizer:
        T.ByT5Tokenizer().save_pretrained(folder)
    return folder


FC1 = "model.decoder.layers.0.fc1"
FAULTS = {
    "unknown model": ("--model opp-125m", "--model opp-125m: expected smollm2-135m, opt-..., pythia-..."),
    "Hub out of reach": ("--model opt-125m", "--model opt-125m: .*without the Hub, use --model smollm2-135m or a local folder"),
    "folder without config": ("--model {tmp}/empty", "/empty: the folder has no config.json"),
    "folder without weights": ("--model {tmp}/no-weights", "/no-weights: .*no file named model.safetensors"),
    "truncated weights": ("--model {tmp}/truncated", "--model .*/truncated: "),
    "no tokenizer": ("--model {tmp}/no-tokenizer", "/no-tokenizer: no tokenizer"),
    "missing gguf": ("--model {tmp}/none.gguf", "--model .*/none.gguf: no such file"),
    "truncated gguf": ("--model {tmp}/truncated.gguf", "--model .*/truncated.gguf: "),
    "NaN in a weight": ("--model {tmp}/nan", f"1 of 2048 weights of {FC1} are NaN or inf"),
    "already quantized": ("--model {tmp}/quantized", "/quantized: the model is already quantized"),
    "tokens it lacks": ("--model {tmp}/tokens", "the tokenizer gives the token [0-9]+, and the model knows 50"),
    "rank too large": (
        "--rank 33",
        r"rank 33 is not within 1 .. min\(out, in\) = 32 of model.decoder.layers.0.self_attn.k_proj",
    ),
    "rank 0": ("--rank 0", "--rank 0: expected at least 1"),
    "rank negative": ("--rank -1", "--rank -1: expected at least 1"),
    "alpha 0": ("--alpha 0", "--alpha 0.0: expected a positive number"),
    "bits": ("--bits 5", "--bits 5: expected 2, 3, 4, 8 or 16"),
    "missing data": ("--data {tmp}/none.json", "none.json: no such file"),
    "missing data, no suffix": ("--data none", "--data none: no such file"),
    "empty data": ("--data {tmp}/empty.txt", "empty.txt: the file is empty"),
    "not UTF-8": ("--data {tmp}/latin.txt", "latin.txt: 'utf-8' codec can't decode byte 0xe4 in position 0"),
    "not JSON": ("--data {tmp}/half.json", "half.json: Expecting value: line 1 column 2"),
    "no records": ("--data {tmp}/no-records.json", "no-records.json: expected a list of records, got none"),
    "calibration data": ("--calibration-data {tmp}/none.json", "--calibration-data .*none.json: no such file"),
    "no seeds": ("--compare --seeds 0", "--seeds 0: expected at least 1"),
    "a negative rate": ("--compare --sweep 1e-3 -1", "--sweep -1.0: expected a positive number"),
    "a rank of 0": ("--compare --ranks 0 8", "--ranks 0: expected at least 1"),
    "a JSON object": ("--data {tmp}/object.json", "object.json: expected a list of records, got dict"),
    "other records": ("--data {tmp}/others.json", "needs `text`, or `instruction` and `output`, and has 'a', 'b'"),
    "numbers": ("--data {tmp}/numbers.json", "needs `text`, or `instruction` and `output`, and has int"),
    "too short": ("--data {tmp}/short.txt", "gives 6 sequences of 32 tokens, and 16 are needed: 8 to calibrate, 4 to validate"),
    "calibration that overflows": ("--model {tmp}/overflow", "model.decoder.layers.0.fc2 read NaN or inf in calibration"),
    "no data for NaN": ("--model {tmp}/overflow --init qlora", "its loss on the validation sequences is not a number"),
    "no linear layers": ("--model {tmp}/no-layers", "GPT2LMHeadModel has no linear layers to replace"),
    "memory 0": ("--calibration-memory 0", "--calibration-memory 0.0: expected a positive number"),
    "memory below one H": ("--calibration-memory 1e-6", "layers.0.self_attn.[a-z]_proj takes 4096 bytes, more than the 1000"),
    "too long": ("--sequence-length 65", "--sequence-length 65 is over the model's limit of 64"),
    "taken": ("--out {tmp}/taken", "--out .*/taken already holds a run: give another folder, --resume or"),
}


@pytest.fixture(scope="session")
def broken(opt_folder, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("broken")
    (tmp / "empty").mkdir(), (tmp / "taken").mkdir()
    (tmp / "taken/results.json").write_text("{}")
    broken_model(tmp / "no-weights"), (tmp / "no-weights/model.safetensors").unlink()
    weights = broken_model(tmp / "truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    broken_model(tmp / "no-tokenizer", tokenizer=False)
    broken_model(tmp / "nan", lambda model: model.get_submodule(FC1).weight.data.view(-1)[:1].fill_(math.nan))
    broken_model(tmp / "overflow", lambda model: model.get_submodule(FC1).weight.data.mul_(1e30))
    broken_model(tmp / "no-layers", lambda model: model.transformer.h.__delitem__(slice(None)), family="gpt2", n_layer=0)
    broken_model(tmp / "tokens", lambda model: model.resize_token_embeddings(50))
    broken_model(tmp / "quantized", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    (tmp / "truncated.gguf").write_bytes(b"GGUF" + bytes(20))
    (tmp / "empty.txt").write_text(" \n"), (tmp / "latin.txt").write_bytes(b"\xe4"), (tmp / "half.json").write_text("[")
    (
        (tmp / "no-records.json").write_text("[]"),
        (tmp / "object.json").write_text("{}"),
        (tmp / "others.json").write_text('[{"a": 1, "b": 2}]'),
    )
    (tmp / "numbers.json").write_text("[1]"), (tmp / "short.txt").write_text("too short " * 20)
    return tmp


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_line_and_exit_code_2(fault, opt_folder, broken, monkeypatch, capsys):
    arguments, message = FAULTS[fault]
    from huggingface_hub import constants

    def unreachable(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
    arguments = arguments.format(tmp=broken).split()
    with pytest.raises(SystemExit) as stop:
        train.main(["--model", str(opt_folder), "--out", str(broken / "out"), *TINY_RUN, *arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and re.search(message, lines[0]), lines
    assert not list((broken / "out").glob("*")), "nothing is left behind"


def test_debug_shows_the_traceback(opt_folder, broken):
    with pytest.raises(ValueError, match="expected 2, 3, 4, 8 or 16"):
        train.main(["--model", str(opt_folder), "--bits", "5", "--debug", "--out", str(broken / "out")])


def test_help_starts_without_the_heavy_imports():
    code = "import sys, train\ntry: train.parse_args(['--help'])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=Path(__file__).parent)
    assert process.returncode == 0 and b"--preset" in process.stdout


@pytest.mark.network
def test_quailora_closes_most_of_the_gap_on_smollm2_before_a_single_step(tmp_path):
    sizes = "--sequence-length 128 --calibration 32 --validation 16 --steps 0".split()
    process = run_train("--out", tmp_path / "out", *sizes)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "out/results.json").read_text())["runs"][0]
    full, quantized, start = result["full_precision_perplexity"], result["quantized_perplexity"], result["perplexity"][0][1]
    assert full < start < quantized and (quantized - start) / (quantized - full) > 0.5


# ---------------------------------------------------------------------------------------------------------------------
# `python test_quailora.py`: what SmolLM2-135M costs beside the limits of the machine and peft + bitsandbytes, as ratios;
# nothing here is a test
# ---------------------------------------------------------------------------------------------------------------------


def training_step(which):
    """A step of AdamW on 4 x 128 tokens with SmolLM2-135M, rank 64 on every linear layer of a 4-bit base, as a function."""
    if which == "peft + bitsandbytes":
        model = nf4_base(train.smollm2(), quantization_config=NF4)
        model = peft.get_peft_model(model, peft.LoraConfig(r=64, lora_alpha=16, target_modules="all-linear"))
    else:
        model = T.AutoModelForCausalLM.from_pretrained(train.smollm2(), dtype=torch.float32)
        apply_quailora(model.train(), None, init="qlora", floor=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    ids = torch.randint(0, model.config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(0))

    def step():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quailora, "bitsandbytes", None if which == "ours, torch alone" else bitsandbytes)
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step(), optimizer.zero_grad()
            return time.perf_counter() - start

    return step


def in_new_process(measure, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def seconds_of(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def step_memory(which):
    """Peak resident MB of two steps."""
    step = training_step(which)
    gc.collect()
    held = resident_mb()
    return held + peak_mb(lambda: (step(), step()))[0]


def peak_mb(call):
    """What `call` takes at its peak beyond what is held before (Linux), and what it returns."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    before = resident_mb()
    result = call()
    return resident_mb("VmHWM") - before, result


def resident_mb(key="VmRSS"):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) / 1024


def decaying_correlations(n):
    """H, (n, n), of random inputs with a decaying spectrum and three outlier features."""
    generator = torch.Generator().manual_seed(0)
    decay = torch.linspace(0, -4, n).exp()[torch.randperm(n, generator=generator), None]
    X = torch.randn(n, n, generator=generator) * decay
    X[:3] *= 100
    return X @ X.T


def compare_sizes(arguments, rank=64):
    """For each shape OUTxIN, on the CPU, with H given. The limit is the time of the two large products, E H and E E^T or E^T E,
    in float32; error and floor are those of (1)."""
    try:
        shapes = [tuple(map(int, shape.split("x"))) for shape in arguments]
        assert all(len(shape) == 2 and min(shape) >= rank for shape in shapes)
    except (ValueError, AssertionError):
        sys.exit(f"usage: python quailora.py [OUTxIN ...], both at least {rank}; default: 576x1536 to 11008x4096")
    torch.manual_seed(0)
    LoRALinear.from_linear(nn.Linear(64, 64), rank=1)  # starts the threads
    print("| (out, in) | method | seconds | over the limit | peak extra MB | error over the floor |\n|---|---|---|---|---|---|")
    for out, n in shapes or [(576, 1536), (1536, 576), (4096, 4096), (4096, 11008), (11008, 4096)]:
        H, linear, rows = decaying_correlations(n), nn.Linear(n, out, bias=False), []
        W = linear.weight.detach()
        limit = seconds_of(lambda: (W @ H, W @ W.T if out < n else W.T @ W))  # noqa: B023
        for name, init, rounds in (("QuAILoRA", "quailora", 1), ("LoftQ, 5 x one round", "svd", 5)):
            given = H if quailora.needs_data(init) else None
            memory, layer = peak_mb(lambda: LoRALinear.from_linear(linear, given, rank, init=init))  # noqa: B023
            error = calibrated_error(W - layer.merged_weight(), *nothing(W), H)
            rows.append((name, rounds * layer.report["seconds"], memory, error))
        least = quailora.initialize(W, H, rank, "exact")[-1]["initialized"]
        for name, seconds, memory, error in rows:
            cells = f"{seconds:.2f} | {seconds / limit:.1f} | {memory:,.0f} | {error / least:.4f}"
            print(f"| ({out}, {n}) | {name} | {cells} |", flush=True)


def compare_steps(rounds=7):
    kinds = ("peft + bitsandbytes", "ours", "ours, torch alone")
    steps = {which: training_step(which) for which in kinds}
    seconds = {which: [] for which in kinds}
    for _ in range(rounds + 1):  # the first is a warm-up
        for which in kinds:
            seconds[which].append(steps[which]())
    median = {which: statistics.median(times[1:]) for which, times in seconds.items()}
    memory = {which: in_new_process(step_memory, which) for which in kinds}
    print("| a training step, 4 x 128 tokens | seconds | over peft + bitsandbytes | peak MB | over |\n|---|---|---|---|---|")
    for which in kinds:
        time_ratio, memory_ratio = median[which] / median[kinds[0]], memory[which] / memory[kinds[0]]
        print(f"| {which} | {median[which]:.2f} | {time_ratio:.2f} | {memory[which]:,.0f} | {memory_ratio:.2f} |")


def compare_calibration(rounds=3):
    """16 x 256 tokens in batches of 4, beside a forward pass without the head and X X^T once for each distinct H."""
    model = T.AutoModelForCausalLM.from_pretrained(train.smollm2(), dtype=torch.float32).eval()
    batches = torch.randint(0, model.config.vocab_size, (16, 256), generator=torch.Generator().manual_seed(0)).split(4)
    sizes = [len(H) for H in {id(H): H for H in input_correlations(model, batches[:1]).values()}.values()]
    inputs = {n: torch.randn(4 * 256, n) for n in set(sizes)}

    def forward():
        with torch.no_grad():
            for batch in batches:
                model.base_model(batch)

    def products():
        for n in sizes * len(batches):
            inputs[n].T @ inputs[n]

    times = [[seconds_of(c) for c in (lambda: input_correlations(model, batches), forward, products)] for _ in range(rounds)]
    ours, forward, products = map(statistics.median, zip(*times, strict=True))
    print(
        f"\ncalibration on 16 x 256 tokens: {ours:.1f} s, {ours / (forward + products):.2f} of a forward pass without the head"
        f" ({forward:.1f} s) and {len(sizes)} products X X^T ({products:.1f} s)"
    )
    return model, input_correlations(model, batches)


def initialization_memory():
    """What apply_quailora takes at its peak beyond model and H, and the largest layer, in MB: for the layers of a block of
    LLaMA 7B, of random weights, which are large enough to be seen beside the work memory of the libraries."""
    shapes = dict.fromkeys("qkvo", (4096, 4096)) | {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
    block = nn.ModuleDict({name: nn.Linear(n, out, bias=False) for name, (out, n) in shapes.items()})
    H = {n: decaying_correlations(n) for n in (4096, 11008)}
    H, largest = {name: H[n] for name, (_, n) in shapes.items()}, block["gate"].weight.nbytes / 2**20
    return peak_mb(lambda: apply_quailora(block, None, H=H, floor=False))[0], largest


@contextlib.contextmanager
def timed_parts(seconds):
    """Adds to `seconds`, a Counter, what the parts of a start take."""

    def timed(part, call):
        def timed_call(*args, **options):
            start = time.perf_counter()
            result = call(*args, **options)
            seconds[part] += time.perf_counter() - start
            return result

        return timed_call

    problem = quailora._Problem
    parts = [("rounding", quailora, "quantize"), ("G", problem, "__init__"), ("sketch", problem, "start")]
    with pytest.MonkeyPatch.context() as patch:
        for part, owner, name in [*parts, ("ALS with sketch", problem, "als"), ("factors", problem, "factors")]:
            patch.setattr(owner, name, timed(part, getattr(owner, name)))
        yield


def compare_initialization(model, H):
    """All 210 layers, H given, beside one product with H and one with E for each in float32, and LoftQ's rounds."""
    layers, limit = quailora.linear_layers(model), 0.0
    for name, layer in layers.items():
        W = layer.weight.detach()
        limit += seconds_of(lambda: (W @ H[name], W @ W.T if len(W) < len(W.T) else W.T @ W))  # noqa: B023
    ours, loftq, worst, parts = 0.0, 0.0, 0.0, collections.Counter()
    for name, layer in layers.items():
        with timed_parts(parts):
            report = LoRALinear.from_linear(layer, H[name], floor=True).report
        ours, worst = ours + report["seconds"], max(worst, (report["initialized"] / report["floor"]) ** 2)
        loftq += 5 * LoRALinear.from_linear(layer, None, init="svd").report["seconds"]
    print(
        f"\ninitialization of {len(layers)} layers, H given: {ours:.1f} s, {ours / limit:.1f} of the limit ({limit:.1f} s), "
        f"1/{loftq / ours:.1f} of LoftQ's 5 rounds (one round of each layer times 5: {loftq:.0f} s); "
        f"worst error over the floor {worst:.4f}\nin milliseconds a layer: limit {limit / len(layers) * 1e3:.1f}, all "
        f"{ours / len(layers) * 1e3:.1f}, {', '.join(f'{part} {t / len(layers) * 1e3:.1f}' for part, t in parts.items())}"
    )
    peak, largest = in_new_process(initialization_memory)
    print(
        f"apply_quailora on the layers of a block of LLaMA 7B, H given: {peak:,.0f} MB at its peak beyond model and H, "
        f"{peak / largest:.1f} copies of the largest layer ({largest:.0f} MB)"
    )


def start_up(rounds=3):
    def first_bar():
        command = [sys.executable, train.__file__, "--steps", "0", "--out", "/dev/null/none"]
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            while b"%|" not in (process.stderr.read1() or b"%|"):
                pass
            process.kill()
        return time.perf_counter() - start

    command = [sys.executable, train.__file__, "--help"]
    usage = min(seconds_of(lambda: subprocess.run(command, stdout=subprocess.DEVNULL)) for _ in range(rounds))
    print(f"\ntrain.py --help: {usage:.2f} s; train.py on SmolLM2 to its first progress bar: {first_bar():.1f} s")


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count())
    compare_steps()
    compare_initialization(*compare_calibration())
    start_up()
