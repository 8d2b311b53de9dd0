"""What can go wrong, and whose fault it is.

Three families: the caller's (``UsageError`` and below), another process's or machine's
(``RemoteError``), this machine's (``LocalError``). Bugs of our own are assertions.
"""

from __future__ import annotations


class SwarmcacheError(Exception):
    """Base of everything that swarmcache raises on purpose. ``str()`` is fit for a user."""


class UsageError(SwarmcacheError):
    """The caller asked for something that makes no sense; the message says what was expected."""


class ConfigError(UsageError):
    """A setting is unknown or out of range; names file, key and what was expected."""


class SourceUnreadable(UsageError):
    """The source does not exist, is no regular file, or may not be read by the caller."""


class RemoteError(SwarmcacheError):
    """Another process broke the protocol or went away."""


class AuthenticationFailed(RemoteError):
    """The other side does not know the cluster's secret."""


class BadMessage(RemoteError):
    """The other side sent something that is no message of ours."""


class PeerUnavailable(RemoteError):
    """The peer cannot be reached, stalled, or closed the connection."""


class PeerHangs(PeerUnavailable):
    """The other side takes connections and says nothing on them."""


class PeerBusy(RemoteError):
    """The peer has no upload slot left for us just now."""


class ChunkAbsent(RemoteError):
    """The peer does not have the chunk (any more)."""


class ChunkCorrupt(RemoteError):
    """The bytes that a peer delivered do not have the digest that the peer announced."""


class DaemonUnavailable(RemoteError):
    """No daemon answers on the local socket."""


class NoDescriptor(DaemonUnavailable):
    """This process may open no more files, so it cannot connect to the daemon."""


class DaemonRefused(RemoteError):
    """The daemon does not do what it was asked; the message says why."""


class LocalError(SwarmcacheError):
    """This machine cannot do it."""


class NoSpace(LocalError):
    """The cache's disk has no room for the file within the limits set."""


class DiskFailed(LocalError):
    """The disk of a cache directory fails, cannot be written, or is no longer mounted."""


class DirectoryUnusable(LocalError):
    """A directory of ours has the wrong owner, mode or type; the message says what to do."""


class CacheDirUnusable(DirectoryUnusable):
    """Something is wrong with, or in the way in, the cache directory; says what to do."""


class NoThread(LocalError):
    """The system lets this process have no more threads just now."""


class NotCached(LocalError):
    """There is no verified copy on this node, and the caller wants nothing else; says why."""


class SourceChanged(LocalError):
    """The source file is no longer the file version that was asked for."""


class SourceFailed(LocalError):
    """Reading the source failed (I/O error on the file server, stale handle)."""


class CopyFailed(LocalError):
    """A file could not be copied to its destination, which is as it was."""


class LeaseExpired(LocalError):
    """The lease ran out by this node's own clock before the range was read."""
