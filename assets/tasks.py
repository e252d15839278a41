# SPDX-License-Identifier: MIT
"""Accuracy on questions with choices, of a model and of runs of train.py on it.

    python assets/tasks.py piqa.jsonl arc_easy.jsonl --out tasks.json \\
      QLoRA=runs/qlora/start QuAILoRA=runs/mine/start tuned=runs/mine/adapter

A line of a file is {"context": ..., "choices": [...], "answer": index}. A run is the folder that
save_adapter wrote, with base/ beside it if it has a base of its own. Flips are counted from the
reference, and gaps are closed from the first other run to it: the model in full precision, or a
run. Scored as lm-eval does, by a choice's log-likelihood after the context. --out keeps these, to
be computed once.
"""

import argparse
import json
import sys
import zlib
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import train  # noqa: E402

FULL = "full precision"
MEASURES = ("accuracy", "normalized", "log-probability", "flips")


def parse_args(argv=None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    # fmt: off
    add = parser.add_argument
    add("given", nargs="+", metavar="FILE or NAME=FOLDER", help="questions, and adapters")
    add("--model", default="smollm2-135m", help="as for train.py; default: %(default)s")
    add("--out", type=Path, default=Path("tasks.json"), help="default: %(default)s")
    add("--limit", type=int, help="the first so many questions of each file; default: all")
    add("--reference", default=FULL, metavar="NAME", help="default: %(default)s, not trained")
    # fmt: on
    args = parser.parse_intermixed_args(argv)
    args.runs = dict(given.split("=", 1) for given in args.given if "=" in given)
    args.files = [Path(given) for given in args.given if "=" not in given]
    return args


def read_questions(file: Path, limit: int | None) -> list[dict]:
    with train.naming(f"{file}"):
        lines = [line for line in file.read_text("utf-8").split("\n") if line.strip()]
        questions = [json.loads(line) for line in lines[:limit]]
        train.require(questions, "no questions")
        for i, q in enumerate(questions, 1):
            whole = q["context"] and all(q["choices"]) and 0 <= q["answer"] < len(q["choices"])
            train.require(whole, f"question {i} lacks a context, a choice, or the answer's")
    return questions


def encoded(tokenizer, context: str, choice: str) -> tuple[list[int], int]:
    """Tokens of both, and how many of them are the choice's."""
    both = tokenizer(f"{context} {choice}", add_special_tokens=False).input_ids
    return both, len(both) - len(tokenizer(context, add_special_tokens=False).input_ids)


def log_likelihoods(model, tokenizer, questions: list[dict], tokens=512) -> list[list[float]]:
    """Of each choice of each question, in batches of about so many tokens."""
    import torch

    model.eval()
    device = next(model.parameters()).device
    pairs = [(i, c) for i, q in enumerate(questions) for c in range(len(q["choices"]))]
    texts = {(i, c): (questions[i]["context"], questions[i]["choices"][c]) for i, c in pairs}
    rows = {pair: encoded(tokenizer, *text) for pair, text in texts.items()}
    found = [[0.0] * len(q["choices"]) for q in questions]
    left = sorted(pairs, key=lambda pair: len(rows[pair][0]))
    with torch.no_grad(), tqdm(total=len(pairs)) as bar:
        while left:
            longest = len(rows[left[-1]][0])
            batch = [left.pop() for _ in range(min(len(left), max(1, tokens // longest)))]
            ids = [torch.tensor(rows[pair][0]) for pair in batch]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
            logits = model(input_ids=padded, use_cache=False).logits
            for pair, x, own in zip(batch, logits, ids, strict=True):
                choice = own[-rows[pair][1] :].to(device)  # read at the position before each
                x = x[len(own) - len(choice) - 1 : len(own) - 1].float()
                likelihood = x.log_softmax(-1).gather(1, choice[:, None]).sum()
                found[pair[0]][pair[1]] = likelihood.item()
            bar.update(len(batch))
    return found


def measured(scores: list, reference: list, questions: list[dict]) -> np.ndarray:
    """(questions, MEASURES): whether the likeliest choice is right, the same by the likelihood per
    character, the log-probability of the right one among the choices, and whether the likeliest
    differs from the reference's."""
    rows = []
    for ours, theirs, question in zip(scores, reference, questions, strict=True):
        answer, ours = question["answer"], np.array(ours)
        lengths = [len(choice) for choice in question["choices"]]
        right = [ours.argmax() == answer, (ours / lengths).argmax() == answer]
        log_probability = ours[answer] - np.logaddexp.reduce(ours)
        rows.append([*right, log_probability, ours.argmax() != np.argmax(theirs)])
    return np.array(rows, dtype=float)


def table(found: dict[str, np.ndarray]) -> list[str]:
    """Means, and how much of the gap from the second of `found` up to the first is closed, where it
    is over two standard errors. Errors are by drawing the same questions with replacement for all,
    those of shares half the width of the middle 68%."""
    full, base = ([*found] * 2)[:2]  # the same without a run
    n, random = len(found[full]), np.random.default_rng(0)
    draws = random.integers(n, size=(1000, n))
    titles = [f"{measure} | gap closed" for measure in MEASURES]
    lines = [f"| {n} questions | {' | '.join(titles)} |", "|---" * (2 * len(MEASURES) + 1) + "|"]
    means = {name: rows.mean(0) for name, rows in found.items()}
    drawn = {name: np.array([rows[draw].mean(0) for draw in draws]) for name, rows in found.items()}

    gap = means[full] - means[base]
    certain = gap * [1, 1, 1, -1] > 2 * (drawn[full] - drawn[base]).std(0)
    for name in found:
        cells = []
        for i, measure in enumerate(MEASURES):
            form = ".3f" if measure == "log-probability" else ".1%"
            cells.append(f"{means[name][i]:{form}} ± {drawn[name][:, i].std():{form}}")
            if certain[i] and name not in (full, base):
                with np.errstate(all="ignore"):  # a drawn gap may be 0
                    closed = (drawn[name] - drawn[base])[:, i] / (drawn[full] - drawn[base])[:, i]
                low, high = np.nanpercentile(closed, [16, 84])
                share = (means[name] - means[base])[i] / gap[i]
                cells.append(f"{share + 0.0:.0%} ± {(high - low) / 2:.0%}")  # no -0%
            else:
                cells.append("")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def score(args: argparse.Namespace) -> None:
    train.require(args.files, "give a file of questions")
    names = [FULL, *args.runs]
    train.require(args.reference in names, f"--reference {args.reference}: not one of {names}")
    tasks = {str(file): read_questions(file, args.limit) for file in args.files}
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    found = {name: {} for name in (args.reference, *args.runs)}
    for name, scores in found.items():
        folder, model = args.runs.get(name), None
        for task, questions in tasks.items():
            key = f"{args.model}, {folder}, {zlib.crc32(json.dumps(questions).encode())}"
            if key not in known:
                print(f"\n{name}, {task}", flush=True)
                if model is None:
                    model, tokenizer = train.load_model(args.model)
                    if folder:
                        train.load_adapter(model, Path(folder))
                known[key] = log_likelihoods(model, tokenizer, questions)
                train.write_json(args.out, known)
            scores[task] = known[key]
    parts = {task: [task] for task in tasks}
    if len(tasks) > 1:
        parts["together"] = [*tasks]
    for title, part in parts.items():
        questions = [question for task in part for question in tasks[task]]
        scores = {name: [x for task in part for x in of[task]] for name, of in found.items()}
        reference = scores[args.reference]
        rows = {name: measured(ours, reference, questions) for name, ours in scores.items()}
        print(f"\n### {title}\n", *table(rows), sep="\n")


def main(argv=None) -> None:
    args = parse_args(argv)
    args.debug = False
    train.attempt(score, args)


if __name__ == "__main__":
    main()
