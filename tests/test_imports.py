"""Imports have one order, and torch comes only when asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import whence

ROOT = Path(whence.__file__).parent

ORDER = [
    {"_plain", "_files", "_interrupts", "_background", "_core", "errors", "_arrays", "_optional"},
    {"sketch"},
    {"hashing"},
    {"factored", "sklearn"},
    {"store"},
    {"search"},
    {"text"},
    {"interop"},
    {"gradients"},
    {"curvature"},
    {"attribution"},
    {"methods"},
    {"evaluate"},
    {"report"},
    {"demo"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
MAY_IMPORT_TORCH = {
    "hashing/gat.py",
    "gradients",
    "curvature",
    "methods",
    "attribution",
    "evaluate",
    "integrations",
    "demo",
}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], path


def imported(path):
    """(module, line) of everything a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "whence":
                for alias in node.names:
                    yield f"whence.{alias.name}", node.lineno
            else:
                yield node.module, node.lineno


def test_every_module_has_a_level():
    assert {place for place, _ in modules()} <= set(LEVEL)


def test_no_import_goes_against_the_flow():
    backward = []
    for place, path in modules():
        for name, line in imported(path):
            parts = name.split(".")
            target = parts[1] if parts[0] == "whence" and len(parts) > 1 else None
            if target in LEVEL and LEVEL[target] > LEVEL[place]:
                backward.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
            assert target is None or target in LEVEL, f"{path}:{line} imports {name}"
    assert backward == []


def test_torch_is_imported_in_few_places():
    found = {
        (place, path.relative_to(ROOT).as_posix())
        for place, path in modules()
        for name, _ in imported(path)
        if name.split(".")[0] == "torch"
    }
    assert [names for names in found if not MAY_IMPORT_TORCH & set(names)] == []


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_whence_imports_no_torch():
    done = run("import sys, whence; print('torch' in sys.modules, 'pandas' in sys.modules)")
    assert done.stdout.split() == ["False", "False"]


def test_hashing_imports_no_torch_but_for_its_network():
    done = run("import sys, whence.hashing; print('torch' in sys.modules)")
    assert done.stdout.split() == ["False"]
    done = run("import sys, whence.hashing.gat; print('torch' in sys.modules)")
    assert done.stdout.split() == ["True"]


def test_opening_and_searching_needs_no_torch(tmp_path):
    from filled import fill, random_rows

    fill(tmp_path / "s", random_rows(5))
    done = run(
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, whence\n"
        f"store = whence.open({str(tmp_path / 's')!r})\n"
        "print(store.search(np.ones((1, 16), np.float32), k=2).helpful.ids.shape)\n"
        "try:\n    whence.record\n"
        "except whence.errors.MissingDependencyError as error:\n    print(error)"
    )
    assert done.stdout.splitlines() == [
        "(1, 2)",
        "whence.record needs torch: pip install 'whence[torch]'",
    ], done.stderr


def test_the_public_names_are_there():
    for name in whence.__all__:
        assert getattr(whence, name) is not None
