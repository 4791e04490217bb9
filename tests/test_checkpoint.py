import json

import pytest
import torch
from torch import nn

from grpo.checkpoint import find_checkpoint, load_optimizer, read_state, save_checkpoint, step_folders, write_folder


def write(text):
    return lambda folder: (folder / "file").write_text(text)


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "runs" / "best"
    write_folder(folder, lambda new: [write("old")(new), (new / "more").write_text("")])
    write_folder(folder, write("new"))
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("file", "new")]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_folder_whole(tmp_path, error):
    folder = tmp_path / "best"
    write_folder(folder, write("old"))

    def fill(new):
        write("half")(new)
        raise error

    with pytest.raises(type(error)):
        write_folder(folder, fill)
    assert [path.read_text() for path in folder.iterdir()] == ["old"]
    write_folder(folder, write("new"))
    assert [path.read_text() for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


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


def test_the_newest_checkpoints_are_kept(tmp_path):
    for step in (9, 10, 100, 11):
        save(tmp_path, step)
    assert [folder.name for folder in step_folders(tmp_path)] == ["step_000011", "step_000100"]
    save(tmp_path, 101, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000101"]


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
    assert find_checkpoint(None, tmp_path) is None
    assert find_checkpoint("auto", tmp_path) is None
    assert find_checkpoint("auto", tmp_path / "nowhere") is None
    for step in (1, 2):
        save(tmp_path, step)
    first, second = step_folders(tmp_path)
    assert find_checkpoint("auto", tmp_path) == second
    assert find_checkpoint(str(first), tmp_path / "another run") == first
    assert find_checkpoint(None, tmp_path) is None


def test_auto_passes_over_a_folder_that_is_not_whole(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step_000002").mkdir()
    assert find_checkpoint("auto", tmp_path).name == "step_000001"


@pytest.mark.parametrize("missing", ["state.json", "optimizer.pt", "config.json"])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, missing):
    save(tmp_path, 1)
    (folder,) = step_folders(tmp_path)
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"--resume {folder}.*{missing}"):
        find_checkpoint(str(folder), tmp_path)
    with pytest.raises(ValueError, match="--resume nowhere"):
        find_checkpoint("nowhere", tmp_path)


def test_state_is_json(tmp_path):
    save(tmp_path, 7)
    assert json.loads((tmp_path / "checkpoints" / "step_000007" / "state.json").read_text())["step"] == 7
