"""What README and the families' pages show is run: Python blocks as they stand, launcher commands by their help."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTARTS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
PAGES = [ROOT / "README.md", ROOT / "BUILD_NOTES.md", *sorted((ROOT / "experiments").glob("*/README.md"))]
_COMMAND = re.compile(r"python -m (experiments\.[\w.]+(?: --?[\w=./,{}\"'-]+)*)")
COMMANDS = sorted(
    {match.rstrip("`.,;:)") for page in PAGES for match in _COMMAND.findall(page.read_text(encoding="utf-8"))}
)


@pytest.mark.parametrize("number", range(len(QUICKSTARTS)))
def test_quickstart(number, tmp_path, capsys):
    code = QUICKSTARTS[number]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    if "jax.config.update" not in code:
        exec(compile(code, f"README quickstart {number}", "exec"), {"__name__": "__main__"})
        assert capsys.readouterr().out
        return
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_the_pages_exist(command):
    """Modules, studies and flag names of every command; what they compute is tested elsewhere."""
    from experiments.common.flags import help_text
    from experiments.common.study import load_study

    module, *flags = command.split()
    place = ROOT.joinpath(*module.split("."))
    assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), f"no module {module}"
    named = dict(flag.lstrip("-").split("=", 1) for flag in flags if "=" in flag)
    if module.endswith(".launch") and named.get("study", "NAME") != "NAME":
        study = load_study(module.split(".")[1], named["study"])
        listed = help_text(module.split(".")[1], study, full=True)
        for name in named:
            assert name == "study" or f"--{name} " in listed, f"{command}: {study.name} has no flag --{name}"


def test_files_named_on_the_pages_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} points to {target}"
