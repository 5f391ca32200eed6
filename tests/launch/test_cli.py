"""The command line: every sub-command explains itself, mistakes are one line, `--help` is fast."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from longtake.launch import cli
from longtake.launch.command import names, positive, size
from longtake.launch.torchrun import (
    Launch,
    exit_code,
    preemption_stamp,
    torchrun_argv,
    torchrun_environment,
)

COMMAND_NAMES = [command.name for command in cli.COMMANDS]


def longtake(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "longtake.launch.cli", *argv],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
    )


@pytest.mark.parametrize("name", COMMAND_NAMES)
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"longtake {name}" in capsys.readouterr().out


def test_commands_are_those_of_the_design() -> None:
    asked = "world pack index verify stats plan-steps encode train sample evaluate export report"
    assert sorted(COMMAND_NAMES) == sorted(asked.split())


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom longtake.launch import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'av', 'pyarrow', 'rich', 'hydra', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "evaluate" in run.stdout
    assert time.monotonic() - start < 5  # ~0.1 s alone; the machine may be busy


def test_a_mistake_is_one_line_and_code_1(tmp_path: Path) -> None:
    run = longtake("index", str(tmp_path / "absent"))
    assert run.returncode == 1
    assert "absent" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1, run.stderr


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGTAKE_DEBUG", "1")
    with pytest.raises(ValueError, match="absent"):
        cli.main(["stats", str(tmp_path / "absent")])


def test_unknown_command_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["evalute", "x"])
    assert stop.value.code == 2
    assert "evalute" in capsys.readouterr().err


def test_argument_types() -> None:
    assert size("32x48") == (32, 48)
    assert size("64") == (64, 64)
    assert names("a, b,c") == ("a", "b", "c")
    assert positive("3") == 3


@pytest.mark.parametrize(
    "argv",
    [
        ["world", "out", "--clips", "0"],
        ["world", "out", "--clips", "4", "--size", "big"],
        ["world", "out", "--clips", "4", "--families", ","],
        ["world", "out", "--clips", "4", "--split", "test"],
    ],
)
def test_bad_arguments_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2


def test_torchrun_argv() -> None:
    alone = torchrun_argv(Launch(2), ["experiment=demo_dit"])
    assert "--standalone" in alone and "--nproc-per-node=2" in alone
    assert alone[-3:] == ["-m", "longtake.train", "experiment=demo_dit"]
    assert any("SIGUSR1" in part for part in alone)
    two = torchrun_argv(Launch(8, 2, 1, "node0:29500", "run7"), [])
    assert {"--nnodes=2", "--rdzv-conf=is_host=0", "--rdzv-endpoint=node0:29500"} <= set(two)
    assert "--standalone" not in two
    bound = torchrun_argv(Launch(2, interface="lo"), [])
    assert {"--nnodes=1", "--rdzv-conf=is_host=1", "--local-addr=127.0.0.1"} <= set(bound)
    assert any(word.startswith("--rdzv-endpoint=127.0.0.1:") for word in bound)
    assert torchrun_environment("lo").items() >= {
        *(("GLOO_SOCKET_IFNAME", "lo"), ("NCCL_SOCKET_IFNAME", "lo")),
        ("LONGTAKE_BIND_ADDRESS", "127.0.0.1"),
    }


def test_an_interface_must_be_one_of_this_machine() -> None:
    with pytest.raises(ValueError, match=r"--interface eth77 must be one .* \(lo\b"):
        Launch(2, interface="eth77")
    with pytest.raises(ValueError, match=r"by the address of --interface lo, 127\.0\.0\.1"):
        Launch(1, 2, 0, "127.0.0.7:29400", interface="lo")


@pytest.mark.parametrize(("nodes", "rank", "where"), [(2, 0, ""), (2, 2, "h:1"), (1, 1, "")])
def test_impossible_launches(nodes: int, rank: int, where: str) -> None:
    with pytest.raises(ValueError, match="--"):
        Launch(1, nodes, rank, where)


def test_exit_code_follows_the_marker(tmp_path: Path) -> None:
    assert exit_code(0, tmp_path, None) == 0
    assert exit_code(1, tmp_path, None) == 1
    (tmp_path / "PREEMPTED").touch()
    assert exit_code(1, tmp_path, None) == 75
    # The same marker was there before the start: this attempt did not write it.
    assert exit_code(1, tmp_path, preemption_stamp(tmp_path)) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate"], "takes a run, or --videos"),
        (["evaluate", "run", "--videos", "v"], "takes a run, or --videos"),
        (["evaluate", "--videos", "v", "--nproc", "2"], "--nproc means nothing with --videos"),
        (["evaluate", "run", "--clips", "c", "--splits", "val"], "--splits means nothing"),
        (["evaluate", "run", "--where", "x"], "--where means nothing on the world"),
        (["evaluate", "run", "--show", "-1"], "--show -1"),
    ],
)
def test_options_without_effect_are_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 1
    assert message in capsys.readouterr().err


def test_options_are_not_abbreviated() -> None:
    """`--npr 2` would survive into the copies that `--nproc 2` starts."""
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "run", "--npr", "2"])
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "run", "--families", "move,move"])
