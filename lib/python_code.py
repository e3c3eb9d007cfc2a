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
    lines, previous = source.splitlines(), tokenize.NEWLINE
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


def modules_imported(code: str, lib: Path) -> set[str]:
    """Name the modules of `lib` that a piece of code imports at any depth of nesting; all of them when it cannot be read.

    Args:
        code: Python, as text.
        lib: the folder of the package.
    """
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return {path.stem for path in lib.glob("*.py")}
    dotted: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = f"lib.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            dotted |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    names = {name.split(".")[1] for name in dotted if name.startswith("lib.")}
    return {name for name in names if (lib / f"{name}.py").is_file()}
