# SPDX-License-Identifier: Apache-2.0
"""The list of faults that tests/plant.py plants still fits the source. To plant them all takes minutes: CONTRIBUTING.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]


def test_the_list_is_long_and_its_names_differ():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: Fault):
    assert fault.old != fault.new
    assert (ROOT / fault.file).read_text().count(fault.old) == 1, f"its text has to stand once in {fault.file}"
    for test in (word for word in shlex.split(fault.tests) if word.startswith("tests/")):
        file, _, name = test.partition("::")
        assert not name or re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"no {name} in {file}"
