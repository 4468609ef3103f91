"""No command answers a wrong environment, folder or value by a traceback, an unknown exit code or leftovers."""

import pytest
from wrong_uses import campaign


@pytest.mark.process
@pytest.mark.parametrize(("seed", "n_cases"), [(1, 12), pytest.param(2, 400, marks=pytest.mark.long)])
def test_every_wrong_use_ends_in_one_message(tmp_path, seed, n_cases):
    assert list(campaign(seed, n_cases, tmp_path)) == []
