from pathlib import Path

import numpy as np
import pytest
from data_support import document, small_tokenizer, write_dataset
from support import metric

from megagpt.__main__ import main
from megagpt.cli import init
from megagpt.cli.pretrain import pretrain
from megagpt.config.run_file import load_run_config


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_what_init_writes_passes_lint_without_a_word_and_trains_as_it_is(dataset, tmp_path, device, capsys):
    noise = dataset.parent / "noise"
    assert main(["init", str(noise), "--cpu"]) == 0
    printed = capsys.readouterr().out
    assert main(["lint", "noise.jsonc"]) == 0
    assert capsys.readouterr().out == "noise.jsonc: no findings\n"
    assert pretrain(["--deepspeed_config", "noise.jsonc"]) == 0
    run = load_run_config(tmp_path / "noise.jsonc")
    losses = metric(tmp_path / "runs" / "noise", "val/loss")
    assert max(losses) == run.megagpt.schedule.max_steps
    # Each reason that was printed stands in the file, as a comment.
    comments = [
        line.strip() for line in (tmp_path / "noise.jsonc").read_text().splitlines() if line.strip()[:2] == "//"
    ]
    kept = " ".join(comment.removeprefix("// ") for comment in comments)
    reasons = [line.partition(": ")[2] for line in printed.splitlines()[:-1]]
    assert len(reasons) == 8
    assert [reason for reason in reasons if reason not in kept] == []
    assert "train with `megagpt train noise.jsonc`" in printed.splitlines()[-1]


def test_a_gpu_by_name_gives_a_run_for_it(dataset, tmp_path, capsys):
    assert main(["init", str(dataset), "--gpu", "a100 40gb", "--out", "gpu.json5", "--hours", "2"]) == 0
    run = load_run_config(tmp_path / "gpu.json5")
    assert (run.deepspeed.dtype, str(run.megagpt.out_dir)) == ("bf16", "runs/gpu")
    assert (
        "// launching kernels, not counted, can take most of so small a model's step." in Path("gpu.json5").read_text()
    )
    assert main(["init", str(dataset), "--gpu", "V100", "--out", "old.json5"]) == 0
    assert load_run_config(tmp_path / "old.json5").deepspeed.dtype == "fp16"
    assert "fp16: V100 has no bf16.\n" in capsys.readouterr().out


def test_a_line_break_in_the_datas_name_ends_no_comment(dataset, tmp_path):
    strange = tmp_path / 'a\n{"b": 1} \u2028 \udce9'
    strange.symlink_to(dataset)
    assert main(["init", str(strange), "--cpu", "--out", "run.jsonc"]) == 0
    assert load_run_config(tmp_path / "run.jsonc").megagpt.data.val[""].path == strange


def test_an_existing_file_is_not_overwritten(dataset, tmp_path, capsys):
    (tmp_path / "mine.jsonc").write_text("mine")
    assert main(["init", str(dataset), "--cpu", "--out", "mine.jsonc"]) == 2
    assert "run file mine.jsonc exists, and is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "mine.jsonc").read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["nothing"], "there is no dataset folder nothing"),
        (["texts"], "texts is not a dataset; build one from it with `python -m data_tools build --input texts"),
        (
            ["my texts"],
            "my texts is not a dataset; build one from it with `python -m data_tools build --input 'my texts'",
        ),
        (["texts/a.txt"], "texts/a.txt is not a dataset; build one from it with"),
        (["texts/run.json"], "texts/run.json is a run file, which `megagpt init` writes; give the folder of a dataset"),
        (["DATASET", "--gpu", "1080"], "--gpu '1080' is not known; give --gpu-memory GIB and --tflops T"),
        (["DATASET", "--tflops", "20"], "--tflops alone describes no GPU; give --gpu-memory too, or --gpu NAME"),
        (["DATASET", "--cpu", "--tflops", "20"], "describe a GPU; remove them, or --cpu"),
        (["data", "--out", "no/run.json"], "there is no folder no; make it"),
        (["data", "--out", "texts"], "run file texts exists"),
        (["data/train"], "data/train is not a dataset, but data is; give `megagpt init data`"),
        (["data/manifest.json"], "data/manifest.json is not a dataset, but data is; give"),
        (["."], ". is not a dataset, but data is; give `megagpt init data`"),
        (["data"], "data has no documents in its 'val' split; build it again with another val_fraction"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_no_file(args, complaint, dataset, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "texts" / "run.json").write_text('{"megagpt": {}}')
    (tmp_path / "my texts").mkdir()
    tokenizer = small_tokenizer()
    write_dataset(tmp_path / "data", [np.append(tokenizer.encode(document(0)), tokenizer.eod_id)])
    before = sorted(tmp_path.iterdir())
    assert main(["init", *(str(dataset) if arg == "DATASET" else arg for arg in args)]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("error:") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_gpu_that_is_not_known_is_named(dataset, monkeypatch, capsys):
    monkeypatch.setattr(init.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(init.torch.cuda, "get_device_name", lambda: "Tesla K80")
    assert main(["init", str(dataset)]) == 2
    said = capsys.readouterr().err
    assert (
        "this machine's GPU, 'Tesla K80', is not known; give --gpu-memory GIB and --tflops T of its data sheet" in said
    )
    assert main(["init", str(dataset), "--gpu-memory", "11", "--tflops", "4", "--out", "k80.jsonc"]) == 0
    assert main(["init", str(dataset), "--cpu"]) == 0
