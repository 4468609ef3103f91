"""Files behind URLs, on a real object-store server and a real web server: each name gives its own document."""

import functools
import http.server
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.registry import _import_class
from reader_support import FORMATS, TEXTS, jsonl, read_all, texts_of

import data_tools.readers.work_units
from data_tools.config import BuildConfig, SourceConfig
from data_tools.readers.by_format import read_slice
from data_tools.readers.find_files import find_files
from data_tools.readers.work_units import cut_into_units
from megagpt.errors import UserError

KEYS = [  # of objects whose text is their key
    *(
        "odd[1].jsonl",
        "odd1.jsonl",
        "wh?t.jsonl",
        "what.jsonl",
        "st*r.jsonl",
        "star.jsonl",
        "[!a].jsonl",
        "{a,b}.jsonl",
    ),
    *("a::b.jsonl", "a:b.jsonl", "a%20b.jsonl", "a b.jsonl", "a+b.jsonl", "a%2Bb.jsonl", "a#b.jsonl", "a&b=c.jsonl"),
    *("x//y.jsonl", "x/y.jsonl", "/lead.jsonl", "lead.jsonl", "dot/../x.jsonl", "./d.jsonl", "back\\slash.jsonl"),
    *(
        ".hid/a.jsonl",
        ".hid/.b.jsonl",
        "node_modules/a.jsonl",
        "end .jsonl",
        "~.jsonl",
        "$HOME.jsonl",
        "caf\u00e9.jsonl",
    ),
    *(
        "both",
        "both/in.jsonl",
        "dir[1]/a.jsonl",
        "dir1/a.jsonl",
        "zip://x.jsonl",
        "mark/in.jsonl",
        "/deep/a.jsonl",
        "deep/b.jsonl",
    ),
]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A real object-store server on this machine, and the environment that leads to it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        store = boto3.client("s3", endpoint_url=endpoint)
        store.create_bucket(Bucket="corpus")
        for name, content in FORMATS.items():
            store.put_object(Bucket="corpus", Key=f"{name.split('.')[0]}/{name}", Body=content(TEXTS))
        for key in KEYS:
            store.put_object(Bucket="corpus", Key=key, Body=jsonl([key]) if key != "both" else b"both")
        for marker in ("mark/", "only/"):
            store.put_object(Bucket="corpus", Key=marker, Body=b"")
        store.put_object(Bucket="corpus", Key="slash/full/", Body=b"text")
        store.put_object(Bucket="corpus", Key="version/a?versionId=1.txt", Body=b"text")
        store.put_object(Bucket="corpus", Key="tree/.git/x.py", Body=b"hidden")
        store.put_object(Bucket="corpus", Key="tree/b/x.py", Body=b"print('b')")
        store.put_object(Bucket="corpus", Key="tree/a.py", Body=b"print('a')")
        yield "s3://corpus"
    server.stop()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.csv", "a.parquet", "file.arrow"])
def test_an_object_store_gives_the_same_documents(name: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_tools.readers.work_units, "MIN_UNIT_BYTES", 500)
    assert texts_of(read_all(f"{bucket}/{name.split('.')[0]}/{name}")) == TEXTS


def test_an_object_stores_folders_and_globs(bucket: str) -> None:
    assert texts_of(read_all(f"{bucket}/tree")) == ["print('a')", "print('b')"]
    assert texts_of(read_all(f"{bucket}/tree/*.py")) == ["print('a')"]
    assert texts_of(read_all(f"{bucket}/tree", include=("x.*",))) == ["print('b')"]
    with pytest.raises(UserError, match="s3://corpus/nothing: there is no such file or folder"):
        list(read_all(f"{bucket}/nothing"))


def test_a_url_that_leads_nowhere_is_named(bucket: str) -> None:
    with pytest.raises(UserError, match=r"s3://no-such-bucket/a\.jsonl"):
        list(read_all("s3://no-such-bucket/a.jsonl"))
    with pytest.raises(UserError, match=r"foo://bar: Protocol not known"):
        list(read_all("foo://bar"))


@pytest.mark.parametrize("key", KEYS)
def test_each_key_gives_its_own_document(key: str, bucket: str) -> None:
    assert texts_of(read_all(f"{bucket}/{key}")) == [key]


FOLDERS = {
    "x": ["x//y.jsonl", "x/y.jsonl"],
    "both/": ["both/in.jsonl"],
    "mark": ["mark/in.jsonl"],
    "mark/": ["mark/in.jsonl"],
    "mark/**": ["mark/in.jsonl"],
    "mark*/**": ["mark/in.jsonl"],
    "mar*": ["mark/in.jsonl"],
    ".hid": [".hid/a.jsonl"],
    ".hid/*.jsonl": [".hid/a.jsonl"],
    ".hid/.*": [".hid/.b.jsonl"],
    "node_modules/*.jsonl": ["node_modules/a.jsonl"],
    "tree/*": ["print('a')"],
    "odd*": ["odd1.jsonl", "odd[1].jsonl"],
    "dir[1]/*.jsonl": ["dir[1]/a.jsonl"],
    "dir?/*.jsonl": ["dir1/a.jsonl"],
    "dir*": ["dir1/a.jsonl", "dir[1]/a.jsonl"],
}


@pytest.mark.parametrize("path", FOLDERS)
def test_a_folder_or_pattern_gives_what_is_below_it(path: str, bucket: str) -> None:
    assert texts_of(read_all(f"{bucket}/{path}")) == FOLDERS[path]


REFUSED = {
    "only/": r"there are no files to read in s3://corpus/only/",
    "odd1.jsonl/": r"odd1\.jsonl/: there is no such file or folder",
    "no[1": r"no\[1: there is no such file or folder",
    "slash": r"'s3://corpus/slash/full/' has a key that no URL can name; copy it to another key",
    "version": r"'s3://corpus/version/a\?versionId=1\.txt' has a key that no URL can name",
    "version/a?versionId=1.txt": r"cannot read s3://corpus/version/a\?versionId=1\.txt: ",
    "/deep/": r"s3://corpus//deep cannot be listed: the store answers with 'corpus/deep/",
}


@pytest.mark.parametrize("path", REFUSED)
def test_what_gives_no_document_of_its_own_gives_one_message(path: str, bucket: str) -> None:
    with pytest.raises(UserError, match=REFUSED[path]):
        list(read_all(f"{bucket}/{path}"))


def test_an_object_that_changes_after_it_was_found_is_refused(bucket: str) -> None:
    fs = fsspec.filesystem("s3")
    fs.pipe_file("corpus/changing.jsonl", jsonl(["old"]))
    source = SourceConfig(name="test", paths=(f"{bucket}/changing.jsonl",))
    [unit] = cut_into_units([("test", find_files(source))])
    fs.pipe_file("corpus/changing.jsonl", jsonl(["a longer one"]))
    with pytest.raises(UserError, match=r"changing\.jsonl has 34 bytes, and 25 when it was found; run the build again"):
        list(read_slice(unit.slices[0], source, strict=False))
    fs.rm_file("corpus/changing.jsonl")


def test_the_s3_client_is_no_old_one_that_fsspec_warns_of() -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        _import_class("s3fs.S3FileSystem")
    assert [str(warning.message) for warning in warned if "very old" in str(warning.message)] == []


class Pages(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and one address without a Content-Length."""

    def send_head(self) -> Any:
        if self.path != "/chunked":
            return super().send_head()
        self.send_response(200)
        return self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("site")
    for name in ("a.jsonl", "dir/b.jsonl", "dir/.hid/c.jsonl", "a b[1].jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(jsonl([name]))
    (folder / "page.html").write_text('<html><body><a href="a.jsonl">link</a><p>page</p></body></html>')
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Pages, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_web_address_gives_its_file_whatever_its_query(site: str) -> None:
    assert texts_of(read_all(f"{site}/a.jsonl")) == ["a.jsonl"]
    assert texts_of(read_all(f"{site}/a.jsonl?signature=a/b.txt")) == ["a.jsonl"]
    assert [source.name for source in BuildConfig().with_inputs([f"{site}/a.jsonl?signature=a/b.txt"])] == ["a.jsonl"]
    assert texts_of(read_all(f"{site}/a%20b%5B1%5D.jsonl")) == ["a b[1].jsonl"]
    assert texts_of(read_all(f"{site}/dir/")) == texts_of(read_all(f"{site}/dir")) == ["dir/b.jsonl"]
    assert texts_of(read_all(f"simplecache::{site}/a.jsonl")) == ["a.jsonl"]
    assert "page" in "".join(texts_of(read_all(f"{site}/page.html")))
    with pytest.raises(UserError, match=r"chunked does not tell its size; download it and give the file"):
        list(read_all(f"{site}/chunked"))
    with pytest.raises(UserError, match=r"none\.jsonl: there is no such file or folder"):
        list(read_all(f"{site}/none.jsonl"))
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:1/a\.jsonl cannot be reached: Cannot connect"):
        list(read_all("http://127.0.0.1:1/a.jsonl"))


def test_the_members_of_an_archive_are_read_in_their_format(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        for name in ("a.jsonl", "dir/b.jsonl"):
            packed.writestr(name, jsonl([name]))
    assert texts_of(read_all(f"zip://a.jsonl::{tmp_path}/x.zip")) == ["a.jsonl"]
    assert texts_of(read_all(f"zip://*.jsonl::{tmp_path}/x.zip")) == ["a.jsonl"]
    assert texts_of(read_all(f"zip://dir::{tmp_path}/x.zip")) == ["dir/b.jsonl"]
    with pytest.raises(UserError, match=r"cannot read zip://a\.jsonl::/none\.zip: .*No such file"):
        list(read_all("zip://a.jsonl::/none.zip"))


@pytest.mark.parametrize("url", ["github://x", "reference://x", "s3://", "ftp://127.0.0.1:1/a.jsonl"])
def test_a_url_that_cannot_be_used_is_named(url: str, bucket: str) -> None:
    with pytest.raises(UserError, match=f"{url}: "):
        list(read_all(url))
