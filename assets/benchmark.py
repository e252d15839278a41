# SPDX-License-Identifier: MIT
"""What QuAILoRA costs, beside what else the same machine does in the same run.

    python assets/benchmark.py                          SmolLM2-135M: 5 minutes on 2 cores
    python assets/benchmark.py 4096x4096 11008x4096     layers of these shapes, OUTxIN, H given
    python assets/benchmark.py --memory                 whole models, all H at once and by blocks
    python assets/benchmark.py --device cuda            a LLaMA of 7B with random weights, on a GPU

The pace of the machine is that of two large products, E H, and E E^T or E^T E, in float32. LoftQ
is one round of init="svd", which is rounding and a full SVD: its seconds times LoftQ's five
rounds, its memory and error as they are. Memory is read from Linux. Nothing here is a test.
"""

import argparse
import gc
import json
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import quailora  # noqa: E402
import train  # noqa: E402
from quailora import LoRALinear, QuantizedWeight  # noqa: E402

RANK, STEPS, CPU = 64, 20, torch.device("cpu")
SQUARE, TALL, WIDE = (4096, 4096), (11008, 4096), (4096, 11008)  # the layers of LLaMA 7B
LLAMA = {  # blocks, width, width of the MLP, rows of k and v
    "7B": (32, 4096, 11008, 4096),
    "13B": (40, 5120, 13824, 5120),
    "70B": (80, 8192, 28672, 1024),
}

# ------------------------------------------------------------------------ clock, memory, tables


def seconds_of(call, *arguments) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def resident_mb(key="VmRSS") -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) / 1024


def peak_mb(call, *arguments, **options):
    """What `call` takes at its peak beyond what is held before, and what it returns."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    before = resident_mb()
    result = call(*arguments, **options)
    return resident_mb("VmHWM") - before, result


def in_new_process(measure, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # where no memory is left over
        return pool.apply(measure, arguments)


def beside(measured: str, value: float, other="", its="") -> dict:
    ratio = value / its if other else ""
    return {"measured": measured, "value": value, "beside": other, "its": its, "ratio": ratio}


def show(rows, needs=()) -> list[dict]:
    """Print rows, dicts with the same keys, as a table, each as soon as it is measured."""
    if missing := [package for package in needs if not find_spec(package)]:
        print(f"\nskipped, for want of {', '.join(missing)}: {rows.__name__}")
        return []
    shown = []
    for row in rows:
        if not shown:
            print("", f"| {' | '.join(row)} |", "|---" * len(row) + "|", sep="\n")
        cells = [x if isinstance(x, str) else f"{x:.5g}" for x in row.values()]
        print(f"| {' | '.join(cells)} |", flush=True)
        shown.append(row)
    return shown


# -------------------------------------------------------------------------------- SmolLM2-135M

PEFT = "peft + bitsandbytes"
ALONE = "ours, on torch alone"


def load_smollm2(**options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(train.smollm2(), dtype=torch.float32, **options)


def peft_model(load=load_smollm2, **more):
    """That of a QLoRA user: loaded by transformers, rounded by bitsandbytes, adapted by peft."""
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    nf4 = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **more)
    model = load(quantization_config=BitsAndBytesConfig(load_in_4bit=True, **nf4))
    for module in model.modules():
        if isinstance(module, Linear4bit):  # its bfloat16 products for CPUs cannot be trained
            module.support_avx512bf16_for_cpu = False
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear"))


def training_step(kind: str):
    """A step of AdamW on 4 x 128 tokens, an adapter on every layer of the body, as a function."""
    model = peft_model() if kind == PEFT else load_smollm2()
    if kind != PEFT:
        quailora.apply_quailora(model, None, RANK, init="qlora")
    model.train()
    ids = torch.randint(49152, (4, 128), generator=torch.manual_seed(0))
    kernels = None if kind == ALONE else QuantizedWeight.kernels

    return step_of(model, ids, lambda: mock.patch.object(QuantizedWeight, "kernels", kernels))


def step_of(model, ids, context):
    """A step of AdamW, its forward and backward pass in context()."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)

    def step():
        with context():
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_memory(kind: str) -> float:
    step = training_step(kind)
    peak_mb(lambda: (step(), step()))
    return resident_mb("VmHWM")


def step_costs():
    kinds = (PEFT, "ours", ALONE)
    steps = {kind: training_step(kind) for kind in kinds}
    turns = [{kind: seconds_of(steps[kind]) for kind in kinds} for _ in range(8)]
    seconds = {kind: median(turn[kind] for turn in turns[1:]) for kind in kinds}  # 0: warm-up
    memory = {kind: in_new_process(step_memory, kind) for kind in kinds}
    for kind in kinds:
        row = {"a training step, 4 x 128 tokens": kind, "seconds": seconds[kind]}
        row |= {"over peft's": seconds[kind] / seconds[PEFT], "peak MB": memory[kind]}
        yield row | {"over peft's MB": memory[kind] / memory[PEFT]}


def model_costs():
    model = load_smollm2().eval()
    batches = torch.randint(49152, (16, 256), generator=torch.manual_seed(0)).split(4)
    H = quailora.input_correlations(model, batches)
    yield calibration_cost(model, batches, H)
    yield from start_costs(model, H)
    title = "apply_quailora on a block of LLaMA 7B: peak MB beyond model and H"
    largest = 4 * TALL[0] * TALL[1] / 2**20
    yield beside(title, in_new_process(block_memory), "its largest layer", largest)
    usage = [sys.executable, train.__file__, "--help"]
    yield beside("train.py --help: seconds", seconds_of(subprocess.check_output, usage))
    yield beside("train.py to its first progress bar: seconds", seconds_of(first_bar))


def calibration_cost(model, batches, H) -> dict:
    sizes = {id(M): len(M) for M in H.values()}.values()  # layers share some
    X = {n: torch.randn(n, batches[0].numel()) for n in set(sizes)}

    @torch.no_grad()
    def needed():
        for batch in batches:
            model.base_model(batch)
            for n in sizes:
                X[n] @ X[n].T

    times = []
    for _ in range(3):
        ours = seconds_of(quailora.input_correlations, model, batches)
        times.append((ours, seconds_of(needed)))
    ours, least = map(median, zip(*times, strict=True))
    other = f"a forward pass without the head, and X X^T of {len(sizes)} inputs"
    return beside("calibration, 16 x 256 tokens: seconds", ours, other, least)


def two_products(W, H):
    return W @ H, W @ W.T if len(W) < len(H) else W.T @ W


def start_costs(model, H: dict):
    layers = quailora.linear_layers(model)
    products = ours = loftq = worst = 0.0
    for name, layer in layers.items():
        products += seconds_of(two_products, layer.weight.detach(), H[name])
        report = LoRALinear.from_linear(layer, H[name], RANK, floor=True).report
        ours += report["seconds"]
        worst = max(worst, (report["initialized"] / report["floor"]) ** 2)
        loftq += 5 * LoRALinear.from_linear(layer, None, RANK, init="svd").report["seconds"]
    title = f"a start of {len(layers)} layers, H given: seconds"
    yield beside(title, ours, "two large products for each", products)
    yield beside(title, ours, "LoftQ", loftq)
    yield beside("error (1) over the floor, in the worst layer", worst)


def block_memory() -> float:
    shapes = [SQUARE] * 4 + [TALL] * 2 + [WIDE]
    block = nn.Sequential(*(nn.Linear(n, out, bias=False) for out, n in shapes))
    H = {name: correlations(layer.in_features) for name, layer in block.named_children()}
    return peak_mb(quailora.apply_quailora, block, None, RANK, H=H)[0]


def first_bar() -> None:
    command = [sys.executable, train.__file__, "--steps", "0", "--out", "/dev/null/none"]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:
        shown = any(b"%|" in text for text in iter(process.stderr.read1, b""))
        process.kill()  # before it writes
    assert shown, command


# --------------------------------------------------------------- layers of any shape, and LLaMA


@cache
def correlations(n: int):
    """H, (n, n), of random inputs with a decaying spectrum and three outlier features."""
    generator = torch.manual_seed(0)
    decay = torch.linspace(0, -4, n).exp()[torch.randperm(n, generator=generator), None]
    X = torch.randn(n, n, generator=generator) * decay
    X[:3] *= 100
    return X @ X.T


def layer_costs(shapes: list, floor: bool, device=CPU):
    LoRALinear.from_linear(nn.Linear(64, 64, device=device), rank=1)  # starts the threads
    for out, n in shapes:
        H, linear = correlations(n).to(device), nn.Linear(n, out, bias=False, device=device)
        two_products(linear.weight.detach(), H)  # warm-up
        products, _, _ = measured_on(device, two_products, linear.weight.detach(), H)
        rows = []
        for method, init, rounds in ("QuAILoRA", "quailora", 1), ("LoftQ", "svd", 5):
            start = LoRALinear.from_linear
            _, peak, layer = measured_on(device, start, linear, H, RANK, init=init)
            peak *= 1e9 / 2**20
            seconds, left = rounds * layer.report["seconds"], layer.report["initialized"]
            row = {"layer": f"{out}x{n}", "method": method, "seconds": seconds}
            row |= {"over two products": seconds / products, "peak extra MB": peak}
            rows.append(row | {"left of the rounding error": left})
        if floor:
            least = LoRALinear.from_linear(linear, H, RANK, init="exact").report["initialized"]
            for row in rows:
                row["error (1) over the floor"] = (row["left of the rounding error"] / least) ** 2
        yield from rows


def llama_costs(rows: list[dict]):
    """Each layer scaled from that of its form in 7B, by the products of 20 times (5) and (6): one
    E H, or each time H B, and two with E. LoftQ's by its SVD."""
    arithmetic = {
        "QuAILoRA": lambda out, n: min(out, STEPS * RANK) * n * n + 2 * STEPS * RANK * out * n,
        "LoftQ": lambda out, n: out * n * min(out, n),
    }
    for model, (blocks, width, hidden, kv) in LLAMA.items():
        block = [(SQUARE, (width, width))] * 2 + [(SQUARE, (kv, width))] * 2
        block += [(TALL, (hidden, width))] * 2 + [(WIDE, (width, hidden))]
        minutes = {}
        for method, count in arithmetic.items():
            known = {row["layer"]: row["seconds"] for row in rows if row["method"] == method}
            scaled = [known["{}x{}".format(*a)] * count(*b) / count(*a) for a, b in block]
            minutes[method] = blocks * sum(scaled) / 60
        yield {"minutes for all layers of LLaMA": model, **minutes}


# ------------------------------------------------- a LLaMA with random weights, on any device


def synchronized(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measured_on(device, call, *arguments, **options):
    """Seconds, peak GB beyond what is held before (of a GPU's memory), and what `call` returns."""

    def timed():
        began = synchronized(device)
        result = call(*arguments, **options)
        return synchronized(device) - began, result

    if device.type != "cuda":
        peak, (seconds, result) = peak_mb(timed)
        return seconds, peak * 2**20 / 1e9, result
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds, result = timed()
    return seconds, (torch.cuda.max_memory_allocated() - before) / 1e9, result


def random_llama(device, blocks, width, hidden, dtype=torch.bfloat16):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(num_hidden_layers=blocks, hidden_size=width, intermediate_size=hidden)
    heads = max(1, width // 128)
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def random_tokens(device, count, length=512, vocabulary=32000):
    return torch.randint(vocabulary, (count, length), generator=torch.manual_seed(0)).to(device)


def device_equals_cpu(device):
    """What each init makes of a small model here and on the CPU."""
    batches = random_tokens(CPU, 4, 64).split(2)
    for init in quailora.INITS:
        weights = []
        for where in (CPU, device):
            model = random_llama(CPU, 2, 128, 256, torch.float32).to(where)
            torch.manual_seed(0)
            quailora.apply_quailora(model, batches, 16, init=init)
            layers = quailora.lora_layers(model).values()
            weights.append([layer.merged_weight().cpu() for layer in layers])
        apart = [(a - b).norm() / a.norm() for a, b in zip(*weights, strict=True)]
        yield {"merged weight here and on the CPU": init, "apart, worst layer": max(apart).item()}


def codes_equal_bitsandbytes(device):
    import bitsandbytes

    W = torch.randn(4096, 4096, generator=torch.manual_seed(0)).to(device)
    codes, _ = bitsandbytes.functional.quantize_4bit(W, quant_type="nf4", blocksize=64)
    same = (quailora.quantize(W).codes.view(-1) == codes.view(-1)).double().mean().item()
    yield {"NF4 codes of 4096 x 4096 that equal bitsandbytes'": same}


def device_calibration(device, size, tokens):
    """A pass over random tokens, and the same without H."""
    model, batches = random_llama(device, *size), random_tokens(device, *tokens).split(4)

    @torch.no_grad()
    def alone():
        for batch in batches:
            model.base_model(batch)

    alone()
    least, _, _ = measured_on(device, alone)
    layers = quailora.linear_layers(model)
    quailora.input_correlations(model, batches[:1], skip=[*layers][1:])  # warm-up
    seconds, _, _ = measured_on(device, quailora.input_correlations, model, batches)
    count = batches[0].shape[1] * 4 * len(batches)
    yield {
        "calibration": f"{count:,} tokens", "tokens/s": count / seconds,
        "tokens/s without H": count / least, "share of H": 1 - least / seconds,
    }  # fmt: skip


def device_start(device, size, tokens):
    """The whole of apply_quailora, and of initialize_peft on a model in NF4."""
    batches = random_tokens(device, *tokens).split(4)
    model = random_llama(device, *size)
    held = sum(p.nbytes for p in model.parameters()) / 1e9
    yield whole_start_row(device, quailora.apply_quailora, model, batches, held)
    del model
    if missing := [name for name in ("bitsandbytes", "peft") if not find_spec(name)]:
        print(f"skipped, for want of {', '.join(missing)}: initialize_peft")
        return
    with tempfile.TemporaryDirectory() as folder:
        random_llama(device, *size).save_pretrained(folder)
        model = adapted(folder, device)
        held = torch.cuda.memory_allocated() / 1e9 if device.type == "cuda" else math.nan
        yield whole_start_row(device, quailora.initialize_peft, model, batches, held)


def whole_start_row(device, start, model, batches, held: float) -> dict:
    seconds, peak, rows = measured_on(device, start, model, batches)
    row = {"a start of the whole model": start.__name__, "model, GB": held, "seconds": seconds}
    started = sum(row["seconds"] for row in rows)
    return row | {"of these layers": started, "peak GB beyond": peak}


def adapted(folder, device):
    from transformers import AutoModelForCausalLM

    load, dtype = AutoModelForCausalLM.from_pretrained, torch.bfloat16
    load = partial(load, folder, dtype=dtype, device_map={"": device})
    return peft_model(load, bnb_4bit_compute_dtype=dtype)


def device_step(device, size, tokens):
    """A training step, gradient checkpointing off, beside peft and bitsandbytes."""
    ids, kinds = random_tokens(device, *tokens), ("ours", PEFT)
    with tempfile.TemporaryDirectory() as folder:
        random_llama(device, *size).save_pretrained(folder)
        for kind in kinds:
            if kind == "ours":
                model = random_llama(device, *size)
                quailora.apply_quailora(model, None, RANK, init="qlora")
            elif find_spec("bitsandbytes") and find_spec("peft"):
                model = adapted(folder, device)
            else:
                print(f"skipped, for want of bitsandbytes or peft: {kind}")
                return
            in_16_bits = partial(torch.autocast, device.type, torch.bfloat16)
            step = step_of(model.train(), ids, in_16_bits)
            step()
            turns = [measured_on(device, step)[:2] for _ in range(3)]
            seconds, peak = (median(column) for column in zip(*turns, strict=True))
            row = {f"a training step, {tokens[0]} x {tokens[1]}": kind, "seconds": seconds}
            yield row | {"peak GB beyond the model": peak}
            del model, step


def device_costs(device) -> dict:
    """The whole of --device: 7B on a GPU, small shapes on a CPU."""
    gpu = device.type == "cuda"
    size = (32, 4096, 11008) if gpu else (2, 256, 512)
    shapes = [SQUARE, TALL, WIDE] if gpu else [(256, 256), (512, 256), (256, 512)]
    name = torch.cuda.get_device_name(device) if gpu else "small shapes, to try the script"
    print(name)
    results = {"device": name, "torch": torch.__version__}
    results["equal"] = show(device_equals_cpu(device))
    results["codes"] = show(codes_equal_bitsandbytes(device), needs=["bitsandbytes"])
    results["layers"] = show(layer_costs(shapes, False, device))
    if gpu:
        results["LLaMA"] = show(llama_costs(results["layers"]))
    results["calibration"] = show(device_calibration(device, size, (32 if gpu else 8,)))
    results["start"] = show(device_start(device, size, (32 if gpu else 8,)))
    results["step"] = show(device_step(device, size, (4, 512 if gpu else 64)))
    return results


# ------------------------------------------------------------------------------ whole models

WAYS = ("all H at once", "by blocks", "by blocks, from disk", "sequential, from disk")
WAYS += ("initialize_peft",)


def start_whole(way: str, folder: str, tokens: tuple[int, int], vocabulary: int) -> dict:
    """Seconds of a start, and the most memory it held beyond the libraries, with the model."""
    from transformers import AutoModelForCausalLM

    batches = random_tokens(CPU, *tokens, vocabulary).split(2)
    options = {"device_map": {"": "disk"}} if "disk" in way else {}
    load = partial(AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32, **options)

    def start():
        model = peft_model(load) if way == "initialize_peft" else load()
        if way == "initialize_peft":
            quailora.initialize_peft(model, batches)
        elif way == "all H at once":
            H = quailora.input_correlations(model, batches)
            quailora.apply_quailora(model, None, RANK, H=H)
        elif "sequential" in way:
            quailora.apply_sequentially(model, batches, RANK)
        else:
            quailora.apply_quailora(model, batches, RANK)

    peak, seconds = peak_mb(seconds_of, start)
    return {"a start": way, "seconds": seconds, "peak MB": peak}


def memory_costs():
    """SmolLM2, and a LLaMA of random weights, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        random_llama(CPU, 22, 2048, 5632, torch.float32).save_pretrained(folder)
        models = ("SmolLM2-135M", train.smollm2(), (16, 256), 49152), (
            "LLaMA of 1.26 billion weights", folder, (4, 256), 32000,
        )  # fmt: skip
        for name, *model in models:
            for way in WAYS:
                yield {"model": name, **in_new_process(start_whole, way, *model)}


def shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x", 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description="What QuAILoRA costs, as ratios.")
    add = parser.add_argument
    add("shapes", nargs="*", type=shape, metavar="OUTxIN", help="layers; default: SmolLM2-135M")
    add("--memory", action="store_true", help="of whole models, started by blocks, from disk, ...")
    add("--floor", action="store_true", help="of layers also the least possible error: slow")
    add("--device", type=torch.device, help="cuda: a LLaMA of 7B; cpu: the same on small shapes")
    add("--out", type=Path, metavar="FILE", help="the numbers as JSON too")
    args = parser.parse_args()
    machine = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(machine)
    results = {"machine": machine}
    if args.device:
        results |= device_costs(args.device)
    elif args.memory:
        results["memory"] = show(memory_costs(), needs=["gguf", "peft", "bitsandbytes"])
    elif args.shapes:
        results["layers"] = show(layer_costs(args.shapes, args.floor))
        if {SQUARE, TALL, WIDE} <= set(args.shapes):
            results["LLaMA"] = show(llama_costs(results["layers"]))
    else:
        results["step"] = show(step_costs(), needs=["gguf", "peft", "bitsandbytes"])
        results["model"] = show(model_costs(), needs=["gguf"])
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
