"""The architecture: who may import whom, how large things may be, and that engines are named in one place."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_cuttlefish

PACKAGE = Path(hf_cuttlefish.__file__).parent
ORDER = (
    {"maths", "processes", "config"},
    {"layers"},
    {"measure"},
    {"decide"},
    {"patch"},
    {"engines"},
    {"saving"},
    {"report"},
    {"switch"},
    {"cuttlefish"},
    {"trainer"},
    {"callback"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)
"""What stands first imports nothing that stands later."""
MOST_ENTRIES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 18, 400, 60
LONGER = {"saving/modeling_low_rank.py": 500}
"""A file that travels alone, beside the weights of a model, so that it cannot be divided."""
ENGINES = {
    "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule", "fully_shard", "DeepSpeedEngine", "DTensor",
    "ZeroRedundancyOptimizer", "DDP", "FSDP1", "FSDP2", "DeepSpeed", "TensorParallel", "deepspeed", "ddp", "fsdp1", "fsdp2",
    "tensor_parallel", "zero_redundancy", "ds_shape", "ds_numel", "ds_id",
}  # fmt: skip
"""Names of engines as code would use them; words in docstrings, comments and messages may say them."""
MAY_NAME = {
    "layers/parts.py": {"DTensor", "ds_shape"},  # the one place that knows what a sharded tensor looks like
    "patch/optimizer.py": {"deepspeed"},  # the package of optimizers that cannot be edited
    "cli/commands.py": {"deepspeed"},  # `env` shows its version
}
FILES = sorted(PACKAGE.rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room(parts: tuple[str, ...]) -> str:
    """The package of a module, or the module itself where it stands at the top."""
    return parts[0] if parts else "__init__"


def imports(path: Path) -> Iterator[tuple[tuple[str, ...], list[str], int]]:
    """(module inside the package, names, line) of all that a file imports of ours, TYPE_CHECKING aside."""
    found = tree(path)
    for node in ast.walk(found):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    here = path.relative_to(PACKAGE).with_suffix("").parts[:-1]
    for node in ast.walk(found):
        if isinstance(node, ast.ImportFrom):
            module = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = here[: len(here) - node.level + 1]
            elif module[:1] == ("hf_cuttlefish",):
                base, module = (), module[1:]
            else:
                continue
            names = [alias.name for alias in node.names]
            if module:
                yield (*base, *module), names, node.lineno
            else:  # from . import trainer
                for name in names:
                    yield ((*base, name) if is_module((*base, name)) else base), [name], node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                module = tuple(alias.name.split("."))
                if module[0] == "hf_cuttlefish":
                    yield module[1:], [], node.lineno


def is_module(parts: tuple[str, ...]) -> bool:
    path = PACKAGE.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_a_package_imports_only_what_stands_before_it():
    rank = {name: i for i, names in enumerate(ORDER) for name in names}
    wrong = []
    for path in FILES:
        own = room(path.relative_to(PACKAGE).with_suffix("").parts)
        for module, _, line in imports(path):
            other = room(module)
            if rank[other] > rank[own]:
                wrong.append(f"{name_of(path)}:{line} imports {'.'.join(module)}")
    assert not wrong, "\n".join(wrong)


def test_no_private_name_crosses_a_module():
    wrong = []
    for path in FILES:
        for module, names, line in imports(path):
            private = [name for name in (*module, *names) if name.startswith("_") and not name.endswith("__")]
            wrong += [f"{name_of(path)}:{line} imports {name} of {'.'.join(module)}" for name in private]
    assert not wrong, "\n".join(wrong)


def test_the_top_level_is_seen_at_a_glance():
    entries = {p.name for p in PACKAGE.iterdir()} - {"__pycache__"}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGER.get(name_of(path), MOST_LINES)
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
    lengths = {f.name: f.end_lineno - f.lineno + 1 - lines_of_docstring(f) for f in functions}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES_OF_A_FUNCTION}


def lines_of_docstring(function: ast.FunctionDef) -> int:
    first = function.body[0]
    return first.end_lineno - first.lineno + 1 if ast.get_docstring(function) else 0


def test_no_engine_is_named_outside_of_engines():
    wrong = []
    for path in FILES:
        if name_of(path).startswith("engines/"):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Name):
                names = [node.id]
            elif isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # type(x).__name__ == "..."
                names = [node.value]
            else:
                continue
            known = ENGINES - MAY_NAME.get(name_of(path), set())
            wrong += [f"{name_of(path)}:{node.lineno} names {name}" for name in names if name in known]
    assert not wrong, "\n".join(wrong)


def test_thirteen_names_are_public_and_each_shows_how_it_is_used():
    assert len(hf_cuttlefish.__all__) == 13 and hf_cuttlefish.__all__ == sorted(hf_cuttlefish.__all__)
    without = []
    for name in hf_cuttlefish.__all__:
        lines = (getattr(hf_cuttlefish, name).__doc__ or "").splitlines()
        # An example stands in lines of its own, further in than the text, before the first section.
        text = lines[: next((i for i, line in enumerate(lines) if line.strip() in ("Args:", "Returns:")), len(lines))]
        depth = min((len(li) - len(li.lstrip()) for li in lines[1:] if li.strip()), default=0)
        if not any(len(li) - len(li.lstrip()) >= depth + 4 and "(" in li for li in text[1:] if li.strip()):
            without.append(name)
    assert not without, f"no example in the docstrings of {without}"
