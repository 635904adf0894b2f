"""The mutants of ``tests/mutants.py``."""

import ast

import pytest

from tests import mutants


@pytest.mark.parametrize("module", mutants.OWN)
def test_every_mutant_is_another_program(module, tmp_path):
    (tmp_path / "contextrast_kernels").mkdir()
    path = tmp_path / "contextrast_kernels" / f"{module}.py"
    source = (mutants.ROOT / "contextrast_kernels" / f"{module}.py").read_text()
    path.write_text(source)
    found = mutants.mutants(module)
    assert found
    for mutant in found:
        with mutants.written(mutant, tmp_path):
            assert ast.dump(ast.parse(path.read_text())) != ast.dump(ast.parse(source)), mutant
    assert path.read_text() == source


def test_annotations_texts_and_errors_are_left_alone():
    tree = ast.parse('def f(a: "1 < 2" = 3) -> 4:\n    if a > 5:\n        raise ValueError(6)\n    return f"{7}"')
    changed = [ast.unparse(other) for node in mutants.expressions(tree) if (other := mutants.changed(node))]
    assert changed == ["4", "a >= 5", "6"]
