"""A folder with results of all kinds, and everything that `python -m report` makes of them."""

import shutil

import pytest
from made_results import ALL, block, put

from report import documents


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A README that shows each result and a rung's page; documents.write() has been called on it."""
    root = tmp_path_factory.mktemp("built")
    put(root, *ALL)
    readme = "".join(block(f"{result['kind']}.json") for result in ALL)
    (root / "README.md").write_text(f"# title\n\n{readme}\nthe end\n", encoding="utf-8")
    (root / "docs" / "ladder").mkdir(parents=True)
    rung_page = block("ladder.json r03_compile") + block("verify.json compile=True")
    (root / "docs" / "ladder" / "r03_compile.md").write_text(rung_page, encoding="utf-8")
    assert documents.write(root) == []
    return root


@pytest.fixture
def house(built, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(built, tmp_path, dirs_exist_ok=True)
