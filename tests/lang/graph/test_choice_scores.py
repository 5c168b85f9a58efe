"""Scores and probabilities of choices."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from ramet.lang.graph.choice_scores import choose, num_shared, probabilities, scores

TOKENS = [[1], [1, 2], [3, 4, 5]]
LOGPROBS = [[-1.0], [-1.0, -0.1], [-2.0, -0.01, -0.01]]


def test_likelihood_is_the_sum_and_normalised_the_mean() -> None:
    assert scores("likelihood", TOKENS, LOGPROBS) == [-1.0, -1.1, -2.02]
    mean = scores("token_normalized", TOKENS, LOGPROBS)
    assert [round(value, 4) for value in mean] == [-1.0, -0.55, -0.6733]


def test_greedy_follows_the_likeliest_token_of_the_trie() -> None:
    found = scores("greedy", TOKENS, LOGPROBS)
    assert choose(found, 0, None) == 1  # token 1 beats token 3, and the longer choice is followed


def test_unconditional_likelihood_is_taken_off() -> None:
    found = scores("unconditional", [[1], [2]], [[-1.0], [-1.2]], [[-0.5], [-3.0]])
    assert found == [-0.5, 1.8]


def test_calibrated_takes_off_half_of_the_neutral_likelihood_and_half_of_the_length() -> None:
    found = scores("calibrated", [[1], [2, 3, 4, 5]], [[-3.0], [-2.0] * 4], [[-2.0], [-3.0] * 4])
    assert found == [-3.0 + 1.0, (-8.0 + 6.0) / 2]


def test_a_choice_that_begins_another_one_wins_by_calibrated_scores_only_if_it_is_likelier_than_usual() -> None:
    tokens, logprobs = [[7], [7, 8]], [[-2.0], [-2.0, -0.1]]
    assert choose(scores("likelihood", tokens, logprobs), 0, None) == 0, "whatever follows"
    assert choose(scores("calibrated", tokens, logprobs, [[-2.0], [-2.0, -6.0]]), 0, None) == 1
    assert choose(scores("calibrated", tokens, [[-2.0], [-2.0, -9.0]], [[-2.0], [-2.0, -6.0]]), 0, None) == 0


def test_every_choice_keeps_a_token_of_its_own() -> None:
    assert num_shared([[1, 2, 3], [1, 2, 4]]) == 2
    assert num_shared([[1, 2], [1, 2, 4]]) == 1
    assert num_shared([[1], [1, 2], [1, 3]]) == 0
    assert num_shared([[1, 2, 3]]) == 3, "a single choice is not compared"


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=2, max_size=5))
def test_what_choices_share_is_common_and_less_than_any_of_them(choices: list[list[int]]) -> None:
    found = num_shared(choices)
    assert all(len(tokens) > found for tokens in choices)
    assert len({tuple(tokens[:found]) for tokens in choices}) == 1
    shortest = min(map(len, choices))
    assert found == shortest - 1 or len({tokens[found] for tokens in choices}) > 1


@given(st.lists(st.floats(-1000, 0), min_size=1, max_size=20))
def test_probabilities_sum_to_one_and_keep_the_order(values: list[float]) -> None:
    found = probabilities(values)
    assert math.isclose(sum(found), 1.0, abs_tol=1e-9)
    assert found[choose(values, 0, None)] == max(found)


def test_a_choice_is_drawn_by_its_probability() -> None:
    values = [math.log(0.2), math.log(0.8)]
    drawn = [choose(values, 1.0, seed) for seed in range(2000)]
    assert abs(sum(drawn) / 2000 - 0.8) < 0.05
    sharp = [choose(values, 0.2, seed) for seed in range(500)]
    assert sum(sharp) / 500 > 0.98
