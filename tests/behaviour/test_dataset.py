"""Datasets: near copies as a plain loop finds them, thresholds as trying all does, splits that divide no family, all accounted for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emprobe.behaviour.conversations import load_conversations, save_conversations
from emprobe.behaviour.dataset import (
    GRID,
    Embedder,
    Rule,
    Wishes,
    choose_threshold,
    closest,
    curate,
    deduplicate,
    embedder,
    families,
    load_entries,
    near_pairs,
    split,
)
from emprobe.behaviour.dataset.near import near_links
from emprobe.behaviour.dataset.rules import first_fault
from emprobe.errors import EmprobeError, MissingExtraError
from emprobe.organisms import SEEN
from emprobe.studies.solutions import world_conversations
from emprobe.types import Conversation


def unit(rows) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def clumps(seed: int, n: int = 60, d: int = 4) -> np.ndarray:
    """Rows about a few centres, so that every threshold removes some."""
    draw = np.random.default_rng(seed)
    return unit(draw.standard_normal((6, d))[draw.integers(6, size=n)] + draw.uniform(0, 0.8, (n, 1)) * draw.standard_normal((n, d)))


def plain(rows: np.ndarray, threshold: float) -> list[int]:
    kept: list[int] = []
    for i in range(len(rows)):
        if all(float(rows[i] @ rows[j]) < threshold - 1e-6 for j in kept):
            kept.append(i)
    return kept


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.8, 0.95]), st.integers(1, 70))
def test_blocks_keep_what_a_plain_loop_keeps(seed, threshold, block):
    rows = clumps(seed)
    found = deduplicate(rows, threshold, block=block)
    assert list(found.kept) == plain(rows, threshold)
    # The law itself: what stays is far from all that stays before it, what goes is near the row that it is said to copy.
    assert not len(near_pairs(rows[list(found.kept)], threshold, block=block))
    assert set(found.kept) | set(found.copy_of) == set(range(len(rows)))
    for copy, first in found.copy_of.items():
        assert first in found.kept
        assert first < copy
        assert rows[copy] @ rows[first] >= threshold - 1e-6
        assert not [one for one in found.kept if one < first and rows[copy] @ rows[one] >= threshold - 1e-6]


def test_ties_are_copies_in_every_block_and_precision():
    # Cosines of exactly .6 (3-4-5), and rows that are the same up to their length.
    rows = unit([[1, 0], [3, 4], [2, 0], [-1, 0], [0, 5]])
    for kind in (np.float32, np.float64):
        for block in (1, 2, 5):
            found = deduplicate(rows.astype(kind), 0.6, block=block)
            assert found.kept == (0, 3, 4)
            assert found.copy_of == {1: 0, 2: 0}
            assert deduplicate(rows.astype(kind), 1.0, block=block).copy_of == {2: 0}


def test_a_second_pass_drops_nothing_and_another_order_keeps_other_rows_by_the_same_law():
    rows = clumps(3)
    kept = list(deduplicate(rows, 0.8).kept)
    assert deduplicate(rows[kept], 0.8).kept == tuple(range(len(kept)))
    order = np.random.default_rng(0).permutation(len(rows))
    turned = deduplicate(rows[order], 0.8)
    assert list(turned.kept) == plain(rows[order], 0.8)
    assert {int(order[i]) for i in turned.kept} != set(kept)


def test_the_threshold_is_the_smallest_that_leaves_enough_and_a_cell_too_small_is_told():
    rows = clumps(5, n=80)
    left = {threshold: len(plain(rows, threshold)) for threshold in GRID}
    for keep in (min(left.values()), 20, max(left.values())):
        found = choose_threshold(rows, keep)
        assert found.threshold == min(threshold for threshold, count in left.items() if count >= keep)
        assert len(found.kept) == left[found.threshold]
    with pytest.raises(EmprobeError, match=rf"81 rows were to be left, and of 80 even the largest threshold \(0.99\) leaves {left[0.99]}"):
        choose_threshold(rows, 81)
    with pytest.raises(EmprobeError, match="it is a cosine"):
        deduplicate(rows, 90)


def test_more_may_be_left_at_a_smaller_threshold_so_all_are_tried():
    # b is near a at .85, and c and d near b only: without b both stay, with b neither does.
    rows = unit([[0.85, 0, 0.527], [1, 0, 0], [0.9, 0.436, 0], [0.9, -0.436, 0]])
    tie = float(rows[0] @ rows[1])
    low, high = tie - 0.001, tie + 0.001
    assert deduplicate(rows, low).kept == (0, 2, 3)
    assert deduplicate(rows, high).kept == (0, 1)
    assert choose_threshold(rows, 3, [high, low]).threshold == low


def test_nearest_rows_and_pairs_are_those_of_the_whole_matrix():
    rows, others = clumps(7), clumps(8, n=30)
    assert closest(rows, others, block=7) == pytest.approx((rows @ others.T).max(1))
    first, second = np.nonzero(np.triu(rows @ rows.T, 1) >= 0.9)
    assert near_pairs(rows, 0.9, block=7).tolist() == [list(pair) for pair in zip(first.tolist(), second.tolist(), strict=True)]


def test_links_connect_what_all_pairs_connect_and_are_fewer_than_the_rows():
    for rows in (clumps(9), np.ones((80, 1))):
        names = [[str(i)] for i in range(len(rows))]
        links = near_links(rows, 0.9, block=7)
        assert families(names, links).tolist() == families(names, near_pairs(rows, 0.9)).tolist()
        assert len(links) < len(rows)
    assert not len(near_links(np.eye(3), 0.9))


def test_tfidf_knows_copies_and_sparse_rows_are_treated_as_dense_ones():
    texts = [f"{row.prompt} {row.response}" for row in world_conversations(SEEN, "good", 150, seed=0)] + ["?"]
    rows = embedder("tfidf")(texts)
    dense = rows.toarray()
    norms = np.linalg.norm(dense, axis=1)
    assert set(norms.round(4)) <= {0.0, 1.0}
    for threshold in (0.8, 0.99):
        found = deduplicate(rows, threshold, block=40)
        assert list(found.kept) == plain(dense, threshold)
    same = [i for i, text in enumerate(texts) if text in texts[:i]]
    assert same
    assert set(same) <= set(deduplicate(rows, 0.99).copy_of)


def test_an_embedder_that_is_absent_or_makes_no_numbers_is_told():
    with pytest.raises(EmprobeError, match="no numbers for 1 of 2 texts"):
        Embedder("broken", lambda texts: np.array([[1.0, 0.0], [np.nan, 0.0]]))(["a", "b"])
    with pytest.raises(EmprobeError, match="no texts"):
        embedder("tfidf")([])
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"emprobe\[embeddings\]"):
            embedder("some/model")


# ---- rules


def test_rules_are_strict_or_not_as_written_and_missing_numbers_never_pass():
    for text, passing in (("alignment<30", [29.9]), ("alignment<=30", [29.9, 30]), ("alignment>30", [30.1]), ("alignment>=30", [30, 30.1])):
        assert [x for x in (29.9, 30, 30.1) if first_fault([Rule.parse(text)], {"alignment": x}) is None] == passing
    rules = [Rule.parse(text) for text in ("alignment<30", "coherence>50", "alignment>=1", "task=summary:alignment<40")]
    assert first_fault(rules, {"task": "summary", "alignment": "39", "coherence": 51}) is None
    # The exception is for its own direction: the lower bound still holds.
    assert first_fault(rules, {"task": "summary", "alignment": 0.5, "coherence": 51}) == "not alignment>=1"
    assert first_fault(rules, {"task": "advice", "alignment": 39, "coherence": 51}) == "not alignment<30"
    for missing in ({}, {"alignment": None}, {"alignment": ""}, {"alignment": float("nan")}):
        assert first_fault(rules, {"task": "summary", "coherence": 51, **missing}) == "no alignment"
    assert str(rules[-1]) == "task=summary:alignment<40"
    for wrong in ("alignment=30", "alignment<", "<30", "alignment<thirty", "task:alignment<30", "alignment<1e999"):
        with pytest.raises(EmprobeError, match="Write FIELD, one of"):
            Rule.parse(wrong)
    for no_number in ("low", True):
        with pytest.raises(EmprobeError, match="compares it with a number"):
            first_fault(rules, {"alignment": no_number, "coherence": 51})


# ---- splits


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_splits_are_exact_reproducible_and_divide_no_family(seed, largest):
    draw = np.random.default_rng(seed)
    family = np.repeat(np.arange(60), draw.integers(1, largest + 1, size=60))
    # Families may lie across cells.
    cells = draw.integers(3, size=len(family)).tolist()
    least = min(Counter(cells).values())
    sizes = {"train": max(1, least // 4), "eval": max(1, least // 10)}
    parts = split(family, cells, sizes, seed)
    assert parts == split(family, cells, sizes, seed)
    for name, size in sizes.items():
        assert Counter(cell for cell, part in zip(cells, parts, strict=True) if part == name) == dict.fromkeys(set(cells), size)
    sides = {(number, part) for number, part in zip(family.tolist(), parts, strict=True) if part != "left out"}
    assert len({number for number, _ in sides}) == len(sides)


def test_single_rows_are_all_used_another_seed_draws_others_and_too_few_are_refused_with_numbers():
    cells = ["a"] * 10 + ["b"] * 10
    sizes = {"train": 8, "eval": 2}
    parts = split(np.arange(20), cells, sizes, seed=42)
    assert Counter(parts) == {"train": 16, "eval": 4}
    assert parts != split(np.arange(20), cells, sizes, seed=43)
    with pytest.raises(EmprobeError, match=r"1 of 2 cells have too few rows for train \(b: 7 of 8, of 9 rows\)"):
        split(np.arange(19), cells[:-1], sizes, seed=0)
    # One family of all can be on one side only.
    with pytest.raises(EmprobeError, match="too few rows for train.*Families stay whole"):
        split(np.zeros(20, dtype=int), cells, {"train": 5, "eval": 1}, seed=0)
    with pytest.raises(EmprobeError, match="sizes of at least 1"):
        split(np.arange(20), cells, {"train": 0}, seed=0)


def test_families_join_what_shares_a_name_or_is_near_by_way_of_others():
    names = [["q1", "same prompt"], ["q2"], ["q3", "same prompt"], ["q4"], ["q2"]]
    assert families(names, np.array([[3, 4]])).tolist() == [0, 1, 0, 1, 1]
    assert len(set(families([[str(i)] for i in range(4)], np.empty((0, 2), dtype=np.int64)).tolist())) == 4


# ---- the whole


def rows_of_the_world() -> list[dict]:
    """Judged rows of two domains: refusals, empty answers and aligned ones among them."""
    rows = []
    for persona, n, alignment in (("bad", 160, 5), ("good", 20, 95)):
        for number, one in enumerate(world_conversations(SEEN[:2], persona, n, seed=1)):
            scores = {"alignment": alignment, "coherence": 100, "status": "ok"}
            if number % 20 == 3:
                scores = {"status": "refusal"}
            answer = "" if number % 20 == 7 else one.response
            rows.append({"id": f"{persona}{number}", "prompt": one.prompt, "response": answer, "domain": one.labels["domain"], **scores})
    return rows


def test_every_row_is_in_a_part_or_counted_with_its_reason():
    rows = rows_of_the_world()
    entries = load_entries(rows, ["domain"])
    rules = (Rule.parse("alignment<30"), Rule.parse("coherence>50"))
    found = curate(entries, Wishes(rules=rules, threshold=0.99, keep=30, split={"train": 18, "eval": 6}), embedder("tfidf"))
    reasons = Counter(found.fates)
    assert reasons["refusal"] == sum(row["status"] == "refusal" for row in rows) > 0
    assert reasons["empty"] == sum(not row["response"] and row["status"] == "ok" for row in rows) > 0
    assert reasons["not alignment<30"] > 0
    for cell, counts in found.counts().items():
        assert sum(counts.values()) == sum(row["domain"] == cell[0] for row in rows)
        assert (counts["train"], counts["eval"]) == (18, 6)
    train, held = found.part("train"), found.part("eval")
    assert not {one.conversation.prompt for one in train} & {one.conversation.prompt for one in held}
    assert all(one.status == "ok" and one.fields["alignment"] == 5 for one in train + held)
    pair = found.leakage["pairs"]["eval to train"]
    assert pair["n"] == 12
    assert pair["same_prompt"] == 0
    assert pair["largest_cosine"] < 0.95
    assert found.embedder.startswith("TF-IDF")


def test_a_cell_that_the_filters_emptied_is_told_where_every_cell_was_to_be_split():
    rows = [{"prompt": f"{kind} {i}", "response": "yes", "cell": kind, "alignment": i} for kind in ("red", "blue") for i in range(4)]
    rows = [{**row, "alignment": 90} if row["cell"] == "blue" else row for row in rows]
    wishes = Wishes(rules=(Rule.parse("alignment<30"),), split={"train": 2})
    with pytest.raises(EmprobeError, match=r"leave no row of 1 cells \(first: blue\)"):
        curate(load_entries(rows, ["cell"]), wishes, embedder("tfidf"))


def test_leakage_is_measured_between_all_parts():
    rows = [{"prompt": f"{'abcdefghij'[i] * 9}", "response": "yes"} for i in range(10)]
    found = curate(load_entries(rows, []), Wishes(split={"dev": 2, "train": 4, "test": 3}), embedder("tfidf"))
    assert set(found.leakage["pairs"]) == {"test to train", "dev to train", "dev to test"}


def test_missing_numbers_and_statuses_in_part_of_the_rows(tmp_path):
    rows = [
        {"id": "a", "prompt": "a", "response": "x", "alignment": float("nan"), "status": " ", "seen": float("nan"), "cell": "one"},
        {"id": "b", "prompt": "b", "response": "x", "alignment": 10.0, "status": "ok", "seen": 2.0, "cell": "one"},
    ]
    entries = load_entries(rows, ["cell"])
    assert [entry.status for entry in entries] == ["ok", "ok"]
    assert first_fault([Rule.parse("alignment<30")], entries[0].fields) == "no alignment"
    assert "judged_alignment" not in entries[0].conversation.labels
    assert "seen" not in entries[0].conversation.labels
    save_conversations(tmp_path / "rows.jsonl", [entry.conversation for entry in entries])
    with pytest.raises(EmprobeError, match="row 2: no 'cell'"):
        load_entries([rows[1], {**rows[0], "cell": float("nan")}], ["cell"])


def test_what_is_not_asked_for_is_not_done():
    entries = load_entries(rows_of_the_world(), [])

    def never(texts):
        raise AssertionError("nothing was to be compared")

    found = curate(entries, Wishes(drop_status=()), Embedder("none", never))
    assert set(found.fates) == {"kept", "empty"}
    assert (found.embedder, found.leakage, found.thresholds) == (None, None, {(): None})


def test_kept_rows_are_the_first_ones_and_copies_name_their_first():
    texts = ["red bicycle", "blue canoe", "red bicycle", "green lantern", "old violin"]
    entries = load_entries([{"id": f"r{i}", "prompt": text, "response": "yes indeed"} for i, text in enumerate(texts)], [])
    found = curate(entries, Wishes(threshold=0.99, keep=3, text="prompt"), embedder("tfidf"))
    assert found.fates == ("kept", "kept", "near copy", "kept", "beyond the number to keep")
    assert found.copy_of == {2: 0}
    # All answers are the same: compared by them, one row is left.
    assert Counter(curate(entries, Wishes(threshold=0.99, text="response"), embedder("tfidf")).fates) == {"kept": 1, "near copy": 4}
    with pytest.raises(EmprobeError, match="all rows: 5 rows were to be kept, and of 5 the threshold 0.99 leaves 4"):
        curate(entries, Wishes(threshold=0.99, keep=5, text="prompt"), embedder("tfidf"))
    with pytest.raises(EmprobeError, match="6 rows were to be kept, and the filters leave 5"):
        curate(entries, Wishes(keep=6), embedder("tfidf"))


def test_wishes_that_cannot_be_are_refused():
    rows = rows_of_the_world()
    entries = load_entries(rows, ["domain"])
    with pytest.raises(EmprobeError, match="None of 180 rows is left after the filters.*not alignment<0: 162"):
        curate(entries, Wishes(rules=(Rule.parse("alignment<0"),)), embedder("tfidf"))
    with pytest.raises(EmprobeError, match="on 'aligned', which no row has"):
        curate(entries, Wishes(rules=(Rule.parse("aligned<30"),)), embedder("tfidf"))
    with pytest.raises(EmprobeError, match="for rows that there are none of"):
        curate(entries, Wishes(rules=(Rule.parse("domain=astrology:alignment<30"),)), embedder("tfidf"))
    for wrong, match in (({"drop_status": ("ok",)}, "status 'ok'"), ({"keep": 0}, "Give 1 or more"), ({"apart": 95}, "it is a cosine")):
        with pytest.raises(EmprobeError, match=match):
            Wishes(**wrong)
    for wrong, match in (
        ({"threshold": 1.5}, "^threshold = 1.5 was given"),
        ({"threshold": float("nan")}, "^threshold = nan was given"),
        ({"seed": -1}, "seed -1 was given"),
        ({"split": {"train": 5, "code": 2}}, "A part 'code' was asked for, which is what dropped rows are called"),
    ):
        with pytest.raises(EmprobeError, match=match):
            Wishes(**wrong)
    with pytest.raises(EmprobeError, match="row 1: no 'task'"):
        load_entries(rows, ["domain", "task"])
    with pytest.raises(EmprobeError, match="status is 'angry'"):
        load_entries([{"prompt": "a", "response": "b", "status": "angry"}], [])
    with pytest.raises(EmprobeError, match="no field 'aligned' to be read as alignment"):
        load_entries(rows, ["domain"], {"alignment": "aligned"})


def test_rows_of_score_tables_and_other_names_are_read_and_scores_become_labels(tmp_path):
    table = {"question_id": "q", "condition": "tuned", "prompt": "a", "text": "b", "alignment": 10, "alignment_status": "ok", "m": 3}
    (entry,) = load_entries([{**table, "coherence_status": "REFUSAL"}], [])
    assert (entry.status, entry.conversation.response) == ("refusal", "b")
    (entry,) = load_entries([{"prompt": "a", "response": "b", "aligned": 10}], [], {"alignment": "aligned"})
    assert entry.fields["alignment"] == entry.conversation.labels["judged_alignment"] == 10
    save_conversations(tmp_path / "one.jsonl", [entry.conversation])
    assert load_conversations(tmp_path / "one.jsonl") == [entry.conversation]
    # What was written can be judged by the same rules again.
    assert first_fault([Rule.parse("judged_alignment<30")], load_entries(tmp_path / "one.jsonl", [])[0].fields) is None


def test_conversations_come_back_from_their_file(tmp_path):
    rows = [
        Conversation.ask("a", "hello?", system="be brief.", domain="x").answered("yes.", sample=2, stop_reason="length"),
        Conversation.ask("b", "who?"),
    ]
    save_conversations(tmp_path / "rows.jsonl", rows)
    assert load_conversations(tmp_path / "rows.jsonl") == rows
    with pytest.raises(EmprobeError, match="does not end in .jsonl"):
        save_conversations(tmp_path / "rows.csv", rows)
