"""The layers of the code: what may import what, and how long a file and a function may be.

Imports are read from the source with ast, so that those inside functions count like those at the top of a file.
"""

import ast
import re
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from tests.launch import ROOT

LAYERS = (
    ("pipeline.__main__", "data_prep.__main__"),
    ("pipeline.evaluate", "pipeline.publish", "pipeline.scaling"),
    ("pipeline.results",),
    ("pipeline.model_folder",),
    ("pipeline.train",),
    ("pipeline.operate",),
    ("pipeline.plan",),
    ("pipeline.weights",),
    ("pipeline.checkpoint",),
    ("pipeline.model",),
    ("pipeline.distributed",),
    ("pipeline.probe_images",),
    ("pipeline.command_line", "pipeline.training_set"),
    ("pipeline.config",),
    ("pipeline.layout", "pipeline.probe_config", "pipeline.schedule", "pipeline.start"),
    ("pipeline.compilers", "pipeline.costs", "pipeline.hub", "pipeline.memory_errors", "pipeline.stop_signals"),
    ("pipeline.rank_errors", "pipeline.value_checks"),
    ("data_prep",),
    ("data_prep.common",),
)
"""From top to bottom. A module belongs to the entry with the longest matching name, and imports from its own entry or
from lower layers: two entries of one layer never import each other."""
OF_DEEPSPEED = "pipeline/train/engine/deepspeed_internals.py"
"""The one file that uses more of DeepSpeed than its documented interface."""
UNDOCUMENTED = {"__compatible_ops__", "mp_group", "loss_fn", "global_steps", "global_samples", "micro_steps"}
"""Names of DeepSpeed's, beside those that begin with ds_ and the private ones of its engines and optimizers."""
NOT_OURS = {
    *("src/model.py", "deepspeed/runtime/pipe/schedule.py", "deepspeed/runtime/pipe/p2p.py"),
    "pipeline/evaluate/tasks/nearest_mean.py",
}
"""Files of other projects, and the pages' examples of new ones."""
FILE_LINES = 400
FUNCTION_LINES = 60

Imports = dict[str, set[str]]
"""The modules that each module imports."""


def read_imports(root: Path) -> Imports:
    """Of every module of the two packages below `root`; a package's own name stands for its __init__."""
    files = {_name(file, root): file for top in ("data_prep", "pipeline") for file in (root / top).rglob("*.py")}
    return {name: set(_imported(name, file, files)) for name, file in files.items()}


def _name(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _imported(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}:{node.lineno}: name the whole module, not a relative one."
            wanted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        else:
            continue
        for target in wanted:
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name:
                yield target


def layer_of(module: str) -> tuple[int, str] | None:
    """The number of a module's layer, and the entry that it belongs to."""
    entries = [(number, entry) for number, layer in enumerate(LAYERS) for entry in layer]
    matching = [(number, entry) for number, entry in entries if f"{module}.".startswith(f"{entry}.")]
    return max(matching, key=lambda found: len(found[1]), default=None)


def faults(imports: Imports) -> list[str]:
    """A sentence for each module outside the layers, each import that runs up or across, and each circle."""
    found = [f"{_path(module)} is in no layer." for module in imports if not _has_layer(module)]
    for module, targets in sorted(imports.items()):
        for target in sorted(targets):
            above, below = layer_of(module), layer_of(target)
            if above and below and above[1] != below[1] and above[0] >= below[0]:
                found.append(f"{_path(module)} imports {_path(target)}, which is not in a lower layer.")
    return found + [
        f"These import each other in a circle: {', '.join(map(_path, circle))}." for circle in circles(imports)
    ]


def _has_layer(module: str) -> bool:
    return layer_of(module) is not None or module in ("data_prep", "pipeline")


def _path(module: str) -> str:
    return f"{module.replace('.', '/')}.py"


def _paths(modules: list[str]) -> str:
    return ", ".join(map(_path, modules))


def circles(imports: Imports) -> list[list[str]]:
    """Groups of modules each of which reaches all others of its group."""
    reached = {module: _reachable(module, imports) for module in imports}
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in imports
        if module in reached[module]
    }
    return [list(group) for group in sorted(groups)]


def _reachable(start: str, imports: Imports) -> set[str]:
    seen: set[str] = set()
    left = list(imports[start])
    while left:
        module = left.pop()
        if module not in seen:
            seen.add(module)
            left += imports[module]
    return seen


def test_imports_run_down_and_in_no_circle() -> None:
    found = faults(read_imports(ROOT))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "imported", "named"),
    [
        ("pipeline/plan/memory.py", "pipeline.train.loop", ["pipeline/plan/memory.py", "pipeline/train/loop.py"]),
        ("pipeline/publish/push.py", "pipeline.evaluate.registry", ["publish/push.py", "evaluate/registry.py"]),
        ("pipeline/plan/hardware.py", "pipeline.plan.command", ["circle", "plan/hardware.py", "plan/command.py"]),
        ("data_prep/common/files.py", "data_prep.config", ["data_prep/common/files.py", "data_prep/config.py"]),
    ],
)
def test_a_broken_rule_is_reported_with_both_files(file: str, imported: str, named: list[str]) -> None:
    imports = read_imports(ROOT)
    imports[file.removesuffix(".py").replace("/", ".")].add(imported)
    sentences = [sentence for sentence in faults(imports) if all(part in sentence for part in named)]
    assert sentences


def test_an_import_inside_a_function_counts(tmp_path: Path) -> None:
    for name, text in {"a": "def f():\n    from pipeline.b import g\n", "b": "import pipeline.a\n"}.items():
        (tmp_path / "pipeline").mkdir(exist_ok=True)
        (tmp_path / f"pipeline/{name}.py").write_text(text)
    found = faults(read_imports(tmp_path))
    assert "pipeline/a.py is in no layer." in found
    assert "These import each other in a circle: pipeline/a.py, pipeline/b.py." in found


def internals_used(text: str) -> list[str]:
    """The undocumented attributes of DeepSpeed that a source reads or sets, as `object.attribute`."""
    used = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            holder, name = ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            holder, name = ast.unparse(node.args[0]), ast.unparse(node.args[1]).strip("'")
        else:
            continue
        of_deepspeed = holder.rpartition(".")[2].lstrip("_") in ("engine", "optimizer")
        if name in UNDOCUMENTED or name.startswith("ds_") or (of_deepspeed and name.startswith("_")):
            used.append(f"{holder}.{name}")
    return used


def test_one_file_knows_of_deepspeed_what_is_not_documented() -> None:
    files = [file for top in ("data_prep", "pipeline") for file in (ROOT / top).rglob("*.py")]
    used = {str(file.relative_to(ROOT)): found for file in files if (found := internals_used(file.read_text()))}
    assert used.pop(OF_DEEPSPEED)
    assert used == {}


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("deepspeed.ops.__compatible_ops__['x'] = False", ["deepspeed.ops.__compatible_ops__"]),
        ("hasattr(module, 'mp_group')", ["module.mp_group"]),
        ("self._engine._aggregate_total_loss()", ["self._engine._aggregate_total_loss"]),
        ("self._engine.optimizer._global_grad_norm", ["self._engine.optimizer._global_grad_norm"]),
        ("parameter.ds_shape", ["parameter.ds_shape"]),
        ("self._engine.step(); self._engine.optimizer.param_groups; self._optimizer", []),
    ],
)
def test_what_deepspeed_does_not_document_is_recognized(source: str, used: list[str]) -> None:
    assert internals_used(source) == used


def test_files_and_functions_are_short() -> None:
    too_long = []
    for file in python_files():
        text = file.read_text()
        if text.count("\n") > FILE_LINES:
            too_long.append(f"{file.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= FUNCTION_LINES:  # type: ignore[operator]
                too_long.append(f"{file.relative_to(ROOT)}:{node.lineno}: {node.name}")
    assert not too_long, "\n".join(too_long)


def prose_of(file: Path) -> list[str]:
    """The comments and docstrings of a Python file, which other triple-quoted strings count among; all other files."""
    if file.suffix != ".py":
        return [file.read_text()]
    with file.open("rb") as source:
        tokens = list(tokenize.tokenize(source.readline))
    return [
        token.string
        for token in tokens
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.string.startswith('"""'))
    ]


def missing_files(text: str, folder: Path) -> list[str]:
    """The Python files that a text in a folder names and that are not there. A name without a folder may be that of a
    neighbour, or of the only file that is called so."""
    named = set(re.findall(r"(?<![\w/.-])[\w-]+(?:/[\w-]+)*\.py\b", text)) - NOT_OURS
    return [
        name
        for name in sorted(named)
        if not any((start / name).exists() for start in (folder, ROOT))
        and sum(f"/{file}".endswith(f"/{name}") for file in python_files()) != 1
    ]


@cache
def python_files() -> list[Path]:
    """Of the packages and the tests."""
    return [file for top in ("data_prep", "pipeline", "tests") for file in sorted((ROOT / top).rglob("*.py"))]


def test_every_file_that_is_named_is_there() -> None:
    pages = [
        file for top in (".", "configs", "slurm", "data_prep", "pipeline", "tests") for file in ROOT.glob(f"{top}/*.md")
    ]
    others = [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("slurm/**/*.sh"), *pages, *ROOT.glob("pipeline/*/README.md")]
    missing = {
        str(file.relative_to(ROOT)): found
        for file in (*python_files(), *others)
        for text in prose_of(file)
        if (found := missing_files(text, file.parent))
    }
    assert missing == {}


def test_a_file_that_moved_is_reported() -> None:
    plan = ROOT / "pipeline/plan"
    assert missing_files("see memory.py, plan/memory.py and pipeline/costs.py", plan) == []
    assert missing_files("see batch.py and pipeline/plan/costs.py", plan) == ["batch.py", "pipeline/plan/costs.py"]
    assert missing_files("see base.py", plan) == ["base.py"], "two files have the name, and neither is a neighbour"


def test_every_test_file_is_collected(pytestconfig: pytest.Config) -> None:
    """pytest silently skips folders of some names, such as build."""
    skipped = [pattern for pattern in pytestconfig.getini("norecursedirs") if not pattern.startswith((".", "_"))]
    folders = {file.parent.name for file in (ROOT / "tests").rglob("test_*.py")}
    assert not [folder for folder in folders if any(fnmatch(folder, pattern) for pattern in skipped)]
