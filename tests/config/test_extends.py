import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import GOOD, RUN_FILES

from megagpt.__main__ import main
from megagpt.config.extends import merged, read_run_files
from megagpt.config.parsing import leaves, overridden, read_json
from megagpt.config.run_file import load_run_config
from megagpt.config.schema import MegaGPTConfig
from megagpt.config.schema_keys import kinds_of, models_in
from megagpt.errors import UserError

COMMENTED = """\
// a run of mine
{
  "train_batch_size": 8, /* sequences,
                            over all ranks */
  "train_micro_batch_size_per_gpu": 0x4,
  optimizer: {type: 'AdamW', params: {lr: 1e-3}},
  "megagpt": {
    "out_dir": "runs/x", // no comment: "//"
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32,},
    "data": {"train": [{"path": "d"},], "val": "d"},
    "schedule": {"max_steps": 5},
  },
}
"""


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / f"{next(iter(files))}.json"


def test_a_run_file_with_comments_is_the_run_without_them(tmp_path):
    assert load_run_config(write(tmp_path, run=COMMENTED)) == load_run_config(write(tmp_path, plain=GOOD))


@settings(max_examples=30)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_json_reads_the_same_as_json5(tmp_path_factory, value):
    folder = tmp_path_factory.getbasetemp()
    text = json.dumps({"value": value}, ensure_ascii=False)
    plain, commented = write(folder, plain=text), write(folder, commented=f"// a comment\n{text} // and one")
    assert read_json(plain) == read_json(commented) == {"value": value}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 1, // one\n "b" 2}', r'json, line 2, column 6: not JSON: Unexpected "2"'),
        ('// only "this"', r"line 1, column 15: not JSON: Unexpected end of input"),
        ('{"a": 1, /* for ever', r"line 1, column 21: not JSON: Unexpected end of input"),
        ('{"a": "x\ny"}', r'line 1, column 9: not JSON: Unexpected "\\n"'),
        ('{a: 1, "a": 2}', r"run.json: one section gives 'a' twice"),
        ('{a: 1, "\\u0061": 2}', "one section gives 'a' twice"),
        ("{a: Infinity}", "Infinity is not a finite number"),
        ("{a: 0xffffffffffffffff}", "the number 0xffffffffffffffff is too large"),
        ("{a: 1e999}", "the number 1e999 is too large"),
        ("// x\n" + "[" * 10**5, "nested too deep"),
    ],
)
def test_a_mistake_in_a_file_with_comments_is_named_with_its_place(tmp_path, text, complaint):
    with pytest.raises(UserError, match=complaint):
        load_run_config(write(tmp_path, run=text))


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_a_file_that_changes_nothing_is_the_file_that_it_extends(tmp_path, path):
    assert load_run_config(write(tmp_path, run={"extends": str(path)})) == load_run_config(path)


def test_extended_files_are_merged_key_by_key_from_the_first_to_the_last(tmp_path):
    (tmp_path / "bases").mkdir()
    first = GOOD | {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    write(
        tmp_path / "bases",
        second={"extends": "first.json", "zero_optimization": {"stage": 1}, "bf16": None},
        first=first,
    )
    own = {"megagpt": {"schedule": {"max_steps": 7}, "data": {"train": [{"path": "e"}]}}}
    path = write(tmp_path, run={"extends": "bases/second.json", **own})
    changes = ["zero_optimization.stage=1", "megagpt.schedule.max_steps=7", 'megagpt.data.train=[{"path": "e"}]']
    expected = write(tmp_path, expected=overridden({**GOOD, "zero_optimization": {}}, changes))
    assert load_run_config(path) == load_run_config(expected)
    # The command line changes the result.
    assert load_run_config(path, ["megagpt.schedule.max_steps=8"]).megagpt.schedule.max_steps == 8


def test_null_removes_a_key_and_is_a_value_only_where_it_is_the_default(tmp_path):
    """RFC 7396's examples; and in our section no key has a null that means something else than the default."""
    path = write(
        tmp_path,
        run={"extends": "base.json", "a": None, "c": {"d": None}, "e": [None]},
        base={"a": 1, "c": {"d": 1, "x": 2}, "e": [1]},
    )
    assert merged(read_run_files(path)) == {"c": {"x": 2}, "e": [None]}

    def sections(model):
        yield model
        for info in model.model_fields.values():
            for inner in models_in(info.annotation):
                yield from sections(inner)

    optional = [
        (model, name)
        for model in sections(MegaGPTConfig)
        for name in model.model_fields
        if type(None) in kinds_of(model, name)
    ]
    assert len(optional) >= 6
    assert [key for key in optional if key[0].model_fields[key[1]].default is not None] == []


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"run": {"extends": "nix.json"}}, "there is no file .*nix.json; .* the folder of run.json"),
        ({"run": {"extends": "."}}, "there is no file"),
        ({"run": {"extends": 3}}, r"extends=3 is not a path; write one"),
        ({"run": {"extends": ["a.json"]}}, r'extends=\["a.json"\] is not a path'),
        ({"run": {"extends": None}}, "extends=null is not a path"),
        ({"run": {"extends": ""}}, "extends='' is not a path"),
        ({"run": {"extends": "$NOT_SET_ANYWHERE/a.json"}}, "the variable NOT_SET_ANYWHERE is not set"),
        ({"run": {"extends": "run.json"}}, "leads back to .*run.json; remove extends"),
        ({"run": {"extends": "b.json"}, "b": {"extends": "./run.json"}}, "b.json: extends='./run.json' leads back to"),
        ({"run": {"extends": "b.json"}, "b": "{,}"}, r"b.json, line 1, column 3: not JSON"),
        ({"run": {"extends": "b.json"}, "b": '{"a": 1, "a": 2}'}, r"b.json: one section gives 'a' twice"),
        ({"run": {"extends": "b.json", "lr": 1}, "b": GOOD}, r"run.json, which extends .*b.json: unknown key 'lr'"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_extended_is_one_message(tmp_path, files, complaint):
    with pytest.raises(UserError, match=complaint):
        load_run_config(write(tmp_path, **files))


def test_extends_on_the_command_line_is_refused(tmp_path):
    with pytest.raises(UserError, match="extends acts in a file alone"):
        load_run_config(write(tmp_path, run=GOOD), ["extends=other.json"])


def test_lint_names_the_file_in_which_a_key_stands(tmp_path, capsys):
    files = {
        "run": {"extends": "base.json", "megagpt": {"model": {"n_lyr": 4}}},
        "base": {**GOOD, "optimiser": {"lr": 1}},
    }
    path = write(tmp_path, **files)
    assert main(["lint", str(path), "megagpt.every.lgo=3"]) == 2
    lines = [line.removeprefix(f"{tmp_path}/").split(";")[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(lines) == [
        "base.json: error: unknown key 'optimiser.lr'",
        "run.json: error: unknown key 'megagpt.every.lgo'",
        "run.json: error: unknown key 'megagpt.model.n_lyr'",
    ]


def test_what_a_run_keeps_is_plain_json_without_extends(tmp_path):
    path = write(tmp_path, run='{"extends": "base.json", /* mine */}', base=GOOD)
    kept = json.loads(json.dumps(load_run_config(path).as_json()))
    assert "extends" not in leaves(kept)
