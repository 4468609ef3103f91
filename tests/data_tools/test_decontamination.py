"""Documents that share n-grams of words with a test set are found, and no others."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.dedup.decontamination import DecontaminationConfig, is_contaminated, read_ngrams, write_ngrams
from megagpt.errors import UserError

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
WORDS = QUESTION.split()


def is_found(tmp_path, text: str, tests: list[str], cfg: DecontaminationConfig) -> bool:
    write_ngrams([[test] for test in tests], tmp_path / "ngrams.npy", cfg)
    return is_contaminated([text], read_ngrams(tmp_path / "ngrams.npy"), cfg)


@pytest.mark.parametrize("start", [0, 1, len(WORDS) - 13])
def test_thirteen_words_of_a_test_are_found_anywhere_and_twelve_are_not(tmp_path, start):
    for n_words, expected in ((13, True), (12, False)):
        text = "Before it. " + " ".join(WORDS[start : start + n_words]) + " And after."
        assert is_found(tmp_path, text, ["Another test altogether.", QUESTION], DecontaminationConfig()) is expected


def test_case_punctuation_and_line_breaks_hide_nothing(tmp_path):
    text = QUESTION.upper().replace(",", " --").replace(" ", "\n")
    assert is_found(tmp_path, text, [QUESTION], DecontaminationConfig())


def test_words_in_another_order_are_no_copy(tmp_path):
    assert not is_found(tmp_path, " ".join(WORDS[::-1]), [QUESTION], DecontaminationConfig())


def test_min_hits_counts_different_runs(tmp_path):
    cfg = DecontaminationConfig(min_hits=2)
    assert not is_found(tmp_path, " ".join(WORDS[:13] * 3), [" ".join(WORDS[:13])], cfg)
    assert is_found(tmp_path, " ".join(WORDS[:14]), [QUESTION], cfg)


def test_texts_too_short_for_a_run_are_counted(tmp_path):
    counts = write_ngrams([[QUESTION], ["Yes."], [QUESTION]], tmp_path / "ngrams.npy", DecontaminationConfig())
    assert counts == {"texts": 3, "short": 1, "ngrams": len(WORDS) - 12}


@pytest.mark.parametrize("tests", [[], ["Yes.", "No."]])
def test_nothing_to_look_for_is_an_error_that_names_the_way_out(tmp_path, tests):
    with pytest.raises(UserError, match=r"ngram=13: none of . texts has that many words; set a smaller one"):
        write_ngrams([[test] for test in tests], tmp_path / "ngrams.npy", DecontaminationConfig())


def test_the_file_is_rising_and_depends_on_the_texts_alone(tmp_path):
    texts = [" ".join(map(str, range(i, i + 30))) for i in range(5)]
    for name, order in (("a", texts), ("b", texts[::-1])):
        write_ngrams([[text] for text in order], tmp_path / name, DecontaminationConfig())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert np.all(np.diff(np.load(tmp_path / "a")) > 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


texts_of_few_words = st.lists(st.sampled_from("ab"), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(texts_of_few_words, st.lists(texts_of_few_words, min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 3))
def test_decisions_are_those_of_sets_of_words(tmp_path, text, tests, ngram, min_hits):
    def runs(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)}

    wanted = set().union(*map(runs, tests))
    if wanted:
        cfg = DecontaminationConfig(ngram=ngram, min_hits=min_hits)
        found = is_found(tmp_path, " ".join(text), [" ".join(test) for test in tests], cfg)
        assert found == (len(runs(text) & wanted) >= min_hits)


def test_a_run_of_words_across_pieces_is_found_and_hits_are_counted_over_all_of_them(tmp_path):
    words = [f"w{i}" for i in range(40)]
    write_ngrams([[" ".join(words[:10]), " ".join(words[10:])]], tmp_path / "ngrams.npy", DecontaminationConfig())
    known = read_ngrams(tmp_path / "ngrams.npy")
    pieces = ["before " + " ".join(words[3:8]) + " ", " ".join(words[8:16]) + " after"]  # one run of 13, cut in two
    assert is_contaminated(pieces, known, DecontaminationConfig())
    assert not is_contaminated(pieces[:1], known, DecontaminationConfig())
    assert not is_contaminated(pieces[1:], known, DecontaminationConfig())
    twice = [" ".join(words[:13]) + " x ", " ".join(words[20:33])]
    assert is_contaminated(twice, known, DecontaminationConfig(min_hits=2))
    assert not is_contaminated(twice, known, DecontaminationConfig(min_hits=3))
