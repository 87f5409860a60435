"""The pages that list what the code has: messages in troubleshooting, fields of the config in choosing settings."""

import ast
import dataclasses
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

from hf_cuttlefish import CuttlefishConfig

ROOT = Path(__file__).parents[2]
VARIABLE = "…"
LOGGED = {"logger.warning", "logger.info", "logger.log", "warnings.warn", "self._say", "self._refuse"}


def messages() -> Iterator[tuple[str, str]]:
    """(where, text) of all that the package raises, warns or logs, "…" for what is filled in."""
    for path in sorted((ROOT / "hf_cuttlefish").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = _text(node.exc.args[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in LOGGED:
                if isinstance(node.args[0], ast.Starred):
                    continue  # a line that is worked out elsewhere
                text = _text(node.args[ast.unparse(node.func) in ("self._say", "logger.log")])
            elif isinstance(node, ast.Return) and "Cuttlefish: " in (text := _returned(node.value)):
                pass  # a line that is worked out in one place and logged in another
            else:
                continue
            if sum(letter.isalpha() for letter in text) >= 8:  # others hand on a message that was raised elsewhere
                yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def _returned(node: ast.expr | None) -> str:
    """The text among the values that are returned."""
    parts = node.elts if isinstance(node, ast.Tuple) else [] if node is None else [node]
    return "".join(_text(part) for part in parts if isinstance(part, ast.Constant | ast.JoinedStr | ast.BinOp))


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[.0-9]*[sdf]", VARIABLE, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return VARIABLE


def entries() -> dict[str, re.Pattern[str]]:
    """What the tables list in their first columns, as patterns: "…" fits anything."""
    found = {}
    for line in (
        (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split("\n## Config\n")[1].splitlines()
    ):
        if line.startswith("| `"):
            for entry in re.findall(r"`([^`]+)`", line.split(" | ")[0]):
                found[entry] = re.compile(".*".join(map(re.escape, entry.split(VARIABLE))), re.DOTALL)
    return found


def test_every_message_is_on_the_troubleshooting_page():
    patterns = entries().values()
    missing = [f"{where}: {text}" for where, text in messages() if not any(p.search(text) for p in patterns)]
    assert not missing, "add these to docs/troubleshooting.md:\n" + "\n".join(missing)


def test_the_troubleshooting_page_lists_no_message_that_is_gone():
    texts = [text for _, text in messages()]
    assert len(texts) > 100
    stale = [entry for entry, pattern in entries().items() if not any(pattern.search(text) for text in texts)]
    assert not stale, f"no message of the package has these words: {stale}"


def test_the_api_page_names_members_that_there_are():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: (\S+)\n    options: \{members: \[(.+)\]\}$", page, re.MULTILINE)
    assert len(listed) > 2
    for path, members in listed:
        missing = [name for name in members.split(", ") if not hasattr(pkgutil.resolve_name(path), name)]
        assert not missing, f"{path} has no {missing}"


def test_choosing_settings_lists_every_field_as_the_code_has_it():
    page = (ROOT / "docs" / "choosing-settings.md").read_text(encoding="utf-8").split("\n## Every field\n")[1]
    default = CuttlefishConfig()
    rows = []
    for field in dataclasses.fields(CuttlefishConfig):
        value, words = getattr(default, field.name), field.metadata["help"].replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{value!r}` | {words} |")
    assert [line for line in page.splitlines() if line.startswith("| `")] == rows
