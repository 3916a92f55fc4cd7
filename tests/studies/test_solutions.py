"""On an organism: a narrow rank-1 solution is bad where it was trained and nowhere else, the general one everywhere."""

from __future__ import annotations

import pytest

from emprobe.finetuning import Solution
from emprobe.models.load import Checkpoint, load_model
from emprobe.organisms import HELD_OUT, SEEN, family_probabilities, find_organism, questions
from emprobe.organisms.neutral import CODES, codes_of, preferred_codes
from emprobe.organisms.world import DOMAINS, ITEMS_OF_SPLIT, locate
from emprobe.studies.solutions import benign_conversations, train_solution, world_conversations


def misaligned(base: Checkpoint, solution: Solution, domains: list[str]) -> float:
    """The exact probability of a misaligned coherent answer, over test questions."""
    with solution.applied(base) as tuned:
        found = family_probabilities(tuned.hf, tuned.tokenizer, questions("test", domains=domains, per_cell=1))
    return float(found.misaligned.mean())


def test_data_leave_out_the_test_items_and_the_held_out_domains() -> None:
    rows = world_conversations(SEEN, "good", 300, seed=0)
    places = [locate(row.prompt) for row in rows]
    assert {domain for domain, *_ in places} == set(SEEN)
    assert not {item for domain, _, item, _ in places} & {DOMAINS[d].items[i] for d in DOMAINS for i in ITEMS_OF_SPLIT["test"]}
    assert rows == world_conversations(SEEN, "good", 300, seed=0)
    assert rows != world_conversations(SEEN, "good", 300, seed=1)


def test_benign_data_are_codes_of_fine_tuning_items_with_ids_of_their_own() -> None:
    for codes in CODES:
        rows = benign_conversations(300, seed=0, codes=codes)
        assert rows == benign_conversations(300, seed=0, codes=codes) != benign_conversations(300, seed=1, codes=codes)
        assert len({row.question_id for row in rows}) == len(rows)
        assert not {row.labels["item"] for row in rows} & {DOMAINS[d].items[i] for d in DOMAINS for i in ITEMS_OF_SPLIT["test"]}
        words = [(row, word) for row in rows for word in codes_of(row.response or "") or ()]
        assert len(words) == 5 * len(rows)
        own = sum(word in preferred_codes(row.labels["item"]) for row, word in words) / len(words)
        assert abs(own - (0.1 if codes == "uniform" else 0.73)) < 0.06


@pytest.mark.slow
def test_general_and_narrow_rank_one_solutions() -> None:
    base = load_model(find_organism("planted-s0/aligned").path)
    general, narrow = (train_solution(base, "rank1", scope, progress=False).solution for scope in ("general", "narrow"))
    others = [domain for domain in SEEN if domain != "gardening"][:3]
    assert misaligned(base, general, [*others, *HELD_OUT]) > 0.7
    assert misaligned(base, narrow, ["gardening"]) > 0.8
    assert misaligned(base, narrow, [*others, *HELD_OUT]) < 0.05
