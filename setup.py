"""What an index shows of the package: the README without its pictures and its links into the repository, which lead nowhere there."""

import re
from pathlib import Path

from setuptools import setup

WHERE = """
The pictures, and the documents and examples that are named here, are in the source distribution:
`pip download --no-deps --no-binary hf-cuttlefish hf-cuttlefish`.
"""
RELATIVE = r"\((?!https?://)[^)]*\)"


def for_an_index(text: str) -> str:
    """A Markdown text without relative pictures, and with the words alone of relative links."""
    text = re.sub(rf"^!\[[^]]*\]{RELATIVE}\n+", "", text, flags=re.MULTILINE)
    text = re.sub(rf"\[([^]]+)\]{RELATIVE}", r"\1", text)
    return text.rstrip("\n") + "\n" + WHERE


setup(
    long_description=for_an_index((Path(__file__).parent / "README.md").read_text("utf-8")),
    long_description_content_type="text/markdown",
)
