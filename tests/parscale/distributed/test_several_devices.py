"""Models whose layers are on several devices give what they give on one: each tensor is moved where it is needed.

The devices are pretended (`pretended_devices.py`).
"""

import json
from pathlib import Path

import pretended_devices
import pytest

pytestmark = pytest.mark.skipif(not pretended_devices.AVAILABLE, reason="this torch takes no devices made in Python")

PROGRAM = Path(__file__).with_name("several_devices.py")


@pytest.fixture(scope="module")
def differences(programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    program = programs.run(PROGRAM, folder / "found.json", cwd=folder)
    assert program.returncode == 0, program.stderr[-5000:]
    return json.loads((folder / "found.json").read_text())


def test_two_devices_give_what_one_gives(differences):
    calls = {name.rsplit("-", 1)[1] for name in differences}
    assert calls == {"logits", "loss", "in pieces", "generate", "without streams", "of each stream"}
    wrong = {name: found for name, found in differences.items() if not isinstance(found, float) or found > 1e-5}
    assert not wrong
