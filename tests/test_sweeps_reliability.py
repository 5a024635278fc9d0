"""What a run survives: kill -9 anywhere, damaged ledgers, full disks, company, bad items."""

import errno
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sweeping import ITEMS, MOMENTS, SPEC, killed_at_random, run_small, start, stored, tiny

import mechinterp as mi
from mechinterp.sweeps import local, places, values
from mechinterp.sweeps.ledger import DamagedLedgerError, Ledger, check
from mechinterp.sweeps.local import DiskFullError
from mechinterp.sweeps.opening import open_ledger
from mechinterp.sweeps.places import place_of
from mechinterp.sweeps.values import DamagedValuesError, read_result, read_written


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, which others are compared with."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run_small(out)
    return out


@pytest.fixture
def copied(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_an_uninterrupted_run_does_every_item_once(whole):
    rows = mi.open_run(whole).rows()
    assert len(rows) == ITEMS and {row.state for row in rows} == {"done"}
    assert {row.attempts for row in rows} == {1}
    assert len(stored(whole)) == len(list((whole / "values").iterdir())) == ITEMS


def test_a_ledger_that_cannot_be_read_now_is_not_called_damaged(copied, monkeypatch):
    """As where the disk is full or all files are open: it stays where it is."""
    path = copied / "ledger.sqlite"
    path.rename(copied / "aside")
    path.mkdir()
    (path / "something").touch()
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        check(path)


def test_edits_in_force_are_no_part_of_a_key_so_a_run_under_them_is_refused(tmp_path):
    model = tiny()
    edited = mi.HookManager(model).edit(mi.edits.Zero("z", layers=0, heads=0))
    with pytest.raises(ValueError, match="edits or functions are in force"), edited:
        mi.run(SPEC, tmp_path / "run", models={"tiny": model})
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------- kill -9


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments_it_goes_on_and_ends_with_the_same_numbers(
    seed, whole, tmp_path
):
    out, kills, generator = tmp_path / "run", 0, random.Random(seed)
    while kills < 5:
        if not killed_at_random(out, generator, longest=1.0):
            shutil.rmtree(out)  # it was through before: begin anew
            continue
        kills += 1
    run_small(out)
    assert stored(out) == stored(whole)
    assert sum(row.attempts for row in mi.open_run(out).rows()) <= ITEMS + kills
    assert sorted(p.suffix for p in (out / "values").iterdir()) == [".parquet"] * ITEMS


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_this_very_moment_it_loses_at_most_the_item_in_flight(
    moment, whole, tmp_path
):
    process = start(tmp_path / "run", moment=moment, at=4)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    place = place_of(tmp_path / "run", make=False)
    kept = {path.stem: path.stat().st_mtime_ns for path in place.values.glob("*.parquet")}
    assert len(kept) == (4 if "entered" in moment else 3)
    found = run_small(tmp_path / "run")
    assert found.status().complete and stored(tmp_path / "run") == stored(whole)
    again = {path.stem: path.stat().st_mtime_ns for path in place.values.glob("*.parquet")}
    assert {key: again[key] for key in kept} == kept, "something finished was done again"
    assert not list(place.values.glob(".*")), "a half-written file was left"


# ------------------------------------------------------------------------------------ ledgers


@pytest.mark.parametrize("seed", range(6))
def test_a_ledger_truncated_anywhere_is_noticed_and_every_finished_item_recovered(
    seed, whole, copied, caplog
):
    path = copied / "ledger.sqlite"
    whole_bytes = path.read_bytes()
    length = (
        [0, 50, 4096][seed] if seed < 3 else random.Random(seed).randrange(len(whole_bytes))
    )
    path.write_bytes(whole_bytes[:length])
    with pytest.raises(DamagedLedgerError):
        check(path)
    with pytest.raises(DamagedLedgerError, match=r"Run the same spec .* again"):
        mi.open_run(copied).status()
    before = {p: p.stat().st_mtime_ns for p in (copied / "values").iterdir()}
    found = run_small(copied)
    assert found.status().complete and stored(copied) == stored(whole)
    assert {p: p.stat().st_mtime_ns for p in (copied / "values").iterdir()} == before
    assert f"recovered {ITEMS} finished items" in caplog.text
    assert list(copied.glob("ledger.damaged-*.sqlite"))


def test_a_missing_ledger_is_rebuilt_too_and_lost_or_cut_values_are_done_again(whole, copied):
    (copied / "ledger.sqlite").unlink()
    cut, gone, *_ = sorted((copied / "values").iterdir())
    cut.write_bytes(cut.read_bytes()[:-100])
    gone.unlink()
    with pytest.raises(DamagedValuesError):
        read_written(cut)
    assert run_small(copied).status().complete
    assert stored(copied) == stored(whole)


def test_a_truncated_write_ahead_log_loses_nothing_that_was_finished(whole, tmp_path):
    process = start(tmp_path / "run", moment="an item is entered", at=8)
    process.join()
    log = tmp_path / "run" / "ledger.sqlite-wal"
    for share in (0.9, 0.3, 0):
        log.write_bytes(log.read_bytes()[: int(share * log.stat().st_size)])
        with open_ledger(place_of(tmp_path / "run", make=False)) as ledger:
            assert len(ledger.digests()) == 8
        if not log.exists():
            break
    assert run_small(tmp_path / "run").status().complete
    assert stored(tmp_path / "run") == stored(whole)


def test_another_database_is_not_taken_for_a_ledger(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE items (mine TEXT)")
    db.close()
    with pytest.raises(DamagedLedgerError, match="not a ledger"):
        check(path)


# ------------------------------------------------------------------------------------ company


def test_two_processes_on_one_folder_share_the_work_and_do_nothing_twice(whole, tmp_path):
    out = tmp_path / "run"
    children = [start(out), start(out)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    rows = mi.open_run(out).rows()
    assert {row.state for row in rows} == {"done"} and {row.attempts for row in rows} == {1}
    assert stored(out) == stored(whole)


def test_a_claim_is_one_workers_until_its_process_is_gone(copied, monkeypatch):
    place = place_of(copied, make=False)
    with Ledger(place) as ours, Ledger(place) as theirs:
        ((plan, _),) = ours.plans()
        ours.undo(list(ours.digests())[:1])
        ours.register(1, "cpu")
        theirs.register(1, "cpu")
        mine = ours.claim(plan)
        assert mine is not None and theirs.claim(plan) is None
        assert theirs.waiting_for_others(plan)
        monkeypatch.setattr("mechinterp.sweeps.ledger.is_alive", lambda *_: False)
        taken = theirs.claim(plan)
        assert taken is not None and taken.key == mine.key
        written = read_written(values.path_of(place.values, mine.key))
        assert not ours.done(written), "a worker entered what was no longer its own"
        assert theirs.done(written)


def test_the_lock_of_a_worker_tells_whether_it_is_alive_whatever_the_clock_says(
    copied, monkeypatch
):
    place = place_of(copied, make=False)
    with Ledger(place) as ours:
        ((plan, _),) = ours.plans()
        ours.undo(list(ours.digests())[:1])
        theirs = Ledger(place)
        theirs.register(1, "cpu")
        mine = theirs.claim(plan)
        ours.register(1, "cpu")
        monkeypatch.setattr(time, "time", lambda: 4e9)  # the clock was set, by decades
        assert ours.claim(plan) is None and len(ours.workers()) == 2
        assert theirs._lock is not None
        theirs._lock.release()  # as the system does when a process ends
        assert len(ours.workers()) == 1
        taken = ours.claim(plan)
        assert taken is not None and mine is not None and taken.key == mine.key
        theirs.close()
    assert not list(place.workers.iterdir()), "a lock was left behind"


def test_a_network_file_system_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "file_system", lambda _: "nfs4")
    with pytest.raises(ValueError, match=r"network file system \(nfs4\).*local disk"):
        run_small(tmp_path / "run")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- damaged values


def test_values_cut_short_are_done_again(whole, copied):
    path = sorted((copied / "values").iterdir())[3]
    path.write_bytes(path.read_bytes()[:-100])
    run_small(copied)
    assert stored(copied) == stored(whole)


def test_values_of_another_run_under_the_same_name_are_done_again(whole, copied):
    path = sorted((copied / "values").iterdir())[3]
    written = read_written(path)
    found = read_result(path)
    name = next(iter(found.data.data_vars))
    found.data[name] = found.data[name] + 1
    values.write_values(path.parent, written.item, found, seconds=1.0, finished=1.0, machine={})
    run_small(copied)
    assert stored(copied) == stored(whole)


def test_numbers_that_changed_in_their_file_are_never_returned(copied):
    path = sorted((copied / "values").iterdir())[3]
    table = values.pq.read_table(path)
    column = table["value"].to_numpy().copy()
    column[0] += 1e-9
    place = table.schema.get_field_index("value")
    values.pq.write_table(table.set_column(place, "value", [column]), path)
    with pytest.raises(DamagedValuesError, match=r"not those that were written.*run the same"):
        read_result(path)
    with pytest.raises(DamagedValuesError):
        for found in mi.open_run(copied).results():
            assert found.result


# --------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("where", ["open_ledger", "export", "tally_of"])
def test_a_disk_that_is_full_before_or_after_the_work_is_said_too(where, tmp_path, monkeypatch):
    from mechinterp.sweeps import run as running

    def full(*_, **__):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(running, where, full)
    with pytest.raises(DiskFullError, match="make room"):
        run_small(tmp_path / "run", {**SPEC, "export": "all.csv"})


def test_a_full_disk_stops_cleanly_and_the_same_command_goes_on(whole, tmp_path, monkeypatch):
    calls, write = [], values.pq.write_table

    def full(table, path, **told):
        calls.append(1)
        if len(calls) == 5:
            write(table, path, **told)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(table, path, **told)

    with monkeypatch.context() as smaller:
        smaller.setattr(values.pq, "write_table", full)
        with pytest.raises(DiskFullError, match="make room and start the same command again"):
            run_small(tmp_path / "run")
    now = mi.open_run(tmp_path / "run").status()
    assert (now.done, now.failed, now.running, now.todo) == (4, 0, 0, ITEMS - 4)
    assert len(list((tmp_path / "run" / "values").iterdir())) == 4
    assert run_small(tmp_path / "run").status().complete
    assert stored(tmp_path / "run") == stored(whole)


def test_a_disk_that_is_really_full_stops_cleanly(whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(disk)]
    if not sys.platform.startswith("linux") or subprocess.run(mount).returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        with pytest.raises(DiskFullError):
            run_small(disk / "run")
        subprocess.run(["mount", "-o", "remount,size=20M", str(disk)], check=True)
        assert 0 < mi.open_run(disk / "run").status().done < ITEMS
        assert run_small(disk / "run").status().complete
        assert stored(disk / "run") == stored(whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ------------------------------------------------------------------------------------ failures


def test_an_item_that_raises_is_recorded_and_the_rest_goes_on(whole, tmp_path, monkeypatch):
    do, seen = local.Workbench.do, []

    def sometimes(self, item):
        seen.append(item.key)
        if item.arguments.get("kind") == "mean":
            raise RuntimeError("the weights are bananas")
        return do(self, item)

    with monkeypatch.context() as broken:
        broken.setattr(local.Workbench, "do", sometimes)
        found = run_small(tmp_path / "run")
        assert found.status().failed == 3 and found.status().done == ITEMS - 3
        assert all("the weights are bananas" in error for error in found.failures.values())
        assert all("Traceback" in error for error in found.failures.values())
        seen.clear()
        run_small(tmp_path / "run")
        assert not seen, "a failed item was done again without being asked to"
    found = run_small(tmp_path / "run", retry_failed=True)
    assert found.status().complete and stored(tmp_path / "run") == stored(whole)


def test_a_result_file_is_never_unpickled(copied):
    import pickle

    class Trap:
        def __reduce__(self):
            return (open, (str(copied / "sprung"), "w"))

    path = sorted((copied / "values").iterdir())[0]
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DamagedValuesError):
        read_result(path)
    (copied / "ledger.sqlite").unlink()
    run_small(copied)
    assert not (copied / "sprung").exists()


# ------------------------------------------------------------------------------ what is reused


def test_a_larger_grid_runs_only_what_is_new(copied):
    before = stored(copied)
    larger = {**SPEC, "seeds": [0, 1]}
    run_small(copied, larger)
    rows = mi.open_run(copied).rows()
    assert len(rows) == 2 * ITEMS and {row.attempts for row in rows} == {1}
    assert before.items() <= stored(copied).items()
    assert len(mi.open_run(copied, all_plans=True).rows()) == len(rows)


def test_other_weights_never_reuse_a_number(copied):
    other = tiny()
    with torch.no_grad():
        next(other.parameters()).mul_(1 + 1e-6)
    found = mi.run(SPEC, copied, models={"tiny": other}, output="quiet")
    assert found.status().done == ITEMS
    assert len(mi.open_run(copied, all_plans=True).rows("done")) == 2 * ITEMS


def test_other_versions_never_reuse_a_number(copied, monkeypatch):
    from mechinterp import results

    told = {**results.versions(), "torch": "99.0"}
    monkeypatch.setattr(results, "versions", lambda: told)
    assert run_small(copied).status().done == ITEMS
    assert len(mi.open_run(copied, all_plans=True).rows("done")) == 2 * ITEMS


def test_weights_that_change_under_a_run_stop_it(tmp_path):
    from mechinterp.sweeps.workbench import ChangedError

    model, told = tiny(), []
    run = local.Workbench.do

    def change(self, item):
        told.append(1)
        if len(told) == 3:
            with torch.no_grad():
                next(model.parameters()).add_(1)
        return run(self, item)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(local.Workbench, "do", change)
        with pytest.raises(ChangedError, match="changed since the sweep was planned"):
            mi.run(SPEC, tmp_path / "run", models={"tiny": model}, output="quiet")
    assert mi.open_run(tmp_path / "run").status().done == 2


@pytest.mark.slow
def test_a_worker_process_that_is_killed_is_replaced_and_the_numbers_are_the_same(tmp_path):
    import threading
    import time

    import psutil
    from zoo import hf

    mi.save_model(mi.load_model(hf("gpt2")), tmp_path / "model")
    spec = {**SPEC, "models": str(tmp_path / "model")}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        mi.run(spec, tmp_path / "alone", output="quiet")
    finally:
        torch.set_num_threads(before)
    killed: list[int] = []

    def kill_one() -> None:
        while not list((tmp_path / "run" / "values").glob("*.parquet")):
            time.sleep(0.02)
        (victim, *_) = psutil.Process().children()
        killed.append(victim.pid)
        victim.kill()

    threading.Thread(target=kill_one, daemon=True).start()
    torch.set_num_threads(2)
    try:
        found = mi.run(spec, tmp_path / "run", workers=2, output="quiet")
    finally:
        torch.set_num_threads(before)
    assert killed and found.status().complete and not found.failures
    assert stored(tmp_path / "run") == stored(tmp_path / "alone")
