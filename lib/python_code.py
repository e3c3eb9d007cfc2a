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
    lines, cuts, previous = source.splitlines(), [], tokenize.NEWLINE
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return source
    code = [token for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]
    for token, following in pairwise(code):
        is_statement = previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT) and following.type == tokenize.NEWLINE
        cuts += [token] if token.type == tokenize.STRING and is_statement else []
        previous = token.type
    cuts += [token for token in tokens if token.type == tokenize.COMMENT]
    for token in sorted(cuts, key=lambda token: token.start, reverse=True):
        (first, start), (last, end) = token.start, token.end
        lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:]]
    return "\n".join(line.rstrip() for line in lines if line.strip())


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
