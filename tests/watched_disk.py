"""Every call that the disk code makes to the kernel, seen and steered by a test.

``watched(watcher)`` puts stand-ins for the modules ``os`` and ``fcntl`` and for ``fallocate`` and
``syncfs`` of the C library into all loaded modules of swarmcache, and a file system layer ("VFS")
of our own into SQLite. Each call comes to ``watcher.call`` with what would carry it out, so that a
watcher can count, record, alter or fail it. Outside of the ``with`` block nothing is changed.

SQLite's part is its documented interface for this (https://sqlite.org/vfs.html), spoken through
ctypes: a copy of the standard layer whose functions ask the watcher first.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import errno
import fcntl
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

from swarmcache import disk_calls

# What of module ``os`` goes to the kernel. ``close`` is not among them: the file systems that a
# cache can be on have nothing left to do in it, so it cannot fail.
OS_CALLS = {
    "chmod",
    "fchmod",
    "fstat",
    "fstatvfs",
    "fsync",
    "ftruncate",
    "getxattr",
    "link",
    "listdir",
    "lstat",
    "makedirs",
    "mkdir",
    "open",
    "preadv",
    "pread",
    "pwrite",
    "removexattr",
    "rename",
    "replace",
    "rmdir",
    "scandir",
    "setxattr",
    "stat",
    "statvfs",
    "truncate",
    "unlink",
    "utime",
    "fdatasync",
    "read",
    "readlink",
    "symlink",
    "write",
}
FCNTL_CALLS = {"flock", "fcntl"}
LIBC_CALLS = ("fallocate", "syncfs")

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]
Do = Callable[..., Any]

SQLITE_OK = 0
SQLITE_IOERR = 10


class Watcher(Protocol):
    """Decides what becomes of a call.

    ``name`` is that of the function in ``os``, ``fcntl`` or the C library, "read" for what a file
    object reads, or "sqlite_open", "sqlite_write" and so on. ``do`` carries the call out and takes
    the same arguments. Calls of SQLite return its result codes; their first argument is a path.
    """

    def call(self, name: str, arguments: Arguments, keywords: Keywords, do: Do) -> Any: ...


class _WatchedModule:
    """Stands in for a module; some of its functions go through the watcher."""

    def __init__(self, module: ModuleType, names: set[str], watcher: Watcher) -> None:
        self._module = module
        self._names = names
        self._watcher = watcher

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._module, name)
        if name not in self._names:
            return real
        return lambda *arguments, **keywords: self._watcher.call(name, arguments, keywords, real)

    def fdopen(self, fd: int, mode: str) -> io.BufferedReader:
        """Only of ``os``: a file object whose reads are seen."""
        assert mode == "rb", "what the disk code needs so far"
        return io.BufferedReader(_WatchedFile(fd, self._watcher))


class _WatchedFile(io.RawIOBase):
    def __init__(self, fd: int, watcher: Watcher) -> None:
        self._fd = fd
        self._watcher = watcher

    def fileno(self) -> int:
        return self._fd

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        def read(fd: int, size_bytes: int) -> bytes:
            return os.read(fd, size_bytes)

        data: bytes = self._watcher.call("read", (self._fd, len(buffer)), {}, read)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """All calls to the kernel of the disk code and of SQLite go through the watcher meanwhile."""
    stand_ins = {
        "os": (os, _WatchedModule(os, OS_CALLS, watcher)),
        "fcntl": (fcntl, _WatchedModule(fcntl, FCNTL_CALLS, watcher)),
    }
    modules = [each for name, each in sys.modules.items() if name.startswith("swarmcache.")]
    replaced: list[tuple[ModuleType, str, Any, Any]] = [
        (module, name, real, stand_in)
        for module in modules
        for name, (real, stand_in) in stand_ins.items()
        if vars(module).get(name) is real
    ]
    for name in LIBC_CALLS:
        real = vars(disk_calls)[f"_{name}"]
        replaced.append((disk_calls, f"_{name}", real, _of_libc(watcher, name, real)))
    real = disk_calls._syscall
    replaced.append((disk_calls, "_syscall", real, _of_openat2(watcher, real)))
    for module, name, _, stand_in in replaced:
        setattr(module, name, stand_in)
    try:
        with _watched_sqlite(watcher):
            yield
    finally:
        for module, name, real, _ in replaced:
            setattr(module, name, real)


def _of_libc(watcher: Watcher, name: str, real: Callable[..., int]) -> Callable[..., int]:
    """A function of the C library that tells of a failure by its result and ``errno``."""

    def do(*arguments: int) -> None:
        if real(*arguments) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def call(*arguments: int) -> int:
        try:
            watcher.call(name, arguments, {}, do)
        except OSError as error:
            ctypes.set_errno(error.errno or errno.EIO)
            return -1
        return 0

    return call


def _of_openat2(watcher: Watcher, real: Callable[..., int]) -> Callable[..., int]:
    """The only system call that the disk code makes by its number: another way to open."""

    def call(number: int, dir_fd: int, name: bytes, how: bytes, size_bytes: int) -> int:
        def do(path: bytes, flags: int, mode: int = 0, *, dir_fd: int) -> int:
            fd = real(number, dir_fd, path, how, size_bytes)
            if fd < 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            return fd

        flags, _, _ = disk_calls._HOW.unpack(how)
        try:
            fd: int = watcher.call("open", (name, flags), {"dir_fd": dir_fd}, do)
        except OSError as error:
            ctypes.set_errno(error.errno or errno.EIO)
            return -1
        return fd

    return call


# --- SQLite ---------------------------------------------------------------------------------------

_FILE, _PATH, _INT, _INT64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int64
# SQLite keeps the pointer to the path of a file that it opens, so it must be handed on as such.
_OPEN = ctypes.CFUNCTYPE(_INT, ctypes.c_void_p, ctypes.c_void_p, _FILE, _INT, ctypes.c_void_p)
_DELETE = ctypes.CFUNCTYPE(_INT, ctypes.c_void_p, _PATH, _INT)
_ACCESS = ctypes.CFUNCTYPE(_INT, ctypes.c_void_p, _PATH, _INT, ctypes.POINTER(_INT))
_CLOSE = ctypes.CFUNCTYPE(_INT, _FILE)
_MOVE = ctypes.CFUNCTYPE(_INT, _FILE, ctypes.c_void_p, _INT, _INT64)  # read and write
_TRUNCATE = ctypes.CFUNCTYPE(_INT, _FILE, _INT64)
_SYNC = ctypes.CFUNCTYPE(_INT, _FILE, _INT)
_SIZE = ctypes.CFUNCTYPE(_INT, _FILE, ctypes.POINTER(_INT64))
_SHM_MAP = ctypes.CFUNCTYPE(_INT, _FILE, _INT, _INT, _INT, ctypes.c_void_p)


class _Vfs(ctypes.Structure):
    """``sqlite3_vfs`` of sqlite3.h."""

    _fields_ = [
        ("version", _INT),
        ("file_size", _INT),
        ("path_max", _INT),
        ("next", ctypes.c_void_p),
        ("name", _PATH),
        ("app_data", ctypes.c_void_p),
        ("open", _OPEN),
        ("delete", _DELETE),
        ("access", _ACCESS),
        ("others", ctypes.c_void_p * 12),
    ]


class _Methods(ctypes.Structure):
    """``sqlite3_io_methods`` of sqlite3.h."""

    _fields_ = [
        ("version", _INT),
        ("close", _CLOSE),
        ("read", _MOVE),
        ("write", _MOVE),
        ("truncate", _TRUNCATE),
        ("sync", _SYNC),
        ("file_size", _SIZE),
        ("locks", ctypes.c_void_p * 3),
        ("control", ctypes.c_void_p),
        ("device", ctypes.c_void_p * 2),
        ("shm_map", _SHM_MAP),
        ("shm", ctypes.c_void_p * 3),
        ("fetch", ctypes.c_void_p * 2),
    ]


class _SqliteLayer:
    """A VFS that asks the watcher before it does what the standard one does.

    SQLite may keep pointers to its tables as long as the process lives, so it is made only once
    and gets another watcher for each test.
    """

    def __init__(self) -> None:
        # The library that Python's own module is linked with, not just any of that name.
        path = getattr(_sqlite3, "__file__", None)
        self._library = ctypes.CDLL(path)
        self._library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
        self.real = self._library.sqlite3_vfs_find(None)
        self.watcher: Watcher | None = None
        self.broken: list[BaseException] = []
        self._paths: dict[int, str] = {}
        self._methods: dict[int, tuple[_Methods, _Methods]] = {}
        self._vfs = _Vfs.from_buffer_copy(self.real.contents)
        self._vfs.next = None
        self._vfs.name = b"watched"
        self._vfs.open = _OPEN(self._open)
        self._vfs.delete = _DELETE(self._delete)
        self._vfs.access = _ACCESS(self._access)

    def install(self) -> None:
        self._library.sqlite3_vfs_register(ctypes.byref(self._vfs), 1)

    def remove(self) -> None:
        self._library.sqlite3_vfs_register(self.real, 1)
        self._library.sqlite3_vfs_unregister(ctypes.byref(self._vfs))

    def _call(self, name: str, arguments: tuple[Any, ...], do: Callable[[], int]) -> int:
        try:
            if self.watcher is None:
                return do()
            code = self.watcher.call("sqlite_" + name, arguments, {}, lambda *_: do())
            return int(code)
        except BaseException as error:
            self.broken.append(error)  # an exception cannot pass through SQLite
            return SQLITE_IOERR

    def _open(
        self, _vfs: int, path: int | None, file: int, flags: int, out_flags: int | None
    ) -> int:
        shown = os.fsdecode(ctypes.string_at(path)) if path else ""
        real = self.real.contents

        def do() -> int:
            code: int = real.open(ctypes.addressof(real), path, file, flags, out_flags)
            methods = ctypes.c_void_p.from_address(file)
            if code == SQLITE_OK and methods.value:
                methods.value = self._methods_for(methods.value)
                self._paths[file] = shown
            return code

        # SQLite looks at the methods of a file that could not be opened, too.
        ctypes.c_void_p.from_address(file).value = None
        return self._call("open", (shown, flags), do)

    def _delete(self, _vfs: int, path: bytes, sync_directory: int) -> int:
        real = self.real.contents
        return self._call(
            "delete",
            (os.fsdecode(path), sync_directory),
            lambda: int(real.delete(ctypes.addressof(real), path, sync_directory)),
        )

    def _access(self, _vfs: int, path: bytes, flags: int, out: Any) -> int:
        real = self.real.contents
        return self._call(
            "access",
            (os.fsdecode(path),),
            lambda: int(real.access(ctypes.addressof(real), path, flags, out)),
        )

    def _methods_for(self, address: int) -> int:
        """The address of a table like the one there, but for the functions that are watched."""
        if address not in self._methods:
            real = _Methods.from_address(address)
            ours = _Methods.from_buffer_copy(real)
            ours.close = _CLOSE(lambda file: self._close(real, file))
            ours.read = _MOVE(
                lambda file, at, size_bytes, offset: self._call(
                    "read",
                    (self._paths[file], offset),
                    lambda: int(real.read(file, at, size_bytes, offset)),
                )
            )
            ours.write = _MOVE(
                lambda file, at, size_bytes, offset: self._call(
                    "write",
                    (self._paths[file], offset, ctypes.string_at(at, size_bytes)),
                    lambda: int(real.write(file, at, size_bytes, offset)),
                )
            )
            ours.truncate = _TRUNCATE(
                lambda file, size_bytes: self._call(
                    "truncate",
                    (self._paths[file], size_bytes),
                    lambda: int(real.truncate(file, size_bytes)),
                )
            )
            ours.sync = _SYNC(
                lambda file, flags: self._call(
                    "sync", (self._paths[file],), lambda: int(real.sync(file, flags))
                )
            )
            ours.file_size = _SIZE(
                lambda file, out: self._call(
                    "file_size", (self._paths[file],), lambda: int(real.file_size(file, out))
                )
            )
            ours.shm_map = _SHM_MAP(
                lambda file, page, size_bytes, extend, out: self._call(
                    "shm_map",
                    (self._paths[file],),
                    lambda: int(real.shm_map(file, page, size_bytes, extend, out)),
                )
            )
            self._methods[address] = (real, ours)
        return ctypes.addressof(self._methods[address][1])

    def _close(self, real: _Methods, file: int) -> int:
        del self._paths[file]
        return int(real.close(file))


_layer: list[_SqliteLayer] = []


@contextmanager
def _watched_sqlite(watcher: Watcher) -> Iterator[None]:
    if not _layer:
        _layer.append(_SqliteLayer())
    layer = _layer[0]
    layer.watcher = watcher
    layer.install()
    try:
        yield
    finally:
        layer.remove()
        layer.watcher = None
        broken, layer.broken = layer.broken, []
    if broken:
        raise broken[0]
