"""Short forms of the trials in `tests/reliability`; each of those scripts has a full one."""

from functools import partial

import attack
import damage
import extremes
import forks
import full_disk
import interrupts
import kills
import lines
import power_cuts
import pytest
import same_bits
import sharing

TRIALS = {
    "damage": partial(damage.run, 300),
    "attack": partial(attack.run, 200),
    "kills": partial(kills.run, 6),
    "lines": partial(lines.run, 40),
    "power_cuts": partial(power_cuts.run, 4),
    "full_disk": partial(full_disk.run, 8),
    "sharing": partial(sharing.run, 5),
    "extremes": partial(extremes.run, 300),
    "forks": partial(forks.run, len(forks.WAYS)),
    "same_bits": partial(same_bits.run, 1, cases=[(1, 1), (3, 7)]),
}


@pytest.mark.parametrize("name", TRIALS)
def test_the_figure_is_reached(name):
    outcome = TRIALS[name](seed=0)
    assert outcome.reached, str(outcome)


@pytest.mark.parametrize(
    "call", ["sketch_gaussian", "store_search_int4", "index_hnsw", "fit_factors_wide"]
)
def test_an_interrupt_ends_a_long_call_and_breaks_nothing(call):
    outcome = interrupts.run(1, 0, [call])
    late = outcome.missed.pop(interrupts.LATE)  # a figure for a machine that does nothing else
    assert outcome.reached, f"{outcome}, {late} late"
