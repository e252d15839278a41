# SPDX-License-Identifier: MIT
"""What the equations do to one layer of SmolLM2-135M: what is left of its rounding error,
|| (W - (Q + A B^T)) X || over || (W - Q) X ||, after (4) and after each (5) and (6), down to the
least that rank 64 can leave. A table, and a figure in assets/half_steps.png; half a minute.

The default layer is in the middle of all 210 by what is left in the end.

    python assets/half_steps.py --layer model.layers.0.mlp.down_proj --out other.png
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))

import quailora  # noqa: E402
from train import load_model, token_blocks  # noqa: E402

RANK, STEPS = 64, 20
ORANGE, BLUE, RED = "#B87A00", "#0072B2", "#D55E00"  # (4), (5), (6)


def measure(name: str) -> dict[str, float]:
    """What is left, by the state that leaves it. X: 16 sequences of 256 tokens of the language
    reference of Python. In float64, to see the last differences from the floor."""
    model, tokenizer = load_model("smollm2-135m")
    X = token_blocks("python", tokenizer, 256, 16)[:16]
    W = quailora.linear_layers(model)[name].weight.detach()  # (out, in)
    H = quailora.input_correlations(model, X.split(4))[name].double()  # (in, in)
    E = (W - quailora.quantize(W).dequantize()).double()  # (out, in)
    A, B, halves = quailora.als_init(E, H, RANK, STEPS, return_errors=True)
    errors = {"QLoRA": quailora.calibrated_error(E, 0 * A, B, H)}
    errors["SVD alone"] = quailora.calibrated_error(E, *quailora.svd_init(E, RANK), H)
    errors["(4), from a sketch"] = halves[0]
    for i, error in enumerate(halves[1:]):
        errors[f"({5 + i % 2}), round {i // 2 + 1}"] = error
    errors["the floor"] = quailora.calibrated_error(E, *quailora.exact_init(E, H, RANK), H)
    return {state: math.sqrt(error / errors["QLoRA"]) for state, error in errors.items()}


def draw(name: str, left: dict[str, float], file: Path) -> None:
    plt.switch_backend("agg")
    qlora, svd, *halves, floor = left.values()
    rounds = [i / 2 for i in range(len(halves))]  # (4) at 0, (5) at 0.5, (6) at 1, ...
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 5), width_ratios=(3, 2))
    above = [value / floor - 1 for value in halves]
    for axes, values in zip(panels, (halves, above), strict=True):
        axes.plot(rounds, values, color="0.6", linewidth=1.3)
        axes.plot(rounds[0], values[0], "D", color=ORANGE)
        axes.plot(rounds[1::2], values[1::2], "o", color=BLUE)
        axes.plot(rounds[2::2], values[2::2], "s", color=RED)
        axes.set_xlabel("rounds")

    first, second = panels
    first.set(xlim=(-0.15, 5.25), ylim=(0, 1.06), title="what is left of the rounding error")
    first.axhline(qlora, color="black")
    first.axhline(svd, color=ORANGE)
    first.axhline(floor, color="black", linestyle=(0, (4, 3)))
    first.text(5.2, qlora - 0.06, "QLoRA: 1", ha="right")
    first.text(5.2, svd - 0.06, f"SVD alone: {svd:.3f}", ha="right", color=ORANGE)
    first.text(5.2, floor - 0.06, f"the least for rank {RANK}: {floor:.3f}", ha="right")
    first.text(0.1, halves[0] + 0.03, "(4)  an SVD, from a sketch", color=ORANGE)
    first.text(0.62, halves[1] + 0.03, "(5)  the best A for this B", color=BLUE)
    first.text(1.1, halves[2] + 0.025, "(6)  the best B for that A", color=RED)
    second.set(yscale="log", title="how far that is above the least")
    second.set_xticks(range(0, STEPS + 1, 5))
    second.set_yticks([1, 0.1, 0.01, 0.001], ["100%", "10%", "1%", "0.1%"])
    figure.suptitle(f"{name} of SmolLM2-135M, NF4, rank {RANK}")
    figure.tight_layout()
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layer", default="model.layers.6.self_attn.o_proj", help="its name")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"), help="PNG")
    args = parser.parse_args()
    left = measure(args.layer)
    print(f"| {args.layer} | what is left | over the floor |\n|---|---|---|")
    for state, value in left.items():
        print(f"| {state} | {value:.4f} | {value / left['the floor']:.4f} |")
    draw(args.layer, left, args.out)
