"""python -m harness score"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.base import Command
from harness.errors import HarnessError


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", type=Path, metavar="DEVICE", help="the scores on the device: a file of a tool")
    parser.add_argument("reference", type=Path, metavar="REFERENCE", help="those of the CPU, a GPU or the old stack")
    parser.add_argument("--metric", metavar="TEXT", help="only scores with this in their name")
    parser.add_argument(
        "--alpha", type=float, default=0.05, help="the chance to fail a device that is as good (default 0.05)"
    )
    parser.add_argument(
        "--beta", type=float, default=0.2, help="the chance to pass one that is worse by the effect (default 0.2)"
    )
    parser.add_argument(
        "--effect", type=float, default=0.03, help="the drop that must be seen, as a share (default 0.03: 3 points)"
    )


def _run(arguments: argparse.Namespace) -> int:
    from harness.judging.scores import Decision, judge_score
    from harness.scores import read_scores

    device, reference = read_scores(arguments.device), read_scores(arguments.reference)
    if len(device) == len(reference) == 1:  # two columns are called by their files
        names = [(next(iter(device)), next(iter(reference)))]
    else:
        names = [(name, name) for name in reference if name in device]
    names = [pair for pair in names if arguments.metric is None or arguments.metric in pair[1]]
    if not names:
        which = f" with {arguments.metric}" if arguments.metric else ""
        raise HarnessError(
            f"no score is in both files{which}: {arguments.device} has {', '.join(sorted(device))}, "
            f"{arguments.reference} {', '.join(sorted(reference))}"
        )
    absent = [] if len(names) == 1 and len(reference) == 1 else sorted(reference.keys() - device.keys())
    verdicts = []
    for mine, name in names:
        how = dict(alpha=arguments.alpha, beta=arguments.beta, effect=arguments.effect)
        verdict = judge_score(device[mine], reference[name], **how)
        verdicts.append(verdict)
        scores = f"{device[mine].value:.4f} against {reference[name].value:.4f}"
        print(f"{verdict.decision} {name}: {scores}; {verdict.text}")
    for name in absent:
        print(f"MISSING {name}: {arguments.device} has no such score")
    print(f"one-sided, alpha {arguments.alpha}, beta {arguments.beta}, effect {arguments.effect * 100:g} points")
    return 0 if not absent and all(verdict.decision is Decision.PASS for verdict in verdicts) else 1


COMMAND = Command(
    name="score",
    summary="Judge a dataset's score on the device against a reference: passes, fails, or says how many samples more "
    "are needed.",
    example="python -m harness score npu/results_gsm8k.json gpu/results_gsm8k.json --effect 0.02\n"
    "  python -m harness score npu/samples_gsm8k.jsonl gpu/samples_gsm8k.jsonl",
    add=_add,
    run=_run,
)
