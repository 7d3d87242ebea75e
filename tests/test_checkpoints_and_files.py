"""Files are whole or not there, whatever happens while they are written."""

import hashlib
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, copy_of_state, differing, tiny_network

from advbn_lib.checkpoints import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from advbn_lib.files import atomic_write, sha256


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"first", b"second"):
        with atomic_write(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    assert listing(path.parent) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_old_file_is_there_until_the_block_ends(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new" * 100_000)
        file.flush()
        assert path.read_bytes() == b"old"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_old_file_is_as_it_was_and_nothing_is_left_behind(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and listing(tmp_path) == ["file"]


def test_a_file_may_have_the_longest_name_there_is(tmp_path):
    path = tmp_path / ("a" * 250 + ".json")
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and listing(tmp_path) == [path.name]


def test_sha256_is_hashlibs(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 1000)
    assert sha256(path) == hashlib.sha256(b"abc" * 1000).hexdigest()


def python(program: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from advbn_lib import records
from advbn_lib.checkpoints import save_checkpoint

def write(what, folder, size):
    if what == "checkpoint":
        save_checkpoint(folder / "file", {"layer": torch.nn.Linear(size, size)}, {}, "key")
    else:
        records.write(records.Record("file", "smoke", 0, "key", {}, {"much": [0.5] * size}, *[{}] * 7, ""), folder)

what, folder = sys.argv[1], Path(sys.argv[2])
write(what, folder, 2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
try:
    write(what, folder, 20_000 if what == "record" else 300)
except OSError as error:
    print("OSError", error)
after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
assert len(before) == 1 and before == after, sorted(map(str, after))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of the file size are POSIX")
@pytest.mark.parametrize("what", ["checkpoint", "record"])
def test_on_a_full_disk_the_old_file_survives_and_the_error_is_plain(what, tmp_path):
    done = python(FULL_DISK, what, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OSError") and "File too large" in done.stdout


KILLED = """
import os, signal, sys
from pathlib import Path
from advbn_lib.files import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_killed_while_writing_the_old_file_survives(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    assert python(KILLED, path).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def parts() -> dict:
    model = tiny_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 3, 12, 12)).square().sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def test_a_checkpoint_restores_parts_random_state_and_progress(tmp_path):
    path, saved = tmp_path / "file.pt", parts()
    save_checkpoint(path, saved, {"epoch": 3, "losses": [[0.5, 1.5]]}, "key")
    expected = torch.rand(5)
    fresh = parts()
    assert load_checkpoint(path, fresh, "key") == {"epoch": 3, "losses": [[0.5, 1.5]]}
    assert torch.equal(torch.rand(5), expected)
    assert differing(copy_of_state(saved["model"]), copy_of_state(fresh["model"])) == []
    momentum = [state["momentum_buffer"] for state in fresh["optimizer"].state.values()]
    assert all(torch.equal(a, b["momentum_buffer"]) for a, b in zip(momentum, saved["optimizer"].state.values()))
    assert listing(tmp_path) == ["file.pt"]


def test_another_key_is_refused_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "file.pt"
    save_checkpoint(path, parts(), {}, "key")
    fresh, random_state = parts(), torch.get_rng_state()
    before = copy_of_state(fresh["model"])
    with pytest.raises(CheckpointError, match=f"{path} belongs to another run"):
        load_checkpoint(path, fresh, "other")
    assert differing(before, copy_of_state(fresh["model"])) == [] and torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("share", [0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path, share):
    path = tmp_path / "file.pt"
    save_checkpoint(path, parts(), {}, "key")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=f"{path} is damaged.*remove it"):
        read_checkpoint(path)


def test_a_flipped_bit_is_noticed_or_harmless(tmp_path):
    """Some bytes may be read by nobody; what is loaded must be what was saved."""
    path, saved = tmp_path / "file.pt", parts()
    save_checkpoint(path, {"model": saved["model"]}, {"epoch": 3}, "key")
    content, state = path.read_bytes(), copy_of_state(saved["model"])
    draws, noticed = random.Random(0), 0
    for i in range(200):
        altered = bytearray(content)
        first = 0 if i % 2 else len(content) - 3000  # an archive's table of contents is at its end
        altered[draws.randrange(first, len(content))] ^= 1 << draws.randrange(8)
        path.write_bytes(altered)
        try:
            read = read_checkpoint(path)
        except CheckpointError:
            noticed += 1
        else:
            assert differing(read["parts"]["model"], state) == []
            assert (read["progress"], read["key"]) == ({"epoch": 3}, "key")
    assert noticed > 100


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)], ids=["empty", "text", "zip"]
)
def test_something_else_is_refused(tmp_path, content):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path} is damaged.*remove it"):
        read_checkpoint(path)


def test_a_tensor_alone_is_no_checkpoint(tmp_path):
    torch.save(torch.ones(3), tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="file.pt"):
        read_checkpoint(tmp_path / "file.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    save_checkpoint(tmp_path / "file.pt", {}, {"evil": Evil()}, "key")
    with pytest.raises(CheckpointError, match="file.pt"):
        read_checkpoint(tmp_path / "file.pt")
    assert not (tmp_path / "touched").exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint.*nothing.pt"):
        read_checkpoint(tmp_path / "nothing.pt")
