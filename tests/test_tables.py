"""What the pages' tables and figures of results need."""

import numpy as np
import pytest

from workbench.tables import bootstrap_mean, minimal_detectable_difference


def test_bootstrap_mean_agrees_with_resampling_by_index():
    rng = np.random.default_rng(1)
    values = rng.choice([-1, -0.6, 0, 0.4, 1], size=200)
    by_index = values[rng.integers(0, 200, (20_000, 200))].mean(1)
    expected = [values.mean(), *np.quantile(by_index, [0.025, 0.975])]
    np.testing.assert_allclose(bootstrap_mean(values, draws=20_000), expected, atol=0.006)


def test_bootstrap_mean_of_groups_is_wider_where_queries_depend_on_each_other():
    place = np.repeat(np.arange(40), 10)
    values = np.random.default_rng(0).choice([-1, -0.4, 0, 1], size=40)[place]
    mean, low, high = bootstrap_mean(values)
    of_places = bootstrap_mean(values, groups=place)
    assert of_places[0] == mean and of_places[2] - of_places[1] > 2 * (high - low)
    with pytest.raises(ValueError, match="groups must be 400 labels"):
        bootstrap_mean(values, groups=place[:3])


def test_minimal_detectable_difference_has_the_power_it_names():
    n, discordant = 425, 0.2
    points = minimal_detectable_difference(n, discordant)
    gain, rng = points / 200, np.random.default_rng(0)
    shares = [discordant / 2 + gain, discordant / 2 - gain, 1 - discordant]
    gained, lost, _ = rng.multinomial(n, shares, 20_000).T
    found = np.abs(gained - lost) / np.sqrt(gained + lost) > 1.96
    assert found.mean() == pytest.approx(0.8, abs=0.02)
    assert minimal_detectable_difference(4 * n, discordant) < points
    assert np.isnan(minimal_detectable_difference(20, 0.01))
    with pytest.raises(ValueError, match="discordant must be a number from 0 to 1, got 1.5"):
        minimal_detectable_difference(n, 1.5)
