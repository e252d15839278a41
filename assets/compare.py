# SPDX-License-Identifier: MIT
"""Compare starts of an adapter on the same terms: tables, figures. Takes train.py's options too.

    python assets/compare.py --methods qlora quailora --seeds 2 --ranks 8 64 --out runs/mine
    python assets/compare.py --report assets/compare-python.json

Each run is a process of its own, on the same data in the same order; calibration and evaluation
in full precision are done once. --out holds what is finished (results.json), the rest (runs/), to
be gone on with by --resume, and the figures. --report runs nothing.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import unittest.mock
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import train  # noqa: E402
from train import naming, require  # noqa: E402

INITS = {  # --init: how it is called, and how it is drawn, in the colors of Okabe and Ito
    "qlora": ("QLoRA", "#000000", "o", "-"),
    "peft": ("QLoRA as peft draws it", "#999999", ".", "-"),
    "svd": ("SVD alone", "#E69F00", "s", ":"),
    "loftq": ("LoftQ", "#56B4E9", "v", "-."),
    "quailora": ("QuAILoRA", "#D55E00", "^", "-"),
    "exact": ("exact (QERA)", "#D55E00", "2", ":"),
    "cloq": ("CLoQ", "#F0E442", "P", "--"),
    "joint": ("joint", "#0072B2", "*", "-"),
    8: ("QLoRA, 8 bits", "#009E73", "D", "--"),
    16: ("LoRA, full precision", "#CC79A7", "X", (0, (1, 1))),
}
ZERO = ("qlora", "peft")  # without an adapter at step 0
VARIANTS = {  # INIT-VARIANT: of the start's split into lora_A and lora_B, or of training
    "equal": "equal norms",  # as in (4) of the paper
    "white": "white lora_A",  # the adapter's inputs, lora_A x, are uncorrelated and of one variance
    "plus": "LoRA+",  # arXiv 2402.12354
    "half": "half of it frozen",  # half the rows repair and are not trained, half start at random
}
NAMES = [*train.METHODS, *(f"qa-{init}" for init in train.METHODS), "qlora-plus"]
NAMES += [f"{init}-{variant}" for init in ("quailora", "joint") for variant in VARIANTS]
NAMES.remove("joint-half")  # it is of als_init
VARIED = ("bits", "calibration_data", "init", "lr", "method", "rank", "seed", "steps", "variant")


def parse_args(argv=None) -> argparse.Namespace:
    parser = train.options()
    parser.description = __doc__
    add = parser.add_argument
    # fmt: off
    add("--methods", nargs="+", default=["qlora", "peft", "svd", "loftq", "quailora"],
        choices=NAMES, metavar="INIT", help="the baseline first; INIT, qa-INIT for it with "
        "--method qa-lora, or INIT-VARIANT: equal (factors of equal norm), white (lora_A x of one "
        "variance), plus (LoRA+: lora_A at 1/16 of the rate) or half (half the rows repair and are "
        "frozen); default: %(default)s")
    add("--seeds", type=int, default=1, help="seeds 0, 1, ... of each; default: 1")
    add("--sweep", type=float, nargs="+", default=[], metavar="LR", help="also each at the best of "
        "these rates, chosen on sequences that are neither trained nor validated on")
    add("--ranks", type=int, nargs="+", default=[], metavar="RANK", help="also --methods at these "
        "ranks at step 0, and fine-tuned at the first, middle and last of them")
    add("--calibrations", nargs="+", default=[], metavar="DATA", help="also QuAILoRA with these")
    add("--report", type=Path, metavar="FILE", help="only print the tables of this results.json")
    # fmt: on
    args = train.parse_args(argv, parser, "compare")
    args.selection = args.validation
    return args


def check_options(args: argparse.Namespace) -> None:
    train.check_options(args)
    require(args.seeds >= 1, f"--seeds {args.seeds}: expected at least 1")
    require(min([1, *args.ranks]) > 0, f"--ranks {args.ranks}: expected at least 1")
    require(min([1, *args.sweep]) > 0, f"--sweep {args.sweep}: expected positive rates")
    require(args.bits <= 4, f"--bits {args.bits}: expected 2, 3 or 4; 8 and 16 are the references")
    split = [name for name in args.methods if name.endswith(("-equal", "-white", "-half"))]
    plain = not args.sequential and args.method == "lora"
    require(plain or not split, f"{split}: not with qa-lora, --sequential")
    require("RANK" not in os.environ, "give this to python, not to torchrun: it starts processes")


def methods_of(args: argparse.Namespace) -> dict[str, dict]:
    """Title of a row: --method, --init and --bits. The last two are the references."""
    methods = {}
    for name in args.methods:
        init, _, variant = name.removeprefix("qa-").partition("-")
        title, method = INITS[init][0], "lora"
        if name.startswith("qa-") or args.method == "qa-lora":
            title = "QA-LoRA, " + ("zero start" if init == "qlora" else title)
            method = "qa-lora"
        method = dict(method=method, init=init, bits=args.bits, variant=variant or None)
        title += f", {VARIANTS[variant]}" if variant else ""
        methods[f"{title}, {args.bits} bits"] = method
    for bits in (8, 16):
        methods[INITS[bits][0]] = dict(method="lora", init="qlora", bits=bits, variant=None)
    return methods


# ---------------------------------------------------------------------------------------- runs


def calibrate(job: argparse.Namespace, file: Path) -> None:
    """What all runs share: H, the seconds it took, and the perplexity in full precision."""
    import torch

    from quailora import input_correlations

    shared = train.Job(job, {"seconds": {}})
    with shared.phase("calibrate"):
        H = input_correlations(shared.model, shared.batches)
    partial = file.with_suffix(".partial")
    with naming(f"{file} could not be written"):
        torch.save({"H": H, "perplexity": shared.evaluate(), "seconds": shared.seconds}, partial)
        partial.replace(file)


def run(job: argparse.Namespace, file: Path | None) -> None:
    """One run of train.py, on what calibrate() left in `file`."""
    import torch

    import quailora

    shared, device = {}, "cuda" if torch.cuda.is_available() else "cpu"
    if file:
        with naming(f"{file} could not be read (delete it to calibrate again)"):
            shared = torch.load(file, device)
    with varied(job.variant):
        result = train.run(job, shared.get("H"), shared.get("perplexity"))
    if shared and job.init not in ZERO and quailora.INITS[job.init].needs_data:
        result["seconds"]["calibrate"] = shared["seconds"]["calibrate"]
        train.write_json(job.out / "results.json", {"runs": [result]})


def varied(variant: str | None):
    """A context in which train.py runs one of VARIANTS."""
    import torch
    import transformers

    import quailora

    apply = quailora.apply_quailora

    def split_anew(model, *args, H=None, **options):  # M lora_A, lora_B M^-1: the same product
        rows = apply(model, *args, H=H, **options)
        for name, layer in quailora.lora_layers(model).items() if H else ():
            A, B = layer.lora_A.data.double(), layer.lora_B.data.double()
            if variant == "equal":  # lora_A lora_A^T = lora_B^T lora_B, as A A^T = c I
                M = power(B.T @ B, 0.25) / A.norm(dim=1).mean().sqrt()
            else:  # lora_A H lora_A^T = I tr H / r: on average a random lora_A has that
                M = power(A @ H[name].double() @ A.T, -0.5) * (H[name].trace() / len(A)).sqrt()
            layer.lora_A.data = (M @ A).float()
            layer.lora_B.data = torch.linalg.solve(M, B, left=False).float()
        return rows

    def power(S, exponent):  # of a semidefinite S, (r, r)
        L, V = torch.linalg.eigh(S)
        return V * L.clamp(min=1e-8 * L[-1]) ** exponent @ V.T

    def slow_lora_A(trainer, model=None):
        lr, named = trainer.args.learning_rate, trainer.model.named_parameters()
        trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        rates = [lr / 16 if name.endswith("lora_A") else lr for name, _ in trained]
        groups = [{"params": [p], "lr": rate} for (_, p), rate in zip(trained, rates, strict=True)]
        trainer.optimizer = torch.optim.AdamW(groups, weight_decay=0)
        return trainer.optimizer

    def half(E, H, rank, steps):
        A, B = quailora.als_init(E, H, rank // 2, steps)
        more = rank - rank // 2
        A = torch.cat([A, A.new_zeros(len(A), more)], 1)
        return A, torch.cat([B, B.new_empty(len(B), more).normal_()], 1)

    def frozen_half(trainer, model=None):
        for layer in quailora.lora_layers(trainer.model).values():
            trained = torch.arange(layer.rank, device=layer.lora_A.device) >= layer.rank // 2
            layer.lora_A.register_hook(trained[:, None].mul)
            layer.lora_B.register_hook(trained.mul)
        return create(trainer)

    create, patch, stack = transformers.Trainer.create_optimizer, unittest.mock.patch, ExitStack()
    optimizers = {"plus": slow_lora_A, "half": frozen_half}
    if variant in optimizers:
        change = transformers.Trainer, "create_optimizer", optimizers[variant]
        stack.enter_context(patch.object(*change))
    if variant == "half":
        halved = quailora.Init(half, needs_data=True)
        stack.enter_context(patch.dict(quailora.INITS, quailora=halved))
    if variant in ("equal", "white"):
        stack.enter_context(patch.object(quailora, "apply_quailora", split_anew))
    return stack


def in_process(title: str, action, job: argparse.Namespace, **arguments) -> None:
    """action(job, **arguments) in a process of its own; where it fails, this one ends too."""
    call = functools.partial(action, **arguments)
    process = multiprocessing.get_context("spawn").Process(target=train.attempt, args=(call, job))
    process.start()
    process.join()
    if process.exitcode < 0:
        raise RuntimeError(f"{title} was killed by signal {-process.exitcode}; --resume goes on")
    if process.exitcode:  # it has said why
        sys.exit(process.exitcode)


def load(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["runs"][0]


def keep_start(out: Path, start: Path) -> None:
    """What a run left at step 0, for runs that differ in the rate alone to go on from."""
    result = load(out)
    for key in result.keys() & {"selection_perplexity", "merged_perplexity"}:
        del result[key]
    for key in result["seconds"].keys() - {"evaluate", "calibrate", "initialize"}:
        del result["seconds"][key]
    result["perplexity"] = result["perplexity"][:1]
    for name in ("start", "base"):
        if (out / name).exists():
            shutil.copytree(out / name, start / name, dirs_exist_ok=True)
    train.write_json(start / "results.json", {"runs": [result]})  # last: then it is complete


class Runs:
    """Those in --out. What is asked for and not there yet is run."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.file, self.done = args, args.out / "results.json", []
        self.defaults = train.settings(train.parse_args([]))  # of runs older than an option
        options = {key: getattr(args, key) for key in vars(train.parse_args([]))}
        self.options = options | {"resume": True, "overwrite": False}
        now = train.settings(argparse.Namespace(**options))
        self.common = {key: value for key, value in now.items() if key not in VARIED}
        if args.overwrite:
            for path in train.held(args.out):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.file.exists():
            with naming(f"{self.file} could not be read"):
                content = json.loads(self.file.read_text())
                found, self.done = content["common"], content["runs"]
            found = self.defaults | found
            for key, value in self.common.items():
                other = f"--out {args.out} holds runs with {key} {found[key]}, not {value}"
                require(found[key] == value, other)
        self.save()

    def save(self) -> None:
        self.args.out.mkdir(parents=True, exist_ok=True)
        train.write_json(self.file, {"common": self.common, "runs": self.done})

    def of(self, method: dict, seed: int = 0, **changes) -> dict:
        """The result of one run."""
        job = argparse.Namespace(**self.options | method | {"seed": seed} | changes)
        for result in self.done:
            if self.defaults | result["settings"] == train.settings(job):
                return result
        title = f"run {len(self.done) + 1}"
        name = "-".join(f"{key}-{getattr(job, key)}" for key in VARIED)
        print(f"\n=== {title}: {name}", flush=True)
        job.floor = job.init == "quailora"  # for layers.png
        file = self.calibration(job)
        job.out = self.args.out / "runs" / re.sub(r"[^\w.-]", "_", name)
        start = job.out.with_name(job.out.name.replace(f"lr-{job.lr}", "start"))  # of any rate
        if (start / "results.json").exists() and not job.out.exists():
            begun = start.with_name(f".{job.out.name}")  # moved when it is complete
            shutil.copytree(start, begun, dirs_exist_ok=True)
            result = load(start) | {"settings": train.settings(job)}
            train.write_json(begun / "results.json", {"runs": [result]})
            begun.rename(job.out)
        in_process(title, run, job, file=file)
        result = load(job.out)
        self.done.append(result)
        self.save()
        if self.args.sweep and not (start / "results.json").exists():
            keep_start(job.out, start)
        shutil.rmtree(job.out / "start")
        for folder in job.out.glob("checkpoint-*"):
            shutil.rmtree(folder)
        return result

    def calibration(self, job: argparse.Namespace) -> Path | None:
        """The file that calibrate() writes."""
        job.out = self.args.out / "runs" / "shared"
        data = re.sub(r"[^\w.-]", "_", job.calibration_data or job.data)
        file = job.out / f"H-{data}.pt"
        if job.sequential:
            return None
        if not file.exists():
            in_process("calibration", calibrate, job, file=file)
        return file

    def seeds(self, method: dict, **changes) -> list[dict]:
        return [self.of(method, seed, **changes) for seed in range(self.args.seeds)]


# -------------------------------------------------------------------------------------- tables


def row(title: str, cells: list) -> str:
    return f"| {' | '.join([title, *cells])} |"


def head(cells: list, title: str = "") -> list[str]:
    return [row(title, cells), "|---" * (len(cells) + 1) + "|"]


def mean_cell(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def gap_cell(base: list[float], ours: list[float], reference: list[float]) -> str:
    """Gap closed: (QLoRA's perplexity - ours) / (QLoRA's - the reference's), by means over the
    seeds that all three have."""
    seeds = min(len(values) for values in (base, ours, reference))
    if not seeds or ours is base:
        return ""
    base, ours, reference = (statistics.fmean(values[:seeds]) for values in (base, ours, reference))
    closed = (base - ours) / (base - reference) if base > reference else math.nan
    return "" if math.isnan(closed) else f"{closed:.0%}"


def comparison(methods: dict[str, list[dict]]) -> list[str]:
    """A Markdown table of means over seeds: QLoRA's first, the two references last."""
    base, *_, eight, full = methods
    curve = methods[base][0]["perplexity"]
    ends = [0] if len(curve) == 1 else [0, -1]
    merges = any("QA-LoRA" in title for title in methods)
    gaps = "gap closed to 8 bits | to full precision"
    columns = [f"step {curve[end][0]} | {gaps}" for end in ends]
    columns += ["merged into its bits"] * merges
    columns += ["seconds to calibrate + initialize", "peak MB"]
    lines = head(" | ".join(columns).split(" | "))
    for title, runs in methods.items():
        cells = []
        for end in ends:
            found = {t: [run["perplexity"][end][1] for run in methods[t]] for t in methods}
            cells.append(mean_cell(found[title]))
            cells += [gap_cell(found[base], found[title], found[to]) for to in (eight, full)]
        merged = [run["merged_perplexity"] for run in runs if "merged_perplexity" in run]
        cells += [mean_cell(merged) if merged else ""] * merges
        initialize = sum(layer["seconds"] for layer in runs[0]["layers"])
        cells.append(f"{runs[0]['seconds'].get('calibrate', 0):.0f} + {initialize:.0f}")
        cells.append(f"{max(run['peak_memory_mb'] for run in runs):,.0f}")
        lines.append(row(title, cells))
    return lines


def sweep(runs: Runs, methods: dict[str, dict]) -> dict[str, dict[float, list[dict]]]:
    """Title -> rate -> results by seed: with the first seed at all rates, with all at the best."""
    trials = {}
    for title, method in methods.items():
        trials[title] = {lr: [runs.of(method, lr=lr)] for lr in runs.args.sweep}
        best = best_rate(trials[title])
        trials[title][best] = runs.seeds(method, lr=best)
    return trials


def tuned_tables(trials: dict[str, dict[float, list[dict]]]) -> list[str]:
    """Of title -> rate -> results by seed: perplexities of the first seed by rate, and each method
    over its seeds at the rate that is best for the selection, if it has several rates."""
    rates = sorted({lr for by_rate in trials.values() for lr in by_rate})
    lines = ["\n### By learning rate, seed 0: validation / selection\n"]
    lines += head([f"{lr:g}" for lr in rates])
    best_of = {title: best_rate(by_rate) for title, by_rate in trials.items()}
    for title, by_rate in trials.items():
        best = best_of[title]
        cells = {}
        for lr, (first, *_) in by_rate.items():
            cells[lr] = " / ".join(f"{end:.3f}" for end in both_ends(first)[:2])
        cells[best] = f"**{cells[best]}**"
        lines.append(row(title, [cells.get(lr, "") for lr in rates]))

    if len(rates) < 2:
        return lines
    titles = "rate"
    for measure in ("validation", "selection", "geometric mean of both"):
        titles += f" | {measure} | gap closed to 8 bits"
    lines += ["\n### Each at its best rate\n", *head(titles.split(" | "))]
    ends = {title: [both_ends(run) for run in trials[title][lr]] for title, lr in best_of.items()}
    columns = {title: [*zip(*of, strict=True)] for title, of in ends.items()}  # by measure, seed
    base, eight = next(iter(trials)), INITS[8][0]
    for title, best in best_of.items():
        if len(trials[title]) == 1 and title not in (base, eight):
            continue  # not tuned
        cells = [f"{best:g}"]
        of_eight = columns.get(eight, [[]] * 3)
        for ours, of_base, reference in zip(columns[title], columns[base], of_eight, strict=True):
            cells += [mean_cell(ours), gap_cell(of_base, ours, reference)]
        lines.append(row(title, cells))
    return lines


def best_rate(by_rate: dict[float, list[dict]]) -> float:
    """The one that is best for the selection, with the first seed."""
    found = {lr: results[0]["selection_perplexity"] for lr, results in by_rate.items()}
    return min(found, key=lambda lr: math.inf if math.isnan(found[lr]) else found[lr])


def both_ends(result: dict) -> tuple[float, float, float]:
    """Perplexity on the validation and the selection after training, and their geometric mean."""
    validation, selection = result["perplexity"][-1][1], result["selection_perplexity"]
    return validation, selection, math.sqrt(validation) * math.sqrt(selection)


def report(args: argparse.Namespace) -> None:
    """Of the runs in a file of results, with the settings that most have, seeds 0, 1, ...: at the
    first rate that the references have, by rate, and each at its best."""
    file, defaults = args.report, train.settings(train.parse_args([]))
    with naming(f"{file} could not be read"):
        runs = json.loads(file.read_text())["runs"]
        for run in runs:
            run["settings"] = defaults | run["settings"]
            both_ends(run)
        low = [run["settings"] for run in runs if run["settings"]["bits"] <= 4]
        require(low, "no runs in 4 bits or fewer")
    most = {}
    for key in ("rank", "steps", "calibration_data", "bits"):
        most[key] = statistics.mode(settings[key] for settings in low)
    named = methods_of(argparse.Namespace(methods=NAMES, method="lora", bits=most["bits"]))
    trials = {}
    for title, method in named.items():
        wanted = most | method
        for run in sorted(runs, key=lambda run: run["settings"]["seed"]):
            lr, seed = run["settings"]["lr"], run["settings"]["seed"]
            found = trials.get(title, {}).get(lr, [])
            if wanted.items() <= run["settings"].items() and seed == len(found):
                trials.setdefault(title, {})[lr] = [*found, run]
    references = [set(trials.get(INITS[bits][0], [])) for bits in (8, 16)]
    for lr in sorted(set.intersection(*references))[:1]:
        print(f"### {file}: learning rate {lr:g}\n")
        at_rate = {title: of[lr] for title, of in trials.items() if lr in of}
        print(*comparison(at_rate), sep="\n")
    print(*tuned_tables(trials), sep="\n")


def calibrations_table(runs: Runs) -> list[str]:
    """QuAILoRA calibrated on other data."""
    args, ours = runs.args, {"init": "quailora", "bits": runs.args.bits}
    lines = [f"\n### QuAILoRA fine-tuned on {args.data}\n"]
    lines += head(["step 0", f"step {args.steps}"], "calibrated on")
    for data in [args.calibration_data, *args.calibrations]:
        curve = runs.of(ours, calibration_data=data)["perplexity"]
        cells = [f"{perplexity:.3f}" for _, perplexity in (curve[0], curve[-1])]
        lines.append(row(data or "the same", cells))
    return lines


def by_rank(runs: Runs, methods: dict[str, dict]) -> dict[tuple, dict]:
    """(title, step) -> rank -> perplexity, at step 0 and for some ranks after fine-tuning."""
    ranks, values = runs.args.ranks, {}
    trained = {ranks[0], ranks[len(ranks) // 2], ranks[-1], runs.args.rank}
    for title, method in methods.items():
        for rank in ranks if method["bits"] == runs.args.bits else ():
            changes = {"rank": rank} if rank in trained else {"rank": rank, "steps": 0}
            if rank not in trained and method["init"] in ZERO:
                changes = {}  # at step 0 there is no adapter, so one rank is as another
            curve = runs.of(method, **changes)["perplexity"]
            for step, value in (curve[0], curve[-1]) if rank in trained else curve[:1]:
                values.setdefault((title, step), {})[rank] = value
    return values


def ranks_table(values: dict[tuple, dict], ranks: list[int]) -> list[str]:
    lines = ["\n### By rank\n", *head([str(rank) for rank in ranks])]
    for (title, step), found in values.items():
        cells = [f"{found[rank]:.3f}" if rank in found else "" for rank in ranks]
        lines.append(row(f"{title}, step {step}", cells))
    return lines


# ------------------------------------------------------------------------------------- figures


def style_of(method: dict) -> dict:
    _, *style = INITS[method["bits"] if method["bits"] > 4 else method["init"]]
    style = dict(zip(("color", "marker", "linestyle"), style, strict=True))
    if method["method"] == "qa-lora":
        style |= {"marker": "h", "linestyle": (0, (4, 1, 1, 1))}
    return style


def save_figure(figure, axes, file: Path, x: str, y: str = "validation perplexity") -> None:
    axes.set(xlabel=x, ylabel=y)
    crowded = len(axes.lines) >= 8
    figure.legend(loc="outside right upper") if crowded else axes.legend()
    figure.savefig(file)


def figures(runs: Runs, methods: dict[str, dict], ranks: dict[tuple, dict]) -> None:
    """perplexity.png, layers.png and, with --ranks, rank.png."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({
        "figure.figsize": (6.4, 4), "figure.dpi": 150, "figure.constrained_layout.use": True,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    })  # fmt: skip
    args = runs.args
    figure, axes = plt.subplots()
    for title, method in methods.items():
        curves = [run["perplexity"] for run in runs.seeds(method)]
        means = [statistics.fmean(p for _, p in points) for points in zip(*curves, strict=True)]
        axes.plot([step for step, _ in curves[0]], means, label=title, **style_of(method))
    x = f"steps of {args.batch_size * args.accumulation * args.sequence_length:,} tokens"
    save_figure(figure, axes, args.out / "perplexity.png", x)

    figure, axes = plt.subplots(figsize=(4.8, 4.4))
    for title, method in methods.items():
        ours = method | {"init": "quailora"}  # whose run knows the floors
        if method["init"] in ZERO or ours not in methods.values():
            continue
        rows = zip(runs.of(ours)["layers"], runs.of(method)["layers"], strict=True)
        rows = [(a, b) for a, b in rows if a.get("floor") and b["calibrated"]]
        pairs = [(a["floor"], b["initialized"]) for a, b in rows]
        if pairs:
            style = style_of(method) | dict(linestyle="", markersize=3, alpha=0.7)
            axes.plot(*zip(*pairs, strict=True), label=title, **style)
    axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8, label="the least for the nearest Q")
    x = "least possible error of a layer / plain quantization's"
    save_figure(figure, axes, args.out / "layers.png", x, "error / plain quantization's")

    if ranks:
        figure, axes = plt.subplots()
        for (title, step), found in ranks.items():
            style = style_of(methods[title]) | {"linestyle": "-" if step else "--"}
            axes.plot(list(found), list(found.values()), label=f"{title}, step {step}", **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(args.ranks, [str(rank) for rank in args.ranks])
        save_figure(figure, axes, args.out / "rank.png", "rank r of the adapter")


def compare(args: argparse.Namespace) -> None:
    check_options(args)
    runs, methods = Runs(args), methods_of(args)
    for seed in range(args.seeds):  # all methods with one seed before the next one
        for method in methods.values():
            runs.of(method, seed)
    lines = [f"### {args.model}, {args.data}: learning rate {args.lr:g}\n"]
    lines += comparison({title: runs.seeds(method) for title, method in methods.items()})
    lines += tuned_tables(sweep(runs, methods)) if args.sweep else []
    lines += calibrations_table(runs) if args.calibrations else []
    ranks = by_rank(runs, methods) if args.ranks else {}
    lines += ranks_table(ranks, args.ranks) if args.ranks else []
    figures(runs, methods, ranks)
    print("", *lines, f"\nresults and figures: {args.out}", sep="\n")


def main(argv=None) -> None:
    args = parse_args(argv)
    train.attempt(report if args.report else compare, args)


if __name__ == "__main__":
    main()
