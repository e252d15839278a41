# SPDX-License-Identifier: MIT
"""initialize_peft on SmolLM2-135M in NF4, with H of the rounded model, as it gathers it, and of the
model in full precision, as in the paper. Validation perplexity, in the setting of train.py.

    python assets/in_place.py [DATA ...]        DATA as for train.py; 3 minutes each on 2 cores
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import train  # noqa: E402

full, tokenizer = train.load_model("smollm2-135m")

import torch  # noqa: E402
from benchmark import peft_model  # noqa: E402

from quailora import initialize_peft, input_correlations  # noqa: E402


@torch.no_grad()
def perplexity(model, sequences) -> float:
    model.eval()
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in sequences.split(4)]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    print("| | full precision | NF4 | started, H of the rounded model | H of full precision |")
    print("|---|---|---|---|---|")
    for data in sys.argv[1:] or ["python"]:
        args = train.parse_args(["--data", data])
        calibration, _, _, validation = train.sequences(args, tokenizer, full)
        batches = calibration.split(4)
        model = peft_model()
        row = [perplexity(full, validation), perplexity(model, validation)]
        initialize_peft(model, batches)
        row.append(perplexity(model, validation))
        initialize_peft(model, None, H=input_correlations(full, batches))
        row.append(perplexity(model, validation))
        print(f"| {Path(data).name} |", " | ".join(f"{x:.3f}" for x in row), "|", flush=True)


if __name__ == "__main__":
    main()
