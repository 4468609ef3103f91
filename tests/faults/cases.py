"""Every case of the campaign. Groups have the letters of RESULTS.md.

A case begins where the straight run was, strikes, starts again without the fault, and is judged by the straight run.
"""

from disks import disks
from judge import Case
from kills import kills_in_save, random_kills, signals
from network import network
from numerics import blind_spots, wrong_numbers
from others import exact_resumes, hangs, hostile, launchers, mismatches
from rot import damages, data_damages, full_disks


def every_case(*, blind: bool = False) -> list[Case]:
    """`blind`: also what is known to end in another run that nobody notices."""
    groups = (
        kills_in_save,
        random_kills,
        signals,
        damages,
        data_damages,
        full_disks,
        disks,
        hangs,
        network,
        mismatches,
        wrong_numbers,
        exact_resumes,
        launchers,
        hostile,
        *([blind_spots] if blind else []),
    )
    return [case for group in groups for case in group()]
