"""Rules about the source that no single module can keep."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("k1", "k1env", "policies", "scripts")
ABOVE = {layer: {*LAYERS[position + 1 :], "tests"} for position, layer in enumerate(LAYERS)}
UNKNOWN_TO_K1 = {"gymnasium", "stable_baselines3"}
MAX_LINES = 450
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
FOLDERS = sorted({path.parent.relative_to(ROOT).as_posix() for path in SOURCES})
SCRIPTS = [path for path in SOURCES if path.is_relative_to(ROOT / "scripts")]
EVERY_FILE = SOURCES + sorted((ROOT / "tests").rglob("*.py"))
WITHOUT_EFFECT = (
    ast.Import
    | ast.ImportFrom
    | ast.FunctionDef
    | ast.AsyncFunctionDef
    | ast.ClassDef
    | ast.Assign
    | ast.AnnAssign
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_packages(tree: ast.AST) -> set[str]:
    """The top-level packages of all imports, in functions and under TYPE_CHECKING too."""
    packages = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            packages.add(node.module.partition(".")[0])
        elif is_dynamic_import(node):
            packages.add(node.args[0].value.partition(".")[0])
    return packages


def is_dynamic_import(node: ast.AST) -> bool:
    """Whether it is a call of `import_module` or `__import__` with a literal absolute name."""
    if not isinstance(node, ast.Call) or not node.args:
        return False
    called = node.func.attr if isinstance(node.func, ast.Attribute) else None
    called = node.func.id if isinstance(node.func, ast.Name) else called
    name = node.args[0]
    return (
        called in {"import_module", "__import__"}
        and isinstance(name, ast.Constant)
        and isinstance(name.value, str)
        and not name.value.startswith(".")
    )


def forbidden_imports(layer: str, source: str) -> set[str]:
    forbidden = ABOVE[layer] | (UNKNOWN_TO_K1 if layer == "k1" else set())
    return imported_packages(ast.parse(source)) & forbidden


def statements_with_effect(source: str) -> list[int]:
    """The lines of a module's own statements that do more than define."""
    return [
        node.lineno
        for node in ast.parse(source).body
        if not isinstance(node, WITHOUT_EFFECT) and not is_docstring(node) and not is_guard(node)
    ]


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_guard(node: ast.stmt) -> bool:
    condition = ast.unparse(node.test) if isinstance(node, ast.If) else ""
    return condition in {"__name__ == '__main__'", "TYPE_CHECKING", "typing.TYPE_CHECKING"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    assert not forbidden_imports(layer, path.read_text())


@pytest.mark.parametrize("path", EVERY_FILE, ids=name_of)
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def documented_modules(text: str, folder: str) -> set[str]:
    """The names in the first column of the table under `folder/`, or in the sentence about it."""
    section = re.split(r"^\*\*|`[a-z0-9_/]+/`: ", text.partition(f"`{folder}/`: ")[2], flags=re.M)[
        0
    ]
    rows = re.findall(r"^\| (`.*?) \|", section, flags=re.M)
    return set(re.findall(r"`(\w+)`", " ".join(rows) if rows else section))


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_documentation_lists_every_module_in_its_place(folder: str) -> None:
    text = (ROOT / "docs" / "development.md").read_text()
    modules = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    documented = documented_modules(text, folder) - {"__init__"}
    assert modules <= documented
    if folder not in ("policies", "scripts"):  # their sentences name more than modules
        assert documented <= modules


# There may be none yet, which pytest would report as a skipped test.
@pytest.mark.parametrize("path", SCRIPTS or [None], ids=lambda path: path and name_of(path))
def test_importing_a_script_does_nothing(path: Path | None) -> None:
    assert path is None or not statements_with_effect(path.read_text())


def test_there_is_something_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} >= {"k1", "k1env"}


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("k1", "import gymnasium"),
        ("k1", "def f():\n    from gymnasium.spaces import Box"),
        ("k1", "import k1env.ledger as ledger"),
        ("k1env", "from policies import heuristic"),
        ("k1env", "import importlib\nimportlib.import_module('policies.heuristic')"),
        ("policies", "import scripts.evaluate"),
        ("scripts", "from tests import helpers"),
    ],
)
def test_a_forbidden_import_is_seen(layer: str, source: str) -> None:
    assert forbidden_imports(layer, source)


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("k1", "import torch\nfrom k1.errors import K1Error"),
        ("k1env", "import gymnasium\nimport k1"),
        ("policies", "import k1env"),
        ("scripts", "import k1\nimport policies"),
    ],
)
def test_an_allowed_import_passes(layer: str, source: str) -> None:
    assert not forbidden_imports(layer, source)


def test_a_script_that_acts_at_import_is_seen() -> None:
    harmless = (
        "'''Doc.'''\nimport sys\nX = 1\ndef main(): ...\nif __name__ == '__main__':\n    main()"
    )
    assert statements_with_effect(harmless) == []
    assert statements_with_effect("import sys\nprint(1)\nfor x in (): ...") == [2, 3]
