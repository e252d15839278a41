# SPDX-License-Identifier: MIT
"""initialize_peft on SmolLM2-135M in NF4: validation perplexity, in the setting of train.py, with
the H of the rounded model, as initialize_peft gathers it, and with the H of the model in full
precision (the paper).

    python assets/in_place.py [DATA ...]        DATA as for train.py; 5 minutes each on 2 cores
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import train  # noqa: E402

full, tokenizer = train.load_model("smollm2-135m")

import torch  # noqa: E402
from benchmark import peft_model  # noqa: E402

import quailora  # noqa: E402
from quailora import initialize_peft, input_correlations  # noqa: E402


@torch.no_grad()
def perplexity(model, sequences) -> float:
    model.eval()
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in sequences.split(4)]
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def first_pass(model, batches) -> dict:
    """H of the rounded model."""
    model = model.get_base_model()
    modules = {name: layer.module for name, layer in quailora._peft_layers(model).items()}
    with quailora._calibrating(model, adapters_on=False) as stack:
        return quailora._correlations(modules, quailora._Walk(model.base_model, batches, stack))


def main() -> None:
    print("| | full precision | NF4 | H of NF4 | initialize_peft | H of full precision |")
    print("|---|---|---|---|---|---|")
    for data in sys.argv[1:] or ["python"]:
        args = train.parse_args(["--data", data])
        calibration, _, _, validation = train.sequences(args, tokenizer, full)
        batches = calibration.split(4)
        model = peft_model()
        row = [perplexity(full, validation), perplexity(model, validation)]
        starts = dict(H=first_pass(model, batches)), {}, dict(H=input_correlations(full, batches))
        for given in starts:
            initialize_peft(model, batches, **given)
            row.append(perplexity(model, validation))
        print(f"| {Path(data).name} |", " | ".join(f"{x:.3f}" for x in row), "|", flush=True)


if __name__ == "__main__":
    main()
