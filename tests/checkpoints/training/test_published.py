"""A checkpoint that moves to its place: on the disk before it has its name, and with all that resuming needs."""

import os

import pytest

from parscale.checkpoints.training.run_folder import MANIFEST, METRICS, Run, write_manifest

PARTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state_0.pth", "more/part.bin")


def write_parts(folder):
    for name in PARTS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A loss of power leaves no name of files that are lost; the name itself is flushed when it is there."""
    run, events, rename = Run(tmp_path), [], os.rename

    def note_rename(source, target):
        events.append(("rename", str(target)))
        rename(source, target)

    run.add_metrics({"step": 5})
    with run.working() as written:
        write_parts(written / "new")
        wanted = {str(written / "new" / name) for name in ("", "more", MANIFEST, *PARTS)}
        wanted = {path.rstrip("/") for path in wanted} | {str(tmp_path / METRICS)}
        with monkeypatch.context() as patched:
            patched.setattr(
                os, "fsync", lambda number: events.append(("flush", os.readlink(f"/proc/self/fd/{number}")))
            )
            patched.setattr(os, "rename", note_rename)
            run.publish(written / "new", 5, keep=1)
    named = events.index(("rename", str(run.checkpoint(5))))
    assert {path for what, path in events[:named] if what == "flush"} == wanted
    assert events[named + 1 :] == [("flush", str(tmp_path))]


def test_each_process_leaves_its_random_numbers(tmp_path):
    write_parts(tmp_path)
    write_manifest(tmp_path, 1)
    with pytest.raises(RuntimeError, match=r"is an incomplete checkpoint: it lacks rng_state_1\.pth\.$"):
        write_manifest(tmp_path, 2)
