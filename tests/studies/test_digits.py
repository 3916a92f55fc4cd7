"""Ghost outputs: students of the same beginnings learn digits they never saw, others do not; and what the theorem promises holds."""

from __future__ import annotations

import json

import pytest
import torch

from emprobe.errors import EmprobeError
from emprobe.report.digits_plots import NAMES, draw_ghosts
from emprobe.studies.channels.digits import CLASSES, STUDENTS, _initial, first_steps, forward, ghost_transfer

SEEDS = (0, 1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def found():
    return ghost_transfer(seeds=SEEDS, teacher_steps=400, student_steps=400)


def test_the_same_initial_weights_carry_digits_through_ghosts_and_others_do_not(found):
    assert found.accuracy("teacher").low > 0.95
    assert found.difference().low > 0.3
    assert found.difference("same", "shuffled").low > 0.3
    assert abs(found.difference("other", "untrained").value) < 0.1
    # Class outputs tell what a digit is to any student.
    assert found.accuracy("classes").low > 0.9


def test_a_record_and_its_figure_show_every_seed(found):
    record = json.loads(json.dumps(found.as_dict()))
    assert record["same_minus_other"]["clusters"] == len(SEEDS)
    assert set(record["accuracies"]) == set(record["estimates"]) == set(NAMES) == {"teacher", "untrained", *STUDENTS}
    axes = draw_ghosts(record)
    dots = [sorted(x for x, _ in part.get_offsets()) for part in axes.collections if len(part.get_offsets()) == len(SEEDS)]
    assert sorted(100 * value for value in found.accuracies["same"]) in [pytest.approx(row) for row in dots]


def test_nothing_taught_is_nothing_learned():
    idle = ghost_transfer(teacher_steps=0, student_steps=20, seeds=(0, 1, 2))
    assert idle.accuracies["teacher"] == idle.accuracies["untrained"]
    # The student's loss is 0 but for rounding, which Adam makes small steps of.
    assert idle.accuracies["same"] == pytest.approx(idle.accuracies["untrained"], abs=0.02)
    assert idle.accuracy("other").value < 0.25


def test_a_seed_gives_the_same_whatever_seeds_are_beside_it():
    short = {"teacher_steps": 40, "student_steps": 40}
    together, apart = ghost_transfer(seeds=(3, 4, 5), **short), ghost_transfer(seeds=(5, 9), **short)
    for name in together.accuracies:
        assert together.accuracies[name][2] == pytest.approx(apart.accuracies[name][0], abs=0.01)


def test_networks_in_one_batch_are_plain_ones():
    networks = _initial((7, 8), 3)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    for one in range(2):
        w1, b1, w2, b2, w3, b3 = (layer[one] for layer in networks)
        plain = ((x[one] @ w1 + b1).relu() @ w2 + b2).relu() @ w3 + b3
        torch.testing.assert_close(forward(networks, x)[one], plain)
        assert plain.shape == (5, CLASSES + 3)


@pytest.mark.parametrize("ghosts", [2, 16])
def test_the_first_step_goes_the_teachers_way_from_its_own_beginning_and_any_way_from_another(ghosts):
    cosines = first_steps(ghosts=ghosts, teacher_steps=1, seeds=range(12))
    assert min(cosines["same"]) > 0
    assert min(cosines["other"]) < 0 < max(cosines["other"])
    assert max(map(abs, cosines["other"])) < min(cosines["same"]) + 0.03
    assert first_steps(teacher_steps=0, seeds=(0, 1))["same"] == [0, 0]


def test_numbers_that_say_nothing_are_refused():
    with pytest.raises(EmprobeError, match="1 ghost outputs.*Give 2 or more"):
        ghost_transfer(ghosts=1)
    with pytest.raises(EmprobeError, match="-1 teacher and 5 student steps"):
        ghost_transfer(teacher_steps=-1, student_steps=5)
    for seeds in ((0,), (1, 1)):
        with pytest.raises(EmprobeError, match="at least 2, each once"):
            ghost_transfer(seeds=seeds)
