"""The PEFT that transformers' own `add_adapter` asks for, which may be newer than any release."""

import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION


def peft_for_add_adapter(plain):
    """The module `peft`; the test is skipped where a plain model's `add_adapter` refuses it too."""
    peft = pytest.importorskip("peft")
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        with pytest.raises(ValueError, match="version of PEFT"):
            plain.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
        pytest.skip(f"transformers asks for PEFT {MIN_PEFT_VERSION}, without streams either")
    return peft
