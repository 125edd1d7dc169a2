"""Completion: bash as people use it, zsh and fish by what their scripts are told."""

from __future__ import annotations

import os
import pty
import select
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from stepwell.cli import main

PROGRAM = Path(sys.executable).with_name("stepwell")
TIMEOUT_S = 200
BASH = r"""
compopt() { echo "compopt $*"; }
complete_it() {
    COMPREPLY=(); COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _stepwell_completion stepwell
    echo "${COMPREPLY[*]}"
}
"""
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@pytest.fixture
def environment() -> dict[str, str]:
    """With the program first on the path, and no server where one would be."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STEPWELL_")}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = f"127.0.0.1:{listener.getsockname()[1]}"
    return kept | {"PATH": f"{PROGRAM.parent}:{os.environ['PATH']}", "STEPWELL_SERVER": free}


@pytest.mark.slow
@needs_bash
def test_bash_completes_by_the_printed_script(environment: dict[str, str]) -> None:
    script = CliRunner().invoke(main, ["completion", "bash"])
    assert script.exit_code == 0
    asked = {
        "stepwell st": "store step state",
        "stepwell serve --tls-c": "--tls-cert --tls-client-ca",
        "stepwell serve --front ''": "auto native python",
        "stepwell serve --config ''": "compopt -o default ",
        "stepwell serve --data-dir ''": "compopt -o dirnames ",
        "stepwell serve forecast = mo": "compopt -o default ",  # as bash divides forecast=mo
        "stepwell step a --input x": "compopt -o default ",
        "stepwell state set user ''": "compopt -o default ",
        "stepwell completion z": "zsh",
        "stepwell step user-": "",  # there is no server, and nothing is said
        "stepwell bench fore": "",
    }
    lines = [script.stdout, BASH, *(f"complete_it {words}; echo --" for words in asked)]
    done = subprocess.run(
        ["bash", "--norc", "--noprofile"],
        input="\n".join(lines),
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert done.stderr == ""
    answers = [" ".join(answer.split("\n")) for answer in done.stdout.split("\n--\n")]
    assert dict(zip(asked, answers, strict=False)) == asked


@needs_bash
def test_a_tab_completes_the_line_of_a_person(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "my_model.keras").touch()
    primary, secondary = pty.openpty()
    command = ["bash", "--norc", "--noprofile", "-i"]
    environment |= {"TERM": "dumb", "PS1": "> ", "INPUTRC": os.devnull}
    bash = subprocess.Popen(
        command, stdin=secondary, stdout=secondary, stderr=secondary, env=environment, cwd=tmp_path
    )
    os.close(secondary)
    try:
        os.write(primary, b'eval "$(stepwell completion bash)"; echo rea""dy\n')
        assert "\nready" in read_until(primary, "\nready")
        os.write(primary, b"stepwell ser\t--max-mo\t1 m=my\t\n")
        shown = read_until(primary, "does not exist", "no such", "error: ")
        assert "stepwell serve --max-model-bytes 1 m=my_model.keras" in shown
    finally:
        bash.kill()
        bash.wait(TIMEOUT_S)
        os.close(primary)


def read_until(terminal: int, *texts: str) -> str:
    """What a terminal shows, up to one of the texts."""
    shown = ""
    while not any(text in shown for text in texts):
        readable, _, _ = select.select([terminal], [], [], TIMEOUT_S)
        assert readable, shown
        shown += os.read(terminal, 4096).decode().replace("\r", "")
    return shown


@pytest.mark.parametrize(
    ("shell", "asking", "says"),
    [
        (
            "zsh",
            {"COMP_WORDS": "stepwell serve forecast=m", "COMP_CWORD": "2"},
            "plain\nforecast=m.keras\n_\n",
        ),
        ("fish", {"COMP_WORDS": "stepwell serve forecast=m", "COMP_CWORD": "forecast=m"}, "forecast=m.keras"),
        ("zsh", {"COMP_WORDS": "stepwell serve --config", "COMP_CWORD": "3"}, "file\n\n_\n"),
        ("fish", {"COMP_WORDS": "stepwell serve --max-he", "COMP_CWORD": "--max-he"}, "--max-held-bytes"),
    ],
)
def test_other_shells_get_what_their_scripts_ask_for(
    environment: dict[str, str], tmp_path: Path, shell: str, asking: dict[str, str], says: str
) -> None:
    (tmp_path / "m.keras").touch()
    script = CliRunner().invoke(main, ["completion", shell]).stdout
    assert f"_STEPWELL_COMPLETE={shell}_complete" in script
    done = subprocess.run(
        [PROGRAM],
        env=environment | asking | {"_STEPWELL_COMPLETE": f"{shell}_complete"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert done.stderr == ""
    assert says in done.stdout


def test_a_shell_that_is_not_known() -> None:
    refused = CliRunner().invoke(main, ["completion", "tcsh"])
    assert refused.exit_code == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in refused.stderr
