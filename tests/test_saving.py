"""Saving survives being killed, other processes that save, full disks and read-only folders."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

import cebra_jax_metrics as cjm
from cebra_jax_metrics.checkpoints import store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

# Imports once, and forks before JAX has threads.
DRIVER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from cebra_jax_metrics import load, save
from cebra_jax_metrics.checkpoints import store

kept, path, out = map(Path, sys.argv[1:])

def save_in_turn(number, ready):
    checkpoints = [load(kept / name) for name in "AB"]
    for i in range(number):
        save(checkpoints[i % 2], path)
        if i == 0:
            os.write(ready, b"x")

def start(work, *arguments):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        work(*arguments, writing)
        os._exit(0)
    os.close(writing)
    os.read(reading, 1)  # until it says that it has begun, or it ends
    os.close(reading)
    return child
"""


def run(script, *arguments):
    """What a script prints, line by line; what it leaves running ends with it."""
    code = DRIVER + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Two models in files of their own: large, so that writing them takes its time."""
    folder = tmp_path_factory.mktemp("kept")
    for number, name in enumerate("AB"):
        encoder = cjm.Encoder.init(jax.random.key(number), "offset1-model", 3000, 300 + number, 3)
        cjm.save(cjm.Checkpoint(cjm.Model((encoder,)), metadata={"name": name}), folder / name)
    return folder


@pytest.fixture
def places(kept, tmp_path):
    """The kept models, a file to save to in a folder of its own, and a folder for copies of it."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "copies").mkdir()
    return kept, tmp_path / "folder" / "model", tmp_path / "copies"


def name_of(path, kept):
    """Which of the kept models a file is, all of it."""
    found = cjm.load(path)
    name = found.metadata["name"]
    original = cjm.load(kept / name)
    jax.tree.map(np.testing.assert_array_equal, found.model, original.model)
    return name


def temporary_files(path):
    return [each for each in path.parent.iterdir() if each != path]


@pytest.mark.heavy
def test_killed_at_any_moment(places):
    kept, path, copies = places
    run(
        """
        random.seed(0)
        shutil.copy(kept / "A", path)
        for i in range(30):
            child = start(save_in_turn, 10_000)
            time.sleep(random.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            shutil.copy(path, out / str(i))
        """,
        *places,
    )
    names = [name_of(copy, kept) for copy in copies.iterdir()]
    assert len(names) == 30
    assert set(names) == {"A", "B"}
    assert len(temporary_files(path)) <= 30


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("Path.open", "A"),
        ("os.fsync", "A"),
        ("Path.replace", "A"),
        ("Path.unlink", "B"),
        ("Path.glob", "B"),
    ],
)
def test_killed_at_every_step(places, moment, expected):
    """Killed where a function is called; half of the file is written where that is ``fsync``."""
    kept, path, _ = places
    run(
        f"""
        shutil.copy(kept / "A", path)

        def killed(*arguments, **options):
            if "{moment}" == "os.fsync":
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        def work(ready):
            checkpoint = load(kept / "B")
            {moment} = killed
            save(checkpoint, path)

        child = start(work)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        """,
        *places,
    )
    assert name_of(path, kept) == expected
    assert len(temporary_files(path)) == (moment in ("os.fsync", "Path.replace"))


def test_abandoned_files_do_not_gather(places):
    kept, path, _ = places
    checkpoint = cjm.load(kept / "A")
    run(
        """
        def work(ready):
            checkpoint = load(kept / "B")
            os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
            save(checkpoint, path)

        for _ in range(3):
            os.waitpid(start(work), 0)
        """,
        *places,
    )
    old, older, young = temporary_files(path)
    for file, hours in ((old, 1.1), (older, 1000)):
        time = young.stat().st_mtime - hours * 3600
        os.utime(file, (time, time))
    strange = path.with_name(".0123456789abcdef-0123456789abcdef.tmp")
    strange.touch()
    os.utime(strange, (0, 0))
    cjm.save(checkpoint, path.with_name("another"))
    assert {old, older, young, strange} <= set(path.parent.iterdir())
    cjm.save(checkpoint, path)
    assert set(path.parent.iterdir()) == {path, path.with_name("another"), young, strange}


def test_two_processes_at_once(places):
    kept, path, copies = places
    run(
        """
        children = [start(save_in_turn, 100) for _ in range(2)]
        for i in range(20):
            shutil.copy(path, out / str(i))
            time.sleep(0.01)
        for child in children:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """,
        *places,
    )
    for file in (*copies.iterdir(), path):
        assert name_of(file, kept) in "AB"
    assert not temporary_files(path)


def test_full_disk(places):
    """A file that may not grow as long as it has to."""
    kept, path, _ = places
    before = (kept / "A").read_bytes()
    path.write_bytes(before)
    (line,) = run(
        """
        import resource
        checkpoint = load(kept / "B")
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            save(checkpoint, path)
        except OSError as error:
            print(error)
        """,
        *places,
    )
    assert "File too large" in line
    assert "nothing was changed" in line
    assert str(path) in line
    assert path.read_bytes() == before
    assert not temporary_files(path)


@pytest.mark.parametrize(("mode", "expected"), [(0o555, "refused"), (0o777, "written")])
def test_read_only_folder(places, mode, expected):
    """As another user where this one is root, whom no mode keeps from writing."""
    path = places[1]
    path.write_bytes(b"old")
    path.parent.chmod(mode)
    try:
        lines = run(
            """
            os.chdir(path.parent)  # the folders above may be closed to others
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                store._write_atomically(Path("model"), b"new")
                print("written")
            except PermissionError as error:
                print("refused", error, sep="\\n")
            """,
            *places,
        )
    finally:
        path.parent.chmod(0o755)
    assert lines[0] == expected
    assert path.read_bytes() == (b"old" if expected == "refused" else b"new")
    assert expected == "written" or "nothing was changed (Permission denied): 'model'" in lines[1]
    assert not temporary_files(path)


@pytest.mark.parametrize(
    ("where", "kind"),
    [("", IsADirectoryError), ("file/model", NotADirectoryError), ("no/model", FileNotFoundError)],
)
def test_errors_name_the_file(tmp_path, kept, where, kind):
    (tmp_path / "file").touch()
    with pytest.raises(kind, match="Cannot save the checkpoint, nothing was changed") as caught:
        cjm.save(cjm.load(kept / "A"), tmp_path / where)
    assert caught.value.filename == str(tmp_path / where)
    assert isinstance(caught.value.__cause__, OSError)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_names_of_temporary_files_tell_their_target(tmp_path, monkeypatch):
    """Also for names that are no text, and as long as can be."""
    seen = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (seen.append(a), replace(a, b))[1])
    for name in (b"\xff", b"n" * 255, b"m" * 255, b"m" * 255):
        store._write_atomically(tmp_path / os.fsdecode(name), b"")
    marks = [file.name.partition("-")[0] for file in seen]
    assert len(set(marks)) == 3
    assert marks[2] == marks[3]
    assert len(set(seen)) == 4
