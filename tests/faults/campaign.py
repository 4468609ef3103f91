r"""The faults campaign: strikes a run in every way that cases.py lists; one JSON line for each case.

    make faults                     all of it, for hours: stop it and start it again as you like
    PYTHONPATH=.:tests:tests/programs OMP_NUM_THREADS=1 \
        python tests/faults/campaign.py [--sample N] [--seed S] [--groups ABD]
        [--minutes M] [--baseline] [--results FILE]

Cases that stand in the results are not run again. It is a process of its own, because it forks all the ranks.
"""

import argparse
import importlib
import json
import random
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from cases import every_case
from judge import Case, Outcome
from lab import adopt_orphans
from support import ROOT, build_dataset
from systems import Bare, Megagpt

SHORT = {"A": 5, "B": 1, "C": 2, "D": 5, "E": 1, "H": 4, "J": 1, "L": 5}  # of 24: the cheap ones are more


# what a rank imports on its way to the first step: so much less is left for each forked one
WARM = ("torch._inductor.compile_fx", "deepspeed.runtime.zero.muon.original_muon", "megagpt.train.trainer")


def sample(cases: list[Case], n: int, seed: int) -> list[Case]:
    """n of them, the same for the same seed: of each group its share, but in a short campaign as SHORT has it.

    Groups E and G have more cases where the tests run as root.
    """
    rng = random.Random(seed)
    if n <= 24:  # each stage costs a straight run to compare with
        cases = [case for case in cases if "stage 0" not in case.name and "stage 2" not in case.name]
    groups = sorted({case.group for case in cases})
    by_group = {group: [case for case in cases if case.group == group] for group in groups}
    weights = SHORT if n <= 24 else {group: len(by_group[group]) ** 0.5 for group in groups}
    chosen = []
    for group in groups:
        share = max(1, round(n * weights.get(group, 0) / sum(weights.values()))) if group in weights else 0
        chosen += rng.sample(by_group[group], min(share, len(by_group[group])))
    left = [case for case in cases if case not in chosen]
    return (chosen + rng.sample(left, max(0, min(n - len(chosen), len(left)))))[:n]  # shares are rounded


def run(cases: list[Case], *, baseline: bool, results: Path, minutes: float) -> Iterator[dict[str, object]]:
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {(row["system"], row["group"], row["case"]) for row in rows}
    until = time.monotonic() + 60 * minutes
    adopt_orphans()
    results.parent.mkdir(parents=True, exist_ok=True)
    for module in WARM:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="faults_") as name, results.open("a") as file:
        home = Path(name)
        system = Bare(home) if baseline else Megagpt(build_dataset(home / "corpus"), home)
        for case in cases:
            if time.monotonic() > until:
                return
            if (system.name, case.group, case.name) in known or (baseline and not case.baseline):
                continue
            began, folder = time.monotonic(), home / "case"
            try:
                outcome = case.run(system, folder)
            except Exception:
                outcome = Outcome("error", traceback.format_exc()[-1500:])
            took = round(time.monotonic() - began, 1)
            row = {"system": system.name, "group": case.group, "case": case.name, **outcome.as_json(), "took": took}
            file.write(json.dumps(row) + "\n")
            file.flush()
            shutil.rmtree(folder, ignore_errors=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", default="ABCDEFGHIJKL")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--baseline", action="store_true", help="bare DeepSpeed in the place of megagpt")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "faults.jsonl")
    args = parser.parse_args()
    cases = [case for case in every_case(blind=not args.sample) if case.group in args.groups]
    if args.sample:
        cases = sample(cases, args.sample, args.seed)
    else:  # what a campaign has run when it is stopped is a sample too
        random.Random(args.seed).shuffle(cases)
    for row in run(cases, baseline=args.baseline, results=args.results, minutes=args.minutes):
        print(row["group"], row["case"], "|", row["verdict"], row["note"], f"({row['took']} s)", flush=True)


if __name__ == "__main__":
    main()
