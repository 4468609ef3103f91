"""Duplicates in a corpus: which documents share a cluster, whatever the files, ranges and order."""

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.dedup.lsh import (
    BANDS,
    LINKS,
    DedupConfig,
    Duplicates,
    cluster,
    duplicates_in,
    link,
    order_number,
    write_bands,
)

NEAR = DedupConfig(method="near")
EXACT = DedupConfig(method="exact")
reuse_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def duplicates(
    folder: Path, units: Sequence[Sequence[str]], cfg: DedupConfig, *, n_parts: int = 1, seed: int = 1
) -> tuple[list[Duplicates], dict[str, int]]:
    """Run all four steps; returns each unit's duplicates, and the counts."""
    bands = [folder / f"{unit}.bands" for unit in range(len(units))]
    for path, texts in zip(bands, units, strict=True):
        write_bands(enumerate(texts), len(texts), path, cfg, seed=seed)
    links = []
    for band in range(cfg.n_bands):
        for part in range(n_parts):
            links.append(folder / f"{band}-{part}.links")
            link(bands, band, part, n_parts, links[-1])
    counts = cluster(links, folder / "clusters")
    return [duplicates_in(unit, folder / "clusters") for unit in range(len(units))], counts


def firsts(found: Sequence[Duplicates], units: Sequence[Sequence[str]]) -> dict[int, int]:
    """Document -> its cluster's first, both counted over all units, for documents that are not the first."""
    starts = np.cumsum([0, *map(len, units)])
    return {
        int(starts[unit] + row): int(starts[first >> 32] + first % 2**32)
        for unit, group in enumerate(found)
        for row, first in zip(group.rows.tolist(), group.firsts.tolist(), strict=True)
    }


def first_of_cluster(pairs: Sequence[tuple[int, int]]) -> dict[int, int]:
    """The oracle: union-find."""
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return {node: root(node) for node in parent if root(node) != node}


def write_links(path: Path, band: int, pairs: Sequence[tuple[int, int]]) -> Path:
    columns = [pa.array([pair[i] for pair in pairs], pa.uint64()) for i in range(2)]
    schema = LINKS.with_metadata({"band": str(band)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return path


def read(path: Path, batch: int = 0) -> list[list[int]]:
    with pa.memory_map(str(path)) as file:
        return [column.to_pylist() for column in pa.ipc.open_file(file).get_batch(batch).columns]


def random_words(n: int, rng: random.Random) -> list[str]:
    return [f"w{rng.getrandbits(48):x}" for _ in range(n)]


def edited(text: str, n_edits: int, rng: random.Random) -> str:
    words = text.split()
    for i in rng.sample(range(len(words)), n_edits):
        words[i] = f"w{rng.getrandbits(48):x}"
    return " ".join(words)


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """300 documents, many edited copies of earlier ones, some exact copies, some tiny, some without words."""
    rng = random.Random(7)
    texts = [" ".join(random_words(120, rng)) for _ in range(100)]
    texts += [edited(rng.choice(texts), rng.randrange(1, 12), rng) for _ in range(150)]
    texts += [rng.choice(texts).replace(" ", "\n", 3) for _ in range(30)]
    texts += ["", "one", "One!", "?", "...", "one two", "two one", *(random_words(1, rng) * 13)]
    rng.shuffle(texts)
    return texts


# --- which documents share a cluster --------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", [0.5, 0.8, 0.9])
def test_pairs_are_found_as_often_as_the_formula_says(tmp_path, similarity):
    rng = random.Random(1)
    n, n_words = 400, 196
    n_runs = n_words - 4
    n_common = round(2 * similarity / (1 + similarity) * n_runs)  # runs; J = common / (2 runs - common)
    texts = []
    for _ in range(n):
        words = random_words(2 * n_words, rng)
        texts += [
            " ".join(words[:n_words]),
            " ".join(words[: n_common + 4] + words[n_words : 2 * n_words - n_common - 4]),
        ]
    found, counts = duplicates(tmp_path, [texts], NEAR)
    true = n_common / (2 * n_runs - n_common)
    expected = 1 - (1 - true**NEAR.rows) ** NEAR.bands
    assert abs(len(found[0].rows) / n - expected) < 4 * (expected * (1 - expected) / n) ** 0.5 + 1 / n
    assert set(firsts(found, [texts]).items()) <= {(i + 1, i) for i in range(0, 2 * n, 2)}
    assert counts["exact"] == 0


def test_clusters_are_those_of_all_pairs_with_an_equal_key(corpus, tmp_path):
    found, counts = duplicates(tmp_path, [corpus], NEAR)
    holders: dict[tuple[int, int, int], list[int]] = {}
    for band in range(NEAR.n_bands):
        for key, low, row in zip(*read(tmp_path / "0.bands", band), strict=True):
            holders.setdefault((band, key, low), []).append(row)
    pairs = [pair for rows in holders.values() for pair in pairwise(rows)]
    expected = first_of_cluster(pairs)
    assert len(expected) > 100
    assert firsts(found, [corpus]) == expected
    assert counts["clusters"] == len(set(expected.values()))
    assert counts["exact"] + counts["near"] == len(expected)


def test_exact_copies_differ_in_white_space_and_form_of_unicode_alone(tmp_path):
    texts = [
        "caf\u00e9 au lait",
        "Caf\u00e9 au lait",
        " cafe\u0301\tau\n\nlait\n",
        "caf\u00e9 au lait.",
        "caf\u00e9 au la it",
    ]
    found, counts = duplicates(tmp_path, [texts], EXACT)
    assert firsts(found, [texts]) == {2: 0, 4: 0}
    assert counts == {"clusters": 1, "exact": 2, "near": 0}


def test_half_a_key_in_common_makes_no_copy(tmp_path):
    columns = [pa.array([5, 5, 5], pa.uint64()), pa.array([1, 2, 2], pa.uint64()), pa.array([0, 1, 2], pa.uint32())]
    with pa.OSFile(str(tmp_path / "bands"), "wb") as sink, pa.ipc.new_file(sink, BANDS) as writer:
        writer.write_batch(pa.record_batch(columns, schema=BANDS))
    assert link([tmp_path / "bands"], 0, 0, 1, tmp_path / "links") == 1
    assert read(tmp_path / "links") == [[1], [2]]


def test_a_chain_of_small_edits_is_one_cluster_though_its_ends_have_nothing_in_common(tmp_path):
    words = random_words(600, random.Random(3))
    chain = [" ".join(words[i : i + 200]) for i in range(0, 401, 4)]  # J = 192 / 200 from one to the next
    found, counts = duplicates(tmp_path, [chain[::-1]], NEAR)
    assert found[0].rows.tolist() == list(range(1, len(chain)))
    assert set(found[0].firsts.tolist()) == {0}
    assert counts == {"clusters": 1, "exact": 0, "near": len(chain) - 1}


def test_exact_is_who_equals_the_first_by_way_of_equal_documents_alone(tmp_path):
    rng = random.Random(4)
    text = " ".join(random_words(200, rng))
    near = edited(text, 1, rng)
    found, counts = duplicates(tmp_path, [[text, near, text + "\n", near]], NEAR)
    assert found[0].firsts.tolist() == [0, 0, 0]
    assert found[0].exact.tolist() == [False, True, False]
    assert counts == {"clusters": 1, "exact": 1, "near": 2}


def test_documents_without_words_are_copies_only_of_the_same_signs(tmp_path):
    texts = ["", "? !", "?", " ?\n! ", "  "]
    found, _ = duplicates(tmp_path, [texts], NEAR)
    assert firsts(found, [texts]) == {3: 1, 4: 0}


def test_a_long_document_is_a_copy_in_any_pieces(tmp_path):
    rng = random.Random(5)
    words = random_words(5000, rng)
    whole = " ".join(words)
    pieces = [(1, " ".join(words[i : i + 700]) + " ") for i in range(0, 5000, 700)]
    other = [(2, edited(whole, 20, rng)[:20_000]), (2, "")]
    write_bands([(0, whole), *pieces, *other], 3, tmp_path / "bands", NEAR, seed=1)
    links = [tmp_path / f"{band}.links" for band in range(NEAR.n_bands)]
    counts = [link([tmp_path / "bands"], band, 0, 1, path) for band, path in enumerate(links)]
    assert counts == [1] * NEAR.n_bands
    assert all(read(path) == [[0], [1]] for path in links)


# --- files, cuts and order make no difference -----------------------------------------------------------------


@pytest.mark.parametrize("cfg", [EXACT, NEAR], ids=["exact", "near"])
@pytest.mark.parametrize("n_parts", [1, 3, 8])
def test_cuts_into_units_and_parts_make_no_difference(corpus, tmp_path, cfg, n_parts):
    expected, counts = duplicates(tmp_path, [corpus], cfg)
    for cuts in ([], [150], [0, 0, 1, 17, 299]):
        bounds = [0, *cuts, len(corpus)]
        units = [corpus[begin:end] for begin, end in pairwise(bounds)]
        found, same_counts = duplicates(tmp_path, units, cfg, n_parts=n_parts)
        assert firsts(found, units) == firsts(expected, [corpus])
        assert same_counts == counts


def test_the_same_documents_give_the_same_bytes(corpus, tmp_path):
    units = [corpus[:100], [], corpus[100:]]
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        duplicates(folder, units, NEAR, n_parts=2)
    one, other = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one == other
    assert len(one) == len(units) + 2 * NEAR.n_bands + 1  # nothing temporary is left


def test_bands_are_sorted_by_key_and_row(corpus, tmp_path):
    write_bands(enumerate(corpus), len(corpus), tmp_path / "bands", NEAR, seed=1)
    for band in range(NEAR.n_bands):
        rows = list(zip(*read(tmp_path / "bands", band), strict=True))
        assert rows == sorted(rows)


def test_units_without_documents_are_fine(tmp_path):
    found, counts = duplicates(tmp_path, [[], ["a"], []], NEAR)
    assert [len(group.rows) for group in found] == [0, 0, 0]
    assert counts == {"clusters": 0, "exact": 0, "near": 0}


def test_rows_that_were_dropped_before_are_no_copies_of_each_other(tmp_path):
    write_bands([(1, "a"), (4, "b"), (5, "a")], 7, tmp_path / "bands", NEAR, seed=1)
    for band in range(NEAR.n_bands):
        assert sorted(read(tmp_path / "bands", band)[2]) == [1, 4, 5]
        assert link([tmp_path / "bands"], band, 0, 1, tmp_path / "links") == 1
        assert read(tmp_path / "links") == [[1], [5]]


def test_a_duplicate_points_across_units(tmp_path):
    found, _ = duplicates(tmp_path, [["x", "a"], ["b"], ["c", "d", "a", "a"]], EXACT)
    assert [group.rows.tolist() for group in found] == [[], [], [2, 3]]
    assert found[2].firsts.tolist() == [order_number(0, 1)] * 2


@reuse_folder
@given(data=st.data(), n_parts=st.integers(1, 5))
def test_links_join_each_document_to_the_first_with_its_key(tmp_path, data, n_parts):
    keys = data.draw(
        st.lists(st.lists(st.sampled_from([0, 1, 2**62, 2**63, 2**64 - 1]), max_size=8), min_size=1, max_size=4)
    )
    files, first, expected = [], {}, []
    for unit, unit_keys in enumerate(keys):
        rows = sorted(range(len(unit_keys)), key=lambda row: unit_keys[row])
        columns = [[unit_keys[row] for row in rows], [0] * len(rows), rows]
        files.append(tmp_path / f"{unit}.bands")
        with pa.OSFile(str(files[-1]), "wb") as sink, pa.ipc.new_file(sink, BANDS) as writer:
            writer.write_batch(
                pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, BANDS, strict=True)], schema=BANDS)
            )
        for row, key in enumerate(unit_keys):
            document = int(order_number(unit, row))
            if first.setdefault(key, document) != document:
                expected.append((first[key], document))
    found = []
    for part in range(n_parts):
        n_links = link(files, 0, part, n_parts, tmp_path / "links")
        links = list(zip(*read(tmp_path / "links"), strict=True))
        assert n_links == len(links)
        assert links == sorted(links)
        found += links
    assert sorted(found) == sorted(expected)


pairs_of_documents = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 20)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=30
)


@reuse_folder
@given(st.lists(st.tuples(st.integers(0, 2), pairs_of_documents), min_size=1, max_size=6))
def test_clusters_are_the_components_of_all_links(tmp_path, bands):
    spread = [(band, [(a << 30, b << 30) for a, b in pairs]) for band, pairs in bands]  # over several units
    files = [write_links(tmp_path / str(i), band, pairs) for i, (band, pairs) in enumerate(spread)]
    cluster(files, tmp_path / "clusters")
    documents, found, exact = read(tmp_path / "clusters")
    expected = first_of_cluster([pair for _, pairs in spread for pair in pairs])
    exactly = first_of_cluster([pair for band, pairs in spread for pair in pairs if band == 0])
    assert dict(zip(documents, found, strict=True)) == expected
    assert documents == sorted(documents)
    assert exact == [exactly.get(document) == expected[document] for document in documents]
    in_units = [duplicates_in(unit, tmp_path / "clusters") for unit in range(12)]
    assert [int(order_number(u, int(row))) for u, group in enumerate(in_units) for row in group.rows] == documents
    assert [int(first) for group in in_units for first in group.firsts] == found
    assert [bool(flag) for group in in_units for flag in group.exact] == exact
