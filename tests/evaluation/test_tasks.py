"""`megagpt evaluate --tasks` gives the numbers of the export by the harness's own `hf` model; mistakes are named."""

import json
import os
import random
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_support import lossy_tokenizer
from event_files import board, curves_of
from support import DEBUG_RUN, curves, debug_run, overrides
from task_files import CHOICE, GENERATED, write_tasks

from megagpt.__main__ import main
from megagpt.checkpoint.load import load_model
from megagpt.config.schema import ModelConfig
from megagpt.errors import UserError
from megagpt.evaluation import tasks as running
from megagpt.evaluation.tasks import Tasks, _results, open_tasks, run_tasks
from megagpt.huggingface import export as exporting
from megagpt.huggingface.export import Exported
from megagpt.model.gpt import GPT
from megagpt.tokenizer.tokenizer import padded_vocab_size
from megagpt.train.trainer import train

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval, of the extra `tasks`, is not installed")


@pytest.fixture(scope="module")
def run(dataset, device, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(debug_run(dataset, folder, "megagpt.schedule.max_steps=4", "megagpt.schedule.warmup_steps=0"), device)
    return folder


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("given") / "tasks", dataset.with_suffix(".jsonl"))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory) -> None:
    cache = tmp_path_factory.getbasetemp() / "datasets_cache"
    monkeypatch.setattr(import_module("datasets").config, "HF_DATASETS_CACHE", str(cache))


def answers(tasks: Tasks) -> dict[str, list[Any]]:
    """What the model answered to each request of each task."""
    return {
        name: [one.resps[0] for one in sorted(task.instances, key=lambda one: (one.doc_id, one.idx))]
        for name, task in tasks.loaded["tasks"].items()
    }


def test_hf_on_the_export_gives_the_same_answers(run, folder, tmp_path, monkeypatch):
    """Each log probability, each greedy token, each text, in batches of 1 and of 8; also of contexts that are cut."""
    evaluator, huggingface = import_module("lm_eval.evaluator"), import_module("lm_eval.models.huggingface")
    monkeypatch.setattr(exporting, "_compared", lambda *_: Exported(0.0, 0, 0))  # test_export.py starts that process
    exporting.export(load_model(run, torch.device("cpu")), tmp_path / "out", dtype="fp32", license_name=None)
    tasks, (model, tokenizer, *_) = open_tasks([str(folder)]), load_model(run, torch.device("cpu"))
    contexts = [len(tokenizer.encode(one["question"])) for one in tasks.loaded["tasks"]["tiny_choice"].eval_docs]
    assert min(contexts) == 0
    assert max(contexts) > model.cfg.seq_len
    found = []
    for micro_batch in (1, 8):
        numbers = run_tasks(tasks, model, tokenizer, micro_batch=micro_batch).metrics
        found.append((numbers, answers(tasks)))
        theirs = huggingface.HFLM(str(tmp_path / "out"), dtype="float32", batch_size=micro_batch, device="cpu")
        by_hf = evaluator.evaluate(theirs, tasks.loaded, bootstrap_iters=0, log_samples=False)
        found.append((_results(by_hf, 0).metrics, answers(tasks)))
    (numbers, own), *others = found
    assert any(is_greedy for _, is_greedy in own["tiny_choice"])
    for metrics, answered in others:
        # a logit differs by some 1e-6, so a mean of nats does, and its exponential relatively: of words of 6 letters
        assert metrics == {task: pytest.approx(numbers[task], rel=1e-4) for task in numbers}
        assert answered["tiny_generated"] == own["tiny_generated"]
        for task in ("tiny_choice", "tiny_texts"):
            assert np.allclose(answered[task], own[task], rtol=1e-5, atol=1e-5)


def test_the_table_and_json_have_every_task(run, folder, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(run), "--tasks", f"{folder}/choice.yaml,{folder}/texts.yaml", "--limit", "5"]) == 0
    table = capsys.readouterr().out
    assert "\n  tiny_choice          5  acc              higher" in table
    assert main(["evaluate", str(run), "--tasks", str(folder), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["documents"] == {"tiny_choice": 24, "tiny_generated": 24, "tiny_texts": 24}
    assert row["tasks"].keys() == row["documents"].keys()
    # a mean of zeros and ones, with its standard error
    share = row["tasks"]["tiny_choice"]["acc"]
    assert row["standard_errors"]["tiny_choice"]["acc"] == pytest.approx((share * (1 - share) / 23) ** 0.5)


def test_texts_that_are_drawn_are_the_same_in_any_batch(run, folder, tmp_path):
    settings = GENERATED.replace("do_sample: false", "do_sample: true, temperature: 1.0")
    (tmp_path / "a.yaml").write_text(settings.replace("choice.jsonl", str(folder / "choice.jsonl")))
    tasks, (model, tokenizer, *_) = open_tasks([str(tmp_path)]), load_model(run, torch.device("cpu"))
    found = []
    for micro_batch in (1, 5):
        run_tasks(tasks, model, tokenizer, micro_batch=micro_batch)
        found.append(answers(tasks)["tiny_generated"])
    assert found[0] == found[1]
    assert len(set(found[0])) > 12


def test_texts_that_the_tokenizer_cannot_spell_are_counted(folder):
    tokenizer = lossy_tokenizer()
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, seq_len=64), padded_vocab_size(tokenizer.vocab_size))
    found = run_tasks(open_tasks([str(folder / "texts.yaml")]), model, tokenizer, micro_batch=8, limit=3)
    # made-up words, whose letters are not all in it; the first text is empty
    assert found.what_is_lost().startswith("the tokenizer cannot spell 2 texts of these tasks: <unk> stands in them")


@pytest.mark.parametrize("task", ["choice", "texts", "generated"])
def test_what_fails_in_the_model_or_on_another_rank_is_no_mistake_of_a_task(run, folder, task):
    """A run that took a rank's death for a task's mistake would train on."""
    model, tokenizer, *_ = load_model(run, torch.device("cpu"))

    def cut_off(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    model.h[0].register_forward_hook(cut_off)
    with pytest.raises(RuntimeError, match=r"^Connection closed by peer$"):
        run_tasks(open_tasks([str(folder / f"{task}.yaml")]), model, tokenizer, micro_batch=8, limit=3)


def test_tasks_leave_the_generators_as_they_were(run, folder):
    tasks, (model, tokenizer, *_) = open_tasks([str(folder / "choice.yaml")]), load_model(run, torch.device("cpu"))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run_tasks(tasks, model, tokenizer, micro_batch=8, limit=2)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


ONE_CHOICE = json.dumps({"question": "a", "choices": ["b", "c"], "gold": 0}) + "\n"
EMPTY_ANSWER = json.dumps({"question": "a", "choices": ["", "b"], "gold": 0})


def test_a_run_with_tasks_is_the_run_without_them_and_resumes_with_the_same_numbers(dataset, folder, device, tmp_path):
    """Its losses are the same to the last bit, and its tasks' metrics are in every file."""
    options = ["megagpt.schedule.max_steps=4", "megagpt.schedule.warmup_steps=0", "csv_monitor.enabled=true"]
    options += ["megagpt.regularization.dropout=0.1", "megagpt.every.save=2"]
    train(debug_run(dataset, tmp_path / "without", *options), device)
    options += ["megagpt.every.tasks=2", f'megagpt.tasks=["{folder}"]']
    train(debug_run(dataset, tmp_path / "straight", *options), device)
    for stop_at in (2, None):
        train(debug_run(dataset, tmp_path / "cut", *options), device, stop_at=stop_at)
    without, straight, cut = (curves(tmp_path / name) for name in ("without", "straight", "cut"))
    for name in ("train/loss", "val/loss", "optim/grad_norm"):
        assert without[name] == straight[name] == cut[name]
    tasks = {name for name in straight if name.startswith("tasks/")}
    assert {name: straight[name] for name in tasks} == {name: cut[name] for name in tasks}
    assert "tasks/tiny_choice/acc" in tasks
    assert {tuple(straight[name]) for name in tasks} == {(2, 4)}
    assert "tasks/tiny_choice/acc" in curves_of(board(tmp_path / "cut"))
    assert (tmp_path / "cut" / "csv" / "tasks_tiny_choice_acc.csv").is_file()


def test_a_task_that_breaks_ends_no_run(dataset, folder, device, tmp_path, capsys):
    (tmp_path / "given.py").write_text("def judged(doc, results):\n    return {'acc': 1 / doc['gold']}\n")
    settings = (
        CHOICE.replace("choice.jsonl", str(folder / "choice.jsonl")) + "process_results: !function given.judged\n"
    )
    (tmp_path / "a.yaml").write_text(settings)
    options = ["megagpt.schedule.max_steps=1", "megagpt.schedule.warmup_steps=0", "megagpt.every.tasks=1"]
    train(debug_run(dataset, tmp_path / "run", *options, f'megagpt.tasks=["{tmp_path}/a.yaml"]'), device)
    told = capsys.readouterr().out
    assert "no results of tasks at step 1: the tasks tiny_choice cannot be run: ZeroDivisionError" in told
    assert "finished at step 1" in told


def test_lint_and_training_tell_of_tasks_that_are_not_there(dataset, device, tmp_path, capsys):
    options = [*overrides(dataset, tmp_path / "run"), "megagpt.every.tasks=2", 'megagpt.tasks=["no/such.yaml"]']
    assert main(["lint", str(DEBUG_RUN), *options]) == 0
    assert "megagpt.tasks: no/such.yaml is no file; correct the path" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"megagpt\.tasks: no/such\.yaml is no file"):
        train(debug_run(dataset, tmp_path / "run", *options[-2:]), device)
    assert main(["lint", str(DEBUG_RUN), *options[:-1]]) == 2
    assert "names none; set megagpt.tasks" in capsys.readouterr().out
    assert main(["lint", str(DEBUG_RUN), *options[:-2], options[-1]]) == 0
    assert "has no effect: megagpt.every.tasks is 0" in capsys.readouterr().out
    assert main(["lint", str(DEBUG_RUN), *options[:-1], 'megagpt.tasks=[""]']) == 0
    assert "megagpt.tasks: names no task" in capsys.readouterr().out


MISTAKES = {
    "empty": ({}, "is a folder without a task, which is a file NAME.yaml; name another folder"),
    "yml": ({"a.yml": CHOICE}, "a.yml to a.yaml"),
    "broken": ({"a.yaml": "task: a\n dataset_path: [json\n"}, "a.yaml cannot be read as a task: ScannerError"),
    "misspelt": ({"a.yaml": CHOICE.replace("task:", "tasks:")}, "a.yaml has no key task"),
    "no_data": ({"a.yaml": CHOICE}, "a.yaml reads choice.jsonl, which is neither next to it nor in the current folder"),
    "no_documents": ({"a.yaml": CHOICE, "choice.jsonl": ""}, "task tiny_choice has no documents"),
    "no_function": (
        {"a.yaml": CHOICE.replace('"{{question}}"', "!function given.text")},
        "a.yaml cannot be read as a task: ImportError: Cannot import module 'given'",
    ),
    "no_column": (
        {"a.yaml": CHOICE.replace("{{question}}", "{{asked}}"), "choice.jsonl": ONE_CHOICE},
        "a.yaml: 'asked' is undefined; its documents have the fields question, choices, gold",
    ),
    "no_field": (
        {"a.yaml": CHOICE.replace("gold", "golt"), "choice.jsonl": ONE_CHOICE},
        "a.yaml: doc_to_target: golt is no field of its documents, which have question, choices, gold; did you mean "
        "gold? A fixed text is written \"{{'golt'}}\"",
    ),
    "no_field_of_a_text": (
        {"a.yaml": GENERATED.replace('"{{choices[gold]}}"', "answer"), "choice.jsonl": ONE_CHOICE},
        "a.yaml: doc_to_target: answer is no field of its documents, which have question, choices, gold; correct it",
    ),
    "no_field_of_choices": (
        {"a.yaml": CHOICE.replace('"{{choices}}"', "choises"), "choice.jsonl": ONE_CHOICE},
        "a.yaml: doc_to_choice: choises is no field of its documents, which have question, choices, gold; did you mean",
    ),
    "no_field_of_examples": (
        {
            "a.yaml": CHOICE + "num_fewshot: 1\nfewshot_split: test\nfewshot_config: {doc_to_target: golt}\n",
            "choice.jsonl": ONE_CHOICE * 3,
        },
        "a.yaml: fewshot_config: doc_to_target: golt is no field of its documents",
    ),
    "no_metric": (
        {"a.yaml": CHOICE.replace("metric: acc\n", "metric: accc\n"), "choice.jsonl": ONE_CHOICE},
        "a.yaml: accc is no metric of lm-evaluation-harness; did you mean acc?",
    ),
    "no_split": (
        {"a.yaml": CHOICE.replace("test_split: test", "test_split: tset"), "choice.jsonl": ONE_CHOICE},
        "a.yaml: test_split: tset is no split of its data; correct it",
    ),
    "no_target": (
        {"a.yaml": CHOICE.replace("doc_to_target: gold\n", ""), "choice.jsonl": ONE_CHOICE},
        "a.yaml has no key doc_to_target; add it",
    ),
    "one_brace": (
        {"a.yaml": CHOICE.replace("{{question}}", "Q: {question} A:"), "choice.jsonl": ONE_CHOICE},
        "a.yaml: doc_to_text: 'Q: {question} A:' is a fixed text; a field is written {{question}}",
    ),
    "a_text_that_is_null": (
        {"a.yaml": CHOICE, "choice.jsonl": ONE_CHOICE + ONE_CHOICE.replace('"a"', "null")},
        "a.yaml: doc_to_text reads question, which is null in document 2; give it a value",
    ),
    "secret_label": (
        {"a.yaml": CHOICE, "choice.jsonl": ONE_CHOICE + ONE_CHOICE.replace("0", "-1")},
        "a.yaml: the target of document 2, -1, is none of its 2 choices ['b', 'c'], nor the number of one, counted "
        "from 0; correct doc_to_target: 'gold', or the data, which has question, choices, gold",
    ),
    "counted_from_1": (
        {"a.yaml": CHOICE, "choice.jsonl": ONE_CHOICE.replace("0", "1") + ONE_CHOICE.replace("0", "2")},
        "a.yaml: the target of document 2, 2, is none of its 2 choices ['b', 'c']",
    ),
    "a_letter": (
        {"a.yaml": CHOICE, "choice.jsonl": ONE_CHOICE.replace("0", '"B"')},
        "a.yaml: the target of document 1, 'B', is none of its 2 choices ['b', 'c']",
    ),
    "no_label": (
        {"a.yaml": CHOICE, "choice.jsonl": ONE_CHOICE + ONE_CHOICE.replace("0", "null")},
        "a.yaml: the target of document 2, None, is none of its 2 choices ['b', 'c']",
    ),
    "too_long": (
        {
            "a.yaml": GENERATED.replace("max_gen_toks: 12", "max_gen_toks: 64"),
            "choice.jsonl": '{"question": "a", "choices": ["a"], "gold": 0}\n',
        },
        "a task generates up to 64 tokens, and the model has 64 positions",
    ),
    "long_answer": (
        {"a.yaml": CHOICE, "choice.jsonl": json.dumps({"question": "a", "choices": ["ab", "ab" * 40], "gold": 0})},
        "tokens, and the model scores 1 to 64, its positions; change the task",
    ),
    "no_answer": (
        {"a.yaml": CHOICE + 'target_delimiter: ""\n', "choice.jsonl": EMPTY_ANSWER},
        "task tiny_choice has no documents, or one with an empty answer",
    ),
    "network": (
        {"a.yaml": CHOICE.replace("dataset_path: json", "dataset_path: nobody/nothing").replace(
            "dataset_kwargs: {data_files: {test: choice.jsonl}}\n", ""
        )},
        "is not on this machine, and nothing is downloaded unasked",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_folder_of_tasks_is_one_message(run, tmp_path, capsys, monkeypatch, mistake):
    # as in a process that has not imported these before; `datasets` reads the first one's
    monkeypatch.setattr(import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(import_module("datasets").config, "HF_HUB_OFFLINE", True)
    files, complaint = MISTAKES[mistake]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    capsys.readouterr()
    assert main(["evaluate", str(run), "--tasks", str(tmp_path)]) == 2
    written = capsys.readouterr()
    assert complaint in written.err
    assert len(written.err.splitlines()) == 1
    assert written.out == ""


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        # reading all of the package's tasks takes seconds
        pytest.param(["--tasks", "hellaswg"], "did you mean hellaswag?", marks=pytest.mark.long),
        (["--tasks", ""], "--tasks names no task"),
        (["--tasks", "x", "--tokens", "5"], "--tokens has no effect on --tasks, whose data is its own"),
        (["--tasks", "x", "--split", "val"], "--split has no effect on --tasks, whose data is its own"),
        (["--limit", "5"], "--limit 5 is for --tasks; give --tokens N"),
    ],
)
def test_a_wrong_option_is_one_message(run, capsys, options, complaint):
    assert main(["evaluate", str(run), *options]) == 2
    assert complaint in capsys.readouterr().err


def test_a_data_file_that_was_replaced_is_read_whatever_its_time(tmp_path):
    """`datasets` takes a file of the same name and time for the one in its cache, as in an unpacked archive."""
    (tmp_path / "a.yaml").write_text(CHOICE)
    for documents in (2, 3):
        row = json.dumps({"question": "a", "choices": ["b", "c"], "gold": 0}) + "\n"
        (tmp_path / "choice.jsonl").write_text(row * documents)
        os.utime(tmp_path / "choice.jsonl", (1, 1))
        task = open_tasks([str(tmp_path)]).loaded["tasks"]["tiny_choice"]
        assert len(task.eval_docs) == documents


def test_a_cache_that_cannot_be_written_is_no_obstacle_and_a_group_is_told(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(import_module("datasets").config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    assert open_tasks([str(folder / "choice.yaml")]).names == ["tiny_choice"]
    monkeypatch.setattr(running.tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(UserError, match="or set TMPDIR and HF_HOME to folders that can be written"):
        open_tasks([str(folder / "choice.yaml")])
    (tmp_path / "group.yaml").write_text("group: mine\ntask: [tiny_choice]\n")
    with pytest.raises(UserError, match=r"group\.yaml is a group of tasks; name its folder"):
        open_tasks([str(tmp_path / "group.yaml")])


def test_a_task_named_twice_is_refused(folder):
    with pytest.raises(UserError, match="names the task tiny_choice twice; name it once"):
        open_tasks([str(folder), str(folder / "choice.yaml")])


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(running, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package lm-eval; install with pip install -e '\.\[tasks\]'"):
        open_tasks(["hellaswag"])
