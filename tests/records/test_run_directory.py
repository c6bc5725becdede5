"""A run's directory: found or claimed once, locked while it lives, never overwritten."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import danling_conf
from danling_conf import ConfigRefused
from danling_conf.config.identity import config_id
from danling_conf.records.frozen import freeze_attempt
from danling_conf.records.run_directory import Attempt, bind, claim, newest_attempt, newest_run, owner_of, read_run
from danling_conf.records.run_lock import LostRun, RankLock, is_live
from danling_conf.schema.files import LAYOUTS_INDEX, RUN_FILE, write_whole

pytestmark = pytest.mark.slow

CLAIM = """
import sys, danling_conf
from danling_conf.records.run_directory import claim
config = danling_conf.compose(sys.argv[1:])
print("ready", flush=True)
sys.stdin.readline()
attempt, lock = claim(config)
print(attempt.run_directory, attempt.directory, attempt.seed, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


def config(root: Path, *overrides: str):
    return danling_conf.compose(["steps=3", f"workspace_root={root}", *overrides])


def claimed(root: Path, *overrides: str) -> Attempt:
    """Claim, and let go at once."""
    attempt, lock = claim(config(root, *overrides))
    lock.release()
    return attempt


def checkpoint_in(run: Path, name: str = "ckpt-1") -> Path:
    """What stands for a run's newest checkpoint: its content is not looked at here."""
    saved = run / "checkpoints" / name
    saved.mkdir(parents=True)
    (saved / "checkpoint.json").touch()
    latest = saved.with_name("latest")
    latest.unlink(missing_ok=True)
    latest.symlink_to(saved.name)
    return saved


def test_a_new_run(root):
    attempt = claimed(root, "lineage=a", "experiment=b", "seed=7")
    identity = config_id(config(root, "seed=7"))
    assert attempt.run_directory == root / "a" / "b" / identity
    assert attempt.directory.parent == attempt.run_directory / "attempts"
    assert (attempt.run_id, attempt.seed, attempt.restore, attempt.notes) == (identity, 7, None, ())
    assert read_run(attempt.run_directory)["config_id"] == identity
    assert read_run(attempt.run_directory)["parent"] is None
    assert Attempt.from_json(json.loads(json.dumps(attempt.to_json()))) == attempt


def test_every_fresh_start_has_a_directory_of_its_own(root):
    names = [claimed(root).run_directory.name for _ in range(3)]
    assert names == [names[0], f"{names[0]}.2", f"{names[0]}.3"]
    other = claimed(root, "optim.lr=0.5").run_directory.name
    assert other not in names


def test_a_drawn_seed_belongs_to_the_run(root):
    first, second = claimed(root), claimed(root)
    assert first.seed != second.seed
    assert claimed(root, f"resume={first.run_directory}").seed == first.seed
    assert claimed(root, "auto_resume=true").seed == second.seed


def test_auto_resume_takes_the_newest(root):
    names = [claimed(root).run_directory for _ in range(11)]  # .11 is newer than .2, not before it
    again = claimed(root, "auto_resume=true")
    assert again.run_directory == again.restore == names[-1]
    # A longer budget, another name in the logs, other workers: the same run.
    longer = claimed(root, "auto_resume=true", "steps=99", "dataloader.num_workers=2", "log_interval=1")
    assert longer.run_directory == names[-1]
    assert longer.directory != again.directory


def test_auto_resume_without_a_run_makes_one(root):
    attempt = claimed(root, "auto_resume=true")
    assert attempt.restore is None
    assert attempt.notes == ()
    assert attempt.run_directory.is_dir()


def test_auto_resume_says_when_only_the_layout_differs(root):
    first = claimed(root, "parallel=ddp2")
    claimed(root, "optim.lr=0.5")
    attempt = claimed(root, "auto_resume=true")
    assert attempt.run_directory != first.run_directory
    (note,) = attempt.notes
    assert f"resume={first.run_directory} parallel.allow_degree_change=true" in note


def test_a_run_of_another_layout_is_told_of_whatever_lies_beside_it(root):
    two = config(root, "parallel=ddp2", "seed=1")
    first = bind(two).run_directory
    for seed in range(2, 42):
        bind(replace(two, seed=seed))
    (first.parent / "nothing").symlink_to("nowhere")
    (first.parent / "loop").symlink_to("loop")
    (first.parent / "file").write_text("")
    one = config(root, "auto_resume=true", "seed=1")
    made = bind(one)
    assert f"resume={first} " in made.notes[0]
    shutil.rmtree(made.run_directory)
    moved = first.rename(first.with_name("the good one"))
    made = bind(one)
    assert f'resume="{moved}"' in made.notes[0]
    shutil.rmtree(made.run_directory)
    moved.rename(root / "elsewhere")
    assert bind(one).notes == ()


@pytest.mark.parametrize("damage", ["missing", "torn", "garbage", "directory", "FIFO", "link"])
def test_a_damaged_index_of_layouts_loses_no_note(root, damage):
    first = claimed(root, "parallel=ddp2").run_directory
    index = first.parent / LAYOUTS_INDEX
    content = index.read_bytes()
    assert content.startswith(first.name.encode())
    index.unlink()
    if damage == "torn":
        index.write_bytes(content[:-1])
    elif damage == "garbage":
        index.write_bytes(b"\0\xff\n" + content[::-1])
    elif damage == "directory":
        index.mkdir()
    elif damage == "FIFO":
        os.mkfifo(index)
    elif damage == "link":
        index.symlink_to(root / "target")
    (note,) = claimed(root, "auto_resume=true").notes
    assert f"resume={first} " in note
    assert not (root / "target").exists()


def test_copies_and_unfinished_directories_are_no_runs(root):
    first = claimed(root).run_directory
    for name in (f"{first.name}.bak", f"{first.name}x"):
        folder = first.with_name(name)
        folder.mkdir()
        (folder / RUN_FILE).write_text((first / RUN_FILE).read_text())
    first.with_name(f"{first.name}.7").mkdir()  # its process ended before it wrote what it is
    assert newest_run(first.parent, first.name) == first
    assert claimed(root, "auto_resume=true").run_directory == first


def test_a_broken_file_of_another_run_is_passed_over(root):
    other = claimed(root, "parallel=ddp2").run_directory
    (other / RUN_FILE).write_text('{"settings": ')
    attempt = claimed(root, "auto_resume=true")
    assert attempt.notes == ()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_broken_file_of_the_run_itself_is_named(root, content):
    run = claimed(root).run_directory
    (run / RUN_FILE).write_text(content)
    for override in ("auto_resume=true", f"resume={run}"):
        with pytest.raises(ConfigRefused, match=r"run\.json is broken") as caught:
            claim(config(root, override))
        assert str(run) in str(caught.value)


def test_resuming_a_live_run_is_refused(root):
    attempt, lock = claim(config(root))
    for override in ("auto_resume=true", f"resume={attempt.run_directory}"):
        with pytest.raises(ConfigRefused, match=r"the run is live: process [0-9]+ on ") as caught:
            claim(config(root, override))
        assert str(attempt.run_directory) in str(caught.value)
    # No attempt was opened, and a fresh start is another run.
    assert len(list((attempt.run_directory / "attempts").iterdir())) == 1
    assert claimed(root).run_directory != attempt.run_directory
    lock.release()
    assert claimed(root, f"resume={attempt.run_directory}").run_directory == attempt.run_directory


def start(root: Path, *overrides: str) -> subprocess.Popen[str]:
    """A process that is ready to claim."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, "steps=3", f"workspace_root={root}", *overrides],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_killed_process_holds_nothing(root):
    process = start(root)
    go(process)
    run = Path(process.stdout.readline().split()[0])
    try:
        with pytest.raises(ConfigRefused, match=f"process {process.pid} on"):
            claim(config(root, f"resume={run}"))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert claimed(root, f"resume={run}").run_directory == run
    finally:
        end(process)


def test_processes_that_claim_at_once_get_directories_of_their_own(root):
    processes = [start(root) for _ in range(4)]
    try:
        for process in processes:
            go(process)
        lines = [process.stdout.readline().split() for process in processes]
        runs, attempts, seeds = zip(*lines, strict=True)
        assert len(set(runs)) == len(set(attempts)) == len(set(seeds)) == 4
        identity = config_id(config(root))
        assert {Path(run).name for run in runs} == {identity, *(f"{identity}.{number}" for number in (2, 3, 4))}
    finally:
        for process in processes:
            end(process)


def test_of_processes_that_resume_at_once_one_does(root):
    run = claimed(root).run_directory
    processes = [start(root, f"resume={run}") for _ in range(3)]
    try:
        for process in processes:
            go(process)
        lines = [process.stdout.readline() for process in processes]
        assert sum(str(run) in line for line in lines) == 1
        assert len(list((run / "attempts").iterdir())) == 2
    finally:
        for process in processes:
            end(process)


def test_another_layout_is_refused_and_allowed_when_asked(root):
    run = claimed(root).run_directory
    with pytest.raises(ConfigRefused) as caught:
        claim(config(root, f"resume={run}", "parallel=fsdp2"))
    (violation,) = caught.value.violations
    assert violation.path == "parallel"
    assert "made under the layout single" in violation.rule
    assert "parallel.allow_degree_change=true" in violation.fix
    attempt = claimed(root, f"resume={run}", "parallel=fsdp2", "parallel.allow_degree_change=true")
    assert attempt.run_directory == attempt.restore == run
    # The permission is for layouts alone.
    with pytest.raises(ConfigRefused) as caught:
        claim(config(root, f"resume={run}", "parallel=fsdp2", "parallel.allow_degree_change=true", "optim.lr=0.5"))
    assert [item.path for item in caught.value.violations] == ["optim.lr"]


def test_a_run_of_other_settings_is_refused_with_all_of_them(root):
    run = claimed(root).run_directory
    with pytest.raises(ConfigRefused) as caught:
        claim(config(root, f"resume={run}", "optim.lr=0.5", "model.width=3", "parallel=ddp2"))
    assert {item.path for item in caught.value.violations} == {"optim.lr", "model.width", "parallel"}
    assert f"the run {run.name} was made with 0.001" in caught.value.report()


def test_the_newest_checkpoint_of_the_same_run_goes_on_in_it(root):
    run = claimed(root).run_directory
    saved = checkpoint_in(run)
    for source in (saved, saved.with_name("latest")):
        attempt = claimed(root, f"resume={source}")
        assert (attempt.run_directory, attempt.restore) == (run, source)


def test_an_older_checkpoint_starts_a_new_run_so_that_nothing_is_overwritten(root):
    first = claimed(root)
    older, _ = checkpoint_in(first.run_directory), checkpoint_in(first.run_directory, "ckpt-2")
    attempt = claimed(root, f"resume={older}")
    assert attempt.run_directory.name == f"{first.run_directory.name}.2"
    assert attempt.restore == older
    assert read_run(attempt.run_directory)["parent"] == str(first.run_directory)
    assert attempt.seed == first.seed


def test_a_checkpoint_of_a_foreign_run_starts_a_new_one_that_names_its_parent(root):
    parent = claimed(root, "optim.lr=0.5").run_directory
    saved = checkpoint_in(parent)
    attempt = claimed(root, f"resume={saved}")
    assert attempt.run_directory != parent
    assert attempt.restore == saved
    assert read_run(attempt.run_directory)["parent"] == str(parent)
    assert str(saved) in attempt.notes[0]


def test_a_checkpoint_that_no_run_owns_starts_a_new_run(root, tmp_path):
    saved = tmp_path / "found"
    saved.mkdir()
    (saved / "checkpoint.json").touch()
    attempt = claimed(root, f"resume={saved}")
    assert attempt.restore == saved
    assert read_run(attempt.run_directory)["parent"] == str(saved)


def test_a_run_elsewhere_is_resumed_where_it_is(root, tmp_path):
    run = claimed(tmp_path / "elsewhere").run_directory
    assert claimed(root, f"resume={run}").run_directory == run
    assert not root.exists()


def test_a_relative_path_and_a_link_find_the_run(root, tmp_path, monkeypatch):
    run = claimed(root).run_directory
    monkeypatch.chdir(tmp_path)
    assert claimed(root, f"resume={run.relative_to(tmp_path)}").run_directory == run


def test_an_attempt_is_the_newest_though_the_clock_was_set_back(root, monkeypatch):
    first = claimed(root)
    run = first.run_directory
    (run / "attempts" / "zz").mkdir()  # somebody's own
    (run / "attempts" / f"{first.directory.name}.9").mkdir()
    monkeypatch.setattr("time.strftime", lambda form: "20200101-000000")
    names = [claimed(root, f"resume={run}").directory.name for _ in range(2)]
    assert names == [f"{first.directory.name}.10", f"{first.directory.name}.11"]
    assert newest_attempt(run).name == names[1]


def test_attempts_within_a_second_differ(root):
    run = claimed(root).run_directory
    attempts = {claimed(root, f"resume={run}").directory for _ in range(3)}
    assert len(attempts) == 3


def test_owner(root, tmp_path):
    run = claimed(root).run_directory
    assert owner_of(run) == owner_of(run / "checkpoints" / "not" / "there") == run
    assert owner_of(tmp_path) is None


def test_a_root_that_is_a_file_is_refused(root, tmp_path):
    blocked = replace(config(root), workspace_root=str(tmp_path / "file"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigRefused) as caught:
        claim(blocked)
    (violation,) = caught.value.violations
    assert violation.path == "workspace_root"
    assert "cannot be written" in violation.rule


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_whole(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old"


def test_processes_that_auto_resume_at_once_make_one_run(root):
    """Where no run exists: one of them has it, and the others say so."""
    processes = [start(root, "auto_resume=true") for _ in range(8)]
    try:
        for process in processes:
            go(process)
        lines = [process.stdout.readline().split() for process in processes]
        (made,) = root.rglob("run.json")
        (holder,) = [process for process, line in zip(processes, lines, strict=True) if line]
        assert [line[0] for line in lines if line] == [str(made.parent)]
        assert sorted(item.name for item in made.parent.parent.iterdir()) == [LAYOUTS_INDEX, made.parent.name]
        for process in processes:
            if process is not holder:
                _, err = process.communicate(timeout=60)
                assert "the run is live" in err
    finally:
        for process in processes:
            end(process)


def test_ranks_that_outlive_their_command_keep_the_run(root):
    """Until they end; and one that comes late, after another attempt has taken the run, is refused."""
    attempt, lock = claim(config(root))
    run, resumed = attempt.run_directory, config(root, f"resume={attempt.run_directory}")
    share = RankLock(run, attempt.token)
    lock.release()
    assert is_live(run)
    with pytest.raises(ConfigRefused, match="which is gone, have not ended yet"):
        claim(resumed)
    attempt.check_token()
    share.release()
    assert not is_live(run)
    later, lock = claim(resumed)
    with pytest.raises(LostRun, match="another attempt has taken over the run"):
        RankLock(run, attempt.token)
    with pytest.raises(LostRun):
        attempt.check_token()
    later.check_token()
    lock.release()


@pytest.mark.parametrize("name", ["run.lock", "ranks.lock"])
def test_a_lock_is_not_written_through_a_link(root, name):
    attempt, lock = claim(config(root))
    lock.release()
    path = attempt.run_directory / name
    path.unlink()
    path.symlink_to(root / "elsewhere")
    with pytest.raises(ConfigRefused, match="symbolic links"):
        claim(config(root, f"resume={attempt.run_directory}"))
    assert not (root / "elsewhere").exists()


def test_a_moved_run_is_resumed_from_another_working_directory(root, tmp_path, monkeypatch):
    run = claimed(root).run_directory
    moved = tmp_path / "moved" / run.name
    moved.parent.mkdir()
    run.rename(moved)
    monkeypatch.chdir(tmp_path)
    again, lock = claim(config(root, f"resume=moved/{run.name}"))
    assert again.run_directory == moved
    again.check_token()
    lock.release()
    assert len(list((moved / "attempts").iterdir())) == 2
    assert not list(root.rglob("run.json"))


@pytest.mark.parametrize("how", ["resume", "auto_resume"])
def test_a_run_whose_checkpoints_are_elsewhere_is_not_begun_anew(root: Path, how: str) -> None:
    made = config(root, "checkpoint.dir_name=saved")
    attempt, lock = claim(made)
    freeze_attempt(made, attempt, Path(__file__))
    lock.release()
    (attempt.run_directory / "saved" / "ckpt-s00000001").mkdir(parents=True)
    again = f"resume={attempt.run_directory}" if how == "resume" else "auto_resume=true"
    with pytest.raises(ConfigRefused, match=r"(?s)checkpoint\.dir_name=checkpoints.*keeps its checkpoints in saved"):
        claimed(root, again)
    assert claimed(root, again, "checkpoint.dir_name=saved").run_directory == attempt.run_directory
