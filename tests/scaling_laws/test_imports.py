"""What this room may import."""

import subprocess
import sys


def test_nothing_imports_torch():
    program = """
import importlib, pkgutil, sys
import parscale.scaling_laws as room
for module in pkgutil.iter_modules(room.__path__):
    if module.name != "sweep":
        importlib.import_module(f"parscale.scaling_laws.{module.name}")
print(sorted({"torch", "transformers", "pandas", "sklearn"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
