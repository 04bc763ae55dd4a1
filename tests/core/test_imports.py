from __future__ import annotations

import pkgutil
import subprocess
import sys
import textwrap

import pytest

HEAVY = ("torch", "tensorflow", "keras", "jax", "cupy", "matplotlib", "rich", "typer", "mfac_torch", "mfac_keras")

ONLY_STDLIB_AND = """
import importlib.machinery, sys

class Only(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        there = name.partition(".")[0] in sys.stdlib_module_names | {allowed!r}
        return super().find_spec(name, path, target) if there else None

sys.meta_path[:] = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter, Only]
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    search_path = f"import sys; sys.path[:] = {sys.path!r}\n"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", search_path + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )


def loaded_by(statement: str, packages: tuple[str, ...]) -> list[str]:
    result = run(f"{statement}\nprint([name for name in {packages!r} if name in sys.modules])")
    assert result.returncode == 0, result.stderr
    return eval(result.stdout)


def test_the_core_loads_no_framework_and_nothing_that_only_the_command_line_needs() -> None:
    assert loaded_by("import mfac_core", HEAVY) == []


def test_the_check_for_loaded_packages_can_fail() -> None:
    assert loaded_by("import mfac_core, rich", HEAVY) == ["rich"]


def test_the_command_line_loads_no_framework_before_a_command_runs() -> None:
    assert loaded_by("import mfac_core.cli", ("torch", "tensorflow", "keras", "jax", "cupy", "matplotlib")) == []


def test_the_torch_adapter_loads_no_other_framework() -> None:
    pytest.importorskip("torch")

    assert loaded_by("import mfac_torch", ("tensorflow", "keras", "jax", "mfac_keras", "matplotlib", "sklearn")) == []


def test_the_core_prunes_where_only_numpy_array_api_compat_and_yaml_are_installed() -> None:
    result = run(
        ONLY_STDLIB_AND.format(allowed={"mfac_core", "numpy", "array_api_compat", "yaml", "_yaml"})
        + textwrap.dedent("""
        import numpy as np
        import mfac_core

        weights = np.arange(1.0, 9.0)
        gradients = np.random.default_rng(0).standard_normal((4, 8))
        for update in ("independent", "joint"):
            result = mfac_core.prune(weights, gradients, sparsity=0.5, block_size=4, update=update)
            assert np.count_nonzero(result.weights) == 4
        assert mfac_core.inverse_fisher(gradients).diagonal().shape == (8,)
        assert len(mfac_core.load_recipe("m_modifiers:\\n- !EpochRangeModifier {end_epoch: 2}\\n").modifiers) == 1
        """)
    )

    assert result.returncode == 0, result.stderr


def test_the_block_on_other_packages_can_fail() -> None:
    result = run(ONLY_STDLIB_AND.format(allowed={"mfac_core"}) + "import mfac_core")

    assert "No module named 'numpy'" in result.stderr


def test_every_name_in_all_is_there_once() -> None:
    import mfac_core

    assert len(set(mfac_core.__all__)) == len(mfac_core.__all__)
    assert [name for name in mfac_core.__all__ if not hasattr(mfac_core, name)] == []


def test_no_public_name_is_that_of_a_module() -> None:
    import mfac_core

    modules = {module.name for module in pkgutil.iter_modules(mfac_core.__path__)}

    assert modules & set(mfac_core.__all__) == set()
