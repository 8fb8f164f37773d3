"""Short forms of the trials in `tests/reliability`; each of those scripts has a full one."""

import attack
import damage
import extremes
import full_disk
import kills
import power_cuts
import pytest
import sharing


@pytest.mark.parametrize(
    ("trial", "count"),
    [
        (damage, 300),
        (attack, 200),
        (kills, 6),
        (power_cuts, 4),
        (full_disk, 8),
        (sharing, 5),
        (extremes, 300),
    ],
    ids=lambda each: getattr(each, "__name__", str(each)),
)
def test_the_figure_is_reached(trial, count):
    outcome = trial.run(count, seed=0)
    assert outcome.reached, str(outcome)
