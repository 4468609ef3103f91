"""Every case of the campaign. Groups have the letters of RESULTS.md.

A case begins where the straight run was, strikes, starts again without the fault, and is judged by the straight run.
"""

from judge import Case
from kills import kills_in_save, random_kills, signals
from others import exact_resumes, hangs, hostile, launchers, mismatches
from rot import damages, data_damages, full_disks


def every_case() -> list[Case]:
    groups = (
        kills_in_save,
        random_kills,
        signals,
        damages,
        data_damages,
        full_disks,
        hangs,
        mismatches,
        exact_resumes,
        launchers,
        hostile,
    )
    return [case for group in groups for case in group()]
