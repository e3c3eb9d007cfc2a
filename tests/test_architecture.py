"""The rules of the code's shape: one-way imports, short and typed functions, and a list of things that are never done."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (
    {"core"},
    {"checkpoints", "report"},
    {"models"},
    {"attention"},
    {"diffusion"},
    {"texts", "calibration", "decoding"},
    {"pruning"},
    {"quantization", "evaluation", "timing"},
    {"studies"},
    {"grid"},
    {"commands"},
    {"launch"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_MODULES = 12
PURE = {
    "models": ("visibility",),
    "attention": ("sinks", "variance", "stability", "planted"),
    "calibration": ("token_weights",),
    "pruning": ("importances", "sparsegpt", "repairs", "alps", "structured", "allocation"),
    "quantization": ("rounding", "joint", "planes"),
}
PURE_MODULES = {f"lib.{room}.{name}" for room, names in PURE.items() for name in names}
PURE_MAY_IMPORT = {"torch", "jaxtyping", "numpy", "math", "itertools", "typing", "collections", "dataclasses", "lib.core.errors"}
LONGEST_FUNCTION = 60
LONGEST_MODULE = 330
MAY_PRINT = ("lib.commands.terminal",)
GLOBAL_RANDOM = (
    "torch.manual_seed",
    "torch.seed",
    "torch.cuda.manual_seed",
    "numpy.random.seed",
    "np.random.seed",
    "random.seed",
)

LIBRARY = sorted((ROOT / "lib").rglob("*.py"))
PROGRAMS = LIBRARY + sorted(path for folder in ("recipes", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
SOURCES = {path: path.read_text(encoding="utf-8") for path in PROGRAMS}
TREES = {path: ast.parse(source) for path, source in SOURCES.items()}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(path: Path) -> str:
    """The name that a file of the library is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(name: str) -> str:
    """The room that a dotted name of the library lies in; empty for the package itself."""
    return name.split(".")[1] if "." in name else ""


MODULES = {dotted(path): path for path in LIBRARY}


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of modules that are imported anywhere, inside functions as well."""
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level], "imports are absolute"
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (below & MODULES.keys()) or {str(node.module)}
    return found


def local_imports(tree: ast.AST) -> set[str]:
    return {name for name in imports(tree) if name.split(".")[0] == "lib"}


def private_names_of_others(tree: ast.Module) -> list[str]:
    """What begins with one underscore and belongs to another module of lib: imported by name, or reached through the module."""
    aliases: set[str] = set()
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lib":
            found += [f"{node.module}.{alias.name}" for alias in node.names if alias.name.startswith("_")]
            aliases |= {alias.asname or alias.name for alias in node.names if alias.name.islower()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            found += [f"{node.value.id}.{node.attr}"] if node.attr.startswith("_") and not node.attr.startswith("__") else []
    return sorted(found)


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def public_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    bodies = [tree.body, *(node.body for node in classes)]
    return [node for body in bodies for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


every_module = pytest.mark.parametrize("path", LIBRARY, ids=named)
every_program = pytest.mark.parametrize("path", PROGRAMS, ids=named)


@every_module
def test_imports_go_one_way(path: Path) -> None:
    own = room(dotted(path))
    others = {room(name) for name in local_imports(TREES[path])} - {own, ""}
    assert not own or own in FLOOR, f"{own} is no room: put it into FLOORS of this test and into docs/layout.md"
    beside = {other for other in others if not own or FLOOR[other] >= FLOOR[own]}
    assert not beside, f"{own or 'lib'} imports from rooms that are not below it: {beside}"
    above = {name.split(".")[0] for name in imports(TREES[path])} & {"recipes", "benchmarks", "tests"}
    assert not above, f"lib stands below {above}"


def test_imports_have_no_circle() -> None:
    graph = {dotted(path): local_imports(TREES[path]) - {dotted(path)} for path in LIBRARY}
    TopologicalSorter(graph).prepare()


def test_rooms_are_described_and_small() -> None:
    folders = {path.parent for path in LIBRARY}
    for folder in folders:
        modules = [path for path in LIBRARY if path.parent == folder and path.name != "__init__.py"]
        assert (folder / "__init__.py").is_file()
        assert len(modules) <= MOST_MODULES, f"{named(folder)} has {len(modules)} modules: split it by meaning"
        repeating = [path.stem for path in modules if path.stem == folder.name]
        assert not repeating, f"{named(folder)}/{repeating[0]}.py says the room's name again"
    assert {room(name) for name in MODULES} - {""} == FLOOR.keys(), "FLOORS names the rooms that there are"


@pytest.mark.parametrize("name", sorted(PURE_MODULES))
def test_pure_modules_know_tensors_only(name: str) -> None:
    tree = TREES[MODULES[name]]
    allowed = PURE_MAY_IMPORT | PURE_MODULES
    foreign = {full for full in imports(tree) if full not in allowed and full.split(".")[0] not in allowed}
    assert not foreign, f"{name} takes tensors and returns tensors, but imports {foreign}"
    assert not [call for call, _ in calls(tree) if call in ("open", "Path")]


@every_program
def test_functions_and_modules_are_short(path: Path) -> None:
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions(TREES[path])}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}
    assert len(SOURCES[path].splitlines()) <= LONGEST_MODULE


@every_program
def test_public_functions_are_described_and_typed(path: Path) -> None:
    assert ast.get_docstring(TREES[path]) or not SOURCES[path].strip()
    for node in public_functions(TREES[path]):
        assert ast.get_docstring(node), f"{node.name} has no docstring"
        assert node.returns is not None, f"{node.name} does not say what it returns"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
        bare = [argument.arg for argument in arguments if argument.annotation is None and argument.arg not in ("self", "cls")]
        assert not bare, f"{node.name} leaves {bare} without a type"


@every_program
def test_private_names_stay_in_their_module(path: Path) -> None:
    assert not private_names_of_others(TREES[path])


def test_a_private_name_of_another_module_is_seen() -> None:
    code = "from lib.evaluation import sums, tasks as benchmarks\nfrom lib.pruning.pruner import _check\n"
    code += "sums._x()\nbenchmarks._y\nself._z\n"
    assert private_names_of_others(ast.parse(code)) == ["benchmarks._y", "lib.pruning.pruner._check", "sums._x"]


@every_module
def test_library_does_not_print(path: Path) -> None:
    printed = [call for call, _ in calls(TREES[path]) if call == "print"]
    assert not printed or dotted(path) in MAY_PRINT


@every_module
def test_library_has_no_global_random_state(path: Path) -> None:
    assert not [call for call, _ in calls(TREES[path]) if call in GLOBAL_RANDOM]


@every_program
def test_no_foreign_code_and_no_pickle_is_run(path: Path) -> None:
    for call, node in calls(TREES[path]):
        assert call not in ("torch.load", "pickle.load", "pickle.loads", "eval", "exec"), f"{call} runs what a file says"
        trusting = [key for key in node.keywords if key.arg == "trust_remote_code" and ast.unparse(key.value) != "False"]
        assert not trusting, f"{call} would run code of a checkpoint"
        asking = (
            "Auto" in call and call.endswith(".from_pretrained") and "trust_remote_code" not in [key.arg for key in node.keywords]
        )
        assert not asking, f"{call} would ask whether to run code of a checkpoint: say trust_remote_code=False"


@every_program
def test_definite_systems_are_solved_by_cholesky(path: Path) -> None:
    """The batched LU of MKL hangs from about 150 unknowns on where it has two threads; two to four planes stay below."""
    found = [call for call, _ in calls(TREES[path]) if re.search(r"linalg\.(solve|inv|lu|ldl)(_\w+)?$", call)]
    assert set(found) <= {"torch.linalg.solve_triangular"} | ({"torch.linalg.solve"} if path.stem == "planes" else set())


@every_program
def test_devices_are_chosen_in_one_place(path: Path) -> None:
    assert not [call for call, _ in calls(TREES[path]) if call.endswith(".cuda")]


def test_launcher_starts_fast() -> None:
    """Before anything is installed, or a wrong word is answered, only these may be imported."""
    first = {"lib", "lib.core", "lib.core.environment", "lib.core.errors", "lib.launch", "lib.launch.command", "lib.commands"}
    own = {name for name in MODULES if name.startswith("lib.commands.")} - {"lib.commands.session"}
    first |= own
    for name in first:
        tree = TREES[MODULES[name]]
        at_top = imports(ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []))
        assert {full for full in at_top if full.split(".")[0] not in sys.stdlib_module_names} <= first
