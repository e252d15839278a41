# SPDX-License-Identifier: MIT
"""Fine-tuned runs of train.py as files for llama.cpp: perplexity there and in transformers, size.

    python train.py --method qa-lora --bits 4 --out runs/int4       and other runs on SmolLM2-135M
    python assets/llama_cpp.py runs/int4 runs/int3 runs/qlora       2 minutes each on 2 cores

A run of QA-LoRA has left merged/model.gguf. A LoRA adapter is merged in full precision, and the sum
rounded to Q4_1, as a user does today. Needs xllamacpp, which holds llama.cpp.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import xllamacpp  # noqa: E402
from in_place import full, perplexity, tokenizer  # noqa: E402

import quailora  # noqa: E402
import train  # noqa: E402


def written(args) -> Path:
    """The GGUF of a run; that of a LoRA adapter is made here."""
    file = args.out / "merged/model.gguf"
    if args.method == "lora":
        model, _ = train.load_model(args.model)
        train.load_adapter(model, args.out / "adapter")
        quailora.merge(model)
        quailora.apply_quailora(model, None, rank=1, bits=4, init="qlora", group_size=32)
        file.parent.mkdir(exist_ok=True)
        quailora.save_gguf(quailora.merge(model), train.smollm2() / "gguf/model.gguf", file)
    return file


def in_llama_cpp(file: Path, sequences) -> float:
    """llama.cpp's server only samples: each next token is made certain, its log-probability (of the
    model, without that) is read."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(file), 512, 1, False
    server, total, count = xllamacpp.Server(params), 0.0, 0
    for ids in sequences.tolist():
        for i in range(1, len(ids)):
            answer = server.handle_completions(
                {"prompt": [ids[:i]], "n_predict": 1, "n_probs": 1, "logit_bias": [[ids[i], 1e4]],
                 "temperature": 0, "samplers": ["temperature"], "cache_prompt": True}
            )  # fmt: skip
            token = answer["choices"][0]["logprobs"]["content"][0]
            assert token["id"] == ids[i]
            total, count = total - token["logprob"], count + 1
    return math.exp(total / count)


def main() -> None:
    own = train.smollm2() / "gguf/model.gguf"
    print("| | bits | fine-tuned | merged, in transformers | in llama.cpp | bytes |")
    print("|---|---|---|---|---|---|")
    for folder in [None, *sys.argv[1:]]:
        args, tuned, file, name = train.parse_args([]), "", own, "SmolLM2's own file"
        if folder:
            result = json.loads(Path(folder, "results.json").read_text())["runs"][0]
            args = argparse.Namespace(**result["settings"], out=Path(folder))
            file, name = written(args), f"{args.method}, {args.init}"
            tuned = f"{result['perplexity'][-1][1]:.3f}"
        *_, validation = train.sequences(args, tokenizer, full)
        model, _ = train.load_model(str(file))
        found = f"{perplexity(model, validation):.3f} | {in_llama_cpp(file, validation):.3f}"
        print(f"| {name} | {args.bits} | {tuned} | {found} | {file.stat().st_size:,} |", flush=True)


if __name__ == "__main__":
    main()
