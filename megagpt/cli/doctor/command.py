"""`megagpt doctor`: check that every host of a hostfile is ready to train, and name a fix for what is not.

`megagpt check-hosts` checks the hostfile alone.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megagpt.cli.doctor.agent import serve
from megagpt.cli.doctor.hosts import examine
from megagpt.cli.doctor.launcher_environment import write_environment
from megagpt.distributed.hostfile import check_environment, check_hosts
from megagpt.terminal import print_error, show


def as_text(found: Mapping[str, Any]) -> str:
    """Format what `examine` found for people: a line for each fact, for each finding, and their number."""
    findings, speed = [str(finding) for finding in found["findings"]], found["all_reduce_gb_per_s"]
    hosts = ", ".join(found["hosts"]) or "no host answered"
    total = f"{hosts}: {len(findings) or 'nothing'} to fix"
    if speed is not None:
        total += f"; an all-reduce sends {speed:.2f} GB/s from each"
    return "\n".join([*_fact_lines(found["hosts"]), *findings, total])


def _fact_lines(hosts: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Yield "name: value" for each fact that was read; where hosts differ, one line for each value with its hosts."""
    for name in dict.fromkeys(name for facts in hosts.values() for name in facts):
        hosts_of: dict[str, list[str]] = {}
        for host, facts in hosts.items():
            hosts_of.setdefault(facts.get(name, "absent"), []).append(host)
        for value, names in hosts_of.items():
            yield f"{name}: {value}" + (f" ({', '.join(names)})" if len(hosts_of) > 1 else "")


def run(args: argparse.Namespace) -> int:
    """Print the findings; exit code 2 if there are any. With the hidden --probe this process is an agent."""
    if args.probe:
        return serve()
    if args.write_env:
        print_error(write_environment(args.hostfile))
    found = examine(args.hostfile, args.run_file, args.overrides)
    show(json.dumps(found, default=vars) if args.json else as_text(found))
    return 2 if found["findings"] else 0


def run_check_hosts(args: argparse.Namespace) -> int:
    """Check a hostfile and the working folder's .deepspeed_env. Raises UserError for a line that is unsafe."""
    check_hosts(args.hostfile)
    check_environment(Path.cwd())
    return 0
