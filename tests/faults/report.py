"""The table of RESULTS.md from the lines that a campaign wrote: python tests/faults/report.py FILE"""

import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

GROUPS = {
    "A": "kill -9 at a point of a save",
    "B": "kill -9 at a random time",
    "C": "signals, also a second one in the save",
    "D": "damaged files",
    "E": "disks that are full, read-only, or not ours to write to",
    "F": "hang",
    "G": "network between two hosts",
    "H": "another run file",
    "I": "numbers that are not finite, flipped bits",
    "J": "exact resume",
    "K": "launchers",
    "L": "hostile files and names",
}
BAD = ("silently wrong", "stuck", "restarted at step 0")  # which have columns of their own


def line(group: str, rows: list[dict[str, Any]]) -> str:
    verdicts = Counter(row["verdict"] for row in rows)
    lost = [row["lost"] for row in rows if row["lost"] is not None]
    seconds = [row["seconds"] for row in rows if row["seconds"]]
    cells = [
        f"{group} {GROUPS[group]}",
        len(rows),
        verdicts["recovered"],
        verdicts["refused"],
        verdicts["stuck"] + verdicts["restarted at step 0"],
        verdicts["silently wrong"],
        max(lost, default="-"),
        f"{statistics.median(seconds):.1f} / {max(seconds):.1f}" if seconds else "-",
        sum(row["orphans"] for row in rows),
        sum(bool(row["note"]) and row["verdict"] not in BAD for row in rows)
        + verdicts["error"]
        + verdicts["not struck"],
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main(results: Path) -> None:
    rows = [json.loads(text) for text in results.read_text().splitlines()]
    head = ["group", "tried", "recovered", "refused", "stuck or from 0", "silently wrong", "most steps lost"]
    head += ["seconds to the end, median / max", "orphans", "else not as promised"]
    for system in ("megagpt", "bare DeepSpeed"):
        ours = [row for row in rows if row["system"] == system]
        print(f"\n**{system}**\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for group in GROUPS:
            if found := [row for row in ours if row["group"] == group]:
                print(line(group, found))
        for row in ours:
            if row["verdict"] in BAD or row["note"]:
                print(
                    f"\n- {row['group']} {row['case']}: {row['verdict']}; {row['note'][:300]}"
                ) if system == "megagpt" else None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
