"""`import padst_cli`: instant, and enough for transformers to know the format, in either order of imports.

A third order, padst's own plug-in importing transformers, is what the tests under `runtime` run in.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

import padst_cli


def run(script: str) -> str:
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    return child.stdout.strip()


def test_the_import_is_light_and_fast():
    script = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "import padst_cli\n"
        "took = time.process_time() - start\n"
        "assert not {'torch', 'transformers', 'numpy', 'typer', 'rich'} & set(sys.modules)\n"
        "print(took)\n"
    )
    assert float(run(script)) < 0.2


@pytest.mark.parametrize("imports", ["import padst_cli, transformers", "import transformers.quantizers, padst_cli"])
def test_the_format_is_known_in_every_order_of_imports(imports):
    script = (
        f"{imports}\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "print('padst' in AUTO_QUANTIZER_MAPPING and 'padst' in AUTO_QUANTIZATION_CONFIG_MAPPING)\n"
    )
    assert run(script) == "True"


def test_lazy_names():
    from padst_cli.runtime.load import load

    assert padst_cli.load is load
    assert {"load", "sparsify", "evaluate", "export"} <= set(dir(padst_cli))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = padst_cli.nonsense


def test_an_interrupt_while_the_command_is_imported_is_quiet():
    script = (
        "import sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'padst_cli.commands':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from padst_cli.__main__ import main\n"
        "main()\n"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (child.returncode, child.stdout, child.stderr) == (130, "", "")
