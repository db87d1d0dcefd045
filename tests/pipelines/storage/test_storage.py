"""Stores keep the few promises that the commit protocol rests upon, on disk and on S3, and under
faults.
"""

from __future__ import annotations

import hashlib
import io
import logging
import threading
from collections.abc import Callable

import pytest

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import StorageSection
from glm_batch.pipelines.storage.s3 import S3
from glm_batch.pipelines.storage.storage import Entry, Store, check_store, open_store
from tests.s3_faults import FAULTS, new_bucket, proxy


def test_what_is_written_is_read(store: Store) -> None:
    data = bytes(range(256)) * 5000
    store.write("parts/a", data)
    assert store.read("parts/a") == data
    assert store.size("parts/a") == len(data)
    store.write("parts/a", b"")
    assert (store.read("parts/a"), store.size("parts/a")) == (b"", 0)


def test_the_first_writer_wins(store: Store) -> None:
    assert store.create("parts/a", b"first")
    assert not store.create("parts/a", b"second")
    assert store.read("parts/a") == b"first"
    check_store(store)


def test_of_many_writers_at_once_one_wins(store: Store) -> None:
    won: list[int] = []
    ready = threading.Barrier(8)

    def write(number: int) -> None:
        ready.wait()
        if store.create("parts/a", f"{number}".encode()):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [f"{number}".encode() for number in won] == [store.read("parts/a")]


def test_absent_files(store: Store) -> None:
    assert store.size("parts/none") is None
    store.delete("parts/none")
    with pytest.raises(FileNotFoundError):
        store.read("parts/none")
    assert list(store.pages("nowhere")) == []


def test_listing_and_deletion(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm_batch.pipelines.storage.storage.PAGE", 2)
    monkeypatch.setattr("glm_batch.pipelines.storage.s3.PAGE_KEYS", 2)
    for number in range(5):
        store.write(f"parts/{number}", b"x" * number)
    store.write("plan.json", b"{}")
    pages = list(store.pages("parts"))
    assert max(map(len, pages)) <= 2
    assert sorted(entry.name for page in pages for entry in page) == [
        f"parts/{number}" for number in range(5)
    ]
    assert {entry.size for page in pages for entry in page} == set(range(5))
    root = [entry for page in store.pages() for entry in page if entry.name != "tmp"]
    assert sorted(root, key=lambda entry: entry.name) == [
        Entry(name="parts", size=None),
        Entry(name="plan.json", size=2),
    ]
    store.delete("parts/3")
    assert store.size("parts/3") is None


def test_a_store_without_conditional_writes_is_refused(s3_server: str) -> None:
    with proxy(s3_server, one_in=10**9, conditional=False) as careless:
        store = open_store(
            f"s3://{new_bucket(s3_server)}/out", StorageSection(endpoint_url=careless.url)
        )
        with pytest.raises(ConfigError, match="lets a second writer replace a file"):
            check_store(store)


def test_a_bucket_that_is_not_there_is_refused(s3_server: str) -> None:
    with pytest.raises(ConfigError, match="s3://no-such-bucket/out cannot be written"):
        check_store(open_store("s3://no-such-bucket/out", StorageSection(endpoint_url=s3_server)))


def test_another_kind_of_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="gs://bucket/out"):
        open_store("gs://bucket/out", StorageSection())


def test_without_credentials_the_remedy_is_told(
    s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    # a connection of its own
    monkeypatch.setattr("glm_batch.pipelines.storage.s3.READ_TIMEOUT_S", 59)
    storage = StorageSection(endpoint_url=s3_server + "/")
    with pytest.raises(
        PermissionError, match=r"no credentials; set AWS_ACCESS_KEY_ID and such, or storage\.anon"
    ):
        S3(storage).read("s3://bucket/key")
    with pytest.raises(FileNotFoundError):
        S3(StorageSection(endpoint_url=s3_server, anon=True)).read("s3://bucket/key")


def test_every_fault_is_survived_and_logged_with_its_reason(
    s3_server: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm_batch.pipelines.storage.s3.FIRST_PAUSE_S", 0.01)
    caplog.set_level(logging.WARNING, "glm_batch.pipelines.storage.s3")
    with proxy(s3_server, seed=3, one_in=3, stall_s=0.01) as faulty:
        s3, bucket = S3(StorageSection(endpoint_url=faulty.url)), new_bucket(s3_server)
        for number in range(40):
            data = hashlib.sha256(str(number).encode()).digest() * 40
            assert s3.create(f"s3://{bucket}/{number}", data)
            assert s3.read(f"s3://{bucket}/{number}") == data
            assert s3.read(f"s3://{bucket}/{number}", 5, 99) == data[5:99]
        assert set(faulty.faults) >= set(FAULTS)
    for reason in ("500 InternalError", "503 SlowDown", "try 1 of 8", "again in"):
        assert reason in caplog.text


def test_a_fault_that_stays_is_an_error_with_its_place(
    s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm_batch.pipelines.storage.s3.FIRST_PAUSE_S", 0.001)
    with proxy(s3_server, one_in=1, stall_s=0.01) as broken:
        monkeypatch.setattr(broken, "draw", lambda: "503")
        with pytest.raises(OSError, match="please wait"):
            S3(StorageSection(endpoint_url=broken.url)).read("s3://bucket/key")


@pytest.mark.parametrize("read_ahead", [1, 7, 1 << 20])
def test_an_object_reads_like_a_file(
    s3_server: str, read_ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm_batch.pipelines.storage.s3.READ_AHEAD_BYTES", read_ahead)
    data = bytes(range(100))
    s3, url = S3(StorageSection(endpoint_url=s3_server)), f"s3://{new_bucket(s3_server)}/a"
    s3.write(url, data)
    remote, plain = s3.open(url, len(data)), io.BytesIO(data)
    steps: list[Callable[[io.IOBase], object]] = [
        lambda file: file.read(3), lambda file: file.seek(-5, 2), lambda file: file.read(9), lambda file: file.read(1),
        lambda file: file.seek(10), lambda file: file.read(4), lambda file: file.seek(-2, 1), lambda file: file.read(3),
        lambda file: file.tell(), lambda file: file.read(),
    ]  # fmt: skip
    for step in steps:
        assert step(remote) == step(plain)


def test_a_copy_is_whole_and_outlives_what_it_was_made_of(store: Store) -> None:
    store.prepare(["a/parts", "b/parts", "tmp"])
    store.write("a/parts/x y+z%.parquet", b"some bytes")
    store.copy("a/parts/x y+z%.parquet", "b/parts/other.parquet")
    store.remove("a")
    assert store.read("b/parts/other.parquet") == b"some bytes"
    with pytest.raises(FileNotFoundError):
        store.copy("a/parts/x y+z%.parquet", "b/parts/third.parquet")
    assert store.size("b/parts/third.parquet") is None


def test_a_folder_goes_with_all_that_is_in_it_and_nothing_else(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is removed spans pages
    monkeypatch.setattr("glm_batch.pipelines.storage.s3.PAGE_KEYS", 4)
    store.prepare(["a/parts", "a/commits", "ab", "tmp"])
    names = [f"a/parts/{number}" for number in range(9)] + ["a/plan.json", "a/commits/1"]
    for name in [*names, "ab/stays", "a.json"]:
        store.write(name, b"x")
    store.remove("a")
    assert not any(store.size(name) for name in names)
    assert not any(store.pages("a"))
    assert (store.size("ab/stays"), store.size("a.json")) == (1, 1)
    store.remove("a")
