"""What replicas and forget do once their options are known."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from swarmcache import answer_stream
from swarmcache.client import Client
from swarmcache.display import size_text
from swarmcache.get import say
from swarmcache.listing import JsonArray, duration_text, path_fields, printing, shown_path
from swarmcache.local_protocol import (
    NODES_MAX,
    AboutNodes,
    ForgetOn,
    NodeForgot,
    NodeReplicas,
    NodeSilent,
    ReplicasOn,
    decode_node_answer,
    encode_request,
)

EXIT_NOT_ALL = 1
# Of one answer: a page of 256 replicas with the longest possible paths.
ANSWER_BYTES_MAX = 4 << 20
NodeAnswer = NodeReplicas | NodeForgot | NodeSilent


@dataclass(slots=True)
class File:
    """A file version in the caches of some nodes. ``idle_s``: since its last use on any of them."""

    size_bytes: int
    idle_s: float
    path: bytes = b""
    nodes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Given:
    """What a node has given up so far."""

    dropped: int = 0
    dropped_bytes: int = 0
    kept: int = 0


class Nodes:
    """All nodes that are alive, as they or the tracker say, and what there is to complain of on
    stderr."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.exit_code = 0
        status = client.status()
        self.own: str = status["node"]["address"]
        self.names = {self.own: str(status["node"].get("name") or self.own)}
        cluster, members = status.get("cluster"), status.get("members") or []
        alive = [each for each in members if each["state"] in ("alive", "suspect")]
        for each in [*alive, *(cluster or {}).get("nodes", [])]:
            self.names.setdefault(each["node"], str(each.get("name") or each["node"]))
        if cluster is None and len(self.names) == 1:
            self.complain(f"only this node can be asked: {status.get('reason')}")
        if len(set(self.names.values())) < len(self.names):
            self.names = {node: node for node in self.names}

    def complain(self, text: str) -> None:
        self.exit_code = EXIT_NOT_ALL
        say(text)

    def ask(self, request: AboutNodes, nodes: Sequence[str] | None = None) -> Iterator[NodeAnswer]:
        """What these nodes (by default all) answer; those that do not are named on stderr.

        Raises DaemonUnavailable, DaemonRefused, BadMessage.
        """
        asked = list(self.names) if nodes is None else list(nodes)
        for start in range(0, len(asked), NODES_MAX):
            request.nodes = asked[start : start + NODES_MAX]
            answers: Iterator[NodeAnswer] = answer_stream.ask(
                self._client, encode_request(request), decode_node_answer, ANSWER_BYTES_MAX
            )
            for answer in answers:
                if isinstance(answer, NodeSilent):
                    self.complain(f"{self.names[answer.node]} cannot be asked: {answer.reason}")
                else:
                    yield answer


def show_replicas(client: Client, paths: list[bytes], *, as_json: bool) -> int:
    """List the files in all caches on stdout and return the exit code."""
    nodes = Nodes(client)
    files: dict[str, File] = {}
    for answer in nodes.ask(ReplicasOn(paths=paths)):
        if isinstance(answer, NodeReplicas):
            for each in answer.replicas:
                file = files.setdefault(each.version_id, File(each.size_bytes, each.idle_s))
                file.idle_s = min(file.idle_s, each.idle_s)
                file.path = file.path or each.path
                file.nodes.append(nodes.names[answer.node])
    # By path, those without one at the end.
    order = sorted(files.items(), key=lambda item: (not item[1].path, item[1].path, item[0]))
    with printing(), ExitStack() as stack:
        array = stack.enter_context(JsonArray()) if as_json else None
        for number, (version_id, file) in enumerate(order):
            if array is not None:
                array.add(
                    {
                        "version_id": version_id,
                        **(path_fields("path", file.path) if file.path else {"path": None}),
                        "size_bytes": file.size_bytes,
                        "idle_s": file.idle_s,
                        "nodes": sorted(file.nodes),
                    }
                )
                continue
            if number == 0:
                print(_row("size", "replicas", "used", "file"))
            shown = shown_path(file.path) if file.path else version_id
            used = duration_text(file.idle_s)
            print(_row(size_text(file.size_bytes), str(len(file.nodes)), used, shown))
    return nodes.exit_code


def _row(size: str, replicas: str, used: str, name: str) -> str:
    return f"{size:>10}  {replicas:>8}  {used:>5}  {name}"


def forget_replicas(
    client: Client, paths: list[bytes], unused_s: float | None, *, as_json: bool
) -> int:
    """Have all nodes give files up, tell of each node on stdout, and return the exit code."""
    nodes = Nodes(client)
    known: dict[str, bytes] = {}  # the paths of what this node has, which others cannot name
    for answer in nodes.ask(ReplicasOn(paths=paths), [nodes.own]):
        if isinstance(answer, NodeReplicas):
            known |= {each.version_id: each.path for each in answer.replicas}
    given = {node: Given() for node in nodes.names}
    for answer in nodes.ask(ForgetOn(paths=paths, unused_s=unused_s)):
        if isinstance(answer, NodeForgot):
            node = given[answer.node]
            node.dropped += answer.dropped
            node.dropped_bytes += answer.dropped_bytes
            node.kept += len(answer.kept)
            for kept in answer.kept:
                path = kept.path or known.get(kept.version_id, b"")
                shown = repr(os.fsdecode(path)) if path else kept.version_id
                nodes.complain(f"{nodes.names[answer.node]}: {shown} stays: {kept.why}")
    with printing(), ExitStack() as stack:
        array = stack.enter_context(JsonArray()) if as_json else None
        for name, node in sorted((nodes.names[each], node) for each, node in given.items()):
            if array is not None:
                counts = {"dropped": node.dropped, "dropped_bytes": node.dropped_bytes}
                array.add({"node": name, **counts, "kept": node.kept})
            elif node.dropped or node.kept:
                size = size_text(node.dropped_bytes)
                print(f"{name}: {node.dropped} files dropped, {size}; {node.kept} stay")
    return nodes.exit_code
