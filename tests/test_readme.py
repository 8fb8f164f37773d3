"""The README's code runs as it stands, and its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_every_block_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 3
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "positive = helpful" in printed
    assert "weak baseline" in printed
    assert (tmp_path / "why.html").stat().st_size > 0


def test_what_goes_on_after_a_kill_can_also_be_run_once_more_when_all_is_done(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in BLOCKS if "rec.pending" in block]
    assert len(blocks) == 2
    for block in blocks + blocks:
        torch.manual_seed(0)
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", TEXT))
def test_every_local_link_leads_somewhere(link):
    assert (ROOT / link).exists()


def test_the_two_commands_are_there():
    assert 'pip install ".[demo]" && whence demo\npip install ".[test]" && pytest\n' in TEXT
