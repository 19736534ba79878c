"""Which routing decisions are excused, and which are not."""

from dataclasses import replace

import numpy as np
import pytest

from wse_emu.equivalence.routing import judge_assigned, judge_routing, judge_together
from wse_emu.equivalence.routing_bounds import probability_tolerance
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.foundation.taps import TapRecord


def judge(ids, own, exact=None, bound=1e-6):
    own = np.array([own], np.float32)
    exact = own.astype(np.float64) if exact is None else np.array([exact], np.float64)
    zero = np.zeros(1, np.int64)
    return judge_routing(TapRecord(zero, zero, zero), 3, np.array([ids]), own, exact, np.full(exact.shape, bound))


def test_the_highest_in_descending_order_are_right():
    found = judge([2, 0], [1.0, 0.5, 3.0, -1.0])
    assert found.fault is None
    assert (found.exact_ties, found.rounded_ties, found.swaps, found.misordered, found.near_ties) == (0, 0, 0, 0, [])


@pytest.mark.parametrize(
    ("ids", "named"), [([0, 2], 0), ([2, 1], 1), ([3, 0], 3), ([2, 3], 3)], ids=["order", "third best", "worst first", "worst second"]
)
def test_anything_else_is_wrong_and_the_first_wrong_slot_named(ids, named):
    found = judge(ids, [1.0, 0.5, 3.0, -1.0])
    assert (found.faulty_tokens, found.misordered) == (1, 1)
    assert found.fault.expert == named
    assert "its own router logits rank [2, 0]" in found.fault.message


def test_equal_scores_go_to_the_lowest_id():
    own = [1.0, 2.0, 2.0, 2.0]
    assert judge([1, 2], own).fault is None
    assert judge([1, 2], own).exact_ties == 1
    for wrong in ([2, 1], [1, 3], [2, 3]):
        assert judge(wrong, own).misordered == 1


def test_a_tie_below_the_last_chosen_is_no_tie():
    assert judge([3, 0], [1.0, 0.5, 0.5, 3.0]).exact_ties == 0
    assert judge([3, 0], [1.0, 1.0, 0.5, 3.0]).exact_ties == 1


@pytest.mark.parametrize(("gap", "excused"), [(1e-7, True), (2.3e-6, True), (2.5e-6, False), (0.4, False)])
def test_a_set_that_float64_would_not_choose_is_excused_up_to_the_tolerance(gap, excused):
    """Two logits known to 1e-6 each, and two probabilities to 3 u each and what their distance from the maximum, 0.5, adds."""
    found = judge([2, 0], [1.5, 1.0, 2.0, 0.0], exact=[1.5 - 1.5e-6, 1.5 - 1.5e-6 + gap, 2.0, 0.0])
    assert found.misordered == 0
    assert (len(found.near_ties), found.swaps) == ((1, 0) if excused else (0, 1))
    if excused:
        (tie,) = found.near_ties
        assert (tie.layer, tie.chosen, tie.ideal) == (3, (0,), (1,))
        assert tie.gap == pytest.approx(gap, rel=1e-6)
        assert tie.tolerance == pytest.approx(2e-6 + 2 * 3.5 * 2**-24, rel=1e-6)
    else:
        assert found.fault.expert == 0
        assert "float64 scores put expert 1 above expert 0" in found.fault.message


def test_scores_whose_float32_probabilities_are_equal_may_stand_in_either_order():
    low, high = np.float32(-8.0), np.nextafter(np.float32(-8.0), np.float32(0))
    assert np.exp(low) != np.exp(high) or np.exp(np.float32(low)) == np.exp(np.float32(high))
    own = [low, high, np.float32(0.0)]
    for ids in ([2, 1], [2, 0]):
        assert judge(ids, own).fault is None
    assert judge([2, 0], own).rounded_ties == 1
    assert judge([2, 1], own).rounded_ties == 0


def test_experts_without_any_probability_may_be_chosen_in_any_order():
    own = [0.0, -200.0, -150.0]
    assert judge([0, 1], own).fault is None
    assert judge([0, 2], own).fault is None
    assert judge([1, 0], own).misordered == 1
    assert judge([0, 1], [0.0, -60.0, -50.0]).misordered == 1


def test_probability_tolerance_grows_with_the_distance_from_the_maximum():
    u = 2.0**-24
    allowed = probability_tolerance(np.array([5.0, 1.0, -200.0]))
    assert allowed[0, 0] == pytest.approx(6 * u)
    assert allowed[0, 1] == pytest.approx(10 * u)
    assert np.isinf(allowed[2, 2])
    assert np.isfinite(allowed[0, 2])


GROUPS = RoutingRule(router_selection_nonlinearity="none", expert_weighting_nonlinearity="softmax", n_group=3, topk_group=1)


def judge_by(rule, ids, own, exact=None, bound=1e-6, correction=None):
    own = np.array([own], np.float32)
    exact = own.astype(np.float64) if exact is None else np.array([exact], np.float64)
    zero = np.zeros(1, np.int64)
    record = TapRecord(zero, zero, zero)
    added = None if correction is None else np.array(correction, np.float64)
    return judge_routing(record, 0, np.array([ids]), own, exact, np.full(exact.shape, bound), rule=rule, correction=added)


def test_experts_of_a_shut_group_may_score_higher():
    """The best expert lies in group 0; a group that scores as high by a hair was opened instead, and its own best were taken."""
    own = [5.0, 0.0, 5.0, 1.0, 4.0, 4.0]
    assert judge_by(GROUPS, [0, 1], own).fault is None
    near = judge_by(GROUPS, [2, 3], [5.0, 0.0, 5.0000005, 1.0, 4.0, 4.0], exact=[5.0, 0.0, 5.0 - 1e-7, 1.0, 4.0, 4.0])
    assert near.fault is None
    assert (len(near.near_ties), near.swaps) == (1, 0)


def test_a_group_opened_against_its_score_is_wrong():
    found = judge_by(GROUPS, [4, 5], [5.0, 0.0, 3.0, 1.0, 4.0, 4.0])
    assert (found.swaps, found.misordered) == (1, 1)
    assert found.fault.expert == 4
    assert "float64 scores put expert 0 above expert 4 by 1" in found.fault.message


def test_the_worse_expert_of_an_open_group_is_wrong():
    rule = replace(GROUPS, topk_group=2)
    own = [5.0, 4.5, 4.0, 1.0, 0.0, 0.0]
    assert judge_by(rule, [0, 1], own).fault is None
    assert judge_by(rule, [0, 2], own).misordered == 1  # both groups gave an expert
    own = [5.0, 2.0, 4.0, 3.0, 0.0, 9.0]
    assert judge_by(rule, [5, 0], own).fault is None
    assert judge_by(rule, [5, 1], own).misordered == 1


def test_a_tie_of_groups_goes_as_the_policy_says():
    own = [5.0, 0.0, 5.0, 1.0, 4.0, 4.0]
    assert judge_by(GROUPS, [2, 3], own).misordered == 1
    assert judge_by(replace(GROUPS, tie_policy="highest_id"), [2, 3], own).fault is None
    assert judge_by(replace(GROUPS, tie_policy="highest_id"), [0, 1], own).misordered == 1


def test_a_correction_may_tie_what_float32_cannot_tell_apart():
    rule = RoutingRule(router_selection_nonlinearity="sigmoid", expert_weighting_nonlinearity="sigmoid", e_score_correction_bias=True)
    own, correction = [0.0, 1e-5, -9.0], [1000.0, 1000.0, 0.0]  # float32 holds 1000.5 and 1000.5000025 alike
    assert judge_by(rule, [0], own, correction=correction).fault is None
    assert judge_by(rule, [1], own, correction=correction).fault is None
    assert judge_by(rule, [2], own, correction=correction).misordered == 1
    assert judge_by(rule, [0], [0.0, 1e-7, -9.0], bound=0.0, correction=[0.0, 1e-5, 0.0]).misordered == 1


def test_scores_of_16_bits_tie_and_the_policy_decides():
    rule = RoutingRule(router_selection_nonlinearity="sigmoid", expert_weighting_nonlinearity="sigmoid", selection_dtype="bfloat16")
    own = [1.0, 1.0001, 0.0]
    assert judge_by(rule, [0], own, bound=0.0).fault is None
    assert judge_by(rule, [1], own, bound=0.0).misordered == 1
    assert judge_by(rule, [0], own, bound=0.0).exact_ties == 1


def test_numbers_leave_no_room():
    assert judge_assigned(np.array([[1, 2], [0, 1]]), np.array([4, 3]), 3).fault is None
    found = judge_assigned(np.array([[1, 2], [1, 0]]), np.array([4, 3]), 3)
    assert (found.misordered, found.fault.token, found.fault.slot, found.fault.expert) == (1, 1, 0, 1)


def test_of_a_group_that_gave_an_expert_the_better_ones_count_even_if_another_group_was_as_good():
    found = judge_by(GROUPS, [3], [5.0, 0.0, 5.0000005, 1.0, 4.0, 4.0], exact=[5.0, 0.0, 5.0 - 1e-7, 1.0, 4.0, 4.0])
    assert (found.swaps, found.misordered) == (1, 1)


def test_the_group_that_was_shut_is_the_one_that_is_nearest():
    """Two groups are open, one of them gave nothing: the other, as good as the one that did, was shut."""
    rule = replace(GROUPS, topk_group=2, group_score="top2_sum")
    found = judge_by(rule, [4], [3.0, 3.0, 4.0, 1.0, 5.0, 1e-6], exact=[3.0, 3.0, 4.0, 1.0, 5.0, -1e-7])
    assert found.fault is None
    assert (len(found.near_ties), found.swaps) == (1, 0)


def test_ties_are_counted_where_tokens_meet_too():
    scores, together = np.array([[0.5, 0.5, 0.1], [0.2, 0.7, 0.1]], np.float32), np.zeros(2, np.int64)
    rule = RoutingRule(router_selection_nonlinearity="sinkhorn")
    found = judge_together(np.array([[0], [1]]), scores, together, 1, rule)
    assert (found.exact_ties, found.misordered) == (1, 0)
    found = judge_together(np.array([[0], [1]]), scores, together, 1, replace(rule, tie_policy="highest_id"))
    assert (found.exact_ties, found.misordered) == (1, 1)
