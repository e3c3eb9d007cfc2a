"""The rules of the code's shape: one-way imports, short and typed functions, and a list of things that are never done."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    {"__init__", "errors", "sections", "config", "runtime", "python_code", "provenance", "environment", "wheels"}
    | {"leases", "store", "hub"},
    {"data", "checkpoints", "integrity", "layouts", "hidden_states", "spread", "models", "recorder", "attention", "weight_store"}
    | {"sinks", "variance", "stability", "planted", "blocking"},
    {"diffusion", "sampler", "ragged", "caches", "refresh", "late_steps", "decoding"},
    {"pruning", "sparsegpt", "structured", "token_weights", "allocation", "quantization"}
    | {"joint_compression"}
    | {"calibration", "calibration_sets", "measured_weights", "one_shot", "methods", "pruner", "lean_pruning"}
    | {"shrink", "phases"},
    {"evaluation", "scoring", "harness", "tasks", "standins", "pseudo_perplexity", "paired", "timing", "search"}
    | {"batched_harness"}
    | {"traces", "trace_views", "trace_statistics", "noise_match", "sink_effect"}
    | {"pruning_runs", "adaptive_runs", "where_it_acts", "attribution"}
    | {"joint_runs", "joint_grid", "joint_export", "export", "model_card", "containers", "streaming", "corpora"}
    | {"configurations", "measured_formats", "hardware_aware"}
    | {"roofline", "call_times", "format_support", "linear_formats", "latency"}
    | {"decoding_runs", "decoding_tasks", "decoding_tables"},
    {"sweep", "supervisor", "cell_process", "cluster", "cells", "cell_work", "grid", "grid_tables"}
    | {"availability", "costs", "plan"}
    | {"tables", "results", "claims", "canvas", "figures", "animation", "trace_figures", "trace_tables", "report"}
    | {"variance_tables", "agreement_tables", "effect_tables", "variance_figures"}
    | {"pruning_tables", "gain_tables", "pruning_figures", "sink_pruning_figures"}
    | {"joint_tables", "joint_figures", "hardware_tables", "timing_figures"}
    | {"readme", "html_report", "execution", "batch", "launcher"},
)
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names}
PURE = (
    "sinks",
    "variance",
    "stability",
    "planted",
    "pruning",
    "sparsegpt",
    "structured",
    "allocation",
    "token_weights",
    "quantization",
    "joint_compression",
)
PURE_MAY_IMPORT = {
    "torch",
    "jaxtyping",
    "numpy",
    "math",
    "typing",
    "collections",
    "dataclasses",
    "lib.config",
    "lib.sinks",
    "lib.pruning",
    "lib.sparsegpt",
    "lib.quantization",
}
LONGEST_FUNCTION = 60
LONGEST_MODULE = 330
MAY_PRINT = ("launcher",)
GLOBAL_RANDOM = (
    "torch.manual_seed",
    "torch.seed",
    "torch.cuda.manual_seed",
    "numpy.random.seed",
    "np.random.seed",
    "random.seed",
)

LIBRARY = sorted((ROOT / "lib").glob("*.py"))
PROGRAMS = LIBRARY + sorted(path for folder in ("recipes", "benchmarks") for path in (ROOT / folder).glob("*.py"))
SOURCES = {path: path.read_text(encoding="utf-8") for path in PROGRAMS}
TREES = {path: ast.parse(source) for path, source in SOURCES.items()}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> set[str]:
    """Dotted names that are imported anywhere, inside functions as well."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" if node.module == "lib" else str(node.module) for alias in node.names}
    return found


def local_imports(tree: ast.AST) -> set[str]:
    return {name.split(".")[1] for name in imports(tree) if name.startswith("lib.")}


def private_names_of_others(tree: ast.Module) -> list[str]:
    """What begins with one underscore and belongs to another module of lib: imported by name, or reached through the module."""
    aliases: set[str] = set()
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lib":
            found += [f"{node.module}.{alias.name}" for alias in node.names if alias.name.startswith("_")]
            aliases |= {alias.asname or alias.name for alias in node.names} if node.module == "lib" else set()
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
    assert path.stem in LAYER, f"{path.stem} has no layer: put it into LAYERS of this test and into the table of the design"
    upwards = {name for name in local_imports(TREES[path]) if LAYER[name] > LAYER[path.stem]}
    assert not upwards, f"{path.stem} (layer {LAYER[path.stem]}) imports from above: {upwards}"
    above = {name.split(".")[0] for name in imports(TREES[path])} & {"recipes", "benchmarks", "tests"}
    assert not above, f"lib stands below {above}"


def test_imports_have_no_circle() -> None:
    graph = {path.stem: local_imports(TREES[path]) for path in LIBRARY}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_know_tensors_only(name: str) -> None:
    path = ROOT / "lib" / f"{name}.py"
    if not path.exists():
        pytest.skip(f"{name} is not written yet")
    foreign = {full for full in imports(TREES[path]) if full not in PURE_MAY_IMPORT and full.split(".")[0] not in PURE_MAY_IMPORT}
    assert not foreign, f"{name} takes tensors and returns tensors, but imports {foreign}"
    assert not [call for call, _ in calls(TREES[path]) if call in ("open", "Path")]


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
    code = "from lib import sampler, tasks as benchmarks\nfrom lib.pruner import _check\nsampler._x()\nbenchmarks._y\nself._z\n"
    assert private_names_of_others(ast.parse(code)) == ["benchmarks._y", "lib.pruner._check", "sampler._x"]


@every_module
def test_library_does_not_print(path: Path) -> None:
    printed = [call for call, _ in calls(TREES[path]) if call == "print"]
    assert not printed or path.stem in MAY_PRINT


@every_module
def test_library_has_no_global_random_state(path: Path) -> None:
    assert not [call for call, _ in calls(TREES[path]) if call in GLOBAL_RANDOM]


@every_program
def test_no_foreign_code_and_no_pickle_is_run(path: Path) -> None:
    for call, node in calls(TREES[path]):
        assert call not in ("torch.load", "pickle.load", "pickle.loads", "eval", "exec"), f"{call} runs what a file says"
        trusting = [key for key in node.keywords if key.arg == "trust_remote_code" and ast.unparse(key.value) != "False"]
        assert not trusting, f"{call} would run code of a checkpoint"


@every_program
def test_devices_are_chosen_in_one_place(path: Path) -> None:
    assert not [call for call, _ in calls(TREES[path]) if call.endswith(".cuda")]


def test_launcher_starts_fast() -> None:
    heavy = {"torch", "transformers", "numpy", "pandas", "matplotlib", "yaml", "papermill"}
    for name in ("launcher", "environment"):
        tree = TREES[ROOT / "lib" / f"{name}.py"]
        at_top = imports(ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []))
        assert not {full for full in at_top if full.split(".")[0] in heavy}
        assert at_top & {f"lib.{module.stem}" for module in LIBRARY} <= {"lib.environment"}
