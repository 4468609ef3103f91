"""Small tasks of lm-evaluation-harness with data of their own: multiple choice, perplexity, generation."""

import json
import random
from pathlib import Path

CHOICE = """task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""
TEXTS = """task: tiny_texts
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
GENERATED = """task: tiny_generated
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "so {{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n", "q"], max_gen_toks: 12, do_sample: false}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write_tasks(folder: Path, corpus: Path, *, documents: int = 24) -> Path:
    """Write the three tasks and their data, made of a corpus of JSON lines."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()[:documents]]
    questions = []
    for number, text in enumerate(texts):
        words = text.split()
        at = number if number < 2 else rng.randrange(1, len(words) - 3)  # the first has an empty context
        choices, gold = rng.sample(words, 3), rng.randrange(4)
        choices.insert(gold, " ".join(words[at : at + 2]))
        if number == 2:
            choices[(gold + 1) % 4] = " "  # the likeliest, of a model that has learned little more
        questions.append({"question": " ".join(words[:at]), "choices": choices, "gold": gold})
    texts[0] = ""
    for name, rows in (("choice", questions), ("texts", [{"text": text} for text in texts])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, settings in (("choice", CHOICE), ("texts", TEXTS), ("generated", GENERATED)):
        (folder / f"{name}.yaml").write_text(settings)
    return folder
