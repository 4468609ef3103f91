import json

import pytest
from support import GOOD

from megagpt.config.run_file import parse_run
from megagpt.errors import UserError
from megagpt.lint.linter import lint_file

TWO = {"web": {"path": "data/web"}, "code": {"path": "data/code"}}


def val(value: object, *more: str):
    return parse_run(GOOD, [f"megagpt.data.val={json.dumps(value)}", *more])


@pytest.mark.parametrize("value", ["data/x", TWO, {"a-1_B": {"path": "a", "tokens": 64, "weight": 2.0}}])
def test_validation_data_is_written_as_it_was_given(value):
    run = val(value)
    written = run.as_json()["megagpt"]["data"]["val"]
    assert parse_run(run.as_json()).megagpt == run.megagpt
    if isinstance(value, str):
        assert written == value  # as in the run.json of all runs before there were names
    else:
        assert written == {name: {"tokens": None, "weight": None} | one for name, one in value.items()}


@pytest.mark.parametrize("monitor", ["val/loss", "loss/val", "val/loss/code"])
def test_what_decides_is_the_mean_of_all_sets_or_one_of_them(monitor):
    run = val(TWO, f"megagpt.early_stopping.monitor={monitor}")
    assert list(run.megagpt.deciding_sets) == (["code"] if monitor.endswith("code") else ["web", "code"])
    assert run.megagpt.early_stopping.monitor in ("val/loss", "val/loss/code")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([{"path": "a"}], 'is not a path, and no sets by name such as {"web": {"path": "data/web"}}'),
        ({}, "names no set"),
        ({"path": "a"}, 'this set has no name; write {"NAME": {"path": "a"}}, or "val": "a"'),
        ({"web": "a"}, 'web is a path alone; write {"web": {"path": "a"}}'),
        ({"a/b": {"path": "a"}}, "'a/b' cannot be the name of a set: .* write 'a_b'"),
        ({"": {"path": "a"}}, "'' cannot be the name of a set"),
        ({"a.b": {"path": "a"}}, "write 'a_b'"),
        ({"x" * 65: {"path": "a"}}, f"at most 64; write '{'x' * 64}'"),
        ({"Web": {"path": "a"}, "web": {"path": "b"}}, "'Web' and 'web' differ in capital letters only"),
        ({"web": {"pth": "a"}}, r"'megagpt\.data\.val\.web\.pth'; did you mean 'megagpt\.data\.val\.web\.path'\?"),
        ({"web": {"path": "a", "y": {"path": "b"}}}, r"\.web\.y'; known are .*web\.path"),
        ({"web": {"path": "a", "tokens": "8k"}}, r"write megagpt\.data\.val\.web\.tokens=8000"),
        ({"web": {"path": "a", "weight": 1}, "code": {"path": "b"}}, r"data\.val\.code\.weight is not; give every set"),
        ({"web": {"path": "$NO_SUCH_VARIABLE/a"}}, r"data\.val\.web\.path: .* export NO_SUCH_VARIABLE"),
    ],
)
def test_sets_that_are_wrong_are_told_with_the_way_out(value, told):
    with pytest.raises(UserError, match=told):
        val(value)


@pytest.mark.parametrize(
    ("monitor", "meant"),
    [("code", "val/loss/code"), ("val/loss/cod", "val/loss/code"), ("val/los", "val/loss"), ("webb", "val/loss/web")],
)
def test_a_monitor_that_is_not_measured_is_told_with_the_nearest_one(monitor, meant):
    with pytest.raises(UserError, match=rf"monitor='{monitor}' is not measured; did you mean '{meant}'\?"):
        val(TWO, f"megagpt.early_stopping.monitor={monitor}")


def test_a_key_that_is_misspelt_with_sets_in_it_is_named_without_their_names():
    with pytest.raises(UserError, match=r"unknown key 'megagpt\.data\.vall'; did you mean 'megagpt\.data\.val'\?"):
        parse_run(GOOD, [f"megagpt.data.vall={json.dumps({'web': {'path': 'a'}})}"])


def test_lint_tells_of_weights_and_tokens_that_have_no_effect(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(GOOD))
    weighted = {name: one | {"weight": 1.0, "tokens": 64} for name, one in TWO.items()}
    options = [f"megagpt.data.val={json.dumps(weighted)}", "megagpt.data.val_tokens=128"]
    found = [str(issue) for issue in lint_file(tmp_path / "run.json", options) if issue.level == "warning"]
    assert found == ["warning: megagpt.data.val_tokens=128 has no effect: each validation set has tokens; remove one"]
    one = [options[0], "megagpt.early_stopping.monitor=val/loss/web"]
    found = [str(issue) for issue in lint_file(tmp_path / "run.json", one) if issue.level == "warning"]
    why = "has no effect: val/loss is that of one set, and no mean; remove it"
    assert found == [f"warning: megagpt.data.val.{name}.weight=1.0 {why}" for name in TWO]
