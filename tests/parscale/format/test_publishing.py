"""How what is written gets to its place: links, what is in the way, flushing, and several processes at one place."""

import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from killed_saves import kill_at_move

from parscale import wrap
from parscale.format.folders import Checkpoint
from parscale.format.staging import require_new_folder, require_writable_folder, staged, staged_file
from parscale.format.working import MARKER, working

SUFFIX = ".parscale-working"


def tree(folder):
    """Everything below a folder: contents of files, where links lead to, and folders."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            what = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
            found[str(path.relative_to(folder))] = what
    return found


def write(work, names, text="new"):
    for name in names:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text)


def publish(target, names, **options):
    """A save: these files, and old ones of other shards have no place beside them."""
    with staged(target, last="config.json", replaces=lambda name: name.startswith("model-"), **options) as work:
        write(work, names)


@pytest.fixture
def target(tmp_path):
    """A folder with an older save, and a place elsewhere that links in it lead to."""
    write(tmp_path / "elsewhere", ["config.json", "model.safetensors", "streams.safetensors", "thesis.txt"], "theirs")
    write(tmp_path / "target", ["config.json", "other/streams.safetensors", "model-1.safetensors", "mine.txt"], "old")
    return tmp_path / "target"


# -- links


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("leads_to", ["../elsewhere/config.json", "../nowhere", "../elsewhere", "config.json"])
@pytest.mark.parametrize("name", ["config.json", "model-1.safetensors"])
def test_a_link_in_place_of_a_file_is_replaced_and_what_it_leads_to_stays(target, name, leads_to, fails, monkeypatch):
    """Of a new file, and of an old one that has no place beside the new ones."""
    (target / name).unlink()
    (target / name).symlink_to(leads_to)
    before = tree(target.parent)
    if fails:
        break_the_last_move(monkeypatch, 4)
        with pytest.raises(OSError, match="Nothing was saved: Input/output error"):
            publish(target, ["config.json", "model.safetensors"])
    else:
        publish(target, ["config.json", "model.safetensors"])
        before |= {"target/config.json": b"new", "target/model.safetensors": b"new"}
        del before["target/model-1.safetensors"]
    assert tree(target.parent) == before


def break_the_last_move(monkeypatch, number):
    from parscale.format import staging

    moves, replace = [], os.replace

    def move(source, destination):
        moves.append(source)
        if len(moves) == number:
            raise OSError(errno.EIO, "broken")
        replace(source, destination)

    monkeypatch.setattr(staging.os, "replace", move)


@pytest.mark.parametrize("what", ["link", "dangling link", "file"])
@pytest.mark.parametrize("place", ["other", "deep", "deep/er"])
def test_nothing_is_written_through_what_stands_for_a_sub_folder(target, place, what):
    path = target / place
    if path.is_dir():
        (path / "streams.safetensors").unlink()
        path.rmdir()
    path.parent.mkdir(exist_ok=True)
    if what == "file":
        path.write_text("mine")
    else:
        path.symlink_to(target.parent / ("elsewhere" if what == "link" else "nowhere"))
    before = tree(target.parent)
    with pytest.raises(OSError, match=f"{place} should be a folder, but is .*move it elsewhere"):
        publish(target, ["config.json", f"{place}/streams.safetensors"])
    assert tree(target.parent) == before


def test_a_folder_that_stands_for_a_file_is_refused(target):
    (target / "model.safetensors").mkdir()
    (target / "model.safetensors" / "mine").write_text("mine")
    before = tree(target.parent)
    with pytest.raises(OSError, match="should be a file, but is a folder; move it elsewhere"):
        publish(target, ["config.json", "model.safetensors"])
    assert tree(target.parent) == before


def test_a_set_s_sub_folder_that_is_a_link(wrapped, tmp_path):
    wrapped.add_streams("other", 2, init="random", prefix_length=3)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "other").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path)
    with pytest.raises(OSError, match="a link, through which nothing is written"):
        wrapped.save_pretrained(tmp_path / "model")
    assert tree(tmp_path) == before


def test_a_link_that_is_the_output_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old.json").write_text("old")
    (tmp_path / "output").symlink_to("disk")
    (tmp_path / "figures.json").symlink_to("disk/old.json")
    with staged(tmp_path / "output", last="config.json") as work:
        write(work, ["config.json"])
    with staged_file(tmp_path / "figures.json") as beside:
        beside.write_text("new")
    assert tree(tmp_path) == {
        "disk": "folder", "disk/config.json": b"new", "disk/old.json": b"new", "output": "disk",
        "figures.json": "disk/old.json",
    }  # fmt: skip


# -- undoing


@pytest.mark.parametrize("first", range(2, 5))
def test_what_cannot_be_put_back_is_kept(target, monkeypatch, first):
    """From one move on, all fail: the next save finds the files where the error says."""
    before, moves, replace = tree(target), [], os.replace

    def move(source, destination):
        moves.append(source)
        if len(moves) >= first:
            raise OSError(errno.EIO, "broken")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", move)
    with pytest.raises(OSError, match=rf"could not be moved back \(.*\): they are in .*{SUFFIX}, and the next save"):
        publish(target, ["config.json", "model.safetensors"])
    monkeypatch.undo()
    require_writable_folder(target)
    new = before | {"config.json": b"new", "model.safetensors": b"new"}
    del new["model-1.safetensors"]
    assert tree(target) == (before if first < 4 else new)


# -- killed while files move


@pytest.mark.parametrize("target_holds", [["config.json", "model-1.safetensors", "mine.txt"], ["mine.txt"]])
def test_a_save_that_is_killed_while_files_move_is_all_or_nothing(tmp_path, target_holds):
    """A kill at each rename and each flush: whatever the next save does, one checkpoint is complete."""
    ended = []
    for number in range(1, 100):
        target = tmp_path / str(number)
        write(target, target_holds, "old")
        old, new = tree(target), {"config.json": b"new", "deep": "folder", "deep/set": b"new", "mine.txt": b"old"}
        process = os.fork()
        if process == 0:
            die_at(number)
            publish(target, ["config.json", "deep/set"])
            os._exit(0)
        killed = os.waitpid(process, 0)[1] != 0
        if "config.json" in target_holds and not (target / "config.json").exists():
            with pytest.raises(FileNotFoundError, match=r"A save was cut off: move the files in .* to "):
                Checkpoint(target).kind()
        with pytest.raises(RuntimeError), staged(target, last="config.json"):
            raise RuntimeError
        assert tree(target) in (old, new)
        ended.append(tree(target) == new)
        if not killed:
            break
    assert not killed
    assert ended == sorted(ended)  # from one kill on it is the new one
    assert set(ended) == {False, True}


def die_at(number):
    """Ends this process without any clean-up in place of one of its renames and flushes."""
    calls = 0

    def counted(call):
        def counting(*arguments):
            nonlocal calls
            calls += 1
            if calls == number:
                os._exit(9)
            return call(*arguments)

        return counting

    os.replace, os.rename, os.fsync = counted(os.replace), counted(os.rename), counted(os.fsync)


def test_a_second_interruption_while_moves_are_undone(target, monkeypatch):
    before, moves, replace = tree(target), [], os.replace

    def interrupt(source, destination):
        moves.append(source)
        if len(moves) > 2:
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publish(target, ["config.json", "model.safetensors"])
    monkeypatch.undo()
    require_writable_folder(target)
    assert tree(target) == before


SAVED = ["config.json", "model.safetensors"]  # of the folder `target`: two old files move away, then these come


@pytest.mark.parametrize(("number", "newer"), [(2, SAVED), (3, SAVED[:1]), (3, SAVED), (4, SAVED[:1])])
def test_what_was_written_after_a_save_was_cut_off_is_not_replaced(target, number, newer):
    before = tree(target)
    assert kill_at_move(number, lambda: publish(target, SAVED))
    write(target, newer, "newer")
    cut = tree(target)
    for write_again in (lambda: require_writable_folder(target), lambda: publish(target, ["report.json"])):
        said = r"has newer ones of the same names \(config.json.*move those elsewhere.*delete this folder"
        with pytest.raises(FileExistsError, match=said) as raised:
            write_again()
        assert raised.value.filename == str(target / SUFFIX)
        assert tree(target) == cut
    for name in newer:
        (target / name).rename(target.parent / name)
    require_writable_folder(target)
    new = before | dict.fromkeys(SAVED, b"new")
    del new["model-1.safetensors"]
    assert tree(target) == (before if number < 3 else new)


def test_a_folder_that_was_emptied_after_a_save_was_cut_off_is_not_new(target):
    """What a shell's `rm -r target/*` leaves is hidden; a save brings it back and does not go on."""
    kill_at_move(2, lambda: publish(target, SAVED))
    for name in ("other/streams.safetensors", "model-1.safetensors", "mine.txt"):
        (target / name).unlink()
    (target / "other").rmdir()
    with pytest.raises(ValueError, match=r"is not empty; .* A save there was cut off, and .*working has files of it"):
        require_new_folder(target)
    with pytest.raises(ValueError, match="is not empty"), staged(target, last="config.json", new=True):
        pytest.fail("the work was begun")
    assert tree(target) == {"config.json": b"old"}


def test_a_folder_in_which_nothing_had_moved_yet_is_new(tmp_path):
    write(tmp_path / SUFFIX, [MARKER, "new/config.json"])
    (tmp_path / SUFFIX / ".leaving").mkdir()
    require_new_folder(tmp_path)
    publish(tmp_path, ["config.json"], new=True)
    assert tree(tmp_path) == {"config.json": b"new"}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
@pytest.mark.parametrize("number", [3, 4])
def test_a_save_that_was_cut_off_is_ended_in_its_own_order(target, number, log):
    """Also by whoever ends it: `config.json` first would let readers take an incomplete folder for a checkpoint."""
    write(target, ["model.safetensors"], "old")
    kill_at_move(number, lambda: publish(target, SAVED))
    require_writable_folder(target)
    moved = [entry[2].relative_to(target).as_posix() for entry in log if entry[0] == "move"]
    assert [name for name in moved if SUFFIX not in name] == ["model.safetensors", "config.json"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_a_save_that_fails_is_undone_in_its_own_order(target, monkeypatch, log):
    break_the_last_move(monkeypatch, 4)
    with pytest.raises(OSError, match="Nothing was saved"):
        publish(target, SAVED)
    moved = [entry[2].relative_to(target).as_posix() for entry in log if entry[0] == "move"]
    assert [name for name in moved if SUFFIX not in name][-2:] == ["model-1.safetensors", "config.json"]


def test_a_folder_that_may_not_be_read_is_somebody_s(target, monkeypatch):
    """As the folder lost+found at the top of a disk."""
    (target / "lost+found").mkdir()
    iterdir = Path.iterdir

    def refuse(path):
        if path.name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    publish(target, ["config.json", "model.safetensors"])
    assert sorted(os.listdir(target)) == ["config.json", "lost+found", "mine.txt", "model.safetensors", "other"]


def test_a_working_folder_of_links_moves_nothing(tmp_path):
    """As one in a folder that somebody else made."""
    write(tmp_path / "elsewhere", ["thesis.txt"], "mine")
    for name in (".leaving", "new"):
        folder = tmp_path / name.strip(".") / SUFFIX
        write(folder, [MARKER, *([".old/config.json"] if name == "new" else [])])
        (folder / name).symlink_to(tmp_path / "elsewhere")
        require_writable_folder(folder.parent)
        assert tree(folder.parent) == {}
    assert tree(tmp_path / "elsewhere") == {"thesis.txt": b"mine"}


# -- flushing


@pytest.fixture
def log(monkeypatch):
    """What was flushed and moved, in order."""
    done, fsync, replace, rename = [], os.fsync, os.replace, os.rename

    def flushed(descriptor):
        done.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def moved(how):
        def move(source, destination):
            done.append(("move", Path(source), Path(destination)))
            how(source, destination)

        return move

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", moved(replace))
    monkeypatch.setattr(os, "rename", moved(rename))
    return done


def assert_flushed(log, names, target):
    """Each file before it moves, and the folder that it came into after it."""
    for name in names:
        (at,) = (i for i, entry in enumerate(log) if entry[0] == "move" and entry[2] in (target / name, target))
        source = log[at][1] if log[at][2] == target / name else log[at][1] / name
        assert ("flush", source) in log[:at]
        into = log[at][2].parent
        assert ("flush", into) in log[at:]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("save", ["save_pretrained", "save_streams"])
def test_a_save_is_on_the_disk_before_it_has_its_name(wrapped, tiny, tmp_path, log, save, existing):
    target = tmp_path / "model"
    if existing:
        getattr(wrap(tiny(), 2, init="random"), save)(target)
        log.clear()
    getattr(wrapped, save)(target)
    moved = [entry for entry in log if entry[0] == "move" and SUFFIX not in entry[2].parts]
    assert_flushed(log, [path.relative_to(target) for path in target.rglob("*") if path.is_file()], target)
    last = "config.json" if save == "save_pretrained" else "parscale_config.json"
    if existing:
        assert moved[-1][2] == target / last
        before = log[: log.index(moved[-1])]
        assert before[-1][0] == "flush"  # the other files have their names on the disk before the last one comes


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, log):
    with staged_file(tmp_path / "figures.json") as beside:
        beside.write_text("new")
    assert_flushed(log, ["figures.json"], tmp_path)


def test_folders_above_are_on_the_disk(tmp_path, log):
    with staged(tmp_path / "a" / "b" / "model", last="config.json") as work:
        write(work, ["config.json"])
    assert {("flush", tmp_path), ("flush", tmp_path / "a"), ("flush", tmp_path / "a" / "b")} <= set(log)


def test_what_says_how_to_end_the_moves_is_on_the_disk_before_them(tmp_path, log):
    write(tmp_path, ["config.json", "model.safetensors"], "old")
    publish(tmp_path, ["config.json", "model.safetensors"])
    folder = tmp_path / SUFFIX
    moves = {entry[2]: number for number, entry in enumerate(log) if entry[0] == "move"}
    leaves, left = moves[folder / ".leaving" / "config.json"], moves[folder / ".old"]
    assert {("flush", folder / ".last"), ("flush", folder)} <= set(log[:leaves])
    assert ("flush", folder) in log[left : moves[tmp_path / "model.safetensors"]]


# -- several processes, and killed ones


def hold(folder, started, end):
    with staged(folder, last="config.json") as work:
        write(work, ["config.json"], "first")
        started.set()
        end.wait(60)


@pytest.mark.parametrize("existing", [False, True])
def test_two_processes_do_not_write_one_folder(tmp_path, existing):
    target = tmp_path / "model"
    if existing:
        write(target, ["config.json"], "old")
    context = multiprocessing.get_context("fork")
    started, end = context.Event(), context.Event()
    other = context.Process(target=hold, args=(target, started, end))
    other.start()
    assert started.wait(60)
    for options in ({}, {} if existing else {"new": True}):
        with pytest.raises(BlockingIOError, match=r"another process is writing there; wait .*model"):
            publish(target, ["config.json"], **options)
    end.set()
    other.join()
    assert tree(target) == {"config.json": b"first"}
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("existing", [False, True])
def test_what_a_killed_process_left_is_cleared_by_the_next_one(tmp_path, existing):
    target = tmp_path / "model"
    if existing:
        target.mkdir()
    script = (
        "import os, signal\nfrom parscale.format.staging import staged\n"
        f"with staged({str(target)!r}, last='config.json') as work:\n"
        "    (work / 'half').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-P", "-c", script]).returncode < 0
    assert list(tmp_path.rglob("half"))
    require_new_folder(target)
    with staged(target, last="config.json", new=True) as work:
        write(work, ["config.json"])
    assert tree(tmp_path) == {"model": "folder", "model/config.json": b"new"}


def test_a_folder_by_that_name_which_is_somebody_s_is_left_alone(tmp_path):
    mine = tmp_path / f".model{SUFFIX}"
    write(mine, ["thesis.txt"], "mine")
    with pytest.raises(FileExistsError, match="was not made by parscale; move it elsewhere"):
        publish(tmp_path / "model", ["config.json"])
    assert tree(mine) == {"thesis.txt": b"mine"}


def test_a_working_folder_says_what_it_is(tmp_path):
    with working(tmp_path, "model") as folder:
        assert "can be deleted" in (folder / MARKER).read_text()
    assert not list(tmp_path.iterdir())


# -- folders that are filled meanwhile


def test_a_new_folder_that_was_filled_meanwhile(tmp_path):
    def fill():
        with staged(tmp_path / "model", last="config.json", new=True) as work:
            write(work, ["config.json"])
            write(tmp_path / "model", ["mine"])

    with pytest.raises(ValueError, match="is not empty; give a new one"):
        fill()
    assert tree(tmp_path) == {"model": "folder", "model/mine": b"new"}


def test_a_folder_that_appeared_meanwhile(tmp_path):
    for name, files in (("empty", []), ("filled", ["config.json", "mine"])):
        target = tmp_path / name

        def save(target=target, files=files):
            with staged(target, last="config.json") as work:
                write(work, ["config.json"])
                target.mkdir()
                write(target, files, "theirs")

        if files:
            with pytest.raises(FileExistsError, match=r"did not exist and was filled while .*; save again.*filled"):
                save()
        else:
            save()
    assert tree(tmp_path) == {
        "empty": "folder", "empty/config.json": b"new", "filled": "folder", "filled/config.json": b"theirs",
        "filled/mine": b"theirs",
    }  # fmt: skip
