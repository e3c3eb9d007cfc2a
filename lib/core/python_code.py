"""What decides a result in a Python file: its code without what only people read, and the modules that it imports."""

import ast
import io
import tokenize
from itertools import pairwise
from pathlib import Path


def code_only(source: str) -> str:
    """Take comments, docstrings and empty lines out of Python code; a file that is not Python stays as it is.

    >>> code_only("# why\\ndef f(x):  # how\\n    'What.'\\n\\n    return '# not a comment'\\n")
    "def f(x):\\n    return '# not a comment'"
    """
    lines, previous = source.split("\n"), tokenize.NEWLINE  # as tokenize counts them: a form feed ends none
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return source
    cuts = [token for token in tokens if token.type == tokenize.COMMENT]
    code = [token for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]
    for token, following in pairwise(code):
        is_statement = previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT) and following.type == tokenize.NEWLINE
        cuts += [token] if token.type == tokenize.STRING and is_statement else []
        previous = token.type
    for (first, start), (last, end) in sorted(((token.start, token.end) for token in cuts), reverse=True):
        lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:], *[""] * (last - first)]
    inside = {row for token in code if token not in cuts for row in range(token.start[0], token.end[0])}  # of a text over lines
    kept = (line if row in inside else line.rstrip() for row, line in enumerate(lines, 1) if line.strip() or row in inside)
    return "\n".join(kept)


def modules_reached(code: str, lib: Path) -> list[Path]:
    """List the files of a package that a piece of code imports, directly or through other files of it.

    Args:
        code: Python, as text; one that cannot be read reaches every file.
        lib: the folder of the package, which `code` imports by the folder's name.

    Returns:
        Sorted paths; importing a module runs the `__init__.py` of every folder above it, so these are among them.
    """
    reached, waiting = {lib / "__init__.py"}, _imported(code, lib)
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            waiting |= _imported(path.read_text(encoding="utf-8"), lib)
    return sorted(path for path in reached if path.is_file())


def names_imported(tree: ast.AST) -> set[str]:
    """Name what a piece of code may import, at any depth of nesting: `from a import b` may mean `a` with a name b, or `a.b`."""
    dotted: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            dotted |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return dotted


def _imported(code: str, lib: Path) -> set[Path]:
    """List the files that importing what a piece of code names runs first; all of them when it cannot be read."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return set(lib.rglob("*.py"))
    found: set[Path] = set()
    for name in names_imported(tree):
        first, *parts = name.split(".")
        if first == lib.name:
            folders = [lib.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
            found |= {folder / "__init__.py" for folder in folders} | {folders[-1].with_suffix(".py")}
    return {path for path in found if path.is_file()}
