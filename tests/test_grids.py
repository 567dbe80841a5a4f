"""How many cases of a grid `make test` runs."""

import itertools
import types
from pathlib import Path

import pytest


@pytest.fixture
def plugin(request):
    return request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))


@pytest.mark.parametrize("sizes", [(1,), (5,), (2, 2), (3, 2, 4), (6, 1, 2)], ids=str)
def test_every_value_is_met_by_as_few_cases_as_there_are_values_on_the_longest_side(plugin, sizes):
    cases = [set(enumerate(values)) for values in itertools.product(*map(range, sizes))]
    taken = plugin.covering(cases)
    assert len(taken) == max(sizes)
    assert set().union(*(cases[number] for number in taken)) == set().union(*cases)


def test_values_that_never_meet_are_all_met(plugin):
    assert plugin.covering([{"a", "b"}, {"a"}, {"c"}, {"b", "c", "d"}]) in ({0, 3}, {1, 3})
    assert plugin.covering([]) == set()


class Case:
    """What the collection asks of a test."""

    def __init__(self, name, marks, **params):
        self.nodeid, self.marks = f"{name}[{params}]", {*marks}
        self.callspec = types.SimpleNamespace(params=params)

    def get_closest_marker(self, name):
        return name if name in self.marks else None

    def add_marker(self, mark):
        self.marks.add(mark.name)


def test_what_meets_nothing_new_is_nightly(plugin):
    letters, numbers = ("a", "b", "c"), (1, 2)
    pairs = list(itertools.product(letters, numbers))
    grid = [Case("grid", ["grid"], letter=letter, number=number) for letter, number in pairs]
    nightly = [Case("grid", ["grid", "nightly"], letter="d", number=number) for number in numbers]
    other = [Case("other", [], letter=letter, number=number) for letter, number in pairs]
    plugin.pytest_collection_modifyitems([*grid, *nightly, *other])
    daily = [tuple(case.callspec.params.values()) for case in grid if "nightly" not in case.marks]
    assert len(daily) == 3
    assert {letter for letter, _ in daily} == {*letters}
    assert {number for _, number in daily} == {*numbers}
    assert all("nightly" in case.marks for case in nightly)
    assert not any("nightly" in case.marks for case in other)
