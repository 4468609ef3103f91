"""`megagpt lint RUN.json`: what a run file gets wrong, or says without effect."""

import argparse
import json

from megagpt.config.run_file import load_run_config
from megagpt.lint.linter import effective, lint_file
from megagpt.planner.estimate import vocabulary


def run(args: argparse.Namespace) -> int:
    found = lint_file(args.run_file, args.overrides, ranks=args.ranks)
    wrong = any(finding.level == "error" for finding in found)
    shown = None
    if args.effective and not wrong:
        run = load_run_config(args.run_file, args.overrides)
        shown = effective(run, vocabulary(run)[0], args.ranks)
    if args.json:
        rows = [{"level": finding.level, "key": finding.key, "text": finding.text} for finding in found]
        print(json.dumps({"findings": rows} | ({} if shown is None else {"effective": shown})))
    else:
        lines = [f"{args.run_file}: {finding}" for finding in found]
        print("\n".join(lines or [f"{args.run_file}: nothing to say"]))
        if shown is not None:
            print(json.dumps(shown, indent=2))
    return 2 if wrong else 0
