"""Training on shards behind a URL is training on the same data."""

from pathlib import Path

from longtake.train.run_folder import read_marker
from tests.data.http_store import serve
from tests.train.tiny_runs import losses, options, train_here, write_splits


def test_a_run_on_http_shards_equals_one_on_local_shards(tmp_path: Path) -> None:
    write_splits(tmp_path / "data", 24, 8)
    more = ("train.steps=6", "train.val_every=3", f"data.cache.folder={tmp_path / 'cache'}")
    local, remote = tmp_path / "local", tmp_path / "remote"
    assert train_here(options(tmp_path / "data", local, *more)) == 0
    with serve(tmp_path / "data") as store:
        urls = [f"data.{name}.0.path={store.url}/{name}" for name in ("train", "val")]
        words = options(tmp_path / "data", remote, *more, *urls, "data.num_workers=2")
        assert train_here(words) == 0
        assert sum(store.sent.values()) > 10_000
    assert read_marker(remote) == "FINISHED"
    for name in ("data_hash", "loss", "val/loss"):
        assert losses(remote, name) == losses(local, name), name
