"""What a server opens besides its own port: only on this machine, and to nobody without Ray's
token.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

import grpc
import httpx
import psutil
import pytest

from tests.glm_actors.serving.conftest import Server

# One method of each service that could run or tell anything, by the process that offers it.
METHODS = {
    "gcs_server": [
        "ray.rpc.InternalKVGcsService/InternalKVKeys",
        "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    ],
    "raylet": ["ray.rpc.NodeManagerService/GetNodeStats"],
    "-m glm_batch.jobs serve": ["ray.rpc.CoreWorkerService/PushTask"],
    "ray::ServeController": ["ray.rpc.CoreWorkerService/PushTask"],
    "ray::ServeReplica": [
        "ray.rpc.CoreWorkerService/PushTask",
        "ray.serve.ASGIService/HandleRequest",
    ],
    "ray::DashboardAgent": ["ray.rpc.ReporterService/GetTraceback"],
}


def listeners(server: Server) -> Iterator[tuple[str, str, int]]:
    """(command line, address, port) of every listening socket of the server's processes."""
    root = psutil.Process(server.process.pid)
    for process in [root, *root.children(recursive=True)]:
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                yield " ".join(process.cmdline()), connection.laddr.ip, connection.laddr.port


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def test_every_socket_listens_on_loopback(server: Server) -> None:
    found = list(listeners(server))
    assert len(found) > 10
    assert [each for each in found if not is_loopback(each[1])] == []


def answers(port: int, method: str, headers: list[tuple[str, str]]) -> grpc.StatusCode:
    with (
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.unary_unary(f"/{method}")(b"", metadata=headers, timeout=20.0)
    code: grpc.StatusCode = caught.value.code()
    return code


@pytest.mark.parametrize("headers", [[], [("authorization", "Bearer " + "0" * 64)]])
def test_ray_refuses_who_has_not_its_token(server: Server, headers: list[tuple[str, str]]) -> None:
    """A process has several ports, of which one offers the service."""
    codes: dict[str, set[grpc.StatusCode]] = {
        method: set() for methods in METHODS.values() for method in methods
    }
    for command, _, port in listeners(server):
        # ranks have sockets besides that answer nothing
        if f":{port}" in server.url or "two-ranks" in command:
            continue
        methods = next((known for part, known in METHODS.items() if part in command), [])
        for method in methods:
            codes[method].add(answers(port, method, headers))
    unreachable = {
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
    assert {method: found - unreachable for method, found in codes.items()} == {
        method: {grpc.StatusCode.UNAUTHENTICATED} for method in codes
    }


def test_rays_http_refuses_too(server: Server) -> None:
    ports = [port for command, _, port in listeners(server) if "RuntimeEnvAgent" in command]
    assert ports
    for port in ports:
        assert (
            httpx.post(
                f"http://127.0.0.1:{port}/get_or_create_runtime_env", timeout=20.0
            ).status_code
            == 401
        )
    # ours: Ray's HTTP proxy is not there
    assert httpx.get(f"{server.url}/-/routes", timeout=20.0).status_code == 401
