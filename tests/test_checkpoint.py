import errno
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from grpo.checkpoint import (
    damage,
    find_checkpoint,
    load_optimizer,
    read_best,
    read_state,
    save_checkpoint,
    step_folders,
    tidy,
    write_folder,
)


def write(text):
    return lambda folder: (folder / "file").write_text(text)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != "manifest.json"}


def silent(message):
    pytest.fail(f"there was nothing to tell, but: {message}")


# ---- folders


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "runs" / "best"
    write_folder(folder, 1, lambda new: [write("old")(new), (new / "more").write_text("")])
    write_folder(folder, {"step": 2}, write("new"))
    assert contents(folder) == {"file": "new", "state.json": '{"step": 2}\n'}
    assert list(folder.parent.iterdir()) == [folder]


def test_the_manifest_has_the_size_and_sha256_of_every_file(tmp_path):
    def fill(folder):
        (folder / "part").mkdir()
        (folder / "part" / "one").write_text("abc")
        (folder / "two").write_bytes(b"")

    write_folder(tmp_path / "best", None, fill)
    assert json.loads((tmp_path / "best" / "manifest.json").read_text()) == {  # digests as `sha256sum` prints them
        "part/one": {"size": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        "state.json": {"size": 5, "sha256": "38e0b9de817f645c4bec37c0d4a3e58baecccb040f5718dc069a72c7385a0bed"},
        "two": {"size": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
    }
    assert damage(tmp_path / "best") is None


def test_files_are_on_the_disk_before_their_folder_has_its_name(tmp_path, monkeypatch):
    """os.fsync is told a descriptor: /proc says of what."""
    folder, synced = tmp_path / "best", []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda *paths: (synced.append("rename"), rename(*paths)))
    write_folder(folder, None, write("text"))
    *before, last, parent = synced
    assert {Path(path).name for path in before} == {"file", "state.json", "manifest.json", ".partial"}
    assert (last, parent) == ("rename", str(tmp_path))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_folder_whole_and_frees_the_disk(tmp_path, error):
    folder = tmp_path / "best"
    write_folder(folder, None, write("old"))

    def fill(new):
        write("half")(new)
        raise error

    with pytest.raises(type(error)):
        write_folder(folder, None, fill)
    assert contents(folder)["file"] == "old" and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("operation", ["rename", "fsync"])
def test_a_save_whose_last_operations_fail_leaves_a_whole_folder(tmp_path, monkeypatch, operation):
    """Each call of the operation fails once, the later ones after the folder that is replaced has been moved away."""
    folder, owner = tmp_path / "best", {"rename": Path, "fsync": os}[operation]
    original = getattr(owner, operation)
    write_folder(folder, 0, write("0"))
    for n in range(1, 50):
        calls = itertools.count()

        def failing(*arguments, calls=calls, n=n):
            if next(calls) == n - 1:
                raise OSError(errno.EIO, "Input/output error")
            return original(*arguments)

        monkeypatch.setattr(owner, operation, failing)
        before = read_state(folder)
        try:
            write_folder(folder, n, write(str(n)))
        except OSError:
            assert read_state(folder) in (before, n) and damage(folder) is None
            assert list(tmp_path.iterdir()) == [folder]
        else:
            break
    assert n > 2 and contents(folder) == {"file": str(n), "state.json": f"{n}\n"}


# ---- checkpoints


def trained(steps, seed=0):
    """A network and its optimizer after some steps."""
    torch.manual_seed(seed)
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.ones(3)).square().sum().backward()
        optimizer.step()
    return network, optimizer


def save(run, step, keep=2):
    network, optimizer = trained(step)

    def save_model(folder):
        (folder / "config.json").write_text("{}")
        torch.save(network.state_dict(), folder / "weights.pt")

    save_checkpoint(run, {"step": step, "best": None}, save_model, optimizer.state_dict(), keep)


def names(run):
    return [folder.name for folder in step_folders(run)]


def test_the_newest_checkpoints_are_kept(tmp_path):
    for step in (9, 10, 11):
        save(tmp_path, step)
    assert names(tmp_path) == ["step_000010", "step_000011"]
    (tmp_path / "checkpoints" / "step_000010.mine").mkdir()
    save(tmp_path, 100, keep=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000010.mine", "step_000100"]


def test_later_checkpoints_do_not_crowd_out_the_new_one(tmp_path):
    for step in (100, 300):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step_000300" / "weights.pt").unlink()
    save(tmp_path, 200)
    assert names(tmp_path) == ["step_000100", "step_000200"]


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    save(tmp_path, 3)
    (folder,) = step_folders(tmp_path)
    assert read_state(folder) == {"step": 3, "best": None}
    network, optimizer = trained(0, seed=1)
    network.load_state_dict(torch.load(folder / "weights.pt"))
    load_optimizer(folder, optimizer)
    optimizer.zero_grad()
    network(torch.ones(3)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), trained(4)[0].parameters()))


def test_an_optimizer_file_may_not_hold_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("run",))

    torch.save(Payload(), tmp_path / "optimizer.pt")
    with pytest.raises(Exception, match="weights_only"):
        load_optimizer(tmp_path, trained(0)[1])


def test_resume_means(tmp_path):
    assert find_checkpoint(None, tmp_path, silent) is None
    assert find_checkpoint("auto", tmp_path, silent) is None
    assert find_checkpoint("auto", tmp_path / "nowhere", silent) is None
    for step in (1, 2):
        save(tmp_path, step)
    first, second = step_folders(tmp_path)
    assert find_checkpoint("auto", tmp_path, silent) == second
    assert find_checkpoint(str(second), tmp_path, silent) == second
    assert find_checkpoint(str(first), tmp_path / "another run", silent) == first
    assert find_checkpoint(None, tmp_path, silent) is None


def test_a_checkpoint_that_the_run_has_gone_on_from_is_refused(tmp_path):
    """The lines of the later steps would be dropped, and the later checkpoints would be without them."""
    for step in (1, 2):
        save(tmp_path, step)
    first, _ = step_folders(tmp_path)
    with pytest.raises(ValueError, match=f"--resume {first}: .* step_000002; .*--output"):
        find_checkpoint(str(first), tmp_path, silent)


@pytest.mark.parametrize("missing", ["state.json", "optimizer.pt", "config.json"])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, missing):
    save(tmp_path, 1)
    (folder,) = step_folders(tmp_path)
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"--resume {folder}.*{missing}"):
        find_checkpoint(str(folder), tmp_path, silent)
    with pytest.raises(ValueError, match="--resume nowhere"):
        find_checkpoint("nowhere", tmp_path, silent)


def test_state_is_json(tmp_path):
    save(tmp_path, 7)
    assert json.loads((tmp_path / "checkpoints" / "step_000007" / "state.json").read_text())["step"] == 7


# ---- damage


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file):
    os.truncate(file, 2)


DAMAGES = [(flip, name, f"{name}: sha256 differs") for name in ("weights.pt", "optimizer.pt", "state.json")]
DAMAGES += [(cut, name, f"{name}: size 2, not ") for name in ("weights.pt", "optimizer.pt", "state.json")]
DAMAGES += [(Path.unlink, name, f"{name}: No such file or directory") for name in ("weights.pt", "manifest.json")]
DAMAGES += [(cut, "manifest.json", "manifest.json: not a manifest")]


@pytest.mark.parametrize(("hurt", "name", "told"), DAMAGES)
def test_a_damaged_checkpoint_is_told_and_passed_over_or_refused(tmp_path, hurt, name, told):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    first, second, third = step_folders(tmp_path)
    hurt(third / name)
    lines = []
    assert find_checkpoint("auto", tmp_path, lines.append) == second
    (line,) = lines
    assert line.startswith(f"{third} ") and told in line and "\n" not in line
    with pytest.raises(ValueError) as error:
        find_checkpoint(str(third), tmp_path, silent)
    assert str(error.value).startswith(f"--resume {third}: ") and told in str(error.value)

    hurt(second / name)
    lines.clear()
    assert find_checkpoint("auto", tmp_path, lines.append) == first
    assert [line.split()[0] for line in lines] == [str(third), str(second)]
    hurt(first / name)
    with pytest.raises(ValueError, match=r"--resume auto: .*damaged"):  # and not: begin again, over the old lines
        find_checkpoint("auto", tmp_path, lines.append)


def test_a_flip_of_any_byte_is_noticed(tmp_path):
    write_folder(tmp_path / "best", {"step": 1}, write("text"))
    for file in (tmp_path / "best").iterdir():
        whole = file.read_bytes()
        for place in range(len(whole)):
            for bit in range(8):
                file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
                assert damage(tmp_path / "best"), (file.name, place, bit)
        file.write_bytes(whole)


def test_the_best_model_says_which_it_is_unless_it_is_damaged(tmp_path):
    assert read_best(tmp_path, silent) is None
    write_folder(tmp_path / "best", {"step": 3, "srcc": 0.5}, write("text"))
    assert read_best(tmp_path, silent) == {"step": 3, "srcc": 0.5}
    flip(tmp_path / "best" / "file")
    lines = []
    assert read_best(tmp_path, lines.append) is None
    assert len(lines) == 1 and str(tmp_path / "best") in lines[0] and "file: sha256 differs" in lines[0]


# ---- saves that are cut off: processes killed, files that may not grow


def random_bytes(step):
    return random.Random(step).randbytes(20_000 + step)


def save_model_and_best(run, step):
    def save_model(folder):
        (folder / "config.json").write_text("{}")
        (folder / "weights").write_bytes(random_bytes(step))

    write_folder(run / "best", {"step": step}, save_model)
    save_checkpoint(run, {"step": step}, save_model, nn.Linear(9, 9).state_dict(), keep=2)  # AdamW: seconds to import


def save_for_ever(run, step, completed):
    with open(completed, "w") as file:
        for each in itertools.count(step):
            save_model_and_best(run, each)
            print(each, file=file, flush=True)


def save_killed_before_change(run, step, n):
    """Save one step; before the n-th change to the file system, counted from 0, the process kills itself."""
    changes = itertools.count()

    def hook(event, arguments):
        written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (written or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")) and next(changes) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save_model_and_best(run, step)


@contextmanager
def process(target, *arguments):
    """A process that has imported all it needs already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    started = context.Process(target=target, args=arguments)
    started.start()
    yield started
    started.kill()
    started.join()


def newest(run):
    """Steps of the newest checkpoint and of the best model; both have to be intact, and what was saved at that step."""
    folder = find_checkpoint("auto", run, silent)
    best = read_best(run, silent)["step"]
    assert (run / "best" / "weights").read_bytes() == random_bytes(best)
    assert (folder / "weights").read_bytes() == random_bytes(read_state(folder)["step"])
    load_optimizer(folder, nn.Linear(9, 9))
    return read_state(folder)["step"], best


def test_a_save_that_is_killed_at_any_time_leaves_the_last_or_the_one_before(tmp_path):
    run, completed, chance = tmp_path / "run", tmp_path / "completed", random.Random(0)
    save_model_and_best(run, 1)
    steps = [1]
    for _ in range(50):
        completed.write_text("")
        with process(save_for_ever, run, steps[-1] + 1, completed) as saving:
            while not completed.read_text() and saving.is_alive():
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.05))
        last = int(completed.read_text().split()[-1])
        step, best = newest(run)
        assert last <= step <= best <= last + 1
        assert len(step_folders(run)) <= 3  # two to keep, and one if the old one was about to go
        steps.append(step)
    assert len(set(steps)) == 51


def test_a_save_that_is_killed_before_any_change_to_the_disk_leaves_the_last_or_the_one_before(tmp_path):
    for step in (1, 2):  # as many as are kept: the next save deletes one
        save_model_and_best(tmp_path, step)
    before = []
    for n in itertools.count():
        with process(save_killed_before_change, tmp_path, step + 1, n) as saving:
            saving.join()
        before.append(step)
        last, (step, best) = step, newest(tmp_path)
        assert last <= step <= best <= last + 1
        if saving.exitcode == 0:
            break
        assert saving.exitcode == -signal.SIGKILL
    assert step == last + 1 and n > 20 and len(set(before)) > 3


def test_a_file_that_may_not_grow_leaves_the_last_checkpoint(tmp_path):
    """As a full disk does, by a limit that the system holds this process to."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises((OSError, RuntimeError)):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    assert find_checkpoint("auto", tmp_path, silent).name == "step_000001"
    save(tmp_path, 2)
    assert find_checkpoint("auto", tmp_path, silent).name == "step_000002"


def test_what_a_killed_save_left_is_tidied(tmp_path):
    write_folder(tmp_path / "best", 1, write("old"))
    shutil.copytree(tmp_path / "best", tmp_path / ".partial")
    (tmp_path / "best").rename(tmp_path / ".best.replaced")
    (tmp_path / ".mine").mkdir()
    for _ in range(2):
        tidy(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "best"]
    shutil.copytree(tmp_path / "best", tmp_path / ".best.replaced")
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "best"]


def test_a_checkpoint_that_was_about_to_be_replaced_is_found(tmp_path):
    save(tmp_path, 1)
    (folder,) = step_folders(tmp_path)
    folder.rename(folder.with_name(".step_000001.replaced"))
    assert find_checkpoint("auto", tmp_path, silent) == folder and names(tmp_path) == [folder.name]
