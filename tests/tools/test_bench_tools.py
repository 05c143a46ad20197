"""The tools that measure read their command line as the others do."""

from __future__ import annotations

import pytest

from tools import bench_switches, bench_trainer


@pytest.mark.parametrize("tool", [bench_trainer, bench_switches])
def test_help_is_no_error(tool, capsys):
    """It is what the tool says of itself, with exit code 0."""
    with pytest.raises(SystemExit) as caught:
        tool.prepare(["--help"])
    assert caught.value.code == 0 and tool.__doc__.strip() in capsys.readouterr().out


def test_a_comparison_of_nothing_is_named():
    """Settings behind -- hold for both sides."""
    with pytest.raises(ValueError, match="nothing to compare"):
        bench_switches.prepare(["config.py", "--num_steps", "4", "--", "--lr", "1.0"])
